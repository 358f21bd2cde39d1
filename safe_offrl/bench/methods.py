"""Methods of a benchmark: each is settings of the two phases and nothing else.

So every method writes the same ledger, is resumed the same way and is compared by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safe_offrl.agents import AGENTS

Settings = Mapping[str, Any]  # dotted key -> value

_NEVER = 1_000_000_000  # steps: more than any budget has
_OFF: Settings = {"kl": False, "safety_constraint": False, "shield": False, "guard": False}
_RLPD: Settings = {**_OFF, "baseline.learner": "rlpd"}
_FROZEN: Settings = {**_OFF, "warmup_steps": _NEVER, "update_every": _NEVER}
_BF16: Settings = {"precision": "bf16"}
# Plain TD: the pressure upwards that makes the safety critic conservative is ours.
_LAGRANGIAN: Settings = {
    "baseline.learner": "rlpd",
    "kl": False,
    "shield": False,
    "guard": False,
    "critic.alpha_init": 1e-5,
    "critic.alpha_max": 1e-5,
    "lagrangian.aim": 1.0,
}


@dataclass(frozen=True)
class Method:
    """How a method differs from ours, in both phases; ``source`` says where it is from."""

    source: str
    pretrain: Settings = field(default_factory=dict)
    finetune: Settings = field(default_factory=dict)


METHODS: dict[str, Method] = {
    "ours": Method("both constraints, shield and guard, IQL values before"),
    "ours-no-kl": Method("ours without the trust region", finetune={"kl": False}),
    "ours-no-constraint": Method(
        "ours without the safety constraint", finetune={"safety_constraint": False}
    ),
    "ours-no-shield": Method("ours without the shield", finetune={"shield": False}),
    "ours-no-guard": Method("ours without the guard", finetune={"guard": False}),
    "frozen": Method("the pretrained policy, nothing learnt online", finetune=_FROZEN),
    "frozen-shield": Method(
        "the pretrained policy behind the shield, nothing learnt online",
        finetune={**_FROZEN, "shield": True},
    ),
    "rlpd": Method("RLPD (arXiv:2302.02948), started from our pretrained policy", finetune=_RLPD),
    "rlpd-scratch": Method(
        "RLPD as published: fresh networks, 5000 random steps",
        finetune={**_RLPD, "baseline.from_scratch": True, "warmup_steps": 5_000},
    ),
    "wsrl": Method(
        "WSRL (arXiv:2412.07762): from Cal-QL, 5000 steps of it, then UTD 4 on online data alone",
        pretrain={"agent": "calql", "alignment_steps": 0},
        finetune={
            **_RLPD,
            "offline_share": 0.0,
            "warmup_steps": 5_000,
            "update_every": 1,
            "utd": 4,
        },
    ),
    "calql": Method(
        "Cal-QL (arXiv:2303.05479), gone on with half of each batch online",
        pretrain={"agent": "calql", "alignment_steps": 0},
        finetune={**_OFF, "baseline.learner": "calql"},
    ),
    "iql": Method(
        "IQL (arXiv:2110.06169), gone on with half of each batch online",
        pretrain={"agent": "iql", "alignment_steps": 0},
        finetune={**_OFF, "baseline.learner": "iql"},
    ),
    "sooper": Method(
        "SOOPER (arXiv:2601.19612) without its model: RLPD behind a guard, to the episode's end",
        finetune={**_RLPD, "guard": True, "baseline.sooper": True},
    ),
    "sac-lagrangian": Method(
        "SAC-Lagrangian (as in OmniSafe), started from our pretrained policy, log in half a batch",
        finetune={**_LAGRANGIAN, "baseline.multiplier": "dual"},
    ),
    "sac-pid": Method(
        "the same with PID control of lambda (arXiv:2007.03964)",
        finetune={**_LAGRANGIAN, "baseline.multiplier": "pid"},
    ),
    "marvel": Method(
        "Marvel's recipe (arXiv:2412.04426): values aligned before, adaptive PID from 0, no log",
        finetune={
            **_LAGRANGIAN,
            "baseline.multiplier": "pid",
            "baseline.pid.adaptive": True,
            "baseline.multiplier_init": 0.0,
            "offline_share": 0.0,
        },
    ),
    "bc-safe": Method(
        "BC-Safe (arXiv:2306.09303): the log's safe episodes imitated, nothing learnt online",
        pretrain={"agent": "bc_safe"},
        finetune=_FROZEN,
    ),
    # Questions of a suite each: what one setting does.
    "ours-margin": Method(
        "ours steered towards half of the limit", finetune={"lagrangian.aim": 0.5}
    ),
    "ours-apart": Method("ours with a limit for each cost signal, which the suite's settings name"),
    "ours-bf16": Method("ours with products in bfloat16", pretrain=_BF16, finetune=_BF16),
    "frozen-bf16": Method("frozen, pretrained in bfloat16", pretrain=_BF16, finetune=_FROZEN),
    "rlpd-narrow": Method(
        "rlpd with narrower exploration, as wide as a cautious policy explores",
        finetune={**_RLPD, "learner.target_entropy": -1},
    ),
}
# What each agent pretrains, as published and away from what the safety critic fears, and what is
# made of it online; of iql these are "frozen" and "ours".
METHODS |= {
    f"published-{name}": Method(
        f"{name} as published, nothing learnt online",
        {"agent": name, "safety_constraint": False},
        _FROZEN,
    )
    for name in AGENTS
}
_OTHERS = [name for name in AGENTS if name != "iql"]
METHODS |= {
    f"frozen-{name}": Method(f"frozen, pretrained with {name}", {"agent": name}, _FROZEN)
    for name in _OTHERS
}
METHODS |= {
    f"ours-{name}": Method(f"ours, pretrained with {name}", {"agent": name}) for name in _OTHERS
}
