"""Fifty seeded steps of every algorithm, compared with what they gave at the last review.

A difference here means: the update rule changed. If that was intended, write new numbers with

    python tests/test_golden.py

and say in the change why they moved. Settings are spelt out below, so that tuning a default does
not touch these files.
"""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from safe_offrl.agents import AGENTS, AgentConfigs, kind_of, online_agent
from safe_offrl.agents.awac import AWACConfig
from safe_offrl.agents.awr import AWRConfig
from safe_offrl.agents.bc import BCConfig
from safe_offrl.agents.bcq import BCQConfig
from safe_offrl.agents.bcq_discrete import DiscreteBCQConfig
from safe_offrl.agents.bear import BEARConfig
from safe_offrl.agents.brac import BRACConfig
from safe_offrl.agents.ccil import CCILConfig
from safe_offrl.agents.combo import COMBOConfig
from safe_offrl.agents.cql import CQLConfig
from safe_offrl.agents.crr import CRRConfig
from safe_offrl.agents.dagger import DAggerConfig
from safe_offrl.agents.dqn import DQNConfig
from safe_offrl.agents.extraction import ExtractionConfig
from safe_offrl.agents.fql import FQLConfig
from safe_offrl.agents.gail import GAILConfig
from safe_offrl.agents.idql import IDQLConfig
from safe_offrl.agents.iql import IQLConfig
from safe_offrl.agents.latent import LatentConfig
from safe_offrl.agents.mopo import MOPOConfig
from safe_offrl.agents.morel import MOReLConfig
from safe_offrl.agents.qc import QCConfig
from safe_offrl.agents.qrdqn import QRDQNConfig
from safe_offrl.agents.rlpd import RLPD, RLPDConfig
from safe_offrl.agents.spibb import SoftSPIBBConfig, SPIBBConfig
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.agents.td3bc import ReBRACConfig, TD3BCConfig
from safe_offrl.agents.world_model import ModelConfig
from safe_offrl.compute.descent import EAGER, Compute
from safe_offrl.compute.state import Part, collect_state
from safe_offrl.data.dataset import Dataset
from safe_offrl.policies.networks import Actor, NetworkConfig, Networks
from safe_offrl.safety.critic import SafetyCritic, SafetyCriticConfig
from safe_offrl.safety.outlook import AccidentAhead
from safe_offrl.types import Batch, Layout, States
from tests.agents.setups import agents_for, setup_of

FOLDER = Path(__file__).parent / "golden"
STEPS, LOGGED = 50, (1, 10, 25, 50)
LAYOUT = Layout(observation_size=4, action_size=2)
SIZES = NetworkConfig(actor_hidden=(16, 16), critic_hidden=(16, 16), critics=4)
COMMON = {"learning_rate": 1e-3, "discount": 0.97, "tau": 0.01}
MODEL = ModelConfig(learning_rate=1e-3, hidden=(16, 16), share=0.4)
CONFIGS = AgentConfigs(
    mopo=MOPOConfig(**COMMON, penalty=1.0, rollout_steps=3, real_share=0.05, model=MODEL),
    morel=MOReLConfig(**COMMON, rollout_steps=3, real_share=0.05, model=MODEL),
    combo=COMBOConfig(**COMMON, beta=0.5, rollout_steps=3, real_share=0.5, model=MODEL),
    bc=BCConfig(learning_rate=1e-3),
    awr=AWRConfig(learning_rate=1e-3, discount=0.97, temperature=1.0, weight_limit=20.0),
    awac=AWACConfig(**COMMON, temperature=2.0),
    crr=CRRConfig(**COMMON, weighting="exp", temperature=1.0, weight_limit=20.0),
    ccil=CCILConfig(
        learning_rate=1e-3,
        model_learning_rate=1e-3,
        hidden=(16, 16),
        share=0.4,
        lipschitz=3.0,
        nearest=0.4,
        accurate=0.9,
    ),
    gail=GAILConfig(learning_rate=1e-3, discount=0.97),
    dagger=DAggerConfig(learning_rate=1e-3),
    iql=IQLConfig(**COMMON, expectile=0.7),
    cql=CQLConfig(**COMMON, alpha=1.0, actions=5),
    latent=LatentConfig(**COMMON, expectile=0.7, kl_weight=0.1),
    idql=IDQLConfig(**COMMON, expectile=0.7, temperature=0.05),
    bcq=BCQConfig(**COMMON, perturbation=0.05, temperature=0.05),
    qc=QCConfig(**COMMON, temperature=0.05),
    fql=FQLConfig(**COMMON, weight=0.3, aggregate="mean"),
    dqn=DQNConfig(**COMMON, temperature=0.02),
    qrdqn=QRDQNConfig(**COMMON, quantiles=8, temperature=0.02),
    bcq_discrete=DiscreteBCQConfig(**COMMON, threshold=0.3, temperature=0.02),
    spibb=SPIBBConfig(learning_rate=1e-3, discount=0.97, n_wedge=35),
    soft_spibb=SoftSPIBBConfig(learning_rate=1e-3, discount=0.97, epsilon=0.3, delta=1.0),
    td3bc=TD3BCConfig(**COMMON, alpha=2.5, deployment_noise=0.1),
    rebrac=ReBRACConfig(**COMMON, actor_weight=0.05, critic_weight=0.02, deployment_noise=0.1),
    brac=BRACConfig(**COMMON, actor_weight=0.1, critic_weight=0.05, components=3),
    bear=BEARConfig(
        **COMMON,
        threshold=0.05,
        sigma=20.0,
        samples=4,
        multiplier_learning_rate=0.01,
        components=3,
    ),
)
EXTRACTION = ExtractionConfig(
    learning_rate=1e-3, weight=0.1, components=3, inverse_temperature=3.0, weight_limit=100.0
)
LEARNER = RLPDConfig(**COMMON, subset=2, target_entropy=-0.5, temperature_init=0.05)
SAFETY = SafetyCriticConfig(
    members=3,
    reference=1,
    hidden=(16, 16),
    learning_rate=1e-3,
    tau=0.01,
    target_gap=0.02,
    alpha_init=0.01,
    alpha_max=0.1,
    alpha_learning_rate=0.01,
)

Step = Callable[[Batch], dict[str, Tensor]]


def batches() -> list[Batch]:
    """A stationary little task: the reward prefers an action that depends on the state."""
    g = torch.Generator().manual_seed(11)
    result = []
    for _ in range(STEPS):
        observations = torch.randn(32, 4, generator=g)
        actions = 2.0 * torch.rand(32, 2, generator=g) - 1.0
        rewards = -(actions - torch.tanh(observations[:, :2])).square().sum(-1)
        accidents = (actions[:, 0] + 0.3 * observations[:, 2] > 0.8).float()
        result.append(
            Batch(
                observations=observations,
                actions=actions,
                rewards=rewards,
                accidents=accidents,
                costs=accidents,
                next_observations=observations + 0.1 * torch.randn(32, 4, generator=g),
                terminated=accidents,
                time_to_go=(torch.randint(1, 21, (32,), generator=g)) / 20.0,
                return_to_go=rewards * 5.0,
            )
        )
    return result


@functools.cache
def log() -> Dataset:
    """The same as a log of episodes, for whoever draws batches of its own."""
    rows = torch.cat([LAYOUT.pack(batch) for batch in batches()])
    starts = np.arange(0, len(rows) + 1, 32)
    return Dataset(rows, LAYOUT, starts, np.zeros(len(rows), bool), 32, "")


def risk(observations: Tensor, time_to_go: Tensor, actions: Tensor) -> Tensor:
    return torch.sigmoid(3.0 * actions[:, 0] - 2.0)


def offline(name: str, compute: Compute = EAGER) -> tuple[Step, dict[str, Part]]:
    generator = torch.Generator().manual_seed(0)
    discrete = name not in agents_for(discrete=False)
    networks = Networks(*LAYOUT.sizes, SIZES, generator, kind_of(name, discrete=discrete))
    setup = setup_of(
        networks,
        generator,
        tabular_log() if "spibb" in name else log(),
        compute=compute,
        extraction=EXTRACTION,
        steps=STEPS,
    )
    agent = AGENTS[name](setup, CONFIGS.settings_for(AGENTS[name]))
    steering = Steering((Penalty(risk, torch.tensor(2.0)),))
    parts = {part.rpartition(".")[2]: value for part, value in agent.parts().items()}
    given = choices if discrete else lambda batch: batch
    return lambda batch: agent.update(given(batch), steering), parts


def online(name: str, compute: Compute = EAGER) -> tuple[Step, dict[str, Part]]:
    """Of whoever is behaviour cloning offline."""
    generator = torch.Generator().manual_seed(0)
    networks = Networks(*LAYOUT.sizes, SIZES, generator, kind_of(name, discrete=False))
    anchor = Actor(*LAYOUT.sizes, (16, 16), generator, networks.actor.kind)
    setup = setup_of(networks, generator, log(), compute=compute, learner=LEARNER)
    steering = Steering((Penalty(risk, torch.tensor(2.0)),), anchor, torch.tensor(0.5))
    learner = online_agent(name, setup, CONFIGS)

    def step(batch: Batch) -> dict[str, Tensor]:
        return learner.update_critics(batch) | learner.update_actor(batch, steering)

    return step, learner.parts()


def choices(batch: Batch) -> Batch:
    """The larger number of an action for the action, one-hot."""
    return batch._replace(actions=torch.eye(2)[batch.actions.argmax(1)])


def tabular_log() -> Dataset:
    """The signs of the observations are sixteen states."""
    batch = Batch(*(torch.cat(x) for x in zip(*(b.tensors for b in batches()), strict=True)))
    signs = batch.observations.sign(), batch.next_observations.sign()
    batch = choices(batch)._replace(observations=signs[0], next_observations=signs[1])
    n = len(batch.rewards)
    return Dataset(LAYOUT.pack(batch), LAYOUT, np.arange(n + 1), np.zeros(n, bool), 20, "")


def rlpd(compute: Compute = EAGER) -> tuple[Step, dict[str, Part]]:
    generator = torch.Generator().manual_seed(0)
    networks = Networks(*LAYOUT.sizes, SIZES, generator)
    learner = RLPD(networks, LEARNER, generator, compute)
    anchor = Actor(*LAYOUT.sizes, (16, 16), generator)
    steering = Steering((Penalty(risk, torch.tensor(2.0)),), anchor, torch.tensor(0.5))

    def step(batch: Batch) -> dict[str, Tensor]:
        return learner.update_critics(batch) | learner.update_actor(batch, steering)

    return step, learner.parts()


def csc(compute: Compute = EAGER) -> tuple[Step, dict[str, Part]]:
    generator = torch.Generator().manual_seed(0)
    critic = SafetyCritic(*LAYOUT.sizes, AccidentAhead(20), SAFETY, generator, compute)
    actor = Actor(*LAYOUT.sizes, (16, 16), generator)
    weights = torch.linspace(0.5, 1.5, 32)

    def step(batch: Batch) -> dict[str, Tensor]:
        return critic.update(
            batch, weights, actor, States.at_start(batch.observations[:8]), generator, floor=0.2
        )

    return step, critic.parts()


ALGORITHMS: dict[str, Callable[..., tuple[Step, dict[str, Part]]]] = {
    **{name: functools.partial(offline, name) for name in AGENTS if name != "bc_safe"},
    "gail": functools.partial(online, "gail"),
    "dagger": functools.partial(online, "dagger"),
    "rlpd": rlpd,
    "csc": csc,
}


def measure(name: str) -> dict[str, Any]:
    """Metrics at some steps, and the norm of every state tensor at the end."""
    step, parts = ALGORITHMS[name]()
    metrics: dict[str, list[float]] = {}
    for i, batch in enumerate(batches(), start=1):
        values = step(batch)
        if i in LOGGED:
            for key, value in values.items():
                metrics.setdefault(key, []).append(float(value))
    norms = {key: float(value.double().norm()) for key, value in collect_state(parts).items()}
    return {"steps": LOGGED, "metrics": metrics, "norms": norms}


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_fifty_steps_give_the_golden_numbers(name: str) -> None:
    golden = json.loads((FOLDER / f"{name}.json").read_bytes())
    measured = measure(name)
    assert list(measured["metrics"]) == list(golden["metrics"])
    for key, values in golden["metrics"].items():
        assert measured["metrics"][key] == pytest.approx(values, rel=1e-4, abs=1e-6), key
        assert all(map(math.isfinite, values))
    assert measured["norms"] == pytest.approx(golden["norms"], rel=1e-4, abs=1e-6)


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(ALGORITHMS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for algorithm in ALGORITHMS:
        text = json.dumps(measure(algorithm), indent=1) + "\n"
        (FOLDER / f"{algorithm}.json").write_text(text, encoding="utf-8")
