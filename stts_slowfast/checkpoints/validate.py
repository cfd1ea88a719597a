"""Refuses checkpoints of another model than a config's, before a run starts."""

import re
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from stts_slowfast.backbones.state_dict import AUTHORS_SCORER, State
from stts_slowfast.budgets import DIMENSIONS
from stts_slowfast.checkpoints.formats import (
    CONSTANT,
    detect_format,
    is_standalone,
    state_dict_of,
    to_model,
)
from stts_slowfast.hosts import unwrap

_SCORER = re.compile(r"^stts\.(time|space|tokens)_(\d+)\.")
_BLOCK = re.compile(r"^(?:model\.)?(?:\w+\.)?(?:encoder\.)?(?:blocks|features|layers?)\.(\d+)\.")
_HEAD = re.compile(r"^(?:model\.)?(?:head\.|cls_head\.|classifier\.)")
# Parameters that SlowFast's own loader resamples to the model's size.
_RESAMPLED = re.compile(r"rel_pos|pos_embed_(temporal|spatial)|attn\.pool_[qkv]\.weight")
_UNTRAINED = "uniform, random or change"


def validate_checkpoint(model: nn.Module, state: Mapping, cfg, purpose: str, source: str) -> None:
    """Refuses a checkpoint that is not of the model of ``cfg``.

    A standalone model is compared with what :func:`load_weights` would make of the file; any other
    model, such as SlowFast's own, with the names in the file, since its loader renames nothing.
    Scorers without weights (uniform, random, change) need none from the file.

    Args:
        model: the model with its selectors, wrapped for several devices or not; not changed.
        state: the checkpoint, or the state dict in it.
        cfg: the run's config.
        purpose: ``test``; ``finetune``, if the file may lack scorers and have a head for other
            classes; ``resume``, if the file must have all of the model's parameters.
        source: the file's path, for messages.

    Raises:
        ValueError: naming the file, the keys and the remedy; for an unknown ``purpose``.
    """
    if purpose not in ("test", "finetune", "resume"):
        raise ValueError(f"purpose is {purpose!r}: use test, finetune or resume")
    try:
        _check(unwrap(model), state_dict_of(state), cfg, purpose, source)
    except ValueError as error:
        text = str(error) if source in str(error) else f"{source}: {error}"
        if purpose == "resume":
            text += ". For another run choose another OUTPUT_DIR, or set TRAIN.AUTO_RESUME False"
        raise ValueError(text) from error


def _check(model: nn.Module, theirs: State, cfg, purpose: str, source: str) -> None:
    own = {key: value for key, value in model.state_dict().items() if not CONSTANT.search(key)}
    patterns = cfg.TRAIN.CHECKPOINT_CLEAR_NAME_PATTERN if purpose == "finetune" else ()
    for pattern in patterns:
        theirs = {key.replace(pattern, "", 1): value for key, value in theirs.items()}
    standalone = is_standalone(model)
    found = to_model(theirs, model) if standalone else theirs
    selecting = "STTS" in cfg and cfg.STTS.ENABLE
    _check_scorers(own, found, cfg.STTS if selecting else None, purpose, source)
    if selecting or standalone:
        _check_backbone(own, found, theirs, standalone, purpose, source)


def _check_scorers(own: State, found: State, node, purpose: str, source: str) -> None:
    trained = _blocks(found)
    if node is None:
        if trained and purpose != "finetune":
            raise ValueError(
                f"{source} was trained with token selection ({_block_keys(trained)}), but "
                "STTS.ENABLE is False: set STTS.ENABLE True, with KEEP [1.0] to keep every token"
            )
        return
    if any(AUTHORS_SCORER.match(key) for key in found):
        raise ValueError(
            f"{source} names its scorers as the STTS authors' code does, so they would not be "
            f"loaded: `stts convert {source} OUT` renames them"
        )
    if purpose == "finetune":
        return
    learned = _blocks(own)
    for dimension, blocks in trained.items():
        configured = list(node[dimension].BLOCKS)
        if sorted(configured) != blocks and (dimension in learned or not configured):
            raise ValueError(
                f"STTS.{dimension}.BLOCKS is {configured}, but {source} was trained with {blocks}: "
                f"set STTS.{dimension}.BLOCKS {blocks}, with KEEP {[1.0] * len(blocks)} to keep "
                f"every token, or STTS.{dimension}.SCORER {_UNTRAINED}, which need no weights"
            )
    missing = [dimension for dimension in DIMENSIONS if dimension in learned.keys() - trained]
    if missing:
        keys = " and ".join(f"STTS.{dimension}.SCORER" for dimension in missing)
        alternative = (
            ", or set " + " and ".join(f"STTS.{dimension}.BLOCKS []" for dimension in missing)
            if trained
            else ", or set STTS.ENABLE False"
        )
        raise ValueError(
            f"{source} has no trained scorers for {_block_keys({d: learned[d] for d in missing})}: "
            f"train them from it first (TRAIN.CHECKPOINT_FILE_PATH), or set {keys} {_UNTRAINED}, "
            f"which need no weights{alternative}"
        )
    wrong = [key for key in own if _SCORER.match(key) and not _fits(key, own, found)]
    if wrong:
        raise ValueError(
            f"{source} has no scorer that fits the model: {_differ(wrong, own, found)}"
        )


def _check_backbone(
    own: State, found: State, theirs: State, renamed: bool, purpose: str, source: str
) -> None:
    tolerated = None if renamed else _RESAMPLED
    wrong = [
        key
        for key in own
        if not _SCORER.match(key)
        and not _fits(key, own, found, tolerated)
        and (_BLOCK.match(key) or purpose != "finetune")
    ]
    heads = [key for key in wrong if _HEAD.match(key)]
    if wrong and heads == wrong:
        raise ValueError(
            f"{source} has a head for other classes: {_differ(heads, own, found)}; set "
            "MODEL.NUM_CLASSES to what it was trained with, or fine-tune from it"
        )
    # Without further blocks of the file the model would compute something else.
    beyond = [key for key in found if _BLOCK.match(key) and key not in own]
    beyond = [key for key in beyond if not CONSTANT.search(key)]
    if not wrong and not beyond:
        return
    advice = "MODEL.*, MVIT.* (or the family's node) and DATA.* must be those it was trained with"
    known = detect_format(theirs)
    converted = known.to_slowfast(theirs, [])
    if not renamed and len(set(converted) & set(own)) > len(set(found) & set(own)):
        advice = f"it is {known.name}: `stts convert {source} OUT` writes it under SlowFast's names"
    if wrong:
        raise ValueError(
            f"{source} does not fit this model: {len(wrong)} of its {len(own)} parameters are "
            f"missing or of another shape ({_differ(wrong, own, found)}); {advice}"
        )
    raise ValueError(
        f"{source} belongs to a larger model: this one has no {', '.join(beyond[:3])}"
        f"{', ...' if len(beyond) > 3 else ''} ({len(beyond)} parameters); {advice}"
    )


def _blocks(names: Collection[str]) -> dict[str, list[int]]:
    """The blocks before which there are scorers with weights: ``{"TIME": [0], "SPACE": [4]}``."""
    blocks: dict[str, set[int]] = {}
    for match in filter(None, map(_SCORER.match, names)):
        blocks.setdefault(match.group(1).upper(), set()).add(int(match.group(2)))
    return {dimension: sorted(blocks[dimension]) for dimension in DIMENSIONS if dimension in blocks}


def _block_keys(blocks: dict[str, list[int]]) -> str:
    return ", ".join(f"STTS.{dimension}.BLOCKS {at}" for dimension, at in blocks.items())


def _fits(key: str, own: State, found: State, tolerated: re.Pattern | None = None) -> bool:
    if key not in found:
        return False
    return found[key].shape == own[key].shape or bool(tolerated and tolerated.search(key))


def _differ(keys: list[str], own: State, found: State) -> str:
    def one(key: str) -> str:
        value: Tensor | None = found.get(key)
        shape = "missing" if value is None else f"{tuple(value.shape)} in the file"
        return f"{key} {tuple(own[key].shape)}, {shape}"

    return "; ".join(map(one, keys[:3])) + ("; ..." if len(keys) > 3 else "")
