"""The text of a comparison: three tables of runs and groups, paired comparisons, notes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from safe_offrl.report import (
    EARLY_STEPS,
    LAST_EPISODES,
    LAST_SHARE,
    Comparison,
    Interval,
    Mean,
    Pairing,
    Row,
)
from safe_offrl.statistics import RateRatio


class Table(NamedTuple):
    """One table of a comparison: cells as text, the first two columns are words."""

    title: str
    header: list[str]
    rows: list[list[str]]  # one a run
    groups: list[list[str]]  # one a method with several runs


LEGEND = (
    "eval.: of the final policy (safe-offrl evaluate); estimate: its V_accident(s0) in %, or\n"
    "its expected cost per episode, by the safety critic; violations: accepted without both\n"
    "measured constraints; recovering: accepted while the acting policy exceeded the limit,\n"
    "with a lower estimate than its predecessor; est. >= limit: iterations whose acting\n"
    "policy, measured again, was not below the limit."
)


def tables_of(comparison: Comparison) -> list[Table]:
    """Accidents, returns and costs, constraints."""
    confidence = f"{100 * min(run.confidence for run in comparison.runs):g} %"
    early = f"first {EARLY_STEPS // 1000}k"
    return [
        _table(
            comparison,
            f"Accidents while learning (every episode counts; anytime intervals, {confidence})",
            "run|method|episodes|steps|accidents|"
            + early
            + "|per episode|per 1000 steps|certified <|cost/episode",
            _accident_cells,
        ),
        _table(
            comparison,
            f"Return and cost per episode (final: last {LAST_SHARE:.0%} of the steps, at most "
            f"{LAST_EPISODES} episodes; +- standard error)",
            "run|method|final return|final cost|eval. return|eval. cost|eval. accidents",
            _return_cells,
        ),
        _table(
            comparison,
            "Constraints",
            "run|method|estimate|accepted|violations|recovering|est. >= limit",
            _constraint_cells,
        ),
    ]


def _table(
    comparison: Comparison, title: str, header: str, cells: Callable[[Row], list[str]]
) -> Table:
    rows, groups = ([cells(row) for row in rows] for rows in (comparison.rows, comparison.groups))
    return Table(title, header.split("|"), rows, groups)


def format_table(comparison: Comparison) -> str:
    """The comparison as text: accidents, returns and constraints, paired summary, notes."""
    blocks = [_block(table) for table in tables_of(comparison)]
    if comparison.pairings:
        lines = ["Paired comparison (same pretrained policy, same seed)"]
        for pairing in comparison.pairings:
            head, *rest = pairing_lines(pairing)
            lines += [f"  {head}", *(f"    {line}" for line in rest)]
        blocks.append("\n".join(lines))
    blocks.append(LEGEND)
    if comparison.notes:
        blocks.append("\n".join(f"Note: {note}" for note in comparison.notes))
    return "\n\n".join(blocks)


def _block(table: Table) -> str:
    """Text columns, the first two left-aligned; groups below a rule."""
    names, rows, groups = table.header, table.rows, table.groups
    everything = [names, *rows, *groups]
    widths = [max(len(row[i]) for row in everything) for i in range(len(names))]

    def line(cells: Sequence[str]) -> str:
        left = [cell.ljust(w) for cell, w in zip(cells[:2], widths[:2], strict=True)]
        right = [cell.rjust(w) for cell, w in zip(cells[2:], widths[2:], strict=True)]
        return "  ".join(left + right).rstrip()

    rule = "  ".join("-" * w for w in widths)
    lines = [table.title, line(names), rule, *map(line, rows)]
    if groups:
        lines += [rule, *map(line, groups)]
    return "\n".join(lines)


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
        f"{row.per_1000_steps.high:.2f}]",
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
    cells = ["-"] * 4
    if row.violations is not None:
        cells = [
            f"{row.accepted}/{row.iterations} ({row.accepted_share:.0%})",
            f"{row.violations}",
            f"{row.recovering}",
            "-" if row.above_limit is None else f"{row.above_limit}",
        ]
    return [*_head_cells(row), _estimate(row), *cells]


def _estimate(row: Row) -> str:
    if math.isnan(row.estimate.value):
        return "-"
    return f"{row.estimate.value:{'.1%' if row.constraint == 'accident' else '.1f'}}"


def _head_cells(row: Row) -> list[str]:
    return [row.label, row.method if row.pooled else f"{row.method}, seed {row.seeds[0]}"]


def pairing_lines(pairing: Pairing) -> list[str]:
    """Who against whom, and then what was found, a line each."""
    a, b = pairing.accidents
    ratio, returns = pairing.accident_ratio, pairing.return_ratio
    pairs = f"{pairing.pairs} pair" + ("s" if pairing.pairs > 1 else "")
    lines = [
        f"{pairing.first} vs {pairing.second}, {pairs}:",
        f"accidents {a} vs {b}, per-step ratio {_bounds(ratio, '.2f')}, p = {ratio.p_value:.2g}",
    ]
    if not math.isnan(pairing.cost_ratio.value):
        lines.append(f"cost per step, ratio {_bounds(pairing.cost_ratio, '.2f')}")
    if not math.isnan(returns.value):
        lines.append(f"final return, ratio {_bounds(returns, '.3f')}")
    lines.append(f"final return, difference {_bounds(pairing.return_difference, '+.3f')}")
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
