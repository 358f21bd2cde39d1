"""The limits of an online phase: what their critics and multipliers learn, and how they judge."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from safe_offrl.data.experience import Experience
from safe_offrl.policies.networks import Actor
from safe_offrl.safety.acceptance import Judge
from safe_offrl.safety.constrained import Constrained, metric_name
from safe_offrl.safety.guard import Guard, Watch
from safe_offrl.safety.monitor import SafetyMonitor
from safe_offrl.safety.outlook import Outlook
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.types import Layout, States

UPDATE_STATES = 32  # estimate states per update of a safety critic
DECISION_STATES = 1000  # estimate states behind one decision on a candidate


class OnlineConstraints:
    """Each limit with its monitor, and the experience that its critic learns from."""

    def __init__(
        self,
        config: FinetuneConfig,
        constraints: Sequence[Constrained],
        monitors: Sequence[SafetyMonitor],
        experience: Experience,
        generator: torch.Generator,
    ) -> None:
        self._config = config
        self._constraints, self._monitors = constraints, monitors
        self._experience, self._generator = experience, generator

    def update(
        self, acting: Actor, seen: Sequence[float], *, critics_only: bool
    ) -> dict[str, Tensor]:
        """One step of each safety critic and, unless ``critics_only``, of each lambda.

        The critics are of the policy that ACTS: its episodes are what it is judged by, and the
        learner asks them what a change of an action does (CPO's advantage). ``seen``: what recent
        episodes show of each limit, in its critic's unit.
        """
        metrics: dict[str, Tensor] = {}
        for index, floor in enumerate(seen):
            found = self._step(index, acting, floor, critics_only=critics_only)
            limit = self._constraints[index].limit
            metrics |= {metric_name(k, limit, first=not index): v for k, v in found.items()}
        return metrics

    def _step(
        self, index: int, acting: Actor, floor: float, *, critics_only: bool
    ) -> dict[str, Tensor]:
        config, generator = self._config, self._generator
        _, critic, multiplier = self._constraints[index]
        risky, weights, spans = self._experience.stratified_batch(
            config.batch_size, critic.config.positive_share, generator, index
        )
        states = self._estimate_states(critic.outlook, UPDATE_STATES)
        metrics = critic.update(risky, weights, acting, states, generator, floor=floor, spans=spans)
        if config.safety_constraint and not critics_only:
            # A Lagrangian method steers by what really happened, and by all of it.
            multiplier.update(
                metrics["csc/estimate"]
                if config.baseline.multiplier == "ours"
                else multiplier.value.new_tensor(self._monitors[index].recent_mean)
            )
        return metrics

    def judges(self) -> list[Judge]:
        """What a proposal is held against, one a limit."""
        return [self._judge(constraint) for constraint in self._constraints]

    @property
    def _latest(self) -> int:
        """Steps whose states stand for what the deployed policy visits."""
        config, buffer = self._config, self._experience.buffer
        return max(config.visited_steps, buffer.steps_of_recent(config.visited_episodes))

    def _judge(self, constraint: Constrained) -> Judge:
        limit, critic, _ = constraint
        visited = self._experience.buffer.recent_visits(
            self._latest, until_accident=limit.quantity.until_accident
        )
        states = self._estimate_states(critic.outlook, DECISION_STATES)
        return Judge(limit, critic, visited, states)

    def _estimate_states(self, outlook: Outlook, size: int) -> States:
        """Estimate states of the deployed policy: starts, and for a cost its visits."""
        visited, length, latest = None, 0.0, self._latest
        if outlook.over_visits:
            visited = self._experience.buffer.draw_recent(latest, size, self._generator)
            length = self._experience.buffer.mean_episode_length(latest)
        starts = self._experience.draw_start_observations(size, self._generator)
        return outlook.estimate_states(starts, visited, length)


def guard_of(
    config: FinetuneConfig,
    constraints: Sequence[Constrained],
    actor: Actor,
    pretrained: Mapping[str, Tensor],
    words: Mapping[str, Any] | None,
) -> Guard | None:
    """The guard that a pretrain run left, by its tensors and words, held to the limits of this run.

    ``actor`` and the critics of ``constraints`` are still the pretrained ones. None where the guard
    is off or must abstain, or the pretrain run is of an earlier version.
    """
    if not config.guard:
        return None
    if config.baseline.sooper:
        watches = [Watch.from_critic(c.limit, c.critic, pushed=True) for c in constraints]
        return Guard([copy.deepcopy(actor).cpu()], watches, until_end=True)
    if words is None:
        return None
    sizes = actor.observation_size, actor.action_size
    guard = Guard.restored(pretrained, words, sizes, actor.kind)
    guard = guard.held_to([constraint.limit for constraint in constraints], config.guarding)
    return guard if guard.watches else None


def until_hand_over(rows: Tensor, handed_over: Sequence[bool], layout: Layout) -> Tensor:
    """The rows [n, D] before the first hand-over, which ends the episode: nothing is behind it."""
    kept = rows[: list(handed_over).index(True)]
    layout.unpack(kept).terminated[-1:] = 1.0
    return kept
