"""An exported file does what the policy behind its shield does, and says which policy that is."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from safe_offrl import cli, commands
from safe_offrl.commands.export import _interface
from safe_offrl.deploy import export
from safe_offrl.deploy.export import FORMATS, Arrays, Runner, compare
from safe_offrl.deploy.graph import Inputs, Outputs, PolicyGraph
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.env.make import make_env
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.policies.acting import NumpyActor
from safe_offrl.policies.networks import Actor
from safe_offrl.policy import load_policy
from safe_offrl.record.final_policy import FinalPolicy, final_policy
from safe_offrl.record.run import RunDir
from safe_offrl.safety.calibration import CalibrationReport
from safe_offrl.safety.critic import SafetyCritic, SafetyCriticConfig
from safe_offrl.safety.outlook import AccidentAhead
from safe_offrl.safety.shield import Shield, ShieldConfig
from safe_offrl.spec import SafetySpec
from safe_offrl.types import Normalizer

TINY = ["steps=60", "alignment_steps=20", "log_every=20", "batch_size=32"]
TINY += ["networks.actor_hidden=[16]", "networks.critic_hidden=[16]", "critic.hidden=[16,16]"]
# Actions differ little to an untrained critic: a small margin lets some of them pass.
ONLINE = ["warmup_steps=200", "iteration_steps=200", "batch_size=32", "shielding.margin=0.005"]


def silent(text: str) -> None:
    pass


def make_run(env_id: str, dataset: Path, root: Path) -> RunDir:
    """A run whose shield acts, whatever its calibration report says of an untrained critic."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CalibrationReport, "shield_acts", True)
        config = commands.pretrain_config(env=env_id, dataset=str(dataset), overrides=TINY)
        plan = commands.plan_pretrain(config, say=silent)
        pretrained = commands.pretrain_run(plan, name="offline", runs=root, say=silent)
    settings = commands.finetune_config(pretrained, budget=400, overrides=ONLINE)
    online = commands.plan_finetune(pretrained, settings, accept_risk=True)
    return commands.finetune_run(online, name="online", runs=root, say=silent)


@pytest.fixture(scope="module")
def continuous(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> RunDir:
    return make_run("PointHazard-v0", tiny_dataset, tmp_path_factory.mktemp("continuous"))


@pytest.fixture(scope="module")
def discrete(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    root = tmp_path_factory.mktemp("discrete")
    log, overrides = root / "grid.hdf5", ["learners.ppo.steps=0"]
    commands.collect_run(
        env="HazardGrid-v0", out=log, transitions=2500, overrides=overrides, say=silent
    )
    return make_run("HazardGrid-v0", log, root)


@pytest.fixture(scope="module")
def final(continuous: RunDir) -> FinalPolicy:
    return final_policy(continuous)


def exported(run: RunDir, file_format: str, folder: Path) -> tuple[dict[str, Any], Runner]:
    path = folder / "made" / f"policy.{file_format}"
    commands.export_run(run.path, file_format=file_format, out=path, say=silent)
    manifest = json.loads(path.with_name(f"policy.{file_format}.json").read_bytes())
    return manifest, FORMATS[file_format].open(path.read_bytes())


def play_both(
    run: RunDir, play: Runner, manifest: dict[str, Any], steps: int, *, deterministic: bool = False
) -> tuple[list[Any], list[Any], int]:
    """Episodes in which predict and the file see the same and draw the same.

    Returns the actions of both, and in how many steps the shield took another than the first.
    """
    policy = load_policy(run.path, seed=5)
    shield, actor = policy._policy.shield, policy._policy.sampler
    assert isinstance(actor, NumpyActor)
    choose = shield.choose
    chosen: list[tuple[Any, bool]] = []

    def spy(*arguments: Any, **options: Any) -> tuple[Any, bool]:
        chosen.append(choose(*arguments, **options))
        return chosen[-1]

    shield.choose = spy  # type: ignore[method-assign]
    env = gymnasium.make(manifest["environment"]["id"])
    draws, horizon = manifest["inputs"][2]["shape"][1], manifest["environment"]["horizon"]
    wanted, given = [], []
    ended, episodes, state = True, 0, None
    observation: Any = None
    for _ in range(steps):
        if ended:
            observation, _ = env.reset(seed=episodes)
            episodes, state = episodes + 1, None
        rng = copy.deepcopy(policy._rng)
        noise = actor.noise(draws - deterministic, rng)
        if deterministic:
            noise = np.concatenate([np.zeros((1, noise.shape[1])), noise])
        played = state[0] if state is not None else 0
        result = play(
            {
                "observation": np.asarray(observation, np.float32).reshape(1, -1),
                "time_to_go": np.asarray([max(0.0, 1.0 - played / horizon)], np.float32),
                "noise": noise[None].astype(np.float32),
            }
        )
        action, state = policy.predict(observation, state, deterministic=deterministic)
        assert bool(result["intervened"][0]) == chosen[-1][1]
        wanted.append(action)
        given.append(result["action"][0])
        observation, _, terminated, truncated, _ = env.step(action)
        ended = terminated or truncated
    return wanted, given, sum(replaced for _, replaced in chosen)


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_thousand_actions_are_those_of_predict(
    continuous: RunDir, tmp_path: Path, file_format: str
) -> None:
    manifest, play = exported(continuous, file_format, tmp_path)
    wanted, given, replaced = play_both(continuous, play, manifest, 1000)
    np.testing.assert_allclose(given, wanted, rtol=0.0, atol=1e-5)
    assert 100 <= replaced <= 900


def test_with_the_first_draw_zero_they_are_those_of_deterministic_predict(
    continuous: RunDir, tmp_path: Path
) -> None:
    manifest, play = exported(continuous, "torchscript", tmp_path)
    wanted, given, replaced = play_both(continuous, play, manifest, 300, deterministic=True)
    np.testing.assert_allclose(given, wanted, rtol=0.0, atol=1e-5)
    assert 30 <= replaced <= 270


@pytest.mark.parametrize(
    ("file_format", "deterministic"),
    [("onnx", False), ("torchscript", False), ("torchscript", True)],
)
def test_discrete_actions_are_those_of_predict(
    discrete: RunDir, tmp_path: Path, file_format: str, deterministic: bool
) -> None:
    manifest, play = exported(discrete, file_format, tmp_path)
    wanted, given, replaced = play_both(discrete, play, manifest, 1000, deterministic=deterministic)
    assert given == wanted
    assert len(set(wanted)) > 2
    assert 50 <= replaced <= 950


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_policy_without_a_shield(continuous: RunDir, tmp_path: Path, file_format: str) -> None:
    run = RunDir(continuous.path.parent / "offline")
    manifest, play = exported(run, file_format, tmp_path)
    wanted, given, replaced = play_both(run, play, manifest, 150)
    np.testing.assert_allclose(given, wanted, rtol=0.0, atol=1e-5)
    assert replaced == 0
    assert not manifest["shield"]["acts"]
    assert manifest["inputs"][2]["shape"] == ["batch", 1, 2]


@pytest.mark.parametrize("file_format", FORMATS)
def test_rows_of_a_batch_are_independent_and_nan_is_no_action(
    final: FinalPolicy, file_format: str
) -> None:
    graph = graph_of(final)
    play = FORMATS[file_format].open(FORMATS[file_format].write(graph))
    arrays = export._examples(graph, final.policy)
    together = play(arrays)
    assert 0 < together["intervened"].sum() < len(together["intervened"])
    for row in range(5):
        alone = play({name: x[row : row + 1] for name, x in arrays.items()})
        for name, values in alone.items():
            np.testing.assert_allclose(values[0], together[name][row], rtol=0.0, atol=1e-6)
    arrays["observation"][3, 1] = np.nan
    arrays["observation"][4, 1] = np.inf
    arrays["time_to_go"][6] = np.nan
    broken = play(arrays)
    np.testing.assert_array_equal(
        np.isnan(broken["action"]).all(1), np.isin(np.arange(len(broken["action"])), [3, 4, 6])
    )


# --- the graph by itself ---


def graph_of(final: FinalPolicy) -> PolicyGraph:
    space = final.env.env.action_space
    assert isinstance(space, gymnasium.spaces.Box)
    return PolicyGraph(final.policy, space)


def by_hand(
    *, mean: float, slope: float, space: gymnasium.spaces.Box, candidates: int = 3
) -> PolicyGraph:
    """Action tanh(mean + noise) with risk sigmoid(slope * action); a margin of .1."""
    actor = Actor(1, 1, (), torch.Generator().manual_seed(0))
    config = SafetyCriticConfig(hidden=())
    critic = SafetyCritic(1, 1, AccidentAhead(10), config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        weight, bias = actor.parameters()
        weight.zero_()
        bias.copy_(torch.tensor([mean, math.atanh(5.0 / 3.5 - 1.0)]))  # standard deviation 1
        critic.net.output.weight.zero_()
        critic.net.output.weight[: config.reference, 2] = slope
        critic.net.output.weight[config.reference :, 2] = -100.0  # they have no say
        critic.net.output.bias.zero_()
    shield = Shield.from_critic(
        critic, ShieldConfig(candidates=candidates, margin=0.2), 0.5, acts=True
    )
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    return PolicyGraph(DeployedPolicy.from_actor(actor, shield, Normalizer(zero, one), 0), space)


def act(graph: PolicyGraph, *noise: float) -> tuple[Any, bool]:
    """(action, whether the shield intervened) at one observation."""
    inputs = Inputs(torch.zeros(1, 1), torch.ones(1), torch.tensor(noise).view(1, -1, 1))
    result = Outputs(*graph(*inputs))
    return result.action.item(), bool(result.intervened.item())


UNIT = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
close = functools.partial(pytest.approx, abs=1e-6)


def test_the_choice_by_hand() -> None:
    """Risks sigmoid(a): at a = tanh(-.5), tanh(.5), tanh(1.5) they are .386, .614 and .712."""
    graph = by_hand(mean=0.5, slope=1.0, space=UNIT)
    tanh = math.tanh
    assert act(graph, -1.0, 0.0, 1.0) == (close(tanh(-0.5)), False)
    assert act(graph, 0.0, -1.0, 1.0) == (close(tanh(-0.5)), True)  # .228 above the least
    assert act(graph, 1.0, 0.0, 0.0) == (close(tanh(1.5)), False)  # .098 above: within the margin
    assert act(graph, 1.0, 0.0, -1.0) == (close(tanh(-0.5)), True)
    # The first within the margin, not the least risky: a = tanh(-.2) has .451, .065 above.
    assert act(graph, 1.0, -0.7, -1.0) == (close(tanh(-0.2)), True)


def test_how_close_a_choice_is_by_hand() -> None:
    """Of the risks .386, .614 and .712 the second is .128 from passing, the least always does."""
    graph = by_hand(mean=0.5, slope=1.0, space=UNIT)

    def closeness(*noise: float) -> float:
        noise_of = torch.tensor(noise).view(1, -1, 1)
        return graph.closeness(Inputs(torch.zeros(1, 1), torch.ones(1), noise_of)).item()

    def risk(noise: float) -> float:
        return 1.0 / (1.0 + math.exp(-math.tanh(0.5 + noise)))

    assert closeness(-1.0, 0.0, 1.0) == close(risk(0.0) - risk(-1.0) - 0.1)
    assert closeness(1.0, 1.0, 1.0) == close(0.1)


def test_nan_does_not_pass_where_a_runtime_swallows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ReLU that makes 0 of a NaN gives an action that is none a risk that looks fine."""
    graph = by_hand(mean=0.5, slope=10.0, space=UNIT)
    monkeypatch.setattr(graph, "_risks", lambda _, options: torch.zeros(options.shape[:2]))
    assert act(graph, 0.0, 0.0, 0.0) == (close(math.tanh(0.5)), False)
    assert act(graph, math.nan, math.nan, 0.0) == (close(math.tanh(0.5)), True)
    action, _ = act(graph, math.nan, math.nan, math.nan)
    assert math.isnan(action)


def test_actions_are_in_the_environments_units() -> None:
    space = gymnasium.spaces.Box(np.float32(10.0), np.float32(30.0), (1,), np.float32)
    graph = by_hand(mean=0.5, slope=0.0, space=space)
    action, _ = act(graph, -1.0, 0.0, 0.0)
    assert action == pytest.approx(20.0 + 10.0 * math.tanh(-0.5))
    assert act(graph, 1e6, 0.0, 0.0)[0] == 30.0
    # -0.7 + (0.5 - -0.7) is 0.50000006 in float32.
    space = gymnasium.spaces.Box(np.float32(-0.7), np.float32(0.5), (1,), np.float32)
    assert act(by_hand(mean=0.5, slope=0.0, space=space), 1e6, 0.0, 0.0)[0] == 0.5


def test_numbers_of_discrete_actions_start_where_the_space_does(discrete: RunDir) -> None:
    final = final_policy(discrete)
    at_zero = PolicyGraph(final.policy, gymnasium.spaces.Discrete(4))
    at_seven = PolicyGraph(final.policy, gymnasium.spaces.Discrete(4, start=7))
    arrays = export._examples(at_zero, final.policy)
    arrays["observation"][5] = np.nan
    inputs = [torch.from_numpy(arrays[name]) for name in Inputs._fields]
    numbers = Outputs(*at_zero(*inputs)).action
    assert set(numbers.tolist()) == {-1, 0, 1, 2, 3}
    assert (numbers == -1).nonzero().tolist() == [[5]]
    assert torch.equal(Outputs(*at_seven(*inputs)).action, numbers + 7)
    final.env.close()


# --- what is written ---


@pytest.mark.parametrize(
    "damage",
    [
        lambda graph: graph.mean.add_(0.01),
        lambda graph: graph.std.mul_(1.01),
        lambda graph: graph.actor.layers[-1].bias.add_(0.001),
        lambda graph: graph.risk_net.output.weight.neg_(),
        lambda graph: graph.high.add_(0.001),
        lambda graph: setattr(graph, "margin", 1.0),
    ],
    ids=["mean", "std", "policy", "risk", "units", "margin"],
)
def test_a_file_that_is_another_policy_is_noticed(final: FinalPolicy, damage: Any) -> None:
    graph, damaged = graph_of(final), graph_of(final)
    with torch.no_grad():
        damage(damaged)

    def compared(which: PolicyGraph) -> export.Comparison:
        play = export.open_torchscript(export.to_torchscript(which))
        return compare(play, graph, final.env, final.policy)

    assert compared(graph).same
    assert compared(graph).difference < 1e-5
    assert not compared(damaged).same


@pytest.mark.parametrize("name", Outputs._fields)
def test_every_output_is_compared(final: FinalPolicy, name: str) -> None:
    graph = graph_of(final)
    honest = export.open_torchscript(export.to_torchscript(graph))

    def wrong(arrays: Arrays) -> Arrays:
        result = honest(arrays)
        changed = result[name].copy()
        changed[::10] = ~changed[::10] if changed.dtype == bool else changed[::10] + 0.001
        return {**result, name: changed}

    parts = graph, final.env, final.policy
    assert compare(honest, *parts).same
    assert not compare(wrong, *parts).same


def test_nothing_is_written_if_they_differ(
    continuous: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(graph: PolicyGraph) -> bytes:
        graph.margin /= 2.0
        data = export.to_torchscript(graph)
        graph.margin *= 2.0
        return data

    path = tmp_path / "policy.pt"
    path.write_bytes(b"the one before")
    wrong = FORMATS["torchscript"]._replace(write=half)
    monkeypatch.setitem(FORMATS, "torchscript", wrong)
    with pytest.raises(RunError, match="Nothing was written"):
        commands.export_run(continuous.path, file_format="torchscript", out=path, say=silent)
    assert [f.name for f in tmp_path.iterdir()] == ["policy.pt"]
    assert path.read_bytes() == b"the one before"


def test_the_manifest_says_which_policy_it_is(final: FinalPolicy, continuous: RunDir) -> None:
    lines: list[str] = []
    returned = commands.export_run(continuous.path, file_format="torchscript", say=lines.append)
    path = continuous.path / "exports" / "policy.pt"
    manifest = json.loads(path.with_name("policy.pt.json").read_bytes())
    assert manifest == returned
    assert manifest["file"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    # As in a certificate.
    assert manifest["policy"]["sha256"] == final.policy.sha256
    assert manifest["shield"]["sha256"] == final.policy.shield.sha256
    assert manifest["shield"]["acts"]
    assert (manifest["shield"]["draws"], manifest["shield"]["margin"]) == (4, 0.005 * 0.05)
    assert manifest["policy"]["run"] == "online"
    assert manifest["environment"]["horizon"] == 100
    names = [[part["name"] for part in manifest[side]] for side in ("inputs", "outputs")]
    assert names == [list(Inputs._fields), list(Outputs._fields)]
    (shown,) = re.findall(r"difference of two actions (\S+)", "\n".join(lines))
    assert float(shown) < 1e-5


class Sensors(gymnasium.Env[Any, Any]):
    observation_space = gymnasium.spaces.Dict(
        wheel=gymnasium.spaces.Box(-1.0, 1.0, (), np.float32),
        arm=gymnasium.spaces.Box(-1.0, 1.0, (2, 3), np.float32),
    )
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2, 1), np.float32)


gymnasium.register("ExportSensors-v0", lambda **_: Sensors(), max_episode_steps=10)


def test_the_manifest_says_where_each_number_stands(final: FinalPolicy) -> None:
    env = make_env("ExportSensors-v0", SafetySpec(accident="episode_cost", cost_threshold=5.0))
    described = _interface(graph_of(final), env)
    order = [(p["name"], p["start"], p["stop"]) for p in described["observation"]["order"]]
    assert order[:2] == [("wheel", 0, 1), ("arm", 1, 7)]
    assert order[2][1:] == (7, 8)
    assert "cost" in order[2][0]
    assert described["inputs"][0]["shape"] == ["batch", 8]
    assert described["outputs"][0]["shape"] == ["batch", 2, 1]


def test_from_the_command_line(
    continuous: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["safe-offrl", "export", str(continuous.path), "--out", str(tmp_path / "it.pt")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--format", "torchscript", "--json"])
    with contextlib.suppress(SystemExit):
        cli.main()
    assert json.loads(capsys.readouterr().out)["file"]["name"] == "it.pt"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["it.pt", "it.pt.json"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--format", "coreml"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        'error: There is no format "coreml". Give --format onnx or torchscript.\n'
    )


def test_bad_input_is_one_sentence(
    continuous: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="onnx or torchscript"):
        commands.export_run(continuous.path, file_format="onyx", say=silent)
    with pytest.raises(ConfigError, match="is a folder"):
        commands.export_run(continuous.path, file_format="torchscript", out=tmp_path, say=silent)
    with pytest.raises(RunError):
        commands.export_run("nothing", runs=tmp_path, say=silent)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"onnx and onnxscript and onnxruntime.*\[export\]"):
        commands.export_run(continuous.path, say=silent)
