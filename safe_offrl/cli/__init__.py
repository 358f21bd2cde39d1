"""The command line: `safe-offrl COMMAND`. A command parses its arguments and calls a function.

The functions are those of :mod:`safe_offrl.commands`. An option has the name of the argument that
it fills, so that what was typed is handed on as it is; :mod:`safe_offrl.cli.options` has them all.

Everything heavy is imported when a command is run, so that --help answers at once (no torch).
"""

from __future__ import annotations

import inspect as signatures
import json
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from safe_offrl.cli.answers import Answer, dry_run_answer, run_phase, settings_answer, tally
from safe_offrl.cli.options import TAKEN
from safe_offrl.errors import UserError

if TYPE_CHECKING:
    from safe_offrl import commands

app = typer.Typer(
    help="Learn from a log, finish learning in the real thing, and count every accident.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def command(function: Callable[..., Answer]) -> Callable[..., Answer]:
    """Add a command of the function's name and docstring; it takes its options and ``say``."""

    def call(*, debug: bool, as_json: bool = False, **given: Any) -> None:
        global commands  # It is known to all from here on, and not imported for --help.
        from safe_offrl import commands
        from safe_offrl.record.json_answer import give

        if "overrides" in given:
            given["overrides"] = commands.parse_overrides(given["overrides"] or [])
        to_stderr = partial(print, file=sys.stderr, flush=True)
        answer = function(**given, say=to_stderr if as_json else commands.say_plain)
        if as_json:
            give(json.dumps(answer.value, allow_nan=False))  # It is printed at the command's end.
        else:
            print(answer.text, end="")
        if answer.exit_code:
            raise typer.Exit(answer.exit_code)

    # typer makes options of a function's parameters, which are those that its signature names.
    parameters = [option.parameter() for option in TAKEN[function.__name__]]
    call.__signature__ = signatures.Signature(parameters)  # type: ignore[attr-defined]
    app.command(function.__name__.replace("_", "-"), help=function.__doc__)(call)
    return function


@command
def pretrain(**given: Any) -> Answer:
    """Learn a policy and its safety critic from a dataset, offline.

    Takes no step in the environment: let `safe-offrl check-env` find what is wrong with one.
    """
    return run_phase(
        commands.pretrain_config,
        partial(commands.plan_pretrain, preset=given["preset"]),
        commands.pretrain_run,
        commands.resume_pretrain,
        lambda run: {"run": str(run.path), "calibration": run.read_json("calibration.json")},
        **given,
    )


@command
def assess(**given: Any) -> Answer:
    """Say from the log alone what a pretrained policy would do; of several, name the one to use.

    Writes assessment.json into each run, or all of it into FILE.
    """
    return Answer(commands.assess_runs(**given))


@command
def finetune(*, arguments: list[str] | None, accept_risk: bool, **given: Any) -> Answer:
    """Go on learning in the environment, within both constraints.

    RUN is a finished pretrain run; the newest one if left out. Refuses to start unless the log
    shows that its policy keeps the limit, see `safe-offrl assess`.
    """
    from safe_offrl.record.find_run import find_run

    # Both are optional and positional: what holds no "=" is the run.
    run_names = [text for text in arguments or [] if "=" not in text]
    keys = [text for text in arguments or [] if "=" in text]
    commands.parse_overrides(run_names[1:])
    source: Any = None  # A run that goes on knows its own.
    if given["resume"] is None:
        source = find_run(run_names[0] if run_names else None, given["runs"], "pretrain")
        run_names = []
    return run_phase(
        partial(commands.finetune_config, source),
        partial(commands.plan_finetune, source, accept_risk=accept_risk),
        commands.finetune_run,
        partial(commands.resume_finetune, accept_risk=accept_risk),
        tally,
        overrides=[*run_names, *keys],
        **given,
    )


@command
def evaluate(*, videos: int | None, **given: Any) -> Answer:
    """Play episodes with a run's final policy; writes evaluation.json into the run, or FILE."""
    return Answer(commands.evaluate_run(**given, videos=videos or 0))


@command
def certify(**given: Any) -> Answer:
    """Prove how few accidents a run's final policy has; writes certificate.json and a page.

    Exit code 0 if certified, 3 if refuted or undecided.
    """
    result = commands.certify_run(**given)
    return Answer(result, exit_code=0 if result["verdict"] == "certified" else 3)


@command
def verify(**given: Any) -> Answer:
    """Check a certificate: hashes, arithmetic, and beside its run the episodes and the policy."""
    checks = commands.verify_certificate(**given)
    return Answer({check.name: check.detail for check in checks})


@command
def replay(**given: Any) -> Answer:
    """Play every version that acted in a run again, in simulation: estimates against the truth.

    It is no part of learning, of the budget or of the ledger. Writes replay.json and replay.png.
    """
    return Answer(commands.replay_run(**given))


@command
def export(**given: Any) -> Answer:
    """Write a run's final policy and its shield as one graph for use without Python.

    FILE.json beside it says how to feed it, and which policy and shield it holds.
    """
    return Answer(commands.export_run(**given))


@command
def ledger(**given: Any) -> Answer:
    """Print a run's record of episodes and accidents, and verify its hash chain.

    Exit code 1 if the record is damaged.
    """
    result = commands.show_ledger(**given)
    return Answer(result, exit_code=0 if result["intact"] else 1)


@command
def trust(**given: Any) -> Answer:
    """Let a run that was made elsewhere import the modules that its settings name; once is enough.

    That executes them here, so it is asked for.
    """
    commands.trust_run(**given)
    return Answer()


@command
def compare(**given: Any) -> Answer:
    """Compare methods over their seeds: accidents, returns, constraints, with intervals."""
    return Answer(commands.compare_runs(**given))


@command
def benchmark(
    *, suite: str, methods: str | None, seeds: str | None, runs: Path, dry_run: bool, **given: Any
) -> Answer:
    """Run methods x environments x paired seeds, resumable, and compare them.

    Runs go to RUNS/benchmark-SUITE; the same command goes on after an interruption.
    """
    from safe_offrl.bench.suite import load_suite, narrowed

    plan = narrowed(load_suite(suite), methods, seeds)
    root = runs / f"benchmark-{plan.name}"
    if dry_run:
        return dry_run_answer(commands.benchmark_text(plan, root), given["say"])
    return Answer(commands.benchmark_run(plan, root=root, **given))


@command
def collect(*, print_config: bool, **given: Any) -> Answer:
    """Train behaviours and log a dataset with a mixture of them.

    KEY=VALUE takes safety.accident=..., safety.constraint=... and so on, and what --print-config
    lists. The name of FILE says the format, as with convert.
    """
    if print_config:
        asked = ("env", "transitions", "seed", "workers", "preset", "overrides")
        return settings_answer(commands.collect_config(**{key: given[key] for key in asked})[1])
    return Answer({"dataset": str(commands.collect_run(**given))})


@command
def inspect(**given: Any) -> Answer:
    """Say what a dataset holds, and what cannot be learnt from it."""
    return Answer(commands.inspect_dataset(**given))


@command
def convert(**given: Any) -> Answer:
    """Write a dataset in another format, and say what that loses.

    safety.horizon=N tells the time limit to a log that does not mark which episodes it cut.
    """
    return Answer(commands.convert_dataset(**given))


@command
def check_env(**given: Any) -> Answer:
    """Say whether an environment can be used here, and what to repair; exit code 1 if it cannot.

    ID is a Gymnasium id or "package.module:Env-v0"; KEY=VALUE takes safety.accident=... and so on.
    Plays episodes with random actions, and makes a second instance: not for a real machine.
    """
    result = commands.check_env_run(**given)
    return Answer(result, exit_code=0 if result["usable"] else 1)


@command
def demo(**given: Any) -> Answer:
    """Show the whole thing: pretrain, then fine-tune with and without constraints, and compare."""
    commands.demo_run(**given)
    return Answer()


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
    except OSError as error:  # A full disk, say, is no mistake in the input.
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
    except FloatingPointError as error:  # Learning diverged, at once or after days.
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}.", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        from safe_offrl.record.progress import Interrupted  # Its import takes torch's seconds.

        if not isinstance(error, Interrupted):
            raise
        print(error, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(error.exit_code)  # All is closed; taking Python apart takes seconds.
