"""The whole job on the embedded environment, with one command."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

from safe_offrl.collect.processes import own_command
from safe_offrl.commands.common import say_plain
from safe_offrl.commands.compare import compare_runs
from safe_offrl.commands.offline import pretrain_run
from safe_offrl.commands.offline_plan import plan_pretrain, pretrain_config
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.record.progress import Say
from safe_offrl.record.run import RunDir
from safe_offrl.record.run_names import require_runs_folder


def demo_run(
    *,
    steps: int | None = None,
    budget: int = 20_000,
    seed: int = 0,
    runs: str | Path = "runs",
    say: Say = say_plain,
) -> list[RunDir]:
    """Pretrain, fine-tune with and without constraints side by side, compare.

    Both fine-tunings start from the same policy, as two processes of one thread each. Returns the
    three runs.
    """
    # Offline phase.
    runs = Path(runs)
    require_runs_folder(runs)
    plan = plan_pretrain(pretrain_config(steps=steps, seed=seed), say=say)
    if budget < plan.dataset.horizon:
        raise ConfigError(
            f"The budget is {budget} steps, too small for one episode of {plan.dataset.horizon} "
            "steps. Try 20k."
        )
    name = _free_demo_name(runs)
    pretrained = pretrain_run(plan, name=name, runs=runs, say=say)
    # Online phases.
    base = [*own_command("cli"), "finetune", str(pretrained.path)]
    base += ["--runs", str(runs), "--seed", str(seed), "--budget", str(budget), "--videos", "5"]
    off = ["--no-kl", "--no-safety-constraint", "--no-shield", "--no-guard"]
    _run_together(
        {
            "constrained": [*base, "--name", f"{name}-constrained"],
            "unconstrained": [*base, "--name", f"{name}-unconstrained", *off],
        },
        say,
    )
    # Comparison.
    names = [name, f"{name}-constrained", f"{name}-unconstrained"]
    png = runs / f"{name}-comparison.png"
    say("")
    compare_runs(names, png=png, runs=runs, say=say)
    say(f"\nCharts and accidents of both runs: tensorboard --logdir {runs}")
    return [RunDir(runs / n) for n in names]


def _free_demo_name(runs: Path) -> str:
    k = 1
    while any((runs / f"demo-{k}{end}").exists() for end in ("", "-constrained", "-unconstrained")):
        k += 1
    return f"demo-{k}"


def _run_together(commands: dict[str, list[str]], say: Say) -> None:
    """Run commands at the same time; every line they print is shown with its label in front."""
    # Processes.
    width = max(map(len, commands))
    processes = {
        label: subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for label, command in commands.items()
    }

    # What they print.
    def show(label: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            say(f"{label:<{width}} | {line.rstrip()}")

    readers = [threading.Thread(target=show, args=item) for item in processes.items()]
    # Their end, or that of all when one waits no more.
    try:
        for reader in readers:
            reader.start()
        codes = {label: process.wait() for label, process in processes.items()}
    except BaseException:
        for process in processes.values():
            process.terminate()  # They save themselves and name their --resume command.
        raise
    finally:
        for process, reader in zip(processes.values(), readers, strict=True):
            process.wait()
            reader.join()
            if process.stdout is not None:
                process.stdout.close()
    # Failures.
    failed = [label for label, code in codes.items() if code]
    if failed:
        raise RunError(f"The {failed[0]} run did not finish; its output above says why.")
