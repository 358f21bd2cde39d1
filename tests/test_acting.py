import numpy as np
import torch

from safe_offrl.acting import NumpyActor
from safe_offrl.distributions import sample
from safe_offrl.nets import Actor

ACTOR = (6, 3, (32, 16))


def make() -> tuple[Actor, NumpyActor]:
    actor = Actor(*ACTOR, torch.Generator().manual_seed(0))
    return actor, NumpyActor(actor)


def assert_agree(actor: Actor, acting: NumpyActor) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        observation = rng.standard_normal(6, dtype=np.float32)
        with torch.no_grad():
            mean, log_std = actor(torch.from_numpy(observation))
        numpy_mean, numpy_std = acting.distribution(observation)
        np.testing.assert_allclose(numpy_mean, mean.numpy(), atol=1e-6)
        np.testing.assert_allclose(numpy_std, log_std.exp().numpy(), rtol=1e-5)
        np.testing.assert_allclose(acting.mean_action(observation), mean.tanh().numpy(), atol=1e-6)
        noise = np.random.default_rng(7).standard_normal(3, dtype=np.float32)
        expected, _ = sample(mean, log_std, torch.from_numpy(noise))
        action = acting.sample(observation, np.random.default_rng(7))
        np.testing.assert_allclose(action, expected.numpy(), atol=1e-6)
        assert action.dtype == np.float32


def test_the_numpy_actor_is_the_torch_actor() -> None:
    assert_agree(*make())


def test_it_follows_learning() -> None:
    actor, acting = make()
    before = acting.mean_action(np.ones(6, dtype=np.float32)).copy()
    optimizer = torch.optim.Adam(actor.parameters(), lr=0.01, fused=True)
    for _ in range(3):
        loss = actor(torch.ones(1, 6))[0].sum()
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
