"""A first run on a GPU, with random weights and no network: memory against the plan, step time, kernels, resume.

One H100 or H200 needs about ten minutes. Sections run one after another; each line is a JSON object, the last one all
of them. A section that fails says why and does not stop the others; the exit code is then 1.

    python benchmarks/gpu.py                          # all sections
    python benchmarks/gpu.py --only attention recipe
    python benchmarks/gpu.py --dry-run                # every section at toy size on a CPU: does the script work?
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastvideo.distillation.adapters.diffusers.kernels import REFUSALS, attend, check_kernel
from fastvideo.distillation.engine.optional.performance import peak_of
from fastvideo.errors import UserError
from fastvideo.planning.estimate import Plan, Planner
from fastvideo.planning.published import architecture_folder, without_weights
from fastvideo.training.distillation import parse

RECIPE = "wan2.1_t2v_1.3b_dmd2_lora"
WORDS = "a green seven moving up and left\na red three moving down\n"
"""Prompts of words that the embedded tokenizer knows, which stands in for UMT5's."""
TOY = ("--model.height", "32", "--model.width", "32", "--model.num-frames", "9", "--model.max-sequence-length", "16")
BACKENDS = ("native", "_native_cudnn", "_native_flash", "_native_efficient", "flash", "_flash_3", "sage", "xformers")
"""Attention by the names of `model.attention_backend`; `fastvideo plan --attention-flops` takes what they reach."""
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Bench:
    """Options of all sections: their folder, toy size on a CPU, and steps of a run."""

    work: Path
    dry: bool
    steps: int

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def half(self) -> int:
        return max(1, self.steps // 2)

    def flags(self, output: str, *more: str) -> list[str]:
        """The recipe, but for its weights, its prompts, its text encoder and validations."""
        prompts = self.work / "prompts.txt"
        prompts.write_text(WORDS * 8)
        given = {"--model.path": str(self.work / "model"), "--data.prompts": str(prompts), "--device": self.device}
        given |= {"--model.prompt-for-negative": "a", "--validation.every": "0", "--trainer.log-every": "1"}
        given |= {"--output": str(self.work / output), "--trainer.max-steps": str(self.steps)}
        given |= {"--checkpoint.every": str(self.half), "--checkpoint.keep": "9"}
        if self.dry and "--model.attention-backend" not in more:
            given["--model.attention-backend"] = "native"  # the recipe names a kernel of CUDA
        words = [word for pair in given.items() for word in pair]
        return ["--config", RECIPE, *words, *(TOY if self.dry else ()), *more]


def make_model(bench: Bench) -> None:
    """A pipeline folder of the recipe's architecture with random weights, and a text encoder of one layer."""
    from importlib.resources import files

    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    tiny, folder = Path(str(files("fastvideo").joinpath("tiny/weights/pipeline"))), bench.work / "model"
    large = ("transformer", "vae", "text_encoder")
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("recipe.json", *(() if bench.dry else large)))
    if bench.dry:
        return
    published = architecture_folder("wan2.1-t2v-1.3b")
    vocabulary = json.loads((tiny / "text_encoder/config.json").read_text())["vocab_size"]
    text = UMT5Config(vocab_size=vocabulary, d_model=4096, d_ff=64, d_kv=64, num_heads=2, num_layers=1)
    torch.manual_seed(0)
    with torch.device(bench.device):
        WanTransformer3DModel.from_config(
            json.loads((published / "transformer/config.json").read_text())
        ).save_pretrained(folder / "transformer")
        AutoencoderKLWan.from_config(json.loads((published / "vae/config.json").read_text())).save_pretrained(
            folder / "vae"
        )
        UMT5EncoderModel(text).save_pretrained(folder / "text_encoder")


def environment(bench: Bench) -> Figures:
    """Device, its memory, and versions."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    if not bench.dry:
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "gib": properties.total_memory / 2**30}
    return found


def seconds(bench: Bench, call: Callable[[], object], repeat: int = 3) -> float:
    """Mean time of a call, after one that is not counted."""
    wait = torch.cuda.synchronize if not bench.dry else lambda: None
    call()
    wait()
    begin = time.perf_counter()
    for _ in range(repeat):
        call()
    wait()
    return (time.perf_counter() - begin) / repeat


def attention(bench: Bench) -> Figures:
    """TFLOP/s of attention at the recipe's size, forward and with backward, by backend."""
    return {"tflops": {name: rates(bench, name) for name in BACKENDS}}


def rates(bench: Bench, name: str) -> Figures:
    """TFLOP/s of one backend, or why it has none; without ``with_backward`` it cannot train."""
    heads, tokens, width = (2, 64, 16) if bench.dry else (12, 32760, 128)
    made = [torch.randn(1, tokens, heads, width, device=bench.device, dtype=torch.bfloat16) for _ in range(3)]
    flops, grad, found = 4 * heads * tokens**2 * width, torch.randn_like(made[0]), {}

    def both() -> None:
        attend(name, *made).backward(grad)

    try:
        found["forward"] = flops / seconds(bench, lambda: attend(name, *made)) / 1e12
        check_kernel(name, width, torch.bfloat16, made[0].device, trained=True)
        for tensor in made:
            tensor.requires_grad_(True)
        found["with_backward"] = 3.5 * flops / seconds(bench, both) / 1e12
    except (*REFUSALS, UserError) as error:  # a kernel that this device or build does not have
        return {**found, "error": str(error).splitlines()[0]}
    return found


def trained(bench: Bench, output: str, *more: str) -> Figures:
    """A run of the recipe by the real entry in a process of its own: time and memory of its steps."""
    command = [sys.executable, "-m", "fastvideo.training.distillation", *bench.flags(output, *more)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-2000:])
    rows = lines(bench.work / output / "performance.jsonl")
    settled = rows[1:] or rows  # the first step compiles and allocates
    last = "performance/seconds_per_step"
    used = [row["performance/flops_utilisation"] for row in rows if "performance/flops_utilisation" in row]
    pace, peak = sum(row[last] for row in settled) / len(settled), peak_of(torch.device(bench.device))
    return {
        "seconds_per_step": pace,
        "peak_gib": max(row["performance/peak_memory_bytes"] for row in rows) / 2**30,
        "utilisation": sum(used) / len(used) if used else None,
        "utilisation_by_plan": planned(bench).flops / pace / peak if peak else None,
        "first_step": lines(bench.work / output / "startup.jsonl")[-1],
    }


def lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file with one a line."""
    return [json.loads(line) for line in file.read_text().splitlines()]


@cache
def planned(bench: Bench) -> Plan:
    """The plan of the same run, whose operations are those of every backend, compiled or not."""
    return Planner().plan(without_weights(parse(bench.flags("unused"))[1]), 1)


def recipe(bench: Bench) -> Figures:
    """The recipe as it is, against its plan; what torch's allocator does not hand out is left out of that."""
    found, plan = trained(bench, "recipe"), planned(bench)
    outside = sum(size for name, size in plan.parts.items() if name in ("CUDA context", "NCCL", "VAE"))
    predicted = (plan.total - outside) / 2**30  # without validations no VAE is loaded
    return {**found, "plan_gib": predicted, "plan_over_measured": predicted / found["peak_gib"], "flops": plan.flops}


def compiled(bench: Bench) -> Figures:
    """The recipe with compiled blocks."""
    return trained(bench, "compiled", "--model.compile-blocks")


def cudnn(bench: Bench) -> Figures:
    """The recipe with cuDNN's attention by name."""
    return trained(bench, "cudnn", "--model.attention-backend", "native" if bench.dry else "_native_cudnn")


def resume(bench: Bench) -> Figures:
    """From the middle checkpoint of ``recipe`` to its end: the largest relative difference of a later loss."""
    source = bench.work / "recipe" / "checkpoints" / f"step-{bench.half}"
    if not source.is_dir():
        trained(bench, "recipe")
    found = trained(bench, "resumed", "--resume-from", str(source))
    losses = [
        {row["step"]: row["critic/loss"] for row in lines(bench.work / name / "metrics.jsonl") if "critic/loss" in row}
        for name in ("recipe", "resumed")
    ]
    later = [step for step in losses[1] if step > bench.half]
    apart = [abs(losses[1][step] - losses[0][step]) / abs(losses[0][step]) for step in later]
    return {"steps": len(later), "largest_difference": max(apart), "first_step": found["first_step"]}


SECTIONS: Mapping[str, Callable[[Bench], Figures]] = {
    "environment": environment,
    "attention": attention,
    "recipe": recipe,
    "resume": resume,
    "cudnn": cudnn,
    "compiled": compiled,
}


def main() -> int:
    """Run the sections; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, help="these sections; all without it")
    parser.add_argument("--work", type=Path, default=Path("outputs/gpu"), help="folder of weights and runs; made anew")
    parser.add_argument("--steps", type=int, default=20, help="steps of each run")
    parser.add_argument("--dry-run", action="store_true", help="toy size, on a CPU")
    arguments = parser.parse_args()
    bench = Bench(arguments.work.resolve(), arguments.dry_run, arguments.steps)
    if not bench.dry and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry-run tries the script on a CPU")
    shutil.rmtree(bench.work, ignore_errors=True)
    bench.work.mkdir(parents=True)
    make_model(bench)
    found: dict[str, Any] = {"benchmark": "gpu"}
    for name in arguments.only or SECTIONS:
        try:
            found[name] = dict(SECTIONS[name](bench))
        except Exception as error:  # reported, and the others still run
            found[name] = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps({name: found[name]}), flush=True)
    print(json.dumps(found))
    return int(any("failed" in figures for figures in found.values() if isinstance(figures, dict)))


if __name__ == "__main__":
    sys.exit(main())
