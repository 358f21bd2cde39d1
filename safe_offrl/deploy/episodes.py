"""One complete episode of the policy behind shield and guard, as rows for the buffer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.contract import ask
from safe_offrl.errors import EnvError, EnvFault
from safe_offrl.types import Episode, Layout

FAULTS_IN_A_ROW = 3  # episodes that the environment may fail in before the run stops


class PlayedEpisode(NamedTuple):
    """What happened; ``rows`` [n, D] are transitions with the EXECUTED actions.

    ``fault`` says in words how the environment failed. Whether the step that it failed in was an
    accident is unknown, so it counts as one, and nothing of the episode is to be learnt from.
    """

    rows: Tensor
    steps: int  # taken, the one that failed included
    episode_return: float
    cost: float
    accident: bool
    accident_steps: int
    shield_interventions: int
    fault: str = ""
    signal_costs: Mapping[str, float] = {}  # sums of the named cost signals
    handed_over: tuple[bool, ...] = ()  # of each row, whether the guard's fallback acted

    @property
    def content(self) -> str:
        """Hash of observations, actions and outcomes; "" if the environment failed."""
        return "" if self.fault else hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()[:16]

    def recorded(
        self,
        *,
        index: int,
        seed: int,
        steps_before: int,
        worst_cost: float,
        version: int,
        phase: str,
        content: str = "",
        worst_signals: Mapping[str, float] | None = None,
    ) -> Episode:
        """What the ledger keeps of it; ``steps_before`` were charged by earlier episodes.

        ``worst_cost`` is the most that an episode is known to cost: what a fault counts as, and
        ``worst_signals`` that of each named cost.
        ``content`` tells episodes of one frozen policy apart.
        """
        fault = bool(self.fault)
        worst = (worst_signals or {}) if fault else {}
        return Episode(
            index=index,
            seed=seed,
            steps=self.steps,
            total_steps=steps_before + self.steps,
            episode_return=self.episode_return,
            cost=max(self.cost, worst_cost) if fault else self.cost,
            accident=self.accident or fault,
            accident_steps=max(self.accident_steps, int(fault)),
            version=version,
            phase=phase,
            shield_interventions=self.shield_interventions,
            outcome="fault" if fault else "complete",
            content=content,
            signal_costs={k: max(v, worst.get(k, v)) for k, v in self.signal_costs.items()},
            guarded_steps=sum(self.handed_over),
        )


class Reservation(NamedTuple):
    """An episode is about to begin; until its end is known it counts as ``worst``."""

    worst: Episode

    @classmethod
    def for_episode(
        cls,
        *,
        index: int,
        seed: int,
        steps: int,
        steps_before: int,
        worst_cost: float,
        version: int,
        phase: str,
        worst_signals: Mapping[str, float] | None = None,
    ) -> Reservation:
        """The most that an episode can take: all its steps, these costs, and an accident."""
        return cls(
            Episode(
                index=index,
                seed=seed,
                steps=steps,
                total_steps=steps_before + steps,
                episode_return=0.0,
                cost=worst_cost,
                accident=True,
                accident_steps=1,
                version=version,
                phase=phase,
                shield_interventions=0,
                outcome="lost",
                signal_costs=worst_signals or {},
            )
        )


def play_episode(
    env: AccidentEnv,
    policy: DeployedPolicy,
    seed: int,
    rng: np.random.Generator,
    *,
    mean_action: bool = False,
) -> PlayedEpisode:
    """Reset with ``seed`` and act until the episode ends.

    Observations are standardised by the policy's normalizer, in what it sees and in the rows, and
    the rows' rewards are scaled by it; the episode's return is in the environment's unit.
    Return-to-go is left at 0 in the rows: only Cal-QL reads it, and fills it in. Where the
    environment fails, the episode ends, and its ``fault`` says how. Raises EnvError when the policy
    wants a non-finite action, which is never sent, and for settings that do not fit the
    environment.
    """
    normalizer = policy.normalizer
    rows: list[np.ndarray] = []
    total = cost = 0.0
    steps = accidents = interventions = 0
    handed_over: list[bool] = []
    until_end = policy.guard is not None and policy.guard.until_end
    signal_costs = dict.fromkeys(env.signals, 0.0)
    ended = False
    fault = ""
    try:
        observation = normalizer(ask(env.reset, seed=seed)[0])
        while not ended:
            # The action, behind shield and guard.
            time_to_go = 1.0 - len(rows) / env.horizon
            if until_end and handed_over[-1:] == [True]:
                assert policy.guard is not None
                action = policy.guard.fallback_action(observation, time_to_go)
                replaced, handed = False, True
            else:
                spent = {"cost": cost, **signal_costs}
                action, replaced, handed = policy.act(
                    observation, time_to_go, rng, spent, mean_action=mean_action
                )
            if not np.isfinite(action).all():
                raise EnvError(
                    "The policy's action is not finite, so nothing was sent to the environment. Go "
                    "back to an earlier checkpoint, or lower the learning rate."
                )
            # The step, charged before it is taken.
            steps += 1
            interventions += replaced
            handed_over.append(handed)
            raw, reward, terminated, truncated, info = ask(env.step, action)
            following = normalizer(raw)
            # The transition, with the executed action.
            accident = bool(info["accident"])
            row = Layout.row(
                observation,
                action,
                following,
                rewards=reward * normalizer.reward_scale,
                accidents=accident,
                costs=info["cost"],
                terminated=terminated,
                time_to_go=time_to_go,
                return_to_go=0.0,
                signals=[info["signals"][name] for name in signal_costs],
            )
            rows.append(row)
            # The totals of the episode.
            observation, ended = following, terminated or truncated
            total += float(reward)
            cost += float(info["cost"])
            accidents += accident
            for name in signal_costs:
                signal_costs[name] += info["signals"][name]
    except EnvFault as error:
        fault = str(error)
    return PlayedEpisode(
        rows=torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0),
        steps=steps,
        episode_return=total,
        cost=cost,
        accident=accidents > 0,
        accident_steps=accidents,
        shield_interventions=interventions,
        fault=fault,
        signal_costs=signal_costs,
        handed_over=tuple(handed_over),
    )


def distinct(episodes: Iterable[Episode]) -> list[Episode]:
    """Of a frozen policy's episodes those that differ in anything that happened, the first of each.

    One whose end is unknown is one of its own.
    """
    first: dict[str, Episode] = {}
    for episode in episodes:
        first.setdefault(episode.content or f"unknown {episode.index}", episode)
    return list(first.values())


def faults_in_a_row(before: int, fault: str) -> int:
    """How many episodes in a row have failed, this one included; EnvError if it is enough."""
    if not fault:
        return 0
    if before + 1 == FAULTS_IN_A_ROW:
        raise EnvError(
            f"The environment failed in {FAULTS_IN_A_ROW} episodes in a row, the last time so: "
            f"{fault} Each counts as an accident of unknown outcome. Repair the environment before "
            "you continue."
        )
    return before + 1
