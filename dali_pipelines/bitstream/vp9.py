"""VP9. Source: VP9 bitstream specification 6.2 and annex B."""

from collections.abc import Iterator

from dali_pipelines.bitstream.bits import Bits
from dali_pipelines.bitstream.in_order import InOrderParser
from dali_pipelines.bitstream.parser import FrameHeader, UncertainError

_HEADER_BYTES = 20
"""Bytes to parse of a frame header, which needs fewer."""
_SUPERFRAME_MARKER = 6
_CS_RGB = 7  # color_space


class Vp9Parser(InOrderParser):
    """Every frame may change the probabilities that the next ones are coded with: none is disposable."""

    _has_begun = False

    def _read(self, packet: memoryview) -> FrameHeader:
        frames = [self._read_frame(frame) for frame in _frames(packet)]
        shown = sum(is_shown for _, is_shown in frames)
        if shown > 1:
            raise UncertainError("packets of several frames")
        return FrameHeader(starts_group=frames[0][0], is_shown=bool(shown))

    def _read_frame(self, data: memoryview) -> tuple[bool, bool]:
        """Returns (is a key frame, is shown)."""
        bits = Bits(bytes(data[:_HEADER_BYTES]))
        bits.skip(frame_marker=2)
        profile_low_bit, profile_high_bit = bits.u(1), bits.u(1)
        profile = profile_low_bit + 2 * profile_high_bit
        if profile == 3:
            bits.skip(reserved_zero=1)
        show_existing_frame = bits.u(1)
        if show_existing_frame:
            return False, True
        frame_type, show_frame, error_resilient_mode = bits.u(1), bits.u(1), bits.u(1)
        is_key = not frame_type
        self._has_begun |= is_key
        if is_key:
            bits.skip(frame_sync_code=24)
            self._check_colours(_read_color_config(bits, profile))
            self._check_size(_read_frame_size(bits))
        else:
            self._read_inter_size(bits, profile, error_resilient_mode, show_frame)
        return is_key, bool(show_frame)

    def _read_inter_size(self, bits: Bits, profile: int, error_resilient_mode: int, show_frame: int) -> None:
        intra_only = 0 if show_frame else bits.u(1)
        if intra_only and not self._has_begun:
            raise UncertainError("the file does not begin with a frame that can be decoded alone")
        if not error_resilient_mode:
            bits.skip(reset_frame_context=2)
        if intra_only:
            bits.skip(frame_sync_code=24)
            if profile:
                _read_color_config(bits, profile)
            bits.skip(refresh_frame_flags=8)
            self._check_size(_read_frame_size(bits))
            return
        bits.skip(refresh_frame_flags=8)
        for _ in range(3):
            bits.skip(ref_frame_idx=3, ref_frame_sign_bias=1)
        for _ in range(3):
            found_ref = bits.u(1)
            if found_ref:  # the size is that of a reference frame, the same so far
                return
        self._check_size(_read_frame_size(bits))


def _frames(data: memoryview) -> Iterator[memoryview]:
    """The frames of a superframe, whose index, at its end, has their sizes."""
    marker = data[-1]
    frames_in_superframe, bytes_per_size = (marker & 7) + 1, (marker >> 3 & 3) + 1
    index = data[-2 - frames_in_superframe * bytes_per_size : -1]
    if (
        marker >> 5 != _SUPERFRAME_MARKER
        or len(index) != 1 + frames_in_superframe * bytes_per_size
        or index[0] != marker
    ):
        yield data
        return
    place = 0
    for number in range(frames_in_superframe):
        frame_size = int.from_bytes(index[1 + number * bytes_per_size : 1 + (number + 1) * bytes_per_size], "little")
        if frame_size:
            yield data[place : place + frame_size]
        place += frame_size


def _read_color_config(bits: Bits, profile: int) -> tuple[int, ...]:
    ten_or_twelve_bit = bits.u(1) if profile >= 2 else 0
    color_space = bits.u(3)
    color_range = bits.u(1) if color_space != _CS_RGB else 0
    subsampling = bits.u(1 if color_space == _CS_RGB else 3) if profile in (1, 3) else 0  # with reserved_zero
    return profile, ten_or_twelve_bit, color_space, color_range, subsampling


def _read_frame_size(bits: Bits) -> tuple[int, int]:
    frame_width_minus_1, frame_height_minus_1 = bits.u(16), bits.u(16)
    return frame_width_minus_1 + 1, frame_height_minus_1 + 1
