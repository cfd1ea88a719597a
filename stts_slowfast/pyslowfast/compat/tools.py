"""What SlowFast's tools, and parts of it that few runs reach, trip over."""

import functools
import os
import sys
import types

from stts_slowfast.pyslowfast import run_state
from stts_slowfast.pyslowfast.compat import patch
from stts_slowfast.pyslowfast.patching import is_wrapped, wrap


@patch("mt_adamw")
def patch_mt_adamw(optimizer) -> bool:
    """``torch.optim._multi_tensor.AdamW``, which is ``AdamW(foreach=True)`` by now."""
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
    """``tools/visualization.py`` unpacks four of the five things that a batch has."""
    wrap(loader, "construct_loader", _loader_for_visualization)
    return True


def _loader_for_visualization(construct_loader, *args, **kwargs):
    loader, job = construct_loader(*args, **kwargs), run_state.running()
    if job is None or job.job != "visualize" or not is_slowfasts(job.function, "visualization"):
        return loader
    return WithoutTime(loader)


class WithoutTime:
    """A loader whose batches are inputs, labels, indices and meta, without the times of clips."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        for batch in self.loader:
            yield (*batch[:3], batch[-1])

    def __len__(self) -> int:
        return len(self.loader)


@patch("activations")
def patch_activations(utils) -> bool:
    """Activations are taken for tensors, but a transformer's block gives its tokens and their grid.

    Of several things that a layer gives, the first is shown: the tokens, (batch, tokens, width).
    """
    wrap(utils.GetWeightAndActivation, "_register_single_hook", _keep_tokens)
    return True


def _keep_tokens(register_single_hook, activations, layer_name):
    from slowfast.visualization.utils import get_layer

    register_single_hook(activations, layer_name)
    hooks = get_layer(activations.model, layer_name)._forward_hooks
    last = next(reversed(hooks))
    keep = hooks[last]

    def keep_first(layer, inputs, output):
        first = output[0] if isinstance(output, (tuple, list)) else output
        # What is drawn is viewed in other shapes, which a transposed result would not allow.
        keep(layer, inputs, first.contiguous())

    hooks[last] = keep_first


@patch("layer_weights")
def patch_layer_weights(tensorboard_vis) -> bool:
    """Weights of several layers are drawn with the indices of the first layer's rows."""
    wrap(tensorboard_vis.TensorboardWriter, "plot_weights_and_activations", _layer_by_layer)
    return True


def _layer_by_layer(plot_weights_and_activations, writer, layers, *args, **kwargs):
    for name, values in layers.items():
        plot_weights_and_activations(writer, {name: values}, *args, **kwargs)


@patch("load_config")
def patch_load_config(parser) -> bool:
    """``tools/benchmark.py`` asks for no config file, so ``--cfg`` would be passed over."""
    wrap(parser, "load_config", _load_named_config)
    return True


def is_a_tool(path: str | None, name: str) -> bool:
    """Whether a file is ``tools/NAME.py`` of a checkout of SlowFast."""
    if not path or os.path.basename(path) != f"{name}.py":
        return False
    tools = os.path.dirname(os.path.realpath(path))
    beside = os.path.join(os.path.dirname(tools), "slowfast", "__init__.py")
    return os.path.isfile(os.path.join(tools, "run_net.py")) and os.path.isfile(beside)


def is_slowfasts(function, name: str) -> bool:
    """Whether a function is one of ``tools/NAME.py`` of a checkout of SlowFast."""
    module = sys.modules.get(getattr(function, "__module__", None))
    return is_a_tool(getattr(module, "__file__", None), name)


def _load_named_config(load_config, args, path_to_config=None):
    main = sys.modules.get("__main__")
    if path_to_config is None and is_a_tool(getattr(main, "__file__", None), "benchmark"):
        path_to_config = next(iter(getattr(args, "cfg_files", None) or ()), None)
    return load_config(args, path_to_config)


@patch("demo")
def patch_demo(utils) -> bool:
    """The demo scales a video's shorter side alone, but an MViT's positions are of a square."""
    wrap(utils, "process_cv2_inputs", _middle_squares)
    return True


def _middle_squares(process_cv2_inputs, frames, cfg):
    height, width = frames[0].shape[:2]
    if cfg.MODEL.ARCH == "mvit" and height != width:  # what is convolutional takes any
        if cfg.DETECTION.ENABLE:  # boxes are places in the whole frame
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
    """PTVMViT hands on an empty ``MVIT.POOL_KV_STRIDE`` where pytorchvideo wants None."""
    name = "create_multiscale_vision_transformers"
    stock = getattr(ptv_model_builder, name)
    if is_wrapped(stock):
        return False

    @functools.wraps(stock)
    def create(*args, **kwargs):
        strides = kwargs.get("pool_kv_stride_size")
        if strides is not None and not len(strides):
            kwargs["pool_kv_stride_size"] = None
        return stock(*args, **kwargs)

    create.stock = create.wrapper = stock
    setattr(ptv_model_builder, name, create)  # there alone: pytorchvideo's own stays
    return True
