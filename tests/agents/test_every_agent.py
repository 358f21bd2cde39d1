"""What every learner must do, offline and online, with continuous and with discrete actions.

Parametrised over AGENTS: a new agent is tested by its line there, and one with an online form in
that too.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from safe_offrl.agents import AGENTS, FAMILIES
from safe_offrl.cli.options import AGENT_WORDS
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import Descent
from safe_offrl.compute.state import collect_state, restore_state, seeded
from safe_offrl.data.dataset import Dataset
from safe_offrl.types import Batch, Layout
from tests.agents.setups import Learner, agents_for, learner_of

LAYOUT, ROWS = Layout(3, 2), 16


def batch_of(seed: int, *, discrete: bool) -> Batch:
    g = seeded(seed)
    actions = 2.0 * torch.rand(ROWS, 2, generator=g) - 1.0
    return Batch(
        observations=torch.randn(ROWS, 3, generator=g),
        actions=torch.eye(2)[actions.argmax(-1)] if discrete else actions,
        rewards=torch.randn(ROWS, generator=g),
        accidents=(torch.rand(ROWS, generator=g) < 0.2).float(),
        costs=torch.zeros(ROWS),
        next_observations=torch.randn(ROWS, 3, generator=g),
        terminated=(torch.rand(ROWS, generator=g) < 0.2).float(),
        time_to_go=torch.rand(ROWS, generator=g),
        return_to_go=torch.randn(ROWS, generator=g),
    )


def episodes(*, discrete: bool) -> Dataset:
    """Two episodes of 8 steps, the second with an accident."""
    batch = batch_of(100, discrete=discrete)
    last = (torch.arange(ROWS) == ROWS - 1).float()
    rows = LAYOUT.pack(batch._replace(accidents=last, terminated=last))
    return Dataset(rows, LAYOUT, np.array([0, 8, 16]), np.array([False, True]), 8, "")


def risk(observations: Tensor, time_to_go: Tensor, actions: Tensor) -> Tensor:
    return torch.sigmoid(actions.sum(-1))


class Case(NamedTuple):
    name: str
    online: bool
    discrete: bool


def cases() -> list[Case]:
    """All that can be."""
    found = []
    for discrete in (False, True):
        able = agents_for(discrete=discrete)
        found += [Case(name, False, discrete) for name in able]
        found += [
            Case(n, True, discrete) for n in [*able, "rlpd"] if n == "rlpd" or AGENTS[n].Online
        ]
    return found


# They learn values of the log's returns, of the whole log before the first batch, and of batches of
# their own.
OTHERWISE = ("awr", "spibb", "soft_spibb", "rebrac", "qc", "gail")
# Online the reward of a batch is nothing to them.
REWARDLESS = ("gail", "dagger")


def learns_values(case: Case) -> bool:
    """By temporal differences from batches."""
    if case.name == "rlpd" or case.online:
        return case.name not in REWARDLESS
    return AGENTS[case.name].Config().discount is not None and case.name not in OTHERWISE


def words(case: Case) -> str:
    return " ".join([case.name, "online" * case.online, "discrete" * case.discrete]).strip()


everyone = pytest.mark.parametrize("case", cases(), ids=words)
with_values = pytest.mark.parametrize(
    "case", [case for case in cases() if learns_values(case)], ids=words
)
with_critics = pytest.mark.parametrize(
    "case", [case for case in cases() if case.online and case.name != "dagger"], ids=words
)


def make(case: Case, seed: int = 0) -> Learner:
    return learner_of(
        case.name,
        LAYOUT,
        online=case.online,
        discrete=case.discrete,
        seed=seed,
        dataset=episodes(discrete=case.discrete),
        risk=risk,
        anchored=True,
        steps=10,  # those that learn a model first do so in two of them
    )


def train(mine: Learner, batches: list[Batch]) -> None:
    for batch in batches:
        mine.step(batch)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


@everyone
def test_what_is_kept_goes_on_bit_for_bit(case: Case) -> None:
    mine, other = make(case, seed=0), make(case, seed=1)
    for i in range(3):
        mine.step(batch_of(i, discrete=case.discrete))
    other.step(batch_of(9, discrete=case.discrete))
    restore_state(other.parts, collect_state(mine.parts))
    for i in range(3):
        mine.step(batch_of(i, discrete=case.discrete))
        other.step(batch_of(i, discrete=case.discrete))
    assert_equal(collect_state(mine.parts), collect_state(other.parts))


@everyone
def test_the_generator_is_the_only_source_of_randomness(case: Case) -> None:
    results = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        mine = make(case)
        for i in range(2):
            mine.step(batch_of(i, discrete=case.discrete))
        results.append(collect_state(mine.parts))
    assert_equal(*results)


@everyone
def test_losses_change_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    mine: Learner | None = None
    looked = []
    differentiate = Descent._differentiate

    def watched(self: Descent, *arguments: Any) -> Any:
        assert mine is not None
        tensors = _tensors(arguments)
        before, copies = collect_state(mine.parts), [x.clone() for x in tensors]
        random = torch.get_rng_state()
        found = differentiate(self, *arguments)
        assert_equal(collect_state(mine.parts), before)
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(x, copy) for x, copy in zip(tensors, copies, strict=True))
        looked.append(self)
        return found

    monkeypatch.setattr(Descent, "_differentiate", watched)
    mine = make(case)
    mine.step(batch_of(1, discrete=case.discrete))
    assert looked


def _tensors(arguments: Any) -> list[Tensor]:
    if isinstance(arguments, Tensor):
        return [arguments]
    return [x for a in arguments for x in _tensors(a)] if isinstance(arguments, tuple) else []


@with_values
@pytest.mark.parametrize("field", ["rewards", "terminated"])
def test_wrong_shapes_are_refused(case: Case, field: str) -> None:
    batch = batch_of(0, discrete=case.discrete)
    mine, bad = make(case), batch._replace(**{field: getattr(batch, field).unsqueeze(-1)})
    words = "expected equal shapes|same number of dimensions"
    with pytest.raises((ValueError, RuntimeError), match=words):
        train(mine, [bad] * 4)


@everyone
def test_every_trained_tensor_is_in_one_optimiser_and_moves(case: Case) -> None:
    mine = make(case)
    held = [p for part in mine.parts.values() if isinstance(part, Adam) for p in part.parameters]
    twice = [p for p in mine.networks.actor.parameters() if sum(p is other for other in held) > 1]
    assert len({id(p) for p in held}) == len(held) - len(twice)
    assert bool(twice) == (case.name in FAMILIES["a model"])  # imitates while a model learns
    modules = {key: part for key, part in mine.parts.items() if isinstance(part, nn.Module)}
    of_modules = [p for part in modules.values() for p in part.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in held]
    for i in range(4):
        mine.step(batch_of(i, discrete=case.discrete))
    assert held
    assert not [p.shape for p, old in zip(held, before, strict=True) if torch.equal(p, old)]
    # What asks for gradients and is in no optimiser would never be learnt: the reward critics of an
    # agent without values are aligned afterwards.
    learnt = {p.data_ptr() for p in held}
    idle = (
        {p.data_ptr() for p in modules["critics"].parameters()} if "critics" in modules else set()
    )
    assert all(p.data_ptr() in learnt or p.data_ptr() in idle for p in of_modules)


@with_critics
def test_critics_learn_without_moving_the_actor(case: Case) -> None:
    mine = make(case)
    assert mine.update_critics is not None
    actor, critics = collect_state({"actor": mine.networks.actor}), mine.parts["critics"]
    assert isinstance(critics, nn.Module)
    before = [p.detach().clone() for p in critics.parameters()]
    mine.update_critics(batch_of(0, discrete=case.discrete))
    assert_equal(collect_state({"actor": mine.networks.actor}), actor)
    after = critics.parameters()
    assert not any(torch.equal(p, old) for p, old in zip(after, before, strict=True))


def test_help_and_the_documentation_name_every_agent() -> None:
    page = (Path(__file__).parents[2] / "docs" / "agents.md").read_text(encoding="utf-8")
    for family in FAMILIES.values():
        assert f" {', '.join(family)};" in AGENT_WORDS
        assert all(f"\n| `{name}` | " in page for name in family)
