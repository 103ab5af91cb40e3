"""Devices that are none, or are not on this machine, are refused in a sentence before anything is loaded."""

from __future__ import annotations

import pytest
import torch

from fastvideo.cli import main
from fastvideo.devices import check_device
from fastvideo.errors import UserError
from fastvideo.inference.loading import load_model


def test_a_word_that_is_no_device() -> None:
    with pytest.raises(UserError, match=r"device 'cudda': one of cpu, cuda, cuda:1, mps is expected; did you mean 'cu"):
        check_device("cudda")
    with pytest.raises(UserError, match=r"device 'gpu': one of cpu, cuda"):
        load_model("no/such/folder", device="gpu")


def test_a_device_that_is_not_here() -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(UserError, match=rf"device '{missing}' is not on this machine \(.+\); one of cpu, cuda"):
        check_device(missing)
    for kind in ("meta", "hpu"):
        with pytest.raises(UserError, match=rf"device .{kind}. is not on this machine"):
            check_device(kind)
    check_device("cpu")


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "tiny"],
        ["live", "tiny_stream", "--port", "0"],
        ["evaluate", "tiny"],
        ["preprocess", "videos", "--model", "tiny", "--out", "out"],
    ],
    ids=lambda words: words[0],
)
def test_every_verb_says_so(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--device", "gpu"]) == 2
    assert capsys.readouterr().err.startswith("error: device 'gpu': one of cpu")
