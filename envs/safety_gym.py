"""Safety-Gymnasium 1.0.0, unmodified, on today's Python, NumPy, Gymnasium and MuJoCo.

The newest release pins packages of 2023 and fails on ``import safety_gymnasium`` from Python 3.11
on. What fails is its ``__init__``, which ties the tasks to an API that Gymnasium removed; the tasks
themselves need four small patches, all in :func:`_load`. Dynamics, observations, rewards and costs
are the original's (tests/test_safety_gym.py compares them with recordings of the original stack).
gymnasium and numpy only until an environment is made.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MISSING = (
    "{} is not installed: run `make setup`, or "
    "`pip install 'safe-offrl[safety-gym]'` and then "
    "`pip install --no-deps safety-gymnasium==1.0.0`."
)
NO_RENDERING = (
    "Rendering needs OpenGL without a display, and neither EGL nor OSMesa works here: install one "
    "of them (Debian and Ubuntu: `apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri`, or "
    "`apt-get install libosmesa6`), or set MUJOCO_GL yourself."
)
# A texture that MuJoCo computes, in place of six photographs of 3259 x 3259 pixels: decoding them
# is 98 % of a reset and 700 MB. Only pictures can tell the difference.
LIGHT_SKY = {
    "@type": "skybox",
    "@builtin": "gradient",
    "@rgb1": "0.3 0.5 0.7",
    "@rgb2": "0 0 0",
    "@width": "100",
    "@height": "600",
}


class SafetyGymEnv(gym.Env[Array, Array], gym.utils.EzPickle):
    """One task of Safety-Gymnasium by its own name, with Gymnasium's interface.

    Observation, action, reward: the original's, float64. ``info["cost"]``: the original's cost of
    the step, which it returns beside the reward; 0 or 1 in every task. A navigation task never
    terminates on a cost. ``task_id``: "SafetyPointGoal1-v0", "SafetyHopperVelocity-v1", ...
    ``camera_name``: "fixedfar" (from above, the default of navigation), "fixednear", "track" or
    "vision"; a velocity task has "track". Raises gymnasium.error.DependencyNotInstalled without
    Safety-Gymnasium, and for ``render_mode="rgb_array"`` where OpenGL is missing.
    """

    packages = ("mujoco", "safety-gymnasium")  # that the dynamics depend on: recorded with runs
    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012

    def __init__(
        self,
        task_id: str,
        render_mode: str | None = None,
        width: int = 256,
        height: int = 256,
        camera_name: str | None = None,
    ) -> None:
        gym.utils.EzPickle.__init__(self, task_id, render_mode, width, height, camera_name)
        if render_mode is not None:
            _choose_opengl()
        options = {"render_mode": render_mode, "width": width, "height": height}
        with np.errstate(over="ignore"):  # Gymnasium casts unlimited float64 bounds to float32
            self.original: Any = _make(task_id, camera_name, options)
        self.metadata = self.metadata | {"render_fps": self.original.metadata["render_fps"]}
        self.render_mode = render_mode
        self.observation_space = self.original.observation_space
        self.action_space = self.original.action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start an episode; the layout follows from ``seed``, or from the last seed given."""
        super().reset(seed=seed)
        if seed is None:  # the original would draw from numpy's global generator
            seed = int(self.np_random.integers(2**32))
        observation, info = self.original.reset(seed=seed)
        return observation, {**info, "cost": 0.0}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """The original's step, its cost moved into ``info``."""
        observation, reward, cost, terminated, truncated, info = self.original.step(
            np.asarray(action)
        )
        info = {**info, "cost": float(cost)}
        return observation, float(reward), bool(terminated), bool(truncated), info

    def render(self) -> NDArray[np.uint8] | None:
        """A picture [height, width, 3], or None without a render mode."""
        return None if self.render_mode is None else self.original.render()

    def close(self) -> None:
        """Free what rendering holds."""
        viewers = getattr(getattr(self.original, "task", None), "_viewers", {})
        while viewers:  # the original leaves them to the garbage collector
            viewers.popitem()[1].free()
        self.original.close()


def _make(task_id: str, camera_name: str | None, options: dict[str, Any]) -> Any:
    """The original environment behind an id."""
    try:
        package = _load()
    except ModuleNotFoundError as error:
        raise gym.error.DependencyNotInstalled(MISSING.format(error.name)) from error
    velocity = re.fullmatch(r"Safety(\w+)Velocity-(v\d)", task_id)
    if velocity is None:
        robot = re.match(r"Safety([A-Z][a-z]+)", task_id)
        if robot is None:
            raise ValueError(f'"{task_id}" is no task of Safety-Gymnasium')
        builder = importlib.import_module(f"{package}.builder").Builder
        camera_name = camera_name or "fixedfar"
        return builder(task_id, {"agent_name": robot[1]}, camera_name=camera_name, **options)
    name, version = velocity.groups()
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()  # HalfCheetah -> half_cheetah
    module = f"{package}.tasks.safe_velocity.safety_{snake}_velocity_{version}"
    environment = getattr(importlib.import_module(module), f"Safety{name}VelocityEnv")
    return environment(camera_name=camera_name, **options)


@functools.cache
def _load() -> str:
    """Import the parts of Safety-Gymnasium that work and patch them; returns its name."""
    name = "safety_gymnasium"
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(name=name)
        # Its own modules use the package for __file__ alone: leave its __init__ unexecuted.
        package = importlib.util.module_from_spec(spec)
        package.__getattr__ = _no_attribute  # type: ignore[method-assign]
        sys.modules[name] = package

    # 1. From Python 3.11 on a dataclass refuses a default value without hash, which arrays are.
    colors = importlib.import_module(f"{name}.assets.color").COLOR
    colors.update({key: value.view(_HashableArray) for key, value in colors.items()})

    # 2. From NumPy 2.4 on float() and int() refuse an array of one element.
    agent: Any = importlib.import_module(f"{name}.bases.base_agent")
    agent.float = lambda value: np.asarray(value).item()  # module globals come before builtins
    agent.BaseAgent._init_jnt_sensors = _init_joint_sensors

    # 3. From Gymnasium 1.0 on a viewer must be told its size; render() has put it into the model.
    underlying: Any = importlib.import_module(f"{name}.bases.underlying")
    viewer = underlying.OffScreenViewer

    def sized_viewer(model: Any, data: Any) -> Any:
        return viewer(model, data, model.vis.global_.offwidth, model.vis.global_.offheight)

    underlying.OffScreenViewer = sized_viewer

    # 4. Every reset reads the same assets through the module's yaml: read them once, with our sky.
    world: Any = importlib.import_module(f"{name}.world")
    path = Path(world.BASE_DIR) / "configs" / "assets.yaml"
    assets = world.yaml.safe_load(path.read_text(encoding="utf-8"))
    assets["textures"]["skybox"] = LIGHT_SKY
    world.yaml = SimpleNamespace(load=lambda file, Loader: assets, FullLoader=None)
    return name


class _HashableArray(np.ndarray):
    __hash__ = object.__hash__  # type: ignore[assignment]


def _no_attribute(attribute: str) -> Any:
    raise AttributeError(
        f"safety_gymnasium has no attribute {attribute!r} here: its __init__ cannot run on this "
        'Python. Its environments are Gymnasium\'s: gymnasium.make("SafetyPointGoal1-v0").'
    )


def _init_joint_sensors(agent: Any) -> None:
    """BaseAgent._init_jnt_sensors without int() of arrays: a sensor's type tells its joint's."""
    sensors = importlib.import_module("mujoco").mjtSensor
    info = agent.sensor_info
    names = {
        sensors.mjSENS_JOINTPOS: info.hinge_pos_names,
        sensors.mjSENS_JOINTVEL: info.hinge_vel_names,
        sensors.mjSENS_BALLQUAT: info.ballquat_names,
        sensors.mjSENS_BALLANGVEL: info.ballangvel_names,
    }
    for index in range(agent.engine.model.nsensor):
        sensor = agent.engine.model.sensor(index)
        info.sensor_dim[sensor.name] = sensor.dim[0]
        names.get(sensor.type[0], []).append(sensor.name)
        if sensor.name == "agent_pos":
            info.freejoint_pos_name = sensor.name
        elif sensor.name == "agent_qvel":
            info.freejoint_qvel_name = sensor.name


def _choose_opengl() -> None:
    """Set MUJOCO_GL to the first of EGL and OSMesa that works, unless the user has set it."""
    if os.environ.get("MUJOCO_GL"):
        return
    for backend in ("egl", "osmesa"):
        # In a process of its own: PyOpenGL binds to the first it loads, even to one that fails.
        program = f"from mujoco.{backend} import GLContext; GLContext(8, 8).make_current()"
        command = [sys.executable, "-c", program]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            return
    raise gym.error.DependencyNotInstalled(NO_RENDERING)
