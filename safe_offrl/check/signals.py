"""What named cost signals come to, in a log or in an environment's episodes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from safe_offrl.check.replay import OUTCOMES, Recording
from safe_offrl.data.dataset import Dataset
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.record.env_report import EnvReport
from safe_offrl.types import signal_column


class SignalSummary(NamedTuple):
    """One signal: what it adds up to in an episode, and the share of steps in which it is not 0."""

    name: str
    mean: float
    least: float
    most: float
    share: float

    @classmethod
    def measured(
        cls, name: str, sums: NDArray[np.float64], steps: NDArray[np.floating]
    ) -> SignalSummary:
        """From the ``sums`` of episodes [M] and the values of all ``steps`` [N]."""
        ends = float(sums.min()), float(sums.max())
        return cls(name, float(sums.mean()), *ends, float((steps > 0.0).mean()))

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.mean:.4g} an episode ({self.least:.4g} to {self.most:.4g}), above "
            f"0 in {self.share:.1%} of the steps"
        )


def summarise_signals(dataset: Dataset) -> tuple[SignalSummary, ...]:
    """Of each signal of a log."""
    return tuple(
        SignalSummary.measured(name, sums, dataset.column(signal_column(name)).numpy())
        for name, sums in dataset.signal_costs.items()
    )


def check_signals(report: EnvReport, env: AccidentEnv, recordings: list[Recording]) -> None:
    """Whether each signal is ever above 0."""
    for k, name in enumerate(env.signals, start=len(OUTCOMES)):
        columns = [recording.outcomes[:, k] for recording in recordings]
        sums = np.array([column.sum() for column in columns])
        found = SignalSummary.measured(name, sums, np.concatenate(columns))
        report.measured[f"mean_cost_{name}"] = found.mean
        if found.most == 0.0:
            report.add(
                "warn",
                "signals",
                f"{name} is 0 in every step. Is that right? Look at safety.signals.{name}, or play "
                "more --episodes.",
            )
        else:
            report.add("ok", "signals", str(found))
