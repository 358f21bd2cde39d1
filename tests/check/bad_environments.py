"""Small environments with one defect each, for tests of `check-env`; importing registers them.

All walk on a line with noise; beyond 1 on either side is the accident.
"""

from __future__ import annotations

import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

Array = NDArray[Any]
Step = tuple[Any, float, bool, bool, dict[str, Any]]


class Sound(gymnasium.Env[Any, Any]):
    """Nothing is wrong with this one."""

    observation_space: spaces.Space[Any] = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space: spaces.Space[Any] = spaces.Box(-2.0, 3.0, (1,), np.float32)
    position = 0.0
    clock = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.position, self.clock = 0.1 * float(self.np_random.standard_normal()), 0
        return self.observe(), {}

    def step(self, action: Any) -> Step:
        self.clock += 1
        self.position += 0.05 * float(action[0]) + 0.1 * float(self.np_random.standard_normal())
        over = abs(self.position) > 1.0
        return self.observe(), self.position, over, False, {"cost": float(over)}

    def observe(self) -> Any:
        return np.array([self.position, self.clock / 20], dtype=np.float32)


class TwoSignals(Sound):
    """Beside the cost it says how far it is, and a wall that is never touched."""

    def step(self, action: Any) -> Step:
        *rest, info = super().step(action)
        return (*rest, {**info, "parts": {"distance": abs(self.position)}, "wall": 0})


class RandomSignal(Sound):
    def step(self, action: Any) -> Step:
        *rest, info = super().step(action)
        chance = float(np.random.rand())  # noqa: NPY002  # what is wrong with it
        return (*rest, {**info, "wall": chance})


class NoCost(Sound):
    def step(self, action: Any) -> Step:
        return (*super().step(action)[:4], {})


class CostOnlyOnAccidents(Sound):
    def step(self, action: Any) -> Step:
        *rest, info = super().step(action)
        return (*rest, info if info["cost"] else {})


class NanObservation(Sound):
    def observe(self) -> Any:
        return np.array([self.position, np.nan if self.clock == 3 else 0.0], dtype=np.float32)


class InfiniteReward(Sound):
    def step(self, action: Any) -> Step:
        observation, _, *rest = super().step(action)
        return (observation, float("inf"), *rest)


class NanCost(Sound):
    def step(self, action: Any) -> Step:
        return (*super().step(action)[:4], {"cost": float("nan")})


class NegativeCost(Sound):
    def step(self, action: Any) -> Step:
        *rest, info = super().step(action)
        return (*rest, {"cost": info["cost"] - 0.5})


class UnboundedActions(Sound):
    action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)


class Image(Sound):
    observation_space = spaces.Box(0, 255, (8, 8, 3), np.uint8)

    def observe(self) -> Any:
        return np.zeros((8, 8, 3), np.uint8)


class ImageAndUnbounded(Image):
    action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)


class MissingKey(Sound):
    observation_space = spaces.Dict({"x": spaces.Box(-9, 9, (1,)), "gone": spaces.Box(-9, 9, (1,))})

    def observe(self) -> Any:
        return {"x": np.array([self.position], dtype=np.float32)}


class WrongSize(Sound):
    def observe(self) -> Any:
        return np.zeros(3, dtype=np.float32)


class SixValues(Sound):
    """The step of Safety-Gymnasium: the cost is a value of its own."""

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, info["cost"], terminated, truncated, info


class NoSeed(Sound):
    def reset(self) -> Any:  # type: ignore[override]
        return super().reset()


class StepRaises(Sound):
    def step(self, action: Any) -> Step:
        if self.clock == 2:
            raise KeyError("motor")
        return super().step(action)


class ConstructorRaises(Sound):
    def __init__(self) -> None:
        raise RuntimeError("no licence found")


class CloseRaises(Sound):
    def close(self) -> None:
        raise RuntimeError("closed already")


class GlobalRandomness(Sound):
    def step(self, action: Any) -> Step:
        self.position += 0.1 * np.random.standard_normal()  # noqa: NPY002
        return super().step(action)


class StateSurvivesReset(Sound):
    episodes = 0

    def reset(self, **options: Any) -> Any:
        result = super().reset(**options)
        self.episodes += 1
        return result

    def step(self, action: Any) -> Step:
        observation, reward, *rest = super().step(action)
        return (observation, reward + 0.01 * self.episodes, *rest)


class HashOrder(Sound):
    """hash() of a text differs from process to process."""

    def observe(self) -> Any:
        return np.array([self.position, hash("left") % 16_777_213], dtype=np.float32)


class BothEnds(Sound):
    def step(self, action: Any) -> Step:
        observation, reward, terminated, _, info = super().step(action)
        return observation, reward, terminated, terminated, info


class TimeLimitTerminates(Sound):
    def step(self, action: Any) -> Step:
        observation, reward, _, _, info = super().step(action)
        return observation, reward, self.clock == 7, False, info


class NeverAnAccident(Sound):
    def step(self, action: Any) -> Step:
        return (*super().step(action)[:4], {"cost": 0.0})


class AlwaysAnAccident(Sound):
    def step(self, action: Any) -> Step:
        return (*super().step(action)[:4], {"cost": 1.0})


class LargeObservation(Sound):
    def observe(self) -> Any:
        return np.array([self.position, 5e4 * self.position], dtype=np.float32)


class TinyObservations(Sound):
    def observe(self) -> Any:
        return np.array([1e-7 * self.position, 1e-5 * self.position], dtype=np.float32)


class FarObservation(Sound):
    def observe(self) -> Any:
        return np.array([5.4e6 + self.position, self.position], dtype=np.float32)


class FarObservationInFloat64(Sound):
    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)

    def observe(self) -> Any:
        return np.array([5.4e6 + 0.01 * self.position, self.position])


class ConstantObservation(Sound):
    def observe(self) -> Any:
        return np.array([self.position, 0.5], dtype=np.float32)


class Slow(Sound):
    def step(self, action: Any) -> Step:
        time.sleep(0.013)
        return super().step(action)


class NotPicklable(Sound):
    def __init__(self) -> None:
        self.callback = lambda: None


class OutsideItsSpace(Sound):
    observation_space = spaces.Box(-0.01, 0.01, (2,), np.float32)


class PlaceholderBounds(Sound):
    action_space = spaces.Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (1,))


class LargeBounds(Sound):
    action_space = spaces.Box(-1e8, 1e8, (1,), np.float32)

    def step(self, action: Any) -> Step:
        return super().step(1e-8 * action)


class EverySeedTheSame(Sound):
    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return super().reset(seed=7)


class ThreeScenarios(Sound):
    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return super().reset(seed=None if seed is None else seed % 3)


class SeedsTheGlobalGenerator(Sound):
    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        np.random.seed(seed)  # noqa: NPY002
        return super().reset(seed=seed)

    def step(self, action: Any) -> Step:
        self.position += 0.1 * np.random.standard_normal()  # noqa: NPY002
        return super().step(action)


class CostAStepLate(Sound):
    last = 0.0

    def reset(self, **options: Any) -> Any:
        observation, _ = super().reset(**options)
        late, self.last = self.last, 0.0
        return observation, {"cost": late}

    def step(self, action: Any) -> Step:
        *rest, info = super().step(action)
        late, self.last = self.last, info["cost"]
        return (*rest, {"cost": late})


class SummedCost(Sound):
    total = 0.0

    def step(self, action: Any) -> Step:
        *rest, _ = super().step(action)
        self.total = (0.0 if self.clock == 1 else self.total) + float(self.position > 0.2)
        return (*rest, {"cost": self.total})


class GrowingCost(SummedCost):
    """The distance from the middle, which mostly grows and is no sum."""

    def step(self, action: Any) -> Step:
        *rest, _ = super().step(action)
        return (*rest, {"cost": abs(self.position)})


class WritesIntoItsAction(Sound):
    def step(self, action: Any) -> Step:
        result = super().step(action)
        action *= 0.0
        return result


class LeavesItsSpaceLate(Sound):
    observation_space = spaces.Box(
        np.array([-0.9, 0.0], np.float32), np.array([0.9, 1.0], np.float32)
    )


class ClockTerminates(Sound):
    def step(self, action: Any) -> Step:
        observation, reward, over, _, info = super().step(action)
        return observation, reward, over or self.clock == 15, False, info


class FailsSometimes(Sound):
    def step(self, action: Any) -> Step:
        if self.np_random.random() < 0.02:
            raise RuntimeError("solver did not converge")
        return super().step(action)


class CostVector(Sound):
    def step(self, action: Any) -> Step:
        *rest, info = super().step(action)
        return (*rest, {"cost": np.array([info["cost"], 0.0])})


class OldReset(Sound):
    def reset(self, **options: Any) -> Any:
        return super().reset(**options)[0]


class Nested(Sound):
    """A plain Dict: Gymnasium sorts its keys, so "arm" comes before "wheels"."""

    observation_space = spaces.Dict(
        {
            "wheels": spaces.Box(-9.0, 9.0, (2, 2), np.float32),
            "arm": spaces.Dict({"angle": spaces.Box(-9.0, 9.0, (1,), np.float32)}),
        }
    )

    def observe(self) -> Any:
        wheels = self.position * np.arange(1.0, 5.0, dtype=np.float32).reshape(2, 2)
        return {
            "wheels": np.clip(wheels, -9.0, 9.0),
            "arm": {"angle": np.array([self.clock / 20], dtype=np.float32)},
        }


def hits_wall(
    observation: Array,
    action: Array,
    next_observation: Array,
    reward: float,
    terminated: bool,
    truncated: bool,
    info: dict[str, Any],
) -> bool:
    """An accident function."""
    return bool(abs(next_observation[0]) > 0.5)


def any_cost(*arguments: Any) -> bool:
    return bool(arguments[-1]["cost"].sum() > 0.0)


def not_a_verdict(*arguments: Any) -> Any:
    return "yes"


for _name in [n for n, c in vars().items() if isinstance(c, type) and issubclass(c, Sound)]:
    gymnasium.register(f"{_name}-v0", entry_point=f"{__name__}:{_name}", max_episode_steps=20)
gymnasium.register(
    "ResetsItself-v0",
    entry_point=f"{__name__}:Sound",
    max_episode_steps=20,
    additional_wrappers=(gymnasium.wrappers.Autoreset.wrapper_spec(),),
)
gymnasium.register("NoLimit-v0", entry_point=f"{__name__}:Sound")
