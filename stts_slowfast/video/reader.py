"""`Video`: an open video file, and any of its frames in one pass."""

import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from stts_slowfast.video.convert import Converter
from stts_slowfast.video.files import (
    Source,
    VideoError,
    identity,
    keep_pages,
    open_source,
    source_name,
)
from stts_slowfast.video.times import Memory, Times, from_index, from_packets

av.logging.set_level(av.logging.PANIC)  # what goes wrong is raised as a VideoError, with its file

# Codecs whose decoders, told so, pass over a packet that no other needs, and give all other frames
# as they would have. (VP9's do not pass over; AV1's lose frames; HEVC's take a picture for unneeded
# that a higher temporal layer may need.)
_CAN_SKIP = {"h264", "mpeg4", "mpeg2video", "mpeg1video"}
# What FFmpeg says of damage, after which it makes pixels up. It complains of more in whole files:
# of references that frames before a keyframe lack, for one.
_DAMAGE = re.compile("error while decoding|damaged|Error splitting|overread|no frame", re.I)

_memory = Memory()


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
    file. Nothing is decoded on opening: the time stamps of packets say exactly which frame is the
    i-th, whatever the container claims about frame count, start time, frame rate or B-frames; where
    it has an index of all packets, not even they are read. Frames are numbered as a decoding from
    the first to the last would yield them.

    Args:
        threads: decoding threads (0: as many as FFmpeg sees fit).
        rotate: turn frames as the display matrix says, as players do.

    ``num_decoded`` counts the frames that the decoder gave out so far. ``damage`` says what is
    wrong with the file as far as it was read ("" if nothing is): frames that it promises are
    missing, or could not be decoded as they were meant.

    Raises VideoError when there is nothing to decode.
    """

    def __init__(
        self, source: Source, name: str | None = None, threads: int = 1, rotate: bool = True
    ):
        self.name = name or source_name(source)
        self.threads, self.rotate = threads, rotate
        self.num_decoded = 0
        self.damage = ""
        self._reformatter = VideoReformatter()  # one for all frames: making one is slow
        self._container = None
        keep_pages()
        self._file, self._owns_file = open_source(source, self.name)
        try:
            self._open()
            self._find_times(identity(source))
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
        if self._container is not None:
            self._container.close()
            self._container = None
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
        for number, image in enumerate(self.iterate(wanted, short_side)):
            if pixels is None:
                pixels = np.empty((len(wanted), *image.shape), np.uint8)
            pixels[number] = image
        return torch.from_numpy(
            pixels if wanted == indices else pixels[np.searchsorted(wanted, indices)]
        )

    def iterate(self, wanted: list[int], short_side: int = 0) -> Iterator[np.ndarray]:
        """As `decode`, image after image (H, W, 3) as the pass goes on: of frames that are given in
        ascending order, each once. All have the size of the first."""
        convert = Converter(short_side, self.rotate, self._reformatter)
        try:
            for frame in self._wanted(wanted):
                yield convert(frame)
        except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
            raise self._explain(error) from error

    @property
    def num_frames(self) -> int:
        return self._times.num_frames

    @property
    def info(self) -> VideoInfo:
        """What `probe` tells; the size is that of the first frame as it is decoded."""
        height, width = self.decode([0]).shape[1:3]
        return VideoInfo(self.num_frames, self.fps, self.duration, height, width)

    # -- opening

    def _open(self) -> None:
        self._file.seek(0)
        self._container = av.open(self._file, "r", metadata_errors="ignore")
        if not self._container.streams.video:
            raise VideoError(self.name, "it has no video stream")
        self._stream = self._container.streams.best("video") or self._container.streams.video[0]
        if self._stream.codec_context is None:
            raise VideoError(self.name, "this build of FFmpeg cannot decode its codec")
        self._stream.codec_context.thread_count = self.threads
        # Not by frames: PyAV 18 can hang where a decoder with frame threads is let go early.
        self._stream.thread_type = "SLICE" if self.threads != 1 else "NONE"

    def _reopen(self) -> None:
        self._container.close()
        self._open()

    def _find_times(self, key: tuple | None) -> None:
        """Sets ``_times``, ``fps`` and ``duration``."""
        self._times = _memory.get(key)
        if self._times is None:
            where, size = self._file.tell(), self._file.seek(0, os.SEEK_END)
            self._file.seek(where)  # where the container left it
            self._times = from_index(self._stream, size) or self._read_times()
            _memory.put(key, self._times)
        self._blame(self._times.damage)
        self.fps, self.duration = self._rate()

    def _read_times(self) -> Times:
        self._reopen()
        times = from_packets(self._container, self._stream, self._file)
        self._blame(times.damage)
        if not times.timed:
            times.num_frames = self._count()
            times.damage = self.damage
        return times

    def _count(self) -> int:
        """Counts the frames by decoding them all."""
        self._reopen()
        count = sum(1 for _ in self._frames(self._container.demux(self._stream)))
        if not count:
            raise VideoError(self.name, "none of its frames can be decoded")
        return count

    def _rate(self) -> tuple[float, float]:
        """Frames per second, and seconds."""
        rate = self._stream.average_rate or self._stream.guessed_rate
        pts = self._times.pts
        if not rate and len(pts) > 1:
            seconds = float((int(pts[-1]) - int(pts[0])) * self._stream.time_base)
            rate = (len(pts) - 1) / seconds if seconds > 0 else 0
        fps = float(rate) if rate else 30.0  # a single picture has no rate; any will do
        return fps, self.num_frames / fps

    # -- decoding

    def _frames(self, packets: Iterable[av.Packet], wanted=None) -> Iterator[av.VideoFrame]:
        """Decoded frames; past a broken packet it goes on. With ``wanted`` time stamps, frames that
        neither are among them nor needed for others may be left out."""
        context = self._stream.codec_context
        skip = wanted is not None and context.name in _CAN_SKIP
        for packet in packets:
            if skip:
                leave_out = packet.pts is not None and packet.pts not in wanted
                context.skip_frame = "NONREF" if leave_out else "DEFAULT"
            errors, _ = av.logging.get_last_error()
            try:
                frames = packet.decode()
            except av.InvalidDataError as error:
                self._blame(f"a packet cannot be decoded: {error.strerror}")
                continue
            self._blame_messages(errors)
            for frame in frames:
                self.num_decoded += 1
                yield frame

    def _wanted(self, wanted: list[int]) -> Iterator[av.VideoFrame]:
        """The frames ``wanted`` (ascending, each once)."""
        found = 0
        if self._times.timed and self._learn(wanted):
            for frame in self._by_time(wanted):
                found += 1
                yield frame
            if found == len(wanted):
                return
        if self._times.timed:  # some packets yield no frame
            self._times.timed, self._times.num_frames = False, self._count()
        yield from self._by_count(wanted[found:])

    def _learn(self, wanted: list[int]) -> bool:
        """Reads the time stamps that the container's index does not tell, of the groups needed."""
        times = self._times
        for run in times.unread(wanted):
            stamps = ((p.dts, p.pts) for p in self._seek(run[0]) if p.size)
            for group in run:
                start, end = times.bounds(group)
                if not times.learn(group, list(islice(stamps, end - start))):
                    self._relearn()
                    return self._times.timed
        return True

    def _relearn(self) -> None:
        """The container's index is wrong: reads all packets."""
        times = self._read_times()
        vars(self._times).update(vars(times))  # also for who remembers them

    def _by_time(self, wanted: list[int]) -> Iterator[av.VideoFrame]:
        """The frames ``wanted`` up to the first that cannot be found."""
        times, left = self._times, wanted
        while left:
            origin = last = times.origin(left[0])
            # From one group on, and through the next ones as long as something in them is wanted.
            count = 0
            while count < len(left) and times.origin(left[count]) <= last + 1:
                last = times.group(left[count])
                count += 1
            stamps = times.pts[left[:count]].tolist()
            yield from self._stretch(origin, stamps)
            if stamps:
                return
            left = left[count:]

    def _stretch(self, origin: int, stamps: list[int]) -> Iterator[av.VideoFrame]:
        """Frames with the ascending ``stamps``, which are removed as they are found."""
        last, wanted = stamps[-1], set(stamps)
        for frame in self._frames(self._seek(origin), wanted):
            if frame.pts in wanted:
                if frame.pts != stamps[0]:
                    return  # out of order
                del stamps[0]
                yield self._checked(frame)
            if not stamps or frame.pts is None or frame.pts > last:
                return

    def _by_count(self, wanted: list[int]) -> Iterator[av.VideoFrame]:
        # Where the count turned out smaller than the packets promised, the last frame stands in.
        left = [min(index, self._times.num_frames - 1) for index in wanted]
        self._reopen()
        for number, frame in enumerate(self._frames(self._container.demux(self._stream))):
            while left and left[0] == number:
                del left[0]
                yield self._checked(frame)
            if not left:
                return
        raise VideoError(self.name, "frames that were there before cannot be decoded now")

    def _checked(self, frame: av.VideoFrame) -> av.VideoFrame:
        if frame.is_corrupt:
            self._blame("the decoder marks a frame as corrupt")
        return frame

    def _seek(self, group: int) -> Iterator[av.Packet]:
        """Packets from the keyframe of ``group`` on, or from an earlier one where the container
        does not find it."""
        times = self._times
        tries = ((each, target) for each in range(group, -1, -1) for target in times.targets(each))
        for earlier, target in tries:
            try:
                self._container.seek(target, stream=self._stream)
                packets = self._container.demux(self._stream)
                first = next(packets)
            except av.FFmpegError:
                break
            if first.is_keyframe and times.begins(earlier, first):
                return chain([first], packets)
        self._reopen()
        return self._container.demux(self._stream)

    # -- what is wrong

    def _blame(self, damage: str) -> None:
        self.damage = self.damage or damage

    def _blame_messages(self, errors: int) -> None:
        count, last = av.logging.get_last_error()
        if count != errors and last and _DAMAGE.search(last[2]):
            self._blame(f"the decoder says: {last[2].strip()}")

    def _explain(self, error: Exception) -> VideoError:
        self._file.seek(0, os.SEEK_END)
        if self._file.tell() == 0:
            return VideoError(self.name, "the file is empty")
        reason = getattr(error, "strerror", None) or str(error)
        return VideoError(self.name, f"{reason} (is it truncated, or not a video?)")


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
