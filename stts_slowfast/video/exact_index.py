"""The index of a file that was decoded from its first frame to its last.

Files with packed B-frames, packets without times, pictures that are "not coded", joined recordings
or false keyframes do not decode to what they claim. They are decoded once to count their frames,
and again from the start up to the last wanted frame. Of long files a checksum of each frame's
pixels is
kept, so that reading can seek: a frame that differs is noticed, and the file is then decoded from
its start.
"""

import zlib
from array import array
from collections.abc import Iterator

import av
import numpy as np

from stts_slowfast.video.io import VideoError
from stts_slowfast.video.stream import Stream

UNKNOWN = np.iinfo(np.int64).min
MAX_FRAME_BYTES = 64 * 2**20  # of decoded frames that are kept; a file with more is long
_MAX_REORDER = 16  # frames that a decoder may delay
_MAX_SEARCH = 300  # frames between the end of a seek and the intended keyframe


class ExactIndex:
    """The frames of a stream, in the decoder's output order.

    Attributes:
        pts: (frames,) the decoder's time stamps, UNKNOWN if it gives none.
        checksums: (frames,) checksums of their pixels; empty if the file is short.
        keys: numbers of the frames to seek; empty if the file is short.
        seekable: whether seeking has always given the same pixels.
        damage: what is missing from the file ("" if nothing).
        decode_error: the decoder's error ("" if none), from frame ``first_damaged`` on.
    """

    def __init__(
        self, pts, checksums, keys, damage: str = "", decode_error: str = "", first_damaged: int = 0
    ):
        self.pts, self.checksums, self.keys, self.damage = pts, checksums, keys, damage
        self.num_frames, self.seekable = len(pts), True
        self.decode_error, self.first_damaged = decode_error, min(first_damaged, len(pts) - 1)

    @property
    def nbytes(self) -> int:
        return self.pts.nbytes + self.checksums.nbytes + self.keys.nbytes

    @property
    def times(self) -> np.ndarray | None:
        """(frames,) presentation times, or None if they are unknown. Containers that give decoding
        times as presentation times are right once these are sorted; joined recordings are not.
        """
        order = np.argsort(self.pts, kind="stable")
        times, moved = self.pts[order], np.abs(order - np.arange(len(order))).max()
        known = times[0] != UNKNOWN and (np.diff(times) > 0).all() and moved <= _MAX_REORDER
        return times if known else None

    def key(self, number: int) -> int:
        """The frame to seek before decoding ``number``; 0 is the start of the file."""
        index = int(np.searchsorted(self.keys, number, "right")) - 1
        return int(self.keys[index]) if self.seekable and index >= 0 else 0


def decode_all(stream: Stream) -> tuple[ExactIndex, list[av.VideoFrame]]:
    """Decodes all frames, and returns them too if they are few."""
    pts, checksums, keys = array("q"), array("L"), array("q")
    frames: list[av.VideoFrame] = []
    room, intact, damage = MAX_FRAME_BYTES, 0, stream.damage
    stream.decode_error = ""
    for number, frame in enumerate(stream.frames(stream.packets())):
        pts.append(UNKNOWN if frame.pts is None else frame.pts)
        intact += not stream.decode_error
        room -= sum(plane.buffer_size for plane in frame.planes)
        frames.append(frame)
        if room < 0:
            for each, frame in enumerate(frames, number + 1 - len(frames)):
                checksums.append(checksum(frame))
                if frame.key_frame and frame.pts is not None and each:
                    keys.append(each)
            frames = []
    if not pts:
        raise VideoError(stream.name, "none of its frames can be decoded")
    arrays = np.array(pts, np.int64), np.array(checksums, np.uint32), np.array(keys, np.int64)
    stream.damage = damage  # the decoder's error counts once a damaged frame is read
    return ExactIndex(*arrays, damage, stream.decode_error, intact), frames


def checksum(frame: av.VideoFrame) -> int:
    """CRC-32 of the pixels of a frame's first plane (luma), as decoded."""
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
        yield from _decode_from(stream, index, left, start)
        if left and len(left) == count:
            if not start:
                raise VideoError(stream.name, "frames that were there before cannot be decoded now")
            index.seekable = False


def _decode_from(
    stream: Stream, index: ExactIndex, left: list[int], start: int
) -> Iterator[av.VideoFrame]:
    """Frames from ``start`` on, up to a gap; removes those it yields from ``left``. Ends at a frame
    that differs from the first decoding."""
    packets = stream.seek(int(index.pts[start])) if start else stream.packets()
    if packets is None:
        return
    number = start
    for count, frame in enumerate(stream.frames(packets)):
        if start and (number >= index.num_frames or checksum(frame) != index.checksums[number]):
            if number == start and count < _MAX_SEARCH:
                continue  # the container starts before the requested frame
            index.seekable = False
            return
        while left and left[0] == number:
            del left[0]
            yield frame
        number += 1
        if not left or index.key(left[0]) > number + 1:
            return
