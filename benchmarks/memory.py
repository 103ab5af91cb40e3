"""Bytes of the three roles of DMD2 by layout, from the shapes of a published network, beside one bfloat16 copy of it.

A network of 42 million parameters is then trained for a step, in both layouts of roles: the bytes that its weights,
gradients and optimizers really take stand beside those that the shapes promise.

    python benchmarks/memory.py                       # Wan2.1 1.3B
    python benchmarks/memory.py --architecture wan2.1-t2v-14b
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from plan_check import config_file

from fastvideo.data.order import MemorySource, SampleStream, Shard
from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.tracking import Tracker
from fastvideo.planning.fake import fake_run
from fastvideo.planning.layout import role_plans
from fastvideo.planning.published import ARCHITECTURES, without_weights
from fastvideo.training.distillation import parse
from fastvideo.training.run import build_trainer

CONFIG = "examples/distillation/wan2.1_t2v_1.3b_dmd2.yaml"
ADAPTERS = "examples/distillation/wan2.1_t2v_1.3b_dmd2_lora.yaml"
LAYOUTS = [("full parameters", CONFIG, shard) for shard in (1, 8, 64)] + [("adapters", ADAPTERS, 1)]
BFLOAT16 = 2
LORA = {"rank": 32, "targets": ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]}


def held_after_a_step(config: Any) -> int:
    """Bytes of weights, gradients and optimizer states of all roles, what roles share once."""
    adapter = build_adapter(config)
    method = build_method(config, adapter)
    roles = list(method.bundle)
    networks, gradients = [role.network for role in roles], list[int]()

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))

    for role in roles:
        if role.training is not None:
            role.training.optimizer.register_step_pre_hook(count)  # a step clears the gradients
    trainer = build_trainer(config, adapter, method, Tracker(Path(config.output), enabled=False), Processes())
    trainer.train_step(SampleStream(MemorySource(["a red three moving up"]), 0, Shard(1)))
    states = [state for role in roles if role.training is not None for state in role.training.optimizer.state.values()]
    kept = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    kept += [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    return sum({id(tensor): tensor.nbytes for tensor in kept}.values()) + sum(gradients)


def measured(kinds: tuple[str, ...] = ("full parameters", "adapters")) -> dict[str, dict[str, float]]:
    """Held and promised MiB, float32 throughout as on a CPU."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        file = config_file(Path(folder), "mid")
        values = yaml.safe_load(file.read_text())
        for kind in kinds:
            lora = {"lora": LORA} if kind == "adapters" else {}
            roles = {role: {"trainable": True, **lora} for role in ("student", "critic")}
            small = {"ema": {"enabled": False}, "roles": roles | {"teacher": {"trainable": False}}}
            file.write_text(yaml.safe_dump({**values, **small, "data": {"size": 1, "batch_size": 1}}))
            config = parse(["--config", str(file)])[1]
            promised = sum(row.total for row in role_plans(fake_run(config)))
            rows[kind] = {"held_mib": held_after_a_step(config) / 2**20, "promised_mib": promised / 2**20}
            print(f"42 million parameters, {kind}: {rows[kind]}", flush=True)
    return {kind: {name: round(value, 2) for name, value in row.items()} for kind, row in rows.items()}


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
        roles = role_plans(fake_run(config, Processes(shard=shard)))
        base = BFLOAT16 * next(role.parameters for role in roles if role.name == "teacher")
        held = sum(role.weights + role.tables + role.gradients + role.optimizer for role in roles)
        ratios[f"{name}, shard {shard}"] = round(held / base, 3)
        copies = f"{held / base:.2f} copies of the base in bfloat16"
        print(f"{name}, shard {shard:<3} {held / 2**30:8.2f} GiB per process, {copies}")
    found = {"copies_of_the_base": ratios, "trained_for_a_step": measured()}
    print(json.dumps({"benchmark": "memory", "architecture": arguments.architecture, **found}))


if __name__ == "__main__":
    main()
