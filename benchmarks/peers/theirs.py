"""d3rlpy's learners (MIT), by ``update`` on mini-batches of its replay buffer; no more of it.

It is imported in an environment of its own, which has nothing of ours.
"""

from __future__ import annotations

import random
from dataclasses import fields
from typing import Any

import d3rlpy
import numpy as np
import torch

from benchmarks.peers.learner import Actions, Learner, Observations
from benchmarks.peers.settings import ALGORITHMS, COMMON, Peer, Settings

THEIR_NAMES = {  # of fields of Common
    "gamma": "discount",
    "tau": "tau",
    "n_critics": "critics",
    "batch_size": "batch_size",
}


def config_of(peer: Peer) -> Any:
    """The class's settings: those of all, where it has them, and those of the table."""
    config = getattr(d3rlpy.algos, peer.config)
    encoder = d3rlpy.models.VectorEncoderFactory(list(COMMON.hidden))
    common: Settings = {}
    for name in (field.name for field in fields(config)):
        if name.endswith("learning_rate"):
            common[name] = COMMON.learning_rate
        elif name.endswith("encoder_factory"):
            common[name] = encoder
        elif name in THEIR_NAMES:
            common[name] = getattr(COMMON, THEIR_NAMES[name])
    if peer.quantiles:
        quantiles = d3rlpy.models.QRQFunctionFactory(n_quantiles=peer.quantiles)
        common["q_func_factory"] = quantiles
    own = {theirs: peer.own[ours] for theirs, ours in THEIR_NAMES.items() if ours in peer.own}
    return config(**common | own | peer.theirs)


def build(algorithm: str, log: str, seed: int, steps: int) -> Learner:
    """One of ALGORITHMS on the log in this file, as tasks.py has written it."""
    torch.set_num_threads(1)
    peer = ALGORITHMS[algorithm]
    random.seed(seed)
    d3rlpy.seed(seed)
    with np.load(log) as arrays:
        count = arrays["actions"].shape[1]
        actions = arrays["actions"]
        dataset = d3rlpy.dataset.MDPDataset(
            arrays["observations"],
            actions.argmax(1, keepdims=True) if peer.discrete else actions,
            arrays["rewards"],
            terminals=arrays["terminals"],
            timeouts=arrays["timeouts"],
            action_size=count,
        )
    learner = config_of(peer).create(device="cpu:0")
    learner.build_with_dataset(dataset)

    def train(updates: int) -> None:
        for _ in range(updates):
            learner.update(dataset.sample_transition_batch(COMMON.batch_size))

    def act(observations: Observations, *, mean: bool) -> Actions:
        assert mean  # Theirs is deployed so.
        chosen = learner.predict(observations)
        return np.eye(count, dtype=np.float32)[chosen] if peer.discrete else chosen

    return Learner(train, act)
