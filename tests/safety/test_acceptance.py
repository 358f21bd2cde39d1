"""Only a candidate that passes both MEASURED constraints may act."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from safe_offrl.errors import ConfigError
from safe_offrl.limits import Limit
from safe_offrl.policies.gaussian import Gaussian
from safe_offrl.policies.networks import Actor
from safe_offrl.safety.acceptance import (
    AcceptanceConfig,
    Decision,
    Judge,
    decide,
    interpolate,
    measure_divergence,
    risk_change,
)
from safe_offrl.safety.critic import SafetyCritic, SafetyCriticConfig
from safe_offrl.safety.outlook import AccidentAhead
from safe_offrl.types import Batch, States, Visited

STATES = 400
STEPS = 10.0  # per episode
DEFAULTS = AcceptanceConfig()


def policy(mean: float, std: float = 0.3) -> Actor:
    """tanh-Gaussian with this mean before tanh, everywhere."""
    actor = Actor(1, 1, (), torch.Generator().manual_seed(0))
    raw = math.atanh((math.log(std) + 5.0) / 3.5 - 1.0)
    with torch.no_grad():
        weight, bias = actor.parameters()
        weight.zero_()
        bias.copy_(torch.tensor([mean, raw]))
    return actor


def critic_of(base: float, slope: float) -> SafetyCritic:
    """Q_C = sigmoid(base + slope * action), all members alike."""
    config = SafetyCriticConfig(hidden=())
    critic = SafetyCritic(1, 1, AccidentAhead(10), config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in critic.net.parameters():
            parameter.zero_()
        critic.net.output.weight[:, 2] = slope  # inputs: observation, time to go, action
        critic.net.output.bias.fill_(base)
    return critic


def visited() -> Visited:
    zeros, column = torch.zeros(STATES), torch.randn(STATES, 1)
    batch = Batch(column, column, zeros, zeros, zeros, column, zeros, zeros + 0.5, zeros)
    return Visited(batch, zeros + 1.0, STEPS)


def judge(
    previous: Actor,
    learner: Actor,
    critic: SafetyCritic,
    *,
    epsilon: float = 0.2,
    delta: float | None = 0.05,
    accidents: bool = True,
    config: AcceptanceConfig = DEFAULTS,
) -> tuple[Decision, Actor]:
    torch.manual_seed(0)
    return decide(
        previous,
        learner,
        [
            Judge(
                Limit("accident", epsilon, 1.0),
                critic,
                visited(),
                States.at_start(torch.randn(300, 1)),
            )
        ],
        config,
        kl_limit=delta,
        constrain_safety=accidents,
        confidence=0.95,
        generator=torch.Generator().manual_seed(0),
    )


def means(actor: Actor) -> float:
    policy = actor(torch.zeros(1, 1))
    assert isinstance(policy, Gaussian)
    return policy.mean.item()


SAFE = critic_of(-5.0, 0.0)  # .7 % whatever one does


# --- the two measurements ---


def test_interpolation_is_in_parameters_and_copies() -> None:
    previous, learner = policy(0.0), policy(1.0)
    candidate = interpolate(previous, learner, 0.25)
    assert means(candidate) == pytest.approx(0.25)
    assert (means(previous), means(learner)) == (0.0, 1.0)


def test_kl_is_measured_in_both_directions() -> None:
    # N(.2, .2) against N(0, .4): log 2 + (.04 + .04) / .32 - 1/2,
    # and the other way -log 2 + (.16 + .04) / .08 - 1/2
    forward, reverse = math.log(2) + 0.25 - 0.5, -math.log(2) + 2.5 - 0.5
    measured = measure_divergence(policy(0.2, 0.2), policy(0.0, 0.4), torch.zeros(5, 1), 0.95)
    assert measured.tolist() == pytest.approx([forward, reverse, forward, reverse], rel=1e-4)


def test_the_tail_sees_what_the_mean_hides() -> None:
    candidate = policy(0.0)
    with torch.no_grad():
        next(candidate.parameters())[0] = 1.0
    states = torch.zeros(100, 1)
    states[:10] = 1.0  # the candidate differs in 10 % of the states, there by 1 / (2 * .09) nats
    measured = measure_divergence(candidate, policy(0.0), states, 0.95)
    assert measured[0].item() == pytest.approx(0.1 / 0.18, rel=1e-4)
    assert measured[2].item() == pytest.approx(1.0 / 0.18, rel=1e-4)


def test_risk_change_by_hand() -> None:
    critic = critic_of(0.0, 2.0)
    low, high = policy(-0.5, 0.01), policy(0.5, 0.01)
    noise = torch.zeros(STATES, 1)
    expected = 1 / (1 + math.exp(-2 * math.tanh(0.5))) - 1 / (1 + math.exp(2 * math.tanh(0.5)))
    assert risk_change(high, low, critic, visited(), noise) == pytest.approx(expected, abs=1e-5)
    assert risk_change(low, high, critic, visited(), noise) == pytest.approx(-expected, abs=1e-5)


def test_what_happens_after_the_first_accident_does_not_count() -> None:
    """The candidate is riskier in the states that count and safer in the others."""
    critic, noise = critic_of(0.0, 2.0), torch.zeros(STATES, 1)
    candidate, previous = policy(0.0, 0.01), policy(0.0, 0.01)
    with torch.no_grad():
        next(candidate.parameters())[0] = 0.5  # the mean is half the observation
    seen = visited()
    sign = torch.where(torch.arange(STATES) < 10, 1.0, -1.0)
    batch = seen.batch._replace(observations=sign.unsqueeze(1))
    counted = (sign > 0).float()
    expected = 1 / (1 + math.exp(-2 * math.tanh(0.5))) - 0.5
    change = risk_change(candidate, previous, critic, Visited(batch, counted, STEPS), noise)
    assert change == pytest.approx(expected, abs=1e-5)
    nothing = Visited(batch, torch.zeros(STATES), 0.0)
    assert risk_change(candidate, previous, critic, nothing, noise) == 0.0


# --- the decision ---


def test_a_small_safe_step_is_accepted_whole() -> None:
    decision, actor = judge(policy(0.0), policy(0.05), SAFE)
    assert decision.accepted
    assert decision.fraction == 1.0
    assert means(actor) == pytest.approx(0.05)
    assert decision.kl_forward_mean == pytest.approx(0.05**2 / (2 * 0.09), rel=1e-3)
    assert decision.v_candidate == pytest.approx(decision.v_previous)


def test_backtracking_finds_the_largest_fraction_of_the_grid() -> None:
    # KL = (.3 f)^2 / .18 = .5 f^2 < .05 needs f < .316: of 1, .7, .49, .343, .2401 the last.
    decision, actor = judge(policy(0.0), policy(0.3), SAFE)
    assert decision.fraction == pytest.approx(0.7**4)
    assert means(actor) == pytest.approx(0.3 * 0.7**4)
    assert decision.kl_forward_mean < 0.05
    assert decision.kl_reverse_mean < 0.05
    measured = measure_divergence(actor, policy(0.0), visited().batch.observations, 0.95)
    assert decision.kl_forward_mean == pytest.approx(measured[0].item(), rel=1e-3)
    assert decision.reason == "every constraint holds"


@pytest.mark.parametrize("std", [0.15, 0.6])
def test_either_direction_of_kl_refuses(std: float) -> None:
    """Narrowing is dear one way, widening the other; a single direction would let one pass."""
    previous, learner = policy(0.0, 0.3), policy(0.0, std)
    forward, reverse, *_ = measure_divergence(learner, previous, torch.zeros(2, 1), 0.95).tolist()
    between = 0.5 * (forward + reverse)
    assert min(forward, reverse) < between < max(forward, reverse)
    decision, actor = judge(
        previous, learner, SAFE, delta=between, config=AcceptanceConfig(tries=1)
    )
    assert not decision.accepted
    assert actor is previous
    assert decision.reason.startswith("KL ")


def test_the_tail_of_kl_refuses() -> None:
    learner = policy(0.0)
    with torch.no_grad():
        next(learner.parameters())[0] = 0.05  # KL grows with o^2
    one = AcceptanceConfig(tries=1, tail_ratio=5.0)
    assert judge(policy(0.0), learner, SAFE, config=one)[0].accepted
    strict = AcceptanceConfig(tries=1, tail_ratio=0.5)
    decision, _ = judge(policy(0.0), learner, SAFE, config=strict)
    assert not decision.accepted
    assert decision.reason.startswith("KL tail")


def test_an_adversarial_candidate_is_refused() -> None:
    """The hazard begins just right of where the deployed policy stands: every fraction is in it."""
    critic = critic_of(80.0, 200.0)  # deadly above -.4, the deployed policy's action is -.46
    previous, learner = policy(-0.5, 0.02), policy(1.5, 0.02)
    decision, actor = judge(previous, learner, critic, delta=None)
    assert not decision.accepted
    assert decision.fraction == 0.0
    assert actor is previous
    assert decision.v_previous < 0.2 <= decision.v_candidate
    assert "V_accident" in decision.reason
    # It is the accident constraint alone that stops it.
    assert judge(previous, learner, critic, delta=None, accidents=False)[0].accepted


def test_backtracking_stops_below_epsilon() -> None:
    critic = critic_of(-5.0, 3.0)
    decision, actor = judge(policy(-0.5), policy(1.0), critic, delta=None)
    assert decision.accepted
    assert 0.0 < decision.fraction < 1.0
    assert decision.v_candidate < 0.2
    torch.manual_seed(0)
    noise = torch.randn(STATES, 1, generator=torch.Generator().manual_seed(0))
    change = risk_change(actor, policy(-0.5), critic, visited(), noise)
    assert decision.v_candidate == pytest.approx(decision.v_previous + STEPS * change, abs=1e-4)
    # One fraction earlier the limit was exceeded.
    earlier = interpolate(policy(-0.5), policy(1.0), decision.fraction / 0.7)
    change = risk_change(earlier, policy(-0.5), critic, visited(), noise)
    assert decision.v_previous + STEPS * change >= 0.2


@pytest.mark.parametrize(("target", "accepted"), [(-0.1, True), (0.1, False)])
def test_above_epsilon_only_a_lower_estimate_is_accepted(target: float, accepted: bool) -> None:
    critic = critic_of(0.0, 0.5)  # about 50 %, epsilon is 20 %
    decision, actor = judge(policy(0.0), policy(target), critic)
    assert decision.accepted == accepted
    assert decision.v_previous > 0.2
    assert decision.v_candidate > 0.2
    assert (decision.v_candidate < decision.v_previous) == accepted
    if accepted:
        assert decision.reason == "improves on a policy above the limit"
    else:
        assert means(actor) == 0.0


def test_above_epsilon_the_kl_limit_holds_all_the_same() -> None:
    decision, _ = judge(policy(0.0), policy(-0.5), critic_of(0.0, 0.5))
    assert decision.accepted
    assert decision.fraction < 1.0
    assert max(decision.kl_forward_mean, decision.kl_reverse_mean) < 0.05


def test_an_unchanged_policy_above_epsilon_is_no_improvement() -> None:
    assert not judge(policy(0.0), policy(0.0), critic_of(0.0, 0.5))[0].accepted


def test_an_estimate_at_its_ceiling_hides_no_deterioration() -> None:
    """V = 1 is the most there is: a candidate that is riskier still must not look like progress."""
    critic = critic_of(6.0, 3.0)
    # Members that disagree push the upper limit of the estimate beyond 1.
    with torch.no_grad():
        critic.net.output.bias[2] = 2.0
    decision, _ = judge(policy(0.0), policy(0.1), critic)
    assert not decision.accepted


def nan_actor() -> Actor:
    actor = policy(0.0)
    with torch.no_grad():
        list(actor.parameters())[1].fill_(math.nan)
    return actor


@pytest.mark.parametrize("delta", [0.05, None])
def test_a_nan_candidate_is_refused(delta: float | None) -> None:
    previous = policy(0.0)
    decision, actor = judge(previous, nan_actor(), SAFE, delta=delta)
    assert not decision.accepted
    assert actor is previous


def test_a_nan_estimate_is_refused() -> None:
    decision, _ = judge(policy(0.0), policy(0.01), critic_of(math.nan, 0.0))
    assert not decision.accepted


def test_switches() -> None:
    previous, far, risky = policy(-1.0), policy(3.0), critic_of(-3.0, 2.0)
    config = AcceptanceConfig(tries=16)

    def decision(delta: float | None, accidents: bool) -> Decision:
        return judge(
            previous, far, risky, epsilon=0.6, delta=delta, accidents=accidents, config=config
        )[0]

    both, no_kl = decision(0.05, True), decision(None, True)
    no_accidents, none = decision(0.05, False), decision(None, False)
    assert max(both.kl_forward_mean, both.kl_reverse_mean) < 0.05
    assert both.v_candidate < 0.6
    assert no_kl.fraction > both.fraction
    assert no_kl.kl_forward_mean > 0.05  # measured all the same
    assert no_kl.v_candidate < 0.6
    assert no_accidents.kl_forward_mean < 0.05
    assert none.fraction == 1.0
    assert none.v_candidate > 0.6  # measured all the same
    assert none.reason == "every constraint holds"  # there is none


def test_nothing_is_changed_by_deciding() -> None:
    previous, learner, critic = policy(0.0), policy(0.3), critic_of(-3.0, 1.0)
    before: list[Tensor] = [
        p.clone() for m in (previous, learner, critic.net) for p in m.parameters()
    ]
    judge(previous, learner, critic)
    after = [p for m in (previous, learner, critic.net) for p in m.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "settings", [{"shrink": 1.0}, {"tries": 0}, {"tail": math.nan}, {"tail_ratio": 0.0}]
)
def test_a_backtracking_that_gets_nowhere_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"acceptance.{next(iter(settings))}"):
        AcceptanceConfig(**settings)
