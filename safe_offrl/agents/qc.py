"""Q-chunking (Li et al. 2025, arXiv:2507.07969): values of h actions at once, and of the plans that
a flow proposes the best.

    y = sum_{i<h} discount^i r_{t+i} + discount^h (1 - terminated) V(s_{t+h}),
    V(s) = E_{plan ~ pi(s)} min_e Q'_e(s, plan),

is the target of Q(s_t, a_t .. a_{t+h-1}) of logged actions: a reward reaches back h steps at once,
and as Q is of all the actions on the way, these need not be the policy's. (Where they answered
to chance on the way, Q takes the luck for theirs.) The plans are those of a flow over h A numbers,
distilled into a generator F.

Where it differs: the paper executes a plan to its end; here there is a new one at every step, see
policies/chunked.py, so Q is the value of a plan that nobody carries through. The choice is learnt
(agents/choice.py), where the paper takes the argmax of Q, and weighs the risk of the first action;
the target is of that choice, and of N = 16 plans, not 32: it is most of the work. Online F stays as
it is, for all policies to propose the same, where the paper's flow goes on learning; the critics
and the choice go on, on logged and new chunks. A chunk that terminates before its end counts, where
the authors' code leaves it out: plans are made near the end too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safe_offrl.agents.choice import Choice
from safe_offrl.agents.flow import BehaviourFlow, Distillation
from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.steering import Steering
from safe_offrl.agents.td_values import TDValues
from safe_offrl.compute.state import Part
from safe_offrl.data.sampling import ChunkSampler, Reach
from safe_offrl.policies.chunked import CHUNK, CHUNKED, networks_of_plans
from safe_offrl.policies.proposals import ProposalNetwork
from safe_offrl.policies.protocol import normal
from safe_offrl.types import Batch


@dataclass(frozen=True)
class QCConfig:
    """Settings of Q-chunking as published, and the ``temperature`` of the choice, as in IDQL.

    ``discount`` is that of a single step. ``tau`` is also that of the flow's average.
    """

    learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 5e-3
    temperature: float = 0.05


class OnlineQC:
    """Critics of chunks, and the choice among plans; what proposes them has learnt before."""

    own_values = True
    from_scratch = False  # a generator that has learnt nothing would stay so
    return_discount: float | None = None

    def __init__(self, setup: Setup, config: QCConfig) -> None:
        self.generator = setup.generator
        self.reach = Reach(CHUNK, config.discount)
        self.plans = networks_of_plans(setup.networks, self.generator)
        self.values = TDValues(
            self.plans,
            self.generator,
            setup.compute,
            learning_rate=config.learning_rate,
            discount=config.discount**CHUNK,
            tau=config.tau,
        )
        self.choice = Choice(
            self.plans,
            config.learning_rate,
            config.temperature,
            setup.compute,
            executed=setup.networks.layout.action_size,
        )

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {**self.values.parts(), **self.choice.parts()}

    def update_critics(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the critics on a batch of chunks, then Polyak."""
        return self.values.update(batch)

    def update_actor(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One step of the scorer, on the same."""
        return self.choice.update(batch, steering, self.generator)


class QC:
    """The same offline, and the flow and the generator; it draws its own batches, of chunks."""

    Config = QCConfig
    Online: type[OnlineAgent] | None = OnlineQC
    kinds = (CHUNKED,)

    def __init__(self, setup: Setup, config: QCConfig) -> None:
        self.learner, self.generator = OnlineQC(setup, config), setup.generator
        plans, lr, compute = self.learner.plans, config.learning_rate, setup.compute
        network = plans.actor.layers
        assert isinstance(network, ProposalNetwork)
        self.behaviour = BehaviourFlow(plans, lr, config.tau, self.generator, compute)
        self.distillation = Distillation(network.generator, self.behaviour.actions, lr, compute)
        self.logged = ChunkSampler.from_dataset(
            setup.dataset, self.learner.reach, self.generator.device
        )

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {
            **self.learner.parts(),
            **self.behaviour.parts(),
            **self.distillation.parts(),
        }

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One step of each, critics, flow, generator and choice, on as many chunks of the log."""
        chunks, generator = self.logged.draw(len(batch.rewards), self.generator), self.generator
        metrics = self.learner.update_critics(chunks)
        shape = chunks.actions.shape
        x0, w = normal(shape, generator), normal(shape, generator)
        t = torch.rand((len(chunks.actions), 1), generator=generator, device=generator.device)
        flow_loss = self.behaviour.update(chunks, x0, t)
        distillation_loss = self.distillation.update(chunks.observations, w)
        metrics |= self.learner.update_actor(chunks, steering)
        return metrics | {
            "actor/flow_loss": flow_loss,
            "actor/distillation_loss": distillation_loss,
        }
