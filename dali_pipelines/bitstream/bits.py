"""Reads the bits of a header field by field."""

from dali_pipelines.bitstream.parser import UncertainError


class Bits:
    """Reads unsigned numbers from the start of some bytes. All methods raise `UncertainError` if the bytes run out."""

    def __init__(self, data: bytes):
        self._value = int.from_bytes(data)
        self._count = self._left = 8 * len(data)

    @property
    def position(self) -> int:
        """Bits read so far."""
        return self._count - self._left

    def u(self, count: int) -> int:
        """Reads the next `count` bits as a number."""
        self._left -= count
        if self._left < 0:
            raise UncertainError("a header is cut off")
        return self._value >> self._left & ((1 << count) - 1)

    def ue(self) -> int:
        """Reads an Exp-Golomb number."""
        rest = self._value & ((1 << self._left) - 1)
        zeros = self._left - rest.bit_length()
        self.u(zeros)
        return self.u(zeros + 1) - 1

    def skip(self, **fields: int) -> None:
        """Skips fields, given as name in the specification = width in bits."""
        self.u(sum(fields.values()))

    def skip_ue(self, *names: str) -> None:
        """Skips one Exp-Golomb number for each of these names from the specification."""
        for _ in names:
            self.ue()
