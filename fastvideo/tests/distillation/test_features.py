"""Features of real networks: what the hooks give is what the blocks computed, with and without checkpointing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo.distillation.adapters.base import DistillAdapter
from fastvideo.distillation.builder import build_adapter, build_method
from fastvideo.distillation.bundle import RoleHandle, frozen
from fastvideo.distillation.config.reading import config_of
from fastvideo.distillation.engine.parallel.recompute import checkpointed
from fastvideo.distillation.features import features, x0_guided_and_features
from fastvideo.distillation.methods.distribution_matching.discriminator import generated_tokens
from fastvideo.distillation.rng import normal, seeded
from fastvideo.distillation.types import Condition, Given, UserError
from fastvideo.tests.distillation.tiny import FAMILIES, cogvideox_config, wan_config
from fastvideo.tests.distillation.toys import spy

PROMPTS = ("red seven", "a three")


def family(name: str, folder: Path, **options: Any) -> DistillAdapter[Any]:
    adapter = FAMILIES[name].make(folder)
    config = {"wan": wan_config, "cogvideox": cogvideox_config}[name]
    root = Path(adapter.config.path)
    return type(adapter)(config(root, **options)) if options else adapter


def inputs(adapter: DistillAdapter[Any]) -> tuple[Tensor, Tensor, Condition]:
    x_t = normal((2, *adapter.codec.latent_shape), seeded(1)).requires_grad_()
    return x_t, torch.tensor([0.3, 0.8]), adapter.conditioner.encode_prompts(PROMPTS)


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_nothing_runs_after_the_last_tap(name: str, tiny_wan: Path) -> None:
    adapter = family(name, tiny_wan.parent)
    network = adapter.folder.load_network()
    ran: list[int] = []
    for index, block in enumerate(getattr(network, adapter._spec.blocks)):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    _, (alone,) = adapter.features(network, *inputs(adapter), (0,))
    assert ran == [0]
    _, (beside, _) = adapter.features(network, *inputs(adapter), (0, 1), whole=True)
    assert torch.equal(alone, beside), "stopping early changes nothing"
    ran[:] = [0]
    adapter.features(network, *inputs(adapter), (1,))
    assert ran == [0, 0, 1]


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_checkpointed_blocks_give_the_same_features_and_gradients(name: str, tiny_wan: Path) -> None:
    found = []
    for recompute in (False, True):
        adapter = family(name, tiny_wan.parent)
        network = adapter.folder.load_network()
        if recompute:
            adapter.scaling.recompute(network, checkpointed("full"))
        x_t, t, condition = inputs(adapter)
        features = adapter.features(network, x_t, t, condition, (0,))[1]
        u, both = adapter.features(network, x_t, t, condition, (0, 1), whole=True)
        (u.square().sum() + sum(f.pow(3).sum() for f in (*features, *both))).backward()
        found.append([u.detach(), *features, *both, x_t.grad, *(p.grad for p in network.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_hooks_are_gone_after_a_call_even_one_that_fails(tiny_wan: Path) -> None:
    adapter = family("wan", tiny_wan.parent)
    network = adapter.folder.load_network()
    x_t, t, condition = inputs(adapter)
    adapter.features(network, x_t, t, condition, (0,))
    with pytest.raises(RuntimeError):
        adapter.features(network, x_t[:, :1], t, condition, (0,))
    for block in getattr(network, adapter._spec.blocks):
        assert not block._forward_hooks
        assert not block._forward_pre_hooks


def test_a_tap_that_is_no_block_is_refused(tiny_wan: Path) -> None:
    adapter = family("wan", tiny_wan.parent)
    network = adapter.folder.load_network()
    for taps in ((2,), (-1,), ()):
        with pytest.raises(UserError, match="blocks 0 to 1 of WanFamily"):
            adapter.features(network, *inputs(adapter), taps)


def test_a_role_shows_given_frames_clean_and_marks_their_tokens(tiny_wan: Path) -> None:
    adapter = family("wan", tiny_wan.parent)
    role = RoleHandle("teacher", adapter, adapter.folder.load_network())
    x_t, t, text = inputs(adapter)
    mask = torch.tensor([[True, False], [False, False]])
    condition = Condition(text.tensors, Given(mask, normal(tuple(x_t.shape), seeded(2))))
    (tokens,) = features(role, x_t, t, condition, (0,))
    (gradient,) = torch.autograd.grad(tokens.square().sum(), x_t)
    assert torch.count_nonzero(gradient[0, :, 0]) == 0
    assert (gradient[0, :, 1].abs().sum(), gradient[1, :, 0].abs().sum()) > (0.0, 0.0)
    free = generated_tokens(tokens.shape[1], condition.given)  # type: ignore[arg-type]
    assert free.shape == tokens.shape[:2]
    assert free.view(2, 2, -1).float().mean(2).tolist() == [[0.0, 1.0], [1.0, 1.0]]
    x0, again = x0_guided_and_features(role, x_t, t, condition, condition, 1.0, (0,))
    torch.testing.assert_close(again[0], tokens)
    torch.testing.assert_close(x0, role.x0(x_t, t, condition))
    assert not x0.requires_grad


def test_guided_x0_beside_features_is_the_guided_x0(tiny_wan: Path) -> None:
    adapter = family("wan", tiny_wan.parent)
    adapter.ensure_negative_conditioning()
    role = RoleHandle("teacher", adapter, adapter.folder.load_network())
    x_t, t, condition = inputs(adapter)
    negative = adapter.conditioner.negative(2)
    x0, (tokens,) = x0_guided_and_features(role, x_t, t, condition, negative, 3.0, (1,))
    assert torch.equal(x0, role.x0_guided(x_t, t, condition, negative, 3.0).detach())
    torch.testing.assert_close(tokens, features(role, x_t, t, condition, (1,))[0])


def test_the_tokens_of_the_analytic_family_are_its_sufficient_statistics() -> None:
    adapter = spy((2, 3, 1, 2))
    role = RoleHandle("teacher", adapter, adapter.folder.load_network().double())
    x_t, t = normal((2, 2, 3, 1, 2), seeded(1), dtype=torch.float64), torch.tensor([0.3, 0.8], dtype=torch.float64)
    (tokens,) = features(role, x_t, t, adapter.conditioner.encode_prompts(["0.5", "0"]), (0,))
    assert tokens.shape == (2, 6, 5)
    alpha, mean, std = 0.7, 0.7 + 0.5, 0.4
    y = (x_t[0] - alpha * mean) / (alpha**2 * std**2 + 0.3**2) ** 0.5
    expected = torch.stack([torch.ones(6, dtype=torch.float64), *y.flatten(1), *y.flatten(1).square()], dim=1)
    torch.testing.assert_close(tokens[0], expected, rtol=1e-6, atol=1e-6)


def test_held_weights_let_gradient_through_and_keep_none(tiny_wan: Path) -> None:
    adapter = family("wan", tiny_wan.parent)
    role = RoleHandle("critic", adapter, adapter.folder.load_network(), trainable=True)
    x_t, t, condition = inputs(adapter)
    with frozen([role]):
        features(role, x_t, t, condition, (0,))[0].square().sum().backward()
    assert x_t.grad is not None
    assert x_t.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in role.network.parameters())
    assert len(role.parameters()) == len(list(role.network.parameters()))


def judged(pipeline: Path, backbone: str, teacher: dict[str, Any], **changes: Any) -> Any:
    """A method whose discriminator reads a role that has options of its own."""
    trained = {"student", "discriminator"} | ({"critic"} if backbone == "critic" else set())
    roles: Any = {role: {"trainable": role in trained} for role in ("teacher", *sorted(trained))}
    roles[backbone] |= teacher
    size = {"height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 8}
    made = {
        "distill_model": "wan",
        "distill_method": "ladd" if backbone == "teacher" else "dmd2_gan",
        "output": str(pipeline.parent / "run"),
        "model": {"path": str(pipeline), **size},
        "roles": roles,
        "method": {} if backbone == "teacher" else {"features_of": "critic"},
        "data": {"path": str(pipeline.parent / "data"), "batch_size": 2},
        "tracking": {"backends": []},
    }
    config = config_of(made, "test")
    return build_method(config, build_adapter(config))


@pytest.mark.parametrize("size", [{"num_layers": 4}, {"num_attention_heads": 4}], ids=["deeper", "wider"])
@pytest.mark.parametrize("backbone", ["teacher", "critic"])
def test_a_role_of_another_size_has_features_of_another_size(
    backbone: str, size: dict[str, int], tiny_wan: Path, tmp_path: Path
) -> None:
    """Heads are made for the size of the run's model, so a path to another is refused; a model of its own is not."""
    from diffusers import WanTransformer3DModel

    own = WanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer")
    other = Path(shutil.copytree(tiny_wan, tmp_path / "other"))
    WanTransformer3DModel.from_config({**own.config, **size}).save_pretrained(other / "transformer")
    file = other / "transformer" / "diffusion_pytorch_model.safetensors"
    for path in (other, file):  # the file has its config.json beside it
        with pytest.raises(UserError) as error:
            judged(tiny_wan, backbone, {"path": str(path)})
        assert str(error.value).startswith(f"roles.{backbone}.path: {path} has blocks of another number or size than ")
        assert str(error.value).endswith(f"roles.{backbone}.model: {{family: wan, path: FOLDER}}")
    same = judged(tiny_wan, backbone, {"path": str(shutil.copytree(tiny_wan, tmp_path / "same"))})
    assert max(same.adversary.taps) == 1
    if backbone == "teacher":
        method = judged(tiny_wan, backbone, {"model": {"family": "wan", "path": str(other)}})
        x_t, t, condition = inputs(method.teacher.adapter)
        assert max(method.adversary.taps) == len(method.teacher.network.blocks) - 1
        assert method.adversary.judge(x_t, t, condition).shape[0] == len(t)
