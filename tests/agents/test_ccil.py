"""CCIL: bound, labels and losses by hand, and an unstable system that only labels can hold."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safe_offrl import commands
from safe_offrl.agents import find_agent, kind_of
from safe_offrl.agents.ccil import CCIL, CCILConfig, LipschitzDynamics
from safe_offrl.agents.steering import Steering
from safe_offrl.compute.state import seeded
from safe_offrl.data.dataset import Dataset
from safe_offrl.data.sampling import uniform_batches
from safe_offrl.errors import DataError
from safe_offrl.policies.networks import NetworkConfig, Networks
from safe_offrl.types import Batch
from tests.agents.setups import setup_of
from tests.agents.small_problems import log_of
from tests.agents.test_latent_steering import TINY, silent
from tests.agents.test_toy_agent import Killed, kill_at, result

NOTHING_ELSE = Steering()
# Changes 1 and 5: their mean is 3, their deviation 2.
TWO_STEPS = log_of(
    torch.tensor([[0.0], [2.0]]),
    torch.tensor([[0.5], [-0.5]]),
    torch.zeros(2),
    torch.tensor([[1.0], [7.0]]),
    torch.zeros(2),
)


def agent_of(log: Dataset = TWO_STEPS, *, steps: int = 0, **settings: Any) -> CCIL:
    """With a model of one linear layer unless ``settings`` say otherwise."""
    generator = seeded(0)
    sizes = NetworkConfig((8,), (8,), 2)
    networks = Networks(*log.layout.sizes, sizes, generator, kind_of("ccil", discrete=False))
    settings = {"hidden": (), **settings}
    return CCIL(setup_of(networks, generator, log, steps=steps), CCILConfig(**settings))


def linear_(model: LipschitzDynamics, weights: list[float], bias: float) -> None:
    (layer,) = model.linear
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weights]))
        layer.bias.fill_(bias)


# --- the model ---


def test_changes_and_the_model_s_loss_are_by_hand() -> None:
    """f = 3 + 2 (.5 s + a - .25), 3.5 and 3.5 where it should be 1 and 5."""
    model = agent_of().model
    linear_(model, [0.5, 1.0], -0.25)
    batch = TWO_STEPS.transitions
    assert model.changes(batch.observations, batch.actions).flatten().tolist() == [3.5, 3.5]
    (loss,) = model.loss(batch)
    assert loss.item() == pytest.approx((1.25**2 + 0.75**2) / 2.0)


def test_each_layer_is_shrunk_to_its_share_of_the_bound() -> None:
    """Three layers of a bound of 8: no singular value is above 2, and smaller ones stay."""
    model = agent_of(hidden=(2, 2), lipschitz=8.0).model
    first, second, third = model.linear
    assert model.most == pytest.approx(2.0)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))  # 5
        second.weight.copy_(torch.tensor([[0.0, 1.5], [0.5, 0.0]]))
        third.weight.copy_(torch.tensor([[1.0, -6.0]]))
    for _ in range(30):
        model.bound_()
    assert first.weight.flatten().tolist() == pytest.approx([1.2, 1.6, 0.0, 0.0])
    assert second.weight.flatten().tolist() == [0.0, 1.5, 0.5, 0.0]
    size = math.sqrt(37.0) / 2.0
    assert third.weight.flatten().tolist() == pytest.approx([1.0 / size, -6.0 / size])


def test_learning_never_leaves_the_bound() -> None:
    """What is learnt has a slope of 40, and the network one of 3 at most."""
    states = torch.randn(64, 1, generator=seeded(1))
    actions = torch.rand(64, 1, generator=seeded(2))
    log = log_of(states, actions, torch.zeros(64), 40.0 * states.abs(), torch.zeros(64))
    agent = agent_of(log, steps=200, share=1.0, hidden=(16, 16), model_learning_rate=1e-2)
    for _ in range(200):
        agent.update(log.transitions, NOTHING_ELSE)
    norms = [torch.linalg.matrix_norm(x.weight.detach(), 2).item() for x in agent.model.linear]
    assert math.prod(norms) == pytest.approx(3.0, rel=0.05)
    points = torch.cat([states, actions], dim=1)
    outputs = agent.model.layers(points).detach()
    slopes = (outputs - outputs.T).abs() / torch.cdist(points, points).fill_diagonal_(1.0)
    assert 1.0 < slopes.max().item() <= 3.1


# --- the labels ---


def test_labels_are_one_step_back_from_where_they_lead() -> None:
    """f is 3.5 at both: from -3.5 and -1.5. It misses s' by 2.5 and 1.5."""
    agent = agent_of()
    linear_(agent.model, [0.5, 1.0], -0.25)
    states, judged = agent.labels(TWO_STEPS.transitions)
    assert states.flatten().tolist() == [-3.5, -1.5]
    assert judged.tolist() == [[3.5, 3.5], [2.5, 1.5]]


def test_distances_are_lengths() -> None:
    log = log_of(
        torch.zeros(2, 2),
        torch.zeros(2, 1),
        torch.zeros(2),
        torch.tensor([[3.0, 4.0], [3.0, 4.0]]),
        torch.zeros(2),
    )
    agent = agent_of(log)
    (layer,) = agent.model.linear
    nn.init.zeros_(layer.weight)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([2.0, 8.0]))  # and 3 and 4 on average
    _, judged = agent.labels(log.transitions)
    assert judged[:, 0].tolist() == pytest.approx([13.0, math.hypot(2.0, 8.0)])


def test_what_is_trusted_is_measured_on_the_log() -> None:
    """Distances 0 to 10 and errors of 10 less them: the nearest 30 %, the most accurate 80 %."""
    states = torch.arange(11.0).unsqueeze(1)
    log = log_of(states, torch.zeros(11, 1), torch.zeros(11), states + 10.0, torch.zeros(11))
    agent = agent_of(log, nearest=0.3, accurate=0.8)
    linear_(agent.model, [1.0, 0.0], -10.0)  # f = s: the changes are all 10, in units of 1
    assert agent.thresholds.tolist() == [-1.0, -1.0]
    assert agent.measured().tolist() == pytest.approx([3.0, 8.0])


def test_labels_that_are_far_or_inaccurate_do_not_count() -> None:
    agent = agent_of()
    linear_(agent.model, [0.5, 1.0], -0.25)
    batch = TWO_STEPS.transitions
    asked = torch.tensor([[0.0], [2.0], [-3.5], [-1.5]])
    actions = torch.tensor([[0.5], [-0.5], [0.5], [-0.5]])
    p = agent.actor.density(asked).log_prob(actions)
    for thresholds, loss, share in (
        ([-1.0, -1.0], -(p[0] + p[1]) / 2.0, 0.0),
        ([3.5, 1.5], -(p[0] + p[1] + p[3]) / 3.0, 0.5),  # the first misses by 2.5
        ([3.5, 2.5], -p.sum() / 4.0, 1.0),
        ([3.4, 2.5], -(p[0] + p[1]) / 2.0, 0.0),
    ):
        agent.thresholds.copy_(torch.tensor(thresholds))
        found, trusted = agent.loss(batch)
        assert found.item() == pytest.approx(loss.item(), rel=1e-5)
        assert trusted.item() == share


def test_the_model_has_its_share_of_the_steps_and_then_labels_are_trusted() -> None:
    agent = agent_of(steps=10, share=0.4, nearest=1.0, accurate=1.0)
    shares, models = [], []
    for _ in range(10):
        metrics = agent.update(TWO_STEPS.transitions, NOTHING_ELSE)
        shares.append(metrics["actor/labels"].item())
        models.append("model/loss" in metrics)
    assert models == [True] * 4 + [False] * 6
    assert shares == [0.0] * 3 + [1.0] * 7
    assert agent.thresholds.tolist() == pytest.approx(agent.measured().tolist())


# --- an unstable system ---


@functools.cache
def unstable(name: str) -> Networks:
    """What imitates a log of ``s' = 1.2 s + a`` about 0, in which a says nothing of s."""
    g, n, steps = seeded(1), 2000, 500
    s, a = 0.1 * torch.randn(n, 1, generator=g), 0.3 * torch.randn(n, 1, generator=g)
    a = a.clamp(-0.95, 0.95)
    log = log_of(s, a, torch.zeros(n), 1.2 * s + a, torch.zeros(n))
    own = {"hidden": (32,), "nearest": 0.9, "model_learning_rate": 3e-3} if name == "ccil" else {}
    generator, agent = seeded(0), find_agent(name)
    sizes = NetworkConfig((32,), (8,), 2)
    networks = Networks(1, 1, sizes, generator, kind_of(name, discrete=False))
    imitation = agent(
        setup_of(networks, generator, log, steps=steps), agent.Config(learning_rate=3e-3, **own)
    )
    for _ in range(steps):
        (batch,) = uniform_batches(log.rows, log.layout, 1, 128, g)
        imitation.update(batch, NOTHING_ELSE)
    return networks


def mean_action(networks: Networks, states: Tensor) -> Tensor:
    """Of 200 draws at each state [B, 1]."""
    g = seeded(3)
    with torch.no_grad():
        policy = networks.actor(states)
        drawn = [policy.quadrature(networks.actor.noise((len(states),), g)) for _ in range(200)]
        return torch.stack([x.expect(x.actions[:, 0]) for x in drawn]).mean(0).unsqueeze(1)


@pytest.mark.parametrize(("name", "returns"), [("bc", False), ("ccil", True)])
def test_from_a_perturbed_state_labels_lead_back_and_imitation_drifts_off(
    name: str, returns: bool
) -> None:
    """Nothing in the log answers s, so that from .4 imitation alone is at 1.2^6 .4 = 1.2.

    By regression a label's action is -.3^2 / (.3^2 + (.8 .1)^2) = -.93 of its state.
    """
    networks, states = unstable(name), torch.tensor([[0.4], [-0.4]])
    for _ in range(6):
        states = 1.2 * states + mean_action(networks, states)
    distance = states.abs().max().item()
    assert (distance < 0.15) if returns else (distance > 0.8)


# --- what it is refused for, and the commands ---


def test_states_that_are_discrete_are_refused() -> None:
    states = torch.eye(5).repeat(20, 1)
    zeros = torch.zeros(100)
    log = log_of(states, torch.zeros(100, 1), zeros, states, zeros)
    with pytest.raises(DataError, match=r"in 100 steps of the log there are 5 different .* bc\."):
        agent_of(log)


def test_a_run_that_is_killed_goes_on_bit_for_bit(
    tmp_path: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = commands.pretrain_config(
        agent="ccil",
        dataset=str(tiny_dataset),
        steps=30,
        overrides=[*TINY, "agents.ccil.hidden=[16]"],
    )
    plan, runs = commands.plan_pretrain(config, say=silent), {"runs": tmp_path, "say": silent}
    whole = commands.pretrain_run(plan, name="whole", **runs)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        kill_at(patch, 3)  # while the model learns
        with pytest.raises(Killed):
            commands.pretrain_run(plan, name="cut", checkpoint_seconds=0.0, **runs)  # type: ignore[arg-type]
    assert result(commands.resume_pretrain("cut", **runs)) == result(whole)  # type: ignore[arg-type]
    assert whole.load_checkpoint().tensors["agent.model_updates/value"].item() == 6
    online = commands.finetune_config(
        whole, budget=300, overrides=["warmup_steps=100", "iteration_steps=100", "batch_size=32"]
    )
    assert online.baseline.learner == "rlpd"
    plan_online = commands.plan_finetune(whole, online, accept_risk=True)
    run = commands.finetune_run(plan_online, name="online", **runs)  # type: ignore[arg-type]
    assert run.state["status"] == "finished"


def test_rows_are_not_changed() -> None:
    batch = TWO_STEPS.transitions
    before = Batch(*(field.clone() for field in batch.tensors))
    agent = agent_of(steps=2, share=0.5, nearest=1.0, accurate=1.0)
    for _ in range(3):
        agent.update(batch, NOTHING_ELSE)
    assert all(map(torch.equal, batch.tensors, before.tensors))
