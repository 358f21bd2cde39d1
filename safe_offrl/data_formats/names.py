"""Which array of a file is which: our names, those that others use for the same, and near misses.

An array that is meant but not read would be filled in by a guess, and rates of accidents with it:
so nothing of a file is dropped without a word.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from safe_offrl.data.content import signal_of, signals_in
from safe_offrl.data_formats.stored import OPTIONAL, REQUIRED
from safe_offrl.errors import DataError
from safe_offrl.types import signal_column

# Gymnasium, Minari, OmniSafe and CleanRL call arrays so; they are read where ours are missing.
SYNONYMS = {
    "obs": "observations",
    "observation": "observations",
    "next_obs": "next_observations",
    "next_observation": "next_observations",
    "action": "actions",
    "reward": "rewards",
    "cost": "costs",
    "termination": "terminals",
    "terminations": "terminals",
    "terminated": "terminals",
    "truncation": "timeouts",
    "truncations": "timeouts",
    "truncated": "timeouts",
    "done": "dones",
}
# Either of the two says where an episode ends; dones mixes them.
ENDS = ("terminals", "timeouts", "dones")
# What a load reads of the metadata; the rest is for people.
METADATA_KEYS = (
    "env_id",
    "horizon",
    "accident",
    "cost_threshold",
    "action_low",
    "action_high",
    "action_count",
    "action_start",
    "behaviours",
    "ends",
    "observation_offset",
    "signals",
)
# Names that begin so were probably meant as ours.
_STEMS = {
    "observations": r"(obs|state)",
    "next_observations": r"(next_?(obs|state)|(obs|state)\w*_?next|new_?(obs|state))",
    "actions": r"act",
    "rewards": r"rew",
    "costs": r"((total|info|episode)_)?costs?(_|$)",
    "terminals": r"(is_?)?(termin|done)",
    "timeouts": (
        r"(is_?)?(trunc|time_?(out|limit)|last$|interrupt)|end_of_episode|episode_ends?|max_steps"
    ),
    "accidents": r"(is_?)?accident",
}
_KEY_STEMS = {
    "horizon": r"(horizon|max_(episode_)?(steps|length)|time_?limit|episode_length)",
    "env_id": r"env(ironment)?(_?(id|name))?$",
    "action_count": r"(n|num|number_of)_actions$",
}
_SHOWN = 6  # names in one sentence


class Recognised(NamedTuple):
    """``names``: {ours: the file's} of what is read; ``remarks``: a sentence for what is not so."""

    names: dict[str, str]
    remarks: list[str]


def recognise(present: Mapping[str, int | None], how: str = "Rename it") -> Recognised:
    """Choose the arrays to be read from all that a file holds: {name: its rows, None if unknown}.

    Ours come first, then synonyms of what is missing, each with a remark. Signals are those of a
    file that has costs, too: in another the cost itself may be meant.

    Raises DataError where an array that is missing may be there under a near name; ``how`` says
    what to do about it. Arrays of the log's length that are not read are named in a remark.
    """
    known = (*REQUIRED, *OPTIONAL, "dones")
    names = {key: key for key in known if key in present}
    remarks = []
    synonyms = dict(SYNONYMS)
    if "costs" in present or "cost" in present:
        names |= {key: key for key in map(signal_column, signals_in(present))}
        synonyms |= {key: signal_column(name) for key in present if (name := signal_of(key))}
    for theirs, ours in synonyms.items():
        if theirs in present and ours not in names:
            names[ours] = theirs
            remarks.append(f'"{theirs}" is read as "{ours}".')
    unused = [name for name in present if name not in names.values()]
    for key in _missing_arrays(names):
        near = near_name(key, unused)
        if near is not None:
            raise DataError(
                f'The dataset has no array "{key}", but one called "{near}", which is not read. '
                f'{how} to "{key}" if that is what it holds, else to a name unlike it.'
            )
    rows = present[names["observations"]] if "observations" in names else None
    idle = [name for name in unused if present[name] == rows or present[name] is None]
    if idle:
        more = f" and {len(idle) - _SHOWN} more" if len(idle) > _SHOWN else ""
        listed = ", ".join(f'"{name}"' for name in idle[:_SHOWN])
        remarks.append(f"of the dataset's arrays these are not used: {listed}{more}.")
    return Recognised(names, remarks)


def near_name(key: str, names: Iterable[str]) -> str | None:
    """The name of which ``key`` was probably meant, by its beginning, then by its spelling."""
    plain = {name: _normal_form(name) for name in names}
    stem = re.compile((_STEMS | _KEY_STEMS).get(key, re.escape(key)))
    for name, text in plain.items():
        if stem.match(text):
            return name
    for name, text in plain.items():
        if difflib.SequenceMatcher(None, key, text).ratio() >= 0.85:
            return name
    return None


def _missing_arrays(names: Mapping[str, str]) -> list[str]:
    """What is not there and would be filled in or refused: of the ends, what dones does not say."""
    wanted = [key for key in (*REQUIRED, "accidents") if key not in names]
    if "dones" in names:
        return [key for key in wanted if key != "terminals"]
    return wanted


def _normal_form(name: str) -> str:
    """The last part of a path, in small letters, words joined by _."""
    last = name.strip().rpartition("/")[2].rpartition(".")[2]
    return re.sub(r"[\W_]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", last)).strip("_").lower()
