"""Rebuild a tiny pipeline from nothing but scikit-learn's digits.

    python -m fastvideo.tiny.build --out FOLDER [--family wan|cogvideox]
                                   [--stage classifier|vae|decoder|text|transformer|teacher]

Stages and their wall times on one core, in order: `classifier` (the judge, 7 minutes), `vae` (13 minutes), `decoder`
(its decoder alone once more, 25 minutes), `text` (tokenizer and random text encoder, at once), `transformer` (random
weights, at once), `teacher` (the `sft` method trains them, 2.5 hours; run it from the root of the repository, where its
recipe is). Without --stage all of them run.
A stage writes FOLDER/classifier or its part of FOLDER/pipeline and replaces what was there; the others stay.
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

from fastvideo.tiny import cogvideox_pipeline, pipeline, teacher, train_vae
from fastvideo.tiny.classifier import TinyClassifier
from fastvideo.tiny.cogvideox_recipe import CogVideoXRecipe
from fastvideo.tiny.pipeline import save_half
from fastvideo.tiny.recipe import TinyRecipe
from fastvideo.tiny.sharpen import sharpen_decoder
from fastvideo.tiny.text import build_t5, build_tokenizer, build_umt5
from fastvideo.tiny.train_classifier import accuracy, train_classifier
from fastvideo.tiny.world import TinyWorld

Recipe = TinyRecipe | CogVideoXRecipe


@dataclass(frozen=True)
class TinyFamily:
    """What differs from one family's pipeline to another's.

    Attributes:
        recipe: its numbers.
        vae: the class of its VAE.
        text_encoder: builds its text encoder from the recipe's text part.
        write_network: saves an untrained transformer, the scheduler and the index into a pipeline folder.
        teacher: how its transformer is trained.
    """

    recipe: Recipe
    vae: train_vae.VaeKind
    text_encoder: Callable[[Any], Any]
    write_network: Callable[[Path, Any], None]
    teacher: teacher.TeacherRecipe


WAN = TinyFamily(TinyRecipe(), train_vae.WAN, build_umt5, pipeline.write_network, teacher.WAN)
FAMILIES = {
    "wan": WAN,
    "cogvideox": TinyFamily(
        CogVideoXRecipe(), train_vae.COGVIDEOX, build_t5, cogvideox_pipeline.write_network, teacher.COGVIDEOX
    ),
}
Stage = Callable[[Path, Recipe, TinyFamily], dict[str, float]]


def classifier_stage(out: Path, recipe: Recipe, family: TinyFamily) -> dict[str, float]:
    """Train and save the judge; returns its accuracy on held-out real videos."""
    judge = train_classifier(recipe.classifier)
    judge.save(out / "classifier")
    return accuracy(judge, TinyWorld("heldout").sample(recipe.report_videos, seed=0))


def vae_stage(out: Path, recipe: Recipe, family: TinyFamily) -> dict[str, float]:
    """Train and save the VAE; returns its quality on held-out videos, read by the judge in `out`."""
    judge = TinyClassifier.load(out / "classifier")
    vae = train_vae.train_vae(recipe.vae, family.vae)
    quality = asdict(train_vae.vae_quality(vae, judge, recipe.report_videos, seed=0))
    save_half(vae, out / "pipeline" / "vae")
    return quality


def decoder_stage(out: Path, recipe: Recipe, family: TinyFamily) -> dict[str, float]:
    """Train the decoder of the VAE in `out` further and save it; returns the quality of the VAE then."""
    vae = family.vae.load(out / "pipeline" / "vae")
    sharpen_decoder(vae, recipe.sharpen, family.vae)
    judge = TinyClassifier.load(out / "classifier")
    save_half(vae, out / "pipeline" / "vae")
    return asdict(train_vae.vae_quality(vae, judge, recipe.report_videos, seed=0))


def text_stage(out: Path, recipe: Recipe, family: TinyFamily) -> dict[str, float]:
    """Save tokenizer and text encoder."""
    build_tokenizer(recipe.text).save_pretrained(out / "pipeline" / "tokenizer")
    family.text_encoder(recipe.text).save_pretrained(out / "pipeline" / "text_encoder")
    return {}


def transformer_stage(out: Path, recipe: Recipe, family: TinyFamily) -> dict[str, float]:
    """Save an untrained transformer, the scheduler and the index that makes the folder a diffusers pipeline."""
    family.write_network(out / "pipeline", recipe)
    return {}


def teacher_stage(out: Path, recipe: Recipe, family: TinyFamily) -> dict[str, float]:
    """Train the transformer and install it; returns its last loss."""
    return teacher.train_teacher(out, family.teacher)


STAGES: dict[str, Stage] = {
    "classifier": classifier_stage,
    "vae": vae_stage,
    "decoder": decoder_stage,
    "text": text_stage,
    "transformer": transformer_stage,
    "teacher": teacher_stage,
}


def build(out: Path, stages: list[str], recipe: Recipe, family: TinyFamily = WAN) -> None:
    """Run `stages` in order, printing one JSON line with wall time and figures after each."""
    for name in stages:
        start = time.perf_counter()
        figures = STAGES[name](out, recipe, family)
        seconds = round(time.perf_counter() - start, 1)
        print(json.dumps({"stage": name, "wall_seconds": seconds, **figures}), flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m fastvideo.tiny.build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that receives classifier/ and pipeline/")
    parser.add_argument("--family", choices=list(FAMILIES), default="wan", help="model family (default: wan)")
    parser.add_argument("--stage", choices=list(STAGES), action="append", help="run this stage only (repeatable)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1, which is reproducible)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)  # black pixels make denormals, which are a hundred times slower
    wanted = arguments.stage or list(STAGES)
    if wanted[0] == "vae" and not (arguments.out / "classifier").is_dir():
        parser.error(f"{arguments.out} holds no classifier to judge the VAE by: run --stage classifier first")
    family = FAMILIES[arguments.family]
    build(arguments.out, [name for name in STAGES if name in wanted], family.recipe, family)


if __name__ == "__main__":
    main()
