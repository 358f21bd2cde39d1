"""The guard's fallback: the policy of least risk that the log supports, with a critic of its own.

It is extracted as the policies of the offline agents are, but nothing draws it towards reward: of
the log's actions those count that are less risky than its own, and it minimises

    caution sum Q_C(s, a) + weight KL(pi || mixture of these actions)

with safety critics of its own actions. It is a Gaussian, or a categorical, whatever kind of policy
the agent trains. What such a policy says of a state is what cannot be
avoided any more, and so it can be left to act where another policy has got to.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from safe_offrl.agents.aversion import Aversion
from safe_offrl.agents.extraction import Extraction
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.compute.device import Device
from safe_offrl.compute.state import Part
from safe_offrl.data.dataset import Dataset
from safe_offrl.data.sampling import uniform_batches
from safe_offrl.policies.networks import Actor
from safe_offrl.safety.constrained import constrained_parts, metric_name
from safe_offrl.safety.guard import Guard, Watch
from safe_offrl.safety.guard_evidence import guard_refusals
from safe_offrl.train.foundation import Foundation
from safe_offrl.train.offline_constraints import OfflineConstraints
from safe_offrl.train.pretrain_config import PretrainConfig


class Fallback:
    """The careful policy in training, and the critics that it is judged by; resumable."""

    def __init__(
        self,
        config: PretrainConfig,
        dataset: Dataset,
        train: Dataset,
        logged: Dataset,
        compiled: bool,
        device: Device,
    ) -> None:
        """``train`` are the normalised episodes of ``dataset`` that it learns from.

        ``logged`` are the same on the device. What it draws is drawn from a generator of its own:
        nothing else changes with it.
        """
        own = config.fallback
        config = replace(
            config,
            critic=replace(config.critic, cost_discount=own.cost_discount),
            extraction=replace(config.extraction, weight=own.weight),
        )
        self.config = config
        base = Foundation.from_log(config, dataset, dataset.horizon, compiled, device)
        self.actor, self.generator = base.networks.actor, base.generator
        self.constraints = base.constraints()
        self.extraction = Extraction(
            base.networks,
            config.extraction,
            self.generator,
            base.compute,
            [Aversion(own.caution, relative=True)] * len(self.constraints),
        )
        self.offline = OfflineConstraints(config, self.constraints, train, logged, self.generator)
        caution = torch.tensor(own.caution, device=self.generator.device)
        self._steering = Steering(
            tuple(Penalty(critic.plain_risk, caution) for _, critic, _ in self.constraints)
        )
        self._layout = train.layout

    def update(self) -> dict[str, Tensor]:
        """One step of the policy, one of each safety critic; scalars to log."""
        size = self.config.batch_size
        (batch,) = uniform_batches(self.offline.rows, self._layout, 1, size, self.generator)
        metrics = self.extraction.update(batch, None, self._steering)
        for i, (limit, _, _) in enumerate(self.constraints):
            found = self.offline.update(i, self.actor, batch)
            metrics |= {metric_name(k, limit, first=not i): v for k, v in found.items()}
        return {f"fallback/{name}": value for name, value in metrics.items()}

    def refusals(self, held_out: Dataset, logged: int) -> list[tuple[str, ...]]:
        """Of each limit, why the guard must not watch it; see :func:`guard_refusals`."""
        actor = copy.deepcopy(self.actor).cpu()
        return [
            guard_refusals(
                critic.in_memory(),
                actor,
                held_out.under(limit),
                self.offline.estimate(i, self.actor, at_start=True),
                limit,
                logged,
                self.config.safety.confidence,
            )
            for i, (limit, critic, _) in enumerate(self.constraints)
        ]

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        parts: dict[str, Part] = {
            "actor": self.actor,
            **self.extraction.parts(),
            **constrained_parts(self.constraints),
            "generator": self.generator,
        }
        return {f"fallback.{name}": part for name, part in parts.items()}

    def guard(self, pretrained: Actor, watched: Sequence[bool]) -> Guard:
        """A guard of copies of the careful and the pretrained policy, of the limits ``watched``."""
        actors = [copy.deepcopy(actor).cpu() for actor in (self.actor, pretrained)]
        watches = [
            Watch.from_critic(limit, critic)
            for (limit, critic, _), wanted in zip(self.constraints, watched, strict=True)
            if wanted
        ]
        return Guard(actors, watches)
