"""Several limits at once: each has its own critic, lambda and monitor, and every one must hold."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from safe_offrl import commands
from safe_offrl.agents.aversion import Aversion
from safe_offrl.agents.extraction import Extraction, ExtractionConfig
from safe_offrl.agents.iql import IQL
from safe_offrl.agents.rlpd import RLPD, RLPDConfig
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.assess.estimates import Estimates
from safe_offrl.certify.certificate import sealed
from safe_offrl.certify.recheck import recheck
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.limits import ACCIDENT, COST, Limit
from safe_offrl.policies.networks import NetworkConfig, Networks
from safe_offrl.record.ledger import parse_ledger
from safe_offrl.record.online_curves import OnlineCurves
from safe_offrl.record.run import RunDir
from safe_offrl.record.why import Reasons
from safe_offrl.safety.acceptance import AcceptanceConfig, Judge, decide
from safe_offrl.safety.constrained import Constrained
from safe_offrl.safety.critic import SafetyCritic, SafetyCriticConfig
from safe_offrl.safety.monitor import SafetyMonitor
from safe_offrl.safety.multiplier import LagrangianConfig, Multiplier
from safe_offrl.safety.outlook import CostAhead
from safe_offrl.spec import SafetySpec
from safe_offrl.stats.fixed import shared_confidence
from safe_offrl.train.finetune import Finetuning
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.train.foundation import settings_of
from safe_offrl.train.iteration import Iteration, untested
from safe_offrl.train.pretrain import Pretraining
from safe_offrl.train.pretrain_config import PretrainConfig
from safe_offrl.types import Batch, Episode, States, Visited
from tests.safety.test_acceptance import critic_of, policy, visited
from tests.safety.test_deployment import deployment, mean_of, monitor_after
from tests.test_resume import ONLINE, TINY, killed, record, silent

BOTH = {"accident": 0.6, "cost": 8.0}  # of PointHazard


# --- the contract ---


def test_limits_say_what_the_short_forms_say_and_the_first_is_the_constraint() -> None:
    spec = SafetySpec(limits={"cost": 12.0, "accident": 0.03})
    assert (spec.constraint, spec.cost_limit, spec.epsilon) == ("cost", 12.0, 0.03)
    assert list(spec.bounds.items()) == [("cost", 12.0), ("accident", 0.03)]
    cost, accident = spec.all_limits(100, 2.0)
    assert cost == Limit("cost", 12.0 / 200.0, 200.0)
    assert accident == Limit("accident", 0.03, 1.0)
    assert SafetySpec(epsilon=0.2).bounds == {"accident": 0.2}
    assert len({spec, SafetySpec(limits={"cost": 12.0, "accident": 0.03})}) == 1


def test_each_is_the_contract_of_one_limit() -> None:
    spec = SafetySpec(limits={"cost": 12.0, "accident": 0.03})
    assert [each.bounds for each in spec.each()] == [{"cost": 12.0}, {"accident": 0.03}]
    assert SafetySpec(epsilon=0.2).each() == (SafetySpec(epsilon=0.2),)


@pytest.mark.parametrize(
    ("limits", "message"),
    [({"costs": 1.0}, 'a limit of "costs"'), ({"cost": -1.0}, "cost_limit is -1")],
)
def test_a_limit_that_means_nothing_is_refused(limits: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SafetySpec(limits=limits)


@pytest.mark.parametrize("text", ["cost", "cost=much", "=3 4"])
def test_a_limit_is_typed_as_name_and_value(text: str) -> None:
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        commands.pretrain_config(env="HazardLine-v0", limit=[text])


@pytest.mark.parametrize(
    ("limits", "overrides"),
    [
        (["cost=5"], ["safety.cost_limit=3"]),
        (["cost=5"], ["safety.limits.cost=3"]),
        (["cost=5"], ["safety.constraint=accident"]),
        (["cost=5", "cost=3"], []),
        (None, ["safety.limits.accident=0.1", "safety.epsilon=0.2"]),
    ],
)
def test_a_limit_that_is_given_twice_is_refused(
    limits: list[str] | None, overrides: list[str]
) -> None:
    with pytest.raises(ConfigError, match="twice"):
        commands.pretrain_config(env="HazardLine-v0", limit=limits, overrides=overrides)


def test_a_limit_that_a_file_gives_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("pretrain: {safety: {limits: {cost: 5}, cost_limit: 3}}")
    with pytest.raises(ConfigError, match="twice"):
        commands.pretrain_config(env="HazardLine-v0", preset=file)
    # Whoever comes later has the last word.
    config = commands.pretrain_config(env="PointHazard-v0", limit=["accident=0.3"])  # preset: .05
    assert config.safety.epsilon == 0.3


def test_a_further_limit_begins_with_its_own_quantitys_settings() -> None:
    """What depends on the quantity is its own, and everything else that of the first limit."""
    both = SafetySpec(limits={"accident": 0.1, "cost": 25.0})
    critic = SafetyCriticConfig(hidden=(7,), target_gap=0.03)
    config = PretrainConfig(safety=both, critic=critic)
    own = settings_of(config, "critic", COST, config.critic)
    assert own == replace(critic, target_gap=0.005, weight_decay=0.1)
    assert settings_of(config, "critic", ACCIDENT, config.critic) is critic
    assert settings_of(config, "lagrangian", COST, config.lagrangian).init == 100.0
    assert settings_of(config, "extraction", COST, config.extraction).aversion == (100.0, True)
    # The other way round.
    turned = SafetySpec(limits={"cost": 25.0, "accident": 0.1})
    costly = LagrangianConfig(init=100.0, maximum=300.0, aim=0.5)
    config = PretrainConfig(safety=turned, lagrangian=costly)
    assert settings_of(config, "lagrangian", ACCIDENT, costly) == LagrangianConfig(aim=0.5)
    # Online, where the critic goes on with what the offline phase said of it.
    tuned = FinetuneConfig(safety=both, critic=critic)
    own = settings_of(tuned, "critic", COST, tuned.critic)
    assert own == replace(critic, target_gap=0.005, weight_decay=0.1, tau=0.05)
    gains = settings_of(tuned, "baseline", COST, tuned.baseline).pid
    assert (gains.proportional, gains.integral, gains.derivative) == (0.3, 0.03, 0.3)


def test_the_error_is_split_between_the_limits() -> None:
    assert shared_confidence(0.95, 1) == 0.95
    assert shared_confidence(0.95, 2) == pytest.approx(0.975)
    assert shared_confidence(0.9, 5) == pytest.approx(0.98)


# --- learning ---


def small() -> Networks:
    return Networks(1, 1, NetworkConfig((8,), (8,), 2), torch.Generator().manual_seed(0))


def batch_of(size: int) -> Batch:
    zeros, column = torch.zeros(size), torch.linspace(-1.0, 1.0, size)[:, None]
    return Batch(column, column, zeros, zeros, zeros, column, zeros, zeros + 0.5, zeros)


def test_an_actor_is_asked_by_every_limit() -> None:
    """Two penalties of constant risk add 2 x .25 and 3 x .5 to the loss."""
    learner = RLPD(small(), RLPDConfig(), torch.Generator().manual_seed(0))
    batch, noise, zero = batch_of(6), torch.zeros(6, 1), torch.tensor(0.0)
    penalties = (
        Penalty(lambda o, t, a: 0.25 + 0.0 * a.sum(-1), torch.tensor(2.0)),
        Penalty(lambda o, t, a: 0.50 + 0.0 * a.sum(-1), torch.tensor(3.0)),
    )
    plain = learner.actor_loss(batch, noise, (), None, zero)[0]
    asked = learner.actor_loss(batch, noise, penalties, None, zero)[0]
    torch.testing.assert_close(asked, plain + 2.0)


def test_a_logged_action_counts_against_every_risk() -> None:
    """Weights exp(-ln 2 (1, 0) - ln 4 (0, 1)) of two actions, by two aversions: 1/2 and 1/4."""
    aversions = (Aversion(math.log(2.0), False), Aversion(math.log(4.0), False))
    settings = ExtractionConfig(), torch.Generator().manual_seed(0)
    extraction = Extraction(small(), *settings, aversions=aversions)
    batch = batch_of(2)  # its actions are -1 and 1
    one = torch.tensor(1.0)
    penalties = (
        Penalty(lambda o, t, a: (a[:, 0] < 0).float(), one),
        Penalty(lambda o, t, a: (a[:, 0] > 0).float(), one),
    )
    with torch.no_grad():
        log_probs = extraction.behaviour(batch.observations).log_prob(batch.actions)
        (loss,) = extraction.mixture_loss(batch, torch.zeros(2), penalties, None)
    weights = torch.tensor([0.5, 0.25]) / 0.375
    torch.testing.assert_close(loss, -(weights * log_probs).mean())


# --- acceptance ---


def judges(epsilon: float, share: float) -> list[Judge]:
    """An accident limit whose risk does not depend on the action, and a cost limit whose does."""
    torch.manual_seed(0)
    states, batch = States.at_start(torch.randn(300, 1)), visited()
    flat, steep = critic_of(-5.0, 0.0), critic_of(-3.0, 4.0)
    steep.outlook = CostAhead(10, 1.0, 0.9, 1)
    accident = Judge(Limit("accident", epsilon, 1.0), flat, batch, states)
    return [accident, Judge(Limit("cost", share, 10.0), steep, batch, states)]


@pytest.mark.parametrize(("share", "accepted"), [(0.9, True), (0.01, False)])
@pytest.mark.parametrize("turned", [False, True])
def test_every_limit_must_hold(share: float, accepted: bool, turned: bool) -> None:
    """The learner's mean action of .1 raises the cost; whichever limit comes first."""
    both = judges(0.5, share)[:: -1 if turned else 1]
    decision, acting = decide(
        policy(0.0),
        policy(0.1),
        both,
        AcceptanceConfig(),
        kl_limit=None,
        constrain_safety=True,
        confidence=0.95,
        generator=torch.Generator().manual_seed(0),
    )
    assert decision.accepted == accepted
    assert (mean_of(acting) != 0.0) == accepted
    (before, after), (flat_before, flat_after) = decision.estimates[:: 1 if turned else -1]
    assert after > before > 0.04  # sigmoid(-3)
    assert flat_after == pytest.approx(flat_before)
    assert len(decision.further) == 1
    if not accepted:
        assert decision.reason.startswith("expected cost ")


@pytest.mark.parametrize(
    ("accepted", "estimates", "satisfied"),
    [
        (True, (0.9, 0.1), True),  # (v_previous, v_candidate) of the second limit, .5
        (True, (0.1, 0.9), False),
        (False, (0.9, 0.1), False),  # who stays is whom it was measured of
        (False, (0.1, 0.9), True),
    ],
)
def test_the_record_is_of_who_acts_and_in_the_units_of_the_limits(
    accepted: bool, estimates: tuple[float, float], satisfied: bool
) -> None:
    limits = Limit("accident", 0.2, 1.0), Limit("cost", 0.5, 40.0)
    constraints = [
        Constrained(limit, critic_of(-3.0, 0.0), Multiplier(LagrangianConfig(), limit.share))
        for limit in limits
    ]
    decision = untested(2)._replace(
        accepted=accepted,
        kl_forward_mean=0.0,
        kl_reverse_mean=0.0,
        kl_forward_tail=0.0,
        kl_reverse_tail=0.0,
        v_previous=0.1,
        v_candidate=0.15,
        further=(estimates,),
    )
    about: dict[str, Any] = {"index": 0, "step": 9, "version": 1, "metrics": {}, "kl_weight": 0.1}
    line = Iteration.from_decision(
        decision, constraints, delta=0.05, tail_ratio=5.0, rolled_back=False, **about
    )
    assert line.constraints_satisfied == satisfied
    assert (line.v_previous, line.v_candidate, line.limit) == (0.1, 0.15, 0.2)
    (cost,) = line.further
    assert (cost.v_previous, cost.v_candidate) == tuple(40.0 * x for x in estimates)
    assert (cost.constraint, cost.limit) == ("cost", 20.0)


def test_an_alarm_of_any_limit_takes_the_policy_back() -> None:
    deployed = deployment(epsilon=0.2)
    zeros, states = torch.zeros(50), torch.zeros(50, 1)
    batch = Batch(states, states, zeros, zeros, zeros, states, zeros, zeros + 0.5, zeros)
    judge = Judge(
        deployed.limit,
        deployed._critic,
        Visited(batch, zeros + 1.0, 10.0),
        States.at_start(states),
    )
    calm = monitor_after([False] * 200, 0)

    def propose(first: SafetyMonitor, second: SafetyMonitor, mean: float) -> tuple[Any, bool]:
        generator = torch.Generator().manual_seed(0)
        both = [judge, judge], [first, second]
        return deployed.propose(policy(mean), *both, 0.95, generator)

    # Only what keeps both limits is certified.
    uncertain = monitor_after([False], 0)
    propose(calm, uncertain, 0.02)
    assert not deployed.proved
    deployed.version = 0
    propose(calm, monitor_after([False] * 200, 0), 0.04)
    assert deployed.proved
    alarming, other = monitor_after([True] * 40, 2), monitor_after([False] * 40, 2)
    assert alarming.alarm
    assert not other.alarm
    decision, rolled_back = propose(other, alarming, 0.06)
    assert rolled_back
    assert "rolled back" in decision.reason
    assert not alarming.alarm


# --- a whole run ---


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def pretrained(root: Path, tiny_dataset: Path) -> RunDir:
    given = [f"{name}={value}" for name, value in BOTH.items()]
    config = commands.pretrain_config(
        dataset=str(tiny_dataset), steps=60, limit=given, overrides=TINY
    )
    said: list[str] = []
    plan = commands.plan_pretrain(config, say=silent)
    assert "P(accident in 100 steps) < 0.6" in plan.header
    assert "expected cost of 100 steps < 8" in plan.header
    run = commands.pretrain_run(plan, name="offline", runs=root, say=said.append)
    first, second = [text for text in said if text.startswith("calibration")]
    assert "\nshield " in first
    assert "\nshield " not in second
    assert "\ncost " in second
    return run


def online_plan(pretrained: RunDir, **settings: Any) -> commands.FinetunePlan:
    config = commands.finetune_config(pretrained, budget=1500, overrides=ONLINE, **settings)
    return commands.plan_finetune(pretrained, config, accept_risk=True)


@pytest.fixture(scope="module")
def online(root: Path, pretrained: RunDir) -> RunDir:
    return commands.finetune_run(online_plan(pretrained), name="online", runs=root, say=silent)


def lines(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "iterations.jsonl").read_text().splitlines()]


def test_every_decision_is_about_both(online: RunDir) -> None:
    assert len(lines(online)) > 3
    for line in lines(online):
        (cost,) = line["further"]
        assert (line["constraint"], line["limit"]) == ("accident", 0.6)
        assert (cost["constraint"], cost["limit"]) == ("cost", 8.0)
        assert 0.0 < line["v_previous"] < 1.0
        assert 0.0 < cost["v_previous"] < 100.0
        assert line["multiplier"] != cost["multiplier"]
        acting = "v_candidate" if line["accepted"] or line["rolled_back"] else "v_previous"
        near = (
            not line["rolled_back"] or max(line["kl_forward_mean"], line["kl_reverse_mean"]) < 0.05
        )
        kept = line[acting] < 0.6 and cost[acting] < 8.0 and near
        assert line["constraints_satisfied"] == kept


def test_the_progress_line_has_both_estimates() -> None:
    limits = Limit("accident", 0.1, 1.0), Limit("cost", 0.1, 100.0)
    curves = OnlineCurves([SafetyMonitor(limit) for limit in limits], 1000)
    line = {"accepted": True, "v_candidate": 0.05, "kl_forward_mean": 0.01, "kl_reverse_mean": 0.02}
    curves.add_iteration(line | {"further": [{"v_candidate": 7.25, "v_previous": 9.0}]})
    assert "V_acc 0.050 | cost 7.2 | accepted 100 %" in curves.line()
    curves.add_iteration(
        line | {"accepted": False, "v_previous": 0.06, "further": [{"v_previous": 9.0}]}
    )
    assert "V_acc 0.060 | cost 9.0 | accepted 50 %" in curves.line()
    assert curves.trust()["safety/expected_cost_estimate"] == 9.0


@pytest.fixture(scope="module")
def one(root: Path, tiny_dataset: Path) -> RunDir:
    """A run of one limit."""
    config = commands.pretrain_config(dataset=str(tiny_dataset), steps=20, overrides=TINY)
    plan = commands.plan_pretrain(config, say=silent)
    return commands.pretrain_run(plan, name="one", runs=root, say=silent)


def test_one_limit_leaves_no_trace_of_others(root: Path, one: RunDir) -> None:
    run = commands.finetune_run(online_plan(one), name="one-online", runs=root, say=silent)
    assert all("further" not in line for line in lines(run))
    assert not any("limit_" in key for key in run.load_checkpoint().tensors)


@pytest.mark.parametrize(("method", "call"), [("append_episode", 13), ("save_checkpoint", 4)])
def test_a_run_of_two_limits_is_resumed_bitwise(
    root: Path,
    pretrained: RunDir,
    online: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    call: int,
) -> None:
    name = f"online-{method}-{call}"
    killed(monkeypatch, online_plan(pretrained), root / name, method, call)
    again = commands.resume_finetune(name, runs=root, say=silent)
    assert record(again) == record(online)


def test_each_limit_has_its_own_critic_lambda_and_monitor(pretrained: RunDir) -> None:
    loop = commands.online.start_loop(online_plan(pretrained))
    assert isinstance(loop, Finetuning)
    accident, cost = loop.constraints
    assert cost.critic.outlook.over_visits
    assert not accident.critic.outlook.over_visits
    stored = pretrained.load_checkpoint().tensors
    assert float(cost.multiplier.value) == stored["limit_cost.multiplier/value"]
    net = stored["limit_cost.safety_critic/output.bias"]
    assert torch.equal(cost.critic.net.output.bias, net)
    assert not torch.equal(accident.critic.net.output.bias, net)
    assert [m.confidence for m in loop.monitors] == pytest.approx([0.975, 0.975])
    for _ in range(40):
        loop.monitors[1].update(False, 90.0, 0)
    assert loop.alarm
    assert not loop.monitors[0].alarm


def test_a_limit_is_given_anew_online_and_its_short_form_too(pretrained: RunDir) -> None:
    asked = [
        commands.finetune_config(pretrained, limit=["cost=0.5"]),
        commands.finetune_config(pretrained, cost_limit=0.5),
        commands.finetune_config(pretrained, overrides=["safety.limits.cost=0.5"]),
    ]
    for config in asked:
        assert config.safety.limits == {"accident": 0.6, "cost": 0.5}
        assert config.safety.cost_limit == 0.5
    for twice in (
        {"limit": ["cost=0.5"], "cost_limit": 0.4},
        {"limit": ["cost=0.5"], "overrides": ["safety.limits.cost=0.4"]},
        {"cost_limit": 0.4, "overrides": ["safety.limits.cost=0.4"]},
    ):
        with pytest.raises(ConfigError, match="twice"):
            commands.finetune_config(pretrained, **twice)
    with pytest.raises(ConfigError, match="Give --limit cost=VALUE"):
        commands.finetune_config(pretrained, overrides=["safety.cost_limit=0.5"])


def test_what_nothing_has_learnt_cannot_be_limited_online(one: RunDir) -> None:
    with pytest.raises(ConfigError, match="pretrain with them"):
        commands.finetune_config(one, limit=["accident=0.5", "cost=0.5"])


def test_the_log_must_show_every_limit(pretrained: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = commands.assess_runs([pretrained.path], say=silent)
    (found,) = answer["runs"].values()
    assert (found["limit"], found["confidence"]) == (0.6, pytest.approx(0.975))
    assert found["further"]["cost"]["limit"] == pytest.approx(8.0)
    risk = online_plan(pretrained).inputs.risk or ""
    assert re.search("accident probability .* limit 60.0%; cost per episode .* limit 8", risk)
    for shown, refused in (("accident", "cost per episode"), ("cost", "accident probability")):
        monkeypatch.setattr(
            Estimates, "shows_below", lambda self, *_, shown=shown: self.constraint == shown
        )
        monkeypatch.setattr(
            Estimates, "shows_above", lambda self, *_, shown=shown: self.constraint != shown
        )
        config = commands.finetune_config(pretrained, budget=1500, overrides=ONLINE)
        with pytest.raises(RunError, match=f'first step of "offline": {refused}'):
            commands.plan_finetune(pretrained, config)


def test_a_certificate_names_the_limit_that_it_says_nothing_of(online: RunDir) -> None:
    said: list[str] = []
    commands.certify_run(online.path, episodes=5, epsilon=0.9, say=said.append)
    assert "limits      of the cost limit of 8, another one of this run" in said[0]
    said.clear()
    commands.certify_run(online.path, cost_limit=90.0, say=said.append)
    assert "limits      of epsilon 0.6, another one of this run" in said[0]


def test_one_certificate_is_about_every_limit(online: RunDir) -> None:
    """Whichever way it ends: both are judged, checked again, and shown."""
    said: list[str] = []
    certificate = commands.certify_run(online.path, epsilon=0.9, cost_limit=90.0, say=said.append)
    assert "limits      of" not in said[0]
    assert "P(accident in an episode) < 0.9 and expected cost of an episode < 90" in said[0]
    (other,) = certificate["further"]
    assert (certificate["claim"]["quantity"], other["claim"]["quantity"]) == ("accident", "cost")
    assert certificate["claim"]["shares"] == other["claim"]["shares"] == 2
    folder = sorted((online.path / "certificates").iterdir(), key=lambda p: int(p.name))[-1]
    episodes = parse_ledger((folder / "episodes.jsonl").read_bytes(), "it").counted
    scale = other["claim"]["scale"]
    assert other["total_outcome"] == pytest.approx(sum(e.cost for e in episodes) / scale)
    assert certificate["total_outcome"] == sum(e.accident for e in episodes)
    checks = commands.verify_certificate(folder / "certificate.json", say=silent)
    assert all(check.passed for check in checks)
    page = (folder / "certificate.html").read_text()
    assert "&lt; 0.9 and expected cost of an episode &lt; 90" in page
    # What is said of the second limit is as little to be changed as what is said of the first.
    record = (folder / "episodes.jsonl").read_bytes()
    for change in (
        {"total_outcome": other["total_outcome"] + 1.0},
        {"upper": other["upper"] + 1.0},
        {"lower": other["lower"] - 1.0},
    ):
        forged = sealed({**_without_hash(certificate), "further": [other | change]})
        failed = {c.name for c in recheck(forged, record, "it") if not c.passed}
        assert failed >= {"arithmetic"}

    # Nor is how the claims belong together.
    def with_claims(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
        claim, further = certificate["claim"] | first, other["claim"] | second
        parts = {"claim": claim, "further": [other | {"claim": further}]}
        return sealed({**_without_hash(certificate), **parts})

    for first, second in (
        ({"shares": 1}, {"shares": 1}),
        ({}, {"confidence": 0.5}),
        ({}, {"attempt": certificate["claim"]["attempt"] + 1}),
        ({}, {"quantity": "accident", "scale": 91.0}),
    ):
        found = recheck(with_claims(first, second), record, "it")
        assert "claims" in {c.name for c in found if not c.passed}
    with pytest.raises(ConfigError, match="no certificate"):
        recheck(with_claims({"shares": 0}, {}), record, "it")
    counted = sealed({**_without_hash(certificate), "guarded_steps": 10**6})
    assert "counts" in {c.name for c in recheck(counted, record, "it") if not c.passed}
    undone = sealed({**_without_hash(certificate), "verdict": "undecided"})
    assert "arithmetic" in {c.name for c in recheck(undone, record, "it") if not c.passed}


def _without_hash(certificate: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in certificate.items() if key != "sha256"}


def test_why_names_the_lambda() -> None:
    limits = [Limit("accident", 0.1, 1.0), Limit("cost", 0.1, 100.0)]
    reasons = Reasons((limit, LagrangianConfig(aim=0.5)) for limit in limits)
    line = {"accepted": True, "rolled_back": False, "reason": "", "multiplier": 1.0}
    assert reasons.take(line | {"further": [{"multiplier": 1.0}]}) == []
    (text,) = reasons.take(line | {"further": [{"multiplier": 0.0}]})
    assert text.startswith("lambda of cost is 0")
    assert "below 5 " in text


def test_each_limit_learns_from_its_own(
    pretrained: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its batches, of one step or of twenty, what its episodes show, and its pull on the actor."""
    loop = commands.online.start_loop(online_plan(pretrained))
    next(event for event in loop.run() if isinstance(event, Iteration))
    seen: dict[int, tuple[float, float]] = {}  # critic: longest span, floor
    asked: list[Steering] = []
    update, update_actor = SafetyCritic.update, RLPD.update_actor

    def watched(self: SafetyCritic, *arguments: Any, **named: Any) -> Any:
        seen[id(self)] = float(named["spans"].max()), named["floor"]
        return update(self, *arguments, **named)

    def watched_actor(self: RLPD, batch: Batch, steering: Steering) -> Any:
        asked.append(steering)
        return update_actor(self, batch, steering)

    monkeypatch.setattr(SafetyCritic, "update", watched)
    monkeypatch.setattr(RLPD, "update_actor", watched_actor)
    loop.monitors[0].recent, loop.monitors[1].recent = [1.0, 0.0], [0.25, 0.25]
    run = loop.run()
    event = next(run)
    assert isinstance(event, Episode)
    assert event.phase == "online"
    shown = [m.limit.quantity.seen(m.recent) for m in loop.monitors]
    next(run)  # the updates that this episode pays for
    accident, cost = (seen[id(constraint.critic)] for constraint in loop.constraints)
    assert (accident[0], cost[0]) == (1.0, 20.0)
    assert [accident[1], cost[1]] == shown
    assert shown[0] != shown[1]
    wanted = [(c.critic.plain_risk, c.multiplier.value) for c in loop.constraints]
    assert [tuple(penalty) for penalty in asked[-1].penalties] == wanted


def test_a_lagrangian_method_follows_each_limits_own_episodes(pretrained: RunDir) -> None:
    off = ["kl=false", "shield=false", "guard=false"]
    off += ["baseline.multiplier=dual", "baseline.multiplier_init=5"]
    config = commands.finetune_config(pretrained, budget=1500, overrides=[*ONLINE, *off])
    plan = commands.plan_finetune(pretrained, config, accept_risk=True)
    loop = commands.online.start_loop(plan)
    next(event for event in loop.run() if isinstance(event, Iteration))
    accident, cost = (constraint.multiplier for constraint in loop.constraints)
    before = float(accident.value), float(cost.value)
    loop.monitors[0].recent, loop.monitors[1].recent = [0.0], [1.0]
    loop._update([0.0, 0.0], critics_only=False)
    assert float(accident.value) < before[0]
    assert float(cost.value) > before[1]


def test_the_offline_actor_is_asked_by_every_limit(
    tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [f"{name}={value}" for name, value in BOTH.items()]
    config = commands.pretrain_config(
        dataset=str(tiny_dataset), steps=2, limit=given, overrides=TINY
    )
    plan = commands.plan_pretrain(config, say=silent)
    loop = Pretraining(config, plan.dataset)
    asked: list[Steering] = []
    update = IQL.update

    def watched(self: IQL, batch: Batch, steering: Steering) -> Any:
        asked.append(steering)
        return update(self, batch, steering)

    monkeypatch.setattr(IQL, "update", watched)
    next(loop.steps())
    wanted = [(c.critic.risk, c.multiplier.value) for c in loop.constraints]
    assert [tuple(penalty) for penalty in asked[-1].penalties] == wanted
    assert len(wanted) == 2
