"""load_policy: the policy that was learnt acts outside of safe-offrl exactly as it did inside."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from safe_offrl import commands
from safe_offrl.deploy.episodes import play_episode
from safe_offrl.errors import ConfigError, EnvError, RunError
from safe_offrl.policies.networks import StackedMLP
from safe_offrl.policy import Policy, load_policy
from safe_offrl.record.final_policy import final_policy
from safe_offrl.record.run import RunDir
from safe_offrl.safety.guard import Guard, Watch
from safe_offrl.train.fallback import Fallback

TINY = ["alignment_steps=20", "log_every=10", "batch_size=32"]
TINY += ["networks.actor_hidden=[16]", "networks.critic_hidden=[16]", "critic.hidden=[16,16]"]
ONLINE = ["warmup_steps=400", "iteration_steps=200", "batch_size=32"]


def silent(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> RunDir:
    root = tmp_path_factory.mktemp("runs")
    config = commands.pretrain_config(dataset=str(tiny_dataset), steps=60, overrides=TINY)
    plan = commands.plan_pretrain(config, say=silent)
    pretrained = commands.pretrain_run(plan, name="offline", runs=root, say=silent)
    # A shield that acts: the untrained critic's own report would make it abstain.
    report = pretrained.read_json("calibration.json")
    pretrained.write_json("calibration.json", {**report, "shield_refusals": []})
    settings = commands.finetune_config(pretrained, budget=600, overrides=ONLINE)
    online = commands.plan_finetune(pretrained, settings, accept_risk=True)
    return commands.finetune_run(online, name="online", runs=root, say=silent)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> RunDir:
    """A run behind a guard that keeps a cost limit of 5, whatever the log shows of its fallback.

    What its untrained critic sees ahead is less than that, and does not spend it by itself.
    """
    root = tmp_path_factory.mktemp("guarded")
    overrides = [*TINY, "safety.constraint=cost", "safety.cost_limit=5"]
    config = commands.pretrain_config(dataset=str(tiny_dataset), steps=20, overrides=overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fallback, "refusals", lambda self, *_: [() for _ in self.constraints])
        plan = commands.plan_pretrain(config, say=silent)
        pretrained = commands.pretrain_run(plan, name="offline", runs=root, say=silent)
    settings = commands.finetune_config(pretrained, budget=200, overrides=ONLINE)
    online = commands.plan_finetune(pretrained, settings, accept_risk=True)
    return commands.finetune_run(online, name="online", runs=root, say=silent)


def test_it_plays_the_episode_that_the_loop_plays(run: RunDir) -> None:
    final = final_policy(run)
    shield = final.policy.shield
    shield.acts, shield.margin = True, 1e-4  # an untrained critic: some draws pass, some do not
    played = play_episode(final.env, final.policy, 11, np.random.default_rng(3))
    final.env.close()

    policy = load_policy(run.path, seed=3)
    shield = policy._policy.shield
    shield.acts, shield.margin = True, 1e-4
    env = gymnasium.make("PointHazard-v0")
    observation, _ = env.reset(seed=11)
    state, ended = None, False
    rewards: list[float] = []
    while not ended:
        action, state = policy.predict(observation, state)
        assert policy.action_space.contains(action)
        observation, reward, terminated, truncated, _ = env.step(action)
        rewards.append(float(reward))
        ended = terminated or truncated
    assert state is not None
    assert state[0] == len(rewards) == len(played.rows)
    assert sum(rewards) == pytest.approx(played.episode_return)
    assert played.shield_interventions > 0


def test_deterministic_is_the_mean_action(run: RunDir) -> None:
    policy = load_policy(run.path)
    policy._policy.shield.acts = False
    final = final_policy(run)
    observation = final.env.env.reset(seed=0)[0]
    scaled = final.policy.normalizer(np.asarray(observation, dtype=np.float32))
    mean = final.policy.actor(torch.from_numpy(scaled)[None]).act(torch.zeros(1))
    expected = final.env.own_action(mean[0].detach().numpy())
    action, _ = policy.predict(observation, deterministic=True)
    np.testing.assert_allclose(action, expected, rtol=1e-5, atol=1e-6)
    assert not np.array_equal(policy.predict(observation)[0], policy.predict(observation)[0])


def test_a_stack_of_observations_is_taken_one_by_one(run: RunDir) -> None:
    env = gymnasium.make("PointHazard-v0")
    observations = np.stack([env.reset(seed=k)[0] for k in range(3)])
    together, states = load_policy(run.path).predict(observations, deterministic=True)
    assert together.shape == (3, *env.action_space.shape)  # type: ignore[misc]
    alone = load_policy(run.path)
    for k in range(3):
        np.testing.assert_array_equal(
            together[k], alone.predict(observations[k], deterministic=True)[0]
        )
    # An episode that begins anew forgets; the others go on.
    _, states = load_policy(run.path).predict(observations, states, [False, True, False])
    assert states == (2, 1, 2)


def test_stable_baselines_evaluates_it(run: RunDir) -> None:
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor

    env = Monitor(gymnasium.make("PointHazard-v0"))
    mean, _ = evaluate_policy(load_policy(run.path), env, n_eval_episodes=2)  # type: ignore[arg-type]
    assert np.isfinite(mean)


def fallback_action(policy: Policy, observation: Any, left: float = 1.0) -> Any:
    """What the guard would do instead, in the environment's units."""
    deployed = policy._policy
    assert deployed.guard is not None
    seen = deployed.normalizer(policy._env.observe(observation, 0.0))
    return policy._env.own_action(deployed.guard.fallback_action(seen, left))


def test_a_guard_must_be_told_what_the_episode_has_cost(guarded: RunDir) -> None:
    policy = load_policy(guarded.path)
    observation = gymnasium.make("PointHazard-v0").reset(seed=0)[0]
    with pytest.raises(ConfigError, match=r"episode_cost=.*guard=False"):
        policy.predict(observation)
    with pytest.raises(ConfigError, match="episode_cost"):
        policy.predict(np.stack([observation] * 2), deterministic=True)
    instead = fallback_action(policy, observation)
    below, _ = policy.predict(observation, episode_cost=0.0)
    assert not np.array_equal(below, instead)
    for cost in (5.0, 9.0, np.nan):
        above, state = policy.predict(observation, episode_cost=cost)
        np.testing.assert_array_equal(above, instead)
        assert state == (1,)


def test_each_of_a_stack_has_a_cost_of_its_own(guarded: RunDir) -> None:
    env = gymnasium.make("PointHazard-v0")
    observations = np.stack([env.reset(seed=k)[0] for k in range(3)])

    def predicted(costs: Any, which: Any = slice(None)) -> Any:
        policy = load_policy(guarded.path)
        return policy.predict(observations[which], deterministic=True, episode_cost=costs)[0]

    mixed = predicted([0.0, 9.0, 0.0])
    policy = load_policy(guarded.path)
    np.testing.assert_array_equal(mixed[1], fallback_action(policy, observations[1]))
    free, taken = predicted([0.0] * 3), predicted([9.0] * 3)
    with pytest.raises(ConfigError, match="episode_cost has 1 costs for 3 observations"):
        predicted(9.0)  # whose is it?
    np.testing.assert_array_equal(mixed[[0, 2]], free[[0, 2]])
    np.testing.assert_array_equal(mixed[1], taken[1])
    assert not np.array_equal(free[1], taken[1])
    np.testing.assert_array_equal(predicted(np.array([9.0, 9.0, 9.0])), taken)


def test_it_can_be_loaded_without_its_guard(guarded: RunDir) -> None:
    observation = gymnasium.make("PointHazard-v0").reset(seed=0)[0]
    policy = load_policy(guarded.path, guard=False)
    free, _ = policy.predict(observation, deterministic=True)
    spent, _ = policy.predict(observation, deterministic=True, episode_cost=9.0)
    np.testing.assert_array_equal(free, spent)
    kept = load_policy(guarded.path)
    np.testing.assert_array_equal(
        kept.predict(observation, deterministic=True, episode_cost=0.0)[0], free
    )
    assert not np.array_equal(fallback_action(kept, observation), free)


def test_a_guard_that_spends_nothing_need_not_be_told(guarded: RunDir) -> None:
    """It takes over where the fallback is safer, and not where it is less so."""
    policy = load_policy(guarded.path)
    guard = policy._policy.guard
    assert guard is not None
    observation = gymnasium.make("PointHazard-v0").reset(seed=0)[0]
    free, _ = load_policy(guarded.path, guard=False).predict(observation, deterministic=True)
    size = policy._policy.actor.observation_size + 1 + 2
    net = StackedMLP(1, size, (), layer_norm=True, generator=torch.Generator())
    net.requires_grad_(False).output.weight.zero_()
    accidents = Guard(guard.fallbacks[:1], [Watch("accident", 1e-3, net, 1.0, spends=False)])
    policy._policy = policy._policy._replace(guard=accidents)
    instead = fallback_action(policy, observation)
    direction = torch.from_numpy(free - instead)[:, None]
    for sign, expected in ((1.0, instead), (-1.0, free)):
        net.output.weight[0, -2:] = sign * direction / direction.square().sum()
        policy._policy = policy._policy._replace(
            guard=Guard(accidents.fallbacks, accidents.watches)
        )
        action, _ = policy.predict(observation, deterministic=True)
        np.testing.assert_array_equal(action, expected)


def test_a_guard_that_never_hands_back_needs_a_memory(guarded: RunDir) -> None:
    policy = load_policy(guarded.path)
    guard = policy._policy.guard
    assert guard is not None
    forever = Guard(guard.fallbacks, guard.watches, until_end=True)
    policy._policy = policy._policy._replace(guard=forever)
    observation = gymnasium.make("PointHazard-v0").reset(seed=0)[0]
    with pytest.raises(ConfigError, match="predict has no memory"):
        policy.predict(observation, episode_cost=0.0)


def test_a_guarded_policy_plays_the_episode_that_the_loop_plays(guarded: RunDir) -> None:
    """In an environment that takes a toll: half of an action's size."""
    final = final_policy(guarded)
    step = final.env.env.step

    def dear(action: Any) -> Any:
        *rest, info = step(action)
        return *rest, {**info, "cost": float(np.abs(action).sum()) / 2.0}

    final.env.env.step = dear  # type: ignore[method-assign]
    played = play_episode(final.env, final.policy, 11, np.random.default_rng(3))
    assert 0 < sum(played.handed_over) < played.steps
    policy = load_policy(guarded.path, seed=3)
    observation, _ = final.env.env.reset(seed=11)
    state, ended, cost = None, False, 0.0
    rewards: list[float] = []
    while not ended:
        action, state = policy.predict(observation, state, episode_cost=cost)
        observation, reward, terminated, truncated, info = dear(action)
        cost += info["cost"]
        rewards.append(float(reward))
        ended = terminated or truncated or len(rewards) == policy.horizon
    final.env.close()
    assert len(rewards) == len(played.rows)
    assert sum(rewards) == pytest.approx(played.episode_return)
    assert cost == pytest.approx(played.cost)


def test_a_pretrained_policy_acts_by_itself(guarded: RunDir) -> None:
    policy = load_policy(guarded.path.parent / "offline")
    assert policy._policy.guard is None
    observation = gymnasium.make("PointHazard-v0").reset(seed=0)[0]
    policy.predict(observation)


@pytest.mark.parametrize("bad", [np.zeros(3), [np.nan] * 6, "north"])
def test_what_is_no_observation_is_refused(run: RunDir, bad: Any) -> None:
    with pytest.raises(EnvError, match="PointHazard-v0"):
        load_policy(run.path).predict(bad, [0])


def test_the_package_offers_it_without_loading_torch_for_others() -> None:
    import safe_offrl

    assert safe_offrl.load_policy is load_policy
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        safe_offrl.nothing  # noqa: B018


def test_a_run_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        load_policy("nothing", runs=tmp_path)
