"""On a GPU: the numbers of the CPU, graphs that do what calls do, runs that are resumed bitwise."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safe_offrl import commands
from safe_offrl.agents.cql import ConservativeCritics, CQLConfig
from safe_offrl.agents.rlpd import RLPD, RLPDConfig
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.cuda_graph import WARM_UPS, CudaGraph
from safe_offrl.compute.descent import FINITE_EVERY, Compute, Descent, Precision
from safe_offrl.compute.device import Device
from safe_offrl.compute.state import collect_state, restore_state
from safe_offrl.data_formats.conversion import convert
from safe_offrl.errors import ConfigError
from safe_offrl.policies.networks import NetworkConfig, Networks
from safe_offrl.record.checkpoints import save_checkpoint
from safe_offrl.record.run import RunDir
from safe_offrl.safety.critic import SafetyCritic, SafetyCriticConfig
from safe_offrl.safety.outlook import AccidentAhead
from safe_offrl.types import Batch, Layout, States
from tests import test_resume
from tests.compute.test_descent import compiles
from tests.test_resume import TINY, Killed, kill_at, record, silent

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
STEPS = 50
# Fixtures: runs of the CPU.
pretrain_plan, pretrained, online = (
    test_resume.pretrain_plan,
    test_resume.pretrained,
    test_resume.online,
)
LAYOUT = Layout(6, 2)
SIZES = NetworkConfig((32, 32), (32, 32), 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA GPU")
def test_a_gpu_that_is_not_there_is_refused_before_anything(tiny_dataset: Path) -> None:
    config = commands.pretrain_config(dataset=str(tiny_dataset), overrides=["device=cuda"])
    with pytest.raises(ConfigError, match="device is cuda, but torch finds no CUDA GPU"):
        commands.plan_pretrain(config, say=silent)
    config = commands.pretrain_config(dataset=str(tiny_dataset), steps=10, overrides=TINY)
    plan = commands.plan_pretrain(config, say=silent)
    assert plan.inputs.device == "cpu"
    assert "device      CPU, 1 thread" in plan.header


def test_a_run_of_a_gpu_is_evaluated_without_one(tmp_path: Path, online: RunDir) -> None:
    # What such a run has and one of a CPU has not: its settings, and a generator of 16 bytes.
    run = RunDir(shutil.copytree(online.path, tmp_path / "run"))
    text = run.config_text.replace("device: cpu", "device: cuda")
    text = text.replace("pretrained: ../offline", f"pretrained: {online.path.parent / 'offline'}")
    assert text.count("device: auto") == 1
    (run.path / "config.yaml").write_text(text.replace("device: auto", "device: cuda"))
    kept = run.load_checkpoint()
    drawn = {"generator/state": torch.zeros(16, dtype=torch.uint8)}
    assert set(drawn) <= set(kept.tensors)
    folder = run.path / "checkpoints"
    save_checkpoint(folder, kept.step, {**kept.tensors, **drawn}, kept.info, kept.counts)
    theirs, ours = (commands.evaluate_run(r.path, episodes=5, say=silent) for r in (run, online))
    assert theirs["mean_return"] == ours["mean_return"]


@needs_gpu
def test_a_recorded_call_is_a_call() -> None:
    # x <- x + a b each time, whatever is given: warm-ups, the recording and replays alike.
    x = torch.zeros(3, device="cuda")
    told: list[int] = []

    def add(pair: tuple[Tensor, Tensor], offset: object) -> tuple[Tensor, Tensor]:
        told.append(1)
        x.add_(pair[0] * pair[1])
        return x.sum(), pair[0] + 1.0

    graph, total = CudaGraph(add), 0.0
    kept = []
    for k in range(1, 9):
        a, b = torch.full((3,), float(k), device="cuda"), torch.tensor(2.0, device="cuda")
        kept.append(graph((a, b), None))
        total += 3 * 2.0 * k
        assert float(kept[-1][0]) == total
    assert len(told) == WARM_UPS + 1
    assert [float(one[0]) for one in kept] == [6.0, 18.0, 36.0, 60.0, 90.0, 126.0, 168.0, 216.0]
    assert kept[-2][1].tolist() == [8.0] * 3  # a later call leaves earlier values alone
    # Another object or shape is another function.
    graph((torch.ones(1, device="cuda"), torch.ones(1, device="cuda")), None)
    assert len(told) == WARM_UPS + 2
    assert x.tolist() == [73.0] * 3


def batch_of(generator: torch.Generator, n: int = 64) -> Batch:
    batch = LAYOUT.unpack(torch.randn(n, LAYOUT.width, generator=generator))
    return batch._replace(
        actions=batch.actions.tanh(),
        terminated=(batch.terminated > 1.0).float(),
        accidents=(batch.accidents > 1.0).float(),
        time_to_go=torch.rand(n, generator=generator),
    )


def moved(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        parts = [moved(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def learnt(device: Device, *, compiled: bool, precision: Precision) -> list[Tensor]:
    """Losses and parameters after some updates of three learners, the same on every device."""
    compute = Compute(compiled, precision, device)
    drawn = torch.Generator().manual_seed(1)

    def place(*values: object) -> tuple[object, ...]:
        return tuple(moved(value, device) for value in values)

    here, there = torch.Generator().manual_seed(0), torch.Generator(device)
    first = Networks(*LAYOUT.sizes, SIZES, here)
    critic = SafetyCritic(
        *LAYOUT.sizes, AccidentAhead(50), SafetyCriticConfig(hidden=(32, 32)), here
    )
    nets = Networks(*LAYOUT.sizes, SIZES, there)
    risky = SafetyCritic(*LAYOUT.sizes, critic.outlook, critic.config, there, compute)
    restore_state(nets.parts(), collect_state(first.parts()))
    restore_state(
        {"net": risky.net, "target": risky.target},
        collect_state({"net": critic.net, "target": critic.target}),
    )
    learner = RLPD(nets, RLPDConfig(), there, compute)
    cql = ConservativeCritics(nets, CQLConfig(actions=2), compute, calibrated=True)
    descents = (
        Descent(learner.critic_loss, learner.critic_optimizer, compute),
        Descent(cql.critic_loss, cql.critic_optimizer, compute),
        Descent(risky.loss, risky.optimizer, compute),
        Descent(learner.actor_loss, learner.actor_optimizer, compute),
    )
    values: list[Tensor] = []
    for _ in range(STEPS):
        batch = batch_of(drawn)
        noise = [torch.randn(64, 2, generator=drawn) for _ in range(4)]
        many = [torch.randn(2, 64, 2, generator=drawn).tanh() for _ in range(3)]
        weights = torch.rand(64, generator=drawn)
        states = States.at_start(torch.randn(16, 6, generator=drawn))
        members = torch.randperm(4, generator=drawn)[:2]
        values += descents[0](*place(batch, noise[0], members))
        values += descents[1](*place(batch, noise[1], (many[0], many[1]), many[2]))
        values += descents[2](
            *place(batch, weights), nets.actor, *place(states, (*noise[:2], noise[2][:16]), None)
        )
        values += descents[3](
            *place(batch, noise[3]), risky.plain_risk, *place(torch.tensor(1.0), None, weights[0])
        )
    state = collect_state({**nets.parts(), **risky.parts()})
    return [value.cpu() for value in [*values, *state.values()]]


@needs_gpu
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=compiles)])
def test_the_numbers_are_those_of_the_cpu(compiled: bool) -> None:
    ours = learnt("cuda", compiled=compiled, precision="fp32")
    for mine, expected in zip(ours, learnt("cpu", compiled=False, precision="fp32"), strict=True):
        torch.testing.assert_close(mine, expected, rtol=2e-3, atol=2e-4)


@needs_gpu
def test_bf16_is_near_fp32() -> None:
    ours = learnt("cuda", compiled=False, precision="bf16")
    exact = learnt("cuda", compiled=False, precision="fp32")
    losses = [pair for pair in zip(ours, exact, strict=True) if pair[0].ndim == 0]
    assert any(not torch.equal(mine, other) for mine, other in losses)
    for mine, other in losses:
        assert float(mine) == pytest.approx(float(other), rel=0.1, abs=0.05)


@needs_gpu
@pytest.mark.promise("R9")
@pytest.mark.parametrize("when", [1, WARM_UPS + 5])
def test_what_is_not_finite_moves_nothing_and_stops(when: int) -> None:
    x = torch.ones(3, device="cuda", requires_grad=True)
    optimizer = Adam([x], 0.1)

    def loss(factor: Tensor) -> tuple[Tensor]:
        return ((factor * x).square().sum(),)

    descend = Descent(loss, optimizer, Compute(device="cuda"))
    for _ in range(when - 1):
        descend(torch.tensor(1.0, device="cuda"))
    before, steps = x.detach().clone(), optimizer.state_dict()["0.step"].clone()
    descend(torch.tensor(math.nan, device="cuda"))
    assert torch.equal(x, before)
    assert torch.equal(optimizer.state_dict()["0.step"], steps)
    for _ in range(FINITE_EVERY - when - 1):
        descend(torch.tensor(1.0, device="cuda"))
    with pytest.raises(FloatingPointError, match=r"is not finite\. The optimiser did not step"):
        descend(torch.tensor(1.0, device="cuda"))


# --- runs ---

ON_GPU = [*TINY, "device=cuda"]
ONLINE = ["warmup_steps=400", "iteration_steps=200", "batch_size=32", "device=cuda"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def offline_plan(dataset: Path, agent: str) -> commands.PretrainPlan:
    config = commands.pretrain_config(dataset=str(dataset), agent=agent, steps=60, overrides=ON_GPU)
    return commands.plan_pretrain(config, say=silent)


@needs_gpu
@pytest.mark.promise("R1")
@pytest.mark.parametrize("agent", ["iql", "calql", "latent"])
def test_runs_are_resumed_bitwise_and_used_without_a_gpu(
    root: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch, agent: str
) -> None:
    plan = offline_plan(tiny_dataset, agent)
    assert torch.cuda.get_device_name() in plan.header
    whole = commands.pretrain_run(plan, name=f"{agent}-whole", runs=root, say=silent)
    with monkeypatch.context() as patch:
        kill_at(patch, "log", 4)
        with pytest.raises(Killed):
            commands.pretrain_run(
                plan, name=f"{agent}-cut", runs=root, checkpoint_seconds=0.0, say=silent
            )
    assert whole.read_json("versions.json")["gpu"] == torch.cuda.get_device_name()
    again = commands.resume_pretrain(f"{agent}-cut", runs=root, say=silent)
    assert record(again) == record(whole)

    def online(name: str, *, kill: bool = False) -> None:
        config = commands.finetune_config(whole, budget=1500, overrides=ONLINE)
        online_plan = commands.plan_finetune(whole, config, accept_risk=True)
        commands.finetune_run(
            online_plan, name=name, runs=root, checkpoint_seconds=0.0 if kill else 1e9, say=silent
        )

    online(f"{agent}-online")
    with monkeypatch.context() as patch:
        kill_at(patch, "append_episode", 9)
        with pytest.raises(Killed):
            online(f"{agent}-online-cut", kill=True)
    resumed = commands.resume_finetune(f"{agent}-online-cut", runs=root, say=silent)
    finished = RunDir(root / f"{agent}-online")
    assert record(resumed) == record(finished)
    assert finished.iterations()
    # What was learnt there acts anywhere.
    assert commands.evaluate_run(finished.path, episodes=5, say=silent)


@needs_gpu
def test_a_memory_map_stays_on_disk_and_teaches_the_same(root: Path, tiny_dataset: Path) -> None:
    mapped = root / "tiny.mmap"
    convert(tiny_dataset, mapped)
    found = {}
    for name, dataset in (("memory", tiny_dataset), ("mapped", mapped)):
        run = commands.pretrain_run(
            offline_plan(dataset, "iql"), name=f"iql-{name}", runs=root, say=silent
        )
        config = commands.finetune_config(run, budget=1000, overrides=ONLINE)
        plan = commands.plan_finetune(run, config, accept_risk=True)
        online = commands.finetune_run(plan, name=f"online-{name}", runs=root, say=silent)
        found[name] = run.load_checkpoint(), online.load_checkpoint()
    for a, b in zip(found["memory"], found["mapped"], strict=True):
        assert a.tensors.keys() == b.tensors.keys()
        assert all(torch.equal(a.tensors[key], b.tensors[key]) for key in a.tensors)
