"""Reads the frames of clips from video files with PyAV, and has the clip sampling rules.

`Video` knows no sampling rule, and the rules (``sampling.py``) know no file::

    with Video("clip.mp4") as video:
        slots = clip_frames(video.num_frames, video.fps, num_frames=16, sampling_rate=4)
        frames = video.decode(video.frames_at(slots))  # (16, H, W, 3)
"""

from stts_slowfast.video.frame_cache import cache_frames, open_video
from stts_slowfast.video.io import VideoError, run_with_timeout
from stts_slowfast.video.reader import Video, VideoInfo, decode_clip, probe
from stts_slowfast.video.sampling import (
    clip_frames,
    clip_size,
    clip_span,
    frame_indices,
    frames_between,
    segment_indices,
)

__all__ = [
    "Video",
    "VideoError",
    "VideoInfo",
    "cache_frames",
    "clip_frames",
    "clip_size",
    "clip_span",
    "decode_clip",
    "frame_indices",
    "frames_between",
    "open_video",
    "probe",
    "run_with_timeout",
    "segment_indices",
]
