"""Manifests that a config names, the names of classes, and whether the two fit."""

from collections.abc import Sequence
from pathlib import Path

from dali_pipelines.errors import InputError
from dali_pipelines.manifest import Manifest

_MOST_UNNAMED = 10_000  # classes without names: beyond that, a label is a mistake


def read_manifest(path: str | None, *, key: str) -> Manifest:
    """The manifest that a config names under `key`; refuses none, and one without videos."""
    if path is None:
        raise InputError(f"{key} is not set: name a manifest with -o {key}=FILE; prepare.py makes one")
    manifest = Manifest.read(path)
    if not len(manifest):
        raise InputError(f"{path}: no videos in it")
    return manifest


def read_labels(path: str) -> tuple[str, ...]:
    """Class names from a text file, one a line; line 1 is label 0."""
    try:
        names = tuple(Path(path).read_text(encoding="utf-8-sig").strip().splitlines())
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file; expected a class name a line") from None
    if not names:
        raise InputError(f"{path}: empty; expected a class name a line")
    return names


def class_names(labels: str | None, manifest: Manifest) -> tuple[str, ...]:
    """From the file `labels`, else from the manifest's header, else numbers up to the largest label."""
    if labels is not None:
        return read_labels(labels)
    largest = int(manifest.labels.max())
    if not manifest.classes and largest >= _MOST_UNNAMED:
        raise InputError(
            f"label {largest} stands in a manifest without class names; name them in a file: -o data.labels=FILE"
        )
    return manifest.classes or tuple(map(str, range(largest + 1)))


def check_labels(manifest: Manifest, classes: Sequence[str], *, name: str, renamed: bool = False) -> None:
    """`InputError` where the manifest called `name` speaks of other classes than `classes`.

    Its own names are not compared where they were `renamed` (data.labels), or where `classes` are mere numbers.
    """
    unnamed = tuple(classes) == tuple(map(str, range(len(classes))))
    if manifest.classes and not renamed and manifest.classes != tuple(classes):
        pairs = enumerate(zip(manifest.classes, classes, strict=False))
        different = [f"class {k} is {there!r} there, {here!r} here" for k, (there, here) in pairs if there != here]
        if len(manifest.classes) != len(classes):
            different = [f"{len(manifest.classes)} there, {len(classes)} here"]
        if len(manifest.classes) != len(classes) or not unnamed:
            raise InputError(
                f"{name}: its classes are not those in use: {different[0]}; mend the line `# classes:` in it"
            )
    worst = int(manifest.labels.argmax())
    if manifest.labels[worst] >= len(classes):
        raise InputError(
            f"{name}: {manifest[worst].path} has label {manifest.labels[worst]}, but there are {len(classes)} classes "
            f"(0 to {len(classes) - 1})"
        )
