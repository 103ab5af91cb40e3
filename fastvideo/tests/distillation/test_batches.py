"""Conditions of several families in one batch."""

from __future__ import annotations

import pytest
import torch

from fastvideo.distillation.adapters.analytic import AnalyticAdapter, AnalyticConditioner, AnalyticConfig
from fastvideo.distillation.batches import BatchPreparer
from fastvideo.distillation.caption_dropout import without_captions
from fastvideo.distillation.types import Batch, Condition, RawBatch


class Doubled(AnalyticConditioner):
    """Another text encoder: the number, twice."""

    key = "doubled"

    def encode_prompts(self, prompts: object) -> Condition:
        shifts = super().encode_prompts(prompts).of(self.key)["shift"]  # type: ignore[arg-type]
        return Condition({self.key: {"shift": 2 * shifts}})


@pytest.fixture
def conditioners() -> list[AnalyticConditioner]:
    found: list[AnalyticConditioner] = [AnalyticConditioner(torch.device("cpu")), Doubled(torch.device("cpu"))]
    for each in found:
        each.ensure_negative_conditioning()
    return found


def test_a_batch_holds_the_text_of_every_family(conditioners: list[AnalyticConditioner]) -> None:
    adapter = AnalyticAdapter(AnalyticConfig())
    batch = BatchPreparer(adapter.codec, conditioners)(RawBatch(("1", "3")))
    assert batch.condition.of("analytic")["shift"].tolist() == [1.0, 3.0]
    assert batch.condition.of("doubled")["shift"].tolist() == [2.0, 6.0]
    assert {key: batch.negative.of(key)["shift"].tolist() for key in batch.negative.tensors} == {
        "analytic": [0.0, 0.0],
        "doubled": [0.0, 0.0],
    }
    assert batch.x0 is None
    assert batch.shape == (2, *adapter.codec.latent_shape)


def test_rows_and_drops_act_on_every_family(conditioners: list[AnalyticConditioner]) -> None:
    text, null = (
        conditioners[0].encode_prompts(prompts) | conditioners[1].encode_prompts(prompts)
        for prompts in (("1", "3"), ("", ""))
    )
    mixed = without_captions(Batch((2, 1, 1, 1, 1), text, null), torch.tensor([False, True]))
    assert [mixed.of(key)["shift"].tolist() for key in ("analytic", "doubled")] == [[0.0, 3.0], [0.0, 6.0]]
    assert [text.rows(slice(1, 2)).of(key)["shift"].tolist() for key in ("analytic", "doubled")] == [[3.0], [6.0]]


def test_a_condition_of_another_family_is_named() -> None:
    with pytest.raises(RuntimeError, match="no tensors of 'doubled', but of analytic"):
        AnalyticConditioner(torch.device("cpu")).encode_prompts(["1"]).of("doubled")
