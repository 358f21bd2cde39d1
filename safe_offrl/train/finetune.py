"""The online phase: collect, update, propose, measure, accept or keep.

A generator of episodes and iterations. Whoever drives it writes each episode to the ledger before
asking for the next, and may checkpoint at every event: there the state is whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safe_offrl.agents import kind_of, online_agent
from safe_offrl.agents.extraction import usual_aversion
from safe_offrl.agents.protocol import Setup
from safe_offrl.agents.steering import Steering
from safe_offrl.compute.device import Device
from safe_offrl.compute.state import Part, collect_state, named, restore_state
from safe_offrl.data.dataset import Dataset
from safe_offrl.data.episode_sums import fill_returns
from safe_offrl.data.experience import Experience
from safe_offrl.data.sampling import Reach
from safe_offrl.deploy.episodes import Reservation, faults_in_a_row, play_episode
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.env.adapter import AccidentEnv, episode_seed
from safe_offrl.policies.kinds import KINDS
from safe_offrl.safety.constrained import constrained_parts
from safe_offrl.safety.deployment import Deployment
from safe_offrl.safety.monitor import SafetyMonitor
from safe_offrl.stats.fixed import shared_confidence
from safe_offrl.train.controllers import controller_for
from safe_offrl.train.decisions import Decisions
from safe_offrl.train.finetune_config import PROBATION_FAILED, FinetuneConfig
from safe_offrl.train.foundation import Foundation
from safe_offrl.train.iteration import Iteration
from safe_offrl.train.online_constraints import OnlineConstraints, guard_of, until_hand_over
from safe_offrl.types import Episode, Normalizer


class Finetuning:
    """State and loop of the online phase; resumable at every event and at the end."""

    def __init__(
        self,
        config: FinetuneConfig,
        env: AccidentEnv,
        dataset: Dataset,
        pretrained: Mapping[str, Tensor],
        pretrained_info: Mapping[str, Any],
        *,
        compiled: bool = False,
        device: Device = "cpu",
    ) -> None:
        config.require_an_episode(env.horizon)
        self.config = config
        self.env = env
        self.normalizer = Normalizer.restored(pretrained)
        env.offset = self.normalizer.offset
        self.rng = np.random.default_rng(config.seed)
        # What learns, in the order in which it is drawn.
        words = pretrained_info.get("policy", {})
        kind = KINDS[words["kind"]] if "kind" in words else None
        if config.baseline.from_scratch:  # not of another learner's kind, parts of which stay
            kind = kind_of(config.baseline.learner, discrete=dataset.discrete)
        self.foundation = base = Foundation.from_log(
            config, dataset, env.horizon, compiled, device, kind
        )
        self.networks, self.limits, self.generator = base.networks, base.limits, base.generator
        logged = dataset.normalised(self.normalizer)
        built_from = (self.networks, logged, self.limits, self.generator, base.compute)
        setup = Setup(
            *built_from,
            aversions=tuple(usual_aversion(limit.quantity) for limit in self.limits),
            learner=config.cautious_learner,
            offline_share=config.offline_share,
            controller=controller_for(config, env, self.normalizer),
        )
        self.learner = online_agent(config.baseline.learner, setup, config.baseline.agents)
        self.constraints = base.constraints()
        if not config.baseline.from_scratch:
            self._go_on_from(pretrained)
        init = config.baseline.multiplier_init
        for _, _, multiplier in self.constraints:
            start = float(multiplier.value) if init is None else init
            multiplier.begin_at(start if config.safety_constraint else 0.0)
        # What it learns from, and what judges it.
        self.experience = Experience(
            logged.on(self.generator.device),
            config.budget,
            config.offline_share,
            reaches=[
                Reach(critic.outlook.steps, critic.outlook.discount, limit.quantity.signal)
                for limit, critic, _ in self.constraints
            ],
            chunk=getattr(self.learner, "reach", None),
            device=self.generator.device,
        )
        confidence = shared_confidence(config.safety.confidence, len(self.limits))
        self.monitors = [SafetyMonitor(limit, confidence) for limit in self.limits]
        self.online = OnlineConstraints(
            config, self.constraints, self.monitors, self.experience, self.generator
        )
        self.deployment = Deployment(
            self.networks.actor,
            self.constraints[0].critic,
            self.limits[0],
            config.safety.delta,
            config.acceptance,
            config.shielding,
            kl_limited=config.kl,
            safety_limited=config.safety_constraint,
            shield_acts=config.shield and pretrained_info["shield_acts"],
        )
        self.guard = guard_of(
            config, self.constraints, self.networks.actor, pretrained, pretrained_info.get("guard")
        )
        self.decisions = Decisions(
            config, self.constraints, self.monitors, self.deployment, self.online, self.generator
        )
        # Where it is.
        self.steps = self.episodes = 0
        self.updated = 0  # steps whose updates have been made; less than steps after an episode
        self.next_proposal = config.warmup_steps + config.iteration_steps
        self.stopped = ""
        self.fault = ""  # how the environment failed in the last episode, in words
        self._faults = 0  # episodes in a row that it has failed in

    def _go_on_from(self, pretrained: Mapping[str, Tensor]) -> None:
        """Take over values, safety critic and lambda of the offline phase."""
        owner = "agent" if self.learner.own_values else "learner"
        fresh = getattr(self.learner, "fresh", ())
        learnt = {k: part for k, part in self.learner.parts().items() if k not in fresh}
        parts: dict[str, Part] = {
            **named(owner, learnt),
            **constrained_parts(self.constraints),
        }
        restore_state(parts, pretrained)

    @property
    def policy(self) -> DeployedPolicy:
        """What acts now, and acts on when the loop ends; a baseline's random warm-up apart."""
        deployment = self.deployment
        return DeployedPolicy.from_actor(
            deployment.actor, deployment.shield, self.normalizer, deployment.version, self.guard
        )

    def _acting(self) -> DeployedPolicy:
        """Who acts in the next episode: the deployed policy, or a baseline's random warm-up."""
        random = self.config.baseline.from_scratch and self.steps < self.config.warmup_steps
        return self.policy.at_random() if random else self.policy

    def run(self, recorded: Sequence[Episode] = ()) -> Iterator[Episode | Reservation | Iteration]:
        """Interact until the budget cannot hold another episode or accidents are used up.

        ``recorded`` are episodes that the ledger of a resumed run holds already. In a simulation
        they are played again, unless the environment failed in them; those, and in reality all,
        are counted as recorded. In reality a Reservation comes before each episode: its steps may
        be taken once it is on disk. EnvError if the environment fails in three episodes in a row.
        """
        config = self.config
        while not self.stopped:
            if self.updated == self.steps:  # else the resumed state is that of an episode's end
                # Of a run resumed after an episode that failed, nobody has asked this yet.
                self.stopped = self._reason_to_stop() if self.episodes >= len(recorded) else ""
                if self.stopped:
                    return
                yield from self._next_episode(recorded)
            # Updates that the interactions since the last ones pay for.
            previous, self.updated = self.updated, self.steps
            warming_up = previous < config.warmup_steps
            due = self.steps // config.update_every - previous // config.update_every
            testing = config.testing(self.steps)
            idle = testing or (warming_up and config.baseline.from_scratch)
            if idle or not self.experience.buffer.size:
                due = 0
            # Metrics are this episode's alone: what an earlier one left is not in the checkpoint.
            metrics: dict[str, Tensor] = {}
            seen = [m.limit.quantity.seen(m.recent) for m in self.monitors]
            for _ in range(due):
                metrics |= self._update(seen, critics_only=warming_up)
            # A proposal, where one is due and there is something to judge it by.
            self.stopped = self._reason_to_stop()
            if self.stopped == PROBATION_FAILED:
                return
            if testing and self.experience.buffer.size:
                yield from self.decisions.select(self.steps, last=bool(self.stopped))
                continue
            # What is handed over has acted: behind the last episode only an alarm may take it back.
            last = bool(self.stopped) and not (self.alarm and config.safety_constraint)
            propose = self.steps >= self.next_proposal and not last
            propose |= config.untested and not warming_up
            if propose and self.experience.buffer.size:
                self.next_proposal = self.steps + config.iteration_steps
                yield self.decisions.propose(
                    self.networks.actor, self.steps, {k: float(v) for k, v in metrics.items()}
                )

    def _next_episode(self, recorded: Sequence[Episode]) -> Iterator[Episode | Reservation]:
        """Play one episode, or count one of those that are on record; yields it."""
        config, index = self.config, self.episodes
        real = config.env.kind == "real"
        if index < len(recorded) and (real or recorded[index].outcome != "complete"):
            self._remember(recorded[index], None)
            yield recorded[index]
            return
        about: dict[str, Any] = {
            "index": index,
            "seed": episode_seed(config.seed, index, "finetune"),
            "steps_before": self.steps,
            "version": self.deployment.version,
            "phase": config.phase(self.steps),
            "worst_cost": self.foundation.worst_cost,
            "worst_signals": self.foundation.worst_signals,
        }
        if real:
            yield Reservation.for_episode(steps=self.env.horizon, **about)
        played = play_episode(self.env, self._acting(), about["seed"], self.rng)
        episode = played.recorded(**about)
        # A failing environment teaches nothing; so a fault that is on record leaves the same state.
        self._remember(episode, None if played.fault else played.rows, played.handed_over)
        self.fault = played.fault
        yield episode
        self._faults = faults_in_a_row(self._faults, played.fault)

    def _remember(
        self, episode: Episode, rows: Tensor | None, handed_over: Sequence[bool] = ()
    ) -> None:
        """Count an episode and learn from its rows; without them there is nothing to learn."""
        self.steps += episode.steps
        self.episodes += 1
        if rows is not None:
            if self.guard is not None and self.guard.until_end and any(handed_over):
                rows, handed_over = until_hand_over(rows, handed_over, self.foundation.layout), ()
            if self.learner.return_discount is not None:
                fill_returns(rows, self.experience.dataset.layout, self.learner.return_discount)
            handed = torch.tensor(handed_over) if any(handed_over) else None
            self.experience.buffer.append(rows, handed)
        else:
            self.updated = self.steps
            # The same noise is never used twice: it may be what brought the episode to its end.
            self.rng = np.random.default_rng([self.config.seed, 2, episode.index])
            if episode.version > self.deployment.version:  # lost, with its checkpoint
                self.deployment.version = episode.version + 1
        for monitor in self.monitors:
            seen = episode.accident, episode.cost, episode.version
            monitor.update(*seen, episode.signal_costs)
        self.decisions.see(episode)

    @property
    def monitor(self) -> SafetyMonitor:
        """That of the first limit."""
        return self.monitors[0]

    @property
    def alarm(self) -> bool:
        """Whether some policy is shown to have exceeded a limit."""
        return any(monitor.alarm for monitor in self.monitors)

    def _update(self, seen: Sequence[float], *, critics_only: bool) -> dict[str, Tensor]:
        """UTD critic updates, one of each safety critic and multiplier, one of the actor.

        ``seen``: what recent episodes show of each limit, in its critic's unit.
        """
        config, generator, experience = self.config, self.generator, self.experience
        # Critics of the reward.
        metrics: dict[str, Tensor] = {}
        batches = experience.batches(config.utd, config.batch_size, generator)
        for batch in batches:
            metrics |= self.learner.update_critics(batch)
        # Safety critics and lambdas.
        if not config.unconstrained:
            metrics |= self.online.update(self.deployment.actor, seen, critics_only=critics_only)
        # Actor.
        if not critics_only:
            steered = self.constraints if config.safety_constraint else ()
            steering = Steering(
                tuple(constraint.penalty(plain=True) for constraint in steered),
                self.deployment.actor if config.kl else None,
                self.deployment.kl_weight,
            )
            metrics |= self.learner.update_actor(batches[-1], steering)
        return metrics

    def _reason_to_stop(self) -> str:
        if self.config.probation and self.alarm and not self.decisions.iterations:
            return PROBATION_FAILED
        return self.config.reason_to_stop(self.steps, self.monitor.accidents, self.env.horizon)

    def _parts(self) -> dict[str, Part]:
        return {
            **named("learner", self.learner.parts()),
            **constrained_parts(self.constraints, controlled=True),
            **self.deployment.parts(),
            **self.decisions.selection.parts(),
            "generator": self.generator,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, as tensors."""
        return {
            **collect_state(self._parts()),
            **self.policy.tensors(),
            **{f"experience/{k}": v for k, v in self.experience.buffer.state_dict().items()},
        }

    def info(self) -> dict[str, Any]:
        """The rest of the state, JSON-able."""
        return {
            "steps": self.steps,
            "episodes": self.episodes,
            "updated": self.updated,
            **self.decisions.info(),
            **self.deployment.info(),
            "policy": self.policy.words(),
            **self.foundation.costs_info(),
            "next_proposal": self.next_proposal,
            "stopped": self.stopped,
            "recent": self.monitor.recent,
            "monitor": self.monitor.state_dict(),
            "further_monitors": [m.state_dict() | {"recent": m.recent} for m in self.monitors[1:]],
            "rng": self.rng.bit_generator.state,
        }

    def load(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict` and :meth:`info`, bitwise."""
        self.decisions.load(info)
        restore_state(self._parts(), tensors)
        prefix = "experience/"
        self.experience.buffer.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
        self.steps = int(info["steps"])
        self.episodes = int(info["episodes"])
        self.updated = int(info.get("updated", self.steps))
        self.deployment.load(info)
        self.next_proposal = int(info["next_proposal"])
        self.stopped = str(info["stopped"])
        self.monitor.recent = list(info["recent"])
        self.monitor.load_state_dict(info["monitor"])
        for monitor, state in zip(self.monitors[1:], info.get("further_monitors", []), strict=True):
            monitor.load_state_dict(state)
            monitor.recent = list(state["recent"])
        self.rng.bit_generator.state = info["rng"]
