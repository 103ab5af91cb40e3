"""Sampled latents on disk, a file per prompt and seed, so that a stopped or larger measurement goes on from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastvideo.distillation.sample import SamplerSpec, prompt_seeds
from fastvideo.errors import UserError
from fastvideo.files import record_of, replace_file, replacing
from fastvideo.inference.loading import LoadedModel, OpenedModel
from fastvideo.inference.progress import PatientBar
from fastvideo.inference.sampler import Sampling, sample_batches
from fastvideo.shares import ALONE, Share

FOLDER = "samples"
"""Folder of the samples inside an evaluation's output."""
KEY = "model.json"


@dataclass(frozen=True)
class Clips:
    """Prompts with the seed of their noise; a prompt that occurs again gets other noise."""

    prompts: tuple[str, ...]
    seed: int

    def names(self) -> list[str]:
        """File names: hash of the prompt, and seed of the noise."""
        seeds = prompt_seeds(self.seed, self.prompts)
        heads = [hashlib.sha256(prompt.encode()).hexdigest()[:16] for prompt in self.prompts]
        return [f"{head}-{seed:016x}.safetensors" for head, seed in zip(heads, seeds, strict=True)]


class Samples:
    """The latents of one model under one sampler, for the prompts of :class:`Clips`.

    Args:
        root: folder of all models' samples.
        key: all that a sample depends on besides prompt and noise; it names this model's folder in ``root``.
        clips: prompts and seed.
    """

    def __init__(self, root: Path, key: Mapping[str, Any], clips: Clips) -> None:
        self.key, self.clips = key, clips
        self.folder = root / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.files = [self.folder / name for name in clips.names()]

    def missing(self, share: Share = ALONE) -> list[int]:
        """Numbers of the prompts without a file; of a ``share`` of them."""
        return [row for row, file in enumerate(self.files) if row in share and not file.is_file()]

    def write(self, rows: Sequence[int], latents: Tensor, seconds: float) -> None:
        """Keep latents ``[B, C, F, H, W]`` of the prompts ``rows``, and the seconds that each took."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / KEY).is_file():
            replace_file(self.folder / KEY, json.dumps(self.key, indent=2) + "\n")
        for row, one in zip(rows, latents, strict=True):
            about = {"prompt": self.clips.prompts[row], "seconds": f"{seconds:.6g}"}
            with replacing(self.files[row]) as part:
                save_file({"latents": one.contiguous()}, part, metadata=about)

    def read(self, rows: Sequence[int]) -> Tensor:
        """Latents float32 ``[len(rows), C, F, H, W]`` on the CPU.

        Raises:
            UserError: for a damaged file.
        """
        return torch.stack([self._open(row)[0] for row in rows])

    def seconds(self, rows: Sequence[int]) -> list[float]:
        """Seconds of denoising of each sample."""
        return [self._open(row)[1] for row in rows]

    def _open(self, row: int) -> tuple[Tensor, float]:
        try:
            with safe_open(self.files[row], framework="pt") as file:
                return file.get_tensor("latents"), float(file.metadata()["seconds"])
        except (SafetensorError, OSError, TypeError, KeyError) as error:
            raise UserError(f"sample {self.files[row]} cannot be read ({error}): delete it, and call again") from error

    def batches(self, rows: Sequence[int], size: int) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Numbers and latents of ``rows``, ``size`` at a time."""
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            yield part, self.read(part)


def sample_key(model: OpenedModel, spec: SamplerSpec) -> dict[str, Any]:
    """All that a sample depends on besides prompt and noise."""
    return {
        "weights": weights_key(Path(model.source), model.adapter.folder.parts),
        "sampler": {**asdict(spec), "times": list(spec.times)},
        "latents": model.adapter.codec.latent_key,
        "latent_shape": list(model.adapter.codec.latent_shape),
        "conditions": model.adapter.conditioner.key,
        "negative_prompt": model.adapter.conditioner.negative_prompt,
        "precision": _arithmetic(model),
    }


def _arithmetic(model: OpenedModel) -> str:
    """The precision that a network is held in; samples of float32 weights under autocast had its name alone."""
    held = str(model.adapter.folder.compute_dtype).removeprefix("torch.")
    return held if held == "float32" else f"{held} weights"


def weights_key(folder: Path, parts: Sequence[str]) -> str:
    """SHA-256 over the files of a model folder's networks, so that a student that was trained on is another model."""
    digest = hashlib.sha256()
    for part in parts:
        for file in sorted(path for path in (folder / part).rglob("*") if path.is_file()):
            digest.update(f"{file.relative_to(folder)} {record_of(file).sha256}\n".encode())
    return digest.hexdigest()


def fill(
    samples: Samples, model: LoadedModel, spec: SamplerSpec, batch_size: int, label: str, share: Share = ALONE
) -> int:
    """Sample what ``samples`` lacks of a ``share``, and keep every batch at once; returns how many there were."""
    missing = samples.missing(share)
    wanted = Sampling(samples.clips.prompts, spec, samples.clips.seed, batch_size, rows=missing)
    calls = spec.calls_of(model.adapter.codec.latent_shape[1])
    with PatientBar(f"{label}: sampling", max(1, len(missing)) * calls) as bar:
        batches = sample_batches(model.adapter, model.denoiser, wanted, bar)
        for rows, batch in zip(wanted.batches, batches, strict=True):
            samples.write(rows, batch.latents, batch.seconds / len(rows))
    return len(missing)
