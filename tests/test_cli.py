"""The command line: bad input is one clear sentence and exit code 2; nothing heavy for --help."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
from numpy.typing import NDArray

from safe_offrl import cli, commands
from safe_offrl.cli.options import NEEDED, TAKEN
from safe_offrl.commands.given_limits import Limits
from safe_offrl.commands.online_plan import FinetuneSettings
from safe_offrl.data_formats.hdf5 import write_dataset
from tests.promises import Record

TINY = ["steps=20", "alignment_steps=5", "log_every=10", "batch_size=32"]
TINY += ["networks.actor_hidden=[16]", "networks.critic_hidden=[16]", "critic.hidden=[16,16]"]


Array = NDArray[np.float32]


class Walk(gymnasium.Env[Array, Any]):
    """A walk that lasts 20 steps, with or without an accident signal."""

    def __init__(self, *, cost: bool, discrete: bool) -> None:
        self.observation_space = gymnasium.spaces.Box(-9.0, 9.0, (6,), np.float32)
        box = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = gymnasium.spaces.MultiDiscrete([3, 2]) if discrete else box
        self._cost = cost

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(6, np.float32), {}

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        info = {"cost": float(self.np_random.random() < 0.01)} if self._cost else {}
        return np.zeros(6, np.float32), 1.0, False, False, info


def make_walk(**options: Any) -> Walk:
    return Walk(cost=options.get("cost", True), discrete=options.get("discrete", False))


gymnasium.register("CliWalk-v0", make_walk, max_episode_steps=20)
gymnasium.register("CliNoSignal-v0", make_walk, max_episode_steps=20, kwargs={"cost": False})
gymnasium.register("CliDiscrete-v0", make_walk, max_episode_steps=20, kwargs={"discrete": True})


class Outcome(NamedTuple):
    """Exit code and output of one call of the entry point."""

    code: int
    out: str
    err: str


Call = Callable[..., Outcome]


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Call:
    """Call the entry point in this process, in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["safe-offrl", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def pretrained(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny pretrain run, made through the installed command."""
    folder = tmp_path_factory.mktemp("pretrained")
    command = [str(Path(sys.executable).parent / "safe-offrl"), "pretrain", "--name", "offline"]
    command += ["--dataset", str(tiny_dataset), *TINY]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "offline"


def walk_dataset(path: Path, env_id: str) -> Path:
    n = 200
    rng = np.random.default_rng(0)
    ends = np.arange(n) % 20 == 19
    arrays = {
        "observations": np.zeros((n, 6), np.float32),
        "next_observations": np.zeros((n, 6), np.float32),
        "actions": rng.uniform(-1, 1, (n, 2)).astype(np.float32),
        "rewards": np.ones(n, np.float32),
        "costs": (np.arange(n) % 50 == 7).astype(np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": ends,
    }
    write_dataset(path, arrays, {"env_id": env_id, "accident": "cost", "horizon": 20})
    return path


# --- bad input ---


def refused(outcome: Outcome, message: str) -> None:
    assert outcome.code == 2, outcome.err
    assert re.search(message, outcome.err), outcome.err
    assert "Traceback" not in outcome.err
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "stepz=3"], r'Unknown key "stepz"\. Did you mean "steps"\?'),
        (["pretrain", "epsilon=0.1"], r'Did you mean "safety\.epsilon"\?'),
        (["pretrain", "safety.epsilon=1.0"], r"strictly between 0 and 1"),
        (["pretrain", "safety.epsilon=0"], r"strictly between 0 and 1"),
        (["pretrain", "safety.epsilon=nan"], r"a finite number is needed"),
        (["pretrain", "safety.delta=-1"], r"above 0"),
        (["pretrain", "--agent", "sac"], r'no agent "sac"'),
        (["pretrain", "--steps", "many"], r'"many" is not a whole number'),
        (["pretrain", "--steps", "-5"], r'"-5" is not a whole number of 0 or more'),
        (["pretrain", "seed=-1"], r"seed is -1, but 0 or more"),
        (["collect", "--out", "x.hdf5", "seed=-1"], r"seed is -1, but 0 or more"),
        (["pretrain", "agents.iql.discount=0.999"], r"alignment\.discount is 0\.99.*Set both"),
        (["verify", "nothing.json"], r"Give runs/RUN/certificates/N/certificate\.json"),
        (["demo", "--budget", "50"], r"budget is 50 steps, too small for one episode of 100"),
        (["benchmark", "--suite", "smoke", "--methods", "xyzzy"], r"There are ours, frozen, rlpd"),
        (["pretrain", "nonsense"], r"neither an option nor key=value"),
        (["pretrain", "--dataset", "nothing.hdf5"], r'no dataset file ".*nothing\.hdf5"'),
        (["pretrain", "--env", "Nothing-v0"], r'no environment "Nothing-v0"'),
        (["pretrain", "--env", "CliDiscrete-v0"], r"action space .* cannot be used"),
        (["pretrain", "--resume", "nothing"], r"is not a run folder"),
        (["pretrain", "--resume", "x", "--steps", "3"], r"--resume continues a run with its own"),
        (["finetune"], r"no finished pretrain run"),
        (["finetune", "nothing"], r"is not a run folder"),
        (["finetune", "a", "b"], r'"b" is neither an option nor key=value'),
        (["evaluate", "nothing"], r"is not a run folder"),
        (["compare", "nothing"], r"is not a run folder"),
        (["inspect", "nothing.hdf5"], r"no dataset file"),
        (["collect", "--env", "CliNoSignal-v0", "--out", "x.hdf5"], r"no accident signal"),
        (["collect", "--transitions", "5k"], r"Give --out FILE"),
    ],
)
def test_bad_input(call: Call, arguments: list[str], message: str) -> None:
    refused(call(*arguments), message)


def test_dataset_of_another_environment(call: Call, tmp_path: Path) -> None:
    path = walk_dataset(tmp_path / "walk.hdf5", "CliWalk-v0")
    refused(
        call("pretrain", "--dataset", str(path), "--env", "PointHazard-v0"),
        r'logged on "CliWalk-v0", not on "PointHazard-v0"',
    )
    own = call("pretrain", "--dataset", str(path), "--dry-run")  # where none is named
    assert "CliWalk-v0" in own.out + own.err
    assert "PointHazard" not in own.out + own.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "99"], r"less than one episode of 100 steps"),
        (["--epsilon", "1.5"], r"strictly between 0 and 1"),
        (["--epsilon", "0"], r"strictly between 0 and 1"),
        (["--epsilon", "nan"], r"finite number"),
        (["--delta", "inf"], r"finite number"),
        (["--budget", "50kk"], r"not a whole number"),
        (["utdd=3"], r'Unknown key "utdd"'),
        (["seed=-1"], r"seed is -1, but 0 or more"),
        (["--cost-limit", "25"], r'the constraint "accident", so cost_limit means nothing'),
        (["safety.accident=terminated"], r"accident is terminated, but .* learnt under cost"),
        (["safety.constraint=cost"], r"constraint is cost, but .* learnt under accident"),
        (["learner.discount=0.9"], r"learner\.discount is 0\.9, .* discounted by 0\.99"),
    ],
)
def test_bad_input_of_finetune(
    call: Call, pretrained: Path, arguments: list[str], message: str
) -> None:
    refused(call("finetune", str(pretrained), *arguments), message)
    assert not Path("runs").exists()  # nothing is begun before everything is checked


@pytest.mark.parametrize("command", ["pretrain", "finetune", "evaluate", "certify", "collect"])
def test_a_seed_below_0_is_refused(call: Call, command: str) -> None:
    outcome = call(command, "--seed", "-1")
    assert outcome.code == 2
    assert "greater than or equal to 0" in outcome.err


def test_settings_from_a_file(call: Call, pretrained: Path, tmp_path: Path) -> None:
    file = tmp_path / "robot.yaml"
    file.write_text(
        "pretrain: {batch_size: 64, safety: {epsilon: 0.2}}\n"
        "finetune: {utd: 3}\n"
        "collect: {unsafe_share: 0.4}\n"
    )
    options = ["--config", str(file), "--print-config"]
    # Not the preset of the environment beneath it; what is typed is above it.
    offline = call("pretrain", *options, "batch_size=32").out
    assert "batch_size: 32" in offline
    assert "epsilon: 0.2" in offline
    assert "utd: 3" in call("finetune", str(pretrained), *options).out
    assert "unsafe_share: 0.4" in call("collect", *options).out
    file.write_text("pretraining: {batch_size: 64}\n")
    refused(call("pretrain", *options), r'Unknown key "pretraining" in .*Did you mean "pretrain"')
    file.write_text("pretrain: {batch: 64}\n")
    refused(call("pretrain", *options), r'Unknown key "batch"')
    refused(call("pretrain", "--config", "none.yaml"), r'"none\.yaml" cannot be read')


def test_a_log_is_never_overwritten(call: Call, tmp_path: Path) -> None:
    log = tmp_path / "log.hdf5"
    log.write_bytes(b"a year of it")
    refused(call("collect", "--out", str(log)), "exists already")
    assert log.read_bytes() == b"a year of it"


def test_a_folder_is_no_file(call: Call, pretrained: Path, tmp_path: Path) -> None:
    refused(call("compare", str(pretrained), "--markdown", str(tmp_path)), "is a folder")


def test_environment_without_accident_signal_online(call: Call, tmp_path: Path) -> None:
    path = walk_dataset(tmp_path / "walk.hdf5", "CliNoSignal-v0")
    options = ["--env", "CliNoSignal-v0", "--dataset", str(path), "--name", "p"]
    assert call("pretrain", *options, *TINY).code == 0
    refused(call("finetune", "p", "--budget", "200", "--accept-risk"), r"gives no accident signal")


def test_debug_shows_the_traceback(call: Call) -> None:
    from safe_offrl.errors import ConfigError

    with pytest.raises(ConfigError):
        call("pretrain", "--debug", "stepz=3")


def test_dataset_gone_or_changed(call: Call, tiny_dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.hdf5"
    copy.write_bytes(tiny_dataset.read_bytes())
    assert call("pretrain", "--dataset", str(copy), "--name", "p", *TINY).code == 0
    walk_dataset(copy, "PointHazard-v0")
    refused(call("finetune", "p", "--budget", "200"), r"has changed since this run was made")
    copy.unlink()
    refused(call("finetune", "p", "--budget", "200"), r"of this run is gone")


# --- what scripts and people rely on ---


@pytest.mark.promise("R14")
@pytest.mark.parametrize("command", ["", "pretrain", "finetune", "demo"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys\nfrom safe_offrl import cli\n"
        f"sys.argv = ['safe-offrl', *{command.split()!r}, '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'h5py', 'scipy', 'omegaconf', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--help" in done.stdout


FUNCTIONS: dict[str, list[Callable[..., Any]]] = {
    "pretrain": [commands.pretrain_config, commands.pretrain_run, commands.resume_pretrain],
    "assess": [commands.assess_runs],
    "finetune": [commands.finetune_config, commands.finetune_run, commands.resume_finetune],
    "evaluate": [commands.evaluate_run],
    "certify": [commands.certify_run],
    "verify": [commands.verify_certificate],
    "replay": [commands.replay_run],
    "export": [commands.export_run],
    "ledger": [commands.show_ledger],
    "trust": [commands.trust_run],
    "compare": [commands.compare_runs],
    "benchmark": [commands.benchmark_run],
    "collect": [commands.collect_run],
    "inspect": [commands.inspect_dataset],
    "convert": [commands.convert_dataset],
    "check_env": [commands.check_env_run],
    "demo": [commands.demo_run],
}
# What a function takes as one group.
SETTINGS = {
    **dict.fromkeys(("assess", "certify"), Limits.__annotations__),
    "finetune": FinetuneSettings.__annotations__,
}
# What the command itself looks at.
OWN = {
    "pretrain": {"resume", "dry_run", "print_config"},
    "finetune": {"arguments", "resume", "dry_run", "print_config"},
    "benchmark": {"suite", "methods", "seeds", "runs", "dry_run"},
    "collect": {"print_config"},
}


@pytest.mark.parametrize("name", TAKEN)
def test_an_option_is_an_argument_of_what_the_command_calls(name: str) -> None:
    """By name and by default, since what was typed is handed on as it is."""
    signatures = [inspect.signature(function) for function in FUNCTIONS[name]]
    arguments = {k: v.default for found in signatures[::-1] for k, v in found.parameters.items()}
    arguments |= dict.fromkeys(SETTINGS.get(name, {}))
    for option in TAKEN[name]:
        if option.name in {"as_json", "debug"} | OWN.get(name, set()):
            continue
        default = arguments[option.name]
        if option.default is None:  # not given
            assert default in (None, 0, (), inspect.Parameter.empty), option.name
        elif option.default is not NEEDED and default is not inspect.Parameter.empty:
            assert default in (option.default, str(option.default)), option.name


@pytest.mark.slow
@pytest.mark.promise("R14")
def test_help_takes_half_a_second(figure: Record) -> None:
    seconds = []
    for _ in range(9):
        begin = time.monotonic()
        subprocess.run([sys.executable, "-m", "safe_offrl.cli", "--help"], capture_output=True)
        seconds.append(time.monotonic() - begin)
    median = sorted(seconds)[4]
    figure("R14", f"{median:.2f} s, median of {len(seconds)}")
    assert median < 0.5


def test_print_config(call: Call, pretrained: Path) -> None:
    from safe_offrl.config import from_dict, read_yaml
    from safe_offrl.train.finetune_config import FinetuneConfig
    from safe_offrl.train.pretrain_config import PretrainConfig

    outcome = call("pretrain", "--agent", "calql", "--steps", "50k", "--print-config")
    config = from_dict(PretrainConfig, read_yaml(outcome.out, "stdout"))
    assert (config.agent, config.steps) == ("calql", 50_000)
    arguments = ["--budget", "1.5M", "--epsilon", ".2", "--no-shield", "--print-config"]
    outcome = call("finetune", str(pretrained), *arguments)
    online = from_dict(FinetuneConfig, read_yaml(outcome.out, "stdout"))
    assert (online.budget, online.safety.epsilon, online.shield) == (1_500_000, 0.2, False)
    assert online.kl
    assert online.safety_constraint
    assert not Path("runs").exists()


def test_dry_run_says_what_can_be_proven_and_does_nothing(call: Call, pretrained: Path) -> None:
    outcome = call("finetune", str(pretrained), "--budget", "50k", "--accept-risk", "--dry-run")
    assert outcome.code == 0
    assert "with an accident" in outcome.out
    # 500 full-length episodes of 100 steps; 3.48 / 500 = 0.70 % (table of SAFETY.md).
    assert "500 episodes" in outcome.out
    assert "0.70%" in outcome.out
    assert "1 thread" in outcome.out
    assert "accepted by --accept-risk; not assessed" in outcome.out
    assert not Path("runs").exists()


def test_finetune_evaluate_compare(call: Call, pretrained: Path, tmp_path: Path) -> None:
    options = ["--budget", "600", "--accept-risk", "--name", "online", "--json"]
    options += ["warmup_steps=200"]
    options += ["iteration_steps=200", "batch_size=32"]
    outcome = call("finetune", str(pretrained), *options)
    assert outcome.code == 0, outcome.err
    answer = json.loads(outcome.out)
    assert 0 < answer["steps"] <= 600
    assert "accidents" in outcome.err  # the progress line
    outcome = call("evaluate", "online", "--episodes", "3", "--json")
    assert json.loads(outcome.out)["episodes"] == 3
    outcome = call("compare", "online", "--png", "c.png", "--json")
    assert json.loads(outcome.out)["runs"][0]["label"] == "online"
    assert Path("c.png").stat().st_size > 1000
    options = ["--svg", "c.svg", "--html", "c.html", "--markdown", "c.md", "--by-group"]
    outcome = call("compare", "online", "--runs", "runs", *options)
    assert outcome.code == 0, outcome.err
    assert "<svg" in Path("c.svg").read_text()
    assert "<table>" in Path("c.html").read_text()
    assert "(<c.svg>)" in Path("c.md").read_text()
    group = json.loads(call("compare", "runs", "--json").out)  # a folder of runs is a method
    assert {row["method"] for row in group["runs"]} == {"runs"}
    refused(call("finetune", "--resume", "online"), r"is finished already")


def test_newest_pretrain_run_is_the_default(call: Call, tiny_dataset: Path) -> None:
    for name in ("first", "second"):
        assert call("pretrain", "--dataset", str(tiny_dataset), "--name", name, *TINY).code == 0
    outcome = call("finetune", "--budget", "1k", "--accept-risk", "--dry-run")
    assert re.search(r"from .*second", outcome.out)
