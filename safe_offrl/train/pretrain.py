"""The offline phase: an agent and the safety critic beside it, then value pre-alignment.

A generator of records: logging, checkpoints and the screen belong to the caller.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from safe_offrl.agents import AgentConfigs, find_agent
from safe_offrl.agents.extraction import ExtractionConfig
from safe_offrl.agents.protocol import Setup
from safe_offrl.agents.rlpd import RLPD, RLPDConfig
from safe_offrl.agents.steering import Steering
from safe_offrl.compute.descent import CompileMode, Compute, Precision
from safe_offrl.compute.device import Device, DeviceChoice
from safe_offrl.compute.state import Part, collect_state, named, restore_state, seeded
from safe_offrl.data.dataset import Dataset
from safe_offrl.data.sampling import RiskSampler, draw_indices, uniform_batches
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.errors import ConfigError
from safe_offrl.policies.kinds import kind_for
from safe_offrl.policies.networks import NetworkConfig, Networks
from safe_offrl.safety.calibration import CalibrationReport, calibrate_critic
from safe_offrl.safety.critic import RiskEstimate, SafetyCritic, SafetyCriticConfig
from safe_offrl.safety.multiplier import LagrangianConfig, Multiplier
from safe_offrl.safety.shield import Shield
from safe_offrl.spec import SafetySpec
from safe_offrl.types import Record


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of the offline phase.

    ``steps`` gradient steps of the agent, then ``alignment_steps`` in which the actor is frozen and
    the reward and safety critics learn its own values (Marvel, arXiv:2412.04426): the online phase
    starts from critics that agree with the policy that will act. ``held_out`` is the share of
    episodes kept for the calibration report. ``device`` (see :mod:`safe_offrl.compute.device`),
    ``compile`` and ``precision`` (see :mod:`safe_offrl.compute.descent`) say how losses are
    computed.
    """

    agent: str = "iql"
    env: str = "PointHazard-v0"
    dataset: str | None = None
    steps: int = 100_000
    alignment_steps: int = 5_000
    batch_size: int = 256
    held_out: float = 0.15
    seed: int = 0
    log_every: int = 1000
    device: DeviceChoice = "auto"
    compile: CompileMode = "auto"
    precision: Precision = "fp32"
    safety: SafetySpec = field(default_factory=SafetySpec)
    networks: NetworkConfig = field(default_factory=NetworkConfig)
    critic: SafetyCriticConfig = field(default_factory=SafetyCriticConfig)
    lagrangian: LagrangianConfig = field(default_factory=LagrangianConfig)
    agents: AgentConfigs = field(default_factory=AgentConfigs)
    extraction: ExtractionConfig = field(default_factory=ExtractionConfig)
    alignment: RLPDConfig = field(default_factory=RLPDConfig)

    def __post_init__(self) -> None:
        """Refuse what cannot run."""
        if ":" not in self.agent:  # else importing it must wait until the run is trusted
            key = self.agents.key(find_agent(self.agent))
            if self.agents.own and key != "own":
                raise ConfigError(
                    "agents.own holds settings of an agent of your own, but agent is "
                    f"{self.agent}. Leave them out, or set agents.{key}."
                )
        if self.steps < 1 or self.alignment_steps < 0 or self.batch_size < 2 or self.log_every < 1:
            raise ConfigError(
                "steps and log_every must be at least 1, alignment_steps at least 0 and batch_size "
                "at least 2. Raise the one that is too small."
            )
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, but 0 or more is needed. Try 0.")
        if self.alignment.discount != discount_of(self):
            raise ConfigError(
                f"alignment.discount is {self.alignment.discount}, but the values that are aligned "
                f"are discounted by {discount_of(self)}. Set both to the same."
            )
        if not 0.0 < self.held_out < 0.9:
            raise ConfigError(
                f"held_out is {self.held_out}, but a share of episodes in (0, 0.9) is needed. "
                "Try 0.1."
            )


HELD_OUT_ROWS = 200_000  # transitions, about, that the critic is judged on: they lie in memory
# What the cost constraint has for defaults. An action changes the cost rate ahead by a hundredth
# where it changes an accident's probability by a tenth, so lambda must be larger; and where cost
# has to be left behind rather than kept away from, only relative risk can teach the way out.
COST_DEFAULTS: dict[str, Any] = {
    "critic": {"target_gap": 0.005, "weight_decay": 0.1},
    "lagrangian": {"init": 100.0, "maximum": 300.0},
    "extraction": {"relative_risk": True, "risk_aversion": 100.0},
}

START_STATES = 64  # start states per update of the safety critic
ESTIMATE_STATES = 2000  # policy actions behind one estimate of what is constrained


def discount_of(config: PretrainConfig) -> float:
    """Discount of the run's values: what return_to_go in the dataset must be computed with.

    That of the chosen agent; of one that learns no values, that of the alignment.
    """
    own = config.agents.discount(config.agent)
    return config.alignment.discount if own is None else own


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
        compute = Compute(compiled, config.precision, device)
        self.generator = seeded(config.seed, device)
        self._logged_episodes = dataset.episodes
        train, held_out = dataset.split(config.held_out, config.seed)
        # A robot's joints, a plant's pressures: no network should have to learn their units.
        self.normalizer = train.normalizer()._replace(reward_scale=dataset.reward_scale())
        self.train = train.normalised(self.normalizer)
        self.held_out = held_out.sample(HELD_OUT_ROWS, config.seed).normalised(self.normalizer)
        layout = dataset.layout
        self.networks = Networks(
            *layout, config.networks, self.generator, kind_for(discrete=dataset.discrete)
        )
        self.cost_max = dataset.cost_max
        self.limit = config.safety.limit(dataset.horizon, self.cost_max)
        self.worst_cost = self.limit.worst_cost(dataset.worst_cost)
        agent = find_agent(config.agent)
        built_from = (self.networks, self.train, self.limit, self.generator, compute)
        self.agent = agent(Setup(*built_from, config.extraction), config.agents.of(agent))
        self.learner = RLPD(self.networks, config.alignment, self.generator, compute)
        self.critic = SafetyCritic(
            *layout,
            dataset.horizon,
            config.critic,
            self.generator,
            self.cost_max if self.limit.constraint == "cost" else None,
            compute,
        )
        if self.limit.constraint == "cost":
            costs = self.train.episode_costs.sum() / self.cost_max / len(self.train.rows)
            self.critic.start_from(math.log(costs / (1.0 - costs)) if 0.0 < costs < 1.0 else -3.0)
        self.multiplier = Multiplier(config.lagrangian, self.limit.share, self.generator.device)
        self.step = 0
        self.report: CalibrationReport | None = None
        self._metrics: dict[str, Tensor | float] = {}  # since the last record
        logged = self.train.on(self.generator.device)
        self._risky = RiskSampler.of(
            logged,
            steps=self.critic.steps,
            discount=config.critic.cost_discount,
            device=self.generator.device,
        )
        self._rows = logged.rows
        self._starts = logged.initial_observations.to(self.generator.device)
        self._steps_per_episode = float(self.train.episode_lengths.mean())

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
                # Part of the result, and so of the last checkpoint: may the shield act?
                self.report = self._calibrate()
            record = None
            if last or self.step % config.log_every == 0:
                values = {f"offline/{k}": float(v) for k, v in self._metrics.items()}
                record, self._metrics = Record(self.step, values), {}
            yield record

    def _update(self, *, aligning: bool) -> dict[str, Tensor]:
        config, generator = self.config, self.generator
        layout, size = self.train.layout, config.batch_size
        (batch,) = uniform_batches(self._rows, layout, 1, size, generator)
        if aligning:
            metrics = self.learner.update_critics(batch)
        else:
            steering = Steering(self.critic.risk, self.multiplier.value)
            metrics = self.agent.update(batch, steering)
        risky, weights, spans = self._risky.draw(
            config.batch_size, config.critic.positive_share, generator
        )
        starts = self._starts[draw_indices(len(self._starts), START_STATES, generator)]
        reference = self.critic.reference_states(starts, batch, self._steps_per_episode)
        metrics |= self.critic.update(
            risky, weights, self.networks.actor, reference, generator, spans=spans
        )
        # On the log's states the expected cost stays near the log's own whatever the policy does:
        # dual ascent on it would only wind lambda up. Online the states are the policy's.
        if not aligning and self.limit.constraint == "accident":
            self.multiplier.update(metrics["csc/estimate"])
        return {**metrics, "lambda": self.multiplier.value}

    def estimate(self) -> RiskEstimate:
        """What is constrained, under the present actor: over the log's start states, or its states.

        The states of the log are those of its behaviours, not of the actor: for the expected cost
        the estimate is of first order in what sets them apart.
        """
        generator = seeded(self.config.seed, self.generator.device)
        index = draw_indices(len(self._starts), ESTIMATE_STATES, generator)
        logged = None
        if self.limit.constraint == "cost":
            (logged,) = uniform_batches(
                self._rows, self.train.layout, 1, ESTIMATE_STATES, generator
            )
        reference = self.critic.reference_states(
            self._starts[index], logged, self._steps_per_episode
        )
        return self.critic.estimate(
            self.networks.actor, reference, generator, self.config.safety.confidence
        )

    def calibration(self) -> CalibrationReport:
        """The report on the safety critic, made when training ends."""
        return self.report or self._calibrate()

    def _calibrate(self) -> CalibrationReport:
        actor = copy.deepcopy(self.networks.actor).cpu()
        critic = self.critic.in_memory()
        return calibrate_critic(
            critic, actor, self.held_out, self.estimate(), self.limit, self._logged_episodes
        )

    def _parts(self) -> dict[str, Part]:
        return {
            **named("agent", self.agent.parts()),
            **named("learner", self.learner.parts()),
            **self.critic.parts(),
            **self.normalizer.parts(),
            "multiplier": self.multiplier.value,
            "generator": self.generator,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        return {**collect_state(self._parts()), **self.policy.tensors()}

    @property
    def policy(self) -> DeployedPolicy:
        """What has been learnt to act, by itself: its accident rate is what is estimated."""
        return DeployedPolicy.of(self.networks.actor, Shield.abstaining(), self.normalizer, 0)

    def info(self) -> dict[str, Any]:
        """The part of the state that is not tensors; JSON-able."""
        acts = self.report.shield_acts if self.report else False
        unlogged = [(k, float(v)) for k, v in self._metrics.items()]  # in this order
        return {
            "step": self.step,
            "shield_acts": acts,
            "policy": self.policy.words(),
            "cost_max": self.cost_max,
            "worst_cost": self.worst_cost,
            **({"unlogged": unlogged} if unlogged else {}),
        }

    def load(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict` and :meth:`info`, bitwise."""
        restore_state(self._parts(), tensors)
        self.step = int(info["step"])
        self._metrics = dict(info.get("unlogged", {}))
