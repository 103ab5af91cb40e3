"""Caption files and folders as other people, systems and trainers write them."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest

from fastvideo.data.caption_files import read_captions
from fastvideo.data.captions import POSTER, find_videos
from fastvideo.data.prompts import read_prompts
from fastvideo.errors import UserError

INPUTS = Path(__file__).parent / "inputs"
CAT = {"a.mp4": "a cat"}


def videos_in(folder: Path, *names: str) -> Path:
    """A folder with empty files of these names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def found(folder: Path, captions: Path | None = None) -> dict[str, str]:
    """Captions by the names of the videos in a folder."""
    return {video.name: video.problem or video.caption for video in find_videos(folder, captions)}


@pytest.mark.parametrize("name", ["newline.csv", "separator.csv"])
def test_only_line_ends_outside_of_quotes_end_rows(name: str) -> None:
    assert read_captions(INPUTS / "csv-captions" / name) == {"a.mp4": "a cat walks home", "b.mp4": "dog"}


def test_a_caption_may_be_longer_than_csv_expects(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text(f'file_name,caption\na.mp4,"{"word " * 40_000}"\nb.mp4,dog\n')
    assert read_captions(tmp_path / "c.csv") == {"a.mp4": " ".join(["word"] * 40_000), "b.mp4": "dog"}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_tables_of_every_program(end: str, separator: str, encoding: str, tmp_path: Path) -> None:
    rows = ["File Name{}CAPTION", 'a.mp4{}"a cat{} ä"', "b.mp4{}\u6c49", ""]
    text = end.join(row.replace("{}", separator) for row in rows)
    (tmp_path / "c.csv").write_bytes(text.encode(encoding))
    assert read_captions(tmp_path / "c.csv") == {"a.mp4": " ".join(f"a cat{separator} ä".split()), "b.mp4": "\u6c49"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('file_name,caption\na.mp4,cat\nb.mp4,"a dog\nc.mp4,bird\n', "line 3: a quote that opens in this row is never"),
        ('file_name,caption\na.mp4,"a cat\nb.mp4,"\nc.mp4,bird\n', "line 2: .* takes in a row of line 3"),
        ('caption,file_name\n"a cat,a.mp4\ndog",b.mp4\n', "line 2: .* takes in a row"),
        ('file_name,caption\na.mp4,"a "big" cat"\n', "line 2: .* ends in the middle of a field"),
        ("file_name,caption,caption\na.mp4,cat,dog\n", "column 'caption' is there twice"),
        ("file_name;caption\na.mp4;a cat; walking\n", "line 2: 2 columns are expected, found 3; .* with ';' in double"),
        ("f\0i\0l\0e\0", "line 1: holds a NUL character"),
    ],
)
def test_a_table_that_could_be_read_wrongly_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_captions(tmp_path / "c.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "not JSON"),
        ('{"file": "a.mp4", "caption": ' + "1" * 5000 + "}", "line 1: not JSON that can be read"),
        ('\n{"file": "a.mp4", "caption": "\\ud83d"}', "line 2: .* is half a character"),
        ('{"file": "a.mp4", "caption": [3]}', "several captions in a list"),
        ('[{"file": "a.mp4", "caption": "x"}, 3]', "entry 2: an object"),
        ('[{"file": "a.mp4",\n "caption" "x"}]', "not JSON .*line 2"),
    ],
)
def test_json_that_cannot_be_used_is_refused_with_its_place(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_captions(tmp_path / "c.jsonl")


def test_one_of_several_captions_is_chosen_by_seed_and_name(tmp_path: Path) -> None:
    """The choice differs between videos and seeds, and does not depend on the other videos."""
    rows = [{"path": f"{i}.mp4", "cap": ["one", "two", "", "three"]} for i in range(60)]
    whole, last = tmp_path / "all.json", tmp_path / "last.jsonl"
    whole.write_text(json.dumps(rows))
    last.write_text(json.dumps(rows[-1]))
    chosen = read_captions(whole)
    assert set(chosen.values()) == {"one", "two", "three"}
    assert read_captions(whole, seed=1) != chosen == read_captions(whole)
    assert read_captions(last)["59.mp4"] == chosen["59.mp4"]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "musubi.jsonl", "videos2caption.json"])
def test_files_of_other_trainers(name: str, tmp_path: Path) -> None:
    """Hugging Face's and DiffSynth's metadata and FastVideo's list are found; musubi's name is free."""
    folder = videos_in(tmp_path, "a.mp4")
    source = folder / name
    source.write_bytes((INPUTS / "metadata-of-other-trainers" / name).read_bytes())
    assert found(folder, source if name.startswith("musubi") else None) == CAT


@pytest.mark.parametrize("written", ["a.mp4", "clips/a.mp4", "clips\\a.mp4", ".\\clips\\a.mp4", "{}/clips/a.mp4"])
def test_names_of_other_systems_and_folders(written: str, tmp_path: Path) -> None:
    """FastVideo leaves the folder ``videos`` out; others write backslashes and absolute paths."""
    folder = videos_in(tmp_path / "data", "clips/a.mp4", "clips/b.mp4")
    row = {"video_path": written.format(folder), "caption": "a cat"}
    (folder / "captions.jsonl").write_text(json.dumps(row))
    assert found(folder)["clips/a.mp4"] == "a cat"


def test_names_relative_to_the_caption_file_or_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos_in(tmp_path / "data", "clips/a.mp4", "other/a.mp4")
    beside, above = tmp_path / "data" / "clips" / "list.csv", tmp_path / "list.csv"
    beside.write_text("file_name,caption\na.mp4,a cat\n")
    above.write_text("file_name,caption\ndata/clips/a.mp4,a cat\n")
    monkeypatch.chdir(tmp_path)
    for source in (beside, above):
        assert found(tmp_path / "data", source)["clips/a.mp4"] == "a cat"
        assert found(Path("data"), source.relative_to(tmp_path))["clips/a.mp4"] == "a cat"


def test_an_end_that_several_videos_have_is_not_found(tmp_path: Path) -> None:
    folder = videos_in(tmp_path, "x/a.mp4", "y/a.mp4")
    (folder / "captions.csv").write_text("file_name,caption\na.mp4,a cat\n")
    with pytest.raises(UserError, match=r"'a.mp4' not found in .*did you mean '[xy]/a.mp4'"):
        find_videos(folder)


def test_two_names_of_one_video_are_refused(tmp_path: Path) -> None:
    folder = videos_in(tmp_path, "x/a.mp4")
    (folder / "captions.csv").write_text("file_name,caption\nx/a.mp4,a cat\nx\\a.mp4,a dog\n")
    with pytest.raises(UserError, match="are the same video"):
        find_videos(folder)


@pytest.mark.parametrize(("disk", "written"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_accents_may_be_spelt_either_way(disk: str, written: str, tmp_path: Path) -> None:
    on_disk, in_text = (unicodedata.normalize(form, "caf\u00e9.mp4") for form in (disk, written))
    folder = videos_in(tmp_path, on_disk)
    (folder / in_text).with_suffix(".txt").write_text("a dog")
    assert found(folder) == {on_disk: "a dog"}
    (folder / "captions.csv").write_text(f"file_name,caption\n{in_text},a cat\n", encoding="utf-8")
    assert found(folder) == {on_disk: "a cat"}


def test_the_exact_name_goes_first(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "caf\u00e9.mp4") for form in ("NFC", "NFD")]
    folder = videos_in(tmp_path, *names, "x\\a.mp4", "x/a.mp4")
    lines = [f"{name},{i}" for i, name in enumerate([*names, "x\\a.mp4", "x/a.mp4"])]
    (folder / "captions.csv").write_text("\n".join(["file_name,caption", *lines]), encoding="utf-8")
    assert found(folder) == {names[0]: "0", names[1]: "1", "x\\a.mp4": "2", "x/a.mp4": "3"}


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    store, folder = videos_in(tmp_path / "store", "a.mp4"), videos_in(tmp_path / "data", "z.mp4", "real/b.mp4")
    for link, target in {"sub": store, "again": store, "loop": folder, "before": folder / "real"}.items():
        os.symlink(target, folder / link)
    os.symlink(folder, store / "back")
    (folder / "captions.csv").write_text("file_name,caption\nsub/a.mp4,one\nbefore/b.mp4,two\nz.mp4,three\n")
    assert found(folder) == {"again/a.mp4": "one", "real/b.mp4": "two", "z.mp4": "three"}


def test_a_link_without_its_file_is_listed(tmp_path: Path) -> None:
    folder = videos_in(tmp_path, "a.mp4")
    (folder / "a.txt").write_text("a cat")
    os.symlink(folder / "gone.mp4", folder / "b.mp4")
    assert found(folder) == {"a.mp4": "a cat", "b.mp4": f"a link to {folder}/gone.mp4, which does not exist"}


def test_a_link_to_a_folder_that_is_gone_is_listed(tmp_path: Path) -> None:
    """As on a machine that has not mounted the disk; one to a text file concerns its video alone."""
    folder = videos_in(tmp_path, "z.mp4")
    (folder / "z.txt").write_text("a cat")
    os.symlink(folder / "store", folder / "sub")
    os.symlink(folder / "store.txt", folder / "notes.txt")
    assert found(folder) == {"sub": f"a link to {folder}/store, which does not exist", "z.mp4": "a cat"}


def test_a_poster_is_no_data_unless_a_caption_file_names_it(tmp_path: Path) -> None:
    folder = videos_in(tmp_path, "a.mp4", "a.jpg", "b.jpg")
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("a cat")
    assert found(folder) == {"a.jpg": POSTER, "a.mp4": "a cat", "b.jpg": "a cat"}
    (folder / "captions.csv").write_text("file_name,caption\na.jpg,one\na.mp4,two\nb.jpg,three\n")
    assert found(folder) == {"a.jpg": "one", "a.mp4": "two", "b.jpg": "three"}


def test_videos_with_posters_and_no_captions_are_told_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of 2 videos has a caption: no caption: a\.txt does not exist"):
        find_videos(videos_in(tmp_path, "a.jpg", "a.mp4"))


def test_a_suffix_in_capitals_is_a_text_file_too(tmp_path: Path) -> None:
    folder = videos_in(tmp_path, "A.MP4")
    (folder / "A.TXT").write_text("a cat")
    assert found(folder) == {"A.MP4": "a cat"}


@pytest.mark.parametrize(
    ("name", "text"), [("metadata.csv", "file_name,fps\na.mp4,8\n"), ("metadata.json", '{"fps": 8}')]
)
def test_metadata_without_captions_are_no_caption_file(name: str, text: str, tmp_path: Path) -> None:
    folder = videos_in(tmp_path, "a.mp4")
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=f"{name}.* one of caption, text, prompt, cap"):
        find_videos(folder)
    (folder / "a.txt").write_text("a cat")
    assert found(folder) == CAT
    with pytest.raises(UserError, match=name):
        find_videos(folder, folder / name)


@pytest.mark.parametrize("none", ["null", '""', "[]"])
def test_no_caption_in_json_concerns_its_video_alone(none: str, tmp_path: Path) -> None:
    folder = videos_in(tmp_path, "a.mp4", "b.mp4")
    lines = ['{"path": "a.mp4", "cap": "a cat"}', f'{{"path": "b.mp4", "cap": {none}}}']
    (folder / "captions.jsonl").write_text("\n".join(lines))
    assert found(folder) == {**CAT, "b.mp4": "no caption in captions.jsonl"}


def test_a_name_that_is_no_text_is_shown_by_its_bytes(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.mp4")
    folder = videos_in(tmp_path, name)
    (folder / name).with_suffix(".txt").write_text("a cat")
    assert found(folder) == {"caf\\xe9.mp4": "a cat"}


def test_if_no_video_has_a_caption_the_message_names_the_text_files(tmp_path: Path) -> None:
    folder = videos_in(tmp_path, "a.mp4", "train/metadata.csv", "prompts.txt")
    with pytest.raises(UserError, match=r"none of 1 videos .*The folder has prompts.txt, train/metadata.csv: a file"):
        find_videos(folder)


def test_prompts_end_at_line_ends_alone(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffa cat\u2028walks\r\n\rdog\x85\n".encode())
    assert list(read_prompts(str(tmp_path / "p.txt"))) == ["a cat\u2028walks", "dog"]
