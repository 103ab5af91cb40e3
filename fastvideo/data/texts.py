"""``fastvideo preprocess --prompts``: texts to Parquet, so that no text encoder is needed while training.

A row is one prompt with its text for every family of the run, cut to its tokens, in bfloat16. Beside the rows lie the
texts that sampling needs: negative and validation prompts. The prompts of a file go through the encoder in batches that
depend on the file alone, so that any number of processes and interruptions gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from torch import Tensor

from fastvideo.data.model import ModelChoice
from fastvideo.data.output import SKIPPED, shard_path, write_missing
from fastvideo.data.prompts import too_long
from fastvideo.data.schema import METADATA_KEY, bfloat16_columns, text_column, text_schema
from fastvideo.data.shards import GROUP_BYTES, Row, whole_file
from fastvideo.data.stored_texts import write_sampling_texts
from fastvideo.data.workers import FileJob, WriteFile, start_server
from fastvideo.distillation.abilities import of_texts
from fastvideo.distillation.adapters.base import Conditioner
from fastvideo.distillation.types import UserError
from fastvideo.shares import ALONE, Share
from fastvideo.wording import counted

FORMAT = 1
"""Increase it when the same settings give other rows."""
STEM, DTYPE = "prompts", "bfloat16"


@dataclass(frozen=True)
class TextJob(FileJob):
    """Encode prompts for the families of a run.

    Attributes:
        choices: the families, whose texts become the columns in this order.
        prompts: one row each.
        validation: prompts that only sampling needs, beside each family's negative one.
        batch_size: prompts that go through an encoder together.
    """

    choices: Sequence[ModelChoice]
    prompts: Sequence[str]
    validation: Sequence[str]
    batch_size: int

    def __len__(self) -> int:
        return len(self.prompts)

    def conditioners(self, device: str) -> list[Conditioner]:
        """The conditioner of each family; encoders are loaded on first use."""
        return [choice.adapter(device).conditioner for choice in self.choices]

    def for_sampling(self, conditioner: Conditioner) -> list[str]:
        """Prompts whose texts lie beside the rows."""
        return list(dict.fromkeys([conditioner.negative_prompt, *self.validation]))

    def settings(self) -> dict[str, Any]:
        """Everything that the texts depend on besides their prompts.

        Raises:
            UserError: for a family whose texts cannot be stored.
        """
        texts, sampling = {}, {}
        for number, (choice, conditioner) in enumerate(zip(self.choices, self.conditioners("cpu"), strict=True)):
            if not (found := of_texts(conditioner).text_settings):
                raise UserError(f"--prompts: the family {choice.family} has no text encoder whose texts can be stored")
            texts[text_column(number)] = {**found, "dtype": DTYPE, "model": choice.fields["path"]}
            sampling[text_column(number)] = self.for_sampling(conditioner)
        options = {"prompts_per_file": self.per_file, "batch_size": self.batch_size}
        return {"format": FORMAT, "texts": texts, "sampling": sampling, **options}

    def writer(self, device: str) -> WriteFile:
        return TextWriter(self, self.conditioners(device), self.settings())


@dataclass(frozen=True)
class TextWriter:
    """Writes output files; ``made`` is their metadata."""

    job: TextJob
    conditioners: Sequence[Conditioner]
    made: Mapping[str, Any]

    def __call__(self, number: int, done: Callable[[int], None]) -> None:
        """Write one file, whole or not at all; calls ``done`` with the number of finished prompts."""
        if number == 0:  # first, so that a folder whose first file is there has them
            self._write_sampling_texts()
        prompts = [self.job.prompts[row] for row in self.job.part(number)]
        long = _reasons(self.conditioners, prompts)
        rows = [row for row in range(len(prompts)) if row not in long]
        texts = [self._encoded(each, [prompts[row] for row in rows], done) for each in self.conditioners]
        first, schema = self.job.part(number).start, text_schema(len(texts))
        with whole_file(shard_path(self.job.out, number, STEM), schema) as file:
            found = (_row(first + row, prompts[row], own) for row, *own in zip(rows, *texts, strict=True))
            for group in _groups(found):
                file.write_table(pa.Table.from_pylist(group, schema=schema))
            skipped = [
                {"number": first + row + 1, "prompt": prompts[row], "reason": why} for row, why in sorted(long.items())
            ]
            file.add_key_value_metadata({METADATA_KEY.decode(): json.dumps({**self.made, "skipped": skipped})})
        done(len(prompts))

    def _write_sampling_texts(self) -> None:
        prompts = [self.job.for_sampling(each) for each in self.conditioners]
        texts = [
            self._encoded(each, own, lambda done: None) for each, own in zip(self.conditioners, prompts, strict=True)
        ]
        write_sampling_texts(self.job.out, self.made["texts"], prompts, texts)

    def _encoded(self, conditioner: Conditioner, prompts: Sequence[str], done: Callable[[int], None]) -> list[Tensor]:
        """Text ``[L, D]`` of each prompt in bfloat16; those of about the same length share a batch."""
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        found: dict[int, Tensor] = {}
        before = self.conditioners.index(conditioner) / len(self.conditioners)
        for start in range(0, len(order), self.job.batch_size):
            rows = order[start : start + self.job.batch_size]
            texts = of_texts(conditioner).encode_texts([prompts[row] for row in rows])
            found |= {row: text.bfloat16() for row, text in zip(rows, texts, strict=True)}
            done(int(len(prompts) * before + len(found) / len(self.conditioners)))
        return [found[row] for row in range(len(prompts))]


def _reasons(conditioners: Sequence[Conditioner], prompts: Sequence[str]) -> dict[int, str]:
    """Reasons for which prompts are left out, by row."""
    return {
        row: f"{count} tokens, the text encoder takes {each.text_length} (max_sequence_length)"
        for each in conditioners
        for row, count in too_long(each, prompts).items()
    }


def _row(number: int, prompt: str, texts: Sequence[Tensor]) -> Row:
    row: Row = {"id": f"{number:08d}", "caption": prompt}
    for place, text in enumerate(texts):
        row |= bfloat16_columns(text_column(place), text)
    return row


def _groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Rows in groups of about :data:`GROUP_BYTES`, which a reader opens at once."""
    group: list[Row] = []
    size = 0
    for row in rows:
        group.append(row)
        size += sum(len(value) for value in row.values() if isinstance(value, bytes))
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    yield group


def preprocess_texts(
    job: TextJob, *, workers: int, overwrite: bool = False, strict: bool = False, share: Share = ALONE
) -> str:
    """Write the missing files; returns a line for the terminal.

    Args:
        job: the prompts.
        workers: processes on this machine.
        overwrite: delete the results of an earlier call.
        strict: refuse prompts that are too long, instead of leaving them out.
        share: the files of this machine, if several write into the folder; the last one to finish completes it.

    Raises:
        UserError: for a mistake in the call; nothing is written then.
        RunError: if a process dies; the same call then continues.
    """
    if workers > 1:
        start_server(__name__)
    settings = job.settings()
    for conditioner in job.conditioners("cpu"):
        conditioner.check_prompts(job.for_sampling(conditioner))
        if strict:
            refuse_long(too_long(conditioner, job.prompts), conditioner, job.prompts)
    sources = hashlib.sha256("\n".join(job.prompts).encode()).hexdigest()
    manifest = {"settings": settings, "sources": sources, "videos": len(job), "files": job.files}
    found = write_missing(job, manifest, workers=workers, overwrite=overwrite, share=share, stem=STEM)
    left_out = counted(len(found.skipped), "prompt")
    bad = f"; {left_out} too long and left out, see {job.out / SKIPPED}" if found.skipped else ""
    return f"{job.out}: texts of {counted(found.rows, 'prompt')}, {found.rate(STEM)}{bad}{found.others}"


def refuse_long(long: Mapping[int, int], conditioner: Conditioner, prompts: Sequence[str]) -> None:
    """Raise for prompts that an encoder cannot take whole.

    Raises:
        UserError: with their number and the first of them.
    """
    if long:
        row = min(long)
        raise UserError(
            f"{len(long)} of {counted(len(prompts), 'prompt')} have more tokens than the text encoder takes, "
            f"{conditioner.text_length} (max_sequence_length); the first is number {row + 1} with {long[row]}: "
            f"{prompts[row][:80]!r}"
        )
