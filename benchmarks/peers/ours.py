"""Our learners, as a long run computes them, without anything of safety."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch

from benchmarks.peers.learner import Actions, Learner, Observations
from benchmarks.peers.settings import ALGORITHMS, COMMON, EXTRACTION, Peer, Settings
from benchmarks.peers.tasks import read_log
from safe_offrl.agents import AGENTS, kind_of
from safe_offrl.agents.extraction import ExtractionConfig
from safe_offrl.agents.protocol import Setup
from safe_offrl.agents.steering import Steering
from safe_offrl.compute.descent import choose_compute
from safe_offrl.compute.device import configure
from safe_offrl.compute.state import seeded
from safe_offrl.data.sampling import uniform_batches
from safe_offrl.limits import Limit
from safe_offrl.policies.networks import NetworkConfig, Networks


def config_of(peer: Peer) -> Any:
    """The agent's own settings: those of all, where it has them, and those of the table."""
    config = AGENTS[peer.agent].Config
    names = {field.name for field in fields(config)} & {"learning_rate", "discount", "tau"}
    common: Settings = {name: getattr(COMMON, name) for name in names}
    if config().discount is None:  # It learns no values.
        del common["discount"]
    return config(**common, **peer.ours)


def build(algorithm: str, log: str, seed: int, steps: int) -> Learner:
    """One of ALGORITHMS on the log of this task."""
    configure(1)
    peer, generator = ALGORITHMS[algorithm], seeded(seed)
    logged = read_log(log)
    dataset = logged.dataset
    kind = kind_of(peer.agent, discrete=dataset.discrete)
    sizes = NetworkConfig(COMMON.hidden, COMMON.hidden, COMMON.critics, layer_norm=False)
    networks = Networks(*dataset.layout.sizes, sizes, generator, kind)
    compute, _ = choose_compute("auto", "fp32", steps)
    setup = Setup(
        networks,
        dataset,
        (Limit("accident", 0.1, 1.0),),  # Nothing asks for it without a penalty.
        generator,
        compute,
        ExtractionConfig(**EXTRACTION),
        steps=steps,
    )
    agent = AGENTS[peer.agent](setup, config_of(peer))
    rng, actor = np.random.default_rng(seed), networks.actor

    def train(updates: int) -> None:
        for _ in range(updates):
            rows, layout = dataset.rows, dataset.layout
            (batch,) = uniform_batches(rows, layout, 1, COMMON.batch_size, generator)
            agent.update(batch, Steering())

    @torch.no_grad()
    def act(observations: Observations, *, mean: bool) -> Actions:
        shape = (1, len(observations), *actor.noise_shape)
        noise = np.zeros(shape) if mean else kind.draw_noise(shape, rng)
        made = actor(torch.from_numpy(observations)).act(torch.from_numpy(noise).float())
        return made[0].numpy()

    return Learner(train, act)
