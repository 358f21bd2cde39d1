"""What a comparison needs of a run folder: settings, episodes, decisions and evaluation.

The ledger is the record of accidents; nothing is taken from TensorBoard.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from safe_offrl.env.identity import KEY
from safe_offrl.errors import RunError
from safe_offrl.limits import Quantity
from safe_offrl.record.kept_versions import REPLAY
from safe_offrl.record.run import RunDir
from safe_offrl.report.decisions import LoggedDecision, logged_decision
from safe_offrl.stats.fixed import Mean
from safe_offrl.types import Episode

_LIMIT_KEYS = {"accident": "epsilon", "cost": "cost_limit"}
_SWITCHES = {
    "kl": "no-kl",
    "safety_constraint": "no-safety-constraint",
    "shield": "no-shield",
    "guard": "no-guard",
}


class StoredEvaluation(NamedTuple):
    """What `safe-offrl evaluate` measured on the final policy, in episodes of its own."""

    episodes: int
    accidents: int
    mean_return: float  # over complete episodes; NaN if the environment failed in every one
    return_standard_error: float
    mean_cost: float
    cost_standard_error: float
    mean_length: float  # steps; NaN in evaluations from before it was written
    seed: int | None = None  # which episodes were played; this and the next None in old ones
    mean_action: bool | None = None
    signals: Mapping[str, Sequence[float]] = {}  # of each: mean cost, and its standard error

    def cost_in(self, quantity: Quantity) -> Mean:
        """The mean cost of what is limited; NaN if it was not measured."""
        if not quantity.signal:
            return Mean(self.mean_cost, self.cost_standard_error)
        return Mean(*self.signals.get(quantity.signal, (math.nan, math.nan)))


class StoredReplay(NamedTuple):
    """What `safe-offrl replay` found of the versions that acted, each played again."""

    versions: int
    above: int  # shown to exceed the limit, one-sided
    correlation: float  # of estimates with truths over versions; NaN if unknown
    most_cost: float  # of an episode


class Question(NamedTuple):
    """What a run's accidents and returns are about, as far as its files say.

    ``identity`` (see env/identity.py) is that of the environment it began in; of a run of an
    earlier version only rule and horizon, from its settings. ``source`` is the sha256 of the
    environment's file. ``resumed`` are the identities of others that it went on in, ``evaluated``
    is that of its evaluation.
    """

    identity: Mapping[str, Any] = {}
    source: str | None = None
    resumed: Sequence[Any] = ()
    evaluated: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class RunData:
    """One run folder, read."""

    name: str
    kind: str
    status: str
    method: str
    seed: int
    pretrained: str  # identity of the policy it started from; pairs runs together with the seed
    env_id: str
    budget: int | None
    constraint: str  # "accident", "cost" or a cost signal
    limit: float  # epsilon, or the cost limit; NaN if unknown
    limits: Mapping[str, float]  # of a run that has several, by what is limited
    confidence: float
    episodes: list[Episode]
    constrained: bool  # whether an acceptance step decided who acts
    decisions: list[LoggedDecision]
    evaluation: StoredEvaluation | None
    estimate: float  # of what is constrained, final policy, by the safety critic; NaN if unknown
    question: Question = field(default_factory=Question)
    replay: StoredReplay | None = None

    @property
    def accidents(self) -> int:
        """Of the phase online, all episodes together."""
        return sum(episode.accident for episode in self.episodes)


def method_label(settings: Mapping[str, Any]) -> str:
    """Name of a fine-tuning configuration by what is switched off.

    >>> method_label({"kl": True, "safety_constraint": True, "shield": True, "guard": True})
    'constrained'
    >>> method_label({"kl": False, "safety_constraint": True, "shield": False})
    'no-kl no-shield no-guard'
    >>> method_label({"kl": False, "safety_constraint": False, "shield": False})
    'rlpd (all off)'
    """
    # Runs of earlier versions had no guard.
    off = [label for key, label in _SWITCHES.items() if not settings.get(key, key != "guard")]
    learner = str(_baseline(settings, "learner"))
    start = " from scratch" if _baseline(settings, "from_scratch") else ""
    multiplier = _baseline(settings, "multiplier")
    if multiplier != "ours":
        return f"{learner}-lagrangian ({multiplier}){start}"
    if len(off) == len(_SWITCHES):
        return f"{learner} (all off){start}"
    return " ".join(off) or "constrained"


def _baseline(settings: Mapping[str, Any], key: str) -> Any:
    """A setting of ``baseline``, which runs of earlier versions do not have."""
    values = {"learner": "rlpd", "from_scratch": False, "multiplier": "ours"}
    return (values | dict(settings.get("baseline") or {}))[key]


def read_run(path: Path, group_by: str | None = None, group: str | None = None) -> RunData:
    """Read one run folder; RunError if it is none or is damaged.

    ``group_by``: dotted key of the stored settings ("utd", "safety.epsilon") to group runs by,
    instead of ``group``, the folder's label, or else :func:`method_label`.
    """
    # Settings.
    run = RunDir(Path(path))
    kind, status = run.kind, str(run.state.get("status", "unknown"))
    settings, inputs = _read_config(run, kind)
    safety = settings.get("safety") or {}
    try:
        # Method.
        if group_by is not None:
            method = f"{group_by}={_lookup(settings, group_by, run.name)}"
        elif group is not None:
            method = group
        else:
            method = method_label(settings) if kind == "finetune" else "pretrained (frozen)"
        evaluated = _evaluation_file(run)
        # The policy that pairs are made by.
        if kind == "pretrain":  # It is paired with what started from it.
            origin = evaluated.get("checkpoint_sha256")
        else:
            origin = inputs.get("pretrained_sha256") or inputs.get("pretrained")
        # Record.
        decisions = [logged_decision(line) for line in run.iterations()]
        constraint, limits = str(safety.get("constraint", "accident")), safety.get("limits") or {}
        return RunData(
            name=run.name if group is None else f"{group}/{run.path.name}",
            kind=kind,
            status=status,
            method=method,
            seed=int(settings.get("seed", 0)),
            pretrained=str(origin or ""),
            env_id=str(inputs.get("env_id") or settings.get("env") or "unknown"),
            budget=int(settings["budget"]) if "budget" in settings else None,
            constraint=constraint,
            limit=float(limits.get(constraint, safety.get(_LIMIT_KEYS.get(constraint), math.nan))),
            limits=limits,
            confidence=float(safety.get("confidence", 0.95)),
            episodes=run.episodes(),
            constrained=kind == "finetune"
            and _baseline(settings, "multiplier") == "ours"
            and any(settings.get(key, True) for key in _SWITCHES),
            decisions=decisions,
            evaluation=_evaluation(evaluated) if evaluated else None,
            estimate=_estimate(run, decisions),
            question=_question(run, safety, inputs.get("horizon"), evaluated),
            replay=_replay(run),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f'The run "{run.name}" holds a value that cannot be read ({error!r}). '
            "Restore the folder from a backup or leave the run out."
        ) from error


def _question(
    run: RunDir, safety: Mapping[str, Any], horizon: Any, evaluated: Mapping[str, Any]
) -> Question:
    rule = {key: safety.get(key) for key in ("accident", "cost_threshold")}
    settings = {"rule": rule, "horizon": safety.get("horizon") or horizon}
    known, *resumed = run.environments or [settings]
    source = (run.versions.get("environment") or {}).get("environment_source")
    return Question(dict(known), source, resumed, evaluated.get(KEY))


def _read_config(run: RunDir, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings of the run's kind, inputs) from config.yaml."""
    try:
        values = yaml.safe_load(run.config_text)
        settings, inputs = values.get(kind, values), values.get("inputs") or {}
    except (OSError, ValueError, RecursionError, AttributeError, yaml.YAMLError) as error:
        raise RunError(
            f'config.yaml of the run "{run.name}" is missing or damaged ({error}). '
            "Restore it from a backup or leave the run out."
        ) from error
    return settings, inputs


def _lookup(settings: Mapping[str, Any], dotted: str, name: str) -> Any:
    value: Any = settings
    for part in dotted.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise RunError(
                f'The run "{name}" has no setting "{dotted}" to group by. '
                "Give a key that `--print-config` shows."
            )
        value = value[part]
    return value


def _evaluation_file(run: RunDir) -> dict[str, Any]:
    """evaluation.json; empty if there is none."""
    return run.read_json("evaluation.json") if (run.path / "evaluation.json").is_file() else {}


def _evaluation(values: Mapping[str, Any]) -> StoredEvaluation:
    mean, error = values["mean_return"], values.get("return_standard_error")
    length, seed = values.get("mean_length"), values.get("seed")
    return StoredEvaluation(
        episodes=int(values["episodes"]),
        accidents=int(values["accidents"]),
        mean_return=math.nan if mean is None else float(mean),
        return_standard_error=math.nan if error is None else float(error),
        mean_cost=float(values["mean_cost"]),
        cost_standard_error=float(values["cost_standard_error"]),
        mean_length=math.nan if length is None else float(length),
        seed=None if seed is None else int(seed),
        mean_action=values.get("mean_action"),
        signals=values.get("signals", {}),
    )


def _replay(run: RunDir) -> StoredReplay | None:
    values = run.read_json(REPLAY) if (run.path / REPLAY).is_file() else None
    if values is None or len(values["versions"]) != values["kept"]:  # It was broken off.
        return None
    known, versions = values["correlation"], values["versions"]
    return StoredReplay(
        versions=len(versions),
        above=int(values["above"]),
        correlation=math.nan if known is None else float(known),
        most_cost=max(float(version["most_cost"]) for version in versions),
    )


def evaluation_notes(methods: Mapping[str, Sequence[RunData]]) -> list[str]:
    """What the reader must know of the evaluations of these methods' runs before believing them."""
    alike: dict[tuple[int, int], list[str]] = {}
    for method, runs in methods.items():
        played = [(run.env_id, run.evaluation.seed) for run in runs if run.evaluation is not None]
        copies = Counter(key for key in played if key[1] is not None)
        if shared := sum(n for n in copies.values() if n > 1):
            alike.setdefault((shared, len(played)), []).append(method)
    notes = [
        f"{', '.join(names)}: {shared} of {count} evaluations each played the same episodes as "
        "another, so their pooled interval is too narrow."
        for (shared, count), names in alike.items()
    ]
    actions = {
        run.name: run.evaluation.mean_action
        for runs in methods.values()
        for run in runs
        if run.evaluation is not None
    }
    if {True, False} <= set(actions.values()):
        names = ", ".join(name for name, mean in actions.items() if mean)
        notes.append(f"The evaluations of {names} took mean actions, the others sampled them.")
    return notes


def _estimate(run: RunDir, decisions: Sequence[LoggedDecision]) -> float:
    """The calibration report's estimate, or the last iteration's for the policy that acts on."""
    if run.kind == "pretrain":
        has_report = (run.path / "calibration.json").is_file()
        return float(run.read_json("calibration.json")["estimate"]) if has_report else math.nan
    measured = [d for d in decisions if not math.isnan(d.v_candidate)]
    if not measured:
        return math.nan
    last = measured[-1]
    return last.v_candidate if last.accepted or last.rolled_back else last.v_deployed
