"""What a policy that never acted would do, from the log alone: fitted Q evaluation, bootstrapped.

Fitted Q evaluation (Le, Voloshin & Yue 2019, arXiv:1903.08738) of one fixed policy, undiscounted
within the horizon: its risk (accident probability, or cost as a share of the largest) and return.

* Small networks learn both by temporal differences. Only what their last hidden layers see of a
  step is kept, as features phi(s, t, a) of all of them together.
* On these features the fixed point of the evaluation is a linear system, solved exactly: what a
  gradient descent leaves undone is not left undone here (least squares on learnt features: Levine
  et al. 2017, arXiv:1705.07461; as an estimator: Duan, Jia & Wang 2020, arXiv:2002.09516).
* The system is a sum over episodes, so the bootstrap over episodes (Hao et al. 2021,
  arXiv:2102.03607) takes sums with random weights and solves again: hundreds of replicates in
  seconds, none of them with the noise of a training of its own.
* Features learnt from half of the episodes serve in the system of the other half, and the two
  estimates are averaged. Where features and system share episodes the networks have fitted their
  noise too, and the bootstrap says half of the true error.

The same system with the log's own next actions says what the log itself shows: how far it is off
there is part of the error.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safe_offrl.assess.fitted_features import (
    HALVES,
    RETURN,
    RISK,
    Features,
    FittedConfig,
    TellShare,
    episode_totals,
    learn_features,
    take,
)
from safe_offrl.data.dataset import Dataset
from safe_offrl.limits import Limit
from safe_offrl.policies.networks import Actor


class Fitted(NamedTuple):
    """An estimate of one quantity, in its own unit, and what its error is made of."""

    value: float
    sampling: float  # standard error by the bootstrap over episodes
    disagreement: float  # half the difference between the two halves of the log
    features: float  # how far it moves when half of the networks are left out
    misfit: float  # of the log's own mean, by the same fit with the log's own actions
    episodes: float  # effective number of logged episodes that speak of the policy

    @property
    def error(self) -> float:
        """Standard error: of the sampling (no less than the disagreement), features and misfit."""
        return self.error_of(1.0)

    def error_of(self, times: float) -> float:
        """What it would be with so many ``times`` as many episodes: sampling alone gets better."""
        sampling = max(self.sampling, self.disagreement) / math.sqrt(times)
        return float(np.linalg.norm([sampling, self.features, self.misfit]))


class Evaluation(NamedTuple):
    """What is found of both quantities; ``q_values`` only if asked for."""

    risk: Fitted
    returns: Fitted
    q_values: Tensor | None  # [2, 2, N]: (Q of the logged action, V), (risk, return), step


# --- the linear system ------------------------------------------------------------------------


class Moments(NamedTuple):
    """Sums over the steps (and start states) of each of G groups of episodes, D features."""

    gram: Tensor  # [G, D, D], phi phi^T
    following: Tensor  # [2, G, D, D], phi (continuation E_pi phi')^T, for each quantity
    outcomes: Tensor  # [2, G, D], phi outcome
    starts: Tensor  # [G, D], E_pi phi of start states
    episodes: Tensor  # [G]

    def summed(self) -> Moments:
        """As of one group."""
        return Moments(
            self.gram.sum(0, keepdim=True),
            self.following.sum(1, keepdim=True),
            self.outcomes.sum(1, keepdim=True),
            self.starts.sum(0, keepdim=True),
            self.episodes.sum(0, keepdim=True),
        )

    def only(self, columns: Tensor) -> Moments:
        """Of these features alone, an index [d]."""
        rows = columns.unsqueeze(1)
        return Moments(
            self.gram[:, rows, columns],
            self.following[:, :, rows, columns],
            self.outcomes[:, :, columns],
            self.starts[:, columns],
            self.episodes,
        )


ALONE = torch.ones(1, 1, dtype=torch.float64)  # the weights of one group


def bootstrap_weights(replicates: int, groups: int, rng: np.random.Generator) -> Tensor:
    """Weights [1 + replicates, groups], each row summing to the number of groups.

    The first row is all ones. The others are those of the Bayesian bootstrap (Rubin 1981): as
    spread as counts of draws with replacement, and never 0, so no replicate loses a part of the
    log that its system cannot do without.
    """
    drawn = rng.exponential(size=(replicates, groups))
    drawn *= groups / drawn.sum(axis=1, keepdims=True)
    return torch.from_numpy(np.concatenate([np.ones((1, groups)), drawn]))


class Solution(NamedTuple):
    """What a system says: values for each row of weights; the rest for the first row."""

    values: Tensor  # [R, 2], of the start states
    shares: Tensor  # [2], of the log's steps that speak of the policy
    weights: Tensor  # [2, D], of the features


def solve(moments: Moments, weights: Tensor, ridge: float) -> Solution:
    """Values of both quantities for each row of weights of the groups [R, G].

    ``w = (S + ridge I - F)^-1 b`` solves ``phi^T w = outcome + E_pi phi'^T w`` by least squares
    over the log's steps, and the value is that of the start states, ``z^T w``. Read the other way
    round it weighs the log's outcomes by ``mu_i = phi_i^T (S + ridge I - F)^-T z``, the
    occupancy of the policy over that of the log: its Kish share ``(sum mu)^2 / (N sum mu^2)`` says
    how much of the log speaks of the policy.
    """
    # Sizes, and what the ridge is relative to.
    values = torch.empty(len(weights), 2, dtype=torch.float64)
    shares = torch.empty(2, dtype=torch.float64)
    size = moments.gram.shape[-1]
    eye = torch.eye(size, dtype=torch.float64)
    first = torch.empty(2, size, dtype=torch.float64)
    total = moments.gram.sum(0).diagonal().double()
    strength = ridge * total.mean() / total[-1]  # The last feature is 1 and counts steps.
    flat = moments.gram.flatten(1)
    # Each quantity.
    for quantity in (RISK, RETURN):
        differences = flat - moments.following[quantity].flatten(1)
        outcomes = moments.outcomes[quantity].double()
        for part in torch.arange(len(weights)).split(20):
            # Values of a part of the weights.
            w = weights[part]
            systems = (w.float() @ differences).double().unflatten(1, (size, size))
            systems = systems + strength * eye
            starts = (w @ moments.starts.double()) / (w @ moments.episodes.double()).unsqueeze(1)
            solution = torch.linalg.solve(systems, w @ outcomes)
            values[part, quantity] = (solution * starts).sum(1)
            if part[0] == 0:
                # Kish share, of the first row of weights alone.
                first[quantity] = solution[0]
                ratio = torch.linalg.solve(systems[0].T, starts[0])
                gram = (w[0].float() @ flat).double().unflatten(0, (size, size))
                total, squares = ratio @ gram[:, -1], ratio @ gram @ ratio
                shares[quantity] = total.square() / (gram[-1, -1] * squares)
    return Solution(values, shares, first)


def gather(
    dataset: Dataset,
    limit: Limit,
    groups: list[np.ndarray],
    features: Features,
    generator: torch.Generator,
) -> tuple[Moments, Moments]:
    """The moments of these groups of episodes: under the policy, and under the log's own actions.

    Those of the log's own actions are one sum, G = 1: its system is solved once.
    """
    parts, own = [], []
    for episodes in groups:
        # Steps of a group, and features of what follows them.
        index = torch.from_numpy(_rows_of(dataset, episodes))
        steps = take(dataset, limit, index)
        batch = steps.batch
        here = features.of(batch.observations, batch.time_to_go, batch.actions)
        there = batch.next_observations, steps.next_time_to_go
        going_on = steps.continuation(limit).unsqueeze(2)
        ahead = going_on * features.under_policy(*there, generator)
        logged = going_on * features.of(*there, steps.next_actions)
        # Start states.
        starts = torch.from_numpy(dataset.episode_starts[episodes])
        first = dataset.layout.unpack(dataset.rows[starts])
        at_start = features.under_policy(first.observations, first.time_to_go, generator)
        at_logged = features.of(first.observations, first.time_to_go, first.actions)
        # Moments.
        count = torch.tensor(float(len(episodes)))
        gram, outcomes = here.T @ here, steps.outcomes @ here
        parts.append((gram, here.T @ ahead, outcomes, at_start.sum(0), count))
        own.append((here.T @ logged, at_logged.sum(0)))
    # All groups under the policy, and their sum under the log's own actions.
    gram, following, outcomes, starts, counts = map(torch.stack, zip(*parts, strict=True))
    under_policy = Moments(
        gram, following.transpose(0, 1), outcomes.transpose(0, 1), starts, counts
    )
    following, starts = (sum(column) for column in zip(*own, strict=True))
    whole = under_policy.summed()
    return under_policy, whole._replace(following=following.unsqueeze(1), starts=starts[None])


def _rows_of(dataset: Dataset, episodes: np.ndarray) -> np.ndarray:
    spans = dataset.episode_starts
    return np.concatenate([np.arange(spans[e], spans[e + 1]) for e in episodes])


# --- the evaluation ---------------------------------------------------------------------------


def evaluate_fitted(
    dataset: Dataset,
    actor: Actor,
    limit: Limit,
    config: FittedConfig,
    seed: int = 0,
    *,
    with_q: bool = False,
    progress: TellShare = lambda _: None,
) -> Evaluation:
    """Evaluate a policy from a dataset as it sees it (normalised), of at least two episodes.

    The risk is in units of ``limit.scale``. Memory maps are drawn from, never copied.
    """
    # Halves of the episodes.
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    halves = np.array_split(rng.permutation(dataset.episodes), HALVES)
    half_of_episode = np.isin(np.arange(dataset.episodes), halves[1])
    half_of_row = torch.from_numpy(np.repeat(half_of_episode, dataset.episode_lengths)).long()
    # Features, learnt from each half.
    net = learn_features(
        dataset, actor, limit, half_of_row, config, generator, lambda done: progress(0.8 * done)
    )
    members = torch.arange(net.members).view(2, HALVES, -1)
    # Fits on each half, by features that the other one taught.
    results = []
    aside = torch.Generator().manual_seed(seed)  # Asking for q_values must not change the rest.
    q_values = torch.empty(2, 2, len(dataset.rows), dtype=torch.float64)
    for half, episodes in enumerate(halves):
        features = Features(net, members[:, 1 - half].flatten(), actor, config.actions)
        groups = np.array_split(episodes, min(config.groups, len(episodes)))
        under_policy, own = gather(dataset, limit, groups, features, generator)
        weights = bootstrap_weights(config.replicates, len(groups), rng)
        solution = solve(under_policy, weights, config.ridge)
        by_each = _by_each_network(under_policy, config).mean(0)
        logged = solve(own, ALONE, config.ridge).values[0]
        results.append(_Half(solution.values, by_each, logged, solution.shares * len(episodes)))
        # Values of each logged step, for whoever reweighs them.
        for group in groups if with_q else ():
            rows = torch.from_numpy(_rows_of(dataset, group))
            batch = dataset.layout.unpack(dataset.rows[rows])
            seen = batch.observations, batch.time_to_go
            taken = features.of(*seen, batch.actions)
            for k, phi in enumerate((taken, features.under_policy(*seen, aside))):
                q_values[k, :, rows] = solution.weights @ phi.T.double()
        progress(0.9 + 0.1 * half)
    # Both halves together.
    both = _Half(*(torch.stack(column) for column in zip(*results, strict=True)))
    means = logged_means(dataset, limit)
    risk, returns = (_fitted(both, quantity, *means[quantity]) for quantity in (RISK, RETURN))
    return Evaluation(risk, returns, q_values if with_q else None)


class _Half(NamedTuple):
    """What one half of the log says, or both with an axis in front."""

    values: Tensor  # [1 + R, 2], the first of the log as it is, the others of the bootstrap
    by_each: Tensor  # [2], mean of the estimates by one network each
    logged: Tensor  # [2], of the log's own actions
    episodes: Tensor  # [2], effective


def _fitted(both: _Half, quantity: int, least: float, most: float) -> Fitted:
    """One quantity from both halves. Its mean over the log lies between ``least`` and ``most``."""
    values = both.values[..., quantity]  # [2, 1 + R]
    value, first = values.mean(0), values[:, 0]
    # It is half the central 68 %: one replicate whose system is nearly singular must not decide.
    low, high = np.quantile(value[1:].numpy(), [0.16, 0.84])
    logged = float(both.logged[:, quantity].mean())
    return Fitted(
        value=float(value[0]),
        sampling=float(high - low) / 2.0,
        disagreement=float((first[0] - first[1]).abs()) / 2.0,
        features=float((value[0] - both.by_each[:, quantity].mean()).abs()),
        misfit=max(0.0, least - logged, logged - most),
        episodes=float(both.episodes[:, quantity].sum()),
    )


def _by_each_network(moments: Moments, config: FittedConfig) -> Tensor:
    """Values by one network of each quantity alone, the constant kept: [networks, 2]."""
    last = moments.gram.shape[-1] - 1
    columns = torch.arange(last).view(2, config.networks, -1)
    alone = (
        moments.summed().only(torch.cat([columns[:, k].flatten(), torch.tensor([last])]))
        for k in range(config.networks)
    )
    return torch.stack([solve(m, ALONE, config.ridge).values[0] for m in alone])


def logged_means(dataset: Dataset, limit: Limit) -> tuple[tuple[float, float], tuple[float, float]]:
    """Between what the log's own mean risk, in units of ``limit.scale``, and mean return lie.

    An episode that was cut off would have gone on to anything: to an accident, to the largest cost
    for the rest of it, to any return at all.
    """
    risk, returns = episode_totals(dataset, limit)
    cut = ~whole_episodes(dataset)
    ahead = 1.0 - dataset.episode_lengths / dataset.horizon
    most = limit.quantity.select(np.ones_like(risk), risk + ahead)
    unknown = math.inf if cut.any() else 0.0
    mean = float(returns.mean())
    return (
        (float(risk.mean()), float(np.where(cut, most, risk).mean())),
        (mean - unknown, mean + unknown),
    )


def whole_episodes(dataset: Dataset) -> NDArray[np.bool_]:
    """Which episodes [M] ended or reached the horizon: of another the sum is not its value."""
    last = torch.from_numpy(dataset.episode_starts[1:] - 1)
    ended = dataset.layout.unpack(dataset.rows[last]).terminated.numpy() > 0
    whole: NDArray[np.bool_] = ended | (dataset.episode_lengths == dataset.horizon)
    return whole
