"""What a DMD2 cycle costs as videos, batches and networks grow, beside the hand-written loop of ``step_cost.py``.

Each point changes one thing of the middle one; framework and loop take turns, as in ``step_cost.py``.

    python benchmarks/sweep.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from step_cost import SIZES, Bench, folder_of, timed

HEAD_WIDTH = 48
AXES: dict[str, tuple[str, list[int]]] = {
    "tokens": ("tokens of a video", [32, 64, 128, 192]),
    "batch": ("videos of a batch", [2, 4, 8, 16]),
    "parameters": ("attention heads of the network", [2, 4, 6, 8]),
}
"""Axis -> what is changed, its values: sides of the video in pixels, videos, heads."""
MIDDLE = {"tokens": 64, "batch": 8, "parameters": 4}


def size_of(side: int, batch: int, heads: int) -> dict[str, Any]:
    """A network of four blocks on square videos of nine frames."""
    network = {"num_attention_heads": heads, "attention_head_dim": HEAD_WIDTH, "ffn_dim": 128 * heads, "num_layers": 4}
    return {"network": network, "video": {"height": side, "width": side, "num_frames": 9}, "batch": batch}


def measure(name: str, cycles: int) -> dict[str, float]:
    """Milliseconds of a cycle of the framework, the ratio to the loop's, and what the point stands for."""
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(name, folder_of(name, Path(root)))
        (framework, networks), (loop, _) = bench.framework(), bench.loop()
        for cycle in (framework, loop):
            timed(cycle)
        pairs = [(timed(framework), timed(loop)) for _ in range(cycles)]
    frames, height, width = 3, *(SIZES[name]["video"][side] // 16 for side in ("height", "width"))
    return {
        "tokens": frames * height * width,
        "batch": SIZES[name]["batch"],
        "parameters": sum(p.numel() for p in networks["student"].parameters()),
        "milliseconds": round(1000 * statistics.median(mine for mine, _ in pairs), 1),
        "of_the_loop": round(statistics.median(mine / theirs for mine, theirs in pairs), 3),
    }


def main() -> None:
    """Measure, print, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    found: dict[str, list[dict[str, float]]] = {}
    for axis, (title, values) in AXES.items():
        print(title)
        for value in values:
            point = {**MIDDLE, axis: value}
            name = f"{axis}-{value}"
            SIZES[name] = size_of(point["tokens"], point["batch"], point["parameters"])  # type: ignore[index]
            found.setdefault(axis, []).append(measure(name, arguments.cycles))
            last = found[axis][-1]
            print(
                f"  {last[axis]:>10} {last['milliseconds']:9.1f} ms, {last['of_the_loop']:.3f} of the loop", flush=True
            )
    print(json.dumps({"benchmark": "sweep", "axes": found}))


if __name__ == "__main__":
    main()
