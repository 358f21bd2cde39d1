"""The policy that acts, and the only ways in which it changes: acceptance and roll-back.

A version is a frozen policy behind a frozen shield. The learner never acts; it proposes, and what
is deployed goes on acting until a candidate is accepted or the monitor's alarm takes it back.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from safe_offrl.compute.state import Part
from safe_offrl.limits import Limit
from safe_offrl.policies.networks import Actor
from safe_offrl.safety.acceptance import (
    AcceptanceConfig,
    Decision,
    Judge,
    decide,
    measure,
    upper_estimates,
)
from safe_offrl.safety.critic import SafetyCritic
from safe_offrl.safety.monitor import SafetyMonitor
from safe_offrl.safety.shield import Shield, ShieldConfig

MIN_DELTA_SHARE = 1 / 16  # of delta that every alarm's halving leaves


class Deployment:
    """The deployed policy with its version, shield and trust region.

    ``kl_limited`` and ``safety_limited`` say which constraints a candidate must meet.
    ``critic`` and ``limit`` are those that the shield compares actions by, the first of a run.
    Unless ``shield_acts`` the shield abstains. ``delta`` and ``kl_weight`` (of the penalty
    that keeps the learner near) are scalar tensors, moved in place.
    """

    def __init__(
        self,
        actor: Actor,
        critic: SafetyCritic,
        limit: Limit,
        delta: float,
        acceptance: AcceptanceConfig,
        shielding: ShieldConfig,
        *,
        kl_limited: bool,
        safety_limited: bool,
        shield_acts: bool,
    ) -> None:
        self.limit = limit
        self.initial_delta = delta
        self.acceptance = acceptance
        self.shielding = shielding
        self.kl_limited = kl_limited
        self.safety_limited = safety_limited
        self.actor = copy.deepcopy(actor)
        self.version = 0
        self.certified = copy.deepcopy(actor)  # the pretrained policy, to begin with
        self.certified_version = 0
        self.proved = False  # whether the monitor has shown that it keeps the limit
        device = next(actor.parameters()).device
        self.delta = torch.tensor(delta, device=device)
        self.kl_weight = torch.tensor(0.1 if kl_limited else 0.0, device=device)
        self._critic = critic
        self.shield = Shield.from_critic(critic, shielding, limit.share, acts=shield_acts)
        self.certified_shield = copy.deepcopy(self.shield)

    def deploy(self, actor: Actor, shield: Shield | None = None) -> None:
        """Let a copy of this policy act, behind a copy of this shield or one of today's critic."""
        self.version += 1
        self.actor.load_state_dict(actor.state_dict())  # in place: a recorded update reads it there
        if shield is None:
            acts = self.shield.acts
            self.shield = Shield.from_critic(
                self._critic, self.shielding, self.limit.share, acts=acts
            )
        else:
            self.shield = copy.deepcopy(shield)

    def propose(
        self,
        learner: Actor,
        judges: Sequence[Judge],
        monitors: Sequence[SafetyMonitor],
        confidence: float,
        generator: torch.Generator,
    ) -> tuple[Decision, bool]:
        """Decide on the learner and deploy what passes; (decision, whether it was a roll-back).

        ``judges`` and ``monitors`` are one a limit. A version that the monitors have certified
        below every limit is kept for an alarm to go back to. Without the safety constraint an alarm
        changes nothing.
        """
        # Measurement and decision.
        decision, candidate = decide(
            self.actor,
            learner,
            judges,
            self.acceptance,
            kl_limit=float(self.delta) if self.kl_limited else None,
            constrain_safety=self.safety_limited,
            confidence=confidence,
            generator=generator,
        )
        if self.kl_limited:
            self._adapt_kl_weight(decision)
        # An alarm, which takes precedence over any decision.
        alarming = [i for i, monitor in enumerate(monitors) if monitor.alarm]
        if alarming and self.safety_limited:
            for i in alarming:
                monitors[i].reset_alarm()
            return self._on_alarm(decision, judges, monitors, alarming, generator)
        # A certificate of the version that has acted so far.
        if all(m.version_interval(self.version)[1] < m.limit.share for m in monitors):
            self.certified = copy.deepcopy(self.actor)
            self.certified_shield = copy.deepcopy(self.shield)
            self.certified_version, self.proved = self.version, True
        if decision.accepted:
            self.deploy(candidate)
        return decision, False

    def _on_alarm(
        self,
        decision: Decision,
        judges: Sequence[Judge],
        monitors: Sequence[SafetyMonitor],
        alarming: Sequence[int],
        generator: torch.Generator,
    ) -> tuple[Decision, bool]:
        """Some policy has exceeded a limit: halve delta, and back to the last certified policy.

        Until one is certified that is the pretrained policy, but not if it is itself shown to
        exceed a limit, nor unless its estimate of every ``alarming`` one is the lower one.
        """
        # Trust region.
        self.delta.mul_(0.5).clamp_(min=MIN_DELTA_SHARE * self.initial_delta)
        # Reasons to keep the policy that acts.
        if self.certified_version == self.version:
            which = "last certified" if self.proved else "pretrained"
            return _stays(decision, f"the {which} policy already acts"), False
        if any(m.version_interval(self.certified_version)[0] > m.limit.share for m in monitors):
            return _stays(decision, "the policy to go back to is shown to exceed the limit"), False
        before = [before for before, _ in decision.estimates]
        measured = self._measured(self.certified, judges, before, generator)
        lower = [after < before for before, after in measured.estimates]
        if not self.proved and not all(lower[i] for i in alarming):
            return _stays(decision, "the pretrained policy is not estimated to be safer"), False
        # The roll-back. Its own shield returns with it: what was shown is about the two together.
        self.deploy(self.certified, self.certified_shield)
        self.certified_version = self.version
        which = "last certified policy" if self.proved else "pretrained policy: none was certified"
        return measured._replace(reason=f"alarm: rolled back to the {which}"), True

    def put_back(
        self,
        actor: Actor,
        shield: Shield,
        reason: str,
        realised: Sequence[float],
        judges: Sequence[Judge],
        confidence: float,
        generator: torch.Generator,
    ) -> Decision:
        """Let a policy act that has acted before, behind the shield that it had; what that means.

        Like a roll-back it may be further away than delta: no step that a learner proposes. So far
        away no estimate from the states of another policy holds, and its own episodes are known:
        ``realised``, one a limit, stands for it.
        """
        before = upper_estimates(self.actor, judges, confidence, generator)
        measured = self._measured(actor, judges, before, generator)
        self.deploy(actor, shield)
        first, *further = zip(before, realised, strict=True)
        return measured._replace(reason=reason, v_candidate=first[1], further=tuple(further))

    def _measured(
        self,
        candidate: Actor,
        judges: Sequence[Judge],
        before: Sequence[float],
        generator: torch.Generator,
    ) -> Decision:
        noise = self.actor.noise(judges[0].visited.batch.actions.shape[:-1], generator)
        return measure(candidate, self.actor, judges, before, noise, self.acceptance.tail)

    def _adapt_kl_weight(self, decision: Decision) -> None:
        """Aim the learner at the rim of the trust region.

        A proposal that had to be cut raises the penalty on leaving, one well inside lowers it.
        """
        if decision.fraction < 1.0:
            self.kl_weight *= 1.5
        elif decision.kl_mean < 0.5 * float(self.delta):
            self.kl_weight /= 1.5
        self.kl_weight.clamp_(1e-2, 1e3)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps, besides :meth:`info`."""
        shield, certified = self.shield.net, self.certified_shield.net
        assert shield is not None
        assert certified is not None
        return {
            "deployed": self.actor,
            "certified": self.certified,
            "shield": shield,
            "certified_shield": certified,
            "kl_weight": self.kl_weight,
            "delta": self.delta,
        }

    def info(self) -> dict[str, Any]:
        """The version numbers, JSON-able."""
        return {
            "version": self.version,
            "certified_version": self.certified_version,
            "proved": self.proved,
        }

    def load(self, info: Mapping[str, Any]) -> None:
        """Restore the version numbers; :meth:`parts` are restored in place."""
        self.version = int(info["version"])
        self.certified_version = int(info["certified_version"])
        self.proved = bool(info.get("proved", False))  # runs of earlier versions do not say


def _stays(decision: Decision, reason: str) -> Decision:
    return decision._replace(accepted=False, fraction=0.0, reason=f"alarm: {reason}")
