"""The safety critic gives probabilities: by hand, by closed forms, by dynamic programming."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from safe_offrl.compute.state import collect_state, restore_state
from safe_offrl.data.sampling import StratifiedSampler
from safe_offrl.envs.hazard_line import HazardLineEnv, accident_probability, always
from safe_offrl.errors import ConfigError
from safe_offrl.policies.networks import Actor, polyak_
from safe_offrl.safety.critic import SafetyCritic, SafetyCriticConfig
from safe_offrl.safety.outlook import AccidentAhead
from safe_offrl.types import Batch, States

HORIZON = 20
STEPS = 1500  # of the comparison with dynamic programming


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def constant_actor(observation_size: int, action: float) -> Actor:
    """Almost always this action, everywhere: standard deviation e^-5 before tanh."""
    actor = Actor(observation_size, 1, (), seeded())
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.zero_()
        parameter.copy_(torch.tensor([math.atanh(action), -10.0]))
    return actor


def make(observation_size: int = 1, **settings: object) -> SafetyCritic:
    config = SafetyCriticConfig(**{"hidden": (32, 32), "learning_rate": 3e-3, **settings})  # type: ignore[arg-type]
    return SafetyCritic(observation_size, 1, AccidentAhead(HORIZON), config, seeded())


def constant_(net: torch.nn.Module, logit: float) -> None:
    with torch.no_grad():
        *_, bias = net.parameters()
        for parameter in net.parameters():
            parameter.zero_()
        bias.fill_(logit)


def one_step(size: int, *, steps_left: float, accident: float = 0.0, end: float = 0.0) -> Batch:
    column, zeros = torch.zeros(size, 1), torch.zeros(size)
    return Batch(
        observations=column,
        actions=column,
        rewards=zeros,
        accidents=zeros + accident,
        costs=zeros + accident,
        next_observations=column,
        terminated=zeros + end,
        time_to_go=torch.full((size,), steps_left / HORIZON),
        return_to_go=zeros,
    )


def loss_of(critic: SafetyCritic, batch: Batch, weights: Tensor | None = None) -> float:
    noise = (torch.zeros(len(batch.rewards), 1),) * 2 + (torch.zeros(3, 1),)
    weights = torch.ones(len(batch.rewards)) if weights is None else weights
    actor = constant_actor(1, 0.0)
    return critic.loss(batch, weights, actor, States.at_start(torch.zeros(3, 1)), noise)[0].item()


# --- targets ---


@pytest.mark.parametrize(
    ("steps_left", "accident", "end", "target"),
    [
        (20, 0, 0, 0.7),  # the target network's value of what follows
        (2, 0, 0, 0.7),
        (1, 0, 0, 0.0),  # the horizon: no step is left
        (20, 0, 1, 0.0),
        (20, 1, 0, 1.0),  # absorbing
        (20, 1, 1, 1.0),
        (1, 1, 0, 1.0),
    ],
)
def test_targets_by_hand(steps_left: float, accident: float, end: float, target: float) -> None:
    critic = make(alpha_init=1e-30)
    constant_(critic.net, math.log(0.2 / 0.8))
    constant_(critic.target, math.log(0.7 / 0.3))
    entropy = -target * math.log(0.2) - (1.0 - target) * math.log(0.8)
    loss = loss_of(critic, one_step(4, steps_left=steps_left, accident=accident, end=end))
    assert loss == pytest.approx(5 * entropy, rel=1e-5)  # five members, summed


def test_last_steps_of_every_horizon_do_not_bootstrap() -> None:
    # 1/H - 1/H is exactly 0 only in exact arithmetic.
    for horizon in (3, 7, 20, 100, 999, 1000):
        critic = SafetyCritic(
            1, 1, AccidentAhead(horizon), SafetyCriticConfig(hidden=(4,)), seeded()
        )
        constant_(critic.net, 1.0)
        constant_(critic.target, 20.0)  # "certain accident", if it were asked
        critic.log_alpha.fill_(-60.0)
        for steps_left, target_is_accident in ((1, False), (2, True)):
            # As play_episode computes it, in float32.
            left = float(np.float32(1.0 - (horizon - steps_left) / horizon))
            batch = one_step(4, steps_left=1)._replace(time_to_go=torch.full((4,), left))
            loss = math.log1p(math.exp(-1.0 if target_is_accident else 1.0))
            assert loss_of(critic, batch) == pytest.approx(5 * loss, rel=1e-5)


def test_next_step_is_asked_with_one_step_less() -> None:
    critic = make(alpha_init=1e-30)
    seen: list[Tensor] = []
    critic.target.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    loss_of(critic, one_step(2, steps_left=5))
    torch.testing.assert_close(seen[0][:, 1], torch.full((2,), 4 / HORIZON))


# --- conservatism ---


def test_only_the_pushed_members_are_pushed_and_upwards() -> None:
    critic = make(members=5, reference=2, alpha_init=0.5, alpha_max=1.0)
    constant_(critic.net, 0.0)
    constant_(critic.target, 0.0)  # targets agree with the net: plain TD has no gradient
    noise = (torch.zeros(4, 1), torch.zeros(4, 1), torch.zeros(3, 1))
    batch = one_step(4, steps_left=9)
    loss, _, _ = critic.loss(
        batch, torch.ones(4), constant_actor(1, 0.3), States.at_start(torch.zeros(3, 1)), noise
    )
    gradient = torch.autograd.grad(loss, list(critic.net.parameters())[-1])[0].flatten()
    # d/dlogit of -.5 log sigmoid at 0 = -.25
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0, -0.25, -0.25, -0.25]))


def test_each_kind_of_member_has_its_own_word() -> None:
    """Members that say .1, .3 (plain) and .6, .8, 1 (pushed): means of .2 and of .8."""
    critic = make()
    constant_(critic.net, 0.0)
    with torch.no_grad():
        critic.net.output.bias.copy_(
            torch.logit(torch.tensor([0.1, 0.3, 0.6, 0.8, 1.0 - 1e-7]))[:, None, None]
        )
    at = torch.zeros(4, 1), torch.ones(4), torch.zeros(4, 1)
    assert critic.plain_risk(*at).tolist() == pytest.approx([0.2] * 4)
    assert critic.risk(*at).tolist() == pytest.approx([0.8] * 4)


def test_the_push_tilts_the_members_that_are_pushed_and_no_others() -> None:
    """Half of all actions end in an accident, whichever: there is nothing to prefer.

    The pushed members are right to call the policy's own action riskier than it is, for an
    estimate; a policy that descended their gradient would flee from wherever it is.
    """
    critic = make(alpha_init=0.3, alpha_max=0.3, target_gap=0.9)
    generator, actor = seeded(1), constant_actor(1, 0.5)
    actions = torch.linspace(-1.0, 1.0, 200).repeat_interleave(2)[:, None]  # each once with, and
    hit = (torch.arange(400) % 2).float()  # once without
    batch = one_step(400, steps_left=1)._replace(actions=actions, accidents=hit)
    start = States.at_start(torch.zeros(3, 1))
    for _ in range(300):
        critic.update(batch, torch.ones(400), actor, start, generator)
    here, there = torch.full((1, 1), 0.5), torch.full((1, 1), -0.5)
    at = torch.zeros(1, 1), torch.full((1,), 1 / HORIZON)
    assert (critic.risk(*at, here) - critic.risk(*at, there)).item() > 0.1
    assert abs((critic.plain_risk(*at, here) - critic.plain_risk(*at, there)).item()) < 0.05


def test_fixed_point_is_the_closed_form() -> None:
    """Where pi = beta, Q* = (y + alpha) / (1 + alpha); with plain TD, Q* = y."""
    critic = make(members=2, reference=1, alpha_init=0.25, alpha_learning_rate=0.0, alpha_max=1.0)
    batch = one_step(64, steps_left=9, end=1.0)
    batch = batch._replace(accidents=(torch.arange(64) % 4 == 0).float())
    actor, generator = constant_actor(1, 0.0), seeded()
    for _ in range(400):
        critic.update(batch, torch.ones(64), actor, States.at_start(torch.zeros(4, 1)), generator)
    logits = critic.logits(batch.observations[:1], batch.time_to_go[:1], batch.actions[:1])
    plain, pushed = torch.sigmoid(logits[:, 0]).tolist()
    assert plain == pytest.approx(0.25, abs=0.02)
    assert pushed == pytest.approx((0.25 + 0.25) / 1.25, abs=0.02)


@pytest.mark.parametrize(
    ("logit_gap", "floor", "rises"), [(0.0, 0.0, True), (2.0, 0.0, False), (2.0, 0.99, True)]
)
def test_alpha_rises_while_the_estimate_falls_short(
    logit_gap: float, floor: float, rises: bool
) -> None:
    """Wanted: the reference's V plus a gap, and no less than what was really seen."""
    critic = make(members=4, reference=2, learning_rate=1e-6, target_gap=0.05, alpha_init=0.01)
    constant_(critic.net, 0.0)
    with torch.no_grad():
        list(critic.net.parameters())[-1][2:] += logit_gap
    before = critic.alpha.item()
    batch, actor = one_step(4, steps_left=9), constant_actor(1, 0.0)
    critic.update(
        batch, torch.ones(4), actor, States.at_start(torch.zeros(3, 1)), seeded(), floor=floor
    )
    assert (critic.alpha.item() > before) == rises
    # A shortfall counts in gaps, at most one: the logarithm moves by the learning rate.
    step = math.log(critic.alpha.item() / before)
    assert abs(step) == pytest.approx(critic.config.alpha_learning_rate, rel=1e-3)


def test_alpha_stays_below_its_bound() -> None:
    critic = make(alpha_init=0.09, alpha_max=0.1, alpha_learning_rate=0.5, learning_rate=1e-6)
    batch, actor, generator = one_step(4, steps_left=9), constant_actor(1, 0.0), seeded()
    for _ in range(5):
        critic.update(
            batch, torch.ones(4), actor, States.at_start(torch.zeros(3, 1)), generator, floor=1.0
        )
    assert critic.alpha.item() == pytest.approx(0.1)


# --- updates ---


def test_loss_reads_and_update_writes() -> None:
    critic = make()
    before = collect_state(critic.parts())
    loss_of(critic, one_step(4, steps_left=9))
    after = collect_state(critic.parts())
    assert all(torch.equal(after[k], v) for k, v in before.items())
    critic.update(
        one_step(4, steps_left=9),
        torch.ones(4),
        constant_actor(1, 0.0),
        States.at_start(torch.zeros(3, 1)),
        seeded(),
    )
    after = collect_state(critic.parts())
    assert not any(torch.equal(after[k], v) for k, v in before.items())


def test_target_moves_by_tau_and_the_actor_stays() -> None:
    critic, actor = make(tau=0.3), constant_actor(1, 0.0)
    expected = SafetyCritic(1, 1, AccidentAhead(HORIZON), critic.config, seeded()).target
    policy = [p.clone() for p in actor.parameters()]
    batch = one_step(4, steps_left=9)
    critic.update(batch, torch.ones(4), actor, States.at_start(torch.zeros(3, 1)), seeded())
    polyak_(expected, critic.net, 0.3)
    for e, t in zip(expected.parameters(), critic.target.parameters(), strict=True):
        torch.testing.assert_close(t, e)
    assert all(torch.equal(a, b) for a, b in zip(policy, actor.parameters(), strict=True))
    assert all(p.grad is None for p in actor.parameters())


def test_wrong_shapes_are_refused() -> None:
    batch = one_step(4, steps_left=9)
    with pytest.raises((ValueError, RuntimeError)):
        loss_of(make(), batch._replace(terminated=torch.zeros(4, 1)))
    with pytest.raises(ValueError, match="expected equal shapes"):
        loss_of(make(), batch, torch.ones(4, 1))


def test_every_trained_tensor_is_in_the_optimiser_and_in_the_checkpoint() -> None:
    critic, other = make(), make()
    held = {id(p) for p in critic.optimizer.parameters}
    assert held == {id(p) for p in critic.net.parameters()}
    generator, batch, actor = seeded(3), one_step(8, steps_left=9), constant_actor(1, 0.2)
    critic.update(batch, torch.ones(8), actor, States.at_start(torch.zeros(3, 1)), generator)
    restore_state(other.parts(), collect_state(critic.parts()))
    for c in (critic, other):
        c.update(batch, torch.ones(8), actor, States.at_start(torch.zeros(3, 1)), seeded(4))
    one, two = collect_state(critic.parts()), collect_state(other.parts())
    assert all(torch.equal(one[k], v) for k, v in two.items())


# --- calibration ---


@pytest.mark.parametrize("corrected", [True, False])
def test_stratified_batches_keep_the_accident_prior(corrected: bool) -> None:
    """4 % of the transitions are accidents, half of every batch: the weights must undo that."""
    critic = make(members=2, reference=1, alpha_max=1e-5, alpha_init=1e-5)
    store = one_step(500, steps_left=9, end=1.0)
    store = store._replace(accidents=(torch.arange(500) % 25 == 0).float())
    sampler, generator = StratifiedSampler(store.accidents), seeded(2)
    actor = constant_actor(1, 0.0)
    for _ in range(400):
        index, weights = sampler.draw(64, 0.5, generator)
        batch = Batch(*(x[index] for x in store.tensors))
        weights = weights if corrected else torch.ones(64)
        critic.update(batch, weights, actor, States.at_start(torch.zeros(3, 1)), generator)
    risk = critic.risk(store.observations[:1], store.time_to_go[:1], store.actions[:1]).item()
    assert risk == pytest.approx(0.04 if corrected else 0.52, abs=0.015 if corrected else 0.1)


def hazard_line_log(transitions: int) -> tuple[Batch, Tensor]:
    """Episodes of uniformly random actions: (transitions, start observations)."""
    env, rng = HazardLineEnv(), np.random.default_rng(0)
    observation, _ = env.reset(seed=0)
    t, starts = 0, [observation]
    rows: list[tuple[object, ...]] = []
    while len(rows) < transitions:
        action = rng.uniform(-1.0, 1.0, 1).astype(np.float32)
        following, _, terminated, _, info = env.step(action)
        rows.append((observation, action, info["cost"], following, terminated, 1.0 - t / HORIZON))
        observation, t = following, t + 1
        if terminated or t == HORIZON:
            (observation, _), t = env.reset(), 0
            starts.append(observation)
    columns = [torch.from_numpy(np.stack(c).astype(np.float32)) for c in zip(*rows, strict=True)]
    o, a, cost, following_o, terminated_c, left = columns
    zeros = torch.zeros(transitions)
    batch = Batch(o, a, zeros, cost, cost, following_o, terminated_c, left, zeros)
    return batch, torch.from_numpy(np.stack(starts))


@pytest.fixture(scope="module")
def hazard_line() -> tuple[Batch, Tensor]:
    return hazard_line_log(20_000)


@pytest.mark.parametrize("action", [0.6, 0.2, -0.2])
def test_v_accident_against_dynamic_programming(
    hazard_line: tuple[Batch, Tensor], action: float
) -> None:
    """Off-policy, from random behaviour, for policies of 6, 28 and 67 % accidents in 20 steps."""
    log, starts = hazard_line
    critic, actor, generator = make(7, tau=0.02), constant_actor(7, action), seeded(1)
    sampler = StratifiedSampler(log.accidents)
    for _ in range(STEPS):
        index, weights = sampler.draw(128, critic.config.positive_share, generator)
        batch = Batch(*(x[index] for x in log.tensors))
        first = torch.randint(len(starts), (32,), generator=generator)
        critic.update(batch, weights, actor, States.at_start(starts[first]), generator)
    truth = accident_probability(always(action), HORIZON)
    estimate = critic.estimate(actor, States.at_start(starts), generator, 0.95)
    assert truth - 0.02 <= estimate.value <= truth + 0.15
    assert estimate.value <= estimate.upper <= truth + 0.15
    assert estimate.reference == pytest.approx(truth, abs=0.06)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"reference": 0}, "reference"),
        ({"members": 2, "reference": 2}, "reference"),
        ({"target_gap": 0.0}, "target_gap"),
        ({"target_gap": math.nan}, "target_gap"),
        ({"positive_share": 1.0}, "positive_share"),
        ({"cost_steps": 0}, "cost_steps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"alpha_init": 0.0}, "alpha_init"),
    ],
)
def test_settings_without_a_target_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        SafetyCriticConfig(**settings)
