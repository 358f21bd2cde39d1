import pytest
import torch
from torch import nn

from safe_offrl.compute.adam import Adam
from safe_offrl.compute.state import Part, collect_state, named, restore_state
from safe_offrl.policies.networks import Actor


def make(seed: int) -> dict[str, Part]:
    generator = torch.Generator().manual_seed(seed)
    actor = Actor(3, 2, (4,), generator)
    optimizer = Adam(actor.parameters(), 1e-2)
    return {
        "actor": actor,
        "actor_optimizer": optimizer,
        "generator": generator,
        "alpha": torch.tensor(float(seed)),
    }


def train(parts: dict[str, Part], steps: int) -> None:
    actor, optimizer, generator = parts["actor"], parts["actor_optimizer"], parts["generator"]
    assert isinstance(actor, nn.Module)
    assert isinstance(optimizer, Adam)
    assert isinstance(generator, torch.Generator)
    for _ in range(steps):
        loss = actor(torch.randn(5, 3, generator=generator))[0].square().sum()
        optimizer.step(torch.autograd.grad(loss, optimizer.parameters))


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_restored_learner_continues_bitwise() -> None:
    parts = make(0)
    train(parts, 3)
    state = collect_state(parts)
    other = make(1)
    train(other, 2)  # with an optimiser state of its own, which must go
    restore_state(other, state)
    assert_equal(collect_state(other), state)
    train(parts, 3)
    train(other, 3)
    assert_equal(collect_state(parts), collect_state(other))
    assert "actor_optimizer/0.exp_avg" in state


def test_before_the_first_step_as_well() -> None:
    parts, other = make(0), make(1)
    restore_state(other, collect_state(parts))
    train(parts, 2)
    train(other, 2)
    assert_equal(collect_state(parts), collect_state(other))


def test_the_state_is_a_copy() -> None:
    parts = make(0)
    train(parts, 1)
    state = collect_state(parts)
    before = {k: v.clone() for k, v in state.items()}
    train(parts, 1)
    assert_equal(state, before)
    # ... and so is what a restore puts into the optimiser.
    restore_state(parts, state)
    train(parts, 1)
    assert_equal(state, before)


def test_tensors_are_restored_in_place() -> None:
    parts = make(0)
    alpha = parts["alpha"]
    restore_state(parts, collect_state(make(5)))
    assert parts["alpha"] is alpha
    assert float(alpha) == 5.0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["actor/layers.0.weight", "actor_optimizer/1.exp_avg", "alpha/value", "generator/state"]
)
def test_a_missing_tensor_is_an_error(name: str) -> None:
    state = collect_state(make(0))
    del state[name]
    with pytest.raises((KeyError, RuntimeError)):
        restore_state(make(1), state)


def test_parts_are_named_by_their_owner_once() -> None:
    one, other = torch.tensor(1.0), torch.tensor(2.0)
    parts = named("agent", {"alpha": one, **named("extraction", {"alpha": other})})
    assert parts == {"agent.alpha": one, "extraction.alpha": other}
