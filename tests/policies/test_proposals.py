"""Best of N proposals: what is proposed and chosen, in torch, in numpy and as a file, and what the
KL of the choice bounds.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from safe_offrl.deploy.export import FORMATS
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.errors import ConfigError
from safe_offrl.policies.acting import NumpyActor
from safe_offrl.policies.latent import generate
from safe_offrl.policies.networks import Actor
from safe_offrl.policies.proposals import PROPOSALS, ProposalNetwork, Proposals
from safe_offrl.policies.protocol import require_density, require_entropy
from safe_offrl.safety.acceptance import interpolate
from tests.policies.test_latent import assert_same_in_a_file, bits, deployed_of, seeded

O, A, N = 3, 2, 16  # noqa: E741


def actor_of(seed: int = 0) -> Actor:
    """A policy that is far from where one begins."""
    actor = Actor(O, A, (16, 16), seeded(seed), PROPOSALS)
    with torch.no_grad():
        parts_of(actor).scorer[-1].weight.mul_(1000.0)  # type: ignore[operator]
        parts_of(actor).generator[-1].weight.mul_(3.0)  # type: ignore[operator]
    return actor


def parts_of(actor: Actor) -> ProposalNetwork:
    assert isinstance(actor.layers, ProposalNetwork)
    return actor.layers


def proposals(actor: Actor, observations: Tensor) -> Proposals:
    policy = actor(observations)
    assert isinstance(policy, Proposals)
    return policy


def drawn_noise(*shape: int, size: int = A, seed: int = 0) -> Tensor:
    noise = PROPOSALS.draw_noise((*shape, N, size + 1), np.random.default_rng(seed))
    return torch.from_numpy(noise)


def line(weights: list[float], bias: float) -> nn.Sequential:
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weights]))
        layer.bias.fill_(bias)
    return nn.Sequential(layer)


def by_hand(slope: float, observation: float = 3.0, observations: int = 1) -> Proposals:
    """a = tanh(.5 w - .1 s + .2) with w clipped at 3, l = slope a + .7 s."""
    fixed = torch.linspace(-1.0, 1.0, N).view(1, N, 1)
    network = ProposalNetwork(line([0.7, slope], 0.0), line([-0.1, 0.5], 0.2), fixed)
    return Proposals(network, torch.full((observations, 1), observation))


def made(w: float) -> float:
    return math.tanh(0.5 * max(-3.0, min(3.0, w)) - 0.3 + 0.2)


# --- what it is ---


def test_what_is_proposed_and_with_which_probability() -> None:
    """Two proposals, at 2 and at 100, and fourteen far below; l = 4 a, whatever 0.7 s adds."""
    noise = torch.full((1, N, 2), -50.0)
    noise[0, 5, 0], noise[0, 11, 0] = 2.0, 100.0
    (actions, weights), log_probs = by_hand(4.0).scored(noise)
    expected = [made(-50.0)] * N
    expected[5], expected[11] = made(2.0), made(3.0)  # the generator's reach
    assert actions.flatten().tolist() == pytest.approx(expected)
    total = sum(math.exp(4.0 * a) for a in expected)
    assert weights is not None
    assert weights.flatten().tolist() == pytest.approx(
        [math.exp(4.0 * a) / total for a in expected]
    )
    assert log_probs.exp().tolist() == pytest.approx(weights.flatten().tolist())
    assert weights.sum().item() == pytest.approx(1.0)


def test_rows_are_blocks_of_observations() -> None:
    """Row k B + b is proposal k at observation b, made of noise [b, k]."""
    actor, observations = actor_of(), torch.randn(5, O, generator=seeded(1))
    noise = torch.randn(5, N, A + 1, generator=seeded(2))
    policy = proposals(actor, observations)
    quadrature = policy.quadrature(noise)
    assert quadrature.weights is not None
    assert quadrature.weights.shape == (N, 5)
    for b in range(5):
        seen = observations[b : b + 1]
        alone = proposals(actor, seen).quadrature(noise[b : b + 1])
        wanted = generate(parts_of(actor).generator, seen, noise[b, :, None, :A])[:, 0]
        torch.testing.assert_close(quadrature.actions[b::5], wanted)
        torch.testing.assert_close(quadrature.weights[:, b : b + 1], alone.weights)


def test_how_often_it_takes_what_is_the_probability() -> None:
    """Of the same proposals again and again: Gumbel noise makes the softmax."""
    policy = by_hand(3.0)
    noise = drawn_noise(1, size=1).expand(40_000, 1, N, 2).clone()
    noise[..., -1] = drawn_noise(40_000, 1, size=1, seed=1)[..., -1]
    with torch.no_grad():
        actions, weights = policy.quadrature(noise[0])
        drawn = policy.act(noise).flatten()
    assert weights is not None
    counted = (drawn[:, None] == actions.flatten()).float().mean(0)
    torch.testing.assert_close(counted, weights[:, 0].detach(), atol=0.01, rtol=0.0)
    assert weights.max().item() > 0.15


def test_gumbel_noise_is_drawn_in_the_last_column() -> None:
    """Mean .5772 and variance pi^2 / 6; the rest is standard normal."""
    noise = drawn_noise(20_000).numpy()
    assert noise.dtype == np.float32
    normal, gumbel = noise[..., :-1], noise[..., -1]
    assert normal.mean() == pytest.approx(0.0, abs=0.01)
    assert normal.var() == pytest.approx(1.0, abs=0.01)
    assert gumbel.mean() == pytest.approx(0.5772, abs=0.01)
    assert gumbel.var() == pytest.approx(math.pi**2 / 6.0, abs=0.02)


def test_without_noise_it_is_the_best_of_what_is_always_proposed() -> None:
    """Not what the generator makes of zeros: the fixed noise goes from -1 to 1."""
    zeros = torch.zeros(1, 1, N, 2)
    assert by_hand(4.0).act(zeros).item() == pytest.approx(made(1.0))
    assert by_hand(-4.0).act(zeros).item() == pytest.approx(made(-1.0))


def test_its_entropy_is_that_of_the_choice() -> None:
    require_entropy(PROPOSALS, "The entropy")
    assert PROPOSALS.target_entropy is not None
    assert PROPOSALS.target_entropy(3, math.nan, 0.3) == pytest.approx(0.3 * math.log(16.0))
    noise = drawn_noise(7, size=1)
    for slope, entropy in ((0.0, math.log(16.0)), (1e4, 0.0)):
        quadrature, log_probs = by_hand(slope, observations=7).scored(noise)
        found = -quadrature.expect(log_probs)
        assert found.tolist() == pytest.approx([entropy] * 7, abs=1e-3)


def test_it_has_no_density() -> None:
    with pytest.raises(ConfigError, match=r'of the kind "proposals" has none\.'):
        require_density(PROPOSALS, "The likelihood")


def test_it_begins_near_the_behaviour() -> None:
    """All proposals are as likely as each other, within a fiftieth."""
    actor, observations = Actor(O, A, (64, 64), seeded(), PROPOSALS), torch.randn(500, O)
    quadrature = proposals(actor, observations).quadrature(drawn_noise(500))
    assert quadrature.weights is not None
    torch.testing.assert_close(
        quadrature.weights, torch.full((N, 500), 1.0 / N), rtol=0.02, atol=0.0
    )


# --- its divergence ---


def test_its_divergence_is_by_hand() -> None:
    """Of two fixed sets of proposals at w = -1 and 1 alone: a coin each, l = +-slope a."""
    w = torch.tensor([[-1.0, 1.0], [1.0, 0.5]]).unsqueeze(-1)
    expected = 0.0
    for one, other in ((-1.0, 1.0), (1.0, 0.5)):
        gap = made(one) - made(other)
        p, q = (1.0 / (1.0 + math.exp(-slope * gap)) for slope in (4.0, -2.0))
        expected += 0.5 * (p * math.log(p / q) + (1.0 - p) * math.log((1.0 - p) / (1.0 - q)))
    p_policy, q_policy = by_hand(4.0, observations=3), by_hand(-2.0, observations=3)
    p_policy.network.fixed = w
    assert p_policy.divergence(q_policy).tolist() == pytest.approx([expected] * 3)
    assert p_policy.divergence(p_policy).tolist() == [0.0] * 3


def test_its_gradient_is_that_of_its_own_scores() -> None:
    p, q = by_hand(1.0), by_hand(2.0)
    p.divergence(q).sum().backward()
    weight = next(p.network.scorer.parameters())
    assert weight.grad is not None
    assert weight.grad.any()
    assert all(x.grad is None for x in q.network.parameters())
    assert all(x.grad is None for x in p.network.generator.parameters())


def test_policies_are_compared_at_the_same_mirrored_noise() -> None:
    """Whatever the seed of their networks; no checkpoint has to keep it."""
    one, other = parts_of(Actor(O, A, (4,), seeded(1), PROPOSALS)), parts_of(actor_of(2))
    assert torch.equal(one.fixed, other.fixed)
    assert torch.equal(one.fixed[0], -one.fixed[1])
    assert one.fixed.shape == (2, N, A)
    assert 0.5 < one.fixed[0].std().item() < 1.5
    assert "fixed" not in one.state_dict()


W = torch.linspace(-6.0, 6.0, 1001, dtype=torch.float64)
NORMAL = torch.softmax(-0.5 * W.square(), dim=0)


def random_policies(seed: int) -> tuple[Proposals, Proposals]:
    """Two that share a generator, of scorers smooth or sharp, near or far, as chance has it."""
    g = seeded(seed)
    p, q = (Actor(1, 1, (16,) * (1 + seed % 2), g, PROPOSALS) for _ in range(2))
    sharp, near = torch.rand(2, generator=g).tolist()
    with torch.no_grad():
        for parameter in parts_of(p).generator.parameters():
            parameter.mul_(1.0 + 4.0 * sharp)
        for actor in (p, q):
            parts_of(actor).scorer[-1].weight.mul_(1000.0 * (0.1 + near))  # type: ignore[operator]
    parts_of(q).generator = parts_of(p).generator
    parts_of(p).fixed = torch.randn(1000, N, 1, generator=g)  # the bound, not an estimate of it
    return proposals(p, torch.zeros(1, 1)), proposals(q, torch.zeros(1, 1))


def weights_of(policy: Proposals, others: Tensor) -> Tensor:
    """The probability that a proposal made of each of the points W is taken, N times its own.

    ``others`` [M, N - 1] are the noise of the other proposals, over which is averaged.
    """

    def exponentials(w: Tensor) -> Tensor:
        actions = generate(policy.network.generator, torch.zeros(1, 1), w.float().view(-1, 1, 1))
        return policy._scores(actions).double().view(w.shape).exp()

    with torch.no_grad():
        mine, theirs = exponentials(W), exponentials(others)
        share = (mine[:, None] / (mine[:, None] + theirs.sum(-1))).mean(-1)
    weights = NORMAL * share
    return weights / weights.sum()


def kl_of_actions(p: Proposals, q: Proposals, others: Tensor, bins: int) -> float:
    """KL of the histograms of their actions, which is no more than that of the actions."""
    with torch.no_grad():
        actions = generate(
            p.network.generator, torch.zeros(1, 1), W.float().view(-1, 1, 1)
        ).flatten()
    place = ((actions.double() + 1.0) / 2.0 * bins).long().clamp(0, bins - 1)
    mine, theirs = (
        torch.zeros(bins, dtype=torch.float64).index_add_(0, place, weights_of(x, others))
        for x in (p, q)
    )
    return float(torch.special.xlogy(mine, mine / theirs.clamp_min(1e-300)).sum())


def test_the_kl_of_actions_is_at_most_the_kl_of_the_choice() -> None:
    """The data-processing inequality, for a hundred generators with two scorers each."""
    shares = []
    for seed in range(100):
        p, q = random_policies(seed)
        others = torch.randn(200, N - 1, generator=seeded(seed), dtype=torch.float64)
        found, bound = kl_of_actions(p, q, others, bins=1000), p.divergence(q).item()
        assert found <= bound * 1.02 + 1e-6
        assert bound <= 16.0
        shares.append(found / bound)
    assert np.median(shares) > 0.3  # a bound that is of use


def test_from_the_behaviour_it_is_at_most_log_n() -> None:
    """As sharp as a choice can be: the highest action of sixteen."""
    sharp, even = by_hand(1e4), by_hand(0.0)
    bound = sharp.divergence(even).item()
    assert bound == pytest.approx(math.log(16.0))
    # The density of the highest w of sixteen, from N(0, 1): log 16 - 15/16 nats.
    others = torch.randn(4000, N - 1, generator=seeded(), dtype=torch.float64)
    narrow, flat = by_hand(300.0), by_hand(0.0)
    for policy in (narrow, flat):
        next(policy.network.generator.parameters()).copy_(torch.tensor([[0.0, 0.25]]))
    found = kl_of_actions(narrow, flat, others, bins=2000)
    assert found == pytest.approx(math.log(16.0) - 15.0 / 16.0, rel=0.1)


# --- numpy, files, checkpoints ---


def test_it_acts_in_numpy_as_in_torch() -> None:
    actor, observations = actor_of(), torch.randn(20, O, generator=seeded(1))
    sampler = NumpyActor(actor)
    for observation in observations:
        noise = sampler.noise(6, np.random.default_rng(0))
        assert noise.shape == (6, N, A + 1)
        drawn = sampler.draw(observation.numpy(), 6, np.random.default_rng(0))
        assert drawn.dtype == np.float32
        with torch.no_grad():
            wanted = actor(observation[None]).act(torch.from_numpy(noise)[:, None])[:, 0]
            best = actor(observation[None]).act(torch.zeros(1, 1, N, A + 1))[0, 0]
        np.testing.assert_allclose(drawn, wanted.numpy(), atol=2e-6)
        np.testing.assert_allclose(sampler.mean_action(observation.numpy()), best, atol=2e-6)
    # Beyond the reach of the generator too.
    far = 100.0 * torch.randn(6, N, A + 1, generator=seeded(2))
    with torch.no_grad():
        wanted = actor(observations[:1]).act(far[:, None])[:, 0]
    drawn = PROPOSALS.in_numpy(actor.layers)(observations[0].numpy(), far.numpy())
    np.testing.assert_allclose(drawn, wanted.numpy(), atol=2e-6)


NOT_FINITE = [(place, math.nan) for place in range(12)]
NOT_FINITE += [(place, sign * math.inf) for place in (5, 11) for sign in (1, -1)]  # last biases


@pytest.mark.parametrize(("place", "value"), NOT_FINITE)
def test_an_action_of_a_network_that_is_not_finite_is_nan(place: int, value: float) -> None:
    actor = actor_of()
    parameters = list(actor.parameters())
    assert len(parameters) == 12
    with torch.no_grad():
        parameters[place].fill_(value)
    drawn = NumpyActor(actor).draw(np.ones(O, np.float32), 5, np.random.default_rng(0))
    assert np.isnan(drawn).all()


def test_a_checkpoint_brings_it_back() -> None:
    deployed = deployed_of(actor_of())
    kept = DeployedPolicy.restored(deployed.tensors(), deployed.words())
    assert kept.actor.kind is PROPOSALS
    assert kept.sha256 == deployed.sha256
    assert not any(p.requires_grad for p in parts_of(kept.actor).generator.parameters())
    observation = np.ones(O, np.float32)
    mine, theirs = (NumpyActor(x.actor).mean_action(observation) for x in (kept, deployed))
    np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("file_format", list(FORMATS))
def test_a_file_does_what_it_does(file_format: str) -> None:
    assert_same_in_a_file(deployed_of(actor_of()), file_format)


def test_between_two_versions_the_generator_is_the_same_bit_for_bit() -> None:
    previous, learner = actor_of(), actor_of()
    with torch.no_grad():
        for parameter in parts_of(learner).scorer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=seeded(1)))
    between = interpolate(previous, learner, 0.7)
    assert bits(parts_of(between).generator) == bits(parts_of(previous).generator)
    assert bits(parts_of(between).scorer) != bits(parts_of(previous).scorer)
