"""Decodes clips inside SlowFast with `stts_slowfast.video`.

SlowFast asks for the views of a test video one after the other. A worker keeps the last file open
and continues from where the last view ended, so all views take one pass.
"""

import functools
import inspect
import math
import operator
from contextvars import ContextVar

import torch

from stts_slowfast.pyslowfast import read_context
from stts_slowfast.pyslowfast.compat import patch
from stts_slowfast.pyslowfast.lazy_clip import LazyClip
from stts_slowfast.pyslowfast.patching import is_wrapped, wrap
from stts_slowfast.video import Video, frames_between
from stts_slowfast.video.io import stat_key
from stts_slowfast.video.sampling import clip_size


@patch("decoder")
def patch_decoder(decoder) -> bool:
    """Both values of ``DATA.DECODING_BACKEND`` (``slowfast/datasets/decoder.py``).

    Only the functions that read frames are replaced: ``torchvision_decode`` calls functions that
    torchvision no longer has, and ``pyav_decode`` computes with lists. SlowFast's ``decode`` still
    orders the clips, augments raw frames, samples within a clip, and returns None for a file that
    cannot be decoded.
    """
    if is_wrapped(decoder.torchvision_decode):
        return False
    torchvision_works = hasattr(decoder.io, "_read_video_from_memory")
    pyav_works = "start_end_delta_time" in decoder.pyav_decode.__code__.co_varnames
    if torchvision_works and pyav_works:
        return False

    def torchvision_decode(original, video_handle, *args, **kwargs):
        if torchvision_works and isinstance(video_handle, bytes):
            return original(video_handle, *args, **kwargs)
        return decode_clips(decoder, video_handle, *args, sparse=_sparse.get(), **kwargs)

    wrap(decoder, "torchvision_decode", torchvision_decode)
    wrap(decoder, "decode", functools.partial(_decode, pyav_works))
    return True


def _decode(pyav_works: bool, original_decode, *args, **kwargs):
    call = inspect.signature(original_decode).bind(*args, **kwargs)
    augmented = any(call.arguments.get(f"{how}_prob", 0.0) > 0 for how in _AUGMENTATIONS)
    if call.arguments.get("backend", "pyav") == "pyav" and not pyav_works:
        # SlowFast's PyAV backend does not scale.
        call.arguments.update(backend="torchvision", max_spatial_scale=0)
    token = _sparse.set(len(call.arguments["num_frames"]) == 1 and not augmented)
    try:
        frames, *others = original_decode(*call.args, **call.kwargs)
    finally:
        _sparse.reset(token)
    context = read_context.current()
    if frames is not None and not (context and context.only_crops()):
        frames = [clip.materialize() if isinstance(clip, LazyClip) else clip for clip in frames]
    return frames, *others


# Whether frames that SlowFast will not sample may stay black.
_sparse: ContextVar[bool] = ContextVar("stts_sparse", default=False)
# Augmentations that SlowFast applies to all frames of a clip before it samples.
_AUGMENTATIONS = ("time_diff", "gaussian")


def decode_clips(
    decoder,
    source,
    sampling_rate,
    num_frames,
    clip_idx,
    video_meta=None,
    num_clips_uniform=10,
    target_fps=30,
    modalities=("visual",),
    max_spatial_scale=0,
    use_offset=False,
    min_delta=-math.inf,
    max_delta=math.inf,
    sparse=False,
):
    """SlowFast's ``torchvision_decode`` with `stts_slowfast.video`.

    Args:
        decoder: the module ``slowfast.datasets.decoder``; its ``get_multiple_start_end_idx`` gives
            the clips' positions.
        source: the file's bytes, or its PyAV container.
        sampling_rate, num_frames: of each clip.
        others: those of ``torchvision_decode``; ``video_meta`` and ``modalities`` are not used.
        sparse: leave frames black that ``temporal_sampling`` will not take.

    Returns:
        For each clip a uint8 tensor ``(frames, H, W, 3)``, in temporal order (for a test view a
        `LazyClip`, because SlowFast only crops it); the frames per second; False; for each clip its
        first and last frame and the distance to the clip before. For a video shorter than its
        clips: all its frames; the frames per second; True; None.

    Raises:
        VideoError: if the video cannot be read; SlowFast's ``decode`` turns it into None.
    """
    context = read_context.current()
    last_file = context.last_file if context else read_context.LastFile()
    options = sampling_rate, num_frames, num_clips_uniform, target_fps, use_offset
    try:
        reader = _open_reader(last_file, source, (*map(repr, options), max_spatial_scale))
        video = reader.video
        sizes = [
            clip_size(frames, rate, video.fps, target_fps)
            for rate, frames in zip(sampling_rate, num_frames)
        ]

        def spans(number: int):
            return decoder.get_multiple_start_end_idx(
                video.num_frames,
                sizes,
                number,
                num_clips_uniform,
                min_delta=min_delta,
                max_delta=max_delta,
                use_offset=use_offset,
            )

        def frames(start: float, end: float, size: float, count: int) -> list[list[int]] | None:
            """All frames of a clip, and those that SlowFast samples; None if the clip is empty."""
            slots = frames_between(start, end, video.num_frames, video.ticks)
            if not slots:
                return None
            whole = torch.tensor(video.frames_at(slots))
            sampled = decoder.temporal_sampling(whole, 0, size - 1, count) if sparse else whole
            return [whole.tolist(), sorted(set(sampled.tolist()))]

        # Of a video shorter than its clips SlowFast takes all frames, and samples itself.
        positions, clips, later = None, [], []
        if video.num_frames > sum(map(operator.mul, num_frames, sampling_rate)):
            positions = spans(clip_idx)
            clips = [frames(*span[:2], *rest) for span, *rest in zip(positions, sizes, num_frames)]
        if not clips or None in clips:
            everything = video.frames_at(range(video.num_frames))
            positions, clips = None, [[everything, sorted(set(everything))]]
        elif clip_idx >= 0 and sparse:  # SlowFast will ask for the next views too
            for number in range(clip_idx + 1, num_clips_uniform):
                later += (frames(*spans(number)[0, :2], sizes[0], num_frames[0]) or [[], []])[1]
        tensors = [reader.read(whole, sampled, later) for whole, sampled in clips]
        if not sparse:
            tensors = [clip.materialize() for clip in tensors]
        fps = video.fps
    except Exception as error:
        if context:
            context.issue = "unreadable", getattr(error, "reason", str(error))
        last_file.close()
        raise
    if video.damage and context:
        context.issue = "damaged", video.damage
    if clip_idx < 0 or not context:
        last_file.close()
    return tensors, fps, positions is None, positions


class _ClipReader:
    """An open video and one pass through it, which continues from clip to clip.

    ``images`` holds the decoded frames from the first frame of the last clip on: those of one clip.
    """

    def __init__(self, video: Video, short_side: int):
        self.video, self.short_side = video, short_side
        self.images, self.frames = {}, iter(())

    def read(self, whole: list[int], sampled: list[int], later: list[int]) -> LazyClip:
        """The frames ``whole``, (frames, H, W, 3) uint8, black except for ``sampled`` (ascending).

        If a new pass is necessary it also visits the frames ``later``, of views to come.
        """
        self.images = {n: image for n, image in self.images.items() if n >= whole[0]}
        if not self._advance(sampled):
            wanted = sorted({*sampled, *later})
            self.images = {}
            self.frames = zip(wanted, self.video.iter_frames(wanted, self.short_side))
            self._advance(sampled)
        sampled = set(sampled)
        return LazyClip.create([self.images[n] if n in sampled else None for n in whole])

    def _advance(self, sampled: list[int]) -> bool:
        """Continues the pass until it has all of ``sampled``; False if it does not visit them."""
        while sampled[-1] not in self.images:
            number, image = next(self.frames, (None, None))
            if number is None or number > sampled[-1]:
                return False
            if number >= sampled[0]:
                self.images[number] = image
        return all(number in self.images for number in sampled)

    def close(self) -> None:
        self.video.close()


def _open_reader(last_file: read_context.LastFile, source, options: tuple) -> _ClipReader:
    path, threads = None, 1
    if not isinstance(source, bytes):
        # SlowFast has opened a PyAV container: keep its path and its number of threads.
        stream = source.streams.video[0] if source.streams.video else None
        if stream is not None and str(stream.thread_type).upper().endswith("AUTO"):
            threads = 0
        path = source.name
        source.close()
    key = source if path is None else stat_key(path)
    options = *options, threads
    opened = last_file.opened
    if opened is not None and key is not None and opened[:2] == (key, options):
        return opened[2]
    last_file.close()
    # SlowFast does not rotate videos; a checkpoint is tested as it was trained.
    video = Video(source if path is None else path, threads=threads, rotate=False)
    last_file.opened = key, options, _ClipReader(video, options[-2])
    return last_file.opened[2]
