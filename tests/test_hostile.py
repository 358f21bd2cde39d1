"""Fourteen inputs that try to run code, read other files, write elsewhere or take all memory.

Each is refused with one of our own errors, its marker file was not made, and what it asked for of
this machine is in no error message.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from safe_offrl import cli, commands
from safe_offrl.bench.suite import load_suite
from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.errors import EnvError, RunError, UserError
from safe_offrl.files import json_bytes
from safe_offrl.record.find_run import find_run
from safe_offrl.record.run import RunDir
from safe_offrl.record.run_config import RunInputs, parse_run_yaml, run_yaml
from safe_offrl.record.trust import require_trusted, trust_own
from safe_offrl.spec import SafetySpec
from safe_offrl.train.pretrain_config import PretrainConfig
from tests.data_formats.test_data_hdf5 import METADATA, make_arrays
from tests.failing_disk import fail
from tests.promises import Record
from tests.record.test_run import TENSORS, make

MODULE = "module_of_somebody_else"
SECRET = "what-nobody-else-should-read"


class Payload:
    """Makes the marker file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def load(path: Path) -> Any:
    return load_dataset(path, discount=0.9, spec=SafetySpec(), horizon=4)


def hdf5(folder: Path, **rewards: Any) -> Path:
    """A valid file but for its rewards: an argument of create_dataset, or a link."""
    path = folder / "log.hdf5"
    write_dataset(path, make_arrays(), METADATA)
    with h5py.File(path, "a") as file:
        del file["rewards"]
        if "link" in rewards:
            file["rewards"] = rewards["link"]
        elif "layout" in rewards:
            file.create_virtual_dataset("rewards", rewards["layout"])
        else:
            file.create_dataset("rewards", **rewards)
    return path


def pickle_in_npz(folder: Path, marker: Path) -> None:
    rewards = np.array([Payload(marker)] * 6, dtype=object)
    arrays: dict[str, Any] = {**make_arrays(), "rewards": rewards}
    np.savez(folder / "log.npz", **arrays)
    load(folder / "log.npz")


def external_link(folder: Path, marker: Path) -> None:
    load(hdf5(folder, link=h5py.ExternalLink(str(folder / "secret.hdf5"), "rewards")))


def soft_link(folder: Path, marker: Path) -> None:
    load(hdf5(folder, link=h5py.SoftLink("/costs")))


def external_storage(folder: Path, marker: Path) -> None:
    external = [(str(folder / "secret.txt"), 0, h5py.h5f.UNLIMITED)]
    load(hdf5(folder, shape=(6,), dtype="f4", external=external))


def virtual_dataset(folder: Path, marker: Path) -> None:
    layout = h5py.VirtualLayout(shape=(6,), dtype="f4")
    layout[:] = h5py.VirtualSource(str(folder / "secret.hdf5"), "rewards", shape=(6,))
    load(hdf5(folder, layout=layout))


def shape_of_terabytes(folder: Path, marker: Path) -> None:
    load(hdf5(folder, shape=(10**12,), dtype="f8", chunks=(1024,)))


def agent_zip(folder: Path, marker: Path) -> None:
    """As Stable-Baselines3 saves one: a pickle in base64 beside the weights."""
    with zipfile.ZipFile(folder / "agent.zip", "w") as archive:
        archive.writestr("data", json.dumps({"policy_class": {":serialized:": "gASV"}}))
        archive.writestr("policy.pth", pickle.dumps(Payload(marker)))
    with pytest.raises(UserError):
        find_run("agent.zip", folder)
    (folder / "agent.zip").rename(folder / "agent.npz")
    load(folder / "agent.npz")


def resolver_in_yaml(folder: Path, marker: Path) -> None:
    text = "inputs: {env_id: '${oc.env:SAFE_OFFRL_SECRET}', dataset: a, dataset_sha256: b}\n"
    parse_run_yaml(text + "pretrain: {}\n", "pretrain", PretrainConfig, folder)


def python_tag_in_yaml(folder: Path, marker: Path) -> None:
    tag = f"!!python/object/apply:os.mkdir ['{marker}']"
    (folder / "suite.yaml").write_text(f"environments: [HazardLine-v0]\nmethods: {tag}\n")
    load_suite(str(folder / "suite.yaml"))


def nested_yaml(folder: Path, marker: Path) -> None:
    parse_run_yaml("inputs: " + "{a: " * 5000, "pretrain", PretrainConfig, folder)


def run_name_outside(folder: Path, marker: Path) -> None:
    (folder / "runs").mkdir()
    make(folder / "runs", name=f"../{marker.name}")


def pickle_as_weights(folder: Path, marker: Path) -> None:
    """A checkpoint that was signed again, with a pickle where the weights were."""
    with make(folder, name="run") as run:
        run.save_checkpoint(10, TENSORS, {"step": 10})
    inside = folder / "run" / "checkpoints" / "step-000000010"
    (inside / "state.safetensors").write_bytes(pickle.dumps(Payload(marker)))
    manifest = json.loads((inside / "manifest.json").read_bytes())
    del manifest["crc32"]
    for name in manifest["sha256"]:
        manifest["sha256"][name] = hashlib.sha256((inside / name).read_bytes()).hexdigest()
    manifest["crc32"] = zlib.crc32(json_bytes(manifest))
    (inside / "manifest.json").write_bytes(json_bytes(manifest))
    RunDir(folder / "run").load_checkpoint()


def foreign_run(
    folder: Path,
    marker: Path,
    *,
    env_id: str = "HazardLine-v0",
    accident: str = "cost",
    signals: dict[str, str] | None = None,
) -> RunDir:
    """A run that somebody else made, beside a module that makes the marker when it is imported."""
    (folder / f"{MODULE}.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    safety = SafetySpec(accident=accident, signals=signals or {})
    config = PretrainConfig(env=env_id, safety=safety)
    inputs = RunInputs(env_id=env_id, dataset="log.hdf5", dataset_sha256="0" * 64)
    text = run_yaml(inputs, "pretrain", config, folder)
    with RunDir.create(folder, kind="pretrain", config_text=text, name="foreign") as run:
        run.set_status("finished")
    return RunDir(folder / "foreign")


def environment_of_a_run(folder: Path, marker: Path) -> None:
    foreign_run(folder, marker, env_id=f"{MODULE}:Env-v0")
    commands.evaluate_run(folder / "foreign")


def accident_rule_of_a_run(folder: Path, marker: Path) -> None:
    run = foreign_run(folder, marker, accident=f"{MODULE}:rule")
    commands.plan_finetune(run, commands.finetune_config(run), accept_risk=True)


def signal_of_a_run(folder: Path, marker: Path) -> None:
    foreign_run(folder, marker, signals={"hazards": f"{MODULE}:signal"})
    commands.evaluate_run(folder / "foreign")


HOSTILE: tuple[Callable[[Path, Path], None], ...] = (
    pickle_in_npz,
    external_link,
    soft_link,
    external_storage,
    virtual_dataset,
    shape_of_terabytes,
    agent_zip,
    resolver_in_yaml,
    python_tag_in_yaml,
    nested_yaml,
    run_name_outside,
    pickle_as_weights,
    environment_of_a_run,
    accident_rule_of_a_run,
    signal_of_a_run,
)


@pytest.fixture(scope="module")
def refused(figure: Record) -> Iterator[list[str]]:
    """Names of the inputs that were refused; their number is reported."""
    names: list[str] = []
    yield names
    figure("R13", f"{len(names)}/{len(HOSTILE)} hostile inputs refused, no marker file")


@pytest.mark.promise("R13")
@pytest.mark.parametrize("attack", HOSTILE, ids=lambda attack: attack.__name__)
def test_hostile_inputs_are_refused_and_do_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: list[str],
    attack: Callable[[Path, Path], None],
) -> None:
    monkeypatch.setenv("SAFE_OFFRL_SECRET", SECRET)
    folder, marker = tmp_path / "input", tmp_path / "input" / "marker"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "secret.txt").write_text(SECRET)
    write_dataset(folder / "secret.hdf5", make_arrays(), METADATA)
    with pytest.raises(UserError) as caught:
        attack(folder, marker)
    assert not marker.exists()
    assert SECRET not in str(caught.value)
    assert not isinstance(caught.value.__cause__, MemoryError)
    refused.append(attack.__name__)


@pytest.mark.parametrize("attack", [environment_of_a_run, accident_rule_of_a_run, signal_of_a_run])
def test_a_run_that_is_trusted_may_import(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    attack: Callable[[Path, Path], None],
) -> None:
    monkeypatch.setenv("SAFE_OFFRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # the working directory is added
    monkeypatch.chdir(tmp_path)
    marker, run = tmp_path / "marker", tmp_path / "foreign"
    with pytest.raises(RunError, match=rf"import and execute {MODULE}:.*safe-offrl trust {run}$"):
        attack(tmp_path, marker)
    assert not marker.exists()
    monkeypatch.setattr(sys, "argv", ["safe-offrl", "trust", "foreign", "--runs", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert f"its settings import {MODULE}:" in capsys.readouterr().out
    assert not marker.exists()
    shutil.rmtree(run)
    with pytest.raises(EnvError):  # the module holds nothing else
        attack(tmp_path, marker)
    assert marker.exists()
    sys.modules.pop(MODULE, None)


def test_own_runs_are_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_dataset: Path
) -> None:
    monkeypatch.setenv("SAFE_OFFRL_CACHE", str(tmp_path / "cache"))
    env_id = "safe_offrl.envs.point_hazard:PointHazard-v0"
    config = commands.pretrain_config(
        env=env_id, dataset=str(tiny_dataset), steps=1, overrides=["alignment_steps=0"]
    )
    plan = commands.plan_pretrain(config, say=lambda text: None)
    run = commands.pretrain_run(plan, name="own", runs=tmp_path, say=lambda text: None)
    safety = plan.config.safety
    require_trusted(run, plan.inputs, safety)  # its module is there
    monkeypatch.delitem(sys.modules, env_id.partition(":")[0])  # as in another process
    require_trusted(run, plan.inputs, safety)
    (run.path / "config.yaml").write_text(run.config_text + "# changed\n")
    with pytest.raises(RunError, match=r"import and execute safe_offrl\.envs"):
        require_trusted(run, plan.inputs, safety)


def unwritable_cache(folder: Path, kind: str, patch: pytest.MonkeyPatch) -> Path:
    """A cache folder in which nothing can be written."""
    cache = folder / "cache"
    if kind == "a file":
        cache.write_text("no folder")
    elif kind == "below a file":
        (folder / "file").write_text("no folder")
        cache = folder / "file" / "cache"
    else:
        cache.mkdir()
        fail(patch, "write", kind, lambda path, _: cache in path.parents)
        patch.setattr(Path, "touch", denied)  # it asks the system without os.open
    patch.setenv("SAFE_OFFRL_CACHE", str(cache))
    return cache


def denied(path: Path) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize("kind", ["a file", "below a file", "denied"])
def test_where_nothing_can_be_remembered_it_says_so_and_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It does not say "not made on this machine", which it cannot know."""
    cache = unwritable_cache(tmp_path, kind, monkeypatch)
    run = foreign_run(tmp_path, tmp_path / "marker", env_id=f"{MODULE}:Env-v0", accident="cost")
    inputs, config = parse_run_yaml(run.config_text, "pretrain", PretrainConfig, run.path)
    said: list[str] = []
    trust_own(run.config_text, inputs, config.safety, said.append)
    (line,) = said
    assert line.startswith("note        this run will have to be trusted before it is used. The ")
    assert f'"{cache / "trusted"}", cannot be written (' in line
    assert line.endswith("Set SAFE_OFFRL_CACHE to a folder of yours.")
    with pytest.raises(RunError) as caught:
        require_trusted(run, inputs, config.safety)
    said_then = str(caught.value)
    assert said_then.startswith('Whether the run "foreign" was made on this machine is not known')
    assert f'"{cache / "trusted"}", cannot be written (' in said_then
    assert "Set SAFE_OFFRL_CACHE to a folder of yours." in said_then
    assert "was not made on this machine" not in said_then
    with pytest.raises(RunError, match=r"cannot be written.*Set SAFE_OFFRL_CACHE"):
        commands.trust_run(run.path)


def test_a_list_that_can_be_written_and_does_not_hold_a_run_says_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFE_OFFRL_CACHE", str(tmp_path / "cache"))
    run = foreign_run(tmp_path, tmp_path / "marker", env_id=f"{MODULE}:Env-v0", accident="cost")
    inputs, config = parse_run_yaml(run.config_text, "pretrain", PretrainConfig, run.path)
    with pytest.raises(RunError, match="was not made on this machine as far as it knows"):
        require_trusted(run, inputs, config.safety)
    said: list[str] = []
    trust_own(run.config_text, inputs, config.safety, said.append)
    require_trusted(run, inputs, config.safety)
    assert said == []


def test_the_payload_would_make_its_marker(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()
