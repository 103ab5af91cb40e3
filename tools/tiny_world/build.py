"""Rebuild a tiny pipeline: Wan from scikit-learn's digits alone, CogVideoX from the shipped Wan too.

    python -m tools.tiny_world --out FOLDER [--family wan|cogvideox|stream|soft|stills]
                               [--stage classifier|vae|decoder|text|transformer|teacher]

Stages and their wall times on one core, in order: `classifier` (the judge, 7 minutes), `vae` (13 minutes), `decoder`
(its decoder alone once more, 25 minutes), `text` (tokenizer and random text encoder, at once), `transformer` (random
weights, at once), `teacher` (trained by the `sft` method, 2.5 hours; run it from the root of the repository). Without
--stage all of them run. The times are those of Wan; CogVideoX distils `vae` and `teacher` from the shipped Wan
pipeline, in less time, and `soft` tunes its network on soft videos. `stills` is the tiny SDXL, of single frames. A
stage replaces FOLDER/classifier or its part of FOLDER/pipeline; the others stay.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fastvideo.tiny.classifier import TinyClassifier
from fastvideo.tiny.world import TinyWorld
from tools.tiny_world import cogvideox_pipeline, cogvideox_teacher, pipeline, soft, stills, stream, teacher, train_vae
from tools.tiny_world.cogvideox_encoder import train_encoder
from tools.tiny_world.cogvideox_recipe import CogVideoXRecipe
from tools.tiny_world.pipeline import save_half
from tools.tiny_world.recipe import TextRecipe, TinyRecipe
from tools.tiny_world.sharpen import sharpen_decoder
from tools.tiny_world.soft import SoftRecipe
from tools.tiny_world.stills import StillsRecipe
from tools.tiny_world.stream import StreamRecipe
from tools.tiny_world.text import build_t5, build_tokenizer, build_umt5
from tools.tiny_world.train_classifier import accuracy, train_classifier

Recipe = TinyRecipe | CogVideoXRecipe | StreamRecipe | SoftRecipe | StillsRecipe
Stage = Callable[[Path, Any], dict[str, float]]


def classifier_stage(out: Path, recipe: Recipe) -> dict[str, float]:
    """Train and save the judge; returns its accuracy on held-out real videos."""
    judge = train_classifier(recipe.classifier)
    judge.save(out / "classifier")
    return accuracy(judge, TinyWorld("heldout").sample(recipe.report_videos, seed=0))


def vae_stage(out: Path, recipe: TinyRecipe) -> dict[str, float]:
    """Train and save the VAE; returns its quality on held-out videos, read by the judge in `out`."""
    vae = train_vae.train_vae(recipe.vae)
    save_half(vae, out / "pipeline" / "vae")
    return _quality(vae, out, recipe)


def encoder_stage(out: Path, recipe: CogVideoXRecipe) -> dict[str, float]:
    """Train the encoder of the VAE and save it with an untrained decoder; returns its last error."""
    vae, error = train_encoder(recipe.vae)
    save_half(vae, out / "pipeline" / "vae")
    return {"latent_error": error}


def decoder_stage(kind: train_vae.VaeKind) -> Stage:
    """Train the decoder of the VAE in `out` and save it; returns the quality of the VAE then."""

    def stage(out: Path, recipe: Recipe) -> dict[str, float]:
        vae = kind.load(out / "pipeline" / "vae")
        sharpen_decoder(vae, recipe.sharpen, TinyWorld("train"), kind)
        save_half(vae, out / "pipeline" / "vae")
        return _quality(vae, out, recipe)

    return stage


def _quality(vae: train_vae.Vae, out: Path, recipe: Recipe) -> dict[str, float]:
    judge = TinyClassifier.load(out / "classifier")
    return asdict(train_vae.vae_quality(vae, judge, recipe.report_videos, seed=0))


def text_stage(encoder: Callable[[TextRecipe], PreTrainedModel]) -> Stage:

    def stage(out: Path, recipe: Recipe) -> dict[str, float]:
        build_tokenizer(recipe.text).save_pretrained(out / "pipeline" / "tokenizer")
        encoder(recipe.text).save_pretrained(out / "pipeline" / "text_encoder")
        return {}

    return stage


def transformer_stage(write_network: Callable[[Path, Any], None]) -> Stage:
    """Save an untrained transformer, the scheduler and the pipeline's index."""

    def stage(out: Path, recipe: Recipe) -> dict[str, float]:
        write_network(out / "pipeline", recipe)
        return {}

    return stage


@dataclass(frozen=True)
class TinyFamily:
    """Recipe of one family's pipeline and its stages, in order."""

    recipe: Recipe
    stages: dict[str, Stage]


WAN = TinyFamily(
    TinyRecipe(),
    {
        "classifier": classifier_stage,
        "vae": vae_stage,
        "decoder": decoder_stage(train_vae.WAN),
        "text": text_stage(build_umt5),
        "transformer": transformer_stage(pipeline.write_network),
        "teacher": lambda out, recipe: teacher.train_teacher(out),
    },
)
COGVIDEOX = TinyFamily(
    CogVideoXRecipe(),
    {
        "classifier": classifier_stage,
        "vae": encoder_stage,
        "decoder": decoder_stage(train_vae.COGVIDEOX),
        "text": text_stage(build_t5),
        "transformer": transformer_stage(cogvideox_pipeline.write_network),
        "teacher": cogvideox_teacher.train_teacher,
    },
)
STREAM = TinyFamily(
    StreamRecipe(),
    {
        "vae": stream.vae_stage,
        "decoder": stream.decoder_stage,
        "transformer": stream.network_stage,
        "teacher": stream.teacher_stage,
    },
)
SOFT = TinyFamily(SoftRecipe(), {"transformer": soft.network_stage, "teacher": soft.teacher_stage})
STILLS = TinyFamily(
    StillsRecipe(),
    {
        "vae": stills.vae_stage,
        "text": stills.text_stage,
        "transformer": stills.network_stage,
        "teacher": stills.teacher_stage,
    },
)
FAMILIES = {"wan": WAN, "cogvideox": COGVIDEOX, "stream": STREAM, "soft": SOFT, "stills": STILLS}


def build(out: Path, stages: list[str], recipe: Recipe, family: TinyFamily = WAN) -> None:
    """Run `stages` in order, printing one JSON line with wall time and figures after each."""
    for name in stages:
        start = time.perf_counter()
        figures = family.stages[name](out, recipe)
        seconds = round(time.perf_counter() - start, 1)
        print(json.dumps({"stage": name, "wall_seconds": seconds, **figures}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tiny_world",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that receives classifier/ and pipeline/")
    parser.add_argument("--family", choices=list(FAMILIES), default="wan", help="model family (default: wan)")
    parser.add_argument("--stage", choices=list(WAN.stages), action="append", help="run this stage only (repeatable)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1, which is reproducible)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)  # black pixels make denormals, which are a hundred times slower
    family = FAMILIES[arguments.family]
    wanted = [name for name in family.stages if name in (arguments.stage or family.stages)]
    judged = "classifier" in family.stages and wanted[0] in ("vae", "decoder")
    if judged and not (arguments.out / "classifier").is_dir():
        parser.error(f"{arguments.out} holds no classifier to judge the VAE by: run --stage classifier first")
    build(arguments.out, wanted, family.recipe, family)
