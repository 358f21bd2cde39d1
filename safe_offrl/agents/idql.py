"""IDQL (Hansen-Estruch et al. 2023, arXiv:2304.10573): IQL's values, a generative model of the
log's behaviour, and of its samples the best.

The model is a flow, distilled into the generator F of a policy that proposes N actions; what
chooses among them is learnt (agents/choice.py). The paper takes the argmax of Q, to which a
temperature of 0 leads, or samples in proportion to weights of IQL's expectile, of diffusion samples
and with the critics at hand. Here the choice is a policy: it weighs risk, has an entropy and a
divergence, and RLPD goes on with it online, while F stays as it is. Its KL from the behaviour is at
most log N, whatever the critics say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safe_offrl.agents.choice import Choice
from safe_offrl.agents.flow import BehaviourFlow, Distillation
from safe_offrl.agents.iql import IQLConfig, IQLValues
from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.steering import Steering
from safe_offrl.compute.state import Part
from safe_offrl.policies.proposals import PROPOSALS, ProposalNetwork
from safe_offrl.policies.protocol import normal
from safe_offrl.types import Batch


@dataclass(frozen=True)
class IDQLConfig:
    """Settings of IDQL: of IQL's values as published, and one of the choice's own.

    ``tau`` is also that of the flow's average. ``temperature`` of the choice, against the
    normalised critics: at .05 one of two proposals that is better by 5 % of |Q| is taken e times as
    often.
    """

    learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 5e-3
    expectile: float = 0.7
    temperature: float = 0.05


class IDQL:
    """Values, flow, generator and choice, each with an optimiser of its own."""

    Config = IDQLConfig
    Online: type[OnlineAgent] | None = None
    kinds = (PROPOSALS,)

    def __init__(self, setup: Setup, config: IDQLConfig) -> None:
        networks, self.generator, compute = setup.networks, setup.generator, setup.compute
        lr, network = config.learning_rate, networks.actor.layers
        assert isinstance(network, ProposalNetwork)
        values = IQLConfig(lr, config.discount, config.tau, config.expectile)
        self.values = IQLValues(networks, values, self.generator, compute)
        self.behaviour = BehaviourFlow(networks, lr, config.tau, self.generator, compute)
        self.distillation = Distillation(network.generator, self.behaviour.actions, lr, compute)
        self.choice = Choice(networks, lr, config.temperature, compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {
            **self.values.parts(),
            **self.behaviour.parts(),
            **self.distillation.parts(),
            **self.choice.parts(),
        }

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One step of each: values, flow, generator, choice."""
        _, metrics = self.values.update(batch)
        shape, generator = batch.actions.shape, self.generator
        x0, w = normal(shape, generator), normal(shape, generator)
        t = torch.rand((len(batch.actions), 1), generator=generator, device=generator.device)
        flow_loss = self.behaviour.update(batch, x0, t)
        distillation_loss = self.distillation.update(batch.observations, w)
        metrics |= self.choice.update(batch, steering, generator)
        return metrics | {
            "actor/flow_loss": flow_loss,
            "actor/distillation_loss": distillation_loss,
        }
