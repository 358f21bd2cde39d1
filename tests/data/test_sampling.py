"""Half and half in EVERY slice, for any ratio and UTD; stratified draws stay unbiased."""

import numpy as np
import pytest
import torch

from safe_offrl.data.dataset import Dataset
from safe_offrl.data.sampling import (
    RiskSampler,
    StratifiedSampler,
    SuccessiveSampler,
    n_step_costs,
    symmetric_batches,
    uniform_batches,
)
from safe_offrl.types import Layout

LAYOUT = Layout(observation_size=3, action_size=2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(n: int, value: float) -> torch.Tensor:
    return torch.full((n, LAYOUT.width), value)


@pytest.mark.parametrize("updates", [1, 4, 20])
@pytest.mark.parametrize(
    ("batch_size", "share", "n_offline"),
    [(256, 0.5, 128), (8, 0.25, 2), (10, 0.75, 8), (7, 0.5, 4), (16, 0.0, 0), (16, 1.0, 16)],
)
def test_every_slice_has_the_exact_share_with_offline_rows_first(
    updates: int, batch_size: int, share: float, n_offline: int
) -> None:
    drawn = symmetric_batches(
        filled(50, -1.0),
        filled(3, 1.0),
        LAYOUT,
        updates=updates,
        batch_size=batch_size,
        offline_share=share,
        generator=generator(),
    )
    assert len(drawn) == updates
    for batch in drawn:
        assert batch.observations.shape == (batch_size, 3)
        assert batch.actions.shape == (batch_size, 2)
        assert {len(field) for field in batch.tensors} == {batch_size}
        assert torch.equal(batch.rewards[:n_offline], torch.full((n_offline,), -1.0))
        assert bool((batch.rewards[n_offline:] == 1.0).all())


def test_rows_stay_aligned_and_every_row_is_reachable() -> None:
    rows = torch.arange(6.0).unsqueeze(1).expand(-1, LAYOUT.width).clone()
    drawn = symmetric_batches(
        rows,
        rows + 100,
        LAYOUT,
        updates=20,
        batch_size=32,
        offline_share=0.5,
        generator=generator(),
    )
    for batch in drawn:
        for field in batch.tensors:  # all columns of a row carry its number
            spread = field if field.ndim == 2 else field.unsqueeze(-1)
            assert bool((spread == batch.rewards.unsqueeze(-1)).all())
    rewards = torch.stack([batch.rewards for batch in drawn])
    assert set(rewards[:, :16].flatten().tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}
    assert set(rewards[:, 16:].flatten().tolist()) == {100.0 + k for k in range(6)}
    assert not torch.equal(rewards[0], rewards[1])  # every batch is drawn afresh


def test_draws_depend_on_the_generator_alone() -> None:
    rows = torch.randn(40, LAYOUT.width, generator=generator(3))
    torch.manual_seed(0)
    first = uniform_batches(rows, LAYOUT, 3, 8, generator(1))[2]
    torch.manual_seed(1)
    again = uniform_batches(rows, LAYOUT, 3, 8, generator(1))[2]
    other = uniform_batches(rows, LAYOUT, 3, 8, generator(2))[2]
    assert torch.equal(first.observations, again.observations)
    assert not torch.equal(first.observations, other.observations)
    assert first.rewards.shape == (8,)


def test_an_empty_store_serves_only_a_share_of_zero() -> None:
    empty = torch.zeros(0, LAYOUT.width)

    def draw(share: float) -> None:
        symmetric_batches(
            filled(5, 1.0),
            empty,
            LAYOUT,
            updates=2,
            batch_size=4,
            offline_share=share,
            generator=generator(),
        )

    with pytest.raises(ValueError, match="empty"):
        draw(0.5)
    with pytest.raises(ValueError, match="outside"):
        draw(1.5)
    with pytest.raises(ValueError, match="outside"):
        draw(float("nan"))


def test_stratified_weights_by_hand() -> None:
    # N = 10, 2 accidents, share .5: q = .05 + .25 = .3 for an accident, .05 otherwise, so the
    # weights are .1 / .3 = 1/3 and .1 / .05 = 2.
    accidents = torch.tensor([1.0, 0, 0, 0, 1.0, 0, 0, 0, 0, 0])
    index, weights = StratifiedSampler(accidents).draw(4000, 0.5, generator())
    drawn = accidents[index] > 0
    assert torch.allclose(weights[drawn], torch.tensor(1 / 3))
    assert torch.allclose(weights[~drawn], torch.tensor(2.0))
    # An accident is drawn with probability 2 * .3 = .6; standard error sqrt(.24 / 4000) = .0077.
    assert abs(float(drawn.float().mean()) - 0.6) < 0.03
    assert set(index.tolist()) == set(range(10))


def test_stratified_weighted_means_are_unbiased() -> None:
    values = torch.randn(200, generator=generator(5))
    accidents = (torch.arange(200) % 25 == 0).float()
    values = values + 3 * accidents
    for share in (0.0, 0.3, 0.8):
        index, weights = StratifiedSampler(accidents).draw(200_000, share, generator(7))
        assert weights.shape == (200_000,)
        assert abs(float(weights.mean()) - 1.0) < 0.02
        assert abs(float((weights * values[index]).mean() - values.mean())) < 0.02
        # The accidents' prior, the very thing oversampling would distort.
        assert abs(float((weights * accidents[index]).mean()) - 0.04) < 0.002


def test_stratified_without_accidents_is_uniform() -> None:
    index, weights = StratifiedSampler(torch.zeros(6)).draw(600, 0.5, generator())
    assert torch.equal(weights, torch.ones(600))
    assert set(index.tolist()) == set(range(6))


def test_stratified_refuses_what_cannot_be_corrected() -> None:
    sampler = StratifiedSampler(torch.tensor([0.0, 1.0]))
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="outside"):
            sampler.draw(3, share, generator())
    with pytest.raises(ValueError, match="expected"):
        StratifiedSampler(torch.zeros(0))


def risky(
    steps: int = 1, discount: float = 1.0, layout: Layout = LAYOUT
) -> tuple[RiskSampler, torch.Tensor]:
    """Episodes of 3 and 2 steps with the costs 1, 2, 4 and 8, 16; the second ends for good.

    Row i has observation i and next observation 100 + i. Signal k costs 10 ** (k + 1) as much.
    """
    rows = torch.zeros(5, layout.width)
    batch = layout.unpack(rows)
    batch.observations[:] = torch.arange(5.0).unsqueeze(1)
    batch.next_observations[:] = 100.0 + torch.arange(5.0).unsqueeze(1)
    batch.costs[:] = 2.0 ** torch.arange(5.0)
    batch.accidents[4] = batch.terminated[4] = 1.0
    starts = torch.tensor([0, 3, 5])
    columns = [batch.costs * 10.0**k for k in range(1 + len(layout.signals))]
    if batch.signals is not None:
        batch.signals[:] = torch.stack(columns[1:], dim=-1)
    costs, spans = n_step_costs(torch.stack(columns, dim=-1), starts, steps, discount)
    stratified = StratifiedSampler(batch.accidents)
    return RiskSampler(rows, layout, stratified, costs, spans, steps=steps), rows


def test_n_step_transitions_by_hand() -> None:
    sampler, _ = risky(steps=2, discount=0.5)
    batch, _, spans = sampler.draw(200, 0.25, generator())
    at = batch.observations[:, 0].long()
    assert set(at.tolist()) == set(range(5))
    # 1 + 2/2, 2 + 4/2, 4; 8 + 16/2, 16: no sum goes past the end of its episode.
    assert torch.equal(batch.costs, torch.tensor([2.0, 4.0, 4.0, 16.0, 16.0])[at])
    assert torch.equal(spans, torch.tensor([2.0, 2.0, 1.0, 2.0, 1.0])[at])
    following = torch.tensor([101.0, 102.0, 102.0, 104.0, 104.0])[at]
    assert torch.equal(batch.next_observations[:, 0], following)
    assert torch.equal(batch.terminated, (at >= 3).float())


def test_n_steps_beyond_every_episode_are_the_whole_rest() -> None:
    batch, _, spans = risky(steps=50)[0].draw(200, 0.0, generator())
    at = batch.observations[:, 0].long()
    assert torch.equal(batch.costs, torch.tensor([7.0, 6.0, 4.0, 24.0, 16.0])[at])
    assert torch.equal(spans, torch.tensor([3.0, 2.0, 1.0, 2.0, 1.0])[at])


def test_signals_are_summed_over_the_steps_that_the_cost_is() -> None:
    sampler, _ = risky(2, 0.5, Layout(*LAYOUT.sizes, ("hazards", "vases")))
    batch, _, _ = sampler.draw(200, 0.25, generator())
    at = batch.observations[:, 0].long()
    costs = torch.tensor([2.0, 4.0, 4.0, 16.0, 16.0])[at]
    assert torch.equal(batch.costs, costs)
    assert batch.signals is not None
    assert torch.equal(batch.signals, torch.stack([10.0 * costs, 100.0 * costs], dim=-1))


@pytest.mark.parametrize("signals", [(), ("hazards", "vases")])
def test_one_step_is_the_stored_transition_with_its_weight(signals: tuple[str, ...]) -> None:
    layout = Layout(*LAYOUT.sizes, signals)
    sampler, rows = risky(layout=layout)
    batch, weights, spans = sampler.draw(60, 0.5, generator(3))
    index, expected = StratifiedSampler(layout.unpack(rows).accidents).draw(60, 0.5, generator(3))
    assert torch.equal(layout.pack(batch), rows[index])
    assert torch.equal(weights, expected)
    assert torch.equal(spans, torch.ones(60))


def test_the_action_after_is_that_of_the_next_row_of_the_same_episode() -> None:
    """Episodes of 3, 1 and 2 steps; the action of row i is (i, i)."""
    rows = torch.arange(6.0).unsqueeze(1).expand(-1, LAYOUT.width).clone()
    starts = np.array([0, 3, 4, 6])
    sampler = SuccessiveSampler(Dataset(rows, LAYOUT, starts, np.zeros(6, bool), 3, ""))
    batch, following = sampler.draw(400, generator())
    row, known = batch.rewards, following.known
    assert set(row[known == 1.0].tolist()) == {0.0, 1.0, 4.0}
    assert set(row[known == 0.0].tolist()) == {2.0, 3.0, 5.0}
    assert torch.equal(batch.actions, row.unsqueeze(1).expand(-1, 2))
    assert torch.equal(following.actions[known == 1.0], batch.actions[known == 1.0] + 1.0)
    assert following.actions.shape == (400, 2)
