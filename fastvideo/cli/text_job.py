"""The families and prompts that ``fastvideo preprocess --prompts`` encodes, from its flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastvideo.data.model import SIZES, ModelChoice, choose_model
from fastvideo.data.prompts import read_prompts
from fastvideo.data.texts import TextJob
from fastvideo.distillation.config.reading import family_of, read_config
from fastvideo.errors import UserError

if TYPE_CHECKING:
    from fastvideo.cli.preprocess import PreprocessArguments


def make_text_job(arguments: PreprocessArguments) -> TextJob:
    """The job of ``--prompts`` with ``--model``, or with ``--config``.

    Raises:
        UserError: if the model, the config or a file cannot be read, or both or none of them are given.
    """
    if (arguments.model is None) == (arguments.config is None):
        raise UserError("--prompts: give --model MODEL, or --config FILE for all families of a run")
    config = None if arguments.config is None else read_config(arguments.config)
    choices = _of_model(arguments) if config is None else _of_config(arguments, config)
    prompts = arguments.prompts or (config and config.data.prompts)
    if not prompts:
        raise UserError(f"--prompts: give a text file, one prompt per line; {arguments.config} has no data.prompts")
    validation = [*(config.validation.prompts if config else ())]
    if arguments.validation_prompts is not None:
        validation += read_prompts(arguments.validation_prompts)
    return TextJob(
        out=arguments.out,
        per_file=arguments.prompts_per_file,
        device=arguments.device,
        choices=choices,
        prompts=read_prompts(prompts),
        validation=validation,
        batch_size=arguments.batch_size,
    )


def _of_model(arguments: PreprocessArguments) -> Sequence[ModelChoice]:
    choice = choose_model(str(arguments.model), {name: getattr(arguments, name) for name in SIZES})
    if arguments.negative_prompt is None:
        return [choice]
    return [replace(choice, fields={**choice.fields, "prompt_for_negative": arguments.negative_prompt})]


def _of_config(arguments: PreprocessArguments, config: Any) -> Sequence[ModelChoice]:
    """The families of a run, the student's first, each once."""
    given = [name for name in (*SIZES, "negative_prompt") if getattr(arguments, name) is not None]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')}: the config says it, for each of its families")
    sections = [(config.distill_model, config.model), *(family_of(config, role) for role in config.roles)]
    distinct = {(name, options.model_dump_json()): options for name, options in sections}
    return [ModelChoice(name, _uncached(options.model_dump())) for (name, _), options in distinct.items()]


def _uncached(fields: dict[str, Any]) -> dict[str, Any]:
    """Every prompt is encoded once."""
    return {**fields, "prompt_cache_mib": 0} if "prompt_cache_mib" in fields else fields
