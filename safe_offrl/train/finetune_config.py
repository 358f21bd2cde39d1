"""Settings of the online phase."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from safe_offrl.agents.rlpd import RLPDConfig
from safe_offrl.compute.descent import CompileMode, Precision
from safe_offrl.compute.device import DeviceChoice
from safe_offrl.errors import ConfigError
from safe_offrl.policies.networks import NetworkConfig
from safe_offrl.safety.acceptance import AcceptanceConfig
from safe_offrl.safety.critic import SafetyCriticConfig
from safe_offrl.safety.guard import GuardConfig
from safe_offrl.safety.multiplier import LagrangianConfig
from safe_offrl.safety.selection import SelectionConfig
from safe_offrl.safety.shield import ShieldConfig
from safe_offrl.spec import EnvironmentConfig, SafetySpec
from safe_offrl.train.baselines import BaselineConfig

PROBATION_FAILED = "on probation, the pretrained policy was shown to exceed its limit"


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of the online phase.

    ``budget`` interactions in all, whole episodes only. The first ``warmup_steps`` are the frozen
    pretrained policy's (WSRL, arXiv:2412.07762): no random action is ever sent. Then every
    ``iteration_steps`` interactions end in one proposal. Every ``update_every`` interactions pay
    for ``utd`` updates of the critics (every batch with exactly ``offline_share`` of logged data),
    one of the safety critic and one of the actor. ``kl``, ``safety_constraint``, ``shield`` and
    ``guard`` switch each part off; all off is RLPD warm-started from the same policy, which then
    deploys its learner after every episode, as it does with the guard alone.

    The states of the latest ``visited_episodes``, and at least of ``visited_steps``, stand for what
    the deployed policy visits: one episode is luck, and an estimate of it leads lambda astray.

    ``cautious_entropy`` (nats per action dimension) replaces ``learner.target_entropy`` while the
    safety constraint is on. The noise that a policy explores with is itself a source of
    accidents; -1 is SAC's target, where RLPD has -0.5. ``cautious_discrete_entropy`` (share of
    log A) likewise replaces ``learner.discrete_entropy``: at .1 the best of four actions has a
    probability of about .98. ``device``, ``compile`` and ``precision`` say how losses are computed,
    see :mod:`safe_offrl.compute.descent`; ``baseline`` is for what our method is compared with.
    ``videos`` is how many accidents are filmed, the first ones of the run, see
    :mod:`safe_offrl.report.videos`; ``keep_versions`` keeps every version that acted, for replays.
    ``selection`` is how the last part of the budget finds the policy that is handed over; a run
    without acceptance step has none.
    On ``probation`` the run stops where the episodes before its first decision show that the
    pretrained policy exceeds a limit: so begins a run of which the log does not show that all are
    kept.
    """

    budget: int = 50_000
    accident_budget: int | None = None
    videos: int = 0
    keep_versions: bool = False
    probation: bool = False
    seed: int = 0
    kl: bool = True
    safety_constraint: bool = True
    shield: bool = True
    guard: bool = True
    warmup_steps: int = 5_000
    iteration_steps: int = 500
    update_every: int = 1
    utd: int = 1
    batch_size: int = 256
    offline_share: float = 0.5
    cautious_entropy: float = -1.0
    cautious_discrete_entropy: float = 0.1
    visited_steps: int = 2_000
    visited_episodes: int = 10
    device: DeviceChoice = "auto"
    compile: CompileMode = "auto"
    precision: Precision = "fp32"
    env: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    safety: SafetySpec = field(default_factory=SafetySpec)
    networks: NetworkConfig = field(default_factory=NetworkConfig)
    critic: SafetyCriticConfig = field(default_factory=SafetyCriticConfig)
    lagrangian: LagrangianConfig = field(
        default_factory=lambda: LagrangianConfig(learning_rate=3e-3, aim=0.6)
    )
    learner: RLPDConfig = field(default_factory=RLPDConfig)
    acceptance: AcceptanceConfig = field(default_factory=AcceptanceConfig)
    shielding: ShieldConfig = field(default_factory=ShieldConfig)
    guarding: GuardConfig = field(default_factory=GuardConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)

    def __post_init__(self) -> None:
        """Refuse what cannot run."""
        # The budgets, the seed and the videos.
        if self.budget < 1:
            raise ConfigError(
                f"The budget is {self.budget} steps, too small for one episode. Try 50k."
            )
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, but 0 or more is needed. Try 0.")
        if self.accident_budget is not None and self.accident_budget < 1:
            raise ConfigError(
                f"The accident budget is {self.accident_budget}, but at least 1 is needed. Leave "
                "it out for a run that no number of accidents stops."
            )
        if self.videos and self.env.kind == "real":
            raise ConfigError(
                f"videos is {self.videos}, but a film is made by playing an episode again, and "
                "nothing of env.kind real is played again. Leave videos out."
            )
        if self.videos < 0:
            raise ConfigError(f"videos is {self.videos}, but 0 (none) or more is needed. Try 10.")
        if self.baseline.sooper and not self.guard:
            raise ConfigError(
                "baseline.sooper is a guard, but guard is off. Switch guard on, or leave it out."
            )
        if self.videos and self.baseline.sooper:
            raise ConfigError(
                f"videos is {self.videos}, but of an episode that is handed over baseline.sooper "
                "keeps only the beginning. Leave videos out."
            )
        # The loop and its batches.
        if min(self.warmup_steps, self.iteration_steps, self.utd, self.update_every) < 1:
            raise ConfigError(
                "warmup_steps, iteration_steps, utd and update_every must be at least 1. Raise the "
                "one that is too small."
            )
        if self.visited_steps < 1 or self.visited_episodes < 0:
            raise ConfigError(
                f"visited_steps is {self.visited_steps} and visited_episodes "
                f"{self.visited_episodes}, but 1 and 0 at least are needed. Try 2000 and 10."
            )
        if self.batch_size < 2:
            raise ConfigError(
                f"batch_size is {self.batch_size}, but at least 2 is needed. Try 256."
            )
        if not 0.0 <= self.offline_share < 1.0:
            raise ConfigError(
                f"offline_share is {self.offline_share}, but a share in [0, 1) is needed. 0.5 is "
                "symmetric sampling."
            )
        # The baselines, each of which leaves some constraint out.
        own = self.baseline.multiplier == "ours"
        if not own and (self.kl or self.shield or self.guard or not self.safety_constraint):
            raise ConfigError(
                f"baseline.multiplier is {self.baseline.multiplier}, a Lagrangian method, which "
                "has the safety constraint alone. Switch kl, shield and guard off, "
                "safety_constraint on."
            )
        if self.baseline.from_scratch and own and (self.guard or not self.unconstrained):
            raise ConfigError(
                "baseline.from_scratch needs every constraint off, or baseline.multiplier dual or "
                "pid: there is no safe policy to begin with. Set kl, safety_constraint, shield and "
                "guard."
            )

    def require_an_episode(self, horizon: int) -> None:
        """Raise ConfigError where the budget holds no episode of so many steps."""
        if self.budget < horizon:
            raise ConfigError(
                f"The budget is {self.budget} steps, too small for one episode of {horizon} "
                f"steps. Give --budget at least {horizon}."
            )

    def phase(self, steps: int) -> str:
        """Of an episode that begins after so many steps: "warmup", "online" or "testing"."""
        if self.testing(steps):
            return "testing"
        return "warmup" if steps < self.warmup_steps else "online"

    def reason_to_stop(self, steps: int, accidents: int, horizon: int) -> str:
        """Why no further episode may begin after so many steps and accidents; "" if one may."""
        if self.accident_budget is not None and accidents >= self.accident_budget:
            return f"the accident budget of {self.accident_budget} is spent"
        left = self.budget - steps
        if left >= horizon:
            return ""
        if left:
            words = f"steps are left, fewer than an episode of {horizon:,} may take"
            return f"{left:,} of {self.budget:,} {words}"
        return "the budget is spent"

    @property
    def cautious_learner(self) -> RLPDConfig:
        """The learner's settings, with less noise while the safety constraint is on."""
        if not self.safety_constraint:
            return self.learner
        return replace(
            self.learner,
            target_entropy=self.cautious_entropy,
            discrete_entropy=self.cautious_discrete_entropy,
        )

    @property
    def untested(self) -> bool:
        """Whether the learner is deployed after every episode, without the acceptance step."""
        return self.unconstrained or self.baseline.multiplier != "ours"

    def testing(self, steps: int) -> bool:
        """Whether nobody learns any more after so many steps, and versions are tested."""
        return self.selects and self.budget - steps <= self.selection.share * self.budget

    @property
    def selects(self) -> bool:
        """Whether the policy that is handed over is chosen among those that acted."""
        return self.safety_constraint and not self.untested and self.selection.share > 0.0

    @property
    def unconstrained(self) -> bool:
        """Whether nothing limits the learner; what it does may still be guarded."""
        return not (self.kl or self.safety_constraint or self.shield)
