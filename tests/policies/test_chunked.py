"""Policies that plan: which plan, and which of its actions, in torch, in numpy and as a file."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from safe_offrl.deploy.export import FORMATS
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.errors import ConfigError
from safe_offrl.policies.acting import NumpyActor
from safe_offrl.policies.chunked import CHUNK, CHUNKED, Chunked, networks_of_plans
from safe_offrl.policies.networks import Actor, NetworkConfig, Networks
from safe_offrl.policies.proposals import PROPOSALS_MADE, ProposalNetwork, Proposals
from safe_offrl.policies.protocol import require_density, require_entropy
from tests.policies.test_latent import assert_same_in_a_file, bits, deployed_of, seeded

O, A, N = 3, 2, PROPOSALS_MADE  # noqa: E741
SIZE = CHUNK * A  # numbers of a plan


def actor_of(seed: int = 0) -> Actor:
    """A policy that is far from where one begins."""
    actor = Actor(O, A, (16, 16), seeded(seed), CHUNKED)
    with torch.no_grad():
        parts_of(actor).scorer[-1].weight.mul_(1000.0)  # type: ignore[operator]
        parts_of(actor).generator[-1].weight.mul_(3.0)  # type: ignore[operator]
    return actor


def parts_of(actor: Actor) -> ProposalNetwork:
    assert isinstance(actor.layers, ProposalNetwork)
    return actor.layers


def by_hand(slope: float, *, made: int = 2) -> Chunked:
    """A plan is tanh(w / 2), number by number; it scores ``slope`` times its last number."""
    generator, scorer = nn.Linear(1 + SIZE, SIZE), nn.Linear(1 + SIZE, 1)
    with torch.no_grad():
        generator.weight.copy_(torch.cat([torch.zeros(SIZE, 1), 0.5 * torch.eye(SIZE)], dim=1))
        generator.bias.zero_()
        scorer.weight.zero_()
        scorer.weight[0, -1] = slope
    fixed = torch.zeros(2, made, SIZE)
    fixed[:, 0, -1], fixed[:, 1, -1] = 1.0, -1.0
    network = ProposalNetwork(nn.Sequential(scorer), nn.Sequential(generator), fixed)
    return Chunked(Proposals(network, torch.zeros(1, 1)))


def two_plans() -> Tensor:
    """Noise [1, 2, SIZE + 1] of 1.1, 1.2, ... and of -1.1, -1.2, ...; without Gumbel noise."""
    noise = torch.zeros(1, 2, SIZE + 1)
    noise[0, 0, :-1] = 1.0 + torch.arange(1, SIZE + 1) / 10.0
    noise[0, 1, :-1] = -noise[0, 0, :-1]
    return noise


FIRST = [math.tanh(0.55), math.tanh(0.6)]


def test_it_takes_the_first_action_of_the_best_plan() -> None:
    """Best by its last number, of which the action knows nothing."""
    assert by_hand(9.0).act(two_plans()).tolist() == [pytest.approx(FIRST)]
    assert by_hand(-9.0).act(two_plans()).tolist() == [pytest.approx([-x for x in FIRST])]
    several = two_plans().expand(4, 1, 2, SIZE + 1)
    assert by_hand(9.0).act(several).shape == (4, 1, A)


def test_every_first_action_has_the_probability_of_its_plan() -> None:
    actions, weights = by_hand(0.7).quadrature(two_plans())
    assert actions.tolist() == [pytest.approx(FIRST), pytest.approx([-x for x in FIRST])]
    last = math.tanh(0.5 * (1.0 + SIZE / 10.0))
    share = 1.0 / (1.0 + math.exp(-2.0 * 0.7 * last))
    assert weights is not None
    assert weights.flatten().tolist() == pytest.approx([share, 1.0 - share])


def test_its_divergence_is_that_of_the_choice_of_a_plan() -> None:
    """Two plans with the same first action and +-tanh(.5) at the end: a coin each.

    The actions are the same, so their KL of 0 is below it.
    """
    p, q = by_hand(2.0), by_hand(-1.0)
    a, b = (1.0 / (1.0 + math.exp(-2.0 * k * math.tanh(0.5))) for k in (2.0, -1.0))
    expected = a * math.log(a / b) + (1.0 - a) * math.log((1.0 - a) / (1.0 - b))
    assert p.divergence(q).item() == pytest.approx(expected, rel=1e-5)
    assert expected > 0.5
    assert p.divergence(p).item() == 0.0


def drawn_from(actor: Actor) -> Tensor:
    noise = CHUNKED.draw_noise((20_000, 1, N, CHUNK + 1), np.random.default_rng(0))
    with torch.no_grad():
        actions: Tensor = actor(torch.zeros(1, 1)).act(torch.from_numpy(noise))
    return actions.flatten()


@pytest.mark.parametrize("seed", range(5))
def test_the_kl_of_actions_is_at_most_that(seed: int) -> None:
    """Of histograms of what two policies do that share a generator, and many sets of plans."""
    g = seeded(seed)
    p, q = (Actor(1, 1, (16,), g, CHUNKED) for _ in range(2))
    parts_of(q).generator = parts_of(p).generator
    with torch.no_grad():
        for actor in (p, q):
            parts_of(actor).scorer[-1].weight.mul_(500.0)  # type: ignore[operator]
        parts_of(p).generator[-1].weight.mul_(3.0)  # type: ignore[operator]
    parts_of(p).fixed = torch.randn(500, N, CHUNK, generator=g)
    bound = p(torch.zeros(1, 1)).divergence(q(torch.zeros(1, 1))).item()
    mine, theirs = (drawn_from(x).histc(20, -1.0, 1.0) / 20_000 for x in (p, q))
    found = torch.special.xlogy(mine, mine / theirs.clamp_min(1e-5)).sum().item()
    assert 0.01 < found < bound


def test_who_needs_an_entropy_or_a_density_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'kind "chunked" does not say\.'):
        require_entropy(CHUNKED, "The entropy")
    with pytest.raises(ConfigError, match=r'kind "chunked" has none\.'):
        require_density(CHUNKED, "The likelihood")


def test_networks_of_plans_have_the_same_actor_and_larger_critics() -> None:
    networks = Networks(O, A, NetworkConfig((16,), (16,), 4), seeded(), CHUNKED)
    plans = networks_of_plans(networks, seeded(1))
    assert plans.layout.sizes == (O, SIZE)
    assert plans.actor.layers is networks.actor.layers
    observations = torch.randn(5, O, generator=seeded(2))
    noise = plans.actor.noise((5,), seeded(3))
    ours, theirs = plans.actor(observations), networks.actor(observations)
    assert torch.equal(ours.act(noise)[:, :A], theirs.act(noise))
    assert plans.q(observations, torch.zeros(5, SIZE)).shape == (4, 5)
    assert plans.critics is not networks.critics
    assert list(plans.parts()["actor"].state_dict()) == list(networks.actor.state_dict())  # type: ignore[union-attr]


# --- numpy, files, checkpoints ---


def test_it_acts_in_numpy_as_in_torch() -> None:
    actor, observations = actor_of(), torch.randn(20, O, generator=seeded(1))
    sampler = NumpyActor(actor)
    for observation in observations:
        noise = sampler.noise(6, np.random.default_rng(0))
        assert noise.shape == (6, N, SIZE + 1)
        drawn = sampler.draw(observation.numpy(), 6, np.random.default_rng(0))
        assert drawn.shape == (6, A)
        with torch.no_grad():
            wanted = actor(observation[None]).act(torch.from_numpy(noise)[:, None])[:, 0]
            best = actor(observation[None]).act(torch.zeros(1, 1, N, SIZE + 1))[0, 0]
        np.testing.assert_allclose(drawn, wanted.numpy(), atol=2e-6)
        np.testing.assert_allclose(sampler.mean_action(observation.numpy()), best, atol=2e-6)


@pytest.mark.parametrize("place", range(12))
def test_an_action_of_a_network_that_is_not_finite_is_nan(place: int) -> None:
    actor = actor_of()
    parameters = list(actor.parameters())
    assert len(parameters) == 12
    with torch.no_grad():
        parameters[place].fill_(math.nan)
    drawn = NumpyActor(actor).draw(np.ones(O, np.float32), 5, np.random.default_rng(0))
    assert np.isnan(drawn).all()


def test_a_checkpoint_brings_it_back() -> None:
    deployed = deployed_of(actor_of())
    kept = DeployedPolicy.restored(deployed.tensors(), deployed.words())
    assert kept.actor.kind is CHUNKED
    assert kept.sha256 == deployed.sha256
    assert bits(kept.actor) == bits(deployed.actor)
    observation = np.ones(O, np.float32)
    mine, theirs = (NumpyActor(x.actor).mean_action(observation) for x in (kept, deployed))
    np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("file_format", list(FORMATS))
def test_a_file_does_what_it_does(file_format: str) -> None:
    assert_same_in_a_file(deployed_of(actor_of()), file_format)
