"""How the time of an update and the memory of a dataset grow, beside a model of the cost.

    python benchmarks/speed/growth.py [--out docs/results]

One thread, compiled. An update of RLPD (observation 60, action 2) is varied in one size at a time
around 10 critics, batch 256, width 256, UTD 1. The model is the larger of two times: its floating
point operations at the measured rate of plain matrix products, and the bytes of parameters, targets
and moments at the measured rate of a copy. Writes growth.png and growth.txt.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.utils.flop_counter import FlopCounterMode

from safe_offrl.agents.rlpd import RLPD, RLPDConfig
from safe_offrl.agents.steering import Steering
from safe_offrl.compute.descent import EAGER, Compute, choose_compute
from safe_offrl.compute.device import configure
from safe_offrl.data.sampling import uniform_batches
from safe_offrl.policies.networks import NetworkConfig, Networks
from safe_offrl.types import Layout

LAYOUT = Layout(60, 2)
FLOAT = 4  # bytes


class Sizes(NamedTuple):
    """What is varied."""

    critics: int = 10
    batch: int = 256
    width: int = 256
    utd: int = 1


VARIED = {
    "critics": [1, 2, 5, 10, 20],
    "batch": [64, 128, 256, 512, 1024],
    "width": [64, 128, 256, 512],
    "utd": [1, 2, 5, 10, 20],
}
ROW_COUNTS = [100_000, 300_000, 1_000_000, 3_000_000]


def updater(sizes: Sizes, compute: Compute) -> tuple[Callable[[], None], int]:
    """One round of UTD critic updates and one of the actor; bytes that it must touch at least."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20_000, LAYOUT.width, generator=generator)
    hidden = (sizes.width, sizes.width)
    networks = Networks(*LAYOUT.sizes, NetworkConfig(hidden, hidden, sizes.critics), generator)
    settings = RLPDConfig(subset=min(2, sizes.critics))
    learner = RLPD(networks, settings, generator, compute)
    steering = Steering()

    def update() -> None:
        batches = uniform_batches(rows, LAYOUT, sizes.utd, sizes.batch, generator)
        for batch in batches:
            learner.update_critics(batch)
        learner.update_actor(batches[-1], steering)

    parameters = sum(p.numel() for p in networks.critics.parameters())
    # Adam reads gradient, parameter and two moments and writes three of them; Polyak reads two and
    # writes one; hidden activations are written and read forward and backward.
    activations = 2 * sizes.critics * sizes.batch * sizes.width
    return update, FLOAT * sizes.utd * (10 * parameters + 4 * activations)


def seconds_of(call: Callable[[], None], least: float = 0.3) -> float:
    """Median over 5 rounds of at least so many seconds."""
    call()
    begin = time.perf_counter()
    call()
    calls = max(1, round(least / (time.perf_counter() - begin)))
    rounds = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        rounds.append((time.perf_counter() - begin) / calls)
    return statistics.median(rounds)


def rates() -> tuple[float, float]:
    """(floating point operations a second of stacked products, bytes a second of a copy)."""
    a, b, out = (torch.randn(10, 256, 256) for _ in range(3))
    source = torch.zeros(2**22)
    target = torch.zeros_like(source)
    flops = 10 * 2 * 256**3 / seconds_of(lambda: void(torch.bmm(a, b, out=out)))
    return flops, 2 * FLOAT * len(source) / seconds_of(lambda: void(target.copy_(source)))


def void(_: object) -> None:
    """For a lambda that returns None."""


def memory(rows: int) -> float:
    """MiB that a process (Linux) holds more than before, with so many rows and a batch of them."""
    code = (
        "import sys, torch; from safe_offrl.types import Layout; "
        "from safe_offrl.data.sampling import uniform_batches; "
        "held = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096 / 2**20; "
        "before, layout, n = held(), Layout(60, 2), int(sys.argv[1]); "
        "rows = torch.ones(n, layout.width); "
        "batch = uniform_batches(rows, layout, 20, 256, torch.Generator()); print(held() - before)"
    )
    command = [sys.executable, "-c", code, str(rows)]
    return float(subprocess.run(command, check=True, capture_output=True).stdout)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    configure(1)
    compute, _ = choose_compute("on", "fp32", 0)
    flop_rate, byte_rate = rates()
    lines = [
        f"RLPD, observation 60, action 2, one thread: {flop_rate / 1e9:.0f} GFLOP/s of plain "
        f"products, {byte_rate / 1e9:.0f} GB/s of a copy.",
        "Model: the larger of operations and bytes at these rates.",
        "",
        f"{'varied':<10}{'size':>9}{'GFLOP':>9}{'ms':>9}{'model ms':>10}{'ratio':>8}",
    ]
    print("\n".join(lines))
    curves: dict[str, list[tuple[int, float, float]]] = {}
    for name, values in VARIED.items():
        curves[name] = []
        for value in values:
            sizes = Sizes()._replace(**{name: value})
            counted, _ = updater(sizes, EAGER)
            with FlopCounterMode(display=False) as counter:
                counted()
            update, moved = updater(sizes, compute)
            model = max(counter.get_total_flops() / flop_rate, moved / byte_rate)
            measured = seconds_of(update)
            curves[name].append((value, 1e3 * measured, 1e3 * model))
            lines.append(
                f"{name:<10}{value:>9,}{counter.get_total_flops() / 1e9:9.2f}{1e3 * measured:9.2f}"
                f"{1e3 * model:10.2f}{measured / model:8.2f}"
            )
            print(lines[-1], flush=True)
    lines += ["", f"{'dataset rows':<19}{'MiB':>9}{'rows alone':>12}"]
    curves["dataset rows"] = []
    for rows in ROW_COUNTS:
        alone = rows * LAYOUT.width * FLOAT / 2**20
        curves["dataset rows"].append((rows, memory(rows), alone))
        lines.append(f"{rows:<19,}{curves['dataset rows'][-1][1]:9.0f}{alone:12.0f}")
        print(lines[-1], flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "growth.txt").write_text("\n".join(lines) + "\n")
    draw(curves, args.out / "growth.png")


def draw(curves: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    """One panel for each size."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(curves), figsize=(16, 3.4), layout="constrained")
    for panel, (name, points) in zip(panels, curves.items(), strict=True):
        x, measured, model = zip(*points, strict=True)
        panel.loglog(x, measured, "o-", label="measured")
        panel.loglog(x, model, "--", color="grey", label="model")
        panel.set(xlabel=name, ylabel="MiB" if name == "dataset rows" else "ms an update")
        panel.minorticks_off()
        panel.set_xticks(x, [f"{v:,}" if v < 10_000 else f"{v // 1000:,}k" for v in x])
        ticks = [v for v in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if v >= 0.8 * min(model)]
        ticks = [v for v in ticks if v <= 1.2 * max(measured)]
        panel.set_yticks(ticks, [f"{v:,}" for v in ticks])
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
