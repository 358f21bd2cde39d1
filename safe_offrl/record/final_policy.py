"""The policy that a run ended with, from the run's folder alone: no log, no learner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from safe_offrl.compute.device import configure
from safe_offrl.config import from_dict, read_yaml
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.make import make_env
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.limits import Limit
from safe_offrl.record.checkpoints import Checkpoint, fitting
from safe_offrl.record.run import RunDir
from safe_offrl.record.run_config import RunInputs, run_inputs
from safe_offrl.record.trust import require_trusted
from safe_offrl.spec import EnvironmentConfig, SafetySpec


class FinalPolicy(NamedTuple):
    """A run's policy at its newest checkpoint, and what it acts in and is held against.

    ``worst_cost`` is what an episode counts as whose end is unknown, and ``worst_signals`` in each
    named cost signal, where one is limited.
    """

    run: RunDir
    policy: DeployedPolicy
    env: AccidentEnv
    environment: EnvironmentConfig
    safety: SafetySpec
    limits: tuple[Limit, ...]
    worst_cost: float
    worst_signals: Mapping[str, float]
    checkpoint_sha256: str

    @property
    def limit(self) -> Limit:
        """The first limit."""
        return self.limits[0]


def final_policy(run: RunDir) -> FinalPolicy:
    """The policy that a run ended with, and its environment, which is the caller's to close.

    A fine-tuning run's policy acts behind its shield, a pretrained one by itself: its accident rate
    is what V_accident(s0) estimates. RunError for a pretrain run that is not finished, a run from
    elsewhere that is not trusted, a checkpoint of an earlier version, and an environment that the
    policy does not fit.
    """
    # A finished run that is trusted.
    inputs, safety, environment = stored_facts(run)
    require_trusted(run, inputs, safety)
    if run.kind == "pretrain" and run.state["status"] != "finished":
        raise RunError(
            f'The run "{run.name}" is not finished. '
            f"Finish it with `safe-offrl pretrain --resume {run.name}`."
        )
    # Environment.
    configure(inputs.threads)
    env = make_env(inputs.env_id, safety, timeout=environment.timeout)
    try:
        # Policy.
        checkpoint = run.load_checkpoint()
        policy, info = stored_policy(run, checkpoint), checkpoint.info
        _require_fit(run, policy, inputs, env)
        env.offset = policy.normalizer.offset
        return FinalPolicy(
            run=run,
            policy=policy,
            env=env,
            environment=environment,
            safety=safety,
            limits=safety.all_limits(
                env.horizon, float(info["cost_max"]), info.get("signals_max", {})
            ),
            worst_cost=float(info["worst_cost"]),
            worst_signals=info.get("worst_signals", {}),
            checkpoint_sha256=checkpoint.sha256,
        )
    except BaseException:
        env.close()
        raise


def stored_policy(run: RunDir, checkpoint: Checkpoint) -> DeployedPolicy:
    """The policy that acted last before a run's checkpoint; RunError for an earlier version's."""
    if "policy" not in checkpoint.info:
        raise RunError(
            f'The run "{run.name}" is of an earlier version, whose checkpoints do not hold all '
            "that acts. Use the version in its versions.json, or make the run again."
        )
    with fitting(run.path):
        return DeployedPolicy.restored(checkpoint.tensors, checkpoint.info["policy"])


def stored_facts(run: RunDir) -> tuple[RunInputs, SafetySpec, EnvironmentConfig]:
    """What a run was made from, what it is held to, and in what kind of environment."""
    values = read_yaml(run.config_text, "config.yaml")
    inputs, settings = run_inputs(values, run.path), values.get(run.kind)
    if not isinstance(settings, dict) or not isinstance(settings.get("safety"), dict):
        raise ConfigError(f'config.yaml lacks "{run.kind}.safety". Start a new run.')
    # A pretrain run plays nothing: its "env" is the name of one.
    environment = settings.get("env", {}) if run.kind == "finetune" else {}
    safety = from_dict(SafetySpec, settings["safety"])
    return inputs, safety, from_dict(EnvironmentConfig, environment)


def _require_fit(run: RunDir, policy: DeployedPolicy, inputs: RunInputs, env: AccidentEnv) -> None:
    """Raise ConfigError or RunError if the environment is not as it was."""
    if inputs.horizon not in (None, env.horizon):
        raise ConfigError(
            f'An episode of "{inputs.env_id}" has {env.horizon} steps now, but "{run.name}" learnt '
            f"what happens within {inputs.horizon}. Register the environment as it was, or "
            "pretrain again."
        )
    actor = policy.actor
    learnt = (actor.observation_size, actor.action_size, actor.kind.one_hot)
    found = (env.observation_size, env.action_size, env.discrete)
    if learnt != found:
        kinds = ("numbers of an action", "discrete actions")
        raise RunError(
            f'"{inputs.env_id}" has {found[0]} numbers of an observation and {found[1]} '
            f'{kinds[found[2]]}, but the policy of "{run.name}" learnt with {learnt[0]} and '
            f"{learnt[1]} {kinds[learnt[2]]}. Register the environment as it was."
        )
