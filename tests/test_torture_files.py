"""The torture of files finds what it looks for. It runs by itself: python -m tests.torture.files"""

import numpy as np
import pytest

from dali_pipelines import clip_source
from dali_pipelines.errors import InputError
from dali_pipelines.host_decoder import decode_frames
from dali_pipelines.probe import probe
from preparation import index
from tests.torture import files
from tests.torture.damage import KINDS, damage, find_fields
from tests.videos import textured, write_video


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    frames = textured(20, height=files.HEIGHT, width=files.WIDTH)
    return probe(write_video(tmp_path_factory.mktemp("torture") / "a.mkv", frames, codec="vp8"))


def judge(row) -> str:
    return files.judge(row.path, row, 0)["outcome"]


@pytest.mark.slow
def test_a_whole_file_is_equal_and_one_without_its_end_is_refused(tmp_path, row):
    assert judge(row) == "equal"
    (tmp_path / "cut.mkv").write_bytes(open(row.path, "rb").read()[:300])
    assert files.judge(str(tmp_path / "cut.mkv"), row, 0)["outcome"] == "refused"


def test_other_frames_are_wrong(row, monkeypatch):
    def swapped(*arguments, **more):
        decoded = decode_frames(*arguments, **more)
        return decoded._replace(frames=decoded.frames[::-1].copy())

    monkeypatch.setattr(clip_source, "decode_frames", swapped)
    assert judge(row) == "wrong"


def test_another_count_of_frames_is_wrong(row, monkeypatch):
    monkeypatch.setattr("dali_pipelines.probe._count_frames", lambda *_, **__: row.frames - 1)
    monkeypatch.setattr(index, "decode_all", lambda *_, **__: ())
    assert judge(row) == "wrong"


@pytest.mark.parametrize("error", [KeyError("size"), InputError("ValueError: size")])
def test_an_error_that_no_one_has_named_is_unnamed(row, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(clip_source, "decode_frames", fail)
    assert judge(row) == "unnamed"


def test_damage_is_the_same_each_time_and_other_for_each_seed(row):
    data, fields = open(row.path, "rb").read(), find_fields(files.Path(row.path))
    assert all(fields[kind] for kind in ("sizes", "tables", "headers", "claims", "times", "packets"))
    for kind in KINDS:
        made = [damage(data, fields, kind, np.random.default_rng(seed), other=data) for seed in (0, 0, 1, 2)]
        assert made[0] == made[1] and len({data, *made}) >= 3
