"""The offline phase: an agent and the safety critic beside it, then value pre-alignment.

A generator of records: logging, checkpoints and the screen belong to the caller.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from safe_offrl.agents import find_agent, kind_of
from safe_offrl.agents.protocol import Setup
from safe_offrl.agents.rlpd import RLPD
from safe_offrl.agents.steering import Steering
from safe_offrl.compute.device import Device
from safe_offrl.compute.state import Part, collect_state, named, restore_state
from safe_offrl.data.dataset import Dataset
from safe_offrl.data.sampling import uniform_batches
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.safety.calibration import CalibrationReport, calibrate_critic
from safe_offrl.safety.constrained import constrained_parts, metric_name
from safe_offrl.safety.critic import RiskEstimate
from safe_offrl.safety.guard import Guard
from safe_offrl.safety.shield import Shield
from safe_offrl.train.fallback import Fallback
from safe_offrl.train.foundation import Foundation, settings_of
from safe_offrl.train.offline_constraints import OfflineConstraints
from safe_offrl.train.pretrain_config import PretrainConfig
from safe_offrl.types import Record

HELD_OUT_ROWS = 200_000  # transitions, about, that the critic is judged on: they lie in memory


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
            config,
            dataset,
            dataset.horizon,
            compiled,
            device,
            kind_of(config.agent, discrete=dataset.discrete),
        )
        self.networks, self.generator = base.networks, base.generator
        agent = find_agent(config.agent)
        built_from = (self.networks, self.train, base.limits, self.generator, base.compute)
        aversions = tuple(
            settings_of(config, "extraction", limit.quantity, config.extraction).aversion
            for limit in base.limits
        )
        setup = Setup(*built_from, config.extraction, aversions, steps=config.steps)
        self.agent = agent(setup, config.agents.settings_for(agent))
        self.learner = RLPD(self.networks, config.alignment, self.generator, base.compute)
        self.constraints = base.constraints()
        logged = self.train.on(self.generator.device)
        learnt_from = self.train, logged
        self.offline = OfflineConstraints(config, self.constraints, *learnt_from, self.generator)
        # What the guard falls back to.
        careful = config.fallback.steps > 0
        self._fallback = (
            Fallback(config, dataset, *learnt_from, compiled, device) if careful else None
        )
        # Where it is.
        self.step = 0
        self.reports: tuple[CalibrationReport, ...] = ()  # one a limit, made when training ends
        self._guard: Guard | None = None  # likewise; none if it must abstain
        self._metrics: dict[str, Tensor | float] = {}  # since the last record

    @property
    def total_steps(self) -> int:
        """Gradient steps of all parts."""
        return self._aligned + self._fallback_steps

    @property
    def begins(self) -> tuple[int, ...]:
        """The steps before the first of each part."""
        return 0, self.config.steps, self._aligned

    @property
    def _aligned(self) -> int:
        return self.config.steps + self.config.alignment_steps

    @property
    def _fallback_steps(self) -> int:
        return self.config.fallback_steps if self._fallback else 0

    def run(self) -> Iterator[Record]:
        """Train to the end, yielding a record every ``log_every`` steps."""
        return (record for record in self.steps() if record is not None)

    def steps(self) -> Iterator[Record | None]:
        """Train to the end, yielding after each step: the record that is due there, or None."""
        config = self.config
        while self.step < self.total_steps:
            if self._fallback is not None and self.step >= self._aligned:
                self._metrics |= self._fallback.update()
            else:
                self._metrics |= self._update(aligning=self.step >= config.steps)
            self.step += 1
            last = self.step == self.total_steps
            if last:
                # Whether shield and guard may act is part of the result, and of its checkpoint.
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
        (batch,) = uniform_batches(self.offline.rows, layout, 1, size, generator)
        if aligning:
            metrics = self.learner.update_critics(batch)
        else:
            steered = self.constraints if config.safety_constraint else ()
            steering = Steering(tuple(c.penalty(plain=False) for c in steered))
            metrics = self.agent.update(batch, steering)
        for i, (limit, critic, multiplier) in enumerate(self.constraints):
            found = self.offline.update(i, self.networks.actor, batch)
            # On the log's observations the expected cost stays near the log's own whatever the
            # policy does: dual ascent on it would wind lambda up. Online they are the policy's.
            steers = config.safety_constraint and not aligning
            if steers and not critic.outlook.over_visits:
                multiplier.update(found["csc/estimate"])
            found = {**found, "lambda": multiplier.value}
            metrics |= {metric_name(k, limit, first=not i): v for k, v in found.items()}
        return metrics

    def estimate(self, index: int = 0) -> RiskEstimate:
        """What is limited, of the limit at ``index``, under the present actor."""
        return self.offline.estimate(index, self.networks.actor)

    def calibrations(self) -> tuple[CalibrationReport, ...]:
        """The reports on the safety critics, one a limit, made when training ends."""
        return self.reports or self._calibrate()

    def _calibrate(self) -> tuple[CalibrationReport, ...]:
        actor = copy.deepcopy(self.networks.actor).cpu()
        reports = tuple(
            calibrate_critic(
                critic.in_memory(),
                actor,
                self.held_out.under(limit),
                self.estimate(i),
                limit,
                self._logged_episodes,
            )
            for i, (limit, critic, _) in enumerate(self.constraints)
        )
        if self._fallback is None:
            return reports
        # The guard.
        refusals = self._fallback.refusals(self.held_out, self._logged_episodes)
        watched = [not refused for refused in refusals]
        self._guard = self._fallback.guard(actor, watched) if any(watched) else None
        return tuple(
            replace(report, guard_refusals=refused)
            for report, refused in zip(reports, refusals, strict=True)
        )

    def _parts(self) -> dict[str, Part]:
        return {
            **named("agent", self.agent.parts()),
            **named("learner", self.learner.parts()),
            **constrained_parts(self.constraints),
            **self.normalizer.parts(),
            "generator": self.generator,
            **(self._fallback.parts() if self._fallback else {}),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        guard = self._guard.tensors() if self._guard else {}
        return {**collect_state(self._parts()), **self.policy.tensors(), **guard}

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
            "guard": self._guard.words() if self._guard else None,
            **self.foundation.costs_info(),
            **({"unlogged": unlogged} if unlogged else {}),
        }

    def load(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict` and :meth:`info`, bitwise."""
        restore_state(self._parts(), tensors)
        self.step = int(info["step"])
        self._metrics = dict(info.get("unlogged", {}))
