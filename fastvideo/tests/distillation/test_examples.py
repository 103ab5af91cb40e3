"""Every example is what it says: it loads, validates and builds, and the scripts start what they name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from fastvideo.conformance.tiny import MADE
from fastvideo.data.prompts import read_prompts
from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.config.causal import StreamOptions
from fastvideo.distillation.config.reading import read_yaml, validate
from fastvideo.distillation.experts import check_boundary
from fastvideo.distillation.registry import load_method, run_schema
from fastvideo.tests.distillation.tiny import cogvideox_folder, made_family
from fastvideo.training.distillation import parse

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"
RECIPES = sorted((EXAMPLES / "distillation").rglob("*.yaml"))
SCRIPTS = sorted((EXAMPLES / "distillation").rglob("*.sh"))
EIGHT_STEPS = "distill_wan2.1_t2v_1.3B_dmd2_8steps.sh"


VARIANTS = {"flux2_dev_dmd2": "flux2-dev"}
"""Tiny pipelines of recipes that are not for the first of their family."""


def name_of(path: Path) -> str:
    return str(path.relative_to(EXAMPLES))


def config_of(values: dict[str, Any], recipe: Path) -> Any:
    return validate(run_schema(values["distill_model"], values["distill_method"]), values, str(recipe))


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_recipe_is_valid_and_says_what_it_is(recipe: Path) -> None:
    config = config_of(read_yaml(recipe), recipe)
    header = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    assert any("arXiv" in line for line in header), "name the paper"
    assert any("Command:" in line for line in header), "give the command"
    assert config.output.startswith("outputs/"), "git ignores outputs/ alone"


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_recipe_names_data_that_is_there(recipe: Path) -> None:
    config = config_of(read_yaml(recipe), recipe)
    if config.data.prompts:
        prompts = read_prompts(str(ROOT / config.data.prompts))
        assert len(prompts) >= 8 * config.data.batch_size, "eight processes need a batch each"
        assert not load_method(config.distill_method).uses_latents(config.method)


def use_toys(values: dict[str, Any], root: Path) -> None:
    """Put tiny pipelines into the sections of roles with a family of their own."""
    for role in values["roles"].values():
        if (name := role.get("model", {}).get("family")) in MADE:
            made = made_family(name, root).config.model_dump(include={"path", "max_sequence_length"})
            role["model"] |= {**made, "height": 16, "width": 32}
            values["method"]["allow_resize"] = True


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_recipe_builds(recipe: Path, tiny_wan: Path) -> None:
    """The whole builder, with toy networks of the real class instead of the recipe's weights."""
    values = read_yaml(recipe)
    values["model"] |= {"attention_backend": "native"} if "attention_backend" in values["model"] else {}
    use_toys(values, tiny_wan.parent)
    if values["distill_model"] == "wan":
        options = load_method(values["distill_method"]).Config
        streams = issubclass(options, StreamOptions) and options.autoregressive_roles
        reach = values["method"].get("reach", {})
        values["model"]["path"] = str(streaming(tiny_wan, reach.get("chunk", 1)) if streams else tiny_wan)
        for role in values["roles"].values():
            role.pop("path", None)
    if values["distill_model"] == "cogvideox":
        values["model"]["path"] = str(cogvideox_folder(tiny_wan.parent))
    if (name := values["distill_model"]) in MADE:
        made = made_family(VARIANTS.get(recipe.stem, name), tiny_wan.parent).config
        values["model"] |= made.model_dump(include={"path", "max_sequence_length"})
    config = config_of(values, recipe)
    adapter = build_adapter(config)
    loaded = set(config.roles) - set(
        load_method(config.distill_method).heads(config.method, dict.fromkeys(config.roles, adapter))
    )
    network = adapter.folder.load_network()
    method = build_method(config, adapter, networks={role: deepcopy(network) for role in loaded})
    assert method.bundle.roles == tuple(config.roles)
    assert method.ladder.times == config.ladder.times
    for handle in method.bundle:
        assert (handle.training is not None) == handle.trainable


def streaming(pipeline: Path, chunk: int) -> Path:
    """The pipeline as one that says that it generates chunk by chunk."""
    folder = pipeline.parent / f"streaming-{chunk}"
    if not folder.is_dir():
        shutil.copytree(pipeline, folder)
        (folder / "recipe.json").write_text(json.dumps({"streaming": {"chunk": chunk}}))
    return folder


def test_wan_recipe_is_the_published_one() -> None:
    recipe = EXAMPLES / "distillation" / "wan2.1_t2v_1.3b_dmd2.yaml"
    config = config_of(read_yaml(recipe), recipe)
    assert config.ladder.times == (1.0, 0.75, 0.5, 0.25)
    assert config.method.teacher_guidance == 4.5
    assert config.model.prompt_for_negative.startswith("Bright tones, overexposed")
    assert config.model.prompt_for_negative.endswith("walking backwards")


@pytest.mark.parametrize(("kind", "boundary"), [("t2v", 0.875), ("i2v", 0.9)])
def test_both_experts_of_a14b_have_two_steps(kind: str, boundary: float) -> None:
    """I2V at the shift 5 of its authors; the 12 of T2V would leave the low expert one."""
    recipe = EXAMPLES / "distillation" / f"wan2.2_{kind}_a14b_dmd2_lora.yaml"
    config = config_of(read_yaml(recipe), recipe)
    assert config.ladder.times == pytest.approx((1.0, 0.9375, 0.8333, 0.625), abs=1e-4)
    check_boundary(config.ladder.times, boundary, "ladder.times")
    assert [t > boundary for t in config.ladder.times] == [True, True, False, False]
    assert load_method("dmd2").uses_latents(config.method) is False


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_script_starts_a_valid_run(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a ``torchrun`` that prints its arguments: they must be flags that the entry knows."""
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "OUTPUT_DIR": "outputs/from_test"}
    done = subprocess.run(
        ["bash", str(script), "--seed", "7"], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    )
    arguments = done.stdout.splitlines()
    entry = arguments.index("fastvideo/training/distillation.py")
    monkeypatch.chdir(ROOT)
    _, config = parse(arguments[entry + 1 :])
    assert (config.distill_model, config.distill_method, config.seed) == ("wan", "dmd2", 7)
    assert config.ladder.times == (1.0, 0.85, 0.7, 0.55, 0.35, 0.275, 0.2, 0.125)


def test_eight_step_script_documents_its_variables() -> None:
    text = (EXAMPLES / "distillation" / "phase1" / EIGHT_STEPS).read_text()
    comments = [line for line in text.splitlines() if line.startswith("#")]
    variables = {line.split("=${")[0] for line in text.splitlines() if "=${" in line and not line.startswith("export")}
    assert variables
    for variable in variables:
        assert any(f" {variable} " in line for line in comments), variable
