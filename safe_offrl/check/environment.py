"""Can an environment be used here, and what should be repaired first? Bad ones raise nothing."""

from __future__ import annotations

import contextlib
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from numpy.typing import NDArray

from safe_offrl.check.observations import check_observations
from safe_offrl.check.oddities import Listener, add_oddities, clock_in_words
from safe_offrl.check.replay import Recording, first_difference, record, replay, replay_elsewhere
from safe_offrl.check.signals import check_signals
from safe_offrl.check.situations import find_situations
from safe_offrl.collect.behaviours import Controller, Vector, random_behaviour
from safe_offrl.deploy.episodes import FAULTS_IN_A_ROW
from safe_offrl.env.adapter import AccidentEnv, episode_seed
from safe_offrl.env.contract import refusals
from safe_offrl.env.make import make_raw
from safe_offrl.env.observations import layout
from safe_offrl.env.user_code import raised, sentence
from safe_offrl.errors import ConfigError, EnvError, EnvFault
from safe_offrl.limits import QUANTITIES
from safe_offrl.record.env_report import EnvReport
from safe_offrl.spec import SafetySpec

MANY = 1000  # numbers; more look like an image
NO_COST = 'No cost was seen: look at info["cost"], or play more --episodes.'
ADVICE_ON_SHARE = {  # of the random episodes with an accident
    0.0: "Is that right? Risk is learnt from a log with accidents: look at safety.accident and "
    "safety.cost_threshold, or play more --episodes.",
    1.0: "Is that right? Risk is learnt from a log with both kinds: look at safety.accident and "
    "safety.cost_threshold, and log behaviour that is better than random.",
}
SLOW = 600.0  # seconds for the default online budget of 50,000 steps
# What Gymnasium's checker recommends and this package takes care of.
_HARMLESS = ("space minimum value is -inf", "space maximum value is inf", "symmetric and normal")


def check_environment(env_id: str, spec: SafetySpec, *, episodes: int = 20) -> EnvReport:
    """Run Gymnasium's checker and ours on an environment, with ``episodes`` random episodes.

    Nothing that the environment does wrong is raised; all of it is in the report. ConfigError for
    fewer than 2 episodes.
    """
    if episodes < 2:
        raise ConfigError(f"{episodes} episodes show too little. Ask for at least 2.")
    # Making it.
    report = EnvReport(env_id, spec.accident)
    try:
        raw = make_raw(env_id)
    except EnvError as error:
        report.add("FAIL", "make", str(error))
        return report
    cls = type(raw.unwrapped)
    report.add("ok", "make", f"{cls.__name__} of the module {cls.__module__}")
    # Episodes with random actions.
    if _check_spaces(report, raw, spec):
        _check_gymnasium(report)
        listener = Listener(raw)
        env = AccidentEnv(listener, spec, env_id=env_id)
        played, observations = _check_episodes(report, env, episodes)
        recordings = list(played.values())
        if recordings:
            _check_repeats(report, env, spec, *next(iter(played.items())))
            if report.usable:
                _check_seeds(report, env)
            _check_ends(report, env, listener, recordings)
            _check_accidents(report, spec, recordings, listener)
            check_signals(report, env, recordings)
            check_observations(report, env, np.array(observations))
            add_oddities(report, env, listener, recordings)
            _check_speed(report, listener)
    # What needs no episode.
    _check_pickle(report, raw)
    with contextlib.suppress(Exception):  # Gymnasium's checker has said so already
        raw.close()
    return report


def _check_spaces(report: EnvReport, raw: gymnasium.Env[Any, Any], spec: SafetySpec) -> bool:
    """Spaces, horizon and rule: whether the adapter takes the environment."""
    refused = refusals(report.env_id, raw, spec)
    if "observations" not in refused:
        report.layout = layout(report.env_id, raw.observation_space)
    size = report.layout[-1].stop if report.layout else 0
    limit = raw.spec.max_episode_steps if raw.spec else None
    horizon = spec.horizon or limit
    found = {
        "observations": _count(size, "number")
        + (
            f" from {len(report.layout)} parts, flattened in this order:"
            if len(report.layout) > 1
            else ""
        ),
        "actions": str(raw.action_space),
        "horizon": f"{horizon} steps, "
        + ("safety.horizon" if spec.horizon else "the registered max_episode_steps"),
        "accident rule": _rule_in_words(spec),
    }
    if spec.signals:
        found["signals"] = ", ".join(f"{name} is {path}" for name, path in spec.signals.items())
    for part, text in found.items():
        if part in refused:
            report.add("FAIL", part, refused[part])
        elif part == "observations" and size > MANY:
            report.add("warn", part, f"{text} That many look like an image: extract features.")
        else:
            report.add("ok", part, text)
    return not refused


def _rule_in_words(spec: SafetySpec) -> str:
    return {
        "cost": f'a step with info["cost"] > {spec.cost_threshold:g}',
        "episode_cost": f'a step after which info["cost"] sums to > {spec.cost_threshold:g}',
        "terminated": "a step that terminates the episode",
    }.get(spec.accident, f"a step for which {spec.accident} returns True")


def _check_gymnasium(report: EnvReport) -> None:
    """Gymnasium's own checker, on an instance of its own, which it closes."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gymnasium_check_env(make_raw(report.env_id).unwrapped, skip_render_check=True)
    except Exception as error:  # whatever the environment raises under the checker
        report.add("warn", "gymnasium", f"Gymnasium's checker refuses it: {raised(error)}")
        return
    texts = [re.sub(r"\x1b\[[0-9;]*m|WARN: ", "", str(w.message)) for w in caught]
    texts = [text for text in texts if not any(known in text for known in _HARMLESS)]
    for text in dict.fromkeys(texts):
        report.add("warn", "gymnasium", text)
    if not texts:
        report.add("ok", "gymnasium", "its own checker finds nothing")


def _check_episodes(
    report: EnvReport, env: AccidentEnv, episodes: int
) -> tuple[dict[int, Recording], list[NDArray[np.float64]]]:
    """Play with random actions: {seed: episode}, none if they fail three times in a row.

    Second, every observation of them in float64.
    """
    # Random actions, whose observations are kept.
    factory = random_behaviour(env.action_size).factory
    played: dict[int, Recording] = {}
    observations: list[NDArray[np.float64]] = []
    fault, in_a_row = "", 0

    def watched(controller: Controller) -> Controller:
        def act(observation: Vector) -> Vector:
            observations.append(env.exact)
            return controller(observation)

        return act

    # Episodes.
    for index in range(episodes):
        seed, seen = episode_seed(0, index, "check"), len(observations)
        try:
            played[seed] = record(env, seed, watched(factory(np.random.default_rng(seed))))
            observations.append(env.exact)
            in_a_row = 0
        except EnvFault as error:
            del observations[seen:]
            fault, in_a_row = str(error), in_a_row + 1
            if in_a_row == FAULTS_IN_A_ROW:
                break
        except EnvError as error:
            report.add("FAIL", "episodes", str(error))
            return {}, []
    # Report.
    if in_a_row == FAULTS_IN_A_ROW or not played:
        report.add("FAIL", "episodes", fault)
        return {}, []
    lengths = [len(r.actions) for r in played.values()]
    report.measured |= {"horizon": env.horizon, "episodes": len(played), "steps": sum(lengths)}
    if fault:
        report.add(
            "warn",
            "episodes",
            f"{episodes - len(played)} of {episodes} failed. Each is left out of a log, and counts "
            f"as an accident online. The last one: {fault}",
        )
    else:
        report.add(
            "ok",
            "episodes",
            f"{episodes} with random actions, {min(lengths)} to {max(lengths)} steps long; every "
            "observation, reward and cost is finite",
        )
    return played, observations


def _check_repeats(
    report: EnvReport, env: AccidentEnv, spec: SafetySpec, seed: int, first: Recording
) -> None:
    """The first episode again: here after the others, and in another process."""
    why = "without that, no run can be resumed and no two runs compared pair by pair."
    repeats: dict[str, tuple[Callable[[], Recording], str]] = {
        "deterministic": (
            lambda: replay(env, seed, first.actions),
            "Draw every random number from self.np_random and set all state in reset()",
        ),
        "other process": (
            lambda: replay_elsewhere(report.env_id, spec, seed, first.actions),
            "Let nothing depend on the process, such as hash() or the order of a set",
        ),
    }
    for name, (again, remedy) in repeats.items():
        try:
            difference = first_difference(env, first, again())
        except EnvError as error:  # of the other process
            text = f"{sentence(error)} Every command is a process of its own: register the id"
            report.add("warn", name, f"{text} where a module is imported, and name it module:Id.")
            return
        except Exception as error:  # whatever the environment raises, this time
            report.add("FAIL", name, f"What worked fails when repeated: {raised(error)}")
            return
        if difference is not None:
            text = f"With the same seed and actions, {difference}. {remedy}: {why}"
            report.add("FAIL", name, text)
            return
        report.add("ok", name, "the same seed and actions give the same episode")


def _check_seeds(report: EnvReport, env: AccidentEnv) -> None:
    """Whether different seeds play different episodes: else many episodes are looks at one."""
    found = find_situations(env)
    report.measured["situations"] = found.different
    text = str(found)
    if found.one:
        report.add(
            "warn",
            "seeds",
            f"{text[0].upper()}{text[1:]}: its episodes differ by the policy's chance alone and "
            "say nothing of other situations, and `certify` refuses it. Draw start and noise from "
            "self.np_random, which super().reset(seed=seed) seeds.",
        )
    elif found.few:
        report.add(
            "warn", "seeds", f"{text}: whatever is counted is about those. Is that all there is?"
        )
    else:
        report.add("ok", "seeds", text)


def _check_ends(
    report: EnvReport, env: AccidentEnv, listener: Listener, recordings: list[Recording]
) -> None:
    """Terminated is the task's own end, truncated is the clock's; the values differ."""
    ends = [bool(r.outcomes[-1, 3]) for r in recordings]
    clock = clock_in_words([len(r.actions) for r in recordings], ends)
    early = [step for step in listener.both_ends if step < env.horizon]
    if early:
        text = (
            f"Step {early[0]} of an episode was both terminated and truncated. It counts as "
            "terminated: return truncated=True only where a time limit cuts an episode off."
        )
    elif clock:
        text = clock
    else:
        ended = f"{sum(ends)} episodes terminated, {len(ends) - sum(ends)} truncated"
        report.add("ok", "episode ends", ended)
        return
    report.add("warn", "episode ends", text)


def _check_accidents(
    report: EnvReport, spec: SafetySpec, recordings: list[Recording], listener: Listener
) -> None:
    """Whether the accident signal is ever seen, and ever absent."""
    share = float(np.mean([r.outcomes[:, 2].any() for r in recordings]))
    costs = [float(r.outcomes[:, 1].sum()) for r in recordings]
    mean_cost = float(np.mean(costs))
    report.measured |= {"accident_share": share, "mean_cost": mean_cost}
    text = f"{share:.0%} of the random episodes have one; cost {mean_cost:.3g} per episode"
    for words, steps in listener.no_costs.most_common(1):
        often = "" if steps == listener.steps else f" in {steps / listener.steps:.0%} of the steps"
        text += f", an accident being 1, since {words}{often}"
    found = (ADVICE_ON_SHARE.get(share), None if mean_cost else NO_COST)
    advice = " ".join(
        filter(None, (q.select(*found) for k, q in QUANTITIES.items() if k in spec.bounds))
    )
    if min(r.outcomes[:, 1].min() for r in recordings) < 0.0:
        advice = "A cost below 0 was seen: what is limited is a sum, so make costs 0 or more."
    if not advice:
        report.add("ok", "accidents", text)
    else:
        report.add("warn", "accidents", f"{text}. {advice}")


def _check_speed(report: EnvReport, listener: Listener) -> None:
    """What 50,000 steps cost, the learning apart."""
    rate = listener.steps / listener.step_seconds
    reset = float(np.median(listener.reset_seconds))
    report.measured |= {"steps_per_second": rate, "reset_ms": 1e3 * reset}
    resets = report.measured["episodes"] / report.measured["steps"]
    seconds = 50_000 * (1.0 / rate + reset * resets)
    text = f"{rate:,.0f} steps a second, reset {1e3 * reset:.2g} ms; 50k steps take {seconds:.3g} s"
    if seconds > SLOW:
        report.add("warn", "speed", f"{text} without the learning. Is a part of it needless?")
    else:
        report.add("ok", "speed", text)


def _check_pickle(report: EnvReport, raw: gymnasium.Env[Any, Any]) -> None:
    """Nothing here needs it; vectorised and distributed training elsewhere may."""
    try:
        pickle.loads(pickle.dumps(raw.unwrapped))
    except Exception as error:  # whatever pickle or the environment raises
        text = f"It cannot be pickled ({raised(error)}). Only other libraries may need that."
        report.add("warn", "pickle", text)
    else:
        report.add("ok", "pickle", "can be pickled")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
