"""The command line: `safe-offrl COMMAND`. A command parses its arguments and calls a function.

The functions are those of :mod:`safe_offrl.commands`.

Everything heavy is imported inside the commands, so that --help answers at once (no torch).
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safe_offrl.errors import UserError

if TYPE_CHECKING:
    from safe_offrl.record.progress import Say

app = typer.Typer(
    help="Learn from a log, finish learning in the real thing, and count every accident.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _count(value: str | int) -> int:
    """Parse 200, 50k, 1.5M; typer sends defaults through here as well."""
    from safe_offrl.config import parse_count

    return value if isinstance(value, int) else parse_count(value)


def _count_option(help_text: str, name: str) -> Any:
    return typer.Option(name, parser=_count, metavar="N", help=f"{help_text} (50k, 1.5M).")


def _only_json(context: typer.Context, wanted: bool) -> bool:
    """Keep standard output for the answer, from here to the end of the command."""
    if wanted:
        from safe_offrl.record.json_answer import only_answer

        context.with_resource(only_answer())
    return wanted


Runs = Annotated[Path, typer.Option("--runs", help="Folder that holds the runs.")]
Name = Annotated[str | None, typer.Option(help="Name of the new run; numbered if left out.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of everything random.")]
Resume = Annotated[
    str | None, typer.Option(metavar="RUN", help="Continue this run; it keeps its settings.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads of torch, 1 if left out; stored in the run.")
]
Json = Annotated[
    bool,
    typer.Option("--json", callback=_only_json, help="Print one JSON object, the rest to stderr."),
]
CheckpointSeconds = Annotated[
    float, typer.Option(min=0.0, help="Seconds of work that a crash may cost.")
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="YAML file of settings, as those in configs/, instead of the environment's preset.",
    ),
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print the resolved settings and stop.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, print the header and stop.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Videos = Annotated[
    int | None, typer.Option(min=0, help="Film so many accidents, the first ones; none if out.")
]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Where to write; into the run if left out.")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", show_default=False)]


@app.command()
def pretrain(
    overrides: Overrides = None,
    agent: Annotated[
        str | None, typer.Option(help="iql, cql, calql, bc_safe, or your own: module:name.")
    ] = None,
    env: Annotated[
        str | None, typer.Option(metavar="ID", help='Gymnasium id or "package.module:Env-v0".')
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="PATH", help="A file, a folder or a local Minari id.")
    ] = None,
    steps: Annotated[int | None, _count_option("Gradient steps", "--steps")] = None,
    seed: Seed = None,
    name: Name = None,
    runs: Runs = Path("runs"),
    resume: Resume = None,
    threads: Threads = None,
    checkpoint_seconds: CheckpointSeconds = 10.0,
    config: Config = None,
    print_config: PrintConfig = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Learn a policy and its safety critic from a dataset, offline.

    Takes no step in the environment: let `safe-offrl check-env` find what is wrong with one.
    """
    from safe_offrl import commands
    from safe_offrl.record.run import require_runs_folder

    say = _say(as_json)
    writing: dict[str, Any] = {"runs": runs, "checkpoint_seconds": checkpoint_seconds, "say": say}
    settings: dict[str, Any] = {
        "agent": agent,
        "env": env,
        "dataset": dataset,
        "steps": steps,
        "seed": seed,
    }
    keys = commands.parse_overrides(overrides or [])
    if resume is not None:
        _refuse_settings_on_resume([*settings.values(), name, config, *keys])
        run = commands.resume_pretrain(resume, threads=threads, **writing)
    else:
        resolved = commands.pretrain_config(**settings, preset=config, overrides=keys)
        if print_config:
            _print_settings(resolved, as_json=as_json)
            return
        if not dry_run:
            require_runs_folder(runs, name)
        plan = commands.plan_pretrain(resolved, threads=threads or 1, preset=config, say=say)
        if dry_run:
            _end_dry_run(plan.header, say, as_json=as_json)
            return
        run = commands.pretrain_run(plan, name=name, **writing)
    if as_json:
        _print_json({"run": str(run.path), "calibration": run.read_json("calibration.json")})


@app.command()
def assess(
    references: Annotated[list[str], typer.Argument(metavar="RUN...", help="Pretrain runs.")],
    epsilon: Annotated[
        float | None, typer.Option(help="Limit of P(accident); each run's own if left out.")
    ] = None,
    cost_limit: Annotated[
        float | None, typer.Option(help="Limit of the expected cost per episode.")
    ] = None,
    confidence: Annotated[float | None, typer.Option(help="Of intervals and limits.")] = None,
    out: Out = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say from the log alone what a pretrained policy would do; of several, name the one to use.

    Writes assessment.json into each run, or all of it into FILE.
    """
    from safe_offrl import commands

    result = commands.assess_runs(
        references,
        epsilon=epsilon,
        cost_limit=cost_limit,
        confidence=confidence,
        out=out,
        runs=runs,
        say=_say(as_json),
    )
    if as_json:
        _print_json(result)


@app.command()
def finetune(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="RUN|KEY=VALUE", show_default=False)
    ] = None,
    budget: Annotated[int | None, _count_option("Steps in the environment", "--budget")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Limit of P(accident).")] = None,
    cost_limit: Annotated[
        float | None, typer.Option(help="Limit of the expected cost per episode.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Limit of the KL, in nats.")] = None,
    accident_budget: Annotated[
        int | None, _count_option("Stop after this many accidents", "--accident-budget")
    ] = None,
    videos: Videos = None,
    seed: Seed = None,
    no_kl: Annotated[bool, typer.Option("--no-kl", help="Switch the KL constraint off.")] = False,
    no_safety_constraint: Annotated[
        bool,
        typer.Option(
            "--no-safety-constraint", help="Switch the accident (or cost) constraint off."
        ),
    ] = False,
    no_shield: Annotated[bool, typer.Option("--no-shield", help="Switch the shield off.")] = False,
    accept_risk: Annotated[
        bool,
        typer.Option(
            "--accept-risk",
            help="Start although the log does not show that the limit is kept; or resume although "
            "the environment has changed.",
        ),
    ] = False,
    name: Name = None,
    runs: Runs = Path("runs"),
    resume: Resume = None,
    threads: Threads = None,
    checkpoint_seconds: CheckpointSeconds = 10.0,
    config: Config = None,
    print_config: PrintConfig = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Go on learning in the environment, within both constraints.

    RUN is a finished pretrain run; the newest one if left out. Refuses to start unless the log
    shows that its policy keeps the limit, see `safe-offrl assess`.
    """
    from safe_offrl import commands
    from safe_offrl.record.run import find_run, require_runs_folder

    say = _say(as_json)
    writing: dict[str, Any] = {"runs": runs, "checkpoint_seconds": checkpoint_seconds, "say": say}
    # Both are optional and positional: what holds no "=" is the run.
    references = [text for text in arguments or [] if "=" not in text]
    keys = [text for text in arguments or [] if "=" in text]
    if len(references) > 1:
        commands.parse_overrides(references[1:])
    settings: dict[str, Any] = {
        "budget": budget,
        "epsilon": epsilon,
        "cost_limit": cost_limit,
        "delta": delta,
        "accident_budget": accident_budget,
        "videos": videos,
        "seed": seed,
        "kl": False if no_kl else None,
        "safety_constraint": False if no_safety_constraint else None,
        "shield": False if no_shield else None,
    }
    if resume is not None:
        _refuse_settings_on_resume([*settings.values(), name, config, *references, *keys])
        run = commands.resume_finetune(resume, threads=threads, accept_risk=accept_risk, **writing)
    else:
        source = find_run(references[0] if references else None, runs, "pretrain")
        resolved = commands.finetune_config(source, **settings, preset=config, overrides=keys)
        if print_config:
            _print_settings(resolved, as_json=as_json)
            return
        if not dry_run:
            require_runs_folder(runs, name)
        plan = commands.plan_finetune(
            source, resolved, threads=threads or 1, accept_risk=accept_risk, say=say
        )
        if dry_run:
            _end_dry_run(plan.header, say, as_json=as_json)
            return
        run = commands.finetune_run(plan, name=name, **writing)
    if as_json:
        episodes = run.episodes()
        accidents = sum(e.accident for e in episodes)
        _print_json(
            {"run": str(run.path), "episodes": len(episodes), "accidents": accidents}
            | {"steps": episodes[-1].total_steps if episodes else 0}
        )


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A pretrain or finetune run.")],
    episodes: Annotated[int, _count_option("Episodes", "--episodes")] = 100,
    mean_action: Annotated[
        bool, typer.Option("--mean-action", help="Act with the mean instead of sampling.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the evaluation episodes.")] = 0,
    videos: Videos = None,
    out: Out = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Play episodes with a run's final policy; writes evaluation.json into the run, or FILE."""
    from safe_offrl import commands

    result = commands.evaluate_run(
        run,
        episodes=episodes,
        mean_action=mean_action,
        seed=seed,
        videos=videos or 0,
        out=out,
        runs=runs,
        say=_say(as_json),
    )
    if as_json:
        _print_json(result)


@app.command()
def certify(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A finished pretrain or finetune run.")],
    epsilon: Annotated[
        float | None, typer.Option(help="Accident probability to stay below; the run's own if out.")
    ] = None,
    cost_limit: Annotated[
        float | None, typer.Option(help="Expected cost of an episode to stay below.")
    ] = None,
    confidence: Annotated[
        float | None, typer.Option(help="Of the certificate, over all attempts on this run.")
    ] = None,
    episodes: Annotated[
        int | None,
        _count_option(
            "Look once, after so many; else after each, until it is settled", "--episodes"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the episodes.")] = 0,
    runs: Runs = Path("runs"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prove how few accidents a run's final policy has; writes certificate.json and a page.

    Exit code 0 if certified, 3 if refuted or undecided.
    """
    from safe_offrl import commands

    result = commands.certify_run(
        run,
        epsilon=epsilon,
        cost_limit=cost_limit,
        confidence=confidence,
        episodes=episodes,
        seed=seed,
        runs=runs,
        say=_say(as_json),
    )
    if as_json:
        _print_json(result)
    if result["verdict"] != "certified":
        raise typer.Exit(3)


@app.command()
def verify(
    certificate: Annotated[Path, typer.Argument(metavar="FILE", help="A certificate.json.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a certificate: hashes, arithmetic, and beside its run the episodes and the policy."""
    from safe_offrl import commands

    checks = commands.verify_certificate(certificate, say=_say(as_json))
    if as_json:
        _print_json({check.name: check.detail for check in checks})


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A pretrain or finetune run.")],
    file_format: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="onnx or torchscript.")
    ] = "onnx",
    out: Out = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a run's final policy and its shield as one graph for use without Python.

    FILE.json beside it says how to feed it, and which policy and shield it holds.
    """
    from safe_offrl import commands

    result = commands.export_run(
        run, file_format=file_format, out=out, runs=runs, say=_say(as_json)
    )
    if as_json:
        _print_json(result)


@app.command()
def ledger(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder or its name.")],
    runs: Runs = Path("runs"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print a run's record of episodes and accidents, and verify its hash chain.

    Exit code 1 if the record is damaged.
    """
    from safe_offrl import commands

    result = commands.show_ledger(run, runs=runs, say=_say(as_json))
    if as_json:
        _print_json(result)
    if not result["intact"]:
        raise typer.Exit(1)


@app.command()
def trust(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder or its name.")],
    runs: Runs = Path("runs"),
    debug: Debug = False,
) -> None:
    """Let a run that was made elsewhere import the modules that its settings name; once is enough.

    That executes them here, so it is asked for.
    """
    from safe_offrl import commands

    commands.trust_run(run, runs=runs)


@app.command()
def compare(
    references: Annotated[
        list[str],
        typer.Argument(metavar="RUN_OR_GROUP...", help="Runs, and folders of runs: one method."),
    ],
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the charts.")] = None,
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the charts as vectors.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it all as one page for a browser.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the tables as Markdown.")
    ] = None,
    group_by: Annotated[
        str | None, typer.Option(metavar="KEY", help="Pool runs by this setting, not by method.")
    ] = None,
    by_run: Annotated[
        bool | None,
        typer.Option(
            "--by-run/--by-group", help="Print each run too, or groups alone (default if many)."
        ),
    ] = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare methods over their seeds: accidents, returns, constraints, with intervals."""
    from safe_offrl import commands

    result = commands.compare_runs(
        references,
        png=png,
        svg=svg,
        html=html,
        markdown=markdown,
        group_by=group_by,
        by_run=by_run,
        runs=runs,
        say=_say(as_json),
    )
    if as_json:
        _print_json(result)


@app.command()
def benchmark(
    suite: Annotated[str, typer.Option(help="smoke, point, safety, or a YAML file.")],
    methods: Annotated[
        str | None, typer.Option(metavar="A,B", help="Only these methods of the suite.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="A,B", help="These seeds instead of the suite's.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
    runs: Runs = Path("runs"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be run, and stop.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run methods x environments x paired seeds, resumable, and compare them.

    Runs go to RUNS/benchmark-SUITE; the same command goes on after an interruption.
    """
    from safe_offrl import commands
    from safe_offrl.bench.suite import load_suite, narrowed

    say = _say(as_json)
    plan = narrowed(load_suite(suite), methods, seeds)
    root = runs / f"benchmark-{plan.name}"
    if dry_run:
        _end_dry_run(commands.benchmark_text(plan, root), say, as_json=as_json)
        return
    result = commands.benchmark_run(plan, root=root, workers=workers, say=say)
    if as_json:
        _print_json(result)


@app.command()
def collect(
    env: Annotated[
        str | None, typer.Option(metavar="ID", help='Gymnasium id or "package.module:Env-v0".')
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write; the cache if left out.")
    ] = None,
    transitions: Annotated[int | None, _count_option("Steps to log", "--transitions")] = None,
    steps: Annotated[
        int | None, _count_option("Most steps of trainings, pilot and log together", "--steps")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="The same, as minutes in the environment.")
    ] = None,
    seed: Seed = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that train behaviours at the same time.")
    ] = None,
    config: Config = None,
    print_config: PrintConfig = False,
    overrides: Overrides = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train behaviours and log a dataset with a mixture of them.

    KEY=VALUE takes safety.accident=..., safety.constraint=... and so on, and what --print-config
    lists. The name of FILE says the format, as with convert.
    """
    from safe_offrl import commands

    keys = commands.parse_overrides(overrides or [])
    settings: dict[str, Any] = {"transitions": transitions, "seed": seed, "workers": workers}
    settings["preset"] = config
    if print_config:
        resolved = commands.collect_config(env, overrides=keys, **settings)[1]
        _print_settings(resolved, as_json=as_json)
        return
    path = commands.collect_run(
        env=env,
        out=out,
        steps=steps,
        minutes=minutes,
        **settings,
        overrides=keys,
        say=_say(as_json),
    )
    if as_json:
        _print_json({"dataset": str(path)})


@app.command()
def inspect(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="A file of any known format.")],
    overrides: Overrides = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figure.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a dataset holds, and what cannot be learnt from it."""
    from safe_offrl import commands

    summary = commands.inspect_dataset(
        dataset, png=png, overrides=commands.parse_overrides(overrides or []), say=_say(as_json)
    )
    if as_json:
        _print_json(summary)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Any dataset: file, folder or local Minari id.")
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="DST", help=".hdf5, .npz, .csv, .mmap (a folder); no suffix for Minari."
        ),
    ],
    overrides: Overrides = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a dataset in another format, and say what that loses.

    safety.horizon=N tells the time limit to a log that does not mark which episodes it cut.
    """
    from safe_offrl import commands

    result = commands.convert_dataset(
        source,
        target,
        overrides=commands.parse_overrides(overrides or []),
        say=_say(as_json),
    )
    if as_json:
        _print_json(result)


@app.command()
def check_env(
    env: Annotated[str, typer.Argument(metavar="ID")],
    overrides: Overrides = None,
    episodes: Annotated[int, _count_option("Random episodes", "--episodes")] = 20,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say whether an environment can be used here, and what to repair; exit code 1 if it cannot.

    ID is a Gymnasium id or "package.module:Env-v0"; KEY=VALUE takes safety.accident=... and so on.
    Plays episodes with random actions, and makes a second instance: not for a real machine.
    """
    from safe_offrl import commands

    result = commands.check_env_run(
        env,
        episodes=episodes,
        overrides=commands.parse_overrides(overrides or []),
        say=_say(as_json),
    )
    if as_json:
        _print_json(result)
    if not result["usable"]:
        raise typer.Exit(1)


@app.command()
def demo(
    steps: Annotated[int | None, _count_option("Offline gradient steps", "--steps")] = None,
    budget: Annotated[int, _count_option("Steps in the environment", "--budget")] = 20_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    runs: Runs = Path("runs"),
    debug: Debug = False,
) -> None:
    """Show the whole thing: pretrain, then fine-tune with and without constraints, and compare."""
    from safe_offrl import commands

    commands.demo(steps=steps, budget=budget, seed=seed, runs=runs)


def _say(as_json: bool) -> Say:
    """Where lines for people go: standard output, or standard error beside --json."""
    from safe_offrl.commands import say_plain

    return (lambda text: print(text, file=sys.stderr, flush=True)) if as_json else say_plain


def _print_json(value: Any) -> None:
    """Give the command's answer, which is printed at its end."""
    from safe_offrl.record.json_answer import give

    give(json.dumps(value, allow_nan=False))


def _print_settings(settings: Any, *, as_json: bool) -> None:
    from safe_offrl.config import to_dict, to_yaml

    if as_json:
        _print_json(to_dict(settings))
    else:
        print(to_yaml(settings), end="")


def _end_dry_run(text: str, say: Say, *, as_json: bool) -> None:
    """Say what would be done."""
    say(text)
    if as_json:
        _print_json({"dry_run": True, "text": text.splitlines()})


def _refuse_settings_on_resume(settings: list[Any]) -> None:
    given = [s for s in settings if s is not None]
    if given:
        raise UserError(
            f"--resume continues a run with its own settings, but {given[0]!r} was given too. "
            "Leave it out, or start a new run."
        )


def main() -> None:
    """Entry point: one sentence and exit code 2 for the user's mistakes, no traceback."""
    if "--debug" not in sys.argv:
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        app()
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", *getattr(error, "__notes__", ()), file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk: not the input
        if "--debug" in sys.argv:
            raise
        if isinstance(error, IsADirectoryError):
            print(f'error: "{error.filename}" is a folder. Name a file in it.', file=sys.stderr)
            sys.exit(2)
        # Of a run that can be continued a note says so.
        further = "continue with --resume" if hasattr(error, "__notes__") else "try again"
        print(
            f"error: {error}. What was written before is intact: free the cause, then {further}.",
            file=sys.stderr,
        )
        sys.exit(1)
    except FloatingPointError as error:  # learning diverged, at once or after days
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}.", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        from safe_offrl.record.progress import Interrupted  # not at the top: it needs torch

        if not isinstance(error, Interrupted):
            raise
        print(error, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(error.exit_code)  # everything is closed; taking Python apart would take seconds


if __name__ == "__main__":
    main()
