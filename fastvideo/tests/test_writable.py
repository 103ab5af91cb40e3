"""Places at which nothing can be written are refused before time is spent on what would go there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvideo.cli import main
from fastvideo.errors import UserError
from fastvideo.mount import check_writable
from fastvideo.tests.launch import in_child

NOBODY = 65534


def test_new_places_below_a_folder_and_files_that_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    for place in (tmp_path, tmp_path / "a.mp4", tmp_path / "new" / "deep" / "a.mp4", Path("a.mp4")):
        check_writable(place)


def test_a_folder_without_permission() -> None:
    def ask(folder: Path, mode: int) -> None:
        folder.chmod(mode)
        if os.getuid() == 0:
            os.setuid(NOBODY)
        check_writable(folder / "new" / "a.mp4")

    with tempfile.TemporaryDirectory() as name:
        assert message_in_child(lambda: ask(Path(name), 0o777)) == ""
        message = message_in_child(lambda: ask(Path(name), 0o555))
    assert message.endswith(f"a.mp4 cannot be written: no permission to write to {name}")


def message_in_child(work: Callable[[], object]) -> str:
    """Message of the error for the user that ``work`` raises in a forked process; empty if it raises none."""
    ready, told = os.pipe()

    def tell() -> None:
        try:
            work()
        except UserError as error:
            os.write(told, str(error).encode())

    assert in_child(tell) == 0
    os.close(told)
    with os.fdopen(ready) as text:
        return text.read()


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "tiny", "--prompt", "a red seven moving left", "--out", "FILE/a.mp4"],
        ["evaluate", "tiny:1", "--prompts", "8", "--out", "FILE/figures.json"],
        ["evaluate", "tiny:1", "--prompts", "8", "--out", "FILE/folder"],
        ["evaluate", "tiny_stream:1", "--long", "33", "--out", "FILE/folder"],
        ["report", "RUN", "--out", "FILE/page.html"],
        ["preprocess", "VIDEOS", "--model", "tiny", "--out", "FILE/data"],
    ],
    ids=lambda words: f"{words[0]} {words[-1]}",
)
def test_every_verb_says_so_at_once(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file.txt").touch()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    (tmp_path / "videos" / "a.txt").write_text("a caption")
    places = {"FILE": "file.txt", "RUN": ".", "VIDEOS": "videos"}
    for name, place in places.items():
        words = [word.replace(name, str(tmp_path / place)) for word in words]
    assert main(words) == 2
    assert f"cannot be written: {tmp_path / 'file.txt'} is a file, not a folder" in capsys.readouterr().err
