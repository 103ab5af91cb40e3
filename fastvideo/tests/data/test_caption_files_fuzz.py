"""Random caption files: read as they were written, or refused by a message; never two captions joined or one cut."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastvideo.data.caption_files import READERS, read_captions
from fastvideo.data.captions import find_videos
from fastvideo.errors import UserError

MARKS = ",;\t|\"'\\\n\r\u2028\u0085\x0b\x1c\ufeff\u202e{}[]:=é漢🐱 \u0301"
CAPTIONS = st.lists(
    st.text(st.sampled_from(MARKS + "ab c. mp4") | st.characters(exclude_categories=["Cs"])), max_size=5
)
CAPTIONS = CAPTIONS.map(lambda texts: [text.replace("\0", "") for text in texts])
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"])
ENDS = st.sampled_from(["\n", "\r\n", "\r"])
MANY = settings(
    max_examples=420, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def wanted(captions: list[str]) -> dict[str, str]:
    return {f"{number}.mp4": " ".join(text.split()) for number, text in enumerate(captions)}


def check_read(path: Path, captions: list[str]) -> None:
    assert read_captions(path) == wanted(captions)


@MANY
@given(CAPTIONS, st.sampled_from(",;\t|"), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), ENDS, ENCODINGS)
def test_tables(tmp_path: Path, captions: list[str], separator: str, quoting: int, end: str, encoding: str) -> None:
    """As csv writes them, which forgets to quote some line ends."""
    quoting = csv.QUOTE_ALL if {"\r", "\n"} & set("".join(captions)) else quoting
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=separator, quoting=quoting, lineterminator=end)
    writer.writerows([("file_name", "caption"), *((f"{i}.mp4", text) for i, text in enumerate(captions))])
    path = tmp_path / "c.csv"
    path.write_bytes(out.getvalue().encode(encoding))
    check_read(path, captions)


@MANY
@given(CAPTIONS, st.sampled_from(["lines", "list", "indented"]), st.booleans(), ENDS, ENCODINGS)
def test_json(tmp_path: Path, captions: list[str], form: str, ascii: bool, end: str, encoding: str) -> None:
    rows = [{"video_path": f"{i}.mp4", "cap": [text]} for i, text in enumerate(captions)]
    if form == "lines":
        text = end.join(json.dumps(row, ensure_ascii=ascii) for row in rows)
    else:
        text = json.dumps(rows, ensure_ascii=ascii, indent=2 if form == "indented" else None)
    path = tmp_path / "c.jsonl"
    path.write_bytes(text.encode(encoding))
    check_read(path, captions)


@MANY
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), max_size=3), ENCODINGS)
def test_text_files(tmp_path: Path, captions: list[str], encoding: str) -> None:
    captions = ["first", *captions]
    for name, text in wanted(captions).items():
        (tmp_path / name).touch()
        (tmp_path / name).with_suffix(".txt").write_bytes(text.encode(encoding))
    found = {video.name: video.caption for video in find_videos(tmp_path)}
    assert {name: found[name] for name in wanted(captions)} == wanted(captions)


@MANY
@given(
    st.sampled_from([*READERS]), st.binary(max_size=60) | st.text(MARKS + "file_name,caption\na.mp4").map(str.encode)
)
def test_anything(tmp_path: Path, suffix: str, content: bytes) -> None:
    """Bytes of any kind, alone and as rows below a right header."""
    path = tmp_path / f"c{suffix}"
    for before in (b"", b"file_name,caption\n", b"caption\tfile\na cat\ta.mp4\n"):
        path.write_bytes(before + content)
        with contextlib.suppress(UserError):
            assert all(isinstance(caption, str) for caption in read_captions(path).values())


@MANY
@given(st.lists(st.text('ab ,"\n', min_size=1, max_size=12), min_size=2, max_size=4), st.data())
def test_a_lost_quote_never_joins_or_cuts_captions(tmp_path: Path, captions: list[str], data: st.DataObject) -> None:
    """A table that lost one of its characters is refused, or has every caption but the damaged row's."""
    rows = [f'{i}.mp4,"{text.replace(chr(34), chr(34) * 2)}"\n' for i, text in enumerate(captions)]
    lost = data.draw(st.integers(0, len(rows) - 1))
    marks = [at for at, letter in enumerate(rows[lost]) if letter == '"']
    at = data.draw(st.sampled_from(marks))
    rows[lost] = rows[lost][:at] + rows[lost][at + 1 :]
    path = tmp_path / "c.csv"
    path.write_text("file_name,caption\n" + "".join(rows))
    expected = wanted(captions)
    try:
        read = read_captions(path)
    except UserError:
        return
    if set(read) <= set(expected):  # find_videos refuses a file that names others
        damaged = f"{lost}.mp4"
        assert {**read, damaged: ""} == {**expected, damaged: ""}


def test_the_lost_quote_is_found(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text('file_name,caption\n0.mp4,"a\n1.mp4,"\n')
    with pytest.raises(UserError, match="takes in a row"):
        read_captions(path)
