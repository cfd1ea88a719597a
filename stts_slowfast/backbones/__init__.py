"""One file a family: its config node, its model, its token grids and its parameter names.

A family is a record in :data:`FAMILIES`. To add one, write a file here and import it below, or
register the record elsewhere before the config is read.
"""

from collections.abc import Collection

from torch import nn

from stts_slowfast.backbones import hf, mvit, timesformer, video_swin  # noqa: F401  they register
from stts_slowfast.backbones.activation_checkpointing import (
    checkpoint_activations,
    detach_backbone,
    refuse_detached_scorers,
)
from stts_slowfast.backbones.family import FAMILIES, Family, Format
from stts_slowfast.plugins import load_extensions

__all__ = [
    "FAMILIES",
    "Family",
    "Format",
    "add_configs",
    "block_grids",
    "build",
    "family_of",
    "refuse_detached_scorers",
    "resolve_config",
]


def add_configs(cfg) -> None:
    """Adds the nodes of all families to a config; does nothing if they exist."""
    load_extensions()
    for _, family in FAMILIES:
        family.add_config(cfg)


def build(cfg) -> nn.Module:
    """Builds ``cfg.MODEL.MODEL_NAME`` without selectors, with random weights.

    ``MODEL.ACT_CHECKPOINT`` and ``MODEL.DETACH_FINAL_FC`` work for every family.

    Raises:
        ValueError: for an unknown name or a setting that the family does not have.
    """
    model = family_of(cfg).build(cfg)
    if cfg.MODEL.get("DETACH_FINAL_FC"):
        refuse_detached_scorers(cfg)
        detach_backbone(model)
    if cfg.MODEL.get("ACT_CHECKPOINT"):
        checkpoint_activations(model)
    return model


def resolve_config(cfg, given: Collection[str]) -> None:
    """Completes a config from the model's own files, if it has any.

    Args:
        cfg: the config, changed in place.
        given: the keys that a file or a command line sets.

    Raises:
        FileNotFoundError: if they are missing.
        ValueError: if a given key contradicts them.
    """
    if cfg.MODEL.MODEL_NAME in FAMILIES or cfg.MODEL.MODEL_NAME.startswith(hf.PREFIX):
        family_of(cfg).resolve_config(cfg, given)


def block_grids(cfg) -> list[tuple[int, int, int]]:
    """The token grid ``(T, H, W)`` that arrives at each block without selection.

    Raises:
        ValueError: for an unknown ``MODEL.MODEL_NAME``.
    """
    return family_of(cfg).block_grids(cfg)


def family_of(cfg) -> Family:
    """The family of ``cfg.MODEL.MODEL_NAME``; raises ``ValueError`` for an unknown name."""
    load_extensions()
    name = cfg.MODEL.MODEL_NAME
    if name.startswith(hf.PREFIX):
        return FAMILIES.get("hf")
    if name not in FAMILIES or name == "hf":
        known = ", ".join(f"{name}:FOLDER" if name == "hf" else name for name, _ in FAMILIES)
        raise ValueError(f"MODEL.MODEL_NAME is {name!r}: use one of {known}")
    return FAMILIES.get(name)
