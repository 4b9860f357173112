"""Helpers of the tests of evaluations."""

import dataclasses

from evaluation.results import Protocol


def facts_of(classes):
    """The facts of results.json for an evaluation of `classes`, as `make_results` takes them."""
    data = {"num_frames": 4, "crop_size": 32, "stride": None, "target_fps": 30, "past_end": "fit"}
    manifest = {"path": "val.csv", "sha256": "ab" * 32, "root": ".", "listed": 4, "kept": 4, "left_out": 0}
    return dataclasses.asdict(Protocol()) | {
        "protocol": Protocol().name,
        "weights": [],
        "config": {"data": data},
        "manifest": manifest,
        "classes": list(classes),
        "date": "2026-11-24T12:00:00+00:00",
        "seconds": 1.5,
        "versions": {},
    }
