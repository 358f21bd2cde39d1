"""Certificates: bounds by hand, false ones as rare as stated, and nothing smuggled in."""

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import special

from safe_offrl import commands
from safe_offrl.certify.certificate import (
    Claim,
    Finding,
    bounds_in_words,
    episodes_without_accident,
    finished,
    joint_verdict,
    judge,
    sealed,
)
from safe_offrl.certify.page import summary
from safe_offrl.certify.recheck import recheck
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.record.ledger import LedgerWriter
from safe_offrl.record.run import RunDir
from safe_offrl.record.subject import rule_source

TINY = ["alignment_steps=20", "log_every=10", "batch_size=32"]
TINY += ["networks.actor_hidden=[16]", "networks.critic_hidden=[16]", "critic.hidden=[16,16]"]


def claim(**settings: Any) -> Claim:
    plain = {
        "quantity": "accident",
        "limit": 0.1,
        "scale": 1.0,
        "confidence": 0.95,
        "method": "anytime",
        "episodes": 10_000,
        "seed": 0,
    }
    return Claim(**(plain | settings))  # type: ignore[arg-type]


def spent(attempt: int) -> float:
    """Error that an attempt may use of .05."""
    return 0.05 * 6.0 / (math.pi**2 * attempt**2)


# --- the arithmetic ---


def test_all_attempts_together_use_the_error_once() -> None:
    shares = [1.0 - claim(attempt=k).attempt_confidence for k in range(1, 2000)]
    assert shares[0] == pytest.approx(spent(1))
    assert 0.0499 < sum(shares) < 0.05


def test_one_look_by_hand() -> None:
    asked = claim(method="one look", episodes=60)
    # Without accidents the upper bound solves (1 - p)^60 = error.
    upper = 1.0 - spent(1) ** (1.0 / 60.0)
    assert tuple(judge(asked, 0.0, 60)) == ("certified", 0.0, pytest.approx(upper))
    assert episodes_without_accident(asked) == math.ceil(math.log(spent(1)) / math.log(0.9))
    # Nothing is said before the number is reached: that would be a second look.
    assert judge(asked, 0.0, 59) == ("undecided", 0.0, 1.0)
    assert not finished([asked], [30.0], 59)
    lower = pytest.approx(spent(1) ** (1.0 / 60.0))
    assert tuple(judge(asked, 60.0, 60)) == ("refuted", lower, 1.0)
    assert judge(claim(method="one look", episodes=60, limit=upper * 0.99), 0.0, 60)[0] == (
        "undecided"
    )


def test_the_sequence_stops_as_soon_as_the_answer_is_known() -> None:
    asked = claim()
    # Without accidents p is refuted when B(.5, 50 + n) / B(.5, 50) / (1 - p)^n >= 1 / error.
    n = 1
    while True:
        log_ratio = special.betaln(0.5, 50.0 + n) - special.betaln(0.5, 50.0)
        if log_ratio - n * math.log1p(-0.1) >= -math.log(spent(1)):
            break
        n += 1
    assert episodes_without_accident(asked) == n
    assert not finished([asked], [0.0], n - 1)
    assert finished([asked], [0.0], n)
    assert judge(asked, 0.0, n).verdict == "certified"
    assert judge(asked, 40.0, 60).verdict == "refuted"
    assert finished([claim(episodes=5)], [0.0], 5)
    assert judge(claim(episodes=5), 0.0, 5).verdict == "undecided"


def test_several_claims_share_the_error() -> None:
    both = claim(shares=2), claim(quantity="cost", limit=25.0, scale=1000.0, shares=2)
    for one in both:
        assert one.attempt_confidence == pytest.approx(1.0 - spent(1) / 2)
    good, bad, open_ = (Finding(v, 0.0, 1.0) for v in ("certified", "refuted", "undecided"))
    for findings, verdict in (
        ([good, good], "certified"),
        ([good, open_], "undecided"),
        ([open_, open_], "undecided"),
        ([good, bad], "refuted"),
        ([bad, open_], "refuted"),
    ):
        assert joint_verdict(findings) == verdict
    # It goes on until each is known, or one is refuted.
    first = episodes_without_accident(both[0])
    second = episodes_without_accident(both[1])
    assert first < second
    assert not finished(both, [0.0, 0.0], first)
    assert not finished(both, [0.0, 0.0], second - 1)
    assert finished(both, [0.0, 0.0], second)
    assert finished(both, [0.0, 30.0], 60)


def test_of_two_limits_at_most_five_certificates_in_a_hundred_are_false() -> None:
    """A look after every episode, a thousand policies each: at both limits, and well above one."""
    claims = [
        Claim(quantity, limit, scale, 0.95, "anytime", 150, seed=0, shares=2)
        for quantity, limit, scale in (("accident", 0.1, 1.0), ("cost", 15.0, 100.0))
    ]
    rng, runs, n = np.random.default_rng(0), 1000, 150
    found = [
        {(k, m): judge(one, float(k), m).verdict for m in range(1, n + 1) for k in range(m + 1)}
        for one in claims
    ]
    for truth, false, true in (
        ((0.1, 0.15), ("certified", "refuted"), ()),
        ((0.3, 0.01), ("certified",), ("refuted",)),
        ((0.01, 0.01), ("refuted",), ("certified",)),
    ):
        said = {"certified": np.ones((runs, n), bool), "refuted": np.zeros((runs, n), bool)}
        for verdict_of, p in zip(found, truth, strict=True):
            counts = (rng.random((runs, n)) < p).cumsum(1)
            verdicts = np.array(
                [[verdict_of[int(k), m + 1] for m, k in enumerate(row)] for row in counts]
            )
            said["certified"] &= verdicts == "certified"
            said["refuted"] |= verdicts == "refuted"
        for verdict in false:
            assert said[verdict].any(1).mean() <= 0.05
        for verdict in true:
            assert said[verdict].any(1).mean() > 0.5


def test_only_bounds_that_hold_together_are_called_an_interval() -> None:
    """Of one look each bound is one-sided; of the sequence both hold at once, at every look."""
    n, p = 30, 0.5
    lower, upper = np.array(
        [judge(claim(method="one look", episodes=n), k, n)[1:] for k in range(n + 1)]
    ).T
    k = np.arange(n + 1)
    chance = special.comb(n, k) * p**n
    above, below = chance[lower > p].sum(), chance[upper < p].sum()
    assert max(above, below) <= spent(1) < above + below  # as an interval it would miss too often
    looked, missed = claim(episodes=n), np.zeros(n + 1)
    reached = np.ones(1)  # probability of k accidents after so many episodes, never missed so far
    for episodes in range(1, n + 1):
        reached = p * (np.append(reached, 0.0) + np.append(0.0, reached))
        for count in range(episodes + 1):
            low, high = judge(looked, count, episodes)[1:]
            if not low <= p <= high:
                missed[episodes] += reached[count]
                reached[count] = 0.0
    assert 0.0 < missed.sum() <= spent(1)
    found = Finding("certified", 0.01, 0.08)
    assert bounds_in_words(looked, found) == "[0.01, 0.08]"
    assert bounds_in_words(claim(method="one look"), found) == (
        "at least 0.01, at most 0.08 (one-sided bounds, each by itself)"
    )


@pytest.mark.parametrize(
    ("method", "verdict", "words"),
    [
        ("one look", "certified", "it is at most 0.08)"),
        ("one look", "undecided", "it is at most 0.08)"),
        ("one look", "refuted", "it is at least 0.01)"),
        ("anytime", "refuted", "it lies in [0.01, 0.08])"),
    ],
)
def test_the_summary_states_no_more_than_was_shown(method: str, verdict: str, words: str) -> None:
    asked = dataclasses.asdict(claim(method=method, episodes=60))
    bounds = {"verdict": verdict, "lower": 0.01, "upper": 0.08}
    said = summary({"claim": asked, "total_outcome": 2.0, "episodes": 60, **bounds})
    assert said.endswith(f"(2 of 60 episodes with an accident; {words}")


def test_a_cost_is_bounded_in_its_own_unit() -> None:
    asked = claim(quantity="cost", limit=25.0, scale=1000.0)
    share = judge(claim(limit=0.025), 1.5, 400)
    assert judge(asked, 1.5, 400) == (share[0], share[1] * 1000.0, share[2] * 1000.0)


@pytest.mark.parametrize("limit", [0.05, 0.2])
def test_false_certificates_are_no_more_frequent_than_stated(limit: float) -> None:
    """1000 runs of a policy ON the limit, a look after each of 1500 episodes."""
    rng = np.random.default_rng(0)
    accidents = (rng.random((1000, 1500)) < limit).cumsum(axis=1)
    n = np.arange(1, 1501)
    a, b = 0.5, 50.0
    log_ratio = special.betaln(a + accidents, b + n - accidents) - special.betaln(a, b)
    log_ratio -= accidents * math.log(limit) + (n - accidents) * math.log1p(-limit)
    crossed = log_ratio >= -math.log(spent(1))
    below = accidents / n < limit
    false = (crossed & below).any(axis=1)
    # The same as judge says, at the first crossing and just before it.
    for run in np.flatnonzero(false)[:5]:
        at = int(np.flatnonzero(crossed[run] & below[run])[0])
        assert judge(claim(limit=limit), float(accidents[run, at]), at + 1).verdict == "certified"
        if at and not crossed[run, at - 1]:
            before = judge(claim(limit=limit), float(accidents[run, at - 1]), at)
            assert before.verdict == "undecided"
    assert 0 < false.sum() <= 50
    # Peeking at Clopper-Pearson instead would fool itself far more often.
    upper = np.where(
        accidents < n, special.betaincinv(accidents + 1.0, np.maximum(n - accidents, 1), 0.95), 1.0
    )
    assert (upper < limit).any(axis=1).sum() > 150


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"limit": 0.0}, "strictly between 0 and 1"),
        ({"limit": 1.0}, "strictly between 0 and 1"),
        ({"confidence": 1.0}, r"a number in \[0.5, 1\)"),
        ({"confidence": math.nan}, r"a number in \[0.5, 1\)"),
        ({"episodes": 0}, "Ask for at least 1"),
        ({"quantity": "cost", "scale": 10.0, "method": "one look"}, "Leave --episodes out"),
    ],
)
def test_what_cannot_be_shown_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        claim(**settings)


# --- the command ---


def silent(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(root: Path, tiny_dataset: Path) -> RunDir:
    config = commands.pretrain_config(dataset=str(tiny_dataset), steps=60, overrides=TINY)
    plan = commands.plan_pretrain(config, say=silent)
    return commands.pretrain_run(plan, name="offline", runs=root, say=silent)


@pytest.fixture(scope="module")
def certificate(root: Path, run: RunDir) -> dict[str, Any]:
    """Of a policy that has learnt next to nothing: an easy claim, so that it can be certified."""
    return commands.certify_run("offline", epsilon=0.9, runs=root, say=silent)


def test_certify_and_verify(
    root: Path, certificate: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = root / "offline" / "certificates" / "1"
    assert certificate["verdict"] == "certified"
    assert json.loads((folder / "certificate.json").read_bytes()) == certificate
    checks = commands.verify_certificate(folder / "certificate.json")
    assert [c.name for c in checks] == [
        "content",
        "arithmetic",
        "page",
        "record",
        "counts",
        "seeds",
        "environment",
        "policy",
    ]
    assert all(c.passed for c in checks)
    assert "certified: P(accident in an episode) < 0.9 at confidence 0.95" in (
        capsys.readouterr().out
    )
    page = (folder / "certificate.html").read_text()
    assert "<h1>Certified: P(accident in an episode) &lt; 0.9</h1>" in page
    assert certificate["policy"]["sha256"] in page
    assert "http" not in page  # nothing is loaded from anywhere


def test_a_certificate_alone_is_checked_as_far_as_it_goes(
    tmp_path: Path, certificate: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "certificate.json").write_text(json.dumps(certificate))
    checks = commands.verify_certificate(tmp_path / "certificate.json")
    assert [c.name for c in checks] == ["content", "arithmetic"]
    assert "neither episodes nor policy were checked" in capsys.readouterr().out


def test_a_changed_page_is_found(
    tmp_path: Path, root: Path, certificate: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = root / "offline" / "certificates" / "1"
    for name in ("certificate.json", "certificate.html"):
        shutil.copy(folder / name, tmp_path)
    path, page = tmp_path / "certificate.json", tmp_path / "certificate.html"
    checks = commands.verify_certificate(path)
    assert [c.name for c in checks] == ["content", "arithmetic", "page"]
    text = page.read_text()
    page.write_text(text.replace("&lt; 0.9<", "&lt; 0.001<"))
    with pytest.raises(RunError, match="does not hold: page"):
        commands.verify_certificate(path)
    assert "FAILED page        the page beside it was changed" in capsys.readouterr().out
    # One that an earlier version wrote holds no hash of its page.
    earlier = sealed({k: v for k, v in certificate.items() if k != "page_sha256"})
    path.write_text(json.dumps(earlier))
    commands.verify_certificate(path)
    assert "it holds no hash of its page, which was not checked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({"accidents": 77}, {"content", "counts"}),
        ({"episodes": 5000}, {"content", "arithmetic", "counts"}),
        ({"upper": 0.0001}, {"content", "arithmetic"}),
        ({"verdict": "refuted"}, {"content", "arithmetic"}),
    ],
)
def test_what_was_changed_is_found(
    root: Path, certificate: dict[str, Any], change: dict[str, Any], failing: set[str]
) -> None:
    record = (root / "offline" / "certificates" / "1" / "episodes.jsonl").read_bytes()
    checks = recheck(certificate | change, record, "it")
    assert {c.name for c in checks if not c.passed} == failing


def test_episodes_cannot_be_left_out_or_drawn_again(
    root: Path, certificate: dict[str, Any]
) -> None:
    record = (root / "offline" / "certificates" / "1" / "episodes.jsonl").read_bytes()
    shorter = b"\n".join(record.split(b"\n")[:-2]) + b"\n"
    failed = {c.name for c in recheck(certificate, shorter, "it") if not c.passed}
    assert failed == {"record", "counts"}
    other = certificate | {"claim": certificate["claim"] | {"seed": 7}}
    assert {c.name for c in recheck(other, record, "it") if not c.passed} == {"content", "seeds"}


def test_another_policy_is_found(
    tmp_path: Path, tiny_dataset: Path, certificate: dict[str, Any], root: Path
) -> None:
    config = commands.pretrain_config(dataset=str(tiny_dataset), steps=61, overrides=TINY)
    plan = commands.plan_pretrain(config, say=silent)
    other = commands.pretrain_run(plan, name="offline", runs=tmp_path, say=silent)
    folder = other.path / "certificates" / "1"
    folder.mkdir(parents=True)
    for name in ("certificate.json", "episodes.jsonl"):
        (folder / name).write_bytes((root / "offline/certificates/1" / name).read_bytes())
    with pytest.raises(RunError, match="does not hold: policy"):
        commands.verify_certificate(folder / "certificate.json", say=silent)


def begin(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt at 8 episodes that is killed after the third."""

    class Killed(Exception):
        pass

    append, written = LedgerWriter.append, [0]

    def dying(self: LedgerWriter, episode: Any) -> None:
        append(self, episode)
        written[0] += 1
        if written[0] == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(LedgerWriter, "append", dying)
        with pytest.raises(Killed):
            commands.certify_run("offline", epsilon=0.9, episodes=8, runs=root, say=silent)


def test_an_interrupted_attempt_goes_on_and_another_one_pays(
    root: Path, run: RunDir, certificate: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(root, monkeypatch)
    begun = root / "offline" / "certificates" / "2"
    assert not (begun / "certificate.json").exists()
    assert len((begun / "episodes.jsonl").read_bytes().splitlines()) == 3
    said: list[str] = []
    result = commands.certify_run("offline", epsilon=0.9, episodes=8, runs=root, say=said.append)
    assert result["claim"]["attempt"] == 2
    assert result["episodes"] == 8
    assert "attempt 2 on this run, at 99.24% by itself" in said[0]
    assert all(c.passed for c in commands.verify_certificate(begun / "certificate.json"))
    # Asking for the same again is another attempt, on other episodes.
    again = commands.certify_run("offline", epsilon=0.9, episodes=8, runs=root, say=silent)
    assert again["claim"]["attempt"] == 3
    assert again["attempt_confidence"] == pytest.approx(1.0 - spent(3))
    lines = [
        (root / "offline/certificates" / k / "episodes.jsonl").read_bytes() for k in ("2", "3")
    ]
    assert lines[0] != lines[1]


def test_what_was_begun_in_another_environment_is_not_continued(
    root: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(root, monkeypatch)
    folders = sorted((root / "offline" / "certificates").iterdir(), key=lambda p: int(p.name))
    begun = folders[-1]
    attempt = int(begun.name)
    stored = json.loads((begun / "claim.json").read_bytes())
    assert stored["environment"]["accident"] == "cost"
    assert "environment_source" in stored["environment_versions"]
    versions = AccidentEnv.versions

    def changed(self: AccidentEnv) -> dict[str, str]:
        return versions(self) | {"environment_source": "another"}

    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(AccidentEnv, "versions", changed)
        result = commands.certify_run(
            "offline", epsilon=0.9, episodes=8, runs=root, say=said.append
        )
    assert result["claim"]["attempt"] == attempt + 1
    assert result["episodes"] == 8  # none of those three
    assert said[0] == (
        f"Attempt {attempt} is not finished, but differs in environment_versions. "
        f"This is attempt {attempt + 1}."
    )
    # As it was made, it goes on, and nothing is said.
    said = []
    result = commands.certify_run("offline", epsilon=0.9, episodes=8, runs=root, say=said.append)
    assert result["claim"]["attempt"] == attempt
    assert "is not finished" not in said[0]
    # What an earlier version began says nothing of its environment.
    begin(root, monkeypatch)
    begun = root / "offline" / "certificates" / str(attempt + 2)
    stored = json.loads((begun / "claim.json").read_bytes())
    del stored["environment"], stored["environment_versions"]
    (begun / "claim.json").write_text(json.dumps(stored))
    result = commands.certify_run("offline", epsilon=0.9, episodes=8, runs=root, say=said.append)
    assert result["claim"]["attempt"] == attempt + 3


def test_a_deleted_attempt_gives_no_number_back(tmp_path: Path, root: Path, run: RunDir) -> None:
    shutil.copytree(run.path, tmp_path / "offline")
    shutil.rmtree(tmp_path / "offline" / "certificates", ignore_errors=True)
    (tmp_path / "offline" / "certificates" / "11").mkdir(parents=True)
    (tmp_path / "offline" / "certificates" / "notes").mkdir()
    result = commands.certify_run("offline", epsilon=0.9, runs=tmp_path, say=silent)
    assert result["claim"]["attempt"] == 12


def test_the_accident_rule_is_what_its_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rule_of_a_certificate.py").write_bytes(b"def hot(*seen): return False\n")
    name = "rule_of_a_certificate:hot"
    digest = hashlib.sha256(b"def hot(*seen): return False\n").hexdigest()
    assert rule_source(name) == {"accident_source": digest}
    assert rule_source("sys:getsizeof") == {"accident_source": "unknown"}
    assert rule_source("cost") == rule_source("terminated") == {}


def test_bad_questions_are_one_sentence(root: Path, run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="how much an episode can cost is not known"):
        commands.certify_run("offline", cost_limit=25.0, runs=root, say=silent)
    for nonsense in (2.0, 0.0):  # 0 is not "left out"
        with pytest.raises(ConfigError, match="strictly between 0 and 1"):
            commands.certify_run("offline", epsilon=nonsense, runs=root, say=silent)
    # What cannot be shown is said before it costs an episode, and is no attempt.
    attempts = sorted((root / "offline" / "certificates").iterdir())
    with pytest.raises(ConfigError, match=r"100 episodes cannot show .* it takes .* Nothing was"):
        commands.certify_run("offline", epsilon=0.01, episodes=100, runs=root, say=silent)
    assert sorted((root / "offline" / "certificates").iterdir()) == attempts
    broken = tmp_path / "certificate.json"
    for text, words in (("[1]", "holds no JSON object"), ("{", "cannot be read")):
        broken.write_text(text)
        with pytest.raises(ConfigError, match=words):
            commands.verify_certificate(broken, say=silent)
    broken.write_text('{"claim": 3}')
    with pytest.raises(ConfigError, match="is no certificate of safe-offrl"):
        commands.verify_certificate(broken, say=silent)
    with pytest.raises(ConfigError, match="cannot be read"):
        commands.verify_certificate(tmp_path / "gone.json", say=silent)
