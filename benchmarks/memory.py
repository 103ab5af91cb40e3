"""Bytes of the three roles of DMD2 by layout, from the shapes of a published network, beside one bfloat16 copy of it.

python benchmarks/memory.py                       # Wan2.1 1.3B
python benchmarks/memory.py --architecture wan2.1-t2v-14b
"""

from __future__ import annotations

import argparse
import json

from fastvideo.distillation.builder import build_adapter
from fastvideo.planning.layout import role_bytes
from fastvideo.planning.published import ARCHITECTURES, without_weights
from fastvideo.training.distillation import parse

CONFIG = "examples/distillation/wan2.1_t2v_1.3b_dmd2.yaml"
ADAPTERS = "examples/distillation/wan2.1_t2v_1.3b_dmd2_lora.yaml"
LAYOUTS = [("full parameters", CONFIG, shard) for shard in (1, 8, 64)] + [("adapters", ADAPTERS, 1)]
BFLOAT16 = 2


def main() -> None:
    """Count, print, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="wan2.1-t2v-1.3b")
    arguments = parser.parse_args()
    hub_id = ARCHITECTURES[arguments.architecture][0]
    ratios = {}
    for name, file, shard in LAYOUTS:
        flags = ["--model.path", hub_id, "--parallel.shard", str(shard)]
        config = without_weights(parse(["--config", file, *flags])[1])
        roles = role_bytes(config, build_adapter(config))
        base = BFLOAT16 * next(role.parameters for role in roles if role.name == "teacher")
        held = sum(role.weights + role.gradients + role.optimizer for role in roles)
        ratios[f"{name}, shard {shard}"] = round(held / base, 3)
        copies = f"{held / base:.2f} copies of the base in bfloat16"
        print(f"{name}, shard {shard:<3} {held / 2**30:8.2f} GiB per process, {copies}")
    print(json.dumps({"benchmark": "memory", "architecture": arguments.architecture, "copies_of_the_base": ratios}))


if __name__ == "__main__":
    main()
