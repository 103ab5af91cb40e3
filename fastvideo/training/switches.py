"""Second prompts of a run's samples: what a stream of ``streaming_tuning`` switches to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastvideo.data.order import MemorySource, Source
from fastvideo.data.prompts import read_prompts, too_long
from fastvideo.data.texts import refuse_long
from fastvideo.distillation.adapters.base import Conditioner
from fastvideo.distillation.builder import Config
from fastvideo.distillation.config.causal import uses_switches
from fastvideo.errors import UserError
from fastvideo.tiny.world import WORLDS, switched_captions


def check_switches(config: Config) -> None:
    """Check, before a network is loaded, that there are prompts to switch to where the method switches.

    Raises:
        UserError: if there are none, or another number than of first prompts, or if the method does not switch.
    """
    file, first = config.data.switch_prompts, config.data.prompts
    if not uses_switches(config.method):
        if file is not None:
            raise UserError(
                f"data.switch_prompts: {config.distill_method} (as configured) switches no prompts; streaming_tuning "
                f"with method.switch_frames does"
            )
        return
    if first is None and config.data.path in WORLDS and file is None:
        return
    if first is None or file is None:
        raise UserError(
            "method.switch_frames: a stream switches from a prompt of data.prompts to the one in the same line of "
            "data.switch_prompts; give both files, or method.switch_frames: [] for streams without switches"
        )
    counts = len(read_prompts(first)), len(read_prompts(file))
    if counts[0] != counts[1]:
        raise UserError(
            f"data.switch_prompts: {file!r} has {counts[1]} prompts, and data.prompts {first!r} has {counts[0]}: each "
            f"line of one goes with a line of the other"
        )


def with_switches(config: Config, source: Source, conditioners: Sequence[Conditioner]) -> Source:
    """The samples with their second prompts, if the method switches.

    Raises:
        UserError: for a second prompt with more tokens than a text encoder takes.
    """
    if not uses_switches(config.method):
        return source
    assert isinstance(source, MemorySource)
    if config.data.switch_prompts is None:
        return replace(source, switches=switched_captions(source.captions, config.seed))
    second = read_prompts(config.data.switch_prompts)
    for conditioner in conditioners:
        if long := too_long(conditioner, second):
            refuse_long(long, conditioner, second)
    kept = set(source.captions)  # some may have been left out as too long
    pairs = zip(read_prompts(str(config.data.prompts)), second, strict=True)
    return replace(source, switches=[switch for prompt, switch in pairs if prompt in kept])
