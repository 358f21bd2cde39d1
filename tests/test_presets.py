"""Every preset in configs/: fits the settings, and what its first line claims is true."""

import importlib.resources
import re

import gymnasium
import pytest

from safe_offrl.bench.suite import flat
from safe_offrl.collect.log_plan import CollectConfig
from safe_offrl.config import load_config, load_preset, read_yaml
from safe_offrl.envs import SAFETY_GYM
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.train.pretrain_config import PretrainConfig

CONFIGS = importlib.resources.files("safe_offrl.configs")
PRESETS, BASES = (
    {
        entry.name: entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=str)
        if entry.name.endswith(".yaml")
    }
    for folder in (CONFIGS, CONFIGS / "base")
)
MOST_LINES = 20
BULLET = {  # of bullet-safety-gym 1.4.0, which needs pybullet and is not installed with us
    "bullet_safety_gym:SafetyBallCircle-v0": 200,
    "bullet_safety_gym:SafetyCarRun-v0": 200,
}


def env_id_of(text: str) -> str:
    return str(read_yaml(text, "the preset")["env_id"])


def test_the_promised_tasks_have_a_preset() -> None:
    promised = {
        f"Safety{name}"
        for name in (
            "PointGoal1-v0",
            "PointCircle1-v0",
            "PointButton1-v0",
            "PointPush1-v0",
            "CarGoal1-v0",
            "CarCircle1-v0",
            "HopperVelocity-v1",
            "HalfCheetahVelocity-v1",
            "AntVelocity-v1",
        )
    }
    env_ids = [env_id_of(text) for text in PRESETS.values()]
    assert promised | set(BULLET) <= set(env_ids)
    assert len(set(env_ids)) == len(env_ids)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_the_settings(name: str) -> None:
    env_id = env_id_of(PRESETS[name])
    preset = load_preset(env_id)
    assert set(preset) <= {"env_id", "base", "collect", "pretrain", "finetune"}
    pretrain = load_config(PretrainConfig, section="pretrain", env_id=env_id)
    load_config(FinetuneConfig, section="finetune", env_id=env_id)
    load_config(CollectConfig, section="collect", env_id=env_id)
    assert pretrain.safety.horizon is None  # the environment's own


@pytest.mark.parametrize("name", [*PRESETS, *BASES])
def test_a_preset_is_a_few_lines_none_of_which_its_base_has(name: str) -> None:
    files = BASES | PRESETS
    assert len(files[name].splitlines()) <= MOST_LINES
    stated = read_yaml(files[name], name)
    here, inherited = stated, dict[str, object]()
    while "base" in here:
        here = read_yaml(files[f"{here['base']}.yaml"], "the base")
        assert set(here) <= {"base", "pretrain", "finetune"}  # nothing of one environment
        inherited = flat(here) | inherited
    assert not [key for key, value in flat(stated).items() if inherited.get(key) == value]


def test_every_base_is_used() -> None:
    used = {read_yaml(text, name).get("base") for name, text in (BASES | PRESETS).items()}
    assert used - {None} == {name.removesuffix(".yaml") for name in BASES}


@pytest.mark.parametrize("name", [n for n in PRESETS if n.startswith(("safety_", "bullet_"))])
def test_a_preset_says_what_it_constrains(name: str) -> None:
    text = PRESETS[name]
    env_id = env_id_of(text)
    first = text.splitlines()[0]
    claim = re.fullmatch(r"# Accident: .+\. Limit: cost (\d+) in (\d+) steps \((.+)\)\.", first)
    assert claim is not None, first
    limit, horizon = int(claim[1]), int(claim[2])
    safety = load_config(PretrainConfig, section="pretrain", env_id=env_id).safety
    assert (safety.constraint, safety.cost_limit) == ("cost", limit)
    assert safety.accident == "cost"
    assert safety.cost_threshold == 0.0
    if env_id in BULLET:
        assert horizon == BULLET[env_id]
        assert claim[3] == "DSRL: 10, 20, 40"
    else:
        assert horizon == SAFETY_GYM[env_id] == gymnasium.spec(env_id).max_episode_steps
        assert (claim[3], limit) == ("OmniSafe; DSRL: 20, 40, 80", 25)


@pytest.mark.parametrize("env_id", BULLET)
def test_bullet_safety_gym_has_that_horizon(env_id: str) -> None:
    pytest.importorskip("pybullet")
    pytest.importorskip("bullet_safety_gym")
    assert gymnasium.spec(env_id).max_episode_steps == BULLET[env_id]
