"""`Video`: an open video file, and any of its frames in one pass."""

import os
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from stts_slowfast.video import exact_index
from stts_slowfast.video.bitstream import packet_reader
from stts_slowfast.video.ffmpeg_log import quiet
from stts_slowfast.video.frame_index import FrameIndex, LRUCache, from_index, from_packets, steady
from stts_slowfast.video.io import (
    Source,
    VideoError,
    open_source,
    source_name,
    stat_key,
    tune_malloc,
)
from stts_slowfast.video.stream import Stream
from stts_slowfast.video.to_rgb import Converter

_memory = LRUCache()


class VideoInfo(NamedTuple):
    """What `probe` tells: frames, frames per second, seconds, pixels."""

    num_frames: int
    fps: float
    duration: float
    height: int
    width: int


class Video:
    """An open video: how many frames it has, and any of them.

    ``source`` is a path (opened by iopath's ``g_pathmgr``), the file's bytes, or a seekable binary
    file. Frame i is what a decoding from the first frame to the last yields as number i, however it
    is asked for. Of files whose packets bear out what the container claims nothing is decoded on
    opening: time stamps say which frame is the i-th; if the container has an index of all packets,
    few of them are read. All other files are decoded once, and what they decoded to is remembered.

    Args:
        threads: decoding threads (0: as many as FFmpeg sees fit).
        rotate: turn and mirror frames as the display matrix says, as players do.

    Attributes:
        num_frames: never changes.
        fps: frames per second, of a file of variable rate their average; ``duration``: seconds.
        ticks: units of the stream's time base a frame.
        clock: (num_frames,) when each is shown, in such units, or None if the rate is even.
        damage: what is wrong with the file as far as it was read ("" if nothing is): frames that it
            promises are missing, or could not be decoded as they were meant.
        num_decoded: frames that the decoder gave out so far.

    Raises VideoError when there is nothing to decode.
    """

    def __init__(
        self, source: Source, name: str | None = None, threads: int = 1, rotate: bool = True
    ):
        self.name = name or source_name(source)
        self.rotate = rotate
        self._reformatter = VideoReformatter()  # one for all frames: making one is slow
        self._kept: list[av.VideoFrame] = []
        tune_malloc()
        self._file, self._owns_file = open_source(source, self.name)
        self._stream = Stream(self._file, self.name, threads)
        try:
            with quiet():
                self._stream.open()
                self._find_times(stat_key(source))
            self._find_rate()
        except VideoError:
            self.close()
            raise
        except Exception as error:
            explained = self._explain(error)
            self.close()
            raise explained from error

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        """Closes the container, and the file if it was opened here."""
        self._kept = []
        self._stream.close()
        if self._owns_file:
            self._file.close()

    def decode(self, indices: Iterable[int], short_side: int = 0) -> torch.Tensor:
        """Decodes the frames ``indices`` (any order, repeats allowed) in one pass over the file.

        Groups of pictures without any of them are passed over, and so are the frames between that
        no other frame needs. With ``short_side``, frames whose shorter side is longer than that are
        scaled down to it on the way. Returns (len(indices), H, W, 3) uint8, RGB.
        """
        indices = [int(index) for index in indices]
        for index in indices:
            if not 0 <= index < self.num_frames:
                raise IndexError(f"{self.name} has frames 0 .. {self.num_frames - 1}, not {index}")
        if not indices:
            raise ValueError("indices is empty: name at least one frame")
        wanted = sorted(set(indices))
        pixels = None
        for number, image in enumerate(self.iter_frames(wanted, short_side)):
            if pixels is None:
                pixels = np.empty((len(wanted), *image.shape), np.uint8)
            pixels[number] = image
        return torch.from_numpy(
            pixels if wanted == indices else pixels[np.searchsorted(wanted, indices)]
        )

    def iter_frames(self, wanted: list[int], short_side: int = 0) -> Iterator[np.ndarray]:
        """As `decode`, image after image (H, W, 3) as the pass goes on: of frames that are given in
        ascending order, each once. All have the size of the first."""
        convert = Converter(short_side, self.rotate, self._reformatter)
        frames = self._wanted(wanted)
        try:
            while True:
                with quiet():
                    frame = next(frames, None)
                    image = None if frame is None else convert(frame)
                if image is None:
                    return
                yield image
        except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
            raise self._explain(error) from error

    def frames_at(self, slots: Iterable[int]) -> list[int]:
        """Frames that are on the screen in the middle of ``slots``, which cut the video's length
        into ``num_frames`` equal parts: the same numbers, unless its rate varies."""
        return frames_at(slots, self.clock, self.ticks)

    @property
    def num_frames(self) -> int:
        return self._index.num_frames

    @property
    def num_decoded(self) -> int:
        return self._stream.num_decoded

    @property
    def damage(self) -> str:
        return self._stream.damage

    @damage.setter
    def damage(self, damage: str) -> None:
        self._stream.damage = damage

    @property
    def info(self) -> VideoInfo:
        """What `probe` tells; the size is that of the first frame as it is decoded."""
        height, width = self.decode([0]).shape[1:3]
        return VideoInfo(self.num_frames, self.fps, self.duration, height, width)

    # -- opening

    def _find_times(self, key: tuple | None) -> None:
        self._key, self._index = key, _memory.get(key)
        if self._index is None:
            self._index = from_index(self._stream) or from_packets(self._stream)
            if self._index is None:
                self._index, self._kept = exact_index.decode_all(self._stream)
            _memory.put(key, self._index)
        self._stream.record_damage(self._index.damage)

    def _find_rate(self) -> None:
        stream, times, count = self._stream.stream, self._index.times, self.num_frames
        rate, unit = stream.average_rate or stream.guessed_rate, stream.time_base
        self.fps, self.clock = float(rate) if rate else 0.0, None
        if times is not None and count > 1:
            clock = times - times[0]
            step = 1 / (self.fps * unit) if self.fps else 0
            # What the container claims, if no frame is off by half of one.
            if (np.abs(clock - np.arange(count) * float(step)) > float(step) / 2).any():
                self.fps = float((count - 1) / (int(clock[-1]) * unit))
                self.clock = None if steady(clock) else clock
        self.fps = self.fps or 30.0  # a single picture has no rate; any will do
        self.ticks = unit.denominator / self.fps / unit.numerator
        self.duration = count / self.fps

    # -- decoding

    def _wanted(self, wanted: list[int]) -> Iterator[av.VideoFrame]:
        """The frames ``wanted`` (ascending, each once)."""
        index, left = self._index, list(wanted)
        if isinstance(index, FrameIndex):
            if index.exact is None and self._read_groups(left):
                self._stream.spoilt = ""
                yield from self._by_time(left)
            if not left:
                return
            if index.exact is None:
                found, self._kept = exact_index.decode_all(self._stream)
                index.settle(found, self._stream)
                _memory.put(self._key, index)
            left, index = index.numbers[left].tolist(), index.exact
        if left and left[-1] >= index.spoilt_from:
            self._stream.record_damage(index.spoilt)
        if self._kept:
            yield from (self._kept[number] for number in left)
        else:
            yield from exact_index.read(self._stream, index, left)

    def _read_groups(self, wanted: list[int]) -> bool:
        """Reads the time stamps that the container's index does not tell, of the groups needed;
        False if they contradict it."""
        times, read = self._index, None
        for run in times.unread_groups(wanted):
            read = read or packet_reader(self._stream.stream)
            packets = (packet for packet in self._seek(run[0]) if packet.size)
            for group in run:
                start, end = times.bounds(group)
                if not times.learn(group, list(islice(packets, end - start)), read):
                    return False
        return True

    def _by_time(self, left: list[int]) -> Iterator[av.VideoFrame]:
        """The frames ``left``, which are removed as they are found, up to the first that is not
        where it should be, or until there is damage: what that spoils is known once the file is
        decoded from its start."""
        times = self._index
        while left and not self._stream.spoilt:
            origin = last = times.origin(left[0])
            # From one group on, and through the next ones as long as something in them is wanted.
            count = 0
            while count < len(left) and times.origin(left[count]) <= last + 1:
                last = times.group(left[count])
                count += 1
            remaining = len(left) - count
            yield from self._decode_span(origin, left, count)
            if len(left) > remaining:
                return

    def _decode_span(self, origin: int, left: list[int], count: int) -> Iterator[av.VideoFrame]:
        """The first ``count`` frames of ``left``, decoded from the group ``origin`` on."""
        times, key = self._index, self._index.keys[origin]
        start, end = times.bounds(origin)
        number = start + int(np.searchsorted(times.pts[start:end], key))
        stamps = times.pts[left[:count]].tolist()
        wanted, in_order = set(stamps), not self._stream.can_skip
        for frame in self._stream.frames(self._seek(origin), wanted):
            if frame.pts is None or self._stream.spoilt:
                return
            if frame.pts < key:
                continue  # the container began earlier
            if in_order:  # as no frame is passed over
                if number >= times.num_frames or frame.pts != times.pts[number]:
                    return
                number += 1
            if frame.pts in wanted:
                if frame.pts != stamps[0]:
                    return
                del stamps[0], left[0]
                yield frame
            if not stamps or frame.pts > stamps[-1]:
                return

    def _seek(self, group: int) -> Iterator[av.Packet]:
        """Packets from the keyframe of ``group`` on, or from an earlier one where the container
        does not find it."""
        times = self._index
        tries = (
            (each, target)
            for each in range(group, -1, -1)
            for target in times.seek_candidates(each)
        )
        for earlier, target in tries:
            packets = self._stream.seek(target)
            try:
                first = next(packets, None) if packets else None
            except av.FFmpegError:
                break
            if first is None:
                break
            if first.is_keyframe and times.begins(earlier, first):
                return chain([first], packets)
        return self._stream.packets()

    def _explain(self, error: Exception) -> VideoError:
        self._file.seek(0, os.SEEK_END)
        if self._file.tell() == 0:
            return VideoError(self.name, "the file is empty")
        reason = getattr(error, "strerror", None) or str(error)
        return VideoError(self.name, f"{reason} (is it truncated, or not a video?)")


def frames_at(slots: Iterable[int], clock: np.ndarray | None, ticks: float) -> list[int]:
    """See `Video.frames_at`."""
    if clock is None:
        return list(slots)
    middles = (np.asarray(list(slots), np.float64) + 0.5) * ticks
    return (np.searchsorted(clock, middles, "right") - 1).clip(0).tolist()


def probe(source: Source) -> VideoInfo:
    """Frames, frames per second, seconds, height and width; at most a frame is decoded."""
    with Video(source) as video:
        return video.info


def decode_clip(
    source: Source, indices: Iterable[int], short_side: int = 0, threads: int = 1
) -> torch.Tensor:
    """Decodes the frames ``indices`` of ``source``: see `Video.decode`."""
    with Video(source, threads=threads) as video:
        return video.decode(indices, short_side)
