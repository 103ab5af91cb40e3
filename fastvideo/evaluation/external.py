"""Metrics that need weights or packages of others: CLIP score, FVD, dimensions of VBench.

Each is measured only if it is asked for or its weights are given; :func:`fastvideo.evaluation.choice.absent` names the
others, with the way to get them.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvideo.data.video_io import write_video
from fastvideo.errors import UserError
from fastvideo.evaluation.frechet import Moments, frechet
from fastvideo.evaluation.metric import Batch, Figures, Metric, Seen
from fastvideo.evaluation.statistics import estimate, weighted_mean

CLIP_FRAMES = 4
"""Frames of a video that CLIP sees, evenly spaced."""
VBENCH_INSTALL = "pip install --no-deps vbench && pip install decord easydict omegaconf openai-clip pyiqa torchvision"
"""VBench pins transformers 4.33 and numpy 1, for dimensions other than those here: they would replace this one's."""
NAME, RESULTS = "fastvideo", "fastvideo_eval_results.json"
"""Name of a measurement by VBench, and the file that it then writes."""
VBENCH_PERCENT = ("imaging_quality",)
"""Dimensions that VBench writes in percent for a video, and divides by 100 for all of them."""
VBENCH_FAILURES = (OSError, ImportError, RuntimeError, ValueError, subprocess.CalledProcessError)
"""Errors of VBench: a package or a download that is missing, weights that cannot be read."""


class ClipScore(Metric):
    """``clip_score``: 100 x cosine of CLIP's embeddings of frames and prompt, mean over frames (arXiv 2104.08718).

    Args:
        path: a CLIP model of transformers, a folder or a hub id.
        device: of the model.

    Raises:
        UserError: if it cannot be loaded.
    """

    def __init__(self, path: str, device: str) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
            self.images: Any = AutoImageProcessor.from_pretrained(path)
            self.model = CLIPModel.from_pretrained(path).to(device).eval()
        except (OSError, ValueError) as error:
            raise UserError(f"--clip {path}: a CLIP model of transformers is expected: {error}") from error
        self.device = device

    @torch.no_grad()
    def observe(self, batch: Batch) -> Seen:
        count = batch.videos.shape[2]
        places = torch.linspace(0, count - 1, min(CLIP_FRAMES, count)).round().long()
        frames = ((batch.videos[:, :, places] + 1) * 127.5).round().byte().transpose(1, 2)
        pictures = list(frames.flatten(0, 1).numpy())
        pixels = self.images(images=pictures, return_tensors="pt", input_data_format="channels_first")
        text = self.tokenizer(list(batch.prompts), padding=True, truncation=True, return_tensors="pt")
        out = self.model(**text.to(self.device), pixel_values=pixels["pixel_values"].to(self.device))
        embedded = out.image_embeds.unflatten(0, (len(frames), -1))
        return {"score": 100 * torch.einsum("bfd,bd->bf", embedded, out.text_embeds).mean(1).double().cpu()}

    def figures(self, seen: Seen, teacher: Seen, counts: Tensor) -> Figures:
        value, resampled = weighted_mean(seen["score"], counts)
        return {"clip_score": estimate(value, resampled, len(seen["score"]), lowest=-100.0)}


class VideoDistance(Metric):
    """``fvd``: Frechet distance from the teacher's videos in the features of a TorchScript network (arXiv 1812.01717).

    The network takes videos float32 ``[B, 3, T, H, W]`` in ``[-1, 1]`` and returns ``[B, D]``. The I3D file of
    StyleGAN-V, whose ``forward`` has the arguments ``rescale``, ``resize`` and ``return_features``, gets values in
    ``[0, 255]`` and these switched on.

    Raises:
        UserError: if the file is no TorchScript module.
    """

    def __init__(self, path: Path, device: str) -> None:
        try:
            self.network = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--fvd-extractor {path}: a TorchScript module is expected: {reason}") from error
        names = [argument.name for argument in self.network.forward.schema.arguments]
        self.switches = {name: True for name in ("rescale", "resize", "return_features") if name in names}
        self.device = device

    @torch.no_grad()
    def observe(self, batch: Batch) -> Seen:
        videos = batch.videos.to(self.device)
        if "rescale" in self.switches:
            videos = (videos + 1) * 127.5
        return {"features": self.network(videos, **self.switches).float().cpu()}

    def figures(self, seen: Seen, teacher: Seen, counts: Tensor) -> Figures:
        reference, own = teacher["features"], seen["features"]
        value = float(frechet(Moments.of(reference), Moments.of(own)))
        resampled = frechet(Moments.of(reference), Moments.weighted(own, counts))
        return {"fvd": estimate(value, resampled, len(own))}


class VBench(Metric):
    """Dimensions of VBench (arXiv 2311.17982) through its package, each as ``vbench_DIMENSION``.

    Its weights are fetched by the package on first use.
    """

    def __init__(self, dimensions: Sequence[str], device: str, fps: int) -> None:
        self.dimensions, self.device, self.fps = dimensions, device, fps
        self._videos = Path(tempfile.mkdtemp(prefix="fastvideo-vbench-"))
        weakref.finalize(self, shutil.rmtree, self._videos, ignore_errors=True)
        self._count = 0

    def observe(self, batch: Batch) -> Seen:
        numbers = range(self._count, self._count + len(batch.videos))
        for number, video in zip(numbers, batch.videos, strict=True):
            write_video(self._file(number), video, self.fps)
        self._count += len(batch.videos)
        return {"number": torch.tensor(numbers)}

    def _file(self, number: int) -> Path:
        return self._videos / f"{number:06d}.mp4"

    def figures(self, seen: Seen, teacher: Seen, counts: Tensor) -> Figures:
        files = [self._file(number) for number in seen["number"].tolist()]
        found: Figures = {}
        for dimension in self.dimensions:
            scores = self._scores(dimension, files)
            value, resampled = weighted_mean(scores, counts)
            found[f"vbench_{dimension}"] = estimate(value, resampled, len(scores))
        return found

    def _scores(self, dimension: str, files: Sequence[Path]) -> Tensor:
        """VBench's result of each file, float64 ``[N]``.

        Raises:
            UserError: if VBench cannot measure it.
        """
        with tempfile.TemporaryDirectory() as folder:
            videos = Path(folder) / "videos"
            videos.mkdir()
            for file in files:
                (videos / file.name).symlink_to(file)
            try:
                self._evaluate(dimension, videos)
            except VBENCH_FAILURES as error:
                raise UserError(f"vbench_{dimension}: {error}; it needs {VBENCH_INSTALL}") from error
            written = json.loads((Path(folder) / RESULTS).read_text(encoding="utf-8"))
        by_name = {Path(one["video_path"]).name: float(one["video_results"]) for one in written[dimension][1]}
        scores = torch.tensor([by_name[file.name] for file in files], dtype=torch.float64)
        return scores / 100 if dimension in VBENCH_PERCENT else scores

    def _evaluate(self, dimension: str, videos: Path) -> None:
        """Let VBench write :data:`RESULTS` beside the folder of videos."""
        vbench = importlib.import_module("vbench")
        about = Path(vbench.__file__).with_name("VBench_full_info.json")
        bench = vbench.VBench(torch.device(self.device), str(about), str(videos.parent))
        with contextlib.redirect_stdout(io.StringIO()):
            bench.evaluate(str(videos), NAME, dimension_list=[dimension], mode="custom_input")
