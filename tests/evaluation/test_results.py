"""Files of an evaluation, intervals, and the comparison of two evaluations."""

import dataclasses
import errno
import os
import re

import numpy as np
import pytest

from dali_pipelines import InputError
from evaluation.comparison import compare, mcnemar, paired_interval
from evaluation.evaluate import results_text
from evaluation.report_sections import class_table
from evaluation.result_files import FILES, prepare_folder, read_results, write_results
from evaluation.results import Protocol, class_results, macro_f1, make_results, wilson_interval
from tests.evaluation import facts_of


def results_of(labels=(0, 1, 1, 0), paths=("a, b.mp4", "b.mp4", "c.mp4", "d.mp4")):
    return make_results(
        facts_of(["ash", "birch"]),
        paths=list(paths),
        labels=np.array(labels),
        probabilities=np.array([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8], [0, 0]], np.float32),
        valid=np.array([True, True, True, False]),
        reasons={3: "gone"},
    )


def test_results_are_read_back(tmp_path):
    results = results_of()
    summary = results.summary
    assert (summary["top1"], summary["top5"], summary["mean_class_accuracy"]) == (0.5, 0.75, 0.5)
    assert summary["macro_f1"] == results.macro_f1 == pytest.approx((2 / 4 + 2 / 3) / 2)  # the unreadable one is missed
    write_results(results, tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(FILES)
    read = read_results(tmp_path)
    assert read.paths == results.paths and read.summary["faults"] == [{"row": 3, "path": "d.mp4", "reason": "gone"}]
    for name in ("labels", "top", "valid"):
        assert getattr(read, name).tolist() == getattr(results, name).tolist()
    np.testing.assert_allclose(read.probabilities, results.probabilities, rtol=1e-6)
    lines = (tmp_path / "per_class.csv").read_text().splitlines()
    assert lines[1:] == ["0,ash,2,1,0.5,0.5,,0", "1,birch,2,1,0.5,1,ash,1"]
    text = (tmp_path / "predictions.csv").read_text()
    (tmp_path / "predictions.csv").write_text(text.replace("0.8", "x"))
    with pytest.raises(InputError, match=r"predictions.csv:4: could not convert string to float: 'x'; evaluate again"):
        read_results(tmp_path)


def test_results_of_older_versions_are_read(tmp_path):
    write_results(results_of(), tmp_path)
    text = (tmp_path / "results.json").read_text()
    (tmp_path / "results.json").write_text(re.sub(r'\n "macro_f1": [\d.]+,', "", text))
    older = read_results(tmp_path)
    assert "macro_f1" not in older.summary and older.macro_f1 == results_of().macro_f1


@pytest.mark.parametrize("num_classes, shown", [(5, False), (6, True)])
def test_the_top5_accuracy_is_shown_from_six_classes_on(num_classes, shown):
    results = make_results(
        facts_of(map(str, range(num_classes))),
        paths=["a.mp4"],
        labels=np.array([0]),
        probabilities=np.eye(num_classes, dtype=np.float32)[:1],
        valid=np.array([True]),
        reasons={},
    )
    text = results_text(results)
    assert ("top-5" in text) == ("Top-5" in class_table(results, class_results(results))) == shown
    assert "mean class accuracy 1.0000, macro F1 1.0000\ntest/top1_1x3_prob 1.0000" in text


def test_a_full_disk_leaves_the_old_results(tmp_path, monkeypatch):
    write_results(results_of(), tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("evaluation.result_files.os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        write_results(results_of(labels=(1, 1, 1, 1)), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
    prepare_folder(tmp_path)  # an evaluation may be replaced


def test_wilson_and_mcnemar_by_hand():
    """8 of 10: Wilson's interval as in Newcombe's tables; 1 against 9: 2 (1 + 10) / 2^10."""
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(10, 10)[1] == pytest.approx(1)
    assert mcnemar(1, 9) == mcnemar(9, 1) == 22 / 1024 and mcnemar(3, 3) == mcnemar(0, 0) == 1
    assert 0 < mcnemar(4000, 4400) < 1e-4
    low, high = paired_interval(1, 9, 98)  # (2 and 10) / 100: 0.08 -+ 1.96 sqrt((0.12 - 0.0064) / 100)
    assert (low, high) == pytest.approx((0.08 - 0.0660600, 0.08 + 0.0660600), abs=1e-5)


def test_comparing_needs_the_same_classes_and_videos():
    a = results_of()
    assert compare(a, results_of()).rows_a.tolist() == [0, 1, 2, 3]
    b = results_of(labels=(1, 0, 0, 1), paths=("b.mp4", "x.mp4", "a, b.mp4", "y.mp4"))
    shared = compare(a, b)
    assert (shared.rows_a.tolist(), shared.rows_b.tolist()) == ([0, 1], [2, 0])
    with pytest.raises(InputError, match="no video in common"):
        compare(a, results_of(paths=("1", "2", "3", "4")))
    with pytest.raises(InputError, match="differ in the label of a, b.mp4: 0 and 1"):
        compare(a, results_of(labels=(1, 1, 1, 0)))
    other = dataclasses.replace(a, summary=a.summary | {"classes": ["ash", "beech"]})
    with pytest.raises(InputError, match="class 1 is 'birch' and 'beech'"):
        compare(a, other)


@pytest.mark.parametrize("settings", [(0, 3), (1, 2), (2, 1), (1, 3, "sum")])
def test_protocols_that_do_not_exist(settings):
    with pytest.raises(InputError, match="--"):
        Protocol(*settings)


def test_macro_f1_by_hand():
    """Class 2 has no video and does not count, though a video was taken for it. Class 4 has no prediction."""
    labels, predicted = np.array([0, 0, 0, 1, 1, 3, 4]), np.array([0, 0, 2, 1, 0, 1, -1])
    top = np.stack([predicted, np.full(7, -1)], 1)
    assert macro_f1(labels, top) == pytest.approx((4 / 6 + 2 / 4 + 0 + 0) / 4)
