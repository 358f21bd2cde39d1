"""Learners: isolated from the caller, copied exactly, penalised as stated, alike in processes."""

import random
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from safe_offrl.collect import penalty
from safe_offrl.collect import sb3 as module
from safe_offrl.collect.frozen import freeze
from safe_offrl.collect.isolation import isolated_torch, narrow_seed
from safe_offrl.collect.penalty import Account, Penalised
from safe_offrl.collect.sb3 import LearnersConfig, PPOConfig, SACConfig, learnt_behaviours
from safe_offrl.env.make import make_env
from safe_offrl.errors import ConfigError, EnvError
from safe_offrl.spec import SafetySpec

SPEC = SafetySpec()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PARALLEL_ENVS", 2)
    monkeypatch.setattr(module, "SAC_START", 50)


def job(algorithm: str = "PPO", env_id: str = "PointHazard-v0") -> Any:
    return module._Job(algorithm, env_id, SPEC, LearnersConfig(), seed=0)


def model_of(job: Any) -> Any:
    from stable_baselines3.common.vec_env import DummyVecEnv

    account = Account()
    envs = DummyVecEnv([lambda: Penalised(make_env(job.env_id, SPEC), account)])
    return module._model(job, envs)


def test_training_leaves_the_global_state_alone() -> None:
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    numpy_before = np.random.get_state()[1].copy()  # type: ignore[index] # noqa: NPY002
    config = LearnersConfig(ppo=PPOConfig(steps=10))
    behaviours = learnt_behaviours("PointHazard-v0", SPEC, config, seed=0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), torch.get_num_threads())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # type: ignore[index] # noqa: NPY002
    assert [b.name for b in behaviours] == ["ppo-256", "ppo-512", "ppo-768"]  # whole rollouts


def test_what_is_learnt_does_not_depend_on_how_the_caller_multiplies_matrices() -> None:
    """`pretrain` configures torch before it builds a missing log, `collect` does not."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set up at import
    before = matmul.fp32_precision
    config = LearnersConfig(ppo=PPOConfig(steps=2000))
    size = make_env("PointHazard-v0", SPEC).observation_size
    actions = []
    try:
        for precision in ("none", "bf16"):  # "bf16" chooses oneDNN, see device.configure
            matmul.fp32_precision = precision
            *_, last = learnt_behaviours("PointHazard-v0", SPEC, config, seed=0)
            assert matmul.fp32_precision == precision
            controller = last.factory(np.random.default_rng(0))
            rng = np.random.default_rng(1)
            seen = rng.normal(size=(50, size)).astype(np.float32)
            actions.append(np.stack([controller(x) for x in seen]))
    finally:
        matmul.fp32_precision = before
    np.testing.assert_array_equal(actions[0], actions[1])


def test_frozen_ppo_policy_equals_the_model() -> None:
    with isolated_torch():
        model = model_of(job())
        policy = model.policy
        frozen = freeze(model)
        with torch.no_grad():
            policy.log_std.fill_(-30.0)  # the mean alone
            deterministic = freeze(model)
            policy.log_std.fill_(np.log(0.5))
            wide = freeze(model)
        rng = np.random.default_rng(0)
        size = model.observation_space.shape[0]
        for _ in range(20):
            x = rng.normal(size=size).astype(np.float32)
            # predict() clips to the action space, and so does the environment what it is given.
            expected = model.predict(x, deterministic=True)[0]
            assert np.allclose(np.clip(deterministic(rng)(x), -1, 1), expected, atol=1e-5)
        zero = np.zeros(size, np.float32)
        samples = np.array([wide(rng)(zero) for _ in range(4000)])
        assert samples.std() == pytest.approx(0.5, rel=0.05)
        # A snapshot: training on must not move it.
        before = frozen(np.random.default_rng(1))(zero)
        model.learn(128)
        assert np.array_equal(before, frozen(np.random.default_rng(1))(zero))


def test_frozen_sac_policy_equals_the_model() -> None:
    with isolated_torch():
        model = model_of(job("SAC"))
        frozen = freeze(model)
        rng = np.random.default_rng(0)
        for _ in range(3):
            x = rng.normal(size=model.observation_space.shape[0]).astype(np.float32)
            with torch.no_grad():
                mean, log_std, _ = model.actor.get_action_dist_params(torch.from_numpy(x)[None])
            act = frozen(rng)
            # Before squashing the samples are Gaussian with the actor's own mean and deviation.
            raw = np.arctanh(np.array([act(x) for _ in range(6000)], np.float64) * (1 - 1e-7))
            np.testing.assert_allclose(raw.mean(0), mean[0], atol=0.06)
            np.testing.assert_allclose(raw.std(0), log_std[0].exp(), rtol=0.06)


def test_frozen_policy_of_discrete_actions_equals_the_model() -> None:
    with isolated_torch():
        model = model_of(job(env_id="HazardGrid-v0"))
        with torch.no_grad():
            model.policy.action_net.bias.copy_(torch.tensor([1.0, 0.0, -1.0, 2.0]))
        act = freeze(model)(np.random.default_rng(0))
        observation = np.zeros(14, np.float32)
        observation[[2, 6]] = 1.0
        with torch.no_grad():
            policy = model.policy.get_distribution(torch.from_numpy(observation)[None])
        draws = np.array([act(observation) for _ in range(8000)])
        np.testing.assert_allclose(draws.mean(0), policy.distribution.probs[0], atol=0.02)
        assert (draws.sum(1) == 1.0).all()
        model.learn(128)


def test_discrete_actions_are_left_to_ppo() -> None:
    messages: list[str] = []
    config = LearnersConfig(ppo=PPOConfig(steps=10), sac=SACConfig(steps=60))
    behaviours = learnt_behaviours("HazardGrid-v0", SPEC, config, seed=0, progress=messages.append)
    assert {b.origin["algorithm"] for b in behaviours} == {"PPO"}
    assert "SAC is left out" in messages[0]


def test_discrete_actions_are_trained_under_a_penalty_too() -> None:
    """A categorical policy has no spread to be widened before it goes on."""
    config = LearnersConfig(cost_limits=(0.1,), ppo=PPOConfig(steps=300, penalised_steps=300))
    behaviours = learnt_behaviours("HazardGrid-v0", SPEC, config, seed=0)
    limits = [b.origin["cost_limit"] for b in behaviours]
    assert limits == [None] * 3 + [0.1] * 3
    act = behaviours[-1].factory(np.random.default_rng(0))
    assert sorted(act(np.zeros(14, np.float32))) == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_discrete_task_without_controllers_is_learnt(seed: int) -> None:
    """The log needs episodes of both kinds; of a policy that learnt little all would be unsafe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PARALLEL_ENVS", 8)
        spec = SafetySpec(accident="terminated")
        config = LearnersConfig(cost_limits=(), ppo=PPOConfig())
        config = module.resolved(config, spec, scripted=False, discrete=True)
        messages: list[str] = []
        learnt_behaviours("CartPole-v1", spec, config, seed=seed, progress=messages.append)
    costs = [float(m.split("cost ")[1].split()[0]) for m in messages]
    assert costs[0] > 0.5
    assert costs[-1] < 0.15


@pytest.mark.parametrize("seed", [2**32 - 2, 2**32 - 1, 2**32, 20241128153000, 2**64, 10**40])
def test_any_seed_of_0_or_more_trains(seed: int) -> None:
    config = LearnersConfig(
        cost_limits=(0.1,), ppo=PPOConfig(steps=10, penalised_steps=10, rollout=16)
    )
    first, second = (
        learnt_behaviours("PointHazard-v0", SPEC, config, seed=s)[-1] for s in (seed, seed + 1)
    )
    x = np.zeros(make_env("PointHazard-v0", SPEC).observation_size, np.float32)
    a, b = (k.factory(np.random.default_rng(0))(x) for k in (first, second))
    assert not np.array_equal(a, b)


def test_narrow_seeds_are_the_seeds_themselves_where_they_fit() -> None:
    assert [narrow_seed(s, module.PARALLEL_ENVS) for s in (0, 1, 2**32 - 2)] == [0, 1, 2**32 - 2]
    hashed = {narrow_seed(s, module.PARALLEL_ENVS) for s in range(2**32, 2**32 + 100)}
    assert len(hashed) == 100
    assert max(hashed) < 2**31


# --- environments that fail ---


class Fails(gymnasium.Env[Any, Any]):
    """A walk of ten steps, each costing 1, that fails as its class says."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    episodes = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.episodes, self.clock = self.episodes + 1, 0
        if self.fails() and self.at == 0:
            raise RuntimeError("no start")
        return np.zeros(1, np.float32), {}

    at = 0
    fails: Any = lambda self: False

    def step(self, action: Any) -> Any:
        self.clock += 1
        if self.fails() and self.clock == self.at:
            raise RuntimeError("did not converge")
        return np.full(1, self.clock, np.float32), 1.0, False, self.clock == 10, {"cost": 1.0}


class FailsAtTheThird(Fails):
    at, fails = 3, lambda self: self.episodes % 2 == 0


class FailsToBegin(Fails):
    at, fails = 0, lambda self: self.episodes % 3 == 1


class FailsAlways(Fails):
    at, fails = 3, lambda self: True


class NeverBegins(Fails):
    at, fails = 0, lambda self: True


class SixValues(Fails):
    def step(self, action: Any) -> Any:
        observation, reward, *ends, info = super().step(action)
        return observation, reward, info["cost"], *ends, info


for _cls in (FailsAtTheThird, FailsToBegin, FailsAlways, NeverBegins, SixValues):
    gymnasium.register(
        f"Learn{_cls.__name__}-v0", f"{__name__}:{_cls.__name__}", max_episode_steps=20
    )


@pytest.mark.promise("R11")
def test_a_failed_episode_is_cut_off_and_counts_nowhere() -> None:
    account = Account()
    env = Penalised(make_env("LearnFailsAtTheThird-v0", SPEC), account)
    act, ends = np.zeros(1, np.float32), []
    env.reset(seed=0)
    for _ in range(10 + 3 + 10):
        observation, reward, terminated, truncated, _ = env.step(act)
        if terminated or truncated:
            ends.append((float(observation[0]), reward, terminated, truncated))
            env.reset()
    # Episodes of 10, of 2 and the failure, and of 10 steps; the failed one has no return, no cost.
    assert ends == [(10.0, 1.0, False, True), (2.0, 0.0, False, True), (10.0, 1.0, False, True)]
    assert account.episodes == [(10.0, 10.0)] * 2
    assert account.dropped.count == 1
    assert "did not converge (test_sb3.py, line" in account.dropped.last


@pytest.mark.promise("R11")
def test_a_start_that_fails_is_tried_again_with_another_seed() -> None:
    account = Account()
    env = Penalised(make_env("LearnFailsToBegin-v0", SPEC), account)
    observation, _ = env.reset(seed=5)
    assert observation.tolist() == [0.0]
    assert account.dropped.count == 1
    env.reset()
    env.reset()
    assert account.dropped.count == 2


@pytest.mark.promise("R11")
@pytest.mark.parametrize("name", ["FailsAtTheThird", "FailsToBegin"])
def test_learners_bear_failing_episodes(name: str) -> None:
    messages: list[str] = []
    config = LearnersConfig(ppo=PPOConfig(steps=300, rollout=32), sac=SACConfig(steps=120))
    learnt_behaviours(f"Learn{name}-v0", SPEC, config, seed=0, progress=messages.append)
    left_out = [m for m in messages if "episodes were left out" in m]
    assert [m.split(":")[0] for m in left_out] == ["training ppo", "training sac"]


@pytest.mark.promise("R11")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FailsAlways", "did not converge"),
        ("NeverBegins", "no start"),
        ("SixValues", r"step\(\) \(observation, reward, terminated, truncated, info\)"),
    ],
)
def test_learners_give_up_an_environment_that_always_fails(name: str, words: str) -> None:
    config = LearnersConfig(ppo=PPOConfig(steps=300, rollout=32))
    with pytest.raises(EnvError, match=f"failed in 10 episodes in a row.*{words}"):
        learnt_behaviours(f"Learn{name}-v0", SPEC, config, seed=0)


def test_penalised_reward_by_hand() -> None:
    account = Account(penalty=3.0)
    env = Penalised(make_env("PointHazard-v0", SPEC), account)
    plain = make_env("PointHazard-v0", SPEC)
    right = np.array([1.0, 0.0], np.float32)
    ended, costs = False, 0.0
    for seed in range(20):  # straight ahead meets the hazard in some episode
        env.reset(seed=seed)
        plain.reset(seed=seed)
        ended, total = False, 0.0
        while not ended:
            reward, (_, wanted, *ends, info) = env.step(right)[1], plain.step(right)
            assert reward == pytest.approx((wanted - 3.0 * info["cost"]) / 4.0)
            total += wanted
            costs += info["cost"]
            ended = any(ends)
        assert account.episodes[-1][0] == pytest.approx(total)
    assert costs == sum(cost for _, cost in account.episodes) > 0.0


def test_adapted_penalty_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penalty, "EPISODES_PER_STEP", 2)
    account = Account(limit=10.0, unit=2.0)
    account.episodes = [(0.0, 20.0)]
    account.adapt()
    assert account.penalty == 0.0  # not enough episodes yet
    account.episodes.append((0.0, 10.0))
    account.adapt()  # mean 15, excess .5: integral .1 * 2 * .5 = .1, and .5 * 2 * .5 beside it
    assert account.penalty == pytest.approx(0.6)
    account.adapt()
    assert account.penalty == pytest.approx(0.6)
    account.episodes += [(0.0, 9.0), (0.0, 9.0)]
    account.adapt()  # excess -.1: integral .08, less .1
    assert account.penalty == 0.0
    account.episodes += [(0.0, 1000.0)] * 2
    account.adapt()  # excess cut at 2: .08 + .4, and 2
    assert account.penalty == pytest.approx(2.48)


def config_of_all() -> LearnersConfig:
    return LearnersConfig(
        penalties=(0.5,),
        cost_limits=(0.1,),
        ppo=PPOConfig(steps=500, penalised_steps=300),
        sac=SACConfig(steps=120, penalised_steps=120),
    )


def test_penalised_policies_go_on_from_the_plain_one() -> None:
    messages: list[str] = []
    behaviours = learnt_behaviours(
        "PointHazard-v0", SPEC, config_of_all(), seed=0, progress=messages.append
    )
    kinds = ["ppo", "sac", "ppo-penalty0.5", "ppo-limit0.1", "sac-penalty0.5", "sac-limit0.1"]
    assert [b.name.rpartition("-")[0] for b in behaviours] == [k for k in kinds for _ in range(3)]
    origins = {b.name.rpartition("-")[0]: b.origin for b in behaviours}  # the last stage of each
    assert origins["ppo"]["steps"] == 768
    assert origins["ppo-penalty0.5"]["steps"] == 768 + 3 * 256  # a rollout a stage
    assert origins["sac-limit0.1"] == {
        "algorithm": "SAC",
        "penalty": origins["sac-limit0.1"]["penalty"],
        "cost_limit": 0.1,
        "stage": 1.0,
        "steps": 240,
    }
    assert origins["sac"]["penalty"] == 0.0
    assert origins["sac-penalty0.5"]["penalty"] == 0.5
    assert any(m.startswith("training sac-limit0.1: 120 of 120 steps") for m in messages)


@pytest.mark.slow
def test_processes_train_the_same_policies() -> None:
    def act(workers: int) -> list[NDArray[np.float32]]:
        config = LearnersConfig(ppo=PPOConfig(steps=10), sac=SACConfig(steps=150))
        behaviours = learnt_behaviours("PointHazard-v0", SPEC, config, seed=3, workers=workers)
        x = np.linspace(-1, 1, make_env("PointHazard-v0", SPEC).observation_size, dtype=np.float32)
        return [b.factory(np.random.default_rng(0))(x) for b in behaviours]

    # The children do not see what the fixture changed, so nor may this process here.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PARALLEL_ENVS", 8)
        patch.setattr(module, "SAC_START", 1000)
        for one, two in zip(act(1), act(2), strict=True):
            assert np.array_equal(one, two)


@pytest.mark.parametrize(
    "settings",
    [{"ppo": PPOConfig(steps=-1)}, {"penalties": (-1.0,)}, {"cost_limits": (1.0, -2.0)}],
)
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LearnersConfig(**settings)
