"""Who learns in an online phase, which parts of the method are active, and why some abstain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safe_offrl.agents import learner_after, reason_to_go_on
from safe_offrl.errors import RunError
from safe_offrl.limits import Limit
from safe_offrl.record.checkpoints import Checkpoint
from safe_offrl.record.run import RunDir
from safe_offrl.safety.calibration import NO_FALLBACK
from safe_offrl.train.finetune_config import FinetuneConfig


def active_line(config: FinetuneConfig, refusals: Mapping[str, tuple[str, ...]]) -> str:
    """The line of a header that names them; ``refusals`` are :func:`pretrained_policy`'s."""
    parts = {
        "KL": config.kl,
        f"{' and '.join(config.safety.bounds)} constraint": config.safety_constraint,
        "shield": config.shield,
        "guard": config.guard,
    }
    if config.baseline.sooper:
        refusals = {**refusals, "guard": ()}  # its own asks nothing of the log
    on = [
        f"{name} (abstains)" if refusals.get(name) else name
        for name, active in parts.items()
        if active
    ]
    why = "".join(
        f"; the {name} abstains for {'; '.join(words)}"
        for name, words in refusals.items()
        if words and parts[name.partition(" of ")[0]]
    )
    learner = config.baseline.learner
    plain = "RLPD" if learner == "rlpd" else learner
    return f"active      {', '.join(on) if on else f'nothing: plain {plain}'}{why}"


def learner_lines(config: FinetuneConfig, agent: str) -> list[str]:
    """Who goes on online, where it is not RLPD, and, where nobody had to ask for it, why."""
    learner = config.baseline.learner
    if learner == "rlpd":
        return []
    why = f": {reason_to_go_on(agent)}" if learner == learner_after(agent) else ""
    return [f"learner     {learner} goes on online in a form of its own{why}"]


def pretrained_policy(
    pretrained: RunDir, limits: Sequence[Limit]
) -> tuple[Checkpoint, dict[str, tuple[str, ...]]]:
    """What an online phase begins with, and why shield and guard abstain, if they do.

    The guard abstains if it may watch no limit at all; if it may watch some, it says which not.
    """
    checkpoint = pretrained.load_checkpoint()
    first, *further = (
        pretrained.read_json(f"calibration{f'_{limit.constraint}' if i else ''}.json")
        for i, limit in enumerate(limits)
    )
    unwatched = [
        tuple(report.get("guard_refusals", (NO_FALLBACK,))) for report in (first, *further)
    ]
    refusals = {
        "shield": tuple(first["shield_refusals"]),
        "guard": unwatched[0] if all(unwatched) else (),
        **{
            f"guard of {limit.constraint}": words
            for limit, words in zip(limits, unwatched, strict=True)
            if words and not all(unwatched)
        },
    }
    if "shield_acts" not in checkpoint.info:
        raise RunError(
            f'The run "{pretrained.name}" is of an earlier version, whose shield worked by a '
            "threshold. Pretrain again."
        )
    return checkpoint, refusals
