"""The guard: who acts when going on is no longer affordable in this episode.

A limit holds for the episodes that really happen, and an estimate over all states does not tell an
expensive one from a cheap one. So at every step the guard adds what the episode has spent of each
limit to what would still be spent if this action were taken and the fallback acted from then on
(SOOPER's rule, arXiv:2601.19612). If that is more than the limit the fallback acts, until going on
is affordable again. Of an accident nothing is spent before it happens, and a probability above the
limit may be nobody's fault in this state: there the fallback acts where it is clearly safer, by the
limit at least.

The fallback was learnt from the log to have the least risk, with a safety critic of its own
(:mod:`safe_offrl.train.fallback`). In each state it does what that critic prefers of two: the
careful policy's action, or the pretrained one's. A step of policy improvement: the pretrained
policy knows the way out where the careful one has nothing to learn from. All is frozen: what was
certified is what acts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from safe_offrl.compute.state import arrays_sha256, collect_state, restore_state, seeded
from safe_offrl.errors import ConfigError
from safe_offrl.limits import QUANTITIES, Limit
from safe_offrl.policies.acting import NumpyActor, NumpyRisk
from safe_offrl.policies.kinds import KINDS
from safe_offrl.policies.networks import Actor, StackedMLP
from safe_offrl.policies.protocol import Kind, Vector
from safe_offrl.safety.critic import SafetyCritic


@dataclass(frozen=True)
class GuardConfig:
    """``caution``: how many times what the critic sees ahead is counted against a limit of cost.

    The critic sees a mean, of a policy that is not the one that has just acted. Counted twice, a
    version that costs 45 an episode under a limit of 25 costs 8 (SafetyPointCircle1), counted once
    16, at the same return. A probability is counted once.
    """

    caution: float = 2.0

    def __post_init__(self) -> None:
        """Refuse a guard that hopes for the best."""
        if not 1.0 <= self.caution < math.inf:
            raise ConfigError(
                f"guarding.caution is {self.caution}, but 1 or more is needed. Try 2, or "
                "--no-guard."
            )


# What an episode has cost so far: "cost", and each named cost signal by its name.
Spent = Mapping[str, float]


class Watch(NamedTuple):
    """One limit that the guard keeps, ``limit`` of what ``constraint`` names, in its unit.

    ``net`` are members of the fallback's safety critic; a value of 1 says that
    ``ahead_at_one`` is ahead. ``spends``: whether what the episode has cost so far counts as well;
    if not, what counts is how much less is ahead of the fallback's own action.
    """

    constraint: str
    limit: float
    net: StackedMLP
    ahead_at_one: float
    spends: bool

    @classmethod
    def from_critic(cls, limit: Limit, critic: SafetyCritic, *, pushed: bool = False) -> Watch:
        """Of a copy of the plain members of the critic, or of those that are ``pushed`` up."""
        members = critic.pushed if pushed else critic.plain
        net = critic.net.select(members).requires_grad_(False).cpu()
        outlook = critic.outlook
        return cls(limit.constraint, limit.value, net, outlook.ahead_at_one, outlook.spends)


class Guard:
    """The frozen policies of the fallback, of which mean actions act, and the limits it watches."""

    def __init__(
        self,
        fallbacks: Sequence[Actor],
        watches: Sequence[Watch],
        caution: float = 1.0,
        *,
        until_end: bool = False,
    ) -> None:
        """``until_end``: once handed over, an episode is never handed back (SOOPER)."""
        self.fallbacks = tuple(fallbacks)
        self.watches = tuple(watches)
        self.caution = caution
        self.until_end = until_end
        self._samplers = [NumpyActor(fallback) for fallback in fallbacks]
        self._risks = [NumpyRisk(watch.net) for watch in watches]

    def held_to(self, limits: Iterable[Limit], config: GuardConfig) -> Guard:
        """The same with these limits' values, of which it watches those that it watched."""
        values = {limit.constraint: limit.value for limit in limits}
        watches = [
            watch._replace(limit=values[watch.constraint])
            for watch in self.watches
            if watch.constraint in values
        ]
        return Guard(self.fallbacks, watches, config.caution, until_end=self.until_end)

    def take_over(
        self, observation: Vector, time_to_go: float, action: Vector, spent: Spent | None
    ) -> Vector | None:
        """What to do instead of this action [A], or None where it may be done.

        ``observation`` [O] is standardised, ``time_to_go`` the share of the horizon that is left,
        ``spent`` what the episode has cost so far, for limits that spend: of each by its name, None
        where it begins. An action or a risk that is not a number is not affordable.
        """
        over, doubtful = False, []
        for watch, risk in zip(self.watches, self._risks, strict=True):
            ahead = self.weight(watch) * float(risk(observation, time_to_go, action[None])[0])
            so_far = spent[watch.constraint] if spent is not None and watch.spends else 0.0
            if not ahead + so_far < watch.limit:
                over |= watch.spends or self.until_end
                doubtful.append((watch, risk, ahead))
        if not doubtful:
            return None
        instead = self.fallback_action(observation, time_to_go)
        for watch, risk, ahead in () if over else doubtful:
            left = self.weight(watch) * float(risk(observation, time_to_go, instead[None])[0])
            over |= not ahead - left < watch.limit
        return instead if over else None

    def fallback_action(self, observation: Vector, time_to_go: float) -> Vector:
        """What the fallback does [A]: of its policies' actions that of the least ahead."""
        options = np.stack([sampler.mean_action(observation) for sampler in self._samplers])
        shares = sum(
            self.weight(watch) / watch.limit * risk(observation, time_to_go, options)
            for watch, risk in zip(self.watches, self._risks, strict=True)
        )
        return options[int(np.argmin(np.nan_to_num(shares, nan=np.inf)))]

    def weight(self, watch: Watch) -> float:
        """What a value of 1 counts against a limit."""
        return watch.ahead_at_one * (self.caution if watch.spends else 1.0)

    @property
    def spends(self) -> tuple[str, ...]:
        """Of which limits it must be told what the episode has cost so far."""
        return tuple(watch.constraint for watch in self.watches if watch.spends)

    @property
    def sha256(self) -> str:
        """Hash of all networks and numbers."""
        arrays = {k: v.cpu().numpy() for k, v in collect_state(self._nets()).items()}
        numbers = [
            [self.weight(watch), watch.limit, watch.spends, self.until_end]
            for watch in self.watches
        ]
        arrays["n"] = np.asarray(numbers, dtype=np.float64)
        # Whether one spends tells an accident from a cost, but not one signal from another.
        names = [watch.constraint for watch in self.watches]
        if not QUANTITIES.keys() >= set(names):
            arrays["names"] = np.frombuffer(" ".join(names).encode(), dtype=np.uint8)
        return arrays_sha256(arrays)

    def _nets(self) -> dict[str, nn.Module]:
        fallbacks = {f"guard/fallback_{i}": actor for i, actor in enumerate(self.fallbacks)}
        watches = {f"guard/watch_{i}": watch.net for i, watch in enumerate(self.watches)}
        return {**fallbacks, **watches}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it, besides :meth:`words`."""
        return collect_state(self._nets())

    def words(self) -> dict[str, Any]:
        """The rest, JSON-able."""
        return {
            "fallbacks": [list(fallback.hidden) for fallback in self.fallbacks],
            "kinds": [fallback.kind.name for fallback in self.fallbacks],
            "caution": self.caution,
            "until_end": self.until_end,
            "watches": [
                {
                    "constraint": watch.constraint,
                    "limit": watch.limit,
                    "ahead_at_one": watch.ahead_at_one,
                    "spends": watch.spends,
                    "members": watch.net.members,
                    "hidden": list(watch.net.widths),
                }
                for watch in self.watches
            ],
        }

    @classmethod
    def restored(
        cls,
        tensors: Mapping[str, Tensor],
        words: Mapping[str, Any],
        sizes: Sequence[int],
        kind: Kind,
    ) -> Guard:
        """From :meth:`tensors` and :meth:`words`; ``sizes`` are of observations and actions.

        Runs of earlier versions do not name the kinds of their fallbacks: all are of this ``kind``.
        """
        generator = seeded(0)  # of weights that are replaced
        observation, action = sizes
        names = words.get("kinds", [kind.name] * len(words["fallbacks"]))
        fallbacks = [
            Actor(observation, action, hidden, generator, KINDS[name])
            for hidden, name in zip(words["fallbacks"], names, strict=True)
        ]
        watches = []
        for said in words["watches"]:
            net = StackedMLP(
                said["members"],
                observation + 1 + action,
                said["hidden"],
                layer_norm=True,
                generator=generator,
            ).requires_grad_(False)
            rest = said["ahead_at_one"], said["spends"]
            watches.append(Watch(said["constraint"], said["limit"], net, *rest))
        until_end = words["until_end"]
        guard = cls(fallbacks, watches, words["caution"], until_end=until_end)
        restore_state(guard._nets(), tensors)
        return guard
