"""`safe-offrl export`: a run's final policy behind shield and guard, for use without Python."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

from gymnasium import spaces

from safe_offrl.commands.common import require_output, say_plain
from safe_offrl.deploy.export import Comparison, compare, require_format
from safe_offrl.deploy.graph import PolicyGraph
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.files import json_bytes, plain, unwritable, write_atomic
from safe_offrl.record.final_policy import final_policy
from safe_offrl.record.find_run import find_run
from safe_offrl.record.progress import Say
from safe_offrl.record.subject import subject_of

EXPORTS = "exports"
MANIFEST_FORMAT = 1  # of the manifest


def export_run(
    run_name: str | Path,
    *,
    file_format: str = "onnx",
    out: str | Path | None = None,
    runs: str | Path = "runs",
    say: Say = say_plain,
) -> dict[str, Any]:
    """Write a run's final policy as one graph, and a manifest beside it; returns the manifest.

    A pretrained policy has neither shield nor guard, as in :func:`safe_offrl.load_policy`. The file
    is run and compared with the policy before it is written: RunError, and nothing written, if they
    differ.
    """
    # Run and files.
    chosen = require_format(file_format)
    run = find_run(run_name, Path(runs))
    path = Path(out) if out is not None else run.path / EXPORTS / f"policy{chosen.suffix}"
    if out is None:
        run.require_writable("Give --out FILE to write elsewhere.")
    require_output(path)
    with contextlib.ExitStack() as stack:
        if unwritable(run.path) is None:
            run.lock()  # No newer checkpoint comes between policy and hashes.
            stack.enter_context(run)
        # Policy.
        final = final_policy(run)
        policy, env = final.policy, final.env
        with contextlib.closing(env):
            _require_float32(env, run.name)
            # Graph, compared with the policy.
            space = env.env.action_space
            assert isinstance(space, spaces.Box | spaces.Discrete)  # Others are refused.
            graph = PolicyGraph(policy, space)
            data = chosen.write(graph)
            found = compare(chosen.open(data), graph, env, policy)
            _require_same(found)
            # Manifest.
            content = {
                "format": MANIFEST_FORMAT,
                "file": {
                    "name": path.name,
                    "format": file_format,
                    "sha256": hashlib.sha256(data).hexdigest(),
                },
                **subject_of(final),
                **_interface(graph, env),
                "compared": found,
            }
    manifest: dict[str, Any] = plain(content)
    packages = manifest["versions"]["packages"]
    packages |= {name: importlib.metadata.version(name) for name in chosen.packages}
    # Files.
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)
    beside = path.with_name(f"{path.name}.json")
    write_atomic(beside, json_bytes(manifest))
    # Summary.
    shield = f"acts, in {found.interventions} of them" if policy.shield.acts else "abstains"
    guard = f"acts, in {found.hand_overs} of them" if policy.guard else "abstains"
    say(
        f"exported    {run.name} (version {policy.version}) as {file_format}\n"
        f"compared    {found.observations} observations, largest difference of two actions "
        f"{found.difference:.1e}\n"
        f"shield      {shield}\n"
        f"guard       {guard}\n"
        f"file        {path}\n"
        f"manifest    {beside}"
    )
    return manifest


def _require_float32(env: AccidentEnv, name: str) -> None:
    """ConfigError if float32, which a graph takes, cannot hold the observations."""
    if env.offset is not None:
        raise ConfigError(
            f'The policy of "{name}" sees observations that float32 cannot hold, less '
            "an offset, and a graph takes float32. Subtract a constant in the environment "
            "and make the runs again, or act with safe_offrl.load_policy."
        )


def _require_same(found: Comparison) -> None:
    """RunError if the file does something else than the policy."""
    if not found.same:
        raise RunError(
            f"The exported policy is not the run's: actions differ by up to "
            f"{found.difference:g} at {found.observations} observations. Nothing was "
            "written; try another --format, or the versions of constraints.txt."
        )


def _interface(graph: PolicyGraph, env: AccidentEnv) -> dict[str, Any]:
    """How the graph is fed and read: sizes, order, units, and an episode in words."""
    kind = graph.actor.kind
    action, result = _action(env)
    return {
        "observation": {
            "size": env.observation_size,
            "order": _observation_parts(env),
            "meaning": "the environment's own numbers, not scaled, part by part: at the keys and "
            "positions of its path, a matrix row by row",
        },
        "action": action,
        "inputs": [
            {
                "name": "observation",
                "shape": ["batch", env.observation_size],
                "dtype": "float32",
                "meaning": 'in the order of "observation"',
            },
            {
                "name": "time_to_go",
                "shape": ["batch"],
                "dtype": "float32",
                "meaning": "max(0, 1 - steps of the episode so far / horizon)",
            },
            {
                "name": "noise",
                "shape": ["batch", graph.draws, *graph.actor.noise_shape],
                "dtype": "float32",
                "meaning": f"{kind.noise_in_words}, all independent and new at each step; row 0 "
                "makes the first choice, the others what the shield may take instead; row 0 all "
                f"zero makes the first choice {kind.mean_in_words}",
            },
            {
                "name": "spent",
                "shape": ["batch", *([len(graph.spent)] if len(graph.spent) > 1 else [])],
                "dtype": "float32",
                "meaning": f"what the episode has cost so far{_in_what(graph)}, 0 at its first "
                "step",
            },
        ][: len(graph.inputs)],
        "outputs": [
            {"name": "action", **result},
            {
                "name": "intervened",
                "shape": ["batch"],
                "dtype": "bool",
                "meaning": "whether the shield replaced the first choice",
            },
            {
                "name": "handed_over",
                "shape": ["batch"],
                "dtype": "bool",
                "meaning": "whether the guard's fallback acts, since going on is not affordable",
            },
        ][: len(graph.outputs)],
        "episode": "Begin with time_to_go 1. At each step draw noise, run the graph, execute "
        "action, lower time_to_go by 1 / horizon"
        + (f", and add the step's cost{_in_what(graph)} to spent." if graph.spent else "."),
        "certificate": "A certificate with the same sha256 of policy, shield and guard is about "
        "this file, as long as noise is drawn.",
    }


def _in_what(graph: PolicyGraph) -> str:
    """The costs that the guard asks for, where they are not the one of the environment alone."""
    return "" if graph.spent in ((), ("cost",)) else f" in {', '.join(graph.spent)}, in this order"


def _observation_parts(env: AccidentEnv) -> list[dict[str, Any]]:
    """Where each part of the observation space lies in a row of numbers."""
    parts: list[dict[str, Any]] = [
        {
            "name": part.name,
            "path": part.path,
            "shape": part.box.shape,
            "start": part.start,
            "stop": part.stop,
        }
        for part in env.layout
    ]
    if env.sums_cost:
        name = "min(cost of the episode so far / cost_threshold, 2)"
        size = env.observation_size
        parts.append({"name": name, "path": None, "shape": (), "start": size - 1, "stop": size})
    return parts


def _action(env: AccidentEnv) -> tuple[dict[str, Any], dict[str, Any]]:
    """The environment's actions, and how the graph gives them."""
    space = env.env.action_space
    action: dict[str, Any]
    if isinstance(space, spaces.Discrete):
        action = {"kind": "discrete", "count": env.action_size, "start": int(space.start)}
        result: dict[str, Any] = {
            "shape": ["batch"],
            "dtype": "int64",
            "meaning": "number of the action; start - 1, which is none, for a NaN observation",
        }
    else:
        assert isinstance(space, spaces.Box)
        action = {"kind": "box", "shape": space.shape, "low": space.low, "high": space.high}
        result = {
            "shape": ["batch", *space.shape],
            "dtype": "float32",
            "meaning": "in the environment's own units; NaN if the observation is not finite",
        }
    return action, result
