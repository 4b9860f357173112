"""MPEG-4 part 2. Source: ISO/IEC 14496-2 6.2 (syntax)."""

from typing import NamedTuple

from dali_pipelines.bitstream.bits import Bits
from dali_pipelines.bitstream.nal import annex_b
from dali_pipelines.bitstream.parser import UNSPECIFIED_MATRIX, FrameHeader, Parser, StreamFormat, UncertainError

_VOP_START, _GROUP_START = b"\xb6", b"\xb3"
_I_VOP, _B_VOP = 0, 2  # vop_coding_type
_VOP_HEADER_BYTES = 32
"""Bytes to parse of a VOP header, which needs fewer."""
_EXTENDED_PAR = 15


class _Layer(NamedTuple):
    """The video object layer, which is the stream's header, up to vop_time_increment_resolution."""

    verid: int
    has_b_vops: bool
    """Whether the header announces B-VOPs."""
    vop_time_increment_resolution: int
    """Units of time per second."""

    @property
    def increment_bits(self) -> int:
        """Width of vop_time_increment and fixed_vop_time_increment."""
        return max((self.vop_time_increment_resolution - 1).bit_length(), 1)


class Mpeg4Parser(Parser):
    """A reference frame is shown when the next one is decoded, a B-VOP immediately."""

    reorder = 1

    def __init__(self, extradata: bytes):
        layer = next(filter(_is_layer, annex_b(extradata)), None)
        if layer is None:
            raise UncertainError("no stream header")
        self._extradata, self._unit = extradata, layer
        self._layer = _read_layer(Bits(layer[1:]))
        self._references = self._count = 0
        self._follows_start = False
        self._seconds = self._previous_seconds = 0  # time base of the next reference frame, and of B-VOPs
        self._times = (0, 0)  # of the last two references

    def read(self, packet: memoryview) -> FrameHeader:
        """See `Parser.read`."""
        units = list(annex_b(bytes(packet)))
        vops = [unit for unit in units if unit[:1] == _VOP_START]
        if any(_is_layer(unit) and unit != self._unit for unit in units):
            raise UncertainError("the parameters of the stream change")
        if len(vops) != 1:
            raise UncertainError("packets of several frames" if vops else "a packet without a frame")
        bits = Bits(vops[0][1:_VOP_HEADER_BYTES])
        vop_coding_type = bits.u(2)
        for unit in units:
            if unit[:1] == _GROUP_START:
                self._seconds = _read_time_code(Bits(unit[1:]))
        self._read_time(bits, is_b=vop_coding_type == _B_VOP)
        vop_coded = bits.u(1)
        if not vop_coded:
            raise UncertainError("frames that are not coded")
        self._count += 1
        if vop_coding_type == _B_VOP:
            if self._references < 2:
                raise UncertainError("the file does not begin with a frame that can be decoded alone")
            # Shown before the reference that was decoded last.
            order = (2 * self._references, self._count)
            return FrameHeader(order, is_leading=self._follows_start, is_disposable=True)
        self._references += 1
        self._follows_start = vop_coding_type == _I_VOP
        return FrameHeader((2 * self._references + 1, 0), starts_group=vop_coding_type == _I_VOP)

    def _read_time(self, bits: Bits, *, is_b: bool) -> None:
        """Reads and checks the time of a VOP. FFmpeg discards B-VOPs with times outside those of the two references,
        and shows references immediately if no B-VOPs are announced."""
        seconds = 0
        while bits.u(1):  # modulo_time_base
            seconds += 1
        bits.skip(marker_bit=1)
        vop_time_increment = bits.u(self._layer.increment_bits)
        bits.skip(marker_bit=1)
        resolution = self._layer.vop_time_increment_resolution
        if not is_b:
            self._previous_seconds, self._seconds = self._seconds, self._seconds + seconds
            self._times = self._times[1], self._seconds * resolution + vop_time_increment
            return
        before, after = self._times
        time = (self._previous_seconds + seconds) * resolution + vop_time_increment
        if not (before < time < after < before + 65536):
            raise UncertainError("the times of its frames disagree with their order")
        if not self._layer.has_b_vops:
            raise UncertainError("frames are held back for longer than the stream says")

    def formats(self) -> list[StreamFormat]:
        """See `Parser.formats`."""
        return [_format(self._unit)]

    def with_header(self, packet: bytes) -> bytes:
        """See `Parser.with_header`."""
        return packet if any(map(_is_layer, annex_b(packet))) else self._extradata + packet


def _is_layer(unit: bytes) -> bool:
    """Whether a unit is a video object layer."""
    return len(unit) > 1 and 0x20 <= unit[0] <= 0x2F


def _read_time_code(bits: Bits) -> int:
    """time_code of a group_of_vop, in seconds."""
    time_code_hours, time_code_minutes = bits.u(5), bits.u(6)
    bits.skip(marker_bit=1)
    time_code_seconds = bits.u(6)
    return time_code_seconds + 60 * (time_code_minutes + 60 * time_code_hours)


def _read_layer(bits: Bits) -> _Layer:
    bits.skip(random_accessible_vol=1, video_object_type_indication=8)
    verid = 1
    is_object_layer_identifier = bits.u(1)
    if is_object_layer_identifier:
        verid = bits.u(4)
        bits.skip(video_object_layer_priority=3)
    aspect_ratio_info = bits.u(4)
    if aspect_ratio_info == _EXTENDED_PAR:
        bits.skip(par_width=8, par_height=8)
    has_b_vops = False
    vol_control_parameters = bits.u(1)
    if vol_control_parameters:
        bits.skip(chroma_format=2)
        low_delay = bits.u(1)
        has_b_vops = not low_delay
        vbv_parameters = bits.u(1)
        if vbv_parameters:
            bits.skip(first_half_bit_rate=15, marker_bit=1)
            bits.skip(latter_half_bit_rate=15, marker_bit=1)
            bits.skip(first_half_vbv_buffer_size=15, marker_bit=1)
            bits.skip(latter_half_vbv_buffer_size=3, first_half_vbv_occupancy=11, marker_bit=1)
            bits.skip(latter_half_vbv_occupancy=15, marker_bit=1)
    video_object_layer_shape = bits.u(2)
    if video_object_layer_shape:
        raise UncertainError("frames that are not rectangular")
    bits.skip(marker_bit=1)
    return _Layer(verid, has_b_vops, vop_time_increment_resolution=bits.u(16))


def _format(unit: bytes) -> StreamFormat:
    bits = Bits(unit[1:])
    layer = _read_layer(bits)
    bits.skip(marker_bit=1)
    fixed_vop_rate = bits.u(1)
    if fixed_vop_rate:
        bits.skip(fixed_vop_time_increment=layer.increment_bits)
    bits.skip(marker_bit=1)
    video_object_layer_width = bits.u(13)
    bits.skip(marker_bit=1)
    video_object_layer_height = bits.u(13)
    bits.skip(marker_bit=1)
    interlaced = bits.u(1)
    bits.skip(obmc_disable=1)
    sprite_enable = bits.u(1 if layer.verid == 1 else 2)
    if sprite_enable:
        rare = "global motion compensation"
    else:
        rare = "data partitions" if _is_partitioned(bits, layer.verid) else ""
    return StreamFormat(
        size=(video_object_layer_height, video_object_layer_width),
        has_fields=bool(interlaced),
        rare=rare,
        matrix=UNSPECIFIED_MATRIX,
        full_range=False,
    )


def _is_partitioned(bits: Bits, verid: int) -> bool:
    """data_partitioned; `bits` start after sprite_enable, which is 0. True if unknown."""
    not_8_bit = bits.u(1)
    if not_8_bit:
        bits.skip(quant_precision=4, bits_per_pixel=4)
    quant_type = bits.u(1)
    if quant_type:  # MPEG
        for _ in range(2):
            load_quant_mat = bits.u(1)  # load_intra_quant_mat, load_nonintra_quant_mat
            if load_quant_mat:
                for _ in range(64):
                    if not bits.u(8):
                        break
    if verid != 1:
        bits.skip(quarter_sample=1)
    complexity_estimation_disable = bits.u(1)
    if not complexity_estimation_disable:
        return True
    bits.skip(resync_marker_disable=1)
    return bool(bits.u(1))
