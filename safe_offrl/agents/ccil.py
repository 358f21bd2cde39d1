"""CCIL (Ke et al. 2024, arXiv:2310.12972): behaviour cloning that knows the way back to the log.

A model of the log's steps, s' = s + f(s, a), is bounded to be Lipschitz, and so may be asked a
little beside them. From a state s~ = s - f(s, a), one step of backward Euler, the logged action a
leads to about s, where the log goes on: (s~, a) is a corrective label. The actor imitates the log
and the labels that are to be trusted, each as much as any other, by maximum likelihood.

As in the authors' code (backward_euler_fast) f is asked at s, not at s~. A label is trusted if it
is near, by a quantile of |s~ - s|, which times the bound of f is the paper's bound of its error,
and if f is good at the step that it is of. They bound each layer; we the whole network, by one step
of the power iteration (arXiv:1802.05957) an update. Changes are in units of their deviation in the
log. Labels have no reward, so no learner but imitation can use them: this is an agent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.steering import Steering
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import Descent
from safe_offrl.compute.state import Part
from safe_offrl.data.dataset import Dataset
from safe_offrl.errors import DataError
from safe_offrl.policies.categorical import CATEGORICAL
from safe_offrl.policies.mixture import MIXTURE
from safe_offrl.policies.mlp import linear_layers
from safe_offrl.policies.protocol import require_density
from safe_offrl.types import Batch

MEASURED_ROWS = 20_000  # transitions, about, of which units and quantiles are
FEWEST_STATES = 0.1  # different observations, as a share of the transitions


@dataclass(frozen=True)
class CCILConfig:
    """Settings of CCIL: of imitation, of the model, and which labels are trusted.

    ``share`` of the updates are the model's too; only then are there labels. ``lipschitz`` bounds
    its network, from standardised observations and actions to standardised changes. Of all labels
    the ``nearest`` are trusted, and of these those of the ``accurate`` share of steps.
    """

    learning_rate: float = 3e-4
    discount: float | None = None
    model_learning_rate: float = 1e-3
    hidden: tuple[int, ...] = (256, 256)
    share: float = 0.2
    lipschitz: float = 3.0
    nearest: float = 0.4
    accurate: float = 0.9


class LipschitzDynamics(nn.Module):
    """f(s, a), the change of an observation, whose network has a bounded slope."""

    center: Tensor
    scale: Tensor

    def __init__(self, log: Batch, config: CCILConfig, generator: torch.Generator) -> None:
        """``log`` are transitions that units are taken from."""
        super().__init__()
        o, a = log.observations.shape[-1], log.actions.shape[-1]
        self.layers = linear_layers(o + a, (*config.hidden, o), generator)
        self.linear = [x for x in self.layers if isinstance(x, nn.Linear)]
        self.most = config.lipschitz ** (1.0 / len(self.linear))  # of each layer
        changes = log.next_observations - log.observations
        std, device = changes.std(0, correction=0), generator.device
        self.register_buffer("center", changes.mean(0).to(device))
        self.register_buffer("scale", torch.where(std > 1e-6, std, 1.0).to(device))
        for i, layer in enumerate(self.linear):
            ones = torch.ones(layer.in_features, device=device)
            self.register_buffer(f"direction{i}", F.normalize(ones, dim=0))
        self.bound_()

    def changes(self, observations: Tensor, actions: Tensor) -> Tensor:
        """f, in units of observations, [B, O]."""
        outputs: Tensor = self.layers(torch.cat([observations, actions], dim=-1))
        return self.center + self.scale * outputs

    def loss(self, batch: Batch) -> tuple[Tensor]:
        """Mean squared error of the changes, each in units of its deviation."""
        changes = self.changes(batch.observations, batch.actions)
        errors = batch.observations + changes - batch.next_observations
        return ((errors / self.scale).square().mean(),)

    @torch.no_grad()
    def bound_(self) -> None:
        """Shrink each layer whose largest singular value is too large to what it may be.

        That is found by a step of the power iteration from where the last one ended.
        """
        for i, layer in enumerate(self.linear):
            direction = self.get_buffer(f"direction{i}")
            weight = layer.weight
            direction.copy_(F.normalize(weight.T @ (weight @ direction), dim=0))
            weight.mul_((self.most / (weight @ direction).norm()).clamp_max(1.0))


def require_continuous(log: Batch) -> None:
    """DataError if the log's observations are a few different ones: nothing is beside them."""
    found, steps = len(log.observations.unique(dim=0)), len(log.rewards)
    if found < FEWEST_STATES * steps:
        raise DataError(
            f"ccil takes states beside the log's, but in {steps:,} steps of the log there are "
            f"{found:,} different ones: these are discrete. Take bc."
        )


class CCIL:
    """The model, and the actor that imitates the log and the labels made of it."""

    Config = CCILConfig
    Online: type[OnlineAgent] | None = None
    kinds = (MIXTURE, CATEGORICAL)

    def __init__(self, setup: Setup, config: CCILConfig) -> None:
        self.config, self.actor = config, setup.networks.actor
        require_density(self.actor.kind, "The likelihood that ccil maximises")
        generator, compute = setup.generator, setup.compute
        self.log = _sample(setup.dataset, generator.device)
        require_continuous(self.log)
        self.model = LipschitzDynamics(self.log, config, generator)
        self.model_optimizer = Adam(self.model.parameters(), config.model_learning_rate)
        self.optimizer = Adam(self.actor.parameters(), config.learning_rate)
        self.learning_steps = round(config.share * setup.steps)
        self.updates = torch.zeros((), dtype=torch.int64)
        # The largest distance of a label, and error at a step, that are trusted: none before.
        self.thresholds = torch.full((2,), -1.0, device=generator.device)
        self._descend_model = Descent(self.model.loss, self.model_optimizer, compute)
        self._descend = Descent(self.loss, self.optimizer, compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {
            "actor": self.actor,
            "actor_optimizer": self.optimizer,
            "model": self.model,
            "model_optimizer": self.model_optimizer,
            "model_updates": self.updates,
            "thresholds": self.thresholds,
        }

    def labels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The states s~ [B, O] for the batch's actions; what they are judged by, [2, B].

        That is the distance |s~ - s|, and the error |s + f(s, a) - s'| at the step itself.
        """
        changes = self.model.changes(batch.observations, batch.actions)
        errors = batch.observations + changes - batch.next_observations
        return batch.observations - changes, torch.stack([changes, errors]).norm(dim=-1)

    @torch.no_grad()
    def measured(self) -> Tensor:
        """The thresholds [2]: quantiles over the log, of distances and errors."""
        _, judged = self.labels(self.log)
        shares = (self.config.nearest, self.config.accurate)
        return torch.stack([x.quantile(q) for x, q in zip(judged, shares, strict=True)])

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """``-log pi(a|s)``, mean over the batch and its trusted labels; (loss, their share)."""
        with torch.no_grad():
            states, judged = self.labels(batch)
            trusted = (judged <= self.thresholds.unsqueeze(-1)).all(0).to(states.dtype)
        both = self.actor.density(torch.cat([batch.observations, states]))
        logged, labelled = both.log_prob(batch.actions.repeat(2, 1)).chunk(2)
        weight = len(logged) + trusted.sum()
        return -(logged.sum() + (trusted * labelled).sum()) / weight, trusted.mean()

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One step of the actor and, at first, of the model; the last of these makes it trusted."""
        metrics = {}
        if int(self.updates) < self.learning_steps:
            metrics["model/loss"] = self._descend_model(batch)[0]
            self.model.bound_()
            self.updates += 1
            if int(self.updates) == self.learning_steps:
                self.thresholds.copy_(self.measured())
        loss, trusted = self._descend(batch)
        return metrics | {"actor/loss": loss, "actor/labels": trusted}


def _sample(dataset: Dataset, device: torch.device) -> Batch:
    """Whole episodes of a log, there."""
    sampled = dataset.sample(MEASURED_ROWS, 0).transitions
    return Batch(*(field.to(device) for field in sampled.tensors))
