"""Every corruption of a log in every format, and what the loader makes of it.

`python -m tests.log_corruptions` prints a table of the single ones, and those that are not seen.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from safe_offrl.data.dataset import Dataset
from safe_offrl.data.loading import load_dataset
from safe_offrl.errors import UserError
from tests import corruptions as c
from tests.clean_logs import CLEAN, Log, Truth, clean, truth_of
from tests.corruption_table import CORRUPTIONS, UNTELLABLE, words_of
from tests.corruptions import ends_of
from tests.log_forms import FORMS, held_alike

# The clean logs that are corrupted; the others of CLEAN are only looked at as they are.
TARGETS = ("ledge", "hazards", "buttons", "levers", "stops", "mortal", "gears")


class Outcome(NamedTuple):
    """What a load did: "true", "refused", "remarked", or one of :data:`WRONG`; and its words."""

    what: str
    text: str


WRONG = ("silent", "unnamed", "crashed", "not read", "false alarm")


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


def judged(path: Path, original: Log, log: Log, names: tuple[str, ...]) -> Outcome:
    """What the load of a corrupted log comes to; ``names`` are the corruptions."""
    try:
        return _judge_load(load(path, log), original, log, names)
    except UserError as error:
        return _judge_refusal(str(error), names)
    except Exception as error:
        return Outcome("crashed", repr(error))


def _judge_refusal(sentence: str, names: tuple[str, ...]) -> Outcome:
    if all(CORRUPTIONS[name].readable for name in names):
        return Outcome("not read", sentence)
    return Outcome("refused" if words_of(names).search(sentence) else "unnamed", sentence)


def _judge_load(dataset: Dataset, original: Log, log: Log, names: tuple[str, ...]) -> Outcome:
    wrong = deviation(dataset, original, log)
    if not wrong:
        return Outcome("true", "")
    named = [text for text in remarks_of(dataset) if words_of(names).search(text)]
    if named and any(CORRUPTIONS[name].remark for name in names):
        return Outcome("remarked", named[0])
    return Outcome("silent", f"{wrong}; remarks: {remarks_of(dataset)}")


def ends_by_limit(log: Log) -> bool:
    """Whether `done` and a horizon say all of it: no other truncation, no termination there."""
    step = np.arange(len(log.rows)) - np.searchsorted(log.episode, log.episode)
    limit = step == int(log.metadata["horizon"]) - 1
    cut = ends_of(log) & ~log.arrays["terminals"]
    return bool((cut == (ends_of(log) & limit)).all())


def corrupted(original: Log, names: tuple[str, ...]) -> Log | None:
    """A clean log after these corruptions, the text of a file last; None if one cannot be made."""
    return c.chain(*(CORRUPTIONS[name].change for name in names))(original)


# What a clean log has to be told of, by format: nothing but what its writers leave out.
EXPECTED = {
    "bare": r"stands in",
    "d4rl": r"stands in",
    "table": r"stands in",
    "omnisafe": r"done",
}


def seen_clean(target: str, folder: Path) -> dict[str, str]:
    """What is wrong with the load of a clean log, by format; of a right loader {}."""
    original, found = clean(target), {}
    for form, (hold, write) in FORMS.items():
        held = hold(original)
        if held is None or (form == "omnisafe" and not ends_by_limit(original)):
            continue
        with tempfile.TemporaryDirectory(dir=folder) as place:
            try:
                dataset = load(write(held, Path(place)), held)
            except UserError as error:
                found[form] = f"refused: {error}"
                continue
            wrong = deviation(dataset, original, held)
            expected = re.compile(EXPECTED.get(form, "(?!)"))
            doubts = [text for text in remarks_of(dataset) if not expected.search(text)]
        if wrong or doubts:
            found[form] = wrong or f"remark: {doubts[0]}"
    return found


def outcomes(
    names: tuple[str, ...], target: str, folder: Path, forms: Iterable[str] = tuple(FORMS)
) -> Iterator[tuple[str, Outcome]]:
    """(format, outcome) in every format that can hold these corruptions of a clean log."""
    original = clean(target)
    log = corrupted(original, names)
    if log is None:
        return
    for form in forms:
        hold, write = FORMS[form]
        pure, held = hold(original), hold(log)
        if pure is None or held is None or held_alike(pure, held):
            continue
        if form == "omnisafe" and not ends_by_limit(original):
            continue
        if any((name, target, form) in UNTELLABLE for name in names):
            continue
        with tempfile.TemporaryDirectory(dir=folder) as place:
            try:
                path = write(held, Path(place))
            except UserError as error:  # of `convert`, to a memory map
                yield form, _judge_refusal(str(error), names)
                continue
            except Exception as error:
                yield form, Outcome("crashed", repr(error))
                continue
            yield form, judged(path, original, held, names)


def main(arguments: list[str]) -> None:
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for name in CLEAN:
            for form, doubt in seen_clean(name, Path(folder)).items():
                print(f"FALSE ALARM {name}, {form}: {doubt}")
        for name in CORRUPTIONS:
            if arguments and not any(part in name for part in arguments):
                continue
            of_name: Counter[str] = Counter()
            lines = []
            for target in TARGETS:
                for form, outcome in outcomes((name,), target, Path(folder)):
                    of_name[outcome.what] += 1
                    if outcome.what in WRONG or arguments:
                        lines.append(f"    {target}, {form}: {outcome.what}: {outcome.text}")
            print(f"{name:<48} " + ", ".join(f"{n} {what}" for what, n in of_name.items()))
            print(*lines, sep="\n", end="\n" if lines else "")
            counts += of_name
    print(", ".join(f"{n} {what}" for what, n in counts.most_common()))


if __name__ == "__main__":
    main(sys.argv[1:])
