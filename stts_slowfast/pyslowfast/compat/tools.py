"""What SlowFast's tools, and parts of it that few runs reach, trip over."""

import functools
import types

from stts_slowfast.pyslowfast.compat import mend
from stts_slowfast.pyslowfast.wrap import wrap


@mend
def mend_mt_adamw(optimizer) -> bool:
    """``torch.optim._multi_tensor.AdamW``, which is ``AdamW(foreach=True)`` by now."""
    import torch

    if hasattr(torch.optim, "_multi_tensor"):
        return False
    adamw = functools.partial(torch.optim.AdamW, foreach=True)
    torch.optim._multi_tensor = types.SimpleNamespace(AdamW=adamw)
    return True


@mend
def mend_ava_test(meters) -> bool:
    """AVA's meter in testing: ``perform_test`` ends each iteration for it a second time.

    The second time its timers stand already, the epoch is missing, and what it is to collect are
    labels, where it collects boxes.
    """
    if hasattr(meters.AVAMeter.iter_toc, "stock"):
        return False
    wrap(meters.AVAMeter, "iter_toc", _pause_once)
    wrap(meters.AVAMeter, "log_iter_stats", _log_with_an_epoch)
    wrap(meters.AVAMeter, "update_stats", _collect_boxes)
    return True


def _pause_once(iter_toc, meter):
    if not meter.iter_timer.is_paused():
        iter_toc(meter)


def _log_with_an_epoch(log_iter_stats, meter, *args, **kwargs):
    if len(args) + len(kwargs) > 1:
        log_iter_stats(meter, *args, **kwargs)


def _collect_boxes(update_stats, meter, preds, ori_boxes, metadata, *args, **kwargs):
    # A box has its video and its second: (boxes, 2). Indices of videos are (videos,).
    if metadata.dim() > 1:
        update_stats(meter, preds, ori_boxes, metadata, *args, **kwargs)


@mend
def mend_visualization(loader) -> bool:
    """``tools/visualization.py`` unpacks four of the five things that a batch has."""
    if hasattr(loader.construct_loader, "stock"):
        return False
    wrap(loader, "construct_loader", _loader_for_visualization)
    return True


def _loader_for_visualization(construct_loader, *args, **kwargs):
    from stts_slowfast.pyslowfast import shards

    loader = construct_loader(*args, **kwargs)
    return WithoutTime(loader) if shards.job() == "visualize" else loader


class WithoutTime:
    """A loader whose batches are inputs, labels, indices and meta, without the times of clips."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        for batch in self.loader:
            yield (*batch[:3], batch[-1])

    def __len__(self) -> int:
        return len(self.loader)


@mend
def mend_activations(utils) -> bool:
    """Activations are taken for tensors, but a transformer's block gives its tokens and their grid.

    Of several things that a layer gives, the first is shown: the tokens, (batch, tokens, width).
    """
    if hasattr(utils.GetWeightAndActivation._register_single_hook, "stock"):
        return False
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


@mend
def mend_layer_weights(tensorboard_vis) -> bool:
    """Weights of several layers are drawn with the indices of the first layer's rows."""
    if hasattr(tensorboard_vis.TensorboardWriter.plot_weights_and_activations, "stock"):
        return False
    wrap(tensorboard_vis.TensorboardWriter, "plot_weights_and_activations", _layer_by_layer)
    return True


def _layer_by_layer(plot_weights_and_activations, writer, layers, *args, **kwargs):
    for name, values in layers.items():
        plot_weights_and_activations(writer, {name: values}, *args, **kwargs)


@mend
def mend_load_config(parser) -> bool:
    """``tools/benchmark.py`` asks for no config file, so ``--cfg`` would be passed over."""
    if hasattr(parser.load_config, "stock"):
        return False
    wrap(parser, "load_config", _load_named_config)
    return True


def _load_named_config(load_config, args, path_to_config=None):
    if path_to_config is None:
        path_to_config = next(iter(getattr(args, "cfg_files", None) or ()), None)
    return load_config(args, path_to_config)


@mend
def mend_demo(utils) -> bool:
    """The demo scales a video's shorter side alone, but an MViT's positions are of a square."""
    if hasattr(utils.process_cv2_inputs, "stock"):
        return False
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


@mend
def mend_ptv_mvit(ptv_model_builder) -> bool:
    """PTVMViT hands on an empty ``MVIT.POOL_KV_STRIDE`` where pytorchvideo wants None."""
    name = "create_multiscale_vision_transformers"
    stock = getattr(ptv_model_builder, name)
    if hasattr(stock, "stock"):
        return False

    @functools.wraps(stock)
    def create(*args, **kwargs):
        strides = kwargs.get("pool_kv_stride_size")
        if strides is not None and not len(strides):
            kwargs["pool_kv_stride_size"] = None
        return stock(*args, **kwargs)

    create.stock = stock
    setattr(ptv_model_builder, name, create)  # there alone: pytorchvideo's own stays
    return True
