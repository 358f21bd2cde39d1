"""A run on probation ends where its warm-up shows that the pretrained policy exceeds the limit."""

from __future__ import annotations

import contextlib
from pathlib import Path

import gymnasium
import pytest

from safe_offrl import commands
from safe_offrl.collect.behaviours import random_behaviour
from safe_offrl.collect.mixture import log_episodes
from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.env.make import make_env
from safe_offrl.envs.hazard_line import HazardLineEnv
from safe_offrl.record.run import RunDir
from safe_offrl.spec import SafetySpec

ENV = "OftenHurt-v0"
TINY = ["alignment_steps=10", "log_every=10", "batch_size=32"]
TINY += ["networks.actor_hidden=[16]", "networks.critic_hidden=[16]", "critic.hidden=[16,16]"]
ONLINE = ["warmup_steps=200", "iteration_steps=60", "batch_size=32", "update_every=5"]

gymnasium.register(ENV, HazardLineEnv, max_episode_steps=20)


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Thirty steps teach nothing: a quarter of its episodes and more have an accident."""
    root = tmp_path_factory.mktemp("runs")
    with contextlib.closing(make_env(ENV, SafetySpec())) as env:
        arrays = log_episodes(
            env, behaviours=[random_behaviour(1)], shares=[1.0], transitions=1000, seed=0
        )
    path = root / "line.hdf5"
    metadata = {"env_id": ENV, "accident": "cost", "cost_threshold": 0.0, "horizon": 20}
    write_dataset(path, arrays, metadata | {"behaviours": [{"name": "random"}]})
    config = commands.pretrain_config(env=ENV, dataset=str(path), steps=30, overrides=TINY)
    plan = commands.plan_pretrain(config, say=silent)
    return commands.pretrain_run(plan, name="offline", runs=root, say=silent)


@pytest.mark.parametrize("probation", [True, False])
def test_an_alarm_in_the_warm_up_ends_it(
    pretrained: RunDir, probation: bool, tmp_path: Path
) -> None:
    overrides = [*ONLINE, f"probation={str(probation).lower()}"]
    config = commands.finetune_config(pretrained, budget=400, epsilon=0.01, overrides=overrides)
    plan = commands.plan_finetune(pretrained, config, accept_risk=True, say=silent)
    said: list[str] = []
    run = commands.finetune_run(plan, name="online", runs=tmp_path, say=said.append)
    steps, decisions = run.episodes()[-1].total_steps, run.iterations()
    assert any(line.startswith("alarm       episode") for line in said)
    if probation:
        assert "on probation, the pretrained policy was shown to exceed its limit" in said[-1]
        assert steps < 200
        assert not decisions
        assert run.state["status"] == "finished"
    else:
        assert "on probation" not in said[-1]
        assert steps > 200
        assert decisions
