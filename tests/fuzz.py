"""What the fuzz tests feed: valid small inputs with one or a few things wrong, as hypothesis draws.

Random bytes would stop at the first check of a format; what is nearly right gets further.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.data_formats.test_data_hdf5 import METADATA, make_arrays

TYPES = ("<f4", "<f8", ">f4", "<f2", "<i8", "<i4", "|u1", "<u8", "|b1", "<c8", "|S3", "<U2")
NUMBERS = (0, 1, -1, 2, 0.5, 6, 1e39, -1e39, float("nan"), float("inf"), 2**31, 2**62, 2**63, 1e-45)
TEXTS = (
    "",
    "a",
    "nan",
    "null",
    "1e5",
    "-1",
    "é",
    "${oc.env:HOME}",
    "..",
    "a/../b",
    "a:b",
    "cost",
    "\0",
)
KEYS = ("horizon", "env_id", "accident", "cost_threshold", "action_count", "action_low", "name")
MORE_KEYS = (*KEYS, "action_high", "behaviours", "no_costs", "warning")

json_values = st.recursive(
    st.none() | st.booleans() | st.sampled_from((*NUMBERS, *TEXTS, "episode_cost", "terminated")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from((*MORE_KEYS, "a")), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def array(draw: st.DrawFn) -> np.ndarray:
    """Any small array: shape, type and values; often six rows, as the valid ones have."""
    shape = draw(
        st.sampled_from([(6,), (6, 1), (6, 2), (6, 3), (5,), (7, 2), (0,), (0, 2), (6, 0), ()])
        | st.lists(st.integers(0, 3), max_size=4).map(tuple)
    )
    kind = draw(st.sampled_from(TYPES))
    values = draw(st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=4))
    with np.errstate(all="ignore"):
        flat = np.resize(np.array(values, np.float64), int(np.prod(shape)))
        found: np.ndarray = flat.astype(kind).reshape(shape)
    return found


@st.composite
def arrays(draw: st.DrawFn, valid: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a valid file, with some left out, replaced, one value changed, or one added."""
    found = dict(valid or make_arrays())
    optional = {"accidents": np.zeros(6, bool), "behaviour_log_probs": np.zeros(6, np.float32)}
    found |= {k: v for k, v in optional.items() if valid is None and draw(st.booleans())}
    for name in draw(st.lists(st.sampled_from(sorted(found)), max_size=2, unique=True)):
        how = draw(
            st.sampled_from(["drop", "value", "value", "type", "rows", "replace", "replace"])
        )
        with np.errstate(all="ignore"):
            if how == "drop":
                del found[name]
            elif how == "value" and found[name].size:
                changed = np.array(found[name], np.float64)
                changed.flat[draw(st.integers(0, changed.size - 1))] = draw(
                    st.sampled_from(NUMBERS)
                )
                found[name] = changed
            elif how == "type":
                found[name] = found[name].astype(draw(st.sampled_from(TYPES)))
            elif how == "rows":
                found[name] = found[name][: draw(st.integers(0, 5))]
            else:
                found[name] = draw(array())
    return found


def metadata() -> st.SearchStrategy[dict[str, Any]]:
    """Our metadata with some entries changed."""
    changes = st.dictionaries(st.sampled_from(MORE_KEYS), json_values, max_size=2)
    return st.builds(lambda base, new: {**base, **new}, st.sampled_from([{}, METADATA]), changes)


def changed_tree(valid: Any) -> st.SearchStrategy[Any]:
    """A JSON or YAML value in which a few nodes were replaced, dropped or renamed."""

    @st.composite
    def draw_one(draw: st.DrawFn) -> Any:
        tree = copy.deepcopy(valid)
        for _ in range(draw(st.integers(1, 3))):
            node, steps = tree, draw(st.integers(1, 4))
            for left in range(steps, 0, -1):
                if not isinstance(node, dict | list) or not node:
                    break
                keys = sorted(node, key=str) if isinstance(node, dict) else range(len(node))
                key = draw(st.sampled_from(list(keys)))
                inner = node[key]
                if left > 1 and isinstance(inner, dict | list) and inner:
                    node = inner
                    continue
                how = draw(st.sampled_from(["replace", "replace", "drop", "rename"]))
                if how == "replace":
                    node[key] = draw(
                        st.sampled_from((*NUMBERS, *TEXTS, [], {}, None)) | json_values
                    )
                elif how == "drop" or isinstance(node, list):
                    del node[key]
                else:
                    node[draw(st.sampled_from([*TEXTS, 1, None, 2.5, True]))] = node.pop(key)
                break
        return tree

    return draw_one()


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes of a valid file, some flipped, overwritten or inserted, or the rest cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(["flip", "flip", "write", "insert", "cut"]))
        some = draw(st.binary(min_size=1, max_size=6))
        if how == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "write":
            data[at : at + len(some)] = some
        elif how == "insert":
            data[at:at] = some
        elif how == "cut":
            del data[at:]
    return bytes(data)


def as_json(value: Any) -> str:
    """JSON as a careless writer makes it: NaN and all."""
    return json.dumps(value, skipkeys=True)
