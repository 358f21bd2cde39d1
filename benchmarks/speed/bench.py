"""Gradient updates a second: safe-offrl and its peers, interleaved on one machine.

    python benchmarks/speed/bench.py [--rounds 5] [--seconds 0.5] [--threads 1 2] [--out FOLDER]
                                     [--device cuda] [--cases "sac 2 critics" ...]

Every implementation lives in a process of its own (worker.py), pinned to as many cores as it has
threads. In each round every one of them runs about ``--seconds`` of the same case, in an order that
rotates, so that whatever else the machine does meets all alike; ratios are taken within a round.
Writes speed.json and speed.txt, or, of a GPU, speed-cuda.json and .txt. Only ratios carry over to
another machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHAPES = [(60, 2), (17, 6)]  # observation, action: a lidar robot, a MuJoCo robot
# What each group is compared with.
REFERENCES = {"sac": "sb3", "iql": "d3rlpy_algos", "cql": "d3rlpy_algos"}
CASES = ["sac 2 critics", "sac 10 critics", "sac 10 critics utd 20", "iql", "cql"]
OURS_ALONE = [
    "sac 2 critics + layernorm",
    "sac 2 critics + csc",
    "sac 10 critics + csc",
    "sac 10 critics + csc + steering",
    "iql + mixture",
    "cql + mixture",
]
# Case: the case without the addition, measured in turns with it; its time is the unit.
WITHOUT = {
    "sac 2 critics + csc": "sac 2 critics + layernorm",
    "sac 10 critics + csc": "sac 10 critics",
    "sac 10 critics + csc + steering": "sac 10 critics",
}
MATMUL_FLOPS = 10 * 2 * 256**3  # of one unit of matmul.py


class Worker:
    """One implementation in a process of its own."""

    def __init__(self, python: str, module: str, threads: int) -> None:
        self.module = module
        self.process = subprocess.Popen(
            [python, str(HERE / "worker.py"), module, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.ask, self.answers = self.process.stdin, self.process.stdout
        self.cases: list[str] = json.loads(self._answer())

    def run(self, case: str, shape: tuple[int, int], updates: int) -> dict[str, float]:
        """Seconds and CPU seconds of so many updates; the first time also ``first_call``."""
        self.ask.write(f"{case},{shape[0]},{shape[1]},{updates}\n")
        self.ask.flush()
        answer: dict[str, float] = json.loads(self._answer())
        return answer

    def close(self) -> None:
        """End the process."""
        self.ask.close()
        self.process.wait()

    def _answer(self) -> str:
        line = self.answers.readline()
        if not line:
            assert self.process.stderr is not None
            raise SystemExit(f"{self.module} stopped:\n{self.process.stderr.read()[-2000:]}")
        return line


def measure(
    workers: list[Worker], case: str, shape: tuple[int, int], rounds: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Of each worker that has the case: updates a second in every round, first call, memory.

    Of a case in WITHOUT also the time by that of the case without, which is run right before it.
    """
    able = [worker for worker in workers if case in worker.cases]
    results: dict[str, dict[str, Any]] = {}
    updates: dict[str, int] = {}
    for worker in able:
        first = worker.run(case, shape, 20)
        pace = worker.run(case, shape, 20)["seconds"] / 20
        updates[worker.module] = max(20, 20 * round(seconds / pace / 20))
        results[worker.module] = {
            "first_call": first["first_call"],
            "flops": first.get("flops"),
            "per_second": [],
            "per_cpu_second": [],
        }
        if case in WITHOUT and worker.module != "matmul":
            worker.run(WITHOUT[case], shape, 20)
            results[worker.module]["without"] = {"per_second": [], "per_cpu_second": []}
    for k in range(rounds):
        for worker in able[k % len(able) :] + able[: k % len(able)]:
            n = updates[worker.module]
            result = results[worker.module]
            if "without" in result:
                _add(result["without"], n, worker.run(WITHOUT[case], shape, n))
            answer = worker.run(case, shape, n)
            _add(result, n, answer)
            result["peak_bytes"] = answer["peak_bytes"]
    if "matmul" not in results:
        return results
    # What the counted operations would take if all of them were such products, back to back.
    limit = results.pop("matmul")
    flops = results["ours_eager"]["flops"]
    for key in ("per_second", "per_cpu_second"):
        limit[key] = [rate * MATMUL_FLOPS / flops for rate in limit[key]]
    results["matmul limit"] = limit
    return results


def _add(rates: dict[str, Any], updates: int, answer: dict[str, float]) -> None:
    rates["per_second"].append(updates / answer["seconds"])
    rates["per_cpu_second"].append(updates / answer["cpu_seconds"])


def table(case: str, results: dict[str, dict[str, Any]], by: str) -> list[str]:
    """Rows for people: medians, and the ratio to the group's reference round by round.

    ``by`` "per_second" or "per_cpu_second".
    """
    reference = results.get(REFERENCES[case.split()[0]])
    lines = []
    for module, result in sorted(results.items(), key=lambda item: -statistics.median(item[1][by])):
        ratio = ""
        if reference is not None:
            pairs = zip(result[by], reference[by], strict=True)
            result["ratio"] = [ours / theirs for ours, theirs in pairs]
        elif "without" in result:
            pairs = zip(result["without"][by], result[by], strict=True)
            result["ratio"] = [without / with_it for without, with_it in pairs]
        if ratios := result.get("ratio"):
            ratio = f"{statistics.median(ratios):5.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        lines.append(
            f"{module:<16}{statistics.median(result['per_second']):12.1f}"
            f"{statistics.median(result['per_cpu_second']):12.1f}  {ratio:<20}"
            f"{result['first_call']:11.1f}{result['peak_bytes'] / 2**20:11.0f}"
        )
    return lines


def main() -> None:
    """Run everything, print as it goes, write both files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--d3rlpy", help="Python of an environment with d3rlpy; left out without")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cases", nargs="+", default=CASES + OURS_ALONE)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    os.environ["SPEED_DEVICE"] = args.device  # for the workers
    modules = ["ours", "ours_bf16", "ours_eager", "sb3"]
    if not on_gpu:
        modules += ["matmul", "torchrl_losses"]
    pythons = dict.fromkeys([*modules, "jax_reference"], sys.executable)
    if args.d3rlpy:
        pythons["d3rlpy_algos"] = args.d3rlpy
    record: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "runs": []}
    text = [
        "Gradient updates (batch 256, networks 256x256). Ratio: to Stable-Baselines3 for SAC, to",
        f"d3rlpy for IQL and CQL, per {'second' if on_gpu else 'CPU second'}, median [lowest, "
        "highest] of the paired rounds.",
        "First s: building it and one update. Peak MiB: of the process, earlier cases included.",
        "ours: compiled, fp32, as long runs; ours_bf16: with products in bfloat16; ours_eager: as",
        "short runs are. Networks are the same in a group, without LayerNorm, but for 10 critics,",
        "where ours and jax_reference have it and the others cannot. + layernorm, + csc (with an",
        "update of the safety critic; + steering: and the actor asks it too), + mixture (our",
        "offline phase, whose actor comes from a mixture): ours by default, with LayerNorm; the",
        "ratio of + csc is its time by that of the same without, measured in turns. matmul limit:",
        "the operations of our update at the fp32 rate of plain products of stacked 256x256",
        "matrices. jax_reference is written for this benchmark.",
        *(["On a GPU all of ours are CUDA graphs; the others as they are."] if on_gpu else []),
    ]
    print("\n".join(text))
    for threads in args.threads:
        workers = [Worker(python, module, threads) for module, python in pythons.items()]
        for shape in SHAPES:
            for case in args.cases:
                results = measure(workers, case, shape, args.rounds, args.seconds)
                title = f"{case}, observation {shape[0]}, action {shape[1]}, {threads} thread(s)"
                columns = ("updates/s", "/CPU s", "ratio", "first s", "peak MiB")
                head = "{:<16}{:>12}{:>12}  {:<20}{:>11}{:>11}".format("", *columns)
                size = f": {results['ours_eager']['flops'] / 1e9:.2f} GFLOP"
                by = "per_second" if on_gpu else "per_cpu_second"
                lines = ["", title + ("" if on_gpu else size), head, *table(case, results, by)]
                print("\n".join(lines), flush=True)
                text += lines
                record["runs"].append(
                    {"case": case, "shape": shape, "threads": threads, "results": results}
                )
        for worker in workers:
            worker.close()
    args.out.mkdir(parents=True, exist_ok=True)
    stem = "speed-cuda" if on_gpu else "speed"
    (args.out / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.out / f"{stem}.txt").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
