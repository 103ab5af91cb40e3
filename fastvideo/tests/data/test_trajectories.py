"""A teacher's walks on disk: the same rows however they were made, and refused by a run that is not theirs."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from fastvideo.cli import main
from fastvideo.data.order import MemorySource
from fastvideo.data.schema import floats, metadata_of
from fastvideo.data.trajectories import precompute, trajectory_times
from fastvideo.distillation.adapters.analytic import AnalyticAdapter
from fastvideo.distillation.config.reading import validate
from fastvideo.distillation.methods.fine_tuning.sft import SFTMethod
from fastvideo.distillation.methods.knowledge_distillation.kd import KDConfig, KDMethod
from fastvideo.distillation.registry import METHODS, load_method, run_schema
from fastvideo.distillation.rng import mixed, normal, seeded
from fastvideo.distillation.sample import SampleNoise, SamplerSpec, sample
from fastvideo.distillation.types import Batch, RoleLoss, UserError
from fastvideo.inference.loading import load_model
from fastvideo.tests.distillation.tiny import wan_folder
from fastvideo.training.data import open_source
from fastvideo.training.run import run

ROWS, LADDER = 10, [1.0, 0.9, 0.5]
PROMPTS = ["red three", "green seven"]
MakeConfig = Callable[..., dict[str, Any]]


@pytest.fixture
def values(tmp_path: Path) -> MakeConfig:
    """A KD run on the analytic family, as YAML would have it; the trajectories go to ``out``."""

    def make(**method: Any) -> dict[str, Any]:
        return {
            "distill_model": "analytic",
            "distill_method": "kd",
            "output": str(tmp_path / "run"),
            "seed": 4,
            "device": "cpu",
            "model": {"path": "denoiser", "shape": [1, 1, 2, 3]},
            "roles": {"student": {"trainable": True, "path": "consistency"}},
            "ladder": {"times": LADDER},
            "method": {"teacher_guidance": 2.0, "teacher_steps": 7, "learning_rate": 0.01, **method},
            "data": {"path": str(tmp_path / "out"), "batch_size": 4},
            "trainer": {"max_steps": 3, "threads": 1},
        }

    return make


def command(tmp_path: Path, values: dict[str, Any], out: str = "out", *flags: str) -> list[str]:
    """The call that makes ten walks in files of four, through the network three at a time."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "prompts.txt").write_text("0.5\n-1\n0\n")
    arguments = ["precompute-trajectories", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / out)]
    arguments += ["--prompts", str(tmp_path / "prompts.txt"), "--count", str(ROWS), "--rows-per-file", "4"]
    return [*arguments, "--batch-size", "3", *flags]


def read(folder: Path) -> list[dict[str, Any]]:
    """All rows, tensors decoded."""
    rows = [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    for row in rows:
        for name in ("vae_latent", "trajectory", "trajectory_times"):
            row[name] = torch.tensor(floats(row[f"{name}_bytes"], row[f"{name}_shape"], row[f"{name}_dtype"]))
    return rows


def as_config(values: dict[str, Any]) -> Any:
    return validate(run_schema("analytic", "kd"), values, "test")


def test_a_row_is_the_guided_walk_from_its_own_noise(values: MakeConfig, tmp_path: Path) -> None:
    assert main(command(tmp_path, values())) == 0
    rows = read(tmp_path / "out")
    assert [row["caption"] for row in rows] == (["0.5", "-1", "0"] * 4)[:ROWS]
    times = sorted({*(1 - i / 7 for i in range(7)), *LADDER}, reverse=True)
    for number, row in enumerate(rows):
        x = normal((1, 1, 2, 3), seeded(mixed(4, number)))
        mean, states = 0.7 + 2.0 * float(row["caption"]), {}  # guidance 2 moves the mean by twice the caption
        for t, after in zip(times, (*times[1:], 0.0), strict=True):
            states[t] = x
            variance = (1 - t) ** 2 * 0.16 + t**2
            u = -mean + (t - (1 - t) * 0.16) / variance * (x - (1 - t) * mean)
            x = x - (t - after) * u
        torch.testing.assert_close(row["trajectory"], torch.stack([states[t] for t in LADDER]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(row["vae_latent"], x, rtol=1e-4, atol=1e-5)
        assert row["trajectory_times"].tolist() == torch.tensor(LADDER).tolist()


def test_the_metadata_says_how_it_was_made(values: MakeConfig, tmp_path: Path) -> None:
    main(command(tmp_path, values()))
    made = metadata_of(pq.read_metadata(tmp_path / "out" / "trajectories-00002.parquet").metadata)
    assert (made["ladder"], made["guidance"], made["seed"], made["solver"]) == (LADDER, 2.0, 4, "euler")
    assert len(made["solver_times"]) == 9
    assert len(made["teacher"]) == 64
    assert (made["family"], made["model"], made["latents"]) == ("analytic", "denoiser", "normalised")


def test_a_teacher_in_bfloat16_walks_as_one_that_is_loaded_to_sample(
    values: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = {"height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 8}
    chosen = {"path": str(wan_folder(tmp_path)), **size, "precision": "bfloat16"}
    config = {**values(), "distill_model": "wan", "roles": {"student": {"trainable": True}}, "model": chosen}
    call = [*command(tmp_path, config), "--count", "2"]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    assert main(call) == 0
    model = load_model(chosen["path"], chosen)
    condition, negative = map(model.adapter.conditioner.encode_prompts, (PROMPTS, ["", ""]))
    spec = SamplerSpec.teacher(trajectory_times(validate(run_schema("wan", "kd"), config, "test"), model.adapter), 2.0)
    noise = SampleNoise([mixed(4, row) for row in range(2)])
    expected = sample(model.denoiser, noise, model.adapter.codec.latent_shape, spec, condition, negative)
    assert torch.equal(torch.stack([row["vae_latent"] for row in read(tmp_path / "out")]), expected)
    config["model"] = {**chosen, "precision": "float32"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(call) == 2
    assert "begun with other settings (dtype: bfloat16 -> float32)" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_and_an_interruption_give_the_same_files_as_one_process(
    values: MakeConfig, tmp_path: Path
) -> None:
    main(command(tmp_path, values(), "one"))
    assert main(command(tmp_path, values(), "two", "--workers", "2")) == 0
    process = multiprocessing.get_context("fork").Process(target=main, args=(command(tmp_path, values(), "killed"),))
    process.start()
    while not list((tmp_path / "killed").glob("*.parquet")):
        process.join(0.002)
    process.kill()
    process.join()
    (tmp_path / "killed" / ".trajectories-00001.parquet.99.part").write_text("cut off")
    (tmp_path / "killed" / "trajectories-00002.parquet").unlink(missing_ok=True)
    main(command(tmp_path, values(), "killed"))
    files = {name: sorted((tmp_path / name).iterdir()) for name in ("one", "two", "killed")}
    assert [file.name for file in files["one"]] == [
        "preprocess.json", "trajectories-00000.parquet", "trajectories-00001.parquet", "trajectories-00002.parquet",
    ]  # fmt: skip
    for name in ("two", "killed"):
        assert [file.read_bytes() for file in files[name]] == [file.read_bytes() for file in files["one"]]


def test_a_run_trains_on_them(values: MakeConfig, tmp_path: Path) -> None:
    main(command(tmp_path, values()))
    student = run(as_config(values()))
    assert (student / "recipe.json").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": {"teacher_guidance": 3.0}}, "guidance: made with 2.0, configured 3.0"),
        ({"method": {"teacher_steps": 14}}, r"teacher steps: made with \[.*configured 15 from 1 to"),
        ({"ladder": {"times": [1.0, 0.75]}}, r"ladder: made with \[1.0, 0.9, 0.5\], configured \[1.0, 0.75\]"),
        ({"model": {"path": "denoiser", "shape": [1, 1, 2, 3], "means": [0.8]}}, "teacher weights: made with [0-9a-f]"),
        ({"data": {"prompts": "PROMPTS"}}, "trains on a teacher's trajectories"),
        ({"data": {"path": "tiny"}}, "precompute-trajectories --config"),
        ({"data": {"path": "no/such/folder"}}, "none at 'no/such/folder': make them with: .*-trajectories --config"),
    ],
)
def test_a_run_that_is_not_theirs_is_refused_with_both_values(
    change: dict[str, Any], message: str, values: MakeConfig, tmp_path: Path
) -> None:
    main(command(tmp_path, values()))
    changed = values()
    for section, fields in change.items():
        fields = {key: str(tmp_path / "prompts.txt") if value == "PROMPTS" else value for key, value in fields.items()}
        changed[section] = {**changed[section], **fields} if section in ("method", "model") else fields
    config = as_config(changed)
    with pytest.raises(UserError, match=message):
        open_source(config, AnalyticAdapter(config.model))


class PairsConfig(KDConfig):
    """Noise and sample alone, as reflow has them."""

    def stored_times(self, ladder: Sequence[float]) -> tuple[float, ...]:
        return (1.0,)


class PairsMethod(KDMethod):
    """Reads no state between noise and sample."""

    Config = PairsConfig

    def losses(self, batch: Batch, step: int) -> Iterator[RoleLoss]:
        assert batch.trajectory is not None
        assert batch.trajectory.states.shape[1] == 1
        u = self.bundle["student"].velocity(batch.latents, torch.full((len(batch),), 0.5), batch.condition)
        yield RoleLoss("student", batch.mean((u - batch.trajectory.states[:, 0] + batch.latents).square()))


def test_a_method_says_which_states_it_reads_and_pairs_serve_any_ladder(
    values: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "pairs", f"{__name__}:PairsMethod")
    made = {**values(), "distill_method": "pairs"}
    assert main(command(tmp_path, made)) == 0
    assert all(row["trajectory_times"].tolist() == [1.0] for row in read(tmp_path / "out"))
    config = validate(run_schema("analytic", "pairs"), {**made, "ladder": {"times": [1.0, 0.75]}}, "test")
    assert (run(config) / "recipe.json").is_file()


class BareMethod(SFTMethod):
    """Has no field of what it says to need."""

    needs_trajectories = True


def test_a_config_without_the_fields_of_trajectories_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "bare", f"{__name__}:BareMethod")
    with pytest.raises(UserError, match=r"bare has needs_trajectories.* derive SFTConfig from .*TrajectoryOptions"):
        load_method("bare")


def test_videos_are_no_trajectories(values: MakeConfig, tmp_path: Path) -> None:
    main(command(tmp_path, values()))
    for file in (tmp_path / "out").glob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.replace_schema_metadata({}), file)
    config = as_config(values())
    with pytest.raises(UserError, match="holds no trajectories, which kd trains on"):
        open_source(config, AnalyticAdapter(config.model))


def test_an_interrupted_folder_is_refused_and_so_is_another_configs(
    values: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command(tmp_path, values()))
    assert main(command(tmp_path, values(teacher_guidance=3.0))) == 2
    assert "guidance: 2.0 -> 3.0" in capsys.readouterr().err
    assert main(command(tmp_path, values(teacher_guidance=3.0), "out", "--overwrite")) == 0
    (tmp_path / "out" / "trajectories-00000.parquet").unlink()
    config = as_config(values(teacher_guidance=3.0))
    with pytest.raises(UserError, match="Run the same fastvideo precompute-trajectories command again"):
        open_source(config, AnalyticAdapter(config.model))


def test_a_method_that_needs_none_is_refused(
    values: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {**values(), "distill_method": "sft", "method": {}}
    assert main(command(tmp_path, wrong)) == 2
    assert "sft trains on no trajectories" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def causal_config(values: MakeConfig, **method: Any) -> dict[str, Any]:
    """A causal KD run on frames with correlation 0.9."""
    made = {**values(reach={"chunk": 1}, allow_bidirectional_pairs=True, **method), "distill_method": "causal_kd"}
    made["model"] = {**made["model"], "shape": [1, 2, 2, 3], "correlation": 0.9}
    return made


def make_causal(values: dict[str, Any], out: Path, videos: MemorySource, **options: Any) -> None:
    chosen = {"workers": 1, "per_file": 4, "batch_size": 3, "device": "cpu", "overwrite": False, **options}
    config = validate(run_schema("analytic", "causal_kd"), values, "test")
    captions = [videos.captions[i % len(videos.captions)] for i in range(ROWS)]
    precompute(config, captions, out, chosen, videos)


@pytest.fixture(scope="module")
def videos() -> MemorySource:
    """Seven videos, so that ten rows use some of them twice."""
    latents = torch.randn(7, 1, 2, 2, 3, generator=torch.Generator().manual_seed(2))
    return MemorySource([f"{i}" for i in range(7)], latents)


def test_a_causal_row_goes_on_from_its_own_video(values: MakeConfig, videos: MemorySource, tmp_path: Path) -> None:
    """The walk of each frame against a loop here: the exact velocity of N(m, s^2) on the data before it, guided."""
    make_causal(causal_config(values), tmp_path / "out", videos)
    assert videos.latents is not None
    rows = read(tmp_path / "out")
    times = sorted({*(1 - i / 7 for i in range(7)), *LADDER}, reverse=True)
    for number, row in enumerate(rows):
        data, shift = videos.latents[number % 7], float(number % 7)
        assert row["caption"] == f"{number % 7}"
        assert torch.equal(row["vae_latent"], data)
        torch.testing.assert_close(row["trajectory_times"], torch.tensor([*LADDER, 0.0]))
        x, states = normal((1, 2, 2, 3), seeded(mixed(4, number))), {}
        before = 0.9 * (data[:, :1] - 0.7)
        variance = torch.tensor([0.16, 0.16 * (1 - 0.81)]).view(1, 2, 1, 1)
        for t, after in zip(times, [*times[1:], 0.0], strict=True):
            states[t] = x
            scale = (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)
            u = 0.0
            for mean, weight in ((0.7 + shift, 2.0), (0.7, -1.0)):
                past = before - 0.9 * (mean - 0.7)
                m = mean + torch.cat([torch.zeros_like(past), past], dim=1)
                u = u + weight * (scale * (x - (1 - t) * m) - m)
            x = x - (t - after) * u
        expected = torch.stack([*(states[t] for t in LADDER), x])
        torch.testing.assert_close(row["trajectory"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_causal_files_are_the_same_from_two_processes(values: MakeConfig, videos: MemorySource, tmp_path: Path) -> None:
    config = causal_config(values)
    for out, workers in (("one", 1), ("two", 2)):
        make_causal(config, tmp_path / out, videos, workers=workers)
    one, two = (sorted((tmp_path / name).glob("*.parquet")) for name in ("one", "two"))
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]
    made = metadata_of(pq.read_metadata(one[0]).metadata)
    assert (made["trajectory_kind"], made["reach"]["chunk"]) == ("causal", 1)


def test_a_run_trains_on_causal_ones(values: MakeConfig, videos: MemorySource, tmp_path: Path) -> None:
    config = causal_config(values)
    make_causal(config, tmp_path / "out", videos)
    built = validate(run_schema("analytic", "causal_kd"), config, "test")
    source, description = open_source(built, AnalyticAdapter(built.model))
    assert "4 states each" in description
    assert source.read([0, 3]).extras["trajectory"].shape == (2, 4, 1, 2, 2, 3)
    run(built)


def test_a_run_refuses_trajectories_of_another_kind(values: MakeConfig, videos: MemorySource, tmp_path: Path) -> None:
    strict = causal_config(values)
    strict["method"]["allow_bidirectional_pairs"] = False
    make_causal(causal_config(values), tmp_path / "out", videos)
    plain = {**strict, "distill_method": "kd", "method": values()["method"]}
    config = validate(run_schema("analytic", "kd"), plain, "test")
    with pytest.raises(UserError, match="are causal, and kd trains on bidirectional ones"):
        open_source(config, AnalyticAdapter(config.model))
    nowhere = validate(run_schema("analytic", "causal_kd"), {**strict, "data": {"path": "nowhere"}}, "test")
    with pytest.raises(
        UserError, match="none at 'nowhere': make them with: fastvideo precompute-trajectories --causal "
    ):
        open_source(nowhere, AnalyticAdapter(nowhere.model))
    assert main(command(tmp_path, plain, "bidirectional")) == 0
    strict["data"] = {**strict["data"], "path": str(tmp_path / "bidirectional")}
    config = validate(run_schema("analytic", "causal_kd"), strict, "test")
    with pytest.raises(UserError, match=r"are bidirectional.*--causal, or set method.allow_bidirectional_pairs"):
        open_source(config, AnalyticAdapter(config.model))
    other = causal_config(values)
    other["method"]["reach"] = {"chunk": 2}
    config = validate(run_schema("analytic", "causal_kd"), other, "test")
    with pytest.raises(UserError, match=r"reach: made with .*'chunk': 1.* configured .*'chunk': 2"):
        open_source(config, AnalyticAdapter(config.model))


def test_the_call_says_what_fits_the_method(
    values: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    causal = causal_config(values)
    for config, flags, message in (
        (values(), ["--causal"], "kd trains on bidirectional trajectories"),
        (causal, ["--causal"], "--prompts: with --causal"),
        (values(), ["--data", "x"], "--data: videos are for --causal"),
    ):
        assert main(command(tmp_path, config, "out", *flags)) == 2
        assert message in capsys.readouterr().err
    causal["method"]["allow_bidirectional_pairs"] = False
    assert main(command(tmp_path, causal)) == 2
    assert "give --causal" in capsys.readouterr().err
    with pytest.raises(UserError, match="has no `streaming`"):
        make_causal(causal, tmp_path / "out", MemorySource(["0"], torch.zeros(1, 1, 2, 2, 3)))
    assert not (tmp_path / "out").exists()
