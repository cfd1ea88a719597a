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
from stts_slowfast.video.frame_index import FrameIndex, from_index, from_packets, steady
from stts_slowfast.video.io import (
    Source,
    VideoError,
    open_source,
    source_name,
    stat_key,
    tune_malloc,
)
from stts_slowfast.video.lru_cache import LRUCache
from stts_slowfast.video.stream import Stream
from stts_slowfast.video.to_rgb import Converter

# Indices of the files that this process opened last, by `stat_key`.
_cache = LRUCache()


class VideoInfo(NamedTuple):
    """Frames, frames per second, seconds, and the size in pixels."""

    num_frames: int
    fps: float
    duration: float
    height: int
    width: int


class Video:
    """An open video: how many frames it has, and any of them.

    ``source`` is a path (opened by iopath's ``g_pathmgr``), the file's bytes, or a seekable binary
    file. Frame i is the i-th frame of a decoding from the first frame to the last, in whatever
    order frames are read. If the packets agree with the container, nothing is decoded on opening:
    frames are numbered by time stamps, and few packets are read if the container has an index of
    them all. Any other file is decoded once, and its index is cached.

    Args:
        threads: decoding threads (0: FFmpeg's choice).
        rotate: apply the display matrix, as players do.

    Attributes:
        num_frames: never changes.
        fps: frames per second, of a file of variable rate the average; ``duration``: seconds.
        ticks: units of the stream's time base per frame.
        frame_times: (num_frames,) presentation times in such units, or None if the rate is
            constant.
        damage: what is wrong with the file, as far as it was read ("" if nothing is): frames that
            it declares are missing, or were decoded with errors.
        num_decoded: frames decoded so far.

    Raises VideoError if there is nothing to decode.
    """

    def __init__(
        self, source: Source, name: str | None = None, threads: int = 1, rotate: bool = True
    ):
        self.name = name or source_name(source)
        self.rotate = rotate
        self._reformatter = VideoReformatter()  # one for all frames: making one is slow
        self._decoded: list[av.VideoFrame] = []
        tune_malloc()
        self._file, self._owns_file = open_source(source, self.name)
        self._stream = Stream(self._file, self.name, threads)
        try:
            with quiet():
                self._stream.open()
                self._load_index(stat_key(source))
            self._set_rate()
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
        self._decoded = []
        self._stream.close()
        if self._owns_file:
            self._file.close()

    def decode(self, indices: Iterable[int], short_side: int = 0) -> torch.Tensor:
        """Decodes the frames ``indices`` (any order, repeats allowed) in one pass over the file.

        Groups of pictures without any of them are skipped, and so are other frames that no frame
        depends on. With ``short_side``, frames with a longer short side are scaled down to it.
        Returns (len(indices), H, W, 3) uint8, RGB. Raises IndexError for a frame that the video
        does not have, ValueError without indices, VideoError if a frame cannot be decoded.
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
        """As `decode`, one image (H, W, 3) at a time, of frames ``wanted`` in ascending order
        without repeats. All have the size of the first. Raises VideoError if one cannot be
        decoded."""
        convert = Converter(short_side, self.rotate, self._reformatter)
        frames = self._iter_wanted(wanted)
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
        """The frames shown in the middle of ``slots``, which divide the video's duration into
        ``num_frames`` equal parts: the same numbers, unless its rate varies."""
        return frames_at(slots, self.frame_times, self.ticks)

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
        """As `probe`; the size is that of the first decoded frame."""
        height, width = self.decode([0]).shape[1:3]
        return VideoInfo(self.num_frames, self.fps, self.duration, height, width)

    # -- opening

    def _load_index(self, key: tuple | None) -> None:
        self._key, self._index = key, _cache.get(key)
        if self._index is None:
            self._index = from_index(self._stream) or from_packets(self._stream)
            if self._index is None:
                self._index, self._decoded = exact_index.decode_all(self._stream)
            _cache.put(key, self._index)
        self._stream.record_damage(self._index.damage)

    def _set_rate(self) -> None:
        stream, times, count = self._stream.stream, self._index.times, self.num_frames
        rate, unit = stream.average_rate or stream.guessed_rate, stream.time_base
        self.fps, self.frame_times = float(rate) if rate else 0.0, None
        if times is not None and count > 1:
            frame_times = times - times[0]
            step = 1 / (self.fps * unit) if self.fps else 0
            # The container's rate, unless some frame is half a frame or more off.
            if (np.abs(frame_times - np.arange(count) * float(step)) > float(step) / 2).any():
                self.fps = float((count - 1) / (int(frame_times[-1]) * unit))
                self.frame_times = None if steady(frame_times) else frame_times
        self.fps = self.fps or 30.0  # a single picture has no rate
        self.ticks = unit.denominator / self.fps / unit.numerator
        self.duration = count / self.fps

    # -- decoding

    def _iter_wanted(self, wanted: list[int]) -> Iterator[av.VideoFrame]:
        """The frames ``wanted`` (ascending, each once)."""
        index, left = self._index, list(wanted)
        if isinstance(index, FrameIndex):
            if index.exact is None and self._read_groups(left):
                self._stream.decode_error = ""
                yield from self._frames_by_time(left)
            if not left:
                return
            if index.exact is None:
                found, self._decoded = exact_index.decode_all(self._stream)
                index.use_exact(found, self._stream)
                _cache.put(self._key, index)
            left, index = index.numbers[left].tolist(), index.exact
        if left and left[-1] >= index.first_damaged:
            self._stream.record_damage(index.decode_error)
        if self._decoded:
            yield from (self._decoded[number] for number in left)
        else:
            yield from exact_index.read(self._stream, index, left)

    def _read_groups(self, wanted: list[int]) -> bool:
        """Reads the time stamps of the groups needed, which the container's index does not have;
        False if they contradict it."""
        index, read = self._index, None
        for groups in index.unread_groups(wanted):
            read = read or packet_reader(self._stream.stream)
            packets = (packet for packet in self._seek(groups[0]) if packet.size)
            for group in groups:
                start, end = index.bounds(group)
                if not index.add_group(group, list(islice(packets, end - start)), read):
                    return False
        return True

    def _frames_by_time(self, left: list[int]) -> Iterator[av.VideoFrame]:
        """The frames ``left``, each removed once it is found, up to the first that does not match
        the index, or a decoder's error: only a decoding from the start shows which frames that
        damages."""
        index = self._index
        while left and not self._stream.decode_error:
            first = last = index.seek_group(left[0])
            # From one group through the next ones, as long as some of their frames are wanted.
            count = 0
            while count < len(left) and index.seek_group(left[count]) <= last + 1:
                last = index.group(left[count])
                count += 1
            remaining = len(left) - count
            yield from self._decode_span(first, left, count)
            if len(left) > remaining:
                return

    def _decode_span(self, group: int, left: list[int], count: int) -> Iterator[av.VideoFrame]:
        """The first ``count`` frames of ``left``, decoded from ``group`` on."""
        index, key = self._index, self._index.keys[group]
        start, end = index.bounds(group)
        number = start + int(np.searchsorted(index.pts[start:end], key))
        stamps = index.pts[left[:count]].tolist()
        wanted, in_order = set(stamps), not self._stream.can_skip
        for frame in self._stream.frames(self._seek(group), wanted):
            if frame.pts is None or self._stream.decode_error:
                return
            if frame.pts < key:
                continue  # the container started earlier
            if in_order:  # no frame is skipped
                if number >= index.num_frames or frame.pts != index.pts[number]:
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
        """Packets from the keyframe of ``group`` on, or from an earlier one if the container does
        not find it."""
        index = self._index
        candidates = (
            (each, target)
            for each in range(group, -1, -1)
            for target in index.seek_candidates(each)
        )
        for earlier, target in candidates:
            packets = self._stream.seek(target)
            try:
                first = next(packets, None) if packets else None
            except av.FFmpegError:
                break
            if first is None:
                break
            if first.is_keyframe and index.can_start(earlier, first):
                return chain([first], packets)
        return self._stream.packets()

    def _explain(self, error: Exception) -> VideoError:
        self._file.seek(0, os.SEEK_END)
        if self._file.tell() == 0:
            return VideoError(self.name, "the file is empty")
        reason = getattr(error, "strerror", None) or str(error)
        return VideoError(self.name, f"{reason} (is it truncated, or not a video?)")


def frames_at(slots: Iterable[int], frame_times: np.ndarray | None, ticks: float) -> list[int]:
    """As `Video.frames_at`."""
    if frame_times is None:
        return list(slots)
    middles = (np.asarray(list(slots), np.float64) + 0.5) * ticks
    return (np.searchsorted(frame_times, middles, "right") - 1).clip(0).tolist()


def probe(source: Source) -> VideoInfo:
    """Frames, frames per second, seconds, height and width; decodes one frame at most."""
    with Video(source) as video:
        return video.info


def decode_clip(
    source: Source, indices: Iterable[int], short_side: int = 0, threads: int = 1
) -> torch.Tensor:
    """Decodes the frames ``indices`` of ``source``, as `Video.decode`."""
    with Video(source, threads=threads) as video:
        return video.decode(indices, short_side)
