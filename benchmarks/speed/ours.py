"""safe-offrl's updates as long runs make them, compiled, each with its batch from the store."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from worker import BATCH, DEVICE, HIDDEN, ROWS, Shape

from safe_offrl.agents.cql import CQL, ConservativeCritics, CQLConfig
from safe_offrl.agents.iql import IQL, IQLConfig, OnlineIQL
from safe_offrl.agents.protocol import Agent, Setup
from safe_offrl.agents.rlpd import RLPD, RLPDConfig
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.compute.descent import Compute
from safe_offrl.compute.device import configure
from safe_offrl.data.dataset import Dataset
from safe_offrl.data.sampling import RiskSampler, StratifiedSampler, n_step_costs, uniform_batches
from safe_offrl.limits import Limit
from safe_offrl.policies.networks import NetworkConfig, Networks
from safe_offrl.safety.critic import SafetyCritic, SafetyCriticConfig
from safe_offrl.safety.outlook import AccidentAhead
from safe_offrl.types import Batch, Layout, States

configure(int(os.environ["OMP_NUM_THREADS"]))
SIZES = (HIDDEN, HIDDEN)
Run = Callable[[int], None]


class Store:
    """Random transitions and all that an update needs besides."""

    def __init__(self, shape: Shape, critics: int, *, layer_norm: bool) -> None:
        self.layout = Layout(shape.observation, shape.action)
        self.generator = torch.Generator(DEVICE).manual_seed(0)
        self.rows = torch.randn(
            ROWS, self.layout.width, generator=self.generator, device=self.generator.device
        )
        data = self.layout.unpack(self.rows)
        data.actions.clamp_(-1.0, 1.0)
        data.terminated.zero_()
        data.costs[:] = data.accidents[:] = (data.costs > 2.0).float()
        steps = torch.arange(ROWS, device=self.generator.device)
        data.time_to_go[:] = 1.0 - steps % 1000 / 1000
        self.sizes = NetworkConfig(SIZES, SIZES, critics, layer_norm)
        self.networks = Networks(*self.layout.sizes, self.sizes, self.generator)

    def setup(self, compute: Compute) -> Setup:
        """What an agent is built from; none of those here asks for the log or the limit."""
        starts, cut = np.array([0, ROWS]), np.zeros(ROWS, bool)
        dataset = Dataset(self.rows, self.layout, starts, cut, 1000, "")
        limits = (Limit("accident", 0.1, 1.0),)
        return Setup(self.networks, dataset, limits, self.generator, compute)

    def batches(self, n: int) -> list[Batch]:
        """n mini-batches with one draw."""
        return uniform_batches(self.rows, self.layout, n, BATCH, self.generator)


def sac(
    critics: int,
    utd: int,
    compute: Compute,
    *,
    layer_norm: bool = True,
    safety: bool = False,
    steering: bool = False,
) -> Callable[[Shape], Run]:
    """RLPD with ``utd`` critic updates to one of the actor; n counts critic updates.

    ``safety``: an update of the safety critic beside; ``steering``: the actor's loss asks it too.
    """

    def build(shape: Shape) -> Run:
        store = Store(shape, critics, layer_norm=layer_norm)
        generator, layout = store.generator, store.layout
        learner = RLPD(store.networks, RLPDConfig(), generator, compute)
        nothing = torch.zeros((), device=generator.device)
        starts = torch.arange(0, ROWS + 1, 1000, device=generator.device)
        data = layout.unpack(store.rows)
        spans = n_step_costs(data.costs.unsqueeze(-1), starts, 1, 1.0)
        stratified = StratifiedSampler(data.accidents)
        risky = RiskSampler(store.rows, layout, stratified, *spans, steps=1)
        critic = SafetyCritic(
            *layout.sizes, AccidentAhead(1000), SafetyCriticConfig(), generator, compute
        )

        def run(n: int) -> None:
            for _ in range(max(1, n // utd)):
                batches = store.batches(utd)
                for batch in batches:
                    learner.update_critics(batch)
                if safety:
                    batch, weights, _ = risky.draw(BATCH, 0.125, generator)
                    states = States.at_start(batch.observations[:32])
                    critic.update(batch, weights, store.networks.actor, states, generator)
                penalties = (Penalty(critic.plain_risk, nothing),) if steering else ()
                learner.update_actor(batches[-1], Steering(penalties))
            _finish()

        return run

    return build


def published(name: str, compute: Compute) -> Callable[[Shape], Run]:
    """IQL or CQL as published, as the peers have them: with AWR, or with the actor of SAC."""

    def build(shape: Shape) -> Run:
        store = Store(shape, 2, layer_norm=False)
        generator, networks = store.generator, store.networks
        steering = Steering()
        iql = OnlineIQL(store.setup(compute), IQLConfig())
        critics = ConservativeCritics(networks, CQLConfig(), compute, calibrated=False)
        actor = RLPD(networks, RLPDConfig(), generator, compute)

        def run(n: int) -> None:
            for _ in range(n):
                batch = store.batches(1)[0]
                if name == "iql":
                    iql.update_critics(batch)
                    iql.update_actor(batch, steering)
                else:
                    critics.update_critics(batch, generator)
                    actor.update_actor(batch, steering)
            _finish()

        return run

    return build


def offline(name: str, compute: Compute) -> Callable[[Shape], Run]:
    """IQL or CQL with 2 critics as our offline phase has them: LayerNorm, actor from a mixture."""

    def build(shape: Shape) -> Run:
        store = Store(shape, 2, layer_norm=True)
        setup = store.setup(compute)
        agent: Agent = IQL(setup, IQLConfig()) if name == "iql" else CQL(setup, CQLConfig())
        no_risk = torch.zeros(BATCH, device=setup.generator.device)

        def risk(observations: Tensor, time_to_go: Tensor, actions: Tensor) -> Tensor:
            return no_risk

        def run(n: int) -> None:
            for _ in range(n):
                agent.update(store.batches(1)[0], Steering((Penalty(risk, no_risk[0]),)))
            _finish()

        return run

    return build


def _finish() -> None:
    """Wait until the GPU has done what it was told."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def cases(compute: Compute) -> dict[str, Callable[[Shape], Run]]:
    """Every case, computed so."""
    return {
        "sac 2 critics": sac(2, 1, compute, layer_norm=False),
        "sac 10 critics": sac(10, 1, compute),
        "sac 10 critics utd 20": sac(10, 20, compute),
        "sac 2 critics + layernorm": sac(2, 1, compute),
        "sac 2 critics + csc": sac(2, 1, compute, safety=True),
        "sac 10 critics + csc": sac(10, 1, compute, safety=True),
        "sac 10 critics + csc + steering": sac(10, 1, compute, safety=True, steering=True),
        "iql": published("iql", compute),
        "cql": published("cql", compute),
        "iql + mixture": offline("iql", compute),
        "cql + mixture": offline("cql", compute),
    }


CASES = cases(Compute(compiled=True, device=DEVICE))
