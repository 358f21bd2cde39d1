"""What a log says of a policy: estimates, their limits, and what they show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from safe_offrl.assess.fitted_evaluation import Fitted
from safe_offrl.assess.importance_sampling import Weighted
from safe_offrl.limits import quantity_named

LEAST_SUPPORT = 0.02  # of the logged actions: with fewer the fit says what it likes
MOST_TIMES = 100.0  # as many episodes: beyond that "log more" is no advice
RETURN_SLACK = 0.01  # of what episodes can return: so far beyond it a fit without error may come
LEAST_EPISODES = 10.0  # effective: with fewer an interval means nothing


@dataclass(frozen=True)
class Estimates:
    """What a log says of a policy. ``risk`` is a share of ``scale``, as in :class:`Limit`.

    ``support`` is the share of logged actions that are such as the policy takes;
    ``weighted_risk`` and ``weighted_return`` are None unless the log holds the behaviours'
    log-probabilities. ``whole``: all of the log was looked at, not a sample of it.
    ``return_range`` is what an episode can return, see :attr:`Dataset.return_range`; None if
    nobody said.
    """

    constraint: str
    scale: float
    episodes: int
    risk: Fitted
    returns: Fitted
    support: float
    weighted_risk: Weighted | None = None
    weighted_return: Weighted | None = None
    whole: bool = True
    return_range: tuple[float, float] | None = None

    def risk_interval(self, confidence: float) -> tuple[float, float]:
        """Two-sided interval of the accident probability, or of the cost per episode."""
        tail = (1.0 - confidence) / 2.0
        low = lower_limit(self.risk.value, self.risk.error, 1.0 - tail)
        return low * self.scale, self.risk_upper(1.0 - tail)

    def risk_upper(self, confidence: float, times: float = 1.0) -> float:
        """One-sided upper limit of the same. Of accidents it is never below what as many episodes
        of the policy's own would show at best, if none of them had one.

        Or what it would be if the log had so many ``times`` as many episodes, and said the same.
        """
        upper = upper_limit(self.risk.value, self.risk.error_of(times), confidence)
        if self.constraint == "accident":
            own = max(1.0, self.risk.episodes * times)
            upper = max(upper, 1.0 - (1.0 - confidence) ** (1.0 / own))
        return upper * self.scale

    def more_to_show(self, limit: float, confidence: float) -> int | None:
        """Further episodes like these after which a log that says the same would show the limit.

        None if no number of them up to MOST_TIMES the log does.
        """
        few, enough = 1.0, MOST_TIMES
        if not self.whole or not self.risk_upper(confidence, enough) < limit:
            return None
        while enough - few > 0.01:
            middle = (few + enough) / 2.0
            shown = self.risk_upper(confidence, middle) < limit
            few, enough = (few, middle) if shown else (middle, enough)
        return math.ceil((enough - 1.0) * self.episodes)

    def return_interval(self, confidence: float) -> tuple[float, float]:
        """Two-sided normal interval of the return, as far as an episode can return so much."""
        reach = float(special.ndtri((1.0 + confidence) / 2.0)) * self.returns.error
        value = self.returns.value
        return self._returnable(value - reach), self._returnable(value + reach)

    @property
    def return_value(self) -> float:
        """The fitted return, or the nearest to it that an episode can return."""
        return self._returnable(self.returns.value)

    def _returnable(self, value: float) -> float:
        return value if self.return_range is None else float(np.clip(value, *self.return_range))

    @property
    def beyond(self) -> str:
        """What was fitted where no episode can return so much, or so little, in words; or ""."""
        if self.return_range is None or self.return_value == self.returns.value:
            return ""
        least, most = self.return_range
        return (
            f"a return of {self.returns.value:.3g} was fitted where the log's rewards allow "
            f"{least:.3g} to {most:.3g} in an episode"
        )

    @property
    def _return_is_possible(self) -> bool:
        """Whether the fitted return is no further beyond than its error explains."""
        if self.return_range is None:
            return True
        least, most = self.return_range
        allowed = 2.0 * self.returns.error + RETURN_SLACK * (most - least)
        return abs(self.returns.value - self.return_value) <= allowed

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why none of this is to be relied on, each a clause; empty if nothing is known."""
        # It is written so that a NaN is a doubt.
        demands = {
            "the evaluation did not come to a finite number": bool(
                np.isfinite([self.risk.error, self.returns.error, self.risk.value]).all()
            ),
            self.beyond: self._return_is_possible,
            f"only {self.support:.1%} of the logged actions are such as the policy takes": (
                self.support >= LEAST_SUPPORT
            ),
            f"the log is worth {self.risk.episodes:.1f} episodes of this policy, "
            f"{LEAST_EPISODES:g} needed{self._more_to_be_worth()}": (
                self.risk.episodes >= LEAST_EPISODES
            ),
        }
        return tuple(text for text, met in demands.items() if not met)

    def _more_to_be_worth(self) -> str:
        if not self.whole or not 0.0 < self.risk.episodes < LEAST_EPISODES:
            return ""
        more = math.ceil((LEAST_EPISODES / self.risk.episodes - 1.0) * self.episodes)
        return f" (log about {more:,} more episodes like these, or behave more like it)"

    def shows_below(self, limit: float, confidence: float) -> bool:
        """Whether the log shows that the risk is below ``limit`` (in its own unit)."""
        return not self.doubts and self.risk_upper(confidence) < limit

    def shows_above(self, limit: float, confidence: float) -> bool:
        """Whether the log shows that the risk is above ``limit``."""
        return not self.doubts and self.risk_interval(confidence)[0] > limit

    def sentence(self, limit: float, confidence: float) -> str:
        """What the log shows, in words."""
        what = f"the {quantity_named(self.constraint).estimated}"
        below = f"{what} is below {risk_text(limit, self.constraint)}"
        if self.doubts:
            return f"The log says too little of this policy: {'; '.join(self.doubts)}."
        if self.shows_below(limit, confidence):
            return f"The log shows that {below}, with {confidence:.0%} confidence."
        low, high = (risk_text(x, self.constraint) for x in self.risk_interval(confidence))
        if self.shows_above(limit, confidence):
            return f"The log shows that {what} is above the limit: {low} at least."
        more = self.more_to_show(limit, confidence)
        sentence = f"The log cannot show that {below}: anything from {low} to {high} fits it."
        if more is not None:
            sentence += f" About {more:,} more episodes like these would, if they say the same."
        return sentence

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; :meth:`from_dict` reads it back."""
        content: dict[str, Any] = {
            "constraint": self.constraint,
            "scale": self.scale,
            "episodes": self.episodes,
            "support": self.support,
            "risk": self.risk._asdict(),
            "return": self.returns._asdict(),
            "return_range": self.return_range,
            **({} if self.whole else {"whole": False}),
        }
        for name, found in (("risk", self.weighted_risk), ("return", self.weighted_return)):
            if found is not None:
                content[f"weighted_{name}"] = found._asdict()
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Estimates:
        """The inverse of :meth:`as_dict`; KeyError or TypeError if it is something else."""
        possible = content.get("return_range")
        found = {
            name: Weighted(**content[name]) if name in content else None
            for name in ("weighted_risk", "weighted_return")
        }
        return cls(
            constraint=str(content["constraint"]),
            scale=float(content["scale"]),
            episodes=int(content["episodes"]),
            risk=Fitted(**content["risk"]),
            returns=Fitted(**content["return"]),
            support=float(content["support"]),
            whole=bool(content.get("whole", True)),
            return_range=None if possible is None else (float(possible[0]), float(possible[1])),
            **found,
        )


def risk_text(value: float, constraint: str) -> str:
    """A risk as a person reads it: a percentage, or a cost."""
    return f"{value:.1%}" if constraint == "accident" else f"{value:.1f}"


# --- intervals --------------------------------------------------------------------------------


def upper_limit(share: float, error: float, confidence: float) -> float:
    """One-sided upper limit of a share in [0, 1] with this standard error.

    Clopper-Pearson of as many episodes as would have this standard error, n = p (1 - p) / se^2: a
    rare event has a skewed interval, which the normal one is not. Where p is smaller than its own
    error, n is that of p = se: an estimate of 0 is no proof of 0.
    """
    k, n = _equivalent(share, error)
    return 1.0 if n <= k else float(special.betaincinv(k + 1.0, n - k, confidence))


def lower_limit(share: float, error: float, confidence: float) -> float:
    """One-sided lower limit of the same."""
    k, n = _equivalent(share, error)
    return 0.0 if k <= 0.0 else float(special.betaincinv(k, n - k + 1.0, 1.0 - confidence))


def _equivalent(share: float, error: float) -> tuple[float, float]:
    """(accidents, episodes), no whole numbers, that would say as much."""
    error = float(np.clip(error, 1e-9, 0.5))
    share = float(np.clip(share, 0.0, 1.0))
    shown = float(np.clip(share, error, 1.0 - error))
    n = shown * (1.0 - shown) / error**2
    return share * n, n


# --- the assessment ---------------------------------------------------------------------------
