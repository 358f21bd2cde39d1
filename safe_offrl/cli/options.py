"""The options of the command line, each written once, and which command takes which.

Nothing heavy is imported at the top, so that --help answers at once (no torch).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

NEEDED = inspect.Parameter.empty  # as a default: it has to be given


class Option(NamedTuple):
    """An option or an argument; ``_replace(help=...)`` is the same one in a command's own words."""

    name: str  # of the keyword argument that it fills, in the command and in what that calls
    kind: Any  # what is typed is turned into this
    help: str | None
    default: Any = None  # means not given
    flag: str | None = None  # what is typed, where that is not the name with dashes
    metavar: str | None = None
    least: float | None = None
    parser: Callable[..., Any] | None = None
    callback: Callable[..., Any] | None = None
    positional: bool = False

    def parameter(self) -> inspect.Parameter:
        """The parameter that a function has to have for typer to make this option."""
        told: dict[str, Any] = {"help": self.help, "metavar": self.metavar, "min": self.least}
        told |= {"parser": self.parser, "callback": self.callback}
        flag = self.flag or f"--{self.name.replace('_', '-')}"
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=self.default,
            annotation=Annotated[
                self.kind | None if self.default is None else self.kind,
                typer.Argument(**told) if self.positional else typer.Option(flag, **told),
            ],
        )


def argument(name: str, kind: Any, metavar: str, text: str | None = None) -> Option:
    """What has to be given, by its place."""
    return Option(name, kind, text, NEEDED, metavar=metavar, positional=True)


def switch(name: str, text: str, **more: Any) -> Option:
    """What is on or off, and off if left out."""
    return Option(name, bool, text, default=False, **more)


def off(name: str, text: str) -> Option:
    """A setting that --no-... switches off; None if left out."""
    flag = f"--no-{name.replace('_', '-')}"
    return Option(name, bool, text, flag=flag, callback=lambda given: False if given else None)


def count(name: str, text: str, default: int | None = None) -> Option:
    """A number of steps or episodes."""
    return Option(name, int, f"{text} (50k, 1.5M).", default, metavar="N", parser=_whole_number)


def file(name: str, text: str) -> Option:
    """A file to be written."""
    return Option(name, Path, text, metavar="FILE")


def _whole_number(value: str | int) -> int:
    """Parse 200, 50k, 1.5M; typer sends defaults through here as well."""
    from safe_offrl.config import parse_count

    return value if isinstance(value, int) else parse_count(value)


def _only_json(context: typer.Context, wanted: bool) -> bool:
    """Keep standard output for the answer, from here to the end of the command."""
    if wanted:
        from safe_offrl.record.json_answer import only_answer

        context.with_resource(only_answer())
    return wanted


RUN = argument("run_name", str, "RUN", "A pretrain or finetune run.")
RUNS = Option("runs", Path, "Folder that holds the runs.", Path("runs"))
OUT = file("out", "Where to write; into the run if left out.")
SEED = Option("seed", int, "Seed of everything random.", least=0)
WORKERS = Option("workers", int, "Runs at the same time.", 1, least=1)
VIDEOS = Option("videos", int, "Film so many accidents, the first ones; none if out.", least=0)
ENV = Option("env", str, 'Gymnasium id or "package.module:Env-v0".', metavar="ID")
BUDGET = count("budget", "Steps in the environment")
EPSILON = Option("epsilon", float, "Limit of P(accident).")
COST_LIMIT = Option("cost_limit", float, "Limit of the expected cost per episode.")
LIMIT = Option(
    "limit",
    list[str],
    "A limit: accident=0.05, cost=25, or of a signal its name; once for each.",
    metavar="NAME=VALUE",
)
CONFIDENCE = Option("confidence", float, "Of intervals and limits.")
OVERRIDES = Option("overrides", list[str], None, metavar="KEY=VALUE", positional=True)
PRESET = Option(
    "preset",
    Path,
    "YAML file of settings, as those in configs/, instead of the environment's preset.",
    flag="--config",
    metavar="FILE",
)
PRINT_CONFIG = switch("print_config", "Print the resolved settings and stop.")
DRY_RUN = switch("dry_run", "Check everything, print the header and stop.")
DEBUG = switch("debug", "Show the traceback of an error.")
JSON = switch(
    "as_json", "Print one JSON object, the rest to stderr.", flag="--json", callback=_only_json
)
# Of a command that makes a run, or goes on with one.
RUNNING = (
    Option("name", str, "Name of the new run; numbered if left out."),
    RUNS,
    Option("resume", str, "Continue this run; it keeps its settings.", metavar="RUN"),
    Option("threads", int, "CPU threads of torch, 1 if left out; stored in the run.", least=1),
    Option("checkpoint_seconds", float, "Seconds of work that a crash may cost.", 10.0, least=0.0),
    PRESET,
    PRINT_CONFIG,
    DRY_RUN,
)

# Every name of agents.FAMILIES: importing that takes seconds, and help must not.
AGENT_WORDS = (
    "By imitation bc, bc_safe, awr, awac, crr, ccil, gail, dagger; by values iql, cql, calql; by "
    "constraints on the policy td3bc, rebrac, brac_p, brac_v, bear, bcq; with several modes "
    "latent, idql, fql, qc; by a model mopo, morel, combo; for discrete actions dqn, rem, qrdqn, "
    "bcq_discrete; for few states spibb, soft_spibb; or your own, module:name. docs/agents.md says "
    "when to take which."
)
# What a command takes, in the order of its help.
TAKEN: dict[str, tuple[Option, ...]] = {
    "pretrain": (
        OVERRIDES,
        Option("agent", str, AGENT_WORDS),
        ENV,
        Option("dataset", str, "A file, a folder or a local Minari id.", metavar="PATH"),
        count("steps", "Gradient steps"),
        LIMIT,
        SEED,
        *RUNNING,
        JSON,
        DEBUG,
    ),
    "assess": (
        argument("run_names", list[str], "RUN...", "Pretrain runs."),
        EPSILON._replace(help="Limit of P(accident); each run's own if left out."),
        *(COST_LIMIT, LIMIT, CONFIDENCE, OUT, RUNS, JSON, DEBUG),
    ),
    "finetune": (
        OVERRIDES._replace(name="arguments", metavar="RUN|KEY=VALUE"),
        *(BUDGET, EPSILON, COST_LIMIT, LIMIT),
        Option("delta", float, "Limit of the KL, in nats."),
        count("accident_budget", "Stop after this many accidents"),
        VIDEOS,
        Option("keep_versions", bool, "Keep every version that acts, for `replay`."),
        SEED,
        off("kl", "Switch the KL constraint off."),
        off("safety_constraint", "Switch the accident (or cost) constraint off."),
        off("shield", "Switch the shield off."),
        off("guard", "Switch the guard off."),
        switch(
            "accept_risk",
            "Start although the log does not show that the limit is kept; or resume although "
            "the environment has changed.",
        ),
        *RUNNING,
        JSON,
        DEBUG,
    ),
    "evaluate": (
        RUN,
        count("episodes", "Episodes", 100),
        switch("mean_action", "Act with the mean instead of sampling."),
        SEED._replace(help="Seed of the evaluation episodes.", default=0),
        *(VIDEOS, OUT, RUNS, JSON, DEBUG),
    ),
    "certify": (
        RUN._replace(help="A finished pretrain or finetune run."),
        EPSILON._replace(help="Accident probability to stay below; the run's own if out."),
        COST_LIMIT._replace(help="Expected cost of an episode to stay below."),
        LIMIT,
        CONFIDENCE._replace(help="Of the certificate, over all attempts on this run."),
        count("episodes", "Look once, after so many; else after each, until it is settled"),
        SEED._replace(help="Seed of the episodes.", default=0),
        *(RUNS, JSON, DEBUG),
    ),
    "replay": (
        RUN._replace(help="A finetune run with --keep-versions."),
        count("episodes", "Episodes of each version", 20),
        SEED._replace(help="Seed of the episodes.", default=0),
        *(RUNS, JSON, DEBUG),
    ),
    "verify": (argument("path", Path, "FILE", "A certificate.json."), JSON, DEBUG),
    "export": (
        RUN,
        Option(
            "file_format", str, "onnx or torchscript.", "onnx", flag="--format", metavar="FORMAT"
        ),
        *(OUT, RUNS, JSON, DEBUG),
    ),
    "ledger": (RUN._replace(help="A run folder or its name."), RUNS, JSON, DEBUG),
    "trust": (RUN._replace(help="A run folder or its name."), RUNS, DEBUG),
    "compare": (
        argument(
            "run_names", list[str], "RUN_OR_GROUP...", "Runs, and folders of runs: one method."
        ),
        file("png", "Write the charts."),
        file("svg", "Write the charts as vectors."),
        file("html", "Write it all as one page for a browser."),
        file("markdown", "Write the tables as Markdown."),
        Option("group_by", str, "Pool runs by this setting, not by method.", metavar="KEY"),
        Option(
            "by_run",
            bool,
            "Print each run too, or groups alone (default if many).",
            flag="--by-run/--by-group",
        ),
        *(RUNS, JSON, DEBUG),
    ),
    "benchmark": (
        Option(
            "suite",
            str,
            "smoke, point, safety, ablations, margin, precision, or a YAML file.",
            NEEDED,
        ),
        Option("methods", str, "Only these methods of the suite.", metavar="A,B"),
        Option("seeds", str, "These seeds instead of the suite's.", metavar="A,B"),
        *(WORKERS, RUNS, DRY_RUN._replace(help="Say what would be run, and stop."), JSON, DEBUG),
    ),
    "collect": (
        ENV,
        OUT._replace(help="Where to write; the cache if left out."),
        count("transitions", "Steps to log"),
        count("steps", "Most steps of trainings, pilot and log together"),
        Option("minutes", float, "The same, as minutes in the environment."),
        SEED,
        WORKERS._replace(help="Processes that train behaviours at the same time.", default=None),
        *(PRESET, PRINT_CONFIG, OVERRIDES, JSON, DEBUG),
    ),
    "inspect": (
        argument("dataset", str, "DATASET", "A file of any known format."),
        *(OVERRIDES, file("png", "Write the figure."), JSON, DEBUG),
    ),
    "convert": (
        argument("source", str, "SRC", "Any dataset: file, folder or local Minari id."),
        argument(
            "target", str, "DST", ".hdf5, .npz, .csv, .mmap (a folder); no suffix for Minari."
        ),
        *(OVERRIDES, JSON, DEBUG),
    ),
    "check_env": (
        argument("env_id", str, "ID"),
        *(OVERRIDES, count("episodes", "Random episodes", 20), JSON, DEBUG),
    ),
    "demo": (
        count("steps", "Offline gradient steps"),
        *(BUDGET._replace(default=20_000), SEED._replace(default=0), RUNS, DEBUG),
    ),
}
