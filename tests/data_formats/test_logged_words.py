"""A log's own words hold where nothing else is said, and what it names is not imported unasked."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from safe_offrl import commands
from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.data_formats.loading import load_dataset, stated_metadata
from safe_offrl.errors import ConfigError
from safe_offrl.record.trust import trust_log
from tests.data_formats.test_data_doubts import LENGTH, falls

MODULE = "own_words"
CODE = """
import gymnasium
import numpy as np


class Fall(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-9.0, 9.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)


def fell(observation, action, following, reward, terminated, truncated, info):
    return terminated


if "OwnFall-v0" not in gymnasium.registry:
    gymnasium.register("OwnFall-v0", entry_point=Fall)
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A log that names an environment without a time limit, its horizon and an own rule."""
    (tmp_path / f"{MODULE}.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SAFE_OFFRL_CACHE", str(tmp_path / "cache"))
    arrays = falls()
    verdicts = arrays["terminals"] | (arrays["actions"][:, 0] > 0.97)
    metadata = {"accident": f"{MODULE}:fell", "horizon": LENGTH, "env_id": f"{MODULE}:OwnFall-v0"}
    write_dataset(tmp_path / "log.hdf5", arrays | {"accidents": verdicts}, metadata)
    yield tmp_path / "log.hdf5"
    sys.modules.pop(MODULE, None)


def test_a_log_from_elsewhere_does_not_say_what_is_imported(log: Path) -> None:
    config = commands.pretrain_config(dataset=str(log), overrides=["safety.accident=cost"])
    assert (config.env, config.safety.accident) == ("PointHazard-v0", "cost")
    with pytest.raises(ConfigError, match=f"would be imported.*safety.accident={MODULE}:fell"):
        commands.pretrain_config(dataset=str(log))
    assert MODULE not in sys.modules


def test_a_log_that_was_made_here_says_it_all(log: Path) -> None:
    trust_log(stated_metadata(log))
    plan = commands.plan_pretrain(commands.pretrain_config(dataset=str(log)))
    assert plan.inputs.env_id == f"{MODULE}:OwnFall-v0"
    assert plan.config.safety.accident == f"{MODULE}:fell"
    assert plan.config.safety.horizon == plan.dataset.horizon == LENGTH
    own = plan.dataset.episode_accidents.mean()
    assert "accidents are counted" not in plan.header
    # Another rule is asked for, and that is said.
    other = commands.plan_pretrain(
        commands.pretrain_config(dataset=str(log), overrides=["safety.accident=terminated"])
    )
    assert other.dataset.episode_accidents.mean() < own
    assert f'under the accident rule "{MODULE}:fell"; accidents are counted under "termin' in (
        other.header
    )


def test_inspect_counts_by_the_logs_own_rule_and_imports_nothing(log: Path) -> None:
    shown = commands.inspect_dataset(log, say=lambda text: None)
    spec = commands.pretrain_config(overrides=[f"safety.accident={MODULE}:fell"]).safety
    own = load_dataset(log, discount=1.0, spec=spec)
    assert shown["accident_episodes"] == own.episode_accidents.sum()
    assert MODULE not in sys.modules


def test_what_inspect_warns_of_is_in_the_header_of_pretrain(log: Path) -> None:
    trust_log(stated_metadata(log))
    warnings = commands.inspect_dataset(log, say=lambda text: None)["warnings"]
    header = commands.plan_pretrain(commands.pretrain_config(dataset=str(log))).header
    assert warnings
    assert all(f"warning     {text}" in header for text in warnings)
