"""LoRA files where a model is expected: the message names the place where they go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastvideo.cli import main

TENSORS = {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 4)}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "pytorch_lora_weights.safetensors")
    return tmp_path


def test_a_file_as_initial_weights(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = lora / "pytorch_lora_weights.safetensors"
    command = ["distill", "--config", "tiny_wan_dmd2", "--output", str(tmp_path / "run")]
    assert main([*command, "--init-student-from", str(file)]) == 2
    assert "roles.student.init_from: " in (message := capsys.readouterr().err)
    assert "lora.init_from (to train it on) or loras (to merge it)" in message
    assert not (tmp_path / "run").exists()


def test_a_folder_as_a_model(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["distill", "--config", "tiny_wan_dmd2", "--output", str(tmp_path / "run")]
    assert main([*command, "--roles.teacher.path", str(lora)]) == 2
    assert "it holds a LoRA, which goes into a role's `loras`" in capsys.readouterr().err
    assert main(["generate", str(lora), "--prompt", "a seven"]) == 2
    assert "`fastvideo merge`" in capsys.readouterr().err
