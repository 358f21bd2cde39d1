"""Gradient steps: a loss, its gradients and an optimiser, in eager mode or as one compiled graph.

Both run the same loss functions. Compiled, a loss and its gradients become a single graph of C++
(on a GPU, Triton) kernels between the matrix products (torch.compile), which spares most passes
over memory; results differ from eager mode by rounding alone. On a GPU loss, gradients and
optimiser step, compiled or not, are recorded as one CUDA graph.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn, Protocol

import torch
from torch import Tensor

from safe_offrl.compute.compiler import compiler_fault
from safe_offrl.compute.cuda_graph import CudaGraph, Values
from safe_offrl.compute.device import Device
from safe_offrl.errors import ConfigError
from safe_offrl.files import cache_folder, unwritable

CompileMode = Literal["auto", "on", "off"]
Precision = Literal["fp32", "bf16"]
# The values are a loss and whatever is logged or handed on besides it.
Gradients = Callable[..., tuple[Values, tuple[Tensor, ...]]]


class Optimizer(Protocol):
    """What steps, given the gradient of each of its parameters."""

    parameters: list[Tensor]

    def step(self, gradients: Sequence[Tensor], skip: Tensor | None = None) -> None:
        """Move the parameters, unless ``skip`` (a scalar tensor on a GPU) is 1."""
        ...


@dataclass(frozen=True)
class Compute:
    """How a loss is evaluated: ``compiled`` or not, its matrix products' type, and on what.

    ``bf16`` multiplies in bfloat16 and adds up in fp32; parameters, LayerNorm, the critics' output
    layer, targets and optimisers stay in fp32.
    """

    compiled: bool = False
    precision: Precision = "fp32"
    device: Device = "cpu"


EAGER = Compute()
# Compiling takes up to a minute, once on a machine; so many updates of the default sizes earn it.
WORTH_COMPILING = 10_000
FINITE_EVERY = 100  # updates on a GPU between two looks at whether all were finite, which wait


def choose_compute(
    mode: CompileMode, precision: Precision, updates: int, device: Device = "cpu"
) -> tuple[Compute, str]:
    """What a run of so many updates computes with, and why, in words for its header.

    ConfigError if something was asked for that this machine cannot do.
    """
    if precision == "bf16" and not _multiplies_bf16(device):
        name = "CPU" if device == "cpu" else "GPU"
        raise ConfigError(
            f"precision is bf16, but this {name} cannot multiply in bfloat16. Try precision=fp32."
        )
    if mode == "off":
        return Compute(False, precision, device), "not compiled"
    if mode == "auto" and updates < WORTH_COMPILING:
        why = f"not compiled: {updates:,} updates do not earn it"
        return Compute(False, precision, device), why
    fault = compiler_fault()
    if fault is not None and mode == "on":
        raise ConfigError(
            f"compile is on, but {fault.what}. {fault.remedy}, or try compile=off in a new run."
        )
    if fault is not None:
        return Compute(False, precision, device), f"not compiled: {fault.what}"
    # What is compiled outlives the process: the next run starts in seconds. torch asks for the
    # folder once, when the first optimiser is made.
    compiled = cache_folder() / "compiled"
    if unwritable(compiled) is None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    return Compute(True, precision, device), "compiled (up to a minute the first time)"


def _multiplies_bf16(device: Device) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Descent:
    """One optimiser step down a loss, with the gradients of the optimiser's own parameters alone.

    An actor's loss runs through the critics: asking for the actor's gradients only spares the
    critics' weight gradients and leaves nothing behind to be cleared.
    """

    def __init__(self, loss: Callable[..., Values], optimizer: Optimizer, compute: Compute) -> None:
        """``loss`` returns a tuple of tensors; the first is the scalar that goes down."""
        self._loss = loss
        self._optimizer = optimizer
        self._device = compute.device
        self._bf16 = compute.precision == "bf16"
        self._gradients: Gradients = (
            _compiled(self._differentiate) if compute.compiled else self._differentiate
        )
        self._graph = CudaGraph(self._step_on_gpu) if compute.device == "cuda" else None
        self._skipped = torch.zeros((), device=compute.device)  # whether a step ever was, on a GPU
        self._calls = 0

    def __call__(self, *arguments: object) -> Values:
        """Evaluate the loss at these arguments and step; returns its values, detached.

        FloatingPointError, before anything has moved, if the loss or a gradient is not finite. On a
        GPU it comes some updates later, in which the optimiser does not step either.
        """
        if self._graph is not None:
            values = self._graph(*arguments)
            self._calls += 1
            if self._calls % FINITE_EVERY == 0 and float(self._skipped):
                self._refuse("not finite")
            return values
        values, gradients = self._gradients(*arguments)
        self._step(values[0], gradients)
        return values

    def in_parts(self, parts: Sequence[tuple[float, tuple[object, ...]]]) -> Values:
        """As :meth:`__call__` on the whole batch, for a loss that is a mean over it: part by part.

        Each part is its share of the batch and the arguments it makes. What a part needs for its
        gradients fits a cache that the whole would overflow.
        """
        share, arguments = parts[0]
        if len(parts) == 1:
            return self(*arguments)
        values, gradients = self._gradients(*arguments)
        torch._foreach_mul_([*values, *gradients], share)
        for share, arguments in parts[1:]:
            more = self._gradients(*arguments)
            torch._foreach_add_([*values, *gradients], [*more[0], *more[1]], alpha=share)
        self._step(values[0], gradients)
        return values

    def _step(self, loss: Tensor, gradients: tuple[Tensor, ...]) -> None:
        # NaN and infinity survive every sum. The sums take half a per cent of an update, and on a
        # CPU reading a number costs nothing.
        if not math.isfinite(sum((float(g.sum()) for g in gradients), start=float(loss))):
            what = "a gradient of it is not finite" if torch.isfinite(loss) else "learning diverged"
            self._refuse(f"{float(loss):.3g}: {what}")
        self._optimizer.step(gradients)

    def _step_on_gpu(self, *arguments: object) -> Values:
        values, gradients = self._gradients(*arguments)
        sums = torch.stack([values[0], *torch._foreach_norm(gradients)])
        skip = 1.0 - sums.sum().isfinite().float()
        self._skipped.copy_(torch.maximum(self._skipped, skip))
        self._optimizer.step(gradients, skip)
        return values

    def _refuse(self, what: str) -> NoReturn:
        raise FloatingPointError(
            f"{self._loss.__qualname__} is {what}. The optimiser did not step, and the checkpoints "
            "are from before. Look at this loss in TensorBoard, and start again with a lower "
            "learning rate"
        )

    def _differentiate(self, *arguments: object) -> tuple[Values, tuple[Tensor, ...]]:
        # Weights that were cast once must not be taken for today's when a graph is replayed.
        with torch.autocast(
            self._device, torch.bfloat16, enabled=self._bf16, cache_enabled=self._graph is None
        ):
            values = self._loss(*arguments)
        gradients = torch.autograd.grad(values[0], self._optimizer.parameters)
        return tuple(value.detach() for value in values), gradients


def _compiled(function: Gradients) -> Gradients:
    torch._dynamo.config.trace_autograd_ops = True
    # fp32 is meant: on a GPU the compiler would advise TensorFloat32 to whoever reads the log.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
    # Checking before every call that no layer was replaced takes longer than the whole of Python's
    # part otherwise; ours never are.
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    compiled: Gradients = torch.compile(  # type: ignore[call-overload]  # its stubs lag behind
        function, fullgraph=True, dynamic=False, options=options, isolate_recompiles=True
    )

    def call(*arguments: object) -> tuple[Values, tuple[Tensor, ...]]:
        try:
            return compiled(*arguments)
        except torch._inductor.exc.InductorError as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"Compiling failed ({reason}). Try compile=off in a new run."
            ) from error

    return call
