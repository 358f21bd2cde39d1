"""The offline phase: an agent and the safety critic beside it, then value pre-alignment.

A generator of records: logging, checkpoints and the screen belong to the caller.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from safe_offrl.agents import find_agent
from safe_offrl.agents.protocol import Setup
from safe_offrl.agents.rlpd import RLPD
from safe_offrl.agents.steering import Steering
from safe_offrl.compute.device import Device
from safe_offrl.compute.state import Part, collect_state, named, restore_state, seeded
from safe_offrl.data.dataset import Dataset
from safe_offrl.data.sampling import RiskSampler, draw_indices, uniform_batches
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.safety.calibration import CalibrationReport, calibrate_critic
from safe_offrl.safety.constrained import Constrained, constrained_parts, metric_name
from safe_offrl.safety.critic import RiskEstimate
from safe_offrl.safety.shield import Shield
from safe_offrl.train.foundation import Foundation, settings_of
from safe_offrl.train.pretrain_config import PretrainConfig
from safe_offrl.types import Batch, Record

HELD_OUT_ROWS = 200_000  # transitions, about, that the critic is judged on: they lie in memory
START_STATES = 64  # start states per update of the safety critic
ESTIMATE_STATES = 2000  # policy actions behind one estimate of what is constrained


class Pretraining:
    """State and loop of the offline phase; resumable after every step."""

    def __init__(
        self,
        config: PretrainConfig,
        dataset: Dataset,
        *,
        compiled: bool = False,
        device: Device = "cpu",
    ) -> None:
        self.config = config
        self._logged_episodes = dataset.episodes
        train, held_out = dataset.split(config.held_out, config.seed)
        # No network should have to learn the units of a robot's joints or a plant's pressures.
        self.normalizer = train.normalizer()._replace(reward_scale=dataset.reward_scale())
        self.train = train.normalised(self.normalizer)
        self.held_out = held_out.sample(HELD_OUT_ROWS, config.seed).normalised(self.normalizer)
        # What learns, in the order in which it is drawn.
        self.foundation = base = Foundation.from_log(
            config, dataset, dataset.horizon, compiled, device
        )
        self.networks, self.generator = base.networks, base.generator
        agent = find_agent(config.agent)
        built_from = (self.networks, self.train, base.limits, self.generator, base.compute)
        aversions = tuple(
            settings_of(config, "extraction", limit.quantity, config.extraction).aversion
            for limit in base.limits
        )
        setup = Setup(*built_from, config.extraction, aversions)
        self.agent = agent(setup, config.agents.settings_for(agent))
        self.learner = RLPD(self.networks, config.alignment, self.generator, base.compute)
        self.constraints = base.constraints()
        for _, critic, _ in self.constraints:
            critic.start_from(critic.outlook.first_logit(self.train))
        # What it learns from.
        logged = self.train.on(self.generator.device)
        self._risky = [
            RiskSampler.from_dataset(
                logged,
                steps=critic.outlook.steps,
                discount=critic.outlook.discount,
                device=self.generator.device,
            )
            for _, critic, _ in self.constraints
        ]
        self._rows = logged.rows
        self._starts = logged.initial_observations.to(self.generator.device)
        self._steps_per_episode = float(self.train.episode_lengths.mean())
        # Where it is.
        self.step = 0
        self.reports: tuple[CalibrationReport, ...] = ()  # one a limit, made when training ends
        self._metrics: dict[str, Tensor | float] = {}  # since the last record

    @property
    def total_steps(self) -> int:
        """Gradient steps of both parts."""
        return self.config.steps + self.config.alignment_steps

    def run(self) -> Iterator[Record]:
        """Train to the end, yielding a record every ``log_every`` steps."""
        return (record for record in self.steps() if record is not None)

    def steps(self) -> Iterator[Record | None]:
        """Train to the end, yielding after each step: the record that is due there, or None."""
        config = self.config
        while self.step < self.total_steps:
            self._metrics |= self._update(aligning=self.step >= config.steps)
            self.step += 1
            last = self.step == self.total_steps
            if last:
                # Whether the shield may act is part of the result, and so of the last checkpoint.
                self.reports = self._calibrate()
            record = None
            if last or self.step % config.log_every == 0:
                values = {f"offline/{k}": float(v) for k, v in self._metrics.items()}
                record, self._metrics = Record(self.step, values), {}
            yield record

    def _update(self, *, aligning: bool) -> dict[str, Tensor]:
        # The agent, or, in alignment, the critics alone.
        config, generator = self.config, self.generator
        layout, size = self.train.layout, config.batch_size
        (batch,) = uniform_batches(self._rows, layout, 1, size, generator)
        if aligning:
            metrics = self.learner.update_critics(batch)
        else:
            steering = Steering(tuple(c.penalty(plain=False) for c in self.constraints))
            metrics = self.agent.update(batch, steering)
        for i, constraint in enumerate(self.constraints):
            found = self._update_constraint(constraint, self._risky[i], batch, aligning=aligning)
            metrics |= {metric_name(k, constraint.limit, first=not i): v for k, v in found.items()}
        return metrics

    def _update_constraint(
        self, constraint: Constrained, risky: RiskSampler, batch: Batch, *, aligning: bool
    ) -> dict[str, Tensor]:
        """One step of a limit's safety critic, and one of its lambda."""
        config, generator, (_, critic, multiplier) = self.config, self.generator, constraint
        # The safety critic.
        drawn, weights, spans = risky.draw(
            config.batch_size, critic.config.positive_share, generator
        )
        starts = self._starts[draw_indices(len(self._starts), START_STATES, generator)]
        states = critic.outlook.estimate_states(starts, batch, self._steps_per_episode)
        metrics = critic.update(drawn, weights, self.networks.actor, states, generator, spans=spans)
        # Lambda. On the log's observations the expected cost stays near the log's own whatever the
        # policy does: dual ascent on it would only wind lambda up. Online they are the policy's.
        if not aligning and not critic.outlook.over_visits:
            multiplier.update(metrics["csc/estimate"])
        return {**metrics, "lambda": multiplier.value}

    def estimate(self, constraint: Constrained | None = None) -> RiskEstimate:
        """What is constrained, under the present actor: over the log's start states, or its states.

        Of the first limit if none is given. The states of the log are those of its behaviours, not
        of the actor: for the expected cost the estimate is of first order in what sets them apart.
        """
        critic = (constraint or self.constraints[0]).critic
        generator = seeded(self.config.seed, self.generator.device)
        index = draw_indices(len(self._starts), ESTIMATE_STATES, generator)
        logged = None
        if critic.outlook.over_visits:
            (logged,) = uniform_batches(
                self._rows, self.train.layout, 1, ESTIMATE_STATES, generator
            )
        states = critic.outlook.estimate_states(
            self._starts[index], logged, self._steps_per_episode
        )
        return critic.estimate(
            self.networks.actor, states, generator, self.config.safety.confidence
        )

    def calibrations(self) -> tuple[CalibrationReport, ...]:
        """The reports on the safety critics, one a limit, made when training ends."""
        return self.reports or self._calibrate()

    def _calibrate(self) -> tuple[CalibrationReport, ...]:
        actor = copy.deepcopy(self.networks.actor).cpu()
        return tuple(
            calibrate_critic(
                constraint.critic.in_memory(),
                actor,
                self.held_out,
                self.estimate(constraint),
                constraint.limit,
                self._logged_episodes,
            )
            for constraint in self.constraints
        )

    def _parts(self) -> dict[str, Part]:
        return {
            **named("agent", self.agent.parts()),
            **named("learner", self.learner.parts()),
            **constrained_parts(self.constraints),
            **self.normalizer.parts(),
            "generator": self.generator,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        return {**collect_state(self._parts()), **self.policy.tensors()}

    @property
    def policy(self) -> DeployedPolicy:
        """What has been learnt to act, by itself: its accident rate is what is estimated."""
        return DeployedPolicy.from_actor(
            self.networks.actor, Shield.abstaining(), self.normalizer, 0
        )

    def info(self) -> dict[str, Any]:
        """The part of the state that is not tensors; JSON-able."""
        acts = self.reports[0].shield_acts if self.reports else False
        unlogged = [(k, float(v)) for k, v in self._metrics.items()]  # in this order
        return {
            "step": self.step,
            "shield_acts": acts,
            "policy": self.policy.words(),
            "cost_max": self.foundation.cost_max,
            "worst_cost": self.foundation.worst_cost,
            **({"unlogged": unlogged} if unlogged else {}),
        }

    def load(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict` and :meth:`info`, bitwise."""
        restore_state(self._parts(), tensors)
        self.step = int(info["step"])
        self._metrics = dict(info.get("unlogged", {}))
