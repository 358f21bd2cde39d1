"""torchrl's loss modules (MIT) with plain Adam and SoftUpdate, on a TensorDict replay buffer."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import CQLLoss, IQLLoss, SACLoss, SoftUpdate
from worker import BATCH, HIDDEN, ROWS, Shape

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def actor_of(shape: Shape) -> ProbabilisticActor:
    """A tanh-Gaussian."""
    net = MLP(shape.observation, 2 * shape.action, 2, HIDDEN, activation_class=nn.ReLU)
    return ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(net, NormalParamExtractor()), ["observation"], ["loc", "scale"]
        ),
        in_keys=["loc", "scale"],
        spec=Bounded(-1.0, 1.0, (shape.action,)),
        distribution_class=TanhNormal,
        return_log_prob=True,
    )


def q_of(shape: Shape) -> ValueOperator:
    """One critic; the losses make as many as they need."""
    net = MLP(shape.observation + shape.action, 1, 2, HIDDEN, activation_class=nn.ReLU)
    return ValueOperator(net, ["observation", "action"])


def buffer_of(shape: Shape) -> TensorDictReplayBuffer:
    """Random transitions."""
    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(2, ROWS, shape.observation, generator=generator)
    ended = torch.zeros(ROWS, 1, dtype=torch.bool)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(ROWS), batch_size=BATCH)
    buffer.extend(
        TensorDict(
            {
                "observation": observations[0],
                "action": torch.rand(ROWS, shape.action, generator=generator) * 1.98 - 0.99,
                "next": {
                    "observation": observations[1],
                    "reward": torch.randn(ROWS, 1, generator=generator),
                    "done": ended,
                    "terminated": ended.clone(),
                },
            },
            [ROWS],
        )
    )
    return buffer


def case(name: str, critics: int = 2) -> Callable[[Shape], Callable[[int], None]]:
    """All losses of a module in one backward pass and one step of Adam."""

    def build(shape: Shape) -> Callable[[int], None]:
        torch.manual_seed(0)
        actor, q, buffer = actor_of(shape), q_of(shape), buffer_of(shape)
        if name == "sac":
            loss = SACLoss(actor, q, num_qvalue_nets=critics)
        elif name == "iql":
            value = MLP(shape.observation, 1, 2, HIDDEN, activation_class=nn.ReLU)
            loss = IQLLoss(actor, q, ValueOperator(value, ["observation"]), num_qvalue_nets=2)
        else:
            loss = CQLLoss(actor, q, action_spec=Bounded(-1.0, 1.0, (shape.action,)))
        loss.make_value_estimator(gamma=0.99)
        targets = SoftUpdate(loss, eps=0.995)
        optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4)

        def run(n: int) -> None:
            for _ in range(n):
                losses = loss(buffer.sample())
                optimizer.zero_grad()
                sum(v for k, v in losses.items() if k.startswith("loss_")).backward()
                optimizer.step()
                targets.step()

        return run

    return build


CASES = {
    "sac 2 critics": case("sac"),
    "sac 10 critics": case("sac", 10),
    "iql": case("iql"),
    "cql": case("cql"),
}
