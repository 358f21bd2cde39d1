"""The corruptions by name, and the words that name each fault."""

from __future__ import annotations

import functools
import re

import numpy as np

from tests.data_formats import corrupted_ends as ends
from tests.data_formats import corruptions as c
from tests.data_formats.corruptions import Corruption

ENDS = r"terminals|timeouts|end is not marked|ends were not marked|ever ends|next.observations"
ENDS += (
    r"|goes on|do(es)? not lead|time limit|order of time|move as far|rows are missing|end neither"
)
ROWS = r"in order|order of|repeat|twice|same|copies|start where|" + ENDS
JUMPS = "the load says that next observations do not lead to the next rows"
MISSING = "what was in rows that are not there is not known: the load says that they are missing"
NAMELESS = "a table cannot name the rule of its verdicts: the load says that they are believed"
READING = "it may be another reading of the sensor"
INFERRED = "a time limit that only a horizon knows: the load says that it has inferred the ends"
THROTTLE = "a throttle that was only ever 0 or 1 is possible"
ELEVEN = "eleven discrete actions are possible"
LIMIT = "an operator may have stopped every episode at the same step"
QUESTION = "the settings may ask another question of the same log"
UNMARKED = "an end that is not marked may be of either kind"
DONES = "a row that is done and timed out may have terminated as well"
DONE = "a termination at the very horizon is possible"


MINARI = {"timeouts": "truncations", "terminals": "terminations", "costs": "cost"}


def names_of(old: str, new: str) -> str:
    """The names that an array should have or has, one of which a sentence says."""
    return "|".join(map(re.escape, (old, new.strip(), MINARI.get(old, old))))


CORRUPTIONS: dict[str, Corruption] = {
    # --- 1: ends of episodes ---
    "terminals held for five rows": Corruption(ends.held("terminals", 4), 1, ENDS),
    "terminals held for two rows": Corruption(ends.held("terminals", 1), 1, ENDS),
    "terminals held into the next episode": Corruption(ends.held("terminals", 0, 3), 1, ENDS),
    "timeouts held for five rows": Corruption(ends.held("timeouts", 4), 1, ENDS),
    "timeouts held into the next episode": Corruption(ends.held("timeouts", 0, 3), 1, ENDS),
    "terminals on every row": Corruption(ends.flag("terminals", np.ones_like), 1, ENDS),
    "timeouts on every row": Corruption(ends.flag("timeouts", np.ones_like), 1, ENDS),
    "terminals a row early": Corruption(ends.flag("terminals", ends.early), 1, ENDS),
    "terminals a row late": Corruption(ends.flag("terminals", ends.late), 1, ENDS),
    "timeouts a row early": Corruption(ends.flag("timeouts", ends.early), 1, ENDS),
    "timeouts a row late": Corruption(ends.flag("timeouts", ends.late), 1, ENDS),
    "half of the terminals missing": Corruption(
        ends.flag("terminals", c.every_second), 1, ENDS, UNMARKED
    ),
    "half of the timeouts missing": Corruption(ends.flag("timeouts", c.every_second), 1, ENDS),
    "terminals all off": Corruption(ends.flag("terminals", np.zeros_like), 1, ENDS, UNMARKED),
    "timeouts all off": Corruption(ends.flag("timeouts", np.zeros_like), 1, ENDS),
    "no end at all": Corruption(ends.no_ends, 1, ENDS, UNMARKED),
    "terminals inverted": Corruption(ends.flag("terminals", np.logical_not), 1, ENDS),
    "timeouts inverted": Corruption(ends.flag("timeouts", np.logical_not), 1, ENDS),
    "terminals and timeouts swapped": Corruption(ends.swapped, 1, ENDS, DONE),
    "both flags at a time limit": Corruption(ends.both_at_time_limit, 1, ENDS, DONE),
    "old done under terminals": Corruption(ends.old_done, 1, ENDS, DONE),
    "success kept on": Corruption(ends.success_kept_on, 1, ENDS),
    "timeouts missing": Corruption(c.dropped("timeouts"), 1, "timeouts|truncations", INFERRED),
    "terminals missing": Corruption(c.dropped("terminals"), 1, "terminals|terminations"),
    "last next observation of the reset": Corruption(ends.next_of_reset, 1, ENDS),
    "next observations of the row itself": Corruption(ends.next_of(0), 1, ROWS, READING),
    "next observations two rows on": Corruption(ends.next_of(2), 1, ROWS, READING),
    "neither timeouts nor horizon": Corruption(
        ends.no_timeouts_no_horizon, 1, "horizon|timeouts|truncations|time limit"
    ),
    "autoreset rows": Corruption(ends.with_reset_rows, 1, ROWS),
    "two environments interleaved": Corruption(ends.interleaved(2), 1, ROWS),
    "four environments interleaved": Corruption(ends.interleaved(4), 1, ROWS),
    "rows shuffled": Corruption(ends.shuffled, 1, ROWS),
    "rows sorted by reward": Corruption(ends.sorted_by_reward, 1, ROWS),
    "rows reversed": Corruption(ends.reversed_rows, 1, ROWS),
    "episodes reversed": Corruption(ends.reversed_episodes, 1, ROWS, JUMPS),
    "first rows lost": Corruption(ends.without(lambda n: slice(7)), 1, ROWS),
    "last rows lost": Corruption(ends.without(lambda n: slice(n - 7, n)), 1, ROWS),
    "rows lost in the middle": Corruption(
        ends.without(lambda n: slice(n // 2, n // 2 + 100)), 1, ROWS, MISSING
    ),
    "every tenth row lost": Corruption(ends.without(lambda n: slice(0, n, 10)), 1, ROWS, MISSING),
    "every second row lost": Corruption(ends.without(lambda n: slice(0, n, 2)), 1, ROWS, MISSING),
    "last rows of episodes lost": Corruption(ends.lost_ends, 1, ROWS),
    "every row twice": Corruption(ends.repeated(ends.twice), 1, ROWS),
    "a block of rows twice": Corruption(
        ends.repeated(ends.block_twice), 1, ROWS, "a world may repeat itself exactly"
    ),
    "the whole log twice": Corruption(ends.repeated(ends.whole_twice), 1, ROWS),
    # --- 2: names, shapes, text ---
    **{
        f'{old} as "{new}"': Corruption(
            c.renamed(old, new),
            2,
            names_of(old, new),
            DONES if new == "dones" else "",
        )
        for old, names in {
            "timeouts": (
                "truncations",
                "truncateds",
                "truncated",
                "timeout",
                "TIMEOUTS",
                " timeouts",
                "time_outs",
                "is_truncated",
            ),
            "terminals": ("terminations", "terminated", "terminal", "is_terminal", "dones"),
            "costs": ("cost", "cost_hazards", "Costs"),
            "rewards": ("reward", "Rewards"),
            "observations": ("obs", "observation", "states"),
            "next_observations": ("next_obs", "next_observation", "Next_Observations"),
            "actions": ("action", "acts"),
        }.items()
        for new in names
    },
    "dones beside terminals": Corruption(c.done_beside_terminals, 2, "dones|truncations", INFERRED),
    "verdicts as accident": Corruption(c.verdicts_as("accident"), 2, '"accident"'),
    "verdicts as is_accident": Corruption(c.verdicts_as("is_accident"), 2, '"is_accident"'),
    "timeouts a row short": Corruption(c.longer("timeouts", -1), 2, "timeouts"),
    "observations a row long": Corruption(c.longer("observations", 1), 2, "observations"),
    "rewards a row short": Corruption(c.longer("rewards", -1), 2, "rewards"),
    "costs a row long": Corruption(c.longer("costs", 1), 2, "costs"),
    "flags as floats": Corruption(
        c.chain(
            *(c.typed(key, lambda x: x.astype(np.float32)) for key in ("terminals", "timeouts"))
        ),
        2,
        "",
        readable=True,
    ),
    "flags as text": Corruption(
        c.chain(*(c.typed(key, lambda x: x.astype(np.str_)) for key in ("terminals", "timeouts"))),
        2,
        "terminals|timeouts|terminations",
    ),
    "flags 0 and 255": Corruption(
        c.chain(*(c.typed(key, lambda x: x * np.uint8(255)) for key in ("terminals", "timeouts"))),
        2,
        "terminals|timeouts",
    ),
    "byte order mark": Corruption(c.written(encoding="utf-8-sig"), 2, "", readable=True),
    "byte order mark before timeouts": Corruption(
        c.written(encoding="utf-8-sig", columns="reversed"), 2, "", readable=True
    ),
    "UTF-16": Corruption(c.written(encoding="utf-16"), 2, "UTF|utf|encod|CSV"),
    "quoted names": Corruption(c.written(quote='"'), 2, "", readable=True),
    "lines end in CR LF": Corruption(c.written(newline="\r\n"), 2, "", readable=True),
    "empty lines between": Corruption(c.written(newline="\n\n"), 2, "", readable=True),
    "columns by name": Corruption(c.written(columns="sorted"), 2, "", readable=True),
    "True and False": Corruption(c.written(true="True", false="False"), 2, "", readable=True),
    "yes and no": Corruption(c.written(true="yes", false="no"), 2, "yes|no|CSV"),
    "spaces after commas": Corruption(c.written(delimiter=", "), 2, "", readable=True),
    "semicolons": Corruption(c.written(delimiter=";"), 2, "semicolon|;|comma|column"),
    "semicolons and decimal commas": Corruption(
        c.written(delimiter=";", decimal=","), 2, "semicolon|;|comma|column"
    ),
    "tabs": Corruption(c.written(delimiter="\t"), 2, "tab|comma|column"),
    "no names of columns": Corruption(c.written(head="none"), 2, "names none|first line|column"),
    "names of columns repeated": Corruption(c.written(head="repeated"), 2, "CSV|column"),
    "a comment before the names": Corruption(
        c.written(head="comment"), 2, "names none|first line|column"
    ),
    # --- 3: metadata ---
    **{
        f"horizon x {factor:g} in the {where}{end}": Corruption(
            c.without_timeouts(c.horizons(factor, where=where))
            if end
            else c.horizons(factor, where=where),
            3,
            f"horizon|truncations|{ENDS}" if end else "horizon|time limit",
            INFERRED if end else LIMIT if factor > 1 else "",
        )
        for factor in (0.5, 5)
        for where in ("file", "load", "spec", "file alone")
        for end in ("", ", no timeouts")
    },
    "horizon in the file alone": Corruption(c.horizon_as(int), 3, "horizon", readable=True),
    "horizon as a float": Corruption(c.horizon_as(float), 3, "horizon", readable=True),
    "horizon as text": Corruption(c.horizon_as(str), 3, "horizon"),
    "horizon that is no whole number": Corruption(c.horizon_as(lambda x: x + 0.5), 3, "horizon"),
    "horizon 0": Corruption(c.horizon_as(lambda x: 0), 3, "horizon"),
    "horizon -1": Corruption(c.horizon_as(lambda x: -1), 3, "horizon"),
    "horizon as true": Corruption(c.horizon_as(lambda x: True), 3, "horizon"),
    "horizon under max_episode_steps": Corruption(
        c.horizon_under("max_episode_steps"), 3, "horizon"
    ),
    "horizon under Horizon": Corruption(c.horizon_under("Horizon"), 3, "horizon"),
    "verdicts of another rule": Corruption(
        c.logged_rule("rules:fast", 0.0), 3, "rules:fast|does not name its rule", NAMELESS
    ),
    "verdicts above another threshold": Corruption(
        c.logged_rule("cost", 0.5), 3, "threshold|does not name its rule", NAMELESS
    ),
    "verdicts read under cost": Corruption(c.read_under("cost"), 3, "rules:far", QUESTION),
    "verdicts read under terminated": Corruption(
        c.read_under("terminated"), 3, "rules:far", QUESTION
    ),
    "verdicts read under another rule": Corruption(
        c.read_under("rules:near"), 3, "rules:far", QUESTION
    ),
    "verdicts of terminations": Corruption(
        c.logged_rule("terminated", 0.0), 3, "terminated|does not name its rule", NAMELESS
    ),
    "bounds of another unit": Corruption(
        c.continuous(c.said(action_low=0.0, action_high=1.0)), 3, "action_low|outside"
    ),
    "bounds exchanged": Corruption(
        c.continuous(c.said(action_low=1.0, action_high=-1.0)), 3, "action_low"
    ),
    "one bound alone": Corruption(c.continuous(c.said(action_low=-1.0)), 3, "action_low"),
    "action_count of continuous actions": Corruption(
        c.continuous(c.said(action_count=3)), 3, "action_count|one-hot|discrete"
    ),
    "action_count too small": Corruption(
        c.discrete(lambda log: c.said(action_count=log.metadata["action_count"] - 1)(log)),
        3,
        "action_count",
    ),
    "action_count as text": Corruption(
        c.discrete(lambda log: c.said(action_count=str(log.metadata["action_count"]))(log)),
        3,
        "action_count",
    ),
    "no_costs beside costs": Corruption(c.said(no_costs=True), 3, "costs"),
    # --- 10: actions ---
    "actions numbered from 1": Corruption(
        c.discrete(c.typed("actions", lambda x: x + 1)), 10, "action"
    ),
    "actions numbered from 1, as said": Corruption(
        c.discrete(c.chain(c.said(action_start=1), c.typed("actions", lambda x: x + 1))),
        10,
        "action",
        readable=True,
    ),
    "actions numbered from 1, no count": Corruption(
        c.discrete(c.chain(c.without_count, c.typed("actions", lambda x: x + 1))),
        10,
        "action",
        "the first action may never have occurred",
    ),
    "actions numbered from -1, no count": Corruption(
        c.discrete(c.chain(c.without_count, c.typed("actions", lambda x: x - 1))), 10, "action"
    ),
    "numbers of actions as floats": Corruption(
        c.discrete(c.typed("actions", lambda x: x.astype(np.float32))), 10, "action"
    ),
    "numbers of actions as float columns": Corruption(
        c.discrete(c.typed("actions", lambda x: x[:, None].astype(np.float32))),
        10,
        "action",
        THROTTLE,
    ),
    "numbers of actions as float columns, no count": Corruption(
        c.discrete(
            c.chain(c.without_count, c.typed("actions", lambda x: x[:, None].astype(np.float32)))
        ),
        10,
        "action",
        THROTTLE,
    ),
    "numbers of actions as bytes": Corruption(
        c.discrete(c.typed("actions", lambda x: x.astype(np.uint8))), 10, "", readable=True
    ),
    "one-hot as integers": Corruption(
        c.discrete(lambda log: c.one_hot(log, int)), 10, "", readable=True
    ),
    "one-hot as integers, no count": Corruption(
        c.discrete(c.chain(lambda log: c.one_hot(log, int), c.without_count)),
        10,
        "action",
        "continuous actions that were only ever 0 or 1 are possible",
    ),
    "one-hot as booleans": Corruption(
        c.discrete(lambda log: c.one_hot(log, bool)), 10, "", readable=True
    ),
    "whole-number actions with bounds": Corruption(
        c.continuous(lambda log: c.steps_of_ten(log, action_low=0, action_high=10)),
        10,
        "action",
        ELEVEN,
        readable=True,
    ),
    "whole-number actions without bounds": Corruption(
        c.continuous(c.steps_of_ten), 10, "action", ELEVEN
    ),
    # --- 0: values ---
    "a reward that is NaN": Corruption(
        c.typed("rewards", lambda x: np.where(np.arange(len(x)) == 5, np.nan, x)), 0, "rewards"
    ),
    "a cost that is infinite": Corruption(
        c.typed("costs", lambda x: np.where(np.arange(len(x)) == 5, np.inf, x)), 0, "costs"
    ),
    "costs a row late": Corruption(ends.costs_late, 0, "costs?"),
    "costs summed up so far": Corruption(ends.costs_so_far, 0, "costs?"),
    "costs negated": Corruption(c.typed("costs", np.negative), 0, "cost"),
}


@functools.cache
def words_of(names: tuple[str, ...]) -> re.Pattern[str]:
    """What a sentence that names one of these faults has."""
    words = "|".join(CORRUPTIONS[name].words for name in names if CORRUPTIONS[name].words)
    return re.compile(words or "(?!)")
