"""How many accidents the evidence allows: bounds that stay valid while one is looking at them.

Three statements, three tools, and beside each what one look at the end shows
(:mod:`safe_offrl.stats.fixed`). X_i is 1 when episode i held an accident, p_i its probability given
everything before episode i.

* run level, policies changing: bounds on P = p_1 + ... + p_n       -> :func:`run_level_upper`
* one frozen policy, p_i = p, looking all the time                  -> :func:`betabinomial_sequence`
* "some policy exceeded epsilon": an e-process                      -> :func:`alarm_update`

X_i may as well be any number in [0, 1] with mean p_i, such as the cost of an episode as a share of
the largest it can have: every evidence factor here is convex (or linear) in X_i, so its mean is at
most that of a 0/1 variable of the same mean. Clopper-Pearson is the exception: counts only.

All evidence is the logarithm of a likelihood ratio. Where a likelihood underflows, the evidence is
minus infinity (a hypothesis that explains nothing), and it stays that: a floor such as 1e-300 would
turn "impossible" into "690 nats" and, after some thousand episodes, certify the opposite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import special

FloatOrArray = TypeVar("FloatOrArray", float, NDArray[np.float64])

# theta ~ Beta(.3, 1) puts weight on small theta, where the evidence of few accidents lies. It is
# fixed, because a prior chosen after the data would void the guarantee.
_RUN_LEVEL_A = 0.3


# --- run level: policies change ---------------------------------------------------------------


def log_run_level_evidence(accidents: float, total: float) -> float:
    """Log evidence that the sum of probabilities P was smaller than ``total``.

    ``log a B(a + N, 1) 1F1(1; a + N + 1; P)``, the mixture over theta ~ Beta(a, 1) of
    ``theta^N exp(P (1 - theta))``. Each factor ``theta^X exp(p (1 - theta))`` has mean at most 1,
    so the mixture at the true P exceeds 1 / alpha with probability at most alpha, ever.
    ``accidents``: N, episodes with an accident so far (the sum of the outcomes). ``total``: P, in
    expected accidents.
    """
    c = _RUN_LEVEL_A + accidents
    prior = math.log(_RUN_LEVEL_A / c)  # log B(a + N, 1) / B(a, 1)
    if total <= c:  # a short series; the incomplete gamma function below would underflow
        return prior + math.log(special.hyp1f1(1.0, c + 1.0, total))
    # hyp1f1 overflows above P ~ 700; 1F1(1; c + 1; P) = e^P P^-c Gamma(c + 1) gammainc(c, P)
    log_1f1 = total - c * math.log(total) + math.lgamma(c + 1.0)
    return prior + log_1f1 + math.log(special.gammainc(c, total))  # gammainc >= 1/2 for total > c


@lru_cache(maxsize=4096)
def run_level_upper(accidents: float, confidence: float = 0.95) -> float:
    """Anytime-valid upper bound on the sum of the true per-episode accident probabilities.

    Holds for changing, drifting and adaptively chosen policies, at every number of episodes at
    once. Depends on N alone; divide by the number of episodes for a bound on their mean.
    """
    require_counts(accidents, accidents)
    threshold = _threshold(confidence)
    high = accidents + 1.0
    while log_run_level_evidence(accidents, high) < threshold:
        high *= 2.0
    return _root(lambda p: log_run_level_evidence(accidents, p) - threshold, 0.0, high)[1]


@lru_cache(maxsize=4096)
def run_level_lower(accidents: float, confidence: float = 0.95) -> float:
    """Anytime-valid lower bound on the same sum: the mirror image, 1 / theta ~ Beta(a, 1).

    ``M = a e^P P^(a - N) Gamma(N - a, P)`` (upper incomplete gamma), decreasing in P.
    """
    require_counts(accidents, accidents)
    if accidents <= _RUN_LEVEL_A:  # no accident, or too little cost to speak of
        return 0.0
    c = accidents - _RUN_LEVEL_A
    constant = math.log(_RUN_LEVEL_A) + math.lgamma(c) - _threshold(confidence)

    def shortfall(p: float) -> float:
        return c * math.log(p) - p - math.log(special.gammaincc(c, p)) - constant

    return _root(shortfall, 0.0, c)[0]  # M < 1 at P = c, so the root lies below


def run_level_interval(accidents: float, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided anytime-valid interval of the sum of probabilities; each side takes alpha / 2."""
    one_sided = (1.0 + confidence) / 2.0
    return run_level_lower(accidents, one_sided), run_level_upper(accidents, one_sided)


# --- version level: one frozen policy ---------------------------------------------------------


def betabinomial_sequence(
    k: float, n: int, confidence: float = 0.95, a: float = 0.5, b: float = 50.0
) -> tuple[float, float]:
    """Anytime-valid interval of the accident probability of one frozen policy (and shield).

    Holds p back when ``B(a + k, b + n - k) / B(a, b) / (p^k (1 - p)^(n - k)) < 1 / alpha``; the
    ratio is a martingale under the true p. Beta(.5, 50) is for rare accidents (mean 1 %).
    """
    require_counts(k, n)
    constant = float(special.betaln(a + k, b + n - k) - special.betaln(a, b))
    constant -= _threshold(confidence)

    def excess(p: float) -> float:  # 0 log 0 is 0 here, hence the products are guarded
        log_p = k * math.log(p) if k else 0.0
        log_not_p = (n - k) * math.log1p(-p) if p < 1.0 else (-math.inf if n > k else 0.0)
        return constant - log_p - log_not_p

    if n == 0:
        return 0.0, 1.0
    rate = k / n
    low = 0.0 if k == 0 else _root(lambda p: -excess(p), 0.0, rate)[0]
    high = 1.0 if k == n else _root(excess, rate, 1.0)[1]
    return low, high


# --- alarm: some policy exceeded epsilon ------------------------------------------------------


class AlarmState(NamedTuple, Generic[FloatOrArray]):
    """Sufficient statistics of the alarm; floats, or arrays of one shape for many runs at once."""

    episodes: int  # t
    log_staked: FloatOrArray  # log of what rides on the next episode; never -inf
    recent_accidents: FloatOrArray  # forgetting sums behind the bet
    recent_episodes: float


def alarm_start() -> AlarmState[float]:
    """Before the first episode: evidence 1, half of it staked."""
    return AlarmState(0, math.log(0.5), 0.0, 0.0)


def alarm_update(state: AlarmState[Any], accident: Any, epsilon: float) -> AlarmState[Any]:
    """One episode's news for the null "every policy so far has p_i <= epsilon"; O(1).

    The factor of an episode is ``1 + lambda (X - epsilon)``, for an accident (1) or none (0) the
    likelihood ratio ``(q/epsilon)^X ((1-q)/(1-epsilon))^(1-X)``, where the bet q >= epsilon depends
    on the past alone: its mean is at most 1 under the null, also for an X between 0 and 1, so the
    product is an e-process and reaches 1 / alpha with probability at most alpha. Two choices make
    it quick when a LATER policy turns bad:

    * q is a forgetting average over 5 / epsilon episodes, and below epsilon nothing is bet;
    * a mixture over the episode at which the trouble begins (Shiryaev-Roberts): weight
      1 / (j (j + 1)) joins before episode j, so the evidence never sinks below 1 / (t + 1), and a
      long safe past costs log t instead of a sum over the whole past.
    """
    bet = _alarm_bet(state, epsilon)
    stake = (bet - epsilon) / (epsilon * (1.0 - epsilon))
    grown = state.log_staked + np.log1p(stake * (np.asarray(accident) - epsilon))
    t = state.episodes + 1
    joining = -math.log(t + 1) - math.log(t + 2)
    keep = 1.0 - epsilon / 5.0
    return AlarmState(
        episodes=t,
        log_staked=np.logaddexp(grown, joining),
        recent_accidents=keep * state.recent_accidents + accident,
        recent_episodes=keep * state.recent_episodes + 1.0,
    )


def alarm_log_evidence(state: AlarmState[Any]) -> Any:
    """Log of the e-process: what is staked plus the weight that has not joined yet, 1 / (t + 2)."""
    return np.logaddexp(state.log_staked, -math.log(state.episodes + 2))


def _alarm_bet(state: AlarmState[Any], epsilon: float) -> Any:
    """Predicted accident probability, at least epsilon; half a pseudo-accident around 2 epsilon."""
    guess = min(2.0 * epsilon, (1.0 + epsilon) / 2.0)
    estimate = (state.recent_accidents + 0.5) / (state.recent_episodes + 0.5 / guess)
    return np.maximum(estimate, epsilon)


# --- helpers ----------------------------------------------------------------------------------


def _threshold(confidence: float) -> float:
    """log 1 / alpha."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    return -math.log1p(-confidence)


def require_counts(k: float, n: float) -> None:
    """Raise ValueError unless ``k`` of ``n`` is possible."""
    if not 0 <= k <= n:
        raise ValueError(f"counts must satisfy 0 <= k <= n, got k={k}, n={n}")


def _root(increasing: Callable[[float], float], low: float, high: float) -> tuple[float, float]:
    """Bracket (low, high), relative width 1e-12, of the sign change of an increasing function.

    The function is never called at the ends; callers return the end that errs on the safe side.
    """
    while high - low > 1e-12 * high:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        if increasing(middle) < 0.0:
            low = middle
        else:
            high = middle
    return low, high
