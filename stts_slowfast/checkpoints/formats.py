"""One place for every checkpoint format: recognises a file by its keys, loads, writes, converts it.

Every format is renamed to one set of names, SlowFast's (for models that SlowFast does not have:
TimeSformer's own and torchvision's Video Swin's), and from there to the model's; adding a format is
adding a row to ``FORMATS``.
"""

import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from iopath.common.file_io import g_pathmgr
from torch import Tensor, nn
from torchvision.models.video.mvit import MViT
from torchvision.models.video.swin_transformer import SwinTransformer3d

from stts_slowfast.backbones.timesformer import TimeSformer, resize_positions, resize_times
from stts_slowfast.backbones.vit import ViT
from stts_slowfast.checkpoints.files import read_checkpoint, write_whole

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
    checkpoint = path_or_state_dict
    if isinstance(checkpoint, (str, os.PathLike)):
        checkpoint = read_checkpoint(checkpoint)
    state = state_dict_of(checkpoint)
    known = recognize(state)
    renamed = known.to_slowfast(state, list(getattr(model, "stts", ())))
    loaded = _copy_into(model, state, _to_model(renamed, model), known.name)
    _set_pool_norm_eps(model, checkpoint, loaded)
    return loaded


def load_pretrained(model: nn.Module, cfg) -> Loaded | None:
    """Loads ``TIMESFORMER.PRETRAINED_MODEL`` into a TimeSformer; None where there is none to load.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_weights`.
    """
    if not isinstance(model, TimeSformer) or not cfg.TIMESFORMER.PRETRAINED_MODEL:
        return None
    loaded = load_weights(model, cfg.TIMESFORMER.PRETRAINED_MODEL)
    logger.info("Loaded %s: %s", cfg.TIMESFORMER.PRETRAINED_MODEL, loaded)
    return loaded


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
    write_whole(path, lambda partial: torch.save(checkpoint, partial))


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

AUTHORS_SCORER = re.compile(
    r"^(time|space)_score_predictor\.(\d+)\.score_network\.(in_conv|out_conv)\.(.+)$"
)
_OUR_SCORER = re.compile(r"^stts\.((time|space)_\d+)\.scorer\.network\.(embed|score)\.(.+)$")
_SCORER_PARTS = {"in_conv": "embed", "out_conv": "score"}


def selectors_from_authors(state: State, selectors: Sequence[str]) -> State:
    """The authors' ``{time,space}_score_predictor.{n}`` under our selectors' names.

    Args:
        state: parameters.
        selectors: the model's selectors, such as ``["time_0", "space_4"]``: ``n`` counts the
            selections of a dimension in order, our names say the block.
    """
    renamed = {}
    for key, value in state.items():
        match = AUTHORS_SCORER.match(key)
        if match:
            dimension, number, part, rest = match.groups()
            ours = [name for name in selectors if name.startswith(f"{dimension}_")]
            if int(number) < len(ours):
                key = f"stts.{ours[int(number)]}.scorer.network.{_SCORER_PARTS[part]}.{rest}"
        renamed[key] = value
    return renamed


def selectors_to_authors(state: State) -> State:
    """The inverse of :func:`selectors_from_authors`."""
    parts = {ours: theirs for theirs, ours in _SCORER_PARTS.items()}
    order: dict[str, list[str]] = {"time": [], "space": []}
    renamed = {}
    for key, value in state.items():
        match = _OUR_SCORER.match(key)
        if match:
            name, dimension, part, rest = match.groups()
            if name not in order[dimension]:
                order[dimension].append(name)
            number = order[dimension].index(name)
            key = f"{dimension}_score_predictor.{number}.score_network.{parts[part]}.{rest}"
        renamed[key] = value
    return renamed


# --- Video Swin: mmaction's names and torchvision's ---------------------------------------------

_SWIN_BLOCK = re.compile(r"^layers\.(\d+)\.blocks\.(\d+)\.(.+)$")
_SWIN_MERGE = re.compile(r"^layers\.(\d+)\.downsample\.(.+)$")
_FEATURES = re.compile(r"^features\.(\d+)\.(?:(\d+)\.)?(.+)$")
_SWIN_MLP = {"mlp.fc1.": "mlp.0.", "mlp.fc2.": "mlp.3."}


def swin_from_mmaction(state: State) -> State:
    """Video Swin's parameters from mmaction's names, prefixed or not, to torchvision's."""
    renamed = {}
    for key, value in state.items():
        key = key.removeprefix("backbone.").replace("cls_head.fc_cls.", "head.")
        if match := _SWIN_BLOCK.match(key):
            stage, block, rest = match.groups()
            key = f"features.{2 * int(stage)}.{block}.{_replace_prefix(rest, _SWIN_MLP)}"
        elif match := _SWIN_MERGE.match(key):
            key = f"features.{2 * int(match.group(1)) + 1}.{match.group(2)}"
        renamed[key] = value
    return renamed


def swin_to_mmaction(state: State) -> State:
    """The inverse of :func:`swin_from_mmaction`, with mmaction's prefixes."""
    mlp = {ours: theirs for theirs, ours in _SWIN_MLP.items()}
    renamed = {}
    for key, value in state.items():
        match = _FEATURES.match(key)
        if match and int(match.group(1)) % 2 == 0:
            stage, block, rest = match.groups()
            key = f"layers.{int(stage) // 2}.blocks.{block}.{_replace_prefix(rest, mlp)}"
        elif match:
            key = f"layers.{int(match.group(1)) // 2}.downsample.{match.group(3)}"
        head = key.startswith("head.")
        renamed[key.replace("head.", "cls_head.fc_cls.") if head else f"backbone.{key}"] = value
    return renamed


# --- TimeSformer and ViT image weights ----------------------------------------------------------


def resize_timesformer(state: State, model: TimeSformer) -> State:
    """Resamples position and time embeddings to the model's number of patches and frames."""
    state = dict(state)
    side = round((model.pos_embed.shape[1] - 1) ** 0.5)
    if "pos_embed" in state:
        state["pos_embed"] = resize_positions(state["pos_embed"], (side, side))
    if "time_embed" in state and model.attention_type != "space_only":
        state["time_embed"] = resize_times(state["time_embed"], model.time_embed.shape[1])
    return state


def start_time(state: State, model: TimeSformer) -> State:
    """Adds a start for what image weights do not have, so that the model starts as the image model.

    Time embeddings are zero; attention over time is a copy of attention over space, and its last
    layer is zero.
    """
    new = {}
    for key, value in model.state_dict().items():
        if key == "time_embed" or ".temporal_fc." in key:
            new[key] = torch.zeros_like(value, device="cpu")
        elif ".temporal_" in key:
            image = state.get(key.replace(".temporal_", "."))
            if image is not None:
                new[key] = image.clone()
    return {**state, **new}


# --- formats ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A checkpoint format.

    Attributes:
        name: what a user reads.
        family: ``MViT``, ``VideoSwin`` or ``TimeSformer``.
        recognize: whether a state dict is of this format, by its keys and shapes.
        to_slowfast: (state, the model's selectors) to SlowFast's names, in the same order.
        from_slowfast: the inverse, in this format's names; None where nobody writes it.
        wrapper: the key under which a file of this format holds its parameters; "" for none.
    """

    name: str
    family: str
    recognize: Callable[[State], bool]
    to_slowfast: Callable[[State, Sequence[str]], State]
    from_slowfast: Callable[[State], State] | None = None
    wrapper: str = ""


def _has(state: State, pattern: str) -> bool:
    return any(re.match(pattern, key) for key in state)


def _patches_are(state: State, dims: int) -> bool:
    weight = state.get("patch_embed.proj.weight", state.get("model.patch_embed.proj.weight"))
    return weight is not None and weight.dim() == dims


def _has_time(state: State) -> bool:
    return _has(state, r"(model\.)?(time_embed$|blocks\.\d+\.temporal_)")


def _without_prefix(state: State, prefix: str) -> State:
    return {key.removeprefix(prefix): value for key, value in state.items()}


_SWIN = r"(backbone\.)?layers\.\d+\.blocks\."
_SCORER = r"(backbone\.)?(time|space)_score_predictor\."

# The first that recognises a file wins.
FORMATS = {
    "authors-mvit": Format(
        "an STTS authors' MViT",
        "MViT",
        lambda state: _patches_are(state, 5) and _has(state, _SCORER) and not _has(state, _SWIN),
        selectors_from_authors,
        selectors_to_authors,
        "model_state",
    ),
    "authors-swin": Format(
        "an STTS authors' Video Swin",
        "VideoSwin",
        lambda state: _has(state, _SWIN) and _has(state, _SCORER),
        lambda state, selectors: selectors_from_authors(swin_from_mmaction(state), selectors),
        lambda state: swin_to_mmaction(selectors_to_authors(state)),
        "state_dict",
    ),
    "mmaction-swin": Format(
        "an mmaction Video Swin",
        "VideoSwin",
        lambda state: _has(state, _SWIN),
        lambda state, selectors: swin_from_mmaction(state),
        swin_to_mmaction,
        "state_dict",
    ),
    "torchvision-swin": Format(
        "a torchvision Video Swin",
        "VideoSwin",
        lambda state: _has(state, r"features\.\d+\.\d+\.attn\."),
        lambda state, selectors: state,
        dict,
    ),
    "torchvision-mvit": Format(
        "a torchvision MViT",
        "MViT",
        lambda state: "conv_proj.weight" in state,
        lambda state, selectors: mvit_to_slowfast(state),
        mvit_from_slowfast,
    ),
    "timesformer": Format(
        "a TimeSformer",
        "TimeSformer",
        lambda state: _patches_are(state, 4) and _has_time(state),
        lambda state, selectors: _without_prefix(state, "model."),
        lambda state: {f"model.{key}": value for key, value in state.items()},
        "model_state",
    ),
    "vit-image": Format(
        "ViT image weights (or a space-only TimeSformer)",
        "TimeSformer",
        lambda state: _patches_are(state, 4) and _has(state, r"(model\.)?pos_embed$"),
        lambda state, selectors: _without_prefix(state, "model."),
    ),
    "slowfast": Format(
        "a SlowFast MViT",
        "MViT",
        lambda state: _patches_are(state, 5) and _has(state, r"blocks\."),
        lambda state, selectors: state,
        dict,
        "model_state",
    ),
}

_OWN = Format("the model's own names", "", lambda state: True, lambda state, selectors: state)


# What "convert" can write: the short name on the command line, and the family's row above.
TARGETS = {
    ("slowfast", "MViT"): "slowfast",
    ("slowfast", "TimeSformer"): "slowfast",
    ("slowfast", "VideoSwin"): "slowfast",
    ("torchvision", "MViT"): "torchvision-mvit",
    ("torchvision", "VideoSwin"): "torchvision-swin",
    ("authors", "MViT"): "authors-mvit",
    ("authors", "VideoSwin"): "authors-swin",
    ("timesformer", "TimeSformer"): "timesformer",
}


def convert(checkpoint: dict, to: str, selectors: Sequence[str]) -> tuple[dict, Format, list[str]]:
    """Turns a checkpoint of any known format into another's; it needs no model.

    Args:
        checkpoint: as read from a file.
        to: ``slowfast`` (what :func:`save_checkpoint` writes), ``torchvision``, ``authors`` or
            ``timesformer``.
        selectors: where the selectors sit, such as ``["time_0", "space_4"]``; only the STTS
            authors' files do not say it themselves.

    Returns:
        The new checkpoint, the format that was recognised, and the names of score predictors for
        which ``selectors`` has no place (they keep the authors' names).

    Raises:
        ValueError: where the format is not known, or the target does not have this family.
    """
    state = state_dict_of(checkpoint)
    source = recognize(state)
    if source is _OWN:
        raise ValueError(f"no known format has parameters such as {next(iter(state))}")
    if (to, source.family) not in TARGETS:
        able = [name for name, family in TARGETS if family == source.family]
        raise ValueError(
            f"recognised as {source.name}, which has no {to} form: use {', '.join(able)}"
        )
    target = FORMATS[TARGETS[to, source.family]]
    ours = source.to_slowfast(state, selectors)
    left_over = [key for key in ours if AUTHORS_SCORER.match(key)]
    converted = {target.wrapper: target.from_slowfast(ours)} if target.wrapper else {}
    converted = converted or target.from_slowfast(ours)
    eps = _pool_norm_eps(checkpoint, source.name)
    if to == "slowfast" and source.family == "MViT" and eps != _EPS_TODAY:
        converted["pool_norm_eps"] = eps
    if to == "slowfast" and isinstance(checkpoint.get("cfg"), str):
        converted["cfg"] = checkpoint["cfg"]
    return converted, source, left_over


def recognize(state: State) -> Format:
    """The format of a state dict; where it is none of the known, the model's own names."""
    return next((row for row in FORMATS.values() if row.recognize(state)), _OWN)


def is_standalone(model: nn.Module) -> bool:
    """Whether the model is one that :func:`load_weights` knows how to rename for."""
    return isinstance(model, (MViT, TimeSformer, SwinTransformer3d, ViT))


def to_model(state: State, model: nn.Module) -> State:
    """A state dict of any known format under the model's names, the file's parameters first."""
    renamed = recognize(state).to_slowfast(state, list(getattr(model, "stts", ())))
    return _to_model(renamed, model)


def _to_model(state: State, model: nn.Module) -> State:
    """From SlowFast's names to the model's; what is added to the file's parameters comes last."""
    if isinstance(model, MViT):
        return mvit_from_slowfast(state)
    if isinstance(model, TimeSformer):
        state = resize_timesformer(state, model)
        return state if _has_time(state) else start_time(state, model)
    return state


def _copy_into(model: nn.Module, state: State, renamed: State, name: str) -> Loaded:
    loaded = Loaded(name)
    own = model.state_dict()
    fitting = {}
    for theirs, (key, value) in zip_longest(state, renamed.items()):
        if key not in own:
            loaded.unexpected.append(theirs)
        elif own[key].shape != value.shape:
            shapes = f"{tuple(value.shape)}, the model's is {tuple(own[key].shape)}"
            loaded.mismatched.append(f"{key} {shapes}")
        else:
            fitting[key] = value
    loaded.missing = [key for key in own if key not in renamed]
    if not fitting and name == _OWN.name:
        raise ValueError(f"no known format, and no parameter of it fits {_name(model)}")
    if not fitting:
        raise ValueError(f"recognised as {name}, but no parameter of it fits {_name(model)}")
    model.load_state_dict(fitting, strict=False)
    return loaded


def _set_pool_norm_eps(model: nn.Module, checkpoint: dict, loaded: Loaded) -> None:
    norms = _pool_norms(model)
    eps = _pool_norm_eps(checkpoint, loaded.format)
    if any(norm.eps != eps for norm in norms):
        loaded.notes.append(f"norms of pooled queries, keys and values set to eps {eps:g}")
    for norm in norms:
        norm.eps = eps


def _pool_norm_eps(checkpoint: dict, name: str) -> float:
    authors = name == FORMATS["authors-mvit"].name
    return checkpoint.get("pool_norm_eps", _EPS_AUTHORS if authors else _EPS_TODAY)


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
