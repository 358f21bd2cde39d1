"""Adam: a step by hand, and equal to torch's own bit by bit."""

import pytest
import torch

from safe_offrl.compute.adam import Adam


def test_two_steps_are_by_hand() -> None:
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    adam = Adam([x], learning_rate=0.1)
    adam.step([torch.tensor([4.0, -0.5])])  # m / sqrt(v) is the sign at first
    assert x.tolist() == pytest.approx([1.0 - 0.1, -2.0 + 0.1])
    adam.step([torch.tensor([0.0, -0.5])])
    # The first: m = .9 x .1 x 4 / (1 - .9^2), v = .999 x .001 x 16 / (1 - .999^2).
    m, v = 0.36 / 0.19, 0.015984 / 0.001999
    assert x.tolist() == pytest.approx([0.9 - 0.1 * m / v**0.5, -1.9 + 0.1])


def test_weight_decay_is_decoupled() -> None:
    x = torch.tensor([2.0], requires_grad=True)
    Adam([x], learning_rate=0.1, weight_decay=0.5).step([torch.tensor([1.0])])
    assert x.tolist() == pytest.approx([2.0 * (1.0 - 0.1 * 0.5) - 0.1])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_is_torch_s_own_bit_by_bit(weight_decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 33, 65), (65,), ()]
    ours = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    adam = Adam(ours, 1e-3, weight_decay)
    # AdamW without decay would do; that Adam is the same is part of the claim.
    other = (
        torch.optim.AdamW(theirs, lr=1e-3, weight_decay=weight_decay, fused=True)
        if weight_decay
        else torch.optim.Adam(theirs, lr=1e-3, fused=True)
    )
    for _ in range(20):
        gradients = [torch.randn(s, generator=generator) for s in shapes]
        adam.step(gradients)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        other.step()
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one, two)


def test_an_empty_state_is_that_before_the_first_step() -> None:
    x, y = (torch.tensor([1.0, 2.0], requires_grad=True) for _ in range(2))
    used, fresh = Adam([x], 0.1), Adam([y], 0.1)
    used.step([torch.tensor([3.0, -4.0])])
    used.load_state_dict({})
    for key, tensor in used.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[key])
