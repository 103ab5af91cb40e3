"""Config of a run: frozen, strict sections, documented field by field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import (
    AfterValidator,
    Field,
    field_validator,
    model_validator,
)

from fastvideo.distillation.config.averages import EMAConfig
from fastvideo.distillation.config.base import RESUMABLE, MethodConfig, Section, ordered
from fastvideo.distillation.config.checkpoints import CheckpointConfig
from fastvideo.distillation.config.parallel import ParallelConfig
from fastvideo.distillation.config.sections import AdapterConfig, TrainerConfig
from fastvideo.distillation.grids import published_ladder, uniform_ladder
from fastvideo.distillation.rollout import Ladder
from fastvideo.distillation.scaling import Quantise, Storage, is_gguf
from fastvideo.errors import UserError
from fastvideo.ranges import Frames, NonNegativeFloat, NonNegativeInt, Number, PositiveFloat, PositiveInt, Seed, Steps
from fastvideo.sampling_ranges import BatchSize, HeldOut, Repeats, Samples, Width, WrittenRate
from fastvideo.storage import is_remote


def _on_disk(folder: str) -> str:
    if not folder:
        raise ValueError("the name of a folder is expected, such as outputs/mine, or . for the working folder")
    if is_remote(folder):
        raise ValueError(f"{folder} is a URL, and a folder on a disk is expected; `checkpoint.mirror` takes a URL")
    return folder


Band = Annotated[tuple[NonNegativeFloat, NonNegativeFloat], AfterValidator(ordered)]
"""Lowest and highest ratio."""
LocalFolder = Annotated[str, AfterValidator(_on_disk)]
"""Folder on a disk, in which files are appended to, renamed and locked."""
MOST_SHIFT = 1000.0
"""Largest shift of a ladder; published ones are below 20."""


class LadderConfig(Section):
    """The student's noise levels: real `times`, a published list of `steps`, or a `count`; see `times`."""

    times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    """Decreasing times in (0, 1]; the final 0 is implied. In YAML also as `steps: [1000, 750, 500, 250]` with
    `shift: 5.0` and `warp: true|false`, or as `count: 50` with `shift: 3.0`: converted here, once. As flags:
    `--ladder.steps 1000 750 500 250`, `--ladder.count 4`, each with `--ladder.shift`."""
    written_as: ClassVar[Mapping[str, Any]] = {"steps": tuple[float, ...], "count": int, "shift": float, "warp": bool}

    @classmethod
    def rivals(cls, key: str) -> tuple[str, ...]:
        """Other spellings; a shift stays with steps and with a count."""
        forms = {"times": ("steps", "count", "shift", "warp"), "steps": ("times", "count")}
        return {**forms, "count": ("times", "steps", "warp")}.get(key, ())

    @model_validator(mode="before")
    @classmethod
    def _convert(cls, value: object) -> object:
        if not isinstance(value, Mapping) or not {"steps", "count"} & set(value):
            return value
        form = "steps" if "steps" in value else "count"
        allowed = {"steps", "shift", "warp"} if form == "steps" else {"count", "shift"}
        if set(value) - allowed:
            raise ValueError(
                f"`{form}` goes with {sorted(allowed - {form})} alone, not with {sorted(set(value) - allowed)}"
            )
        try:
            shift = float(value.get("shift", 1.0))
            if not 0 < shift <= MOST_SHIFT:
                raise UserError(f"shift must be above 0, up to {MOST_SHIFT}")
            if form == "count":
                return {"times": uniform_ladder(int(value["count"]), shift=shift).times}
            return {"times": published_ladder(value["steps"], shift=shift, warp=value.get("warp", True)).times}
        except (TypeError, ValueError, ArithmeticError, UserError) as error:
            raise ValueError(f"{error} (given: {dict(value)})") from error

    @field_validator("times")
    @classmethod
    def _valid(cls, times: tuple[float, ...]) -> tuple[float, ...]:
        try:
            return Ladder(times).times
        except UserError as error:
            raise ValueError(str(error)) from error


class DataConfig(Section):
    """Training data: preprocessed videos, the embedded world, or prompts alone."""

    path: str = "tiny"
    """`tiny` (the embedded world of moving digits), `tiny_stream` (the same without edges, for streams), `tiny_soft`
    (at half resolution) or `tiny_stills` (single frames), or a Parquet file or folder in FastVideo's public schema, as
    `fastvideo preprocess` writes it, or WebDataset's tar shards; local or a URL (`s3://bucket/folder`). A method that
    needs no videos reads captions and text embeddings alone. See `docs/storage.md`."""
    latents: Literal["raw", "normalised"] = "raw"
    """Scale of latents in files that do not say it: as the VAE gives them, or of unit variance."""
    prompts: str | None = None
    """Text file with one prompt per line, instead of `path`; local or a URL."""
    switch_prompts: str | None = None
    """Text file with the prompt that follows each line of `prompts`, for streams that switch (`method.switch_frames`);
    the tiny worlds make their own, which differ in one attribute."""
    long_prompts: Annotated[Literal["skip", "raise"], RESUMABLE] = "skip"
    """Reaction to prompts of `prompts` with more tokens than the text encoder takes: leave them out and list them in
    the run's folder, or stop with an error."""
    buckets: bool = False
    """Take videos of every size in the dataset, one size per batch; otherwise all must have the model's."""
    size: Samples = 4096
    """Samples of the tiny world per epoch."""
    cache: Annotated[LocalFolder, RESUMABLE] = "outputs/cache"
    """Folder for latents of the tiny world, and for counts of prompts that are too long."""
    faults: Literal["raise", "skip"] = "raise"
    """Reaction to an unreadable file or row of a dataset: stop with an error, or skip and list it."""
    max_faults: NonNegativeInt = 100
    """Faults per process that `skip` allows before the run stops."""
    batch_size: BatchSize = 32
    """Samples per process and micro-batch."""

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if self.prompts is not None and self.path != "tiny":
            raise ValueError(f"`path` {self.path!r} and `prompts` {self.prompts!r}: drop one (`--data.prompts None`)")
        return self


class LoRAConfig(Section):
    """LoRA adapter that is trained instead of a role's network."""

    rank: Width = 32
    """Rank of the change to each layer's weights."""
    alpha: PositiveFloat | None = None
    """Scale of the change, which is multiplied by alpha / rank; the rank if not given."""
    targets: tuple[str, ...] = Field(default=("to_q", "to_k", "to_v", "to_out.0"), min_length=1)
    """Adapted linear layers, by the ends of their names."""
    init_from: str | None = None
    """Adapter to start from: a LoRA file of diffusers, peft, kohya (musubi-tuner), ComfyUI or LightX2V, or its folder.
    A lower rank fits. A resumed run ignores it."""


class MergedLoRA(Section):
    """LoRA file that is merged into a network before training."""

    path: str
    """The file, of any program that `lora.init_from` reads, or its folder."""
    weight: Number = 1.0
    """Factor on its change; 1 is the file's own strength."""


MERGE_HINT = "`fastvideo merge MODEL --network FILE --out FOLDER` makes a folder of a .gguf file"
"""Way out of a key that a ``.gguf`` file cannot have, for messages."""


class RoleConfig(Section):
    """One role of the run."""

    trainable: bool
    """True if the role is trained, as the method demands."""
    path: str | None = None
    """Weights of its network; the model's own path if not given. A `.gguf` file stays quantised, for frozen roles: see
    `docs/quantised-teachers.md`."""
    model: dict[str, Any] | None = None
    """Family and options of its own, such as `{family: cogvideox, path: ...}`, with the fields of that family's `model`
    section; sizes are the run's if not given. Roles without it use the run's `model`."""
    init_from: str | None = None
    """Initial weights for the same network: a checkpoint (or a run's folder) as `PATH`, `PATH:ROLE` or
    `PATH:ROLE:ema|live`, or a model folder. Without a suffix it takes the role of this name or else the student, with
    averaged weights if there are any. Also `--init-ROLE-from` on the command line; a resumed run ignores it."""
    lora: LoRAConfig | None = None
    """Adapter to train over a frozen network, which all such roles and the frozen ones with the same `path` share;
    without it a trainable role trains all its weights."""

    loras: tuple[MergedLoRA, ...] = ()
    """LoRA files to merge into the network, such as a style that a teacher shall have. Roles that share a network for
    their adapters name the same ones."""
    quantise: Quantise | None = None
    """Store the matrices of a frozen network's blocks in fewer bits: `int8` (half of bfloat16), `nf4` (a quarter and a
    bit), or `fp8_storage` (half, needs no package). For roles that no gradient passes, such as DMD2's teacher; see
    `docs/quantised-teachers.md`."""

    @property
    def storage(self) -> Storage | None:
        """Storage of the matrices in fewer bits: as ``quantise`` says, or as they are in a ``.gguf`` file."""
        return "gguf" if is_gguf(self.path) else self.quantise

    @property
    def lora_files(self) -> tuple[str, ...]:
        """Paths of all LoRA files that the role reads."""
        start = self.lora and self.lora.init_from
        return (*([start] if start else []), *(lora.path for lora in self.loras))

    def without_start(self) -> RoleConfig:
        """The role without initial weights that training replaces."""
        lora = self.lora and self.lora.model_copy(update={"init_from": None})
        return self.model_copy(update={"init_from": None, "lora": lora})

    @model_validator(mode="after")
    def _one_start(self) -> RoleConfig:
        if self.init_from is not None and (self.loras or (self.lora and self.lora.init_from)):
            both = "loras" if self.loras else "lora.init_from"
            raise ValueError(f"`init_from` replaces the weights that `{both}` changes: give one of them")
        return self

    @model_validator(mode="after")
    def _quantised_is_frozen(self) -> RoleConfig:
        if self.storage is None:
            return self
        if self.trainable:
            what = "the base of an adapter passes gradients on" if self.lora else "its weights change"
            given, hint = f"`quantise` {self.quantise}", "leave `quantise` out here"
            if self.storage == "gguf":
                given, hint = f"`path` {self.path}", f"give the weights in full precision here; {MERGE_HINT}"
            raise ValueError(f"{given} is for frozen roles, such as a teacher, and this one is trained: {what}; {hint}")
        if self.init_from is not None and self.quantise is not None:
            raise ValueError(
                "`quantise` stores the weights of `path` or `model` when they are loaded, before `init_from` would "
                "replace them: give a model folder with those weights as `path`"
            )
        return self

    @model_validator(mode="after")
    def _file_is_quantised(self) -> RoleConfig:
        if is_gguf(self.path) and self.quantise is not None:
            raise ValueError(f"`quantise` {self.quantise}: {self.path} is quantised already, leave `quantise` out")
        if is_gguf(self.path) and self.loras:
            raise ValueError(f"`loras` cannot be merged into the quantised {self.path}; {MERGE_HINT}")
        if is_gguf(self.path) and self.init_from is not None:
            raise ValueError(
                f"`init_from` cannot replace the quantised weights of `path` {self.path}: give the weights that are "
                f"meant as `path`, and leave `init_from` out"
            )
        return self

    @model_validator(mode="after")
    def _adapter_is_trained(self) -> RoleConfig:
        if self.lora is not None and not self.trainable:
            raise ValueError("`lora` is trained: a frozen role has none")
        if self.model is not None and self.path is not None:
            raise ValueError("give `path` or `model` (with a path in it), not both")
        return self


class ValidationConfig(Section):
    """Samples at fixed prompts and noise while training."""

    every: NonNegativeInt = 0
    """Steps per validation; 0 means none."""
    prompts: tuple[str, ...] = ()
    """Prompts; the first eight are written as video."""
    images: tuple[str, ...] = ()
    """One image or clip per prompt, for an image-to-video model."""
    world_prompts: HeldOut = 0
    """Number of prompts of the tiny world instead, scored by its classifier."""
    seed: Seed = 1234
    """Seed of the noise; `fastvideo generate` with this seed and a prompt makes the same video."""
    batch_size: BatchSize | None = None
    """Videos that a process samples and decodes at a time. The default is one for `prompts`, bit-equal to `fastvideo
    generate`, and `data.batch_size` for `world_prompts`."""
    weights: Literal["both", "live", "ema"] = "both"
    """Weights of the student that are shown: the trained ones, their average or both; without an average, the
    trained ones."""
    frames: Frames | None = None
    """Frames of each video, for a student that streams: how it goes on beyond the training's length. The default is
    the model's own."""
    fps: WrittenRate = 8
    """Frames per second of the files."""

    @model_validator(mode="after")
    def _has_prompts(self) -> ValidationConfig:
        if self.every and not (self.prompts or self.world_prompts):
            raise ValueError("`every` is set: give `prompts`, or a number of `world_prompts`")
        if self.prompts and self.world_prompts:
            raise ValueError("give `prompts` or `world_prompts`, not both")
        if self.images and len(self.images) != len(self.prompts):
            raise ValueError(f"`images` has {len(self.images)} files for {len(self.prompts)} prompts")
        return self


class HealthConfig(Section):
    """Checks in every validation and thresholds of their alarms; see `docs/health.md`."""

    enabled: bool = True
    """Run the checks."""
    prompts: PositiveInt = 8
    """Number of the validation's prompts that are checked."""
    seeds: Repeats = 2
    """Videos per prompt, from different noise."""
    teacher_steps: Steps = 25
    """Steps of the teacher's videos, which are made once, at the first validation."""
    panels: bool | None = None
    """Write what student, critic and teacher make of a noisy video; the default is to do so for small videos alone,
    since each panel is four decodings."""
    contrast: Band = (0.5, 2.0)
    """Shares of the teacher's contrast; below the first the student is washed out."""
    saturation: Band = (0.4, 1.8)
    """Shares of the teacher's saturation outside which the student is grey or over-saturated."""
    motion: Band = (0.5, 2.5)
    """Shares of the teacher's motion outside which the student freezes or flickers."""
    late_motion: NonNegativeFloat = 0.6
    """Smallest motion of a long video's last quarter over that of its first, as a share of the teacher's."""
    late_brightness: Band = (0.7, 1.4)
    """The same for brightness, and the largest."""
    brightness: NonNegativeFloat = 0.15
    """Largest difference from the teacher's brightness, of 1."""
    colour: NonNegativeFloat = 0.1
    """Largest difference of a colour channel's deviation from grey, of 1."""
    grid: NonNegativeFloat = 1.6
    """Largest ratio to the teacher's steps at block borders."""
    diversity: NonNegativeFloat = 0.4
    """Smallest share of the teacher's difference between seeds."""
    latent_std: NonNegativeFloat = 2.5
    """Largest ratio to the spread of the teacher's latents."""
    update_balance: NonNegativeFloat = 0.5
    """Smallest ratio of the critic's movement per step to the student's."""
    gradient: NonNegativeFloat = 3.0
    """Largest RMS of the DMD gradient."""
    critic_lag: NonNegativeFloat = 2.0
    """Largest ratio of the critic's squared error in the last chunk of a stream to that in the first."""


class TrackingConfig(Section):
    """Trackers besides `metrics.jsonl`, which is always written."""

    backends: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """External trackers, which cannot stop the run; `wandb` and `trackio` are optional dependencies of those names."""
    project: str = "fastvideo"
    """Project at an external tracker."""
    name: str | None = None
    """Name of the run there; the output folder's if not given."""


AdapterT = TypeVar("AdapterT", bound=AdapterConfig)
MethodT = TypeVar("MethodT", bound=MethodConfig)


class RunConfig(Section, Generic[AdapterT, MethodT]):
    """Complete config of a run; it is saved beside the result and reproduces the run."""

    distill_model: str
    """Model family; `fastvideo list` shows all. One of your own: package.module:Class."""
    distill_method: str
    """Algorithm; `fastvideo list` shows all. One of your own: package.module:Class."""
    output: Annotated[LocalFolder, RESUMABLE]
    """Folder of the run; it must be new, unless the run resumes or overwrites it."""
    seed: Seed = 0
    """Seed of every random draw."""
    device: Annotated[Literal["auto", "cpu", "cuda"], RESUMABLE] = "auto"
    """Device of the run; `auto` takes CUDA if there is one."""
    model: AdapterT
    """Options of the model family."""
    roles: dict[str, RoleConfig]
    """Networks, by role."""
    ladder: LadderConfig = LadderConfig()
    """Noise levels of the student."""
    method: MethodT
    """Options of the algorithm."""
    data: DataConfig = DataConfig()
    """Training data."""
    trainer: TrainerConfig = TrainerConfig()
    """Training loop."""
    parallel: Annotated[ParallelConfig, RESUMABLE] = ParallelConfig()
    """Layout over processes."""
    ema: EMAConfig = EMAConfig()
    """Averaged weights of the student."""
    validation: Annotated[ValidationConfig, RESUMABLE] = ValidationConfig()
    """Samples while training."""
    health: Annotated[HealthConfig, RESUMABLE] = HealthConfig()
    """Checks in every validation."""
    tracking: Annotated[TrackingConfig, RESUMABLE] = TrackingConfig()
    """External trackers."""
    checkpoint: Annotated[CheckpointConfig, RESUMABLE] = CheckpointConfig()
    """Checkpoints."""

    @property
    def validation_batch(self) -> int:
        """Videos that a process samples and decodes at a time in a validation."""
        options = self.validation
        return options.batch_size or (self.data.batch_size if options.world_prompts else 1)
