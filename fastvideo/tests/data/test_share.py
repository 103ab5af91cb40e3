"""Preprocessing that several machines share: disjoint files, one manifest, the bytes of a single machine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from fastvideo.cli.preprocess import main
from fastvideo.data.index import dataset_files
from fastvideo.data.output import open_output
from fastvideo.data.preprocess import preprocess, summary
from fastvideo.errors import UserError
from fastvideo.shares import Share
from fastvideo.tests.data.conftest import MakeJob


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_three_machines_write_what_one_writes(job: MakeJob) -> None:
    preprocess(job("alone"), workers=1)
    parts = [preprocess(job("shared"), workers=1, share=Share(i, 3)) for i in (3, 1, 2)]
    assert contents(job("shared").out) == contents(job("alone").out)
    assert [part.encoded for part in parts] == [2, 4, 3]
    assert [part.left for part in parts] == [4, 2, 0]


def test_machines_that_start_at_once_agree_on_one_folder(tmp_path: Path) -> None:
    manifest = {"settings": {}, "sources": "", "videos": 64, "files": 64}
    with ThreadPoolExecutor(8) as machines:
        shares = [Share(i, 8) for i in range(1, 9)]
        open_ = partial(open_output, tmp_path / "out", manifest, overwrite=False)
        missing = list(machines.map(lambda share: open_(share=share), shares))
    assert sorted(number for part in missing for number in part) == list(range(64))


def test_the_last_machine_completes_the_folder_and_a_finished_one_does_nothing(job: MakeJob) -> None:
    work = job()
    first = preprocess(work, workers=1, share=Share(1, 2))
    assert "2 files of other shards to come" in summary(work.out, first)
    with pytest.raises(UserError, match="has 3 of 5 files"):
        dataset_files(str(work.out))
    foreign = work.out / ".videos-00001.parquet.other-7.part"
    foreign.write_bytes(b"half")
    assert preprocess(work, workers=1, share=Share(1, 2)).encoded == 0
    assert foreign.exists(), "a file that another machine is writing was removed"
    last = preprocess(work, workers=1, share=Share(2, 2))
    assert (last.left, last.rows, last.items) == (0, 9, 9)
    assert not foreign.exists()
    assert len(dataset_files(str(work.out))) == 5


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_wrong_share_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="I from 1 to N"):
        Share.parse(text)


def test_a_share_does_not_delete_what_the_others_write(tmp_path: Path) -> None:
    call = [str(tmp_path), "--model", "tiny", "--out", str(tmp_path / "out"), "--shard", "1/2", "--overwrite"]
    with pytest.raises(UserError, match="would delete what the others write"):
        main(call)
