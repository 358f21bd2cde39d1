"""One way to make an environment, whatever package it is of."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from typing import Any

import gymnasium

from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.identity import environment_identity, environment_versions
from safe_offrl.env.process import ProcessEnv
from safe_offrl.env.user_code import import_plugins, import_user_module, sentence
from safe_offrl.errors import EnvError
from safe_offrl.spec import SafetySpec


def make_env(
    env_id: str, spec: SafetySpec, *, render_mode: str | None = None, timeout: float | None = None
) -> AccidentEnv:
    """Make any Gymnasium environment, adapted to this package.

    ``env_id`` is a registered id ("PointHazard-v0"), one that an installed plug-in registers (see
    :func:`safe_offrl.env.user_code.import_plugins`), or "package.module:Env-v0", where importing
    ``package.module`` registers the id; the module may lie in the working directory. With a
    ``timeout`` it runs in a process of its own, and a reset or step that takes more than so many
    seconds is a fault (see :class:`safe_offrl.env.process.ProcessEnv`). Raises EnvError for an
    unknown id, a module that does not import, or an environment that cannot be used (see
    :class:`AccidentEnv`).
    """
    if timeout is None:
        env = make_raw(env_id, render_mode=render_mode)
    else:
        env = ProcessEnv(functools.partial(_make_described, env_id, render_mode), timeout)
    try:
        return AccidentEnv(env, spec, env_id=env_id)
    except EnvError:
        env.close()
        raise


def _make_described(
    env_id: str, render_mode: str | None
) -> tuple[gymnasium.Env[Any, Any], dict[str, Any]]:
    env = make_raw(env_id, render_mode=render_mode)
    return env, {
        "versions": environment_versions(env),
        "identity": environment_identity(env, env_id),
    }


def time_limit(env_id: str) -> int | None:
    """Steps after which an environment ends every episode as it is registered; None if it does not.

    None of an id that is unknown, too. EnvError for a module that does not import.
    """
    _register(env_id)
    try:
        return gymnasium.spec(env_id.rpartition(":")[2]).max_episode_steps
    except gymnasium.error.Error:
        return None


def _register(env_id: str) -> None:
    """Import whatever registers an id."""
    importlib.import_module("safe_offrl.envs")  # registers the environments that come with us
    module, separator, _ = env_id.partition(":")
    if separator:
        import_user_module(module, f'environment "{env_id}"')
    elif env_id not in gymnasium.registry:
        import_plugins()


def make_raw(env_id: str, *, render_mode: str | None = None) -> gymnasium.Env[Any, Any]:
    """Make a Gymnasium environment as it is, without the adapter; see :func:`make_env`."""
    _register(env_id)
    # A constructor need not know render_mode, not even as None.
    options: dict[str, Any] = {} if render_mode is None else {"render_mode": render_mode}
    try:
        # The passive checker repeats, as warnings, what AccidentEnv refuses with an error.
        return gymnasium.make(env_id, disable_env_checker=True, **options)
    except gymnasium.error.UnregisteredEnv as error:
        raise EnvError(
            f'There is no environment "{env_id}": {sentence(error)} Give a registered Gymnasium '
            'id, or "package.module:Env-v0" so that the module that registers it is imported.'
        ) from error
    except gymnasium.error.DependencyNotInstalled as error:  # says itself what to install
        raise EnvError(f'The environment "{env_id}" cannot be made: {sentence(error)}') from error
    except Exception as error:  # whatever the environment's constructor raises
        raise EnvError(
            f'The environment "{env_id}" could not be made: {sentence(error)} '
            "Check that gymnasium.make accepts this id. What its constructor needs is given where "
            "it is registered, as kwargs={...}."
        ) from error
