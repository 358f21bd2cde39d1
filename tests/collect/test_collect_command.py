"""What is asked for is what is logged: the file of settings, any seed, and the flags."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from safe_offrl import cli, commands
from safe_offrl.compute.state import seeded
from safe_offrl.config import parse_count
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.errors import ConfigError
from safe_offrl.record.run import RunDir
from safe_offrl.report.run_data import read_run
from safe_offrl.spec import SafetySpec

TINY = ["networks.actor_hidden=[8]", "networks.critic_hidden=[8]", "critic.hidden=[8,8]"]
TINY += ["steps=6", "alignment_steps=2", "batch_size=16"]
HUGE = [2**31, 2**32, 20241128153000, 2**64 - 1, 2**64, 10**30 + 1]


def silent(_text: str) -> None:
    return None


@pytest.fixture
def preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of settings whose section "collect" is not the default one."""
    monkeypatch.setenv("SAFE_OFFRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "own.yaml"
    path.write_text(
        "collect:\n  transitions: 700\n  unsafe_share: 0.4\n  learners:\n    ppo: {steps: 0}\n"
        "pretrain:\n  steps: 6\n  alignment_steps: 2\n  batch_size: 16\n"
    )
    return path


def test_pretrain_logs_as_its_file_says(preset: Path) -> None:
    config = commands.pretrain_config(preset=preset, overrides=TINY)
    plan = commands.plan_pretrain(config, preset=preset, say=silent)
    assert 700 <= len(plan.dataset.rows) < 800
    assert plan.dataset.metadata["target_unsafe_share"] == 0.4
    # It is the very log that `collect` makes of the same file, and that is made once.
    cached = commands.collect_run(preset=preset, say=silent)
    assert Path(plan.inputs.dataset) == cached
    again = commands.plan_pretrain(config, preset=preset, say=silent)
    assert again.inputs.dataset == plan.inputs.dataset
    # Other settings are another log.
    preset.write_text(preset.read_text().replace("700", "900"))
    other = commands.plan_pretrain(config, preset=preset, say=silent)
    assert 900 <= len(other.dataset.rows) < 1000
    assert other.inputs.dataset != plan.inputs.dataset


def test_the_flag_config_reaches_the_log(
    preset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["pretrain", "--config", str(preset), *TINY, "--dry-run", "--json"]
    monkeypatch.setattr(sys, "argv", ["safe-offrl", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    header = json.loads(capsys.readouterr().out)["text"]
    assert any(" 7" in line and "transitions" in line for line in header)


def test_a_bound_by_flags(
    preset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["collect", "--config", str(preset), "--out", "log.npz", "--steps", "1k"]
    monkeypatch.setattr(sys, "argv", ["safe-offrl", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    said = capsys.readouterr().out
    assert "plan: " in said
    assert "bounded to 1,000 steps: " in said
    rows = len(load_dataset("log.npz", discount=0.99, spec=SafetySpec()).rows)
    assert 100 <= rows < 700


# --- seeds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", HUGE)
def test_any_seed_of_0_or_more_logs(preset: Path, seed: int) -> None:
    settings: dict[str, Any] = {"preset": preset, "say": silent, "workers": 1}
    overrides = ["learners.ppo.steps=10", "learners.ppo.rollout=16", "transitions=100"]
    found = []
    for k in (0, 1):
        path = commands.collect_run(out=f"{k}.hdf5", seed=seed + k, overrides=overrides, **settings)
        dataset = load_dataset(path, discount=0.99, spec=SafetySpec())
        assert dataset.metadata["seed"] == seed + k
        found.append(dataset.sha256)
    assert found[0] != found[1]


@pytest.mark.parametrize("seed", HUGE)
def test_any_seed_of_0_or_more_learns(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Through the command line, so that no digit is lost on the way."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["safe-offrl", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code in (None, 0, 3), arguments

    text = str(seed)
    offline = ["--dataset", str(tiny_dataset), "--name", "off", *TINY]
    call("pretrain", *offline, f"seed={text}")
    online = ["--name", "on", "--budget", "200", "--accept-risk", "warmup_steps=100"]
    call("finetune", "off", *online, "iteration_steps=100", "--seed", text)
    call("evaluate", "on", "--episodes", "2", "--seed", text)
    call("certify", "on", "--epsilon", "0.9", "--episodes", "40", "--seed", text)
    run = RunDir(tmp_path / "runs" / "on")
    assert f"seed: {text}\n" in run.config_text
    assert run.read_json("evaluation.json")["seed"] == seed
    assert read_run(run.path).seed == seed
    assert commands.compare_runs([run.path], say=silent)["runs"][0]["label"] == "on"


def test_a_huge_seed_is_a_seed_of_its_own() -> None:
    def draw(seed: int) -> float:
        import torch

        return float(torch.rand(1, generator=seeded(seed)))

    assert draw(2**64 - 1) != draw(2**64)
    assert len({draw(2**64 + k) for k in range(50)}) == 50
    assert draw(7) == draw(7)


@pytest.mark.parametrize("seed", ["-1", "seed=-1"])
def test_a_negative_seed_is_one_sentence(seed: str) -> None:
    with pytest.raises(ConfigError, match="0 or more is needed"):
        commands.collect_config(overrides=[f"seed={seed.removeprefix('seed=')}"])


def test_counts_keep_every_digit() -> None:
    assert parse_count("20241128153000123456789") == 20241128153000123456789
    assert parse_count("9007199254740993") == 2**53 + 1  # as a float it would be 2**53
    assert parse_count("9_007_199_254_740_993k") == (2**53 + 1) * 1000
    assert parse_count("1.5M") == 1_500_000


# --- discrete actions, without controllers, from the log to a policy -------------------------


class Cart(gymnasium.Env[Any, Any]):
    """Pushed back, not at all or forward; beyond 1 is the accident."""

    observation_space = gymnasium.spaces.Box(-2.0, 2.0, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(3, start=5)

    def __init__(self, **_: Any) -> None:
        pass

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.x, self.v = 0.0, 0.0
        return self.observe(), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        noise = 0.01 * float(self.np_random.standard_normal())
        self.v = 0.9 * self.v + 0.03 * (int(action) - 6) + noise
        self.x = max(-1.0, self.x + self.v)
        over = self.x > 1.0
        return self.observe(), 0.0 if over else self.x, over, False, {"cost": float(over)}

    def observe(self) -> Any:
        return np.clip([self.x, self.v], -2.0, 2.0).astype(np.float32)


gymnasium.register("CollectCart-v0", Cart, max_episode_steps=40)


@pytest.mark.parametrize(
    ("env_id", "rule"), [("CollectCart-v0", "cost"), ("CartPole-v1", "terminated")]
)
def test_discrete_actions_without_controllers_from_log_to_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env_id: str, rule: str
) -> None:
    monkeypatch.chdir(tmp_path)
    safety = [f"safety.accident={rule}"]
    path = commands.collect_run(
        env=env_id,
        out="log.hdf5",
        transitions=1000,
        workers=1,
        overrides=[*safety, "learners.ppo.steps=3k", "learners.ppo.penalised_steps=1k"],
        say=silent,
    )
    dataset = load_dataset(path, discount=0.99, spec=SafetySpec(accident=rule))
    behaviours = dataset.metadata["behaviours"]
    assert len(behaviours) == 7  # random, three stages of PPO, three of PPO under a limit
    assert dataset.metadata["action_count"] in (2, 3)
    assert dataset.episode_accidents.mean() > 0.0
    assert set(np.unique(dataset.transitions.actions)) == {0.0, 1.0}
    config = commands.pretrain_config(
        env=env_id, dataset=str(path), overrides=[*safety, *TINY, "agent=iql"]
    )
    if dataset.episode_accidents.all():  # of CartPole, after so few steps
        return
    plan = commands.plan_pretrain(config, say=silent)
    run = commands.pretrain_run(plan, name="off", say=silent)
    assert commands.evaluate_run(run.path, episodes=3, say=silent)["episodes"] == 3
