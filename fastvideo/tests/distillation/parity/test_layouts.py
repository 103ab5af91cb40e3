"""Every parallel layout trains what one process trains: losses, every role's gradient, three steps of weights."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from fastvideo.distillation.config.causal import reach_of
from fastvideo.distillation.config.parallel import ParallelConfig
from fastvideo.distillation.engine import placement
from fastvideo.distillation.engine.parallel import sharding
from fastvideo.distillation.engine.parallel.context import context_mesh
from fastvideo.distillation.engine.parallel.distributed import Processes
from fastvideo.distillation.engine.parallel.sharding import shard_mesh
from fastvideo.distillation.registry import METHODS, load_method
from fastvideo.tests.distillation.parity.runs import SIZES, Case, Result, role_folders, train, train_alone
from fastvideo.tests.launch import in_world

LAYOUTS: dict[str, tuple[int, int, int]] = {
    "dp2": (2, 1, 1),
    "shard2": (2, 2, 1),
    "context2": (2, 1, 2),
    "dp2 x context2": (4, 1, 2),
    "shard2 x context2": (4, 2, 2),
    "shard4 x context2": (4, 4, 2),
}
"""Processes, shard, context."""
TOLERANCE = {"loss": 1e-4, "gradient": 5e-4, "weight": 5e-5}
"""Largest difference, relative to the largest value of the tensor that is compared (or 1e-3, if that is smaller)."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    return role_folders(tmp_path_factory.mktemp("roles"))


CANCELLING = {"cm": 4}
"""Times the tolerance of gradients, for a method that regresses on the difference of neighbouring outputs: one process
whose weights change by 1e-7 has a third gradient that differs by 8e-4 to 1.4e-3, where that of DMD2 differs by 2e-6."""


def processes_of(layout: str, rank: int) -> Processes:
    size, shard, context = LAYOUTS[layout]
    return Processes(rank, size, torch.device("cpu"), shard, context)


def train_here(folders: Any, case: Case, layout: str, rank: int, size: int) -> Result:
    return train(case, folders, processes_of(layout, rank))


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-3))


def problems(found: Result, expected: Result, method: str = "") -> list[str]:
    """Every value that differs by more than its tolerance."""
    allowed = TOLERANCE | {"gradient": TOLERANCE["gradient"] * CANCELLING.get(method, 1)}
    pairs = [("loss", k, torch.tensor(found.losses[k]), torch.tensor(v)) for k, v in expected.losses.items()]
    for step, gradients in enumerate(expected.gradients):
        assert found.gradients[step].keys() == gradients.keys()
        pairs += [("gradient", f"{step}/{k}", found.gradients[step][k], v) for k, v in gradients.items()]
    assert found.weights.keys() == expected.weights.keys()
    pairs += [("weight", k, found.weights[k], v) for k, v in expected.weights.items()]
    worst = [(difference(a, b), kind, name) for kind, name, a, b in pairs]
    return [f"{kind} {name}: {d:.1e}" for d, kind, name in sorted(worst, reverse=True) if d > allowed[kind]]


def train_all(folders: Any, cases: list[Case], layout: str, train: Any, rank: int, size: int) -> list[Result]:
    """All cases, one after the other, in one world and over one mesh: every group that is made has threads for good."""
    found = []
    with patch.multiple(placement, shard_mesh=cache(shard_mesh), context_mesh=cache(context_mesh)):
        for case in cases:
            try:
                found.append(train(folders, case, layout, rank, size))
            except BaseException as error:
                raise AssertionError(f"{layout}, {case.name} does not train") from error
    return found


def check(
    folders: Any, cases: Mapping[str, list[Case]], folder: Path, train: Any = train_here, expect: Any = train_alone
) -> None:
    """Train the cases of each layout in one world, and compare every rank with one process."""
    alone: dict[tuple[str, int], Result] = {}
    wrong = []
    for number, (layout, chosen) in enumerate(cases.items()):
        size, data_ranks = LAYOUTS[layout][0], processes_of(layout, 0).data_size
        ends = in_world(size, partial(train_all, folders, chosen, layout, train), folder / str(number))
        for rank, results in enumerate(ends):
            for case, found in zip(chosen, results, strict=True):
                key = (case.name, data_ranks)
                alone[key] = alone.get(key) or expect(case, folders, data_ranks)
                texts = problems(found, alone[key], case.method)[:3]
                wrong += [f"{layout}, {case.name}, rank {rank}: {text}" for text in texts]
    assert not wrong, "\n".join(wrong)


def plain(case: Case, folders: Any, data_ranks: int) -> Result:
    """DMD2 on the case's family without any option."""
    return train_alone(Case(case.family, "dmd2"), folders, data_ranks)


LORA = {
    "student": {"lora": {"rank": 4}, "path": None},
    "critic": {"lora": {"rank": 3, "alpha": 6}, "path": None},
    "teacher": {"path": None},
}
ACCUMULATED = {"trainer": {"grad_accumulation": 2}}
CHECKPOINTED = {"parallel": {"activation_checkpointing": "full"}}


def test_every_layout_trains_wan_with_dmd2_as_one_process_does(folders: Any, tmp_path: Path) -> None:
    """In four processes the case that uses most; the covering matrix has the others there."""
    cases = [Case("wan", "dmd2"), Case("wan", "dmd2", CHECKPOINTED | ACCUMULATED, LORA)]
    check(folders, {"dp2": cases, "shard2": cases, "context2": cases, "shard2 x context2": cases[1:]}, tmp_path)


def case_of(family: str, method: str, **parallel: Any) -> Case:
    """Attention over several processes has no forward-mode derivative, so those methods take differences."""
    derived = "jvp" in load_method(method).Config.model_fields
    differences = {"jvp": "central_difference", "jvp_step": 1e-2} if derived else {}
    return Case(family, method, {"parallel": parallel} if parallel else {}, method_options=differences)


FAMILIES = ("wan", "cogvideox")
CAUSAL = tuple(name for name in METHODS if reach_of(load_method(name).Config()) is not None)
"""Methods of families with chunks alone, over layouts without `context`."""
WHOLE = tuple(name for name in METHODS if name not in (*CAUSAL, "phased_dmd", "dmd2_frames"))


def covering() -> dict[str, list[Case]]:
    """Four methods for every layout and family, in turn: each method in three layouts or more, and in both families."""
    methods, found = itertools.cycle(WHOLE), {}
    for layout in LAYOUTS:
        found[layout] = [case_of(family, next(methods)) for family in FAMILIES for _ in range(4)]
    return found


def variants(family: str) -> list[Case]:
    """Accumulation, recomputation, adapters, one forward for both losses, a critic that reads two times."""
    every = {"parallel": {"sync_every_micro_batch": True, "keep_gathered": "all"}} | ACCUMULATED
    cases = [Case(family, "dmd2", ACCUMULATED), Case(family, "dmd2", CHECKPOINTED), Case(family, "dmd2", {}, LORA)]
    cases += [Case(family, "dmd2", every), Case(family, "dmd2", CHECKPOINTED | ACCUMULATED, LORA)]
    joint, told = {"score_and_train": True}, {"critic_sees_rung": True}
    cases += [Case(family, "dmd2", {}, {}, joint), Case(family, "dmd2", CHECKPOINTED | ACCUMULATED, LORA, joint)]
    return [*cases, Case(family, "dmd2", {}, {}, told), Case(family, "dmd2_gan", CHECKPOINTED, {}, told)]


def test_the_matrix_covers_every_method_layout_and_family() -> None:
    chosen = [(layout, case.family, case.method) for layout, cases in covering().items() for case in cases]
    assert len(set(chosen)) == 4 * len(LAYOUTS) * len(FAMILIES)
    for method in WHOLE:
        assert len({layout for layout, _, name in chosen if name == method}) >= 3
        assert {family for _, family, name in chosen if name == method} == set(FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*list(LAYOUTS)[:-1], pytest.param("shard4 x context2", marks=pytest.mark.nightly)])
def test_layouts_train_methods_as_one_process_does(layout: str, folders: Any, tmp_path: Path) -> None:
    """The covering matrix, and some variants of DMD2: each in two layouts per family."""
    turn = list(LAYOUTS).index(layout) % 3
    cases = [case for family in FAMILIES for case in variants(family)[turn::3]]
    check(folders, {layout: [*covering()[layout], *cases]}, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_every_method_as_one_process_does(
    layout: str, family: str, folders: Any, tmp_path: Path
) -> None:
    check(folders, {layout: [case_of(family, method) for method in WHOLE]}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "shard2"])
def test_layouts_train_causal_methods_as_one_process_does(layout: str, folders: Any, tmp_path: Path) -> None:
    check(folders, {layout: [case_of("wan", method) for method in CAUSAL]}, tmp_path)


GATHERED = ("dmd2_gan", "ladd", "tcm")
"""Methods that hold a network's weights, or read its features, between its forwards in one step."""


@pytest.mark.parametrize(
    "methods",
    [pytest.param(GATHERED, marks=pytest.mark.slow), pytest.param((*WHOLE, *CAUSAL), marks=pytest.mark.nightly)],
    ids=["some", "all"],
)
def test_every_method_trains_alike_while_its_networks_stay_gathered(
    methods: tuple[str, ...], folders: Any, tmp_path: Path
) -> None:
    check(folders, {"shard2": [case_of("wan", method, keep_gathered="all") for method in methods]}, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("family", FAMILIES)
def test_accumulation_recomputation_and_adapters_change_nothing_of_that(
    family: str, folders: Any, tmp_path: Path
) -> None:
    check(folders, dict.fromkeys(LAYOUTS, variants(family)), tmp_path)


NEW = ("sdxl", "qwen_image", "ltx2")
"""A UNet, a packed flow, and a state of parts; what other families do in a layout is what one of these does."""
KNOWN = {"ladder": {"times": [0.93, 0.6]}}
"""A ladder of times that SDXL knows."""


@pytest.fixture(scope="module")
def new_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    return role_folders(tmp_path_factory.mktemp("new"), ("wan", *NEW))


@pytest.mark.slow
def test_two_processes_train_other_kinds_of_networks_as_one_does(new_folders: Any, tmp_path: Path) -> None:
    check(new_folders, {"shard2": [Case(name, "dmd2", KNOWN) for name in NEW]}, tmp_path)


@pytest.mark.slow
def test_two_processes_train_two_families_as_one_does(new_folders: Any, tmp_path: Path) -> None:
    """A student of videos under teachers of videos and of frames: five networks of two kinds, and both autoencoders."""
    stills = {"family": "sdxl", **SIZES["sdxl"]}
    frames = {"frame_teacher": "teacher", "frame_critic": "critic"}
    roles = {role: {"model": {**stills, "path": str(new_folders["sdxl"][own])}} for role, own in frames.items()}
    check(new_folders, {"shard2": [Case("wan", "dmd2_frames", {}, roles)]}, tmp_path)


def train_offloaded(folders: Any, case: Case, layout: str, rank: int, size: int) -> Result:
    """:func:`train_here`, where as many networks as asked for are given to FSDP with its offload policy."""
    given: list[bool] = []
    split = sharding.fully_shard

    def watched(module: Any, **options: Any) -> Any:
        if type(module).__name__ == "WanTransformer3DModel":
            given.append(isinstance(options["offload_policy"], CPUOffloadPolicy))
        return split(module, **options)

    with patch.object(sharding, "fully_shard", watched):
        result = train_here(folders, case, layout, rank, size)
    assert given == ([True] * 3 if case.options["parallel"]["offload"] == "all" else [False, False, True])
    return result


def train_counting(folders: Any, case: Case, layout: str, rank: int, size: int) -> Result:
    """:func:`train_here`; how often the first block was gathered is told among the losses."""
    gathered = 0
    gather = _fsdp_param_group.foreach_all_gather

    def counted(params: Any, *arguments: Any) -> Any:
        nonlocal gathered
        gathered += params[0]._param_fqn.startswith("blocks.0.")
        return gather(params, *arguments)

    with patch.object(_fsdp_param_group, "foreach_all_gather", counted):
        result = train_here(folders, case, layout, rank, size)
    return replace(result, losses=result.losses | {"gathered": gathered})


GATHERS = [
    # Three steps with five losses, two of the student's: once for each of 16 forwards and backwards.
    ({}, "none", 16),
    ({}, "frozen", 15),  # the teacher's second forward finds it whole
    # The teacher once; student and critic for the student's losses; the critic for its own, once with a rollout.
    ({}, "all", 9),
    (LORA, "none", 16),
    (LORA, "frozen", 16),  # the one network has trained adapters
    (LORA, "all", 5),  # once per loss
]
"""Roles, what stays gathered, and how often the first block is gathered in all."""


@pytest.mark.parametrize("numbers", [(1, 2, 5), pytest.param((0, 3, 4), marks=pytest.mark.slow)], ids=["kept", "not"])
def test_networks_that_stay_gathered_train_as_those_that_do_not(
    numbers: tuple[int, ...], folders: Any, tmp_path: Path
) -> None:
    """Those of ``GATHERS`` where something stays gathered at each change, and the others."""
    gathers = [GATHERS[number] for number in numbers]
    cases = [Case("wan", "dmd2", {"parallel": {"keep_gathered": kept}}, roles) for roles, kept, _ in gathers]
    times = {case.name: count for case, (_, _, count) in zip(cases, gathers, strict=True)}
    assert len(times) == len(gathers)

    def expected(case: Case, folders: Any, data_ranks: int) -> Result:
        result = train_alone(case, folders, data_ranks)
        return replace(result, losses=result.losses | {"gathered": times[case.name]})

    check(folders, {"shard2": cases}, tmp_path, train_counting, expected)


@pytest.mark.parametrize("which", ["all", pytest.param("frozen", marks=pytest.mark.slow)])
def test_networks_in_host_memory_train_as_those_on_the_device(which: str, folders: Any, tmp_path: Path) -> None:
    case = Case("wan", "dmd2", {"parallel": {"offload": which}})
    check(folders, {"shard2": [case]}, tmp_path, train_offloaded, plain)


@pytest.mark.parametrize(
    ("which", "trained", "home"),
    [("none", False, "cuda"), ("frozen", True, "cuda"), ("frozen", False, "cpu"), ("all", True, "cpu")],
)
def test_offloaded_networks_live_on_the_host(which: Any, trained: bool, home: str) -> None:
    network = torch.nn.Linear(2, 2).requires_grad_(trained)
    assert sharding.home_of(network, ParallelConfig(shard=2, offload=which), torch.device("cuda")).type == home


def train_compiled(folders: Any, case: Case, layout: str, rank: int, size: int) -> Result:
    """:func:`train_here`, where the compiler had something to do."""
    result = train_here(folders, case, layout, rank, size)
    assert torch._dynamo.utils.counters["frames"]["ok"]
    return result


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks, and warns itself
@pytest.mark.parametrize("layout", ["shard2", "context2"])
def test_compiled_blocks_that_are_split_train_as_eager_whole_ones(layout: str, folders: Any, tmp_path: Path) -> None:
    cases = [Case("wan", "dmd2", {"model": {"compile_blocks": True}})]
    check(folders, {layout: cases}, tmp_path, train_compiled, plain)
