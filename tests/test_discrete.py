"""Discrete actions from the safety critic to the command line, on the grid whose truth is known."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from safe_offrl import cli, commands
from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.data_formats.loading import dataset_content, load_dataset
from safe_offrl.envs import hazard_grid as grid
from safe_offrl.errors import DataError
from safe_offrl.policies.categorical import Categorical
from safe_offrl.policies.kinds import kind_for
from safe_offrl.policies.networks import Actor
from safe_offrl.record.run import RunDir
from safe_offrl.safety.acceptance import measure_divergence, risk_change
from safe_offrl.safety.critic import SafetyCritic, SafetyCriticConfig
from safe_offrl.safety.outlook import AccidentAhead
from safe_offrl.spec import SafetySpec
from safe_offrl.types import Batch, Episode, States, Visited

HORIZON = 40
EVERY_CELL = torch.from_numpy(np.stack([grid.observe(c) for c in range(grid.CELLS)]))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def actor_of(*probabilities: float) -> Actor:
    """The same probabilities everywhere; observations of one number."""
    actor = Actor(1, len(probabilities), (), seeded(), kind_for(discrete=True))
    with torch.no_grad():
        weight, bias = actor.parameters()
        weight.zero_()
        bias.copy_(torch.tensor(probabilities).log())
    return actor


def critic_of(net: list[float], target: list[float]) -> SafetyCritic:
    """Q_C of action k is sigmoid(net[k]), in the target sigmoid(target[k]); alpha is .5."""
    config = SafetyCriticConfig(2, 1, hidden=(), alpha_init=0.5, alpha_max=1.0)
    critic = SafetyCritic(1, len(net), AccidentAhead(10), config, seeded())
    with torch.no_grad():
        for ensemble, logits in ((critic.net, net), (critic.target, target)):
            ensemble.output.weight.zero_()
            ensemble.output.weight[:, 2:, 0] = torch.tensor(logits)
            ensemble.output.bias.zero_()
    return critic


def one_transition(action: list[float]) -> Batch:
    one, zero = torch.ones(1), torch.zeros(1)
    state = torch.zeros(1, 1)
    return Batch(state, torch.tensor([action]), zero, zero, zero, state, zero, one, zero)


def logit(p: float) -> float:
    return math.log(p / (1.0 - p))


def test_critic_loss_by_hand() -> None:
    """Target, push-up and estimate are exact expectations over the policy's actions."""
    critic = critic_of([logit(0.4), logit(0.7), logit(0.2)], [logit(0.1), logit(0.2), logit(0.6)])
    states = States(torch.zeros(2, 1), torch.ones(2), torch.full((2,), 0.5))
    noise = (torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(2, 3))
    weights = torch.tensor([2.0])  # of the stratified sampling
    batch, policy = one_transition([0.0, 0.0, 1.0]), actor_of(0.5, 0.3, 0.2)
    loss, pushed, plain = critic.loss(batch, weights, policy, states, noise)
    target = 0.5 * 0.1 + 0.3 * 0.2 + 0.2 * 0.6
    td = -target * math.log(0.2) - (1.0 - target) * math.log(0.8)
    push = -0.5 * math.log(0.4) - 0.3 * math.log(0.7) - 0.2 * math.log(0.2)
    # Two members learn by TD, one of them is pushed with alpha .5; all weighted by 2.
    assert loss.item() == pytest.approx(2.0 * (2.0 * td + 0.5 * push), rel=1e-5)
    value = 0.5 * 0.4 + 0.3 * 0.7 + 0.2 * 0.2
    assert pushed.item() == pytest.approx(value, rel=1e-5)
    assert plain.item() == pytest.approx(value, rel=1e-5)
    assert critic.estimate(policy, states, seeded(), 0.95).value == pytest.approx(value, rel=1e-5)


def test_acceptance_measures_exactly() -> None:
    critic = critic_of([logit(0.4), logit(0.7), logit(0.2)], [0.0, 0.0, 0.0])
    new, old = actor_of(0.2, 0.3, 0.5), actor_of(0.5, 0.3, 0.2)
    visited = Visited(one_transition([1.0, 0.0, 0.0]), torch.ones(1), 1.0)
    change = risk_change(new, old, critic, visited, torch.randn(1, 3, generator=seeded()))
    assert change == pytest.approx(-0.3 * 0.4 + 0.3 * 0.2, rel=1e-5)
    forward, reverse, *_ = measure_divergence(new, old, torch.zeros(4, 1), 0.95).tolist()
    # .2 log(.2/.5) + .5 log(.5/.2), the same both ways
    assert forward == pytest.approx(0.3 * math.log(2.5), rel=1e-5)
    assert reverse == pytest.approx(0.3 * math.log(2.5), rel=1e-5)


# --- dynamic programming ---


def policy_table(aversion: float, noise: float) -> np.ndarray:
    return (1.0 - noise) * grid.as_probabilities(grid.plan(aversion)) + noise / 4


def actor_from(table: np.ndarray) -> Actor:
    """An actor that is this policy: one hidden unit a cell, on in it alone."""
    actor = Actor(grid.HEIGHT + grid.WIDTH, 4, (grid.CELLS,), seeded(), kind_for(discrete=True))
    first, _, last = actor.layers.children()
    with torch.no_grad():
        first.weight.copy_(EVERY_CELL)  # type: ignore[operator]
        first.bias.fill_(-1.0)  # type: ignore[operator]
        last.weight.copy_(torch.from_numpy(table).log().T)  # type: ignore[operator]
        last.bias.zero_()  # type: ignore[operator]
    return actor


@pytest.fixture(scope="module")
def log() -> tuple[Batch, Tensor]:
    """Episodes of hurried, cautious and random behaviour: (transitions, start observations)."""
    env, rng = grid.HazardGridEnv(), np.random.default_rng(0)
    behaviours = [policy_table(a, n) for a, n in ((0.0, 0.3), (2.0, 0.3), (0.0, 1.0))]
    rows: list[tuple[object, ...]] = []
    starts: list[np.ndarray] = []
    env.reset(seed=0)
    while len(rows) < 20_000:
        behaviour = behaviours[len(starts) % 3]
        observation, _ = env.reset()
        starts.append(observation)
        for t in range(HORIZON):
            action = rng.choice(4, p=behaviour[grid.cell_of(observation)])
            following, _, terminated, _, info = env.step(action)
            row = (observation, np.eye(4)[action], info["cost"], following, terminated)
            rows.append((*row, 1.0 - t / HORIZON))
            observation = following
            if terminated:
                break
    columns = [torch.from_numpy(np.stack(c).astype(np.float32)) for c in zip(*rows, strict=True)]
    o, a, cost, following_o, terminated_c, left = columns
    zeros = torch.zeros(len(rows))
    batch = Batch(o, a, zeros, cost, cost, following_o, terminated_c, left, zeros)
    return batch, torch.from_numpy(np.stack(starts))


def test_the_actor_of_a_table_is_that_table() -> None:
    table = policy_table(0.5, 0.2)
    with torch.no_grad():
        policy = actor_from(table)(EVERY_CELL)
    assert isinstance(policy, Categorical)
    np.testing.assert_allclose(policy.log_probs.exp().numpy(), table, atol=1e-6)


@pytest.mark.parametrize(("aversion", "noise"), [(0.0, 0.1), (1.0, 0.05)])
def test_v_accident_against_dynamic_programming(
    log: tuple[Batch, Tensor], aversion: float, noise: float
) -> None:
    """Off-policy, for policies of 28 and 2 % accidents in 40 steps."""
    batch, starts = log
    table = policy_table(aversion, noise)
    actor, generator = actor_from(table), seeded(1)
    config = SafetyCriticConfig(hidden=(32, 32), learning_rate=3e-3, tau=0.02)
    critic = SafetyCritic(14, 4, AccidentAhead(HORIZON), config, seeded())
    for _ in range(700):
        index = torch.randint(len(batch.rewards), (128,), generator=generator)
        mini = Batch(*(x[index] for x in batch.tensors))
        first = torch.randint(len(starts), (32,), generator=generator)
        critic.update(mini, torch.ones(128), actor, States.at_start(starts[first]), generator)
    truth = grid.accident_probability(table, HORIZON)
    estimate = critic.estimate(actor, States.at_start(starts), generator, 0.95)
    assert truth - 0.02 <= estimate.value <= truth + 0.12
    assert estimate.reference == pytest.approx(truth, abs=0.05)


# --- the whole way ---

TINY = ["steps=60", "alignment_steps=20", "log_every=20", "batch_size=32"]
TINY += ["networks.actor_hidden=[16]", "networks.critic_hidden=[16]", "critic.hidden=[16,16]"]
ONLINE = ["warmup_steps=100", "iteration_steps=100", "batch_size=32"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grid") / "grid.hdf5"
    overrides = ["learners.ppo.steps=0"]
    commands.collect_run(
        env="HazardGrid-v0", out=path, transitions=2500, overrides=overrides, say=silent
    )
    return path


@pytest.fixture(scope="module")
def pretrained(dataset: Path) -> RunDir:
    config = commands.pretrain_config(env="HazardGrid-v0", dataset=str(dataset), overrides=TINY)
    plan = commands.plan_pretrain(config, say=silent)
    return commands.pretrain_run(plan, name="offline", runs=dataset.parent, say=silent)


def silent(text: str) -> None:
    pass


def test_the_log_holds_one_hot_rows(dataset: Path) -> None:
    loaded = load_dataset(dataset, discount=0.99, spec=SafetySpec())
    assert loaded.discrete
    assert loaded.layout.action_size == 4
    actions = loaded.transitions.actions
    assert torch.equal(actions.sum(1), torch.ones(len(actions)))
    assert set(actions.unique().tolist()) == {0.0, 1.0}


def test_from_the_command_line(
    dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["safe-offrl", *arguments])
        with contextlib.suppress(SystemExit):
            cli.main()
        captured = capsys.readouterr()
        assert "error" not in captured.err, captured.err
        return captured.out

    text = call("inspect", str(dataset))
    assert re.search(r"actions +0: \d+%, 1: \d+%, 2: \d+%, 3: \d+%\n", text)
    assert "coverage      actions 100%" in text
    for agent in ("iql", "calql"):
        arguments = ["--env", "HazardGrid-v0", "--dataset", str(dataset), "--agent", agent]
        call("pretrain", *arguments, "--name", agent, *TINY)
    call("finetune", "calql", "--accept-risk", "--budget", "600", "--name", "safe", *ONLINE)
    free = ["--no-kl", "--no-safety-constraint", "--no-shield", "--no-guard"]
    call("finetune", "calql", "--budget", "600", "--name", "free", *free, *ONLINE)
    result = json.loads(call("evaluate", "safe", "--episodes", "20", "--json"))
    assert result["episodes"] == 20
    assert call("compare", "safe", "free")
    runs = [RunDir(tmp_path / "runs" / name) for name in ("safe", "free")]
    assert [run.state["status"] for run in runs] == ["finished", "finished"]
    assert all(560 <= run.episodes()[-1].total_steps <= 600 for run in runs)
    assert runs[1].episodes()[-1].version > 0  # the free one deploys its learner


def test_an_interrupted_run_resumes_bitwise(
    dataset: Path, pretrained: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan() -> commands.FinetunePlan:
        config = commands.finetune_config(pretrained, budget=420, overrides=ONLINE)
        return commands.plan_finetune(pretrained, config, accept_risk=True)

    def record(run: RunDir) -> list[object]:
        names = ("metrics.jsonl", "iterations.jsonl", "ledger.jsonl")
        checkpoint = run.load_checkpoint()
        return [*((run.path / n).read_bytes() for n in names), checkpoint.step, checkpoint.sha256]

    whole = commands.finetune_run(plan(), name="whole", runs=dataset.parent, say=silent)
    append, calls = RunDir.append_episode, [0]
    assert len(whole.episodes()) > 14

    def killed_at_14(self: RunDir, episode: Episode, **named: bool) -> None:
        calls[0] += 1
        if calls[0] == 14:
            raise KeyboardInterrupt
        append(self, episode, **named)

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "append_episode", killed_at_14)
        with pytest.raises(KeyboardInterrupt):
            commands.finetune_run(
                plan(), name="cut", runs=dataset.parent, checkpoint_seconds=0.0, say=silent
            )
    again = commands.resume_finetune("cut", runs=dataset.parent, say=silent)
    assert record(again) == record(whole)


def test_a_continuous_log_is_refused_for_a_discrete_environment(
    dataset: Path, tmp_path: Path
) -> None:
    with dataset_content(dataset) as (arrays, metadata, _, _):
        without = {k: v for k, v in metadata.items() if k != "action_count"}
        write_dataset(tmp_path / "unnamed.hdf5", {k: v[:] for k, v in arrays.items()}, without)
    config = commands.pretrain_config(
        env="HazardGrid-v0", dataset=str(tmp_path / "unnamed.hdf5"), overrides=TINY
    )
    with pytest.raises(DataError, match="action_count"):
        commands.plan_pretrain(config, say=silent)


@pytest.mark.parametrize("wrong", [[0.0, 0.5, 0.5, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0] * 4])
def test_rows_that_are_not_one_hot_are_refused(
    dataset: Path, tmp_path: Path, wrong: list[float]
) -> None:
    with dataset_content(dataset) as (arrays, metadata, _, _):
        copies = {k: v[:].copy() for k, v in arrays.items()}
    copies["actions"][7] = wrong
    write_dataset(tmp_path / "wrong.hdf5", copies, metadata)
    with pytest.raises(DataError, match="one-hot rows of 4"):
        load_dataset(tmp_path / "wrong.hdf5", discount=0.99, spec=SafetySpec())
