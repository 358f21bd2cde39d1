"""Gradient steps: only the optimiser's own parameters, in parts, and compiled as in eager mode."""

import math
from collections.abc import Iterable, Sequence

import pytest
import torch
from torch import Tensor

from safe_offrl.agents.cql import ConservativeCritics, CQLConfig
from safe_offrl.agents.extraction import Extraction, ExtractionConfig
from safe_offrl.agents.rlpd import RLPD, RLPDConfig
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.compute import descent
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.compiler import CompilerFault, compiler_fault
from safe_offrl.compute.descent import EAGER, Compute, Descent, choose_compute
from safe_offrl.compute.state import collect_state
from safe_offrl.errors import ConfigError
from safe_offrl.policies.kinds import kind_for
from safe_offrl.policies.networks import Actor, NetworkConfig, Networks
from safe_offrl.safety.critic import SafetyCritic, SafetyCriticConfig
from safe_offrl.safety.outlook import AccidentAhead
from safe_offrl.types import Layout, States
from tests.test_golden import ALGORITHMS, batches


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class GradientDescent:
    """``x <- x - lr g``: its steps can be computed by hand."""

    def __init__(self, parameters: Iterable[Tensor], learning_rate: float) -> None:
        self.parameters = list(parameters)
        self.gradients: list[Tensor] = []
        self._learning_rate = learning_rate

    def step(self, gradients: Sequence[Tensor], skip: Tensor | None = None) -> None:
        self.gradients = list(gradients)
        with torch.no_grad():
            torch._foreach_add_(self.parameters, self.gradients, alpha=-self._learning_rate)


def test_a_step_touches_the_optimisers_own_parameters_only() -> None:
    networks = Networks(3, 2, NetworkConfig((8,), (8,), 2), seeded())
    critics = [p.detach().clone() for p in networks.critics.parameters()]
    observations = torch.randn(6, 3, generator=seeded(1))

    def loss(observations: Tensor) -> tuple[Tensor, Tensor]:  # an actor's, through the critics
        mean = networks.actor.layers(observations)[:, :2]
        return networks.q(observations, torch.tanh(mean)).mean(), mean

    optimizer = GradientDescent(networks.actor.parameters(), 0.1)
    descend = Descent(loss, optimizer, EAGER)
    before, mean = descend(observations)
    assert not before.requires_grad
    assert not mean.requires_grad
    assert loss(observations)[0] < before
    for now, then in zip(networks.critics.parameters(), critics, strict=True):
        assert torch.equal(now, then)
        assert now.grad is None


def test_a_step_is_by_hand() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    descend = Descent(lambda a: ((a * x).square().sum(), a), GradientDescent([x], 0.1), EAGER)
    loss, _ = descend(torch.tensor([1.0, 3.0]))
    assert loss.item() == 1.0 + 36.0
    assert x.tolist() == pytest.approx([1.0 - 0.1 * 2.0, 2.0 - 0.1 * 36.0])


def test_parts_of_a_batch_make_the_step_of_the_whole() -> None:
    def step(parts: list[int]) -> tuple[list[float], list[float]]:
        x = torch.tensor([1.0, 2.0], requires_grad=True)
        data = torch.randn(10, 2, generator=seeded())
        descend = Descent(
            lambda a: ((a @ x).square().mean(), a.mean()), GradientDescent([x], 0.1), EAGER
        )
        values = descend.in_parts([(len(a) / 10, (a,)) for a in data.split(parts)])
        return [v.item() for v in values], x.tolist()

    whole = step([10])
    for parts in ([5, 5], [4, 4, 2], [1] * 10):
        for ours, expected in zip(step(parts), whole, strict=True):
            assert ours == pytest.approx(expected, rel=1e-5)


# --- what a run computes with ---


def square_root(x: Tensor, factor: Tensor) -> tuple[Tensor]:  # at 0: finite, its slope is not
    return ((factor * x).sqrt().sum(),)


@pytest.mark.promise("R9")
@pytest.mark.parametrize(
    ("start", "factor"),
    [(1.0, math.nan), (1.0, math.inf), (math.nan, 1.0), (0.0, 1.0)],
    ids=["loss is NaN", "loss is infinite", "parameter is NaN", "gradient alone is infinite"],
)
@pytest.mark.parametrize("in_parts", [False, True], ids=["whole", "in parts"])
def test_the_optimiser_never_steps_on_what_is_not_finite(
    start: float, factor: float, in_parts: bool
) -> None:
    x = torch.tensor([4.0, 9.0], requires_grad=True)
    optimizer = Adam([x], 0.1)
    descend = Descent(square_root, optimizer, EAGER)
    descend(x, torch.tensor(1.0))  # so that Adam has moments that could be spoilt
    with torch.no_grad():
        x[1] = start
    before = [t.clone() for t in (x, *optimizer.state_dict().values())]
    shares = [(1.0, (x, torch.tensor(factor)))]
    if in_parts:
        shares = [(0.5, (x + 1.0, torch.tensor(1.0))), (0.5, shares[0][1])]
    with pytest.raises(FloatingPointError, match=r"^square_root is .* did not step"):
        descend.in_parts(shares)
    after = [x, *optimizer.state_dict().values()]
    assert len(after) == 4
    for now, then in zip(after, before, strict=True):
        assert torch.equal(now.nan_to_num(nan=-1.0), then.nan_to_num(nan=-1.0))


def test_a_short_run_does_not_compile() -> None:
    compute, why = choose_compute("auto", "fp32", descent.WORTH_COMPILING - 1)
    assert compute == EAGER
    assert why == "not compiled: 9,999 updates do not earn it"
    assert choose_compute("off", "fp32", 10**6) == (EAGER, "not compiled")


def test_a_compiler_that_fails_is_no_obstacle_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which ones fail, and how that is found: test_compiler.py."""
    fault = CompilerFault('the C++ compiler "g++" does not work: exit code 1', "Repair it")
    monkeypatch.setattr(descent, "compiler_fault", lambda: fault)
    assert choose_compute("auto", "fp32", 10**6) == (EAGER, f"not compiled: {fault.what}")
    with pytest.raises(
        ConfigError, match=r"^compile is on, but the C.* Repair it, or try compile="
    ):
        choose_compute("on", "fp32", 10)
    monkeypatch.setattr(descent, "compiler_fault", lambda: None)
    assert choose_compute("auto", "fp32", 10**6)[0].compiled
    assert choose_compute("on", "fp32", 1)[0].compiled


def test_bf16_is_refused_where_it_would_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(ConfigError, match="cannot multiply in bfloat16"):
        choose_compute("auto", "bf16", 10**6)
    assert choose_compute("off", "fp32", 1)[0].precision == "fp32"


# --- the compiled path ---

compiles = pytest.mark.skipif(
    compiler_fault() is not None, reason="no C++ compiler that works, or no Python.h"
)


# Compiling takes half a minute: of the rest with `slow`.
FAST = ("rlpd", "csc", "iql", "cql")


@compiles
@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ALGORITHMS]
)
def test_compiled_and_eager_agree_over_a_hundred_steps(name: str) -> None:
    eager, eager_parts = ALGORITHMS[name]()
    compiled, compiled_parts = ALGORITHMS[name](compute=Compute(compiled=True))
    given = [*batches(), *batches()]
    if name == "bcq":  # later a rounding flips a ReLU of its scorer, whose gradients are tiny
        given = given[:75]
    for batch in given:
        values = compiled(batch)
        for key, expected in eager(batch).items():
            torch.testing.assert_close(values[key], expected, rtol=1e-5, atol=1e-5)
    state = collect_state(compiled_parts)
    for key, expected in collect_state(eager_parts).items():
        torch.testing.assert_close(state[key], expected, rtol=1e-5, atol=1e-5)


@compiles
def test_compiled_and_eager_agree_where_actions_are_discrete() -> None:
    layout = Layout(4, 3)

    def metrics(compute: Compute) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        generator = seeded()
        sizes = NetworkConfig((16, 16), (16, 16), 4)
        networks = Networks(*layout.sizes, sizes, generator, kind_for(discrete=True))
        cql = ConservativeCritics(networks, CQLConfig(), compute, calibrated=True)
        extraction = Extraction(networks, ExtractionConfig(), generator, compute)
        learner = RLPD(networks, RLPDConfig(), generator, compute)
        settings = SafetyCriticConfig(members=3, reference=1, hidden=(16,))
        critic = SafetyCritic(*layout.sizes, AccidentAhead(20), settings, generator, compute)
        anchor = Actor(*layout.sizes, (16,), generator, kind_for(discrete=True))
        two = torch.tensor(2.0)
        steering = Steering((Penalty(critic.risk, two),), anchor, two)
        logged = []
        for batch in batches():
            action = torch.randint(3, (32,), generator=generator)
            one_hot = torch.nn.functional.one_hot(action, 3).float()
            batch = batch._replace(actions=one_hot)
            advantages, values = cql.update(batch, generator)
            values |= extraction.update(batch, advantages, steering)
            values |= learner.update_critics(batch)
            values |= learner.update_actor(batch, steering)
            starts = States.at_start(batch.observations[:8])
            values |= critic.update(batch, torch.ones(32), anchor, starts, generator)
            logged.append(values)
        return logged, collect_state(learner.parts() | critic.parts() | extraction.parts())

    eager, compiled = metrics(EAGER), metrics(Compute(compiled=True))
    for ours, expected in zip(compiled[0], eager[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled[1], eager[1], rtol=1e-5, atol=1e-5)


def test_bf16_computes_the_same_to_its_precision() -> None:
    networks = Networks(3, 2, NetworkConfig((32,), (32, 32), 4), seeded())
    observations = torch.randn(64, 3, generator=seeded(1))
    actions = torch.randn(64, 2, generator=seeded(2))
    seen: dict[str, Tensor] = {}

    def step(precision: descent.Precision) -> Tensor:
        optimizer = GradientDescent(networks.critics.parameters(), 0.0)

        def loss() -> tuple[Tensor]:
            q = networks.q(observations, actions)
            seen[precision] = q.detach()
            return (q.square().mean(),)

        (value,) = Descent(loss, optimizer, Compute(precision=precision))()
        gradient = optimizer.gradients[-2]  # of the output layer's weight
        assert gradient.shape == networks.critics.output.weight.shape
        assert gradient.dtype == value.dtype == seen[precision].dtype == torch.float32
        return gradient.clone()

    exact, rounded = step("fp32"), step("bf16")
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(seen["bf16"], seen["fp32"], rtol=0.02, atol=0.01)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.01)
