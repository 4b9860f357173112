"""An experiment's settings: a YAML file over these dataclasses, and `-o KEY=VALUE` over that.

Precedence: `-o` > file > the file it names as its `base` > defaults here. An unknown key is an error. Every value
stands once: the network's num_frames, image_size and num_classes follow from `data`.
"""

import dataclasses
import difflib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dali_pipelines.engines import DECODES
from dali_pipelines.errors import InputError
from dali_pipelines.host_decoder import MAX_PIXELS
from dali_pipelines.sampling import PAST_END
from model.attention_types import ATTENTION_TYPES

T = TypeVar("T")


@dataclass
class ModelConfig:
    """Arguments of `model.TimeSformer`."""

    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    qkv_bias: bool = False
    attention: str = "divided_space_time"
    drop_path: float = 0.1
    embed_init_std: float = 0.02


@dataclass
class DataConfig:
    """Which videos, and how a clip is cut out of one; see `dali_pipelines.ClipLoader`."""

    train: str | None = None
    """Manifest, made by prepare.py."""
    val: str | None = None
    test: str | None = None
    """Manifest for evaluate.py; default: that of `val`."""
    labels: str | None = None
    """File with a class name a line; default: the names in the training manifest."""
    num_frames: int = 8
    crop_size: int = 224
    """Pixels a side."""
    short_side: list[int] | None = None
    """Pixels [low, high] that training draws the short side from; validation uses the low one, the test the crop size.
    Default: 8/7 and 10/7 of the crop size."""
    stride: float | None = 32
    """Window of a clip: stride * num_frames / target_fps seconds; null: the whole video."""
    target_fps: float = 30
    past_end: str = "fit"
    """A window longer than the video: "fit" shrinks it, "hold" repeats the last frame."""
    flip: bool = True
    """Mirror every second training clip."""
    mean: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    std: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])
    batch_size: int | None = None
    """Clips a process takes at once; default: its share of the global batch."""
    workers: int | None = None
    """Processes that read and decode, for each training process; default: its share of the CPU cores."""
    decode: str = "auto"
    """auto: on a GPU, NVDEC and the workers (PyAV) side by side; on the CPU, the workers. nvdec: NVDEC alone, for what
    it takes. dali: DALI's own decoder, slow on a GPU. host: the workers."""
    host_share: float | None = None
    """Share of the videos that NVDEC takes, 0 to 1, which the workers decode; default: what keeps both busy."""
    decode_threads: int | None = None
    """Threads that feed NVDEC, for each training process; default: one a worker, 4 to 16."""
    views_per_decode: int = 1
    """Training clips cut out of one decode of a video, each with a window, crop and flip of its own."""
    timeout_s: float = 60
    """Seconds that a worker may take for one video, which is unreadable then."""
    cache: str | None = None
    """Folder on a local disk that keeps what is read from URLs, for the next epochs; null: it is read anew."""
    max_pixels: int = MAX_PIXELS
    """Pixels that a frame may have, by default twice those of 8K; a video with more is unreadable. See --max-pixels of
    prepare.py."""
    max_fault_fraction: float = 0.05
    """Training stops when more than this share of an epoch's videos, 0 to 1, cannot be read."""


@dataclass
class OptimConfig:
    name: str = "sgd"
    """sgd (Nesterov), adamw or lamb."""
    implementation: str = "auto"
    """auto: torch's fused kernels; for LAMB Apex's where they run, on a GPU, else torch's multi-tensor (foreach) ones.
    apex, fused, foreach: that or an error."""
    lr: float = 0.0025
    """At the end of the warm-up, for the global batch."""
    warmup_start_lr: float = 0.00025
    warmup_epochs: float = 2
    final_lr: float = 0.0
    """At the end of the cosine."""
    decay_epochs: list[float] = field(default_factory=list)
    """Where given: no cosine, but a rate that stays, and falls to a tenth after each of these epochs."""
    momentum: float = 0.9
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 7e-5
    """None on the class token, the position and time embeddings and the head's bias."""
    clip_norm: float | None = 40.0
    """Largest norm of all gradients together."""
    global_batch_size: int = 64
    """Clips an optimizer step over all processes."""


@dataclass
class MixConfig:
    """VideoMix: see `training.mixing`."""

    cutmix_prob: float = 0.0
    """Share of micro-batches that CutMix is done to, 0 to 1; Mixup is done to the others."""
    cutmix_alpha: float = 1.0
    """The clip's own share is drawn from Beta(alpha, alpha)."""
    mixup_alpha: float = 0.0
    """The same for Mixup; 0: none."""
    cutmix_box: str = "space"
    """space: rows and columns of all frames, as the paper says; reference: what PaddleVideo's code does."""


@dataclass
class DistillConfig:
    """Learning from a teacher besides the labels: see `training.losses.summed_distillation`."""

    teacher: str | None = None
    """Weights file of ours with the same classes, crop size, mean and std, and as many frames or a multiple of them."""
    temperature: float = 3.0
    weight: float = 0.5
    """Of the teacher, 0 to 1; the labels have the rest."""


@dataclass
class TrainConfig:
    epochs: int = 20
    max_steps: int | None = None
    """Stop after so many steps; the schedule still spans `epochs`."""
    precision: str = "auto"
    """float32, bf16, fp16 (with dynamic loss scaling); auto: bf16 on a GPU that has it, float32 elsewhere; amp (as
    --amp): bf16, fp16 on a GPU without it."""
    label_smoothing: float = 0.1
    pretrained: str | None = None
    """Weights to begin with: a file, folder or name on the Hugging Face Hub, see `model.load_pretrained`."""
    swa_epochs: int = 0
    """The weights after each of so many last epochs are averaged, into swa.safetensors."""
    activation_checkpointing: bool = False
    """Less memory for a third more computing: activations of a block are computed again when they are needed."""
    compile: bool | str = "auto"
    """torch.compile the network. auto: on a GPU, for a run of 1,000 forward passes or more, where a compiler works."""
    cuda_graphs: bool = False
    """Launch the compiled network as one CUDA graph."""
    checkpoint_every_steps: int | None = None
    """Besides one at the end of every epoch."""
    log_every_steps: int = 10
    on_nan: str = "stop"
    """A loss or gradient that is not finite: stop, or rollback (to the last checkpoint; the step's clips are left out
    when it comes to them again). In fp16 such steps are skipped, as long as the loss scale can still fall."""
    hang_timeout_s: float = 600
    """Seconds without progress after which a run of several processes ends, naming the one that hangs."""


@dataclass
class Config:
    name: str = "timesformer"
    seed: int = 0
    output: str = "output/${name}"
    """Folder for everything that a run writes."""
    device: str = "auto"
    """auto: the GPU if there is one."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def load_config(path: str | None, overrides: list[str] = (), *, defaults: dict[str, Any] | None = None) -> Config:
    """The settings of file `path` (None: none) with `KEY=VALUE` overrides; `defaults` stand below the file.

    Raises `InputError` that names the key and, for an unknown one, the nearest that exists.
    """
    merged = OmegaConf.structured(Config)
    layers = [("defaults", OmegaConf.create(defaults or {}))]
    if path is not None:
        layers.extend(_read_layers(path))
    for override in overrides:
        if "=" not in override:
            raise InputError(f"-o {override}: expected KEY=VALUE, such as -o optim.lr=0.001")
        layers.append(
            (f"-o {override}", _parse(f"-o {override}", lambda text=override: OmegaConf.from_dotlist([text])))
        )
    for where, layer in layers:
        _check_keys(where, OmegaConf.to_container(layer), OmegaConf.to_container(OmegaConf.structured(Config)))
        merged = _parse(where, lambda below=merged, layer=layer: OmegaConf.merge(below, layer))
    config = _parse("the config", lambda: OmegaConf.to_object(merged))
    _check_values(config)
    return config


def read_run_config(path: Path) -> Config:
    """The config.yaml of a run that is found beside weights. Anybody may have written it, so it may hold only what
    train.py writes: `InputError` for the name of another file (`base`) and for what would be filled in
    (`${oc.env:HOME}`)."""
    if "base" in (content := _read_yaml(str(path))):
        raise InputError(f"{path}: names another file, which train.py never does; it is not read")
    if "${" in OmegaConf.to_yaml(content):
        raise InputError(f"{path}: has a value to be filled in, which train.py never writes; it is not read")
    return load_config(str(path))


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Keys with their section, such as optim.lr."""
    keys = {}
    for name, value in config.items():
        keys.update(
            {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
        )
    return keys


def _read_layers(path: str) -> list[tuple[str, DictConfig]]:
    """The file and, before it, the one that its key `base` names, from its own folder; and so on."""
    layers = []
    while path is not None:
        if path in [name for name, _ in layers]:
            raise InputError(f"{path}: its `base` leads back to itself")
        content = OmegaConf.to_container(_read_yaml(path))
        base = content.pop("base", None)
        layers.insert(0, (path, OmegaConf.create(content)))
        if base is not None and (not isinstance(base, str) or not base.endswith((".yaml", ".yml"))):
            raise InputError(f"{path}: base is {base!r}; expected the name of a YAML file, from this one's folder")
        path = None if base is None else os.path.normpath(Path(path).parent / base)
    return layers


def _read_yaml(path: str) -> DictConfig:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file; expected YAML") from None
    content = _parse(path, lambda: OmegaConf.create(text or "{}"))  # its YAML loader is a safe one
    if not isinstance(content, DictConfig):
        raise InputError(f"{path}: expected `key: value` lines")
    return content


def _parse(where: str, parse: Callable[[], T]) -> T:
    try:
        return parse()
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not YAML: {error}") from None
    except UnicodeEncodeError:
        raise InputError(f"{where}: not UTF-8; a path that is not needs a link with another name") from None
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise InputError(f"{where}: {key}{str(error).splitlines()[0]}") from None


def _check_keys(where: str, given: Any, known: dict, prefix: str = "") -> None:
    if not isinstance(given, dict):
        return
    for key, value in given.items():
        if key in known:
            if isinstance(known[key], dict):
                if not isinstance(value, dict):
                    raise InputError(
                        f"{where}: {prefix}{key} is a section; set a key in it, such as {prefix}{key}."
                        f"{next(iter(known[key]))}"
                    )
                _check_keys(where, value, known[key], f"{prefix}{key}.")
            continue
        everything = _dotted_keys()
        near = difflib.get_close_matches(f"{prefix}{key}", everything, n=1, cutoff=0.5) or [
            name for name in everything if name.split(".")[-1] == str(key)
        ]
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
        if prefix == "model." and key in ("num_frames", "image_size", "num_classes"):
            hint = "; it follows from data.num_frames, data.crop_size and the class names"
        raise InputError(f"{where}: unknown key {prefix}{key}{hint}")


def _dotted_keys() -> list[str]:
    return list(flat(OmegaConf.to_container(OmegaConf.structured(Config))))


def _one_of(*allowed: str):
    return lambda value: value in allowed, f"one of {', '.join(allowed)}"


def _optional(rule):
    is_good, expected = rule
    return lambda value: value is None or is_good(value), f"{expected}, or null"


def _up_to(most: int):
    return lambda value: 1 <= value <= most, f"1 or more, at most {most}"


_COUNT = (lambda value: value >= 1, "1 or more")
_POSITIVE = (lambda value: 0 < value < math.inf, "more than 0")
_NOT_NEGATIVE = (lambda value: 0 <= value < math.inf, "0 or more")
_SHARE = (lambda value: 0 <= value < 1, "0 or more, less than 1")
_FRACTION = (lambda value: 0 <= value <= 1, "0 to 1")

_VALUES = {
    "seed": (lambda value: 0 <= value < 2**64, "0 or more, less than 2**64"),
    "model.patch_size": _up_to(1024),
    "model.embed_dim": _up_to(65_536),
    "model.depth": _up_to(1000),
    "model.num_heads": _up_to(1024),
    "model.attention": _one_of(*ATTENTION_TYPES),
    "model.drop_path": _SHARE,
    "model.embed_init_std": _NOT_NEGATIVE,
    "data.num_frames": _up_to(4096),
    "data.crop_size": _up_to(8192),
    "data.short_side": (
        lambda value: value is None or (len(value) == 2 and all(1 <= side <= 65_536 for side in value)),
        "[low, high], or null",
    ),
    "data.stride": _optional((lambda value: 0 < value <= 1e6, "more than 0, at most 1e6")),
    "data.target_fps": (lambda value: 1e-3 <= value <= 1e6, "0.001 to 1e6"),
    "data.past_end": _one_of(*PAST_END),
    "data.mean": (lambda value: len(value) == 3 and all(map(math.isfinite, value)), "three numbers"),
    "data.std": (lambda value: len(value) == 3 and all(0 < v < math.inf for v in value), "three numbers above 0"),
    "data.batch_size": _optional(_COUNT),
    "data.workers": _optional(_NOT_NEGATIVE),
    "data.decode": _one_of(*DECODES),
    "data.host_share": _optional(_FRACTION),
    "data.decode_threads": _optional(_COUNT),
    "data.views_per_decode": _COUNT,
    "data.timeout_s": _POSITIVE,
    "data.max_pixels": _COUNT,
    "data.max_fault_fraction": _FRACTION,
    "optim.name": _one_of("sgd", "adamw", "lamb"),
    "optim.implementation": _one_of("auto", "apex", "fused", "foreach"),
    "optim.lr": _POSITIVE,
    "optim.warmup_start_lr": _NOT_NEGATIVE,
    "optim.warmup_epochs": _NOT_NEGATIVE,
    "optim.final_lr": _NOT_NEGATIVE,
    "optim.decay_epochs": (lambda value: value == sorted(value) and min(value, default=1) > 0, "rising, above 0"),
    "optim.momentum": _SHARE,
    "optim.betas": (
        lambda value: len(value) == 2 and all(0 <= v < 1 for v in value),
        "two numbers, 0 or more, below 1",
    ),
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.clip_norm": _optional(_POSITIVE),
    "optim.global_batch_size": _COUNT,
    "mix.cutmix_prob": _FRACTION,
    "mix.cutmix_alpha": _POSITIVE,
    "mix.mixup_alpha": _NOT_NEGATIVE,
    "mix.cutmix_box": _one_of("space", "reference"),
    "distill.temperature": _POSITIVE,
    "distill.weight": _FRACTION,
    "train.epochs": _COUNT,
    "train.max_steps": _optional(_COUNT),
    "train.precision": _one_of("auto", "amp", "float32", "bf16", "fp16"),
    "train.label_smoothing": _SHARE,
    "train.swa_epochs": _NOT_NEGATIVE,
    "train.compile": (lambda value: str(value).lower() in ("auto", "true", "false"), "auto, true or false"),
    "train.checkpoint_every_steps": _optional(_COUNT),
    "train.log_every_steps": _COUNT,
    "train.on_nan": _one_of("stop", "rollback"),
    "train.hang_timeout_s": _POSITIVE,
}
"""Which values are good, and how to say it."""


def _check_value(key: str, value: Any) -> None:
    is_good, expected = _VALUES[key]
    if not is_good(value):
        raise InputError(f"{key} is {value}; expected {expected}")


def _check_values(config: Config) -> None:
    """What a type cannot say."""
    for key in _VALUES:
        value = config
        for name in key.split("."):
            value = getattr(value, name)
        _check_value(key, value)
    data, model = config.data, config.model
    for holds, message in [
        (data.crop_size % model.patch_size == 0,
         f"data.crop_size is {data.crop_size}; expected a multiple of model.patch_size, {model.patch_size}"),
        (model.embed_dim % model.num_heads == 0,
         f"model.embed_dim is {model.embed_dim}; expected a multiple of model.num_heads, {model.num_heads}"),
        (config.optim.warmup_epochs < config.train.epochs,
         f"optim.warmup_epochs is {config.optim.warmup_epochs:g}; expected less than train.epochs, "
         f"{config.train.epochs}: the learning rate would never reach optim.lr"),
        (config.train.swa_epochs <= config.train.epochs,
         f"train.swa_epochs is {config.train.swa_epochs}; expected at most train.epochs, {config.train.epochs}"),
    ]:  # fmt: skip
        if not holds:
            raise InputError(message)


def clip_settings(data: DataConfig, mode: str) -> dict[str, Any]:
    """The arguments of `ClipLoader` that follow from `data`, for a mode of it."""
    short_side = None
    if data.short_side is not None:
        short_side = {"train": tuple(data.short_side), "validate": data.short_side[0], "test": None}[mode]
    return {
        "mode": mode,
        "num_frames": data.num_frames,
        "crop_size": data.crop_size,
        "short_side": short_side,
        "stride": data.stride,
        "target_fps": data.target_fps,
        "past_end": data.past_end,
        "flip": data.flip,
        "mean": data.mean,
        "std": data.std,
        "decode": data.decode,
        "host_share": data.host_share,
        "decode_threads": data.decode_threads,
        "views_per_decode": data.views_per_decode,
        "timeout_s": data.timeout_s,
        "cache": data.cache,
        "max_pixels": data.max_pixels,
    }


PREPROCESSING = ("num_frames", "crop_size", "short_side", "stride", "target_fps", "past_end", "mean", "std")
"""Keys of `data` that weights depend on; they travel inside the weights file."""


def preprocessing(data: DataConfig) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(data).items() if key in PREPROCESSING}


_MOST_PIXELS = 1 << 25  # of a clip whose size a file tells: 400 MB in float32
_MOST_VALUES = 1 << 25  # of the patches of such a clip in the network; TimeSformer-L has 19 million
_MOST_ATTENDED = 1 << 15  # patches that attend to each other; time grows with the square


def check_header(model: Any, preprocessing: Any) -> None:
    """Raises `InputError` unless these, from the header of a weights file, are plain values of the keys that weights
    depend on, within bounds. Anybody may have written the file: it sets nothing else, and nothing in it is expanded."""
    for section, values, kind, known in (
        ("model", model, ModelConfig, [each.name for each in dataclasses.fields(ModelConfig)]),
        ("data", preprocessing, DataConfig, PREPROCESSING),
    ):
        if not isinstance(values, dict):
            raise InputError(f"{section} is no object with keys")
        types = {each.name: each.type for each in dataclasses.fields(kind)}
        for key, value in values.items():
            if key not in known:
                raise InputError(f"{section}.{key[:80]} is no setting of weights")
            if not _is_of_type(value, types[key]):
                raise InputError(f"{section}.{key} is {str(value)[:80]!r}")
            if f"{section}.{key}" in _VALUES:
                _check_value(f"{section}.{key}", value)
    if missing := [key for key in ("num_frames", "crop_size", "mean", "std") if key not in preprocessing]:
        raise InputError(f"data.{missing[0]} is missing")
    frames, side = preprocessing["num_frames"], preprocessing["crop_size"]
    if frames * side**2 > _MOST_PIXELS:
        raise InputError(f"a clip has {frames} x {side} x {side} pixels; expected at most {_MOST_PIXELS}")
    network = ModelConfig(**model)
    patches, width = (side // network.patch_size) ** 2, network.embed_dim
    if frames * patches * width > _MOST_VALUES:
        raise InputError(f"a clip has {frames} x {patches} patches of {width} values; expected at most {_MOST_VALUES}")
    attended = frames * patches if network.attention == "joint_space_time" else max(frames, patches)
    if attended > _MOST_ATTENDED:
        raise InputError(f"{attended} patches attend to each other; expected at most {_MOST_ATTENDED}")


def _is_of_type(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        return (type(value) is int and abs(value) < 2**63) or (kind is float and type(value) is float)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of_type(each, get_args(kind)[0]) for each in value)
    return any(_is_of_type(value, each) for each in get_args(kind)) if get_args(kind) else type(value) is kind
