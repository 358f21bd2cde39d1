"""The tables of a comparison, as text cells: for the terminal, for Markdown and for the page."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from safe_offrl.report.comparison import Comparison
from safe_offrl.report.pairings import Pairing
from safe_offrl.report.summaries import EARLY_STEPS, LAST_EPISODES, LAST_SHARE, Interval, Row
from safe_offrl.stats.fixed import Mean, RateRatio

MANY_RUNS = 20  # more are left out of the terminal's tables where their groups are shown


class Table(NamedTuple):
    """One table of a comparison: cells as text, the first two columns are words."""

    title: str
    header: list[str]
    rows: list[list[str]]  # one a run
    groups: list[list[str]]  # one a method with several runs, or a pairing


LEGEND = """\
IQM: interquartile mean over runs, [bootstrap interval over runs]; +-: standard error.
exact: for these runs as given, the chance of accidents alone (Poisson totals). over seeds:
how much other seeds would change it (bootstrap of pairs; too narrow for fewer than about ten;
p of all sign flips of the differences, which n pairs cannot bring below 2 / 2^n).
eval.: of the final policy (safe-offrl evaluate); estimate: its V_accident(s0) in %, or
its expected cost per episode, by the safety critic; both held: iterations after which the
acting policy satisfied both measured constraints (one that is put back, by an alarm or to
be tested, may be further away than delta); violations: accepted without both;
recovering: accepted while the acting policy exceeded the limit, with a lower estimate than
its predecessor; est. >= limit: iterations whose acting policy, measured again, was not
below the limit."""


def tables_of(comparison: Comparison) -> list[Table]:
    """Over seeds and paired (both only with several runs), then accidents, returns, constraints."""
    # Tables with a line for each run.
    confidence = comparison.confidence
    per_row: list[tuple[str, str, Callable[[Row], list[str]]]] = [
        (
            f"Accidents while learning (every episode counts; anytime intervals, {confidence})",
            "run|method|episodes|steps|accidents|"
            f"first {EARLY_STEPS // 1000}k|per episode|per 1000 steps|certified <|cost/episode",
            _accident_cells,
        ),
        (
            f"Return and cost per episode (final: last {LAST_SHARE:.0%} of the steps, at most "
            f"{LAST_EPISODES} episodes; +- standard error)",
            "run|method|final return|final cost|eval. return|eval. cost|eval. accidents",
            _return_cells,
        ),
        (
            "Constraints",
            "run|method|estimate|accepted|both held|violations|recovering|est. >= limit",
            _constraint_cells,
        ),
    ]
    for name in sorted({name for row in comparison.rows for name in row.signals}):
        title = f"Cost in the signal {name} per episode (final as above; +- standard error)"
        cells = functools.partial(_signal_cells, name)
        per_row.append((title, "run|method|while learning|final|evaluated", cells))
    if any(row.replay for row in comparison.rows):
        title = "Versions that acted, each played again (safe-offrl replay; above: one-sided "
        header = "run|method|versions|above the limit|estimates correlate|most cost of an episode"
        per_row.append((f"{title}{confidence})", header, _replay_cells))
    # Seeds together.
    tables = []
    if comparison.groups:
        title = f"Over seeds (interquartile means over runs, {confidence} bootstrap intervals)"
        header = "run|method|final return|eval. return|accidents a run|worst run|both held"
        tables.append(_table(title, header, groups=map(_seed_cells, comparison.groups)))
    # Pairs.
    if pairings := comparison.pairings:
        what = "Paired comparison (same pretrained policy, same seed)"
        title = f"{what}: accidents while learning, ratio of totals per step"
        header = "method|against|pairs|accidents|ratio|exact|exact p|over seeds|p over seeds"
        tables.append(_table(title, header, groups=map(_paired_accident_cells, pairings)))
        title = f"{what}: returns, costs and final policies"
        header = "method|against|final return, difference|ratio|cost/step, ratio"
        header += "|eval. return, difference|eval. accidents|exact ratio"
        tables.append(_table(title, header, groups=map(_paired_return_cells, pairings)))
    return tables + [
        _table(title, header, map(cells, comparison.rows), map(cells, comparison.groups))
        for title, header, cells in per_row
    ]


def _table(
    title: str, header: str, rows: Iterable[list[str]] = (), groups: Iterable[list[str]] = ()
) -> Table:
    return Table(title, header.split("|"), list(rows), list(groups))


def format_table(comparison: Comparison, *, by_run: bool | None = None) -> str:
    """The comparison as text: every table, the legend, notes.

    ``by_run``: whether to list every run beside the groups; None: if there are at most MANY_RUNS.
    """
    if by_run is None:
        by_run = len(comparison.rows) <= MANY_RUNS
    hidden = bool(comparison.groups) and not by_run
    tables = tables_of(comparison)
    blocks = [_columns_text(table._replace(rows=[]) if hidden else table) for table in tables]
    blocks.append(LEGEND)
    notes = list(comparison.notes)
    if hidden:
        notes.append(f"--by-run lists each of the {len(comparison.rows)} runs.")
    if notes:
        blocks.append("\n".join(f"Note: {note}" for note in notes))
    return "\n\n".join(blocks)


def _columns_text(table: Table) -> str:
    """Text columns, the first two left-aligned; runs and groups below rules."""
    names, rows, groups = table.header, table.rows, table.groups
    everything = [names, *rows, *groups]
    widths = [max(len(row[i]) for row in everything) for i in range(len(names))]

    def line(cells: Sequence[str]) -> str:
        left = [cell.ljust(w) for cell, w in zip(cells[:2], widths[:2], strict=True)]
        right = [cell.rjust(w) for cell, w in zip(cells[2:], widths[2:], strict=True)]
        return "  ".join(left + right).rstrip()

    rule = "  ".join("-" * w for w in widths)
    lines = [table.title, line(names)]
    for part in (rows, groups):
        lines += [rule, *map(line, part)] if part else []
    return "\n".join(lines)


def _seed_cells(row: Row) -> list[str]:
    worst = "-" if row.most_accidents is None else f"{row.most_accidents:,}"
    return [
        *_head_cells(row),
        _bounds(row.final_return_iqm, ".3f"),
        _bounds(row.evaluated_return_iqm, ".3f"),
        _bounds(row.accidents_iqm, ".1f"),
        worst,
        _held(row),
    ]


def _held(row: Row) -> str:
    if row.satisfied is None:
        return "-"
    return f"{row.satisfied}/{row.iterations} ({row.satisfied_share:.1%})"


def _accident_cells(row: Row) -> list[str]:
    head = _head_cells(row)
    if not row.episodes:
        return head + ["-"] * 8
    return [
        *head,
        f"{row.episodes:,}",
        f"{row.steps:,}",
        f"{row.accidents:,}",
        f"{row.early_accidents:,}",
        _percent(row.rate),
        f"{row.per_1000_steps.value:.2f} [{row.per_1000_steps.low:.2f}, "
        f"{row.per_1000_steps.high:.2f}]"
        if row.steps
        else "-",
        f"{row.certified_rate:.1%}",
        _plus_minus(row.cost),
    ]


def _return_cells(row: Row) -> list[str]:
    return [
        *_head_cells(row),
        _plus_minus(row.final_return),
        _plus_minus(row.final_cost),
        _plus_minus(row.evaluated_return),
        _plus_minus(row.evaluated_cost),
        _percent(row.evaluated_rate),
    ]


def _constraint_cells(row: Row) -> list[str]:
    cells = ["-", _held(row), "-", "-", "-"]
    if row.violations is not None and row.iterations:
        cells = [
            f"{row.accepted}/{row.iterations} ({row.accepted_share:.0%})",
            _held(row),
            f"{row.violations}",
            f"{row.recovering}",
            "-" if row.above_limit is None else f"{row.above_limit}",
        ]
    return [*_head_cells(row), _estimate_text(row), *cells]


def _signal_cells(name: str, row: Row) -> list[str]:
    found = row.signals.get(name)
    return [*_head_cells(row), *(map(_plus_minus, found) if found else ["-"] * 3)]


def _replay_cells(row: Row) -> list[str]:
    found = row.replay
    if found is None:
        return [*_head_cells(row), *["-"] * 4]
    return [
        *_head_cells(row),
        f"{found.versions}",
        f"{found.above} ({found.above / found.versions:.0%})",
        _plus_minus(found.correlation),
        f"{found.most_cost:.3g}",
    ]


def _estimate_text(row: Row) -> str:
    if math.isnan(row.estimate.value):
        return "-"
    return f"{row.estimate.value:{'.1%' if row.constraint == 'accident' else '.1f'}}"


def _head_cells(row: Row) -> list[str]:
    return [row.label, row.method if row.pooled else f"{row.method}, seed {row.seeds[0]}"]


def _paired_accident_cells(pairing: Pairing) -> list[str]:
    head = [pairing.first, pairing.second, f"{pairing.pairs}"]
    if pairing.accidents is None or pairing.accident_ratio is None:
        return head + ["-"] * 6
    a, b = pairing.accidents
    return [
        *head,
        f"{a} vs {b}",
        _number_text(pairing.accident_ratio.ratio, ".2f"),
        _range(pairing.accident_ratio, ".2f"),
        f"{pairing.accident_ratio.p_value:.2g}",
        _range(pairing.accident_ratio_over_seeds, ".2f"),
        _number_text(pairing.p_value_over_seeds, ".2g"),
    ]


def _paired_return_cells(pairing: Pairing) -> list[str]:
    accidents, ratio = "-", "-"
    if pairing.evaluated_accidents is not None and pairing.evaluated_ratio is not None:
        a, b = pairing.evaluated_accidents
        accidents, ratio = f"{a} vs {b}", _bounds(pairing.evaluated_ratio, ".2f")
    return [
        pairing.first,
        pairing.second,
        _bounds(pairing.return_difference, "+.3f"),
        _bounds(pairing.return_ratio, ".3f"),
        _bounds(pairing.cost_ratio, ".2f"),
        _bounds(pairing.evaluated_difference, "+.3f"),
        accidents,
        ratio,
    ]


def _number_text(value: float, form: str) -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"


def _range(interval: Interval | RateRatio, form: str) -> str:
    return "-" if math.isnan(interval.low) else f"[{interval.low:{form}}, {interval.high:{form}}]"


def _percent(interval: Interval) -> str:
    if math.isnan(interval.value):
        return "-"
    return f"{interval.value:.1%} [{interval.low:.1%}, {interval.high:.1%}]"


def _bounds(interval: Interval | RateRatio, form: str) -> str:
    """Value and bounds; without bounds (a single run or pair) the value alone."""
    if math.isnan(interval[0]):
        return "-"
    bounds = _range(interval, form)
    return f"{interval[0]:{form}}" + ("" if bounds == "-" else f" {bounds}")


def _plus_minus(mean: Mean) -> str:
    if math.isnan(mean.value):
        return "-"
    return f"{mean.value:.2f}" + ("" if math.isnan(mean.error) else f" +- {mean.error:.2f}")
