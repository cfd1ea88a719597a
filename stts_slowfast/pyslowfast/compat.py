"""What SlowFast needs to run on today's PyTorch, torchvision and PyAV, mended in memory.

Each obstacle is one function, called after the module that has it was imported. It looks whether
the obstacle is there, and says on one line what it mended. ``STTS_COMPAT=0`` switches all off.
"""

import functools
import importlib.machinery
import importlib.util
import inspect
import math
import multiprocessing
import os
import sys
import types

# What each mend is for, for `stts doctor`.
MENDS = {
    "vision_imports": "vision.fair.slowfast means the checkout",
    "ava_evaluation": "ava_evaluation is found in the checkout",
    "prefetch_key": "the key PREFETCH of configs/SSv2/MVITv2_*.yaml is passed over",
    "pkg_resources": "detectron2.model_zoo finds its files without pkg_resources",
    "decoder": "DATA.DECODING_BACKEND pyav and torchvision decode with PyAV",
    "cuda_synchronize": "torch.cuda.synchronize() does nothing on a CPU run",
}

# Packages that SlowFast imports, that no mend can replace, and how to get them.
REMEDIES = {
    "detectron2": "SlowFast needs detectron2 for every model, and it is not on PyPI: install it "
    "from https://github.com/facebookresearch/detectron2",
    "pytorchvideo": "SlowFast needs names that pytorchvideo's release 0.1.5 lacks: install it "
    "from https://github.com/facebookresearch/pytorchvideo",
}
GUIDE = "'Beside SlowFast' in projects/stts/README.md"

_told = set()


def mend(function):
    """Makes a mend out of ``function(module) -> whether it mended something``."""
    name = function.__name__.removeprefix("mend_")

    @functools.wraps(function)
    def guarded(module) -> bool:
        if os.environ.get("STTS_COMPAT") == "0" or not function(module):
            return False
        # Children of a multi-GPU run, and a DataLoader's workers, would only repeat it.
        if name not in _told and multiprocessing.current_process().name == "MainProcess":
            print(f"stts_slowfast: mended {name}: {MENDS[name]}", file=sys.stderr)
        _told.add(name)
        return True

    return guarded


def checkout_root(slowfast: types.ModuleType) -> str:
    """The folder in which the package ``slowfast`` lies: of a checkout, its root."""
    return os.path.dirname(os.path.dirname(os.path.abspath(slowfast.__file__)))


# ---- imports --------------------------------------------------------------------------------


class VisionFinder:
    """Finds ``vision.fair.slowfast``, which exists inside Meta alone, in a checkout of SlowFast.

    Stands last in ``sys.meta_path``, so that a real package of that name comes first.
    """

    def __init__(self, root: str):
        self.folders = {"vision": [], "vision.fair": [], "vision.fair.slowfast": [root]}

    def find_spec(self, name, path=None, target=None):
        if name not in self.folders:
            return None
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = self.folders[name]
        return spec


@mend
def mend_vision_imports(slowfast) -> bool:
    """``from vision.fair.slowfast.tools.train_net import train`` (``tools/run_net.py``)."""
    if any(isinstance(finder, VisionFinder) for finder in sys.meta_path):
        return False
    root = checkout_root(slowfast)
    if not _mentions(os.path.join(root, "tools", "run_net.py"), "vision.fair.slowfast"):
        return False
    sys.meta_path.append(VisionFinder(root))
    return True


@mend
def mend_ava_evaluation(slowfast) -> bool:
    """``from ava_evaluation import ...``, which only a checkout's root on the path satisfies."""
    root = checkout_root(slowfast)
    helper = os.path.join(root, "slowfast", "utils", "ava_eval_helper.py")
    if not _mentions(helper, "from ava_evaluation") or _is_there("ava_evaluation"):
        return False
    if not os.path.isdir(os.path.join(root, "ava_evaluation")):
        return False
    sys.path.append(root)
    return True


@mend
def mend_pkg_resources(detectron2) -> bool:
    """``import pkg_resources`` in ``detectron2.model_zoo``, gone from setuptools 81 on."""
    if "slowfast" not in sys.modules or _is_there("pkg_resources"):
        return False
    module = types.ModuleType("pkg_resources", "The one function that detectron2 uses.")
    module.resource_filename = _resource_filename
    sys.modules["pkg_resources"] = module
    return True


def _resource_filename(package: str, resource: str) -> str:
    folder = importlib.util.find_spec(package).submodule_search_locations[0]
    return os.path.join(folder, resource)


def explain_missing_packages(slowfast) -> None:
    """Adds the remedy to the traceback of an import error that no mend can prevent."""
    previous = sys.excepthook
    if getattr(previous, "explains_missing_packages", False):
        return

    def explain(kind, error, traceback):
        previous(kind, error, traceback)
        remedy = missing_package_remedy(error)
        if remedy:
            print(f"stts_slowfast: {remedy}", file=sys.stderr)

    explain.explains_missing_packages = True
    sys.excepthook = explain


def missing_package_remedy(error: BaseException) -> str | None:
    """What to do about an import error of SlowFast's; None where we do not know."""
    if not isinstance(error, ImportError):
        return None
    package = (error.name or "").split(".")[0]
    if package not in REMEDIES:
        return None
    return f"{REMEDIES[package]}; see {GUIDE}, and run `stts doctor`"


# ---- config ---------------------------------------------------------------------------------


@mend
def mend_prefetch_key(defaults) -> bool:
    """The key ``PREFETCH`` of SlowFast's own ``configs/SSv2/MVITv2_*.yaml``, an error since it left
    ``_C``: it is passed over."""
    config = defaults._C
    if "PREFETCH" in config or config.key_is_deprecated("PREFETCH"):
        return False
    config.register_deprecated_key("PREFETCH")
    return True


# ---- video ----------------------------------------------------------------------------------


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


# ---- devices --------------------------------------------------------------------------------


@mend
def mend_cuda_synchronize(video_model_builder) -> bool:
    """``torch.cuda.synchronize()`` after every iteration, whatever ``NUM_GPUS`` is."""
    import torch

    if torch.cuda.is_available() or hasattr(torch.cuda.synchronize, "stock"):
        return False

    @functools.wraps(torch.cuda.synchronize)
    def synchronize(device=None) -> None:
        return None

    synchronize.stock = torch.cuda.synchronize
    torch.cuda.synchronize = synchronize
    return True


def _mentions(path: str, text: str) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            return text in file.read()
    except OSError:
        return False


def _is_there(package: str) -> bool:
    if package in sys.modules:
        return True
    return importlib.util.find_spec(package) is not None
