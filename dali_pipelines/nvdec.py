"""Decoding on the GPU: the limits reported by the driver, and threads that decode small files with torchcodec.

`ClipSource` makes the files: the packets of one clip, remuxed in memory. Each thread of a `DecodePool` opens one with
torchcodec's `VideoDecoder`, whose NVDEC engine keeps hardware decoders for reuse and releases the GIL. With the device
"cpu", the same code runs on torchcodec's CPU decoder, as in the tests.
"""

import contextlib
import ctypes
import functools
import io
import os
import queue
import re
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor

from dali_pipelines.bitstream.codecs import CODECS
from dali_pipelines.bitstream.parser import UncertainError
from dali_pipelines.clip_source import Sample, bounds
from dali_pipelines.engines import DEPTHS, Limits, LimitsByFormat, cpu_limits
from dali_pipelines.errors import InputError
from dali_pipelines.files import Source
from dali_pipelines.host_decoder import decode_batch, decode_frames, size_mismatch
from dali_pipelines.images import ImageDecoder, batch_length
from dali_pipelines.packets import REMUXED_FPS
from dali_pipelines.processes import TemporaryFolder

_DECODERS_A_THREAD = 4
"""Hardware decoders that torchcodec keeps for reuse, per thread: data sets have videos of several sizes."""
_DECODER_BYTES, _SURFACES = 1 << 30, 12
"""Memory for all these decoders, at 12 surfaces of the largest frame each: an estimate, not measured."""
_IMAGE_THREADS = 8
"""Threads of nvJPEG's part on the CPU, for the 8 or 16 images of a clip."""
_TICK_S = 0.5
_JOIN_S = 5.0


class UnavailableError(Exception):
    """NVDEC, or torchcodec, cannot be used here; the message says why and what to install."""


class Decoded(NamedTuple):
    """The result for one `Sample`."""

    frames: torch.Tensor
    """uint8 [N, H, W, 3] RGB on the pool's device, not rotated, only the part that the rectangles need; black for a
    fault."""
    rectangles: np.ndarray
    """float32 [V, 4]: y0, x0, y1, x1 in pixels of these frames."""
    engine: str
    """"nvdec", "dali" (images), or "host"."""
    fault: str
    fallback: str


class DecodePool:
    """`threads` threads that decode samples in the order of `submit`. `prepare` must have succeeded on the device.

    timeout_s: seconds that a thread may take for one sample; after that the sample is a fault, and a new thread
        replaces the one that hangs.
    largest: pixels of the largest frame, which limits the number of hardware decoders that are kept.

    The threads end with `close`, or when the pool is garbage-collected.
    """

    def __init__(self, device: torch.device, *, threads: int, timeout_s: float, largest: int = 1):
        self._device = device
        self._timeout_s = timeout_s
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._images = ImageDecoder(device.index, threads=min(threads, _IMAGE_THREADS))  # starts at the first image
        if device.type == "cuda":
            fitting = int(_DECODER_BYTES / (1.5 * largest * _SURFACES))
            capacity = min(max(fitting, threads), _DECODERS_A_THREAD * threads)
            load_torchcodec().decoders.set_nvdec_cache_capacity(capacity)
        self._threads: list[threading.Thread] = []
        for _ in range(threads):
            self._start()
        self._end = weakref.finalize(self, _end_threads, self._tasks, self._threads)

    def _start(self) -> None:
        thread = threading.Thread(
            target=_work, args=(self._tasks, self._device, self._images), name="decode", daemon=True
        )
        thread.start()
        self._threads.append(thread)

    def submit(self, sample: Sample, size: tuple[int, int]) -> "Task":
        """Queues a sample for decoding. `size` is the (height, width) that the frames must have."""
        task = Task(sample, size)
        self._tasks.put(task)
        return task

    def result(self, task: "Task") -> Decoded:
        """Waits for the task. Counts polls, not seconds, so a machine that sleeps is not taken for a thread that
        hangs."""
        looks, tick = 0, min(self._timeout_s / 8, _TICK_S)
        while not task.is_done.wait(tick):
            looks += task.thread is not None
            if not any(thread.is_alive() for thread in self._threads):
                raise RuntimeError("the decoding threads have ended")
            if looks * tick >= self._timeout_s:
                # Nobody is waiting for it any more.
                self._threads[:] = [thread for thread in self._threads if thread is not task.thread]
                self._start()
                return _black(task, self._device, f"not decoded within timeout_s = {self._timeout_s:g} seconds")
        if not isinstance(task.outcome, Decoded):
            raise task.outcome or RuntimeError("the decoding threads have ended")
        return task.outcome

    def close(self) -> None:
        """Ends the threads, each after its current sample."""
        self._end()


class Task:
    """A sample on its way through a `DecodePool`."""

    def __init__(self, sample: Sample, size: tuple[int, int]):
        self.sample, self.size = sample, size
        self.thread: threading.Thread | None = None
        """The thread that has started on it."""
        self.is_done = threading.Event()
        self.outcome: Decoded | Exception | None = None


def _end_threads(tasks: "queue.SimpleQueue[Task | None]", threads: list[threading.Thread]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:  # drop the tasks that nobody will ask for
            tasks.get_nowait()
    for _ in threads:
        tasks.put(None)
    # A thread still in C++ when the interpreter ends would abort the process.
    deadline = time.monotonic() + _JOIN_S
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(deadline - time.monotonic(), 0))


def _work(tasks: "queue.SimpleQueue[Task | None]", device: torch.device, images: ImageDecoder) -> None:
    """Runs in each thread, with its own stream on a GPU."""
    with contextlib.ExitStack() as stack:
        failure: Exception | None = None
        try:
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
                stack.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
        except RuntimeError as error:
            failure = error
        while (task := tasks.get()) is not None:
            task.thread = threading.current_thread()
            try:
                if failure is not None:
                    raise failure
                task.outcome = _decode(task, device, images)
            except Exception as error:
                task.outcome = error
            task.is_done.set()


def _decode(task: Task, device: torch.device, images: ImageDecoder) -> Decoded:
    """Decodes with torchcodec, or with PyAV from the same bytes if that fails; black if both fail. Images are decoded
    by DALI on the device, or on the CPU if that fails."""
    sample = task.sample
    if sample.is_host:
        return _finish(torch.from_numpy(sample.frames), sample.rectangles, sample, device, engine="host")
    rows, columns = bounds(sample.rectangles, task.size)
    rectangles = sample.rectangles - np.array([rows.start, columns.start] * 2, np.float32)
    if len(sample.image_ends):
        return _decode_images(task, device, images, (rows, columns), rectangles)
    try:
        frames = decode_file(sample.encoded, sample.positions, tuple(sample.size.tolist()), device)
        return _finish(frames[:, rows, columns], rectangles, sample, device, engine="nvdec")
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:  # torchcodec's, CUDA's, out of memory
        fallback = f"by the host, as NVDEC failed: {_first_line(error)}"
    source = Source("", data=sample.encoded.tobytes())
    try:
        size = tuple(sample.size.tolist())
        decoded = decode_frames(source, sample.positions, size=size, region=(rows, columns))
    except (InputError, UncertainError) as error:
        return _black(task, device, str(error))
    return _finish(torch.from_numpy(decoded.frames), rectangles, sample, device, engine="host", fallback=fallback)


def _decode_images(
    task: Task, device: torch.device, decoder: ImageDecoder, region: tuple[slice, slice], rectangles: np.ndarray
) -> Decoded:
    sample, step = task.sample, batch_length(task.size)
    files = np.split(sample.encoded, sample.image_ends[:-1])
    names = [f"frame {position}" for position in sample.positions.tolist()]
    batches = [slice(first, first + step) for first in range(0, len(files), step)]
    try:
        on_device = [_image_batch(files[some], task.size, device, decoder, region) for some in batches]
        return _finish(torch.cat(on_device), rectangles, sample, device, engine="dali")
    except (RuntimeError, ValueError) as error:
        fallback = f"by the host, as nvJPEG failed: {_first_line(error)}"
    try:
        images = [image[region] for some in batches for image in decode_batch(files[some], names[some], size=task.size)]
    except InputError as error:
        return _black(task, device, str(error))
    frames = torch.from_numpy(np.stack(images))
    return _finish(frames, rectangles, sample, device, engine="host", fallback=fallback)


def _image_batch(
    files: list[np.ndarray],
    size: tuple[int, int],
    device: torch.device,
    decoder: ImageDecoder,
    region: tuple[slice, slice],
) -> torch.Tensor:
    """The region of the images, uint8 [N, H, W, 3], on the device. Raises RuntimeError."""
    with decoder.lock:
        decoded = decoder.run(files)
        images = [to_torch_tensor(decoded[index], copy=False) for index in range(len(files))]
        for image in images:
            if reason := size_mismatch((image.shape[0], image.shape[1]), size):
                raise RuntimeError(reason)
        frames = torch.stack([image[region] for image in images])
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # the next call reuses the memory of `images`
        return frames


def _finish(
    frames: torch.Tensor,
    rectangles: np.ndarray,
    sample: Sample,
    device: torch.device,
    *,
    engine: str,
    fault: str = "",
    fallback: str = "",
) -> Decoded:
    """The frames are on the device, for every stream, when this returns."""
    frames = frames.to(device).contiguous()
    if device.type == "cuda":
        torch.cuda.current_stream().synchronize()
    fault, fallback = fault or sample.fault.tobytes().decode(), fallback or sample.fallback.tobytes().decode()
    return Decoded(frames, rectangles, engine, fault, fallback)


def _black(task: Task, device: torch.device, fault: str) -> Decoded:
    rectangles = np.tile(np.array([0, 0, 1, 1], np.float32), (len(task.sample.rectangles), 1))
    frames = torch.zeros((len(task.sample.positions), 1, 1, 3), dtype=torch.uint8)
    return _finish(frames, rectangles, task.sample, device, engine="host", fault=fault)


def decode_file(
    encoded: np.ndarray, positions: np.ndarray, size: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """Decodes the frames at `positions` (ascending) of a file made by `remux`, with torchcodec in one thread.

    encoded: uint8 [bytes]; size: (height, width) that the frames must have. Returns uint8 [N, H, W, 3] on the device.
    Raises RuntimeError, from torchcodec or for unexpected frames.
    """
    decoders = load_torchcodec().decoders
    with decoders.set_cuda_backend(nvdec_backend()):
        decoder = decoders.VideoDecoder(
            torch.from_numpy(encoded),
            dimension_order="NHWC",
            num_ffmpeg_threads=1,
            device=str(device),
            seek_mode="approximate",  # the frames of the file are evenly spaced, from 0
        )
    if decoder.cpu_fallback and device.type == "cuda":
        raise RuntimeError(str(decoder.cpu_fallback))
    try:
        found = decoder.get_frames_at(positions.tolist())
    finally:
        if device.type == "cuda":
            # Another thread gets the hardware decoder once `decoder` ends; its surface may still hold the last frame.
            torch.cuda.current_stream(device).synchronize()
    shown = torch.round(found.pts_seconds * REMUXED_FPS).tolist()
    if shown != positions.tolist():
        raise RuntimeError("frames come out in another order than their headers say")
    if reason := size_mismatch(tuple(found.data.shape[1:3]), size):
        raise RuntimeError(reason)
    frames: torch.Tensor = found.data
    return frames


def prepare(device: torch.device) -> LimitsByFormat:
    """Makes sure that a `DecodePool` works on the device, and returns the limits of the decoder there.

    It loads torchcodec and decodes a generated video: otherwise a missing library would silently send every clip to the
    slower host. Raises `UnavailableError`.
    """
    version = load_torchcodec().__version__
    if device.type == "cuda" and version.endswith("+cpu"):
        raise UnavailableError(f"torchcodec {version} is built without CUDA: install its build for the CUDA of torch")
    limits = cpu_limits() if device.type == "cpu" else driver_limits(device)
    encoded = _small_video()
    if encoded is not None:
        positions, size = np.arange(3), (_SMALL, _SMALL)
        expected = decode_frames(Source("", data=encoded.tobytes()), positions, size=size).frames
        try:
            found = decode_file(encoded, positions, size, device).cpu().numpy()
        except Exception as error:  # unknown versions of torchcodec may raise anything
            raise UnavailableError(f"torchcodec fails on a test video: {_first_line(error)}") from None
        if np.abs(found.astype(float) - expected).mean() > _TOLERANCE:
            raise UnavailableError("torchcodec decodes a test video to other colours than FFmpeg")
    return limits


@functools.cache
def nvdec_backend() -> str:
    """torchcodec's name for its NVDEC engine: "nvdec", in 0.11 "beta". Its other engine goes through FFmpeg."""
    try:
        with load_torchcodec().decoders.set_cuda_backend("nvdec"):
            return "nvdec"
    except ValueError:
        return "beta"


_SMALL = 256  # pixels a side
_TOLERANCE = 4.0  # of 255, on average; swapped colours are off by far more


def _small_video() -> np.ndarray | None:
    """A red, a green and a blue frame of H.264, as `remux` writes them, uint8 [bytes]; None if PyAV has no encoder."""
    file = io.BytesIO()
    try:
        with av.open(file, "w", format="mp4", options={"use_editlist": "0"}) as container:
            stream = container.add_stream("libx264", rate=REMUXED_FPS, options={"preset": "ultrafast"})
            stream.height = stream.width = _SMALL
            stream.pix_fmt = "yuv420p"
            stream.codec_context.thread_count = 1
            for number in range(3):
                colour = 200 * np.eye(3, dtype=np.uint8)[number]
                frame = av.VideoFrame.from_ndarray(np.tile(colour, (_SMALL, _SMALL, 1)), format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except (ValueError, av.error.FFmpegError):
        return None
    return np.frombuffer(file.getbuffer(), np.uint8)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# -- torchcodec and its FFmpeg --


@functools.cache
def load_torchcodec() -> Any:
    """The module, loaded with PyAV's copy of FFmpeg if PyAV ships one, else the system's. Raises `UnavailableError`."""
    try:
        _load_npp()
        with _ffmpeg_of_av():
            import torchcodec
    except ImportError:
        raise UnavailableError("torchcodec is not installed: pip install 'torchcodec>=0.11'") from None
    except (RuntimeError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if "Error:" in line]
        reason = lines[0] if lines else str(error)
        remedy = "FFmpeg's shared libraries must be installed (apt install ffmpeg)"
        if "libnpp" in reason:
            remedy = "NVIDIA's NPP must be installed (pip install nvidia-npp, for torch's version of CUDA)"
        raise UnavailableError(
            f"torchcodec does not load ({reason}): its version must fit torch {torch.__version__}, and {remedy}"
        ) from None
    return torchcodec


def _load_npp() -> None:
    """Loads NVIDIA's NPP, which torchcodec needs on a GPU, from its pip package, where the loader does not look."""
    for library in ("libnppc.so*", "libnppicc.so*"):
        for path in Path(av.__file__).parents[1].glob(f"nvidia/*/lib/{library}"):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(path))


@contextlib.contextmanager
def _ffmpeg_of_av() -> Iterator[None]:
    """A context in which libraries that need `libavcodec.so.62` and the like find those in PyAV's wheel, whose file
    names differ.

    For each of them it loads an empty library of that name that in turn needs PyAV's. So the process has one FFmpeg,
    the machine needs none, and no environment variable has to be set before the process starts.
    """
    folder = Path(av.__file__).parents[1] / "av.libs"
    with contextlib.closing(TemporaryFolder()) as made:
        place = made.name
        for library in sorted(folder.glob("lib*.so*")):
            if match := re.fullmatch(r"(lib(?:av|sw)\w+)-[0-9a-f]+\.so\.(\d+)\..*", library.name):
                name = f"{match[1]}.so.{match[2]}"
                Path(place, name).write_bytes(_alias(name, library.name))
                ctypes.CDLL(str(library))
                ctypes.CDLL(str(Path(place, name)))
        yield


_MACHINES = {"x86_64": 62, "aarch64": 183}  # e_machine


def _alias(name: str, target: str) -> bytes:
    """An empty shared library (ELF, 64 bits, little-endian) called `name` that needs `target`."""
    strings = b"\0" + name.encode() + b"\0" + target.encode() + b"\0"
    strings += bytes(-len(strings) % 8)
    symbols = 64 + 3 * 56  # after the header and three program headers; one empty symbol of 24 bytes
    hash_table, string_table = symbols + 24, symbols + 48
    dynamic = string_table + len(strings)
    entries = [
        (1, 2 + len(name)),  # DT_NEEDED
        (14, 1),  # DT_SONAME
        (4, hash_table),
        (5, string_table),
        (6, symbols),
        (10, len(strings)),
        (11, 24),  # DT_SYMENT
        (0, 0),
    ]
    end = dynamic + 16 * len(entries)
    machine = _MACHINES.get(os.uname().machine, 0)
    header = struct.pack("<16s2HI3QI6H", b"\x7fELF\x02\x01\x01", 3, machine, 1, 0, 64, 0, 0, 64, 56, 3, 64, 0, 0)
    segments = [  # type, offset, size, alignment: PT_LOAD, PT_DYNAMIC, PT_GNU_STACK (not executable)
        (1, 0, end, 4096),
        (2, dynamic, end - dynamic, 8),
        (0x6474E551, 0, 0, 16),
    ]
    return b"".join(
        [
            header,
            *(struct.pack("<2I6Q", kind, 6, at, at, at, size, size, align) for kind, at, size, align in segments),
            bytes(24),
            struct.pack("<6I", 1, 1, 0, 0, 0, 0),
            strings,
            *(struct.pack("<2Q", *entry) for entry in entries),
        ]
    )


# -- the driver --


class _Caps(ctypes.Structure):
    """CUVIDDECODECAPS from NVIDIA's cuviddec.h (Video Codec SDK 13)."""

    _fields_ = (
        ("codec", ctypes.c_int),
        ("chroma_format", ctypes.c_int),
        ("bit_depth_minus_8", ctypes.c_uint),
        ("reserved1", ctypes.c_uint * 3),
        ("is_supported", ctypes.c_ubyte),
        ("num_nvdecs", ctypes.c_ubyte),
        ("output_format_mask", ctypes.c_ushort),
        ("max_width", ctypes.c_uint),
        ("max_height", ctypes.c_uint),
        ("max_mb_count", ctypes.c_uint),
        ("min_width", ctypes.c_ushort),
        ("min_height", ctypes.c_ushort),
        ("histogram", ctypes.c_ubyte * 4),
        ("reserved3", ctypes.c_uint * 10),
    )


_CHROMA_420 = 1
_NV12 = 1 << 0  # of output_format_mask


def driver_limits(device: torch.device) -> LimitsByFormat:
    """What this GPU's NVDEC takes, as reported by its driver. Raises `UnavailableError`."""
    try:
        cuvid = ctypes.CDLL("libnvcuvid.so.1")
    except OSError:
        raise UnavailableError(
            "the driver's video library, libnvcuvid.so.1, is missing; in a container: "
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
        ) from None
    limits = {}
    with torch.cuda.device(device):
        torch.zeros(1, device=device)  # creates the CUDA context for the query
        for name, codec in CODECS.items():
            for depth in sorted(set(DEPTHS.values())):
                caps = _Caps(codec.nvdec or 0, _CHROMA_420, depth - 8)
                failed = codec.nvdec is None or cuvid.cuvidGetDecoderCaps(ctypes.byref(caps))
                if not failed and caps.is_supported and caps.output_format_mask & _NV12:
                    limits[name, depth] = Limits(
                        caps.min_width,
                        caps.min_height,
                        caps.max_width,
                        caps.max_height,
                        caps.max_mb_count,
                        caps.num_nvdecs or 1,
                        codec.nvdec_block,
                    )
    if not limits:
        raise UnavailableError("the driver reports no NVDEC engine on this GPU")
    return limits
