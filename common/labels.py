"""Class names, the manifests of a config, and checks that they fit together."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dali_pipelines.errors import InputError
from dali_pipelines.folders import is_video_name
from dali_pipelines.manifest import Manifest
from dali_pipelines.text import decode, split_lines

_MAX_UNNAMED = 10_000  # classes without names: a larger label is a mistake
_EXPECTED = "expected one class name per line, label 0 first; or lines `0 name`, JSON, or a manifest"
_NUMBERED = (
    re.compile(r"(?P<label>\d+)[ \t]*[,;:.)\t ][ \t]*(?P<name>.*[^ \t])"),  # 0 archery; 0,archery
    re.compile(r"(?P<name>.*[^ \t,;:])[ \t]*[,;\t][ \t]*(?P<label>\d+)"),  # archery,0
    re.compile(r"(?P<name>.*[^ \t,;:]) (?P<label>\d+)"),  # archery 0; but a class may be called "level 0"
)
_COLUMNS = """
    id idx index label labels class classes name names category action text description label_id class_id category_id
    class_idx class_index label_name class_name classname category_name display_name path file filename video video_id
    youtube_id time_start time_end start end split is_cc frames num_frames fps width height codec
"""


def read_manifest(path: str | None, *, key: str) -> Manifest:
    """The manifest at `path`, the value of `key` in a config. Raises `InputError` for None, and if it has no videos."""
    if path is None:
        raise InputError(f"{key} is not set: name a manifest with -o {key}=FILE; prepare.py makes one")
    if key.startswith("data.") and not Path(path).exists():
        raise InputError(f"{path}: no such manifest; name yours with -o {key}=FILE; prepare.py makes one")
    manifest = Manifest.read(path)
    if not len(manifest):
        raise InputError(f"{path}: no videos in it")
    return manifest


def read_labels(path: str) -> tuple[str, ...]:
    """Class names from a text file, one per line; line 1 is label 0.

    Also reads a manifest, a JSON list, a JSON object of names and labels, and lines with a name and its label. Raises
    `InputError`, which says what was found, for any other file, and if labels are not 0, 1, 2, ...
    """
    text = decode(Path(path).read_bytes())
    if "\0" in text:
        raise InputError(f"{path}: not a text file; {_EXPECTED}")
    lines = [line.strip(" \t") for line in split_lines(text)]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise InputError(f"{path}: empty; {_EXPECTED}")
    for number, line in enumerate(lines, start=1):
        if not line.isascii() and re.search("[\ud800-\udfff]", line):
            raise InputError(f"{path}:{number}: not UTF-8: {line[:80]!r}; save the file as UTF-8")
    if lines[0].startswith(("# root:", "# classes:", "path,label,frames")):
        names = Manifest.read(path).classes
        if not names:
            raise InputError(f"{path}: a manifest without class names; {_EXPECTED}")
        return names
    if lines[0][0:1] in ("[", "{") and (json_names := _from_json(path, text)):
        return json_names
    if re.match(r"<(!doctype|html|\?xml)", lines[0], re.IGNORECASE):
        raise InputError(f"{path}: a web page or XML; {_EXPECTED}")
    if is_video_name(re.sub(r"[ \t,;]+\d+$", "", lines[0])):
        raise InputError(f"{path}: a list of videos, such as {lines[0][:80]!r}; {_EXPECTED}")
    names = _from_numbered(path, lines) or tuple(lines)
    if "" in names:
        raise InputError(f"{path}:{names.index('') + 1}: an empty line, which would be a class; remove it")
    if all(re.match(r"- |\w+ *: *$|item *\{|[\w ]+\{", name) for name in names[:1]) and len(names) > 1:
        raise InputError(f"{path}: YAML or another format, with lines such as {lines[0][:80]!r}; {_EXPECTED}")
    return names


def _from_json(path: str, text: str) -> tuple[str, ...] | None:
    """Class names in a JSON text; None for names in brackets, which are not JSON."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if re.match(r"\s*(\[\s*[\n'\"\d{]|\{\s*[\n'\"])", text):
            raise InputError(f"{path}: begins like JSON, but is not ({error}); {_EXPECTED}") from None
        return None
    if isinstance(content, list) and content and all(isinstance(name, str) for name in content):
        return tuple(content)
    if isinstance(content, dict) and content:
        # {"0": "archery"}, {"archery": 0}, or {"archery": "0"} as in Something-Something V2
        by_label = all(isinstance(value, str) for value in content.values()) and all(map(str.isdecimal, content))
        pairs = [(key, value) if by_label else (value, key) for key, value in content.items()]
        if all(type(label) is int or (isinstance(label, str) and label.isdecimal()) for label, _ in pairs):
            return _in_order(path, [(int(label), name.strip('"')) for label, name in pairs])
    raise InputError(f"{path}: JSON that is neither a list of names nor an object of names and labels; {_EXPECTED}")


def _from_numbered(path: str, lines: Sequence[str]) -> tuple[str, ...] | None:
    """Class names from lines with labels; None if the lines hold only names."""
    cells = re.split(r"[,;\t]", lines[0].lower())
    is_table = len(cells) > 1
    columns = [cell.strip(' "') for cell in (cells if is_table else lines[0].lower().split())]
    has_header = len(columns) > 1 and len(lines) > 1 and set(columns) <= set(_COLUMNS.split())
    rows = lines[has_header:] if len(columns) == 2 else lines
    for pattern in _NUMBERED:
        found = [match for line in rows if (match := pattern.fullmatch(line))]
        if len(found) < len(rows):
            continue
        pairs = [(int(match["label"]), match["name"]) for match in found]
        labels, names = {label for label, _ in pairs}, {name for _, name in pairs}
        # "class 0", "class 1"; "100 m run", "100 m walk"
        is_plain = len(names) < len(pairs) or len(labels) < len(pairs)
        if pattern is _NUMBERED[-1]:
            is_plain = is_plain or labels != set(range(len(pairs))) or len(pairs) == 1
        if not is_plain:
            if is_table:
                pairs = [(label, re.sub(r'^"(.*)"$', r"\1", name).replace('""', '"')) for label, name in pairs]
            return _in_order(path, pairs)
    if has_header and is_table:
        raise InputError(f"{path}: a table with the columns {', '.join(columns)}; {_EXPECTED}")
    return None


def _in_order(path: str, pairs: Iterable[tuple[int, str]]) -> tuple[str, ...]:
    pairs = sorted(pairs)
    for expected, (label, name) in enumerate(pairs):
        if label != expected:
            raise InputError(
                f"{path}: gives {name!r} the label {label}; expected the labels 0 to {len(pairs) - 1}, each once. If "
                "the numbers belong to the names, write these as a JSON list"
            )
    return tuple(name for _, name in pairs)


def class_names(labels: str | None, manifest: Manifest) -> tuple[str, ...]:
    """Class names from the file `labels`, else from the manifest's header, else the numbers up to the largest label."""
    if labels is not None:
        return read_labels(labels)
    largest = int(manifest.labels.max())
    if not manifest.classes and largest >= _MAX_UNNAMED:
        raise InputError(
            f"a manifest without class names has label {largest}; name the classes in a file: -o data.labels=FILE"
        )
    return manifest.classes or tuple(map(str, range(largest + 1)))


def check_labels(manifest: Manifest, classes: Sequence[str], *, name: str, of: str, renamed: bool = False) -> None:
    """Raises `InputError` if the manifest `name` has classes other than `classes`, or a label beyond them.

    of: the source of `classes`, for the message. renamed: whether they come from `data.labels`; the manifest's names
    may then be fewer and spelled differently, but may not belong to other labels. `classes` that are only numbers are
    not compared.
    """
    theirs, classes = manifest.classes, tuple(classes)
    unnamed = classes == tuple(map(str, range(len(classes))))
    different = ""
    if len(theirs) > len(classes) or (theirs and not renamed and len(theirs) < len(classes)):
        different = f"{len(theirs)} there, {len(classes)} here"
        different += f"; does {of} lack names?" if renamed else ""
    elif theirs and not unnamed:
        moved = (k for k, each in enumerate(theirs) if each != classes[k] and (not renamed or each in classes))
        if (first := next(moved, None)) is not None:
            different = f"class {first} is {theirs[first]!r} there, {classes[first]!r} here"
    if different and not (renamed or unnamed) and not {*theirs} & {*classes}:
        raise InputError(
            f"{name}: has other classes than {of} ({', '.join(theirs[:3])}, ... there; {', '.join(classes[:3])}, ... "
            f"here): a different task. Name a manifest of the same task, or train on this one first"
        )
    if different:
        raise InputError(
            f"{name}: its classes are not those of {of}: {different}. Its labels refer to its own classes, so editing "
            "its line `# classes:` would give videos wrong labels: index it again, with prepare.py folder|index "
            "--classes FROM (the training manifest, or a file of its class names)"
        )
    worst = int(manifest.labels.argmax())
    if manifest.labels[worst] >= len(classes):
        raise InputError(
            f"{name}: {manifest[worst].path} has label {manifest.labels[worst]}, but there are {len(classes)} classes "
            f"(0 to {len(classes) - 1}) in {of}"
        )


def shows_top5(classes: Sequence[str]) -> bool:
    """Whether the top-5 accuracy says anything: with five classes or fewer it is always 1."""
    return len(classes) > 5
