"""Opens a video with PyAV and decodes just the frames of a clip; and the clip sampling rules.

The rules (which frames make up a clip) are those of SlowFast's ``datasets/decoder.py`` and
``datasets/ssv2.py``; they are pure functions of numbers. `Video` knows files and nothing of rules::

    with Video("clip.mp4") as video:
        size = clip_size(num_frames=16, sampling_rate=4, fps=video.fps)
        start, end = clip_span(video.num_frames, size)
        frames = video.decode(frame_indices(start, end, 16, video.num_frames))  # (16, H, W, 3)
"""

import bisect
import io
import math
import os
import random
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from iopath.common.file_io import g_pathmgr

av.logging.set_level(av.logging.PANIC)  # what goes wrong is raised as a VideoError, with its file

Source = str | os.PathLike | bytes | BinaryIO


class VideoError(RuntimeError):
    """A video that cannot be read; ``name`` is the file, ``reason`` what is wrong with it."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"cannot read video {name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self):  # keeps both arguments on the way out of a DataLoader's worker
        return type(self), (self.name, self.reason)


class VideoInfo(NamedTuple):
    """What `probe` tells: frames, frames per second, seconds, pixels."""

    num_frames: int
    fps: float
    duration: float
    height: int
    width: int


# ---- clip sampling rules --------------------------------------------------------------------


def clip_size(num_frames: int, sampling_rate: float, fps: float, target_fps: float = 30.0) -> float:
    """Length of a clip in frames of the file, at least 1 (``decoder.decode``).

    ``num_frames`` frames, ``sampling_rate`` apart when played at ``target_fps``; ``fps`` is the
    file's own rate. SlowFast's ``DATA.TRAIN_JITTER_FPS`` adds ``uniform(0, jitter)`` to
    ``target_fps`` in training.
    """
    return max(1.0, sampling_rate * num_frames / target_fps * fps)


def clip_span(
    num_video_frames: float,
    size: float,
    clip_idx: int = -1,
    num_clips: int = 1,
    use_offset: bool = False,
    rng=random,
) -> tuple[float, float]:
    """First and last frame of a clip of ``size`` frames (``decoder.get_start_end_idx``).

    ``clip_idx`` -1 takes a random clip; 0 .. ``num_clips - 1`` the uniform views of testing
    (``TEST.NUM_ENSEMBLE_VIEWS``), spread up to the last possible start with ``use_offset``
    (``DATA.USE_OFFSET_SAMPLING``; the centre where there is one view), else from the first frame
    on. Positions are fractional, and the end lies beyond the video where it is shorter than the
    clip: `frame_indices` clamps. ``rng`` has ``uniform``, like `random.Random`.
    """
    room = max(num_video_frames - size, 0)
    if clip_idx == -1:
        start = rng.uniform(0, room)
    elif not use_offset:
        start = room * clip_idx / num_clips
    elif num_clips == 1:
        start = math.floor(room / 2)
    else:
        start = clip_idx * math.floor(room / (num_clips - 1))
    return start, start + size - 1


def frame_indices(start: float, end: float, num_frames: int, num_video_frames: int) -> list[int]:
    """``num_frames`` indices evenly from ``start`` to ``end``, inside the video, rounded down
    (``decoder.temporal_sampling``); a video shorter than its clip repeats its last frame."""
    positions = torch.linspace(start, end, num_frames).clamp(0, num_video_frames - 1)
    return positions.long().tolist()


def segment_indices(
    num_video_frames: int, num_frames: int, train: bool = False, rng=random
) -> list[int]:
    """One frame out of each of ``num_frames`` equal segments (``ssv2.Ssv2.get_seq_frames``).

    In training a random frame of the segment, both borders included (``rng.randint``), else its
    middle.
    """
    borders = np.round(np.arange(num_frames + 1) * (float(num_video_frames - 1) / num_frames))
    pairs = zip(borders[:-1].astype(int).tolist(), borders[1:].astype(int).tolist())
    return [rng.randint(low, high) if train else (low + high) // 2 for low, high in pairs]


# ---- files ----------------------------------------------------------------------------------


class Video:
    """An open video: how many frames it has, and any of them.

    ``source`` is a path (opened by iopath's ``g_pathmgr``), the file's bytes, or a seekable binary
    file. On opening, the packets are read but not decoded: their time stamps, sorted, say exactly
    which frame is the i-th, whatever the container claims about frame count, start time, frame
    rate or B-frames. Frames are numbered as a decoding from the first to the last would yield them.

    ``threads``: decoding threads (0: as many as FFmpeg sees fit). ``num_decoded`` counts the frames
    that the decoder gave out so far.

    Raises VideoError when there is nothing to decode.
    """

    def __init__(self, source: Source, name: str | None = None, threads: int = 1):
        self.name = name or _source_name(source)
        self.threads = threads
        self.num_decoded = 0
        self.damage = ""
        self._reformatter = VideoReformatter()  # one for all frames: making one is slow
        self._container = None
        self._file, self._owns_file = _open_source(source, self.name)
        try:
            self._open()
            self._scan()
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
        """Decodes the frames ``indices`` (any order, repeats allowed).

        Seeks to the last keyframe before the first of them and stops after the last. With
        ``short_side``, frames whose shorter side is longer than that are scaled down to it on the
        way. Returns (len(indices), H, W, 3) uint8, RGB.
        """
        indices = [int(index) for index in indices]
        for index in indices:
            if not 0 <= index < self.num_frames:
                raise IndexError(f"{self.name} has frames 0 .. {self.num_frames - 1}, not {index}")
        if not indices:
            raise ValueError("indices is empty: name at least one frame")
        try:
            images = self._decode(sorted(set(indices)), short_side)
        except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
            raise self._explain(error) from error
        return torch.from_numpy(np.stack([images[index] for index in indices]))

    @property
    def info(self) -> VideoInfo:
        context = self._stream.codec_context
        return VideoInfo(self.num_frames, self.fps, self.duration, context.height, context.width)

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

    def _scan(self) -> None:
        """Reads the packets: ``_pts`` (sorted; None where it cannot be relied on), ``_keyframes``
        (their pts, sorted), ``num_frames``, ``fps``, ``duration``."""
        packets = self._packets()
        if not packets:
            raise VideoError(self.name, "it holds no frames")
        reliable = packets[0].is_keyframe and all(
            p.pts is not None and not p.is_corrupt for p in packets
        )
        pts = sorted(p.pts for p in packets if not p.is_discard) if reliable else []
        if reliable and pts and len(set(pts)) == len(pts):
            self._pts = pts
            self._keyframes = sorted(p.pts for p in packets if p.is_keyframe)
            self.num_frames = len(pts)
        else:
            self._pts = None
            self.num_frames = self._count()
        self.fps, self.duration = self._rate()

    def _packets(self) -> list[av.Packet]:
        """All packets of the video; where the file breaks off, those before."""
        packets = []
        try:
            packets.extend(p for p in self._container.demux(self._stream) if p.size)
        except av.FFmpegError:
            if not packets:
                raise
        return packets

    def _count(self) -> int:
        """Counts the frames by decoding them all."""
        self._reopen()
        count = sum(1 for _ in self._frames())
        if not count:
            raise VideoError(self.name, "none of its frames can be decoded")
        return count

    def _rate(self) -> tuple[float, float]:
        """Frames per second, and seconds."""
        rate = self._stream.average_rate or self._stream.guessed_rate
        if not rate and self._pts and len(self._pts) > 1:
            seconds = float((self._pts[-1] - self._pts[0]) * self._stream.time_base)
            rate = (len(self._pts) - 1) / seconds
        fps = float(rate) if rate else 30.0  # a single picture has no rate; any will do
        return fps, self.num_frames / fps

    # -- decoding

    def _frames(self) -> Iterable[av.VideoFrame]:
        """Decoded frames from where the container stands; past a broken packet it goes on."""
        for packet in self._container.demux(self._stream):
            try:
                frames = packet.decode()
            except av.InvalidDataError:
                continue
            for frame in frames:
                self.num_decoded += 1
                yield frame

    def _decode(self, indices: list[int], short_side: int) -> dict[int, np.ndarray]:
        """Images of the frames ``indices`` (ascending, each once)."""
        if self._pts is not None:
            images = self._decode_by_time(indices, short_side)
            if len(images) == len(indices):
                return images
            self._pts, self.num_frames = None, self._count()  # packets that yield no frame
        return self._decode_by_count(indices, short_side)

    def _decode_by_time(self, indices: list[int], short_side: int) -> dict[int, np.ndarray]:
        wanted = {self._pts[index]: index for index in indices}
        images = {}
        self._seek(min(wanted))
        for frame in self._frames():
            if frame.pts in wanted:
                images[wanted[frame.pts]] = self._to_rgb(frame, short_side, images)
            if len(images) == len(wanted) or frame.pts is None or frame.pts > max(wanted):
                break
        return images

    def _decode_by_count(self, indices: list[int], short_side: int) -> dict[int, np.ndarray]:
        # Where the count turned out smaller than the packets promised, the last frame stands in.
        wanted = {min(index, self.num_frames - 1) for index in indices}
        images = {}
        self._reopen()
        for number, frame in enumerate(self._frames()):
            if number in wanted:
                images[number] = self._to_rgb(frame, short_side, images)
            if len(images) == len(wanted):
                break
        return {index: images[min(index, self.num_frames - 1)] for index in indices}

    def _to_rgb(self, frame: av.VideoFrame, short_side: int, images: dict) -> np.ndarray:
        """(H, W, 3) uint8; every image of a clip has the size of its first."""
        if images:
            height, width = next(iter(images.values())).shape[:2]
        else:
            scale = min(1.0, short_side / min(frame.height, frame.width)) if short_side else 1.0
            height, width = round(frame.height * scale), round(frame.width * scale)
        frame = self._reformatter.reformat(frame, width, height, "rgb24", **_ONE_THREAD)
        return frame.to_ndarray()

    def _seek(self, pts: int) -> None:
        """Moves to a keyframe shown no later than ``pts``, the last if the container can."""
        last = bisect.bisect_right(self._keyframes, pts) - 1
        for keyframe in reversed(self._keyframes[: last + 1]):
            try:
                self._container.seek(keyframe, stream=self._stream)
                first = next(self._container.demux(self._stream))
                if first.is_keyframe and first.pts is not None and first.pts <= pts:
                    self._container.seek(keyframe, stream=self._stream)
                    return
            except av.FFmpegError:
                break
        self._reopen()

    def _explain(self, error: Exception) -> VideoError:
        self._file.seek(0, os.SEEK_END)
        if self._file.tell() == 0:
            return VideoError(self.name, "the file is empty")
        reason = getattr(error, "strerror", None) or str(error)
        return VideoError(self.name, f"{reason} (is it truncated, or not a video?)")


def probe(source: Source) -> VideoInfo:
    """Frames, frames per second, seconds, height and width, without decoding."""
    with Video(source) as video:
        return video.info


def decode_clip(
    source: Source, indices: Iterable[int], short_side: int = 0, threads: int = 1
) -> torch.Tensor:
    """Decodes the frames ``indices`` of ``source``: see `Video.decode`."""
    with Video(source, threads=threads) as video:
        return video.decode(indices, short_side)


def _source_name(source: Source) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return str(getattr(source, "name", f"<{type(source).__name__}>"))


def _open_source(source: Source, name: str) -> tuple[BinaryIO, bool]:
    """A seekable binary file, and whether closing it is our business."""
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source), True
    if not isinstance(source, str | os.PathLike):
        return source, False
    try:
        return g_pathmgr.open(os.fspath(source), "rb"), True
    except OSError as error:
        raise VideoError(name, error.strerror or str(error)) from error


def _one_thread() -> dict:
    """How to keep PyAV's scaler from starting a thread per core: a scaler a clip pays more for
    them than for its work. Versions that start none do not know the option."""
    try:
        VideoReformatter().reformat(av.VideoFrame(16, 16, "rgb24"), threads=1)
        return {"threads": 1}
    except TypeError:
        return {}


_ONE_THREAD = _one_thread()
