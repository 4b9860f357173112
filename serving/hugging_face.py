"""Exports weights as a folder for transformers' `TimesformerForVideoClassification.from_pretrained`."""

import json
import shlex
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from common.weights import Weights
from dali_pipelines.errors import InputError
from evaluation.results import Summary
from model import TimeSformer
from model.pretrained import to_hugging_face
from model.timesformer import LAYER_NORM_EPS
from model.torchvision import let_torchvision_load
from serving.model_card import model_card, short_side
from serving.verification import Clips, MismatchError, compare_with_original, verified


def export_hugging_face(
    folder: Path,
    weights: Weights,
    clips: Clips,
    *,
    evaluation: Summary | None = None,
    name: str | None = None,
    licence: str | None = None,
) -> str:
    """Writes the folder, and compares it in transformers if that is installed; returns the result to print.

    evaluation, name, licence: for the model card; the default name is the folder's. Raises `InputError` if the folder
    is not empty or if transformers has no such network, and `MismatchError`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--out {folder}: already exists; name a new folder")
    if weights.model.get("attention") == "space_only":
        raise InputError(
            "model.attention is space_only: transformers' TimeSformer then returns the logits of every frame, not "
            "their mean; expected divided_space_time or joint_space_time"
        )
    with verified(folder) as unverified:
        unverified.mkdir()
        network = weights.build()
        state = {to_hugging_face(name): value for name, value in network.state_dict().items()}
        (unverified / "model.safetensors").write_bytes(safetensors.torch.save(state, {"format": "pt"}))
        _write_json(unverified / "config.json", _config(network, weights))
        _write_json(unverified / "preprocessor_config.json", _processor(weights))
        name = name or folder.resolve().name
        card = model_card(name, weights, evaluation, attention=network.attention, licence=licence)
        _write_text(unverified / "README.md", card)
        result = _compare(unverified, weights, clips)
    numbers = "without accuracies: evaluate.py has not evaluated these weights"
    if evaluation is not None:
        numbers = f"with {evaluation['protocol']} {evaluation['top1']:.4f}"
    return (
        f"{result}\nmodel card {numbers}\n"
        f"saved to {folder}: a folder for TimesformerForVideoClassification.from_pretrained"
    )


def require_hub(name: str) -> None:
    """Checks what can be known before the Hub is asked. Raises `InputError` if huggingface_hub is not installed, nobody
    has logged in, or `name` cannot be a repository."""
    try:
        from huggingface_hub import get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
    except ImportError:
        raise InputError("--push-to-hub needs huggingface_hub: pip install huggingface_hub") from None
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub {name}: expected NAME or USER/NAME ({error})") from None
    if get_token() is None:
        raise InputError("--push-to-hub: not logged in to the Hugging Face Hub; type `hf auth login` first")


def push_to_hub(folder: Path, name: str) -> str:
    """Uploads the folder to the repository `name` on the Hugging Face Hub, which is created as a private one if it does
    not exist; returns the result to print. Raises `InputError` if the Hub refuses."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Upload from export.py")
    except Exception as error:  # also those of its HTTP client
        reason = getattr(error, "server_message", None) or str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"--push-to-hub {name}: {reason}; the export is in {folder}. When `hf auth whoami` prints your name, "
            f"upload it: hf upload {name} {shlex.quote(str(folder))} --private"
        ) from None
    return f"pushed to {url} (a new repository is private; its settings make it public)"


def _write_text(path: Path, text: str) -> None:
    # Class names need not be UTF-8; JSON reads the escapes back.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _compare(folder: Path, weights: Weights, clips: Clips) -> str:
    let_torchvision_load()
    try:
        from transformers import TimesformerForVideoClassification
        from transformers.utils import logging
    except ImportError as error:
        return f"NOT VERIFIED: transformers cannot be imported ({error}): pip install transformers, and export again"
    logging.disable_progress_bar()
    loaded: Any = TimesformerForVideoClassification.from_pretrained(folder, output_loading_info=True)
    logging.enable_progress_bar()
    network, info = loaded
    unexpected = {key: value for key, value in info.items() if value}
    if unexpected:
        raise MismatchError(f"transformers opens {folder} with {unexpected}")
    network.eval()

    def run(inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            return network(inputs.transpose(1, 2)).logits

    return compare_with_original(weights, run, clips, runtime="transformers")


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
        "num_attention_heads": network.num_heads,
        "intermediate_size": network.state_dict()["blocks.0.mlp.fc1.weight"].shape[0],
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
        "qkv_bias": "blocks.0.attn.qkv.bias" in network.state_dict(),
        "attention_type": network.attention,
        "drop_path_rate": 0,  # transformers accepts only integers; only training uses it
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
        "dtype": "float32",
    }


def _processor(weights: Weights) -> dict[str, Any]:
    """The processor for validation's centre crop; transformers' cannot take three crops."""
    data = weights.preprocessing
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": short_side(data)},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": data["crop_size"], "width": data["crop_size"]},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": data["mean"],
        "image_std": data["std"],
    }
