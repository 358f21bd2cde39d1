"""A policy as a file that runs without Python: written, run again, and compared with the policy.

ONNX is for ONNX Runtime, TensorRT and the like; TorchScript for LibTorch (``torch::jit::load``).
PyTorch calls TorchScript deprecated, but what follows it cannot be loaded from C++ without being
compiled for one machine.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from safe_offrl.deploy.graph import Inputs, Outputs, PolicyGraph
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.errors import ConfigError
from safe_offrl.policies.acting import NumpyActor
from safe_offrl.safety.guard import Spent

Arrays = dict[str, NDArray[Any]]
Runner = Callable[[Arrays], Arrays]  # arrays by names of Inputs, in their order -> of Outputs

EXAMPLES = 256
TOLERANCE = 1e-5  # of the range of an action: rounding of another runtime
TOO_CLOSE = 1e-5  # of a risk to the most that is let pass: rounding decides which side it is on


class Format(NamedTuple):
    """A kind of file: how it is written and run, and what that takes besides torch."""

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[PolicyGraph], bytes]
    open: Callable[[bytes], Runner]


def to_onnx(graph: PolicyGraph) -> bytes:
    """The graph as an ONNX model, its weights inside; the number of observations is free."""
    batch = torch.export.Dim("batch")
    with _quiet():
        program = torch.onnx.export(
            graph,
            _zeros(graph, 2),
            dynamo=True,
            verbose=False,
            input_names=graph.inputs,
            output_names=graph.outputs,
            dynamic_shapes={name: {0: batch} for name in graph.inputs},
        )
    assert program is not None
    return program.model_proto.SerializeToString()


def open_onnx(data: bytes) -> Runner:
    """Run an ONNX model with ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # at these network sizes a second costs more than it brings
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda arrays: dict(zip(names, session.run(None, arrays), strict=True))


def to_torchscript(graph: PolicyGraph) -> bytes:
    """The graph as a TorchScript archive; the number of observations is free."""
    file = io.BytesIO()
    with _quiet():
        torch.jit.save(torch.jit.trace(graph, _zeros(graph, 2), check_trace=False), file)
    return file.getvalue()


def open_torchscript(data: bytes) -> Runner:
    """Run a TorchScript archive."""
    with _quiet():
        loaded = torch.jit.load(io.BytesIO(data), map_location="cpu")

    def run(arrays: Arrays) -> Arrays:
        with torch.no_grad():
            results = loaded(*(torch.from_numpy(array) for array in arrays.values()))
        names = Outputs._fields[: len(results)]
        return {name: x.numpy() for name, x in zip(names, results, strict=True)}

    return run


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), to_onnx, open_onnx),
    "torchscript": Format(".pt", (), to_torchscript, open_torchscript),
}


def require_format(name: str) -> Format:
    """The format of this name; ConfigError if there is none, or if a package for it is missing."""
    if name not in FORMATS:
        raise ConfigError(f'There is no format "{name}". Give --format {" or ".join(FORMATS)}.')
    missing = [p for p in FORMATS[name].packages if importlib.util.find_spec(p) is None]
    if missing:
        raise ConfigError(
            f"The format {name} needs {' and '.join(missing)}, not installed here. Install what it "
            "takes with `pip install 'safe-offrl[export]'`, or give --format torchscript."
        )
    return FORMATS[name]


# --- does the file do what the policy does? ---------------------------------------------------


class Comparison(NamedTuple):
    """What a file did and what the policy did, at the same observations with the same draws."""

    observations: int
    interventions: int  # of the shield at them
    hand_overs: int  # of the guard at them
    difference: float  # the largest of two actions, in the environment's units
    same: bool  # everything, but for rounding; not if nothing could be compared


def compare(
    run: Runner, graph: PolicyGraph, env: AccidentEnv, policy: DeployedPolicy
) -> Comparison:
    """Compare a file with the policy behind its shield at observations like those of the log.

    They are drawn from a Gaussian with the log's mean and variance: the environment may be a real
    thing, and is left alone. Where a risk is as good as the most that is let pass, rounding
    decides, and nothing is compared.
    """
    arrays = _examples(graph, policy)
    with torch.no_grad():
        closeness = graph.closeness(Inputs(*map(torch.from_numpy, arrays.values())))
    clear = np.flatnonzero(closeness.numpy() > TOO_CLOSE)
    if not len(clear):
        return Comparison(0, 0, 0, 0.0, False)
    wanted = _chosen(arrays, clear, env, policy)
    given = run(arrays)
    difference = np.abs(given["action"][clear] - wanted["action"])
    flags = [name for name in graph.outputs if name != "action"]
    same = bool(np.all(difference <= _tolerance(env))) and all(
        np.array_equal(given[name][clear], wanted[name]) for name in flags
    )
    interventions, hand_overs = (int(wanted[n].sum()) for n in ("intervened", "handed_over"))
    return Comparison(len(clear), interventions, hand_overs, float(difference.max()), same)


def _examples(graph: PolicyGraph, policy: DeployedPolicy) -> Arrays:
    """Inputs of the graph; the draws of row b are those of a generator with the seed b."""
    rng = np.random.default_rng(0)
    size, normalizer = policy.actor.observation_size, policy.normalizer
    standard = rng.standard_normal((EXAMPLES, size), dtype=np.float32)
    actor = NumpyActor(policy.actor)
    noise = [actor.noise(graph.draws, np.random.default_rng(row)) for row in range(EXAMPLES)]
    arrays = {
        "observation": normalizer.mean + normalizer.std * standard,
        "time_to_go": rng.random(EXAMPLES, dtype=np.float32),
        "noise": np.asarray(noise, dtype=np.float32),
    }
    if "spent" in graph.inputs:  # from nothing to all that can be spent
        limit = max(limit for _, limit, _ in graph.watches)
        arrays["spent"] = limit * rng.random((EXAMPLES, *_several(graph)), dtype=np.float32)
    return arrays


def _chosen(
    arrays: Arrays, rows: NDArray[np.intp], env: AccidentEnv, policy: DeployedPolicy
) -> Arrays:
    """What the policy behind its shield does at these rows of the examples."""
    chosen: dict[str, list[Any]] = {name: [] for name in Outputs._fields}
    for row in rows:
        action, intervened, handed_over = policy.act(
            policy.normalizer(arrays["observation"][row]),
            float(arrays["time_to_go"][row]),
            np.random.default_rng(row),
            _spent(arrays, row, policy),
        )
        chosen["action"].append(env.own_action(action))
        chosen["intervened"].append(intervened)
        chosen["handed_over"].append(handed_over)
    return {name: np.stack(values) for name, values in chosen.items()}


def _spent(arrays: Arrays, row: np.intp, policy: DeployedPolicy) -> Spent | None:
    """What the guard is told at a row of the examples."""
    if policy.guard is None or "spent" not in arrays:
        return None
    spent = np.atleast_1d(arrays["spent"][row]).tolist()
    return dict(zip(policy.guard.spends, spent, strict=True))


def _several(graph: PolicyGraph) -> tuple[int, ...]:
    """The shape of what is spent at one observation: () of one cost."""
    return (len(graph.spent),) if len(graph.spent) > 1 else ()


def _tolerance(env: AccidentEnv) -> Any:
    """How far two actions may differ in the environment's units."""
    if env.discrete:
        return 0
    low, high = env.env.action_space.low, env.env.action_space.high  # type: ignore[attr-defined]
    bound = np.maximum(np.abs(low), np.abs(high)).astype(np.float32)
    return TOLERANCE * (high - low) + np.spacing(bound)  # both are rounded to float32


def _zeros(graph: PolicyGraph, b: int) -> tuple[torch.Tensor, ...]:
    """Inputs of the right shapes for b observations."""
    noise = torch.zeros(b, graph.draws, *graph.actor.noise_shape)
    spent = torch.zeros(b, *_several(graph))
    inputs = torch.zeros(b, len(graph.mean)), torch.zeros(b), noise, spent
    return inputs[: len(graph.inputs)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks about themselves: on what they deprecate and lack."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
