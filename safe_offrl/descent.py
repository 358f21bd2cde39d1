"""Gradient steps: a loss, its gradients and an optimiser, in eager mode or as one compiled graph.

Both run the same loss functions. Compiled, a loss and its gradients become a single graph of C++
kernels between the matrix products (torch.compile), which spares most passes over memory; results
differ from eager mode by rounding alone.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from safe_offrl.errors import ConfigError
from safe_offrl.files import cache_folder

CompileMode = Literal["auto", "on", "off"]
Precision = Literal["fp32", "bf16"]
# A loss, and what is to be logged or handed on besides.
Values = tuple[Tensor, ...]
Gradients = Callable[..., tuple[Values, tuple[Tensor, ...]]]


class Optimizer(Protocol):
    """What steps, given the gradient of each of its parameters."""

    parameters: list[Tensor]

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Move the parameters."""
        ...


@dataclass(frozen=True)
class Compute:
    """How a loss is evaluated: ``compiled`` or operation by operation; its matrix products' type.

    ``bf16`` multiplies in bfloat16 and adds up in fp32; parameters, LayerNorm, the critics' output
    layer, targets and optimisers stay in fp32.
    """

    compiled: bool = False
    precision: Precision = "fp32"


EAGER = Compute()
# Compiling takes up to a minute, once on a machine; so many updates of the default sizes earn it.
WORTH_COMPILING = 10_000


def choose(mode: CompileMode, precision: Precision, updates: int) -> tuple[Compute, str]:
    """What a run of so many updates computes with, and why, in words for its header.

    ConfigError if something was asked for that this machine cannot do.
    """
    if precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ConfigError(
            "precision is bf16, but this CPU cannot multiply in bfloat16. Try precision=fp32."
        )
    missing = _missing_for_compiling()
    if mode == "on" and missing:
        raise ConfigError(f"compile is on, but there is {missing}. Install it, or try compile=off.")
    if mode == "off":
        return Compute(False, precision), "not compiled"
    if mode == "auto" and updates < WORTH_COMPILING:
        return Compute(False, precision), f"not compiled: {updates:,} updates do not earn it"
    if missing:
        return Compute(False, precision), f"not compiled: there is {missing}"
    # What is compiled outlives the process: the next run starts in seconds. torch asks for the
    # folder once, when the first optimiser is made.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
    return Compute(True, precision), "compiled (up to a minute the first time)"


def _missing_for_compiling() -> str:
    """What is not there that compiling needs, in words; "" if nothing is."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f'no C++ compiler "{compiler}"'
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "no Python.h (a package like python3-dev)"
    return ""


class Descent:
    """One optimiser step down a loss, with the gradients of the optimiser's own parameters alone.

    An actor's loss runs through the critics: asking for the actor's gradients only spares the
    critics' weight gradients and leaves nothing behind to be cleared.
    """

    def __init__(self, loss: Callable[..., Values], optimizer: Optimizer, compute: Compute) -> None:
        """``loss`` returns a tuple of tensors; the first is the scalar that goes down."""
        self._loss = loss
        self._optimizer = optimizer
        self._bf16 = compute.precision == "bf16"
        self._gradients: Gradients = (
            _compiled(self._differentiate) if compute.compiled else self._differentiate
        )

    def __call__(self, *arguments: object) -> Values:
        """Evaluate the loss at these arguments and step; returns its values, detached.

        FloatingPointError, before anything has moved, if the loss or a gradient is not finite.
        """
        values, gradients = self._gradients(*arguments)
        self._step(values[0], gradients)
        return values

    def in_parts(self, parts: Sequence[tuple[float, tuple[object, ...]]]) -> Values:
        """As :meth:`__call__` on the whole batch, for a loss that is a mean over it: part by part.

        Each part is its share of the batch and the arguments it makes. What a part needs for its
        gradients fits a cache that the whole would overflow.
        """
        share, arguments = parts[0]
        values, gradients = self._gradients(*arguments)
        if len(parts) > 1:
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
            raise FloatingPointError(
                f"{self._loss.__qualname__} is {float(loss):.3g}: {what}. The optimiser did not "
                "step, and the checkpoints are from before. Look at this loss in TensorBoard, and "
                "start again with a lower learning rate"
            )
        self._optimizer.step(gradients)

    def _differentiate(self, *arguments: object) -> tuple[Values, tuple[Tensor, ...]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            values = self._loss(*arguments)
        gradients = torch.autograd.grad(values[0], self._optimizer.parameters)
        return tuple(value.detach() for value in values), gradients


def _compiled(function: Gradients) -> Gradients:
    torch._dynamo.config.trace_autograd_ops = True
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
            raise ConfigError(f"Compiling failed ({reason}). Try compile=off.") from error

    return call
