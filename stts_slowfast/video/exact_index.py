"""The index of a file that was decoded from its first frame to its last: what nobody can deny.

Packed B-frames, packets without times, pictures that are "not coded", joined recordings, false
keyframes: what such files claim is not what they decode to. They are decoded once, which says how
many frames there are, and afterwards again from their start up to the last frame wanted. In long
ones each frame is put down with a checksum of its pixels: there a reading may seek, for a frame
that is not what it was is noticed, upon which the file is decoded from its start after all.
"""

import zlib
from array import array
from collections.abc import Iterator

import av
import numpy as np

from stts_slowfast.video.io import VideoError
from stts_slowfast.video.stream import Stream

UNKNOWN = np.iinfo(np.int64).min
KEPT_BYTES = 64 * 2**20  # of decoded frames: as many are kept for who asked, and make a file long
_REORDERED = 16  # frames that a decoder may hold back
_SEARCHED = 300  # frames from where a seek ends to the keyframe that was meant


class ExactIndex:
    """The frames of a stream, in the order that they are decoded to.

    Attributes:
        pts: (frames,) the times that the decoder gives them, UNKNOWN where it gives none.
        sums: (frames,) checksums of their pixels; empty if the file is short.
        keys: numbers of the frames to seek, likewise.
        seekable: seeking was never seen to give other pixels.
        damage: what the file lacks ("" if nothing).
        spoilt: what the decoder complained of ("" if nothing), from frame ``spoilt_from`` on.
    """

    def __init__(self, pts, sums, keys, damage: str = "", spoilt: str = "", spoilt_from: int = 0):
        self.pts, self.sums, self.keys, self.damage = pts, sums, keys, damage
        self.num_frames, self.seekable = len(pts), True
        self.spoilt, self.spoilt_from = spoilt, min(spoilt_from, len(pts) - 1)

    @property
    def nbytes(self) -> int:
        return self.pts.nbytes + self.sums.nbytes + self.keys.nbytes

    @property
    def times(self) -> np.ndarray | None:
        """(frames,) when each is shown, or None if they do not say. Containers that take times of
        decoding for those of showing are right once they are in order; joined recordings are not.
        """
        places = np.argsort(self.pts, kind="stable")
        times, moved = self.pts[places], np.abs(places - np.arange(len(places))).max()
        known = times[0] != UNKNOWN and (np.diff(times) > 0).all() and moved <= _REORDERED
        return times if known else None

    def key(self, number: int) -> int:
        """The last frame to seek for ``number``; 0: begin with the file."""
        place = int(np.searchsorted(self.keys, number, "right")) - 1
        return int(self.keys[place]) if self.seekable and place >= 0 else 0


def decode_all(stream: Stream) -> tuple[ExactIndex, list[av.VideoFrame]]:
    """Decodes all frames. Returns them too if they are few."""
    pts, sums, keys = array("q"), array("L"), array("q")
    kept, room, whole, damage = [], KEPT_BYTES, 0, stream.damage
    stream.spoilt = ""
    for number, frame in enumerate(stream.frames(stream.packets())):
        pts.append(UNKNOWN if frame.pts is None else frame.pts)
        whole += not stream.spoilt
        room -= sum(plane.buffer_size for plane in frame.planes)
        kept.append(frame)
        if room < 0:
            for each, frame in enumerate(kept, number + 1 - len(kept)):
                sums.append(checksum(frame))
                if frame.key_frame and frame.pts is not None and each:
                    keys.append(each)
            kept = []
    if not pts:
        raise VideoError(stream.name, "none of its frames can be decoded")
    arrays = np.array(pts, np.int64), np.array(sums, np.uint32), np.array(keys, np.int64)
    stream.damage = damage  # the rest is for who asks for the frames that are spoilt
    return ExactIndex(*arrays, damage, stream.spoilt, whole), kept


def checksum(frame: av.VideoFrame) -> int:
    """Of the pixels of a frame's first plane (luma), as they were decoded."""
    plane, planar = frame.planes[0], frame.format.is_planar
    bits = frame.format.components[0].bits if planar else frame.format.padded_bits_per_pixel
    rows = np.frombuffer(plane, np.uint8)[: plane.height * plane.line_size]
    rows = rows.reshape(plane.height, plane.line_size)[:, : plane.width * -(-bits // 8)]
    return zlib.crc32(np.ascontiguousarray(rows))


def read(stream: Stream, index: ExactIndex, numbers: list[int]) -> Iterator[av.VideoFrame]:
    """The frames ``numbers`` (ascending)."""
    left = list(numbers)
    while left:
        start, count = index.key(left[0]), len(left)
        yield from _run(stream, index, left, start)
        if left and len(left) == count:
            if not start:
                raise VideoError(stream.name, "frames that were there before cannot be decoded now")
            index.seekable = False


def _run(stream: Stream, index: ExactIndex, left: list[int], start: int) -> Iterator[av.VideoFrame]:
    """Frames from ``start`` on, up to a gap; removes from ``left`` what it gives. Ends at a frame
    that is not what was decoded before."""
    packets = stream.seek(int(index.pts[start])) if start else stream.packets()
    if packets is None:
        return
    number = start
    for place, frame in enumerate(stream.frames(packets)):
        if start and (number >= index.num_frames or checksum(frame) != index.sums[number]):
            if number == start and place < _SEARCHED:
                continue  # the container begins earlier than it was asked to
            index.seekable = False
            return
        while left and left[0] == number:
            del left[0]
            yield frame
        number += 1
        if not left or index.key(left[0]) > number + 1:
            return
