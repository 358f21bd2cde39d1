"""--json: standard output is one JSON object, whatever an environment prints, and when."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from safe_offrl import cli
from safe_offrl.record.json_answer import give, only_answer

CHATTY = '''
"""Prints in every way that simulators do."""
import atexit, ctypes, logging, os, subprocess, sys
import gymnasium, numpy as np

print("simulator build time: today")
os.write(1, b"written to the descriptor\\n")
C = ctypes.CDLL(None)
C.puts(b"C code says hello")  # stays in C's buffer until its end, as it is a pipe
subprocess.run([sys.executable, "-c", "print('another process')"], check=True)
logging.basicConfig(stream=sys.stdout, level=logging.INFO)
early = sys.stdout
atexit.register(lambda: print("simulator closed"))
atexit.register(lambda: os.write(1, b"and gone\\n"))


class Chatty(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-9.0, 9.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        print("reset", file=early)
        self.x = 0.0
        return self.observe(), {}

    def step(self, action):
        self.x += 0.2 * float(action[0]) + 0.2 * self.np_random.standard_normal()
        if abs(self.x) > 1.0:
            print("collision!")
            logging.info("collision")
            C.puts(b"collision in C")
        return self.observe(), self.x, abs(self.x) > 1.0, False, {"cost": float(abs(self.x) > 1.0)}

    def observe(self):
        return np.array([self.x, np.sin(self.x)], np.float32)

    def close(self):
        print("close")


gymnasium.register("Chatty-v0", entry_point=Chatty, max_episode_steps=20)
'''
SAID = ("simulator build time", "written to the descriptor", "another process", "simulator closed")
TINY = ["networks.actor_hidden=[8]", "networks.critic_hidden=[8]", "critic.hidden=[8,8]"]


def answer(folder: Path, *arguments: str, code: int = 0, said: tuple[str, ...] = SAID) -> Any:
    """What a command prints with --json, in a process of its own."""
    (folder / "chatty_env.py").write_text(CHATTY)
    command = [str(Path(sys.executable).parent / "safe-offrl"), *arguments, "--json"]
    environment = os.environ | {"SAFE_OFFRL_CACHE": str(folder / "cache")}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == code, done.stderr[-2000:]
    assert done.stdout.count("\n") == 1
    for words in said:  # nothing is lost
        assert words in done.stderr
    return json.loads(done.stdout)


def test_check_env(tmp_path: Path) -> None:
    found = answer(tmp_path, "check-env", "chatty_env:Chatty-v0", "--episodes", "6")
    assert found["usable"] is True
    assert found["env_id"] == "chatty_env:Chatty-v0"
    unusable = answer(
        tmp_path, "check-env", "chatty_env:Chatty-v0", "safety.accident=no.module:rule", code=1
    )
    assert unusable["usable"] is False


def test_a_mistake_leaves_standard_output_empty(tmp_path: Path) -> None:
    (tmp_path / "chatty_env.py").write_text(CHATTY)
    command = [str(Path(sys.executable).parent / "safe-offrl"), "collect", "--json"]
    command += ["--env", "chatty_env:Nothing-v0", "--out", "log.hdf5"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: There is no environment" in done.stderr


@pytest.mark.slow
def test_every_command_that_plays(tmp_path: Path) -> None:
    env = ["--env", "chatty_env:Chatty-v0"]
    steps = ["learners.ppo.steps=600", "learners.ppo.penalised_steps=0"]
    found = answer(tmp_path, "collect", *env, "--out", "log.hdf5", "--steps", "9k", *steps)
    assert found == {"dataset": "log.hdf5"}
    offline = [*env, "--dataset", "log.hdf5", "--name", "off", "steps=40", "alignment_steps=5"]
    dry = answer(tmp_path, "pretrain", *offline, *TINY, "--dry-run")
    assert dry["dry_run"] is True
    assert dry["text"][0].startswith("pretrain ")
    assert answer(tmp_path, "pretrain", *offline, *TINY)["run"].endswith("off")
    answer(tmp_path, "assess", "off", said=())
    online = ["off", "--name", "on", "--budget", "300", "--accept-risk"]
    online += ["warmup_steps=100", "iteration_steps=100"]
    assert answer(tmp_path, "finetune", *online)["steps"] <= 300
    assert answer(tmp_path, "evaluate", "on", "--episodes", "3")["episodes"] == 3
    claim = ["certify", "on", "--epsilon", "0.99", "--confidence", "0.5"]
    assert answer(tmp_path, *claim)["verdict"] == "certified"
    answer(tmp_path, "export", "on", "--format", "torchscript")
    answer(tmp_path, "ledger", "on", said=())
    answer(tmp_path, "compare", "on", said=())


def test_settings_are_an_object_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["safe-offrl", "collect", "--print-config", "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert json.loads(capsys.readouterr().out)["learners"]["ppo"]["steps"] == 80_000


def test_in_a_process_that_goes_on_standard_output_is_what_it_was(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def command() -> None:
        with only_answer():
            print("noise")
            give("an answer")
            raise RuntimeError

    before = sys.stdout
    with pytest.raises(RuntimeError):
        command()
    print("later")
    assert sys.stdout is before
    out, err = capfd.readouterr()
    assert out == "an answer\nlater\n"
    assert err == "noise\n"
