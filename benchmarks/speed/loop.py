"""What surrounds the gradient updates: environment steps a second, and calls in microseconds.

    python benchmarks/speed/loop.py [--out docs/results]

One thread, one process, compiled. The online loop is the real one: a policy behind its shield,
one update of everything a step, proposals every 500 steps. Its overhead is the time outside the
updates as a share of the time inside them. Writes loop.txt.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import ours
import torch
from sb3 import Spaces
from stable_baselines3 import SAC
from worker import Shape

from safe_offrl.collect.behaviours import random_behaviour
from safe_offrl.collect.mixture import log_episodes
from safe_offrl.compute.descent import choose_compute
from safe_offrl.compute.device import configure
from safe_offrl.compute.state import seeded
from safe_offrl.data.dataset import Dataset
from safe_offrl.data.online_buffer import OnlineBuffer
from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.make import make_env
from safe_offrl.policies.acting import NumpyActor
from safe_offrl.policies.networks import Actor, NetworkConfig, StackedMLP
from safe_offrl.safety.guard import Guard, Watch
from safe_offrl.safety.selection import SelectionConfig
from safe_offrl.safety.shield import Shield
from safe_offrl.spec import SafetySpec
from safe_offrl.train.finetune import Finetuning
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.train.pretrain import Pretraining
from safe_offrl.train.pretrain_config import PretrainConfig
from safe_offrl.types import Normalizer

RULES = {"Pendulum-v1": "terminated", "PointHazard-v0": "cost"}  # a pendulum has no accidents


def logged(env: AccidentEnv, env_id: str, spec: SafetySpec, folder: Path) -> Dataset:
    """A log of 20,000 random steps."""
    random = random_behaviour(env.action_size)
    arrays = log_episodes(env, behaviours=[random], shares=[1.0], transitions=20_000, seed=0)
    path = folder / f"{env_id}.hdf5"
    metadata = {"env_id": env_id, "horizon": env.horizon, "behaviours": [{"name": "random"}]}
    write_dataset(path, arrays, metadata)
    return load_dataset(path, discount=0.99, spec=spec)


def online(
    env_id: str, folder: Path, steps: int, *, critics: int, constrained: bool
) -> tuple[float, float]:
    """(environment steps a second, time outside updates / inside) once everything is warm."""
    spec = SafetySpec(accident=RULES[env_id], epsilon=0.5)
    env = make_env(env_id, spec)
    data = logged(env, env_id, spec, folder)
    sizes = NetworkConfig(critics=critics)
    pretrained = Pretraining(
        PretrainConfig(env=env_id, safety=spec, networks=sizes, steps=1, alignment_steps=0), data
    )
    list(pretrained.run())
    config = FinetuneConfig(
        budget=steps + 4 * env.horizon,
        warmup_steps=env.horizon,
        networks=sizes,
        safety=spec,
        kl=constrained,
        safety_constraint=constrained,
        shield=constrained,
        selection=SelectionConfig(share=0.0),  # tests at the end pay for no update
    )
    info = pretrained.info() | {"shield_acts": True}
    loop = Finetuning(config, env, data, pretrained.state_dict(), info, compiled=True)
    update, inside = loop._update, [0.0]

    def timed(seen: list[float], *, critics_only: bool) -> dict[str, torch.Tensor]:
        begin = time.perf_counter()
        metrics = update(seen, critics_only=critics_only)
        inside[0] += time.perf_counter() - begin
        return metrics

    loop._update = timed  # type: ignore[method-assign, assignment]
    began, first = 0.0, 0
    for _ in loop.run():
        if not began and loop.steps >= 3 * env.horizon:
            began, first, inside[0] = time.perf_counter(), loop.steps, 0.0
    seconds = time.perf_counter() - began
    return (loop.steps - first) / seconds, seconds / inside[0] - 1.0


def stable_baselines(steps: int) -> float:
    """Environment steps a second of its SAC on Pendulum-v1, one update a step."""
    model = SAC(
        "MlpPolicy", "Pendulum-v1", learning_starts=300, policy_kwargs={"net_arch": [256, 256]}
    )
    model.learn(400)
    begin = time.perf_counter()
    model.learn(steps, reset_num_timesteps=False)
    return steps / (time.perf_counter() - begin)


def microseconds(call: Callable[[], object], calls: int = 300) -> float:
    """Median of 15 rounds of the mean time of a call."""
    rounds = []
    for _ in range(15):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        rounds.append((time.perf_counter() - begin) / calls * 1e6)
    return statistics.median(rounds)


def acting(width: int) -> dict[str, float]:
    """Microseconds of an action of the policy alone, and behind shield and guard that let it pass.

    Observation 60, action 2; two hidden layers, two members a network of risk, four draws.
    """
    generator, hidden = seeded(0), (width, width)

    def risk() -> StackedMLP:
        net = StackedMLP(2, 60 + 1 + 2, hidden, layer_norm=True, generator=generator)
        return net.requires_grad_(False)

    actors = [Actor(60, 2, hidden, generator) for _ in range(3)]
    units = Normalizer(np.zeros(60, np.float32), np.ones(60, np.float32))
    shield = Shield(risk(), 4, 0.5, acts=True)
    guard = Guard(actors[1:], [Watch("cost", 1e9, risk(), 100.0, True)], 2.0)
    observation = np.random.default_rng(0).standard_normal(60).astype(np.float32)
    behind = {
        "policy alone": DeployedPolicy.from_actor(actors[0], Shield.abstaining(), units, 0),
        "behind shield and guard": DeployedPolicy.from_actor(actors[0], shield, units, 0, guard),
    }
    rng = np.random.default_rng(0)
    return {
        f"{name}, {width} wide": microseconds(
            functools.partial(policy.act, observation, 0.5, rng, {"cost": 3.0})
        )
        for name, policy in behind.items()
    }


def calls(folder: Path) -> dict[str, float]:
    """Microseconds of what happens beside an update; observation 60, action 2."""
    store = ours.Store(Shape(60, 2), 2, layer_norm=True)
    actor = NumpyActor(store.networks.actor)
    rng = np.random.default_rng(0)
    observation = rng.standard_normal(60).astype(np.float32)
    model = SAC(
        "MlpPolicy", Spaces(Shape(60, 2)), buffer_size=1000, policy_kwargs={"net_arch": [256, 256]}
    )
    episode = store.rows[:1000].clone()
    insert = microseconds(lambda: OnlineBuffer(store.layout, 1000).append(episode))
    action, tail = np.zeros(2, np.float32), np.zeros(6, np.float32)
    row = microseconds(lambda: np.concatenate([observation, action, observation, tail]))
    return {
        "policy, one observation": microseconds(lambda: actor.draw(observation, 1, rng)),
        "  Stable-Baselines3 predict": microseconds(lambda: model.predict(observation)),
        **acting(128),
        **acting(256),
        "insert one transition": row + insert / 1000,
        "draw a batch of 256": microseconds(lambda: store.batches(1)),
        "draw 20 batches of 256": microseconds(lambda: store.batches(20)),
    }


def start_up() -> float:
    """Seconds of `safe-offrl --help`, the median of 5."""
    command = [str(Path(sys.executable).parent / "safe-offrl"), "--help"]
    rounds = []
    for _ in range(5):
        begin = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        rounds.append(time.perf_counter() - begin)
    return statistics.median(rounds)


def main() -> None:
    """Measure everything, print it and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    configure(1)
    choose_compute("on", "fp32", 0)
    lines = [
        "Around the updates, one thread. Overhead: time outside the updates, as a share of inside.",
        "",
        f"{'online loop, one update a step':<44}{'steps/s':>10}{'overhead':>10}",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for env_id in RULES:
            for critics, constrained in ((2, False), (10, False), (10, True)):
                rate, over = online(
                    env_id, folder, args.steps, critics=critics, constrained=constrained
                )
                title = f"{env_id}, {critics} critics" + (", constrained" if constrained else "")
                lines.append(f"{title:<44}{rate:10.1f}{over:10.1%}")
        rate = stable_baselines(args.steps)
        lines.append(f"{'Pendulum-v1, Stable-Baselines3 SAC, 2':<44}{rate:10.1f}")
        lines += ["", f"{'call':<44}{'us':>10}"]
        lines += [f"{title:<44}{us:10.1f}" for title, us in calls(folder).items()]
    lines += ["", f"{'safe-offrl --help':<44}{start_up():10.2f} s"]
    text = "\n".join(lines)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "loop.txt").write_text(text + "\n")


if __name__ == "__main__":
    main()
