"""HazardGrid-v0: a slippery grid with pits, whose accident probability and return are known.

The example of an environment with DISCRETE actions. The short way leads between pits, where every
step may slip into one; the longer the way around them, the safer. For any policy, accidents and
return follow exactly from dynamic programming: the yardstick for estimates of them. gymnasium and
numpy only.

From hurried to cautious, P(accident) and return of three planned policies within 40 steps:

>>> for aversion in (0.0, 0.5, 2.0):
...     policy = as_probabilities(plan(aversion))
...     print(f"{accident_probability(policy, 40):.3f} {expected_return(policy, 40):.3f}")
0.238 0.158
0.053 0.110
0.000 0.071
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Floats = NDArray[np.float64]
Controller = Callable[[Array], int]

GRID = (  # S start, G goal, # pit
    "........",
    "..###...",
    "S......G",
    "S.##....",
    "S.......",
    "........",
)
HEIGHT, WIDTH = len(GRID), len(GRID[0])
CELLS = HEIGHT * WIDTH  # cell = row * WIDTH + column
KIND = np.array(list("".join(GRID)))
STARTS = np.flatnonzero(KIND == "S")  # an episode starts at each with the same probability
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # (row, column): 0 up, 1 right, 2 down, 3 left
SLIP = 0.2  # P(the step goes to one side of where it was aimed), half for each side
ARRIVAL_REWARD = 1.0
TIME_COST = 0.06  # per step


def neighbour(cell: int, move: int) -> int:
    """The cell that a move leads to; the walls around the grid only stop it."""
    row = min(HEIGHT - 1, max(0, cell // WIDTH + MOVES[move][0]))
    column = min(WIDTH - 1, max(0, cell % WIDTH + MOVES[move][1]))
    return row * WIDTH + column


class HazardGridEnv(gym.Env[Array, np.int64]):
    """Walk from the left to the goal on the right, one cell a step.

    Observation [14]: the row [6] and the column [8], each one-hot. Action: 0 up, 1 right, 2 down,
    3 left; one in five steps goes to one side of it. Reward: 1 on arrival, minus 0.06 a step.
    ``info["cost"]`` is 1 on falling into a pit; both terminate. The time limit comes from the
    registration (40 steps).
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(0.0, 1.0, (HEIGHT + WIDTH,), np.float32)
        self.action_space = gym.spaces.Discrete(len(MOVES))
        self._cell = int(STARTS[0])

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start at one of the cells S."""
        super().reset(seed=seed)
        self._cell = int(self.np_random.choice(STARTS))
        return observe(self._cell), {"cost": 0.0}

    def step(self, action: np.int64) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Move, or slip to one side."""
        roll = self.np_random.random()
        turn = 0 if roll >= SLIP else 1 if roll < SLIP / 2 else -1
        self._cell = neighbour(self._cell, (int(action) + turn) % len(MOVES))
        accident, arrived = KIND[self._cell] == "#", KIND[self._cell] == "G"
        reward = ARRIVAL_REWARD * arrived - TIME_COST
        info = {"cost": float(accident), "is_success": bool(arrived)}
        return observe(self._cell), reward, bool(accident or arrived), False, info


def observe(cell: int) -> Array:
    """The observation [14] in a cell: its row and its column, each one-hot."""
    observation = np.zeros(HEIGHT + WIDTH, dtype=np.float32)
    observation[[cell // WIDTH, HEIGHT + cell % WIDTH]] = 1.0
    return observation


def cell_of(observation: Array) -> int:
    """The inverse of :func:`observe`."""
    return int(observation[:HEIGHT].argmax() * WIDTH + observation[HEIGHT:].argmax())


# --- dynamic programming: a policy is a table [48, 4] of the actions' probabilities per cell ---


def transition_table() -> Floats:
    """P(next cell | cell, action): [4, 48, 48]; pits and goal are left by no action."""
    table = np.zeros((len(MOVES), CELLS, CELLS))
    for cell in range(CELLS):
        for action in range(len(MOVES)):
            if KIND[cell] in "#G":
                table[action, cell, cell] = 1.0
                continue
            for turn, probability in ((0, 1.0 - SLIP), (1, SLIP / 2), (-1, SLIP / 2)):
                table[action, cell, neighbour(cell, (action + turn) % 4)] += probability
    return table


def as_probabilities(actions: NDArray[np.int64]) -> Floats:
    """The policy [48, 4] that always takes ``actions`` [48]."""
    return np.eye(len(MOVES))[actions]


def under(policy: Floats) -> Floats:
    """P(next cell | cell) under a policy: [48, 4] -> [48, 48]."""
    if policy.min() < 0.0 or np.abs(policy.sum(1) - 1.0).max() > 1e-6:
        raise ValueError("the action probabilities of a cell do not sum to 1")
    return np.einsum("ca,acn->cn", policy, transition_table())


def accident_table(policy: Floats, horizon: int) -> Floats:
    """Exact P(a pit within t steps from a cell): [horizon + 1, 48], by backward induction."""
    moves = under(policy)
    table = np.zeros((horizon + 1, CELLS))
    table[0] = KIND == "#"
    for t in range(1, horizon + 1):
        table[t] = moves @ table[t - 1]
    return table


def accident_probability(policy: Floats, horizon: int) -> float:
    """Exact P(at least one accident within ``horizon`` steps) over the start cells."""
    return float(accident_table(policy, horizon)[horizon, STARTS].mean())


def expected_return(policy: Floats, horizon: int) -> float:
    """Exact undiscounted return of an episode of at most ``horizon`` steps."""
    moves, alive = under(policy), (KIND != "#") & (KIND != "G")
    reward = alive * (ARRIVAL_REWARD * moves @ (KIND == "G") - TIME_COST)
    value = np.zeros(CELLS)
    for _ in range(horizon):
        value = reward + moves @ value
    return float(value[STARTS].mean())


def plan(aversion: float) -> NDArray[np.int64]:
    """Best action per cell [48] for return minus ``aversion`` times accidents, without time limit.

    Value iteration; ties go to the lower action.
    """
    table, alive = transition_table(), (KIND != "#") & (KIND != "G")
    ends = ARRIVAL_REWARD * (KIND == "G") - aversion * (KIND == "#")
    value, q = np.zeros(CELLS), np.zeros((len(MOVES), CELLS))
    for _ in range(400):
        q = table @ (ends + value) - TIME_COST
        value = alive * q.max(0)
    return q.round(9).argmax(0)


def scripted_behaviours() -> dict[str, Callable[[np.random.Generator], Controller]]:
    """Name -> factory of controllers for `safe-offrl collect`; they give the action's number."""

    def follow(actions: NDArray[np.int64]) -> Callable[[np.random.Generator], Controller]:
        return lambda _rng: lambda observation: int(actions[cell_of(observation)])

    return {
        "hurried": follow(plan(0.0)),
        "moderate": follow(plan(0.5)),
        "cautious": follow(plan(2.0)),
    }
