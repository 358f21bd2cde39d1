"""The ONNX example of the guide plays every kind of observation space that can be used."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from safe_offrl import commands
from safe_offrl.collect.behaviours import random_behaviour
from safe_offrl.collect.mixture import log_episodes
from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.env.make import make_env
from safe_offrl.env.observations import flatten, layout
from safe_offrl.policy import load_policy
from safe_offrl.spec import SafetySpec
from tests.markdown_blocks import blocks

GUIDE = Path(__file__).parents[2] / "docs" / "custom_environments.md"
HORIZON = 20


def box(*shape: int, dtype: Any = np.float32) -> spaces.Box:
    return spaces.Box(-100, 100, shape, dtype)


SPACES: dict[str, spaces.Space[Any]] = {
    "Vector": box(3),
    "Matrix": box(5, 5),
    # Gymnasium sorts the keys of a plain dict, and keeps the order of pairs.
    "Dict": spaces.Dict({"z": box(2), "grid": box(2, 3), "a": box()}),
    "Pairs": spaces.Dict([("z", box(2)), ("a", box(1))]),
    "Nested": spaces.Dict({"arm": spaces.Dict({"x.y": box(2)}), "legs": spaces.Tuple((box(1),))}),
    "Tuple": spaces.Tuple((box(2, 2), box(1, dtype=np.int16))),
}


class Shaped(gymnasium.Env[Any, Any]):
    """Random numbers in the shape of a space; every other episode ends in an accident."""

    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, kind: str) -> None:
        self.observation_space = SPACES[kind]

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps, self.accident = 0, bool(self.np_random.integers(2))
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        end = self.accident and self.steps == HORIZON // 2
        return self._observe(), float(action[0]), end, False, {"cost": float(end)}

    def _observe(self) -> Any:
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        return self.observation_space.sample()


for _kind in SPACES:
    gymnasium.register(
        f"Shaped{_kind}-v0",
        entry_point=f"{__name__}:Shaped",
        max_episode_steps=HORIZON,
        kwargs={"kind": _kind},
    )


@pytest.fixture
def example() -> str:
    (found,) = [b.text for b in blocks(GUIDE) if "onnxruntime.InferenceSession" in b.text]
    return found


@pytest.mark.parametrize("kind", SPACES)
def test_the_example_feeds_the_policy_as_we_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    example: str,
    kind: str,
) -> None:
    env_id = f"Shaped{kind}-v0"
    with contextlib.closing(make_env(env_id, SafetySpec())) as env:
        behaviours = [random_behaviour(env.action_size)]
        arrays = log_episodes(env, behaviours=behaviours, shares=[1.0], transitions=600, seed=0)
    write_dataset(
        tmp_path / "log.hdf5",
        arrays,
        {"env_id": env_id, "horizon": HORIZON, "behaviours": [{"name": "random"}]},
    )
    sizes = ["networks.actor_hidden=[8]", "networks.critic_hidden=[8]", "critic.hidden=[8]"]
    config = commands.pretrain_config(
        env=env_id,
        dataset=str(tmp_path / "log.hdf5"),
        steps=5,
        overrides=["alignment_steps=1", "batch_size=8", *sizes],
    )
    said: list[str] = []
    plan = commands.plan_pretrain(config, say=said.append)
    run = commands.pretrain_run(plan, runs=tmp_path, say=said.append)
    commands.export_run(run.path, out=tmp_path / "policy.onnx", say=said.append)
    capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "my_env", sys.modules[__name__])
    names: dict[str, Any] = {}
    exec(example.replace("MyEnv-v0", env_id), names)  # what the reader runs
    assert capsys.readouterr().out.split()[-1] == "steps"

    space, policy = SPACES[kind], load_policy(run.path)
    parts = layout(env_id, space)
    for _ in range(20):
        observation = space.sample()
        vector = names["flat"](observation)
        assert vector.dtype == np.float32
        np.testing.assert_array_equal(vector, flatten(env_id, parts, observation))
        # Without draws, the file's action is that of predict.
        inputs = {
            "observation": vector[None],
            "time_to_go": np.ones(1, np.float32),
            "noise": np.zeros((1, *names["shape"]["noise"]), np.float32),
        }
        action, _ = names["session"].run(None, inputs)
        wanted, _ = policy.predict(observation, deterministic=True)
        np.testing.assert_allclose(action[0], wanted, rtol=0.0, atol=1e-5)
