"""Observations far from zero keep their digits, from the file to the policy that acts."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from safe_offrl import commands
from safe_offrl.collect.behaviours import random_behaviour
from safe_offrl.collect.mixture import log_episodes
from safe_offrl.commands.online import start_loop
from safe_offrl.compute.state import collect_state
from safe_offrl.data.dataset import Dataset
from safe_offrl.data.offsets import OFFSET, centred, find_offset, in_own_units
from safe_offrl.data_formats.conversion import convert
from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.data_formats.memory_map import write_memory_map
from safe_offrl.data_formats.stored import dataset_sha256
from safe_offrl.deploy.episodes import PlayedEpisode, play_episode
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.env.make import make_env
from safe_offrl.errors import ConfigError, DataError
from safe_offrl.policies.networks import NetworkConfig
from safe_offrl.policy import load_policy
from safe_offrl.record.final_policy import final_policy
from safe_offrl.record.find_run import find_run
from safe_offrl.record.run import RunDir
from safe_offrl.record.run_config import parse_run_yaml
from safe_offrl.report.videos import AccidentCamera
from safe_offrl.safety.critic import SafetyCriticConfig
from safe_offrl.safety.shield import Shield
from safe_offrl.spec import SafetySpec
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.train.pretrain import Pretraining
from safe_offrl.train.pretrain_config import PretrainConfig
from safe_offrl.types import Layout, Normalizer
from tests.slope import FAR, HORIZON

NEAR_ID, FAR_ID = "tests.slope:SlopeNear-v0", "tests.slope:SlopeFar-v0"
SPEC = SafetySpec(cost_threshold=0.305)
RULES = {"accident": "cost", "cost_threshold": 0.305, "horizon": HORIZON}


def log_of(env_id: str, transitions: int = 1500) -> dict[str, NDArray[Any]]:
    env = make_env(env_id, SPEC)
    behaviours = [random_behaviour(1)]
    return log_episodes(env, behaviours=behaviours, shares=[1.0], transitions=transitions, seed=0)


@pytest.fixture(scope="module")
def far() -> dict[str, NDArray[Any]]:
    return log_of(FAR_ID)


@pytest.fixture(scope="module")
def near() -> dict[str, NDArray[Any]]:
    return log_of(NEAR_ID)


def metadata_of(env_id: str) -> dict[str, Any]:
    return {**RULES, "env_id": env_id, "behaviours": [{"name": "random"}]}


# --- which entries have an offset -------------------------------------------------------------


def column(*values: float, kind: type = np.float64) -> NDArray[Any]:
    return np.array(values, kind)[:, None]


@pytest.mark.parametrize(
    ("observations", "offset"),
    [
        (column(FAR + 0.1, FAR + 0.3), FAR),  # float32 counts in halves there
        (column(-FAR + 0.1, -FAR - 0.1), -FAR),
        (column(1e-6 + 1e-14, 1e-6 + 3e-14), float(np.float32(1e-6))),  # relative, so also here
        (column(2**31, 2**31 + 2, kind=np.int64), 2.0**31),
        (column(16_777_216, 16_777_218, kind=np.int64), None),  # float32 holds these
        (column(1.0, 1.1, 0.9), None),
        (column(FAR, FAR + 1e6 + 0.1), None),  # a tenth in a million is no loss
        (column(FAR + 0.1, FAR + 0.1), None),  # nothing changes
        (column(0.1 + 0.2, 0.3), None),  # nor here, but by a rounding error
        (column(FAR + 0.1, FAR + 0.3, kind=np.float32), None),  # its digits are lost already
        (column(FAR + 0.1, np.nan), None),  # refused elsewhere
        (np.zeros((0, 3)), None),
        (np.array([FAR + 0.1, FAR + 0.3]), None),  # no table: refused elsewhere
    ],
)
def test_an_offset_is_where_float32_loses_digits(
    observations: NDArray[Any], offset: float | None
) -> None:
    found = find_offset(observations)
    assert found is None if offset is None else found is not None and found.tolist() == [offset]


def test_other_entries_are_left_alone(far: dict[str, NDArray[Any]]) -> None:
    assert far["observations"].dtype == np.float64
    found, metadata = centred(far, {})
    assert metadata[OFFSET][0] == pytest.approx(FAR, abs=1.0)
    assert metadata[OFFSET][1] == 0.0
    assert found["observations"].dtype == np.float32
    assert np.array_equal(found["observations"][:, 1], far["observations"][:, 1].astype("f4"))
    position = far["next_observations"][:, 0] - metadata[OFFSET][0]
    assert np.array_equal(found["next_observations"][:, 0], position.astype(np.float32))


def test_a_log_that_float32_holds_is_what_it_was(near: dict[str, NDArray[Any]]) -> None:
    found, metadata = centred(near, RULES)
    assert metadata == RULES
    assert all(found[key] is near[key] for key in near)
    assert in_own_units(near, RULES)[1:] == (RULES, np.dtype("<f4"))


@pytest.mark.parametrize("given", ["far", [1.0], [1.0, None], [1.0, np.inf], [[1.0, 2.0]], 3.0])
def test_an_offset_that_does_not_fit_is_refused(far: dict[str, NDArray[Any]], given: Any) -> None:
    with pytest.raises(DataError, match="observation_offset is not one finite number for each"):
        centred(far, {OFFSET: given})


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["log.hdf5", "log.npz", "log.csv", "log.mmap", "log-v0"])
def test_every_format_keeps_the_digits(
    far: dict[str, NDArray[Any]], tmp_path: Path, name: str
) -> None:
    write_dataset(tmp_path / "first.hdf5", far, metadata_of(FAR_ID))
    with h5py.File(tmp_path / "first.hdf5") as file:  # others read the environment's own numbers
        assert np.abs(file["observations"][:, 0] - far["observations"][:, 0]).max() < 1e-6
        assert OFFSET not in json.loads(file.attrs["safe_offrl"])
    first = load_dataset(tmp_path / "first.hdf5", discount=0.99, spec=SPEC)
    convert(tmp_path / "first.hdf5", tmp_path / name)
    second = load_dataset(tmp_path / name, discount=0.99, spec=SPEC, horizon=HORIZON)
    assert second.metadata[OFFSET] == first.metadata[OFFSET]
    for mine, theirs in zip(first.transitions.tensors, second.transitions.tensors, strict=True):
        assert torch.equal(mine, theirs)
    if name != "log.csv":  # which holds no metadata
        assert second.sha256 == first.sha256
    convert(tmp_path / name, tmp_path / "again.npz", horizon=HORIZON)
    with np.load(tmp_path / "again.npz") as stored:
        assert stored["observations"].dtype == np.float64
        assert np.abs(stored["observations"] - far["observations"]).max() < 1e-6


def test_a_memory_map_of_a_fresh_log_keeps_them_too(
    far: dict[str, NDArray[Any]], tmp_path: Path
) -> None:
    write_memory_map(tmp_path / "log.mmap", far, metadata_of(FAR_ID))
    write_dataset(tmp_path / "log.hdf5", far, metadata_of(FAR_ID))
    one, other = (
        load_dataset(tmp_path / name, discount=0.99, spec=SPEC) for name in ("log.mmap", "log.hdf5")
    )
    assert one.sha256 == other.sha256
    assert torch.equal(one.transitions.observations, other.transitions.observations)


def test_logs_that_float32_would_confuse_have_identities_of_their_own(
    far: dict[str, NDArray[Any]],
) -> None:
    moved = {**far, "observations": far["observations"].copy()}
    moved["observations"][7, 0] += 1e-4
    assert np.array_equal(moved["observations"].astype("f4"), far["observations"].astype("f4"))
    one, other = (dataset_sha256(*centred(arrays, RULES)) for arrays in (far, moved))
    assert one != other


# --- learning and acting ----------------------------------------------------------------------


def loaded(arrays: dict[str, NDArray[Any]], env_id: str, folder: Path) -> Dataset:
    path = folder / f"{env_id[-7:]}.hdf5"
    write_dataset(path, arrays, metadata_of(env_id))
    return load_dataset(path, discount=0.99, spec=SPEC)


def pretrained(data: Dataset, steps: int = 4) -> Pretraining:
    config = PretrainConfig(
        steps=steps,
        alignment_steps=steps,
        batch_size=64,
        log_every=steps,
        networks=NetworkConfig((16,), (16,), 3),
        critic=SafetyCriticConfig(members=3, reference=1, hidden=(16,)),
        safety=SPEC,
    )
    loop = Pretraining(config, data)
    list(loop.run())
    return loop


def test_far_away_the_same_policy_is_learnt(
    near: dict[str, NDArray[Any]], far: dict[str, NDArray[Any]], tmp_path: Path
) -> None:
    one, other = loaded(near, NEAR_ID, tmp_path), loaded(far, FAR_ID, tmp_path)
    assert OFFSET not in one.metadata
    mine, theirs = pretrained(one), pretrained(other)
    seen = mine.train.transitions.observations
    assert torch.allclose(seen, theirs.train.transitions.observations, atol=1e-5)
    parts = (mine.networks.actor.state_dict(), theirs.networks.actor.state_dict())
    for a, b in zip(*(p.values() for p in parts), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    # What float32 keeps of it, in a log of float32: nothing.
    rounded = {
        k: v.astype("f4") if k in ("observations", "next_observations") else v
        for k, v in far.items()
    }
    lost = pretrained(loaded(rounded, "tests.slope:SlopeFarRounded-v0", tmp_path))
    assert not torch.allclose(seen, lost.train.transitions.observations, atol=0.1)


def test_a_checkpoint_holds_the_offset_and_an_early_one_none(
    far: dict[str, NDArray[Any]], tmp_path: Path
) -> None:
    normalizer = loaded(far, FAR_ID, tmp_path).normalizer()
    tensors = collect_state(normalizer.parts())
    found = Normalizer.restored(tensors)
    assert normalizer.offset is not None
    assert found.offset is not None
    assert found.offset.tolist() == normalizer.offset.tolist()
    assert found.reward_scale == normalizer.reward_scale != 1.0
    early = {k: v for k, v in tensors.items() if k[:14] in ("normalizer_mea", "normalizer_std")}
    assert Normalizer.restored(early)[2:] == (1.0, None)
    actor = pretrained(loaded(far, FAR_ID, tmp_path), 1).networks.actor
    moved = normalizer._replace(offset=normalizer.offset + 1.0)
    plain = normalizer._replace(offset=None)

    def sha256(normalizer: Normalizer) -> str:
        return DeployedPolicy.from_actor(actor, Shield.abstaining(), normalizer, 0).sha256

    assert sha256(normalizer) != sha256(moved)
    assert sha256(plain) == sha256(plain._replace(reward_scale=1.0))


def test_the_share_of_a_threshold_stands_beside_an_offset(
    far: dict[str, NDArray[Any]], tmp_path: Path
) -> None:
    spec = SafetySpec(accident="episode_cost", cost_threshold=0.5)
    stored = {k: v for k, v in far.items() if k != "accidents"}
    write_dataset(tmp_path / "far.hdf5", stored, {"horizon": HORIZON, "behaviours": [{}]})
    data = load_dataset(tmp_path / "far.hdf5", discount=0.99, spec=spec)
    env = make_env(FAR_ID, spec)
    env.offset = data.normalizer().offset
    observation, _ = env.reset(seed=0)
    assert observation.shape == (3,) == env.exact.shape
    assert abs(observation[0]) < 5.0
    assert env.exact[0] == pytest.approx(FAR, abs=5.0)
    assert observation[2] == 0.0


SMALL = ["alignment_steps=10", "log_every=10", "batch_size=32", "safety.cost_threshold=0.305"]
SMALL += ["networks.actor_hidden=[16]", "networks.critic_hidden=[16]", "critic.hidden=[16,16]"]


def silent(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, far: dict[str, NDArray[Any]]) -> Path:
    """runs/offline and runs/online, of the far environment, by the commands."""
    root = tmp_path_factory.mktemp("runs")
    write_dataset(root / "far.hdf5", far, metadata_of(FAR_ID))
    config = commands.pretrain_config(
        env=FAR_ID, dataset=str(root / "far.hdf5"), steps=30, overrides=SMALL
    )
    offline = commands.pretrain_run(
        commands.plan_pretrain(config, say=silent), name="offline", runs=root, say=silent
    )
    settings = commands.finetune_config(
        offline, budget=200, overrides=["warmup_steps=60", "iteration_steps=40", "batch_size=32"]
    )
    plan = commands.plan_finetune(offline, settings, accept_risk=True)
    commands.finetune_run(plan, name="online", runs=root, say=silent)
    return root


@pytest.mark.parametrize("name", ["offline", "online"])
def test_who_acts_sees_every_digit(runs: Path, name: str) -> None:
    policy = load_policy(name, runs=runs)
    env = gymnasium.make(FAR_ID)
    observation, _ = env.reset(seed=3)
    moved = observation + np.array([0.01, 0.0])  # which float32 does not see
    assert np.array_equal(observation.astype("f4"), moved.astype("f4"))
    seen = [policy._policy.normalizer(policy._env.observe(o, 0.0)) for o in (observation, moved)]
    spread = float(policy._policy.normalizer.std[0])
    assert seen[1][0] - seen[0][0] == pytest.approx(0.01 / spread, rel=1e-3)
    actions = [policy.predict(o, deterministic=True)[0] for o in (observation, moved)]
    assert not np.array_equal(*actions)


def test_what_was_lived_lies_where_the_log_does(runs: Path) -> None:
    run = find_run("online", runs)
    inputs, config = parse_run_yaml(run.config_text, "finetune", FinetuneConfig, run.path)
    assert inputs.pretrained is not None
    plan = commands.plan_finetune(RunDir(Path(inputs.pretrained)), config, accept_risk=True)
    loop, checkpoint = start_loop(plan), run.load_checkpoint()
    loop.load(checkpoint.tensors, checkpoint.info)
    plan.env.close()
    lived = loop.experience.buffer.recent_transitions(10_000).observations
    logged = loop.experience.dataset.transitions.observations
    assert len(lived)
    assert abs(float(lived[:, 0].mean() - logged[:, 0].mean())) < 2.0
    assert len(torch.unique(lived[:, 0])) > 0.9 * len(lived)
    result = commands.evaluate_run("online", episodes=3, runs=runs, say=silent)
    assert result["episodes"] == 3


def test_a_camera_sees_what_the_policy_sees(runs: Path) -> None:
    final = final_policy(find_run("online", runs))
    normalizer, actor = final.policy.normalizer, final.policy.actor

    def play(seed: int) -> PlayedEpisode:
        return play_episode(final.env, final.policy, seed, np.random.default_rng(seed))

    seed, played = next((s, p) for s in range(100) if (p := play(s)).accident)
    assert float(played.rows[:, 0].abs().max()) < 10.0
    episode = Layout(actor.observation_size, actor.action_size).unpack(played.rows)
    said: list[str] = []
    with contextlib.closing(AccidentCamera(FAR_ID, SPEC, normalizer, said.append)) as camera:
        assert camera.clip(seed, episode) is not None, said


def test_a_graph_cannot_hold_it_and_says_so(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a graph takes float32"):
        commands.export_run(
            "online", file_format="torchscript", out=tmp_path / "x.pt", runs=runs, say=silent
        )
    assert not (tmp_path / "x.pt").exists()
