"""Evaluate and compare runs; log and inspect datasets."""

from __future__ import annotations

import contextlib
import functools
import math
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safe_offrl.check.environment import check_environment
from safe_offrl.check.inspect import INSPECTED, format_summary, summarise
from safe_offrl.check.situations import find_situations
from safe_offrl.collect.build import build_dataset, default_dataset
from safe_offrl.collect.log_plan import CollectConfig, add_log_time
from safe_offrl.commands.common import (
    DEFAULT_ENV,
    require_output,
    require_safety_keys,
    say_plain,
    with_logged_rule,
)
from safe_offrl.commands.environment import changed_line, since_run
from safe_offrl.commands.filming import filming_evaluation
from safe_offrl.config import load_config
from safe_offrl.data_formats.loading import load_dataset, stated_metadata
from safe_offrl.deploy.episodes import distinct
from safe_offrl.deploy.evaluate import evaluate
from safe_offrl.env.identity import KEY
from safe_offrl.errors import ConfigError, DataError
from safe_offrl.files import json_bytes, plain, write_atomic
from safe_offrl.record.final_policy import final_policy
from safe_offrl.record.progress import Heartbeat, Say
from safe_offrl.record.run import find_run
from safe_offrl.record.trust import trust_log
from safe_offrl.report import charts, data_chart, page, tables
from safe_offrl.report import comparison as report
from safe_offrl.report.markdown import write_markdown
from safe_offrl.report.run_data import Source
from safe_offrl.spec import SafetySpec
from safe_offrl.stats.fixed import clopper_pearson
from safe_offrl.train.pretrain import PretrainConfig, discount_of
from safe_offrl.types import Episode


def evaluate_run(
    reference: str | Path,
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
    if episodes < 1:
        raise ConfigError(f"{episodes} episodes cannot be evaluated. Ask for at least 1.")
    run = find_run(reference, Path(runs))
    target = Path(out) if out is not None else run.path / "evaluation.json"
    if out is None:
        run.require_writable("Give --out FILE to write elsewhere.")
    require_output(target)
    final = final_policy(run)
    if final.environment.kind == "real":
        final.env.close()
        raise ConfigError(
            f'The environment of "{run.name}" is real, where every episode must be on record and '
            "evaluate keeps no record. Use "
            f"`safe-offrl certify {run.name} --episodes {episodes}`, which does."
        )
    safety, identity = final.safety, final.env.identity()
    for line in changed_line(f"that of {run.name}", since_run(run, identity)):
        say(line)
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
        ):
            played.append(episode)  # noqa: PERF402  # its length is shown meanwhile
    accidents = sum(episode.accident for episode in played)
    returns = [e.episode_return for e in played if e.outcome == "complete"]
    mean, error = _mean_and_error(returns)
    costs = [episode.cost for episode in played]
    cost, cost_error = _mean_and_error(costs)
    different = distinct(played)
    # Of a few situations that are played again and again, a repeated episode says nothing new.
    counted = different if situations.few else played
    seen = sum(episode.accident for episode in counted)
    low, high = clopper_pearson(seen, len(counted), safety.confidence)
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
        "mean_length": sum(episode.steps for episode in played) / episodes,
        "mean_action": mean_action,
        "seed": seed,
        "checkpoint_sha256": final.checkpoint_sha256,
        KEY: identity,
    }
    gain = f"{mean:.2f} +- {error:.2f}" if returns else "unknown: no episode came to its end"
    say(
        f"{run.name}: {accidents} accidents in {episodes} episodes, "
        f"rate {accidents / episodes:.3f} [{low:.3f}, {high:.3f}] at {safety.confidence:.0%}, "
        f"cost {cost:.2f} +- {cost_error:.2f}, return {gain}"
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


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (0 for a single value); NaN without any."""
    if not values:
        return math.nan, math.nan
    mean = math.fsum(values) / len(values)
    variance = math.fsum((x - mean) ** 2 for x in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def compare_runs(
    references: Sequence[str | Path | Source],
    *,
    png: str | Path | None = None,
    svg: str | Path | None = None,
    html: str | Path | None = None,
    markdown: str | Path | None = None,
    group_by: str | None = None,
    by_run: bool | None = None,
    runs: str | Path = "runs",
    say: Say = say_plain,
) -> dict[str, Any]:
    """Print the comparison of runs, write what is asked for; returns it as plain values.

    A reference is a run, or a folder of runs: the seeds of one method, named like the folder.
    ``by_run``: whether the printed tables list each run; None: unless there are many.
    """
    comparison = report.compare(references, group_by=group_by, root=Path(runs))
    say(tables.format_table(comparison, by_run=by_run))
    figures = [Path(path) for path in (png, svg) if path is not None]
    for path in figures:
        path.parent.mkdir(parents=True, exist_ok=True)
        charts.write_figure(comparison, path)
        say(f"figure      {path}")
    if markdown is not None:
        Path(markdown).parent.mkdir(parents=True, exist_ok=True)
        write_markdown(comparison, Path(markdown), figures)
        say(f"markdown    {markdown}")
    if html is not None:
        Path(html).parent.mkdir(parents=True, exist_ok=True)
        page.write_html(comparison, Path(html))
        say(f"page        {html}")
    return comparison.as_dict()


def collect_run(
    *,
    env: str | None = None,
    out: str | Path | None = None,
    transitions: int | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    seed: int | None = None,
    workers: int | None = None,
    preset: str | Path | None = None,
    overrides: Sequence[str] = (),
    say: Say = say_plain,
) -> Path:
    """Log a dataset; without ``out`` it is the environment's cached default. Returns the path.

    ``steps`` or ``minutes`` bound what is done in the environment, see :func:`build_dataset`.
    """
    env_id = env or DEFAULT_ENV
    safety, config = collect_config(
        env_id,
        preset=preset,
        transitions=transitions,
        seed=seed,
        workers=workers,
        overrides=overrides,
    )
    if steps is not None and minutes is not None:
        raise ConfigError("Give --steps or --minutes: each bounds all that is done.")
    if minutes is not None and not 0.0 < minutes < math.inf:
        raise ConfigError(f"--minutes is {minutes:g}, but a number above 0 is needed. Try 20.")
    with contextlib.closing(Heartbeat(say, "collect     at work, {} so far".format)) as heart:
        if out is None:
            if any(given is not None for given in (transitions, seed, steps, minutes)):
                raise ConfigError(
                    "The cached default dataset has its own size and seed. "
                    "Give --out FILE to log another one."
                )
            path = default_dataset(env_id, safety, config=config, progress=heart.say)
        else:
            if Path(out).exists():
                raise DataError(f'"{out}" exists already. Remove it, or give another name.')
            require_output(Path(out))
            path = build_dataset(
                env_id,
                safety,
                path=Path(out),
                config=config,
                steps=steps,
                minutes=minutes,
                progress=heart.say,
            )
    trust_log(stated_metadata(path))
    say(f"dataset     {path}")
    return Path(path)


def collect_config(
    env: str | None = None,
    *,
    preset: str | Path | None = None,
    overrides: Sequence[str] = (),
    **flags: int | None,
) -> tuple[SafetySpec, CollectConfig]:
    """What is to be logged and how: the environment's preset or this one, flags, and KEY=VALUE.

    "safety.KEY" is part of the preset's section "pretrain", every other key of "collect".
    """
    env_id = env or DEFAULT_ENV
    safety = [text for text in overrides if text.startswith("safety.")]
    others = [text for text in overrides if not text.startswith("safety.")]
    config = load_config(
        CollectConfig,
        section="collect",
        env_id=env_id,
        preset=preset,
        flags=flags,
        overrides=others,
    )
    return _safety_spec(env_id, safety, preset), config


def inspect_dataset(
    dataset: str | Path,
    *,
    png: str | Path | None = None,
    overrides: Sequence[str] = (),
    say: Say = say_plain,
) -> dict[str, Any]:
    """Print what a dataset holds and what cannot be learnt from it; returns it as plain values.

    The accident rule is the file's own where nothing else is said; the limit is that of the preset
    of its environment.
    """
    stated = stated_metadata(dataset)
    resolve = functools.partial(
        load_config,
        PretrainConfig,
        section="pretrain",
        env_id=str(stated.get("env_id", "")),
        overrides=overrides,
    )
    config = with_logged_rule(resolve(), stated, resolve, imports=False)
    loaded = load_dataset(dataset, discount=discount_of(config), spec=config.safety)
    loaded = loaded.sample(INSPECTED, seed=0)
    summary = summarise(loaded, config.safety, config.held_out)
    say(format_summary(summary))
    if png is not None:
        Path(png).parent.mkdir(parents=True, exist_ok=True)
        data_chart.write_data_png(loaded, summary, Path(png))
        say(f"figure        {png}")
    return typing.cast(dict[str, Any], plain(summary.as_dict()))


def check_env_run(
    env_id: str, *, episodes: int = 20, overrides: Sequence[str] = (), say: Say = say_plain
) -> dict[str, Any]:
    """Print what keeps an environment from being used here; returns it as plain values.

    ``result["usable"]`` says whether nothing failed.
    """
    safety = _safety_spec(env_id, overrides)
    report = check_environment(env_id, safety, episodes=episodes)
    if report.usable:
        add_log_time(report, safety, collect_config(env_id)[1])
    say(str(report))
    return typing.cast(dict[str, Any], plain(report.as_dict()))


def _safety_spec(
    env_id: str, overrides: Sequence[str], preset: str | Path | None = None
) -> SafetySpec:
    """The accident rule for an environment: its preset or this one, and "safety.key=value"."""
    require_safety_keys(overrides)
    config = load_config(
        PretrainConfig, section="pretrain", env_id=env_id, preset=preset, overrides=overrides
    )
    return config.safety
