"""What several test files need: a small log of the default environment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from safe_offrl.collect import collect, random_behaviour, scripted_behaviours
from safe_offrl.data.hdf5 import write_dataset
from safe_offrl.env import make_env
from safe_offrl.safety import SafetySpec

torch.set_num_threads(1)  # results depend on the number, and CI has two cores


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PointHazard-v0, 3000 transitions of scripted and random behaviour, both outcomes."""
    env = make_env("PointHazard-v0", SafetySpec())
    behaviours = [*scripted_behaviours(env), random_behaviour(env.action_size)]
    shares = [1.0 / len(behaviours)] * len(behaviours)
    arrays = collect(env, behaviours=behaviours, shares=shares, transitions=3000, seed=0)
    path = tmp_path_factory.mktemp("data") / "tiny.hdf5"
    metadata = {
        "env_id": "PointHazard-v0",
        "accident": "cost",
        "cost_threshold": 0.0,
        "horizon": env.horizon,
        "behaviours": [{"name": b.name} for b in behaviours],
    }
    write_dataset(path, arrays, metadata)
    env.close()
    assert np.sum(arrays["accidents"]) > 0
    return path
