"""The recording of the live page shows what is done on it, and is small."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fastvideo.errors import UserError
from fastvideo.tests.evaluation.browser import chromium
from fastvideo.tests.live.serving import live
from tools import record_live
from tools.record_live import Shot, key, record, write


@pytest.mark.slow
def test_a_recording(tmp_path: Path) -> None:
    with chromium() as browser, live(seconds=0.02, fps=12.0) as running:
        shots = record(browser, running.url, [(0.5, key("\ue013"))], 6.0)
        assert "a red seven moving up" in browser.find_element("id", "log").text
    size = write(shots, tmp_path / "live.webp")
    assert size == (tmp_path / "live.webp").stat().st_size < record_live.LARGEST
    with Image.open(tmp_path / "live.webp") as picture:
        assert picture.n_frames > 1
        assert picture.size == (record_live.WIDTH, record_live.HEIGHT)


def test_a_recording_that_would_be_too_large_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_live, "LARGEST", 100)
    shots = [Shot(Image.effect_noise((64, 64), 90 + at).convert("RGB"), at) for at in range(3)]
    with pytest.raises(UserError, match=r"3 pictures take .* record fewer --seconds"):
        write(shots, tmp_path / "live.webp")
    assert not list(tmp_path.iterdir())
