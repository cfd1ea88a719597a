"""Defects of SlowFast's tools, config, optimizer and visualization, and their patches."""

import functools
import os
import sys
import types

from stts_slowfast.pyslowfast import run_state
from stts_slowfast.pyslowfast.compat import patch
from stts_slowfast.pyslowfast.patching import wrap


@patch("prefetch_key")
def patch_prefetch_key(defaults) -> bool:
    """Ignores the key ``PREFETCH`` of ``configs/SSv2/MVITv2_*.yaml``, which is gone from ``_C``."""
    config = defaults._C
    if "PREFETCH" in config or config.key_is_deprecated("PREFETCH"):
        return False
    config.register_deprecated_key("PREFETCH")
    return True


@patch("mt_adamw")
def patch_mt_adamw(optimizer) -> bool:
    """``torch.optim._multi_tensor.AdamW`` is gone; it is ``AdamW(foreach=True)`` today."""
    import torch

    if hasattr(torch.optim, "_multi_tensor"):
        return False
    wrap(optimizer, "construct_optimizer", _with_multi_tensor)
    return True


def _with_multi_tensor(construct_optimizer, model, cfg, *args, **kwargs):
    import torch

    if cfg.SOLVER.OPTIMIZING_METHOD != "mt_adamw":
        return construct_optimizer(model, cfg, *args, **kwargs)
    adamw = functools.partial(torch.optim.AdamW, foreach=True)
    torch.optim._multi_tensor = types.SimpleNamespace(AdamW=adamw)
    try:
        return construct_optimizer(model, cfg, *args, **kwargs)
    finally:
        del torch.optim._multi_tensor


@patch("visualization")
def patch_visualization(loader) -> bool:
    """``tools/visualization.py`` unpacks four of a batch's five items."""
    wrap(loader, "construct_loader", _construct_loader)
    return True


def _construct_loader(construct_loader, *args, **kwargs):
    loader, job = construct_loader(*args, **kwargs), run_state.current_job()
    if job is None or job.job != "visualize" or not is_tool_function(job.function, "visualization"):
        return loader
    return WithoutTime(loader)


class WithoutTime:
    """A loader whose batches lack the times of clips: inputs, labels, indices, meta."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        for batch in self.loader:
            yield (*batch[:3], batch[-1])

    def __len__(self) -> int:
        return len(self.loader)


@patch("activations")
def patch_activations(utils) -> bool:
    """Activations must be tensors, but a transformer's block returns its tokens and their grid: the
    first output is shown, the tokens (batch, tokens, width)."""
    wrap(utils.GetWeightAndActivation, "_register_single_hook", _register_token_hook)
    return True


def _register_token_hook(register_single_hook, activations, layer_name):
    from slowfast.visualization.utils import get_layer

    register_single_hook(activations, layer_name)
    hooks = get_layer(activations.model, layer_name)._forward_hooks
    last = next(reversed(hooks))
    store = hooks[last]

    def store_first(layer, inputs, output):
        first = output[0] if isinstance(output, (tuple, list)) else output
        # The plots call view(), which needs contiguous memory.
        store(layer, inputs, first.contiguous())

    hooks[last] = store_first


@patch("layer_weights")
def patch_layer_weights(tensorboard_vis) -> bool:
    """Weights of several layers are plotted with the row indices of the first layer."""
    wrap(tensorboard_vis.TensorboardWriter, "plot_weights_and_activations", _plot_each_layer)
    return True


def _plot_each_layer(plot_weights_and_activations, writer, layers, *args, **kwargs):
    for name, values in layers.items():
        plot_weights_and_activations(writer, {name: values}, *args, **kwargs)


@patch("load_config")
def patch_load_config(parser) -> bool:
    """``tools/benchmark.py`` calls ``load_config`` without a path, so it ignores ``--cfg``."""
    wrap(parser, "load_config", _load_config)
    return True


def is_tool_file(path: str | None, name: str) -> bool:
    """Whether a file is ``tools/NAME.py`` of a checkout of SlowFast."""
    if not path or os.path.basename(path) != f"{name}.py":
        return False
    tools = os.path.dirname(os.path.realpath(path))
    beside = os.path.join(os.path.dirname(tools), "slowfast", "__init__.py")
    return os.path.isfile(os.path.join(tools, "run_net.py")) and os.path.isfile(beside)


def is_tool_function(function, name: str) -> bool:
    """Whether a function is one of ``tools/NAME.py`` of a checkout of SlowFast."""
    module = sys.modules.get(getattr(function, "__module__", None))
    return is_tool_file(getattr(module, "__file__", None), name)


def _load_config(load_config, args, path_to_config=None):
    main = sys.modules.get("__main__")
    if path_to_config is None and is_tool_file(getattr(main, "__file__", None), "benchmark"):
        path_to_config = next(iter(getattr(args, "cfg_files", None) or ()), None)
    return load_config(args, path_to_config)


@patch("demo")
def patch_demo(utils) -> bool:
    """The demo scales a video's shorter side only, but an MViT needs square frames."""
    wrap(utils, "process_cv2_inputs", _crop_to_square)
    return True


def _crop_to_square(process_cv2_inputs, frames, cfg):
    height, width = frames[0].shape[:2]
    if cfg.MODEL.ARCH == "mvit" and height != width:
        if cfg.DETECTION.ENABLE:  # boxes refer to the whole frame
            raise ValueError(
                f"DETECTION.ENABLE is True and frames are {width}x{height}, but the positions of "
                f"{cfg.MODEL.MODEL_NAME} are those of a square: crop the video to one first"
            )
        size = min(height, width)
        top, left = (height - size) // 2, (width - size) // 2
        frames = [frame[top : top + size, left : left + size] for frame in frames]
    return process_cv2_inputs(frames, cfg)


@patch("ptv_mvit")
def patch_ptv_mvit(ptv_model_builder) -> bool:
    """PTVMViT passes an empty ``MVIT.POOL_KV_STRIDE`` on, but pytorchvideo expects None."""
    name = "create_multiscale_vision_transformers"
    wrap(ptv_model_builder, name, _create_ptv_mvit, everywhere=False)
    return True


def _create_ptv_mvit(create, *args, **kwargs):
    strides = kwargs.get("pool_kv_stride_size")
    if strides is not None and not len(strides):
        kwargs["pool_kv_stride_size"] = None
    return create(*args, **kwargs)
