"""Corruptions that cannot be told from a log, each with the reason: the shorter the better."""

from __future__ import annotations

from typing import NamedTuple


class Untellable(NamedTuple):
    """Corruptions that no reader could know of from the file and the settings, and why.

    In these logs and formats; () are all.
    """

    names: tuple[str, ...]
    logs: tuple[str, ...]
    forms: tuple[str, ...]
    why: str


LINKLESS = ("bare", "d4rl", "table", "minari", "episodes")  # hold no next observation of their own
UNTELLABLE = (
    Untellable(
        ("rows shuffled",),
        (),
        LINKLESS,
        "without next observations it may be the log of a world that jumps",
    ),
    Untellable(
        ("episodes reversed",),
        (),
        LINKLESS,
        "without next observations it may be the log of a world that runs the other way",
    ),
    Untellable(
        ("terminals and timeouts swapped", "old done under terminals"),
        ("stops",),
        (),
        "episodes of all lengths may have terminated; no horizon says otherwise",
    ),
    Untellable(
        ("terminals and timeouts swapped",),
        ("mortal",),
        (),
        "an operator may have stopped episodes of all lengths",
    ),
    Untellable(
        ("costs a row late",),
        (),
        (),
        "what a step costs may show one step later, and a reset may cost something",
    ),
    Untellable(
        ("costs summed up so far",),
        (),
        (),
        "a damage may grow with each step that does it",
    ),
    Untellable(
        ("the whole log twice",),
        (),
        (),
        "a deterministic world repeats its episodes; that they are no independent ones is another "
        "question",
    ),
)


def untellable(names: tuple[str, ...], target: str, form: str) -> bool:
    """Whether one of the corruptions cannot be told there."""
    return any(
        set(each.names) & set(names)
        and (target in each.logs or not each.logs)
        and (form in each.forms or not each.forms)
        for each in UNTELLABLE
    )
