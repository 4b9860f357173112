"""The settings of a run: the defaults in these dataclasses, overridden by a YAML file, and that by `-o KEY=VALUE`.

Precedence: `-o` > file > the file's `base` > defaults. An unknown key is an error. Every value is set in one place: the
network's num_frames, image_size and num_classes follow from `data`.

A relative path in a file starts at the folder of that file, like `base`, wherever a command is run. A path after `-o`
starts at the current folder, and so does the default of `output`.
"""

import contextlib
import copy
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.config_hints import about_paddle_config, hint_for, is_paddle_config, nearest
from common.config_rules import RULES, check_value
from dali_pipelines.errors import InputError
from dali_pipelines.files import is_url
from dali_pipelines.host_decoder import MAX_PIXELS
from dali_pipelines.text import decode
from model.attention_types import ATTENTION_TYPES


@dataclass
class ModelConfig:
    """Arguments of `model.TimeSformer`."""

    patch_size: int = 16
    """Side of a square patch in pixels."""
    embed_dim: int = 768
    """Width of the network: values per patch."""
    depth: int = 12
    """Number of blocks."""
    num_heads: int = 12
    """Attention heads; they divide the width."""
    qkv_bias: bool = False
    """Biases of the queries, keys and values. PP-TimeSformer has none, the original TimeSformer has them."""
    attention: str = "divided_space_time"
    """divided_space_time, joint_space_time or space_only."""
    drop_path: float = 0.1
    """Stochastic depth: probability, 0 to 1, that training leaves out the last block; it rises from 0 at the first."""
    embed_init_std: float = 0.02
    """Standard deviation of the embeddings' initial values."""


@dataclass
class DataConfig:
    """The videos, and how clips are cut out of them; see `dali_pipelines.ClipLoader`."""

    train: str | None = None
    """Manifest made by prepare.py."""
    val: str | None = None
    """Manifest of the videos for validation during training."""
    test: str | None = None
    """Manifest for evaluate.py; default: `val`."""
    labels: str | None = None
    """File with one class name per line; default: the names in the training manifest."""
    num_frames: int = 8
    """Frames in a clip."""
    crop_size: int = 224
    """Side of the square crop in pixels."""
    short_side: list[int] | None = None
    """Range [low, high] in pixels from which training draws the short side; validation uses the low end, the test uses
    the crop size. Default: 8/7 and 10/7 of the crop size."""
    stride: float | None = 32
    """A clip spans stride * num_frames / target_fps seconds; null: the whole video."""
    target_fps: float = 30
    """Frame rate in which `stride` counts, whatever the rate of the video."""
    past_end: str = "fit"
    """What happens to a clip longer than the video: "fit" shrinks it, "hold" repeats the last frame."""
    flip: bool = True
    """Mirror half of the training clips."""
    mean: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """Of red, green and blue, 0 to 1: subtracted from the pixels."""
    std: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])
    """Of red, green and blue, 0 to 1: the pixels are divided by it."""
    batch_size: int | None = None
    """Clips per micro-batch of a process; default: its share of the global batch."""
    workers: int | None = None
    """Processes that read and decode, per training process; default: its share of the CPU cores."""
    decode: str = "auto"
    """auto: on a GPU, NVDEC and the workers (PyAV) together; on the CPU, the workers. nvdec: NVDEC for all videos that
    it supports. dali: DALI's own decoder, slow on a GPU. host: the workers."""
    host_share: float | None = None
    """Share (0 to 1) of the videos NVDEC supports that the workers decode instead; default: what keeps both busy."""
    decode_threads: int | None = None
    """Threads that feed NVDEC, per training process; default: one per worker, 4 to 16."""
    balance_classes: bool = False
    """Repeat the training videos of rarer classes within each epoch, so that all classes occur about equally often."""
    views_per_decode: int = 1
    """Training clips cut out of each decoded video, each with its own window, crop and flip."""
    timeout_s: float = 60
    """Seconds that a worker may take for one video; one that takes longer counts as unreadable."""
    cache: str | None = None
    """Folder on a local disk that keeps files read from URLs for later epochs; null: every epoch reads them again."""
    max_pixels: int = MAX_PIXELS
    """Largest number of pixels in a frame, by default twice that of 8K; a video with more counts as unreadable. See
    --max-pixels of prepare.py."""
    max_fault_fraction: float = 0.05
    """Training stops when more than this share of an epoch's videos, 0 to 1, cannot be read."""


@dataclass
class OptimConfig:
    """The optimizer and its schedule."""

    name: str = "sgd"
    """sgd (Nesterov), adamw or lamb."""
    implementation: str = "auto"
    """auto: torch's fused kernels; for LAMB, Apex's kernels on a GPU if they run, else torch's multi-tensor
    (foreach) functions. apex, fused, foreach: exactly that, or an error."""
    lr: float = 0.0025
    """Learning rate at the end of the warm-up, for the global batch."""
    warmup_start_lr: float = 0.00025
    """Learning rate of the first step."""
    warmup_epochs: float = 2
    """Epochs in which the learning rate rises; 0.5 is half of the first one."""
    final_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    decay_epochs: list[float] = field(default_factory=list)
    """If given, the rate falls to a tenth after each of these epochs instead of following a cosine."""
    momentum: float = 0.9
    """Of sgd."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of the two moments of adamw and lamb."""
    weight_decay: float = 7e-5
    """Not applied to the class token, the position and time embeddings and the head's bias."""
    layer_decay: float = 1.0
    """Factor for the learning rate per layer, from the last norm down to the embeddings; 1: the same rate everywhere.
    For fine-tuning, 0.65 to 0.8 is common."""
    head_lr_factor: float = 1.0
    """Factor for the learning rate of the head. A new head may need more than the pretrained layers."""
    clip_norm: float | None = 40.0
    """Largest norm of all gradients combined; null: no clipping."""
    global_batch_size: int = 64
    """Clips per optimizer step, over all processes."""


@dataclass
class MixConfig:
    """VideoMix: see `training.mixing`."""

    cutmix_prob: float = 0.0
    """Share of micro-batches, 0 to 1, with CutMix; the rest use Mixup."""
    cutmix_alpha: float = 1.0
    """Parameter of CutMix: the share of a clip that is kept is drawn from Beta(alpha, alpha)."""
    mixup_alpha: float = 0.0
    """The same for Mixup; 0: no Mixup."""
    cutmix_box: str = "space"
    """space: rows and columns of all frames, as in the paper; reference: what PaddleVideo's code does."""


@dataclass
class AugmentConfig:
    """Augmentation of training clips on their device, the same in all frames of a clip: see `training.augmentation`."""

    randaugment_ops: int = 0
    """RandAugment: number of random operations per clip; 0: none."""
    randaugment_magnitude: float = 9.0
    """Strength of these operations, 0 to 10."""
    erasing_prob: float = 0.0
    """Random erasing: share of clips, 0 to 1, in which a random box is filled with noise."""


@dataclass
class DistillConfig:
    """Learning from a teacher in addition to the labels: see `training.losses.summed_distillation`."""

    teacher: str | None = None
    """Weights file of train.py with the same classes, crop size, mean and std, and the same number of frames or a
    multiple of it."""
    temperature: float = 3.0
    """Divides the logits of both networks; more than 1 makes the probabilities softer."""
    weight: float = 0.5
    """Weight of the teacher, 0 to 1; the rest is the weight of the labels."""


@dataclass
class TrainConfig:
    """The run: length, precision, starting weights, checkpoints."""

    epochs: int = 20
    """Length of the run, and of the schedule of the learning rate."""
    max_steps: int | None = None
    """Stop after this number of steps; the schedule still spans `epochs`."""
    precision: str = "auto"
    """float32, bf16, fp16 (with dynamic loss scaling); auto: bf16 on a GPU that supports it, otherwise float32; amp
    (same as --amp): bf16, or fp16 on a GPU without it."""
    label_smoothing: float = 0.1
    """Share of each label, 0 to 1, that is spread over all classes."""
    pretrained: str | None = None
    """Initial weights: a file, folder or name on the Hugging Face Hub, see `model.load_pretrained`."""
    freeze_blocks: int = 0
    """Keep the embeddings and this number of first blocks as they are in `pretrained`; 0: train everything;
    `model.depth`: train only the last norm and the head."""
    ema_decay: float | None = None
    """Decay per step of an exponential moving average of the weights, which is written to ema.safetensors; null: none.
    It is shorter in the first steps: min(ema_decay, (1 + n) / (10 + n)) after n steps."""
    swa_epochs: int = 0
    """Number of final epochs whose weights are averaged into swa.safetensors; 0: none."""
    activation_checkpointing: bool = False
    """Activation checkpointing: recompute a block's activations when needed. Saves memory for a third more compute."""
    compile: bool | str = "auto"
    """Use torch.compile. auto: on a GPU with a working compiler, for runs of 1,000 forward passes or more."""
    cuda_graphs: bool = False
    """Launch the compiled network as one CUDA graph."""
    checkpoint_every_steps: int | None = None
    """Steps between checkpoints, in addition to one at the end of every epoch; null: no others."""
    log_every_steps: int = 10
    """Steps between lines of the log."""
    loggers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Where metrics go besides metrics.jsonl: tensorboard, wandb (Weights & Biases), mlflow."""
    validate_every: int = 1
    """Epochs between validations; the last epoch is always validated."""
    best_metric: str = "top1"
    """The metric of the validation that decides which weights become best.safetensors: top1, mean_class_accuracy,
    macro_f1 or loss. Of equal ones, the lower loss wins."""
    early_stopping: int | None = None
    """Stop after this number of validations in a row in which `best_metric` did not improve; null: never."""
    on_nan: str = "stop"
    """What to do if a loss or gradient is not finite: stop, or rollback (to the last checkpoint; the clips of that step
    are then left out). In fp16 such steps are skipped, as long as the loss scale can still fall."""
    hang_timeout_s: float = 600
    """Seconds without progress after which a run of several processes ends, reporting the one that hangs."""


@dataclass
class Config:
    """All settings of a run."""

    name: str = "timesformer"
    """Names the run, and its folder below output/."""
    seed: int = 0
    """Of all random draws: initial weights, order of the videos, crops, mixing."""
    output: str = "output/${name}"
    """Folder for all files that a run writes."""
    device: str = "auto"
    """auto: the GPU if there is one."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


_PATHS = (
    "output",
    "data.train",
    "data.val",
    "data.test",
    "data.labels",
    "data.cache",
    "train.pretrained",
    "distill.teacher",
)
"""Keys whose values are paths (or URLs)."""

_CONFIGS = Path(__file__).parents[1] / "configs"
_HUB_NAME = re.compile(r"[\w-]+/[\w.-]+")  # train.pretrained: a repository on the Hugging Face Hub


def load_config(
    path: str | os.PathLike[str] | None, overrides: Sequence[str] = (), *, defaults: dict[str, Any] | None = None
) -> Config:
    """The settings in file `path` (None: no file) with `KEY=VALUE` overrides, over `defaults`.

    A name without a folder, such as finetune.yaml, also finds the file that comes with this project (configs/).
    Raises `InputError` that names the key and, for an unknown key, the closest known one.
    """
    layers = [("defaults", OmegaConf.create(defaults or {}))]
    if path is not None:
        layers.extend(_read_layers(_find(os.fspath(path))))
    for override in overrides:
        if "=" not in override:
            raise InputError(f"-o {override}: expected KEY=VALUE without spaces, such as -o optim.lr=0.001")
        key, _, value = override.partition("=")
        with _reporting_errors(f"-o {override}"):
            layers.append((f"-o {override}", OmegaConf.from_dotlist([f"{key.strip()}={value}"])))
    merged = OmegaConf.structured(Config)
    for source, layer in layers:
        _check_keys(source, _to_dict(layer), _to_dict(OmegaConf.structured(Config)))
        with _reporting_errors(source):
            merged = OmegaConf.merge(merged, layer)
    with _reporting_errors("the config"):
        config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)  # the structure of `merged`
    _check_values(config)
    return config


def read_run_config(path: Path) -> Config:
    """The config.yaml of a run, found beside its weights.

    The file is not trusted, so it may only contain what train.py writes. Raises `InputError` if it refers to another
    file (`base`) or has interpolations (`${oc.env:HOME}`).
    """
    if "base" in (content := _read_yaml(str(path))):
        raise InputError(f"{path}: refers to another file, which train.py never writes; it is refused")
    if "${" in OmegaConf.to_yaml(content):
        raise InputError(f"{path}: has an interpolation (${{...}}), which train.py never writes; it is refused")
    return load_config(str(path))


def to_yaml(config: Config) -> str:
    """The settings as YAML, with absolute paths, so that the file means the same in any folder."""
    return OmegaConf.to_yaml(OmegaConf.structured(absolute_paths(config)))


def absolute_paths(config: Config) -> Config:
    """A copy of the settings with absolute paths."""
    changed = OmegaConf.to_object(_map_paths(OmegaConf.structured(config), os.path.abspath))
    assert isinstance(changed, Config)  # the structure of `config`
    return changed


def _map_paths(layer: DictConfig, change: Callable[[str], str]) -> DictConfig:
    """A copy of settings with `change` applied to each path in them; URLs, and names on the Hugging Face Hub, which
    look like paths, are kept."""
    layer = copy.deepcopy(layer)
    for key in _PATHS:
        section, _, name = key.rpartition(".")
        values = layer.get(section) if section else layer
        if not isinstance(values, DictConfig) or OmegaConf.is_missing(values, name) or name not in values:
            continue
        value = _to_dict(values)[name]  # before interpolation
        if not isinstance(value, str) or not value or is_url(value) or value.startswith("${"):
            continue
        changed = change(value)
        if key == "train.pretrained" and _HUB_NAME.fullmatch(value) and not os.path.exists(changed):
            continue
        values[name] = changed
    return layer


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """The values of a nested config, keyed by section and key, such as optim.lr."""
    keys = {}
    for name, value in config.items():
        keys.update(
            {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
        )
    return keys


def _to_dict(config: DictConfig) -> dict[Any, Any]:
    content = OmegaConf.to_container(config)
    assert isinstance(content, dict)  # true for every DictConfig
    return content


def _read_layers(path: str) -> list[tuple[str, DictConfig]]:
    """The file, preceded by its `base` (relative to the file's own folder), and so on."""
    layers: list[tuple[str, DictConfig]] = []
    while True:
        if path in [name for name, _ in layers]:
            raise InputError(f"{path}: its `base` leads back to itself")
        content = _to_dict(_read_yaml(path))
        if is_paddle_config(content):
            raise InputError(f"{path}: {about_paddle_config(content)}")
        base = content.pop("base", None)
        folder = Path(path).parent
        layers.insert(0, (path, _map_paths(OmegaConf.create(content), functools.partial(_below, folder))))
        if base is None:
            return layers
        if not isinstance(base, str) or not base.endswith((".yaml", ".yml")):
            raise InputError(f"{path}: base is {base!r}; expected the name of a YAML file, from this one's folder")
        path = os.path.normpath(Path(path).parent / base)


def _find(path: str) -> str:
    shipped = _CONFIGS / path
    return str(shipped) if path == shipped.name and not os.path.lexists(path) and shipped.is_file() else path


def _below(folder: Path, path: str) -> str:
    return os.path.normpath(folder / path)


def _read_yaml(path: str) -> DictConfig:
    if path.endswith(".py"):
        raise InputError(
            f"{path}: a config of mmaction2; expected a YAML file, such as timesformer_k400.yaml (docs/migrate.md)"
        )
    try:
        text = decode(Path(path).read_bytes())
    except FileNotFoundError:
        shipped = ", ".join(sorted(each.name for each in _CONFIGS.glob("*.yaml")))
        raise InputError(f"{path}: no such config; these come with the project: {shipped}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a YAML file, such as configs/small.yaml") from None
    if "\0" in text:
        raise InputError(f"{path}: not a text file; expected YAML")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise InputError(f"{path}: not UTF-8; save the file as UTF-8")
    with _reporting_errors(path):
        content = OmegaConf.create(text or "{}")  # its YAML loader is a safe one
    if not isinstance(content, DictConfig):
        raise InputError(f"{path}: expected `key: value` lines")
    return content


@contextlib.contextmanager
def _reporting_errors(source: str) -> Iterator[None]:
    """Turn errors of YAML and OmegaConf into an `InputError` that names the source and the key."""
    try:
        yield
    except yaml.YAMLError as error:
        hint = " (a tab? indent with spaces)" if "cannot start any token" in str(error) else ""
        raise InputError(f"{source}: not YAML: {error}{hint}") from None
    except UnicodeEncodeError:
        raise InputError(f"{source}: not UTF-8; for such a path, make a link with another name") from None
    except OmegaConfBaseException as error:
        key, problem = getattr(error, "full_key", None), str(error).splitlines()[0].rstrip(".")
        if rule := RULES.get(key or ""):
            about_types = "ListConfig" in problem  # of OmegaConf, which no user knows
            problem = f"expected {rule.expected}" if about_types else f"{problem}; expected {rule.expected}"
        raise InputError(f"{source}: {f'{key}: ' if key else ''}{problem}") from None


def _check_keys(source: str, given: Any, known: dict[Any, Any], prefix: str = "") -> None:
    if not isinstance(given, dict):
        return
    for key, value in given.items():
        if key not in known:
            raise InputError(f"{source}: unknown key {prefix}{str(key)[:80]}{_hint(prefix, str(key), value)}")
        section = known[key]
        if not isinstance(section, dict):
            if isinstance(value, dict):
                raise InputError(f"{source}: {prefix}{key} is not a section; expected {prefix}{key}=VALUE")
            continue
        if not isinstance(value, dict):
            first = f"{prefix}{key}.{next(iter(section))}"
            raise InputError(f"{source}: {prefix}{key} is a section; set a key in it, such as {first}")
        _check_keys(source, value, section, f"{prefix}{key}.")


def _hint(prefix: str, key: str, value: Any) -> str:
    if prefix == "model." and key in ("num_frames", "image_size", "num_classes"):
        return "; it follows from data.num_frames, data.crop_size and the class names"
    return hint_for(prefix, key, value, _known_keys())


def key_like(name: str) -> str | None:
    """The key that `name` means, such as train.epochs for "epochs"; None if none is near."""
    return nearest("", name, _known_keys())


def _known_keys() -> list[str]:
    return list(flat(_to_dict(OmegaConf.structured(Config))))


def _check_values(config: Config) -> None:
    """Raises `InputError` for values that have the right type but cannot work."""
    for key, value in flat(dataclasses.asdict(config)).items():
        check_value(key, value)
    data, model = config.data, config.model
    for holds, message in [
        (data.crop_size % model.patch_size == 0,
         f"data.crop_size is {data.crop_size}; expected a multiple of model.patch_size, {model.patch_size}"),
        (model.embed_dim % model.num_heads == 0,
         f"model.embed_dim is {model.embed_dim}; expected a multiple of model.num_heads, {model.num_heads}"),
        (config.optim.warmup_epochs < config.train.epochs,
         f"optim.warmup_epochs is {config.optim.warmup_epochs:g}; expected less than train.epochs, "
         f"{config.train.epochs}: the learning rate would never reach optim.lr; try -o optim.warmup_epochs=0"),
        (config.train.swa_epochs <= config.train.epochs,
         f"train.swa_epochs is {config.train.swa_epochs}; expected at most train.epochs, {config.train.epochs}"),
        (not config.train.swa_epochs or config.train.ema_decay is None,
         f"train.swa_epochs is {config.train.swa_epochs} and train.ema_decay is {config.train.ema_decay}; only one "
         "average is kept: set train.swa_epochs=0 or train.ema_decay=null"),
        (config.train.freeze_blocks <= model.depth,
         f"train.freeze_blocks is {config.train.freeze_blocks}; expected at most model.depth, {model.depth}"),
        (not config.train.freeze_blocks or config.train.pretrained is not None,
         f"train.freeze_blocks is {config.train.freeze_blocks} without train.pretrained, so random weights would be "
         "frozen; name the weights, or set train.freeze_blocks=0"),
    ]:  # fmt: skip
        if not holds:
            raise InputError(message)


def clip_settings(data: DataConfig, mode: str) -> dict[str, Any]:
    """The arguments of `ClipLoader` that follow from `data`, for its mode "train", "validate" or "test"."""
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
"""Keys of `data` that weights depend on; a weights file stores their values."""


def preprocessing(data: DataConfig) -> dict[str, Any]:
    """The settings `PREPROCESSING` of `data`."""
    return {key: value for key, value in dataclasses.asdict(data).items() if key in PREPROCESSING}


# Limits for a clip and network with sizes from an untrusted file.
_MAX_CLIP_PIXELS = 1 << 25  # 400 MB in float32
_MAX_PATCH_VALUES = 1 << 25  # of all patches of a clip; TimeSformer-L has 19 million
_MAX_ATTENDED = 1 << 15  # patches that attend to each other; time grows with the square


def check_header(model: Any, preprocessing: Any) -> None:
    """Raises `InputError` unless these sections of a weights file's header contain only keys that weights depend on,
    with plain values within bounds. The file is not trusted: it can set nothing else, and nothing is interpolated."""
    for section, values, kind, known in (
        ("model", model, ModelConfig, [each.name for each in dataclasses.fields(ModelConfig)]),
        ("data", preprocessing, DataConfig, PREPROCESSING),
    ):
        if not isinstance(values, dict):
            raise InputError(f"{section} is not an object with keys")
        types = {each.name: each.type for each in dataclasses.fields(kind)}
        for key, value in values.items():
            if key not in known:
                raise InputError(f"{section}.{key[:80]} is not a setting of weights")
            if not _is_of_type(value, types[key]):
                raise InputError(f"{section}.{key} is {str(value)[:80]!r}")
            check_value(f"{section}.{key}", value)
    if missing := [key for key in ("num_frames", "crop_size", "mean", "std") if key not in preprocessing]:
        raise InputError(f"data.{missing[0]} is missing")
    frames, side = preprocessing["num_frames"], preprocessing["crop_size"]
    if frames * side**2 > _MAX_CLIP_PIXELS:
        raise InputError(f"a clip has {frames} x {side} x {side} pixels; expected at most {_MAX_CLIP_PIXELS}")
    network = ModelConfig(**model)
    patches, width = (side // network.patch_size) ** 2, network.embed_dim
    if frames * patches * width > _MAX_PATCH_VALUES:
        raise InputError(
            f"a clip has {frames} x {patches} patches of {width} values; expected at most {_MAX_PATCH_VALUES}"
        )
    attended = ATTENTION_TYPES[network.attention].most_attended(frames, patches)
    if attended > _MAX_ATTENDED:
        raise InputError(f"{attended} patches attend to each other; expected at most {_MAX_ATTENDED}")


def _is_of_type(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        return (type(value) is int and abs(value) < 2**63) or (kind is float and type(value) is float)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of_type(each, get_args(kind)[0]) for each in value)
    return any(_is_of_type(value, each) for each in get_args(kind)) if get_args(kind) else type(value) is kind
