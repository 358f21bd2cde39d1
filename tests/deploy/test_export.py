"""An exported file does what the policy behind its shield does, and says which policy that is."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.util
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
import torch

from safe_offrl import cli, commands
from safe_offrl.commands.export import _interface
from safe_offrl.deploy import export
from safe_offrl.deploy.export import FORMATS, Arrays, Runner, compare
from safe_offrl.deploy.graph import Inputs, Outputs, PolicyGraph
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.env.make import make_env
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.policies.acting import NumpyActor
from safe_offrl.policies.networks import Actor, StackedMLP
from safe_offrl.policy import load_policy
from safe_offrl.record.final_policy import FinalPolicy, final_policy
from safe_offrl.record.run import RunDir
from safe_offrl.safety.calibration import CalibrationReport
from safe_offrl.safety.critic import SafetyCritic, SafetyCriticConfig
from safe_offrl.safety.guard import Guard, Watch
from safe_offrl.safety.outlook import AccidentAhead
from safe_offrl.safety.shield import Shield, ShieldConfig
from safe_offrl.spec import SafetySpec
from safe_offrl.train.fallback import Fallback
from safe_offrl.types import Normalizer

TINY = ["steps=60", "alignment_steps=20", "log_every=20", "batch_size=32"]
TINY += ["networks.actor_hidden=[16]", "networks.critic_hidden=[16]", "critic.hidden=[16,16]"]
# Actions differ little to an untrained critic: a small margin lets some of them pass.
ONLINE = ["warmup_steps=200", "iteration_steps=200", "batch_size=32", "shielding.margin=0.005"]


def silent(text: str) -> None:
    pass


def make_run(
    env_id: str, dataset: Path, root: Path, *limit: str, guard: bool = False, budget: int = 400
) -> RunDir:
    """A run whose shield acts, whatever its calibration report says of an untrained critic.

    So does its guard, if it is to have one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CalibrationReport, "shield_acts", True)
        if guard:
            patch.setattr(Fallback, "refusals", lambda self, *_: [() for _ in self.constraints])
        overrides = [*TINY, *limit]
        config = commands.pretrain_config(env=env_id, dataset=str(dataset), overrides=overrides)
        plan = commands.plan_pretrain(config, say=silent)
        pretrained = commands.pretrain_run(plan, name="offline", runs=root, say=silent)
    settings = commands.finetune_config(pretrained, budget=budget, overrides=ONLINE)
    online = commands.plan_finetune(pretrained, settings, accept_risk=True)
    return commands.finetune_run(online, name="online", runs=root, say=silent)


@pytest.fixture(scope="module")
def continuous(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> RunDir:
    return make_run("PointHazard-v0", tiny_dataset, tmp_path_factory.mktemp("continuous"))


@pytest.fixture(scope="module")
def discrete(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    root = tmp_path_factory.mktemp("discrete")
    log, overrides = root / "grid.hdf5", ["learners.ppo.steps=0"]
    commands.collect_run(
        env="HazardGrid-v0", out=log, transitions=2500, overrides=overrides, say=silent
    )
    return make_run("HazardGrid-v0", log, root)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> RunDir:
    """A run whose guard keeps a cost limit of 1.3, of which its untrained critic sees 1 ahead."""
    limit = "safety.constraint=cost", "safety.cost_limit=1.3"
    root = tmp_path_factory.mktemp("guarded")
    return make_run("PointHazard-v0", tiny_dataset, root, *limit, guard=True, budget=200)


@pytest.fixture(scope="module")
def final(continuous: RunDir) -> FinalPolicy:
    return final_policy(continuous)


def exported(run: RunDir, file_format: str, folder: Path) -> tuple[dict[str, Any], Runner]:
    path = folder / "made" / f"policy.{file_format}"
    commands.export_run(run.path, file_format=file_format, out=path, say=silent)
    manifest = json.loads(path.with_name(f"policy.{file_format}.json").read_bytes())
    return manifest, FORMATS[file_format].open(path.read_bytes())


class Played(NamedTuple):
    """Actions of predict and of a file, and in how many steps they were not the policy's first.

    ``clear``: where rounding does not decide which of its two fallbacks a guard takes.
    """

    wanted: list[Any]
    given: list[Any]
    replaced: int
    handed_over: int
    clear: list[bool]


def play_both(
    run: RunDir, play: Runner, manifest: dict[str, Any], steps: int, *, deterministic: bool = False
) -> Played:
    """Episodes in which predict and the file see the same and draw the same.

    Each step costs a hundredth, so that a guard has something to count.
    """
    policy = load_policy(run.path, seed=5)
    deployed = policy._policy
    actor = deployed.sampler
    assert isinstance(actor, NumpyActor)
    env = gymnasium.make(manifest["environment"]["id"])
    assert isinstance(policy.action_space, gymnasium.spaces.Box | gymnasium.spaces.Discrete)
    policy_graph = PolicyGraph(deployed, policy.action_space)
    draws, horizon = manifest["inputs"][2]["shape"][1], manifest["environment"]["horizon"]
    names = [part["name"] for part in manifest["inputs"]]
    wanted, given, acts, clear = [], [], [], []
    ended, episodes, state = True, 0, None
    observation: Any = None
    for _ in range(steps):
        if ended:
            observation, _ = env.reset(seed=episodes)
            episodes, state = episodes + 1, None
        rng, same = copy.deepcopy(policy._rng), copy.deepcopy(policy._rng)
        noise = actor.noise(draws - deterministic, rng)
        if deterministic:
            noise = np.concatenate([np.zeros((1, noise.shape[1])), noise])
        played = state[0] if state is not None else 0
        left, cost = max(0.0, 1.0 - played / horizon), 0.01 * played
        arrays = {
            "observation": np.asarray(observation, np.float32).reshape(1, -1),
            "time_to_go": np.asarray([left], np.float32),
            "noise": noise[None].astype(np.float32),
            "spent": np.asarray([cost], np.float32),
        }
        result = play({name: arrays[name] for name in names})
        clear.append(policy_graph.closeness(Inputs(*map(torch.from_numpy, arrays.values()))) > 1e-5)
        seen = deployed.normalizer(policy._env.observe(observation, cost))
        acts.append(deployed.act(seen, left, same, {"cost": cost}, mean_action=deterministic))
        action, state = policy.predict(
            observation, state, deterministic=deterministic, episode_cost=cost
        )
        assert bool(result["intervened"][0]) == acts[-1].replaced
        assert bool(result.get("handed_over", [False])[0]) == acts[-1].handed_over
        wanted.append(action)
        given.append(result["action"][0])
        observation, _, terminated, truncated, _ = env.step(action)
        ended = terminated or truncated
    replaced, handed_over = (sum(flags) for flags in list(zip(*acts, strict=True))[1:])
    return Played(wanted, given, replaced, handed_over, list(map(bool, clear)))


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_thousand_actions_are_those_of_predict(
    continuous: RunDir, tmp_path: Path, file_format: str
) -> None:
    manifest, play = exported(continuous, file_format, tmp_path)
    wanted, given, replaced, *_ = play_both(continuous, play, manifest, 1000)
    np.testing.assert_allclose(given, wanted, rtol=0.0, atol=1e-5)
    assert 100 <= replaced <= 900


def test_with_the_first_draw_zero_they_are_those_of_deterministic_predict(
    continuous: RunDir, tmp_path: Path
) -> None:
    manifest, play = exported(continuous, "torchscript", tmp_path)
    wanted, given, replaced, *_ = play_both(continuous, play, manifest, 300, deterministic=True)
    np.testing.assert_allclose(given, wanted, rtol=0.0, atol=1e-5)
    assert 30 <= replaced <= 270


@pytest.mark.parametrize(
    ("file_format", "deterministic"),
    [("onnx", False), ("torchscript", False), ("torchscript", True)],
)
def test_discrete_actions_are_those_of_predict(
    discrete: RunDir, tmp_path: Path, file_format: str, deterministic: bool
) -> None:
    manifest, play = exported(discrete, file_format, tmp_path)
    wanted, given, replaced, *_ = play_both(
        discrete, play, manifest, 1000, deterministic=deterministic
    )
    assert given == wanted
    assert len(set(wanted)) > 2
    assert 50 <= replaced <= 950


@pytest.mark.parametrize(
    ("file_format", "deterministic"),
    [("onnx", False), ("torchscript", False), ("torchscript", True)],
)
def test_a_policy_behind_its_guard(
    guarded: RunDir, tmp_path: Path, file_format: str, deterministic: bool
) -> None:
    manifest, play = exported(guarded, file_format, tmp_path)
    played = play_both(guarded, play, manifest, 300, deterministic=deterministic)
    given, wanted = (np.stack(x)[played.clear] for x in (played.given, played.wanted))
    np.testing.assert_allclose(given, wanted, rtol=0.0, atol=1e-5)
    assert len(given) > 150
    assert 100 <= played.handed_over <= 290
    assert played.replaced >= 1


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_policy_without_a_shield(continuous: RunDir, tmp_path: Path, file_format: str) -> None:
    run = RunDir(continuous.path.parent / "offline")
    manifest, play = exported(run, file_format, tmp_path)
    wanted, given, replaced, *_ = play_both(run, play, manifest, 150)
    np.testing.assert_allclose(given, wanted, rtol=0.0, atol=1e-5)
    assert replaced == 0
    assert not manifest["shield"]["acts"]
    assert manifest["inputs"][2]["shape"] == ["batch", 1, 2]


@pytest.mark.parametrize("file_format", FORMATS)
def test_rows_of_a_batch_are_independent_and_nan_is_no_action(
    final: FinalPolicy, file_format: str
) -> None:
    graph = graph_of(final)
    play = FORMATS[file_format].open(FORMATS[file_format].write(graph))
    arrays = export._examples(graph, final.policy)
    together = play(arrays)
    assert 0 < together["intervened"].sum() < len(together["intervened"])
    for row in range(5):
        alone = play({name: x[row : row + 1] for name, x in arrays.items()})
        for name, values in alone.items():
            np.testing.assert_allclose(values[0], together[name][row], rtol=0.0, atol=1e-6)
    arrays["observation"][3, 1] = np.nan
    arrays["observation"][4, 1] = np.inf
    arrays["time_to_go"][6] = np.nan
    broken = play(arrays)
    np.testing.assert_array_equal(
        np.isnan(broken["action"]).all(1), np.isin(np.arange(len(broken["action"])), [3, 4, 6])
    )


# --- the graph by itself ---


def graph_of(final: FinalPolicy) -> PolicyGraph:
    space = final.env.env.action_space
    assert isinstance(space, gymnasium.spaces.Box)
    return PolicyGraph(final.policy, space)


def by_hand(
    *,
    mean: float,
    slope: float,
    space: gymnasium.spaces.Box,
    candidates: int = 3,
    guard: float | None = None,
    epsilon: float | None = None,
) -> PolicyGraph:
    """Action tanh(mean + noise) with risk sigmoid(slope * action); a margin of .1.

    ``guard``: this much times sigmoid(action) is ahead, and the limit of one that acts.
    ``epsilon``: the limit of one that acts, of accidents with probability sigmoid(action).
    """
    actor = Actor(1, 1, (), torch.Generator().manual_seed(0))
    config = SafetyCriticConfig(hidden=())
    critic = SafetyCritic(1, 1, AccidentAhead(10), config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        weight, bias = actor.parameters()
        weight.zero_()
        bias.copy_(torch.tensor([mean, math.atanh(5.0 / 3.5 - 1.0)]))  # standard deviation 1
        critic.net.output.weight.zero_()
        critic.net.output.weight[: config.reference, 2] = slope
        critic.net.output.weight[config.reference :, 2] = -100.0  # they have no say
        critic.net.output.bias.zero_()
    shield = Shield.from_critic(
        critic, ShieldConfig(candidates=candidates, margin=0.2), 0.5, acts=True
    )
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    policy = DeployedPolicy.from_actor(actor, shield, Normalizer(zero, one), 0)
    if guard is not None or epsilon is not None:
        fallbacks = [copy.deepcopy(actor) for _ in range(2)]
        for fallback, action in zip(fallbacks, (-0.5, -0.25), strict=True):
            with torch.no_grad():
                list(fallback.parameters())[1][0] = math.atanh(action)
        net = StackedMLP(1, 3, (), layer_norm=True, generator=torch.Generator())
        net.requires_grad_(False).output.weight[:] = torch.tensor([0.0, 0.0, 1.0])[:, None]
        net.output.bias.zero_()
        watch = (
            Watch("accident", epsilon, net, 1.0, spends=False)
            if guard is None and epsilon is not None
            else Watch("cost", guard or 0.0, net, guard or 0.0, spends=True)
        )
        policy = policy._replace(guard=Guard(fallbacks, [watch]))
    return PolicyGraph(policy, space)


def act(graph: PolicyGraph, *noise: float) -> tuple[Any, bool]:
    """(action, whether the shield intervened) at one observation."""
    inputs = Inputs(torch.zeros(1, 1), torch.ones(1), torch.tensor(noise).view(1, -1, 1))
    result = Outputs(*graph(*inputs))
    return result.action.item(), bool(result.intervened.item())


UNIT = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
close = functools.partial(pytest.approx, abs=1e-6)


def test_the_choice_by_hand() -> None:
    """Risks sigmoid(a): at a = tanh(-.5), tanh(.5), tanh(1.5) they are .386, .614 and .712."""
    graph = by_hand(mean=0.5, slope=1.0, space=UNIT)
    tanh = math.tanh
    assert act(graph, -1.0, 0.0, 1.0) == (close(tanh(-0.5)), False)
    assert act(graph, 0.0, -1.0, 1.0) == (close(tanh(-0.5)), True)  # .228 above the least
    assert act(graph, 1.0, 0.0, 0.0) == (close(tanh(1.5)), False)  # .098 above: within the margin
    assert act(graph, 1.0, 0.0, -1.0) == (close(tanh(-0.5)), True)
    # The first within the margin, not the least risky: a = tanh(-.2) has .451, .065 above.
    assert act(graph, 1.0, -0.7, -1.0) == (close(tanh(-0.2)), True)


def test_how_close_a_choice_is_by_hand() -> None:
    """Of the risks .386, .614 and .712 the second is .128 from passing, the least always does."""
    graph = by_hand(mean=0.5, slope=1.0, space=UNIT)

    def closeness(*noise: float) -> float:
        noise_of = torch.tensor(noise).view(1, -1, 1)
        return graph.closeness(Inputs(torch.zeros(1, 1), torch.ones(1), noise_of)).item()

    def risk(noise: float) -> float:
        return 1.0 / (1.0 + math.exp(-math.tanh(0.5 + noise)))

    assert closeness(-1.0, 0.0, 1.0) == close(risk(0.0) - risk(-1.0) - 0.1)
    assert closeness(1.0, 1.0, 1.0) == close(0.1)


def test_nan_does_not_pass_where_a_runtime_swallows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ReLU that makes 0 of a NaN gives an action that is none a risk that looks fine."""
    graph = by_hand(mean=0.5, slope=10.0, space=UNIT)
    monkeypatch.setattr(graph, "_risks", lambda _, options: torch.zeros(options.shape[:2]))
    assert act(graph, 0.0, 0.0, 0.0) == (close(math.tanh(0.5)), False)
    assert act(graph, math.nan, math.nan, 0.0) == (close(math.tanh(0.5)), True)
    action, _ = act(graph, math.nan, math.nan, math.nan)
    assert math.isnan(action)


def test_actions_are_in_the_environments_units() -> None:
    space = gymnasium.spaces.Box(np.float32(10.0), np.float32(30.0), (1,), np.float32)
    graph = by_hand(mean=0.5, slope=0.0, space=space)
    action, _ = act(graph, -1.0, 0.0, 0.0)
    assert action == pytest.approx(20.0 + 10.0 * math.tanh(-0.5))
    assert act(graph, 1e6, 0.0, 0.0)[0] == 30.0
    # -0.7 + (0.5 - -0.7) is 0.50000006 in float32.
    space = gymnasium.spaces.Box(np.float32(-0.7), np.float32(0.5), (1,), np.float32)
    assert act(by_hand(mean=0.5, slope=0.0, space=space), 1e6, 0.0, 0.0)[0] == 0.5


def test_numbers_of_discrete_actions_start_where_the_space_does(discrete: RunDir) -> None:
    final = final_policy(discrete)
    at_zero = PolicyGraph(final.policy, gymnasium.spaces.Discrete(4))
    at_seven = PolicyGraph(final.policy, gymnasium.spaces.Discrete(4, start=7))
    arrays = export._examples(at_zero, final.policy)
    arrays["observation"][5] = np.nan
    inputs = [torch.from_numpy(array) for array in arrays.values()]
    numbers = Outputs(*at_zero(*inputs)).action
    assert set(numbers.tolist()) == {-1, 0, 1, 2, 3}
    assert (numbers == -1).nonzero().tolist() == [[5]]
    assert torch.equal(Outputs(*at_seven(*inputs)).action, numbers + 7)
    final.env.close()


# --- behind a guard ---


def guard_for(policy: DeployedPolicy, *, alike: bool = False, until_end: bool = False) -> Guard:
    """A guard of random networks, which keeps a cost and an accident limit about half of the time.

    ``alike``: both of its fallbacks do the same.
    """
    actor = policy.actor
    observation, action = actor.observation_size, actor.action_size

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    fallbacks = [
        Actor(observation, action, (8,), seeded(0 if alike else seed), actor.kind)
        for seed in range(2)
    ]
    watches = []
    for seed, (name, limit, spends) in enumerate((("cost", 1.0, True), ("accident", 0.1, False))):
        net = StackedMLP(
            2, observation + 1 + action, (12,), layer_norm=True, generator=seeded(seed + 5)
        ).requires_grad_(False)
        net.output.weight.mul_(6.0)
        watches.append(Watch(name, limit, net, 0.9, spends))
    return Guard(fallbacks, watches, 1.1, until_end=until_end)


def guarded_of(final: FinalPolicy, **settings: bool) -> FinalPolicy:
    policy = final.policy
    return final._replace(policy=policy._replace(guard=guard_for(policy, **settings)))


def graph_for(final: FinalPolicy) -> PolicyGraph:
    space = final.env.env.action_space
    assert isinstance(space, gymnasium.spaces.Box | gymnasium.spaces.Discrete)
    return PolicyGraph(final.policy, space)


@pytest.fixture(params=["box", "discrete"])
def guarded_final(request: pytest.FixtureRequest) -> Iterator[FinalPolicy]:
    run = request.getfixturevalue("continuous" if request.param == "box" else "discrete")
    final = final_policy(run)
    with contextlib.closing(final.env):
        yield guarded_of(final)


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_file_hands_over_where_the_policy_does(
    guarded_final: FinalPolicy, file_format: str
) -> None:
    policy, env = guarded_final.policy, guarded_final.env
    graph = graph_for(guarded_final)
    assert graph.inputs == ("observation", "time_to_go", "noise", "spent")
    assert graph.outputs == ("action", "intervened", "handed_over")
    play = FORMATS[file_format].open(FORMATS[file_format].write(graph))
    arrays = export._examples(graph, policy)
    given = play(arrays)
    inputs = Inputs(*map(torch.from_numpy, arrays.values()))
    clear = np.flatnonzero(graph.closeness(inputs).numpy() > export.TOO_CLOSE)
    acts = [
        policy.act(
            policy.normalizer(arrays["observation"][row]),
            float(arrays["time_to_go"][row]),
            np.random.default_rng(row),
            {"cost": float(arrays["spent"][row])},
        )
        for row in clear
    ]
    assert given["handed_over"][clear].tolist() == [act.handed_over for act in acts]
    assert given["intervened"][clear].tolist() == [act.replaced for act in acts]
    wanted = np.stack([env.own_action(act.action) for act in acts])
    np.testing.assert_allclose(given["action"][clear], wanted, rtol=0.0, atol=1e-5)
    assert 30 < sum(act.handed_over for act in acts) < len(acts) - 30
    assert sum(act.replaced for act in acts) > 1
    found = compare(play, graph, env, policy)
    assert found.same
    assert found.hand_overs == sum(act.handed_over for act in acts)
    # How much was spent decides: from nothing to more than there is.
    more, less = (play(arrays | {"spent": np.full_like(arrays["spent"], x)}) for x in (-9.0, 9.0))
    assert more["handed_over"].sum() < given["handed_over"].sum() < less["handed_over"].sum()
    assert less["handed_over"].all()


@pytest.mark.parametrize("file_format", FORMATS)
def test_what_is_no_number_is_no_action_behind_a_guard_either(
    guarded_final: FinalPolicy, file_format: str
) -> None:
    graph = graph_for(guarded_final)
    play = FORMATS[file_format].open(FORMATS[file_format].write(graph))
    arrays = export._examples(graph, guarded_final.policy)
    arrays["observation"][[3, 4], 1] = np.nan, np.inf
    arrays["time_to_go"][[6, 7]] = np.nan, np.inf
    arrays["spent"][[9, 10]] = np.nan, np.inf
    action = play(arrays)["action"]
    none = action == -1 if guarded_final.env.discrete else np.isnan(action).all(1)
    assert np.flatnonzero(none).tolist() == [3, 4, 6, 7, 9, 10]


def test_a_draw_that_is_no_number_is_handed_over(final: FinalPolicy) -> None:
    """As in :meth:`Guard.take_over`: the fallback needs no draws."""
    guarded = guarded_of(final)
    graph = graph_for(guarded)
    arrays = export._examples(graph, guarded.policy)

    def result() -> Outputs:
        return Outputs(*graph(*map(torch.from_numpy, arrays.values())))

    expected = result().handed_over
    assert expected is not None
    passing = int((~expected).nonzero()[0])
    arrays["noise"][passing] = np.nan
    expected[passing] = True
    found = result()
    assert found.handed_over is not None
    assert torch.equal(found.handed_over, expected)
    assert not found.intervened[passing]
    assert found.action.isfinite().all()


def test_a_fallback_that_is_no_number_is_no_action(final: FinalPolicy) -> None:
    """Of a limit that spends: how much safer such a fallback is cannot be said."""
    guard = guard_for(final.policy)
    with torch.no_grad():
        for fallback in guard.fallbacks:
            next(fallback.parameters()).fill_(math.nan)
    guard = Guard(guard.fallbacks, guard.watches[:1], guard.caution)
    guarded = final._replace(policy=final.policy._replace(guard=guard))
    arrays = export._examples(graph := graph_for(guarded), guarded.policy)
    result = Outputs(*graph(*map(torch.from_numpy, arrays.values())))
    assert result.handed_over is not None
    assert torch.equal(result.action.isnan().all(1), result.handed_over)
    assert 0 < result.handed_over.sum() < len(result.handed_over)


@pytest.mark.parametrize("watched", [slice(0, 1), slice(1, 2)])
def test_a_graph_takes_the_fallback_that_is_a_number(final: FinalPolicy, watched: slice) -> None:
    """As the policy does; and one that nobody asks for spoils nothing."""
    for broken in (1, 2):
        guard = guard_for(final.policy)
        with torch.no_grad():
            for fallback in guard.fallbacks[:broken]:
                next(fallback.parameters()).fill_(math.nan)
        guard = Guard(guard.fallbacks, guard.watches[watched], guard.caution)
        guarded = final._replace(policy=final.policy._replace(guard=guard))
        arrays = export._examples(graph := graph_for(guarded), guarded.policy)
        result = Outputs(*graph(*map(torch.from_numpy, arrays.values())))
        assert result.handed_over is not None
        assert 0 < result.handed_over[:64].sum() < 64
        for row in range(64):
            seen = guarded.policy.normalizer(arrays["observation"][row])
            left = float(arrays["time_to_go"][row])
            spent = float(arrays["spent"][row]) if "spent" in arrays else 0.0
            act = guarded.policy.act(seen, left, np.random.default_rng(row), {"cost": spent})
            assert bool(result.handed_over[row]) == act.handed_over
            assert bool(result.action[row].isnan().any()) == (act.handed_over and broken == 2)
            if not np.isnan(act.action).any():
                own = guarded.env.own_action(act.action)
                np.testing.assert_allclose(result.action[row].numpy(), own, atol=1e-5)


@pytest.mark.parametrize("file_format", ["onnx", "torchscript"])
def test_a_graph_asks_for_the_cost_only_where_a_limit_spends(
    final: FinalPolicy, file_format: str
) -> None:
    guard = guard_for(final.policy)
    accidents = Guard(guard.fallbacks, guard.watches[1:], guard.caution)
    guarded = final._replace(policy=final.policy._replace(guard=accidents))
    graph = graph_for(guarded)
    assert graph.inputs == ("observation", "time_to_go", "noise")
    assert graph.outputs == ("action", "intervened", "handed_over")
    chosen = export.FORMATS[file_format]
    found = compare(chosen.open(chosen.write(graph)), graph, guarded.env, guarded.policy)
    assert found.same
    assert 0 < found.hand_overs < found.observations


def test_where_both_fallbacks_do_the_same_there_is_no_choice(final: FinalPolicy) -> None:
    alike = guarded_of(final, alike=True)
    graph = graph_for(alike)
    play = export.open_torchscript(export.to_torchscript(graph))
    found = compare(play, graph, alike.env, alike.policy)
    assert found.same
    assert found.observations > 0.9 * export.EXAMPLES


def spoilt_weight(graph: PolicyGraph, name: str) -> None:
    with torch.no_grad():
        dict(graph.named_parameters())[name].neg_()


@pytest.mark.parametrize(
    "damage",
    [
        lambda graph: spoilt_weight(graph, "fallbacks.0.layers.2.weight"),
        lambda graph: spoilt_weight(graph, "fallbacks.1.layers.2.weight"),
        lambda graph: spoilt_weight(graph, "watch_nets.0.output.weight"),
        lambda graph: spoilt_weight(graph, "watch_nets.1.output.weight"),
        lambda graph: setattr(graph, "watches", ((0.5, 1.0, 1.0), graph.watches[1])),
        lambda graph: setattr(graph, "watches", ((0.99, 1.4, 1.0), graph.watches[1])),
        lambda graph: setattr(graph, "watches", ((0.99, 1.0, 0.0), (*graph.watches[1][:2], 1.0))),
        lambda graph: setattr(graph, "watches", (graph.watches[0], (0.9, 0.5, 0.0))),
    ],
    ids=["fallback", "other", "cost", "accident", "weight", "limit", "spends", "epsilon"],
)
def test_a_file_with_another_guard_is_noticed(final: FinalPolicy, damage: Any) -> None:
    guarded = guarded_of(final)
    graph, damaged = graph_for(guarded), graph_for(guarded)
    damage(damaged)
    play = export.open_torchscript(export.to_torchscript(damaged))
    assert not compare(play, graph, guarded.env, guarded.policy).same


def test_a_hand_over_by_hand() -> None:
    """Action .5 with 20 sigmoid(a) ahead, 12.45 of 20; the fallbacks do -.5 and -.25."""
    graph = by_hand(mean=math.atanh(0.5), slope=0.0, space=UNIT, guard=20.0)
    ahead = 20.0 / (1.0 + math.exp(-0.5))

    def acts(spent: float, noise: float = 0.0) -> Any:
        inputs = torch.zeros(1, 1), torch.ones(1), torch.full((1, 3, 1), noise)
        result = Outputs(*graph(*inputs, torch.tensor([spent])))
        assert result.handed_over is not None
        return result.action.item(), bool(result.intervened), bool(result.handed_over)

    assert acts(19.99 - ahead) == (close(0.5), False, False)
    assert acts(20.01 - ahead) == (close(-0.5), False, True)
    assert acts(20.01 - ahead, noise=-1.0)[2] is False  # it costs less
    action, _, handed_over = acts(math.nan)
    assert math.isnan(action)
    assert handed_over


def test_a_hand_over_of_accidents_by_hand() -> None:
    """Of .5 sigmoid(.5) = .6225 is ahead, of the fallback's -.5 sigmoid(-.5) = .3775."""

    def handed_over(epsilon: float, action: float = 0.5, spent: float = 0.0) -> bool:
        graph = by_hand(mean=math.atanh(action), slope=0.0, space=UNIT, epsilon=epsilon)
        inputs = torch.zeros(1, 1), torch.ones(1), torch.zeros(1, 3, 1), torch.tensor([spent])
        result = Outputs(*graph(*inputs))
        assert result.handed_over is not None
        over = bool(result.handed_over)
        assert result.action.item() == close(-0.5 if over else action)
        apart = 1.0 / (1.0 + math.exp(-action)) - 1.0 / (1.0 + math.exp(0.5))
        tie = 1.0 / (1.0 + math.exp(0.25)) - 1.0 / (1.0 + math.exp(0.5))
        least = min(abs(apart / epsilon - 1.0), tie / epsilon, 0.1)  # the shield's margin
        assert graph.closeness(Inputs(*inputs)).item() == pytest.approx(least, abs=1e-5)
        return over

    assert handed_over(0.24)
    assert not handed_over(0.25)
    assert not handed_over(0.25, spent=1000.0)
    assert not handed_over(0.1, action=-0.6)  # .354 is above the limit, and less than .3775
    assert not handed_over(0.1, action=-0.4)


def test_how_close_a_hand_over_is_by_hand() -> None:
    graph = by_hand(mean=math.atanh(0.5), slope=0.0, space=UNIT, guard=20.0)

    def closeness(spent: float) -> float:
        inputs = torch.zeros(1, 1), torch.ones(1), torch.zeros(1, 3, 1), torch.tensor([spent])
        return graph.closeness(Inputs(*inputs)).item()

    ahead, left, right = (1.0 / (1.0 + math.exp(-a)) for a in (0.5, -0.5, -0.25))
    assert closeness(20.0 * (0.99 - ahead)) == close(0.01)
    assert closeness(20.0 * (1.02 - ahead)) == close(0.02)
    assert closeness(200.0) == close(right - left)  # which fallback


def test_a_guard_that_never_hands_back_needs_a_memory(final: FinalPolicy) -> None:
    with pytest.raises(ConfigError, match="a graph has no memory"):
        graph_for(guarded_of(final, until_end=True))


# --- what is written ---


@pytest.mark.parametrize(
    "damage",
    [
        lambda graph: graph.mean.add_(0.01),
        lambda graph: graph.std.mul_(1.01),
        lambda graph: graph.actor.layers[-1].bias.add_(0.001),
        lambda graph: graph.risk_net.output.weight.neg_(),
        lambda graph: graph.high.add_(0.001),
        lambda graph: setattr(graph, "margin", 1.0),
    ],
    ids=["mean", "std", "policy", "risk", "units", "margin"],
)
def test_a_file_that_is_another_policy_is_noticed(final: FinalPolicy, damage: Any) -> None:
    graph, damaged = graph_of(final), graph_of(final)
    with torch.no_grad():
        damage(damaged)

    def compared(which: PolicyGraph) -> export.Comparison:
        play = export.open_torchscript(export.to_torchscript(which))
        return compare(play, graph, final.env, final.policy)

    assert compared(graph).same
    assert compared(graph).difference < 1e-5
    assert not compared(damaged).same


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("name", Outputs._fields)
def test_every_output_is_compared(final: FinalPolicy, name: str, guard: bool) -> None:
    final = guarded_of(final) if guard else final
    graph = graph_of(final)
    if name not in graph.outputs:
        assert name == "handed_over"
        assert not guard
        return
    honest = export.open_torchscript(export.to_torchscript(graph))

    def wrong(arrays: Arrays) -> Arrays:
        result = honest(arrays)
        changed = result[name].copy()
        changed[::10] = ~changed[::10] if changed.dtype == bool else changed[::10] + 0.001
        return {**result, name: changed}

    parts = graph, final.env, final.policy
    assert compare(honest, *parts).same
    assert not compare(wrong, *parts).same


def test_nothing_is_written_if_they_differ(
    continuous: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(graph: PolicyGraph) -> bytes:
        graph.margin /= 2.0
        data = export.to_torchscript(graph)
        graph.margin *= 2.0
        return data

    path = tmp_path / "policy.pt"
    path.write_bytes(b"the one before")
    wrong = FORMATS["torchscript"]._replace(write=half)
    monkeypatch.setitem(FORMATS, "torchscript", wrong)
    with pytest.raises(RunError, match="Nothing was written"):
        commands.export_run(continuous.path, file_format="torchscript", out=path, say=silent)
    assert [f.name for f in tmp_path.iterdir()] == ["policy.pt"]
    assert path.read_bytes() == b"the one before"


def test_the_manifest_says_which_policy_it_is(final: FinalPolicy, continuous: RunDir) -> None:
    lines: list[str] = []
    returned = commands.export_run(continuous.path, file_format="torchscript", say=lines.append)
    path = continuous.path / "exports" / "policy.pt"
    manifest = json.loads(path.with_name("policy.pt.json").read_bytes())
    assert manifest == returned
    assert manifest["file"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    # As in a certificate.
    assert manifest["policy"]["sha256"] == final.policy.sha256
    assert manifest["shield"]["sha256"] == final.policy.shield.sha256
    assert manifest["shield"]["acts"]
    assert (manifest["shield"]["draws"], manifest["shield"]["margin"]) == (4, 0.005 * 0.05)
    assert manifest["policy"]["run"] == "online"
    assert manifest["environment"]["horizon"] == 100
    names = [[part["name"] for part in manifest[side]] for side in ("inputs", "outputs")]
    assert names == [["observation", "time_to_go", "noise"], ["action", "intervened"]]
    assert manifest["guard"] == {"acts": False, "limits": {}}
    assert any("\nguard       abstains\n" in text for text in lines)
    assert "spent" not in manifest["episode"]
    (shown,) = re.findall(r"difference of two actions (\S+)", "\n".join(lines))
    assert float(shown) < 1e-5


def test_the_manifest_says_what_its_guard_keeps(guarded: RunDir, tmp_path: Path) -> None:
    lines: list[str] = []
    manifest = commands.export_run(
        guarded.path, file_format="torchscript", out=tmp_path / "it.pt", say=lines.append
    )
    with contextlib.closing(final_policy(guarded).env):
        guard = final_policy(guarded).policy.guard
    assert guard is not None
    found = {"acts": True, "caution": 2.0, "sha256": guard.sha256, "limits": {"cost": 1.3}}
    assert manifest["guard"] == found
    names = [[part["name"] for part in manifest[side]] for side in ("inputs", "outputs")]
    assert names == [list(Inputs._fields), list(Outputs._fields)]
    assert "add the step's cost to spent" in manifest["episode"]
    compared = manifest["compared"]
    assert 0 < compared["hand_overs"] < compared["observations"] <= export.EXAMPLES
    assert f"\nguard       acts, in {compared['hand_overs']} of them\n" in lines[-1]


class Sensors(gymnasium.Env[Any, Any]):
    observation_space = gymnasium.spaces.Dict(
        wheel=gymnasium.spaces.Box(-1.0, 1.0, (), np.float32),
        arm=gymnasium.spaces.Box(-1.0, 1.0, (2, 3), np.float32),
    )
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2, 1), np.float32)


gymnasium.register("ExportSensors-v0", lambda **_: Sensors(), max_episode_steps=10)


def test_the_manifest_says_where_each_number_stands(final: FinalPolicy) -> None:
    env = make_env("ExportSensors-v0", SafetySpec(accident="episode_cost", cost_threshold=5.0))
    described = _interface(graph_of(final), env)
    order = [(p["name"], p["start"], p["stop"]) for p in described["observation"]["order"]]
    assert order[:2] == [("wheel", 0, 1), ("arm", 1, 7)]
    assert order[2][1:] == (7, 8)
    assert "cost" in order[2][0]
    assert described["inputs"][0]["shape"] == ["batch", 8]
    assert described["outputs"][0]["shape"] == ["batch", 2, 1]


def test_from_the_command_line(
    continuous: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["safe-offrl", "export", str(continuous.path), "--out", str(tmp_path / "it.pt")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--format", "torchscript", "--json"])
    with contextlib.suppress(SystemExit):
        cli.main()
    assert json.loads(capsys.readouterr().out)["file"]["name"] == "it.pt"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["it.pt", "it.pt.json"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--format", "coreml"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        'error: There is no format "coreml". Give --format onnx or torchscript.\n'
    )


def test_bad_input_is_one_sentence(
    continuous: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="onnx or torchscript"):
        commands.export_run(continuous.path, file_format="onyx", say=silent)
    with pytest.raises(ConfigError, match="is a folder"):
        commands.export_run(continuous.path, file_format="torchscript", out=tmp_path, say=silent)
    with pytest.raises(RunError):
        commands.export_run("nothing", runs=tmp_path, say=silent)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"onnx and onnxscript and onnxruntime.*\[export\]"):
        commands.export_run(continuous.path, say=silent)
