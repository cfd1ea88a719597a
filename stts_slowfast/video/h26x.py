"""The headers of H.264 and HEVC packets: see `bitstream`."""

from typing import NamedTuple

_FIRST_BYTES = 24  # of a slice: more than its header needs, up to the presentation order
_APART = 1 << 40  # between groups, so that the orders of two never overlap


class Picture(NamedTuple):
    """What a packet holds.

    Attributes:
        entry: decoding may start here; later frames are those of a full decoding.
        closed: an entry, and no later packet is shown before it.
        order: increases in presentation order; None if only the decoder knows it.
        shown: the decoder outputs a frame for it.
    """

    entry: bool
    closed: bool
    order: int | None
    shown: bool = True


class Bits:
    """Bits of a header, most significant first. Raises ValueError after the last."""

    def __init__(self, data: bytes):
        self.value, self.left = int.from_bytes(data, "big"), 8 * len(data)

    def u(self, count: int) -> int:
        self.left -= count
        if self.left < 0:
            raise ValueError("the header ends early")
        return (self.value >> self.left) & ((1 << count) - 1)

    def ue(self) -> int:
        """Exponential Golomb code."""
        zeros = self.left - (self.value & ((1 << self.left) - 1)).bit_length()
        self.left -= zeros
        return self.u(zeros + 1) - 1

    def skip_ue(self, count: int) -> None:
        for _ in range(count):
            self.ue()


def _plain(data: bytes) -> bytes:
    """Removes emulation prevention bytes."""
    return data.replace(b"\0\0\3", b"\0\0")


class H264:
    """H.264 with a length before each unit (mp4, Matroska, FLV), one sequence header, no fields.

    Only IDR pictures are entries: whether a recovery point is exact is known once it is decoded.
    """

    def __init__(self, extradata: bytes):
        if extradata[:1] != b"\1" or extradata[5] & 31 != 1:
            raise ValueError("not one sequence header")
        self.length = (extradata[4] & 3) + 1
        self.header = extradata[8 : 8 + int.from_bytes(extradata[6:8], "big")]
        self._read_header(Bits(_plain(self.header[1:])))
        self.start = self.previous = self.count = self.number = 0

    def _read_header(self, bits: Bits) -> None:
        profile, _, _ = bits.u(8), bits.u(8), bits.u(8)
        bits.ue()
        if profile not in (66, 77, 88):
            self._skip_chroma(bits)
        self.number_bits = bits.ue() + 4
        kind = bits.ue()
        if kind == 1:
            raise ValueError("orders by a cycle")
        self.order_bits = bits.ue() + 4 if kind == 0 else 0
        bits.ue()
        gaps, _, _, whole_frames = bits.u(1), bits.ue(), bits.ue(), bits.u(1)
        if gaps or not whole_frames:
            raise ValueError("frames may be left out, or fields")
        bits.u(1)
        if bits.u(1):
            bits.skip_ue(4)
        self.depth = 0 if profile == 66 or kind == 2 else self._reorder(bits)

    @staticmethod
    def _skip_chroma(bits: Bits) -> None:
        chroma = bits.ue()
        if chroma == 3 and bits.u(1):
            raise ValueError("separate colour planes")
        bits.skip_ue(2)
        bits.u(1)
        for each in range((8 if chroma != 3 else 12) if bits.u(1) else 0):
            last = following = 8
            for _ in range((16 if each < 6 else 64) if bits.u(1) else 0):
                if following:
                    code = bits.ue()
                    following = (last + (-(code // 2) if code % 2 == 0 else code // 2 + 1)) & 255
                last = following or last

    @staticmethod
    def _reorder(bits: Bits) -> int | None:
        """``max_num_reorder_frames`` of the header's last part, if it has one."""
        if not bits.u(1):
            return None
        if bits.u(1) and bits.u(8) == 255:
            bits.u(32)
        if bits.u(1):
            bits.u(1)
        if bits.u(1):
            bits.u(4)
            if bits.u(1):
                bits.u(24)
        if bits.u(1):
            bits.skip_ue(2)
        if bits.u(1):
            bits.u(65)
        buffers = 0
        for _ in range(2):
            if bits.u(1):
                buffers += 1
                count = bits.ue() + 1
                bits.u(8)
                for _ in range(count):
                    bits.skip_ue(2)
                    bits.u(1)
                bits.u(20)
        if buffers:
            bits.u(1)
        bits.u(1)
        if not bits.u(1):
            return None
        bits.u(1)
        bits.skip_ue(4)
        return bits.ue()

    def __call__(self, data) -> Picture | None:
        offset, length = 0, self.length
        while offset + length < len(data):
            size = int.from_bytes(data[offset : offset + length], "big")
            offset += length
            kind = data[offset] & 31
            if kind in (1, 5):
                return self._picture(kind == 5, data[offset] >> 5 & 3, data[offset + 1 :])
            if kind == 2 or (kind == 7 and bytes(data[offset : offset + size]) != self.header):
                return None
            offset += size
        return None

    def _picture(self, idr: bool, reference: int, data) -> Picture | None:
        bits = Bits(_plain(bytes(data[:_FIRST_BYTES])))
        self.count += 1
        try:
            if bits.ue():
                return None  # not the first slice of a picture
            bits.skip_ue(2)
            number = bits.u(self.number_bits)
            if idr:
                bits.ue()
                self.start, self.previous = self.count * _APART, 0
            elif number != (self.number + 1) % (1 << self.number_bits):
                return None  # a reference is missing: the decoder's substitute varies
            if reference:
                self.number = number
            if not self.order_bits:
                return Picture(idr, idr, self.start + self.count)
            order, cycle = bits.u(self.order_bits), 1 << self.order_bits
        except ValueError:
            return None
        order += (self.previous - order + cycle // 2) // cycle * cycle  # the nearest such number
        if reference:
            self.previous = order
        return Picture(idr, idr, self.start + order)


class HEVC:
    """HEVC with a length before each unit. Random access points are exact by its standard, except
    for frames shown before them."""

    def __init__(self, extradata: bytes):
        if extradata[:1] != b"\1":
            raise ValueError("no lengths")
        self.length = (extradata[21] & 3) + 1

    def __call__(self, data) -> Picture | None:
        offset, length, found = 0, self.length, None
        while offset + length + 2 < len(data):
            size = int.from_bytes(data[offset : offset + length], "big")
            offset += length
            kind, layer = data[offset] >> 1 & 63, (data[offset] & 1) << 5 | data[offset + 1] >> 3
            if kind in (36, 37):  # the sequence ends: later packets are decoded differently
                return None
            if kind < 32 and not layer and found is None:
                flags = data[offset + 2] >> 6
                # The first slice of a picture; an entry's must not discard earlier frames.
                if not flags & 2 or (kind >= 16 and flags & 1) or kind in (16, 17, 18):
                    return None
                found = Picture(kind in (19, 20, 21), kind in (19, 20), None)
            offset += size
        return found
