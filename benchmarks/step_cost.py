"""What a DMD2 cycle costs beside a hand-written loop that does the same work, and what each option changes.

A cycle is 5 steps: 1 student update and 5 critic updates, with the student's input made from data (its network is
called 5 times, the critic's 6 times, the teacher's twice). The loop below is the least that DMD2 needs: networks of
diffusers, two AdamW, nothing else. Everything is measured in one process, cycle by cycle in turn, so that what disturbs
one disturbs all; a ratio is the median over cycles of the ratio to the loop's cycle of the same turn.

    python benchmarks/step_cost.py                  # the tiny world's network, 30 cycles
    python benchmarks/step_cost.py --size mid       # 320 tokens, width 384
    python benchmarks/step_cost.py --cpu-time --cycles 10 --only framework frames_decoded frames_identity
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import truediv
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from fastvideo.data.order import MemorySource, SampleStream, Shard
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.adapters.wan_family.inputs import WanFamilyConfig
from fastvideo.distillation.batches import BatchPreparer
from fastvideo.distillation.builder import build_method
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.config.sections import TrainerConfig
from fastvideo.distillation.engine.optional.memory import keep_freed_memory
from fastvideo.distillation.engine.runtime import Runtime
from fastvideo.distillation.engine.tracking import Tracker
from fastvideo.distillation.registry import run_schema
from fastvideo.distillation.trainer import DistillTrainer

SIZES: Mapping[str, dict[str, Any]] = {
    "tiny": {"network": {}, "video": {"height": 32, "width": 32, "num_frames": 9}, "batch": 32},
    "mid": {
        "network": {"num_attention_heads": 6, "attention_head_dim": 64, "ffn_dim": 1536, "num_layers": 6},
        "video": {"height": 128, "width": 128, "num_frames": 17},
        "batch": 2,
    },
}
INTERVAL, GUIDANCE, TIMES, BETAS, DECAY = 5, 1.5, (1.0, 0.75, 0.5, 0.25), (0.0, 0.999), 0.01
FRAMES = {"frame_weight": 0.25, "frame_warmup_steps": 0, "trust_frame_teacher": True}
"""Options of DMD2 with a frame teacher: here the video's own network, on stills."""
RATES = {"student": 1e-4, "critic": 2e-4}


class Loop:
    """DMD2 by hand."""

    def __init__(
        self, networks: Mapping[str, nn.Module], batch: Mapping[str, Tensor], *, batched: bool = False
    ) -> None:
        self.student, self.teacher, self.critic = (networks[role] for role in ("student", "teacher", "critic"))
        self.teacher.requires_grad_(False)
        self.batch, self.batched, self.times = batch, batched, torch.tensor(TIMES)
        self.optimizers = {
            role: torch.optim.AdamW(networks[role].parameters(), lr=rate, betas=BETAS, weight_decay=DECAY)
            for role, rate in RATES.items()
        }

    def cycle(self) -> None:
        """Five steps."""
        for step in range(INTERVAL):
            x0 = self.rollout(step == 0)
            if step == 0:
                self.update("student", self.student_loss(x0))
            self.update("critic", self.critic_loss(x0.detach()))

    def update(self, role: str, loss: Tensor) -> None:
        loss.backward()
        if role == "student":
            self._pending = True
            return
        for name in ("student", "critic") if self._pending else ("critic",):
            nn.utils.clip_grad_norm_(getattr(self, name).parameters(), 1.0)
            self.optimizers[name].step()
            self.optimizers[name].zero_grad(set_to_none=True)
        self._pending = False

    _pending = False

    @staticmethod
    def call(network: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return network(x, t * 1000, text, return_dict=False)[0]

    def noised(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        noise, w = torch.randn_like(x0), t.view(-1, 1, 1, 1, 1)
        return (1 - w) * x0 + w * noise, noise

    def rollout(self, grad: bool) -> Tensor:
        with torch.set_grad_enabled(grad):
            t = self.times[torch.randint(len(TIMES), (len(self.batch["x0"]),))]
            x_t, _ = self.noised(self.batch["x0"], t)
            return x_t - t.view(-1, 1, 1, 1, 1) * self.call(self.student, x_t, t, self.batch["text"])

    def student_loss(self, x0: Tensor) -> Tensor:
        with torch.no_grad():
            t = torch.rand(len(x0)).clamp(0.02, 0.98)
            x_t, _ = self.noised(x0, t)
            w, text, negative = t.view(-1, 1, 1, 1, 1), self.batch["text"], self.batch["negative"]
            fake = x_t - w * self.call(self.critic, x_t, t, text)
            if self.batched:
                both = self.call(self.teacher, torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([negative, text]))
                without, given = both.chunk(2)
            else:
                given, without = self.call(self.teacher, x_t, t, text), self.call(self.teacher, x_t, t, negative)
            real = x_t - w * (without + GUIDANCE * (given - without))
            gradient = (fake - real) / ((x0 - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True) + 1e-6)
        return 0.5 * nn.functional.mse_loss(x0, (x0 - gradient).detach())

    def critic_loss(self, x0: Tensor) -> Tensor:
        t = torch.rand(len(x0)).clamp(0.02, 0.98)
        x_t, noise = self.noised(x0, t)
        return nn.functional.mse_loss(self.call(self.critic, x_t, t, self.batch["text"]), noise - x0)


class Fresh(Loop):
    """The loop that samples anew for the critic of a student step, as many implementations do."""

    def cycle(self) -> None:
        for step in range(INTERVAL):
            if step == 0:
                self.update("student", self.student_loss(self.rollout(True)))
            self.update("critic", self.critic_loss(self.rollout(False)))


@dataclass
class Bench:
    """Networks and data of a size."""

    size: str
    folder: str
    prompts: tuple[str, ...] = ()
    networks: dict[str, nn.Module] = field(default_factory=dict)

    def config(
        self, model: Mapping[str, Any], method: Mapping[str, Any], parallel: Mapping[str, Any] | None = None
    ) -> Any:
        frames = "frame_weight" in method
        named = "dmd2_frames" if frames else "dmd2"
        roles = {name: {"trainable": name != "teacher"} for name in ("student", "teacher", "critic")}
        if frames:
            still = {"path": self.folder, "num_frames": 1}
            roles |= {
                f"frame_{name}": {"trainable": name == "critic", "model": still} for name in ("teacher", "critic")
            }
        values = {
            "distill_model": "wan", "distill_method": named, "output": "unused",
            "model": {"path": self.folder, **SIZES[self.size]["video"], **model},
            "roles": roles,
            "ladder": {"times": TIMES},
            "method": {"rollout": "data", "teacher_guidance": GUIDANCE, "generator_update_interval": INTERVAL,
                       "student_learning_rate": RATES["student"], "critic_learning_rate": RATES["critic"],
                       "betas": BETAS, "weight_decay": DECAY, **method},
            "parallel": parallel or {}, "ema": {"enabled": False},
        }  # fmt: skip
        return validate(run_schema("wan", named), values, "benchmarks/step_cost.py")

    def framework(
        self,
        model: Mapping[str, Any] | None = None,
        method: Mapping[str, Any] | None = None,
        parallel: Mapping[str, Any] | None = None,
    ) -> tuple[Callable[[], None], Mapping[str, nn.Module]]:
        """A cycle of the trainer, as a user's config makes it, and its networks."""
        config = self.config(model or {}, method or {}, parallel)
        adapter = WanFamily(config.model)
        built = build_method(config, adapter)
        batch = SIZES[self.size]["batch"]
        latents = torch.randn(batch, *adapter.codec.latent_shape)
        data = SampleStream(MemorySource(["a red three moving up"] * batch, latents), 0, Shard(batch))
        silent = Tracker(Path(self.folder), enabled=False)
        options = TrainerConfig(max_steps=10**9, log_every=10**9)
        others = {role.adapter.conditioner.key: role.adapter.conditioner for role in built.bundle}
        prepare = BatchPreparer(adapter.codec, list({adapter.conditioner.key: adapter.conditioner, **others}.values()))
        trainer = DistillTrainer(built, prepare, options, Runtime(built, options, silent))

        def cycle() -> None:
            for _ in range(INTERVAL):
                step = trainer.step
                trainer.train_step(data)
                trainer.step = step + 1

        return cycle, {role: built.bundle[role].network for role in RATES | {"teacher": 0}}

    def loop(self, kind: type[Loop] = Loop, **options: Any) -> tuple[Callable[[], None], Mapping[str, nn.Module]]:
        """A cycle of the hand-written loop, and its networks."""
        adapter = WanFamily(WanFamilyConfig(path=self.folder, **SIZES[self.size]["video"]))
        networks = {role: adapter.folder.load_network() for role in ("student", "teacher", "critic")}
        count = SIZES[self.size]["batch"]
        text = adapter.conditioner.encode_prompts(["a red three moving up", ""]).of(adapter.conditioner.key)[
            "prompt_embeds"
        ]
        batch = {
            "x0": torch.randn(count, *adapter.codec.latent_shape),
            "text": text[:1].repeat(count, 1, 1),
            "negative": text[1:].repeat(count, 1, 1),
        }
        return kind(networks, batch, **options).cycle, networks


def folder_of(size: str, root: Path) -> str:
    """The shipped pipeline, or one with a larger network of random weights."""
    if not SIZES[size]["network"]:
        return "tiny"
    import shutil
    from importlib.resources import files

    from diffusers import WanTransformer3DModel

    shipped = Path(str(files("fastvideo").joinpath("tiny/weights/pipeline")))
    shutil.copytree(shipped, root / "mid", ignore=shutil.ignore_patterns("transformer"))
    config = dict(WanTransformer3DModel.load_config(shipped, subfolder="transformer"))
    network = WanTransformer3DModel.from_config({**config, **SIZES[size]["network"], "rope_max_seq_len": 1024})
    network.save_pretrained(root / "mid" / "transformer")
    return str(root / "mid")


def count_calls(cycle: Callable[[], None], networks: Mapping[str, nn.Module]) -> dict[str, int]:
    """Forwards of each role's network and backwards in one cycle, by hooks."""
    counts = dict.fromkeys([*networks, "backwards"], 0)

    def add(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[name] += 1

        return hook

    handles = [network.register_forward_hook(add(role)) for role, network in networks.items()]
    trained = [networks[role] for role in RATES]
    handles += [n.proj_out.weight.register_post_accumulate_grad_hook(add("backwards")) for n in trained]
    cycle()
    for handle in handles:
        handle.remove()
    return counts


def timed(cycle: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one cycle."""
    start = clock()
    cycle()
    return clock() - start


def main() -> None:
    """Measure, print, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--cycles", type=int, default=30)
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time, on a machine that does other work too")
    parser.add_argument("--only", nargs="*", help="these contestants beside the loop; all without it")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as root:
        print(json.dumps(measure(arguments, Bench(arguments.size, folder_of(arguments.size, Path(root))))))


def contestants(bench: Bench) -> dict[str, Callable[[], tuple[Callable[[], None], Mapping[str, nn.Module]]]]:
    """Every cycle that is measured, by name; those that end in ``+kept`` run with freed memory kept."""
    return {
        "loop": bench.loop,
        "framework": bench.framework,
        "without_x0_reuse": lambda: bench.loop(Fresh),
        "batched_guidance": lambda: bench.loop(batched=True),
        "compile_blocks": lambda: bench.framework({"compile_blocks": True}),
        "keep_freed_memory+kept": bench.framework,
        "score_and_train": lambda: bench.framework(method={"score_and_train": True}),
        "activation_checkpointing": lambda: bench.framework(parallel={"activation_checkpointing": "full"}),
        "frames_decoded": lambda: bench.framework(method={**FRAMES, "frame_space": "decoded"}),
        "frames_identity": lambda: bench.framework(method={**FRAMES, "frame_space": "identity", "frames_per_video": 1}),
        "with_options+kept": lambda: bench.framework({"compile_blocks": True}),
    }


def measure(arguments: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """Medians and ratios."""
    made = {
        name: make()
        for name, make in contestants(bench).items()
        if not arguments.only or name == "loop" or name.split("+")[0] in arguments.only
    }
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for name, (cycle, _) in made.items():
        print(f"{name:40} warm-up {timed(cycle):.2f} s, {timed(cycle):.2f} s", flush=True)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    for _ in range(arguments.cycles):
        for name, (cycle, _) in made.items():
            keep_freed_memory(name.endswith("+kept"))
            seconds[name].append(timed(cycle, clock))
    keep_freed_memory(False)
    ratios = {}
    for name, times in seconds.items():
        each = [mine / theirs for mine, theirs in zip(times, seconds["loop"], strict=True)]
        short, median = name.split("+")[0], statistics.median(times)
        ratios[short] = round(statistics.median(each), 3)
        print(f"{short:40} {median * 1000:9.1f} ms per cycle   {ratios[short]:.3f} of the loop")
    counted = {name: count_calls(*made[name]) for name in ("framework", "score_and_train") if name in made}
    return {
        "benchmark": "step_cost",
        "size": arguments.size,
        "cycles": arguments.cycles,
        "clock": clock.__name__,
        "loop_ms_per_cycle": round(statistics.median(seconds["loop"]) * 1000, 1),
        "framework_overhead": ratios.get("framework"),
        "with_options": ratios.get("with_options"),
        "frames_over_dmd2": {
            name.removeprefix("frames_"): round(statistics.median(map(truediv, times, seconds["framework"])), 3)
            for name, times in seconds.items()
            if name.startswith("frames_") and "framework" in seconds
        },
        "options": {n: r for n, r in ratios.items() if n not in ("loop", "framework", "with_options")},
        "calls_per_cycle": counted.get("framework", {}),
        "calls_per_cycle_with_score_and_train": counted.get("score_and_train", {}),
    }


if __name__ == "__main__":
    main()
