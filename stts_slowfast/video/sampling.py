"""The frames of a clip, by the rules of SlowFast's ``datasets/decoder.py`` and
``datasets/ssv2.py``, as pure functions of numbers."""

import math
import random

import numpy as np
import torch


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

    ``clip_idx`` -1 samples a random clip; 0 .. ``num_clips - 1`` the uniform views of testing
    (``TEST.NUM_ENSEMBLE_VIEWS``), spread up to the last possible start with ``use_offset``
    (``DATA.USE_OFFSET_SAMPLING``; the centre if there is one view), else from the first frame on.
    Positions are fractional, and the end is after the video's if that is shorter than the clip:
    `frame_indices` clamps. ``rng`` has ``uniform``, like `random.Random`.
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


def frames_between(
    start: float, end: float, num_video_frames: int, ticks: float | None = None
) -> range:
    """The frames that SlowFast decodes for a clip: those shown from ``start`` on up to ``end``.

    It selects them by time stamps, rounded down to whole units of the file's time base, of which a
    frame has ``ticks``: a start less than a unit after a frame selects that frame. None: exact
    times. Empty if no frame is shown in between.
    """
    if ticks is None:
        first, last = math.ceil(start), math.floor(end)
    else:
        low, high = int(start * ticks), int(end * ticks)
        first, last = max(int(low / ticks) - 1, 0), int(high / ticks) + 1
        while math.floor(first * ticks + 0.5) < low:
            first += 1
        while math.floor(last * ticks + 0.5) > high:
            last -= 1
    return range(first, min(last, num_video_frames - 1) + 1)


def clip_frames(
    num_video_frames: int,
    fps: float,
    num_frames: int,
    sampling_rate: float,
    target_fps: float = 30.0,
    clip_idx: int = -1,
    num_clips: int = 1,
    use_offset: bool = False,
    ticks: float | None = None,
    rng=random,
) -> list[int]:
    """The frames of a clip (``decoder.decode``); arguments as in `clip_size`, `clip_span` and
    `frames_between`.

    If the video has more than ``num_frames * sampling_rate`` frames, SlowFast decodes only the
    clip's frames and samples evenly from the first of them. For a shorter video it decodes all
    frames, and samples evenly from the fractional start.
    """
    size = clip_size(num_frames, sampling_rate, fps, target_fps)

    def span() -> tuple[float, float]:
        return clip_span(num_video_frames, size, clip_idx, num_clips, use_offset, rng)

    if num_video_frames > num_frames * sampling_rate:
        decoded = frames_between(*span(), num_video_frames, ticks)
        if decoded:
            return [decoded[i] for i in frame_indices(0, size - 1, num_frames, len(decoded))]
    return frame_indices(*span(), num_frames, num_video_frames)


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
