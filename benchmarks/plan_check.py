"""What a plan predicts against what training processes take: eight layouts, each a real `fastvideo distill`.

A process on a CPU gives the memory of every tensor back at once here (glibc is told to map each by itself), so that its
resident set is what its tensors take; what the interpreter and the libraries take before networks are loaded is
measured in the same process, after a run of one sample, and left out. The prediction is the plan's total.

    python benchmarks/plan_check.py
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from fastvideo.entry import end_process

LAYOUTS: dict[str, tuple[str, int, list[str]]] = {
    "tiny": ("tiny", 1, ["--data.batch-size", "64"]),
    "tiny, recomputed": (
        "tiny",
        1,
        ["--data.batch-size", "64", "--parallel.activation-checkpointing", "full"],
    ),
    "mid": ("mid", 1, []),
    "mid, recomputed": ("mid", 1, ["--parallel.activation-checkpointing", "full"]),
    "mid, accumulated": ("mid", 1, ["--trainer.grad-accumulation", "3"]),
    "mid, no average": ("mid", 1, ["--ema.no-enabled"]),
    "mid, 2 copies": ("mid", 2, []),
    "mid, 2 shards": ("mid", 2, ["--parallel.shard", "2"]),
}
"""Name -> size, processes, flags."""
MID = {"num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": 2048, "num_layers": 8, "rope_max_seq_len": 1024}
RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_TRIM_THRESHOLD_": "32768", "MALLOC_ARENA_MAX": "1"}


def resident(key: str) -> int:
    """A line of ``/proc/self/status``, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def worker(argv: list[str]) -> int:
    """Train as ``argv`` says; print the peak above what the libraries take."""
    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel  # noqa: F401
    from transformers import AutoTokenizer, UMT5EncoderModel  # noqa: F401

    from fastvideo.training.distillation import guarded

    torch.set_num_threads(1)
    warm_up(argv)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    code = guarded(argv)
    print(json.dumps({"code": code, "peak": resident("VmHWM") - before}), flush=True)
    return code


def warm_up(argv: list[str]) -> None:
    """A run of two steps of one sample, alone: everything that is loaded when it is first needed is there after it."""
    from fastvideo.training.distillation import guarded

    hidden = {name: os.environ.pop(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if name in os.environ}
    config = yaml.safe_load(Path(argv[argv.index("--config") + 1]).read_text())
    with tempfile.TemporaryDirectory() as folder:
        small = {"path": "tiny"}, {"size": 8, "batch_size": 1}, {"max_steps": 2, "threads": 1}
        values = {**config, "output": f"{folder}/run", **dict(zip(("model", "data", "trainer"), small, strict=True))}
        (Path(folder) / "run.yaml").write_text(yaml.safe_dump(values))
        guarded(["--config", f"{folder}/run.yaml"])
    os.environ.update(hidden)


def mid_folder(root: Path) -> str:
    """The shipped pipeline with a network of 42 million random weights."""
    import shutil
    from importlib.resources import files

    from diffusers import WanTransformer3DModel

    shipped = Path(str(files("fastvideo").joinpath("tiny/weights/pipeline")))
    shutil.copytree(shipped, root / "mid", ignore=shutil.ignore_patterns("transformer"))
    config = dict(WanTransformer3DModel.load_config(shipped, subfolder="transformer"))
    WanTransformer3DModel.from_config({**config, **MID}).save_pretrained(root / "mid" / "transformer")
    return str(root / "mid")


def config_file(root: Path, size: str) -> Path:
    """A run of three steps."""
    path = "tiny" if size == "tiny" else mid_folder(root) if not (root / "mid").exists() else str(root / "mid")
    video = {} if size == "tiny" else {"height": 128, "width": 128, "num_frames": 17}
    values: dict[str, Any] = {
        "distill_model": "wan",
        "distill_method": "dmd2",
        "output": str(root / "run"),
        "model": {"path": path, **video},
        "roles": {"student": {"trainable": True}, "teacher": {"trainable": False}, "critic": {"trainable": True}},
        "method": {"generator_update_interval": 2},
        "data": {"size": 256, "batch_size": 4},
        "trainer": {"max_steps": 3, "threads": 1},
    }
    file = root / f"{size}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def measured(root: Path, file: Path, world: int, flags: list[str]) -> int:
    """The largest peak of the processes of a run."""
    argv = [__file__, "--worker", "--config", str(file), "--overwrite", *flags]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command = [sys.executable, *(torchrun if world > 1 else []), *argv]
    environment = {**os.environ, **RETURN_AT_ONCE, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"code"')]
    if done.returncode or len(found) != world:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return max(int(entry["peak"]) for entry in found)


def main() -> None:
    """Measure, print, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="these layouts; all without it")
    arguments = parser.parse_args()

    from fastvideo.planning.estimate import Planner
    from fastvideo.planning.published import without_weights
    from fastvideo.training.distillation import parse

    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, (size, world, flags) in LAYOUTS.items():
            if arguments.only and name not in arguments.only:
                continue
            file = config_file(root, size)
            config = without_weights(parse(["--config", str(file), *flags])[1])
            predicted = Planner().plan(config, world).total
            found = measured(root, file, world, flags)
            rows[name] = {
                "predicted_mib": round(predicted / 2**20, 1),
                "measured_mib": round(found / 2**20, 1),
                "ratio": round(predicted / found, 3),
            }
            print(f"{name:20} {rows[name]}", flush=True)
    worst = max(abs(row["ratio"] - 1) for row in rows.values())
    print(json.dumps({"benchmark": "plan_check", "layouts": rows, "largest_error": round(worst, 3)}))


if __name__ == "__main__":
    if "--worker" in sys.argv:
        end_process(worker([argument for argument in sys.argv[1:] if argument != "--worker"]))
    else:
        main()
