"""Whatever is loaded, only our own errors come out: 500 inputs, 10,000 with `make test-slow`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import ReplayBuffer

from safe_offrl.bench.suite import jobs_of, load_suite, parse_suite
from safe_offrl.check.inspect import format_summary, summarise
from safe_offrl.config import load_config, schema_keys
from safe_offrl.data_formats.conversion import convert
from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.data_formats.memory_map import _header_sha256
from safe_offrl.data_formats.replay_buffer import from_replay_buffer
from safe_offrl.data_formats.validation import check_matches_env
from safe_offrl.env.make import make_env
from safe_offrl.errors import UserError
from safe_offrl.record.find_run import find_run
from safe_offrl.record.run_config import RunInputs, parse_run_yaml, run_yaml
from safe_offrl.record.run_names import check_name
from safe_offrl.spec import SafetySpec
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.train.pretrain_config import PretrainConfig
from tests import fuzz
from tests.data_formats import test_data_minari
from tests.data_formats.test_data_hdf5 import METADATA, make_arrays
from tests.data_formats.test_data_replay_buffer import filled
from tests.promises import Record

RULES = ("cost", "cost", "episode_cost", "terminated", "m:f")
CONFIGS: tuple[tuple[str, Any], ...] = (("pretrain", PretrainConfig), ("finetune", FinetuneConfig))
INPUTS = RunInputs("PointHazard-v0", "/data/log.hdf5", "ab" * 32, horizon=50)


class Target(NamedTuple):
    """One kind of input: what is drawn, what is done with it (in a folder), its share of 10,000."""

    inputs: Callable[[Path], st.SearchStrategy[Any]]  # the folder may hold a valid example
    load: Callable[[Path, Any], None]
    inputs_in_10_000: int


def read(path: Path, rule: str = "cost", horizon: int | None = None) -> None:
    """Everything that is done with a dataset before anything is learnt from it."""
    threshold = 1.0 if rule == "episode_cost" else 0.0
    spec = SafetySpec(accident=rule, cost_threshold=threshold)
    dataset = load_dataset(path, discount=0.9, spec=spec, horizon=horizon)
    assert np.isfinite(np.asarray(dataset.transitions.rewards)).all()
    format_summary(summarise(dataset, spec, 0.15))
    check_matches_env(dataset, "PointHazard-v0", 2, 1)


def with_rule(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.tuples(strategy, st.sampled_from(RULES), st.sampled_from([None, 4, 10, 10, 1]))


# --- datasets ---


def hdf5_text(found: Any) -> Any:
    return found.astype("S") if found.dtype.kind == "U" else found


def hdf5_contents(folder: Path, drawn: Any) -> None:
    (arrays, metadata), rule, horizon = drawn
    with h5py.File(folder / "log.hdf5", "w") as file:
        for key, value in arrays.items():
            file[key] = hdf5_text(value)
        file.attrs["safe_offrl"] = fuzz.as_json(metadata)
    read(folder / "log.hdf5", rule, horizon)


def npz_contents(folder: Path, drawn: Any) -> None:
    (arrays, metadata), rule, horizon = drawn
    np.savez(folder / "log.npz", metadata=np.array(fuzz.as_json(metadata)), **arrays)
    read(folder / "log.npz", rule, horizon)


def file_of(name: str) -> Callable[[Path, Any], None]:
    """Reads a file that is given as its bytes."""

    def load(folder: Path, drawn: Any) -> None:
        data, rule, horizon = drawn
        (folder / name).write_bytes(data)
        read(folder / name, rule, horizon)

    return load


def example(suffix: str) -> Callable[[Path], st.SearchStrategy[Any]]:
    """Damaged bytes of a valid file of this format."""

    def inputs(folder: Path) -> st.SearchStrategy[Any]:
        write_dataset(folder / "example.hdf5", make_arrays(), METADATA)
        if suffix != ".hdf5":
            convert(folder / "example.hdf5", folder / f"example{suffix}")
        return with_rule(fuzz.damaged((folder / f"example{suffix}").read_bytes()))

    return inputs


@st.composite
def tables(draw: st.DrawFn) -> bytes:
    """CSV with cells and column names changed."""
    names = ["observations_0", "observations_1", "actions_0", "rewards", "costs", "terminals"]
    names += ["timeouts", *(["accidents"] if draw(st.booleans()) else [])]
    rows = [[str(float(r == 3 and c > 4)) for c in range(len(names))] for r in range(4)]
    cells = ["nan", "inf", "1e39", "-1", "", "x", "0x1", "1e999", "2", '"1"', " 1", "1\0", "#"]
    odd = ["actions", "observations_2", "actions_01", "observations_99999999999", "rewards", "é"]
    for _ in range(draw(st.integers(0, 3))):
        row = draw(st.sampled_from([names, *rows]))
        at = draw(st.integers(0, len(row) - 1))
        if draw(st.integers(0, 5)):
            row[at] = draw(st.sampled_from(odd if row is names else cells))
        else:
            del row[at]
    text = "\n".join(
        ",".join(row) for row in [names, *rows][: draw(st.sampled_from([1, 3, 5, 5, 5, 5]))]
    )
    return (text + draw(st.sampled_from(["\n", "", "\n\n", "\r\n"]))).encode()


def minari_inputs(folder: Path) -> st.SearchStrategy[Any]:
    group = {
        "observations": np.arange(3.0)[:, None],
        "actions": np.ones((2, 1), np.float32),
        "rewards": np.ones(2),
        "terminations": np.array([False, True]),
        "truncations": np.zeros(2, bool),
        "infos/cost": np.array([0.0, 1.0, 0.0]),
        "infos/accident": np.array([False, True, False]),
    }
    description = dict(test_data_minari.DESCRIPTION)
    spaces = {
        key: json.loads(description[key])
        for key in ("observation_space", "action_space", "env_spec")
    }

    def joined(described: Any) -> Any:
        inner = described.get("inner") if isinstance(described, dict) else None
        outer = described.get("outer") if isinstance(described, dict) else described
        if not isinstance(outer, dict) or not isinstance(inner, dict):
            return outer
        return {**outer, **{str(k): fuzz.as_json(v) for k, v in inner.items()}}

    outer = {"data_format": "hdf5"}
    described = fuzz.changed_tree({"outer": outer, "inner": spaces}).map(joined)
    described |= fuzz.changed_tree(description)
    return with_rule(st.tuples(fuzz.arrays(group), described))


def minari(folder: Path, drawn: Any) -> None:
    (arrays, described), rule, horizon = drawn
    data = folder / "log" / "data"
    data.mkdir(parents=True, exist_ok=True)
    with h5py.File(data / "main_data.hdf5", "w") as file:
        test_data_minari.episode(file, 1)["infos/accident"] = np.zeros(3, bool)
        for key, value in arrays.items():
            file[f"episode_0/{key}"] = hdf5_text(value)
    (data / "metadata.json").write_text(fuzz.as_json(described))
    read(folder / "log", rule, horizon)


def map_inputs(folder: Path) -> st.SearchStrategy[Any]:
    write_dataset(folder / "log.hdf5", make_arrays(), METADATA)
    convert(folder / "log.hdf5", folder / "log.mmap")
    header = json.loads((folder / "log.mmap" / "dataset.json").read_bytes())
    return with_rule(
        st.tuples(
            fuzz.changed_tree(header)
            | fuzz.metadata().map(lambda m: {**header, "metadata": fuzz.as_json(m)}),
            st.sampled_from([True, True, True, False]),
        )
    )


def memory_map(folder: Path, drawn: Any) -> None:
    (header, signed), rule, horizon = drawn
    if signed and isinstance(header, dict):  # whoever writes a hostile one can do that as well
        header = json.loads(fuzz.as_json(header))
        header["header_sha256"] = _header_sha256(header)
    (folder / "log.mmap" / "dataset.json").write_text(fuzz.as_json(header))
    read(folder / "log.mmap", rule, horizon)


def buffer_inputs(_: Path) -> st.SearchStrategy[Any]:
    names = ["observations", "next_observations", "actions", "rewards", "dones", "timeouts"]
    changes = st.dictionaries(st.sampled_from(names), st.sampled_from(fuzz.NUMBERS), max_size=2)
    costs = st.just(np.eye(10)[:, :1]) | st.just(np.zeros(10)) | fuzz.array()
    horizon = st.sampled_from([3, 3, None]) | st.integers()
    return st.tuples(st.integers(0, 13), st.booleans(), changes, costs, horizon)


def replay_buffer(folder: Path, drawn: Any) -> None:
    steps, compact, changes, costs, horizon = drawn
    buffer: ReplayBuffer = filled(steps, compact=compact)[0]
    for name, value in changes.items():
        with np.errstate(all="ignore"):
            found = getattr(buffer, name, None)
            if found is not None:
                found.flat[min(2, found.size - 1)] = value
    arrays, metadata = from_replay_buffer(buffer, costs=costs, horizon=horizon)
    write_dataset(folder / "log.hdf5", arrays, metadata)
    read(folder / "log.hdf5")


# --- settings ---


def override_inputs(_: Path) -> st.SearchStrategy[Any]:
    keys = sorted({key for _, schema in CONFIGS for key in schema_keys(schema)})
    values = [*fuzz.TEXTS, "[256,256]", "[-1]", "[]", "1e400", "9" * 30, "0", "true", "none", "inf"]
    values += ["iql", "cost", "episode_cost", "real", "1e-320", "(1, 2)", "0.999999999", "-0"]
    key = st.sampled_from([*keys, "safety", "", "epsilon"]) | st.text(max_size=12)
    value = st.sampled_from(values) | st.floats().map(repr) | st.text(max_size=12)
    return st.lists(st.builds("{}={}".format, key, value) | st.text(max_size=20), max_size=3)


def overrides(folder: Path, drawn: Any) -> None:
    (folder / "none.yaml").write_text("{}")
    for section, schema in CONFIGS:
        with contextlib.suppress(UserError):
            load_config(
                schema,
                section=section,
                env_id="None-v0",
                preset=str(folder / "none.yaml"),
                overrides=drawn,
            )


def yaml_text(tree: Any) -> str:
    return yaml.safe_dump(tree, allow_unicode=True)


def config_inputs(folder: Path) -> st.SearchStrategy[Any]:
    texts = [run_yaml(INPUTS, section, schema(), folder) for section, schema in CONFIGS]
    trees = [yaml.safe_load(text) for text in texts]
    one = st.one_of([fuzz.changed_tree(tree).map(yaml_text) for tree in trees])
    bytes_of = st.one_of([fuzz.damaged(text.encode()) for text in texts])
    return one | bytes_of.map(lambda data: data.decode(errors="replace"))


def config(folder: Path, drawn: Any) -> None:
    for section, schema in CONFIGS:
        with contextlib.suppress(UserError):
            parse_run_yaml(drawn, section, schema, folder)


def suite_inputs(_: Path) -> st.SearchStrategy[Any]:
    suites = [dataclasses.asdict(load_suite(name)) for name in ("smoke", "point")]
    trees = [
        {k: v for k, v in suite.items() if k != "name"} | {"seeds": len(suite["seeds"])}
        for suite in suites
    ]
    trees = [json.loads(json.dumps(tree)) for tree in trees]
    one = st.one_of([fuzz.changed_tree(tree).map(yaml_text) for tree in trees])
    whole = yaml_text(trees[0]).encode()
    return one | fuzz.damaged(whole).map(lambda data: data.decode(errors="replace"))


def suite(folder: Path, drawn: Any) -> None:
    root = folder / "runs"
    for job in jobs_of(parse_suite(drawn, "drawn"), root):
        assert root in job.folder.parents
        assert root.resolve() in job.folder.resolve().parents
        assert all(isinstance(argument, str) for argument in job.arguments)


def run_names(folder: Path, drawn: Any) -> None:
    with contextlib.suppress(UserError):
        assert (folder / check_name(drawn)).resolve().parent == folder.resolve()
    find_run(drawn, folder)


def env_ids(_: Path, drawn: Any) -> None:
    make_env(drawn, SafetySpec()).close()


def names(*parts: str) -> Callable[[Path], st.SearchStrategy[Any]]:
    """Text of these parts and of anything."""
    piece = st.sampled_from([*parts, "/", ".", "..", ":", "\\", "\0", " ", "-v", "0", "%", "~"])
    return lambda _: st.lists(piece, max_size=5).map("".join) | st.text(max_size=70)


def contents(_: Path) -> st.SearchStrategy[Any]:
    return with_rule(st.tuples(fuzz.arrays(), fuzz.metadata()))


TARGETS = {
    "HDF5, contents": Target(contents, hdf5_contents, 1500),
    "HDF5, bytes": Target(example(".hdf5"), file_of("log.hdf5"), 800),
    "npz, contents": Target(contents, npz_contents, 1200),
    "npz, bytes": Target(example(".npz"), file_of("log.npz"), 600),
    "CSV": Target(lambda _: with_rule(tables()), file_of("log.csv"), 800),
    "CSV, bytes": Target(example(".csv"), file_of("log.csv"), 400),
    "Minari": Target(minari_inputs, minari, 1200),
    "memory map": Target(map_inputs, memory_map, 700),
    "replay buffer": Target(buffer_inputs, replay_buffer, 400),
    "key=value": Target(override_inputs, overrides, 1000),
    "config.yaml": Target(config_inputs, config, 600),
    "suite": Target(suite_inputs, suite, 400),
    "run names": Target(names("run", "runs"), run_names, 200),
    "environment ids": Target(names("Point", "Hazard-v0", "os", "m"), env_ids, 200),
}


@pytest.fixture(scope="module")
def counted(figure: Record) -> Iterator[dict[str, int]]:
    """Inputs by size of the test; their sum is reported."""
    counts: dict[str, int] = {}
    yield counts
    for size, count in counts.items():
        figure("R13", f"{count:,} inputs ({size}), only our own errors")


@pytest.mark.promise("R13")
@pytest.mark.parametrize(
    ("size", "share"),
    [("some", 0.05), pytest.param("all", 1.0, marks=pytest.mark.slow)],
    ids=["some", "all"],
)
@pytest.mark.parametrize("name", TARGETS)
def test_only_our_own_errors_come_out(
    tmp_path: Path, counted: dict[str, int], name: str, size: str, share: float
) -> None:
    target = TARGETS[name]
    number = round(share * target.inputs_in_10_000)

    @settings(
        max_examples=number,
        derandomize=size == "some",  # the same inputs for everyone; the slow ones are new each time
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs(tmp_path))
    def load(drawn: Any) -> None:
        counted[size] = counted.get(size, 0) + 1
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=".*Gym.*|.*out of date.*")
            with contextlib.suppress(UserError):
                target.load(tmp_path, drawn)

    load()


def test_the_shares_add_up() -> None:
    assert sum(target.inputs_in_10_000 for target in TARGETS.values()) == 10_000
