"""MViT's parameters as SlowFast, torchvision, pytorchvideo and the STTS authors name them."""

import re

from torch import Tensor, cat, nn
from torchvision.models.video.mvit import MViT

from stts_slowfast.backbones.family import Format
from stts_slowfast.backbones.state_dict import (
    HAS_AUTHORS_SCORER,
    State,
    has,
    patches_are,
    replace_prefix,
    selectors_from_authors,
    selectors_to_authors,
    swapped,
    without_prefix,
)

# --- torchvision --------------------------------------------------------------------------------

# Prefixes of names, after "blocks.N." if there is one: SlowFast's and torchvision's.
_TORCHVISION = {
    "cls_token": "pos_encoding.class_token",
    "pos_embed_spatial": "pos_encoding.spatial_pos",
    "pos_embed_temporal": "pos_encoding.temporal_pos",
    "pos_embed_class": "pos_encoding.class_pos",
    "patch_embed.proj.": "conv_proj.",
    "head.projection.": "head.1.",
    "proj.": "project.",
    "mlp.fc1.": "mlp.0.",
    "mlp.fc2.": "mlp.3.",
    "attn.proj.": "attn.project.0.",
    **{f"attn.pool_{x}.weight": f"attn.pool_{x}.pool.weight" for x in "qkv"},
    **{f"attn.norm_{x}.": f"attn.pool_{x}.norm_act.0." for x in "qkv"},
}
# Parameters without SlowFast's leading dimensions of 1 in torchvision: a vector, and one a
# position.
_VECTORS, _VECTOR_LISTS = (
    ("cls_token", "pos_embed_class"),
    ("pos_embed_spatial", "pos_embed_temporal"),
)


def torchvision_from_slowfast(state: State) -> State:
    """SlowFast's MViT parameters under torchvision's names; others keep theirs."""

    def shaped(key: str, value: Tensor) -> Tensor:
        if key in _VECTORS:
            return value[0, 0]
        return value[0] if key in _VECTOR_LISTS else value

    return {replace_prefix(key, _TORCHVISION): shaped(key, value) for key, value in state.items()}


def torchvision_to_slowfast(state: State) -> State:
    """The inverse of :func:`torchvision_from_slowfast`."""
    renamed = {}
    for key, value in state.items():
        if key.startswith("pos_encoding."):
            value = value.reshape(1, -1, value.shape[-1])
        renamed[replace_prefix(key, swapped(_TORCHVISION))] = value
    return renamed


# --- pytorchvideo -------------------------------------------------------------------------------

# SlowFast's name to pytorchvideo's.
_PYTORCHVIDEO = {
    "cls_token": "cls_positional_encoding.cls_token",
    "pos_embed": "cls_positional_encoding.pos_embed",
    "patch_embed.proj.": "patch_embed.patch_model.",
    "norm_stem.": "norm_patch_embed.",
    "norm.": "norm_embed.",
    "head.projection.": "head.proj.",
}
# Its attention registers its pools and norms a second time, for TorchScript.
_TWICE = re.compile(r"^(blocks\.\d+\.attn\.)(?:pool_([qkv])\.weight|norm_([qkv])\.(weight|bias))$")
_QKV = re.compile(r"^(blocks\.\d+\.attn\.)qkv\.(weight|bias)$")
_PART = re.compile(r"^(blocks\.\d+\.attn\.)([qkv])\.(weight|bias)$")


def pytorchvideo_from_slowfast(state: State, separate: bool = True, twice: bool = True) -> State:
    """SlowFast's MViT parameters under pytorchvideo's names.

    Args:
        state: under SlowFast's names.
        separate: a projection each for queries, keys and values, as in newer versions.
        twice: pools and norms registered twice, as in newer versions.
    """
    renamed = {}
    for key, value in state.items():
        if separate and (match := _QKV.match(key)):
            block, kind = match.groups()
            renamed.update({f"{block}{x}.{kind}": v for x, v in zip("qkv", value.chunk(3))})
            continue
        renamed[replace_prefix(key, _PYTORCHVIDEO)] = value
        if twice and (match := _TWICE.match(key)):
            block, pool, norm, kind = match.groups()
            copy = f"pool_{pool}.pool.weight" if pool else f"pool_{norm}.norm.{kind}"
            renamed[f"{block}_attention_{copy}"] = value
    return renamed


def pytorchvideo_to_slowfast(state: State) -> State:
    """The inverse of :func:`pytorchvideo_from_slowfast`, for all versions; removes the prefix
    ``model.`` of SlowFast's PTVMViT."""
    prefixes = swapped(_PYTORCHVIDEO)
    state = without_prefix(state, "model.")
    renamed = {}
    for key, value in state.items():
        if "._attention_pool_" in key:
            continue
        if match := _PART.match(key):
            block, part, kind = match.groups()
            if part == "q":
                qkv = [state[f"{block}{x}.{kind}"] for x in "qkv"]
                renamed[f"{block}qkv.{kind}"] = cat(qkv)
            continue
        renamed[replace_prefix(key, prefixes)] = value
    return renamed


# --- from the names of a run's checkpoints to a model's ------------------------------------------


def from_slowfast(state: State, model: nn.Module) -> State:
    """SlowFast's names to those of torchvision's, SlowFast's or pytorchvideo's MViT, or our ViT."""
    if isinstance(model, MViT):
        return torchvision_from_slowfast(state)
    own = dict(model.state_dict())
    if not _is_pytorchvideo(own):
        return state
    attention = r"(model\.)?blocks\.\d+\.attn\."
    separate, twice = has(own, attention + r"q\."), has(own, attention + "_attention_pool_")
    renamed = pytorchvideo_from_slowfast(state, separate, twice)
    inside = "model.patch_embed.patch_model.weight" in own  # SlowFast's PTVMViT, not the selectors
    return {
        f"model.{key}" if inside and not key.startswith("stts.") else key: value
        for key, value in renamed.items()
    }


def to_slowfast(state: State, model: nn.Module) -> State:
    """The inverse of :func:`from_slowfast`."""
    if isinstance(model, MViT):
        return torchvision_to_slowfast(state)
    return pytorchvideo_to_slowfast(state) if _is_pytorchvideo(state) else dict(state)


# --- metadata -------------------------------------------------------------------------------------

# The eps of the norms of pooled queries, keys and values: of today's SlowFast and torchvision, and
# of the older SlowFast that the STTS authors forked.
EPS_TODAY, EPS_AUTHORS = 1e-6, 1e-5


def read_metadata(model: nn.Module) -> dict:
    """``pool_norm_eps`` of a torchvision MViT."""
    eps = {norm.eps for norm in _pool_norms(model)}
    return {"pool_norm_eps": eps.pop()} if eps else {}


def set_metadata(model: nn.Module, metadata) -> list[str]:
    """Sets ``pool_norm_eps``; returns a sentence if it changed."""
    norms, eps = _pool_norms(model), metadata["pool_norm_eps"]
    changed = any(norm.eps != eps for norm in norms)
    for norm in norms:
        norm.eps = eps
    return [f"norms of pooled queries, keys and values set to eps {eps:g}"] if changed else []


def _pool_norms(model: nn.Module) -> list[nn.LayerNorm]:
    if not isinstance(model, MViT):
        return []
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and re.search(r"attn\.pool_[qkv]\.", name)
    ]


# --- formats ------------------------------------------------------------------------------------


def _is_pytorchvideo(state: State, prefix: str = r"(model\.)?") -> bool:
    return has(state, prefix + r"patch_embed\.patch_model\.weight$") and has(
        state, prefix + r"blocks\.0\.attn\."
    )


FORMATS = {
    "authors-mvit": Format(
        "an STTS authors' MViT",
        lambda state: (
            patches_are(state, 5)
            and has(state, HAS_AUTHORS_SCORER)
            and not has(state, r"(backbone\.)?layers\.")
        ),
        selectors_from_authors,
        selectors_to_authors,
        "authors",
        "model_state",
        {"pool_norm_eps": EPS_AUTHORS},
    ),
    "torchvision-mvit": Format(
        "a torchvision MViT",
        lambda state: "conv_proj.weight" in state,
        lambda state, selectors: torchvision_to_slowfast(state),
        torchvision_from_slowfast,
        "torchvision",
    ),
    "pytorchvideo-mvit": Format(
        "a pytorchvideo MViT",
        lambda state: _is_pytorchvideo(state, ""),
        lambda state, selectors: pytorchvideo_to_slowfast(state),
        pytorchvideo_from_slowfast,
        "pytorchvideo",
    ),
    "ptv-mvit": Format(
        "SlowFast's PTVMViT",
        lambda state: _is_pytorchvideo(state, r"model\."),
        lambda state, selectors: pytorchvideo_to_slowfast(state),
        lambda state: {
            key if key.startswith("stts.") else f"model.{key}": value
            for key, value in pytorchvideo_from_slowfast(state).items()
        },
        "ptvmvit",
        "model_state",
    ),
    "slowfast": Format(
        "a SlowFast MViT",
        lambda state: patches_are(state, 5) and has(state, r"blocks\."),
        lambda state, selectors: state,
        dict,
        "slowfast",
        "model_state",
    ),
}
