import pytest
import torch

from safe_offrl.errors import ConfigError
from safe_offrl.safety.multiplier import LagrangianConfig, Multiplier, PIDConfig, PIDMultiplier


def make(**settings: float) -> Multiplier:
    return Multiplier(LagrangianConfig(**settings), limit=0.1)


def test_dual_ascent_by_hand() -> None:
    multiplier = make(init=1.0, learning_rate=0.5)
    multiplier.update(torch.tensor(0.15))  # 50 % above epsilon
    assert multiplier.value.item() == pytest.approx(1.25)
    multiplier.update(torch.tensor(0.08))  # 20 % below
    assert multiplier.value.item() == pytest.approx(1.15)
    multiplier.update(torch.tensor(0.1))
    assert multiplier.value.item() == pytest.approx(1.15)


def test_the_excess_is_clipped() -> None:
    multiplier = make(init=1.0, learning_rate=0.5)
    multiplier.update(torch.tensor(1.0))  # 900 % above epsilon counts as 100 %
    assert multiplier.value.item() == pytest.approx(1.5)


def test_it_stays_between_zero_and_its_maximum() -> None:
    multiplier = make(init=0.01, learning_rate=0.5, maximum=1.2)
    multiplier.update(torch.tensor(0.0))
    assert multiplier.value.item() == 0.0
    for _ in range(5):
        multiplier.update(torch.tensor(0.9))
    assert multiplier.value.item() == pytest.approx(1.2)


def test_it_starts_constrained_and_is_updated_in_place() -> None:
    multiplier = Multiplier(LagrangianConfig(), limit=0.1)
    value = multiplier.value
    assert value.item() > 0.0  # zero would leave the first, most dangerous steps unconstrained
    multiplier.update(torch.tensor(0.2))
    assert multiplier.value is value  # losses and checkpoints hold this tensor


def test_aim_steers_below_epsilon() -> None:
    multiplier = make(init=1.0, learning_rate=0.5, aim=0.5)  # towards .05
    multiplier.update(torch.tensor(0.06))  # 20 % above, though below epsilon
    assert multiplier.value.item() == pytest.approx(1.1)


@pytest.mark.parametrize("settings", [{"aim": 0.0}, {"aim": 1.1}, {"init": -1.0}, {"init": 99.0}])
def test_settings_that_would_switch_the_constraint_off_are_refused(
    settings: dict[str, float],
) -> None:
    with pytest.raises(ConfigError):
        make(**settings)


# --- PID ---


def pid_of(maximum: float = 100.0, init: float = 0.0, **settings: float | bool) -> PIDMultiplier:
    return PIDMultiplier(PIDConfig(**settings), init, limit=0.1, maximum=maximum)  # type: ignore[arg-type]


def test_pid_by_hand() -> None:
    """Two updates with v / limit of 1.5, then 2, a delay of 1, and smoothing by halves."""
    pid = pid_of(proportional=2.0, integral=0.5, derivative=3.0, smoothing=0.5, delay=1)
    pid.update(torch.tensor(0.15))
    # s_e = .25, I = .25, s_v = .75 against nothing before.
    assert pid.value.item() == pytest.approx(2 * 0.25 + 0.25 + 3 * 0.75)
    pid.update(torch.tensor(0.2))
    # e = 1: s_e = .625, I = .75, s_v = 1.375 against .75.
    assert pid.value.item() == pytest.approx(2 * 0.625 + 0.75 + 3 * 0.625)
    pid.update(torch.tensor(0.0))
    # e = -1: s_e = -.1875, I = .25, s_v has fallen: no derivative, and not below 0.
    assert pid.value.item() == 0.0
    assert pid.integral.item() == pytest.approx(0.25)


def test_the_derivative_looks_back_by_the_delay() -> None:
    pid = pid_of(proportional=0.0, integral=0.0, derivative=1.0, smoothing=0.0, delay=3)
    values = []
    for v in (0.1, 0.2, 0.3, 0.5, 0.5):
        pid.update(torch.tensor(v))
        values.append(pid.value.item())
    assert values == pytest.approx([1.0, 2.0, 3.0, 5.0 - 1.0, 5.0 - 2.0])


def test_pid_without_the_other_terms_is_dual_ascent() -> None:
    dual = make(init=1.0, learning_rate=0.5, maximum=1.2)
    pid = pid_of(maximum=1.2, init=1.0, proportional=0.0, integral=0.5, derivative=0.0)
    for v in (0.15, 0.08, 0.0, 0.9, 0.9):
        dual.update(torch.tensor(v))
        pid.update(torch.tensor(v))
        assert pid.value.item() == pytest.approx(dual.value.item())


def test_adaptive_gains_follow_the_excess_within_a_factor_of_ten() -> None:
    settings = {"proportional": 1.0, "integral": 1.0, "derivative": 1.0, "smoothing": 0.0}
    pid = pid_of(**settings, delay=2, adaptive=True)
    pid.update(torch.tensor(0.4))  # history 0, 4: mean 2 (.01 is added), deviation 2
    follow, spread = 1 + 0.05 * (1.01 / 2.01), 1 + 0.05 * (2.0 / 2.01)
    assert pid.gains.tolist() == pytest.approx([follow, follow, spread])
    for _ in range(500):
        pid.update(torch.tensor(0.0))  # the factor is .95: far below the limit
    assert pid.gains.tolist()[:2] == pytest.approx([0.1, 0.1])
    for _ in range(500):
        pid.update(torch.tensor(1.0))
    assert pid.gains.tolist()[:2] == pytest.approx([10.0, 10.0])


@pytest.mark.parametrize(
    "settings", [{"proportional": -1.0}, {"delay": 0}, {"smoothing": 1.0}, {"integral": -0.1}]
)
def test_gains_that_would_push_the_wrong_way_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        pid_of(**settings)
