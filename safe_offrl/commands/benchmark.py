"""A benchmark as a command: every run of a suite in a process of its own, then the comparison."""

from __future__ import annotations

import contextlib
import math
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safe_offrl.agents import AgentConfigs, find_agent
from safe_offrl.bench.methods import METHODS
from safe_offrl.bench.suite import Job, Suite, flat, folder_name, jobs_of, settings_of
from safe_offrl.collect.processes import own_command
from safe_offrl.commands.common import say_plain
from safe_offrl.commands.compare import compare_runs
from safe_offrl.commands.offline_plan import pretrain_config
from safe_offrl.commands.online_plan import inherited
from safe_offrl.config import load_config, to_dict
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.files import json_bytes, write_atomic
from safe_offrl.record.find_run import Source
from safe_offrl.record.kept_versions import REPLAY, kept_versions
from safe_offrl.record.progress import TELL_SECONDS, Interrupted, Say, StopSignal
from safe_offrl.record.run import RunDir
from safe_offrl.record.run_config import parse_run_yaml
from safe_offrl.record.run_names import require_runs_folder
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.train.pretrain_config import PretrainConfig

LOOK_SECONDS = 0.5
SAVE_SECONDS = 60.0  # that a run has for saving itself
# Settings that say how a run is made and not which run it is.
_HOW = {"device", "compile", "videos", "keep_versions", "log_every", "env.timeout"}


@dataclass
class _Running:
    job: Job
    command: list[str]
    process: subprocess.Popen[bytes]
    begun: float


@dataclass
class _Progress:
    """What is waiting, running and done."""

    suite: Suite
    root: Path
    workers: int
    waiting: list[Job]
    running: list[_Running] = field(default_factory=list)
    done: set[Path] = field(default_factory=set)
    failed: list[Job] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of the fine-tunings that ended here
    begun: float = field(default_factory=time.monotonic)


def benchmark_text(suite: Suite, root: Path) -> str:
    """What a suite would run, for people; ConfigError if a setting of it is wrong.

    RunError if a run in its folder was made with other settings than the suite has.
    """
    for env in suite.environments:
        for name in suite.methods:
            offline, online = settings_of(suite, name)
            pretrain_config(env=env, overrides=offline)
            load_config(FinetuneConfig, section="finetune", env_id=env, overrides=online)
    jobs = jobs_of(suite, root)
    _require_same_settings(jobs)
    finished = len(jobs) - len(_unfinished(jobs, suite))
    width = max(map(len, suite.methods))
    return "\n".join(
        [
            f"benchmark   {suite.name}: {', '.join(suite.environments)}; {len(suite.methods)} "
            f"methods, {len(suite.seeds)} seeds, {suite.budget:,} steps each",
            f"runs        {len(jobs)} in {root}, {finished} of them finished",
            *(f"  {name:<{width}}  {METHODS[name].source}" for name in suite.methods),
        ]
    )


def _require_same_settings(jobs: Sequence[Job]) -> None:
    """RunError unless each run that has begun was made with the settings that its job has now."""
    sources: dict[Path, PretrainConfig] = {}
    for job in jobs:  # Each comes after what it needs.
        if job.needs is None:
            sources[job.folder] = pretrain_config(**job.options, overrides=job.overrides)
        if not (job.folder / "run.json").is_file():
            continue
        choice = f'Choose another --runs folder, or delete "{job.folder}"'
        choice += "." if job.needs else " and the runs that started from it."
        try:
            made, now = _settings_made(job), _settings_now(job, sources)
        except (ConfigError, OSError) as error:
            raise RunError(
                f'The settings of the run "{job.label}" cannot be compared with those of the suite '
                f"({error}). {choice}"
            ) from error
        for key, value in now.items():
            if made[key] != value and _matters(key, now):
                raise RunError(
                    f'The run "{job.label}" was made with {key} {made[key]!r} and would now be '
                    f"run with {value!r}. {choice}"
                )


def _matters(key: str, settings: Mapping[str, Any]) -> bool:
    """Whether a setting says which run it is: not how it is made, and of a part that it has."""
    if key.startswith("baseline.pid."):
        return bool(settings["baseline.multiplier"] == "pid")
    section, _, rest = key.partition("agents.")
    if rest and section in ("", "baseline."):
        name = settings[f"{section}learner" if section else "agent"]
        own = "" if name == "rlpd" else AgentConfigs().key(find_agent(name))
        return rest.partition(".")[0] == own
    return key not in _HOW


def _settings_made(job: Job) -> dict[str, Any]:
    """What the job's run was made with, as dotted keys; those it did not know at their defaults."""
    text = RunDir(job.folder).config_text
    schema = PretrainConfig if job.needs is None else FinetuneConfig
    inputs, config = parse_run_yaml(text, job.kind, schema, job.folder)
    return {"env": inputs.env_id, **flat(to_dict(config))}


def _settings_now(job: Job, sources: Mapping[Path, PretrainConfig]) -> dict[str, Any]:
    """What the job would be run with, as dotted keys.

    As :func:`finetune_config` resolves it, but from the settings of a pretrain run that need not be
    there: of a finished run the record is enough.
    """
    if job.needs is None:
        return flat(to_dict(sources[job.folder]))
    source = sources[job.needs]
    config = load_config(
        FinetuneConfig,
        section="finetune",
        env_id=source.env,
        inherited=inherited(source),
        flags={"safety": to_dict(source.safety), **job.options},
        overrides=job.overrides,
    )
    return {"env": source.env, **flat(to_dict(config))}


def benchmark_run(
    suite: Suite, *, root: Path, workers: int, say: Say = say_plain
) -> dict[str, dict[str, Any]]:
    """Run what is missing of a suite, ``workers`` at a time, and compare: {environment: JSON}.

    Finished runs are kept and interrupted ones resumed, so the same command goes on after
    anything. The comparison lies beside the runs, as a page, tables, chart and JSON. RunError in
    the end if a run failed.
    """
    # Runs that are missing.
    say(benchmark_text(suite, root))
    require_runs_folder(root)
    (root / "logs").mkdir(parents=True, exist_ok=True)
    jobs = jobs_of(suite, root)
    state = _Progress(suite, root, workers, _unfinished(jobs, suite))
    state.done = {j.folder for j in jobs} - {j.folder for j in state.waiting}
    # Their execution.
    with StopSignal() as stop:
        try:
            _run_jobs(state, stop, say)
        finally:
            _end_all(state)
    # Interruption.
    if stop.number:
        raise Interrupted(
            stop.number,
            f"Interrupted with {len(state.done)} of {len(jobs)} runs done. The same command goes "
            "on from there.",
        )
    # Comparison and failures.
    results = {env: _compare(state, env, say) for env in suite.environments}
    if state.failed:
        names = ", ".join(job.label for job in state.failed)
        raise RunError(
            f"{len(state.failed)} of {len(jobs)} runs failed ({names}); their output is in "
            f'"{root / "logs"}". Repair the cause, then the same command goes on.'
        )
    return results


def _run_jobs(state: _Progress, stop: StopSignal, say: Say) -> None:
    told = -TELL_SECONDS
    while (state.waiting or state.running) and not stop.number:
        ended = _reap(state, say)
        _launch(state)
        if ended or time.monotonic() - told > TELL_SECONDS:
            say(_state_line(state))
            told = time.monotonic()
        time.sleep(LOOK_SECONDS)


def _launch(state: _Progress) -> None:
    """Start waiting jobs whose needs are met; drop those whose needs have failed."""
    lost = {job.folder for job in state.failed}
    for job in [job for job in state.waiting if job.needs in lost]:
        state.waiting.remove(job)
        state.failed.append(job)
    ready = [job for job in state.waiting if job.needs is None or job.needs in state.done]
    ready = ready[: state.workers - len(state.running)]
    for job in ready:
        state.waiting.remove(job)
        command = _next_command(job, state.suite)
        assert command is not None  # It would be done.
        with _log_of(job, state.root).open("ab") as log:
            process = subprocess.Popen(
                [*own_command("cli"), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # A terminal's signal reaches it through us alone.
            )
        state.running.append(_Running(job, command, process, time.monotonic()))


def _log_of(job: Job, root: Path) -> Path:
    return root / "logs" / f"{job.label.replace('/', '-')}.log"


def _next_command(job: Job, suite: Suite) -> list[str] | None:
    """What is left to do of a job: learn, go on learning, evaluate, or nothing."""
    where = ["--runs", str(job.folder.parent)]
    if not (job.folder / "run.json").is_file():
        return [job.kind, *job.arguments, *where, "--name", job.folder.name]
    run = RunDir(job.folder)
    if run.state["status"] != "finished":
        return [job.kind, "--resume", str(job.folder), *where]
    # Episodes of its own, so that the seeds of a method are independent; its partners in pairs,
    # which have the same seed, play the same ones.
    own = ["--seed", str(job.seed), *where]
    if not _evaluated(run, suite.evaluation_episodes, job.seed):
        return ["evaluate", str(job.folder), "--episodes", str(suite.evaluation_episodes), *own]
    if not _replayed(run, suite.replay_episodes, job.seed):
        return ["replay", str(job.folder), "--episodes", str(suite.replay_episodes), *own]
    return None


def _evaluated(run: RunDir, episodes: int, seed: int) -> bool:
    """Whether so many episodes of this seed were played; of any, if no policy is left to play."""
    if not (run.path / "evaluation.json").is_file():
        return False
    found = run.read_json("evaluation.json")
    if found.get("episodes") != episodes:
        return False
    as_wanted = found.get("seed") == seed and not found.get("mean_action")
    return as_wanted or not any(run.path.glob("checkpoints/step-*"))


def _replayed(run: RunDir, episodes: int, seed: int) -> bool:
    """Whether every version was played so often on this seed; of some, if none is left to play."""
    kept = kept_versions(run.path)
    if not episodes or not kept:
        return True
    if not (run.path / REPLAY).is_file():
        return False
    found = run.read_json(REPLAY)
    made = found.get("episodes"), found.get("seed"), len(found.get("versions", ()))
    return made == (episodes, seed, len(kept))


def _unfinished(jobs: Sequence[Job], suite: Suite) -> list[Job]:
    """Jobs with something left to do; a policy that no unfinished run starts from is not needed.

    So a suite goes on from the records of its finished runs alone, without their checkpoints.
    """
    left = [job for job in jobs if _next_command(job, suite)]
    wanted = {job.needs for job in left}
    return [job for job in left if job.needs is not None or job.folder in wanted]


def _reap(state: _Progress, say: Say) -> bool:
    """Take note of the processes that have ended; whether a run is done, or has failed."""
    before = len(state.done) + len(state.failed)
    ended = [running for running in state.running if running.process.poll() is not None]
    for running in ended:
        state.running.remove(running)
        job, code = running.job, running.process.returncode
        following = _next_command(job, state.suite)
        if code == 0 and following is None:
            state.done.add(job.folder)
        elif code == 0 and following != running.command:
            state.waiting.insert(0, job)
        else:
            state.failed.append(job)
            lines = _log_of(job, state.root).read_text(errors="replace").splitlines() or [""]
            say(f"failed      {job.label}, exit code {code}: {lines[-1]}")
        if code == 0 and running.command[0] == "finetune":
            state.seconds.append(time.monotonic() - running.begun)
    return len(state.done) + len(state.failed) > before


def _end_all(state: _Progress) -> None:
    """End what still runs; each run saves itself first."""
    for running in state.running:
        running.process.terminate()
    for running in state.running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.process.wait(timeout=SAVE_SECONDS)
        if running.process.poll() is None:
            running.process.kill()


def _state_line(state: _Progress) -> str:
    count = len(state.waiting) + len(state.running) + len(state.done) + len(state.failed)
    failed = f", {len(state.failed)} failed" if state.failed else ""
    elapsed = (time.monotonic() - state.begun) / 60
    mean = sum(state.seconds) / len(state.seconds) / 60 if state.seconds else math.nan
    left = mean * (len(state.waiting) + len(state.running)) / state.workers
    more = "" if math.isnan(left) else f", about {left:.0f} min left"
    now = ", ".join(running.job.label for running in state.running) or "nothing"
    done = f"{len(state.done)} of {count} runs done{failed}, {elapsed:.0f} min so far{more}"
    return f"{done} | now {now}"


def _compare(state: _Progress, env: str, say: Say) -> dict[str, Any]:
    """Each method's folder is a group: its settings alone may be those of another method."""
    base = state.root / folder_name(env)
    # Whole folders may hold other seeds, and runs that have not ended.
    sources = [
        Source(job.folder, job.folder.parent)
        for job in jobs_of(state.suite, state.root)
        if job.kind == "finetune" and job.folder in state.done and job.folder.parent.parent == base
    ]
    if not sources:
        return {}
    say("")

    def beside(suffix: str) -> Path:
        return state.root / f"{base.name}.{suffix}"

    result = compare_runs(
        sources, png=beside("png"), markdown=beside("md"), html=beside("html"), say=say
    )
    write_atomic(beside("json"), json_bytes(result))
    return result
