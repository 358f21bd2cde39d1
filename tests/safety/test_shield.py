"""The shield: by hand, abstaining, and what a choice among a few draws can and cannot do."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from safe_offrl.errors import ConfigError
from safe_offrl.policies.acting import NumpyActor, Sampler, UniformActor
from safe_offrl.policies.gaussian import GAUSSIAN
from safe_offrl.policies.kinds import kind_for
from safe_offrl.policies.networks import Actor
from safe_offrl.policies.protocol import Rows, Vector
from safe_offrl.safety.critic import SafetyCritic, SafetyCriticConfig
from safe_offrl.safety.outlook import AccidentAhead
from safe_offrl.safety.shield import Shield, ShieldConfig

OBSERVATION = np.zeros(1, dtype=np.float32)
UNIFORM = UniformActor(GAUSSIAN, 1)


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
    generator = torch.Generator().manual_seed(0)
    critic = SafetyCritic(1, 1, AccidentAhead(10), SafetyCriticConfig(hidden=()), generator)
    with torch.no_grad():
        critic.net.output.weight.zero_()
        critic.net.output.weight[:, 1] = time
        critic.net.output.weight[:, 2] = slope
        critic.net.output.bias.fill_(base)
    return critic


def shield_of(
    critic: SafetyCritic, *, acts: bool = True, candidates: int = 4, margin: float = 0.1
) -> Shield:
    """Under a limit of 1, so that a margin is one in risk."""
    config = ShieldConfig(candidates=candidates, margin=margin)
    return Shield.from_critic(critic, config, 1.0, acts=acts)


def stream(shield: Shield, actor: Sampler, n: int = 300) -> tuple[np.ndarray, int]:
    """Actions of n steps, and how many were replaced."""
    rng = np.random.default_rng(0)
    chosen = [shield.choose(actor, OBSERVATION, 0.5, rng) for _ in range(n)]
    return np.concatenate([a for a, _ in chosen]), sum(replaced for _, replaced in chosen)


def v(value: float) -> Vector:
    return np.array([value], dtype=np.float32)


def test_it_abstains_unless_it_may_act() -> None:
    """With a useless critic not one action differs, nor one random number."""
    shield = shield_of(critic_of(50.0), acts=False)
    actions, replaced = stream(shield, policy())
    rng = np.random.default_rng(0)
    drawn = [policy().draw(OBSERVATION, 1, rng)[0, 0] for _ in actions]
    np.testing.assert_array_equal(actions, drawn)
    assert replaced == 0
    assert shield.draws == 1


def test_where_actions_do_not_matter_the_policy_is_not_touched() -> None:
    """However dangerous the state is: nothing that can be chosen is better."""
    for base in (-3.0, 9.0):
        actions, replaced = stream(shield_of(critic_of(0.0, base=base)), policy())
        rng = np.random.default_rng(0)
        drawn = [policy().draw(OBSERVATION, 4, rng)[0, 0] for _ in actions]
        np.testing.assert_array_equal(actions, drawn)
        assert replaced == 0


def test_the_first_draw_within_the_margin_of_the_least_risk_by_hand() -> None:
    # Risks .1, .5, .9 and so on of the draws; the critic is the logit of the action's own value.
    class Script:
        def draw(self, observation: Vector, count: int, rng: np.random.Generator) -> Rows:
            return np.array(self.values[:count], dtype=np.float32)[:, None]

        def mean_action(self, observation: Vector) -> Vector:
            return v(self.mean)

        def __init__(self, *values: float, mean: float = 0.0) -> None:
            self.values, self.mean = values, mean

    critic, rng = critic_of(1.0), np.random.default_rng(0)  # risk = sigmoid(action)

    def logit(risk: float) -> float:
        return math.log(risk / (1.0 - risk))

    def taken(*risks: float, margin: float, mean: float | None = None) -> Any:
        actor = Script(*map(logit, risks), mean=logit(mean or 0.5))
        shield = shield_of(critic, margin=margin)
        action, replaced = shield.choose(actor, OBSERVATION, 0.0, rng, mean_action=mean is not None)
        return 1.0 / (1.0 + math.exp(-action[0])), replaced

    assert taken(0.35, 0.6, 0.3, 0.9, margin=0.1) == (pytest.approx(0.35), False)
    assert taken(0.45, 0.6, 0.3, 0.9, margin=0.1) == (pytest.approx(0.3), True)
    assert taken(0.45, 0.38, 0.3, 0.9, margin=0.1) == (pytest.approx(0.38), True)
    assert taken(0.45, 0.38, 0.3, 0.9, margin=0.0) == (pytest.approx(0.3), True)
    # The mean action takes the place of the first draw, and the last draw is not made.
    assert taken(0.6, 0.3, 0.9, 0.01, margin=0.1, mean=0.35) == (pytest.approx(0.35), False)
    assert taken(0.6, 0.3, 0.9, 0.01, margin=0.1, mean=0.45) == (pytest.approx(0.3), True)


def test_the_least_risky_of_four_uniform_draws() -> None:
    """Without a margin: the least of 4 uniform numbers, whose mean is 1/5 of the way."""
    actions, replaced = stream(shield_of(critic_of(1.0), margin=0.0), UNIFORM, 4000)
    assert actions.mean() == pytest.approx(-1.0 + 2.0 / 5.0, abs=0.02)
    assert replaced / 4000 == pytest.approx(3 / 4, abs=0.03)
    # Seen by a critic that has it the wrong way round, the most dangerous: why it must be licensed.
    actions, _ = stream(shield_of(critic_of(-1.0), margin=0.0), UNIFORM, 4000)
    assert actions.mean() == pytest.approx(1.0 - 2.0 / 5.0, abs=0.02)


def test_no_action_becomes_more_than_k_times_as_probable() -> None:
    """Of 4 draws and the most one-sided critic, the lowest tenth of the actions: 1 - .9^4 < .4."""
    actions, _ = stream(shield_of(critic_of(50.0), margin=0.0), UNIFORM, 4000)
    share = (actions < -0.8).mean()
    assert share == pytest.approx(1.0 - 0.9**4, abs=0.03)
    assert share < 4 * 0.1


def test_members_that_are_pushed_have_no_say() -> None:
    critic = critic_of(1.0)
    with torch.no_grad():
        critic.net.output.weight[critic.config.reference :, 2] = -50.0
    np.testing.assert_array_equal(
        stream(shield_of(critic), policy())[0], stream(shield_of(critic_of(1.0)), policy())[0]
    )


def test_time_to_go_reaches_the_critic() -> None:
    """Near the end of the episode everything is safe, and the same draws pass."""
    shield = shield_of(critic_of(5.0, time=20.0, base=-20.0), margin=0.1)

    def replaced(time_to_go: float) -> int:
        rng = np.random.default_rng(0)
        return sum(shield.choose(policy(), OBSERVATION, time_to_go, rng)[1] for _ in range(100))

    assert replaced(1.0) > 50
    assert replaced(0.1) == 0


def test_a_risk_that_is_not_a_number_is_never_the_least() -> None:
    """Where all are, nothing is known, and the policy acts."""
    rng, same = np.random.default_rng(0), np.random.default_rng(0)
    action, replaced = shield_of(critic_of(math.nan)).choose(policy(), OBSERVATION, 0.5, rng)
    np.testing.assert_array_equal(action, policy().draw(OBSERVATION, 4, same)[0])
    assert not replaced

    class Broken(UniformActor):
        def draw(self, observation: Vector, count: int, rng: np.random.Generator) -> Rows:
            rows = super().draw(observation, count, rng)
            rows[0] = np.nan
            return rows

    action, replaced = shield_of(critic_of(1.0)).choose(Broken(GAUSSIAN, 1), OBSERVATION, 0.5, rng)
    assert np.isfinite(action).all()
    assert replaced


@pytest.mark.parametrize(
    "settings",
    [{"candidates": 1}, {"margin": -0.1}, {"margin": 1.0}, {"margin": math.nan}],
    ids=str,
)
def test_settings_that_make_no_shield_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"shielding\."):
        ShieldConfig(**settings)


def test_the_critic_is_frozen_when_the_shield_is_made() -> None:
    critic = critic_of(10.0)
    shield = shield_of(critic)
    before, _ = stream(shield, policy(), 50)
    with torch.no_grad():
        critic.net.output.weight.neg_()
    np.testing.assert_array_equal(stream(shield, policy(), 50)[0], before)
    assert shield.net is not None
    assert not any(p.requires_grad for p in shield.net.parameters())
    assert all(p.requires_grad for p in critic.net.parameters())


# --- discrete actions ---


def discrete_policy(*probabilities: float) -> NumpyActor:
    actor = Actor(
        1, len(probabilities), (), torch.Generator().manual_seed(0), kind_for(discrete=True)
    )
    with torch.no_grad():
        weight, bias = actor.parameters()
        weight.zero_()
        bias.copy_(torch.tensor(probabilities).log())
    return NumpyActor(actor)


def discrete_critic(*logits: float) -> SafetyCritic:
    """Q_C of action k = sigmoid(logits[k])."""
    config = SafetyCriticConfig(hidden=())
    critic = SafetyCritic(
        1, len(logits), AccidentAhead(10), config, torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        critic.net.output.weight.zero_()
        critic.net.output.weight[:, 2:, 0] = torch.tensor(logits)
        critic.net.output.bias.zero_()
    return critic


def test_discrete_actions_are_draws_too_so_what_the_policy_avoids_stays_rare() -> None:
    # Action 0 is taken with .9 and dangerous. It is left only if four draws are all of it, and an
    # action of 1e-6 that looks safest is not dug out.
    shield = shield_of(discrete_critic(3.0, -3.0, -9.0), margin=0.1)
    rng = np.random.default_rng(0)
    actor = discrete_policy(0.9, 0.1 - 1e-6, 1e-6)
    chosen = [shield.choose(actor, OBSERVATION, 0.5, rng) for _ in range(3000)]
    shares = np.mean([action for action, _ in chosen], axis=0)
    np.testing.assert_allclose(shares, [0.9**4, 1.0 - 0.9**4, 0.0], atol=0.03)
    assert np.mean([replaced for _, replaced in chosen]) == pytest.approx(0.9 - 0.9**4, abs=0.03)


def test_the_most_probable_action_is_shielded_too() -> None:
    shield = shield_of(discrete_critic(3.0, -3.0), margin=0.1)
    action, replaced = shield.choose(
        discrete_policy(0.51, 0.49), OBSERVATION, 0.5, np.random.default_rng(0), mean_action=True
    )
    assert action.tolist() == [0.0, 1.0]
    assert replaced
