"""Settings: precedence, types, ranges, and messages that say what to do."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from safe_offrl import config
from safe_offrl.errors import ConfigError, UserError
from safe_offrl.record.run_config import RunInputs, parse_run_yaml, run_yaml
from safe_offrl.spec import SafetySpec
from safe_offrl.train.pretrain_config import PretrainConfig


@dataclass(frozen=True)
class Inner:
    rate: float = 3e-4
    layers: tuple[int, ...] = (256, 256)
    gap: float | None = None


@dataclass(frozen=True)
class Outer:
    steps: int = 100
    agent: str = "iql"
    kl: bool = True
    run: str | None = None
    inner: Inner = field(default_factory=Inner)
    safety: SafetySpec = field(default_factory=SafetySpec)

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError("steps is negative")


def load(*overrides: str, **layers: object) -> Outer:
    return config.load_config(
        Outer,
        section="outer",
        env_id="None-v0",
        overrides=overrides,
        **layers,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [("50k", 50_000), ("1.5M", 1_500_000), ("1e5", 100_000), ("7", 7), ("1.1M", 1_100_000)],
)
def test_parse_count(text: str, value: int) -> None:
    assert config.parse_count(text) == value


@pytest.mark.parametrize(
    "text", ["", "k", "1.5", "nan", "inf", "1e999", "-3", "5 0", "50kk", "0.1k2"]
)
def test_parse_count_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="whole number"):
        config.parse_count(text)


def test_later_layers_win(tmp_path: Path) -> None:
    preset = tmp_path / "p.yaml"
    preset.write_text("outer:\n  steps: 1\n  agent: a\n  inner: {rate: 1}\n  kl: false\n")
    layers = {
        "preset": str(preset),
        "inherited": {"agent": "b", "safety": {"epsilon": 0.2, "accident": "terminated"}},
        "flags": {"steps": 3, "run": None, "safety.epsilon": 0.3},
    }
    got = load("inner.rate=4", "safety.epsilon=.4", **layers)
    # inherited -> accident; preset -> kl, agent; flag -> steps; override -> rate, epsilon.
    safety = SafetySpec(accident="terminated", epsilon=0.4)
    assert got == Outer(steps=3, agent="a", kl=False, inner=Inner(rate=4.0), safety=safety)
    # A value equal to the dataclass default must still override the preset (a bug of OSRL).
    assert load("steps=100", **layers).steps == 100


def test_a_preset_of_ones_own_comes_after_its_base_and_that_after_its_own(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("base: hazards\npretrain: {steps: 7, critic.tau: 0.5}\n")
    got = config.load_config(PretrainConfig, section="pretrain", env_id="My-v0", preset=preset)
    assert (got.steps, got.critic.tau) == (7, 0.5)
    assert (got.alignment_steps, got.critic.cost_discount) == (2_000, 0.95)  # of hazards
    assert (got.networks.critics, got.critic.learning_rate) == (5, 1e-3)  # of its base, laptop
    assert got.safety == SafetySpec()  # no base says what is constrained


def test_values_take_the_declared_type() -> None:
    got = load("inner.layers=[64,32]", "kl=false", "steps=2k", "inner.gap=5", "run=none")
    assert got == Outer(steps=2000, kl=False, inner=Inner(layers=(64, 32), gap=5.0))
    assert isinstance(got.inner.gap, float)
    assert load("inner.gap=null").inner.gap is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=3", 'Unknown key "stepz". Did you mean "steps"?'),
        ("epsilon=0.1", 'Did you mean "safety.epsilon"?'),
        ("inner.raet=1", 'Did you mean "inner.rate"?'),
        ("nothing_like_it=1", "--print-config lists every key"),
        ("inner.rate=nan", "a finite number"),
        ("inner.rate=inf", "a finite number"),
        ("inner.rate=fast", "a number"),
        ("steps=1.5", "not a whole number"),
        ("steps=-1", "steps is negative"),
        ("kl=maybe", "true or false"),
        ("safety.epsilon=1", "strictly between 0 and 1"),
        ("safety.epsilon=nan", "finite number"),
        ("safety.horizon=0", "at least 1 step"),
        ("run=${oc.env:HOME}", "resolved from outside"),
        ("inner=3", "Unknown key"),
        ("steps", "not of the form key=value"),
        ("steps=none", "not a whole number"),
    ],
)
def test_bad_override_is_one_clear_error(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(override)
    assert message in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    preset = tmp_path / "p.yaml"
    for text, message in [
        ("outer: {stepz: 1}", "Did you mean"),
        ("outer: {run: '${oc.env:HOME}'}", "resolved from outside"),
        ("outer: {steps: .nan}", "whole number"),
        ("outer: [", "not readable as YAML"),
        ("- 1", "no key: value"),
        ("a: " + "[" * 3000, "not readable as YAML"),
        ("outer: {inner: {deep: {deeper: 1}}}", "Unknown key"),
        ("pretraining: {}", 'Did you mean "pretrain"'),
        ("base: laptpo", 'no base "laptpo" of presets. Did you mean "laptop"'),
        ("base: mine.yaml", "There are hazards, laptop"),
        ("base: [laptop]", "text is needed"),
        ("outer: 3", '"outer" of the preset holds no key: value pairs'),
    ]:
        preset.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load(preset=str(preset))
    with pytest.raises(ConfigError, match="cannot be read"):
        load(preset=str(tmp_path / "none.yaml"))


def test_paths_of_a_run_are_written_without_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SAFE_OFFRL_CACHE", raising=False)

    def stored(path: Path, runs: Path) -> str:
        inputs = RunInputs("X-v0", str(path), "ab")
        text = run_yaml(inputs, "outer", Outer(), runs)
        assert parse_run_yaml(text, "outer", Outer, runs / "any")[0] == inputs
        return str(yaml.safe_load(text)["inputs"]["dataset"])

    project = home / "project"
    assert stored(project / "runs" / "offline", project / "runs") == "../offline"
    assert stored(project / "log.hdf5", project / "runs") == "../../log.hdf5"
    assert stored(home / "log.hdf5", project / "runs") == "~/log.hdf5"
    # The cache stays where it is when runs move, also where both are in the home folder.
    cached = home / ".cache" / "safe-offrl" / "log.hdf5"
    assert stored(cached, home / "runs") == "~/.cache/safe-offrl/log.hdf5"
    assert stored(tmp_path / "log.hdf5", project / "runs") == str(tmp_path / "log.hdf5")
    # Everything is below the root: that says nothing about what is moved together.
    assert stored(Path("/data/log.hdf5"), Path("/runs")) == "/data/log.hdf5"


def through_yaml(value: Any) -> Any:
    text = config.yaml_text(config.to_dict(value))
    return config.from_dict(type(value), config.read_yaml(text, "the text"))


def test_yaml_round_trip() -> None:
    value = Outer(steps=7, agent="1e5", run="true", inner=Inner(rate=1e-5, layers=(3,), gap=0.1))
    assert through_yaml(value) == value
    inputs = RunInputs("PointHazard-v0", "/data/d.hdf5", "ab" * 32, pretrained="/r/p")
    text = run_yaml(inputs, "outer", value, Path("/r"))
    assert parse_run_yaml(text, "outer", Outer, Path("/r/x")) == (inputs, value)
    with pytest.raises(ConfigError, match="Did you mean"):
        config.from_dict(Outer, {"stepz": 3})
    with pytest.raises(ConfigError, match="missing"):
        config.from_dict(RunInputs, {"env_id": "X-v0"})


def test_every_preset_is_found_by_its_environment() -> None:
    for entry in Path(config.__file__).parent.parent.joinpath("configs").glob("*.yaml"):
        values = config.read_yaml(entry.read_text(), entry.name)
        assert config.load_preset(values["env_id"]) == values
    assert config.load_preset("Unknown-v0") == {}


@pytest.mark.promise("R13")
@given(st.text(max_size=40))
def test_any_override_text_gives_a_config_or_a_user_error(text: str) -> None:
    with contextlib.suppress(UserError):  # any other exception fails the test
        load(text)


# --- settings that somebody else's class declares ---


@dataclass(frozen=True)
class Foreign:
    steps: int = 1
    own: dict[str, object] = field(default_factory=dict)


def foreign(*overrides: str, **layers: object) -> Foreign:
    return config.load_config(
        Foreign,
        section="foreign",
        env_id="None-v0",
        overrides=overrides,
        **layers,  # type: ignore[arg-type]
    )


def test_entries_of_a_dict_are_set_one_by_one_and_kept() -> None:
    found = foreign("own.rate=1e-3", inherited={"own": {"rate": 1.0, "layers": [8, 8]}})
    assert found == Foreign(own={"rate": "1e-3", "layers": [8, 8]})
    assert through_yaml(found) == found


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("own=3", '"own" is .*, but a mapping of keys to values is needed'),
        ("own.a.b=3", 'Unknown key "own.a.b"'),
        ("steps.a=3", 'Unknown key "steps.a"'),
        ("own.a=${oc.env:HOME}", "resolved from outside the file"),
    ],
)
def test_what_is_no_entry_of_a_dict_is_refused(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        foreign(override)


@pytest.mark.parametrize("text", ["0", "3.5", "true", "[]", "- a"])
def test_a_file_of_no_settings_is_one_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match=r"my\.yaml holds no key: value pairs"):
        config.read_yaml(text, "my.yaml")
