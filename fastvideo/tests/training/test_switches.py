"""Second prompts of a run's samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastvideo.data.order import MemorySource, SampleStream, Shard
from fastvideo.distillation.adapters.analytic import AnalyticAdapter, AnalyticConfig
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.registry import run_schema
from fastvideo.distillation.types import UserError
from fastvideo.tests.preparing import preparer
from fastvideo.tiny.captions import parse_caption
from fastvideo.tiny.world import switched_captions, torus
from fastvideo.training.switches import check_switches, with_switches
from fastvideo.training.texts import encode_ahead


def config(method: str = "streaming_tuning", options: dict[str, Any] | None = None, **data: Any) -> Any:
    values = {"distill_model": "analytic", "distill_method": method, "output": "x", "model": {}, "roles": {}}
    own = {"switch_frames": [2]} if options is None else options
    return validate(run_schema("analytic", method), values | {"method": own, "data": data}, "test")


def files(folder: Path, first: str, second: str) -> dict[str, str]:
    paths = {"prompts": folder / "first.txt", "switch_prompts": folder / "second.txt"}
    for path, text in zip(paths.values(), (first, second), strict=True):
        path.write_text(text)
    return {name: str(path) for name, path in paths.items()}


def test_captions_of_the_tiny_worlds_switch_one_attribute_that_they_name() -> None:
    captions = torus("train").sample_captions(400, 0)
    switched = switched_captions(captions, 0)
    assert switched == switched_captions(captions, 0) != switched_captions(captions, 1)
    changed: dict[str, int] = {}
    for before, after in zip(captions, switched, strict=True):
        old, new = (vars(parse_caption(caption)) for caption in (before, after))
        differs = [name for name in old if old[name] != new[name]]
        assert len(differs) == 1
        named = [name for name in old if old[name] is not None]
        assert differs[0] in (named or ["direction"])
        changed[differs[0]] = changed.get(differs[0], 0) + 1
    assert min(changed.values()) > 60


def test_second_prompts_come_with_their_samples(tmp_path: Path) -> None:
    made = config(**files(tmp_path, "1\n2\n3\n", "-1\n-2\n-3\n"))
    check_switches(made)
    family = AnalyticAdapter(AnalyticConfig())
    family.ensure_negative_conditioning()
    source = with_switches(made, MemorySource(["1", "3"]), [family.conditioner])
    stream = SampleStream(source, 0, Shard(2))
    raw = next(stream)
    assert raw.switches == tuple(f"-{caption}" for caption in raw.captions)
    batch = preparer(family)(raw)
    assert batch.switch is not None
    assert batch.switch.of("analytic")["shift"].tolist() == [-float(caption) for caption in raw.captions]
    assert encode_ahead(made, [family.conditioner], stream, 0) == []


def test_the_tiny_world_needs_no_file_and_other_methods_no_switches() -> None:
    tiny = config(path="tiny")
    check_switches(tiny)
    source = with_switches(tiny, MemorySource(["a red seven"]), [])
    assert isinstance(source, MemorySource)
    assert source.switches[0] != "a red seven"
    plain = config("dmd2", {}, path="tiny")
    check_switches(plain)
    assert with_switches(plain, source, []) is source


@pytest.mark.parametrize(
    ("first", "second", "method", "message"),
    [
        ("1\n2\n", "-1\n", {"switch_frames": [2]}, "has 1 prompts, and data.prompts .* has 2"),
        ("1\n", "-1\n", {}, "streaming_tuning .* switches no prompts"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, first: str, second: str, method: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_switches(config(options=method, **files(tmp_path, first, second)))


def test_a_switch_without_its_prompts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give both files"):
        check_switches(config(path=str(tmp_path)))
    first = files(tmp_path, "1\n", "-1\n")["prompts"]
    with pytest.raises(UserError, match=r"give both files"):
        check_switches(config(prompts=first))
