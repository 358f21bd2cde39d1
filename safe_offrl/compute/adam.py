"""Adam over a fixed list of parameters: one call of torch's fused kernel, and nothing else.

``torch.optim.Adam.step`` collects its parameters, groups them by device and looks for hooks before
it calls the same kernel, and an update has three or four optimisers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


class Adam:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980); with ``weight_decay`` AdamW (arXiv:1711.05101).

    With moments ``m`` and ``v`` of the gradient g, both corrected for their start at 0:
    ``x <- (1 - lr weight_decay) x - lr m / (sqrt(v) + eps)``. Equal to torch's own bit by bit. Of
    the parameters it takes those that require a gradient.
    """

    def __init__(
        self, parameters: Iterable[Tensor], learning_rate: float, weight_decay: float = 0.0
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self._learning_rate = learning_rate
        self._weight_decay = weight_decay
        self._means = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        self._squares = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        # All counts lie in one store: adding 1 to each by itself took 3 % of an update.
        device = self.parameters[0].device
        self._count = torch.zeros(len(self.parameters), device=device)
        self._steps = list(self._count.unbind())

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], skip: Tensor | None = None) -> None:
        """Move the parameters, given the gradient of each; not where ``skip`` is 1.

        ``skip`` is a scalar tensor on a GPU, which decides there: nobody has to wait for it.
        """
        self._count.add_(1.0 if skip is None else 1.0 - skip)
        torch._fused_adamw_(
            self.parameters,
            list(gradients),
            self._means,
            self._squares,
            [],
            self._steps,
            lr=self._learning_rate,
            beta1=0.9,
            beta2=0.999,
            weight_decay=self._weight_decay,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
            found_inf=skip,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The moments, by number of the parameter; not copied."""
        named = {"step": self._steps, "exp_avg": self._means, "exp_avg_sq": self._squares}
        return {
            f"{i}.{key}": tensor
            for key, tensors in named.items()
            for i, tensor in enumerate(tensors)
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`state_dict`, in place; KeyError if a moment is missing.

        An empty state is that before the first step, as runs of earlier versions stored it.
        """
        for key, tensor in self.state_dict().items():
            if state:
                tensor.copy_(state[key])
            else:
                tensor.zero_()
