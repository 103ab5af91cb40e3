"""One student step and one critic step of each CUDA recipe on fake CUDA tensors, and their bytes against the plan's."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvideo.tests.fake_cuda import NoGuard, build_guard, guard_file, take_steps, validate

pytestmark = pytest.mark.slow
CASES = {
    "full, eight shards": ("wan2.1_t2v_1.3b_dmd2", 8, ()),
    "full, eight copies": ("wan2.1_t2v_1.3b_dmd2", 8, ("--parallel.shard", "1")),
    "adapters": ("wan2.1_t2v_1.3b_dmd2_lora", 1, ()),
    "two experts, adapters, eight shards": ("wan2.2_t2v_a14b_dmd2_lora", 8, ()),
    "14B, shards and context": ("wan2.1_t2v_14b_dmd2", 64, ()),
}


@pytest.fixture(autouse=True, scope="module")
def device() -> None:
    try:
        build_guard()
    except NoGuard as reason:
        pytest.skip(f"no fake CUDA device: {reason}")


@pytest.mark.parametrize("name", CASES)
def test_a_student_and_a_critic_step_run_in_bfloat16_and_hold_what_the_plan_says(name: str) -> None:
    recipe, world, flags = CASES[name]
    found = take_steps(recipe, *flags, world=world)
    assert found["attention"].keys() == {"bfloat16"}
    assert 0.9 <= found["plan"] / found["live"] <= 1.1, found


def test_a_validation_of_eight_prompts_holds_no_more_than_decoding_one_video() -> None:
    found = validate("wan2.1_t2v_1.3b_dmd2", prompts=8, frames=5)
    assert found["peak"] <= 1.01 * found["decode"], found


def test_two_environments_share_no_guard() -> None:
    here, there = (guard_file("2.13.0", Path(folder)) for folder in ("/one/site-packages/torch", "/two/torch"))
    assert here != there
    assert here.parent == there.parent
