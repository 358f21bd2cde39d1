"""What an environment must offer, and how its answers are read: one sentence where it does not.

EnvError for what no episode can mend (spaces, a missing accident signal), EnvFault for an answer
that cannot be used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import gymnasium
import numpy as np
from gymnasium import spaces

from safe_offrl.env.action_bounds import placeholder
from safe_offrl.env.observations import layout
from safe_offrl.env.signals import Signals
from safe_offrl.env.user_code import fault_in_words, raised, user_function
from safe_offrl.env.values import kind_in_words, scalar
from safe_offrl.errors import EnvError, EnvFault
from safe_offrl.spec import COST_RULES, SafetySpec

AccidentRule = Callable[[Any, Any, Any, float, bool, bool, Mapping[str, Any]], Any]

RESET_GIVES = "(observation, info)"
STEP_GIVES = "(observation, reward, terminated, truncated, info)"
# Where the environments of a vector keep the last observation of an episode that they have ended.
_LAST_OBSERVATION = ("final_obs", "final_observation", "terminal_observation")


# --- before the first step --------------------------------------------------------------------


def horizon_of(env_id: str, env: gymnasium.Env[Any, Any], spec: SafetySpec) -> int:
    """Steps within which an accident counts: the specification's, else the registered limit."""
    limit = env.spec.max_episode_steps if env.spec else None
    if spec.horizon is None and limit is None:
        raise EnvError(
            f'"{env_id}" has no time limit, so "an accident within the horizon" has no meaning. '
            "Set safety.horizon=STEPS, or register the environment with max_episode_steps."
        )
    if spec.horizon is not None and limit is not None and spec.horizon > limit:
        raise EnvError(
            f'safety.horizon is {spec.horizon}, but "{env_id}" ends every episode after {limit} '
            f"steps. Leave safety.horizon out, or set it to at most {limit}."
        )
    horizon = spec.horizon if spec.horizon is not None else limit
    assert horizon is not None
    return horizon


def require_actions(env_id: str, space: spaces.Space[Any]) -> spaces.Box | spaces.Discrete:
    """The action space, if policies can act in it."""
    if isinstance(space, spaces.Discrete) and space.n > 1:
        return space
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        kind = "integer Box" if isinstance(space, spaces.Box) else str(space)
        raise EnvError(
            f'"{env_id}" has an action space ({kind}) that cannot be used. Give it a Box of real '
            "numbers, or a Discrete space of at least 2 actions: number the combinations."
        )
    remedy = (
        "Give its action space the bounds that are meant, for example with "
        "gymnasium.wrappers.TransformAction(env, lambda action: action, Box(low, high))."
    )
    if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        raise EnvError(
            f'"{env_id}" has infinite action bounds, so actions cannot be scaled to [-1, 1]. '
            f"{remedy}"
        )
    if wrong := placeholder(space.low, space.high):
        raise EnvError(f'"{env_id}" has {wrong}. {remedy}')
    return space


def accident_rule(name: str) -> AccidentRule | None:
    """The function behind "terminated" or "package.module:function"; None if the cost decides."""
    if name in COST_RULES:
        return None
    if name == "terminated":
        return lambda _o, _a, _next, _reward, terminated, _truncated, _info: terminated
    rule: AccidentRule = user_function(name, "accident rule", "safety.accident")
    return rule


def refusals(env_id: str, env: gymnasium.Env[Any, Any], spec: SafetySpec) -> dict[str, str]:
    """Everything for which the adapter would refuse an environment: {part: sentence}."""
    parts: dict[str, Callable[[], object]] = {
        "observations": lambda: layout(env_id, env.observation_space),
        "actions": lambda: require_actions(env_id, env.action_space),
        "horizon": lambda: horizon_of(env_id, env, spec),
        "accident rule": lambda: accident_rule(spec.accident),
        "signals": lambda: Signals(env_id, spec.signals),
    }
    found = {}
    for part, require in parts.items():
        try:
            require()
        except EnvError as error:
            found[part] = str(error)
    return found


# --- answers ----------------------------------------------------------------------------------


def ask(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What the environment answers; whatever it raises of its own is an EnvFault."""
    try:
        return function(*arguments, **named)
    except EnvError:
        raise
    # An exit would end every command as if all were well.
    except (Exception, SystemExit, GeneratorExit) as error:
        raise EnvFault(fault_in_words(error)) from error


def reset_values(env_id: str, answer: Any) -> tuple[Any, dict[str, Any]]:
    """The answer of reset(), if it is the pair that it must be."""
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping):
        return answer[0], cast("dict[str, Any]", answer[1])
    raise EnvFault(
        f'reset() of "{env_id}" returned {kind_in_words(answer)}, but it must return '
        f"{RESET_GIVES}, info being a dict. Fix the environment."
    )


def step_values(
    env_id: str, answer: Any, step: int
) -> tuple[Any, float, bool, bool, dict[str, Any]]:
    """The answer of step(): five values, of which three are a number and two truth values."""
    if not isinstance(answer, tuple | list) or len(answer) != 5:
        raise EnvFault(
            f'step() of "{env_id}" returned {kind_in_words(answer)}, but it must return '
            f'{STEP_GIVES}, the cost in info["cost"]. Fix the environment.'
        )
    observation, raw_reward, raw_terminated, raw_truncated, info = answer
    reward, terminated, truncated = map(scalar, (raw_reward, raw_terminated, raw_truncated))
    if terminated is None or truncated is None or not isinstance(info, Mapping):
        named = {"terminated": raw_terminated, "truncated": raw_truncated, "info": info}
        found = ", ".join(f"{name} as {kind_in_words(value)}" for name, value in named.items())
        raise EnvFault(
            f'step() of "{env_id}" returned {found}, but it must return {STEP_GIVES}: two truth '
            "values and a dict. Fix the environment."
        )
    if reward is None or not math.isfinite(reward):
        given = kind_in_words(raw_reward) if reward is None else reward
        raise EnvFault(
            f'"{env_id}" gave the reward {given} at step {step}. '
            "Fix the environment: rewards must be finite numbers."
        )
    return observation, reward, bool(terminated), bool(truncated), cast("dict[str, Any]", info)


def accident_verdict(name: str, rule: AccidentRule, *step: Any) -> bool:
    """What a rule says of a step: True or False, also as an array of one.

    EnvFault if it raises, EnvError for any other answer.
    """
    try:
        answer = rule(*step)
    except Exception as error:  # whatever the user's function raises
        raise EnvFault(f'The accident rule "{name}" raised {raised(error)}. Repair it.') from error
    if isinstance(answer, bool | np.bool_):
        return bool(answer)
    if getattr(answer, "size", 0) == 1 and getattr(answer, "dtype", None) == np.bool_:
        return bool(answer.item())
    raise EnvError(f'The accident rule "{name}" returned {answer!r}. Make it return True or False.')


def cost_of(env_id: str, info: Mapping[str, Any], step: int, *, limited: bool) -> float | None:
    """The environment's own cost of a step; None if ``info["cost"]`` is no single number.

    EnvFault if it is not finite or, where the expected cost is ``limited``, below 0.
    """
    cost = scalar(info.get("cost"))
    if cost is None:
        return None
    if not math.isfinite(cost):
        raise EnvFault(
            f'"{env_id}" gave the cost {cost} at step {step}. '
            "Fix the environment: costs must be finite numbers."
        )
    if cost < 0.0 and limited:
        raise EnvFault(
            f'"{env_id}" gave the cost {cost:g} at step {step}. '
            "Fix the environment: where the expected cost is limited, costs must be 0 or more."
        )
    return cost


def cost_in_words(info: Mapping[str, Any]) -> str:
    """What there is where ``info["cost"]`` is no single number: 'info["cost"] is a dict with ...'.

    None stands for no cost, as where there is none.
    """
    if info.get("cost") is not None:
        return f'info["cost"] is {kind_in_words(info["cost"])}'
    near = sorted(str(key) for key in info if "cost" in str(key).lower() and key != "cost")
    where = 'info has no "cost"' if "cost" not in info else 'info["cost"] is None'
    return f"{where} (it has {', '.join(near)})" if near else where


def no_signal(env_id: str, info: Mapping[str, Any], rule: str, step: int) -> EnvError:
    """The error of a rule that needs a cost where there is none."""
    return EnvError(
        f'"{env_id}" gives no accident signal: the accident rule is "{rule}", but '
        f'{cost_in_words(info)} at step {step}. Put one number into info["cost"] in every step(), '
        "or set safety.accident=terminated, or safety.accident=package.module:function, a function "
        "of yours that says what an accident is."
    )


def no_cost(env_id: str, info: Mapping[str, Any]) -> EnvError:
    """The error of a limit on the cost where the cost is no number."""
    return EnvError(
        f'The expected cost is limited, but in "{env_id}" {cost_in_words(info)}. '
        'Put one number into info["cost"]: the one that is to be limited.'
    )


def last_observation(info: Mapping[str, Any]) -> Any:
    """The last observation of an episode that a vector's environment has put aside; else None."""
    return next((info[key] for key in _LAST_OBSERVATION if info.get(key) is not None), None)
