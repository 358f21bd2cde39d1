"""The online phase: collect, update, propose, measure, accept or keep.

A generator of episodes and iterations. Whoever drives it writes each episode to the ledger before
asking for the next, and may checkpoint at every event: there the state is whole.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safe_offrl.agents import online_agent
from safe_offrl.agents.protocol import Setup
from safe_offrl.agents.steering import Steering
from safe_offrl.compute.descent import Compute
from safe_offrl.compute.device import Device
from safe_offrl.compute.state import Part, collect_state, named, restore_state, seeded
from safe_offrl.data.dataset import Dataset
from safe_offrl.data.derived import returns_to_go
from safe_offrl.data.experience import Experience
from safe_offrl.deploy.episodes import Reservation, faults_in_a_row, play_episode
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.env.adapter import AccidentEnv, episode_seed
from safe_offrl.errors import ConfigError
from safe_offrl.policies.acting import UniformActor
from safe_offrl.policies.kinds import kind_for
from safe_offrl.policies.networks import Networks
from safe_offrl.safety.acceptance import Decision
from safe_offrl.safety.critic import SafetyCritic
from safe_offrl.safety.deployment import Deployment
from safe_offrl.safety.monitor import SafetyMonitor
from safe_offrl.safety.multiplier import Multiplier, PIDMultiplier
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.train.iteration import UNTESTED, Iteration
from safe_offrl.types import Episode, Normalizer, States

REFERENCE_STATES = 32  # start (and visited) states per update of the safety critic
ESTIMATE_STATES = 1000  # states behind one estimate of what is constrained
# Episodes whose outcome the critic must not fall below: one accident says little, one cost more.
RECENT_EPISODES = {"accident": 100, "cost": 10}


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
        self.generator = seeded(config.seed, device)
        self.rng = np.random.default_rng(config.seed)
        layout = dataset.layout
        self.networks = Networks(
            *layout, config.networks, self.generator, kind_for(discrete=dataset.discrete)
        )
        learner = config.learner
        if config.safety_constraint:
            learner = replace(
                learner,
                target_entropy=config.cautious_entropy,
                discrete_entropy=config.cautious_discrete_entropy,
            )
        compute = Compute(compiled, config.precision, device)
        baseline = config.baseline
        self.cost_max = dataset.cost_max
        self.limit = config.safety.limit(env.horizon, self.cost_max)
        self.worst_cost = self.limit.worst_cost(dataset.worst_cost)
        logged = dataset.normalised(self.normalizer).on(self.generator.device)
        setup = Setup(self.networks, logged, self.limit, self.generator, compute, learner=learner)
        self.learner = online_agent(baseline.learner, setup, baseline.agents)
        self.critic = SafetyCritic(
            *layout,
            env.horizon,
            config.critic,
            self.generator,
            self.cost_max if self.limit.constraint == "cost" else None,
            compute,
        )
        self.experience = Experience(
            logged,
            config.budget,
            config.offline_share,
            steps=self.critic.steps,
            discount=config.critic.cost_discount,
            device=self.generator.device,
        )
        self.multiplier = self._multiplier()
        if not baseline.from_scratch:
            owner = "agent" if self.learner.own_values else "learner"
            restore_state(
                {
                    **named(owner, self.learner.parts()),
                    **self.critic.parts(),
                    "multiplier": self.multiplier.value,
                },
                pretrained,
            )
        if not config.safety_constraint:
            self.multiplier.value.zero_()
        elif baseline.multiplier_init is not None:
            self.multiplier.value.fill_(baseline.multiplier_init)
        if isinstance(self.multiplier, PIDMultiplier):
            self.multiplier.integral.copy_(self.multiplier.value)
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
        self.recent: list[float] = []
        self.steps = self.episodes = self.iterations = 0
        self.updated = 0  # steps whose updates have been made; less than steps after an episode
        self.next_proposal = config.warmup_steps + config.iteration_steps
        self.stopped = ""
        self.fault = ""  # how the environment failed in the last episode, in words
        self._faults = 0  # episodes in a row that it has failed in

    def _multiplier(self) -> Multiplier | PIDMultiplier:
        lagrangian, baseline = self.config.lagrangian, self.config.baseline
        device = self.generator.device
        if baseline.multiplier != "pid":
            return Multiplier(lagrangian, self.limit.share, device)
        limit = lagrangian.aim * self.limit.share
        return PIDMultiplier(baseline.pid, lagrangian.init, limit, lagrangian.maximum, device)

    @property
    def policy(self) -> DeployedPolicy:
        """What acts now, and acts on when the loop ends; a baseline's random warm-up apart."""
        deployment = self.deployment
        return DeployedPolicy.of(
            deployment.actor, deployment.shield, self.normalizer, deployment.version
        )

    def _acting(self) -> DeployedPolicy:
        """Who acts in the next episode: the deployed policy, or a baseline's random warm-up."""
        policy = self.policy
        if self.config.baseline.from_scratch and self.steps < self.config.warmup_steps:
            actor = policy.actor
            uniform = UniformActor(actor.kind, actor.action_size)
            return policy._replace(sampler=uniform)
        return policy

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
                # Resumed after an episode that the environment failed in, nobody has asked yet.
                self.stopped = self._reason_to_stop() if self.episodes >= len(recorded) else ""
                if self.stopped:
                    return
                yield from self._next_episode(recorded)
            previous, self.updated = self.updated, self.steps
            warming_up = previous < config.warmup_steps
            due = self.steps // config.update_every - previous // config.update_every
            if warming_up and config.baseline.from_scratch:
                due = 0
            # Of this episode's updates alone: what an earlier one left is not in the checkpoint.
            metrics: dict[str, Tensor] = {}
            seen = self._seen()
            for _ in range(due):
                metrics |= self._update(seen, critics_only=warming_up)
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
            "worst_cost": self.worst_cost,
        }
        if real:
            yield Reservation.of(steps=self.env.horizon, **about)
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
                self._fill_returns(rows, self.learner.return_discount)
            self.experience.add_episode(rows)
        else:
            self.updated = self.steps
            # Never the same noise twice: it may be what brought the episode to its end.
            self.rng = np.random.default_rng([self.config.seed, 2, episode.index])
            if episode.version > self.deployment.version:  # lost, with its checkpoint
                self.deployment.version = episode.version + 1
        outcome = self.limit.outcome(episode.accident, episode.cost)
        self.recent = [*self.recent, outcome][-RECENT_EPISODES[self.limit.constraint] :]
        self.monitor.update(episode.accident, episode.cost, episode.version)

    def _fill_returns(self, rows: Tensor, discount: float) -> None:
        """Return-to-go of an episode's rows [n, D], in place: the log's have it already."""
        batch = self.experience.dataset.layout.unpack(rows)
        returns = returns_to_go(batch.rewards.numpy(), np.array([0, len(rows)]), discount)
        batch.return_to_go.copy_(torch.from_numpy(returns))

    def _reference(self, size: int) -> States:
        """States for an estimate under the deployed policy: starts, and for a cost its visits."""
        visited, length, latest = None, 0.0, self.config.visited_steps
        if self.limit.constraint == "cost":
            visited = self.experience.recent(latest, size, self.generator)
            length = self.experience.mean_length(latest)
        starts = self.experience.start_states(size, self.generator)
        return self.critic.reference_states(starts, visited, length)

    def _seen(self) -> float:
        """What recent episodes show, in the critic's unit: the accident rate, or the cost.

        Of the cost it is the mean less a standard error. One episode that was stuck in a hazard can
        cost more than the limits of ten; taken at its word it would hold every estimate above the
        limit, and lambda rising, for as long as it is among the recent ones.
        """
        if self.limit.constraint == "accident":
            return self._recent_mean()
        if len(self.recent) < 2:
            return 0.0
        error = statistics.stdev(self.recent) / math.sqrt(len(self.recent))
        return max(self._recent_mean() - error, 0.0)

    def _recent_mean(self) -> float:
        return sum(self.recent) / len(self.recent)

    def _update(self, seen: float, *, critics_only: bool) -> dict[str, Tensor]:
        """UTD critic updates, one of the safety critic, one of the actor and the multiplier.

        ``seen``: what recent episodes show, see :meth:`_seen`.
        """
        config, generator, experience = self.config, self.generator, self.experience
        metrics: dict[str, Tensor] = {}
        batches = experience.batches(config.utd, config.batch_size, generator)
        for batch in batches:
            metrics |= self.learner.update_critics(batch)
        # The safety critic learns the value of the policy that ACTS: it is judged by its episodes,
        # and the learner asks it what a change of one action would do (CPO's advantage).
        if not config.unconstrained:
            risky, weights, spans = experience.stratified_batch(
                config.batch_size, config.critic.positive_share, generator
            )
            metrics |= self.critic.update(
                risky,
                weights,
                self.deployment.actor,
                self._reference(REFERENCE_STATES),
                generator,
                floor=seen,
                spans=spans,
            )
            if config.safety_constraint and not critics_only:
                # A Lagrangian method steers by what really happened, and by all of it.
                self.multiplier.update(
                    metrics["csc/estimate"]
                    if config.baseline.multiplier == "ours"
                    else self.multiplier.value.new_tensor(self._recent_mean())
                )
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
        allowed = self.config.accident_budget
        if allowed is not None and self.monitor.accidents >= allowed:
            return f"the accident budget of {allowed} is spent"
        budget, horizon = self.config.budget, self.env.horizon
        left = budget - self.steps
        if left >= horizon:
            return ""
        if left:
            words = f"steps are left, fewer than an episode of {horizon:,} may take"
            return f"{left:,} of {budget:,} {words}"
        return "the budget is spent"

    def _iterate(self, metrics: dict[str, float]) -> Iteration:
        """Propose the learner to the deployment, or deploy it where nothing is to be tested."""
        config = self.config
        self.iterations += 1
        self.next_proposal = self.steps + config.iteration_steps
        if config.untested:
            self.deployment.deploy(self.networks.actor)
            return self._record(UNTESTED, metrics, rolled_back=False)
        decision, rolled_back = self.deployment.propose(
            self.networks.actor,
            self.experience.lived(
                config.visited_steps, until_accident=self.limit.constraint == "accident"
            ),
            self._reference(ESTIMATE_STATES),
            self.monitor,
            self.generator,
        )
        # The learner goes on from the policy that acts: KL is anchored there, not where it drifted.
        self.networks.actor.load_state_dict(self.deployment.actor.state_dict())
        return self._record(decision, metrics, rolled_back=rolled_back)

    def _record(
        self, decision: Decision, metrics: dict[str, float], *, rolled_back: bool
    ) -> Iteration:
        return Iteration.of(
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
            **{f"experience/{k}": v for k, v in self.experience.state_dict().items()},
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
            "cost_max": self.cost_max,
            "worst_cost": self.worst_cost,
            "next_proposal": self.next_proposal,
            "stopped": self.stopped,
            "recent": self.recent,
            "monitor": self.monitor.state_dict(),
            "rng": self.rng.bit_generator.state,
        }

    def load(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict` and :meth:`info`, bitwise."""
        restore_state(self._parts(), tensors)
        prefix = "experience/"
        self.experience.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
        self.steps = int(info["steps"])
        self.episodes = int(info["episodes"])
        self.updated = int(info.get("updated", self.steps))
        self.iterations = int(info["iterations"])
        self.deployment.load(info)
        self.next_proposal = int(info["next_proposal"])
        self.stopped = str(info["stopped"])
        self.recent = list(info["recent"])
        self.monitor.load_state_dict(info["monitor"])
        self.rng.bit_generator.state = info["rng"]
