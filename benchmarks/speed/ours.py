"""safe-offrl's updates as long runs make them, compiled, each with its batch from the store."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor
from worker import BATCH, DEVICE, HIDDEN, ROWS, Shape

from safe_offrl.agents import OnlineLearner
from safe_offrl.agents.cql import CQL, CQLConfig, OnlineCQL
from safe_offrl.agents.extraction import Extraction, ExtractionConfig
from safe_offrl.agents.iql import IQL, IQLConfig, OnlineIQL
from safe_offrl.agents.rlpd import RLPD, RLPDConfig
from safe_offrl.compute.descent import Compute
from safe_offrl.compute.device import configure
from safe_offrl.data.sampling import RiskSampler, uniform_batches
from safe_offrl.policies.networks import NetworkConfig, Networks
from safe_offrl.safety.critic import SafetyCritic, SafetyCriticConfig
from safe_offrl.types import Batch, Layout

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
        self.networks = Networks(*self.layout, self.sizes, self.generator)

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
        learner = RLPD(store.networks, layout.action_size, RLPDConfig(), compute)
        nothing = torch.zeros((), device=generator.device)
        starts = torch.arange(0, ROWS + 1, 1000, device=generator.device)
        data = layout.unpack(store.rows)
        risky = RiskSampler(store.rows, layout, starts, data.accidents, data.costs)
        critic = SafetyCritic(*layout, 1000, SafetyCriticConfig(), generator, None, compute)

        def run(n: int) -> None:
            for _ in range(max(1, n // utd)):
                batches = store.batches(utd)
                for batch in batches:
                    learner.update_critics(batch, generator)
                if safety:
                    batch, weights, _ = risky.draw(BATCH, 0.125, generator)
                    reference = critic.reference_states(batch.observations[:32], None, 1000.0)
                    critic.update(batch, weights, store.networks.actor, reference, generator)
                risk = critic.plain_risk if steering else None
                learner.update_actor(batches[-1], risk, nothing, None, nothing, generator)
            _finish()

        return run

    return build


def published(name: str, compute: Compute) -> Callable[[Shape], Run]:
    """IQL or CQL as published, as the peers have them: with AWR, or with the actor of SAC."""

    def build(shape: Shape) -> Run:
        store = Store(shape, 2, layer_norm=False)
        layout, generator, networks = store.layout, store.generator, store.networks
        nothing = torch.zeros((), device=generator.device)
        learner: OnlineLearner
        if name == "iql":
            sizes = store.sizes
            iql = IQL(networks, layout.observation_size, sizes, IQLConfig(), generator, compute)
            learner = OnlineIQL(iql, iql.config, compute)
        else:
            actor = RLPD(networks, layout.action_size, RLPDConfig(), compute)
            learner = OnlineCQL(CQL(networks, CQLConfig(), compute, calibrated=False), actor)

        def run(n: int) -> None:
            for _ in range(n):
                batch = store.batches(1)[0]
                learner.update_critics(batch, generator)
                learner.update_actor(batch, None, nothing, None, nothing, generator)
            _finish()

        return run

    return build


def offline(name: str, compute: Compute) -> Callable[[Shape], Run]:
    """IQL or CQL with 2 critics as our offline phase has them: LayerNorm, actor from a mixture."""

    def build(shape: Shape) -> Run:
        store = Store(shape, 2, layer_norm=True)
        layout, generator, networks = store.layout, store.generator, store.networks
        agent = (
            IQL(networks, layout.observation_size, store.sizes, IQLConfig(), generator, compute)
            if name == "iql"
            else CQL(networks, CQLConfig(), compute, calibrated=False)
        )
        extraction = Extraction(
            networks.actor, *layout, SIZES, ExtractionConfig(), generator, compute
        )
        no_risk = torch.zeros(BATCH, device=generator.device)

        def risk(observations: Tensor, time_to_go: Tensor, actions: Tensor) -> Tensor:
            return no_risk

        def run(n: int) -> None:
            for _ in range(n):
                batch = store.batches(1)[0]
                advantages, _ = agent.update(batch, generator)
                extraction.update(batch, advantages, networks.q, risk, no_risk[0], generator)
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
