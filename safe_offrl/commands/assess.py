"""What can be said of pretrained policies before their first step online."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from safe_offrl.assess.assessment import assess_policy, choose_policy
from safe_offrl.assess.estimates import Estimates, risk_text
from safe_offrl.assess.fitted_features import FittedConfig
from safe_offrl.assess.importance_sampling import USABLE
from safe_offrl.commands.common import (
    require_output,
    say_plain,
    stored_dataset,
    warning_lines,
)
from safe_offrl.commands.environment import learnt_lines, since_log
from safe_offrl.commands.given_limits import Limits, limits_by_name, require_own_limit
from safe_offrl.compute.device import configure
from safe_offrl.data.dataset import Dataset
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.files import json_bytes, plain, write_atomic
from safe_offrl.limits import QUANTITIES, Limit, quantity_named
from safe_offrl.record.checkpoints import Checkpoint
from safe_offrl.record.final_policy import stored_policy
from safe_offrl.record.find_run import find_run
from safe_offrl.record.progress import ProgressLine, Say
from safe_offrl.record.run import RunDir
from safe_offrl.record.run_config import RunInputs, parse_run_yaml
from safe_offrl.record.versions import versions
from safe_offrl.spec import SafetySpec
from safe_offrl.stats.fixed import shared_confidence
from safe_offrl.train.pretrain_config import PretrainConfig, discount_of

ASSESSMENT = "assessment.json"
ASSESSMENT_FORMAT = 1
GO_BY = (
    "go by       these: made of the log's episodes, with intervals. What pretrain printed is the "
    "safety critic's own view, which learning steers by"
)
CONFIG = FittedConfig()


class Subject(NamedTuple):
    """A pretrained policy, and the log that it is judged by."""

    run: RunDir
    safety: SafetySpec
    dataset: Dataset  # as logged
    checkpoint: Checkpoint
    config: PretrainConfig
    inputs: RunInputs


def assess_runs(
    run_names: Sequence[str | Path],
    *,
    confidence: float | None = None,
    out: str | Path | None = None,
    runs: str | Path = "runs",
    say: Say = say_plain,
    **limits: Unpack[Limits],
) -> dict[str, Any]:
    """Assess pretrain runs from their logs, and of several name the one to go on with.

    Writes assessment.json into each run; one that is still true of it is not made again. With
    ``out`` all that is returned goes into this file instead, and nothing into the runs. The limits
    are those that the runs were pretrained with, unless given here.
    """
    # Runs, and where the answer goes.
    found = [find_run(run_name, Path(runs), "pretrain") for run_name in run_names]
    for run in found if out is None else ():
        run.require_writable("Give --out FILE to write elsewhere.")
    if out is not None:
        require_output(Path(out))
    # Estimates of each run.
    estimates: dict[str, Estimates] = {}
    bounds: dict[str, tuple[float, float]] = {}
    results: dict[str, Any] = {}
    for run in found:
        first, *further = _subjects(run, limits, confidence, say)
        safety, dataset = first.safety, first.dataset
        for line in warning_lines(dataset, first.config.safety, first.config.held_out):
            say(line)
        key = str(run.path)
        subject, limit = first, limit_of(first)
        estimates[key] = assessed(subject, say, store=out is None)
        bounds[key] = (limit, safety.confidence)
        results[key] = {
            **limit_verdict(estimates[key], limit, safety.confidence),
            "estimates": estimates[key].as_dict(),
        }
        say(describe(run.name, estimates[key], limit, safety.confidence))
        # Limits behind the first.
        for subject in further:
            found_too, limit = assessed(subject, say, store=out is None), limit_of(subject)
            results[key].setdefault("further", {})[subject.safety.constraint] = {
                **limit_verdict(found_too, limit, safety.confidence),
                "estimates": found_too.as_dict(),
            }
            say(describe(run.name, found_too, limit, safety.confidence))
    # Choice among the runs.
    say(GO_BY)
    answer: dict[str, Any] = {"runs": plain(results)}
    if len(found) > 1:
        name, qualifies = choose_policy(estimates, bounds)
        answer |= {"chosen": name, "qualifies": qualifies}
        say(_choice_table(estimates, bounds))
        say(
            f"choice      {name}: the highest lower bound of return among those below their limit"
            if qualifies
            else f"choice      none is shown to be below its limit; the lowest upper limit of risk "
            f"is that of {name}"
        )
    # File.
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(out), json_bytes(answer))
        say(f"file        {out}")
    return answer


def _assessed_facts(subject: Subject) -> dict[str, Any]:
    """What estimates depend on. Limits and confidence only come in when they are read."""
    return {
        "format": ASSESSMENT_FORMAT,
        "policy_sha256": stored_policy(subject.run, subject.checkpoint).sha256,
        "dataset_sha256": subject.dataset.sha256,
        "constraint": subject.safety.constraint,
        "accident": subject.safety.accident,
        "cost_threshold": subject.safety.cost_threshold,
        "horizon": subject.dataset.horizon,
        "settings": dataclasses.asdict(CONFIG),
    }


def stored_estimates(subject: Subject) -> Estimates | None:
    """Those in the run's assessment.json, if they are of this policy and this log."""
    name = _file_of(subject)
    if not (subject.run.path / name).is_file():
        return None
    try:
        stored, identity = subject.run.read_json(name), _assessed_facts(subject)
        if {key: stored.get(key) for key in identity} == identity:
            found = Estimates.from_dict(stored["estimates"])
            # An earlier version did not keep it.
            return dataclasses.replace(found, return_range=subject.dataset.return_range)
    except (RunError, KeyError, TypeError, ValueError):
        pass  # It is damaged, and can be made again.
    return None


def _file_of(subject: Subject) -> str:
    """Where the assessment of one limit lies in its run: that of the first in ASSESSMENT."""
    constraint = subject.safety.constraint
    if constraint == subject.config.safety.constraint:
        return ASSESSMENT
    return ASSESSMENT.replace(".", f"_{constraint}.")


def limit_of(subject: Subject) -> float:
    """The limit that a policy is held to, in its own unit."""
    return _limit(subject).value


def _limit(subject: Subject) -> Limit:
    dataset = subject.dataset
    return subject.safety.limit(dataset.horizon, dataset.cost_max, dataset.signals_max)


def each_subject(subject: Subject, safety: SafetySpec) -> list[Subject]:
    """The subject under each of the limits alone, at confidences that hold together."""
    confidence = shared_confidence(safety.confidence, len(safety.bounds))
    return [
        subject._replace(safety=dataclasses.replace(single, confidence=confidence))
        for single in safety.each()
    ]


def _subjects(run: RunDir, limits: Limits, confidence: float | None, say: Say) -> list[Subject]:
    """What a run has to be judged, by each limit: its own where none is given."""
    inputs, config = parse_run_yaml(run.config_text, "pretrain", PretrainConfig, run.path)
    configure(inputs.threads)
    require_own_limit(config.safety, limits)
    asked: dict[str, Any] = {"confidence": confidence}
    given = {k: v for k, v in asked.items() if v is not None}
    own = limits_by_name(limits)
    if other := [name for name in own if name not in config.safety.bounds]:
        raise ConfigError(
            f'The run "{run.name}" has no limit of "{other[0]}", so nothing was learnt of it. Give '
            f"limits of {' and '.join(config.safety.bounds)}, or pretrain with it."
        )
    if config.safety.limits:
        given["limits"] = config.safety.limits | own
    else:
        given |= {QUANTITIES[name].limit: value for name, value in own.items()}
    safety = dataclasses.replace(config.safety, **given)
    dataset = stored_dataset(inputs, safety, discount_of(config))
    if run.environments:
        for line in learnt_lines(since_log(dataset, run.environments[-1])):
            say(line)
    subject = Subject(run, safety, dataset, run.load_checkpoint(), config, inputs)
    return each_subject(subject, safety)


def assessed(subject: Subject, say: Say, *, store: bool = True) -> Estimates:
    """The stored estimates if they are still true, else new ones, which are stored if wanted."""
    if (stored := stored_estimates(subject)) is not None:
        return stored
    run, dataset = subject.run, subject.dataset
    with contextlib.ExitStack() as writing:
        if store:
            run.lock()  # It is locked before the work, not after it.
            writing.enter_context(run)
        # Policy and limit.
        policy = stored_policy(run, subject.checkpoint)
        # Returns are estimated in the environment's unit.
        normalizer = policy.normalizer._replace(reward_scale=1.0)
        limit = _limit(subject)
        # Estimates.
        say(f"assess      {run.path}: the policy, without its shield, from the log alone")
        line = ProgressLine(100, 0, None if say is say_plain else say, "%")
        with contextlib.closing(line):
            estimates = assess_policy(
                dataset.normalised(normalizer),
                policy.actor,
                limit,
                CONFIG,
                progress=lambda done: line.update(round(100 * done), "fitted Q evaluation"),
            )
        # File.
        content = {
            **_assessed_facts(subject),
            "estimates": estimates.as_dict(),
            **limit_verdict(estimates, limit.value, subject.safety.confidence),
            "versions": versions(),
        }
        if store:
            write_atomic(
                run.path / _file_of(subject), json_bytes(json.loads(json.dumps(plain(content))))
            )
    return estimates


def limit_verdict(estimates: Estimates, limit: float, confidence: float) -> dict[str, Any]:
    """What the estimates mean for one limit at one confidence, JSON-able."""
    low, high = estimates.risk_interval(confidence)
    return_low, return_high = estimates.return_interval(confidence)
    return {
        "limit": limit,
        "confidence": confidence,
        "risk": estimates.risk.value * estimates.scale,
        "risk_low": low,
        "risk_high": high,
        "risk_upper": estimates.risk_upper(confidence),
        "return": estimates.return_value,
        "return_low": return_low,
        "return_high": return_high,
        "doubts": list(estimates.doubts),
        "below_limit": estimates.shows_below(limit, confidence),
        "sentence": estimates.sentence(limit, confidence),
    }


def describe(name: str, estimates: Estimates, limit: float, confidence: float) -> str:
    """A few lines for people."""
    risk = numbers(estimates, limit, confidence)
    low, high = estimates.return_interval(confidence)
    lines = [
        f"{name}: return {estimates.return_value:.3g} [{low:.3g}, {high:.3g}]; {risk}",
        f"  {estimates.sentence(limit, confidence)}",
        f"  {estimates.support:.0%} of the logged actions are such as the policy takes; the log of "
        f"{estimates.episodes:,} episodes is worth {estimates.risk.episodes:,.0f} of its own",
    ]
    if estimates.beyond:
        lines.append(f"  {estimates.beyond}")
    for what, found in (("risk", estimates.weighted_risk), ("return", estimates.weighted_return)):
        if found is None:
            continue
        scale = estimates.scale if what == "risk" else 1.0
        note = "" if found.usable else f": UNUSABLE, {USABLE:g} needed"
        lines.append(
            f"  {what}, reweighed: WIS {found.wis * scale:.3g} +- {found.wis_error * scale:.2g}, "
            f"doubly robust {found.doubly_robust * scale:.3g} +- "
            f"{found.doubly_robust_error * scale:.2g}, {found.episodes:.1f} effective episodes"
            f"{note}"
        )
    return "\n".join(lines)


def numbers(estimates: Estimates, limit: float, confidence: float) -> str:
    """Estimate, interval, upper limit and what it is held against, in one phrase."""
    kind = estimates.constraint
    value = min(max(0.0, estimates.risk.value), 1.0) * estimates.scale
    low, high = (risk_text(x, kind) for x in estimates.risk_interval(confidence))
    return (
        f"{quantity_named(kind).estimated} {risk_text(value, kind)} [{low}, {high}], at most "
        f"{risk_text(estimates.risk_upper(confidence), kind)} ({confidence:.0%}); limit "
        f"{risk_text(limit, kind)}"
    )


def _choice_table(estimates: dict[str, Estimates], limits: dict[str, tuple[float, float]]) -> str:
    width = max(len(name) for name in estimates)
    lines = [f"{'run':<{width}}  return at least  risk at most  limit    below"]
    for name, found in estimates.items():
        limit, confidence = limits[name]
        upper = risk_text(found.risk_upper(confidence), found.constraint)
        lines.append(
            f"{name:<{width}}  {found.return_interval(confidence)[0]:>15.3g}  {upper:>12}  "
            f"{risk_text(limit, found.constraint):<7}  "
            f"{'yes' if found.shows_below(limit, confidence) else 'no'}"
        )
    return "\n".join(lines)
