"""Do seeds matter? What is counted is episodes that differ, in situations that differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from scipy import stats

from safe_offrl import commands
from safe_offrl.certify.recheck import recheck
from safe_offrl.check.situations import SEEDS, Situations, find_situations
from safe_offrl.deploy.episodes import distinct
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.make import make_env
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.policies.acting import NumpyActor
from safe_offrl.record.final_policy import final_policy
from safe_offrl.record.ledger import LedgerWriter
from safe_offrl.record.run import RunDir
from safe_offrl.spec import EnvironmentConfig, SafetySpec
from safe_offrl.types import Episode
from tests.test_faults import ENV, OFFLINE, dataset_of
from tests.test_resume import silent

MODULE = "tests.situation_environments"


def made(name: str) -> AccidentEnv:
    return make_env(f"{MODULE}:{name}-v0", SafetySpec())


class Counting(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Counts steps."""

    steps = 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        return self.env.step(action)


# --- situations -------------------------------------------------------------------------------


def test_situations_by_hand() -> None:
    # Of 13 seeds 0..12 the numbers modulo 5 are 0, 1, 2 three times and 3, 4 twice.
    with made("FiveScenarios") as env:
        found = find_situations(env, range(13))
    assert found == Situations(13, (3, 3, 3, 2, 2))
    assert (found.different, found.one, found.few) == (5, False, True)
    assert str(found) == "13 seeds play only 5 different episodes, given the same actions"
    with made("LateScenarios") as env:  # which are told apart by the 13th step alone
        assert find_situations(env, range(13)) == found
    with made("FiveScenarios") as env:  # one of them by a single seed: there may be more
        assert not find_situations(env, [0, 5, 1, 6, 2]).few


@pytest.mark.parametrize("name", ["OneScenario", "Deterministic"])
def test_every_seed_plays_the_same(name: str) -> None:
    with made(name) as env:
        found = find_situations(env)
    assert found == Situations(SEEDS, (SEEDS,))
    assert found.one
    assert found.few
    assert "every one of 20 seeds plays the same episode" in str(found)


@pytest.mark.parametrize("name", ["SameStart", "Logged"])
def test_every_seed_plays_another_and_that_takes_no_long_look(name: str) -> None:
    env = AccidentEnv(Counting(made(name).env), SafetySpec())
    found = find_situations(env)
    assert found == Situations(SEEDS, (1,) * SEEDS)
    assert not found.few
    # Different starts are enough; after equal ones a single step is.
    assert env.env.steps == (0 if name == "Logged" else SEEDS)  # type: ignore[attr-defined]


@pytest.mark.parametrize("env_id", ["HazardGrid-v0", "HazardLine-v0", "PointHazard-v0"])
def test_chance_that_is_coarse_is_not_taken_for_a_fault(env_id: str) -> None:
    with make_env(env_id, SafetySpec()) as env:
        for first in range(0, 400, SEEDS):
            assert not find_situations(env, range(first, first + SEEDS)).few


def test_four_situations_are_four() -> None:
    with made("Coins") as env:
        found = find_situations(env, range(200))
    assert found.different == 4
    assert found.few


def test_seeds_under_which_it_fails_are_left_out() -> None:
    with made("FailsHalf") as env:
        # Of 0..11 six are odd, and of those 3 and 9 fail in the first step.
        found = find_situations(env, range(12))
        assert found == Situations(4, (1, 1, 1, 1))
        nothing = find_situations(env, [0, 2, 4])
    assert (nothing.seeds, nothing.one, nothing.few) == (0, False, False)


def test_what_looks_like_few_is_as_rare_as_is_said() -> None:
    """20 draws of ten equally likely situations, none met once: 3 %; of twenty, 0.01 %."""
    rng = np.random.default_rng(0)
    for kinds, low, high in ((10, 0.02, 0.04), (20, 0.0, 0.0005)):
        few = 0
        for _ in range(5000):
            sizes = np.bincount(rng.integers(kinds, size=SEEDS))
            few += Situations(SEEDS, tuple(sizes[sizes > 0])).few
        assert low <= few / 5000 <= high


# --- distinct episodes ------------------------------------------------------------------------


def episode(index: int, content: str = "", **changed: Any) -> Episode:
    plain = Episode(index, index, 9, 9 * index + 9, 0.0, 0.0, False, 0, 0, "certify", 0)
    return plain._replace(content=content, **changed)


def test_distinct_episodes_by_hand() -> None:
    contents = ["a", "b", "a", "", "c", "", "b"]
    found = distinct(episode(k, text) for k, text in enumerate(contents))
    assert [e.index for e in found] == [0, 1, 3, 4, 5]  # of unknown ends each is its own


# --- certify and evaluate -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pretrain run "offline"."""
    path = tmp_path_factory.mktemp("situations")
    config = commands.pretrain_config(env=ENV, dataset=str(dataset_of(path)), overrides=OFFLINE)
    plan = commands.plan_pretrain(config, say=silent)
    commands.pretrain_run(plan, name="offline", runs=path, say=silent)
    return path


@pytest.fixture
def playing(offline: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the run play in this environment; with ``still`` its policy always does the same."""

    def play(name: str, *, still: bool = False) -> Path:
        def make(_id: str, spec: SafetySpec, **_: Any) -> AccidentEnv:
            return make_env(f"{MODULE}:{name}-v0", spec)

        monkeypatch.setattr("safe_offrl.record.final_policy.make_env", make)
        if still:
            act = lambda self, observation, count, rng: np.zeros((count, 1), np.float32)  # noqa: E731
            monkeypatch.setattr(NumpyActor, "draw", act)
        return offline

    return play


@pytest.mark.parametrize("name", ["OneScenario", "Deterministic"])
def test_no_number_of_episodes_of_one_situation_is_a_certificate(playing: Any, name: str) -> None:
    runs = playing(name)
    before = sorted((runs / "offline").rglob("*"))
    with pytest.raises(ConfigError, match=r"every one of 20 seeds plays the same.*np_random"):
        commands.certify_run("offline", epsilon=0.5, runs=runs, say=silent)
    assert sorted((runs / "offline").rglob("*")) == before  # no attempt was used up


def certify(runs: Path, said: list[str], **claim: Any) -> dict[str, Any]:
    return commands.certify_run("offline", **claim, runs=runs, say=said.append)


def test_few_situations_are_named_in_the_certificate(playing: Any) -> None:
    said: list[str] = []
    runs = playing("FiveScenarios")
    found = certify(runs, said, epsilon=0.9, episodes=30)
    assert found["situations"] == {"seeds": 20, "different": 5}
    assert found["distinct_episodes"] == 30  # by the policy's own chance
    words = "20 seeds play only 5 different episodes"
    assert any(f"other situations: {words}" in text for text in found["does_not_cover"])
    assert f"warning     {words}" in said[0]
    attempt = max((runs / "offline" / "certificates").iterdir())
    assert "30 different episodes; 20 seeds play 5" in (attempt / "certificate.html").read_text()
    assert all(c.passed for c in recheck(found, (attempt / "episodes.jsonl").read_bytes(), "it"))


def test_repetitions_of_a_few_episodes_are_no_certificate(playing: Any) -> None:
    """A policy that always does the same in five scenarios: five episodes, whatever is played."""
    runs = playing("FiveScenarios", still=True)
    said: list[str] = []
    for _ in range(2):  # the second call finds the same episodes
        with pytest.raises(RunError, match=r"40 episodes were played and only 5 of them differ"):
            certify(runs, said, epsilon=0.5, episodes=40)
    attempt = max((runs / "offline" / "certificates").iterdir())
    assert not (attempt / "certificate.json").exists()
    assert len(LedgerWriter(attempt / "episodes.jsonl").episodes) == 40


def test_a_certificate_counts_the_episodes_that_differ(playing: Any) -> None:
    runs = playing("SameStart", still=True)  # its noise makes each another
    found = certify(runs, [], epsilon=0.9, episodes=20)
    assert (found["situations"], found["distinct_episodes"]) == ({"seeds": 20, "different": 20}, 20)
    record = max((runs / "offline" / "certificates").iterdir()) / "episodes.jsonl"
    lines = [json.loads(line) for line in record.read_bytes().splitlines()]
    assert len({line["content"] for line in lines}) == 20
    changed = recheck(found | {"distinct_episodes": 19}, record.read_bytes(), "it")
    assert {c.name for c in changed if not c.passed} == {"content", "counts"}
    # A certificate of an earlier version does not say.
    earlier = {k: v for k, v in found.items() if k not in ("distinct_episodes", "situations")}
    again = recheck(earlier, record.read_bytes(), "it")
    assert {c.name for c in again if not c.passed} == {"content"}


def test_coarse_chance_may_repeat_itself(playing: Any) -> None:
    """Four fair situations: drawn independently, so counted as drawn; what is said is how many."""
    runs = playing("Coins")
    found = certify(runs, [], epsilon=0.9, episodes=30)
    assert found["verdict"] == "certified"
    assert found["distinct_episodes"] == 30  # actions differ


@pytest.mark.parametrize(
    ("name", "still", "situations", "different"),
    [
        ("SameStart", False, 20, 30),
        ("FiveScenarios", False, 5, 30),
        ("FiveScenarios", True, 5, 5),
        ("Deterministic", True, 1, 1),
        ("Deterministic", False, 1, 30),
    ],
)
def test_an_evaluation_counts_what_differs(
    playing: Any, name: str, still: bool, situations: int, different: int
) -> None:
    said: list[str] = []
    runs = playing(name, still=still)
    result = commands.evaluate_run("offline", episodes=30, runs=runs, say=said.append)
    assert result["situations"] == {"seeds": 20, "different": situations}
    assert result["distinct_episodes"] == different
    assert result == RunDir(runs / "offline").read_json("evaluation.json")
    warned = [text for text in said if text.startswith("warning")]
    assert len(warned) == (situations < 20)
    if still and name == "Deterministic":  # it stays where it is: one episode without an accident
        assert result["accidents"] == 0
        # Clopper-Pearson of 0 in 1 at 95 %: 1 - 0.025 = 0.975, not 1 - 0.025^(1/30) = 0.116.
        assert result["accident_rate_high"] == pytest.approx(0.975)
    elif name == "SameStart":
        high = stats.beta.ppf(0.975, result["accidents"] + 1, 30 - result["accidents"])
        assert result["accident_rate_high"] == pytest.approx(high)


def test_a_real_environment_is_not_tried(playing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Situations:
        raise AssertionError("played off the record")

    def real(run: RunDir) -> Any:
        return final_policy(run)._replace(environment=EnvironmentConfig(kind="real"))

    runs = playing("Deterministic")
    monkeypatch.setattr("safe_offrl.commands.certify.find_situations", never)
    monkeypatch.setattr("safe_offrl.commands.certify.final_policy", real)
    found = certify(runs, [], epsilon=0.9, episodes=20)
    assert found["situations"] is None
    attempts = runs / "offline" / "certificates"
    page = attempts / str(found["claim"]["attempt"]) / "certificate.html"
    assert "no seeds were tried" in page.read_text()
