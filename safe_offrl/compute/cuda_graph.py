"""A function of tensors recorded once as a CUDA graph, and replayed.

An update of these small networks is some hundred kernels of a few microseconds each, and launching
one takes Python longer than running it. A graph launches them all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Values = tuple[Tensor, ...]
# So many calls come first: initialisation, autotuning and compiling cannot be recorded.
WARM_UPS = 3


class CudaGraph:
    """Calls a function, from the fourth call on as one graph; each call has its full effect once.

    Arguments are tensors on the GPU, tuples of them, and objects (modules, bound methods, None):
    while those and the shapes stay the same the recording is used, then it is made anew. What the
    function reads besides must stay where it is in memory, and may change there. It must not wait
    for the GPU, and not draw random numbers.
    """

    def __init__(self, function: Callable[..., Values]) -> None:
        self._function = function
        self._key: tuple[object, ...] = ()
        self._calls = 0  # with arguments of this key
        self._inputs: list[Tensor] = []
        self._outputs: Values = ()
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *arguments: object) -> Values:
        """The function's values; they are the caller's own."""
        leaves = list(_leaves(arguments))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves)
        if key != self._key:
            self._key, self._calls, self._graph = key, 0, None
            self._inputs = [tensor.clone() for tensor in tensors]
        else:
            torch._foreach_copy_(self._inputs, tensors)
        self._calls += 1
        if self._graph is None:
            mine = iter(self._inputs)
            placed = (next(mine) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
            own = _rebuilt(arguments, placed)
            if self._calls <= WARM_UPS:
                return self._aside(own)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):  # nothing is executed here
                self._outputs = self._function(*own)
        self._graph.replay()
        return tuple(value.clone() for value in self._outputs)

    def _aside(self, arguments: tuple[object, ...]) -> Values:
        """An ordinary call on another stream, as a recording wants it before.

        With the tensors of the recording, lest they be compiled for once more.
        """
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            values = self._function(*arguments)
        here.wait_stream(aside)
        return tuple(value.clone() for value in values)


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _rebuilt(value: Any, leaves: Iterator[object]) -> Any:
    """The same nested tuples with other leaves.

    >>> _rebuilt((1, (2, None)), iter("abc"))
    ('a', ('b', 'c'))
    """
    if not isinstance(value, tuple):
        return next(leaves)
    parts = [_rebuilt(part, leaves) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
