"""Which time stamp the i-th frame of a file has, from as few of its packets as will do.

Frames are numbered as they are shown. A group is a keyframe with all packets up to the next one.
Whatever order B-frames put packets in, a group's packets are shown as one stretch of numbers: those
of earlier groups come before, also where the group is open and begins with frames shown before its
keyframe. So sorting one group's time stamps numbers its frames exactly, and the containers that
keep an index of all packets (mp4, mov) need only the groups read that are asked for.
"""

import os
from array import array
from collections import OrderedDict
from typing import BinaryIO

import av
import numpy as np

UNKNOWN = np.iinfo(np.int64).min
# FFmpeg's flags of an index entry; the second is for packets that an edit list leaves out.
_KEYFRAME, _DISCARD = 1, 2
REMEMBERED_BYTES = 32 * 2**20


class Times:
    """Numbers and time stamps of a stream's frames, in packed arrays.

    Attributes:
        pts: (frames,) time stamps in the order of showing; UNKNOWN in groups not read yet.
        starts: (groups,) number of each group's first frame.
        keys: (groups,) its keyframe's time stamp, UNKNOWN as above.
        decoded: (groups,) its time of decoding where the container's index tells it, else None.
        timed: False where time stamps cannot be relied on, so that frames have to be counted.
        num_frames: of the file; 0 until they are counted.
        damage: what is missing ("" if nothing is).
    """

    def __init__(self, pts, starts, keys, decoded=None, damage: str = ""):
        self.pts, self.starts, self.keys, self.decoded = pts, starts, keys, decoded
        self.num_frames, self.timed, self.damage = len(pts), len(pts) > 0, damage

    @property
    def nbytes(self) -> int:
        return self.pts.nbytes + 3 * self.starts.nbytes

    def group(self, frame: int) -> int:
        """The group in whose stretch of numbers a frame lies."""
        return max(0, int(np.searchsorted(self.starts, frame, "right")) - 1)

    def origin(self, frame: int) -> int:
        """The group to begin decoding at: the last whose keyframe is shown no later."""
        group = self.group(frame)
        while group and self.keys[group] > self.pts[frame]:
            group -= 1
        return group

    def unread(self, frames: list[int]) -> list[range]:
        """Runs of groups that have to be read before these frames are known."""
        groups = np.unique(np.searchsorted(self.starts, frames, "right")) - 1
        before = np.maximum(groups - 1, 0)  # where a frame shown before its keyframe begins
        groups = np.unique(np.concatenate([groups, before]))
        groups = groups[self.keys[groups] == UNKNOWN]
        cuts = np.flatnonzero(np.diff(groups) > 1) + 1
        return [range(run[0], run[-1] + 1) for run in np.split(groups, cuts) if len(run)]

    def begins(self, group: int, packet: av.Packet) -> bool:
        """Whether decoding may begin with this keyframe instead of the group's."""
        if self.decoded is not None:
            return packet.dts == self.decoded[group]
        return packet.pts is not None and packet.pts <= self.keys[group]

    def targets(self, group: int) -> list[int]:
        """Time stamps to seek, the likeliest first: a container finds the last keyframe that is
        shown no later, also where its index tells times of decoding alone."""
        if self.keys[group] != UNKNOWN:
            return [int(self.keys[group])]
        shift = int(self.keys[0] - self.decoded[0]) if self.keys[0] != UNKNOWN else 0
        after = [int(self.decoded[group + 1]) - 1] if group + 1 < len(self.starts) else []
        return [int(self.decoded[group]) + shift, *after]

    def bounds(self, group: int) -> tuple[int, int]:
        last = group + 1 == len(self.starts)
        return int(self.starts[group]), len(self.pts) if last else int(self.starts[group + 1])

    def learn(self, group: int, stamps: list[tuple[int, int]]) -> bool:
        """Takes down a group's times of decoding and of showing, packet by packet; False where
        they contradict the index, each other, or what is known of their neighbours."""
        start, end = self.bounds(group)
        if len(stamps) != end - start or stamps[0][0] != self.decoded[group]:
            return False
        if any(shown is None for _, shown in stamps):
            return False
        pts = np.sort(np.array([shown for _, shown in stamps], np.int64))
        before = self.pts[start - 1] if start else UNKNOWN
        after = self.pts[end] if end < len(self.pts) else UNKNOWN
        if (np.diff(pts) <= 0).any() or before >= pts[0] or (after != UNKNOWN and after <= pts[-1]):
            return False
        self.pts[start:end], self.keys[group] = pts, stamps[0][1]
        return True


def from_index(stream: av.video.stream.VideoStream, size: int) -> Times | None:
    """From the container's own index; None where it has none of all packets, or where the file
    (of ``size`` bytes) is not what the index says."""
    entries = getattr(stream, "index_entries", None)  # PyAV 14 does not show them
    if not entries or "mp4" not in stream.container.format.name or len(entries) != stream.frames:
        return None
    last = entries[len(entries) - 1]
    flags = np.array([entry.flags for entry in entries])
    if last.pos + last.size > size or not flags[0] & _KEYFRAME or (flags & _DISCARD).any():
        return None
    starts = np.flatnonzero(flags & _KEYFRAME)
    decoded = np.array([entries[int(start)].timestamp for start in starts], np.int64)
    unknown = np.full(len(entries), UNKNOWN)
    return Times(unknown, starts, unknown[: len(starts)].copy(), decoded)


def from_packets(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, file: BinaryIO
) -> Times:
    """By reading all packets out of ``file``, none of which is kept."""
    errors, _ = av.logging.get_last_error()
    pts, keys = array("q"), array("q")
    previous, count, rising, reliable, broken = UNKNOWN, 0, True, True, ""
    try:
        for packet in container.demux(stream):
            if not packet.size:
                continue
            reliable = reliable and packet.pts is not None and (count > 0 or packet.is_keyframe)
            count += 1
            if packet.is_corrupt:
                reliable, broken = False, "a packet is marked as corrupt"
            if not reliable:
                continue
            rising, previous = rising and packet.pts > previous, packet.pts
            if not packet.is_discard:
                pts.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
    except av.FFmpegError as error:
        if not count:
            raise
        broken = f"it breaks off: {error.strerror}"
    damage = _ends_early(container, stream, count, file, errors) or broken
    # AVI has no times of showing: for H.264 and HEVC FFmpeg makes them up in the order of packets.
    reorders = stream.codec_context.has_b_frames and container.format.name == "avi"
    ordered = np.sort(np.array(pts, np.int64))
    if not reliable or not len(ordered) or (np.diff(ordered) == 0).any() or (rising and reorders):
        return Times(*[np.empty(0, np.int64)] * 3, damage=damage)
    keys = np.sort(np.array(keys, np.int64))
    return Times(ordered, np.searchsorted(ordered, keys), keys, damage=damage)


def _ends_early(container, stream, count: int, file: BinaryIO, errors: int) -> str:
    """Whether a file holds less than it promises: clearly less than the frames of its header, or
    at all less than the bytes of its parts."""
    if stream.frames and count < 0.98 * stream.frames - 1:
        return f"it ends early: {count} of {stream.frames} frames are there"
    number, said = av.logging.get_last_error()
    if number != errors and "ended prematurely" in said[2]:  # Matroska's elements have sizes
        return "it ends early: in the middle of what its header promises"
    where, size = file.tell(), file.seek(0, os.SEEK_END)
    torn = _is_torn(container.format.name, file, size)
    file.seek(where)  # where the container left it
    entries = getattr(stream, "index_entries", None) or ()
    if torn or any(entry.pos + entry.size > size for entry in entries):
        return f"it ends early: its last part goes on beyond its {size} bytes"
    return ""


def _is_torn(name: str, file: BinaryIO, size: int) -> bool:
    """Whether the last chunk of an AVI, or the last packet of a transport stream, is not whole."""
    end = 0
    if name == "mpegts":
        file.seek(max(size - 3 * 204, 0))
        tail = file.read()
        # The byte that begins a packet; of 192, the first four are a time.
        ends = (tail[-first::-length][:3] for first, length in ((188, 188), (188, 192), (204, 204)))
        return b"GGG" not in ends
    while name == "avi" and end < size:
        file.seek(end)
        kind, length = file.read(4), file.read(4)
        if kind != b"RIFF":
            return False
        end += 8 + int.from_bytes(length, "little")
    return end > size


class Memory:
    """What is known of the files that this process opened last, up to a number of bytes: `Times`,
    or anything with ``nbytes``."""

    def __init__(self, limit: int = REMEMBERED_BYTES):
        self.limit = limit
        self.clear()

    def clear(self) -> None:
        self.items, self.sizes, self.size = OrderedDict(), {}, 0

    def get(self, key):
        if key in self.items:
            self.items.move_to_end(key)
        return self.items.get(key)

    def put(self, key, item) -> None:
        if key is None:
            return
        self._forget(key)
        self.items[key], self.sizes[key] = item, item.nbytes + 500
        self.size += self.sizes[key]
        while self.size > self.limit and len(self.items) > 1:
            self._forget(next(iter(self.items)))

    def _forget(self, key) -> None:
        if self.items.pop(key, None) is not None:
            self.size -= self.sizes.pop(key)
