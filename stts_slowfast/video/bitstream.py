"""The first bytes of packets: whether decoding may start there, and the presentation order.

A container's keyframes and presentation times are often wrong. The decoder follows the packets, so
a container's claims are used only if its packets agree. Codecs without a reader here, and streams
of a known codec that may not decode to one frame a packet in presentation order, have none: see
`packet_reader`.
"""

import re
from collections.abc import Callable

import av

from stts_slowfast.video.h26x import H264, HEVC, Bits, Picture

# Reads one packet after the other, in decoding order, from an entry on. None: the packet is not one
# frame, or not what its stream's header declares.
PacketReader = Callable[[bytes | memoryview], Picture | None]


def packet_reader(stream: av.video.stream.VideoStream) -> PacketReader | None:
    """A reader for the packets of a stream, or None if they are not reliable."""
    codec = stream.codec_context.codec
    name = getattr(codec, "canonical_name", codec.name)
    try:
        if name in _READERS:
            return _READERS[name](bytes(stream.codec_context.extradata or b""))
    except (ValueError, IndexError):
        return None
    return _Intra(b"") if codec.intra_only else None


def reorder_depth(reader: PacketReader) -> int | None:
    """How many frames the decoder may delay for reordering; None: it guesses, and loses frames that
    come later than that."""
    return getattr(reader, "depth", 0)


class _Intra:
    """Codecs with intra frames only."""

    def __init__(self, extradata: bytes):
        self.count = 0

    def __call__(self, data) -> Picture | None:
        self.count += 1
        return Picture(True, True, self.count)


class _MPEG4:
    """MPEG-4 part 2 without B-frames, in order: one coded picture a packet."""

    def __init__(self, extradata: bytes):
        self.count, self.time_bits = 0, _time_bits(extradata)

    def __call__(self, data) -> Picture | None:
        data = bytes(data)
        offset = data.find(_VOP)
        self.time_bits = self.time_bits or _time_bits(data)
        if offset < 0 or data.find(_VOP, offset + 4) >= 0 or not self.time_bits:
            return None
        bits = Bits(data[offset + 4 : offset + 24])
        kind = bits.u(2)
        try:
            while bits.u(1):
                pass
            bits.u(self.time_bits + 2)
            if kind == 2 or not bits.u(1):  # a B-frame, or "not coded": no frame
                return None
        except ValueError:
            return None
        self.count += 1
        return Picture(kind == 0, kind == 0, self.count)


_VOP, _VOL = b"\0\0\1\xb6", re.compile(rb"\x00\x00\x01[\x20-\x2f]")


def _time_bits(data: bytes) -> int:
    """Bits of a picture's time, by the header of its stream; 0 if that is not in ``data``."""
    found = _VOL.search(data)
    if not found:
        return 0
    bits = Bits(data[found.end() : found.end() + 32])
    bits.u(9)
    if bits.u(1):
        bits.u(7)
    if bits.u(4) == 15:
        bits.u(16)
    if bits.u(1):
        bits.u(3)
        if bits.u(1):
            bits.u(79)
    if bits.u(2):
        raise ValueError("a shape that is not a rectangle")
    bits.u(1)
    return max(1, (bits.u(16) - 1).bit_length())


class _VP8:
    def __init__(self, extradata: bytes):
        self.count = 0

    def __call__(self, data) -> Picture | None:
        self.count += 1
        key = not data[0] & 1 and bytes(data[3:6]) == b"\x9d\1\x2a"
        return Picture(key, key, self.count, bool(data[0] & 16))


class _VP9:
    def __init__(self, extradata: bytes):
        self.count = 0

    def __call__(self, data) -> Picture | None:
        self.count += 1
        frames = [self._frame(data[start]) for start in self._starts(data)]
        if None in frames or sum(shown for _, shown in frames) != 1:
            return None
        return Picture(frames[0][0], frames[0][0], self.count)

    @staticmethod
    def _starts(data) -> list[int]:
        """Offsets of the frames in a packet."""
        last, starts = data[-1], [0]
        width, count = (last >> 3 & 3) + 1, (last & 7) + 1
        size = 2 + width * count
        if last & 0xE0 != 0xC0 or len(data) < size or data[-size] != last:
            return starts
        index = bytes(data[-size + 1 : -1])
        for each in range(count - 1):
            length = int.from_bytes(index[each * width : each * width + width], "little")
            starts.append(min(starts[-1] + length, len(data) - 1))
        return starts

    @staticmethod
    def _frame(byte: int) -> tuple[bool, bool] | None:
        """Whether a frame is a keyframe, and whether it is shown."""
        if byte >> 6 != 2 or byte & 0x30 == 0x30:
            return None
        if byte & 8:
            return False, True  # an earlier one is shown
        return not byte & 4, bool(byte & 2)


class _AV1:
    def __init__(self, extradata: bytes):
        self.count = 0

    def __call__(self, data) -> Picture | None:
        self.count += 1
        frames, offset, header = [], 0, False
        while offset < len(data):
            kind, extended, sized = data[offset] >> 3 & 15, data[offset] & 4, data[offset] & 2
            offset += 1
            if extended:
                if data[offset] >> 3 & 3:
                    return None  # a spatial layer
                offset += 1
            size = len(data) - offset
            if sized:
                size = shift = 0
                while True:
                    size |= (data[offset] & 127) << shift
                    shift, offset = shift + 7, offset + 1
                    if not data[offset - 1] & 128:
                        break
            header = header or kind == 1
            if kind == 1 and data[offset] & 8:
                return None  # a still picture, whose frames have another header
            if kind in (3, 6):
                byte = data[offset]
                repeated, key, shown = byte & 128, not byte & 96, byte & 16
                frames.append((header and not repeated and key and shown, repeated or shown))
            offset += size
        if sum(bool(shown) for _, shown in frames) != 1:
            return None
        return Picture(bool(frames[0][0]), bool(frames[0][0]), self.count)


_READERS = {
    "h264": H264,
    "hevc": HEVC,
    "mpeg4": _MPEG4,
    "vp8": _VP8,
    "vp9": _VP9,
    "av1": _AV1,
}
