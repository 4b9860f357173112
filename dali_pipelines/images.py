"""Decodes JPEG and PNG files to RGB with DALI: libjpeg-turbo and libpng on the CPU, nvJPEG on a GPU.

On the CPU the pixels are those of PIL, bit by bit. EXIF orientation is applied; grey and CMYK become RGB; transparency
is dropped.
"""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from dali_pipelines.errors import check

_PNG = b"\x89PNG\r\n\x1a\n"
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_MOST_IMAGES = 32  # in one batch
_MOST_BYTES = 64 << 20  # of the decoded images of a batch


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) of a JPEG or PNG file as stored, before its EXIF orientation.

    Reads only headers, so that a small file cannot make a decoder allocate gigabytes. Raises `InputError` if the file
    is neither, or is cut off.
    """
    check(len(data) > 0, "an empty file")
    if data.startswith(_PNG):
        check(data[12:16] == b"IHDR" and len(data) >= 24, "not a JPEG or PNG image")
        check(b"IEND" in data[-64:], "cut off")
        return int.from_bytes(data[20:24]), int.from_bytes(data[16:20])
    check(data.startswith(b"\xff\xd8"), "not a JPEG or PNG image")
    place = 2
    while data[place : place + 1] == b"\xff" and place + 9 <= len(data):  # ITU-T T.81, annex B
        marker = data[place + 1]
        if marker in _SOF:
            check(data.rfind(b"\xff\xd9") > place, "cut off")
            return int.from_bytes(data[place + 5 : place + 7]), int.from_bytes(data[place + 7 : place + 9])
        place += 1 if marker == 0xFF else 2 + int.from_bytes(data[place + 2 : place + 4])
    check(place + 9 <= len(data), "cut off")
    check(False, "a damaged JPEG header")
    raise AssertionError


class ImageDecoder:
    """Decodes images in batches; any thread may call it, one at a time decodes. `device_id`: a GPU, or None for the
    CPU; `threads`: that decode the images of a batch."""

    def __init__(self, device_id: int | None = None, *, threads: int = 1):
        self._device_id, self._threads = device_id, threads
        self._pipeline: Any = None
        self.lock = threading.Lock()

    def run(self, images: Sequence[bytes | np.ndarray]) -> Any:
        """DALI's list of the images of one batch, each uint8 [H, W, 3], valid until the next call: hold the `lock`
        until they are copied. Raises RuntimeError, with DALI's report, if one cannot be decoded."""
        pipeline, self._pipeline = self._pipeline, None  # an error ends a pipeline
        if pipeline is None:
            pipeline = self._build()
        pipeline.feed_input("images", [np.frombuffer(image, np.uint8) for image in images])
        (decoded,) = pipeline.run()
        self._pipeline = pipeline
        return decoded

    def decode(self, images: Sequence[bytes | np.ndarray]) -> list[np.ndarray]:
        """The images of one batch, each uint8 [H, W, 3], in memory of their own. Only on the CPU. Raises
        RuntimeError."""
        with self.lock:
            decoded = self.run(images)
            return [np.array(decoded.at(index)) for index in range(len(images))]

    def _build(self) -> Any:
        from nvidia.dali import Pipeline, fn  # takes half a second, and most processes decode no images
        from nvidia.dali.types import DALIDataType

        pipeline = Pipeline(
            batch_size=_MOST_IMAGES,
            num_threads=self._threads,
            device_id=self._device_id,
            prefetch_queue_depth=1,
            exec_async=False,
            exec_pipelined=False,
        )
        with pipeline:
            files = fn.external_source(name="images", dtype=DALIDataType.UINT8, ndim=1)
            # Without fancy upsampling, nvJPEG's colours would differ from libjpeg-turbo's by up to 40 at edges.
            options: dict[str, Any] = {} if self._device_id is None else {"jpeg_fancy_upsampling": True}
            device = "cpu" if self._device_id is None else "mixed"
            pipeline.set_outputs(fn.decoders.image(files, device=device, **options))
        pipeline.build()
        return pipeline


def batch_length(size: tuple[int, int]) -> int:
    """How many images of (height, width) `size` to decode in one batch."""
    return min(max(_MOST_BYTES // (3 * size[0] * size[1]), 1), _MOST_IMAGES)


@functools.cache
def host_decoder() -> ImageDecoder:
    """The decoder of this process on the CPU, with one thread: other processes decode other samples."""
    return ImageDecoder()
