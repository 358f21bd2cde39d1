import dataclasses
import json
import math
import time

import numpy as np
import pytest

from safe_offrl.certify.certificate import Claim, episodes_without_accident
from safe_offrl.errors import ConfigError
from safe_offrl.limits import Limit
from safe_offrl.safety.monitor import SafetyMonitor, allowance, certifiable
from safe_offrl.stats.anytime import betabinomial_sequence


def _feed(monitor, accidents, version=0):
    for accident in accidents:
        monitor.update(bool(accident), float(accident), version)


def test_before_the_first_episode():
    monitor = SafetyMonitor(Limit("accident", 0.1, 1.0))
    assert math.isnan(monitor.accident_rate)
    assert (monitor.lower_mean, monitor.upper_mean) == (0.0, 1.0)
    assert monitor.version_interval() == (0.0, 1.0)
    assert not monitor.alarm
    assert monitor.log_evidence == pytest.approx(0.0)


def test_run_level_rate_is_the_bound_of_the_sum_over_episodes():
    monitor = SafetyMonitor(Limit("accident", 0.1, 1.0), 0.95)
    _feed(monitor, [0] * 34)
    assert monitor.upper_mean > 0.1  # 35 accident-free episodes are needed
    _feed(monitor, [0])
    assert monitor.upper_mean == pytest.approx(3.482 / 35, abs=1e-4)
    _feed(monitor, [1] + [0] * 64, version=1)
    assert (monitor.episodes, monitor.accidents, monitor.accident_rate) == (100, 1, 0.01)
    assert monitor.upper_mean == pytest.approx(0.0680, abs=1e-4)
    assert monitor.lower_mean == pytest.approx(0.000035, abs=1e-6)


def test_version_interval_splits_alpha_by_order_of_appearance():
    monitor = SafetyMonitor(Limit("accident", 0.1, 1.0), 0.95)
    _feed(monitor, [0] * 50, version=0)
    _feed(monitor, [1, 0, 0, 0], version=7)
    shares = [0.05 * 6 / math.pi**2 / k**2 for k in (1, 2)]
    assert monitor.version_interval() == betabinomial_sequence(1, 4, 1 - shares[1])
    assert monitor.version_interval(0) == betabinomial_sequence(0, 50, 1 - shares[0])
    _feed(monitor, [0] * 10, version=0)  # rolled back: the old version's counts go on
    assert monitor.version == 0
    assert monitor.version_interval() == betabinomial_sequence(0, 60, 1 - shares[0])
    assert monitor.version_interval(99) == (0.0, 1.0)


def test_version_intervals_cover_all_versions_at_all_times():
    # Twelve versions in a run, visited in an order that depends on the accidents.
    rng = np.random.default_rng(0)
    probabilities = np.linspace(0.02, 0.35, 12)
    missed, runs = 0, 300
    for _ in range(runs):
        monitor, version, wrong = SafetyMonitor(Limit("accident", 0.1, 1.0)), 0, False
        for _ in range(150):
            accident = bool(rng.random() < probabilities[version])
            monitor.update(accident, float(accident), version)
            low, high = monitor.version_interval()
            wrong = wrong or not low <= probabilities[version] <= high
            version = max(0, version - 1) if accident else (version + (rng.random() < 0.2)) % 12
        missed += wrong
    assert missed / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


def test_alarm_goes_off_is_sticky_and_resets_with_a_higher_threshold():
    monitor = SafetyMonitor(Limit("accident", 0.1, 1.0), 0.95)
    assert monitor.alarm_threshold == pytest.approx(math.log(20 * math.pi**2 / 6))
    _feed(monitor, [1] * 6)
    assert monitor.alarm
    _feed(monitor, [0] * 200)
    assert monitor.log_evidence < monitor.alarm_threshold
    assert monitor.alarm
    monitor.reset_alarm()
    assert not monitor.alarm
    assert monitor.log_evidence == pytest.approx(0.0)
    assert monitor.alarm_threshold == pytest.approx(math.log(20 * math.pi**2 / 6 * 4))
    assert monitor.episodes == 206  # the record is not reset


def test_false_alarms_of_the_whole_run_stay_within_alpha_even_with_resets():
    rng = np.random.default_rng(1)
    runs, alarmed = 150, 0
    for _ in range(runs):
        monitor, any_alarm = SafetyMonitor(Limit("accident", 0.1, 1.0)), False
        for i, accident in enumerate(rng.random(300) < 0.1):
            monitor.update(bool(accident), float(accident), i // 50)
            any_alarm = any_alarm or monitor.alarm
            if i % 100 == 99:
                monitor.reset_alarm()
        alarmed += any_alarm
    assert alarmed / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


def test_a_30_percent_policy_is_never_certified_as_below_10_percent():
    monitor = SafetyMonitor(Limit("accident", 0.1, 1.0), 0.95)
    for i, accident in enumerate(np.random.default_rng(2).random(8000) < 0.3):
        monitor.update(bool(accident), float(accident), 0)
        if i % 20 == 0:
            assert monitor.upper_mean > 0.1
            assert monitor.version_interval()[1] > 0.1
    assert monitor.alarm
    assert monitor.log_evidence > 1000
    assert monitor.lower_mean > 0.28
    assert monitor.version_interval()[0] > 0.25


def test_state_survives_json_bitwise():
    accidents = np.random.default_rng(3).random(400) < 0.12
    whole, first = (
        SafetyMonitor(Limit("accident", 0.1, 1.0)),
        SafetyMonitor(Limit("accident", 0.1, 1.0)),
    )
    for i, accident in enumerate(accidents):
        whole.update(bool(accident), float(accident), i // 40)
    for i, accident in enumerate(accidents[:150]):
        first.update(bool(accident), float(accident), i // 40)
    text = json.dumps(first.state_dict(), allow_nan=False)
    second = SafetyMonitor(Limit("accident", 0.1, 1.0))
    second.load_state_dict(json.loads(text))
    assert second.state_dict() == first.state_dict()
    for i, accident in enumerate(accidents[150:], start=150):
        second.update(bool(accident), float(accident), i // 40)
    assert second.state_dict() == whole.state_dict()
    assert (second.episodes, second.accidents) == (400, int(accidents.sum()))


def test_fresh_state_is_strict_json():
    json.dumps(SafetyMonitor(Limit("accident", 0.1, 1.0)).state_dict(), allow_nan=False)


def test_state_of_another_limit_is_refused():
    state = SafetyMonitor(Limit("accident", 0.1, 1.0)).state_dict()
    with pytest.raises(ValueError, match=r"limit \['accident', 0\.1, 1\.0\]"):
        SafetyMonitor(Limit("accident", 0.2, 1.0)).load_state_dict(state)


def test_fast_enough_for_every_episode():
    monitor = SafetyMonitor(Limit("accident", 0.1, 1.0))
    start = time.perf_counter()
    _feed(monitor, [0] * 2000)
    assert (time.perf_counter() - start) / 2000 < 500e-6  # about 10 microseconds on one core


def test_certifiable():
    # 50k steps of 1000-step episodes are 50 episodes: nothing below 6.7 %.
    result = certifiable(50_000, 1000, Limit("accident", 0.05, 1.0), 0.95)
    assert result.episodes == 50
    assert result.fixed == pytest.approx(0.0675, abs=1e-4)
    assert result.run_level == pytest.approx(3.482 / 50, abs=1e-5)
    assert result.anytime == pytest.approx(0.0739, abs=1e-4)
    assert not result.reachable
    assert "too few for epsilon 0.05, which needs 70 accident-free episodes" in str(result)
    good = certifiable(50_000, 100, Limit("accident", 0.1, 1.0))
    assert (good.episodes, good.reachable) == (500, True)
    assert (good.episodes_needed_fixed, good.episodes_needed_anytime) == (34, 36)
    assert "within reach" in str(good)
    assert json.loads(json.dumps(good.as_dict()))["reachable"] is True


def test_the_header_promises_what_the_monitor_and_certify_give():
    limit = Limit("accident", 0.05, 1.0)
    best = certifiable(50_000, 1000, limit)
    monitor = SafetyMonitor(limit)
    _feed(monitor, [0] * best.episodes)
    assert best.anytime == monitor.version_interval()[1]
    assert best.run_level == monitor.upper_mean
    # (1 - p)^n = .05 * 6 / pi^2, by hand; the first attempt of `certify` has the same share.
    spent = 0.05 * 6.0 / math.pi**2
    assert best.fixed == pytest.approx(1.0 - spent ** (1 / 50))
    assert best.episodes_needed_fixed == math.ceil(math.log(spent) / math.log(0.95)) == 69
    assert best.episodes_needed_anytime == 78
    claim = Claim("accident", 0.05, 1.0, 0.95, "anytime", 1000, 0)
    assert episodes_without_accident(claim) == 78
    assert episodes_without_accident(dataclasses.replace(claim, method="one look")) == 69


def test_budget_below_one_episode_is_refused():
    with pytest.raises(ConfigError, match="less than one episode"):
        certifiable(99, 100, Limit("accident", 0.1, 1.0))


def test_an_allowance_is_what_the_alarm_can_bear() -> None:
    limit, episodes = Limit("accident", 0.05, 1.0), 25
    allowed = allowance(limit, 0.95, episodes)
    assert allowed == 6
    for bad, sounds in ((6, False), (7, True)):
        monitor = SafetyMonitor(limit, 0.95)
        accidents = [(i + 1) * bad // episodes > i * bad // episodes for i in range(episodes)]
        assert sum(accidents) == bad
        _feed(monitor, accidents)
        assert monitor.alarm is sounds
    # More episodes allow more, a higher limit as well; the alarm of a cost counts four limits.
    for more in (allowance(limit, 0.95, 100), allowance(Limit("accident", 0.2, 1.0), 0.95, 25)):
        assert more is not None
        assert more > allowed
    cost = Limit("cost", 0.025, 1000.0)
    most = allowance(cost, 0.95, episodes)
    assert most is not None
    for expensive, sounds in ((most, False), (most + 1, True)):
        monitor = SafetyMonitor(cost, 0.95)
        for i in range(episodes):
            is_bad = (i + 1) * expensive // episodes > i * expensive // episodes
            monitor.update(False, 100.0 * is_bad, 0)
        assert monitor.alarm is sounds


def test_too_few_episodes_allow_everything() -> None:
    assert allowance(Limit("accident", 0.5, 1.0), 0.95, 2) is None
