"""Class names in every form that people keep them in, and manifests that count other classes."""

import json

import pytest

from common.labels import check_labels, read_labels
from dali_pipelines import InputError, Manifest
from dali_pipelines.manifest import Video

ROW = Video("a.mp4", 0, 8, 25.0, 48, 32, "h264", 0)


@pytest.fixture
def read(tmp_path):
    def read(content: str | bytes) -> tuple[str, ...]:
        (tmp_path / "names.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_labels(str(tmp_path / "names.txt"))

    return read


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_lines_end_at_line_feeds_only(read, mark):
    assert read(f"first{mark}half\n{mark}second{mark}\n") == (f"first{mark}half", f"{mark}second{mark}")


@pytest.mark.parametrize(
    "content",
    [
        "ash\nbirch, red\n",
        "ash\r\nbirch, red\r\n\r\n",
        b"\xef\xbb\xbfash\nbirch, red",
        "ash\nbirch, red\n".encode("utf-16"),
        "0 ash\n1 birch, red\n",
        "1 birch, red\n0 ash\n",  # in no order
        "0: ash\n1: birch, red\n",
        "0\tash\n1\tbirch, red\n",
        'id,name\n0,ash\n1,"birch, red"\n',
        'name,id\n"birch, red",1\nash,0\n',
        "id name\n0 ash\n1 birch, red\n",
        "ash 0\nbirch, red 1\n",
        '["ash", "birch, red"]',
        '{"birch, red": 1, "ash": 0}',
        '{"0": "ash", "1": "birch, red"}',
        '{"ash": "0", "birch, red": "1"}',
        '# root: .\n# classes: ["ash", "birch, red"]\npath,label,frames,fps,width,height,codec,rotation\n',
    ],
)
def test_forms_that_are_understood(read, content):
    assert read(content) == ("ash", "birch, red")


@pytest.mark.parametrize(
    "names",
    [
        ("level 0", "level 1"),
        ("100 m run", "100 m walk"),
        ("catch 22", "take 5"),
        ("[idle]", "[walk]"),
        ("0", "1", "2"),
        ("cedar, Lebanese", "oak, red"),
        ("3 point shot", "dunk"),
    ],
)
def test_names_that_look_like_another_form_stay_names(read, names):
    assert read("\n".join(names) + "\n") == names


@pytest.mark.parametrize(
    "content, message",
    [
        ("1 ash\n2 birch\n", "'ash' the label 1; expected the labels 0 to 1"),
        ("0 ash\n2 birch\n", "'birch' the label 2"),
        ('{"ash": 1, "birch": 2}', "'ash' the label 1"),
        ('[{"id": 0, "name": "ash"}]', "JSON that is neither"),
        ('{"id2label": {"0": "ash"}}', "JSON that is neither"),
        ('{"id": 0}\n{"id": 1}\n', "begins like JSON"),
        ("['ash', 'birch']", "begins like JSON"),
        (
            "label,youtube_id,time_start,time_end,split\nash,abc,1,11,train\n",
            "a table with the columns label, youtube_id",
        ),
        ("x/a.mp4 0\nx/b.mp4 1\n", "a list of videos, such as 'x/a.mp4 0'"),
        ("- ash\n- birch\n", "YAML or another format"),
        ("names:\n  0: ash\n", "YAML or another format"),
        ("<!DOCTYPE html>\n", "a web page"),
        (
            "# root: .\n# classes: []\npath,label,frames,fps,width,height,codec,rotation\n",
            "manifest without class names",
        ),
        ("ash\n\nbirch\n", ":2: an empty line"),
        (b"ash\ncaf\xe9\n", ":2: not UTF-8"),
        ("ash\0birch\0", "not a text file"),
        ("\n", "empty"),
    ],
)
def test_other_files_are_refused_and_what_was_found_is_said(read, content, message):
    with pytest.raises(InputError, match=message):
        read(content)


def manifest(*classes: str, label: int = 0) -> Manifest:
    return Manifest([ROW._replace(label=label)], classes=classes)


@pytest.mark.parametrize(
    "theirs, ours, renamed, message",
    [
        (("b", "c"), ("a", "b", "c"), False, "2 there, 3 here"),
        (("b", "c"), ("a", "b", "c"), True, "class 0 is 'b' there, 'a' here"),
        (("b", "c"), ("d", "e", "f"), True, None),
        (("b", "c"), ("b",), True, "2 there, 1 here; does t.csv lack names"),
        (("b", "a"), ("a", "b"), False, "class 0 is 'b' there, 'a' here"),
        (("b", "a"), ("a", "b"), True, "class 0 is 'b' there, 'a' here"),
        (("x", "b"), ("a", "b"), False, "class 0 is 'x'"),
        (("x", "y"), ("a", "b"), True, None),
        (("a", "b"), ("0", "1"), False, None),
        ((), ("a", "b"), False, None),
    ],
)
def test_labels_that_would_mean_other_classes(theirs, ours, renamed, message):
    arguments = {"name": "v.csv", "of": "t.csv", "renamed": renamed}
    if message is None:
        check_labels(manifest(*theirs), ours, **arguments)
        return
    with pytest.raises(InputError, match=f"v.csv: its classes are not those of t.csv: {message}") as error:
        check_labels(manifest(*theirs), ours, **arguments)
    assert "prepare.py folder|index --classes FROM" in str(error.value) and "mend" not in str(error.value)


def test_classes_of_another_task():
    """Nothing in the manifest is wrong: it belongs to another task."""
    with pytest.raises(InputError, match=r"v.csv: has other classes than t.csv \(x, y, z, ... there; a, b, ... here\)"):
        check_labels(manifest("x", "y", "z"), ("a", "b"), name="v.csv", of="t.csv")


def test_names_in_json_may_hold_anything(read):
    names = ["a\nb", "c\u2028d", ""]
    assert read(json.dumps(names)) == tuple(names)
