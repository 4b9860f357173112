"""Names of every kind: in all the CSV that is written, and on a terminal."""

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from common.command_line import run_command
from common.distributed import start_process
from dali_pipelines.batches import Fault
from dali_pipelines.errors import InputError
from dali_pipelines.manifest import Manifest, Video
from dali_pipelines.text import ForPeople, cell_text, csv_writer, for_data
from evaluation.result_files import read_results, write_results
from evaluation.results import make_results
from preparation.index import Rejected, write_rejected
from serving.formats import csv_columns, csv_rows
from serving.prediction import Unreadable
from tests.evaluation import facts_of
from training.faults import FaultLog

ODD = "\n\r\t,;'\"=+-@# \\\x1b\x85\u2028\udcffa."
NAMES = st.text(st.sampled_from(ODD) | st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1)
every_name = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FORMULAS = (
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "'=1",
    "''-1",
    "'plain",
    " =1",
    "\u3000 -1",
    "\n=1",
    "\uff1d1",
)


def rows_of(path: Path) -> list[list[str]]:
    """As Python reads it, strictly; no cell is a formula."""
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    assert len({len(row) for row in rows}) == 1
    assert not any(cell[:1] in ("=", "+", "-", "@", "\t", "\r") for row in rows for cell in row if cell)
    by_pandas(path, rows)
    return [[cell_text(cell) for cell in row] for row in rows]


def by_pandas(path: Path, rows: list[list[str]]) -> None:
    try:
        import pandas
    except ImportError:
        return
    settings = dict(header=None, dtype=str, keep_default_na=False, encoding_errors="surrogateescape")
    assert pandas.read_csv(path, **settings).to_numpy().tolist() == rows


@pytest.mark.slow
@every_name
@given(names=st.lists(NAMES, min_size=1, max_size=4), root=NAMES)
@example(names=list(FORMULAS), root="a\nb")
@example(names=["x\r", "\r", "\n"], root="archery\r")
@example(names=["a"], root='"quoted"')
def test_manifests_are_read_back(tmp_path, names, root):
    videos = [Video(name, n, 10, 30.0, 64, 48, "h264", 0) for n, name in enumerate(names)]
    shards = [video._replace(shard=name, size=1) for video, name in zip(videos, reversed(names))]
    for rows in (videos, shards):
        written = Manifest(rows, root=f"/{root}", classes=names)
        written.write(tmp_path / "m.csv")
        read = Manifest.read(tmp_path / "m.csv")
        assert [read[n] for n in range(len(read))] == rows and read.classes == tuple(names)
        assert read.root == written.root and read.checksum() == written.checksum()
        body = (tmp_path / "m.csv").read_bytes().partition(b"\npath,")[2]
        (tmp_path / "body.csv").write_bytes(b"path," + body)
        assert [row[0] for row in rows_of(tmp_path / "body.csv")[1:]] == names


@pytest.mark.slow
@every_name
@given(names=st.lists(NAMES, min_size=2, max_size=4, unique=True))
@example(names=list(FORMULAS))
@example(names=["y\nz.mp4", "x\r"])
def test_results_are_read_back(tmp_path, names):
    count = len(names)
    probabilities = np.roll(np.eye(count, dtype=np.float32), 1, axis=1)  # all are wrong
    valid = np.arange(count) > 0
    results = make_results(
        facts_of(names),
        paths=names,
        labels=np.arange(count),
        probabilities=probabilities,
        valid=valid,
        reasons={0: names[1]},
    )
    write_results(results, tmp_path)
    read = read_results(tmp_path)
    assert read.paths == names and (read.top == results.top).all() and (read.valid == valid).all()
    table = rows_of(tmp_path / "predictions.csv")[1:]
    assert [row[1] for row in table] == [row[3] for row in table] == names and table[0][4] == names[1]
    table = rows_of(tmp_path / "per_class.csv")[1:]
    assert [row[1] for row in table] == names and table[1][6] == names[2 % count]


@pytest.mark.slow
@every_name
@given(names=st.lists(NAMES, min_size=1, max_size=3))
@example(names=list(FORMULAS))
def test_lists_of_faults_and_predictions_are_read_back(tmp_path, names):
    (tmp_path / "faults.csv").unlink(missing_ok=True)
    with start_process("cpu") as process:
        log = FaultLog(tmp_path / "faults.csv", process)
        log.write([Fault(0, n, name, name[::-1]) for n, name in enumerate(names)], epoch=0, mode="train")
    assert [row[3:] for row in rows_of(tmp_path / "faults.csv")[1:]] == [[name, name[::-1]] for name in names]
    write_rejected(tmp_path / "rejected.csv", [Rejected(name, 1, name[::-1]) for name in names])
    assert [[row[0], row[2]] for row in rows_of(tmp_path / "rejected.csv")[1:]] == [[n, n[::-1]] for n in names]
    out = io.StringIO()
    table = csv_writer(out)
    table.writerow(csv_columns(5, names, windows=False))
    for name in names:
        table.writerows(csv_rows(Unreadable(video=name, reason=name[::-1]), 5, names, windows=False))
    (tmp_path / "p.csv").write_bytes(out.getvalue().encode("utf-8", "surrogateescape"))
    assert [row[:2] for row in rows_of(tmp_path / "p.csv")[1:]] == [[name, name[::-1]] for name in names]


# -- on a terminal --


def shown(text: str, **settings) -> str:
    stream = io.StringIO()
    print(text, file=ForPeople(stream), **settings)
    return stream.getvalue()


def test_control_characters_are_shown_and_not_obeyed():
    assert shown("a\x1b[2Jb\x07\x9bc") == "a\\x1b[2Jb\\x07\\x9bc\n"
    assert shown("fp4\u202eexe\u2066") == "fp4\\u202eexe\\u2066\n"
    assert shown("good\rbad") == "good\\x0dbad\n"
    assert shown("tab\tline\nfeed, ü 日本 🎬 \udcff") == "tab\tline\nfeed, ü 日本 🎬 \udcff\n"
    assert shown("\r 50%|█████     | 1/2", end="\r") == "\r 50%|█████     | 1/2\r"  # a progress bar
    assert shown("\r") == "\r\n"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("lost rtsp://al:p@ss:1@camera:554/1: refused", "lost rtsp://al:***@camera:554/1: refused"),
        ("zip://a.mp4::https://al:pw@host/a.zip", "zip://a.mp4::https://al:***@host/a.zip"),
        ("http://host:80/a@b http://al@host:80", "http://host:80/a@b http://al@host:80"),
    ],
)
def test_passwords_in_urls_are_hidden(text, expected):
    assert shown(text) == f"{expected}\n"


def test_a_command_shows_them_and_keeps_its_data(capsys):
    evil = "\x1b]0;title\x07"

    def main() -> int:
        print(f"class {evil}")
        print(f"file {evil}", file=sys.stderr)
        csv_writer(for_data(sys.stdout)).writerow([evil])
        raise InputError(evil)

    with pytest.raises(SystemExit):
        run_command(main)
    out, err = capsys.readouterr()
    assert out == f"class \\x1b]0;title\\x07\n{evil}\n" and "\x1b" not in err and err.count("\\x1b]0;title") == 2


def test_data_on_a_terminal_is_for_people():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = ForPeople(Terminal())
    assert for_data(stream) is stream and for_data(json) is json
