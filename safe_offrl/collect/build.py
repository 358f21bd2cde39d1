"""Log a dataset of mixed quality from a mixture of behaviours, deterministically.

The behaviours are scripted controllers where the environment's module offers them, policies of
Stable-Baselines3 (PPO and SAC, plain and penalised) frozen at several stages of training, and
smooth random actions. How often each of them acts is chosen from a pilot so that the log holds a
stated share of unsafe episodes: those with an accident or, where the expected cost is constrained,
those that cost more than the limit. The interaction of training and pilot is NOT part of the log.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from safe_offrl.collect.behaviours import Behaviour, random_behaviour, scripted_behaviours
from safe_offrl.collect.log_plan import PILOT_EPISODES, CollectConfig, fitted
from safe_offrl.collect.mixture import Log, log_episodes, tell, unsafe_mixture
from safe_offrl.collect.sb3 import learnt_behaviours
from safe_offrl.data_formats.conversion import target_format
from safe_offrl.data_formats.loading import FILE_FORMATS
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.identity import KEY
from safe_offrl.env.make import make_env
from safe_offrl.errors import EnvError, UserError
from safe_offrl.files import cache_folder
from safe_offrl.record.progress import Say
from safe_offrl.spec import SafetySpec
from safe_offrl.types import signal_column

SOURCES = (
    "behaviours.py",
    "build.py",
    "frozen.py",
    "isolation.py",
    "sb3.py",
    "mixture.py",
)  # what the content of a log depends on
SHARE_TOLERANCE = 0.05  # a log whose share is further from the target carries a warning


def build_dataset(
    env_id: str,
    spec: SafetySpec,
    *,
    path: str | Path,
    config: CollectConfig | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    progress: Say | None = None,
) -> Path:
    """Log a dataset of ``env_id`` into ``path``, in the format that its name says; returns it.

    Trains what ``config`` names, estimates in a pilot how often each behaviour is unsafe, and mixes
    them towards ``config.unsafe_share`` of the episodes. Where no mixture comes near it, the
    closest is taken; the metadata's "warning" and ``progress`` say so. Deterministic for given
    versions and machine: the same arguments give the same sha256. With more than one worker, a
    script that calls this needs ``if __name__ == "__main__":``, as for any multiprocessing.

    ``steps``, or ``minutes`` at the speed that is measured first, bound all interaction, see
    :func:`safe_offrl.collect.log_plan.bounded`. Episodes that the environment fails in are left
    out; after too many in a row EnvError is raised, and what is logged by then is kept beside
    ``path``.
    """
    # Environment, settings and behaviours.
    config = config or CollectConfig()
    form = FILE_FORMATS[target_format(Path(path))]
    with contextlib.closing(make_env(env_id, spec)) as env:
        identity = env.identity()
        scripted = scripted_behaviours(env)
        config = fitted(env, spec, config, len(scripted), steps, minutes, progress)
        behaviours = [*scripted, random_behaviour(env.action_size)]
        behaviours += learnt_behaviours(
            env_id,
            spec,
            config.learners,
            seed=config.seed,
            workers=config.workers,
            progress=progress,
        )
        # Pilot.
        tell(progress, f"pilot: how often is each of {len(behaviours)} behaviours unsafe?")
        each = math.ceil(config.pilot_share * config.transitions / len(behaviours))
        pilot = [_pilot(env, behaviour, spec, each, config.seed) for behaviour in behaviours]
        # Log.
        log = Log()
        with _kept_if_broken_off(log, env, spec, config, behaviours, Path(path), progress):
            log_episodes(
                env,
                behaviours=behaviours,
                shares=unsafe_mixture(pilot, config.unsafe_share),
                transitions=config.transitions,
                seed=config.seed,
                progress=progress,
                log=log,
            )
        arrays = log.arrays(env)
        metadata = {**_metadata(env, spec, config, behaviours, arrays), KEY: identity}
    # Warnings.
    share = metadata["unsafe_share"]
    if log.dropped.count:
        metadata["dropped_episodes"] = log.dropped.count
    if warnings := _warnings(log, share, config.unsafe_share, spec):
        metadata["warning"] = " ".join(warnings)
    for warning in warnings:
        tell(progress, f"warning: {warning}")
    # File and summary.
    for lost in form.write(Path(path), arrays, metadata, None):
        tell(progress, f"warning: the format of {path} cannot hold {lost}")
    tell(progress, behaviour_table(metadata["behaviours"]))
    tell(
        progress,
        f"logged {len(arrays['rewards']):,} transitions in {len(arrays['episode_behaviours']):,} "
        f"episodes, {share:.1%} {_unsafe_phrase(spec)}: {path}",
    )
    return Path(path)


def _warnings(log: Log, share: float, wanted: float, spec: SafetySpec) -> list[str]:
    """What whoever learns from a log must know, of which a ``share`` of the episodes is unsafe."""
    warnings = []
    if log.dropped.count:
        warnings.append(
            f"{log.dropped.count:,} of {log.dropped.count + len(log.behaviours):,} episodes were "
            "left out, because the environment failed in them; whether there was an accident is "
            f"not known. The last time so: {log.dropped.last}"
        )
    if abs(share - wanted) > SHARE_TOLERANCE:
        warnings.append(
            f"{share:.1%} of the episodes {_unsafe_phrase(spec)}, not the {wanted:.0%} aimed at: "
            "the nearest mixture that the pilot found comes no closer."
        )
    return warnings


@contextlib.contextmanager
def _kept_if_broken_off(
    log: Log,
    env: AccidentEnv,
    spec: SafetySpec,
    config: CollectConfig,
    behaviours: Sequence[Behaviour],
    path: Path,
    progress: Say | None,
) -> Iterator[None]:
    """Write what is logged to a file beside ``path`` if the environment or a signal ends it."""
    try:
        yield
    except (EnvError, KeyboardInterrupt) as error:
        if not log.behaviours:
            raise
        names = (f"{path.stem}-unfinished{k or ''}{path.suffix}" for k in itertools.count())
        kept = next(free for name in names if not (free := path.with_name(name)).exists())
        arrays = log.arrays(env)
        metadata = _metadata(env, spec, config, behaviours, arrays)
        metadata["warning"] = "The log was broken off before it was complete."
        FILE_FORMATS[target_format(kept)].write(kept, arrays, metadata, None)
        text = f'The {len(log.rewards):,} transitions logged by then are kept: "{kept}".'
        if isinstance(error, EnvError):
            raise EnvError(f"{error} {text}") from error
        tell(progress, text)
        raise


def behaviour_table(behaviours: Sequence[Mapping[str, Any]]) -> str:
    """Who logged what, as text: the metadata's "behaviours", a line each."""
    lines = [
        f"{'behaviour':<24}{'penalty':>9}{'episodes':>10}{'return':>10}{'cost':>9}{'unsafe':>9}"
    ]
    for b in behaviours:
        penalty = "" if b.get("penalty") is None else f"{b['penalty']:.3g}"
        line = f"{b['name']:<24}{penalty:>9}{b['episodes']:>10}"
        if b["episodes"]:
            line += f"{b['mean_return']:>10.2f}{b['mean_cost']:>9.2f}{b['unsafe_share']:>9.1%}"
        lines.append(line)
    return "\n".join(lines)


def default_dataset(
    env_id: str = "PointHazard-v0",
    spec: SafetySpec | None = None,
    *,
    config: CollectConfig | None = None,
    progress: Say | None = None,
) -> Path:
    """Path of the cached default dataset of an environment; built on first use.

    It lies in ``$SAFE_OFFRL_CACHE``, else ``~/.cache/safe-offrl``, under a name that depends on the
    environment's identity (see env/identity.py), the accident rule, the settings, all versions, and
    the sources that log it, so a change of any of them builds a new file. Processes that ask at the
    same time wait for one of them to build it.
    """
    # What the file's content depends on.
    spec, config = spec or SafetySpec(), config or CollectConfig()
    env = make_env(env_id, spec)
    key = {
        "env_id": env_id,
        "accident": spec.accident,
        "cost_threshold": spec.cost_threshold,
        "unsafe": _unsafe_phrase(spec),
        "horizon": env.horizon,
        "config": asdict(replace(config, workers=1)),
        "versions": _versions(env),
        KEY: env.identity(),
        "sources": [
            hashlib.sha256(Path(__file__).with_name(name).read_bytes()).hexdigest()
            for name in SOURCES
        ],
    }
    env.close()
    # Place in the cache.
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder()
    path = folder / f"{env_id.rpartition(':')[2].replace('/', '-')}-{digest}.hdf5"
    if path.is_file():
        return path
    # Log, once for all processes that ask.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.is_file():  # another process may have built it meanwhile
                tell(progress, f"building the default dataset of {env_id} (once): {path}")
                build_dataset(env_id, spec, path=path, config=config, progress=progress)
    except OSError as error:
        raise UserError(
            f'The dataset cache "{folder}" cannot be written ({error}). '
            "Set the environment variable SAFE_OFFRL_CACHE to a folder of yours."
        ) from error
    return path


def _pilot(
    env: AccidentEnv, behaviour: Behaviour, spec: SafetySpec, steps: int, seed: int
) -> float:
    """Estimated probability that an episode is unsafe, (k + 1/2) / (n + 1), from unlogged ones."""
    arrays = log_episodes(
        env,
        behaviours=[behaviour],
        shares=[1.0],
        transitions=steps,
        episodes=PILOT_EPISODES,
        seed=seed,
        stream=f"pilot {behaviour.name}",
    )
    unsafe = _unsafe_episodes(arrays, spec)
    return float((unsafe.sum() + 0.5) / (len(unsafe) + 1))


def _starts(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
    """First row of each episode of a log of complete episodes [M]."""
    ends = np.flatnonzero(arrays["terminals"] | arrays["timeouts"])
    return np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)


def _unsafe_episodes(arrays: Mapping[str, NDArray[Any]], spec: SafetySpec) -> NDArray[np.bool_]:
    """Whether each episode had an accident or, if that is constrained, cost above the limit [M]."""
    starts = _starts(arrays)
    accidents = np.logical_or.reduceat(arrays["accidents"], starts)
    signal = spec.quantity.signal
    column = signal_column(signal) if signal else "costs"
    costs = np.add.reduceat(arrays[column], starts, dtype=np.float64)
    return np.asarray(spec.quantity.select(accidents, costs) > spec.limit_value)


def _unsafe_phrase(spec: SafetySpec) -> str:
    return spec.quantity.happened.format(limit=spec.limit_value)


def _metadata(
    env: AccidentEnv,
    spec: SafetySpec,
    config: CollectConfig,
    behaviours: Sequence[Behaviour],
    arrays: Mapping[str, NDArray[Any]],
) -> dict[str, Any]:
    """What the log is, how it came about, and who logged what."""
    # Episodes.
    starts, who = _starts(arrays), arrays["episode_behaviours"]
    unsafe = _unsafe_episodes(arrays, spec)
    accidents = np.logical_or.reduceat(arrays["accidents"], starts)
    returns = np.add.reduceat(arrays["rewards"], starts, dtype=np.float64)
    costs = np.add.reduceat(arrays["costs"], starts, dtype=np.float64)

    # Behaviours.
    def described(index: int, behaviour: Behaviour) -> dict[str, Any]:
        mine = who == index
        entry = {"name": behaviour.name, **behaviour.origin, "episodes": int(mine.sum())}
        if mine.any():
            entry |= {
                "mean_return": float(returns[mine].mean()),
                "mean_cost": float(costs[mine].mean()),
                "unsafe_share": float(unsafe[mine].mean()),
            }
        return entry

    # The log as a whole.
    return {
        "env_id": env.env_id,
        "accident": spec.accident,
        "cost_threshold": spec.cost_threshold,
        "constraint": spec.constraint,
        **({"cost_limit": spec.cost_limit} if spec.constraint == "cost" else {}),
        **({"signals": spec.signals} if spec.signals else {}),
        "horizon": env.horizon,
        "seed": config.seed,
        **_stored_actions(env),
        "behaviours": [described(k, b) for k, b in enumerate(behaviours)],
        "accident_share": float(accidents.mean()),
        "unsafe_share": float(unsafe.mean()),
        "target_unsafe_share": config.unsafe_share,
        "training": {**asdict(config.learners), "logged": False},
        "versions": _versions(env),
    }


def _versions(env: AccidentEnv) -> dict[str, str]:
    """What the content of a dataset depends on besides the arguments."""
    names = ("safe-offrl", "torch", "stable-baselines3")
    return env.versions() | {name: importlib.metadata.version(name) for name in names}


def _stored_actions(env: AccidentEnv) -> dict[str, Any]:
    """How the stored actions are to be read: their bounds, or that they are one-hot rows."""
    if env.discrete:
        return {"action_count": env.action_size}
    return {"action_low": -1.0, "action_high": 1.0}
