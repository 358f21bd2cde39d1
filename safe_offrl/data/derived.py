"""What a load derives from logged arrays: episodes, their horizon, accidents under a rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from safe_offrl.data.content import Arrays, Metadata, signals_in
from safe_offrl.data.episode_sums import (
    costs_so_far,
    cumulate,
    returns_to_go,
    share_used,
    times_to_go,
)
from safe_offrl.errors import ConfigError, DataError
from safe_offrl.spec import BUILT_IN_RULES, COST_RULES, SafetySpec
from safe_offrl.types import signal_column

STORED_ROUNDING = 1e-6  # float32 rounds by less than this share of a number


class Episodes(NamedTuple):
    """Episode boundaries: ``starts`` [M + 1] as in Dataset, ``terminated`` and ``truncated`` [N].

    Termination wins where a row is marked as both; a last episode without an end is truncated.
    """

    starts: NDArray[np.int64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Steps of each episode [M]."""
        return np.diff(self.starts)


def find_episodes(arrays: Arrays) -> Episodes:
    """Episodes end at terminals or timeouts."""
    terminated = arrays["terminals"][:].astype(bool)
    ends = terminated | arrays["timeouts"][:].astype(bool)
    ends[-1] = True
    starts = np.concatenate([[0], np.flatnonzero(ends) + 1]).astype(np.int64)
    return Episodes(starts, terminated, ends & ~terminated)


def resolve_horizon(
    given: int | None, spec: SafetySpec, metadata: Metadata, lengths: NDArray[np.int64]
) -> int:
    """The horizon as a step count that covers the longest episode; DataError otherwise.

    ``given`` is ``spec.horizon``, or the time limit of the environment where that is None; without
    either the file's own counts, and with it the two must agree.
    """
    # The stated horizons, which must agree.
    stated, asked = metadata.get("horizon"), given or spec.horizon
    if isinstance(stated, int | float) and asked is not None and stated != asked:
        remedy = "Leave safety.horizon out, or correct what the dataset says"
        if given and spec.horizon is None:
            remedy = (
                "Give a dataset of this environment as it is registered, or register it with "
                f"max_episode_steps={stated}"
            ) + (f", or set safety.horizon={stated}" if stated < asked else "")
        raise DataError(
            f"The dataset says that its episodes have at most {stated} steps (its horizon), but "
            f"{'safety.horizon is' if spec.horizon else 'the environment ends them after'} "
            f"{asked}. {remedy}."
        )
    horizon = asked or stated
    if not isinstance(horizon, int) or isinstance(horizon, bool) or horizon < 1:
        raise DataError(
            f"The dataset's horizon is {horizon}, so a share of time left has no meaning. "
            "Set safety.horizon to the time limit of the environment."
        )
    # The episodes, which must fit into it.
    longest = int(lengths.max())
    if longest > horizon:
        remedy = f"Set safety.horizon={longest} or more"
        if given and spec.horizon is None:  # which that setting cannot exceed
            remedy = (
                "It is the time limit of the environment: register the environment with "
                f"max_episode_steps={longest} or more, or cut the episodes of the log"
            )
        raise DataError(
            f"Episode {int(lengths.argmax())} of the dataset has {longest} steps, more than "
            f"the horizon of {horizon}. {remedy}, or check that timeouts marks the ends of "
            "episodes."
        )
    return horizon


def accidents_under(
    arrays: Arrays, starts: NDArray[np.int64], metadata: Metadata, spec: SafetySpec
) -> NDArray[np.bool_]:
    """Verdict of the rule of ``spec`` for each transition of whole episodes [N].

    The file's own if its rule is that of ``spec``; otherwise derived from costs or terminals.
    """
    logged_rule = metadata.get("accident")
    by_cost = spec.accident in COST_RULES
    if "accidents" in arrays and (logged_rule is None or _own_rule(metadata, spec)):
        verdicts = arrays["accidents"].astype(bool)
        if logged_rule is not None:
            _require_agreement(arrays, starts, metadata, spec, verdicts)
        return verdicts
    if by_cost and metadata.get("no_costs"):
        raise DataError(
            f'The dataset has no costs, so the accident rule "{spec.accident}" finds nothing in '
            "it. Set safety.accident=terminated, or add an array of costs."
        )
    if spec.accident in BUILT_IN_RULES:
        return _built_in(arrays, starts, spec)
    name = f", and {spec.accident} as the metadata's accident" if logged_rule else ""
    raise DataError(
        f'The accident rule "{spec.accident}" cannot be applied to logged data, and the dataset '
        f"was logged with {logged_rule or 'no rule'}. Store its verdicts, one for each step, "
        f'as the array "accidents"{name}; or set safety.accident=cost.'
    )


def _built_in(arrays: Arrays, starts: NDArray[np.int64], spec: SafetySpec) -> NDArray[np.bool_]:
    """Accidents by cost or termination [N], the same for costs in float64 and as they are stored.

    In float32 a tenth is a little more than a tenth, and a sum of ten more than one.
    """
    if spec.accident == "terminated":
        return arrays["terminals"].astype(bool)
    costs = arrays["costs"].astype(np.float32)
    if spec.accident == "cost":
        return np.asarray(costs > np.float32(spec.cost_threshold))
    spent = costs_so_far(costs, starts) + costs
    exceeds = (spent > spec.cost_threshold * (1.0 + STORED_ROUNDING)).astype(np.float64)
    return cumulate(np.maximum, exceeds, starts) > 0.0  # once above, always an accident


def _require_agreement(
    arrays: Arrays,
    starts: NDArray[np.int64],
    metadata: Metadata,
    spec: SafetySpec,
    verdicts: NDArray[np.bool_],
) -> None:
    """Raise DataError if verdicts are not those of the built-in rule that the file names."""
    if spec.accident not in BUILT_IN_RULES or (
        metadata.get("no_costs") and spec.accident != "terminated"
    ):
        return
    wrong = verdicts != _built_in(arrays, starts, spec)
    if spec.accident == "cost":  # of a cost at the threshold, rounding may have decided
        wrong &= ~np.isclose(arrays["costs"], spec.cost_threshold, rtol=STORED_ROUNDING, atol=0.0)
    elif spec.accident == "episode_cost":
        spent = costs_so_far(arrays["costs"], starts) + arrays["costs"]
        near = np.isclose(spent, spec.cost_threshold, rtol=1e-5, atol=0.0)
        wrong &= ~(cumulate(np.maximum, near.astype(np.float64), starts) > 0.0)
    if wrong.any():
        raise DataError(
            f"The dataset's accidents are not those of the rule that it names, "
            f"{_rule(spec.accident, metadata)}, in {int(wrong.sum()):,} steps (the first is row "
            f"{int(wrong.argmax())}). Leave the array accidents out, or correct the metadata's "
            "accident and cost_threshold."
        )


def require_known_terminations(unsure: str, spec: SafetySpec) -> None:
    """Raise DataError where accidents are terminations, and which episodes terminated is unsure."""
    if unsure and spec.accident == "terminated":
        raise DataError(
            f'{unsure[0].upper()}{unsure[1:]}; under the accident rule "terminated" that decides '
            "what was an accident. Correct terminals and timeouts; or, if they are right, store "
            'the metadata\'s "ends" as "as marked".'
        )


def rule_remarks(
    arrays: Arrays, metadata: Metadata, spec: SafetySpec, starts: NDArray[np.int64]
) -> list[str]:
    """What is to be said where accidents are not counted as they were when the log was made.

    And where what was counted looks like something else: costs that add up within an episode.
    """
    # Another rule than the log's own.
    found = []
    stated = metadata.get("accident")
    if stated is not None and not _own_rule(metadata, spec):
        found.append(
            f"the log was made under the accident rule {_rule(stated, metadata)}; accidents are "
            f"counted under {_rule(spec.accident, {'cost_threshold': spec.cost_threshold})}."
        )
    if "accidents" in arrays and stated is None and spec.accident in BUILT_IN_RULES:
        usable = spec.accident == "terminated" or not metadata.get("no_costs")
        other = usable and (arrays["accidents"].astype(bool) != _built_in(arrays, starts, spec))
        if np.any(other):
            found.append(
                f"the array accidents is believed, though in {int(np.sum(other)):,} steps it is "
                f"not what {_rule(spec.accident, {'cost_threshold': spec.cost_threshold})} says: "
                "the file does not name its rule."
            )
    # Costs below 0.
    below = int((arrays["costs"][:] < 0.0).sum())
    if below and not (arrays["costs"][:] > 0.0).any() and spec.accident in COST_RULES:
        raise DataError(
            f"The dataset has costs below 0 ({below} steps) and none above, so the accident rule "
            f'"{spec.accident}" finds nothing in it. Store what a step costs as a number above 0.'
        )
    if below:
        found.append(
            f"{below} steps have a cost below 0: the expected cost cannot be constrained with them."
        )
    # Costs that add up.
    if _running_sums(arrays["costs"][:], starts):
        found.append(
            "costs never fall within an episode and reach different heights: if they are sums over "
            "the episode so far, store what each step costs."
        )
    return found + _signal_remarks(arrays, metadata, spec)


def _signal_remarks(arrays: Arrays, metadata: Metadata, spec: SafetySpec) -> list[str]:
    """What is to be said of signals that are not used, or may be others than the log's."""
    found = []
    if unused := [name for name in signals_in(arrays) if name not in spec.signals]:
        found.append(
            f"the log's signals {', '.join(unused)} are not used: name in safety.signals those "
            "that are wanted."
        )
    stated = metadata.get("signals")
    for name, source in spec.signals.items():
        logged = stated.get(name, source) if isinstance(stated, dict) else source
        if logged != source:
            found.append(
                f'the log\'s signal {name} is "{logged}", that of the settings "{source}": they '
                "are taken for the same."
            )
    return found


def require_signals(arrays: Arrays, spec: SafetySpec) -> None:
    """Raise DataError if a signal of the settings is not in a log."""
    missing = [name for name in spec.signals if signal_column(name) not in arrays]
    if missing:
        raise DataError(
            f'The dataset has no column "{signal_column(missing[0])}" for the signal '
            f'"{missing[0]}" of safety.signals; it has {", ".join(arrays)}. Log it, or name those '
            "signals alone that there are."
        )


def with_every_signal(arrays: Arrays, metadata: Metadata, spec: SafetySpec) -> SafetySpec:
    """``spec`` with all the signals of a log, found where the log says, or under their names."""
    names, stated = signals_in(arrays), metadata.get("signals")
    logged = stated if isinstance(stated, dict) else {}
    try:
        return replace(spec, signals={name: logged.get(name, name) for name in names})
    except ConfigError:  # what a foreign file says may be anything
        return replace(spec, signals={name: name for name in names})


def _own_rule(metadata: Metadata, spec: SafetySpec) -> bool:
    """Whether ``spec`` counts accidents by the rule that the log was made under."""
    by_cost = spec.accident in COST_RULES
    threshold = spec.cost_threshold if by_cost else metadata.get("cost_threshold")
    return (spec.accident, threshold) == (
        metadata.get("accident"),
        metadata.get("cost_threshold", 0.0 if by_cost else None),
    )


def _rule(name: object, metadata: Metadata) -> str:
    threshold = metadata.get("cost_threshold", 0.0)
    by_cost = name in COST_RULES
    return f'"{name}" above {threshold}' if by_cost else f'"{name}"'


def _running_sums(costs: NDArray[Any], starts: NDArray[np.int64]) -> bool:
    """Whether costs look as if each were the sum of an episode so far.

    They never fall within an episode, and rise at least twice in several of them: a flag that stays
    on after an accident rises once.
    """
    rises = np.diff(costs.astype(np.float64))
    inner = np.ones(len(rises), bool)
    inner[starts[1:-1] - 1] = False
    if (rises[inner] < 0.0).any():
        return False
    climbs = np.flatnonzero(inner & (rises > 0.0))
    episode = np.searchsorted(starts, climbs, side="right")
    return bool((np.unique(episode, return_counts=True)[1] >= 2).sum() >= 3)


def scalar_columns(
    arrays: Arrays,
    starts: NDArray[np.int64],
    metadata: Metadata,
    spec: SafetySpec,
    horizon: int,
    discount: float,
) -> dict[str, NDArray[np.float32]]:
    """The scalar fields of a Batch for whole episodes by their names, [N] each.

    And the named cost signals of ``spec``. Under the rule "episode_cost" two more: ``share_before``
    and ``share_after`` the step, which end the observation and the next observation.
    """
    columns: dict[str, NDArray[Any]] = {
        "rewards": arrays["rewards"],
        "accidents": accidents_under(arrays, starts, metadata, spec),
        "costs": arrays["costs"],
        "terminated": arrays["terminals"].astype(bool),
        "time_to_go": times_to_go(starts, horizon),
        "return_to_go": returns_to_go(arrays["rewards"], starts, discount),
    }
    if spec.accident == "episode_cost":
        spent = costs_so_far(arrays["costs"], starts)
        columns["share_before"] = share_used(spent, spec.cost_threshold)
        columns["share_after"] = share_used(spent + arrays["costs"], spec.cost_threshold)
    columns |= {key: arrays[key] for key in map(signal_column, spec.signals)}
    return {key: value.astype(np.float32) for key, value in columns.items()}


def count_behaviours(
    arrays: Arrays, metadata: dict[str, Any], accidents: NDArray[np.bool_]
) -> None:
    """Set metadata["behaviours"][k]["episodes" and "accident_episodes"] to what the data holds.

    ``accidents`` [M] says which episodes had one, under the rule of this load.
    """
    index = arrays.get("episode_behaviours")
    if index is None:
        return
    behaviours = metadata.get("behaviours")
    if not isinstance(behaviours, list) or not all(isinstance(b, dict) for b in behaviours):
        behaviours = []
    if index.shape != accidents.shape or not np.isin(index, range(len(behaviours))).all():
        raise DataError(
            "episode_behaviours does not give one of the metadata's behaviours for each of the "
            f"{len(accidents)} episodes. Log the dataset again, or leave the array out."
        )
    for k, behaviour in enumerate(behaviours):
        behaviour["episodes"] = int((index == k).sum())
        behaviour["accident_episodes"] = int(accidents[index == k].sum())
