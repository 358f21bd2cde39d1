"""td3bc, rebrac, brac_p, brac_v and bear on problems whose right answer is known."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from safe_offrl.agents import AGENTS, AgentConfigs, kind_of, online_agent
from safe_offrl.agents.rlpd import RLPD
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.compute.state import seeded
from safe_offrl.errors import ConfigError
from safe_offrl.policies.gaussian import GAUSSIAN
from tests.agents.setups import setup_of
from tests.agents.small_problems import agent_of, bandit, drawn_from, log_of, trained

# The published ones are for a million steps, and for rewards of another size.
SETTINGS: dict[str, dict[str, Any]] = {
    "td3bc": {"alpha": 40.0},
    "rebrac": {},
    "brac_p": {"actor_weight": 0.02},
    "brac_v": {"actor_weight": 0.02},
    "bear": {"threshold": 0.3, "samples": 4, "multiplier_learning_rate": 0.03},
}
everyone = pytest.mark.parametrize("name", list(SETTINGS))
UNIFORM = torch.linspace(-0.95, 0.95, 500).unsqueeze(-1)


@everyone
def test_a_bandit_s_best_action_is_found(name: str) -> None:
    """Reward 1 - 2 (a - .5)^2 of actions logged uniformly: the best is .5, and Q(a) the reward."""
    reward = 1.0 - 2.0 * (UNIFORM[:, 0] - 0.5).square()
    networks, _ = trained(name, bandit(UNIFORM, reward), 600, **SETTINGS[name])
    drawn = drawn_from(networks)
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.15)
    assert drawn.std().item() < 0.4
    with torch.no_grad():
        q = networks.q(torch.zeros(500, 1), UNIFORM).mean(0)
    assert (q - reward).abs().mean().item() < 0.1


@everyone
def test_values_discount_once_truncation_bootstraps_and_termination_does_not(name: str) -> None:
    """s0 -> s1 -> the end with reward 1; s2 pays 1 for ever: Q = .5, 1 and 1 / (1 - .5) = 2."""
    state = torch.tensor([0, 1, 2, 2]).repeat(150)
    following = torch.tensor([1, 1, 2, 2]).repeat(150)
    actions = 2.0 * torch.rand(600, 1, generator=seeded(1)) - 1.0
    terminated, eye = (state == 1).float(), torch.eye(3)
    log = log_of(eye[state], actions, (state > 0).float(), eye[following], terminated, length=2)
    networks, _ = trained(name, log, 400, discount=0.5, **SETTINGS[name])
    with torch.no_grad():
        q = networks.q(eye[state], actions).mean(0)
    for which, value in enumerate((0.5, 1.0, 2.0)):
        assert q[state == which].mean().item() == pytest.approx(value, abs=0.1)


@everyone
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_the_way_without_risk_is_taken(name: str, direction: float) -> None:
    """Logged are -.8 and .8, equally good; one of them is risky."""

    def risk(observations: Tensor, time_to_go: Tensor, actions: Tensor) -> Tensor:
        return torch.sigmoid(4.0 * direction * actions[:, 0])

    sides = torch.tensor([[-0.8], [0.8]]).repeat(100, 1)
    sides = sides + 0.05 * torch.randn(200, 1, generator=seeded(2))
    penalty = Penalty(risk, torch.tensor(3.0))
    settings = SETTINGS[name] | {"learning_rate": 5e-3}
    networks, _ = trained(name, bandit(sides, torch.ones(200)), 400, penalty, **settings)
    assert (direction * drawn_from(networks) < -0.5).float().mean().item() > 0.9


# --- what it is refused, and what follows ---


@pytest.mark.parametrize("name", ["td3bc", "rebrac", "bear"])
def test_discrete_actions_are_refused(name: str) -> None:
    assert kind_of(name, discrete=False) is GAUSSIAN
    with pytest.raises(ConfigError, match=rf'"{name}" trains .* are numbers, .* are discrete\.'):
        kind_of(name, discrete=True)


@everyone
def test_rlpd_goes_on_online(name: str) -> None:
    log = bandit(UNIFORM, torch.zeros(500))
    _, networks = agent_of(name, log)
    learner = online_agent("rlpd", setup_of(networks, seeded(0)), AgentConfigs())
    assert isinstance(learner, RLPD)
    batch = log.transitions
    metrics = learner.update_critics(batch) | learner.update_actor(batch, Steering())
    assert all(math.isfinite(float(value)) for value in metrics.values())
    assert AGENTS[name].Online is None
