"""What a dataset holds, and what cannot be learnt from it."""

from __future__ import annotations

import functools
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safe_offrl.check.inspect import INSPECTED, format_summary, summarise
from safe_offrl.commands.common import logged_signals, say_plain, with_logged_rule
from safe_offrl.config import load_config
from safe_offrl.data_formats.loading import load_dataset, stated_metadata
from safe_offrl.files import plain
from safe_offrl.record.progress import Say
from safe_offrl.report import data_chart
from safe_offrl.train.pretrain_config import PretrainConfig, discount_of


def inspect_dataset(
    dataset: str | Path,
    *,
    png: str | Path | None = None,
    overrides: Sequence[str] = (),
    say: Say = say_plain,
) -> dict[str, Any]:
    """Print what a dataset holds and what cannot be learnt from it; returns it as plain values.

    The accident rule is the file's own where nothing else is said; the limit is that of the preset
    of its environment, and the cost signals are all that there are unless some are named.
    """
    stated = stated_metadata(dataset)
    limited = logged_signals(stated, overrides, imports=False)
    resolve = functools.partial(
        load_config,
        PretrainConfig,
        section="pretrain",
        env_id=str(stated.get("env_id", "")),
        flags=limited,
        overrides=overrides,
    )
    config = with_logged_rule(resolve(), stated, resolve, imports=False)
    loaded = load_dataset(
        dataset,
        discount=discount_of(config),
        spec=config.safety,
        every_signal=len(config.safety.signals) == len(limited),
    )
    loaded = loaded.sample(INSPECTED, seed=0)
    summary = summarise(loaded, config.safety, config.held_out)
    say(format_summary(summary))
    if png is not None:
        Path(png).parent.mkdir(parents=True, exist_ok=True)
        data_chart.write_data_png(loaded, summary, Path(png))
        say(f"figure        {png}")
    return typing.cast(dict[str, Any], plain(summary.as_dict()))
