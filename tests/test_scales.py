"""No constant with a unit: a log and the same log times a constant give the same policy.

Multiplying by a power of two changes no digit of a floating-point number, so there every bit must
agree, through any number of steps: a constant with a unit shows in the first that it touches. Other
factors round each number once more, 6e-8 of it; Adam's first steps have the size of the learning
rate whatever the gradient's, so that a handful of steps is compared, to a thousandth of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from safe_offrl.assess.assessment import assess_policy
from safe_offrl.assess.fitted_features import FittedConfig, _spread
from safe_offrl.check.inspect import principal_components, summarise
from safe_offrl.collect.behaviours import random_behaviour
from safe_offrl.collect.build import default_dataset
from safe_offrl.collect.mixture import log_episodes
from safe_offrl.collect.penalty import EPISODES_PER_STEP, Account
from safe_offrl.data.dataset import TUNED_RETURN_SIZE, Dataset
from safe_offrl.data_formats.complete import complete
from safe_offrl.data_formats.loading import assemble, load_dataset
from safe_offrl.data_formats.memory_map import write_memory_map
from safe_offrl.data_formats.validation import validate_arrays
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.errors import DataError
from safe_offrl.policies.networks import NetworkConfig
from safe_offrl.safety.critic import SafetyCriticConfig
from safe_offrl.spec import SafetySpec
from safe_offrl.train.baselines import BaselineConfig
from safe_offrl.train.finetune import Finetuning
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.train.iteration import Iteration
from safe_offrl.train.pretrain import Pretraining
from safe_offrl.train.pretrain_config import PretrainConfig
from safe_offrl.types import Episode
from tests.agents.setups import agents_for
from tests.slope import HORIZON, Slope

EXACT = (2.0**-30, 2.0**30)  # 9.3e-10 and 1.1e9
ROUNDED = (1e-8, 1e-4, 1e4, 1e8)
SCALES = (*EXACT, *ROUNDED)
UNITS = ("observations", "rewards", "costs", "actions")
VERDICTS = ("accidents", "episode_behaviours")
NETWORKS = NetworkConfig((16,), (16,), 3)
CRITIC = SafetyCriticConfig(members=3, reference=1, hidden=(16,))
LEARNING_RATE = 3e-4  # of every network here


def spec_of(constraint: str, costs: float = 1.0) -> SafetySpec:
    """The limits of Slope in its unit of costs."""
    return SafetySpec(
        horizon=HORIZON,
        constraint=constraint,
        cost_threshold=0.305 * costs,  # between two costs: rounding decides no tie
        cost_limit=1.5 * costs,
    )


def slope(constraint: str, **units: Any) -> AccidentEnv:
    return AccidentEnv(Slope(**units), spec_of(constraint, units.get("costs", 1.0)))


@pytest.fixture(scope="module")
def arrays() -> dict[str, NDArray[Any]]:
    """A log of Slope in units of 1."""
    behaviours = [random_behaviour(1)]
    env = slope("accident")
    return log_episodes(env, behaviours=behaviours, shares=[1.0], transitions=1200, seed=0)


def scaled(arrays: Mapping[str, NDArray[Any]], **units: float) -> dict[str, NDArray[Any]]:
    """The same log in other units."""
    factors = {key: units.get(key, 1.0) for key in UNITS}
    factors["next_observations"] = factors["observations"]
    return {
        key: array if key not in factors else array.astype(np.float64) * factors[key]
        for key, array in arrays.items()
    }


def dataset_of(
    arrays: Mapping[str, NDArray[Any]], constraint: str = "accident", **units: float
) -> Dataset:
    """The log as a file of float32 in these units would be loaded; accidents from the costs."""
    stored = scaled(arrays, **units)
    kinds = {"observations": "f4", "next_observations": "f4", "rewards": "f4", "costs": "f4"}
    stored = {k: v.astype(kinds.get(k, v.dtype)) for k, v in stored.items() if k not in VERDICTS}
    bound = units.get("actions", 1.0)
    raw = complete(stored, {"action_low": -bound, "action_high": bound})
    validate_arrays(raw.arrays)
    spec = spec_of(constraint, units.get("costs", 1.0))
    return assemble(raw, discount=0.99, spec=spec)


def pretrained(
    data: Dataset, constraint: str, costs: float = 1.0, steps: int = 4, agent: str = "iql"
) -> Pretraining:
    config = PretrainConfig(
        agent=agent,
        steps=steps,
        alignment_steps=steps,
        batch_size=64,
        log_every=2 * steps,
        networks=NETWORKS,
        critic=CRITIC,
        safety=spec_of(constraint, costs),
    )
    loop = Pretraining(config, data)
    list(loop.run())
    return loop


def same(one: torch.Tensor, other: torch.Tensor, scale: float, steps: int) -> bool:
    """Whether two networks' parameters agree, see the module's docstring."""
    if scale in EXACT:
        return torch.equal(one, other)
    return bool((one - other).abs().max() < 1e-3 * steps * LEARNING_RATE)


def learnt(loop: Pretraining | Finetuning, parts: tuple[str, ...]) -> torch.Tensor:
    """All parameters of these parts of a loop, one vector."""
    state = loop.state_dict()
    found = [v.flatten() for k, v in state.items() if k.startswith(parts)]
    assert found
    return torch.cat(found)


OFFLINE = ("learner.actor/", "learner.critics/", "safety_critic/", "multiplier")


# --- the property -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("constraint", ["accident", "cost"])
def test_the_same_policy_is_pretrained_in_every_unit(
    arrays: dict[str, NDArray[Any]], constraint: str, unit: str, scale: float
) -> None:
    units = {unit: scale}
    costs = units.get("costs", 1.0)
    one = pretrained(dataset_of(arrays, constraint), constraint)
    other = pretrained(dataset_of(arrays, constraint, **units), constraint, costs)
    assert same(learnt(one, OFFLINE), learnt(other, OFFLINE), scale, 8)
    seen = one.train.transitions.observations, other.train.transitions.observations
    with torch.no_grad():
        mine, theirs = (
            loop.networks.actor(x).act(torch.zeros(1))
            for loop, x in zip((one, other), seen, strict=True)
        )
    assert torch.allclose(mine, theirs, rtol=0.0, atol=0.0 if scale in EXACT else 1e-4)
    shares = [loop.foundation.limits[0].share for loop in (one, other)]
    assert shares[0] == pytest.approx(shares[1], rel=1e-6)
    assert other.estimate().value == pytest.approx(one.estimate().value, rel=1e-3)


@pytest.mark.parametrize("agent", agents_for(discrete=False))
@pytest.mark.parametrize("scale", EXACT)
def test_every_agent_learns_the_same_to_the_bit(
    arrays: dict[str, NDArray[Any]], agent: str, scale: float
) -> None:
    units = {"observations": scale, "rewards": 1.0 / scale, "costs": scale, "actions": scale}
    one = pretrained(dataset_of(arrays, "cost"), "cost", 1.0, 20, agent)
    other = pretrained(dataset_of(arrays, "cost", **units), "cost", scale, 20, agent)
    assert torch.equal(learnt(one, OFFLINE), learnt(other, OFFLINE))


OFF: dict[str, Any] = {"kl": False, "shield": False, "guard": False}
BASELINES: dict[str, dict[str, Any]] = {
    "ours": {},
    "iql": {"baseline": BaselineConfig(learner="iql")},
    "calql": {"baseline": BaselineConfig(learner="calql")},
    "rlpd": {"baseline": BaselineConfig(from_scratch=True), "safety_constraint": False, **OFF},
    "pid": {"baseline": BaselineConfig(multiplier="pid"), **OFF},
}


@pytest.mark.parametrize("baseline", list(BASELINES))
@pytest.mark.parametrize("scale", [*EXACT, 1e-8, 1e8])
def test_the_same_is_learnt_online_in_every_unit(
    arrays: dict[str, NDArray[Any]], baseline: str, scale: float
) -> None:
    """Ledger, decisions and networks, in an environment of these units."""
    units = {"observations": scale, "rewards": 1.0 / scale, "costs": scale, "actions": scale}
    exact = scale in EXACT
    found = []
    for given in ({}, units):
        costs = given.get("costs", 1.0)
        data = dataset_of(arrays, "cost", **given)
        loop = pretrained(data, "cost", costs)
        config = FinetuneConfig(
            budget=80,
            warmup_steps=20,
            iteration_steps=20,
            update_every=20,
            utd=1,
            batch_size=64,
            networks=NETWORKS,
            critic=CRITIC,
            safety=spec_of("cost", costs),
            **BASELINES[baseline],
        )
        tensors, info = loop.state_dict(), loop.info()
        tuning = Finetuning(config, slope("cost", **given), data, tensors, info)
        events = list(tuning.run())
        episodes = [e for e in events if isinstance(e, Episode)]
        returns = [e.episode_return / given.get("rewards", 1.0) for e in episodes]
        totals = [e.cost / costs for e in episodes]
        decisions = [e.accepted for e in events if isinstance(e, Iteration)]
        found.append((tuning, returns, totals, decisions))
    (one, returns, totals, decisions), (other, their_returns, their_totals, theirs) = found
    # What people are told is in the environment's unit.
    tolerance = 0.0 if exact else 1e-3
    assert np.allclose(returns, their_returns, rtol=tolerance, atol=0.1 * tolerance)
    assert np.allclose(totals, their_totals, rtol=tolerance, atol=0.1 * tolerance)
    assert decisions == theirs
    parts = ("learner.actor/", "learner.critics/", "safety_critic/")
    assert same(learnt(one, parts), learnt(other, parts), scale, 16)
    rows = one.experience.buffer.rows, other.experience.buffer.rows
    mine, others = (one.experience.dataset.layout.unpack(x) for x in rows)
    assert torch.allclose(mine.rewards, others.rewards, rtol=tolerance, atol=tolerance)


# --- what the scales are ----------------------------------------------------------------------


def with_rewards(data: Dataset, rewards: list[float], discount: float = 0.5) -> Dataset:
    """The first transitions of a log, one episode, with these rewards."""
    n = len(rewards)
    returns = [
        math.fsum(discount**k * r for k, r in enumerate(rewards[first:])) for first in range(n)
    ]
    batch = data.transitions
    first = type(batch)(*(field[:n] for field in batch.tensors))._replace(
        rewards=torch.tensor(rewards, dtype=torch.float32),
        return_to_go=torch.tensor(returns, dtype=torch.float64).float(),
    )
    return replace(data, rows=data.layout.pack(first), episode_starts=np.array([0, n]))


@pytest.mark.parametrize(
    ("rewards", "size"),
    [
        ([0.0, 0.0, 0.0, 0.0], None),
        ([3.0], 3.0),
        ([1.0, 1.0], math.sqrt((1.5**2 + 1.0) / 2)),  # the returns to go are 1.5 and 1
        ([0.0, 0.0, 8.0], math.sqrt((2.0**2 + 4.0**2 + 8.0**2) / 3)),  # sparse: 2, 4 and 8
        ([-1e6, 0.0], math.sqrt(1e12 / 2)),
        ([3e-12, 0.0], math.sqrt(9e-24 / 2)),
    ],
)
def test_rewards_are_scaled_by_the_size_of_their_returns_to_go(
    arrays: dict[str, NDArray[Any]], rewards: list[float], size: float | None
) -> None:
    scale = with_rewards(dataset_of(arrays), rewards).reward_scale()
    assert scale == float(np.float32(scale))
    assert scale == pytest.approx(1.0 if size is None else TUNED_RETURN_SIZE / size, rel=1e-6)


@pytest.mark.parametrize("rewards", [[3e38, 3e38], [1e-42, 0.0]])
def test_rewards_that_float32_cannot_hold_are_refused(
    arrays: dict[str, NDArray[Any]], rewards: list[float]
) -> None:
    with pytest.raises(DataError, match="Store the rewards in another unit"):
        with_rewards(dataset_of(arrays), rewards).reward_scale()


def with_column(data: Dataset, values: NDArray[Any]) -> Dataset:
    """With another first entry of the observations [N]."""
    batch = data.transitions
    observations = batch.observations.clone()
    observations[:, 0] = torch.from_numpy(values.astype(np.float32))
    return replace(data, rows=data.layout.pack(batch._replace(observations=observations)))


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e8, 1e30])
def test_a_spread_is_judged_by_the_size_of_its_entry(
    arrays: dict[str, NDArray[Any]], scale: float
) -> None:
    data = dataset_of(arrays)
    n = len(data.rows)
    alternating = np.where(np.arange(n) % 2 == 0, -1.0, 1.0)
    if n % 2:
        alternating[-1] = 0.0

    def found(values: NDArray[Any]) -> tuple[float, float]:
        normalizer = with_column(data, values * scale).normalizer()
        return float(normalizer.mean[0]), float(normalizer.std[0])

    assert found(alternating)[1] == pytest.approx(scale, rel=1e-3)
    # A thousandth of the size is a spread, however small.
    mean, std = found(1.0 + 1e-3 * alternating)
    assert mean == pytest.approx(scale)
    assert std == pytest.approx(1e-3 * scale, rel=1e-2)
    # The last digit of a float32 is none: the entry is constant, and divided by its size.
    assert found(1.0 + 6e-8 * alternating)[1] == pytest.approx(scale)
    assert found(np.full(n, -3.0))[1] == pytest.approx(3.0 * scale)
    assert found(np.zeros(n)) == (0.0, 1.0)


def test_online_an_entry_that_the_log_never_varies_is_seen_in_its_own_size(
    arrays: dict[str, NDArray[Any]],
) -> None:
    data = dataset_of(arrays)
    for size in (1e-9, 1.0, 1e9):
        normalizer = with_column(data, np.full(len(data.rows), size)).normalizer()
        seen = normalizer(np.array([1.5 * size, 0.0], np.float32))
        assert float(seen[0]) == pytest.approx(0.5)


@pytest.mark.parametrize("scale", [*EXACT, 1e-8, 1e8])
def test_a_memory_map_is_scaled_as_the_log_in_memory(
    arrays: dict[str, NDArray[Any]], tmp_path: Path, scale: float
) -> None:
    stored = scaled(arrays, observations=scale, rewards=1.0 / scale, costs=scale)
    metadata = {"horizon": HORIZON, "action_low": -1.0, "action_high": 1.0}
    stored = {k: v for k, v in stored.items() if k not in VERDICTS}
    write_memory_map(tmp_path / "log.mmap", stored, metadata)
    spec = spec_of("cost", scale)
    mapped = load_dataset(tmp_path / "log.mmap", discount=0.99, spec=spec)
    one, other = dataset_of(arrays, "cost"), mapped
    seen = [d.normalised(d.normalizer()) for d in (one, other)]
    tolerance = 0.0 if scale in EXACT else 1e-5
    for name in ("observations", "next_observations", "rewards", "return_to_go"):
        mine, theirs = (getattr(d.transitions, name) for d in seen)
        assert torch.allclose(mine, theirs, rtol=tolerance, atol=tolerance)
    assert torch.equal(seen[1].transitions.costs, mapped.transitions.costs)
    for name in ("rewards", "return_to_go"):
        mine, theirs = (d.column(name) for d in seen)
        assert torch.allclose(mine, theirs, rtol=tolerance, atol=tolerance)
        assert torch.equal(theirs, getattr(seen[1].transitions, name))


def test_an_entry_that_never_changes_is_no_component() -> None:
    rng = np.random.default_rng(0)
    moving = rng.normal(size=(1001, 1)).astype(np.float32)
    alone = principal_components(moving)
    for value in (0.1, 0.3, 1e-9, 5.4e6):
        still = np.full_like(moving, value)
        both = principal_components(np.concatenate([moving, still], axis=1))
        assert both.shape == (1001, 1)
        assert np.allclose(np.abs(both), np.abs(alone))


# --- what is told of a log --------------------------------------------------------------------


@pytest.mark.parametrize("scale", [*EXACT, 1e-8, 1e8])
def test_an_assessment_is_in_the_units_of_the_log(
    arrays: dict[str, NDArray[Any]], scale: float
) -> None:
    units = {"observations": scale, "rewards": scale, "costs": scale, "actions": scale}
    small = FittedConfig(networks=2, width=16, steps=60, batch_size=64, groups=20, replicates=30)
    found = []
    for given in ({}, units):
        costs = given.get("costs", 1.0)
        data = dataset_of(arrays, "cost", **given)
        loop = pretrained(data, "cost", costs)
        normalised = data.normalised(loop.normalizer._replace(reward_scale=1.0))
        estimates = assess_policy(normalised, loop.networks.actor, loop.foundation.limits[0], small)
        found.append(
            [
                estimates.risk.value * estimates.scale / costs,
                estimates.risk.error * estimates.scale / costs,
                estimates.returns.value / given.get("rewards", 1.0),
                estimates.returns.error / given.get("rewards", 1.0),
                estimates.support,
            ]
        )
    assert found[1] == pytest.approx(found[0], rel=1e-6 if scale in EXACT else 0.05)


def test_returns_that_differ_by_rounding_alone_have_the_unit_of_their_size() -> None:
    tenths = np.array([math.fsum([0.1] * 10), sum([0.1] * 10), 1.0 + 2e-8])
    for scale in (1e-8, 1.0, 1e8):
        assert _spread(scale * tenths) == pytest.approx(scale)
        assert _spread(scale * np.array([1.0, -1.0])) == pytest.approx(scale)
    assert _spread(np.zeros(3)) == 1.0


@pytest.mark.parametrize("scale", [1e-30, *SCALES, 1e30])
def test_an_inspection_says_the_same_in_every_unit(
    arrays: dict[str, NDArray[Any]], scale: float
) -> None:
    """Coverage and warnings, and one step that does not begin where the one before ended."""
    broken = {k: v.copy() for k, v in arrays.items()}
    spread = arrays["observations"].std(axis=0)
    broken["next_observations"][3] += 0.01 * spread
    broken["next_observations"][5] += 1e-5 * spread  # nothing that anybody would notice
    spec = spec_of("accident")
    one = summarise(dataset_of(broken), spec, 0.15)
    other = summarise(dataset_of(broken, observations=scale), spec, 0.15)
    assert (
        sum(
            "1 rows within episodes (the first is row 3) lead near" in text for text in one.warnings
        )
        == 1
    )
    assert one.warnings == other.warnings
    for name in ("observation_coverage", "state_action_coverage"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), abs=0.02)


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1.0, 1e8])
def test_a_penalty_is_adapted_in_units_of_the_limit(scale: float) -> None:
    def penalty(cost: float, limit: float) -> float:
        account = Account(limit=limit * scale, unit=1.0 / scale)
        account.episodes = [(0.0, cost * scale)] * EPISODES_PER_STEP
        account.adapt()
        return account.penalty * scale

    # The sum of both gains, .5 + .1, times the excess.
    assert penalty(cost=3.0, limit=2.0) == pytest.approx(0.6 * 0.5)
    assert penalty(cost=2.0, limit=2.0) == 0.0
    assert penalty(cost=50.0, limit=2.0) == pytest.approx(0.6 * 2.0)
    assert penalty(cost=0.1, limit=0.0) == pytest.approx(0.6 * 2.0)
    assert penalty(cost=0.0, limit=0.0) == 0.0


@pytest.mark.slow
def test_the_reference_is_the_size_of_the_default_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFE_OFFRL_CACHE", str(tmp_path))
    log = load_dataset(
        default_dataset(), discount=PretrainConfig().agents.iql.discount, spec=SafetySpec()
    )
    # Exactly 1 with the versions of constraints.txt; others log a little differently.
    assert log.reward_scale() == pytest.approx(1.0, rel=0.02)
