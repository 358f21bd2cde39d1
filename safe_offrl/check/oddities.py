"""What is odd about an environment without being wrong in any single step, and what it means."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from safe_offrl.check.replay import Recording
from safe_offrl.env.action_bounds import STRANGE_BOUND, largest_bound
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.contract import cost_in_words
from safe_offrl.env.observations import entry_name
from safe_offrl.env.values import scalar
from safe_offrl.record.env_report import EnvReport

CHANCE = 1e-3  # it is odd if chance would show it no more often
LISTED = 3  # a sentence names so many entries of an observation


class Listener(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Below the adapter: what the environment itself says and does, and how long it takes."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.reset_seconds: list[float] = []
        self.step_seconds = 0.0
        self.steps = 0
        self.both_ends: list[int] = []  # steps within an episode that terminate AND truncate
        self.reset_cost = 0.0  # the last one that reset() gave, if it gave any
        self.no_costs: Counter[str] = Counter()  # steps without a number as cost, in words
        self.writes_action = self.global_chance = False
        self._step = 0

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        before = self._global_state()
        start = time.perf_counter()
        result = self.env.reset(**options)
        self.reset_seconds.append(time.perf_counter() - start)
        self.global_chance |= before != self._global_state()
        self._step = 0
        if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict):
            self.reset_cost = scalar(result[1].get("cost")) or self.reset_cost
        return result

    def step(self, action: Any) -> Any:
        given, before = np.array(action), self._global_state()
        start = time.perf_counter()
        result = self.env.step(action)
        self.step_seconds += time.perf_counter() - start
        self.writes_action |= not np.array_equal(given, action)
        self.global_chance |= before != self._global_state()
        self._step += 1
        self.steps += 1
        if isinstance(result, tuple) and len(result) == 5:
            *_, terminated, truncated, info = result
            if terminated and truncated:
                self.both_ends.append(self._step)
            if isinstance(info, dict) and scalar(info.get("cost")) is None:
                self.no_costs[cost_in_words(info)] += 1
        return result

    def _global_state(self) -> tuple[Any, ...]:
        """Where the generators of the whole process stand; nothing once it is known."""
        if self.global_chance:
            return ()
        _, key, position, *_ = np.random.get_state()  # noqa: NPY002
        return np.asarray(key).tobytes(), position, random.getstate()


def add_oddities(
    report: EnvReport, env: AccidentEnv, listener: Listener, recordings: list[Recording]
) -> None:
    """Add a warning for everything odd that was seen."""
    for name, text in (
        *_odd_actions(env, listener),
        *_odd_chance(listener),
        *_odd_costs(listener, recordings),
        *_odd_ends(listener),
        *_odd_observations(report, env, recordings),
    ):
        report.add("warn", name, text)


def clock_in_words(lengths: list[int], terminated: list[bool]) -> str:
    """Whether a time limit is reported as a termination, in words; "" if it does not look so.

    All episodes that come as far as the longest one terminate there, and it takes no truncation to
    know. Were the chance to terminate the same in every step, as it was before, n of them would
    meet in one step by chance with a probability of that chance to the power n - 1.
    """
    longest = max(lengths)
    ended = [last for last, end in zip(lengths, terminated, strict=True) if end]
    there = ended.count(longest)
    if there < 2 or lengths.count(longest) > there:
        return ""
    before = sum(length < longest for length in ended)
    steps = sum(min(length, longest - 1) for length in lengths)
    if ((before + 1) / (steps + 1)) ** (there - 1) >= CHANCE:
        return ""
    many = "Every episode terminates" if there == len(lengths) else f"{there} episodes terminate"
    return (
        f"{many} at step {longest}{' and none lasts longer' if there < len(lengths) else ''}. If "
        "that is a time limit, return truncated=True there instead: what terminates is worth "
        "nothing afterwards, and under safety.accident=terminated the clock would be an accident."
    )


def _odd_actions(env: AccidentEnv, listener: Listener) -> Iterator[tuple[str, str]]:
    space = listener.action_space
    if isinstance(space, spaces.Box) and largest_bound(space.low, space.high) >= STRANGE_BOUND:
        yield (
            "action bounds",
            f"Actions reach {largest_bound(space.low, space.high):.3g}, and what is learnt is "
            "scaled to that: a random action is about half of it. If no such action is meant, give "
            "the action space its real bounds.",
        )
    if listener.writes_action:
        yield (
            "actions given",
            "step() writes into the action that it is given. Here it gets a copy, other libraries "
            "will log what it left: copy it first.",
        )


def _odd_chance(listener: Listener) -> Iterator[tuple[str, str]]:
    if listener.global_chance:
        yield (
            "global chance",
            "It uses or seeds a generator of the whole process (numpy.random, random), so that "
            "environments side by side, as those that `collect` trains in, disturb each other. "
            "Draw from self.np_random.",
        )


def _odd_costs(listener: Listener, recordings: list[Recording]) -> Iterator[tuple[str, str]]:
    if listener.reset_cost:
        yield (
            "late cost",
            f"reset() gives a cost of {listener.reset_cost:g}, which belongs to no step and is "
            "counted nowhere. If costs are reported a step late, report each with the step that "
            "caused it: an accident in the last step would be missed.",
        )
    rises, falls = 0, 0
    for recording in recordings:
        change = np.diff(recording.outcomes[:, 1])
        rises += int((change[recording.outcomes[:-1, 1] > 0.0] > 0.0).sum())
        falls += int((change < 0.0).sum())
    # Costs that belong to steps rise as often as they fall.
    if not falls and 0.5**rises < CHANCE:
        yield (
            "summed cost",
            f"Within an episode the cost never falls, and rises {rises:,} times from above 0. If "
            'info["cost"] is the sum so far, give what each step adds: the sum is taken here.',
        )


def _odd_ends(listener: Listener) -> Iterator[tuple[str, str]]:
    layer: Any = listener.env
    while isinstance(layer, gymnasium.Wrapper):
        if "autoreset" in type(layer).__name__.lower():
            yield (
                "autoreset",
                f"The wrapper {type(layer).__name__} begins the next episode by itself. Every "
                "episode is begun with reset(seed=...) here, so take it off.",
            )
        layer = layer.env


def _odd_observations(
    report: EnvReport, env: AccidentEnv, recordings: list[Recording]
) -> Iterator[tuple[str, str]]:
    if any(
        "observation space" in check.text for check in report.checks if check.name == "gymnasium"
    ):
        return
    box = env.observation_space
    assert isinstance(box, spaces.Box)
    seen = np.concatenate([recording.observations for recording in recordings])
    lowest, highest = seen.min(axis=0), seen.max(axis=0)
    outside = np.flatnonzero((lowest < box.low) | (highest > box.high))
    if len(outside):
        k = int(outside[0])
        named = ", ".join(entry_name(env.layout, int(i)) for i in outside[:LISTED])
        more = f" and {len(outside) - LISTED} more" if len(outside) > LISTED else ""
        yield (
            "observation space",
            f"{named}{more}: outside of the observation space, the first from {lowest[k]:.4g} to "
            f"{highest[k]:.4g} where [{box.low[k]:.4g}, {box.high[k]:.4g}] is stated. Nothing here "
            "relies on it, but correct the space, or what is wrong with the observation.",
        )
