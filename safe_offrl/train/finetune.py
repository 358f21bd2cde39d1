"""The online phase: collect, update, propose, measure, accept or keep.

A generator of episodes and iterations. Whoever drives it writes each episode to the ledger before
asking for the next, and may checkpoint at every event: there the state is whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from safe_offrl.agents import online_agent
from safe_offrl.agents.protocol import Setup
from safe_offrl.agents.steering import Steering
from safe_offrl.compute.device import Device
from safe_offrl.compute.state import Part, collect_state, named, restore_state
from safe_offrl.data.dataset import Dataset
from safe_offrl.data.episode_sums import fill_returns
from safe_offrl.data.experience import Experience
from safe_offrl.deploy.episodes import Reservation, faults_in_a_row, play_episode
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.env.adapter import AccidentEnv, episode_seed
from safe_offrl.errors import ConfigError
from safe_offrl.safety.deployment import Deployment
from safe_offrl.safety.monitor import SafetyMonitor
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.train.foundation import Foundation
from safe_offrl.train.iteration import UNTESTED, Iteration
from safe_offrl.types import Episode, Normalizer, States

UPDATE_STATES = 32  # estimate states per update of the safety critic
DECISION_STATES = 1000  # estimate states behind one decision on a candidate


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
        if config.budget < env.horizon:
            raise ConfigError(
                f"The budget is {config.budget} steps, too small for one episode of "
                f"{env.horizon} steps. Give --budget at least {env.horizon}."
            )
        self.config = config
        self.env = env
        self.normalizer = Normalizer.restored(pretrained)
        env.offset = self.normalizer.offset
        self.rng = np.random.default_rng(config.seed)
        # What learns, in the order in which it is drawn.
        self.foundation = base = Foundation.from_log(config, dataset, env.horizon, compiled, device)
        self.networks, self.limit, self.generator = base.networks, base.limit, base.generator
        logged = dataset.normalised(self.normalizer).on(self.generator.device)
        built_from = (self.networks, logged, self.limit, self.generator, base.compute)
        setup = Setup(*built_from, learner=config.cautious_learner)
        self.learner = online_agent(config.baseline.learner, setup, config.baseline.agents)
        self.critic = base.critic()
        self.multiplier = base.multiplier(config.baseline.gains)
        if not config.baseline.from_scratch:
            self._go_on_from(pretrained)
        init = config.baseline.multiplier_init
        start = float(self.multiplier.value) if init is None else init
        self.multiplier.begin_at(start if config.safety_constraint else 0.0)
        # What it learns from, and what judges it.
        self.experience = Experience(
            logged,
            config.budget,
            config.offline_share,
            steps=self.critic.outlook.steps,
            discount=self.critic.outlook.discount,
            device=self.generator.device,
        )
        self.monitor = SafetyMonitor(self.limit, config.safety.confidence)
        self.deployment = Deployment(
            self.networks.actor,
            self.critic,
            self.limit,
            config.safety.delta,
            config.acceptance,
            config.shielding,
            kl_limited=config.kl,
            safety_limited=config.safety_constraint,
            shield_acts=config.shield and pretrained_info["shield_acts"],
        )
        # Where it is.
        self.steps = self.episodes = self.iterations = 0
        self.updated = 0  # steps whose updates have been made; less than steps after an episode
        self.next_proposal = config.warmup_steps + config.iteration_steps
        self.stopped = ""
        self.fault = ""  # how the environment failed in the last episode, in words
        self._faults = 0  # episodes in a row that it has failed in

    def _go_on_from(self, pretrained: Mapping[str, Tensor]) -> None:
        """Take over values, safety critic and lambda of the offline phase."""
        owner = "agent" if self.learner.own_values else "learner"
        parts: dict[str, Part] = {
            **named(owner, self.learner.parts()),
            **self.critic.parts(),
            "multiplier": self.multiplier.value,
        }
        restore_state(parts, pretrained)

    @property
    def policy(self) -> DeployedPolicy:
        """What acts now, and acts on when the loop ends; a baseline's random warm-up apart."""
        deployment = self.deployment
        return DeployedPolicy.from_actor(
            deployment.actor, deployment.shield, self.normalizer, deployment.version
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
            if warming_up and config.baseline.from_scratch:
                due = 0
            # Metrics are this episode's alone: what an earlier one left is not in the checkpoint.
            metrics: dict[str, Tensor] = {}
            seen = self.limit.quantity.seen(self.monitor.recent)
            for _ in range(due):
                metrics |= self._update(seen, critics_only=warming_up)
            # A proposal, where one is due and there is something to judge it by.
            self.stopped = self._reason_to_stop()
            propose = (config.untested and not warming_up) or self.steps >= self.next_proposal
            if propose and self.experience.buffer.size:
                yield self._iterate({k: float(v) for k, v in metrics.items()})

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
            "phase": "warmup" if self.steps < config.warmup_steps else "online",
            "worst_cost": self.foundation.worst_cost,
        }
        if real:
            yield Reservation.for_episode(steps=self.env.horizon, **about)
        played = play_episode(self.env, self._acting(), about["seed"], self.rng)
        episode = played.recorded(**about)
        # A failing environment teaches nothing; so a fault that is on record leaves the same state.
        self._remember(episode, None if played.fault else played.rows)
        self.fault = played.fault
        yield episode
        self._faults = faults_in_a_row(self._faults, played.fault)

    def _remember(self, episode: Episode, rows: Tensor | None) -> None:
        """Count an episode and learn from its rows; without them there is nothing to learn."""
        self.steps += episode.steps
        self.episodes += 1
        if rows is not None:
            if self.learner.return_discount is not None:
                fill_returns(rows, self.experience.dataset.layout, self.learner.return_discount)
            self.experience.buffer.append(rows)
        else:
            self.updated = self.steps
            # The same noise is never used twice: it may be what brought the episode to its end.
            self.rng = np.random.default_rng([self.config.seed, 2, episode.index])
            if episode.version > self.deployment.version:  # lost, with its checkpoint
                self.deployment.version = episode.version + 1
        self.monitor.update(episode.accident, episode.cost, episode.version)

    def _estimate_states(self, size: int) -> States:
        """Estimate states of the deployed policy: starts, and for a cost its visits."""
        visited, length, latest = None, 0.0, self.config.visited_steps
        if self.critic.outlook.over_visits:
            visited = self.experience.buffer.draw_recent(latest, size, self.generator)
            length = self.experience.buffer.mean_episode_length(latest)
        starts = self.experience.draw_start_observations(size, self.generator)
        return self.critic.outlook.estimate_states(starts, visited, length)

    def _update(self, seen: float, *, critics_only: bool) -> dict[str, Tensor]:
        """UTD critic updates, one of the safety critic, one of the actor and the multiplier.

        ``seen``: what recent episodes show, in the critic's unit.
        """
        config, generator, experience = self.config, self.generator, self.experience
        # Critics of the reward.
        metrics: dict[str, Tensor] = {}
        batches = experience.batches(config.utd, config.batch_size, generator)
        for batch in batches:
            metrics |= self.learner.update_critics(batch)
        # Safety critic and lambda. The critic is of the policy that ACTS: its episodes are what it
        # is judged by, and the learner asks it what a change of an action does (CPO's advantage).
        if not config.unconstrained:
            risky, weights, spans = experience.stratified_batch(
                config.batch_size, config.critic.positive_share, generator
            )
            actor, states = self.deployment.actor, self._estimate_states(UPDATE_STATES)
            metrics |= self.critic.update(
                risky, weights, actor, states, generator, floor=seen, spans=spans
            )
            if config.safety_constraint and not critics_only:
                # A Lagrangian method steers by what really happened, and by all of it.
                self.multiplier.update(
                    metrics["csc/estimate"]
                    if config.baseline.multiplier == "ours"
                    else self.multiplier.value.new_tensor(self.monitor.recent_mean)
                )
        # Actor.
        if not critics_only:
            steering = Steering(
                self.critic.plain_risk if config.safety_constraint else None,
                self.multiplier.value,
                self.deployment.actor if config.kl else None,
                self.deployment.kl_weight,
            )
            metrics |= self.learner.update_actor(batches[-1], steering)
        return metrics

    def _reason_to_stop(self) -> str:
        return self.config.reason_to_stop(self.steps, self.monitor.accidents, self.env.horizon)

    def _iterate(self, metrics: dict[str, float]) -> Iteration:
        """Propose the learner to the deployment, or deploy it where nothing is to be tested."""
        config = self.config
        self.iterations += 1
        self.next_proposal = self.steps + config.iteration_steps
        # The policy that acts from now on: the learner untested, or what passes.
        if config.untested:
            self.deployment.deploy(self.networks.actor)
            decision, rolled_back = UNTESTED, False
        else:
            visited = self.experience.buffer.recent_visits(
                config.visited_steps, until_accident=self.limit.quantity.until_accident
            )
            states = self._estimate_states(DECISION_STATES)
            decision, rolled_back = self.deployment.propose(
                self.networks.actor, visited, states, self.monitor, self.generator
            )
            # The learner goes on from the policy that acts: KL is anchored there, not where it
            # drifted.
            self.networks.actor.load_state_dict(self.deployment.actor.state_dict())
        # The record, in the unit of the limit.
        return Iteration.from_decision(
            decision,
            self.limit,
            index=self.iterations - 1,
            step=self.steps,
            version=self.deployment.version,
            delta=float(self.deployment.delta),
            tail_ratio=self.config.acceptance.tail_ratio,
            multiplier=float(self.multiplier.value),
            kl_weight=float(self.deployment.kl_weight),
            alpha=float(self.critic.alpha),
            rolled_back=rolled_back,
            metrics=metrics,
        )

    def _parts(self) -> dict[str, Part]:
        return {
            **named("learner", self.learner.parts()),
            **self.critic.parts(),
            "multiplier": self.multiplier.value,
            **self.multiplier.parts(),
            **self.deployment.parts(),
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
            "iterations": self.iterations,
            **self.deployment.info(),
            "policy": self.policy.words(),
            "cost_max": self.foundation.cost_max,
            "worst_cost": self.foundation.worst_cost,
            "next_proposal": self.next_proposal,
            "stopped": self.stopped,
            "recent": self.monitor.recent,
            "monitor": self.monitor.state_dict(),
            "rng": self.rng.bit_generator.state,
        }

    def load(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict` and :meth:`info`, bitwise."""
        restore_state(self._parts(), tensors)
        prefix = "experience/"
        self.experience.buffer.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
        self.steps = int(info["steps"])
        self.episodes = int(info["episodes"])
        self.updated = int(info.get("updated", self.steps))
        self.iterations = int(info["iterations"])
        self.deployment.load(info)
        self.next_proposal = int(info["next_proposal"])
        self.stopped = str(info["stopped"])
        self.monitor.recent = list(info["recent"])
        self.monitor.load_state_dict(info["monitor"])
        self.rng.bit_generator.state = info["rng"]
