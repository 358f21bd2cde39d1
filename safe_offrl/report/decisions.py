"""The decisions of an online phase as they stand in its record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Estimated(NamedTuple):
    """Estimates under one limit, in its unit: a probability, or a cost per episode."""

    candidate: float
    deployed: float  # of the policy that acted, measured again in this iteration
    limit: float


class LoggedDecision(NamedTuple):
    """One iteration of the acceptance step, as logged; NaN where the run did not measure."""

    step: int
    accepted: bool
    verdict: bool  # "both constraints satisfied", as the acceptance step saw it
    kl: float  # larger mean of the two directions
    delta: float
    v_candidate: float  # estimates in the unit of the limit: a probability, or a cost per episode
    v_deployed: float  # of the policy that acted, measured again in this iteration
    limit: float
    rolled_back: bool = False  # an alarm put an earlier policy back, which was measured as well
    divergence: tuple[str, str] = ("KL", "nats")  # what ``kl`` is, by name, and its unit
    further: tuple[Estimated, ...] = ()  # of the limits behind the first

    @property
    def estimates(self) -> tuple[Estimated, ...]:
        """Of every limit."""
        return (Estimated(self.v_candidate, self.v_deployed, self.limit), *self.further)

    @property
    def measured(self) -> bool:
        """Whether anything was: without any constraint nothing is."""
        return not (math.isnan(self.kl) and math.isnan(self.v_deployed))

    @property
    def satisfied(self) -> bool:
        """The policy that acts from here on has all measured values below their limits.

        The verdict counts only as far as the numbers bear it out, so NaN is not satisfied. A policy
        that stays has not moved; of it the verdict says whether its estimate is below the limit.
        """
        moved = self.accepted or self.rolled_back
        within = self.kl < self.delta and all(e.candidate < e.limit for e in self.estimates)
        return self.verdict and (within or not moved)

    @property
    def movement(self) -> float:
        """KL between the policy that acts from here on and the one before; 0 if it is the same."""
        return self.kl if self.accepted or self.rolled_back else 0.0

    @property
    def recovering(self) -> bool:
        """Accepted by the exception: the predecessor exceeds a limit, whose estimate improves."""
        exceeds = any(e.limit <= e.candidate for e in self.estimates)
        allowed = all(e.candidate < e.limit or e.candidate < e.deployed for e in self.estimates)
        return self.accepted and exceeds and allowed and self.kl < self.delta

    @property
    def violation(self) -> bool:
        """Accepted without both constraints, and not by the exception.

        The verdict is checked against the numbers: an acceptance that they do not bear out (NaN
        included) is a violation too.
        """
        return self.accepted and not self.satisfied and not self.recovering

    @property
    def deployed_below(self) -> bool:
        """Every estimate of the policy that acted is below its limit; NaN is not."""
        return all(e.deployed < e.limit for e in self.estimates)

    @property
    def estimate_share(self) -> float:
        """Of the policy that acted, the largest of its estimates over their limits."""
        shares = [e.deployed / e.limit if e.limit else math.nan for e in self.estimates]
        return float(np.max(shares))


def logged_decision(line: Mapping[str, Any]) -> LoggedDecision:
    """One line of iterations.jsonl, in which null stands for NaN."""
    number = _with_nan(line)
    forward, reverse = float(number["kl_forward_mean"]), float(number["kl_reverse_mean"])
    return LoggedDecision(
        step=int(line["step"]),
        accepted=bool(line["accepted"]),
        verdict=bool(line["constraints_satisfied"]),
        kl=math.nan if math.isnan(forward + reverse) else max(forward, reverse),
        delta=float(number["delta"]),
        v_candidate=float(number["v_candidate"]),
        v_deployed=float(number["v_previous"]),
        limit=float(number["limit"]),
        rolled_back=bool(line.get("rolled_back", False)),
        divergence=(line.get("divergence", "KL"), line.get("divergence_unit", "nats")),
        further=tuple(
            Estimated(part["v_candidate"], part["v_previous"], part["limit"])
            for part in map(_with_nan, line.get("further", []))
        ),
    )


def _with_nan(line: Mapping[str, Any]) -> dict[str, Any]:
    """With NaN where null stands for it."""
    return {key: math.nan if value is None else value for key, value in line.items()}
