"""Kill the S3 server during uploads of a running training's mirror; count what survives.

    python benchmarks/mirror_kills.py --kills 20

Every round trains with a mirror, kills the server after a random number of uploaded bytes, and lets it come back soon
or after the run. Then everything local is deleted, and the run goes on from the mirror alone. The last line is one JSON
object. The server is moto's, on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import torch
from safetensors.torch import load_file

from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.engine.checkpoint.manifest import DamagedError
from fastvideo.distillation.engine.optional import mirror
from fastvideo.distillation.registry import run_schema
from fastvideo.tests.storage.server import Proxy, environment, s3_server
from fastvideo.training.run import run

KILLS, STEPS, WHOLE = 20, 6, 10
"""Rounds, steps of the run whose server dies, and steps of the run that goes on."""


def training(folder: Path, steps: int, checkpoint: dict[str, Any]) -> Any:
    """Config of a run on a Gaussian, as YAML would give it."""
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("0.0\n" * 64)
    values = {
        "output": str(folder),
        "model": {"means": [0.7], "stds": [0.4], "weights": [1.0]},
        "roles": {
            "student": {"trainable": True, "path": "consistency"},
            "teacher": {"trainable": False},
            "critic": {"trainable": True},
        },
        "method": {"teacher_guidance": 1.0, "student_learning_rate": 0.01, "critic_learning_rate": 0.01},
        "data": {"prompts": str(prompts), "batch_size": 4},
        "trainer": {"max_steps": steps, "log_every": 1},
        "tracking": {"backends": []},
        "checkpoint": checkpoint,
    }
    schema = run_schema("analytic", "dmd2")
    return validate(schema, {"distill_model": "analytic", "distill_method": "dmd2", **values}, "of the benchmark")


def student(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a result."""
    return load_file(folder / "student" / "network.safetensors")


def come_back(proxy: Proxy, ended: threading.Event) -> None:
    """Start the server again soon after it was killed, if that happens before the run has ended."""
    while not ended.is_set():
        if proxy.dead.wait(0.1):
            time.sleep(0.2)
            proxy.mend()
            return


def killed_run(folder: Path, url: str, proxy: Proxy, after: int, soon: bool) -> bool:
    """Train while the server dies after that many uploaded bytes; true if the run reached its end."""
    options = {"every": 2, "mirror": url, "mirror_wait": 10.0 if soon else 0.5}
    proxy.uploaded, proxy.upload_limit = 0, after
    ended = threading.Event()
    helper = threading.Thread(target=come_back, args=(proxy, ended), daemon=True)
    if soon:
        helper.start()
    run(training(folder, STEPS, options))
    proxy.upload_limit = None
    ended.set()
    if soon:
        helper.join()
    if proxy.dead.is_set():
        proxy.mend()
    return (folder / "student").is_dir()


def all_intact(url: str, scratch: Path) -> bool:
    """True if every checkpoint with a manifest in the bucket has every byte."""
    root = mirror.checkpoints_at(url)
    try:
        for step in mirror.complete(mirror.listed(root)):
            mirror.fetch(root, step, scratch)
    except DamagedError:
        return False
    return True


def measured(kills: int = KILLS, seed: int = 0) -> dict[str, int]:
    """Kill the server ``kills`` times: rounds in which it died, and of them how many ended as they must."""
    draw, mirror.PAUSES = random.Random(seed), (0.05, 0.5)
    found = dict.fromkeys(("mirror_kills", "mirror_run_went_on", "mirror_complete_or_absent", "mirror_resume_exact"), 0)
    with tempfile.TemporaryDirectory() as name, s3_server() as proxy:
        os.environ.update(environment(proxy) | {"FASTVIDEO_CACHE": f"{name}/cache"})
        system = fsspec.filesystem("s3")
        system.mkdir("runs")
        whole = Path(name) / "whole"
        run(training(whole, WHOLE, {"every": 2}))
        size = sum(file.stat().st_size for file in (whole / "checkpoints" / f"step-{WHOLE}").iterdir())
        while found["mirror_kills"] < kills:
            folder, url = Path(name) / "run", f"s3://runs/{draw.randrange(10**9)}"
            after, soon = draw.randrange(8000, 3 * size), draw.random() < 0.5
            deaths = proxy.deaths
            went_on = killed_run(folder, url, proxy, after, soon)
            if proxy.deaths == deaths:  # all was uploaded before
                shutil.rmtree(folder)
                continue
            found["mirror_kills"] += 1
            found["mirror_run_went_on"] += went_on
            found["mirror_complete_or_absent"] += all_intact(url, Path(name) / "scratch")
            shutil.rmtree(folder)
            run(training(folder, WHOLE, {"every": 2, "mirror": url}), resume=True)
            first, second = student(whole), student(folder)
            found["mirror_resume_exact"] += all(torch.equal(first[key], second[key]) for key in first)
            shutil.rmtree(folder)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(measured(arguments.kills, arguments.seed)))


if __name__ == "__main__":
    main()
