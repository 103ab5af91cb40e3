"""Cost of a student step of Self-Forcing beside one of DMD2 on the same frames, both from noise.

    python benchmarks/self_forcing_cost.py            # latents of 16 x 16, chunks of 3 frames, and the tiny world's
    python benchmarks/self_forcing_cost.py --rounds 9

The law: a rollout makes ``(E[e] + 2) / (E[e] + 1)`` times the calls, 1.4 for 4 steps of the ladder; scores and the
critic's loss are the same. Steps of both methods alternate, at every step of the ladder in turn; the figure is their
ratio of CPU seconds, forward and backward, without the optimizer. The last line is JSON; exit code 1 above the target.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch

from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.adapters.wan_family.inputs import WanFamilyConfig
from fastvideo.distillation.batches import BatchPreparer
from fastvideo.distillation.bundle import ModelBundle, RoleHandle
from fastvideo.distillation.chunks import Reach
from fastvideo.distillation.methods.distribution_matching.dmd2 import DMD2Config, DMD2Method
from fastvideo.distillation.methods.distribution_matching.self_forcing import SelfForcingConfig, SelfForcingMethod
from fastvideo.distillation.rng import RandomStreams
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.types import Batch, RawBatch

TARGET = 1.6
LADDER = Ladder((1.0, 0.75, 0.5, 0.25))
CASES: dict[str, dict[str, Any]] = {
    "latents 16x16, chunks of 3": {"size": 128, "chunk": 3, "videos": 2},
    "latents 4x4, chunks of 1": {"size": 32, "chunk": 1, "videos": 32},
}
"""The first is held to the target: with 4 tokens a frame, calls of the second are mostly overhead."""


class Exit(RandomStreams):
    """Streams whose shared decision is set from outside."""

    stop = 0

    def shared_index(self, high: int) -> int:
        return self.stop


def methods(size: int, chunk: int, videos: int) -> tuple[list[DMD2Method], Batch]:
    """DMD2 and Self-Forcing on equal networks, and their batch: 33 video frames of ``size`` pixels."""
    adapter = WanFamily(WanFamilyConfig(num_frames=33, height=size, width=size))
    adapter.ensure_negative_conditioning()
    batch = BatchPreparer(adapter.codec, [adapter.conditioner])(RawBatch(("a red seven moving left",) * videos))
    made: list[DMD2Method] = []
    for cls, config in (
        (DMD2Method, DMD2Config(teacher_guidance=1.5)),
        (SelfForcingMethod, SelfForcingConfig(teacher_guidance=1.5, reach=Reach(chunk))),
    ):
        names = ("student", "teacher", "critic")
        roles = [RoleHandle(name, adapter, adapter.folder.load_network(), name != "teacher") for name in names]
        for role in roles:
            role.network.requires_grad_(role.trainable)
        made.append(cls(config, ModelBundle(roles), LADDER, Exit(0)))  # type: ignore[arg-type]
    return made, batch


def seconds(method: DMD2Method, batch: Batch, stop: int) -> float:
    """CPU seconds of one student step."""
    assert isinstance(method.rng, Exit)
    method.rng.stop = stop
    begin = time.process_time()
    for loss in method.losses(batch, 0):
        loss.value.backward()
    spent = time.process_time() - begin
    for handle in method.bundle:
        handle.network.zero_grad()
    return spent


def ratio(rounds: int, **case: int) -> dict[str, float]:
    """CPU seconds of both, medians per step of the ladder, then their mean; and their ratio."""
    both, batch = methods(**case)
    spent: list[list[list[float]]] = [[[] for _ in LADDER.times] for _ in both]
    for _ in range(rounds + 1):
        for stop in range(len(LADDER)):
            for own, method in zip(spent, both, strict=True):
                own[stop].append(seconds(method, batch, stop))
    dmd2, self_forcing = (statistics.mean(statistics.median(times[1:]) for times in own) for own in spent)
    return {"dmd2": round(dmd2, 3), "self_forcing": round(self_forcing, 3), "ratio": round(self_forcing / dmd2, 3)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="student steps of each method at each step of the ladder")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    found = {name: ratio(rounds, **case) for name, case in CASES.items()}
    for name, figures in found.items():
        print(f"{name:28} " + ", ".join(f"{key} {value:.3f}" for key, value in figures.items()))
    first = next(iter(found.values()))["ratio"]
    print(json.dumps({"benchmark": "self_forcing_cost", "target": TARGET, "reached": first <= TARGET, "cases": found}))
    return int(first > TARGET)


if __name__ == "__main__":
    sys.exit(main())
