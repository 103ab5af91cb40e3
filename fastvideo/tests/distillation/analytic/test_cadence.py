"""``critic_updates_on_student_steps``: which roles a cycle updates, how often, and exact resumption in every phase."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.registry import METHODS, load_method, run_schema
from fastvideo.distillation.types import UserError
from fastvideo.tests.distillation import toys
from fastvideo.tests.distillation.resuming import STEPS, differences, toy_run
from fastvideo.tests.distillation.toys import SpyAdapter, analytic_batch, toy_method

FIELD = "critic_updates_on_student_steps"
SHARED = [name for name in METHODS if FIELD in load_method(name).Config.model_fields and name != "rcm"]
"""Methods with DMD2's schedule; rCM's critic rests on student steps always."""


def values(name: str, **options: Any) -> dict[str, Any]:
    named = {"distill_model": "analytic", "distill_method": name}
    return {**named, "output": "x", "model": {}, "roles": {}, "method": options}


def test_every_method_that_is_built_on_dmd2_has_the_schedule() -> None:
    assert set(SHARED) == {
        *("dmd2", "dmd2_gan", "dmd2_frames", "f_distill", "phased_dmd"),
        *("anyflow", "causvid", "self_forcing", "streaming_tuning"),
    }


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("together", [True, False])
def test_a_cycle_updates_every_role_as_often_as_its_config_says(name: str, together: bool, adapter: SpyAdapter) -> None:
    method = toy_method(name, adapter, generator_update_interval=3, **{FIELD: together})
    batch, updates = analytic_batch(adapter, 4), Counter[str]()
    for step in range(6):
        roles = dict.fromkeys(loss.role for loss in method.losses(batch, step))
        assert tuple(roles) == method.active_roles(step)
        updates.update(list(roles))
    others = {role: 6 if together else 4 for role in method.trainable_roles if role != "student"}
    assert updates == {"student": 2, **others}


def test_a_student_step_without_critic_updates_trains_the_student_alone(adapter: SpyAdapter) -> None:
    method = toy_method("dmd2", adapter, **{FIELD: False})
    (loss,) = method.losses(analytic_batch(adapter, 4), 0)
    assert loss.role == "student"
    assert adapter.grad_modes(method.bundle["critic"]) == "n", "it scores, and nothing else"


def test_the_other_roles_draw_what_they_drew(adapter: SpyAdapter) -> None:
    """Until the first skipped update both cadences are one run: the student's first loss is equal to the bit."""
    first = [
        next(toy_method("dmd2", adapter, mean=-0.5, **{FIELD: together}).losses(analytic_batch(adapter, 4), 0)).value
        for together in (True, False)
    ]
    assert torch.equal(*first)


@pytest.mark.parametrize("name", ["dmd2", "dmd2_gan"])
def test_a_run_goes_on_exactly_from_every_phase_of_a_cycle(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = toys.TOYS[name]
    config = {**toy.config, "generator_update_interval": 3, FIELD: False}
    monkeypatch.setitem(toys.TOYS, name, toys.Toy(config, student=toy.student))
    undisturbed = toy_run(name, tmp_path / "undisturbed").train()
    saved = toy_run(name, tmp_path / "saved", every=1, keep=STEPS).train()
    expected = undisturbed.state()
    for step in range(1, STEPS):
        again = toy_run(name, tmp_path / f"from-{step}").restore(step, saved.folder).train()
        assert differences(expected, again.state()) == [], f"resumed at step {step}"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dmd2", {"generator_update_interval": 1, FIELD: False}, "never trains the critic"),
        ("anyflow", {FIELD: False}, "never trains the critic"),
        ("rcm", {"generator_update_interval": 1}, "never trains the critic"),
        ("dmd2", {"score_and_train": True, FIELD: False}, "score_and_train is one forward for both losses"),
        ("rcm", {FIELD: True}, f"method.{FIELD}: must be false for this method: its critic rests"),
    ],
)
def test_a_cadence_that_cannot_be_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(run_schema("analytic", name), values(name, **options), "test")


REFUSED = ["rcm", "anyflow", "causvid", "self_forcing", "streaming_tuning", "phased_dmd"]


@pytest.mark.parametrize("name", REFUSED)
def test_shares_of_the_ladder_are_refused_where_rollouts_do_not_end_on_it(name: str) -> None:
    with pytest.raises(UserError, match=r"method\.rung_shares: must be empty for this method: .*"):
        validate(run_schema("analytic", name), values(name, rung_shares=[1, 0, 0, 0]), "test")
