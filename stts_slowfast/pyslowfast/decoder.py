"""What fetches a clip's frames inside SlowFast, with `stts_slowfast.video`."""

import functools
import inspect
import math

from stts_slowfast.pyslowfast.compat import mend


@mend
def mend_decoder(decoder) -> bool:
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
    stock_decode, stock_torchvision = decoder.decode, decoder.torchvision_decode

    @functools.wraps(stock_torchvision)
    def torchvision_decode(video_handle, *args, **kwargs):
        if torchvision_works and isinstance(video_handle, bytes):
            return stock_torchvision(video_handle, *args, **kwargs)
        return decode_clips(decoder, video_handle, *args, **kwargs)

    @functools.wraps(stock_decode)
    def decode(*args, **kwargs):
        call = inspect.signature(stock_decode).bind(*args, **kwargs)
        if call.arguments.get("backend", "pyav") == "pyav" and not pyav_works:
            # SlowFast's PyAV backend does not scale.
            call.arguments.update(backend="torchvision", max_spatial_scale=0)
        return stock_decode(*call.args, **call.kwargs)

    torchvision_decode.stock = stock_torchvision
    decoder.torchvision_decode, decoder.decode = torchvision_decode, decode
    return True


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
):
    """What SlowFast's ``torchvision_decode`` does, with `stts_slowfast.video`.

    Args:
        decoder: the module ``slowfast.datasets.decoder``, whose ``get_multiple_start_end_idx``
            says where the clips lie.
        source: the file's bytes, or its PyAV container.
        sampling_rate, num_frames: of each clip.
        others: as ``torchvision_decode`` has them; ``video_meta`` and ``modalities`` are not used.

    Returns:
        A uint8 tensor ``(frames of the clip, H, W, 3)`` for each clip, in the order of time; the
        frames per second; False, for the whole video was not decoded; and for each clip its first
        and last frame and the distance to the clip before.

    Raises:
        VideoError: where the video cannot be read; SlowFast's ``decode`` turns it into None.
    """
    with _open_video(source) as video:
        sizes = [
            max(1.0, rate * frames / target_fps * video.fps)
            for rate, frames in zip(sampling_rate, num_frames)
        ]
        spans = decoder.get_multiple_start_end_idx(
            video.num_frames,
            sizes,
            clip_idx,
            num_clips_uniform,
            min_delta=min_delta,
            max_delta=max_delta,
            use_offset=use_offset,
        )
        clips = []
        for start, end, _ in spans:
            last = min(math.floor(end), video.num_frames - 1)
            first = min(math.ceil(start), last)
            clips.append(video.decode(range(first, last + 1), max_spatial_scale))
        return clips, video.fps, False, spans


def _open_video(source):
    from stts_slowfast.video import Video

    if isinstance(source, bytes):
        return Video(source)
    # PyAV's container has been opened, and asked for threads, by SlowFast: take both over.
    stream = source.streams.video[0] if source.streams.video else None
    threaded = stream is not None and str(stream.thread_type).upper().endswith("AUTO")
    path = source.name
    source.close()
    return Video(path, threads=0 if threaded else 1)
