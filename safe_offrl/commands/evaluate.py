"""Play episodes with a run's final policy."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safe_offrl.check.situations import find_situations
from safe_offrl.commands.common import require_output, say_plain
from safe_offrl.commands.environment import changed_line, since_run
from safe_offrl.commands.filming import filming_evaluation
from safe_offrl.deploy.episodes import distinct
from safe_offrl.deploy.evaluate import evaluate
from safe_offrl.env.identity import KEY
from safe_offrl.errors import ConfigError
from safe_offrl.files import json_bytes, plain, write_atomic
from safe_offrl.record.final_policy import FinalPolicy, final_policy
from safe_offrl.record.find_run import find_run
from safe_offrl.record.progress import Heartbeat, Say
from safe_offrl.stats.fixed import clopper_pearson
from safe_offrl.types import Episode


def evaluate_run(
    run_name: str | Path,
    *,
    episodes: int = 100,
    mean_action: bool = False,
    seed: int = 0,
    videos: int = 0,
    out: str | Path | None = None,
    runs: str | Path = "runs",
    say: Say = say_plain,
) -> dict[str, Any]:
    """Play episodes with a run's final policy and write evaluation.json; returns its content.

    It lies in the run, or is the file ``out``, beside which videos are then: nothing is written
    into the run. Refused before the first episode if it cannot be written.

    Accident rate with its two-sided Clopper-Pearson interval: one look at a fixed number, where the
    environment has few situations (:mod:`safe_offrl.check.situations`) of different episodes.
    Returns are those of complete episodes, None if there is none; every episode has a cost. The
    first ``videos`` accidents are filmed. ConfigError where the environment is real: these episodes
    are on no record, those of :func:`certify_run` are.
    """
    # Run and target.
    if episodes < 1:
        raise ConfigError(f"{episodes} episodes cannot be evaluated. Ask for at least 1.")
    run = find_run(run_name, Path(runs))
    target = Path(out) if out is not None else run.path / "evaluation.json"
    if out is None:
        run.require_writable("Give --out FILE to write elsewhere.")
    require_output(target)
    # Policy and environment.
    final = final_policy(run)
    _require_simulation(final, episodes)
    safety, identity = final.safety, final.env.identity()
    for line in changed_line(f"that of {run.name}", since_run(run, identity)):
        say(line)
    # Episodes.
    played: list[Episode] = []
    with (
        contextlib.closing(final.env),
        filming_evaluation(target.parent, final, seed, videos, say) as watch,
        contextlib.closing(Heartbeat(say, lambda _: f"{len(played):,}/{episodes:,} episodes")),
    ):
        situations = find_situations(final.env)
        for episode in evaluate(
            final.env,
            final.policy,
            episodes,
            seed,
            mean_action=mean_action,
            watch=watch,
            worst_cost=final.worst_cost,
            worst_signals=final.worst_signals,
        ):
            played.append(episode)  # noqa: PERF402  # its length is shown meanwhile
    # Outcomes.
    accidents = sum(episode.accident for episode in played)
    returns = [e.episode_return for e in played if e.outcome == "complete"]
    mean, error = _mean_and_error(returns)
    cost, cost_error = _mean_and_error([episode.cost for episode in played])
    signals = {
        name: _mean_and_error([episode.signal_costs[name] for episode in played])
        for name in final.env.signals
    }
    different = distinct(played)
    # Of a few situations that are played again and again, a repeated episode says nothing new.
    counted = different if situations.few else played
    seen = sum(episode.accident for episode in counted)
    low, high = clopper_pearson(seen, len(counted), safety.confidence)
    # Result.
    guarded = sum(e.guarded_steps for e in played) / max(1, sum(e.steps for e in played))
    result: dict[str, Any] = {
        "episodes": episodes,
        "distinct_episodes": len(different),
        "situations": situations.as_dict(),
        "accidents": accidents,
        "accident_rate": accidents / episodes,
        "accident_rate_low": low,
        "accident_rate_high": high,
        "confidence": safety.confidence,
        "mean_return": plain(mean),
        "return_standard_error": plain(error),
        "mean_cost": cost,
        "cost_standard_error": cost_error,
        **({"signals": signals} if signals else {}),  # of each mean, standard error
        "mean_length": sum(episode.steps for episode in played) / episodes,
        "guarded_share": guarded,
        "mean_action": mean_action,
        "seed": seed,
        "checkpoint_sha256": final.checkpoint_sha256,
        KEY: identity,
    }
    # Summary and file.
    behind = f", the guard's fallback in {guarded:.1%} of the steps" if guarded else ""
    gain = f"{mean:.2f} +- {error:.2f}" if returns else "unknown: no episode came to its end"
    say(
        f"{run.name}: {accidents} accidents in {episodes} episodes, "
        f"rate {accidents / episodes:.3f} [{low:.3f}, {high:.3f}] at {safety.confidence:.0%}, "
        f"cost {cost:.2f} +- {cost_error:.2f}, "
        + "".join(f"{k} cost {m:.2f} +- {e:.2f}, " for k, (m, e) in signals.items())
        + f"return {gain}{behind}"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, json_bytes(result))
    if situations.few:
        say(
            f"warning: {situations}; {len(different):,} of these {episodes:,} episodes are "
            "different, which the interval counts, and none is of another situation"
        )
    if out is not None:
        say(f"file        {target}")
    return result


def _require_simulation(final: FinalPolicy, episodes: int) -> None:
    """ConfigError, and the environment closed, if it is a real one."""
    if final.environment.kind == "real":
        final.env.close()
        name = final.run.name
        raise ConfigError(
            f'The environment of "{name}" is real, where every episode must be on record and '
            "evaluate keeps no record. Use "
            f"`safe-offrl certify {name} --episodes {episodes}`, which does."
        )


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (0 for a single value); NaN without any."""
    # Not stats.fixed.mean_and_error, which rounds each partial sum and leaves the error of a single
    # value open: evaluation.json would change in its last digits.
    if not values:
        return math.nan, math.nan
    mean = math.fsum(values) / len(values)
    variance = math.fsum((x - mean) ** 2 for x in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))
