"""Attention backends by name, compiled blocks, and prompts cleaned as the pipeline cleans them."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from fastvideo.distillation.adapters.cogvideox import CogVideoXAdapter
from fastvideo.distillation.adapters.diffusers.folder import repeated_blocks
from fastvideo.distillation.adapters.wan_family.adapter import WanFamily
from fastvideo.distillation.types import UserError
from fastvideo.tests.distillation.tiny import cogvideox_config, cogvideox_folder, wan_config


def backends(network: Any) -> set[str]:
    return {processor._attention_backend.value for processor in network.attn_processors.values()}


def test_the_backend_is_the_one_that_is_named(tiny_wan: Path) -> None:
    for name in ("native", "_native_math"):
        assert backends(WanFamily(wan_config(tiny_wan, attention_backend=name)).folder.load_network()) == {name}


class Called(TorchDispatchMode):
    """Names of the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(operation.name())
        return operation(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # autocast on a CPU leaves norms alone
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_log_names_the_kernel_that_runs(tiny_wan: Path, precision: str) -> None:
    adapter = WanFamily(wan_config(tiny_wan, precision=precision))
    assert adapter.folder.kernels == f"attention native -> flash (CPU), blocks eager, {precision}"
    network, prompts = adapter.folder.load_network(), adapter.conditioner.encode_prompts(["a green seven"])
    with Called() as called:
        adapter.velocity(network, torch.randn(1, *adapter.codec.latent_shape), torch.ones(1), prompts)
    assert {name for name in called.names if "attention" in name} == {
        "aten::_scaled_dot_product_flash_attention_for_cpu"
    }


def test_the_log_follows_what_torch_is_allowed(tiny_wan: Path) -> None:
    with sdpa_kernel(SDPBackend.MATH):
        kernels = WanFamily(wan_config(tiny_wan)).folder.kernels
    assert kernels.startswith("attention native -> math (CPU)")
    named = WanFamily(wan_config(tiny_wan, attention_backend="_native_math")).folder.kernels
    assert named.startswith("attention _native_math, ")


def test_attention_is_the_same_on_another_backend(tiny_wan: Path) -> None:
    network = WanFamily(wan_config(tiny_wan)).folder.load_network()
    other = WanFamily(wan_config(tiny_wan, attention_backend="_native_math")).folder.load_network()
    x, t, text = torch.randn(1, 4, 2, 2, 4), torch.tensor([500.0]), torch.randn(1, 8, 16)
    torch.testing.assert_close(network(x, t, text).sample, other(x, t, text).sample)


@pytest.mark.parametrize(
    ("name", "message"), [("natve", "did you mean 'native'"), ("flash", "flash-attn"), ("sage", "sageattention")]
)
def test_a_backend_that_cannot_be_had_is_refused(name: str, message: str, tiny_wan: Path) -> None:
    with pytest.raises(UserError, match=message):
        WanFamily(wan_config(tiny_wan, attention_backend=name)).folder.load_network()


def test_a_network_that_computes_attention_by_itself_says_so(tmp_path: Path) -> None:
    folder = cogvideox_folder(tmp_path)
    with pytest.raises(UserError, match="only 'native' is possible"):
        CogVideoXAdapter(cogvideox_config(folder, attention_backend="_native_math")).folder.load_network()


def test_the_blocks_are_compiled_and_nothing_else(tiny_wan: Path) -> None:
    network = WanFamily(wan_config(tiny_wan, compile_blocks=True)).folder.load_network()
    compiled = [module for module in network.modules() if module._compiled_call_impl is not None]
    assert compiled == repeated_blocks(network)
    assert len(compiled) == 2
    assert all(module._compiled_call_impl is None for module in copy.deepcopy(network).modules())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks, and warns itself
def test_compiled_blocks_compute_the_same(tiny_wan: Path) -> None:
    x, t, text = torch.randn(2, 4, 2, 2, 4), torch.tensor([500.0, 20.0]), torch.randn(2, 8, 16)
    found = []
    for compiled in (False, True):
        network = WanFamily(wan_config(tiny_wan, compile_blocks=compiled)).folder.load_network()
        network(x, t, text).sample.square().mean().backward()
        with torch.no_grad():
            sample = network(x, t, text).sample
        found.append([sample, *(p.grad for p in network.parameters())])
    for eager, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-6)


MESSY = ("  a  cat\n\tin the&amp;amp; hat ", "cafÃ© &lt;b&gt;", "“quoted”\u00a0text", "ﬁsh … and &#x27;chips&#x27;")


@pytest.mark.parametrize("prompt", MESSY)
def test_prompts_are_cleaned_as_the_pipeline_does(prompt: str, tiny_wan: Path) -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert WanFamily(wan_config(tiny_wan)).conditioner.clean_prompt(prompt) == prompt_clean(prompt)


KEPT = """
import sys
from fastvideo.distillation.engine.optional.memory import keep_freed_memory
def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024
import numpy
def freed():
    before = resident()
    for _ in range(3):
        numpy.ones(8_000_000)
    return resident() - before
keep_freed_memory(False)
given_back = freed()
keep_freed_memory()
print(given_back < 10, freed() > 50)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of Linux's C library")
def test_freed_memory_is_kept() -> None:
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
