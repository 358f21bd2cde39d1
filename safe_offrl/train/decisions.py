"""Who acts next in the online phase: what the learner proposes, or the best that has acted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from safe_offrl.policies.networks import Actor
from safe_offrl.safety.acceptance import Decision
from safe_offrl.safety.constrained import Constrained
from safe_offrl.safety.deployment import Deployment
from safe_offrl.safety.monitor import SafetyMonitor
from safe_offrl.safety.selection import Selection
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.train.iteration import Iteration, untested
from safe_offrl.train.online_constraints import OnlineConstraints
from safe_offrl.types import Episode

SELECTED = "selected: "  # so begins the reason why a version that has acted acts again


class Decisions:
    """Changes who is deployed, and says what each change means."""

    def __init__(
        self,
        config: FinetuneConfig,
        constraints: Sequence[Constrained],
        monitors: Sequence[SafetyMonitor],
        deployment: Deployment,
        online: OnlineConstraints,
        generator: torch.Generator,
    ) -> None:
        self._config, self._constraints, self._monitors = config, constraints, monitors
        self._deployment, self._online, self._generator = deployment, online, generator
        self._limits = [constraint.limit for constraint in constraints]
        self.selection = Selection(config.selection, self._limits)
        self.iterations = 0

    def see(self, episode: Episode) -> None:
        """Remember what an episode of the deployed policy says of it."""
        deployment = self._deployment
        if self._config.selects and episode.version == deployment.version:
            self.selection.see(
                episode.version,
                deployment.actor,
                deployment.shield,
                episode.episode_return if episode.outcome == "complete" else None,
                [limit.outcome_of(episode) for limit in self._limits],
                testing=episode.phase == "testing",
            )

    def propose(self, learner: Actor, step: int, metrics: dict[str, float]) -> Iteration:
        """Propose the learner to the deployment, or deploy it where nothing is to be tested."""
        config, before = self._config, self._deployment.version
        # The policy that acts from now on: the learner untested, or what passes.
        if config.untested:
            self._deployment.deploy(learner)
            decision, rolled_back = untested(len(self._limits)), False
        else:
            judges, confidence = self._online.judges(), config.safety.confidence
            decision, rolled_back = self._deployment.propose(
                learner, judges, self._monitors, confidence, self._generator
            )
            # The learner goes on from the policy that acts: KL is anchored there, not where it
            # drifted.
            learner.load_state_dict(self._deployment.actor.state_dict())
        if self._deployment.version != before:
            self.selection.moved(back=rolled_back)
        return self._recorded(decision, step, metrics, rolled_back=rolled_back)

    def select(self, step: int, *, last: bool) -> Iterator[Iteration]:
        """Let the version act that is best by its episodes, if it is another one."""
        alarming = [monitor for monitor in self._monitors if monitor.alarm]
        chosen = self.selection.choose(last=last, exceeded=bool(alarming))
        if chosen is None:
            return
        for monitor in alarming:
            monitor.reset_alarm()
        decision = self._deployment.put_back(
            chosen.actor,
            chosen.shield,
            SELECTED + self.selection.words(),
            self.selection.realised(),
            self._online.judges(),
            self._config.safety.confidence,
            self._generator,
        )
        yield self._recorded(decision, step, {}, rolled_back=True)

    def _recorded(
        self, decision: Decision, step: int, metrics: dict[str, float], *, rolled_back: bool
    ) -> Iteration:
        """The record of a decision, in the units of the limits."""
        self.iterations += 1
        return Iteration.from_decision(
            decision,
            self._constraints,
            index=self.iterations - 1,
            step=step,
            version=self._deployment.version,
            delta=float(self._deployment.delta),
            tail_ratio=self._config.acceptance.tail_ratio,
            kl_weight=float(self._deployment.kl_weight),
            rolled_back=rolled_back,
            metrics=metrics,
        )

    def info(self) -> dict[str, Any]:
        """What a checkpoint keeps besides ``selection.parts``, JSON-able."""
        return {"iterations": self.iterations, "selection": self.selection.info()}

    def load(self, info: Mapping[str, Any]) -> None:
        """Continue from :meth:`info`; the parts are restored next."""
        self.iterations = int(info["iterations"])
        deployed = self._deployment
        if "selection" in info:  # runs of earlier versions have none
            self.selection.load(info["selection"], deployed.actor, deployed.shield)
