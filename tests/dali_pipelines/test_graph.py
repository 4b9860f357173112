"""The DALI graph against torch, on the CPU; its GPU form by definition, and by running it where there is a GPU."""

import numpy as np
import pytest
import torch
from nvidia.dali import backend
from torch.nn.functional import interpolate

from dali_pipelines.clip_source import Sample
from dali_pipelines.graph import Cut, clip_pipeline, cut_pipeline

CUT = Cut(crop_size=32, clips=1, windows=1, mean=(0.45, 0.4, 0.5), std=(0.225, 0.2, 0.3), half=False)


def fixed(samples):
    """A source that returns the given samples one after another."""
    return lambda info: tuple(samples[info.idx_in_epoch % len(samples)])


def host_sample(rgb_frames, rectangles, *, transpose=False, sample_id=0):
    return Sample(
        frames=rgb_frames,
        encoded=np.zeros(1, np.uint8),
        image_ends=np.zeros(0, np.int32),
        size=np.ones(2, np.int32),
        positions=np.zeros(1, np.int32),
        picks=np.arange(len(rgb_frames), dtype=np.int32)[None],
        rectangles=np.array(rectangles, np.float32),
        is_host=np.array(True),
        transpose=np.array(transpose),
        sample_id=np.array(sample_id, np.int64),
        packets=np.zeros(2, np.int64),
        fault=np.zeros(0, np.uint8),
        fallback=np.zeros(0, np.uint8),
    )


def make_pipeline(samples, way, device_id=None, **cut):
    """Of the graph that also decodes ("clips"), or of the one that is fed decoded frames ("cut")."""
    settings = dict(batch_size=len(samples), device_id=device_id, threads=1, prefetch=1)
    if way == "clips":
        return clip_pipeline(fixed(samples), cut=CUT._replace(**cut), workers=0, **settings)
    frames = [sample.frames if device_id is None else torch.from_numpy(sample.frames).cuda() for sample in samples]
    rest = [[sample.picks for sample in samples], [sample.rectangles for sample in samples]]
    rest.append([sample.transpose for sample in samples])
    return cut_pipeline(lambda number: frames, lambda number: rest, CUT._replace(**cut), **settings)


def run(samples, *, device_id=None, **cut):
    """The clips, which both graphs give."""
    both = []
    for way in ("clips", "cut"):
        out = make_pipeline(samples, way, device_id, **cut).run()[0]
        both.append(torch.from_numpy(np.array((out if device_id is None else out.as_cpu()).as_tensor())))
    assert (both[0] == both[1]).all()
    return both[0]


def expected(rgb_frames, size, y, x, flip=False):
    """Resize, crop, flip and normalise, step by step. [C, T, 32, 32]"""
    frames = torch.from_numpy(rgb_frames).permute(0, 3, 1, 2).double() / 255
    frames = interpolate(frames, size=size, mode="bilinear", align_corners=False, antialias=False)
    frames = frames[:, :, y : y + 32, x : x + 32]
    frames = frames.flip(3) if flip else frames
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (CUT.mean, CUT.std))
    return ((frames - mean) / std).permute(1, 0, 2, 3).float()


def rectangle(rgb_frames, size, y, x, flip=False):
    scale_y, scale_x = rgb_frames.shape[1] / size[0], rgb_frames.shape[2] / size[1]
    y0, x0, y1, x1 = y * scale_y, x * scale_x, (y + 32) * scale_y, (x + 32) * scale_x
    return [y0, x1, y1, x0] if flip else [y0, x0, y1, x1]


def noise(num_frames, height, width):
    return np.random.default_rng(height).integers(0, 256, (num_frames, height, width, 3), np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "height, width, size, y, x",
    [
        (60, 90, (40, 60), 3, 20),
        (90, 60, (60, 40), 28, 8),
        (61, 43, (51, 36), 0, 4),
        (20, 20, (40, 40), 8, 0),  # enlarged
        (1080, 1920, (36, 64), 2, 32),
        (1, 1, (32, 32), 0, 0),
    ],
)
@pytest.mark.parametrize("flip", [False, True])
def test_one_resize_from_a_rectangle_is_resize_then_crop(height, width, size, y, x, flip):
    rgb_frames = noise(2, height, width)
    got = run([host_sample(rgb_frames, [rectangle(rgb_frames, size, y, x, flip)])])
    # 1e-3 of the range, after the division by std
    assert (got[0] - expected(rgb_frames, size, y, x, flip)).abs().max() < 1e-3 / 0.2


def test_views_are_stacked_in_order_and_samples_may_differ_in_size():
    big, small = noise(3, 60, 90), noise(3, 45, 40)
    corners = [(0, 0), (4, 14), (8, 28)]
    got = run(
        [
            host_sample(big, [rectangle(big, (40, 60), y, x) for y, x in corners]),
            host_sample(small, [rectangle(small, (45, 40), y // 2, x // 4) for y, x in corners]),
        ],
        clips=3,
    )
    assert got.shape == (2, 3, 3, 3, 32, 32)
    for view, (y, x) in enumerate(corners):
        assert (got[0, view] - expected(big, (40, 60), y, x)).abs().max() < 5e-3
        assert (got[1, view] - expected(small, (45, 40), y // 2, x // 4)).abs().max() < 5e-3


def test_transpose_swaps_height_and_width_of_that_sample_only():
    rgb_frames = noise(2, 40, 60)
    box = [rectangle(rgb_frames, (40, 60), 3, 20)]
    got = run([host_sample(rgb_frames, box), host_sample(rgb_frames, box, transpose=True)])
    assert (got[1] == got[0].transpose(2, 3)).all() and not (got[1] == got[0]).all()


def test_half_precision():
    rgb_frames = noise(2, 40, 60)
    box = [rectangle(rgb_frames, (40, 60), 3, 20)]
    half = run([host_sample(rgb_frames, box)], half=True)
    assert half.dtype == torch.float16
    assert (half.float() - run([host_sample(rgb_frames, box)])).abs().max() < 2e-3


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("way", ["clips", "cut"])
def test_the_gpu_form_is_well_defined(monkeypatch, way, views):
    """What can be said without a GPU: every operator exists for its device and takes its arguments, and nothing comes
    back to the host after the decoder. Building or serialising it would need a GPU."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    samples = [host_sample(noise(2, 4, 4), [[0, 0, 4, 4]] * views)] * 2
    pipeline = make_pipeline(samples, way, device_id=0, half=True, clips=views)
    pipeline._build_graph()
    devices = {}
    for op in pipeline._ops:
        op.check_args()
        name = getattr(op._op, "schema_name", "ExternalSource")
        found = [op.spec.OutputDevice(index) for index in range(op.spec.NumOutput())]
        if name == "decoders__Video":
            assert name in backend.RegisteredMixedOps()
        elif "gpu" in found and not name.startswith("_conditional"):
            assert name in backend.RegisteredGPUOps()
        devices.setdefault(name, set()).update(found)
    on_gpu = ["SequenceRearrange", "Resize", "Transpose", "CropMirrorNormalize"]
    on_gpu += ["decoders__Video"] * (way == "clips") + ["Stack"] * (views > 1)
    assert all(devices[name] == {"gpu"} for name in on_gpu)
    # Decoded frames come in on the GPU, what else there is from the workers on the CPU.
    assert devices["ExternalSource"] == ({"cpu"} if way == "clips" else {"cpu", "gpu"})


@pytest.mark.gpu
def test_the_gpu_matches_the_cpu():
    big, small = noise(3, 60, 90), noise(3, 45, 40)
    samples = [
        host_sample(big, [rectangle(big, (40, 60), 3, 20, flip=True)]),
        host_sample(small, [rectangle(small, (45, 40), 5, 4)], transpose=True),
    ]
    assert (run(samples, device_id=0) - run(samples)).abs().max() < 5e-3
