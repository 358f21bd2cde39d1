"""Does `safe-offrl assess` tell the truth? Coverage on HazardLine, where the truth is known.

Each case is a behaviour that logs, a policy that is assessed, and a number of episodes; for each of
N logs the interval and the upper limit (95 %) are held against the exact accident probability, from
dynamic programming. Writes a table to the standard output.

    python benchmarks/assess_coverage.py [--datasets 100] [--processes 2] [--cases 5]
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from typing import NamedTuple

import numpy as np
import torch

from safe_offrl.assess.assessment import assess_policy
from safe_offrl.assess.estimates import Estimates
from safe_offrl.assess.fitted_features import FittedConfig
from safe_offrl.compute.device import configure
from safe_offrl.data.dataset import Dataset
from safe_offrl.envs.hazard_line import (
    SIZE,
    Policy,
    accident_table,
    move_right_probability,
    start_positions,
)
from safe_offrl.policies.networks import Actor
from safe_offrl.spec import Limit
from safe_offrl.types import Batch, Layout

HORIZON = 20
CONFIDENCE = 0.95
LIMIT = Limit("accident", 0.05, 1.0)
# Mean action, before noise, at the positions 1 .. SIZE - 2.
CAREFUL = (0.9, 0.7, 0.5, 0.3, 0.6)
RECKLESS = (0.2, 0.0, 0.1, -0.1, 0.2)


class Case(NamedTuple):
    """Who logged (None: uniformly random actions), who is assessed, and from how many episodes."""

    behaviour: tuple[float, ...] | None
    target: tuple[float, ...]
    episodes: int


CASES = {
    "random log, careful policy": Case(None, CAREFUL, 300),
    "random log, reckless policy": Case(None, RECKLESS, 300),
    "careful log, careful policy": Case(CAREFUL, CAREFUL, 300),
    "reckless log, careful policy": Case(RECKLESS, CAREFUL, 300),
    "random log of 1000 episodes": Case(None, CAREFUL, 1000),
}
STD = 0.3  # of the noise before tanh, of every policy here that is not uniform


def policy_of(means: tuple[float, ...]) -> Actor:
    """The tanh-Gaussian policy with these mean actions."""
    actor = Actor(SIZE, 1, (), torch.Generator())
    weight, bias = actor.parameters()
    with torch.no_grad():
        weight.zero_()
        bias.zero_()
        weight[0, 1:-1] = torch.atanh(torch.tensor(means))
        # The actor's squashing of log standard deviations into [-5, 2], inverted.
        bias[1] = np.arctanh((np.log(STD) + 5.0) / 3.5 - 1.0)
    return actor


def exactly(means: tuple[float, ...], points: int = 400) -> Policy:
    """The same policy as :func:`accident_table` takes it, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points // 4)
    weights = weights / weights.sum()

    def at(position: int) -> list[tuple[float, float]]:
        actions = np.tanh(np.arctanh(means[position - 1]) + STD * nodes)
        return list(zip(actions.tolist(), weights.tolist(), strict=True))

    return at


def truth(means: tuple[float, ...]) -> tuple[float, float]:
    """(accident probability, return) by dynamic programming; the return is P(arrival)."""
    policy = exactly(means)
    starts = start_positions()
    risk = accident_table(policy, HORIZON)[HORIZON, starts].mean()

    def mirrored(position: int) -> list[tuple[float, float]]:
        return [(-action, weight) for action, weight in policy(SIZE - 1 - position)]

    # Seen in a mirror, the goal is the hazard.
    arrival = accident_table(mirrored, HORIZON)[HORIZON, [SIZE - 1 - x for x in starts]].mean()
    return float(risk), float(arrival)


def log(case: Case, seed: int) -> Dataset:
    """Whole episodes of the behaviour, simulated side by side."""
    rng = np.random.default_rng(seed)
    n = case.episodes
    position = rng.choice(start_positions(), size=n)
    columns = []
    alive = np.arange(n)
    for t in range(HORIZON):
        x = position[alive]
        if case.behaviour is None:
            action = rng.uniform(-1.0, 1.0, len(x))
        else:
            means = np.arctanh(np.array([0.0, *case.behaviour, 0.0]))
            action = np.tanh(means[x] + STD * rng.standard_normal(len(x)))
        right = rng.random(len(x)) < [move_right_probability(a) for a in action]
        y = x + np.where(right, 1, -1)
        columns.append(np.stack([alive, np.full(len(x), t), x, action, y], axis=1))
        position[alive] = y
        alive = alive[(y > 0) & (y < SIZE - 1)]
    rows = np.concatenate(columns)
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    episode, step, x, action, y = rows.T
    accident, arrived = y == 0, y == SIZE - 1
    zeros = torch.zeros(len(rows))
    eye = torch.eye(SIZE)

    def column(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.float32))

    batch = Batch(
        observations=eye[x.astype(int)],
        actions=column(action)[:, None],
        rewards=column(arrived),
        accidents=column(accident),
        costs=column(accident),
        next_observations=eye[y.astype(int)],
        terminated=column(accident | arrived),
        time_to_go=column(1.0 - step / HORIZON),
        return_to_go=zeros,
    )
    starts = np.append(np.searchsorted(episode, np.arange(n)), len(rows)).astype(np.int64)
    layout = Layout(SIZE, 1)
    cut = np.zeros(len(rows), dtype=bool)
    return Dataset(layout.pack(batch), layout, starts, cut, HORIZON, "hazard line")


def one(job: tuple[str, int, int]) -> tuple[Estimates, float]:
    """One log of one case, assessed; and the seconds it took."""
    name, seed, steps = job
    configure(1)
    case = CASES[name]
    begin = time.monotonic()
    found = assess_policy(
        log(case, seed), policy_of(case.target), LIMIT, FittedConfig(steps=steps), seed
    )
    return found, time.monotonic() - begin


def main() -> None:
    """Assess every log of every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--cases", type=int, default=len(CASES), help="only so many")
    parser.add_argument("--steps", type=int, default=FittedConfig().steps)
    arguments = parser.parse_args()
    print(
        f"{arguments.datasets} logs of HazardLine-v0 a case, {arguments.steps} steps of learning "
        f"features, {CONFIDENCE:.0%}; interval and upper limit as `safe-offrl assess` gives them"
    )
    print(
        f"{'case':<29} {'what':<9} {'truth':>6} {'bias':>7} {'spread':>7} {'error':>7} {'width':>6}"
        f" {'in interval':>12} {'below upper':>12} {'s each':>7}"
    )
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for name, case in list(CASES.items())[: arguments.cases]:
            jobs = [(name, seed, arguments.steps) for seed in range(arguments.datasets)]
            results = pool.map(one, jobs, chunksize=1)
            seconds = np.mean([took for _, took in results])
            for what, exact in zip(("accident", "return"), truth(case.target), strict=True):
                accident = what == "accident"
                estimates = [found for found, _ in results]
                parts = [e.risk if accident else e.returns for e in estimates]
                spans = [
                    (e.risk_interval if accident else e.return_interval)(CONFIDENCE)
                    for e in estimates
                ]
                values = np.array([part.value for part in parts])
                low, high = np.array(spans).T
                inside = ((low <= exact) & (exact <= high)).mean()
                upper = "-"
                if accident:
                    upper = f"{np.mean([e.risk_upper(CONFIDENCE) >= exact for e in estimates]):.0%}"
                print(
                    f"{name:<29} {what:<9} {exact:>6.3f} {values.mean() - exact:>+7.4f} "
                    f"{values.std():>7.4f} {np.mean([p.error for p in parts]):>7.4f} "
                    f"{(high - low).mean():>6.3f} {inside:>12.0%} {upper:>12} {seconds:>7.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
