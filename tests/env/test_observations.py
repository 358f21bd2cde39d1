"""The order in which observations are flattened, and the names of the entries."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from safe_offrl.env.observations import entry_name, flatten, layout
from safe_offrl.errors import EnvError


def box(*shape: int) -> spaces.Box:
    return spaces.Box(-9.0, 9.0, shape, np.float32)


@pytest.mark.parametrize(
    ("space", "order"),
    [
        (spaces.Dict({"b": box(1), "a": box(1)}), ["a", "b"]),  # a plain dict: sorted
        (spaces.Dict(OrderedDict([("b", box(1)), ("a", box(1))])), ["b", "a"]),
        (spaces.Dict([("b", box(1)), ("a", box(1))]), ["b", "a"]),
        (spaces.Dict(b=box(1), a=box(1)), ["b", "a"]),
        (spaces.Dict({"b": box(1), 3: box(1)}), ["b", "3"]),  # type: ignore[dict-item]
    ],
)
def test_the_order_of_a_dict_is_that_of_gymnasiums_space(
    space: spaces.Dict, order: list[str]
) -> None:
    parts = layout("x", space)
    assert [part.name for part in parts] == order
    # The keys of the observation may come in any order.
    value = {part.path[0]: np.array([k]) for k, part in reversed(list(enumerate(parts)))}
    assert flatten("x", parts, value).tolist() == [0.0, 1.0]


NESTED = spaces.Dict(
    {
        "pose": spaces.Tuple([box(), spaces.Dict({"grid": box(2, 3)})]),
        "lidar": box(2),
    }
)


def test_nested_parts_have_slices_and_names() -> None:
    parts = layout("x", NESTED)
    assert [(p.name, p.start, p.stop) for p in parts] == [
        ("lidar", 0, 2),
        ("pose.0", 2, 3),
        ("pose.1.grid", 3, 9),
    ]
    value = {"lidar": [1, 2], "pose": (3.0, {"grid": np.arange(4, 10).reshape(2, 3)})}
    flat = flatten("x", parts, value)
    assert flat.dtype == np.float64
    assert flat.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    names = [entry_name(parts, k) for k in (1, 2, 3, 7, 9)]
    assert names == [
        *("lidar[1]", "pose.0[0]", "pose.1.grid[0, 0]", "pose.1.grid[1, 1]"),
        "share of cost_threshold used",
    ]
    assert entry_name(layout("x", box(3)), 2) == "observation[2]"


@pytest.mark.parametrize(
    "value",
    [
        {"pose": (3.0, {"grid": np.zeros((2, 3))})},
        {"lidar": [1, 2], "pose": (3.0,)},
        {"lidar": [1, 2], "pose": 3.0},
        {"lidar": "near", "pose": (3.0, {"grid": np.zeros((2, 3))})},
        None,
    ],
)
def test_an_observation_without_a_part_is_refused(value: Any) -> None:
    with pytest.raises(EnvError, match="without numbers for"):
        flatten("x", layout("x", NESTED), value)


def test_images_and_other_spaces_are_refused_wherever_they_lie() -> None:
    image = spaces.Box(0, 255, (8, 8, 3), np.uint8)
    with pytest.raises(EnvError, match=r"image observations of shape \(8, 8, 3\)"):
        layout("x", spaces.Dict({"a": box(1), "camera": image}))
    with pytest.raises(EnvError, match="type MultiBinary"):
        layout("x", spaces.Tuple([box(1), spaces.MultiBinary(3)]))
