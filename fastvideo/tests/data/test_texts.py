"""Prompts encoded beforehand: the same texts after any interruption, and a run without a text encoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from fastvideo.cli import main
from fastvideo.cli.preprocess import main as preprocess
from fastvideo.data.model import choose_model
from fastvideo.data.prompts import read_prompts
from fastvideo.data.schema import METADATA_KEY, metadata_of
from fastvideo.data.stored_texts import SAMPLING
from fastvideo.data.texts import TextJob, preprocess_texts
from fastvideo.distillation.config.reading import config_of
from fastvideo.errors import UserError
from fastvideo.shares import Share
from fastvideo.tests.data.conftest import CAPTIONS, TOY
from fastvideo.training import run as run_module
from fastvideo.training.run import run

PROMPTS = (*CAPTIONS, "a red seven moving up", "red", "a green one moving", "three", "a seven")
SHOWN = ("a red five", "green")
MakeTexts = Callable[..., TextJob]


@pytest.fixture
def make(toy: Path, tmp_path: Path) -> MakeTexts:
    """The job of eight prompts in files of three; every argument of it can be another."""

    def texts(out: str = "texts", prompts: tuple[str, ...] = PROMPTS, **sizes: int) -> TextJob:
        choice = choose_model(str(toy), TOY | sizes)
        return TextJob(tmp_path / out, 3, "cpu", [choice], prompts, SHOWN, batch_size=2)

    return texts


@pytest.fixture
def bare(toy: Path, tmp_path: Path) -> Path:
    """The toy pipeline without its text encoder."""
    folder = Path(shutil.copytree(toy, tmp_path / "bare"))
    shutil.rmtree(folder / "text_encoder")
    return folder


@pytest.fixture
def values(bare: Path, tmp_path: Path) -> dict[str, Any]:
    """DMD2 of the pipeline without a text encoder on the stored texts, with validation."""
    return {
        "distill_model": "wan",
        "distill_method": "dmd2",
        "output": str(tmp_path / "run"),
        "model": {**TOY, "path": str(bare)},
        "roles": {name: {"trainable": name != "teacher"} for name in ("student", "teacher", "critic")},
        "method": {"teacher_guidance": 2.0, "generator_update_interval": 1},
        "data": {"path": str(tmp_path / "texts"), "batch_size": 2, "cache": str(tmp_path / "cache")},
        "trainer": {"max_steps": 2, "log_every": 1, "threads": 1},
        "validation": {"every": 2, "prompts": list(SHOWN)},
        "health": {"teacher_steps": 2},
        "checkpoint": {"every": 2},
        "tracking": {"backends": []},
    }


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def tensor(row: dict[str, Any], column: str = "text_embedding") -> Tensor:
    bits = torch.from_numpy(np.frombuffer(row[f"{column}_bytes"], dtype="<i2").copy())
    return bits.view(torch.bfloat16).reshape(row[f"{column}_shape"])


def test_a_row_is_the_text_that_the_encoder_gives(make: MakeTexts, toy: Path, tmp_path: Path) -> None:
    """In bfloat16, cut to the prompt's own tokens, in the columns of FastVideo's text-only data."""
    print(preprocess_texts(make(), workers=1))
    found = rows(tmp_path / "texts")
    assert list(found[0]) == [
        "id", "text_embedding_bytes", "text_embedding_shape", "text_embedding_dtype", "caption",
    ]  # fmt: skip
    assert [row["caption"] for row in found] == list(PROMPTS)
    conditioner = choose_model(str(toy), TOY).adapter("cpu").conditioner
    for row in found:
        (expected,) = conditioner.encode_prompts([row["caption"]]).of(conditioner.key)["prompt_embeds"]
        text, used = tensor(row), conditioner.token_counts([row["caption"]])[0]
        assert (tuple(text.shape), row["text_embedding_dtype"]) == ((used, 16), "bfloat16")
        torch.testing.assert_close(text.float(), expected[:used], rtol=2**-7, atol=1e-5)


def test_an_interrupted_call_goes_on_to_the_same_bytes(make: MakeTexts, tmp_path: Path) -> None:
    preprocess_texts(make("whole"), workers=1)
    preprocess_texts(make(), workers=1)
    for name in ("prompts-00000.parquet", "prompts-00002.parquet", SAMPLING):
        (tmp_path / "texts" / name).unlink()
    assert "8 prompts, " in preprocess_texts(make(), workers=1)
    names = {file.name for file in (tmp_path / "whole").iterdir()}
    assert names == {file.name for file in (tmp_path / "texts").iterdir()}
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "texts" / name).read_bytes(), name
    assert "nothing was left to do" in preprocess_texts(make(), workers=1)
    with pytest.raises(UserError, match="begun with other settings"):
        preprocess_texts(make(prompts=(*PROMPTS, "blue")), workers=1)


def test_machines_that_share_prompts_write_what_one_writes(make: MakeTexts, tmp_path: Path) -> None:
    prompts = (*PROMPTS[:4], "a " * 20, *PROMPTS[4:])
    preprocess_texts(make("alone", prompts), workers=1)
    said = [preprocess_texts(make("texts", prompts), workers=1, share=Share(i, 2)) for i in (2, 1)]
    assert [line.partition("; ")[2].rpartition("; ")[2] for line in said] == [
        "2 files of other shards to come",
        f"1 prompt too long and left out, see {tmp_path / 'texts' / 'skipped.jsonl'}",
    ]
    alone, shared = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("alone", "texts")
    )
    assert SAMPLING in alone
    assert shared == alone


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(make: MakeTexts, tmp_path: Path) -> None:
    preprocess_texts(make("one"), workers=1)
    preprocess_texts(make("two"), workers=2)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_a_long_prompt_is_left_out_and_listed_or_refused(make: MakeTexts, tmp_path: Path) -> None:
    prompts = (*PROMPTS[:4], "a " * 20, *PROMPTS[4:])
    with pytest.raises(UserError, match=r"1 of 9 prompts have more tokens .* 8 .*the first is number 5 with 21: 'a a"):
        preprocess_texts(make(prompts=prompts), workers=1, strict=True)
    assert not (tmp_path / "texts").exists()
    assert "1 prompt too long and left out, see" in preprocess_texts(make(prompts=prompts), workers=1)
    assert [row["caption"] for row in rows(tmp_path / "texts")] == list(PROMPTS)
    (listed,) = map(json.loads, (tmp_path / "texts" / "skipped.jsonl").read_text().splitlines())
    assert (listed["number"], listed["prompt"]) == (5, "a " * 20)


def test_no_text_encoder_is_needed_to_train_validate_resume_and_export(
    make: MakeTexts, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preprocess_texts(make(), workers=1)
    run(config_of(values, "test"))
    assert "training on 8 stored text embeddings of" in capsys.readouterr().err
    longer = values | {"trainer": values["trainer"] | {"max_steps": 4}}
    student = run(config_of(longer, "test"), resume=True)
    names = {file.name for file in (tmp_path / "run" / "validation").iterdir()}
    assert {"teacher.mp4", "step-000002-student.mp4", "step-000004-student.mp4"} <= names
    assert main(["export", str(student), "--out", str(tmp_path / "exported")]) == 0
    assert not (tmp_path / "exported" / "text_encoder").exists()


def test_a_prompt_that_is_not_stored_is_named_before_anything_is_loaded(
    make: MakeTexts, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess_texts(make(), workers=1)
    monkeypatch.setattr(run_module, "build_on", lambda *_: pytest.fail("a network was loaded"))
    shown = values | {"validation": {"every": 2, "prompts": ["a red five", "a blue five"]}}
    with pytest.raises(UserError, match=r"no text encoder.*holds no text of 'a blue five'.*--validation-prompts"):
        run(config_of(shown, "test"))
    negative = values | {"model": values["model"] | {"prompt_for_negative": "ugly"}}
    with pytest.raises(UserError, match="holds no text of 'ugly'"):
        run(config_of(negative, "test"))


def test_texts_of_another_encoder_or_length_are_refused(
    make: MakeTexts, values: dict[str, Any], toy: Path, tmp_path: Path
) -> None:
    preprocess_texts(make(), workers=1)
    shorter = values | {"model": values["model"] | {"max_sequence_length": 6}}
    with pytest.raises(UserError, match=r"model\.max_sequence_length 8, the model's is 6"):
        run(config_of(shorter, "test"))
    other = Path(shutil.copytree(toy, tmp_path / "other"))
    file = other / "text_encoder" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"another model \({toy}\): weights of the text encoder \w+, the model's is"):
        run(config_of(values | {"model": values["model"] | {"path": str(other)}}, "test"))


@pytest.mark.parametrize(("name", "value"), [("dtype", "float16"), ("max_sequence_length", 7)])
def test_a_file_with_other_texts_than_the_rest_is_refused(
    make: MakeTexts, values: dict[str, Any], tmp_path: Path, name: str, value: object
) -> None:
    preprocess_texts(make(), workers=1)
    file = tmp_path / "texts" / "prompts-00001.parquet"
    table, made = pq.read_table(file), metadata_of(pq.read_metadata(file).metadata)
    made["texts"]["text_embedding"][name] = value
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(made)}), file)
    with pytest.raises(UserError, match=r"prompts-00001.parquet: its text embeddings are not those of the other files"):
        run(config_of(values, "test"))


def test_a_file_whose_dtype_is_not_what_it_says_is_refused(
    make: MakeTexts, values: dict[str, Any], tmp_path: Path
) -> None:
    preprocess_texts(make(), workers=1)
    file = tmp_path / "texts" / "prompts-00000.parquet"
    table = pq.read_table(file).replace_schema_metadata(pq.read_metadata(file).metadata)
    place = table.schema.get_field_index("text_embedding_dtype")
    halves = pa.array(["float16"] * len(table))
    pq.write_table(table.set_column(place, "text_embedding_dtype", halves), file)
    with pytest.raises(UserError, match=r"holds float16, and the file says that it was written in bfloat16"):
        run(config_of(values, "test"))


def test_prompts_are_encoded_before_the_first_step_and_the_encoder_is_gone(
    values: dict[str, Any],
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    data = {"prompts": str(file), "batch_size": 2, "cache": str(tmp_path / "cache")}
    model = values["model"] | {"path": str(toy)}
    resident: list[int] = []
    watched = run_module.DistillTrainer.train_step

    def step(self: Any, stream: Any) -> None:
        watched(self, stream)
        resident.append(self.method.student.adapter.conditioner.encoder_bytes)

    monkeypatch.setattr(run_module.DistillTrainer, "train_step", step)
    run(config_of(values | {"data": data, "model": model}, "test"))
    assert resident == [0, 0]
    assert "text encoder stays" not in capsys.readouterr().err
    small = values | {"data": data, "model": model | {"prompt_cache_mib": 0}, "output": str(tmp_path / "small")}
    run(config_of(small, "test"))
    assert all(resident[2:])
    assert "the text encoder stays in memory" in (shown := " ".join(capsys.readouterr().err.split()))
    assert f"fastvideo preprocess --prompts {file} --model {toy} --out FOLDER" in shown


def test_long_prompts_of_a_file_are_left_out_once_or_refused(
    values: dict[str, Any],
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join((PROMPTS[0], "a " * 20, *PROMPTS[1:])))
    data = {"prompts": str(file), "batch_size": 2, "cache": str(tmp_path / "cache")}
    changed = values | {"data": data, "model": values["model"] | {"path": str(toy)}}
    run(config_of(changed, "test"))
    assert "training on 8 prompts of" in (shown := " ".join(capsys.readouterr().err.split()))
    assert "(1 left out, with more tokens than the text encoder takes: listed in" in shown
    (listed,) = map(json.loads, (tmp_path / "run" / "prompts_left_out.jsonl").read_text().splitlines())
    assert listed == {"number": 2, "tokens": 21, "possible": 8, "prompt": ("a " * 20).strip()}
    monkeypatch.setattr("fastvideo.training.texts.too_long", lambda *_: pytest.fail("checked twice"))
    refused = changed | {"data": data | {"long_prompts": "raise"}, "output": str(tmp_path / "refused")}
    with pytest.raises(UserError, match="1 of 9 prompts have more tokens"):
        run(config_of(refused, "test"))


@pytest.mark.slow
def test_one_folder_holds_the_texts_of_every_family_of_a_run(tmp_path: Path) -> None:
    """The student's Wan and the teacher's CogVideoX, both without their encoders."""
    paths = {name: tmp_path / name for name in ("tiny", "cogvideox")}
    weights = Path(run_module.__file__).parents[1] / "tiny" / "weights"
    for path, source in zip(paths.values(), ("pipeline", "cogvideox"), strict=True):
        shutil.copytree(weights / source, path)
    (tmp_path / "prompts.txt").write_text("\n".join(["a red seven", "a blue three", "a green one", "a red two"]))
    teacher = {"family": "cogvideox", "path": str(paths["cogvideox"]), "prompt_for_negative": "a white one"}
    values = {
        "distill_model": "wan",
        "distill_method": "dmd2",
        "output": str(tmp_path / "run"),
        "model": {"path": str(paths["tiny"])},
        "roles": {
            "student": {"trainable": True},
            "teacher": {"trainable": False, "model": teacher},
            "critic": {"trainable": True, "model": teacher},
        },
        "method": {"teacher_guidance": 1.5},
        "data": {"path": str(tmp_path / "texts"), "batch_size": 2},
        "trainer": {"max_steps": 2, "log_every": 1},
        "tracking": {"backends": []},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    call = ["preprocess", "--prompts", str(tmp_path / "prompts.txt"), "--config", str(tmp_path / "config.yaml")]
    assert main([*call, "--out", str(tmp_path / "texts")]) == 0
    (first, *_) = rows(tmp_path / "texts")
    assert [column for column in first if column.endswith("_bytes")] == [
        "text_embedding_bytes",
        "text_embedding_2_bytes",
    ]
    for path in paths.values():
        shutil.rmtree(path / "text_encoder")
    run(config_of(values, "test"))


def test_a_prompt_that_is_too_long_for_a_second_family_is_left_out(
    values: dict[str, Any], toy: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("red\na red seven moving up\ngreen\n")
    scoring = {"path": str(toy), **TOY, "max_sequence_length": 3}
    roles = {name: {**role, "model": scoring} for name, role in values["roles"].items() if name != "student"}
    data = {"prompts": str(tmp_path / "prompts.txt"), "batch_size": 2, "cache": str(tmp_path / "cache")}
    own = {"data": data, "model": values["model"] | {"path": str(toy)}, "roles": values["roles"] | roles}
    run(config_of({**values, **own, "validation": {}}, "test"))
    (listed,) = map(json.loads, (tmp_path / "run" / "prompts_left_out.jsonl").read_text().splitlines())
    assert (listed["number"], listed["possible"]) == (2, 3)


def test_options_of_the_other_kind_of_data_are_refused(tmp_path: Path, toy: Path) -> None:
    (tmp_path / "p.txt").write_text("red\n")
    call = ["--model", str(toy), "--out", str(tmp_path / "o")]
    for extra, message in (
        (["--prompts", str(tmp_path / "p.txt"), "--fps", "3"], "--fps is an option of videos"),
        (["--prompts", str(tmp_path / "p.txt"), str(tmp_path)], "VIDEOS is an option of videos"),
        (["--prompts", str(tmp_path / "p.txt"), "--shard", "1/2", "--overwrite"], "delete what the others write"),
        ([str(tmp_path), "--strict"], "--strict is an option of --prompts"),
        ([], "give VIDEOS --model MODEL, or --prompts FILE --model MODEL"),
    ):
        with pytest.raises(UserError, match=message):
            preprocess([*call, *extra])


def test_prompts_end_at_every_kind_of_line_end_alone(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa\r\nb\u2028c\rd\n\n e\x85f \n".encode())
    assert list(read_prompts(str(file))) == ["a", "b\u2028c", "d", "e\x85f"]
