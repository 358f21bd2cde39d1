import pytest
import torch

from safe_offrl.errors import ConfigError
from safe_offrl.lagrangian import LagrangianConfig, Multiplier


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
