"""Corruptions that cannot be told from a log, each with the reason: the shorter the better."""

from __future__ import annotations

from typing import NamedTuple


class Untellable(NamedTuple):
    """Corruptions that no reader could know of from the file and the settings, and why.

    In these logs and formats; () are all. ``beside``: only together with this other one.
    """

    names: tuple[str, ...]
    logs: tuple[str, ...]
    forms: tuple[str, ...]
    why: str
    beside: str = ""


LINKLESS = ("bare", "d4rl", "table", "minari", "episodes")  # hold no next observation of their own
UNTELLABLE = (
    Untellable(
        ("every tenth row lost", "every second row lost"),
        ("mortal",),
        (),
        "a world in which all is noise goes on from any of its rows",
    ),
    Untellable(
        ("two environments interleaved", "four environments interleaved"),
        ("mortal",),
        LINKLESS,
        "a world in which all is noise goes on from any row to any other",
    ),
    Untellable(
        ("episodes reversed",),
        (),
        LINKLESS,
        "without next observations it may be the log of a world that runs the other way",
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
        ("first rows lost",),
        (),
        ("omnisafe",),
        "with `done` alone the kind of an end is told by the number of steps before it",
    ),
    Untellable(
        ("rows lost in the middle",),
        (),
        LINKLESS,
        "one step across the lost rows may look like any other",
    ),
    Untellable(
        ("half of the terminals missing", "every second row lost", "last rows of episodes lost"),
        ("mortal",),
        LINKLESS,
        "a walk of six steps from anywhere goes on as a walk with portals would",
    ),
    Untellable(
        ("next observations two rows on",),
        (),
        ("minari", "episodes"),
        "the observation after the last step of an episode is the only one that is stored",
    ),
    Untellable(
        tuple(
            f"horizon x {factor} in the {where}"
            for factor in ("0.5", "5")
            for where in ("load", "spec", "file alone")
        ),
        ("stops", "mortal"),
        (),
        "no episode was ever cut by the time limit, so the log knows of none",
    ),
    Untellable(
        ("rows shuffled", "two environments interleaved"),
        (),
        (),
        "one-step episodes in any order are the log of a bandit",
        beside="terminals on every row",
    ),
    Untellable(
        ("rows shuffled", "two environments interleaved", "rows reversed"),
        (),
        (),
        "nearly all are one-step episodes in any order, as of a bandit",
        beside="terminals inverted",
    ),
    Untellable(
        ("old done under terminals", "terminals and timeouts swapped"),
        (),
        ("minari", "episodes", *LINKLESS),
        "a task may always take the same steps, fewer than the horizon, and nothing shows the gaps",
        beside="every tenth row lost",
    ),
    Untellable(
        ("half of the terminals missing",),
        ("mortal",),
        (),
        "next observations of the next start hide the ends, and a walk of six steps goes on",
        beside="last next observation of the reset",
    ),
    Untellable(
        tuple(f"horizon x 0.5 in the {where}" for where in ("load", "spec", "file alone")),
        ("gears",),
        LINKLESS,
        "of 35 ends that the horizon makes twelve are none, which chance may look like",
        beside="timeouts missing",
    ),
    Untellable(
        ("timeouts a row late",),
        (),
        LINKLESS,
        "from its end the log has its flags where they belong, and a walk is a walk either way",
        beside="rows reversed",
    ),
    Untellable(
        ("last next observation of the reset",),
        (),
        (),
        "an environment may do nothing on the first step of an episode: the load says that",
        beside="autoreset rows",
    ),
)


def untellable(names: tuple[str, ...], target: str, form: str) -> bool:
    """Whether one of the corruptions cannot be told there."""
    return any(
        set(each.names) & set(names)
        and (each.beside in names or not each.beside)
        and (target in each.logs or not each.logs)
        and (form in each.forms or not each.forms)
        for each in UNTELLABLE
    )
