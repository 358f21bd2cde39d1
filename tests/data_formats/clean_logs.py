"""Logs with known truth, played by a few lines of numpy: what a loader must neither miss nor doubt.

Each is one way in which an honest log looks odd: repeated starts, noise, jumps, one-step episodes,
an accident on the last step, states that come back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from safe_offrl.spec import SafetySpec

Arrays = dict[str, NDArray[Any]]
State = NDArray[np.float64]
Rng = np.random.Generator
Reset = Callable[[Rng], State]
Step = Callable[[State, NDArray[Any], Rng], tuple[State, float, float, bool]]  # r, cost, terminated


class Truth(NamedTuple):
    """What was logged."""

    episodes: int
    rows: int
    accident_episodes: int
    terminated: int
    truncated: int
    horizon: int


@dataclass(frozen=True)
class Log:
    """Arrays as a file holds them, and what is said of them there and by the settings of a load.

    ``rows`` [N] is which row of the clean log each row was, -1 for one that never happened;
    ``episode`` [N] in which episode. ``style`` is how a table of text is written.
    """

    arrays: Arrays
    rows: NDArray[np.int64]
    episode: NDArray[np.int64]
    horizon: int | None
    metadata: dict[str, Any] = field(default_factory=dict)
    spec: SafetySpec = field(default_factory=SafetySpec)
    style: dict[str, str] = field(default_factory=dict)


def play(
    reset: Reset,
    step: Step,
    *,
    episodes: int,
    horizon: int,
    act: Callable[[Rng, float], NDArray[Any]] | None = None,
    noise: float = 0.0,
    resolution: float = 0.0,
    stop: float = 0.0,
    metadata: dict[str, Any] | None = None,
) -> Log:
    """Episodes of one environment under a policy with a bias of its own in each of them.

    ``noise`` is that of the sensor, ``resolution`` its smallest step, ``stop`` the probability that
    an operator ends the episode after a step. As in Gymnasium a step may terminate and be the last
    of the time limit, and ``next_observations`` are the readings that the next row begins with.
    """
    rng = np.random.default_rng(0)
    columns: dict[str, list[Any]] = {key: [] for key in NAMES}

    def observe(state: State) -> NDArray[np.float32]:
        reading = state + noise * rng.standard_normal(state.shape)
        if resolution:
            reading = np.round(reading / resolution) * resolution
        return reading.astype(np.float32)

    for _ in range(episodes):
        state, bias = reset(rng), float(rng.uniform(-0.4, 1.0))
        observation = observe(state)
        for t in range(1, horizon + 1):
            action = (act or throttle)(rng, bias)
            state, reward, cost, terminated = step(state, action, rng)
            following = observe(state)
            truncated = t == horizon or (not terminated and bool(rng.random() < stop))
            row = (observation, following, action, reward, cost, terminated, truncated)
            for key, value in zip(NAMES, row, strict=True):
                columns[key].append(value)
            observation = following
            if terminated or truncated:
                break
    arrays = {key: np.asarray(values) for key, values in columns.items()}
    arrays |= {key: arrays[key].astype(np.float32) for key in ("rewards", "costs")}
    ends = arrays["terminals"] | arrays["timeouts"]
    episode = np.concatenate([[0], np.cumsum(ends)[:-1]]).astype(np.int64)
    rows = np.arange(len(ends))
    return Log(arrays, rows, episode, horizon, {"horizon": horizon, **(metadata or {})})


NAMES = (
    "observations",
    "next_observations",
    "actions",
    "rewards",
    "costs",
    "terminals",
    "timeouts",
)


def throttle(rng: Rng, bias: float) -> NDArray[np.float32]:
    """A continuous action in [-1, 1]."""
    return np.clip(bias + 0.4 * rng.standard_normal(1), -1.0, 1.0).astype(np.float32)


def gear(rng: Rng, bias: float) -> NDArray[np.float32]:
    """A continuous action in steps of a fifth."""
    return np.round(5 * throttle(rng, bias)) / np.float32(5)


def button(rng: Rng, bias: float) -> NDArray[np.int64]:
    """One of three discrete actions, the third the more often the larger the bias."""
    return np.array(rng.choice(3, p=[0.3 - 0.2 * bias, 0.4 - 0.1 * bias, 0.3 + 0.3 * bias]))


def lever(rng: Rng, bias: float) -> NDArray[np.int64]:
    """One of two."""
    return np.array(int(rng.random() < 0.5 + 0.3 * bias))


def at(*values: float) -> Reset:
    return lambda rng: np.array(values)


def within(low: float, high: float, size: int = 2) -> Reset:
    return lambda rng: rng.uniform(low, high, size)


def brink(rng: Rng) -> State:
    """Anywhere up to the edge, moving towards it."""
    return np.array([rng.uniform(0.3, 1.0), 0.05])


# --- environments: state, action, generator -> state, reward, cost, terminated ---


def drive(state: State, action: NDArray[Any], rng: Rng) -> tuple[State, float, float, bool]:
    """A car; driving over position 1 is the accident and the end."""
    speed = 0.9 * state[1] + 0.03 * float(action[0]) + 0.01 * rng.standard_normal()
    position = max(-1.0, state[0] + speed)
    over = position > 1.0
    return np.array([position, speed]), 0.0 if over else position, float(over), over


def wander(state: State, action: NDArray[Any], rng: Rng) -> tuple[State, float, float, bool]:
    """A walk through a hazard at (1, 1), which costs 1 or 2 a step and ends nothing."""
    drift = np.array([0.06, 0.05]) * float(action[0])
    moved = np.clip(state + drift + 0.03 * rng.standard_normal(2), -2.0, 2.0)
    distance = float(np.abs(moved - 1.0).max())
    return moved, float(moved.sum()), 2.0 if distance < 0.1 else float(distance < 0.3), False


def press(state: State, action: NDArray[Any], rng: Rng) -> tuple[State, float, float, bool]:
    """A step of -0.05, 0.03 or 0.11 on a line with a cliff at 1."""
    moved = state + np.array([0.08 * (int(action) - 0.6) + 0.02 * rng.standard_normal(), 0.01])
    over = bool(moved[0] > 1.0)
    return moved, float(moved[0]), float(over), over


def pull(state: State, action: NDArray[Any], rng: Rng) -> tuple[State, float, float, bool]:
    """A contextual bandit: one step, and what is seen after it has nothing to do with before."""
    strong = float(np.ravel(action)[0]) > 0.3
    return rng.standard_normal(state.shape), float(strong), float(rng.random() < 0.3 * strong), True


def teleport(state: State, action: NDArray[Any], rng: Rng) -> tuple[State, float, float, bool]:
    """The walk with a portal to anywhere every tenth step or so."""
    moved, reward, cost, _ = wander(state, action, rng)
    return (rng.uniform(-2.0, 2.0, 2) if rng.random() < 0.1 else moved), reward, cost, False


def hop(state: State, action: NDArray[Any], rng: Rng) -> tuple[State, float, float, bool]:
    """Cells of a 5 x 5 board from the corner (0, 0); (4, 4) is the goal, (2, 2) costs."""
    moved = state.copy()
    moved[rng.integers(2)] += 1 if rng.random() < 0.5 else -1
    moved = np.clip(moved, 0, 4)
    goal = bool((moved == 4).all())
    return moved, float(goal), float((moved == 2).all()), goal


def lap(state: State, action: NDArray[Any], rng: Rng) -> tuple[State, float, float, bool]:
    """A round of twelve posts that ends where every round begins; some posts are skidded at."""
    post = (int(np.round(np.arctan2(state[1], state[0]) / (np.pi / 6))) + 1) % 12
    moved = np.round([np.cos(post * np.pi / 6), np.sin(post * np.pi / 6)], 6) + 0.0
    return moved, float(action[0]), float(rng.random() < 0.04), post == 0


def wait(state: State, action: NDArray[Any], rng: Rng) -> tuple[State, float, float, bool]:
    """Nothing is ever seen to change."""
    return state, float(action[0]), float(rng.random() < 0.2), False


def sink(state: State, action: NDArray[Any], rng: Rng) -> tuple[State, float, float, bool]:
    """The car stays where it fell, and that costs, until the time limit."""
    if state[0] > 1.0:
        return state, 0.0, 1.0, False
    moved, reward, cost, _ = drive(state, action, rng)
    return moved, reward, cost, False


def decay(state: State, action: NDArray[Any], rng: Rng) -> tuple[State, float, float, bool]:
    """Breaks with probability 0.15 at each step, the last as any other; half of it does harm."""
    broken, harm = bool(rng.random() < 0.15), bool(rng.random() < 0.5)
    return state + 0.1 * rng.standard_normal(2), float(action[0]), float(broken and harm), broken


SCATTERED = within(-0.5, 0.5)
# How each clean log is made.
CLEAN: dict[str, Callable[[], Log]] = {
    "ledge": lambda: play(at(0.0, 0.0), drive, episodes=80, horizon=40),
    "hazards": lambda: play(SCATTERED, wander, episodes=24, horizon=50),
    "buttons": lambda: play(
        SCATTERED, press, episodes=30, horizon=30, act=button, metadata={"action_count": 3}
    ),
    "gears": lambda: play(SCATTERED, drive, episodes=24, horizon=40, act=gear),
    "judged": lambda: judged(play(SCATTERED, wander, episodes=24, horizon=30)),
    "stops": lambda: play(SCATTERED, wander, episodes=30, horizon=50, stop=0.04),
    "mortal": lambda: play(SCATTERED, decay, episodes=50, horizon=200),
    "levers": lambda: play(
        at(0.8, 0.0), press, episodes=30, horizon=30, act=lever, metadata={"action_count": 2}
    ),
    "bandit": lambda: only("terminals", play(within(-1.0, 1.0), pull, episodes=300, horizon=1)),
    "timed bandit": lambda: only(
        "timeouts", play(within(-1.0, 1.0), pull, episodes=300, horizon=1)
    ),
    "deadline": lambda: play(SCATTERED, decay, episodes=120, horizon=8),
    "brink": lambda: play(brink, drive, episodes=100, horizon=40),
    "noise": lambda: play(SCATTERED, drive, episodes=60, horizon=40, noise=0.5),
    "portals": lambda: play(SCATTERED, teleport, episodes=40, horizon=50),
    "board": lambda: play(at(0.0, 0.0), hop, episodes=80, horizon=25, stop=0.05),
    "laps": lambda: play(at(1.0, 0.0), lap, episodes=60, horizon=20),
    "blind": lambda: play(at(0.0), wait, episodes=60, horizon=5),
    "coarse": lambda: play(SCATTERED, wander, episodes=50, horizon=40, stop=0.05, resolution=0.5),
    "stuck": lambda: play(at(0.0, 0.0), sink, episodes=60, horizon=40),
}


def only(end: str, log: Log) -> Log:
    """Without the other flag of the ends of episodes."""
    (other,) = {"terminals", "timeouts"} - {end}
    return replace(log, arrays=log.arrays | {other: np.zeros(len(log.rows), bool)})


def judged(log: Log) -> Log:
    """With the verdicts of an own rule, which finds what no cost tells of."""
    verdicts = log.arrays["observations"].sum(axis=1) > 1.6
    rule: dict[str, Any] = {"accident": "rules:far", "cost_threshold": 0.0}
    return replace(
        log,
        arrays=log.arrays | {"accidents": verdicts, "costs": 0 * log.arrays["costs"]},
        metadata=log.metadata | rule,
        spec=SafetySpec(accident="rules:far"),
    )


@functools.cache
def clean(name: str) -> Log:
    """A clean log of :data:`CLEAN`, made once; nobody writes into its arrays."""
    log = CLEAN[name]()
    for array in log.arrays.values():
        array.flags.writeable = False
    return log


def truth_of(original: Log, rows: NDArray[np.int64], spec: SafetySpec) -> Truth:
    """The counts of those rows of a clean log that are left, each counted once.

    An episode whose end is lost was cut. Accidents are by the log's own verdicts if it has any,
    else by what ``spec`` says: by termination or by cost.
    """
    left = np.unique(rows[rows >= 0])
    terminals, costs = original.arrays["terminals"], original.arrays["costs"]
    accidents = terminals if spec.accident == "terminated" else costs > 0.0
    accidents = original.arrays.get("accidents", accidents)
    number = original.episode[left]
    terminated = len(np.unique(number[terminals[left]]))
    episodes = len(np.unique(number))
    return Truth(
        episodes=episodes,
        rows=len(left),
        accident_episodes=len(np.unique(number[accidents[left]])),
        terminated=terminated,
        truncated=episodes - terminated,
        horizon=int(original.metadata["horizon"]),
    )
