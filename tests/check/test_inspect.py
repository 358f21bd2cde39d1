"""Every figure of the summary by hand, and each warning on a dataset that deserves it alone."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safe_offrl.check.groups import EpisodeGroup, Identification, _more_to_show
from safe_offrl.check.inspect import (
    DatasetSummary,
    _coverage,
    _principal_coverage,
    _state_action_coverage,
    first_accidents,
    format_summary,
    principal_components,
)
from safe_offrl.check.inspect import summarise as summarise_under
from safe_offrl.commands.inspect import inspect_dataset
from safe_offrl.data.dataset import Dataset
from safe_offrl.data_formats.conversion import convert
from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.limits import Limit
from safe_offrl.report.data_chart import write_data_png
from safe_offrl.spec import SafetySpec
from safe_offrl.train.pretrain_config import PretrainConfig

LENGTH = 10


def sound_arrays(episodes: int = 120) -> dict[str, np.ndarray]:
    """Episodes of 10 steps, a third with an accident at the end, varied actions."""
    rng = np.random.default_rng(0)
    n = episodes * LENGTH
    last = np.arange(n) % LENGTH == LENGTH - 1
    accident = last & (np.arange(n) // LENGTH % 3 == 0)
    positions = rng.normal(size=(episodes, LENGTH + 1, 2)).cumsum(axis=1)
    return {
        "observations": positions[:, :-1].reshape(n, 2),
        "next_observations": positions[:, 1:].reshape(n, 2),
        "actions": rng.uniform(-1, 1, (n, 2)),
        "rewards": rng.normal(size=n),
        "costs": accident.astype(np.float32),
        "terminals": accident,
        "timeouts": last & ~accident,
        "episode_behaviours": np.arange(episodes) % 2,
    }


def load(path: Path, arrays: dict[str, np.ndarray], **metadata: Any) -> Dataset:
    base = {"env_id": "Toy-v0", "behaviours": [{"name": "calm"}, {"name": "wild"}]}
    write_dataset(path / "log.hdf5", arrays, base | metadata)
    return load_dataset(path / "log.hdf5", discount=0.9, spec=SafetySpec(), horizon=LENGTH)


def summarise(dataset: Dataset, held_out: float = 1 / 3, **settings: Any) -> DatasetSummary:
    """Of a third of the episodes 10 are 30 in all."""
    return summarise_under(dataset, SafetySpec(**settings), held_out)


def test_figures_by_hand(tmp_path: Path) -> None:
    # Episodes of 1, 2 and 3 steps with returns 1, 5, 15; two accident steps in the last one.
    arrays = {
        "observations": np.array([[0.0], [0], [1], [0], [1], [2]]),
        "next_observations": np.array([[1.0], [1], [2], [1], [2], [3]]),
        "actions": np.array([[-0.5], [0.5], [0.0], [0.25], [0.0], [0.75]]),
        "rewards": np.array([1.0, 2, 3, 4, 5, 6]),
        "costs": np.array([0.0, 0, 0, 1, 1, 0]),
        "terminals": np.array([1, 0, 0, 0, 0, 0]),
        "timeouts": np.array([0, 0, 1, 0, 0, 1]),
        "episode_behaviours": np.array([0, 0, 1]),
    }
    summary = summarise(load(tmp_path, arrays))
    assert summary.env_id == "Toy-v0"
    assert (summary.episodes, summary.transitions, summary.horizon) == (3, 6, LENGTH)
    assert summary.lengths == (1, 1.5, 2, 2.5, 3)
    assert summary.returns == (1, 3, 5, 10, 15)
    assert (summary.accident_episodes, summary.accident_steps) == (1, 2)
    assert (summary.terminated_episodes, summary.truncated_episodes) == (1, 2)
    assert (summary.action_low, summary.action_high) == ((-0.5,), (0.75,))
    # Clopper-Pearson for 1 of 3 at 95 %: 1 - .975^(1/3) at the lower end.
    assert summary.accident_interval[0] == pytest.approx(1 - 0.975 ** (1 / 3))
    assert summary.accident_interval[1] == pytest.approx(0.9057, abs=1e-4)
    # calm: episodes of return 1 and 5 without cost; wild: return 15, cost 2.
    assert summary.groups[0] == ("calm", 2, 3.0, 0.0, 0.0, 0)
    assert summary.groups[1][:4] == ("wild", 1, 15.0, 2.0)
    assert summary.costs == (0, 0, 0, 1, 2)
    # The third episode's first accident: its first step of a horizon of 10, the first tenth.
    assert summary.accident_times == (1, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    assert first_accidents(load(tmp_path, arrays)).tolist() == [0.0]
    text = format_summary(summary)
    assert "1 episodes = 33.3%" in text
    assert "1 terminated, 2 truncated" in text
    assert "calm" in text
    assert "warning: only 6 transitions" in text
    assert json.loads(json.dumps(summary.as_dict()))["returns"] == [1, 3, 5, 10, 15]


def test_signals_by_hand(tmp_path: Path) -> None:
    arrays = sound_arrays(3)
    arrays["costs_hazards"] = np.zeros(30)
    arrays["costs_hazards"][[0, 1, 25]] = 2.0, 1.5, 1.0  # 3.5, 0 and 1 in an episode
    arrays["costs_vases"] = np.zeros(30)
    del arrays["episode_behaviours"]
    write_dataset(tmp_path / "log.hdf5", arrays, {})
    options: dict[str, Any] = {"discount": 0.9, "spec": SafetySpec(), "horizon": LENGTH}
    summary = summarise(load_dataset(tmp_path / "log.hdf5", every_signal=True, **options))
    assert summary.signals == (
        ("hazards", 1.5, 0.0, 3.5, 0.1),
        ("vases", 0.0, 0.0, 0.0, 0.0),
    )
    said = "signal        hazards: 1.5 an episode (0 to 3.5), above 0 in 10.0% of the steps\n"
    assert said + "signal        vases: 0 an episode (0 to 0), above 0 in 0.0% of the" in (
        format_summary(summary)
    )
    assert json.loads(json.dumps(summary.as_dict()))["signals"][0]["most"] == 3.5
    plain = summarise(load_dataset(tmp_path / "log.hdf5", **options))
    assert plain.signals == ()
    assert "\nsignal " not in format_summary(plain)


def test_the_command_shows_every_signal_or_those_that_are_named(tmp_path: Path) -> None:
    arrays = sound_arrays() | {"costs_hazards": np.ones(1200), "costs_vases": np.ones(1200)}
    del arrays["episode_behaviours"]
    write_dataset(tmp_path / "log.hdf5", arrays, {"horizon": LENGTH})
    convert(tmp_path / "log.hdf5", tmp_path / "log.mmap")
    for path, overrides, names in (
        ("log.hdf5", (), ["hazards", "vases"]),
        ("log.mmap", (), ["hazards", "vases"]),
        ("log.hdf5", ("safety.signals.vases=anything",), ["vases"]),
    ):
        said: list[str] = []
        found = inspect_dataset(tmp_path / path, overrides=overrides, say=said.append)
        assert [signal["name"] for signal in found["signals"]] == names
        lines = [line for line in said[0].splitlines() if line.startswith("signal ")]
        assert [line.split()[1] for line in lines] == [f"{name}:" for name in names]


def test_coverage_by_hand() -> None:
    edges = np.ones(2)
    # 4000 points on the diagonal visit 20 of the 20 x 20 bins.
    diagonal = np.repeat(np.linspace(-1, 1, 4000)[:, None], 2, axis=1)
    assert _coverage(diagonal, -edges, edges) == pytest.approx(20 / 400)
    # The pairs (0, 1), (0, 2), (1, 2) of three axes, the last of which never moves: 1 column each.
    three = np.column_stack([diagonal, np.zeros(4000)])
    assert _coverage(three, -np.ones(3), np.ones(3)) == pytest.approx(20 / 400)
    # 91 points allow 3 x 3 bins: the diagonal visits 3 of them.
    assert _coverage(diagonal[::44], -edges, edges) == pytest.approx(3 / 9)
    # One axis, the upper half only.
    half = np.linspace(0, 1, 1000)[:, None]
    assert _coverage(half, -np.ones(1), np.ones(1)) == pytest.approx(0.5)


def test_observation_coverage() -> None:
    rng = np.random.default_rng(0)
    square = rng.uniform(-1, 1, (20_000, 2))
    # Whatever the units, and with a constant and a redundant column.
    scaled = np.column_stack([1000 * square[:, 0], square[:, 1], np.full(20_000, 3.0)])

    def coverage(observations: np.ndarray) -> float:
        return _principal_coverage(principal_components(observations))

    assert coverage(scaled) > 0.4  # a square seen at 45 degrees fills half its range
    # One direction only: its own bins, not those of the rounding errors across it.
    assert coverage(np.column_stack([square[:, 0]] * 2)) == 1.0
    assert coverage(square[:, :1]) == 1.0
    assert coverage(np.ones((50, 3))) == 0.0


def test_state_action_coverage_by_hand() -> None:
    # Two places: at the first all four directions were tried, at the second, as often, only one.
    points = np.repeat([[0.0], [1.0]], 4, axis=0)
    directions = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1], *[[1, 1]] * 4], dtype=float) / 2
    assert _state_action_coverage(points, directions) == pytest.approx((1 + 1 / 4) / 2)
    # One-hot: three actions, one of them never tried.
    one_hot = np.eye(3)[[0, 1, 0, 1, 0, 0, 0, 0]]
    assert _state_action_coverage(points, one_hot) == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_first_accidents_are_counted_once_and_from_the_start_of_the_episode(tmp_path: Path) -> None:
    arrays = sound_arrays(3)
    arrays["costs"][:] = 0
    arrays["costs"][[3, 7, 25]] = 1  # steps 3 and 7 of the first episode, 5 of the third
    assert first_accidents(load(tmp_path, arrays)).tolist() == pytest.approx([0.3, 0.5])


def identified(tmp_path: Path, wild: bool, **settings: Any) -> Identification:
    """240 episodes, every other one by the calm behaviour, which has an accident if not wild."""
    arrays = sound_arrays(240)
    arrays["costs"][:] = 0
    arrays["costs"][9::20] = 0 if wild else 1
    arrays["costs"][19::20] = 1
    return summarise(load(tmp_path, arrays), **settings).identification


def test_a_behaviour_within_epsilon_identifies_it_and_nobody_does_not(tmp_path: Path) -> None:
    # 0 of 120 at 97.5 % (two groups): below 1 - .025^(1/120) = 3.0 %.
    verdict = identified(tmp_path, wild=True, epsilon=0.05)
    assert verdict.identified
    assert "'calm' is below 3.0%" in verdict.sentence
    assert not identified(tmp_path, wild=True, epsilon=0.02).identified
    verdict = identified(tmp_path, wild=False, epsilon=0.05)
    assert not verdict.identified
    assert "at least 72 without an accident" in verdict.sentence  # log .025 / log .95 = 71.9


def test_too_few_transitions_say_how_many_are_missing(tmp_path: Path) -> None:
    few = summarise(load(tmp_path, sound_arrays(60)))
    assert "only 600 transitions" in few.warnings[1]
    assert few.warnings[1].endswith("too few to learn. Log 400 more at least.")


def test_a_cost_that_is_nearly_shown_says_how_many_episodes_would() -> None:
    """m + z s / sqrt(n) < limit: of 25 episodes 4 +- 1, s is 5, and below 5 are (z 5 / 1)^2."""
    group = EpisodeGroup("calm", 25, 0.0, 4.0, 1.0, 0)
    limit = Limit("cost", 0.05, 100.0)
    assert limit.value == 5.0
    assert _more_to_show(group, limit, 0.95) == 68 - 25  # (1.645 * 5)^2 = 67.6
    assert _more_to_show(group._replace(mean_cost=5.0), limit, 0.95) == 0
    assert (
        _more_to_show(group._replace(mean_cost=0.0, cost_error=0.1, episodes=4), limit, 0.95) == 6
    )
    assert _more_to_show(group._replace(cost_error=math.nan, episodes=1), limit, 0.95) == 0


def test_and_the_sentence_says_it(tmp_path: Path) -> None:
    arrays = sound_arrays(24)
    arrays["costs"][:] = 0
    arrays["costs"][[0, 20, 40]] = 1  # by calm: 3 of 12 episodes cost 1
    arrays["costs"][19::20] = 1  # by wild: each
    summary = summarise(load(tmp_path, arrays), constraint="cost", cost_limit=0.5)
    # .25 +- .131, s = .452; of two groups z is 1.96: (1.96 * .452 / .25)^2 = 12.6 of 12.
    assert summary.identification.sentence.endswith(
        "Log more episodes of a more careful behaviour, or about 1 more of 'calm' if they cost the "
        "same."
    )


def test_a_cost_limit_is_identified_by_a_mean_with_its_error(tmp_path: Path) -> None:
    limit = {"constraint": "cost", "cost_limit": 0.5}
    assert identified(tmp_path, wild=True, **limit).identified  # calm: 0 +- 0
    verdict = identified(tmp_path, wild=False, **limit)  # 1 +- 0 each
    assert not verdict.identified
    assert "without an accident" not in verdict.sentence


def test_a_sound_dataset_has_no_warning(tmp_path: Path) -> None:
    assert summarise(load(tmp_path, sound_arrays())).warnings == ()


def _no_accident(arrays: dict[str, np.ndarray]) -> None:
    arrays["costs"][:] = 0


def _few_accidents(arrays: dict[str, np.ndarray]) -> None:
    arrays["costs"][29 * LENGTH :] = 0  # episodes 0, 3, ..., 27 keep theirs: 10


def _all_accidents(arrays: dict[str, np.ndarray]) -> None:
    arrays["costs"][:] = 1


def _few_safe(arrays: dict[str, np.ndarray]) -> None:
    arrays["costs"][: 110 * LENGTH] = 1  # of episodes 110..119 only 111, 114, 117 have one: 7 safe


def _narrow_action(arrays: dict[str, np.ndarray]) -> None:
    arrays["actions"][:, 1] *= 0.09


def _poor_actions(arrays: dict[str, np.ndarray]) -> None:
    arrays["actions"][:] = np.where(np.arange(1200) % 2, 1.0, -1.0)[:, None]


def _one_behaviour(arrays: dict[str, np.ndarray]) -> None:
    arrays["episode_behaviours"][:] = 1


def _same_reward(arrays: dict[str, np.ndarray]) -> None:
    arrays["rewards"][:] = -1


def _negative_cost(arrays: dict[str, np.ndarray]) -> None:
    arrays["costs"][[1, 2]] = -0.5


def _shuffled(arrays: dict[str, np.ndarray]) -> None:
    arrays["next_observations"][[5, 19]] += 100  # 19 is an episode's last step: not comparable


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_no_accident, "Log about 30 episodes with one."),
        (
            _few_accidents,
            "only 10 accident episodes, too few to calibrate the safety critic (about "
            "30, so that 10 are held out). Log 20 more.",
        ),
        (_all_accidents, "cannot be learnt. Log about 30 episodes without one."),
        (
            _few_safe,
            "only 7 episodes without an accident, too few to calibrate the safety critic (about "
            "30, so that 10 are held out). Log 23 more.",
        ),
        (_narrow_action, "action 1 stays within [-0.09, +0.09]"),
        (_poor_actions, "the actions cover 2%"),
        (_one_behaviour, "a single behaviour"),
        (_same_reward, "every episode has the same return"),
        (_negative_cost, "2 steps have a cost below 0"),
        (_shuffled, "next_observations of 1 rows (the first is row 5) are far"),
    ],
)
def test_each_warning(change: Any, words: str, tmp_path: Path) -> None:
    arrays = sound_arrays()
    change(arrays)
    summary = summarise(load(tmp_path, arrays))
    assert len(summary.warnings) == 1
    assert words in summary.warnings[0]
    assert f"warning: {summary.warnings[0]}" in format_summary(summary)


def test_warning_of_the_file_itself(tmp_path: Path) -> None:
    dataset = load(tmp_path, sound_arrays(), warning="the mixture missed its target.")
    assert summarise(dataset).warnings == ("the mixture missed its target.",)


def test_groups_of_a_subset_and_of_a_foreign_file(tmp_path: Path) -> None:
    dataset = load(tmp_path, sound_arrays())
    subset = summarise(dataset.subset(np.arange(110)))
    assert [(g.name, g.episodes) for g in subset.groups] == [("calm", 55), ("wild", 55)]
    arrays = sound_arrays()
    del arrays["episode_behaviours"]
    foreign = summarise(load(tmp_path, arrays))
    assert [g.episodes for g in foreign.groups] == [30, 30, 30, 30]
    returns = [g.mean_return for g in foreign.groups]
    assert returns == sorted(returns)
    assert "highest returns" in format_summary(foreign)
    # Quarters are chosen by outcome: only the log as a whole may count as a behaviour.
    assert "'the whole log'" in foreign.identification.sentence


def test_as_many_accidents_are_asked_for_as_the_shield_needs(tmp_path: Path) -> None:
    """Ten among the held-out episodes: of 15 % that are held out, 67 in all; there are 40."""
    dataset = load(tmp_path, sound_arrays())
    (warning,) = summarise(dataset, PretrainConfig().held_out).warnings
    assert warning == (
        "only 40 accident episodes, too few to calibrate the safety critic (about 67, so that 10 "
        "are held out). Log 27 more."
    )
    assert summarise(dataset, 0.25).warnings == ()


def test_too_few_cheap_episodes_are_a_warning(tmp_path: Path) -> None:
    cheap = summarise(load(tmp_path, sound_arrays()), constraint="cost", cost_limit=0.5)
    assert cheap.within_limit == pytest.approx(2 / 3)
    assert cheap.warnings == ()
    dear = sound_arrays()
    dear["costs"][: 100 * LENGTH] = 1
    summary = summarise(load(tmp_path, dear), constraint="cost", cost_limit=0.5)
    assert "only 14 episodes are below the limit of 0.5" in summary.warnings[0]
    assert summary.warnings[0].endswith("(about 30, so that 10 are held out). Log 16 more.")


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    dataset = load(tmp_path, sound_arrays())
    cases: dict[str, dict[str, Any]] = {"a": {}, "b": {"constraint": "cost", "cost_limit": 0.5}}
    for name, settings in cases.items():
        path = tmp_path / f"{name}.png"
        write_data_png(dataset, summarise(dataset, **settings), path)
        assert path.read_bytes()[:4] == b"\x89PNG"
        assert path.stat().st_size > 20_000
