import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from safe_offrl.acting import NumpyActor
from safe_offrl.nets import Actor
from safe_offrl.safety_critic import SafetyCritic, SafetyCriticConfig
from safe_offrl.shield import Shield, ShieldConfig, Vector

OBSERVATION = np.zeros(1, dtype=np.float32)


def policy(mean: float = 0.0, std: float = 0.8) -> NumpyActor:
    actor = Actor(1, 1, (), torch.Generator().manual_seed(0))
    raw = math.atanh((math.log(std) + 5.0) / 3.5 - 1.0)
    with torch.no_grad():
        weight, bias = actor.parameters()
        weight.zero_()
        bias.copy_(torch.tensor([mean, raw]))
    return NumpyActor(actor)


def critic_of(slope: float, *, time: float = 0.0, base: float = 0.0) -> SafetyCritic:
    """Q_C = sigmoid(base + slope * action + time * time to go)."""
    critic = SafetyCritic(1, 1, 10, SafetyCriticConfig(hidden=()), torch.Generator().manual_seed(0))
    with torch.no_grad():
        critic.net.output.weight.zero_()
        critic.net.output.weight[:, 1] = time
        critic.net.output.weight[:, 2] = slope
        critic.net.output.bias.fill_(base)
    return critic


def shield_of(
    critic: SafetyCritic,
    threshold: float | None,
    candidates: int = 16,
    controller: Callable[[Vector], Vector] | None = None,
) -> Shield:
    return Shield(critic, threshold, ShieldConfig(candidates=candidates), controller)


def stream(shield: Shield, actor: NumpyActor, n: int = 300) -> tuple[np.ndarray, int]:
    """Actions of n steps, and how many were replaced."""
    rng = np.random.default_rng(0)
    chosen = [shield.choose(actor, OBSERVATION, 0.5, rng) for _ in range(n)]
    return np.concatenate([a for a, _ in chosen]), sum(replaced for _, replaced in chosen)


def v(value: float) -> Vector:
    return np.array([value], dtype=np.float32)


def test_without_a_threshold_it_abstains() -> None:
    """A useless critic gets no threshold; then not one action differs, nor one random number."""
    shield = shield_of(critic_of(50.0), None)
    assert shield.abstains
    actions, replaced = stream(shield, policy())
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(actions, [policy().sample(OBSERVATION, rng)[0] for _ in actions])
    assert replaced == 0


def test_a_safe_policy_is_not_touched() -> None:
    actions, replaced = stream(shield_of(critic_of(0.0, base=-3.0), 0.5), policy())
    unshielded, _ = stream(shield_of(critic_of(0.0), None), policy())
    np.testing.assert_array_equal(actions, unshielded)
    assert replaced == 0


def test_no_action_above_the_threshold_is_sent() -> None:
    # sigmoid(10 a) <= .5 is a <= 0: half of the policy's actions.
    shield = shield_of(critic_of(10.0), 0.5)
    assert not shield.abstains
    actions, replaced = stream(shield, policy())
    unshielded, _ = stream(shield_of(critic_of(0.0), None), policy())
    assert actions.max() <= 0.0
    assert (unshielded > 0.0).sum() > 100
    assert 100 < replaced < 200


def test_the_first_passing_sample_is_taken_not_the_least_risky() -> None:
    """An argmin over candidates would pile up at the edge; rejection keeps the policy's spread."""
    actions, _ = stream(shield_of(critic_of(10.0), 0.5), policy())
    expected = -np.abs(np.tanh(0.8 * np.random.default_rng(1).standard_normal(10_000)))
    assert actions.mean() == pytest.approx(expected.mean(), abs=0.06)
    rng = np.random.default_rng(3)
    draws = [policy().sample(OBSERVATION, rng)[0] for _ in range(16)]
    first = next(a for a in draws if a <= 0.0)
    chosen, _ = shield_of(critic_of(10.0), 0.5).choose(
        policy(), OBSERVATION, 0.5, np.random.default_rng(3)
    )
    assert chosen[0] == first


def test_time_to_go_reaches_the_critic() -> None:
    shield = shield_of(critic_of(0.0, time=10.0, base=-5.0), 0.5)  # dangerous in the first half
    rng = np.random.default_rng(0)
    assert shield.choose(policy(), OBSERVATION, 1.0, rng)[1]
    assert not shield.choose(policy(), OBSERVATION, 0.1, rng)[1]


def test_the_mean_action_is_shielded_too() -> None:
    shield = shield_of(critic_of(10.0), 0.5)
    action, replaced = shield.choose(
        policy(0.5), OBSERVATION, 0.5, np.random.default_rng(0), mean_action=True
    )
    assert replaced
    assert action[0] <= 0.0


# --- fall-backs, in their order; a narrow policy at tanh(1) never passes "a <= 0" by itself ---

NARROW = policy(1.0, 0.02)


def test_first_fallback_is_the_mean_action() -> None:
    # The policy is wide, one candidate only, and just the mean is below the threshold.
    shield = shield_of(critic_of(-30.0, base=29.0 * math.tanh(1.0)), 0.5, 1, lambda _: v(1.0))
    actor, rng = policy(1.0, 0.8), np.random.default_rng(0)
    seen = [shield.choose(actor, OBSERVATION, 0.5, rng) for _ in range(50)]
    replaced = [float(a[0]) for a, was_replaced in seen if was_replaced]
    assert len(replaced) > 10
    assert replaced == pytest.approx([math.tanh(1.0)] * len(replaced))


def test_second_fallback_is_the_previously_accepted_action() -> None:
    shield, rng = shield_of(critic_of(10.0), 0.5, 4, lambda _: v(-0.9)), np.random.default_rng(0)
    accepted, replaced = shield.choose(policy(-1.0, 0.02), OBSERVATION, 0.5, rng)
    assert not replaced
    action, replaced = shield.choose(NARROW, OBSERVATION, 0.5, rng)
    assert replaced
    np.testing.assert_array_equal(action, accepted)
    # A new episode forgets it; then the controller is next.
    shield.start_episode()
    action, _ = shield.choose(NARROW, OBSERVATION, 0.5, rng)
    assert action[0] == np.float32(-0.9)


def test_last_resorts() -> None:
    """Nothing passes: the user's controller, and without one the policy's mean, never an argmin."""
    rng = np.random.default_rng(0)
    everything_is_deadly = critic_of(1.0, base=9.0)
    action, replaced = shield_of(everything_is_deadly, 0.5, 4, lambda _: v(0.3)).choose(
        NARROW, OBSERVATION, 0.5, rng
    )
    assert (action[0], replaced) == (np.float32(0.3), True)
    action, replaced = shield_of(everything_is_deadly, 0.5, 4).choose(NARROW, OBSERVATION, 0.5, rng)
    assert action[0] == pytest.approx(math.tanh(1.0))
    assert replaced


def test_a_nan_risk_does_not_pass() -> None:
    shield = shield_of(critic_of(math.nan), 0.5, 4, lambda _: v(-0.9))
    action, replaced = shield.choose(policy(), OBSERVATION, 0.5, np.random.default_rng(0))
    assert (action[0], replaced) == (np.float32(-0.9), True)


def test_the_critic_is_frozen_when_the_shield_is_made() -> None:
    critic = critic_of(10.0)
    shield = shield_of(critic, 0.5)
    before, _ = stream(shield, policy(), 50)
    with torch.no_grad():
        critic.net.output.weight.neg_()
    shield.start_episode()
    np.testing.assert_array_equal(stream(shield, policy(), 50)[0], before)
    assert not any(p.requires_grad for p in shield.net.parameters())
    assert all(p.requires_grad for p in critic.net.parameters())


# --- discrete actions ---


def discrete_policy(*probabilities: float) -> NumpyActor:
    actor = Actor(1, len(probabilities), (), torch.Generator().manual_seed(0), discrete=True)
    with torch.no_grad():
        weight, bias = actor.parameters()
        weight.zero_()
        bias.copy_(torch.tensor(probabilities).log())
    return NumpyActor(actor)


def discrete_critic(*logits: float) -> SafetyCritic:
    """Q_C of action k = sigmoid(logits[k])."""
    config = SafetyCriticConfig(hidden=())
    critic = SafetyCritic(1, len(logits), 10, config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        critic.net.output.weight.zero_()
        critic.net.output.weight[:, 2:, 0] = torch.tensor(logits)
        critic.net.output.bias.zero_()
    return critic


def chosen_shares(shield: Shield, actor: NumpyActor, n: int = 3000) -> tuple[np.ndarray, int]:
    rng = np.random.default_rng(0)
    chosen = [shield.choose(actor, OBSERVATION, 0.5, rng) for _ in range(n)]
    return np.mean([a for a, _ in chosen], axis=0), sum(replaced for _, replaced in chosen)


def test_discrete_actions_are_drawn_from_the_policy_given_that_they_pass() -> None:
    # Action 0, taken with .9, is dangerous; the others are then taken as .06 to .04.
    shield = shield_of(discrete_critic(3.0, -3.0, -3.0), 0.5, candidates=1)
    shares, replaced = chosen_shares(shield, discrete_policy(0.9, 0.06, 0.04))
    np.testing.assert_allclose(shares, [0.0, 0.6, 0.4], atol=0.03)
    assert replaced == pytest.approx(0.9 * 3000, abs=60)


def test_the_only_passing_action_is_found_however_improbable() -> None:
    shield = shield_of(discrete_critic(3.0, 3.0, -3.0), 0.5, candidates=1)
    shares, _ = chosen_shares(shield, discrete_policy(0.7, 0.3 - 1e-6, 1e-6), 50)
    assert shares.tolist() == [0.0, 0.0, 1.0]


def test_the_most_probable_action_where_none_passes() -> None:
    shield = shield_of(discrete_critic(3.0, 3.0, 2.0), 0.5)
    shares, replaced = chosen_shares(shield, discrete_policy(0.2, 0.5, 0.3), 50)
    assert shares.tolist() == [0.0, 1.0, 0.0]  # not the argmin of the risk
    assert replaced == 50
