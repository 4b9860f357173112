"""An experiment's settings: a YAML file over these dataclasses, and `-o KEY=VALUE` over that.

Precedence: `-o` > file > defaults here. An unknown key is an error. Every value stands once: the network's
num_frames, image_size and num_classes follow from `data`.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dali_pipelines.errors import InputError

PRECISIONS = ("auto", "float32", "bf16", "fp16")
OPTIMIZERS = ("sgd", "adamw")


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


@dataclass
class OptimConfig:
    name: str = "sgd"
    """sgd (Nesterov) or adamw."""
    lr: float = 0.0025
    """At the end of the warm-up, for the global batch."""
    warmup_start_lr: float = 0.00025
    warmup_epochs: float = 2
    final_lr: float = 0.0
    """At the end of the cosine."""
    momentum: float = 0.9
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 7e-5
    """None on the class token, the position and time embeddings and the head's bias."""
    clip_norm: float | None = 40.0
    """Largest norm of all gradients together."""
    global_batch_size: int = 64
    """Clips an optimizer step over all processes."""


@dataclass
class TrainConfig:
    epochs: int = 20
    max_steps: int | None = None
    """Stop after so many steps; the schedule still spans `epochs`."""
    precision: str = "auto"
    """float32, bf16, fp16 (with dynamic loss scaling), or auto: bf16 on a GPU that has it, float32 elsewhere."""
    label_smoothing: float = 0.1
    checkpoint_every_steps: int | None = None
    """Besides one at the end of every epoch."""
    log_every_steps: int = 10


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
    train: TrainConfig = field(default_factory=TrainConfig)


def load_config(path: str | None, overrides: list[str] = (), *, defaults: dict[str, Any] | None = None) -> Config:
    """The settings of file `path` (None: none) with `KEY=VALUE` overrides; `defaults` stand below the file.

    Raises `InputError` that names the key and, for an unknown one, the nearest that exists.
    """
    merged = OmegaConf.structured(Config)
    layers = [("defaults", OmegaConf.create(defaults or {}))]
    if path is not None:
        layers.append((path, _read_yaml(path)))
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise InputError(f"-o {override}: expected KEY=VALUE, such as -o optim.lr=0.001")
        layers.append((f"-o {override}", OmegaConf.from_dotlist([override])))
    for where, layer in layers:
        _check_keys(where, OmegaConf.to_container(layer), OmegaConf.to_container(OmegaConf.structured(Config)))
        try:
            merged = OmegaConf.merge(merged, layer)
            config = OmegaConf.to_object(merged)
        except OmegaConfBaseException as error:
            key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
            raise InputError(f"{where}: {key}{str(error).splitlines()[0]}") from None
    _check_values(config)
    return config


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read_yaml(path: str) -> DictConfig:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {error}") from None
    if content is not None and not isinstance(content, dict):
        raise InputError(f"{path}: expected `key: value` lines")
    return OmegaConf.create(content or {})


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
    keys = []
    for name, value in OmegaConf.to_container(OmegaConf.structured(Config)).items():
        keys.extend(f"{name}.{inner}" for inner in value) if isinstance(value, dict) else keys.append(name)
    return keys


def _check_values(config: Config) -> None:
    """What a type cannot say; the rest is checked where it is used."""
    data, optim, train = config.data, config.optim, config.train
    for key, value, allowed in [
        ("optim.name", optim.name, OPTIMIZERS),
        ("train.precision", train.precision, PRECISIONS),
        ("data.past_end", data.past_end, ("fit", "hold")),
        ("model.attention", config.model.attention, ("divided_space_time", "joint_space_time", "space_only")),
    ]:
        if value not in allowed:
            raise InputError(f"{key} is {value!r}; expected one of {', '.join(allowed)}")
    for key, holds, expected in [
        ("data.num_frames", data.num_frames >= 1, "1 or more"),
        ("data.crop_size", data.crop_size % config.model.patch_size == 0 < data.crop_size,
         f"a multiple of model.patch_size, {config.model.patch_size}"),
        ("data.short_side", data.short_side is None or len(data.short_side) == 2, "[low, high]"),
        ("data.mean", len(data.mean) == 3, "three numbers"),
        ("data.std", len(data.std) == 3 and min(data.std) > 0, "three numbers above 0"),
        ("data.batch_size", data.batch_size is None or data.batch_size >= 1, "1 or more"),
        ("data.workers", data.workers is None or data.workers >= 0, "0 or more"),
        ("model.embed_dim", config.model.embed_dim % config.model.num_heads == 0,
         f"a multiple of model.num_heads, {config.model.num_heads}"),
        ("model.drop_path", 0 <= config.model.drop_path < 1, "0 or more, less than 1"),
        ("optim.lr", optim.lr > 0, "more than 0"),
        ("optim.global_batch_size", optim.global_batch_size >= 1, "1 or more"),
        ("train.epochs", train.epochs >= 1, "1 or more"),
        ("train.max_steps", train.max_steps is None or train.max_steps >= 1, "1 or more"),
        ("train.log_every_steps", train.log_every_steps >= 1, "1 or more"),
        ("train.label_smoothing", 0 <= train.label_smoothing < 1, "0 or more, less than 1"),
        ("seed", config.seed >= 0, "0 or more"),
    ]:  # fmt: skip
        if not holds:
            section, _, name = key.rpartition(".")
            value = getattr(getattr(config, section) if section else config, name)
            raise InputError(f"{key} is {value}; expected {expected}")


def clip_settings(data: DataConfig, mode: str) -> dict[str, Any]:
    """The arguments of `ClipLoader` that decide what a clip is, for a mode of it."""
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
    }


PREPROCESSING = ("num_frames", "crop_size", "short_side", "stride", "target_fps", "past_end", "mean", "std")
"""Keys of `data` that weights depend on; they travel inside the weights file."""


def preprocessing(data: DataConfig) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(data).items() if key in PREPROCESSING}
