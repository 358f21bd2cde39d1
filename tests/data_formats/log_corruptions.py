"""Every corruption of a log in every format, and what the loader makes of it.

`python -m tests.data_formats.log_corruptions` prints a table of the single ones, and those that are
not seen.
"""

from __future__ import annotations

import functools
import itertools
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from safe_offrl.data.dataset import Dataset
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.errors import UserError
from tests.data_formats import corruptions as c
from tests.data_formats.clean_logs import CLEAN, Log, Truth, clean, truth_of
from tests.data_formats.corruption_table import CORRUPTIONS, words_of
from tests.data_formats.corruptions import ends_of
from tests.data_formats.log_forms import FORMS, held_alike
from tests.data_formats.untellable import LINKLESS, untellable

# The clean logs that are corrupted; the others of CLEAN are only looked at as they are.
TARGETS = ("ledge", "hazards", "buttons", "levers", "stops", "mortal", "gears", "judged")


ORDER = (1, 3, 10, 0, 2)  # of kinds, as one fault comes after another: names and text last
# What a clean log has to be told of, by format: nothing but what its writers leave out.
EXPECTED = {"bare": "stands in", "d4rl": "stands in", "table": "stands in", "omnisafe": "done"}


# Other forms of a fault that is in pairs already; they are tried alone.
ONLY_ALONE = re.compile(
    r"for two rows|timeouts (held for|on every|inverted)|four env|sorted|second row|first rows"
    r"|two rows on|(rewards|observations|actions) as"
    r"|as \"(?!truncations|terminations|cost\"|next_obs\"|accident)|is_accident"
    r"|(rewards|costs) a row|255|mark before|UTF|CR LF|empty|by name|yes|decimal|tabs|names of"
    r"|comment|horizon (as t|that|0|-1|under H|x .*spec|x 5)|another threshold|of terminations"
    r"|read under (term|another)|exchanged|one bound|count as text|from -1|float columns$|bytes"
    r"|booleans|infinite"
)


class Outcome(NamedTuple):
    """What a load did: "true", "refused", "remarked", "untellable" or one of :data:`WRONG`."""

    what: str
    text: str


WRONG = ("silent", "unnamed", "crashed", "not read")


def load(path: Path, log: Log) -> Dataset:
    return load_dataset(path, discount=0.99, spec=log.spec, horizon=log.horizon)


def remarks_of(dataset: Dataset) -> list[str]:
    """What a load has to say of its file."""
    said = [*getattr(dataset, "remarks", ())]
    return said or [str(dataset.metadata[k]) for k in ("warning",) if k in dataset.metadata]


def deviation(dataset: Dataset, original: Log, log: Log) -> str:
    """The first thing that is not as it was logged; "" if there is none."""
    truth = truth_of(original, log.rows, log.spec)
    ends = dataset.episode_starts[1:] - 1
    truncated = int(dataset.truncated[ends].sum())
    found = Truth(
        episodes=dataset.episodes,
        rows=len(dataset.rows),
        accident_episodes=int(dataset.episode_accidents.sum()),
        terminated=dataset.episodes - truncated,
        truncated=truncated,
        horizon=dataset.horizon,
    )
    for name, right, wrong in zip(Truth._fields, truth, found, strict=True):
        if right != wrong:
            return f"{name} {wrong} instead of {right}"
    return _content(dataset, original, np.unique(log.rows[log.rows >= 0]))


def _content(dataset: Dataset, original: Log, rows: np.ndarray) -> str:
    """The first array whose values are not those of the clean log's ``rows``."""
    batch, arrays = dataset.transitions, original.arrays
    actions = arrays["actions"][rows]
    if (count := original.metadata.get("action_count")) is not None:
        actions = np.eye(count)[actions]
    pairs = {
        "observations": (batch.observations, arrays["observations"][rows]),
        "actions": (batch.actions, actions),
        "rewards": (batch.rewards, arrays["rewards"][rows]),
        "terminated": (batch.terminated, arrays["terminals"][rows]),
    }
    if not dataset.metadata.get("no_costs"):
        pairs["costs"] = (batch.costs, arrays["costs"][rows])
    for name, (found, right) in pairs.items():
        if tuple(found.shape) != right.shape or not np.allclose(found.numpy(), right, atol=1e-5):
            return f"other {name}"
    # The observation before a cut may stand in for the one after it; what follows a termination is
    # never used.
    following, given = arrays["next_observations"][rows], batch.next_observations.numpy()
    right = np.isclose(given, following, atol=1e-5).all(axis=1) | arrays["terminals"][rows]
    stand_in = np.isclose(given, arrays["observations"][rows], atol=1e-5).all(axis=1)
    gap = np.append(np.diff(rows) > 1, True)  # the following row is lost, or there is none
    right |= stand_in & (arrays["timeouts"][rows] | gap)
    return "" if (right | gap).all() else "other next_observations"


def seen_clean(target: str, form: str) -> str | None:
    """What is wrong with the load of a clean log; "" if nothing is, None if it cannot be held.

    It may be said that a row which terminates on the very step of the time limit is taken for
    terminated; and, where no next observation tells otherwise, that a portal may be an end.
    """
    original = clean(target)
    held = held_clean(target, form)
    if held is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            dataset = load(FORMS[form].write(held, Path(folder)), held)
        except UserError as error:
            return f"refused: {error}"
        portal = "move as far" if target == "portals" and form in LINKLESS else "(?!)"
        # A lap always takes twelve steps, and a done does not say whether it was driven to its end.
        lap = "belongs into timeouts" if (target, form) == ("laps", "omnisafe") else "(?!)"
        expected = re.compile(f"marked both|{portal}|{lap}|{EXPECTED.get(form, '(?!)')}")
        doubts = [text for text in remarks_of(dataset) if not expected.search(text)]
        return deviation(dataset, original, held) or "; ".join(doubts)


@functools.cache
def held_clean(target: str, form: str) -> Log | None:
    """A clean log as a format holds it."""
    original = clean(target)
    return (
        None if form == "omnisafe" and not ends_by_limit(original) else FORMS[form].hold(original)
    )


def ends_by_limit(log: Log) -> bool:
    """Whether `done` and a horizon say all of it: no other truncation, no termination there."""
    step = np.arange(len(log.rows)) - np.searchsorted(log.episode, log.episode)
    limit = step == int(log.metadata["horizon"]) - 1
    cut = ends_of(log) & ~log.arrays["terminals"]
    return bool((cut == (ends_of(log) & limit)).all())


def held_corrupted(names: tuple[str, ...], target: str, form: str) -> Log | None:
    """A log after these corruptions, as a format holds it; None if fewer of them do the same."""
    pure, log = held_clean(target, form), corrupted(clean(target), names)
    held = log and FORMS[form].hold(log)
    if pure is None or held is None or held_alike(pure, held):
        return None
    fewer = [held_alone(name, target, form) for name in names if len(names) > 1]
    return None if any(each and held_alike(each, held) for each in fewer) else held


@functools.lru_cache(2000)
def held_alone(name: str, target: str, form: str) -> Log | None:
    return held_corrupted((name,), target, form)


@functools.cache
def outcome(names: tuple[str, ...], target: str, form: str) -> Outcome | None:
    """What the load of a corrupted log comes to; None if there is none to be loaded."""
    held = held_corrupted(names, target, form)
    if held is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            dataset = load(FORMS[form].write(held, Path(folder)), held)
        except UserError as error:
            return _of_refusal(str(error), held, names)
        except Exception as error:
            return Outcome("crashed", repr(error))
        return _of_load(dataset, held, names, target, form)


def corrupted(original: Log, names: tuple[str, ...]) -> Log | None:
    """A clean log after these corruptions, one by one; None if one of them cannot be made."""
    try:
        return c.chain(*(CORRUPTIONS[name].change for name in names))(original)
    except KeyError:  # the array that would be changed is gone
        return None


def _of_refusal(sentence: str, held: Log, names: tuple[str, ...]) -> Outcome:
    # What metadata say can be read only where there are any.
    lost = not held.metadata and any(CORRUPTIONS[name].kind in (3, 10) for name in names)
    if all(CORRUPTIONS[name].readable for name in names) and not lost:
        return Outcome("not read", sentence)
    return Outcome("refused" if words_of(names).search(sentence) else "unnamed", sentence)


def _of_load(
    dataset: Dataset, held: Log, names: tuple[str, ...], target: str, form: str
) -> Outcome:
    wrong = deviation(dataset, clean(target), held)
    if not wrong:
        return Outcome("true", "")
    usual = re.compile(EXPECTED.get(form, "(?!)"))
    new = [text for text in remarks_of(dataset) if not usual.search(text)]
    suspects = tuple(n for n in names if len(names) == 1 or not harmless(n, target, form))
    named = [text for text in new if words_of(suspects or names).search(text)]
    # Two faults hide each other. Who mends the one that is named is left with the other alone.
    if len(names) > 1 and named:
        return Outcome("remarked", f"{wrong}: {named[0]}")
    # An end that is marked neither way may be of either kind.
    unmarked = wrong.startswith("terminated") and any("marked neither" in text for text in named)
    if unmarked or (named and all(may_be_remarked(name, form) for name in suspects)):
        return Outcome("remarked", f"{wrong}: {named[0]}")
    what = "untellable" if untellable(names, target, form) else "silent"
    return Outcome(what, f"{wrong}; remarks: {remarks_of(dataset)}")


def may_be_remarked(name: str, form: str) -> bool:
    """Whether a load may count otherwise if it says why.

    Where a file holds no next observations, jumps alone tell of ends and of the order of rows, and
    there are worlds that jump.
    """
    return bool(CORRUPTIONS[name].remark) or (CORRUPTIONS[name].kind == 1 and form in LINKLESS)


def harmless(name: str, target: str, form: str) -> bool:
    """Whether one corruption alone changes nothing that is counted."""
    alone = outcome((name,), target, form)
    return alone is None or alone.what == "true"


def singles() -> Iterator[tuple[tuple[str, ...], str, str]]:
    """(names, log, format) of every corruption alone."""
    for name in CORRUPTIONS:
        yield from (((name,), target, form) for target in TARGETS for form in FORMS)


def pairs() -> Iterator[tuple[tuple[str, ...], str, str]]:
    """(names, log, format) of every two corruptions, in every format, each of another log."""
    paired = [name for name in CORRUPTIONS if not ONLY_ALONE.search(name)]
    paired.sort(key=lambda name: ORDER.index(CORRUPTIONS[name].kind))
    turn = itertools.cycle(TARGETS)
    for names in itertools.combinations(paired, 2):
        # Two of one horizon, or of one numbering, are a third fault and not both.
        if any(all(word in name for name in names) for word in ("horizon", "numbered from 1")):
            continue
        yield from ((names, next(turn), form) for form in FORMS)


def main(arguments: list[str]) -> None:
    """Print what went wrong, and a line for each corruption; of those named in ``arguments`` all.

    "pairs" adds every two of them.
    """
    for target, form in itertools.product(CLEAN, FORMS):
        if doubt := seen_clean(target, form):
            print(f"FALSE ALARM {target}, {form}: {doubt}")
    wanted = [argument for argument in arguments if argument != "pairs"]
    cases = itertools.chain(singles(), pairs()) if "pairs" in arguments else singles()
    total: Counter[str] = Counter()
    for names, group in itertools.groupby(cases, key=lambda case: case[0]):
        if wanted and not any(part in name for part in wanted for name in names):
            continue
        of_names: Counter[str] = Counter()
        for _, target, form in group:
            if found := outcome(names, target, form):
                of_names[found.what] += 1
                if found.what in WRONG or wanted:
                    print(f"    {target}, {form}: {found.what}: {found.text}")
        print(f"{' + '.join(names):<48} {in_words(of_names)}", flush=True)
        total += of_names
    print(in_words(total))


def in_words(counts: Counter[str]) -> str:
    """How many came to what.

    >>> in_words(Counter(["true", "refused", "true"]))
    '2 true, 1 refused'
    """
    return ", ".join(f"{n} {what}" for what, n in counts.most_common())


if __name__ == "__main__":
    main(sys.argv[1:])
