"""One place for every checkpoint format: recognises a file by its keys, loads and writes it.

A format is a function that renames a file's parameters to the model's own names; adding one is
adding a row to ``FORMATS``.
"""

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from iopath.common.file_io import g_pathmgr
from torch import Tensor, nn
from torchvision.models.video.mvit import MViT

logger = logging.getLogger(__name__)

State = dict[str, Tensor]

# What the norms of pooled queries, keys and values add to the variance: today's SlowFast and
# torchvision, and the older SlowFast that the STTS authors forked.
_EPS_TODAY, _EPS_AUTHORS = 1e-6, 1e-5


@dataclass
class Loaded:
    """What :func:`load_weights` did.

    Attributes:
        format: what the file was recognised as.
        missing: the model's parameters that the file does not have; they keep their values.
        unexpected: the file's parameters, by the file's names, that the model does not have.
        mismatched: parameters of another shape than the model's (a head for other classes, say),
            with both shapes; they keep the model's values.
        notes: what else was done to the model.
    """

    format: str
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"recognised as {self.format}"]
        for name in ("missing", "unexpected", "mismatched"):
            entries = getattr(self, name)
            if entries:
                shown = ", ".join(entries[:4]) + (", ..." if len(entries) > 4 else "")
                parts.append(f"{len(entries)} {name} ({shown})")
        return "; ".join(parts + self.notes)


def load_weights(model: nn.Module, path_or_state_dict: str | os.PathLike | dict) -> Loaded:
    """Loads weights of any known format into a model, in place.

    Args:
        model: a standalone model, with or without selectors.
        path_or_state_dict: a checkpoint file (any path iopath opens), the dict read from one, or
            a bare state dict.

    Returns:
        What it was, what was missing and what was left over.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where the file is no checkpoint, or none of its parameters fits the model.
    """
    source = "the state dict"
    checkpoint = path_or_state_dict
    if isinstance(checkpoint, (str, os.PathLike)):
        source = os.fspath(checkpoint)
        checkpoint = read_checkpoint(source)
    state = state_dict_of(checkpoint)
    known = next((row for row in FORMATS if row[1](state, model)), None)
    if known is None:
        raise ValueError(f"{source} holds no parameters of a format known for {_name(model)}")
    name, _, rename = known
    loaded = _copy_into(model, state, rename(state, model), name)
    _set_pool_norm_eps(model, checkpoint, loaded)
    logger.info("Loaded %s: %s", source, loaded)
    return loaded


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Reads a checkpoint onto the CPU.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it cannot be read as a checkpoint (truncated, another kind of file).
    """
    path = os.fspath(path)
    if not g_pathmgr.isfile(path):
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        with g_pathmgr.open(path, "rb") as f:
            checkpoint = torch.load(f, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a dict of parameters")
    return checkpoint


def save_checkpoint(
    path: str | os.PathLike,
    model: nn.Module,
    cfg,
    epoch: int,
    optimizer_state: dict | None = None,
    scaler_state: dict | None = None,
) -> None:
    """Writes a SlowFast ``.pyth`` checkpoint, parameters under SlowFast's names.

    The file appears whole or not at all: it is written beside its place and then renamed.

    Args:
        path: any path iopath opens; its folder must exist.
        model: a standalone model.
        cfg: stored as text, as SlowFast does.
        epoch: the epoch just finished, counted from 0.
        optimizer_state: the optimizer's ``state_dict()``.
        scaler_state: the gradient scaler's ``state_dict()``.
    """
    checkpoint = {
        "epoch": epoch,
        "model_state": slowfast_state(model),
        "optimizer_state": optimizer_state or {},
        "cfg": cfg.dump(),
    }
    if scaler_state is not None:
        checkpoint["scaler_state"] = scaler_state
    eps = {norm.eps for norm in _pool_norms(model)}
    if eps and eps != {_EPS_TODAY}:
        checkpoint["pool_norm_eps"] = eps.pop()
    path = os.fspath(path)
    if "://" in path:  # remote stores publish a file when it is closed
        with g_pathmgr.open(path, "wb") as f:
            torch.save(checkpoint, f)
        return
    partial = f"{path}.partial"
    torch.save(checkpoint, partial)
    os.replace(partial, path)


def state_dict_of(checkpoint: dict) -> State:
    """The parameters inside a checkpoint, whatever it wraps them in; DDP's prefix taken off.

    Raises:
        ValueError: where there are none.
    """
    for key in ("model_state", "state_dict", "model"):
        if isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    state = {key: value for key, value in checkpoint.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError("the checkpoint holds no parameters: no tensor, model_state or state_dict")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def slowfast_state(model: nn.Module) -> State:
    """The model's parameters under SlowFast's names and shapes (a torchvision MViT is renamed)."""
    state = model.state_dict()
    return mvit_to_slowfast(state) if isinstance(model, MViT) else dict(state)


# --- MViT: SlowFast's names and torchvision's ---------------------------------------------------

# SlowFast's name to torchvision's name, and how many leading ones torchvision drops from the shape.
_MVIT_STEM = {
    "cls_token": ("pos_encoding.class_token", 2),
    "pos_embed_spatial": ("pos_encoding.spatial_pos", 1),
    "pos_embed_temporal": ("pos_encoding.temporal_pos", 1),
    "pos_embed_class": ("pos_encoding.class_pos", 2),
}
# How a name begins, after the "blocks.N." where there is one: SlowFast's and torchvision's.
_MVIT_PREFIXES = {
    "patch_embed.proj.": "conv_proj.",
    "head.projection.": "head.1.",
    "proj.": "project.",
    "mlp.fc1.": "mlp.0.",
    "mlp.fc2.": "mlp.3.",
    "attn.proj.": "attn.project.0.",
    **{f"attn.pool_{x}.weight": f"attn.pool_{x}.pool.weight" for x in "qkv"},
    **{f"attn.norm_{x}.": f"attn.pool_{x}.norm_act.0." for x in "qkv"},
}
_BLOCK = re.compile(r"^blocks\.\d+\.")


def mvit_from_slowfast(state: State) -> State:
    """SlowFast's MViT parameters under torchvision's names; what is no MViT's keeps its name."""
    renamed = {}
    for key, value in state.items():
        if key in _MVIT_STEM:
            key, dropped = _MVIT_STEM[key]
            value = value.reshape(value.shape[dropped:])
        renamed[_replace_prefix(key, _MVIT_PREFIXES)] = value
    return renamed


def mvit_to_slowfast(state: State) -> State:
    """The inverse of :func:`mvit_from_slowfast`."""
    stem = {ours: (theirs, dropped) for theirs, (ours, dropped) in _MVIT_STEM.items()}
    prefixes = {ours: theirs for theirs, ours in _MVIT_PREFIXES.items()}
    renamed = {}
    for key, value in state.items():
        if key in stem:
            key, dropped = stem[key]
            value = value.reshape((1,) * dropped + value.shape)
        renamed[_replace_prefix(key, prefixes)] = value
    return renamed


def _replace_prefix(key: str, prefixes: dict[str, str]) -> str:
    match = _BLOCK.match(key)
    block = match.group() if match else ""
    rest = key.removeprefix(block)
    for old, new in prefixes.items():
        if rest.startswith(old):
            return block + new + rest.removeprefix(old)
    return key


# --- the STTS authors' score predictors ---------------------------------------------------------

_AUTHORS_SCORER = re.compile(
    r"^(time|space)_score_predictor\.(\d+)\.score_network\.(in_conv|out_conv)\.(.+)$"
)


def selectors_from_authors(state: State, model: nn.Module) -> State:
    """The authors' ``{time,space}_score_predictor.{n}`` under our selectors' names.

    ``n`` counts the selections of a dimension in order; our keys name the block.
    """
    stts = getattr(model, "stts", {})
    renamed = {}
    for key, value in state.items():
        match = _AUTHORS_SCORER.match(key)
        if match:
            dimension, number, part, rest = match.groups()
            ours = [name for name in stts if name.startswith(f"{dimension}_")]
            if int(number) < len(ours):
                part = {"in_conv": "embed", "out_conv": "score"}[part]
                key = f"stts.{ours[int(number)]}.scorer.network.{part}.{rest}"
        renamed[key] = value
    return renamed


# --- formats ------------------------------------------------------------------------------------


def _is_authors_mvit(state: State, model: nn.Module) -> bool:
    return _is_slowfast_mvit(state, model) and any(map(_AUTHORS_SCORER.match, state))


def _is_slowfast_mvit(state: State, model: nn.Module) -> bool:
    return isinstance(model, MViT) and "patch_embed.proj.weight" in state


def _from_authors_mvit(state: State, model: nn.Module) -> State:
    return mvit_from_slowfast(selectors_from_authors(state, model))


# Name, who recognises it, and who renames it to the model's names in the order of its own keys.
# The first that recognises a file wins.
FORMATS: list[tuple[str, Callable[[State, nn.Module], bool], Callable[[State, nn.Module], State]]]
FORMATS = [
    ("an STTS authors' MViT", _is_authors_mvit, _from_authors_mvit),
    ("a SlowFast MViT", _is_slowfast_mvit, lambda state, model: mvit_from_slowfast(state)),
    (
        "the model's own names",
        lambda state, model: bool(set(state) & set(model.state_dict())),
        lambda state, model: state,
    ),
]


def _copy_into(model: nn.Module, state: State, renamed: State, name: str) -> Loaded:
    loaded = Loaded(name)
    own = model.state_dict()
    fitting = {}
    for theirs, (key, value) in zip(state, renamed.items()):
        if key not in own:
            loaded.unexpected.append(theirs)
        elif own[key].shape != value.shape:
            shapes = f"{tuple(value.shape)}, the model's is {tuple(own[key].shape)}"
            loaded.mismatched.append(f"{key} {shapes}")
        else:
            fitting[key] = value
    loaded.missing = [key for key in own if key not in renamed]
    if not fitting:
        raise ValueError(f"{name} was recognised, but no parameter of it fits {_name(model)}")
    model.load_state_dict(fitting, strict=False)
    return loaded


def _set_pool_norm_eps(model: nn.Module, checkpoint: dict, loaded: Loaded) -> None:
    norms = _pool_norms(model)
    authors = loaded.format == "an STTS authors' MViT"
    eps = checkpoint.get("pool_norm_eps", _EPS_AUTHORS if authors else _EPS_TODAY)
    if any(norm.eps != eps for norm in norms):
        loaded.notes.append(f"norms of pooled queries, keys and values set to eps {eps:g}")
    for norm in norms:
        norm.eps = eps


def _pool_norms(model: nn.Module) -> list[nn.LayerNorm]:
    if not isinstance(model, MViT):
        return []
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and re.search(r"attn\.pool_[qkv]\.", name)
    ]


def _name(model: nn.Module) -> str:
    return f"this {type(model).__name__}"
