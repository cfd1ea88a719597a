"""What keeps SlowFast from running on today's PyTorch, torchvision and PyAV, patched in memory.

`PATCHES` says of each patch what it is for and where it acts: there alone, and for nothing else.
``STTS_COMPAT=0`` switches all off, ``STTS_COMPAT=-NAME,-NAME`` some. What was patched is one line
on stderr, if a config asks for something of this package, or ``STTS_COMPAT_VERBOSE=1``.
"""

import atexit
import functools
import multiprocessing
import os
import sys
from typing import NamedTuple

from stts_slowfast.pyslowfast.config_access import OUR_KEYS, is_enabled, ours, value


class Patch(NamedTuple):
    """One obstacle.

    Attributes:
        obstacle: what happens without the patch.
        acts: the functions that do otherwise with it, and for what.
        hooks: after which module was imported which function of this package is called with it.
    """

    obstacle: str
    acts: str
    hooks: dict[str, str]


_VISIBLE = "slowfast.visualization"
PATCHES = {
    "vision_imports": Patch(
        "`vision.fair.slowfast`, which the launcher imports, is a package that only Meta has",
        "imports of `vision.fair.slowfast` that nothing else satisfies: it is the checkout",
        {"slowfast": "compat.imports.patch_vision_imports"},
    ),
    "ava_evaluation": Patch(
        "older commits import `ava_evaluation`, which is found from the checkout's root alone",
        "imports of `ava_evaluation` that nothing else satisfies",
        {"slowfast": "compat.imports.patch_ava_evaluation"},
    ),
    "missing_packages": Patch(
        "the traceback of a missing detectron2 or pytorchvideo does not say where to get them",
        "tracebacks of import errors out of SlowFast's files: one line more",
        {"slowfast": "compat.imports.patch_missing_packages"},
    ),
    "pkg_resources": Patch(
        "detectron2's model zoo imports `pkg_resources`, gone from setuptools 81 on",
        "the import of `detectron2.model_zoo`",
        {
            "detectron2": "compat.imports.patch_pkg_resources",
            "detectron2.model_zoo": "compat.imports.patch_pkg_resources_ends",
        },
    ),
    "prefetch_key": Patch(
        "`configs/SSv2/MVITv2_*.yaml` have a key PREFETCH that SlowFast's config does not know",
        "the config key `PREFETCH`: it is passed over",
        {"slowfast.config.defaults": "compat.config.patch_prefetch_key"},
    ),
    "load_config": Patch(
        "`tools/benchmark.py` passes `--cfg` over",
        "`load_config` as `tools/benchmark.py` calls it",
        {"slowfast.utils.parser": "compat.tools.patch_load_config"},
    ),
    "decoder": Patch(
        "no video can be decoded: the code for `DATA.DECODING_BACKEND pyav` fails on every file, "
        "and that for `torchvision` calls functions that torchvision no longer has",
        "`decode` of `slowfast.datasets.decoder`, if a backend is broken: PyAV decodes",
        {
            "slowfast.datasets.decoder": "decoder.patch_decoder",
            "slowfast.datasets.kinetics": "read_context.patch_decoder_items",
        },
    ),
    "bad_videos": Patch(
        "a video that cannot be read is not named; in a test it ends the run after 100 tries",
        "`train_epoch`, `eval_epoch` and `perform_test` of `tools/`, for the dataset `Kinetics` "
        "itself, no subclass: they are named, written down and, if allowed, count as wrong",
        {
            "slowfast.datasets.kinetics": "error_log.patch_bad_videos",
            "tools.train_net": "loops.patch_bad_videos",
            "tools.test_net": "loops.patch_bad_videos",
        },
    ),
    "cuda_synchronize": Patch(
        "a run on a CPU fails in its first iteration, by `torch.cuda.synchronize()`",
        "jobs and epochs with `NUM_GPUS 0`, while they run and if there is no CUDA",
        {"tools.train_net": "loops.patch_cuda_synchronize"},
    ),
    "ava_test": Patch(
        "AVA's test fails in its first iteration: its meter is asked twice",
        "`perform_test` of `tools/test_net.py` with `DETECTION.ENABLE`",
        {"tools.test_net": "loops.patch_ava_test"},
    ),
    "mt_adamw": Patch(
        "`SOLVER.OPTIMIZING_METHOD mt_adamw` asks for a module that PyTorch no longer has",
        "`construct_optimizer` with this method",
        {"slowfast.models.optimizer": "compat.tools.patch_mt_adamw"},
    ),
    "ptv_mvit": Patch(
        "`MODEL_NAME PTVMViT` does not build from SlowFast's own config",
        "PTVMViT with an empty `MVIT.POOL_KV_STRIDE`",
        {"slowfast.models.ptv_model_builder": "compat.tools.patch_ptv_mvit"},
    ),
    "ptv_datasets": Patch(
        "`ptvkinetics` and its kin fail in the first batch, which has four things where SlowFast's "
        "loops unpack five; `DATA.DECODING_BACKEND torchvision` fails on every video",
        "`train_epoch`, `eval_epoch` and `perform_test` of `tools/` for these datasets; their "
        "backend, if torchvision's is gone: PyAV decodes",
        {
            "slowfast.datasets.ptv_datasets": "compat.ptv.patch_backend",
            "tools.train_net": "compat.ptv.patch_loops",
            "tools.test_net": "compat.ptv.patch_loops",
        },
    ),
    "flop_count": Patch(
        "a model with `MODEL.ACT_CHECKPOINT` fails as its FLOPs are counted (`unordered_map::at`)",
        "`get_model_stats`: while it counts, fairscale recomputes nothing",
        {"slowfast.utils.misc": "compat.flops.patch_flop_count"},
    ),
    "unsupported_operators": Patch(
        "counting FLOPs writes about 100 lines of operators that are not counted",
        "`get_model_stats` in runs with selection, or started by `stts run`: no such lines",
        {"slowfast.utils.misc": "compat.flops.patch_unsupported_operators"},
    ),
    "visualization": Patch(
        "`tools/visualization.py` unpacks four of the five things in a batch",
        "the job `visualize` of `tools/visualization.py`",
        {"slowfast.datasets.loader": "compat.tools.patch_visualization"},
    ),
    "activations": Patch(
        "activations are taken for tensors, where a block gives its tokens and their grid",
        "`GetWeightAndActivation` of a layer that gives several things: the first is shown",
        {f"{_VISIBLE}.utils": "compat.tools.patch_activations"},
    ),
    "layer_weights": Patch(
        "weights of several layers are drawn with the indices of the first one's rows",
        "`TensorboardWriter.plot_weights_and_activations`",
        {f"{_VISIBLE}.tensorboard_vis": "compat.tools.patch_layer_weights"},
    ),
    "demo": Patch(
        "the demo of a model with `ARCH mvit` fails on videos that are not square",
        "`process_cv2_inputs` for such models and frames: it gets the middle square",
        {f"{_VISIBLE}.utils": "compat.tools.patch_demo"},
    ),
}

# Packages that SlowFast imports, that no patch can replace, and how to get them.
REMEDIES = {
    "detectron2": "SlowFast needs detectron2 for every model, and it is not on PyPI: install it "
    "from https://github.com/facebookresearch/detectron2",
    "pytorchvideo": "SlowFast needs names that pytorchvideo's release 0.1.5 lacks: install it "
    "from https://github.com/facebookresearch/pytorchvideo",
}
# Set by `stts run` for the launcher that it starts.
BY_US = "STTS_RUN"
GUIDE = "'Inside SlowFast' in projects/stts/README.md"

# The same file under the names by which launchers import it.
ALIASES = {
    "tools.train_net": ("tools.train_net", "vision.fair.slowfast.tools.train_net", "train_net"),
    "tools.test_net": ("tools.test_net", "vision.fair.slowfast.tools.test_net", "test_net"),
}

# Of this process: which patches had something to do, and whether the line about them is written.
applied: list[str] = []
_reported = False


def hooks() -> dict[str, list[str]]:
    """The functions of all patches, by the module after whose import they are called."""
    found: dict[str, list[str]] = {}
    for patch in PATCHES.values():
        for module, function in patch.hooks.items():
            for alias in ALIASES.get(module, (module,)):
                found.setdefault(alias, []).append(function)
    return found


def switched_off() -> set[str]:
    """The patches that ``STTS_COMPAT`` switches off; of a name that is none, nothing comes.

    ``check_switch`` refuses such names.
    """
    text = os.environ.get("STTS_COMPAT", "")
    if text.strip() == "0":
        return set(PATCHES)
    return {word.strip()[1:] for word in text.split(",") if word.strip()[:1] == "-"} & set(PATCHES)


def check_switch(slowfast=None) -> None:
    """Refuses a ``STTS_COMPAT`` that names no patch.

    Raises:
        ValueError: naming the word, and the patches.
    """
    text = os.environ.get("STTS_COMPAT", "")
    if text.strip() in ("", "0", "1"):
        return
    for word in (word.strip() for word in text.split(",")):
        if word[:1] != "-" or word[1:] not in PATCHES:
            raise ValueError(
                f"STTS_COMPAT is {text!r}, but {word!r} switches nothing off: use 0 for all, or "
                f"-NAME,-NAME for some of {', '.join(PATCHES)}"
            )


def patch(name: str):
    """Makes a hook of the patch ``name`` out of ``function(module) -> whether it is needed``."""

    def decorate(function):
        @functools.wraps(function)
        def guarded(module) -> bool:
            if name in switched_off() or not function(module):
                return False
            if name not in applied:
                applied.append(name)
                if not _reported and os.environ.get("STTS_COMPAT_VERBOSE") == "1":
                    atexit.register(report)
            return True

        return guarded

    return decorate


def asks_for_us(cfg) -> bool:
    """Whether a run asks for something that SlowFast does not have without this package: its config
    does, or `stts run` started it."""
    return (
        is_enabled(cfg)
        or os.environ.get(BY_US) == "1"
        or value(cfg, "STTS.FAST_AUGMENT", False)
        or any(
            ours(cfg, f"{node}.{name}") != default
            for node, keys in OUR_KEYS.items()
            for name, default in keys.items()
        )
    )


def report(asked: bool = False) -> None:
    """Writes the line about what was patched, once a process, if something of us was asked for."""
    global _reported
    wanted = asked or os.environ.get("STTS_COMPAT_VERBOSE") == "1"
    # Children of a multi-GPU run, and a DataLoader's workers, would only repeat it.
    alone = multiprocessing.current_process().name == "MainProcess"
    if _reported or not (wanted and applied and alone):
        return
    _reported = True
    print(
        f"stts_slowfast: patched SlowFast in memory: {', '.join(applied)} (STTS_COMPAT=-NAME "
        "switches one off; `stts doctor` lists them)",
        file=sys.stderr,
    )


def table() -> list[str]:
    """The patches as rows of a Markdown table: name, obstacle, where it acts."""
    return [f"| `{name}` | {one.obstacle} | {one.acts} |" for name, one in PATCHES.items()]
