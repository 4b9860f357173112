"""Names of classes, and whether a manifest's labels are among them."""

from collections.abc import Sequence
from pathlib import Path

from dali_pipelines.errors import InputError
from dali_pipelines.manifest import Manifest


def read_labels(path: str) -> tuple[str, ...]:
    """Class names from a text file, one a line; line 1 is label 0."""
    try:
        names = tuple(Path(path).read_text(encoding="utf-8").strip().splitlines())
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file; expected a class name a line") from None
    if not names:
        raise InputError(f"{path}: empty; expected a class name a line")
    return names


def class_names(labels: str | None, manifest: Manifest) -> tuple[str, ...]:
    """From the file `labels`, else from the manifest's header, else numbers up to the largest label."""
    if labels is not None:
        return read_labels(labels)
    return manifest.classes or tuple(str(label) for label in range(int(manifest.labels.max()) + 1))


def check_labels(manifest: Manifest, classes: Sequence[str], *, name: str) -> None:
    """`InputError` where the manifest called `name` speaks of other classes than `classes`."""
    if manifest.classes and manifest.classes != tuple(classes):
        first = next(
            (
                f"class {k} is {a!r} there, {b!r} here"
                for k, (a, b) in enumerate(zip(manifest.classes, classes))
                if a != b
            ),
            f"{len(manifest.classes)} there, {len(classes)} here",
        )
        raise InputError(f"{name}: its classes are not those in use: {first}")
    worst = int(manifest.labels.argmax())
    if manifest.labels[worst] >= len(classes):
        raise InputError(
            f"{name}: {manifest[worst].path} has label {manifest.labels[worst]}, but there are {len(classes)} classes "
            f"(0 to {len(classes) - 1})"
        )
