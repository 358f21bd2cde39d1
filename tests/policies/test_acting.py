import copy

import numpy as np
import pytest
import torch

from safe_offrl.policies.acting import NumpyActor, NumpyRisk
from safe_offrl.policies.categorical import Categorical
from safe_offrl.policies.gaussian import Gaussian
from safe_offrl.policies.kinds import kind_for
from safe_offrl.policies.networks import Actor, StackedMLP, timed_inputs

ACTOR = (6, 3, (32, 16))


def make() -> tuple[Actor, NumpyActor]:
    actor = Actor(*ACTOR, torch.Generator().manual_seed(0))
    return actor, NumpyActor(actor)


def assert_agree(actor: Actor, acting: NumpyActor) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        observation = rng.standard_normal(6, dtype=np.float32)
        with torch.no_grad():
            policy = actor(torch.from_numpy(observation))
        assert isinstance(policy, Gaussian)
        mean = policy.mean.tanh().numpy()
        np.testing.assert_allclose(acting.mean_action(observation), mean, atol=1e-6)
        noise = np.random.default_rng(7).standard_normal(3, dtype=np.float32)
        expected = policy.act(torch.from_numpy(noise))
        (action,) = acting.draw(observation, 1, np.random.default_rng(7))
        np.testing.assert_allclose(action, expected.numpy(), atol=1e-6)
        assert action.dtype == np.float32


def test_the_numpy_actor_is_the_torch_actor() -> None:
    assert_agree(*make())


def test_it_follows_learning() -> None:
    actor, acting = make()
    before = acting.mean_action(np.ones(6, dtype=np.float32)).copy()
    optimizer = torch.optim.Adam(actor.parameters(), lr=0.01, fused=True)
    for _ in range(3):
        policy = actor(torch.ones(1, 6))
        assert isinstance(policy, Gaussian)
        loss = policy.mean.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert np.abs(acting.mean_action(np.ones(6, dtype=np.float32)) - before).max() > 0.01
    assert_agree(actor, acting)


def test_it_follows_a_loaded_state() -> None:
    actor, acting = make()
    other = Actor(*ACTOR, torch.Generator().manual_seed(5))
    actor.load_state_dict(other.state_dict())
    assert_agree(other, acting)


# --- discrete actions ---


def make_discrete(*biases: float) -> tuple[Actor, NumpyActor]:
    actor = Actor(6, 3, (8,), torch.Generator().manual_seed(0), kind_for(discrete=True))
    if biases:
        with torch.no_grad():
            for parameter in actor.parameters():
                parameter.zero_()
            parameter.copy_(torch.tensor(biases))
    return actor, NumpyActor(actor)


def test_discrete_samples_follow_the_network() -> None:
    actor, acting = make_discrete()
    observation = np.random.default_rng(0).standard_normal(6, dtype=np.float32)
    with torch.no_grad():
        policy = actor(torch.from_numpy(observation))
    assert isinstance(policy, Categorical)
    probabilities = policy.log_probs.exp().numpy()
    rng = np.random.default_rng(1)
    draws = acting.draw(observation, 8000, rng)
    assert draws.dtype == np.float32
    assert (draws.sum(1) == 1.0).all()
    assert set(np.unique(draws)) == {0.0, 1.0}
    np.testing.assert_allclose(draws.mean(0), probabilities, atol=0.025)
    assert acting.mean_action(observation).tolist() == np.eye(3)[probabilities.argmax()].tolist()


@pytest.mark.parametrize("actor", [make()[1], make_discrete()[1]], ids=["box", "discrete"])
def test_draws_at_once_are_draws_one_by_one(actor: NumpyActor) -> None:
    observation = np.ones(6, dtype=np.float32)
    rng, same = np.random.default_rng(3), np.random.default_rng(3)
    together = actor.draw(observation, 4, rng)
    alone = np.concatenate([actor.draw(observation, 1, same) for _ in range(4)])
    np.testing.assert_array_equal(together, alone)
    assert actor.draw(observation, 0, rng).shape == (0, 3)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_diverged_network_chooses_no_action(broken: float) -> None:
    _, acting = make_discrete(0.0, broken, 0.0)
    observation = np.zeros(6, dtype=np.float32)
    assert np.isnan(acting.draw(observation, 2, np.random.default_rng(0))).all()
    assert np.isnan(acting.mean_action(observation)).all()


def risk_net(seed: int = 0) -> StackedMLP:
    return StackedMLP(
        2, 6 + 1 + 3, (16, 12), layer_norm=True, generator=torch.Generator().manual_seed(seed)
    )


def assert_same_risk(net: StackedMLP, risk: NumpyRisk) -> None:
    rng = np.random.default_rng(2)
    for count in (1, 4):
        observation = rng.standard_normal(6, dtype=np.float32)
        actions = rng.uniform(-1.0, 1.0, (count, 3)).astype(np.float32)
        inputs = timed_inputs(
            torch.from_numpy(observation).expand(count, -1),
            torch.full((count,), 0.3),
            torch.from_numpy(actions),
        )
        with torch.no_grad():
            expected = torch.sigmoid(net(inputs)).mean(0).numpy()
        np.testing.assert_allclose(risk(observation, 0.3, actions), expected, atol=1e-6)


def test_the_numpy_risk_is_that_of_the_network() -> None:
    net = risk_net()
    assert_same_risk(net, NumpyRisk(net))
    linear = StackedMLP(2, 10, (), layer_norm=True, generator=torch.Generator().manual_seed(3))
    assert_same_risk(linear, NumpyRisk(linear))


def test_the_numpy_risk_follows_a_loaded_state_also_where_it_was_copied() -> None:
    pair = copy.deepcopy([net := risk_net(), NumpyRisk(net)])
    copied, risk = pair
    assert isinstance(copied, StackedMLP)
    assert isinstance(risk, NumpyRisk)
    copied.load_state_dict(risk_net(5).state_dict())
    assert_same_risk(risk_net(5), risk)
