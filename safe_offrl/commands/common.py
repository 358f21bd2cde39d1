"""What the commands share: stored inputs and header lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from safe_offrl.agents import AgentConfigs, find_agent
from safe_offrl.check.inspect import INSPECTED, dataset_warnings
from safe_offrl.compute.descent import Precision
from safe_offrl.config import from_dict, load_config
from safe_offrl.data.dataset import Dataset
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.errors import ConfigError, DataError, RunError
from safe_offrl.files import unwritable
from safe_offrl.limits import quantity_named
from safe_offrl.record.run import RunDir
from safe_offrl.record.run_config import RunInputs
from safe_offrl.record.trust import require_trusted_log
from safe_offrl.spec import SafetySpec
from safe_offrl.train.pretrain_config import PretrainConfig

DEFAULT_ENV = "PointHazard-v0"
LIMITS = "safety.limits."  # before the name of what is limited


def say_plain(text: str) -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)


def with_own_settings(name: str, configs: AgentConfigs) -> AgentConfigs:
    """Settings in which those of an agent of one's own are complete, and of its Config's types.

    The module of the agent ``name`` is imported, so a stored run must be trusted before.
    """
    agent = find_agent(name)
    if configs.key(agent) != "own":
        return configs
    return replace(configs, own=dict(vars(from_dict(agent.Config, configs.own))))


def with_logged_rule(
    config: PretrainConfig,
    metadata: Mapping[str, Any],
    resolve: Callable[..., PretrainConfig],
    *,
    imports: bool = True,
) -> PretrainConfig:
    """Settings under the accident rule that a log was made under, unless another one was asked for.

    ``resolve`` makes the settings anew, with what a log says among their sources. ConfigError if
    the rule is a function of a module (which a run ``imports``) and the log was not made here.
    """
    rule = {key: metadata.get(key) for key in ("accident", "cost_threshold")}
    if not isinstance(rule["accident"], str):
        return config
    words = {f"safety.{key}": value for key, value in rule.items() if value is not None}
    worded = resolve(logged=words)
    if worded.safety.accident != rule["accident"]:
        return config
    if imports and config.safety.accident != rule["accident"]:
        require_trusted_log(metadata)
    return worded


def logged_signals(
    metadata: Mapping[str, Any],
    overrides: Sequence[str],
    limited: Iterable[str] = (),
    *,
    imports: bool = True,
) -> dict[str, str]:
    """Settings that say where a log's own signals are found, of those that are limited.

    By ``overrides``, which may say it themselves, or else ``limited``. ConfigError if that is a
    function of a module (which a run ``imports``) and the log was not made here.
    """
    keys, said = [text.partition("=")[0] for text in overrides], metadata.get("signals")
    stated = said if isinstance(said, dict) else {}
    asked = [*limited, *(key.removeprefix(LIMITS) for key in keys if key.startswith(LIMITS))]
    found = {}
    for name in asked:
        source, key = stated.get(name), f"safety.signals.{name}"
        if isinstance(source, str) and key not in keys:
            if imports:
                require_trusted_log(metadata, name)
            found[key] = source
    return found


def stated_safety(
    env_id: str, overrides: Sequence[str], preset: str | Path | None = None
) -> SafetySpec:
    """The accident rule for an environment: its preset or this one, and "safety.key=value"."""
    require_safety_keys(overrides)
    config = load_config(
        PretrainConfig, section="pretrain", env_id=env_id, preset=preset, overrides=overrides
    )
    return config.safety


def stored_dataset(inputs: RunInputs, spec: SafetySpec, discount: float) -> Dataset:
    """Load the dataset a run was made with; DataError if it is gone or has changed."""
    path = Path(inputs.dataset)
    if not path.exists():
        raise DataError(
            f'The dataset "{path}" of this run is gone. Restore the file with the content sha256 '
            f"{inputs.dataset_sha256[:12]}..., or pretrain again."
        )
    horizon = spec.horizon or inputs.horizon
    try:
        dataset = load_dataset(path, discount=discount, spec=spec, horizon=horizon)
    except DataError as error:
        raise DataError(
            f'The dataset "{path}" has changed since this run was made, or this version of '
            f"safe-offrl reads it with more care: {error}"
        ) from error
    if dataset.sha256 != inputs.dataset_sha256:
        raise DataError(
            f'The dataset "{path}" has changed since this run was made (sha256 '
            f"{dataset.sha256[:12]}..., not {inputs.dataset_sha256[:12]}...). "
            "Restore it, or pretrain again."
        )
    return dataset


def stored_pretrain_run(inputs: RunInputs) -> RunDir:
    """Open the pretrain run that a fine-tuning run started from; RunError if it is gone."""
    if inputs.pretrained is None:
        raise ConfigError("config.yaml names no pretrain run. Start a new run.")
    path = Path(inputs.pretrained)
    if not path.is_dir():
        raise RunError(
            f'The pretrain run "{path}" that this run started from is gone. Restore it, or copy it '
            "too, to the same place beside this run."
        )
    return RunDir(path)


def require_both_outcomes(dataset: Dataset, path: Path, safety: SafetySpec) -> None:
    """Raise DataError if the data cannot tell safe from unsafe: all episodes of one kind."""
    for name in safety.bounds:
        if name == "accident":
            continue
        quantity = quantity_named(name)
        costs = dataset.signal_costs[name] if quantity.signal else dataset.episode_costs
        if costs.min() == costs.max():
            raise DataError(
                f'Every episode of the dataset "{path}" has the {quantity.event} {costs[0]:g}, so '
                f"{quantity.event} cannot be learnt from it. Log cheap and expensive episodes, or "
                "check the file's costs."
            )
    if "accident" not in safety.bounds:
        return
    accidents = int(dataset.episode_accidents.sum())
    if accidents in (0, dataset.episodes):
        what = "no accident" if accidents == 0 else "nothing but accidents"
        raise DataError(
            f'The dataset "{path}" has {what} in its {dataset.episodes} episodes, so risk cannot '
            "be learnt from it. Log episodes of both kinds, or check safety.accident."
        )


def data_line(dataset: Dataset, inputs: RunInputs) -> str:
    """Header line: what the run learns from."""
    share = float(dataset.episode_accidents.mean())
    return (
        f"data        {dataset.episodes:,} episodes, {len(dataset.rows):,} transitions, "
        f"{share:.1%} of the episodes with an accident, cost {dataset.episode_costs.mean():.3g} "
        f"an episode ({Path(inputs.dataset).name}, "
        f"sha256 {dataset.sha256[:12]})"
    )


def warning_lines(dataset: Dataset, safety: SafetySpec, held_out: float) -> list[str]:
    """Header lines: what a load noticed and what cannot be learnt from the log, as in inspect.

    ``held_out`` is the share of its episodes that the safety critic is calibrated on.
    """
    sample = dataset.sample(INSPECTED, seed=0)
    found = [
        f"warning     {text}"
        for limit in safety.all_limits(dataset.horizon, dataset.cost_max, dataset.signals_max)
        for text in dataset_warnings(sample, limit, held_out)
    ]
    return list(dict.fromkeys(found))  # what two limits have in common is said once


def constraint_line(safety: SafetySpec, horizon: int) -> str:
    """Header line: what is promised."""
    promised = [
        quantity_named(name).promise(value, horizon) for name, value in safety.bounds.items()
    ]
    return (
        f"constraints {', '.join(promised)}, KL < {safety.delta:g} nats (delta), "
        f'confidence {safety.confidence:.0%}, accident = "{safety.accident}"'
    )


def device_line(inputs: RunInputs, precision: Precision, compiling: str) -> str:
    """Header line: what it runs on, and how."""
    threads = f"{inputs.threads} thread{'s' if inputs.threads > 1 else ''}"
    name = "CPU" if inputs.device == "cpu" else f"{torch.cuda.get_device_name()}, CPU"
    return f"device      {name}, {threads}, {precision}, {compiling}"


def require_output(out: Path) -> None:
    """Refuse a file to be written, before the work whose result it is to hold.

    ConfigError if it is a folder, or if nothing can be written where it is to lie.
    """
    if out.is_dir():
        raise ConfigError(f'"{out}" is a folder. Give --out a file.')
    if why := unwritable(out.parent):
        raise ConfigError(
            f'"{out}" cannot be written ({why}). Repair that, or give --out another file.'
        )


def parse_overrides(arguments: Iterable[str]) -> list[str]:
    """Trailing key=value arguments; anything else is a mistyped argument."""
    found = list(arguments)
    for text in found:
        if "=" not in text:
            raise ConfigError(f'"{text}" is neither an option nor key=value. See --help.')
    return found


def require_safety_keys(overrides: Iterable[str]) -> None:
    """Raise ConfigError for key=value arguments other than those of the safety specification."""
    other = [text for text in overrides if not text.startswith("safety.")]
    if other:
        raise ConfigError(f'"{other[0]}" means nothing here. Only safety.KEY=VALUE can be given.')
