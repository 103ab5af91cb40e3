"""A plan: exact where it can be, simulated where it must be, and checked against a real step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fastvideo.cli import main
from fastvideo.cli.plan import read_bytes
from fastvideo.conformance.tiny import tiny_options
from fastvideo.distillation.builder import build_adapter, build_families
from fastvideo.distillation.config import reading
from fastvideo.distillation.config.parallel import ParallelConfig
from fastvideo.distillation.config.schema import DataConfig
from fastvideo.distillation.engine.optional.snapshots import disk_bytes
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.placement import EmptyPlacement
from fastvideo.distillation.methods.distribution_matching.dmd2 import DMD2Method
from fastvideo.distillation.types import UserError
from fastvideo.planning.advice import advise, changes
from fastvideo.planning.data import check_there
from fastvideo.planning.estimate import Plan, Planner, _gathers
from fastvideo.planning.fake import LiveBytes, fake_run, stacks
from fastvideo.planning.layout import device_bytes, frozen_parts, gathered_bytes, role_plans
from fastvideo.planning.published import ARCHITECTURES, config_folder, without_weights
from fastvideo.planning.rates import Rates, measured_rates
from fastvideo.planning.report import step_lines, time_line
from fastvideo.planning.simulate import Kind, StepCost, _peaks, _train, at_depth, simulate
from fastvideo.tests.preparing import preparer
from fastvideo.training.distillation import parse

TINY, LARGE = "examples/distillation/tiny_wan_dmd2.yaml", "examples/distillation/wan2.1_t2v_1.3b_dmd2.yaml"
PLAIN = "--method.no-critic-sees-rung"
"""Flag of TINY for networks that are all alike."""
OTHER = "examples/distillation/tiny_cogvideox_dmd2.yaml"
ADAPTERS = "examples/distillation/tiny_wan_dmd2_lora.yaml"
PARAMETERS = {
    "wan2.1-t2v-1.3b": 1_418_996_800,
    "wan2.1-t2v-14b": 14_288_491_584,
    "cogvideox-2b": 1_693_783_872,
    "cogvideox-5b": 5_570_283_072,
    "sdxl-base-1.0": 2_567_463_684,
    "kandinsky5-t2v-lite": 2_007_702_848,
    "ltx-2": 18_876_174_592,
    "flux2-dev": 32_223_281_152,
    "hunyuan-video-1.5-t2v": 8_326_608_160,
}


def config_of(path: str, *flags: str) -> Any:
    return without_weights(parse(["--config", path, *flags])[1])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_hub_id_needs_no_download(name: str) -> None:
    for hub_id in ARCHITECTURES[name]:
        assert Path(config_folder(hub_id)).name == name


def test_an_unknown_model_asks_for_its_architecture() -> None:
    with pytest.raises(UserError, match="--architecture"):
        config_folder("somebody/else")
    assert config_folder("somebody/else", "cogvideox-2b").endswith("cogvideox-2b")
    with pytest.raises(UserError, match="one of wan"):
        config_folder("somebody/else", "wan")


@pytest.mark.parametrize("shard", [1, 8])
def test_bytes_of_the_large_recipe_are_exact(shard: int) -> None:
    """Float32 weights, gradients and two moments for what is trained; what is frozen in bfloat16."""
    config = config_of(LARGE, "--parallel.shard", str(shard))
    roles = {role.name: role for role in role_plans(fake_run(config, Processes(shard=shard)))}
    count = PARAMETERS["wan2.1-t2v-1.3b"]
    student = roles["student"]
    assert student.parameters == count
    assert student.gradients == pytest.approx(4 * count / shard, rel=3e-3)
    assert student.weights >= student.gradients
    assert student.optimizer == 2 * student.gradients + 825 * 4  # a step counter for each tensor
    if shard == 1:
        assert student.gradients == 4 * count
        assert roles["teacher"].weights < 0.51 * 4 * count + 10_000_000
    assert roles["teacher"].gradients == roles["teacher"].optimizer == roles["critic"].average == 0


def test_roles_with_adapters_hold_their_network_once() -> None:
    """Rank 32 at four projections of both attentions, 30 blocks: 2 x 4 x 32 x (1536 + 1536) elements a block."""
    config = config_of("examples/distillation/wan2.1_t2v_1.3b_dmd2_lora.yaml", "--ema.no-enabled")
    roles = {role.name: role for role in role_plans(fake_run(config))}
    options = config.roles["student"].lora
    assert options is not None
    base = 2 * PARAMETERS["wan2.1-t2v-1.3b"]
    if options.rank == 32 and options.targets == ("to_q", "to_k", "to_v", "to_out.0"):
        assert roles["student"].gradients == roles["student"].weights == 4 * 30 * 2 * 4 * 32 * (1536 + 1536)
    held = sum(role.weights + role.gradients + role.optimizer for role in roles.values())
    assert base < held <= 1.5 * base


@pytest.mark.slow
def test_averages_to_choose_from_are_counted_in_memory_and_on_the_disk() -> None:
    """Two more copies of the student and a count of its updates; half of that in each of 17 pairs of files."""
    run = fake_run(config_of(TINY, "--ema.post-hoc.every", "4", "--validation.every", "0"))
    student = next(role for role in role_plans(run) if role.name == "student")
    assert student.average == 3 * student.gradients + 4
    assert disk_bytes(run.method.bundle["student"], run.config.ema.post_hoc) == 17 * 2 * student.gradients // 2


def test_a_plan_says_what_snapshots_take() -> None:
    config, step = config_of(TINY, "--ema.post-hoc.every", "8"), StepCost({}, 0.0, 0.0, {}, {})
    plan = Plan(config, 1, (), {}, 0, {"student": 0}, 0, 0, step, sent=0, snapshots=3 * 2**29)
    assert step_lines(plan, None)[-1] == "disk: at most 34 snapshots of the student's averages, 1.50 GiB in all"
    assert not any("disk" in line for line in step_lines(replace(plan, snapshots=0), None))


def test_a_critic_that_reads_two_times_is_counted_with_the_part_that_reads_the_second() -> None:
    student, _, critic = role_plans(fake_run(config_of(TINY)))
    assert (critic.name, critic.parameters - student.parameters) == ("critic", 17 * 192 + 193 * 192)


def test_second_family_is_counted() -> None:
    """Teacher and critic of another family bring their networks and text encoder, and the bridge both VAEs."""
    config = config_of(TINY, "--validation.every", "0", PLAIN)
    other = {"family": "cogvideox", "path": "tiny_cogvideox", "max_sequence_length": 8}
    scoring = {name: config.roles[name].model_copy(update={"model": other}) for name in ("teacher", "critic")}
    run = fake_run(config.model_copy(update={"roles": config.roles | scoring}))
    own, alone = fake_run(config), fake_run(config_of(OTHER, PLAIN))
    roles, counted = {role.name: role for role in role_plans(run)}, {role.name: role for role in role_plans(alone)}
    assert roles["student"] == role_plans(own)[0]
    assert (roles["teacher"], roles["critic"].weights) == (counted["teacher"], counted["critic"].weights)
    assert [run.bridged(role) for role in ("student", "teacher", "critic")] == [False, True, True]
    parts, theirs = frozen_parts(run), frozen_parts(alone)
    assert parts == {
        **{name: part for name, part in frozen_parts(own).items() if name != "VAE"},
        "VAE": parts["VAE"],
        **{f"{name} of teacher": part for name, part in theirs.items()},
    }
    assert "VAE" not in frozen_parts(own)


def test_live_bytes_are_those_of_tensors_that_live() -> None:
    x = torch.ones(100)
    with LiveBytes() as memory:
        y = x * 2
        assert memory.live == 400
        z = (y + 1).view(10, 10)
        assert memory.live == 800
        del y
        assert memory.live == 400
        z.mul_(2)
        del z
    assert (memory.live, memory.peak) == (0, 800)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_simulated_step_holds_what_a_real_one_holds(recompute: str) -> None:
    """Four blocks are run as they are; fake and real tensors agree to the byte on what operators make."""
    config = config_of(TINY, "--parallel.activation-checkpointing", recompute, "--data.batch-size", "2", PLAIN)
    planned = simulate(fake_run(config), split=False, leave=False)
    adapter = build_adapter(config)
    networks = {name: adapter.folder.load_network() for name in config.roles}
    from fastvideo.distillation.builder import build_method

    if recompute == "full":
        from fastvideo.distillation.engine.parallel.recompute import checkpointed

        for network in networks.values():
            assert adapter.scaling is not None
            adapter.scaling.recompute(network, checkpointed("full"))
    method = build_method(config, adapter, networks=networks)
    method.rng.shared_choice = lambda shares: len(shares) - 1  # type: ignore[method-assign]
    from fastvideo.distillation.types import RawBatch

    batch = preparer(adapter)(RawBatch(("a red three", "a green one")))
    with LiveBytes() as memory:
        _train(method, batch, 0)
    assert max(planned.peaks.values()) == pytest.approx(memory.peak, rel=0.02)
    assert planned.calls == pytest.approx({"student": 2.2, "teacher": 0.4, "critic": 1.0})
    assert sum(planned.backwards.values()) == pytest.approx(1.0)


class WarmedUp(DMD2Method):
    """DMD2 whose critic trains alone for the first half of 40 steps."""

    def active_roles(self, step: int) -> tuple[str, ...]:
        return ("critic",) if step < 20 else super().active_roles(step - 20)


@pytest.mark.slow
def test_a_role_that_trains_later_is_counted() -> None:
    """Its loss at its height, and calls and backward passes by their share of all steps."""
    plain, warm = (
        simulate(fake_run(config_of(TINY, "--trainer.max-steps", "40", *own)), split=False, leave=False)
        for own in ((), ("--distill-method", f"{__name__}:WarmedUp"))
    )
    assert warm.peaks == plain.peaks
    assert warm.backwards["student"] == pytest.approx(plain.backwards["student"] / 2)
    assert warm.calls["teacher"] == pytest.approx(plain.calls["teacher"] / 2)
    assert warm.flops < plain.flops


@pytest.mark.slow
def test_a_deep_network_goes_on_from_two_small_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    run = fake_run(config_of(TINY, "--data.batch-size", "2"))
    whole = simulate(run, split=True, leave=True)
    monkeypatch.setattr("fastvideo.planning.simulate.DEPTHS", (2, 3))
    shallow = simulate(run, split=True, leave=True)
    assert shallow.peaks == pytest.approx(whole.peaks, rel=0.01)
    assert shallow.flops == pytest.approx(whole.flops, rel=0.01)
    assert shallow.attention == pytest.approx(whole.attention, rel=0.01)
    assert 0 < whole.attention < 1


@pytest.mark.slow
def test_all_equal_lists_of_a_deep_unet_go_on_from_small_depths(tmp_path: Path) -> None:
    """Six blocks in each of the four places of the coarsest level: down, middle and twice up."""
    options = tiny_options("sdxl", tmp_path / "sdxl")
    file = Path(options["path"]) / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"transformer_layers_per_block": [1, 6]}))
    (tmp_path / "prompts.txt").write_text("a red seven\n" * 4)
    values = {
        "distill_model": "sdxl",
        "distill_method": "dmd2",
        "output": "unused",
        "model": options,
        "roles": {name: {"trainable": name != "teacher"} for name in ("student", "teacher", "critic")},
        "ladder": {"times": [0.936, 0.803, 0.617, 0.409]},
        "method": {},
        "data": {"prompts": str(tmp_path / "prompts.txt"), "batch_size": 2},
    }
    config = reading.config_of(values, "test")
    lists = stacks(fake_run(config).method.bundle["student"].network)
    assert [len(blocks) for blocks in lists] == [6] * 4
    kind = Kind(Processes(), split=True, leave=True)
    two, four, whole = (_peaks(config, kind, depth) for depth in (2, 4, None))
    assert whole == pytest.approx({role: at_depth(6, (2, 4), [two[role], four[role]]) for role in whole}, rel=1e-3)


def test_a_count_makes_no_adapters_on_the_host() -> None:
    """An adapter of rank 128 on a 14B model would take gigabytes, and minutes to draw."""
    config = config_of(ADAPTERS)
    families = build_families(config, build_adapter(config), Processes())
    (placement,) = families.placements.values()
    lora = config.roles["student"].lora
    assert lora is not None
    network = EmptyPlacement.of(placement).load_shared(None, {"student": lora}, seed=0)
    adapters = [p for name, p in network.named_parameters() if "lora_" in name]
    assert adapters
    assert all(p.is_meta and p.dtype == torch.float32 for p in adapters)
    real = placement.load_shared(None, {"student": lora}, seed=0)
    assert not any(p.is_meta for p in real.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["anyflow", "anyflow_pretrain", "mean_flow"])
def test_methods_that_draw_shares_or_differentiate_forwards_have_a_plan(method: str) -> None:
    plan = Planner().plan(config_of(f"examples/distillation/tiny_wan_{method}.yaml"), 1)
    assert plan.step.flops > 0
    assert plan.total >= plan.stays + plan.validation


@pytest.mark.slow
def test_a_plan_takes_the_highest_of_step_validation_and_encoding() -> None:
    plan = Planner().plan(config_of(TINY, "--data.batch-size", "1"), 1)
    assert plan.validation > 0
    for name in ("validation", "encoding"):
        more = replace(plan, **{name: plan.training + 1})
        assert more.total == plan.stays + plan.training + 1


def test_cuda_and_its_collectives_are_counted_on_cuda_alone() -> None:
    config = config_of(TINY)
    assert device_bytes(config, 8) == {}
    cuda = config.model_copy(update={"device": "cuda"})
    assert device_bytes(cuda, 1).keys() == {"CUDA context"}
    assert device_bytes(cuda, 8).keys() == {"CUDA context", "NCCL"}


def test_a_text_encoder_stays_only_for_prompts_that_do_not_fit(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red three\n" * 4)
    few = config_of(TINY, "--data.prompts", str(prompts))
    assert "text encoder" not in frozen_parts(fake_run(few))
    small = config_of(TINY, "--data.prompts", str(prompts), "--model.prompt-cache-mib", "0")
    assert "text encoder" in frozen_parts(fake_run(small))
    assert "text encoder" not in frozen_parts(fake_run(config_of(TINY, "--data.path", "data/stored")))


@pytest.mark.nightly
def test_more_processes_hold_less_and_send_more() -> None:
    planner = Planner()
    plans = [planner.plan(config_of(TINY, "--parallel.shard", str(n)), n) for n in (1, 2, 4)]
    assert plans[0].total > plans[1].total > plans[2].total
    assert plans[0].sent == 0
    assert 0 < plans[1].sent < plans[2].sent


def test_networks_that_stay_gathered_are_counted_whole_and_sent_once() -> None:
    bare = config_of(TINY, "--parallel.shard", "2", PLAIN)
    roles = role_plans(fake_run(bare, Processes(shard=2)))
    whole, teacher = roles[0].whole, next(role for role in roles if not role.trainable)
    held, gathers = {}, {}
    for kept in ("none", "frozen", "all"):
        config = config_of(TINY, "--parallel.shard", "2", "--parallel.keep-gathered", kept, PLAIN)
        held[kept] = gathered_bytes(config, roles)
        gathers[kept] = [_gathers(config, role, 2.5, 1.0 * role.trainable) for role in (roles[0], teacher)]
    assert held == {"none": held["none"], "frozen": held["none"] + whole, "all": held["none"] + 3 * whole}
    assert gathers == {"none": [3.5, 2.5], "frozen": [3.5, 0.0], "all": [1, 0.0]}


@pytest.mark.parametrize(("kept", "copies"), [("none", 0), ("frozen", 0), ("all", 1)])
def test_a_network_under_three_roles_is_gathered_once_and_counts_as_trained(kept: str, copies: int) -> None:
    plain, config = (
        config_of(ADAPTERS, "--parallel.shard", "2", "--parallel.keep-gathered", which) for which in ("none", kept)
    )
    roles = role_plans(fake_run(config, Processes(shard=2)))
    assert gathered_bytes(config, roles) - gathered_bytes(plain, roles) == copies * roles[0].whole


def test_advice_does_not_offload_what_is_to_stay_gathered() -> None:
    config = config_of(TINY, "--parallel.shard", "2", "--parallel.keep-gathered", "all")
    flags = [flags for flags, _, _ in changes(config, 2)]
    assert flags.index("--parallel.keep-gathered none") < flags.index("--parallel.offload frozen")
    with pytest.raises(ValidationError, match="offload 'frozen' frees the device of what keep_gathered 'all' keeps"):
        ParallelConfig(shard=2, keep_gathered="all", offload="frozen")


@pytest.mark.slow
def test_advice_ends_as_soon_as_the_run_fits() -> None:
    planner, config = Planner(), config_of(TINY)
    plan = planner.plan(config, 4)
    advice = list(advise(planner, plan, plan.total - 1))
    assert [step.flags for step in advice] == ["--parallel.shard 2"]
    assert advice[0].plan.total < plan.total
    assert len({flags for flags, _, _ in changes(config, 4)}) >= 6


def test_a_layout_must_divide_the_processes() -> None:
    with pytest.raises(UserError, match=r"4 does not divide the number of processes, 6; possible: 1, 2, 3, 6"):
        Planner().plan(config_of(TINY, "--parallel.shard", "4"), 6)


def test_attention_takes_its_time_at_its_own_rate() -> None:
    step = StepCost(peaks={}, flops=10e12, attention=0.75, calls={}, backwards={})
    plan = Plan(config_of(TINY), 1, (), {}, 0, {}, 0, 0, step, sent=int(2e11), snapshots=0)
    one, two = time_line(plan, Rates(2e12, 2e12, 1e11)), time_line(plan, Rates(2.5e12, 5e12, 1e11))
    assert one.startswith("time: 5 s of arithmetic at 2e+12 FLOP/s, 2 s of traffic at 1e+11 B/s: 5 to 7 s per step")
    assert "1.5 s of attention at 5e+12 FLOP/s, 1 s of other arithmetic at 2.5e+12 FLOP/s" in two
    assert "2.5 to 4.5 s per step" in two


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has the kernel")
def test_rates_are_measured_with_the_backend_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvideo.planning.rates.SECONDS", 0.01)
    monkeypatch.setattr("fastvideo.planning.rates.ROWS", {"cpu": 64})
    found = measured_rates(config_of(TINY), "_native_math", 1e11)
    assert min(found.flops, found.attention) > 1e6
    assert found.flops != found.attention
    with pytest.raises(UserError, match="'_native_cudnn' does not compute heads of width"):
        measured_rates(config_of(TINY), "_native_cudnn", 1e11)


def test_a_rate_of_attention_alone_is_not_enough(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", TINY, "--attention-flops", "5e14"]) == 2
    assert "give --flops for the rest" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "count"), [("80GiB", 80 * 2**30), ("24GB", 24 * 10**9), ("1.5 gib", 3 * 2**29)])
def test_sizes_are_read(text: str, count: int) -> None:
    assert read_bytes(text, "--gpu-memory") == count


@pytest.mark.parametrize("text", ["much", "80QiB", "1.2.3GB"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no size"):
        read_bytes(text, "--gpu-memory")


def test_a_kernel_that_this_machine_lacks_changes_no_plan() -> None:
    asked = config_of(TINY, "--model.attention-backend", "_native_cudnn", "--model.compile-blocks")
    assert asked == config_of(TINY)
    with pytest.raises(UserError, match=r"_native_cudn' is not one of .*did you mean '_native_cudnn'"):
        config_of(TINY, "--model.attention-backend", "_native_cudn")


@pytest.mark.parametrize("flag", ["--data.path", "--data.prompts"])
def test_data_that_are_not_there_have_no_plan(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", TINY, flag, str(tmp_path / "nothere")]) == 2
    said = capsys.readouterr()
    assert "nothere" in said.err
    assert "--elsewhere" in said.err
    assert "FITS" not in said.out


@pytest.mark.parametrize("path", ["tiny", "tiny_stream", "s3://bucket/videos"])
def test_embedded_data_and_those_at_urls_are_there(path: str) -> None:
    check_there(DataConfig(path=path))


@pytest.mark.slow
def test_the_exit_code_says_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    joint = "--method.critic-updates-on-student-steps"
    command = ["plan", "--config", TINY, "--data.batch-size", "8", joint, "--reserve", "0"]
    assert main([*command, "--gpu-memory", "8GiB"]) == 0
    assert "FITS" in capsys.readouterr().out
    assert main([*command, "--gpu-memory", "1MiB"]) == 1
    printed = capsys.readouterr().out
    assert "DOES NOT FIT" in printed
    assert "--parallel.activation-checkpointing full" in printed
    assert "no number of processes" in printed
