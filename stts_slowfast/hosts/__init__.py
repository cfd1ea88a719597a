"""Hosts: how a model's blocks are called, a file for each library or layout.

A host knows one way in which blocks are called. Selection takes place between the tokens that
arrive at a block and the call: ``unpack`` turns the call's arguments into :class:`Tokens`,
selectors keep some of them, ``pack`` makes the arguments of the smaller call. See :class:`Host` for
how a block knows which tokens arrive. Other packages register theirs with ``@HOSTS.register()``.
"""

import warnings
from typing import Any

from fvcore.common.registry import Registry
from torch import nn

from stts_slowfast.hosts.hf_images import HFImages
from stts_slowfast.hosts.hf_timesformer import HFTimeSformer
from stts_slowfast.hosts.host import Args, Host, Kwargs, Tokens, is_instance_of
from stts_slowfast.hosts.plain_video_vit import PlainVideoViT
from stts_slowfast.hosts.qwen_vision import QwenVision
from stts_slowfast.hosts.thw_blocks import ThwBlockHost
from stts_slowfast.hosts.timm_eva import TimmEva
from stts_slowfast.hosts.timm_vit import TimmViT
from stts_slowfast.hosts.video_swin import SwinHost
from stts_slowfast.hosts.videomae import VideoMAE
from stts_slowfast.hosts.videoprism import VideoPrism
from stts_slowfast.hosts.vivit import ViViT
from stts_slowfast.hosts.vjepa2 import VJEPA2
from stts_slowfast.hosts.vjepa2_official import VJEPA2Official
from stts_slowfast.plugins import load_extensions

__all__ = [
    "HOSTS",
    "Args",
    "Host",
    "Kwargs",
    "Tokens",
    "base_model",
    "find_blocks",
    "is_instance_of",
    "modules_with_selectors",
    "resolve_host",
    "unwrap",
]

# The host of a model is the last registered one that finds blocks in it, so hosts of other packages
# are tried before ours. ThwBlockHost is tried last: it recognises any model with `blocks`, and
# raises for those whose blocks take no grid.
HOSTS = Registry("HOSTS")
for _name, _host in (
    ("BlocksWithGrid", ThwBlockHost),
    ("HFImages", HFImages),
    ("HFTimeSformer", HFTimeSformer),
    ("PlainVideoViT", PlainVideoViT),
    ("QwenVision", QwenVision),
    ("TimmEva", TimmEva),
    ("TimmViT", TimmViT),
    ("StagesOfGrids", SwinHost),
    ("VideoMAE", VideoMAE),
    ("VideoPrism", VideoPrism),
    ("ViViT", ViViT),
    ("VJEPA2", VJEPA2),
    ("VJEPA2Official", VJEPA2Official),
):
    HOSTS._do_register(_name, _host)


def base_model(model: nn.Module) -> nn.Module:
    """The model that has the blocks: ``model.hosted`` if it wraps another, else itself."""
    hosted: nn.Module = getattr(model, "hosted", model)
    return hosted


def modules_with_selectors(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model to which selectors are attached, by their path; ``""`` is the model.

    They may be anywhere: inside DDP, ``torch.compile``, an adapter or a wrapper.
    """
    return {
        path: module
        for path, module in model.named_modules()
        if hasattr(module._modules.get("stts"), "settings")
    }


def unwrap(model: nn.Module) -> nn.Module:
    """The module in a model to which selectors are attached; if there is none, the model inside
    ``DistributedDataParallel`` and ``torch.compile``.

    Raises:
        ValueError: if several modules of the model have selectors.
    """
    found = modules_with_selectors(model)
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} modules of this {type(model).__name__} have selectors "
            f"({', '.join(path or 'itself' for path in found)}): give one of them"
        )
    if found:
        return next(iter(found.values()))
    while isinstance(
        inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module
    ):
        model = inner
    return model


def resolve_host(model: nn.Module) -> tuple[Host, list[nn.Module]]:
    """The host of a model, and the model's blocks.

    Raises:
        ValueError: if no host finds blocks in it.
    """
    load_extensions()
    model = base_model(model)
    if not is_instance_of(model, "peft", "PeftModel"):  # whose attributes are its model's
        for _, host in reversed(list(HOSTS)):
            blocks = list(host.blocks(model))
            if blocks:
                return host(model), blocks
    raise ValueError(
        f"{type(model).__name__} has no blocks to select tokens before"
        f"{_hint_at_inner_model(model)}: STTS works on models with `blocks` called as "
        "x, thw = block(x, thw) (MViT, TimeSformer, ViT), on "
        "Video Swin, on VideoMAE, ViViT, V-JEPA 2, TimeSformer, VideoPrism, SigLIP, CLIP, DINOv2, "
        "DINOv3 and Qwen's vision towers of transformers, on timm's VisionTransformer and Eva, and "
        "on what is registered in stts_slowfast.hosts.HOSTS"
    )


def _hint_at_inner_model(model: nn.Module) -> str:
    """Text that names the module in a model that has blocks; empty if none has."""
    if is_instance_of(model, "peft", "PeftModel"):
        return ", but its base model may have: attach(model.get_base_model(), ...)"
    for path, module in model.named_modules():
        if path:
            for _, host in reversed(list(HOSTS)):
                try:
                    found = len(host.blocks(module))
                except ValueError:
                    found = 0
                if found:
                    kind = type(module).__name__
                    return f", but its {path} ({kind}) has: attach(model.{path}, ...)"
    return ""


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model before which tokens can be selected, in order.

    Raises:
        ValueError: if no host finds blocks in it.
    """
    return resolve_host(model)[1]


def __getattr__(name: str) -> Any:
    if name != "is_a":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        "stts_slowfast.hosts.is_a is now is_instance_of; the old name is removed in 0.4",
        FutureWarning,
        stacklevel=2,
    )
    return is_instance_of
