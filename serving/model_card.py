"""The model card of a Hugging Face folder, with the numbers of the weights' evaluation."""

from pathlib import Path
from typing import Any

from common.labels import shows_top5
from common.weights import Weights
from dali_pipelines.crops import VALIDATION_SCALE
from evaluation.evaluate import weights_sha256
from evaluation.result_files import SUMMARY, read_summary, results_folder
from evaluation.results import Summary


def evaluation_of(source: str, weights: Weights) -> Summary | None:
    """Reads the summary that evaluate.py wrote for the weights `source` into its default folder. None if there is none,
    or if it is for other weights, an ensemble, or clips of another length. Raises `InputError` if results.json
    cannot be read."""
    file = results_folder(source) / SUMMARY
    if not file.is_file():
        return None
    summary = read_summary(file)
    evaluated = [each["sha256"] for each in summary["weights"]]
    same_clips = summary["config"]["data"]["num_frames"] == weights.preprocessing["num_frames"]
    return summary if same_clips and evaluated == [weights_sha256(source, weights)] else None


def short_side(preprocessing: dict[str, Any]) -> int:
    """The short side in pixels before the centre crop, as in validation."""
    if preprocessing.get("short_side"):
        return preprocessing["short_side"][0]
    return round(preprocessing["crop_size"] * VALIDATION_SCALE)


def model_card(
    name: str, weights: Weights, evaluation: Summary | None, *, attention: str, licence: str | None = None
) -> str:
    """The README.md of the model `name` (a folder, or a repository on the Hub), in Markdown. `licence` is one of the
    Hub's identifiers, such as apache-2.0; None: the card says that no licence is named."""
    data = weights.preprocessing
    window = (
        "the whole video"
        if data.get("stride") is None
        else f"{data['stride'] * data['num_frames'] / data.get('target_fps', 30):.3g} seconds from the start"
    )
    classes = "\n".join(f"{label}. {each}" for label, each in enumerate(weights.classes))
    crop, newline = data["crop_size"], "\n"
    licence_text = "No licence is named: ask the author before you use this model." if licence is None else licence
    return f"""\
---
{f"license: {licence}{newline}" if licence else ""}library_name: transformers
pipeline_tag: video-classification
tags:
- timesformer
- video-classification
---

# {name}

A TimeSformer ({attention.replace("_", " ")} attention) that classifies videos into {len(weights.classes)} classes,
trained with TimeSformer on DALI and exported by its `export.py --format huggingface`.

## Preprocessing

{data["num_frames"]} frames, equally spaced over {window}. The short side is resized to {short_side(data)} pixels
(bilinear, without antialiasing), then cropped to the middle {crop} x {crop} pixels. Values are divided by 255, then
normalised with mean {data["mean"]} and standard deviation {data["std"]}.

The evaluation takes three crops instead: the short side is {crop} pixels, the crops are at the start, middle and end
of the long side, and their probabilities are averaged.

`preprocessor_config.json` matches this as far as possible: transformers' processor resizes with antialiasing, and
does not choose frames.

```python
import sys

import av
import numpy as np
import torch

try:
    import torchvision
except (ImportError, RuntimeError):  # missing, or built for another torch (a CUDA build beside a CPU build)
    sys.modules["torchvision"] = None  # transformers then uses Pillow instead

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
{_evaluation_table(evaluation)}
## Classes

{classes}

## Licence

{licence_text}

The code that trained it is under Apache-2.0. The training videos have their own licences.
"""


def _evaluation_table(evaluation: Summary | None) -> str:
    """The data, the protocol, and the numbers and short texts of results.json as a table."""
    if evaluation is None:
        return "\n## Evaluation\n\nNot evaluated.\n"
    manifest = evaluation["manifest"]
    average = {"prob": "probabilities", "score": "scores"}.get(evaluation["average"], evaluation["average"])
    data = (
        f"{evaluation['expected']} videos of the manifest {Path(manifest['path']).name} (SHA-256 "
        f"{manifest['sha256'][:12]}), of which {evaluation['failed']} could not be read and count as wrong. "
        f"Each video: {evaluation['windows']} x {evaluation['crops']} clips (windows x crops), the mean of their "
        f"{average}."
    )
    rows = [
        f"| {key} | {round(value, 4) if isinstance(value, float) else value} |"
        for key, value in evaluation.items()
        if isinstance(value, int | float | str)
        and len(str(value)) <= 80
        and (key != "top5" or shows_top5(evaluation["classes"]))
    ]
    return f"\n## Evaluation\n\n{data}\n\n| | |\n| --- | --- |\n" + "\n".join(rows) + "\n"
