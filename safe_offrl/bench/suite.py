"""Suites: methods x environments x paired seeds, as runs that the other commands can read."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safe_offrl.bench.methods import METHODS, Settings
from safe_offrl.config import coerce, read_yaml, suggestion
from safe_offrl.errors import ConfigError
from safe_offrl.record.run_names import NAME

MOST_SEEDS = 1_000


@dataclass(frozen=True)
class Suite:
    """What to run. ``pretrain`` and ``finetune`` hold for every method, ``settings`` for one.

    ``settings`` maps a method to ``{"pretrain": {...}, "finetune": {...}}``: what was tuned for it.
    ``datasets`` maps an environment to its log; the others use the cached default. Where a run
    keeps its versions (``keep_versions``), each is played ``replay_episodes`` times afterwards.
    """

    name: str
    environments: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    budget: int
    evaluation_episodes: int
    pretrain: Settings = field(default_factory=dict)
    finetune: Settings = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Settings]] = field(default_factory=dict)
    datasets: Mapping[str, str] = field(default_factory=dict)
    replay_episodes: int = 0


@dataclass(frozen=True)
class Job:
    """One run of the command ``kind``; ``needs`` is the folder of the one it starts from."""

    label: str  # "PointHazard-v0/ours/3"
    folder: Path
    kind: str
    options: Settings  # {"budget": 50_000, "seed": 3}
    overrides: tuple[str, ...]  # "key=value" each
    needs: Path | None = None

    @property
    def seed(self) -> int:
        """Of the run, and of the episodes that its policy is evaluated on."""
        return int(self.options["seed"])

    @property
    def arguments(self) -> tuple[str, ...]:
        """Those of the command, for a run that has not begun."""
        start = () if self.needs is None else (str(self.needs), "--accept-risk")
        options = (part for key, value in self.options.items() for part in (f"--{key}", str(value)))
        return (*start, *options, *self.overrides)


def load_suite(asked: str) -> Suite:
    """The suite of this name, or of this YAML file; ConfigError says what is wrong with it."""
    folder = importlib.resources.files("safe_offrl.configs") / "suites"
    known = sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name[0] != "_")
    if asked in known:
        text, name = (folder / f"{asked}.yaml").read_text(encoding="utf-8"), asked
    elif not asked.endswith((".yaml", ".yml")):
        raise ConfigError(
            f'There is no suite "{asked}". There are {", ".join(known)}; or give a YAML file.'
        )
    else:
        try:
            text, name = Path(asked).read_text(encoding="utf-8"), Path(asked).stem
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f'The suite "{asked}" cannot be read ({error}).') from error
    return parse_suite(text, name)


def parse_suite(text: str, name: str) -> Suite:
    """A suite from YAML; unknown keys and methods are refused with a suggestion."""
    # Keys of a suite.
    values = read_yaml(text, f"The suite {name}")
    known = {
        "environments": tuple[str, ...],
        "methods": tuple[str, ...],
        "seeds": int,
        "budget": int,
        "evaluation_episodes": int,
        "replay_episodes": int,
    }
    values.setdefault("replay_episodes", 0)
    mappings = ("pretrain", "finetune", "settings", "datasets")
    # Unknown and missing keys.
    for key in values:
        if key not in (*known, *mappings):
            raise ConfigError(f'Unknown key "{key}". {suggestion(key, [*known, *mappings])}')
    for key in known:
        if key not in values:
            raise ConfigError(f'The suite {name} does not say "{key}". Add it.')
    # Values by type.
    plain: dict[str, Any] = {key: coerce(hint, values[key], key) for key, hint in known.items()}
    nested: dict[str, Any] = {key: values.get(key) or {} for key in mappings}
    for key, value in nested.items():
        if not isinstance(value, dict):
            raise ConfigError(f'"{key}" of the suite {name} holds no key: value pairs. Correct it.')
    # Methods and their settings.
    for method in (*plain["methods"], *nested["settings"]):
        if method not in METHODS:
            raise ConfigError(f'There is no method "{method}". {suggestion(method, METHODS)}')
    for method, phases in nested["settings"].items():
        if not isinstance(phases, dict) or set(phases) - {"pretrain", "finetune"}:
            raise ConfigError(
                f'"settings.{method}" may hold "pretrain" and "finetune" alone. Correct it.'
            )
        for phase, settings in phases.items():
            if not isinstance(settings, dict | None):
                raise ConfigError(
                    f'"settings.{method}.{phase}" holds no key: value pairs. Correct it.'
                )
    # Files of logs.
    for env_id, path in nested["datasets"].items():
        coerce(str, path, f"datasets.{env_id}")
    # Sizes, and environments whose ids name folders.
    if plain["replay_episodes"] < 0 or plain["replay_episodes"] == 1:
        raise ConfigError(
            f"The suite {name} plays each version {plain['replay_episodes']} times again, but that "
            "takes 2 episodes at least. Set replay_episodes to 20, or leave it out."
        )
    if plain["seeds"] > MOST_SEEDS:
        raise ConfigError(f"The suite {name} has more than {MOST_SEEDS:,} seeds. Lower the number.")
    for env_id in plain["environments"]:
        folder = folder_name(env_id)
        if not NAME.fullmatch(folder) or set(folder) == {"."}:
            raise ConfigError(
                f'The environment "{env_id}" of the suite {name} cannot name a folder of runs. '
                "Give the id of an environment."
            )
    if min(plain["seeds"], plain["evaluation_episodes"]) < 1 or not plain["environments"]:
        raise ConfigError(
            f"The suite {name} needs at least 1 environment, 1 seed and 1 evaluation episode. "
            "Raise what is too small."
        )
    plain["seeds"] = tuple(range(plain["seeds"]))
    suite = Suite(name=name, **plain, **nested)
    # Versions to play.
    online = [setting for method in suite.methods for setting in settings_of(suite, method)[1]]
    if suite.replay_episodes and "keep_versions=True" not in online:
        raise ConfigError(
            f"The suite {name} plays versions again, but no method of it keeps any. Set "
            '"keep_versions: true" in "finetune", or in "finetune" of a method\'s settings.'
        )
    return suite


def narrowed(suite: Suite, methods: str | None, seeds: str | None) -> Suite:
    """Only these of its methods, and these seeds; both as words with commas between them."""
    if methods is not None:
        wanted = coerce(tuple[str, ...], methods, "--methods")
        for name in wanted:
            if name not in suite.methods:
                raise ConfigError(
                    f'The suite {suite.name} has no method "{name}". '
                    f"{suggestion(name, suite.methods)}"
                )
        suite = replace(suite, methods=wanted)
    if seeds is not None:
        suite = replace(suite, seeds=coerce(tuple[int, ...], seeds, "--seeds"))
    return suite


def jobs_of(suite: Suite, root: Path) -> list[Job]:
    """Every run of the suite in an order in which each comes after what it needs.

    Methods with the same offline settings share their pretrained policies, seed by seed. Seeds are
    the outer loop: an interrupted suite has whole pairs.
    """
    jobs: dict[Path, Job] = {}
    for seed in suite.seeds:
        for env in suite.environments:
            base = root / folder_name(env)
            for name in suite.methods:
                # Offline run, shared by the methods that have the same settings there.
                offline, online = settings_of(suite, name)
                pretrained = base / f"pretrained-{_variant(suite, name)}" / str(seed)
                source: dict[str, Any] = {"env": env, "seed": seed}
                if env in suite.datasets:
                    source["dataset"] = suite.datasets[env]
                jobs.setdefault(
                    pretrained,
                    Job(
                        label=str(pretrained.relative_to(root)),
                        folder=pretrained,
                        kind="pretrain",
                        options=source,
                        overrides=tuple(offline),
                    ),
                )
                # Online run.
                folder = base / name / str(seed)
                jobs[folder] = Job(
                    label=str(folder.relative_to(root)),
                    folder=folder,
                    kind="finetune",
                    options={"budget": suite.budget, "seed": seed},
                    overrides=tuple(online),
                    needs=pretrained,
                )
    return list(jobs.values())


def folder_name(env_id: str) -> str:
    """The folder of an environment's runs: its id without its module.

    >>> folder_name("my_package.envs:Reactor-v0")
    'Reactor-v0'
    """
    return env_id.rpartition(":")[2].replace("/", "-")


def settings_of(suite: Suite, name: str) -> tuple[list[str], list[str]]:
    """A method's settings of both phases, "key=value" each: the suite's, its own, what is tuned."""
    tuned = suite.settings.get(name, {})
    both = []
    for phase, common, own in (
        ("pretrain", suite.pretrain, METHODS[name].pretrain),
        ("finetune", suite.finetune, METHODS[name].finetune),
    ):
        values = flat(common) | flat(own) | flat(tuned.get(phase) or {})
        both.append([f"{key}={value}" for key, value in sorted(values.items())])
    return both[0], both[1]


def _variant(suite: Suite, name: str) -> str:
    """Which pretrained policies a method starts from: the first method's with equal settings."""
    wanted = settings_of(suite, name)[0]
    return next(m for m in suite.methods if settings_of(suite, m)[0] == wanted)


def flat(settings: Settings, prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys.

    >>> flat({"lagrangian": {"init": 3}, "utd": 2})
    {'lagrangian.init': 3, 'utd': 2}
    """
    result: dict[str, Any] = {}
    for key, value in settings.items():
        inner = (
            flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
        result |= inner
    return result
