"""Texts of a run: stored ones, or else all encoded before the first step and the text encoder freed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from hashlib import sha256
from pathlib import Path

from fastvideo.data.order import MemorySource, SampleStream
from fastvideo.data.prompts import read_prompts, too_long
from fastvideo.data.stored import StoredSource
from fastvideo.data.stored_texts import hold_sampling_texts
from fastvideo.data.texts import refuse_long
from fastvideo.distillation.abilities import of_texts
from fastvideo.distillation.adapters.base import Conditioner
from fastvideo.distillation.batches import text_name
from fastvideo.distillation.builder import Adapter, Config
from fastvideo.errors import UserError
from fastvideo.files import gib, make_folder, replace_file, replacing
from fastvideo.inference.progress import PatientBar
from fastvideo.wording import counted

LEFT_OUT = "prompts_left_out.jsonl"
"""File in a run's folder with the prompts that are too long."""


def conditioners_of(families: Iterable[Adapter]) -> list[Conditioner]:
    """One conditioner per key, in order."""
    return list({family.conditioner.key: family.conditioner for family in families}.values())


def take_stored_texts(config: Config, conditioners: Sequence[Conditioner]) -> None:
    """Hold negative and validation prompts that lie beside the data, before anything encodes them.

    Raises:
        UserError: for a prompt that is not there, if the model's folder has no text encoder.
    """
    if config.data.prompts is None:
        hold_sampling_texts(config.data.path, conditioners)
    for conditioner in conditioners:
        wanted = [conditioner.negative_prompt, *config.validation.prompts]
        texts = of_texts(conditioner)
        missing = texts.missing_texts(wanted)
        if missing and texts.text_settings.get("encoder_weights", "") is None:
            raise UserError(
                f"the model's folder has no text encoder, and {config.data.path} holds no text of {missing[0]!r}: "
                f"encode it where the encoder is, with fastvideo preprocess --prompts FILE --out FOLDER and "
                f"--negative-prompt TEXT or --validation-prompts FILE"
            )


def encode_ahead(config: Config, conditioners: Sequence[Conditioner], data: SampleStream, step: int) -> list[str]:
    """Encode what this process needs from ``step`` on, and free the text encoders; returns notes for the log.

    An encoder stays only if its texts do not fit into the cache.

    Raises:
        UserError: for captions that are not there, where a second family must encode them.
    """
    notes = []
    batches = (config.trainer.max_steps - step) * config.trainer.grad_accumulation
    for number, conditioner in enumerate(conditioners):
        texts = of_texts(conditioner)
        captions = _captions(data, batches, number, conditioner)
        if number and "text_embedding" in _stored(data):
            _check_captions(config, captions)
        missing = texts.missing_texts(captions)
        if not texts.texts_fit(missing):
            notes.append(_stays(config, conditioner, len(missing)))
            continue
        with PatientBar("encoding prompts", len(missing)) as bar:
            for prompt in missing:
                texts.keep_texts([prompt])
                bar(1)
        texts.release_encoder()
    return notes


def _captions(data: SampleStream, batches: int, number: int, conditioner: Conditioner) -> Sequence[str]:
    """Captions that a conditioner encodes in training; none where the data holds its texts."""
    name, source = "text_embedding" if number == 0 else text_name(conditioner), data.source
    if name in _stored(data):
        return ()
    if isinstance(source, MemorySource):
        rows = range(len(source.captions)) if batches >= data.rounds else data.rows_ahead(batches)
        return [captions[row] for captions in (source.captions, source.switches) if captions for row in rows]
    return source.captions() if isinstance(source, StoredSource) else ()


def _stored(data: SampleStream) -> Collection[str]:
    """Names in a raw batch of the texts that the data hold."""
    source = data.source
    if isinstance(source, MemorySource):
        return source.extras
    return source.texts if isinstance(source, StoredSource) else ()


def _check_captions(config: Config, captions: Sequence[str]) -> None:
    """Refuse captions that are empty because a text embedding, of the student's family, stands for them."""
    if empty := sum(not caption for caption in captions):
        raise UserError(
            f"data.path: {empty} of {counted(len(captions), 'caption')} of {config.data.path} are empty, and a second "
            f"model family must encode them (the text embeddings there are the student's): preprocess again with them"
        )


def _stays(config: Config, conditioner: Conditioner, count: int) -> str:
    prompts = f"--prompts {config.data.prompts} " if config.data.prompts else "--prompts FILE "
    size = gib(of_texts(conditioner).encoder_bytes)
    return (
        f"the text encoder stays in memory ({size}): the texts of {counted(count, 'prompt')} "
        f"do not fit into model.prompt_cache_mib. Encode them once: fastvideo preprocess {prompts}--model "
        f"{config.model.path} --out FOLDER, and train with data.path: FOLDER"
    )


def usable_prompts(
    config: Config, conditioners: Sequence[Conditioner], prompts: Sequence[str]
) -> tuple[Sequence[str], str]:
    """The prompts that every text encoder takes whole, and a note on those that one does not.

    The check of a file is kept in ``data.cache``, for the other processes and for later runs.

    Raises:
        UserError: if ``data.long_prompts`` is ``raise`` and there is one, or if nothing is left.
    """
    found = {conditioner: _checked_once(Path(config.data.cache), conditioner, prompts) for conditioner in conditioners}
    left_out = {place for long in found.values() for place in long}
    if not left_out:
        return prompts, ""
    for conditioner, long in found.items():
        if config.data.long_prompts == "raise" or len(long) == len(prompts):
            refuse_long(long, conditioner, prompts)
    note = (
        f" ({len(left_out)} left out, with more tokens than the text encoder takes: listed in "
        f"{Path(config.output) / LEFT_OUT})"
    )
    return [prompt for place, prompt in enumerate(prompts) if place not in left_out], note


def _checked_once(cache: Path, conditioner: Conditioner, prompts: Sequence[str]) -> dict[int, int]:
    """:func:`too_long`, or what an earlier call found for the same prompts and tokenizer."""
    settings = [
        of_texts(conditioner).text_settings.get("tokenizer"),
        conditioner.text_length,
        type(conditioner).__name__,
    ]
    digest = sha256(json.dumps(settings).encode())
    for prompt in prompts:
        digest.update(prompt.encode() + b"\n")
    stamp = cache / f"prompts-{digest.hexdigest()[:16]}.json"
    if stamp.is_file():
        return {int(place): count for place, count in json.loads(stamp.read_text(encoding="utf-8")).items()}
    found = too_long(conditioner, prompts)
    make_folder(cache)
    with replacing(stamp) as temporary:  # several machines may check at once
        temporary.write_text(json.dumps(found), encoding="utf-8")
    return found


def list_left_out(config: Config, conditioners: Sequence[Conditioner]) -> None:
    """Write the prompts of ``data.prompts`` that are too long into the run's folder, if there are any."""
    if config.data.prompts is None:
        return
    prompts = read_prompts(config.data.prompts)
    lines = [
        {"number": place + 1, "tokens": count, "possible": conditioner.text_length, "prompt": prompts[place]}
        for conditioner in conditioners
        for place, count in sorted(_checked_once(Path(config.data.cache), conditioner, prompts).items())
    ]
    if lines:
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        replace_file(Path(config.output) / LEFT_OUT, content)
