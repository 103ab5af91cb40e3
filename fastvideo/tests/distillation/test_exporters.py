"""``load_exporter``: the exporter of a family, by the diffusers pipelines that it reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastvideo.distillation.adapters.analytic import AnalyticConfig
from fastvideo.distillation.adapters.export.cogvideox import CogVideoXExporter
from fastvideo.distillation.adapters.export.wan import WanExporter
from fastvideo.distillation.config.sections import AdapterConfig
from fastvideo.distillation.registry import EXPORTERS, families, load_adapter, load_exporter
from fastvideo.distillation.types import UserError


class ImageConfig(AdapterConfig):
    """A family that reads two pipelines, of which the second has an exporter."""

    pipelines = ("SomeImagePipeline", "WanPipeline")


def test_exporters_by_pipeline() -> None:
    assert type(load_exporter(load_adapter("wan").Config())) is WanExporter
    assert type(load_exporter(load_adapter("cogvideox").Config(path="tiny_cogvideox"))) is CogVideoXExporter
    assert type(load_exporter(ImageConfig())) is WanExporter
    assert set(EXPORTERS) <= set(families())


def test_family_without_pipeline() -> None:
    """Its exporter refuses, with the name of the family's config."""
    exporter = load_exporter(AnalyticConfig())
    with pytest.raises(UserError, match="AnalyticConfig: the family has no diffusers pipeline"):
        exporter.stock_sampler((1.0, 0.5), "euler")


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        ("blocks.7.attn2.to_out.0", "blocks.7.cross_attn.o"),
        ("proj_out", "head.head"),
        ("blocks.7.scale_shift_table", "blocks.7.modulation"),
        ("blocks.7.norm2.bias", "blocks.7.norm3.bias"),
    ],
)
def test_original_names_of_wan(layer: str, name: str) -> None:
    assert load_exporter(load_adapter("wan").Config()).original_name(layer) == name
    with pytest.raises(UserError, match=r"blocks\.7\.norm: the authors' code of Wan has no such layer"):
        load_exporter(load_adapter("wan").Config()).original_name("blocks.7.norm")


def test_the_page_says_which_layouts_of_lora_files_a_family_writes() -> None:
    text = (Path(__file__).parents[3] / "docs" / "weights.md").read_text()
    table = text.partition("| family | read | written")[2].partition("\n\n")[0]
    said: dict[str, tuple[str, ...]] = {}
    for row in table.splitlines()[2:]:
        names, _, written = row.strip("|").split("|")
        said |= dict.fromkeys(re.findall("`(.+?)`", names), tuple(re.findall("`(.+?)`", written)))
    names = set(families().values())
    assert said == {name: load_exporter(load_adapter(name).Config(path=f"tiny_{name}")).lora_layouts for name in names}
