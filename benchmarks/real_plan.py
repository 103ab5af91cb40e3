"""Bytes of the first steps of the CUDA recipes on fake CUDA tensors, against their plans: two blocks, real widths."""

from __future__ import annotations

import json

from fastvideo.tests.fake_cuda import take_steps

CASES = {
    "1.3B, eight shards": ("wan2.1_t2v_1.3b_dmd2", 8, ()),
    "1.3B, eight copies": ("wan2.1_t2v_1.3b_dmd2", 8, ("--parallel.shard", "1")),
    "1.3B, adapters": ("wan2.1_t2v_1.3b_dmd2_lora", 1, ()),
    "14B, 16 shards, context 4": ("wan2.1_t2v_14b_dmd2", 64, ()),
}


def measured() -> dict[str, object]:
    """``plan_against_live``: the predicted bytes over those alive at once, by recipe."""
    ratios = {}
    for name, (recipe, world, flags) in CASES.items():
        found = take_steps(recipe, *flags, world=world)
        ratios[name] = round(found["plan"] / found["live"], 3)
    return {"plan_against_live": ratios}


if __name__ == "__main__":
    print(json.dumps(measured()))
