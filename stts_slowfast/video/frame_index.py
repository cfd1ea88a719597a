"""Which time stamp the i-th frame of a file has, from as few of its packets as will do.

Frames are numbered as they are shown. A group is a keyframe with all packets up to the next one.
Whatever order B-frames put packets in, a group's packets are shown as one stretch of numbers: those
of earlier groups come before, also where the group is open and begins with frames shown before its
keyframe. So sorting one group's time stamps numbers its frames exactly, and the containers that
keep an index of all packets (mp4, mov) need only the groups read that are asked for.

That holds for files whose packets are what the container says of them: each is asked (`bitstream`)
before its time is believed. A file with one that is not has no `Times` but an `ExactIndex`.
"""

from array import array
from collections import OrderedDict
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
CACHE_BYTES = 32 * 2**20


class FrameIndex:
    """Numbers and time stamps of a stream's frames, in packed arrays.

    Attributes:
        pts: (frames,) time stamps in the order of showing; UNKNOWN in groups not read yet.
        starts: (groups,) number of each group's first frame.
        keys: (groups,) its keyframe's time stamp, UNKNOWN as above.
        decoded: (groups,) its time of decoding where the container's index tells it, else None.
        num_frames: of the file; never changes.
        times: (frames,) when each is shown, up to a constant, as far as is known.
        damage: what is missing ("" if nothing is).
        exact: what decoding the file gave, once something did not agree with the above; and
        numbers: (frames,) the frames' numbers in it.
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
        """The group in whose stretch of numbers a frame lies."""
        return max(0, int(np.searchsorted(self.starts, frame, "right")) - 1)

    def origin(self, frame: int) -> int:
        """The group to begin decoding at: the last whose keyframe is shown no later."""
        group = self.group(frame)
        while group and self.keys[group] > self.pts[frame]:
            group -= 1
        return group

    def unread_groups(self, frames: list[int]) -> list[range]:
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

    def seek_candidates(self, group: int) -> list[int]:
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

    def learn(self, group: int, packets: list[av.Packet], read: PacketReader) -> bool:
        """Takes down the times of a group's packets; False where they contradict the index, each
        other, what is known of their neighbours, or what ``read`` finds in them."""
        start, end = self.bounds(group)
        found = _Packets(read)
        whole = all([found.add(packet) for packet in packets]) and len(found.pts) == end - start
        if not whole or packets[0].dts != self.decoded[group] or len(found.keys) != 1:
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

    def settle(self, exact: ExactIndex, stream: Stream) -> None:
        """Something did not agree: from now on frames are those of ``exact``. Their count stays,
        and so do the numbers of those that were read before: where the decoder gives fewer frames
        than there are packets, the one before stands in for each that it does not give."""
        numbers = np.arange(self.num_frames)
        if exact.num_frames != self.num_frames:
            shown = _shown_times(stream)
            if exact.times is not None and len(shown) == self.num_frames:
                numbers = np.searchsorted(exact.times, shown, "right") - 1
            numbers = numbers.clip(0, exact.num_frames - 1)
            promised = f"{exact.num_frames} of {self.num_frames} frames can be decoded"
            self.damage = exact.spoilt or promised
            stream.record_damage(self.damage)
        self.exact, self.numbers = exact, numbers


class _Packets:
    """What the packets of a stream say, one after the other in the order of decoding."""

    def __init__(self, read: PacketReader):
        self.read, self.depth = read, reorder_depth(read)
        self.pts, self.orders, self.keys, self.left_out = (array("q") for _ in range(4))
        self.place, self.first = -1, True

    def add(self, packet: av.Packet) -> bool:
        """False if the packet is not what its container says."""
        picture = self.read(memoryview(packet))
        place = -1 if packet.pos is None else packet.pos
        if picture is None or packet.pts is None or place < self.place:
            return False
        if (packet.is_keyframe and not picture.entry) or (self.first and not picture.closed):
            return False
        self.place, self.first = place, False
        if picture.entry and packet.is_keyframe:
            self.keys.append(packet.pts)
        if packet.is_discard:
            self.left_out.append(packet.pts)
        elif picture.shown:
            self.pts.append(packet.pts)
            self.orders.append(UNKNOWN if picture.order is None else picture.order)
        return True

    def shown(self) -> np.ndarray | None:
        """The times in the order of showing, each once; None if the decoder will have another."""
        pts, orders = np.array(self.pts, np.int64), np.array(self.orders, np.int64)
        if not len(pts):
            return None
        places = np.argsort(pts, kind="stable")
        pts = pts[places]
        left_out = np.array(self.left_out, np.int64)
        if (np.diff(pts) <= 0).any() or ((left_out >= pts[0]) & (left_out <= pts[-1])).any():
            return None
        if orders[0] == UNKNOWN:  # a gap may be of lost frames, without which others are lost too
            return pts if steady(pts) else None
        # A frame that is shown earlier than it is decoded waits for as many others.
        waits = (np.arange(len(pts)) - np.argsort(places)).max()
        return pts if (np.diff(orders[places]) > 0).all() and waits <= (self.depth or 0) else None


def from_index(stream: Stream) -> FrameIndex | None:
    """From the container's own index; None where it has none of all packets, or where the file
    is not what the index says."""
    entries = getattr(stream.stream, "index_entries", None)  # PyAV 14 does not show them
    name, read = stream.container.format.name, packet_reader(stream.stream)
    if not entries or "mp4" not in name or len(entries) != stream.stream.frames or not read:
        return None
    rows = [(each.timestamp, each.flags, each.pos) for each in entries]
    decoded, flags, places = np.array(rows, np.int64).T
    last = entries[len(entries) - 1]
    if last.pos + last.size > file_size(stream.file) or not flags[0] & _KEYFRAME:
        return None
    if (flags & _DISCARD).any() or (np.diff(places) <= 0).any() or not steady(decoded):
        return None
    depth, first = reorder_depth(read), read(_bytes_at(stream.file, places[0], entries[0].size))
    if depth is None or first is None or not first.closed or not _one_frame(stream.stream):
        return None
    starts = np.flatnonzero(flags & _KEYFRAME)
    unknown = np.full(len(entries), UNKNOWN)
    return FrameIndex(
        unknown, starts, unknown[: len(starts)].copy(), decoded[starts].copy(), times=decoded
    )


def _one_frame(stream: av.video.stream.VideoStream) -> bool:
    """Whether its standard has a frame in every packet, so that they need not all be asked."""
    codec = stream.codec_context.codec
    name = getattr(codec, "canonical_name", codec.name)
    return codec.intra_only or name in ("h264", "hevc", "av1", "vp9")


def steady(times: np.ndarray) -> bool:
    """Whether ascending times are even: none is off by as much as half a frame."""
    span = int(times[-1] - times[0])
    even = times[0] + np.arange(len(times)) * (span / max(len(times) - 1, 1))
    return bool((np.abs(times - even) * 2 * (len(times) - 1) <= span).all())


def from_packets(stream: Stream) -> FrameIndex | None:
    """By reading all packets, none of which is kept; None if they do not tell what the file decodes
    to. Notes damage."""
    errors_before, _ = errors()
    packets = stream.packets()
    read = packet_reader(stream.stream)
    found, count, last, reliable = _Packets(read) if read else None, 0, 0, read is not None
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


def _bytes_at(file: BinaryIO, place: int, size: int) -> bytes:
    where = file.tell()
    file.seek(int(place))
    data = file.read(size)
    file.seek(where)  # where the container left it
    return data


class LRUCache:
    """What is known of the files that this process opened last, up to a number of bytes: `Times`,
    or anything with ``nbytes``."""

    def __init__(self, limit: int = CACHE_BYTES):
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
