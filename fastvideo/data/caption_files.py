"""Caption files as people have them: CSV, TSV, JSONL and JSON, with the keys of several trainers."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from zlib import crc32

from fastvideo.distillation.rng import mixed
from fastvideo.errors import UserError
from fastvideo.texts import lines_of, read_text
from fastvideo.wording import see

NAME_KEYS = (
    "file_name",
    "file",
    "video",
    "path",
    "video_path",
    "file_path",
    "media_path",
    "filename",
    "image",
    "image_path",
)
CAPTION_KEYS = ("caption", "text", "prompt", "cap")
"""Keys of file names and captions; of several in a file the first of the list counts."""
SEPARATORS = (",", ";", "\t", "|")
FILE_NAME = re.compile(r"\.(mp4|m4v|mov|mkv|webm|avi|gif|webp|png|jpe?g)$", re.IGNORECASE)
"""End of a cell that names a file, and is no caption."""
Row = tuple[str, str, list[str]]
"""Place in the file, such as ``line 3``; file name; captions."""


class NoCaptionsError(UserError):
    """A file whose columns or keys are not those of captions."""


def read_captions(path: Path, seed: int = 0) -> dict[str, str]:
    """Captions by file name as written; an empty caption stands for none.

    Args:
        seed: of the choice where a video has a list of captions; the choice follows from it and the name alone.

    Raises:
        UserError: naming the line, if the file is not readable, not text, has not the right keys or an open quote, or
            names a video twice.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"caption file {str(path)!r}: a name that ends in {', '.join(READERS)} is expected")
    label = f"caption file {path}"
    captions: dict[str, str] = {}
    places: dict[str, str] = {}
    for place, written, texts in reader(label, read_text(path, label)):
        if not written.strip():
            raise UserError(f"{label}, {place}: no file name")
        name = str(PurePosixPath(written.strip()))
        if name in places:
            raise UserError(f"{label}: {name!r} is named twice, in {places[name]} and {place}")
        places[name] = place
        known = [text for text in (" ".join(text.split()) for text in texts) if text]
        captions[name] = known[mixed(seed, crc32(name.encode())) % len(known)] if known else ""
    return captions


def _csv_rows(label: str, text: str) -> Iterator[Row]:
    lines = lines_of(text)
    first = next((i for i, line in enumerate(lines) if line.strip()), 0)
    separator, header = _header(label, lines[first])
    name, caption = _columns(header)
    for line, row in _parsed(label, lines, first + 1, separator):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(header):
            raise UserError(
                f"{label}, line {line}: {len(header)} columns are expected, found {len(row)}; put a caption with "
                f"{'commas' if separator == ',' else f'{separator!r}'} in double quotes"
            )
        yield f"line {line}", row[name], [row[caption]]


def _header(label: str, line: str) -> tuple[str, list[str]]:
    """Separator and columns: the separator is the one that gives a file name and a caption."""
    for separator in SEPARATORS:
        header = [_key(cell) for cell in next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])]
        twice = [key for key in (*NAME_KEYS, *CAPTION_KEYS) if header.count(key) > 1]
        if twice:
            raise UserError(f"{label}: column {twice[0]!r} is there twice")
        if None not in _columns(header):
            return separator, header
    found = ", ".join(next(csv.reader([line]), []))
    raise NoCaptionsError(
        f"{label}: its first line must name the columns, one of {', '.join(NAME_KEYS)} and one of "
        f"{', '.join(CAPTION_KEYS)}; found {found or 'nothing'}"
    )


def _key(cell: str) -> str:
    """A column as a key: ``File Name`` is ``file_name``."""
    return re.sub(r"[\s-]+", "_", cell.strip().lower())


def _columns(header: Sequence[str]) -> Any:
    """Positions of name and caption; ``None`` for one that is absent."""
    return [next((header.index(key) for key in keys if key in header), None) for keys in (NAME_KEYS, CAPTION_KEYS)]


def _parsed(label: str, lines: list[str], first: int, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Rows with the number of their first line.

    Raises:
        UserError: for a quote that is not closed, closed within a word, or has swallowed rows.
    """
    with _any_field_size(sum(map(len, lines)) + len(lines)):
        reader = csv.reader(
            (f"{line}\n" for line in lines[first:]), delimiter=separator, skipinitialspace=True, strict=True
        )
        start = first + 1
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise UserError(
                    f"{label}, line {start}: {_quote_problem(error)}; a quote inside of quotes is written twice"
                    f"{see('a-quote-is-not-closed')}"
                ) from error
            if row is None:
                return
            end = first + reader.line_num
            _check_swallowed(label, start, end, row, separator)
            yield start, row
            start = end + 1


@contextmanager
def _any_field_size(characters: int) -> Iterator[None]:
    """Let csv read fields as long as the file."""
    before = csv.field_size_limit()
    csv.field_size_limit(max(before, characters))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _quote_problem(error: csv.Error) -> str:
    if "unexpected end" in str(error):
        return "a quote that opens in this row is never closed"
    return f"a quote that opens in this row ends in the middle of a field ({error})"


def _check_swallowed(label: str, start: int, end: int, row: list[str], separator: str) -> None:
    """Refuse a row of several lines that holds the name of another row's video: its quote was not closed."""
    for field in row if end > start else ():
        for offset, line in enumerate(lines_of(field)):
            cells = [cell.strip('" ') for cell in line.split(separator)]
            if len(cells) > 1 and "\n" in field and any(map(FILE_NAME.search, cells)):
                raise UserError(
                    f"{label}, line {start}: a quote that opens in this row takes in a row of line {start + offset} or "
                    f"after it; close it{see('a-quote-is-not-closed')}"
                )


def _json_rows(label: str, text: str) -> Iterator[Row]:
    """Rows of a JSON list, or of one object per line."""
    if text.lstrip().startswith("["):
        values = _parse_json(label, text)
        for number, value in enumerate(values, start=1):
            yield _json_row(label, f"entry {number}", value)
        return
    for number, line in enumerate(lines_of(text), start=1):
        if line.strip():
            yield _json_row(label, f"line {number}", _parse_json(f"{label}, line {number}", line))


def _parse_json(label: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f" at line {error.lineno}" if error.lineno > 1 else ""
        raise UserError(f"{label}: not JSON ({error.msg}{where})") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise UserError(f"{label}: not JSON that can be read ({error})") from error


def _json_row(label: str, place: str, value: Any) -> Row:
    keys = {_key(key): value[key] for key in reversed(value)} if isinstance(value, Mapping) else {}
    name = next((keys[key] for key in NAME_KEYS if key in keys), None)
    written = [keys[key] for key in CAPTION_KEYS if key in keys]
    caption = written[0] if written else None
    texts = caption if isinstance(caption, list) else [] if caption is None else [caption]
    if not isinstance(name, str) or not written or not all(isinstance(text, str) for text in texts):
        raise (UserError if written else NoCaptionsError)(
            f"{label}, {place}: an object with one of {', '.join(NAME_KEYS)} and one of {', '.join(CAPTION_KEYS)} is "
            f"expected, both texts (or several captions in a list)"
        )
    _check_characters(f"{label}, {place}", (name, *texts))
    return place, name, texts


def _check_characters(label: str, texts: Iterable[str]) -> None:
    r"""Refuse half a character: JSON can write ``\ud83d`` without its other half, which no encoding has."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{label}: {text[error.start]!r} is half a character") from error


READERS = {".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _json_rows, ".json": _json_rows}
"""Readers of caption files by suffix."""
