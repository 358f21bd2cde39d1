"""What acts is restored from a run's folder alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from safe_offrl import commands
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.policy import load_policy
from safe_offrl.record.checkpoints import save_checkpoint
from safe_offrl.record.final_policy import final_policy
from safe_offrl.record.run import RunDir
from safe_offrl.safety.calibration import CalibrationReport

SMALL = ["alignment_steps=20", "log_every=10", "batch_size=32"]
SMALL += ["networks.actor_hidden=[16,8]", "networks.critic_hidden=[16]", "critic.hidden=[16,16]"]
ONLINE = ["warmup_steps=200", "iteration_steps=100", "batch_size=32", "shielding.margin=0.005"]
# Rooms that learn, read logs or judge, and the compiler: whoever acts enters none of them.
LEARNING = ("agents", "train", "data_formats", "collect", "assess", "report", "commands")
ACT = """
import json, sys
import safe_offrl
policy = safe_offrl.load_policy(sys.argv[1], seed=3)
action, _ = policy.predict(policy.observation_space.sample() * 0)
rooms = {name.split(".")[1] for name in sys.modules if name.startswith("safe_offrl.")}
print(json.dumps([action.tolist(), sorted(rooms), "torch._inductor" in sys.modules]))
"""


def silent(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Path:
    """A folder of runs: "offline" and "online", and the log that both were made from."""
    root = tmp_path_factory.mktemp("made")
    log = Path(shutil.copy(tiny_dataset, root / "log.hdf5"))
    with pytest.MonkeyPatch.context() as patch:  # the shield of an untrained critic would not act
        patch.setattr(CalibrationReport, "shield_acts", True)
        config = commands.pretrain_config(dataset=str(log), steps=60, overrides=SMALL)
        plan = commands.plan_pretrain(config, say=silent)
        pretrained = commands.pretrain_run(plan, name="offline", runs=root, say=silent)
    settings = commands.finetune_config(pretrained, budget=600, overrides=ONLINE)
    online = commands.plan_finetune(pretrained, settings, accept_risk=True)
    commands.finetune_run(online, name="online", runs=root, say=silent)
    return root


@pytest.fixture
def carried(made: Path, tmp_path: Path) -> RunDir:
    """The fine-tuning run alone, copied to where nothing else of it is."""
    folder = tmp_path / "robot" / "online"
    shutil.copytree(made / "online", folder)
    return RunDir(folder)


def test_everything_after_learning_takes_the_run_alone(made: Path, tmp_path: Path) -> None:
    wanted = commands.evaluate_run("online", episodes=5, runs=made, say=silent)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copytree(made / "online", moved / "online")
    hidden = made.rename(tmp_path / "gone")  # the log, the pretrain run, and where they lay
    try:
        assert commands.evaluate_run("online", episodes=5, runs=moved, say=silent) == wanted
        certificate = commands.certify_run(
            "online", epsilon=0.9, episodes=20, runs=moved, say=silent
        )
        path = next((moved / "online" / "certificates").glob("*/certificate.json"))
        assert all(check.passed for check in commands.verify_certificate(path, say=silent))
        manifest = commands.export_run("online", file_format="torchscript", runs=moved, say=silent)
        final = final_policy(RunDir(moved / "online"))
        final.env.close()
        stated = [certificate["policy"]["sha256"], manifest["policy"]["sha256"]]
        assert stated == [final.policy.sha256] * 2
        assert certificate["shield"]["sha256"] == final.policy.shield.sha256
        observation = np.zeros(final.policy.actor.observation_size, np.float32)
        action, _ = load_policy("online", runs=moved).predict(observation)
        assert np.isfinite(action).all()
    finally:
        hidden.rename(made)


def test_to_act_enters_no_room_that_learns(carried: RunDir) -> None:
    found = subprocess.run(
        [sys.executable, "-c", ACT, str(carried.path)], check=True, capture_output=True, text=True
    )
    action, rooms, compiles = json.loads(found.stdout)
    assert len(action) == 2
    assert not set(rooms) & set(LEARNING)
    assert not compiles


def test_it_is_the_policy_of_the_loop_to_the_last_bit(made: Path, carried: RunDir) -> None:
    run = RunDir(made / "online")
    tensors = run.load_checkpoint().tensors
    final = final_policy(carried)
    final.env.close()
    for name, value in final.policy.actor.state_dict().items():
        np.testing.assert_array_equal(value, tensors[f"deployed/{name}"])
    assert final.policy.shield.net is not None
    for name, value in final.policy.shield.net.state_dict().items():
        np.testing.assert_array_equal(value, tensors[f"shield/{name}"])
    assert final.policy.version == run.load_checkpoint().info["version"]
    assert final.policy.shield.acts
    assert final.policy.shield.margin == pytest.approx(0.005 * final.limit.share)
    assert final.worst_cost == 1.0  # an accident ends an episode there, and nothing else costs


def test_a_pretrained_policy_acts_by_itself(made: Path) -> None:
    final = final_policy(RunDir(made / "offline"))
    final.env.close()
    assert not final.policy.shield.acts
    assert final.policy.shield.net is None
    assert final.policy.version == 0
    tensors = RunDir(made / "offline").load_checkpoint().tensors
    np.testing.assert_array_equal(
        final.policy.actor.state_dict()["layers.0.weight"], tensors["learner.actor/layers.0.weight"]
    )


def test_a_checkpoint_of_an_earlier_version_is_refused_in_a_sentence(carried: RunDir) -> None:
    checkpoint = carried.load_checkpoint()
    info = {key: value for key, value in checkpoint.info.items() if key != "policy"}
    folder = carried.path / "checkpoints"
    save_checkpoint(folder, checkpoint.step, checkpoint.tensors, info, checkpoint.counts)
    with pytest.raises(RunError, match=r"earlier version, whose checkpoints do not hold all"):
        final_policy(carried)
    wrong = {**checkpoint.info, "policy": {**checkpoint.info["policy"], "hidden": [16, 9]}}
    save_checkpoint(folder, checkpoint.step, checkpoint.tensors, wrong, checkpoint.counts)
    with pytest.raises(RunError, match="does not fit this version"):
        final_policy(carried)


def test_an_environment_that_it_does_not_fit_is_refused(carried: RunDir) -> None:
    text = carried.config_text
    config = carried.path / "config.yaml"
    config.write_text(text.replace("env_id: PointHazard-v0", "env_id: HazardGrid-v0"))
    with pytest.raises((ConfigError, RunError), match="as it was"):
        final_policy(RunDir(carried.path))
