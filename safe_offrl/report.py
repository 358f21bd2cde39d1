"""Compare runs: accidents, returns and constraints, read from the run folders alone.

One row a run, one row a group of seeds, and a paired comparison of groups that started from the
same pretrained policies. The ledger is the record of accidents; nothing is taken from TensorBoard.
An accident is an EPISODE with at least one accident throughout this module.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from safe_offrl import charts
from safe_offrl.run import RunDir, RunError
from safe_offrl.statistics import (
    RateRatio,
    bootstrap_interval,
    clopper_pearson,
    rate_ratio,
    run_level_interval,
    run_level_upper,
)
from safe_offrl.types import Episode

EARLY_STEPS = 5_000  # where most accidents of fine-tuning happen
LAST_EPISODES = 100  # behind "final return"
BOOTSTRAP_SEED = 0  # so that the same runs give the same table

_SWITCHES = {"kl": "no-kl", "accident_constraint": "no-accident-constraint", "shield": "no-shield"}


# --- what is read ---------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """What `safe-offrl evaluate` measured on the final policy, in episodes of its own."""

    episodes: int
    accidents: int
    mean_return: float
    return_standard_error: float


class Decision(NamedTuple):
    """One iteration of the acceptance step, as logged; NaN where the run did not measure."""

    step: int
    accepted: bool
    verdict: bool  # "both constraints satisfied", as the acceptance step saw it
    kl: float  # larger mean of the two directions
    delta: float
    v_candidate: float
    v_deployed: float  # of the policy that acted, measured again in this iteration
    epsilon: float

    @property
    def recovering(self) -> bool:
        """Accepted by the exception: the predecessor exceeds epsilon and the estimate improves."""
        improves = self.epsilon <= self.v_candidate < self.v_deployed
        return self.accepted and improves and self.kl < self.delta

    @property
    def violation(self) -> bool:
        """Accepted without both constraints, and not by the exception.

        The verdict is checked against the numbers: an acceptance that they do not bear out (NaN
        included) is a violation too.
        """
        satisfied = self.verdict and self.kl < self.delta and self.v_candidate < self.epsilon
        return self.accepted and not satisfied and not self.recovering


@dataclass(frozen=True)
class RunData:
    """One run folder, read."""

    name: str
    kind: str
    status: str
    method: str
    seed: int
    pretrained: str  # identity of the policy it started from; pairs runs together with the seed
    env_id: str
    budget: int | None
    epsilon: float
    confidence: float
    episodes: list[Episode]
    constrained: bool  # whether an acceptance step decided who acts
    decisions: list[Decision]
    evaluation: Evaluation | None
    estimate: float  # V_accident(s0) of the final policy by the safety critic; NaN if unknown


def method_label(settings: Mapping[str, Any]) -> str:
    """Name of a fine-tuning configuration by what is switched off.

    >>> method_label({"kl": True, "accident_constraint": True, "shield": True})
    'constrained'
    >>> method_label({"kl": False, "accident_constraint": True, "shield": False})
    'no-kl no-shield'
    >>> method_label({"kl": False, "accident_constraint": False, "shield": False})
    'rlpd (all off)'
    """
    off = [label for key, label in _SWITCHES.items() if not settings.get(key, True)]
    if len(off) == len(_SWITCHES):
        return "rlpd (all off)"
    return " ".join(off) or "constrained"


def read_run(path: Path, group_by: str | None = None) -> RunData:
    """Read one run folder; RunError if it is none or is damaged.

    ``group_by``: dotted key of the stored settings ("utd", "safety.epsilon") to group runs by,
    instead of :func:`method_label`.
    """
    run = RunDir(Path(path))
    kind, status = run.kind, str(run.state.get("status", "unknown"))
    settings, inputs = _read_config(run, kind)
    safety = settings.get("safety") or {}
    try:
        if group_by is not None:
            method = f"{group_by}={_lookup(settings, group_by, run.name)}"
        else:
            method = method_label(settings) if kind == "finetune" else "pretrained (frozen)"
        origin = inputs.get("pretrained_sha256") or inputs.get("pretrained") or settings.get("run")
        decisions = [_decision(line) for line in run.iterations()]
        return RunData(
            name=run.name,
            kind=kind,
            status=status,
            method=method,
            seed=int(settings.get("seed", 0)),
            pretrained=str(origin or ""),
            env_id=str(inputs.get("env_id") or settings.get("env") or "unknown"),
            budget=int(settings["budget"]) if "budget" in settings else None,
            epsilon=float(safety.get("epsilon", math.nan)),
            confidence=float(safety.get("confidence", 0.95)),
            episodes=run.episodes(),
            constrained=kind == "finetune" and any(settings.get(key, True) for key in _SWITCHES),
            decisions=decisions,
            evaluation=_read_evaluation(run),
            estimate=_estimate(run, decisions),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f'The run "{run.name}" holds a value that cannot be read ({error!r}). '
            "Restore the folder from a backup or leave the run out."
        ) from error


def _read_config(run: RunDir, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings of the run's kind, inputs) from config.yaml."""
    try:
        values = yaml.safe_load(run.config_text)
        settings, inputs = values.get(kind, values), values.get("inputs") or {}
    except (OSError, ValueError, RecursionError, AttributeError, yaml.YAMLError) as error:
        raise RunError(
            f'config.yaml of the run "{run.name}" is missing or damaged ({error}). '
            "Restore it from a backup or leave the run out."
        ) from error
    return settings, inputs


def _lookup(settings: Mapping[str, Any], dotted: str, name: str) -> Any:
    value: Any = settings
    for part in dotted.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise RunError(
                f'The run "{name}" has no setting "{dotted}" to group by. '
                "Give a key that `--print-config` shows."
            )
        value = value[part]
    return value


def _read_evaluation(run: RunDir) -> Evaluation | None:
    if not (run.path / "evaluation.json").is_file():
        return None
    values = run.read_json("evaluation.json")
    error = values.get("return_standard_error")
    return Evaluation(
        episodes=int(values["episodes"]),
        accidents=int(values["accidents"]),
        mean_return=float(values["mean_return"]),
        return_standard_error=math.nan if error is None else float(error),
    )


def _estimate(run: RunDir, decisions: Sequence[Decision]) -> float:
    """The calibration report's estimate, or the last iteration's for the policy that acts on."""
    if run.kind == "pretrain":
        has_report = (run.path / "calibration.json").is_file()
        return float(run.read_json("calibration.json")["v_accident"]) if has_report else math.nan
    measured = [d for d in decisions if not math.isnan(d.v_candidate)]
    if not measured:
        return math.nan
    return measured[-1].v_candidate if measured[-1].accepted else measured[-1].v_deployed


def _decision(line: Mapping[str, Any]) -> Decision:
    """One line of iterations.jsonl, in which null stands for NaN."""
    number = {k: math.nan if v is None else v for k, v in line.items()}
    forward, reverse = float(number["kl_forward_mean"]), float(number["kl_reverse_mean"])
    return Decision(
        step=int(line["step"]),
        accepted=bool(line["accepted"]),
        verdict=bool(line["constraints_satisfied"]),
        kl=math.nan if math.isnan(forward + reverse) else max(forward, reverse),
        delta=float(number["delta"]),
        v_candidate=float(number["v_candidate"]),
        v_deployed=float(number["v_previous"]),
        epsilon=float(number["epsilon"]),
    )


# --- what is computed -----------------------------------------------------------------------------


class Interval(NamedTuple):
    """A value between its bounds; NaN where there is nothing to measure."""

    value: float
    low: float
    high: float


class Mean(NamedTuple):
    """A mean with its standard error (NaN for a single observation)."""

    value: float
    error: float


_NOTHING = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Row:
    """One run, or several seeds of one method pooled.

    Rates: accidents over episodes, with a two-sided anytime-valid interval at run level (policies
    may change). ``certified_rate`` is the one-sided upper bound alone. Returns of one run: mean and
    standard error over episodes; of a group: over the runs' means.
    """

    label: str
    method: str
    pooled: bool
    seeds: list[int]
    episodes: int
    steps: int
    accidents: int
    rate: Interval
    per_1000_steps: Interval
    early_accidents: int  # in episodes that ended within the first EARLY_STEPS steps of a run
    certified_rate: float
    final_return: Mean
    evaluated_return: Mean
    evaluated_rate: Interval  # Clopper-Pearson: one look at a fixed number of episodes
    evaluated_episodes: int
    iterations: int
    accepted: int
    violations: int | None  # None for a method without constraints
    recovering: int
    estimate: Mean  # V_accident(s0) of the final policies, to be held against evaluated_rate
    # Iterations whose acting policy's estimate was not below epsilon; None if never measured.
    above_epsilon: int | None

    @property
    def accepted_share(self) -> float:
        """Accepted candidates over iterations; NaN without any."""
        return self.accepted / self.iterations if self.iterations else math.nan


@dataclass(frozen=True)
class Pairing:
    """``first`` against ``second`` over the runs that share pretrained policy and seed."""

    first: str
    second: str
    pairs: int
    accidents: tuple[int, int]
    accident_ratio: RateRatio  # per step, exact (conditional binomial)
    return_ratio: Interval  # of summed final returns, bootstrap over pairs; NaN unless both > 0
    return_difference: Interval  # mean over pairs


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found; :func:`format_table` and :func:`write_png` show it."""

    runs: list[RunData]
    rows: list[Row]
    groups: list[Row]  # empty unless some method has several runs
    pairings: list[Pairing]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain, strict JSON: NaN and infinity are None. The episodes themselves are left out."""
        rows = [dataclasses.asdict(r) | {"accepted_share": r.accepted_share} for r in self.rows]
        groups = [dataclasses.asdict(r) | {"accepted_share": r.accepted_share} for r in self.groups]
        pairings = [dataclasses.asdict(p) for p in self.pairings]
        plain = {"runs": rows, "groups": groups, "pairings": pairings, "notes": self.notes}
        return _plain(plain)


def compare(runs: Sequence[Path], *, group_by: str | None = None) -> Comparison:
    """Read the run folders and compute every row, group and paired comparison."""
    if not runs:
        raise RunError("There is no run to compare. Name at least one run folder.")
    data = [read_run(Path(path), group_by) for path in runs]
    by_method: dict[str, list[RunData]] = {}
    for run in data:
        by_method.setdefault(run.method, []).append(run)
    several = any(len(group) > 1 for group in by_method.values())
    groups = [_row(group, pooled=True) for group in by_method.values()] if several else []
    online = [group for group in by_method.values() if any(run.episodes for run in group)]
    pairings = [_pair(a, b) for a, b in itertools.combinations(online, 2)]
    return Comparison(
        runs=data,
        rows=[_row([run]) for run in data],
        groups=groups,
        pairings=[p for p in pairings if p is not None],
        notes=_notes(data, by_method),
    )


def _row(runs: Sequence[RunData], *, pooled: bool = False) -> Row:
    """Pool the runs. Independent runs one after the other are one long run to the bounds."""
    episodes = [episode for run in runs for episode in run.episodes]
    accidents, steps = sum(e.accident for e in episodes), sum(e.steps for e in episodes)
    confidence = min(run.confidence for run in runs)
    decisions = [decision for run in runs for decision in run.decisions]
    evaluations = [run.evaluation for run in runs if run.evaluation is not None]
    evaluated = sum(e.episodes for e in evaluations)
    evaluated_accidents = sum(e.accidents for e in evaluations)
    final = [_mean([e.episode_return for e in run.episodes[-LAST_EPISODES:]]) for run in runs]
    measured = any(not math.isnan(d.v_deployed) for d in decisions)
    upper = run_level_upper(accidents, confidence) / len(episodes) if episodes else 1.0
    return Row(
        label=f"ALL {len(runs)} run{'s' * (len(runs) > 1)}" if pooled else runs[0].name,
        method=runs[0].method,
        pooled=pooled,
        seeds=[run.seed for run in runs],
        episodes=len(episodes),
        steps=steps,
        accidents=accidents,
        rate=_rate(accidents, len(episodes), confidence, most=1.0),
        per_1000_steps=_rate(accidents, steps / 1000, confidence),
        early_accidents=sum(e.accident for e in episodes if e.total_steps <= EARLY_STEPS),
        certified_rate=min(1.0, upper),
        final_return=final[0] if len(runs) == 1 else _mean([m.value for m in final]),
        evaluated_return=Mean(evaluations[0].mean_return, evaluations[0].return_standard_error)
        if len(evaluations) == 1
        else _mean([e.mean_return for e in evaluations]),
        evaluated_rate=Interval(
            evaluated_accidents / evaluated,
            *clopper_pearson(evaluated_accidents, evaluated, confidence),
        )
        if evaluated
        else _NOTHING,
        evaluated_episodes=evaluated,
        iterations=len(decisions),
        accepted=sum(d.accepted for d in decisions),
        violations=sum(d.violation for d in decisions) if runs[0].constrained else None,
        recovering=sum(d.recovering for d in decisions),
        estimate=_mean([run.estimate for run in runs]),
        # Written so that a single NaN among the estimates counts as above.
        above_epsilon=sum(not d.v_deployed < d.epsilon for d in decisions) if measured else None,
    )


def _rate(accidents: int, exposure: float, confidence: float, most: float = math.inf) -> Interval:
    if not exposure:
        return _NOTHING
    low, high = run_level_interval(accidents, confidence)
    return Interval(accidents / exposure, low / exposure, min(most, high / exposure))


def _mean(values: Sequence[float]) -> Mean:
    x = np.asarray(values, dtype=np.float64)
    error = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan
    return Mean(float(x.mean()) if len(x) else math.nan, error)


def _pair(first: Sequence[RunData], second: Sequence[RunData]) -> Pairing | None:
    """Match runs by pretrained policy and seed; None if not one matches."""
    partners = {(run.pretrained, run.seed): run for run in second if run.episodes}
    pairs = [
        (run, partners[run.pretrained, run.seed])
        for run in first
        if run.episodes and (run.pretrained, run.seed) in partners
    ]
    if not pairs:
        return None
    a, b = (_row(side, pooled=True) for side in zip(*pairs, strict=True))
    returns = np.array([[_row([run]).final_return.value for run in pair] for pair in pairs])
    confidence = min(run.confidence for pair in pairs for run in pair)

    def interval(statistic: Callable[[NDArray[np.float64]], float]) -> Interval:
        if len(pairs) == 1:
            return Interval(statistic(returns), math.nan, math.nan)
        rng = np.random.default_rng(BOOTSTRAP_SEED)
        return Interval(
            statistic(returns),
            *bootstrap_interval([returns], statistic, rng, confidence=confidence),
        )

    return Pairing(
        first=a.method,
        second=b.method,
        pairs=len(pairs),
        accidents=(a.accidents, b.accidents),
        accident_ratio=rate_ratio(a.accidents, a.steps, b.accidents, b.steps, confidence),
        # A ratio of returns means something only while every return is positive.
        return_ratio=interval(lambda x: float(x[:, 0].sum() / x[:, 1].sum()))
        if (returns > 0).all()
        else _NOTHING,
        return_difference=interval(lambda x: float((x[:, 0] - x[:, 1]).mean())),
    )


def _notes(data: Sequence[RunData], by_method: Mapping[str, Sequence[RunData]]) -> list[str]:
    """What the reader must know before believing the table."""
    notes = []
    for what, values in (
        ("environments", {run.env_id for run in data}),
        ("epsilon", {f"{run.epsilon:g}" for run in data if not math.isnan(run.epsilon)}),
        ("budgets", {f"{run.budget:,}" for run in data if run.budget is not None}),
    ):
        if len(values) > 1:
            notes.append(f"The runs differ in {what}: {', '.join(sorted(values))}.")
    notes += [f"{run.name} is {run.status}." for run in data if run.status != "finished"]
    names = [run.name for run in data]
    notes += [f"{n} is named twice." for n in sorted(set(names)) if names.count(n) > 1]
    online = {m: g for m, g in by_method.items() if any(run.episodes for run in g)}
    keys = {m: {(run.pretrained, run.seed) for run in g} for m, g in online.items()}
    for method, own in keys.items():
        others = set().union(*(k for m, k in keys.items() if m != method))
        if others - own:
            seeds = ", ".join(str(seed) for _, seed in sorted(others - own))
            notes.append(f"{method} has no run for the pretrained policy and seed of: {seeds}.")
    return notes


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if hasattr(value, "_asdict"):  # named tuples keep their names
        return _plain(value._asdict())
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


# --- table ----------------------------------------------------------------------------------------


def format_table(comparison: Comparison) -> str:
    """The comparison as text: accidents, returns and constraints, paired summary, notes."""
    confidence = f"{100 * min(run.confidence for run in comparison.runs):g} %"
    early = f"first {EARLY_STEPS // 1000}k"
    blocks = [
        _block(
            f"Accidents while learning (every episode counts; anytime intervals, {confidence})",
            "run|method|episodes|steps|accidents|"
            + early
            + "|per episode|per 1000 steps|certified <",
            [_accident_cells(r) for r in comparison.rows],
            [_accident_cells(r) for r in comparison.groups],
        ),
        _block(
            f"Return and constraints (final: last {LAST_EPISODES} episodes; +- standard error)",
            "run|method|final return|eval. return|eval. accidents|estimate|accepted|"
            "violations|recovering|est. >= eps",
            [_return_cells(r) for r in comparison.rows],
            [_return_cells(r) for r in comparison.groups],
        ),
    ]
    if comparison.pairings:
        lines = ["Paired comparison (same pretrained policy, same seed)"]
        for pairing in comparison.pairings:
            lines += _pairing_lines(pairing)
        blocks.append("\n".join(lines))
    blocks.append(
        "eval.: of the final policy (safe-offrl evaluate); estimate: its V_accident(s0);\n"
        "violations: accepted without both measured constraints; recovering: accepted while the\n"
        "acting policy exceeded epsilon, with a lower estimate than its predecessor; est. >= eps:\n"
        "iterations whose acting policy, measured again, was not below epsilon."
    )
    if comparison.notes:
        blocks.append("\n".join(f"Note: {note}" for note in comparison.notes))
    return "\n\n".join(blocks)


def _block(title: str, header: str, rows: list[list[str]], groups: list[list[str]]) -> str:
    """Text columns, the first two left-aligned; groups below a rule."""
    names = header.split("|")
    table = [names, *rows, *groups]
    widths = [max(len(row[i]) for row in table) for i in range(len(names))]

    def line(cells: Sequence[str]) -> str:
        left = [cell.ljust(w) for cell, w in zip(cells[:2], widths[:2], strict=True)]
        right = [cell.rjust(w) for cell, w in zip(cells[2:], widths[2:], strict=True)]
        return "  ".join(left + right).rstrip()

    rule = "  ".join("-" * w for w in widths)
    lines = [title, line(names), rule, *map(line, rows)]
    if groups:
        lines += [rule, *map(line, groups)]
    return "\n".join(lines)


def _accident_cells(row: Row) -> list[str]:
    head = _head_cells(row)
    if not row.episodes:
        return head + ["-"] * 7
    return [
        *head,
        f"{row.episodes:,}",
        f"{row.steps:,}",
        f"{row.accidents:,}",
        f"{row.early_accidents:,}",
        _percent(row.rate),
        f"{row.per_1000_steps.value:.2f} [{row.per_1000_steps.low:.2f}, "
        f"{row.per_1000_steps.high:.2f}]",
        f"{row.certified_rate:.1%}",
    ]


def _return_cells(row: Row) -> list[str]:
    constraints = ["-"] * 4
    if row.violations is not None:
        constraints = [
            f"{row.accepted}/{row.iterations} ({row.accepted_share:.0%})",
            f"{row.violations}",
            f"{row.recovering}",
            "-" if row.above_epsilon is None else f"{row.above_epsilon}",
        ]
    return [
        *_head_cells(row),
        _plus_minus(row.final_return),
        _plus_minus(row.evaluated_return),
        _percent(row.evaluated_rate),
        "-" if math.isnan(row.estimate.value) else f"{row.estimate.value:.1%}",
        *constraints,
    ]


def _head_cells(row: Row) -> list[str]:
    return [row.label, row.method if row.pooled else f"{row.method}, seed {row.seeds[0]}"]


def _pairing_lines(pairing: Pairing) -> list[str]:
    a, b = pairing.accidents
    ratio, returns = pairing.accident_ratio, pairing.return_ratio
    pairs = f"{pairing.pairs} pair" + ("s" if pairing.pairs > 1 else "")
    lines = [
        f"  {pairing.first} vs {pairing.second}, {pairs}:",
        f"    accidents {a} vs {b}, per-step ratio {_bounds(ratio, '.2f')}, "
        f"p = {ratio.p_value:.2g}",
    ]
    if not math.isnan(returns.value):
        lines.append(f"    final return, ratio {_bounds(returns, '.3f')}")
    lines.append(f"    final return, difference {_bounds(pairing.return_difference, '+.3f')}")
    return lines


def _percent(interval: Interval) -> str:
    if math.isnan(interval.value):
        return "-"
    return f"{interval.value:.1%} [{interval.low:.1%}, {interval.high:.1%}]"


def _bounds(interval: Interval | RateRatio, form: str) -> str:
    if math.isnan(interval.value if isinstance(interval, Interval) else interval.ratio):
        return "undefined"
    value = interval.value if isinstance(interval, Interval) else interval.ratio
    if math.isnan(interval.low):
        return f"{value:{form}} (one pair, no interval)"
    return f"{value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def _plus_minus(mean: Mean) -> str:
    if math.isnan(mean.value):
        return "-"
    return f"{mean.value:.2f}" + ("" if math.isnan(mean.error) else f" +- {mean.error:.2f}")


def write_png(comparison: Comparison, path: Path) -> None:
    """Draw the runs that learned online; see :func:`safe_offrl.charts.draw`."""
    curves = [
        charts.RunCurves(
            method=run.method,
            env_id=run.env_id,
            epsilon=run.epsilon,
            confidence=run.confidence,
            episodes=run.episodes,
            estimates=[(d.step, d.v_deployed) for d in run.decisions],
        )
        for run in comparison.runs
        if run.episodes
    ]
    if not curves:
        raise RunError(
            "None of the runs has an online episode to draw. Name a fine-tuning run as well."
        )
    charts.draw(curves, path)
