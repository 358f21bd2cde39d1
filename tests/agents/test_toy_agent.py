"""The README's recipe for an algorithm, followed: one file outside the package, and one line."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from safe_offrl import commands
from safe_offrl.agents import AGENTS, find_agent, find_online
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.compute.descent import Compute
from safe_offrl.config import read_yaml
from safe_offrl.errors import ConfigError, EnvError, RunError
from safe_offrl.policies.kinds import kind_for
from safe_offrl.policies.networks import NetworkConfig, Networks
from safe_offrl.record.run import RunDir
from safe_offrl.train.finetune_config import FinetuneConfig
from tests.agents.setups import setup_of
from tests.compute.test_descent import compiles
from tests.markdown_blocks import SCRIPTS, blocks
from tests.markdown_blocks import commands as lines_of

FOUND = blocks(Path(__file__).parents[2] / "README.md")
(SOURCE,) = (block.text for block in FOUND if block.directive == "file my_agent.py")
(LINES,) = (lines_of(block) for block in FOUND if "--agent my_agent:my_crr" in block.text)
TINY = ["alignment_steps=20", "log_every=10", "batch_size=32", "networks.critics=3"]
TINY += ["networks.actor_hidden=[16]", "networks.critic_hidden=[16]", "critic.hidden=[16,16]"]
ONLINE = [
    "warmup_steps=300",
    "iteration_steps=200",
    "batch_size=32",
    "baseline.learner=my_agent:my_crr",
]


OPTIMIZERS = ("critics_adam", "actor_adam")
STEERING = Steering((Penalty(lambda o, t, a: torch.sigmoid(a[:, 0]), torch.tensor(2.0)),))


class Killed(Exception):
    """Stands for a kill: nothing after it is executed."""


def silent(text: str) -> None:
    pass


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory of whoever followed the recipe; nothing of it stays imported."""
    (tmp_path / "my_agent.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("SAFE_OFFRL_CACHE", str(tmp_path / "cache"))
    yield tmp_path
    forget()


def forget() -> None:
    """As in another process."""
    AGENTS.pop("my_crr", None)
    sys.modules.pop("my_agent", None)


def pretrain_plan(dataset: Path, *overrides: str) -> commands.PretrainPlan:
    config = commands.pretrain_config(
        agent="my_agent:my_crr", dataset=str(dataset), steps=40, overrides=[*TINY, *overrides]
    )
    return commands.plan_pretrain(config, say=silent)


def online_config(run: RunDir) -> FinetuneConfig:
    return commands.finetune_config(run, budget=1000, overrides=ONLINE)


def result(run: RunDir) -> dict[str, object]:
    """What must not depend on interruptions."""
    names = ("metrics.jsonl", "iterations.jsonl", "ledger.jsonl", "calibration.json")
    files = {n: (run.path / n).read_bytes() for n in names if (run.path / n).is_file()}
    assert run.state["status"] == "finished"
    return {**files, "sha256": run.load_checkpoint().sha256}


def kill_at(patch: pytest.MonkeyPatch, call: int) -> None:
    """Let the process die at this call for a checkpoint."""
    save, calls = RunDir.save_checkpoint, [0]

    def counting(self: RunDir, *arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        save(self, *arguments)

    patch.setattr(RunDir, "save_checkpoint", counting)


def test_it_is_one_file_of_which_the_last_line_adds_it() -> None:
    lines = [line for line in SOURCE.splitlines() if line.strip()]
    assert lines[-1] == 'AGENTS["my_crr"] = MyCRR'
    body = lines[lines.index("class MyCRR:") : -2]
    assert len(body) <= 45


def test_it_pretrains_is_killed_resumed_and_goes_online(
    folder: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = pretrain_plan(tiny_dataset, "agents.own.learning_rate=2e-3")
    assert plan.config.agents.own == {"learning_rate": 2e-3, "discount": 0.99}
    whole = commands.pretrain_run(plan, name="whole", say=silent)
    stored = read_yaml(whole.config_text, "config.yaml")["pretrain"]
    assert stored["agents"]["own"] == plan.config.agents.own
    with monkeypatch.context() as patch:
        kill_at(patch, 20)
        with pytest.raises(Killed):
            commands.pretrain_run(plan, name="killed", checkpoint_seconds=0.0, say=silent)
    forget()
    again = commands.resume_pretrain("killed", say=silent)
    assert result(again) == result(whole)
    start, end = (whole.load_checkpoint().tensors[f"agent.{k}/1.step"] for k in OPTIMIZERS)
    assert start == end == 40

    forget()
    config = online_config(whole)
    assert config.baseline.agents.own == plan.config.agents.own
    tune = commands.plan_finetune(whole, config, accept_risk=True)
    online = commands.finetune_run(tune, name="online", say=silent)
    steps = online.load_checkpoint().tensors["learner.critics_adam/1.step"]
    assert steps > 40  # it went on from its own critics
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        tune = commands.plan_finetune(whole, config, accept_risk=True)
        with pytest.raises(Killed):
            commands.finetune_run(tune, name="cut", checkpoint_seconds=0.0, say=silent)
    forget()
    assert result(commands.resume_finetune("cut", say=silent)) == result(online)

    forget()
    (folder / "my_agent.py").unlink()  # to act takes no agent
    assert commands.evaluate_run("cut", episodes=2, say=silent)["episodes"] == 2


def test_rlpd_goes_on_from_it_where_nobody_has_its_file(folder: Path, tiny_dataset: Path) -> None:
    run = commands.pretrain_run(pretrain_plan(tiny_dataset), name="offline", say=silent)
    forget()
    (folder / "my_agent.py").unlink()
    config = commands.finetune_config(run, budget=600, overrides=ONLINE[:3])
    plan = commands.plan_finetune(run, config, accept_risk=True)
    online = commands.finetune_run(plan, name="online", say=silent)
    assert online.state["status"] == "finished"
    assert commands.evaluate_run("online", episodes=2, say=silent)["episodes"] == 2
    assert "my_agent" not in sys.modules


def test_the_commands_of_the_recipe_run(folder: Path, tiny_dataset: Path) -> None:
    further = {
        "pretrain": ["--dataset", str(tiny_dataset), "--steps", "40", *TINY],
        "finetune": [*ONLINE[:3], "--budget", "600"],
        "export": ["--format", "torchscript", "--json"],
    }
    answer = ""
    for line in LINES:
        _, name, *arguments = shlex.split(line)
        command = [str(SCRIPTS / "safe-offrl"), name, *arguments, *further[name]]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        answer = done.stdout
    assert json.loads(answer)["format"]
    assert list((folder / "runs" / "on-crr" / "exports").glob("policy.*"))


def losses(compute: Compute, *, discrete: bool) -> list[float]:
    """Of three updates on one batch."""
    agent, generator = find_agent("my_agent:my_crr"), torch.Generator().manual_seed(0)
    networks = Networks(3, 2, NetworkConfig((8,), (8,), 2), generator, kind_for(discrete=discrete))
    built = agent(setup_of(networks, generator, compute=compute), agent.Config())
    batch = networks.layout.unpack(torch.rand(16, networks.layout.width, generator=generator))
    if discrete:
        batch = batch._replace(actions=torch.eye(2)[torch.arange(16) % 2])
    return [float(v) for _ in range(3) for v in built.update(batch, STEERING).values()]


def test_it_takes_discrete_actions_and_learns(folder: Path) -> None:
    for discrete in (False, True):
        critic, _, *_, last, _ = losses(Compute(), discrete=discrete)
        assert last < critic


@compiles
def test_it_is_compiled(folder: Path) -> None:
    eager = losses(Compute(), discrete=False)
    assert losses(Compute(compiled=True), discrete=False) == pytest.approx(eager, abs=1e-5)


# --- what is refused ---


def test_names_and_settings_that_are_wrong_are_said(folder: Path, tiny_dataset: Path) -> None:
    with pytest.raises(ConfigError, match=r'no agent "toy".*awac, .*td3bc.*module:name'):
        commands.pretrain_config(agent="toy")
    with pytest.raises(EnvError, match="module nowhere of the agent could not be imported"):
        commands.pretrain_config(agent="nowhere:crr")
    with pytest.raises(ConfigError, match='no agent "my_agent:toy"'):
        commands.pretrain_config(agent="my_agent:toy")
    for setting, words in {
        "agents.own.learning_rat=1": 'Unknown key "learning_rat". Did you mean "learning_rate"',
        "agents.own.learning_rate=fast": "a number is needed",
        "agents.own=3": "a mapping of keys to values is needed",
        "agents.own.discount=0.9": "discounted by 0.9",
    }.items():
        with pytest.raises(ConfigError, match=words):
            pretrain_plan(tiny_dataset, setting)
    with pytest.raises(
        ConfigError,
        match=r'"bc_safe" has no form that goes on online.*calql, dagger, fql, gail, iql, my_crr',
    ):
        find_online("bc_safe")


def test_its_own_values_must_have_been_learnt_by_it(folder: Path, tiny_dataset: Path) -> None:
    config = commands.pretrain_config(dataset=str(tiny_dataset), steps=2, overrides=TINY)
    plan = commands.plan_pretrain(config, say=silent)
    run = commands.pretrain_run(plan, name="by-iql", say=silent)
    with pytest.raises(ConfigError, match=r"pretrained by iql, which has not its values"):
        commands.finetune_config(run, budget=600, overrides=ONLINE)


def test_a_run_from_elsewhere_imports_no_agent(
    folder: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = pretrain_plan(tiny_dataset)
    whole = commands.pretrain_run(plan, name="whole", say=silent)
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            commands.pretrain_run(plan, name="offline", checkpoint_seconds=0.0, say=silent)
    tune = commands.plan_finetune(whole, online_config(whole), accept_risk=True)
    with monkeypatch.context() as patch:
        kill_at(patch, 2)
        with pytest.raises(Killed):
            commands.finetune_run(tune, name="online", checkpoint_seconds=0.0, say=silent)
    resumes = {"offline": commands.resume_pretrain, "online": commands.resume_finetune}
    for name, resume in resumes.items():
        forget()
        monkeypatch.setenv("SAFE_OFFRL_CACHE", str(folder / name))  # as on another machine
        with pytest.raises(RunError, match="would import and execute my_agent:my_crr"):
            resume(name, say=silent)
        assert "my_agent" not in sys.modules
        said: list[str] = []
        commands.trust_run(name, say=said.append)
        assert "its settings import my_agent:my_crr" in said[0]
        assert resume(name, say=silent).state["status"] == "finished"
