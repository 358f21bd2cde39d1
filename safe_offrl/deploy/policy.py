"""What acts, as one thing: a frozen policy behind shield and guard, and how it sees the world."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from safe_offrl.compute.state import arrays_sha256, collect_state, restore_state, seeded
from safe_offrl.policies.acting import NumpyActor, Sampler, UniformActor
from safe_offrl.policies.kinds import KINDS, kind_for
from safe_offrl.policies.networks import Actor, StackedMLP
from safe_offrl.policies.protocol import Vector
from safe_offrl.safety.guard import Guard, Spent
from safe_offrl.safety.shield import Shield
from safe_offrl.types import Normalizer


class Act(NamedTuple):
    """What is to be executed, and who chose it."""

    action: Vector  # [A]
    replaced: bool  # by the shield, which did not let the policy's first choice pass
    handed_over: bool  # to the guard's fallback


class DeployedPolicy(NamedTuple):
    """A version of the policy with all that it acts with, and nothing that it learnt with.

    ``sampler`` draws the actions: the actor without torch's overhead, or a baseline's random
    warm-up. ``version`` counts the policies that have acted; 0 is the pretrained one.
    """

    actor: Actor
    sampler: Sampler
    shield: Shield
    normalizer: Normalizer
    version: int
    guard: Guard | None = None

    @classmethod
    def from_actor(
        cls,
        actor: Actor,
        shield: Shield,
        normalizer: Normalizer,
        version: int,
        guard: Guard | None = None,
    ) -> DeployedPolicy:
        """The policy of an actor, whose parameters are shared: as it learns, this one changes."""
        return cls(actor, NumpyActor(actor), shield, normalizer, version, guard)

    def at_random(self) -> DeployedPolicy:
        """The same behind its shield and guard, but with uniformly random actions."""
        uniform = UniformActor(self.actor.kind, self.actor.action_size)
        return self._replace(sampler=uniform)

    def act(
        self,
        observation: Vector,
        time_to_go: float,
        rng: np.random.Generator,
        spent: Spent | None = None,
        *,
        mean_action: bool = False,
    ) -> Act:
        """The action to execute: the policy's behind its shield, or the fallback's.

        ``observation`` [O] is standardised by :attr:`normalizer`; ``time_to_go`` is the share of
        the horizon that is left, ``spent`` what the episode has cost so far, None at its begin.
        """
        action, replaced = self.shield.choose(
            self.sampler, observation, time_to_go, rng, mean_action=mean_action
        )
        if self.guard is not None:
            instead = self.guard.take_over(observation, time_to_go, action, spent)
            if instead is not None:
                return Act(instead, False, True)
        return Act(action, replaced, False)

    @property
    def sha256(self) -> str:
        """Hash of the policy's parameters and of how it scales observations.

        Shield and guard have their own, :attr:`Shield.sha256` and :attr:`Guard.sha256`.
        """
        arrays = {k: v.cpu().numpy() for k, v in self.actor.state_dict().items()}
        scaling = {"mean": self.normalizer.mean, "std": self.normalizer.std}
        offset = self.normalizer.offset
        return arrays_sha256(arrays | scaling | ({} if offset is None else {"offset": offset}))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it, besides :meth:`words`."""
        nets = {} if self.shield.net is None else {"shield": self.shield.net}
        guard = {} if self.guard is None else self.guard.tensors()
        return collect_state({"deployed": self.actor, **nets, **self.normalizer.parts()}) | guard

    def words(self) -> dict[str, Any]:
        """The rest: version, sizes of the networks, how shield and guard choose; JSON-able."""
        actor, shield, net = self.actor, self.shield, self.shield.net
        return {
            "version": self.version,
            "observation_size": actor.observation_size,
            "action_size": actor.action_size,
            "kind": actor.kind.name,
            "hidden": list(actor.hidden),
            "shield": {
                "acts": shield.acts,
                "candidates": shield.candidates,
                "margin": shield.margin,
                "members": 0 if net is None else net.members,
                "hidden": [] if net is None else list(net.widths),
            },
            **({} if self.guard is None else {"guard": self.guard.words()}),
        }

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> DeployedPolicy:
        """From :meth:`tensors` and :meth:`words`, in the computer's memory.

        KeyError or RuntimeError where they do not fit each other.
        """
        generator = seeded(0)  # of weights that are replaced
        sizes, shielding = (words["observation_size"], words["action_size"]), words["shield"]
        # Checkpoints from before there was a third kind do not name theirs.
        kind = KINDS[words["kind"]] if "kind" in words else kind_for(discrete=words["discrete"])
        actor = Actor(*sizes, words["hidden"], generator, kind)
        net = None
        if shielding["members"]:
            net = StackedMLP(
                shielding["members"],
                sizes[0] + 1 + sizes[1],
                shielding["hidden"],
                layer_norm=True,
                generator=generator,
            ).requires_grad_(False)
        restore_state({"deployed": actor, **({} if net is None else {"shield": net})}, tensors)
        shield = Shield(net, shielding["candidates"], shielding["margin"], acts=shielding["acts"])
        guard = None
        if "guard" in words:
            guard = Guard.restored(tensors, words["guard"], sizes, kind)
        return cls.from_actor(actor, shield, Normalizer.restored(tensors), words["version"], guard)
