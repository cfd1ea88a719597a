"""The index of a file's frames by time stamps, from as few of its packets as possible.

Frames are numbered in presentation order. A group of pictures is a keyframe with all packets up to
the next one. Whatever the order of B-frames, a group's frames have consecutive numbers: those of
earlier groups come before, even if the group is open and begins with frames shown before its
keyframe. So sorting one group's time stamps numbers its frames exactly, and of containers with an
index of all packets (mp4, mov) only the requested groups have to be read.

That holds if packets are what the container claims: each is checked (`bitstream`) before its time
is used. A file with one that is not has an `ExactIndex` instead.
"""

from array import array
from typing import BinaryIO

import av
import numpy as np

from stts_slowfast.video.bitstream import PacketReader, packet_reader, reorder_depth
from stts_slowfast.video.exact_index import UNKNOWN, ExactIndex
from stts_slowfast.video.ffmpeg_log import errors
from stts_slowfast.video.stream import Stream
from stts_slowfast.video.truncation import ends_early, file_size

# FFmpeg's flags of an index entry; the second is for packets that an edit list leaves out.
_KEYFRAME, _DISCARD = 1, 2


class FrameIndex:
    """Numbers and time stamps of a stream's frames, in packed arrays.

    Attributes:
        pts: (frames,) time stamps in presentation order; UNKNOWN in groups not read yet.
        starts: (groups,) number of each group's first frame.
        keys: (groups,) its keyframe's time stamp, UNKNOWN as above.
        decoded: (groups,) its decoding time if the container's index has it, else None.
        num_frames: frames of the file; never changes.
        times: (frames,) presentation times up to a constant, as far as they are known.
        damage: what is missing ("" if nothing is).
        exact: the index of the decoded file, once a packet contradicted the above.
        numbers: (frames,) the frames' numbers in ``exact``.
    """

    def __init__(self, pts, starts, keys, decoded=None, damage: str = "", times=None):
        self.pts, self.starts, self.keys, self.decoded = pts, starts, keys, decoded
        self.num_frames, self.damage = len(pts), damage
        self.times = pts if times is None else times
        self.exact: ExactIndex | None = None
        self.numbers = None

    @property
    def nbytes(self) -> int:
        exact = self.exact.nbytes + self.numbers.nbytes if self.exact else 0
        own = self.pts.nbytes if self.times is self.pts else 2 * self.pts.nbytes
        return own + 3 * self.starts.nbytes + exact

    def group(self, frame: int) -> int:
        """The group of a frame."""
        return max(0, int(np.searchsorted(self.starts, frame, "right")) - 1)

    def seek_group(self, frame: int) -> int:
        """The group to decode from: the last whose keyframe is not shown after the frame."""
        group = self.group(frame)
        while group and self.keys[group] > self.pts[frame]:
            group -= 1
        return group

    def unread_groups(self, frames: list[int]) -> list[range]:
        """Consecutive groups that have to be read before the frames are known."""
        groups = np.unique(np.searchsorted(self.starts, frames, "right")) - 1
        before = np.maximum(groups - 1, 0)  # which may have frames shown before their keyframe
        groups = np.unique(np.concatenate([groups, before]))
        groups = groups[self.keys[groups] == UNKNOWN]
        cuts = np.flatnonzero(np.diff(groups) > 1) + 1
        return [range(part[0], part[-1] + 1) for part in np.split(groups, cuts) if len(part)]

    def can_start(self, group: int, packet: av.Packet) -> bool:
        """Whether decoding may start at this keyframe instead of the group's."""
        if self.decoded is not None:
            return packet.dts == self.decoded[group]
        return packet.pts is not None and packet.pts <= self.keys[group]

    def seek_candidates(self, group: int) -> list[int]:
        """Time stamps to seek, the most likely first: a container finds the last keyframe that is
        not shown later, even if its index has only decoding times."""
        if self.keys[group] != UNKNOWN:
            return [int(self.keys[group])]
        shift = int(self.keys[0] - self.decoded[0]) if self.keys[0] != UNKNOWN else 0
        after = [int(self.decoded[group + 1]) - 1] if group + 1 < len(self.starts) else []
        return [int(self.decoded[group]) + shift, *after]

    def bounds(self, group: int) -> tuple[int, int]:
        """First frame of a group, and of the next."""
        last = group + 1 == len(self.starts)
        return int(self.starts[group]), len(self.pts) if last else int(self.starts[group + 1])

    def add_group(self, group: int, packets: list[av.Packet], read: PacketReader) -> bool:
        """Adds the times of a group's packets; False if they contradict the index, each other, the
        neighbouring groups, or what ``read`` finds in them."""
        start, end = self.bounds(group)
        found = _PacketTimes(read)
        complete = all([found.add(packet) for packet in packets]) and len(found.pts) == end - start
        if not complete or packets[0].dts != self.decoded[group] or len(found.keys) != 1:
            return False
        pts = found.shown()
        if pts is None:
            return False
        before = self.pts[start - 1] if start else UNKNOWN
        after = self.pts[end] if end < len(self.pts) else UNKNOWN
        if before >= pts[0] or (after != UNKNOWN and after <= pts[-1]):
            return False
        self.pts[start:end], self.keys[group] = pts, found.keys[0]
        return True

    def use_exact(self, exact: ExactIndex, stream: Stream) -> None:
        """Reads frames from ``exact`` from now on, after a contradiction. Neither the count nor the
        numbers of frames that were read before change: if the decoder gives fewer frames than there
        are packets, the frame before replaces each missing one."""
        numbers = np.arange(self.num_frames)
        if exact.num_frames != self.num_frames:
            shown = _shown_times(stream)
            if exact.times is not None and len(shown) == self.num_frames:
                numbers = np.searchsorted(exact.times, shown, "right") - 1
            numbers = numbers.clip(0, exact.num_frames - 1)
            missing = f"{exact.num_frames} of {self.num_frames} frames can be decoded"
            self.damage = exact.decode_error or missing
            stream.record_damage(self.damage)
        self.exact, self.numbers = exact, numbers


class _PacketTimes:
    """Presentation times of a stream's packets, added in decoding order."""

    def __init__(self, read: PacketReader):
        self.read, self.depth = read, reorder_depth(read)
        self.pts, self.orders, self.keys, self.discarded = (array("q") for _ in range(4))
        self.offset, self.first = -1, True

    def add(self, packet: av.Packet) -> bool:
        """False if the packet is not what its container claims."""
        picture = self.read(memoryview(packet))
        offset = -1 if packet.pos is None else packet.pos
        if picture is None or packet.pts is None or offset < self.offset:
            return False
        if (packet.is_keyframe and not picture.entry) or (self.first and not picture.closed):
            return False
        self.offset, self.first = offset, False
        if picture.entry and packet.is_keyframe:
            self.keys.append(packet.pts)
        if packet.is_discard:
            self.discarded.append(packet.pts)
        elif picture.shown:
            self.pts.append(packet.pts)
            self.orders.append(UNKNOWN if picture.order is None else picture.order)
        return True

    def shown(self) -> np.ndarray | None:
        """The times in presentation order; None if the decoder's order may differ."""
        pts, orders = np.array(self.pts, np.int64), np.array(self.orders, np.int64)
        if not len(pts):
            return None
        order = np.argsort(pts, kind="stable")
        pts = pts[order]
        discarded = np.array(self.discarded, np.int64)
        if (np.diff(pts) <= 0).any() or ((discarded >= pts[0]) & (discarded <= pts[-1])).any():
            return None
        if orders[0] == UNKNOWN:  # a gap may be lost frames, without which others are lost too
            return pts if steady(pts) else None
        # A frame that is shown earlier than it is decoded delays for as many others.
        delays = (np.arange(len(pts)) - np.argsort(order)).max()
        return pts if (np.diff(orders[order]) > 0).all() and delays <= (self.depth or 0) else None


def from_index(stream: Stream) -> FrameIndex | None:
    """From the container's own index; None if it does not cover all packets, or if the file
    contradicts it."""
    entries = getattr(stream.stream, "index_entries", None)  # not in PyAV 14
    name, read = stream.container.format.name, packet_reader(stream.stream)
    if not entries or "mp4" not in name or len(entries) != stream.stream.frames or not read:
        return None
    rows = [(each.timestamp, each.flags, each.pos) for each in entries]
    decoded, flags, offsets = np.array(rows, np.int64).T
    last = entries[len(entries) - 1]
    if last.pos + last.size > file_size(stream.file) or not flags[0] & _KEYFRAME:
        return None
    if (flags & _DISCARD).any() or (np.diff(offsets) <= 0).any() or not steady(decoded):
        return None
    depth, first = reorder_depth(read), read(_bytes_at(stream.file, offsets[0], entries[0].size))
    if (
        depth is None
        or first is None
        or not first.closed
        or not _has_frame_per_packet(stream.stream)
    ):
        return None
    starts = np.flatnonzero(flags & _KEYFRAME)
    unknown = np.full(len(entries), UNKNOWN)
    return FrameIndex(
        unknown, starts, unknown[: len(starts)].copy(), decoded[starts].copy(), times=decoded
    )


def _has_frame_per_packet(stream: av.video.stream.VideoStream) -> bool:
    """Whether every packet of the codec has a frame, so that not all need to be checked."""
    codec = stream.codec_context.codec
    name = getattr(codec, "canonical_name", codec.name)
    return codec.intra_only or name in ("h264", "hevc", "av1", "vp9")


def steady(times: np.ndarray) -> bool:
    """Whether ascending times are even: none is off by as much as half a frame."""
    span = int(times[-1] - times[0])
    even = times[0] + np.arange(len(times)) * (span / max(len(times) - 1, 1))
    return bool((np.abs(times - even) * 2 * (len(times) - 1) <= span).all())


def from_packets(stream: Stream) -> FrameIndex | None:
    """By reading all packets; None if they do not determine what the file decodes to. Records
    damage."""
    errors_before, _ = errors()
    packets = stream.packets()
    read = packet_reader(stream.stream)
    found, count, last, reliable = _PacketTimes(read) if read else None, 0, 0, read is not None
    edited = False
    try:
        for packet in packets:
            if not packet.size:
                continue
            count, last = count + 1, last if packet.dts is None else packet.dts
            if packet.is_corrupt:
                reliable = False
                stream.record_damage("a packet is marked as corrupt")
            reliable = reliable and found.add(packet)
            edited = edited or packet.is_discard
    except av.FFmpegError as error:
        if not count:
            raise
        stream.record_damage(f"it breaks off: {error.strerror}")
    early = ends_early(stream, count, last, edited, errors_before)
    if early:
        stream.damage = early
    pts = found.shown() if reliable else None
    if pts is None:
        return None
    keys = np.sort(np.array(found.keys, np.int64))
    return FrameIndex(pts, np.searchsorted(pts, keys), keys, damage=stream.damage)


def _shown_times(stream: Stream) -> np.ndarray:
    """Times of all packets whose frames are shown."""
    packets = (each for each in stream.packets() if each.size and not each.is_discard)
    return np.unique([each.pts for each in packets if each.pts is not None])


def _bytes_at(file: BinaryIO, offset: int, size: int) -> bytes:
    before = file.tell()
    file.seek(int(offset))
    data = file.read(size)
    file.seek(before)  # the container reads on from there
    return data
