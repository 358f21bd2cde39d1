"""What is compared with d3rlpy, and every setting of it: one table, as equal as both APIs allow.

Nothing of either library is imported: both processes read it.

What cannot be equal:

* Ours has an actor of its own kind: of bc, awac and crr a mixture, where theirs is a Gaussian (bc's
  a point); of iql, cql and calql a Gaussian projected into a mixture that imitates the log
  (agents/extraction.py), where theirs is AWR, or SAC's with its temperature learnt. Their Gaussians
  of awac, crr and iql are not squashed. Discrete ones learn a categorical near the argmax, and
  qrdqn critics beside it; theirs act by the argmax.
* Ours divides Q by its mean magnitude in every actor's loss; theirs in td3bc and rebrac alone.
* Theirs choose by Q among several actions that the policy draws: of crr 4 (it draws among them),
  bear 100, bcq 10. Ours act as they are; bcq chooses among 16 proposals by a learnt scorer, and in
  targets among 10. bear's model of the log is a mixture, theirs a VAE.
* awac and crr average Q over the whole mixture, theirs over single actions.
* Targets of discrete actions: ours follow by tau, theirs are copied; tau's mean age, 1 / tau steps,
  is that of copies every 2 / tau. The next value in cql is our actor's, theirs double Q-learning's.
* d3rlpy drops the last transition of an episode that a time limit cut; ours bootstraps there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

Settings = dict[str, Any]


@dataclass(frozen=True)
class Common:
    """What every learner of both libraries has, wherever its own settings have a field for it."""

    learning_rate: float = 1e-3
    discount: float = 0.99
    tau: float = 5e-3
    critics: int = 2
    hidden: tuple[int, ...] = (128, 128)
    batch_size: int = 128


COMMON = Common()
COPIES = round(2 / COMMON.tau)  # steps between them
# Ours alone: how actors of iql, cql and calql come from their values; theirs have AWR's part.
EXTRACTION: Settings = {
    "learning_rate": COMMON.learning_rate,
    "weight": 0.1,
    "components": 6,
    "inverse_temperature": 3.0,
    "weight_limit": 100.0,
}


class Task(NamedTuple):
    """Where both act, and how many discrete actions there are; ``log`` is in tasks.py."""

    env_id: str
    discrete: bool


@dataclass(frozen=True)
class Peer:
    """One algorithm in both libraries: our agent and its settings, their class and its."""

    agent: str
    ours: Settings
    config: str  # of d3rlpy.algos
    theirs: Settings
    discrete: bool = False
    extracted: bool = False
    quantiles: int = 0  # of their Q functions; 0: a mean
    own: Settings = field(default_factory=dict)  # of Common, where theirs is another


TD3 = {"target_smoothing_sigma": 0.2, "target_smoothing_clip": 0.5, "update_actor_interval": 2}
NOISE = {"deployment_noise": 0.1}  # of ours as deployed; it does not learn
# Lagrange's version is off: the conservative term has its weight, once.
FIXED_ALPHA = {"initial_alpha": 1.0, "alpha_learning_rate": 0.0}
ALGORITHMS: dict[str, Peer] = {
    "bc": Peer("bc", {}, "BCConfig", {"policy_type": "deterministic"}),
    "awac": Peer("awac", {"temperature": 1.0}, "AWACConfig", {"lam": 1.0, "n_action_samples": 1}),
    "crr": Peer(
        "crr",
        {"weighting": "exp", "temperature": 1.0, "weight_limit": 20.0},
        "CRRConfig",
        {
            "weight_type": "exp",
            "beta": 1.0,
            "max_weight": 20.0,
            "advantage_type": "mean",
            "n_action_samples": 4,
            "target_update_type": "soft",
            "update_actor_interval": 1,
        },
    ),
    "td3bc": Peer("td3bc", {"alpha": 2.5, **NOISE}, "TD3PlusBCConfig", {"alpha": 2.5, **TD3}),
    "rebrac": Peer(
        "rebrac",
        {"actor_weight": 0.01, "critic_weight": 0.001, **NOISE},
        "ReBRACConfig",
        {"actor_beta": 0.01, "critic_beta": 0.001, **TD3},
    ),
    "bear": Peer(
        "bear",
        {
            "threshold": 0.05,
            "sigma": 20.0,
            "samples": 10,
            "multiplier_learning_rate": 1e-3,
            "components": 6,
        },
        "BEARConfig",
        {
            "alpha_threshold": 0.05,
            "mmd_kernel": "laplacian",
            "mmd_sigma": 20.0,
            "n_mmd_action_samples": 10,
            "alpha_learning_rate": 1e-3,
            "initial_alpha": 1.0,
            "lam": 0.75,
            "n_target_samples": 10,
            "n_action_samples": 100,
            "vae_kl_weight": 0.5,
            "warmup_steps": 0,
            # No entropy, as published.
            "initial_temperature": 1e-4,
            "temp_learning_rate": 0.0,
        },
    ),
    "bcq": Peer(
        "bcq",
        {"perturbation": 0.05, "temperature": 0.05},
        "BCQConfig",
        {
            "action_flexibility": 0.05,
            "lam": 0.75,
            "beta": 0.5,
            "n_action_samples": 10,
            "update_actor_interval": 1,
            "rl_start_step": 0,
        },
    ),
    "iql": Peer(
        "iql",
        # The latter two are of its form that goes on online.
        {"expectile": 0.7, "inverse_temperature": 3.0, "weight_limit": 100.0},
        "IQLConfig",
        {"expectile": 0.7, "weight_temp": 3.0, "max_weight": 100.0},
        extracted=True,
    ),
    "cql": Peer(
        "cql",
        {"alpha": 5.0, "actions": 10},
        "CQLConfig",
        {
            "conservative_weight": 5.0,
            "n_action_samples": 10,
            "soft_q_backup": False,
            "max_q_backup": False,
            **FIXED_ALPHA,
        },
        extracted=True,
    ),
    "calql": Peer(
        "calql",
        {"alpha": 5.0, "actions": 10},
        "CalQLConfig",
        {
            "conservative_weight": 5.0,
            "n_action_samples": 10,
            "soft_q_backup": False,
            "max_q_backup": False,
            **FIXED_ALPHA,
        },
        extracted=True,
    ),
    "bcq_discrete": Peer(
        "bcq_discrete",
        {"threshold": 0.3, "temperature": 0.02},
        "DiscreteBCQConfig",
        {
            "action_flexibility": 0.3,
            "beta": 0.0,
            "share_encoder": False,
            "target_update_interval": COPIES,
        },
        discrete=True,
    ),
    "cql_discrete": Peer(
        "cql",
        {"alpha": 1.0, "actions": 10},  # All actions are taken, not 10.
        "DiscreteCQLConfig",
        {"alpha": 1.0, "target_update_interval": COPIES},
        discrete=True,
        extracted=True,
    ),
    "qrdqn": Peer(
        "qrdqn",
        {"quantiles": 50, "temperature": 0.02},
        "DQNConfig",
        {"target_update_interval": COPIES},
        discrete=True,
        quantiles=50,
        own={"critics": 1},  # ours has one network of quantiles
    ),
}
TASKS: dict[str, Task] = {
    "PointHazard-v0": Task("PointHazard-v0", discrete=False),
    "Pendulum-v1": Task("Pendulum-v1", discrete=False),
    "HazardGrid-v0": Task("HazardGrid-v0", discrete=True),
}


def tasks_of(algorithm: str) -> list[str]:
    """The tasks that an algorithm is compared on: those with actions of its kind."""
    discrete = ALGORITHMS[algorithm].discrete
    return [name for name, task in TASKS.items() if task.discrete == discrete]
