"""What fetches a clip's frames inside SlowFast, with `stts_slowfast.video`.

SlowFast asks for the views of a test video one after the other, each as if it were the only one. A
worker keeps the last file open, and goes on through it as it is asked: one pass for all views.
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
from stts_slowfast.pyslowfast.patching import wrap
from stts_slowfast.video import Video, frames_between
from stts_slowfast.video.io import stat_key


@patch("decoder")
def patch_decoder(decoder) -> bool:
    """Both values of ``DATA.DECODING_BACKEND`` (``slowfast/datasets/decoder.py``).

    SlowFast's ``decode`` stays: the order of the clips, the augmentation of raw frames, the choice
    of frames within a clip, and None for a file that cannot be decoded, upon which its datasets
    take another. Only what fetches the frames of a clip is replaced: ``torchvision_decode`` calls
    functions that torchvision no longer has, and ``pyav_decode`` computes with lists.
    """
    if hasattr(decoder.torchvision_decode, "stock"):
        return False
    torchvision_works = hasattr(decoder.io, "_read_video_from_memory")
    pyav_works = "start_end_delta_time" in decoder.pyav_decode.__code__.co_varnames
    if torchvision_works and pyav_works:
        return False
    stock_torchvision = decoder.torchvision_decode

    @functools.wraps(stock_torchvision)
    def torchvision_decode(video_handle, *args, **kwargs):
        if torchvision_works and isinstance(video_handle, bytes):
            return stock_torchvision(video_handle, *args, **kwargs)
        return decode_clips(decoder, video_handle, *args, sparse=_sparse.get(), **kwargs)

    torchvision_decode.stock = torchvision_decode.wrapper = stock_torchvision
    decoder.torchvision_decode = torchvision_decode
    wrap(decoder, "decode", functools.partial(_decode, pyav_works))
    return True


def _decode(pyav_works: bool, stock_decode, *args, **kwargs):
    call = inspect.signature(stock_decode).bind(*args, **kwargs)
    augmented = any(call.arguments.get(f"{how}_prob", 0.0) > 0 for how in _AUGMENTATIONS)
    if call.arguments.get("backend", "pyav") == "pyav" and not pyav_works:
        # SlowFast's PyAV backend does not scale.
        call.arguments.update(backend="torchvision", max_spatial_scale=0)
    token = _sparse.set(len(call.arguments["num_frames"]) == 1 and not augmented)
    try:
        frames, *others = stock_decode(*call.args, **call.kwargs)
    finally:
        _sparse.reset(token)
    item = read_context.item()
    if frames is not None and not (item and item.crops_alone()):
        frames = [clip.materialize() if isinstance(clip, LazyClip) else clip for clip in frames]
    return frames, *others


# Whether those frames of the clip that is decoded now may stay black which are not taken.
_sparse: ContextVar[bool] = ContextVar("stts_sparse", default=False)
# What SlowFast may do to all frames of a clip, before it takes some of them.
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
    """What SlowFast's ``torchvision_decode`` does, with `stts_slowfast.video`.

    Args:
        decoder: the module ``slowfast.datasets.decoder``, whose ``get_multiple_start_end_idx``
            says where the clips lie.
        source: the file's bytes, or its PyAV container.
        sampling_rate, num_frames: of each clip.
        others: as ``torchvision_decode`` has them; ``video_meta`` and ``modalities`` are not used.
        sparse: leave those frames black that ``temporal_sampling`` will not take.

    Returns:
        A uint8 tensor ``(frames of the clip, H, W, 3)`` for each clip, in the order of time (for
        a view of testing a `LazyClip`, for SlowFast will crop it and no more); the
        frames per second; False; and for each clip its first and last frame and the distance to
        the clip before. Of a video shorter than its clips: all its frames; the frames per second;
        True; None.

    Raises:
        VideoError: if the video cannot be read; SlowFast's ``decode`` turns it into None.
    """
    item = read_context.item()
    files = item.files if item else read_context.Files()
    rules = sampling_rate, num_frames, num_clips_uniform, target_fps, use_offset
    try:
        file = _open_file(files, source, (*map(repr, rules), max_spatial_scale))
        video = file.video
        sizes = [
            max(1.0, rate * frames / target_fps * video.fps)
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
            """All frames of a clip, and those that are taken out of it; None if it has none."""
            slots = frames_between(start, end, video.num_frames, video.ticks)
            if not slots:
                return None
            whole = torch.tensor(video.frames_at(slots))
            taken = decoder.temporal_sampling(whole, 0, size - 1, count) if sparse else whole
            return [whole.tolist(), sorted(set(taken.tolist()))]

        # Of a video that is shorter than its clips SlowFast decodes all frames, and chooses itself.
        own, clips, later = None, [], []
        if video.num_frames > sum(map(operator.mul, num_frames, sampling_rate)):
            own = spans(clip_idx)
            clips = [frames(*span[:2], *rest) for span, *rest in zip(own, sizes, num_frames)]
        if not clips or None in clips:
            everything = video.frames_at(range(video.num_frames))
            own, clips = None, [[everything, sorted(set(everything))]]
        elif clip_idx >= 0 and sparse:  # a view's file will be asked for the next views too
            for number in range(clip_idx + 1, num_clips_uniform):
                later += (frames(*spans(number)[0, :2], sizes[0], num_frames[0]) or [[], []])[1]
        tensors = [file.read(whole, taken, later) for whole, taken in clips]
        if not sparse:
            tensors = [clip.materialize() for clip in tensors]
        fps = video.fps
    except Exception as error:
        if item:
            item.finding = "unreadable", getattr(error, "reason", str(error))
        files.close()
        raise
    if video.damage and item:
        item.finding = "damaged", video.damage
    if clip_idx < 0 or not item:
        files.close()
    return tensors, fps, own is None, own


class _File:
    """An open video and a pass through it, that goes on as clips are asked for.

    ``images`` holds what the pass has found, from the first frame of the last clip on: as much as
    one clip spans.
    """

    def __init__(self, video: Video, short_side: int):
        self.video, self.short_side = video, short_side
        self.images, self.coming = {}, iter(())

    def read(self, whole: list[int], taken: list[int], later: list[int]) -> LazyClip:
        """(frames of the clip, H, W, 3) uint8, with the frames ``taken`` (ascending) in place."""
        self.images = {n: image for n, image in self.images.items() if n >= whole[0]}
        if not self._reach(taken):
            wanted = sorted({*taken, *later})
            self.images = {}
            self.coming = zip(wanted, self.video.iter_frames(wanted, self.short_side))
            self._reach(taken)
        taken = set(taken)
        return LazyClip.of([self.images[n] if n in taken else None for n in whole])

    def _reach(self, taken: list[int]) -> bool:
        """Goes on until all of ``taken`` are there; False where the pass does not have them."""
        while taken[-1] not in self.images:
            number, image = next(self.coming, (None, None))
            if number is None or number > taken[-1]:
                return False
            if number >= taken[0]:
                self.images[number] = image
        return all(number in self.images for number in taken)

    def close(self) -> None:
        self.video.close()


def _open_file(files: read_context.Files, source, rules: tuple) -> _File:
    path, threads = None, 1
    if not isinstance(source, bytes):
        # PyAV's container has been opened, and asked for threads, by SlowFast: take both over.
        stream = source.streams.video[0] if source.streams.video else None
        if stream is not None and str(stream.thread_type).upper().endswith("AUTO"):
            threads = 0
        path = source.name
        source.close()
    key = source if path is None else stat_key(path)
    rules = *rules, threads
    if files.last is not None and key is not None and files.last[:2] == (key, rules):
        return files.last[2]
    files.close()
    # SlowFast does not turn videos; a checkpoint is tested as it was trained.
    video = Video(source if path is None else path, threads=threads, rotate=False)
    files.last = key, rules, _File(video, rules[-2])
    return files.last[2]
