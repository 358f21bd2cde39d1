"""The deployed policy changes by acceptance and by roll-back, and by nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from safe_offrl.limits import Limit
from safe_offrl.policies.gaussian import Gaussian
from safe_offrl.policies.networks import Actor
from safe_offrl.safety.acceptance import AcceptanceConfig, Decision, Judge
from safe_offrl.safety.critic import SafetyCritic, SafetyCriticConfig
from safe_offrl.safety.deployment import Deployment
from safe_offrl.safety.monitor import SafetyMonitor
from safe_offrl.safety.outlook import AccidentAhead
from safe_offrl.safety.shield import ShieldConfig
from safe_offrl.types import Batch, States, Visited


def policy(mean: float) -> Actor:
    """tanh-Gaussian of standard deviation .3 with this mean before tanh, everywhere."""
    actor = Actor(1, 1, (), torch.Generator().manual_seed(0))
    with torch.no_grad():
        weight, bias = actor.parameters()
        weight.zero_()
        bias.copy_(torch.tensor([mean, math.atanh((math.log(0.3) + 5.0) / 3.5 - 1.0)]))
    return actor


def shield_bias(deployed: Deployment) -> float:
    net = deployed.shield.net
    assert net is not None
    return float(net.output.bias[0])


def mean_of(actor: Actor) -> float:
    policy = actor(torch.zeros(1, 1))
    assert isinstance(policy, Gaussian)
    return policy.mean.item()


def deployment(epsilon: float = 0.2) -> Deployment:
    """A critic that calls everything 0.7 % dangerous."""
    config = SafetyCriticConfig(hidden=())
    critic = SafetyCritic(1, 1, AccidentAhead(10), config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        critic.net.output.weight.zero_()
        critic.net.output.bias.fill_(-5.0)
    return Deployment(
        policy(0.0),
        critic,
        Limit("accident", epsilon, 1.0),
        0.05,
        AcceptanceConfig(),
        ShieldConfig(),
        kl_limited=True,
        safety_limited=True,
        shield_acts=False,
    )


def propose(deployed: Deployment, learner: Actor, monitor: SafetyMonitor) -> tuple[Decision, bool]:
    zeros, states = torch.zeros(50), torch.zeros(50, 1)
    batch = Batch(states, states, zeros, zeros, zeros, states, zeros, zeros + 0.5, zeros)
    visited = Visited(batch, zeros + 1.0, 10.0)
    generator = torch.Generator().manual_seed(0)
    judge = Judge(deployed.limit, deployed._critic, visited, States.at_start(states))
    return deployed.propose(learner, [judge], [monitor], monitor.confidence, generator)


def monitor_after(accidents: list[bool], version: int, epsilon: float = 0.2) -> SafetyMonitor:
    monitor = SafetyMonitor(Limit("accident", epsilon, 1.0))
    for accident in accidents:
        monitor.update(accident, float(accident), version)
    return monitor


def test_an_accepted_candidate_is_a_new_version_behind_a_new_shield() -> None:
    deployed = deployment()
    shield, learner = deployed.shield, policy(0.05)
    decision, rolled_back = propose(deployed, learner, monitor_after([False], 0))
    assert (decision.accepted, rolled_back, deployed.version) == (True, False, 1)
    assert mean_of(deployed.actor) == pytest.approx(0.05)
    assert deployed.shield is not shield
    with torch.no_grad():
        list(learner.parameters())[1].add_(1.0)  # a copy acts, not the learner
    assert mean_of(deployed.actor) == pytest.approx(0.05)


def test_a_refused_candidate_changes_nothing_but_the_penalty() -> None:
    deployed = deployment(epsilon=0.2)
    shield = deployed.shield
    decision, _ = propose(deployed, policy(50.0), monitor_after([False], 0))
    assert not decision.accepted
    assert deployed.version == 0
    assert deployed.shield is shield
    assert mean_of(deployed.actor) == 0.0
    assert float(deployed.kl_weight) == pytest.approx(0.1 * 1.5)


def test_a_timid_proposal_lowers_the_penalty() -> None:
    deployed = deployment()
    propose(deployed, policy(0.01), monitor_after([False], 0))
    assert float(deployed.kl_weight) == pytest.approx(0.1 / 1.5)


def test_an_alarm_goes_back_to_the_version_that_was_certified_last() -> None:
    deployed = deployment(epsilon=0.2)
    # 200 clean episodes certify version 0 below 20 %; versions 1 and 2 are never certified.
    propose(deployed, policy(0.04), monitor_after([False] * 200, 0))
    assert deployed.certified_version == 0
    with torch.no_grad():  # what the safety critic has learnt since is in the shields since
        deployed._critic.net.output.bias.fill_(3.0)
    deployed.deploy(policy(0.08))
    assert shield_bias(deployed) == 3.0
    assert deployed.version == 2
    monitor = monitor_after([True] * 40, 2)
    assert monitor.alarm
    decision, rolled_back = propose(deployed, policy(0.12), monitor)
    assert rolled_back
    assert not decision.accepted
    assert "rolled back" in decision.reason
    # KL((0, .3) || (.08, .3)) = .08^2 / (2 * .09), of the change that was really made.
    assert decision.kl_mean == pytest.approx(0.08**2 / 0.18, rel=1e-3)
    # The policy and the shield that were certified, together.
    assert mean_of(deployed.actor) == 0.0
    assert shield_bias(deployed) == -5.0
    assert deployed.version == deployed.certified_version == 3
    assert float(deployed.delta) == pytest.approx(0.025)
    assert not monitor.alarm


def test_an_alarm_while_the_certified_version_acts_only_shrinks_delta() -> None:
    deployed = deployment()
    for _ in range(6):
        decision, rolled_back = propose(deployed, policy(0.05), monitor_after([True] * 40, 0))
        assert not rolled_back  # nothing moved
        assert not decision.accepted
        assert "already acts" in decision.reason
    assert deployed.version == 0
    assert mean_of(deployed.actor) == 0.0
    assert float(deployed.delta) == pytest.approx(0.05 / 16)  # the floor


def leaning(slope: float) -> Deployment:
    """A critic whose risk rises with the action, and a deployed policy further up than the first.

    Version 0 is at 0, version 1 at .3 before tanh.
    """
    deployed = deployment()
    with torch.no_grad():
        weight = deployed._critic.net.output.weight
        weight[:, 2] = slope  # inputs are observation, time to go, action
    deployed.deploy(policy(0.3))
    return deployed


def test_without_a_certified_policy_an_alarm_goes_back_only_to_a_safer_estimate() -> None:
    safer = leaning(5.0)
    decision, rolled_back = propose(safer, policy(0.3), monitor_after([True] * 40, 1))
    assert rolled_back
    assert "pretrained policy: none was certified" in decision.reason
    assert mean_of(safer.actor) == 0.0
    riskier = leaning(-5.0)
    decision, rolled_back = propose(riskier, policy(0.3), monitor_after([True] * 40, 1))
    assert not rolled_back
    assert "not estimated to be safer" in decision.reason
    assert riskier.version == 1
    assert mean_of(riskier.actor) == pytest.approx(0.3)
    assert float(riskier.delta) == pytest.approx(0.025)


def test_an_alarm_does_not_go_back_to_a_policy_that_is_shown_to_exceed_the_limit() -> None:
    deployed = leaning(5.0)
    monitor = monitor_after([True] * 80, 0)
    monitor.update(True, 1.0, 1)
    decision, rolled_back = propose(deployed, policy(0.3), monitor)
    assert not rolled_back
    assert "shown to exceed the limit" in decision.reason
    assert deployed.version == 1


def test_without_the_safety_constraint_no_alarm_takes_a_policy_back() -> None:
    deployed = leaning(5.0)
    deployed.safety_limited = False
    monitor = monitor_after([True] * 40, 1)
    _, rolled_back = propose(deployed, policy(0.3), monitor)
    assert not rolled_back
    assert monitor.alarm
    assert float(deployed.delta) == pytest.approx(0.05)


def test_what_was_proved_survives_a_checkpoint() -> None:
    deployed = deployment()
    propose(deployed, policy(0.04), monitor_after([False] * 200, 0))
    again = deployment()
    again.load(deployed.info())
    assert again.info() == deployed.info()
    assert again.info()["proved"] is True
