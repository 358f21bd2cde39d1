"""load_policy: the policy that was learnt acts outside of safe-offrl exactly as it did inside."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from safe_offrl import commands
from safe_offrl.deploy.episodes import play_episode
from safe_offrl.errors import EnvError, RunError
from safe_offrl.policy import load_policy
from safe_offrl.record.final_policy import final_policy
from safe_offrl.record.run import RunDir

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
