"""The published CogVideoX text-to-video networks, built from their configs without memory.

Configs: ``transformer/config.json`` and ``scheduler/scheduler_config.json`` of THUDM's CogVideoX-2b, CogVideoX-5b and
CogVideoX1.5-5B on the Hugging Face hub. Twice the counts (half precision) are the sizes of the weight files
there: 3.39 GB for 2b, 9.93 + 1.22 GB for 5b.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastvideo.distillation.adapters.diffusers.discrete_vp import NoiseGrid

SHARED = {
    "attention_head_dim": 64, "in_channels": 16, "out_channels": 16, "text_embed_dim": 4096, "time_embed_dim": 512,
    "patch_size": 2, "max_text_seq_length": 226, "temporal_compression_ratio": 4, "attention_bias": True,
}  # fmt: skip
NETWORKS: dict[str, tuple[dict[str, Any], int]] = {
    "2b": ({"num_layers": 30, "num_attention_heads": 30}, 1_693_783_872),
    "5b": ({"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True}, 5_570_283_072),
    "1.5-5b": (
        {
            "num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True, "patch_size_t": 2,
            "sample_width": 300, "sample_height": 300, "sample_frames": 81, "patch_bias": False,
        },
        5_570_676_352,
    ),
}  # fmt: skip
SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "set_alpha_to_one": True, "clip_sample": False,
    "timestep_spacing": "trailing",
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_the_published_network_has_its_number_of_parameters(name: str) -> None:
    from diffusers import CogVideoXTransformer3DModel

    own, count = NETWORKS[name]
    with torch.device("meta"):
        network = CogVideoXTransformer3DModel(**SHARED, **own)
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize(
    ("shift", "times"), [(3.0, (1.0, 0.904734, 0.754251, 0.555221)), (1.0, (1.0, 0.843719, 0.638739, 0.420980))]
)
def test_four_published_steps_as_rectified_flow_times(shift: float, times: tuple[float, ...]) -> None:
    """The table worked out by hand: alpha-bar of the scaled linear betas, shifted, rescaled to end in 0."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)
    alpha = (abar / (shift + (1 - shift) * abar)).sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    sigma = (1 - alpha**2).sqrt()
    grid = NoiseGrid({**SCHEDULER, "snr_shift_scale": shift}, "CogVideoXDDIMScheduler")
    torch.testing.assert_close(grid.times, sigma / (alpha + sigma))
    assert grid.teacher_timesteps(4) == [999, 749, 499, 249]
    assert grid.times_of([999, 749, 499, 249]) == pytest.approx(times, abs=1e-6)
