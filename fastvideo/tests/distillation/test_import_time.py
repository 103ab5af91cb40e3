"""Naming an algorithm must not cost the seconds that diffusers takes to import."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("diffusers", "transformers", "accelerate", "peft", "sklearn", "tensorboard", "av")
MODULES = (
    "fastvideo.distillation.methods",
    "fastvideo.distillation.methods.distribution_matching.dmd2",
    "fastvideo.distillation.methods.fine_tuning.sft",
    "fastvideo.distillation.adapters.wan_family.adapter",
    "fastvideo.distillation.adapters.analytic",
    "fastvideo.distillation.builder",
    "fastvideo.distillation.trainer",
)


def test_importing_the_core_does_not_import_a_model_library() -> None:
    program = f"""
import importlib, sys
for module in {MODULES}:
    importlib.import_module(module)
    print(module, [name for name in {HEAVY} if name in sys.modules])
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == [f"{module} []" for module in MODULES]
