"""What TensorBoard shows of a run: a view, never the record."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Two charts that show the claim itself: the rate between its bounds, and all of it against epsilon.
_LAYOUT = {
    "Safety": {
        "accident rate with bounds": [
            "Margin",
            ["safety/accident_rate", "safety/accident_rate_lower", "safety/accident_rate_upper"],
        ],
        "accident rate against epsilon": [
            "Multiline",
            [
                "safety/accident_rate$",
                "safety/accident_rate_upper",
                "safety/v_accident_estimate",
                "safety/epsilon",
            ],
        ],
        "accidents so far": ["Multiline", ["safety/accidents_total"]],
        "share of the steps of the guard's fallback": ["Multiline", ["safety/guarded_share"]],
        "cost per episode against its limit": [
            "Multiline",
            [
                "safety/cost_mean$",
                "safety/cost_recent",
                "safety/expected_cost_estimate",
                "safety/cost_limit",
            ],
        ],
    },
    "Trust region": {"KL against delta": ["Multiline", ["trust/kl$", "trust/delta"]]},
}


class Board:
    """The TensorBoard events of one run folder."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        """Open it; events from ``purge_step`` on are hidden: a resumed run writes them anew."""
        from torch.utils.tensorboard import SummaryWriter

        # Event files are read in the order of their names: by second, then by process number as
        # text. One of this very second might come after the new one.
        if any(folder.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(1.0 - time.time() % 1.0)
        self._writer = SummaryWriter(
            str(folder), purge_step=purge_step, max_queue=1000, flush_secs=10
        )
        self._writer.add_custom_scalars(_LAYOUT)

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point of each curve; what is not finite is left out."""
        for tag, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(tag, value, step)

    def add_picture(self, tag: str, step: int, data: bytes, description: str = "") -> None:
        """Show an encoded picture (PNG, or a GIF, which may move) in TensorBoard at x = step."""
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

        with Image.open(io.BytesIO(data)) as picture:
            width, height = picture.size
        image = Summary.Image(width=width, height=height, encoded_image_string=data)
        metadata = SummaryMetadata(summary_description=description)
        value = Summary.Value(tag=tag, image=image, metadata=metadata)
        self._writer._get_file_writer().add_summary(Summary(value=[value]), step)

    def describe(self, settings: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Tell TensorBoard's HParams page the settings, and which curves to hold against them.

        Nested settings become dotted names. The summaries go into the run's own events:
        ``SummaryWriter.add_hparams`` would make a sub-run that is named by the time.
        """
        from torch.utils.tensorboard.summary import hparams

        flat: dict[str, Any] = {}

        def visit(prefix: str, values: Mapping[str, Any]) -> None:
            for key, value in values.items():
                if isinstance(value, Mapping):
                    visit(f"{prefix}{key}.", value)
                else:
                    # A bool would become the number 0 or 1.
                    number = isinstance(value, int | float) and not isinstance(value, bool)
                    flat[prefix + key] = value if number else str(value)

        visit("", settings)
        writer = self._writer._get_file_writer()
        experiment, session, _ = hparams(flat, dict.fromkeys(metrics, 0.0))
        for summary in (experiment, session):
            writer.add_summary(summary)

    def close(self) -> None:
        """Write what is waiting, and end."""
        self._writer.close()
