"""Weights as a folder for transformers' `TimesformerForVideoClassification.from_pretrained`, with a model card."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from common.weights import Weights
from dali_pipelines.crops import VALIDATION_SCALE
from dali_pipelines.errors import InputError
from model import TimeSformer
from model.pretrained import to_hugging_face
from model.timesformer import LAYER_NORM_EPS
from model.torchvision import let_torchvision_load
from serving.export import Clips, MismatchError, check, verified

_TEXT = {"encoding": "utf-8", "errors": "backslashreplace"}  # names of classes need not be UTF-8; JSON reads them again


def export_hugging_face(folder: Path, weights: Weights, clips: Clips, *, results: Path | None = None) -> str:
    """Writes the folder and compares it in transformers, where that is installed; what was found, in words.

    results: a JSON file of an evaluation, whose numbers go into the model card. Raises `InputError` for a folder that
    holds something and for a network that theirs is not, and `MismatchError`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--out {folder}: is there already; name a new folder")
    if weights.model.get("attention") == "space_only":
        raise InputError(
            "model.attention is space_only: transformers' TimeSformer gives logits for every frame then, and no mean "
            "over them; expected divided_space_time or joint_space_time"
        )
    with verified(folder) as unverified:
        unverified.mkdir()
        network = weights.build()
        state = {to_hugging_face(name): value for name, value in network.state_dict().items()}
        (unverified / "model.safetensors").write_bytes(safetensors.torch.save(state, {"format": "pt"}))
        for name, content in (
            ("config.json", _config(network, weights)),
            ("preprocessor_config.json", _processor(weights)),
        ):
            (unverified / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", **_TEXT)
        (unverified / "README.md").write_text(
            _card(folder.resolve().name, network.attention, weights, results), **_TEXT
        )
        found = _check(unverified, weights, clips)
    return f"{found}\nsaved to {folder}: a folder for TimesformerForVideoClassification.from_pretrained"


def _check(folder: Path, weights: Weights, clips: Clips) -> str:
    let_torchvision_load()
    try:
        from transformers import TimesformerForVideoClassification
        from transformers.utils import logging
    except ImportError as error:
        return f"NOT VERIFIED: transformers cannot be imported ({error}): pip install transformers, and export anew"
    logging.disable_progress_bar()
    network, info = TimesformerForVideoClassification.from_pretrained(folder, output_loading_info=True)
    logging.enable_progress_bar()
    strange = {key: value for key, value in info.items() if value}
    if strange:
        raise MismatchError(f"transformers opens {folder} with {strange}")
    network.eval()

    def run(inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            return network(inputs.transpose(1, 2)).logits

    return check(weights, run, clips, runtime="transformers")


def _config(network: TimeSformer, weights: Weights) -> dict[str, Any]:
    names = weights.classes
    return {
        "architectures": ["TimesformerForVideoClassification"],
        "model_type": "timesformer",
        "image_size": weights.preprocessing["crop_size"],
        "patch_size": network.patch_embed.patch_size,
        "num_channels": 3,
        "num_frames": weights.preprocessing["num_frames"],
        "hidden_size": network.norm.normalized_shape[0],
        "num_hidden_layers": len(network.blocks),
        "num_attention_heads": network.blocks[0].attn.num_heads,
        "intermediate_size": network.blocks[0].mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
        "qkv_bias": network.blocks[0].attn.qkv.bias is not None,
        "attention_type": network.attention,
        "drop_path_rate": 0,  # theirs must be an integer; it matters in training only
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
        "dtype": "float32",
    }


def _processor(weights: Weights) -> dict[str, Any]:
    """The centre crop of our validation: theirs cannot take three."""
    data = weights.preprocessing
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": _short_side(data)},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": data["crop_size"], "width": data["crop_size"]},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": data["mean"],
        "image_std": data["std"],
    }


def _short_side(data: dict[str, Any]) -> int:
    """Pixels, as in validation."""
    return data["short_side"][0] if data.get("short_side") else round(data["crop_size"] * VALIDATION_SCALE)


def _card(name: str, attention: str, weights: Weights, results: Path | None) -> str:
    data, attention = weights.preprocessing, attention.replace("_", " ")
    window = (
        "the whole video"
        if data.get("stride") is None
        else f"{data['stride'] * data['num_frames'] / data.get('target_fps', 30):.3g} seconds from the start"
    )
    classes = "\n".join(f"{label}. {each}" for label, each in enumerate(weights.classes))
    crop = data["crop_size"]
    return f"""\
---
license: apache-2.0
library_name: transformers
pipeline_tag: video-classification
tags:
- timesformer
- video-classification
---

# {name}

A TimeSformer ({attention} attention) that tells {len(weights.classes)} classes of videos apart, trained by a system for
video classifiers around NVIDIA DALI and exported by its `export.py --format huggingface`.

## Preprocessing

{data["num_frames"]} frames, equally spaced over {window}. The short side is resized to {_short_side(data)} pixels
(bilinear, without antialiasing), and the middle {crop} x {crop} pixels are taken. Values are divided by 255; then the
mean {data["mean"]} is subtracted, and what is left is divided by {data["std"]}.

An evaluation takes three crops instead: short side {crop} pixels, and of the long side the beginning, the middle and
the end; the mean of their probabilities counts.

`preprocessor_config.json` says the same as far as it can: transformers' processor resizes with antialiasing, and takes
the frames that it is given.

```python
import av
import numpy as np
import torch
from transformers import AutoImageProcessor, TimesformerForVideoClassification

model = TimesformerForVideoClassification.from_pretrained("{name}")
processor = AutoImageProcessor.from_pretrained("{name}")

with av.open("video.mp4") as container:
    frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
chosen = np.linspace(0, len(frames) - 1, model.config.num_frames).astype(int)  # over the whole video
inputs = processor([frames[number] for number in chosen], return_tensors="pt")
with torch.inference_mode():
    label = model(**inputs).logits.argmax(1).item()
print(model.config.id2label[label])
```
{_accuracy(results)}
## Classes

{classes}

## License

Apache-2.0, as the system that trained it. The videos that it learned from have licenses of their own.
"""


def _accuracy(results: Path | None) -> str:
    """The numbers and short words at the top of an evaluation's results.json."""
    if results is None or not results.is_file():
        return ""
    try:
        content = json.loads(results.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{results}: not JSON; move it away, or evaluate again") from None
    items = content.items() if isinstance(content, dict) else []
    rows = [
        f"| {key} | {round(value, 4) if isinstance(value, float) else value} |"
        for key, value in items
        if isinstance(value, int | float | str) and len(str(value)) <= 80
    ]
    return "\n## Evaluation\n\n| | |\n| --- | --- |\n" + "\n".join(rows) + "\n" if rows else ""
