"""Captions from three kinds of files, and every way in which they can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvideo.data.captions import find_videos
from fastvideo.errors import UserError
from fastvideo.wording import see


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two empty files with the names of videos: captions are read before anything is decoded."""
    (tmp_path / "sub").mkdir()
    for name in ("a.mp4", "sub/b.gif", "notes.md", ".hidden.mp4"):
        (tmp_path / name).touch()
    return tmp_path


def test_csv_jsonl_and_text_files_give_the_same(folder: Path) -> None:
    csv, lines = folder / "own.csv", folder / "own.jsonl"
    csv.write_text('caption,file_name\n"one, two",a.mp4\nthree\u00fc,./sub/b.gif\n', encoding="utf-8-sig")
    lines.write_text('{"path": "a.mp4", "text": "one, two"}\n\n{"file": "sub/b.gif", "caption": " three\u00fc "}\n')
    (folder / "a.txt").write_text("one,\ntwo\n")
    (folder / "sub" / "b.txt").write_text("three\u00fc")
    expected = [("a.mp4", "one, two"), ("sub/b.gif", "three\u00fc")]
    for source in (csv, lines, None):
        assert [(video.name, video.caption) for video in find_videos(folder, source)] == expected


def test_a_caption_file_in_the_folder_is_found(folder: Path) -> None:
    (folder / "captions.csv").write_text("file_name,caption\na.mp4,one\n")
    first, second = find_videos(folder)
    assert first.caption == "one"
    assert second.problem == "no caption in captions.csv"
    (folder / "captions.jsonl").write_text("")
    with pytest.raises(UserError, match=r"captions\.csv and captions\.jsonl: name one of them with --captions"):
        find_videos(folder)


def test_a_text_file_that_is_missing_empty_or_not_text_concerns_its_video_alone(folder: Path) -> None:
    for name in ("good.gif", "good.txt"):
        (folder / name).write_text("words")
    (folder / "sub" / "b.txt").write_bytes(b"caf\xe9")
    assert [video.problem for video in find_videos(folder)] == [
        "no caption: a.txt does not exist",
        None,
        f"caption b.txt, line 1: not UTF-8 (byte 4); save it as UTF-8{see('a-file-is-not-utf-8')}",
    ]
    (folder / "sub" / "b.txt").write_text(" \n")
    assert find_videos(folder)[2].problem == "no caption: b.txt is empty"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", b"", "found nothing"),
        ("c.csv", b"name,words\na.mp4,x\n", "its first line must name the columns.*found name, words"),
        (
            "c.csv",
            b"file_name,caption\na.mp4,one, two\n",
            "line 2: 2 columns are expected, found 3; put a caption with commas",
        ),
        ("c.csv", b"file_name,caption\na.mp4\n", "line 2: 2 columns are expected"),
        ("c.csv", b"file_name,caption\na.mp4,x\na.mp4,y\n", "'a.mp4' is named twice, in line 2 and line 3"),
        ("c.csv", b"file_name,caption\na.mp4,x\n./a.mp4,y\n", "'a.mp4' is named twice, in line 2 and line 3"),
        ("c.csv", b"file_name,caption\nz.mp4,x\n", "'z.mp4' not found in"),
        ("c.csv", b"file_name,caption\n" + b"".join(b"%d.mp4,x\n" % i for i in range(9)), "and 6 more not found in"),
        ("c.csv", b"file_name,caption\na.mp4,caf\xe9\n", "line 2: not UTF-8"),
        ("c.jsonl", b'{"file": "a.mp4"\n', "line 1: not JSON"),
        ("c.jsonl", b'{"file": "a.mp4", "caption": 3}\n', "line 1: an object with one of file_name"),
        ("c.jsonl", b'{"file": "a.mp4"}\n', "line 1: an object with one of file_name"),
        ("c.jsonl", b"[]\n", r"no caption in c\.jsonl"),
        ("c.txt", b"", r"a name that ends in \.csv, \.tsv, \.jsonl, \.json is expected"),
    ],
)
def test_a_wrong_caption_file_is_refused_with_its_line(name: str, content: bytes, message: str, folder: Path) -> None:
    source = folder / name
    source.write_bytes(content)
    with pytest.raises(UserError, match=message):
        find_videos(folder, source)


def test_folders_that_are_none_or_have_no_video_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        find_videos(folder / "absent")
    with pytest.raises(UserError, match="is not a folder"):
        find_videos(folder / "a.mp4")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=r"no video in .*\*\.mp4, \*\.webm"):
        find_videos(folder / "empty")
    with pytest.raises(UserError, match="No such file"):
        find_videos(folder, folder / "absent.csv")
