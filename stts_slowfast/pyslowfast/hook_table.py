"""Every function of this package that is called by name after a module of SlowFast is imported.

`FEATURES` is what this package adds, `PATCHES` what works around defects; `HOOKS` is both. A name
such as ``training.wrap_log`` is relative to this package; the function takes the imported module.
PyTorch reads this file at ``import torch``: standard library only.
"""

from typing import NamedTuple

# The names under which launchers import one file.
ALIASES = {
    "tools.train_net": ("tools.train_net", "vision.fair.slowfast.tools.train_net", "train_net"),
    "tools.test_net": ("tools.test_net", "vision.fair.slowfast.tools.test_net", "test_net"),
}

FEATURES = {
    "slowfast": ["compat.check_switch"],
    "slowfast.datasets.build": ["annotations.wrap_build_dataset"],
    "slowfast.datasets.kinetics": ["rand_augment.wrap_augment"],
    "slowfast.models.attention": ["fused.register_attention"],
    "slowfast.models.build": ["plugin.wrap_build_model"],
    "slowfast.models.optimizer": ["training.wrap_optimizer"],
    "slowfast.utils.checkpoint": [
        "checkpoint_loading.wrap_load_checkpoint",
        "plugin.wrap_load_test",
    ],
    "slowfast.utils.logging": ["training.wrap_log"],
    "slowfast.utils.misc": ["distributed.wrap_launch_job", "training.wrap_losses"],
    "slowfast.visualization.tensorboard_vis": ["training.wrap_tensorboard"],
    "tools.train_net": ["loops.wrap_jobs", "loops.wrap_evaluation"],
    "tools.test_net": ["loops.wrap_jobs", "loops.wrap_evaluation"],
    "slowfast.config.defaults": [
        "plugin.add_config",
        "config.add_extra_keys",
        "config.install_config_class",
        "preflight.wrap_config",
        "plugin.wrap_config",
    ],
}


class Patch(NamedTuple):
    """A defect of SlowFast in today's environments, and what works around it.

    Attributes:
        obstacle: what happens without the patch.
        acts: the functions that the patch changes, and for which runs.
        hooks: module of SlowFast to the function of this package that patches it.
    """

    obstacle: str
    acts: str
    hooks: dict[str, str]


_VISUALIZATION = "slowfast.visualization"
PATCHES = {
    "vision_imports": Patch(
        "`vision.fair.slowfast`, which the launcher imports, exists only inside Meta",
        "imports of `vision.fair.slowfast` that nothing else resolves: they find the checkout",
        {"slowfast": "compat.imports.patch_vision_imports"},
    ),
    "ava_evaluation": Patch(
        "older commits import `ava_evaluation`, which is found only from the checkout's root",
        "imports of `ava_evaluation` that nothing else resolves",
        {"slowfast": "compat.imports.patch_ava_evaluation"},
    ),
    "missing_packages": Patch(
        "the traceback of a missing detectron2 or pytorchvideo does not say where to get them",
        "tracebacks of import errors in SlowFast's files: one more line",
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
        "the config key `PREFETCH`: it is ignored",
        {"slowfast.config.defaults": "compat.tools.patch_prefetch_key"},
    ),
    "load_config": Patch(
        "`tools/benchmark.py` ignores `--cfg`",
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
        "itself, not subclasses: they are logged and, if allowed, count as wrong",
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
        "AVA's test fails in its first iteration: its meter is updated twice",
        "`perform_test` of `tools/test_net.py` with `DETECTION.ENABLE`",
        {"tools.test_net": "loops.patch_ava_test"},
    ),
    "mt_adamw": Patch(
        "`SOLVER.OPTIMIZING_METHOD mt_adamw` needs a module that PyTorch no longer has",
        "`construct_optimizer` with this method",
        {"slowfast.models.optimizer": "compat.tools.patch_mt_adamw"},
    ),
    "ptv_mvit": Patch(
        "`MODEL_NAME PTVMViT` does not build from SlowFast's own config",
        "PTVMViT with an empty `MVIT.POOL_KV_STRIDE`",
        {"slowfast.models.ptv_model_builder": "compat.tools.patch_ptv_mvit"},
    ),
    "ptv_datasets": Patch(
        "`ptvkinetics`, `ptvssv2` and `ptvcharades` fail in the first batch, which has four items, "
        "but SlowFast's loops unpack five; `DATA.DECODING_BACKEND torchvision` fails on every "
        "video",
        "`train_epoch`, `eval_epoch` and `perform_test` of `tools/` for these datasets; their "
        "backend, if torchvision's is gone: PyAV decodes",
        {
            "slowfast.datasets.ptv_datasets": "compat.ptv.patch_backend",
            "tools.train_net": "compat.ptv.patch_loops",
            "tools.test_net": "compat.ptv.patch_loops",
        },
    ),
    "flop_count": Patch(
        "a model with `MODEL.ACT_CHECKPOINT` fails when its FLOPs are counted "
        "(`unordered_map::at`)",
        "`get_model_stats`: while it counts, fairscale recomputes nothing",
        {"slowfast.utils.misc": "compat.flops.patch_flop_count"},
    ),
    "unsupported_operators": Patch(
        "counting FLOPs logs about 100 lines of operators that are not counted",
        "`get_model_stats` in runs with selection, or started by `stts run`: no such lines",
        {"slowfast.utils.misc": "compat.flops.patch_unsupported_operators"},
    ),
    "visualization": Patch(
        "`tools/visualization.py` unpacks four of the five items in a batch",
        "the job `visualize` of `tools/visualization.py`",
        {"slowfast.datasets.loader": "compat.tools.patch_visualization"},
    ),
    "activations": Patch(
        "activations must be tensors, but a block returns its tokens and their grid",
        "`GetWeightAndActivation` of layers with several outputs: the first is shown",
        {f"{_VISUALIZATION}.utils": "compat.tools.patch_activations"},
    ),
    "layer_weights": Patch(
        "weights of several layers are plotted with the row indices of the first layer",
        "`TensorboardWriter.plot_weights_and_activations`",
        {f"{_VISUALIZATION}.tensorboard_vis": "compat.tools.patch_layer_weights"},
    ),
    "demo": Patch(
        "the demo of a model with `ARCH mvit` fails on videos that are not square",
        "`process_cv2_inputs` for such models and frames: they are cropped to the central square",
        {f"{_VISUALIZATION}.utils": "compat.tools.patch_demo"},
    ),
}


def _hooks() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    patches = [(module, [name]) for p in PATCHES.values() for module, name in p.hooks.items()]
    for module, names in [*FEATURES.items(), *patches]:
        for alias in ALIASES.get(module, (module,)):
            found.setdefault(alias, []).extend(names)
    # Last: if another hook cannot be registered, SlowFast does not get the node STTS either.
    found["slowfast.config.defaults"] = found.pop("slowfast.config.defaults")
    return found


# Module of SlowFast to the functions that are called, in this order, after its import.
HOOKS = _hooks()
