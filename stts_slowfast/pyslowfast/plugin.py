"""SlowFast's config and model registry with STTS: the node, the selectors, what is refused.

Each function takes the module that was just imported (see ``autoload.HOOKS``) and can be called
again without harm. With ``STTS.ENABLE`` False what SlowFast does is what it does without us.
"""

import functools

import wrapt
from torch import nn

from stts_slowfast import backbones
from stts_slowfast.config import add_stts_config
from stts_slowfast.hooks import attach
from stts_slowfast.pyslowfast import families, shards, weights
from stts_slowfast.pyslowfast.guard import OFF, confirm, enabled
from stts_slowfast.schedule import reset

# ---- config ---------------------------------------------------------------------------------


def add_config(defaults) -> None:
    """Adds the node ``STTS``, those of our backbones, and what the loop can do by us, to
    ``slowfast.config.defaults._C``."""
    add_stts_config(defaults._C)
    backbones.add_configs(defaults._C)
    if "TRAIN" in defaults._C:
        defaults._C.TRAIN.setdefault("MIXED_PRECISION_DTYPE", "")


# ---- models ---------------------------------------------------------------------------------


def wrap_models(video_model_builder) -> None:
    """Gives every model that ``MODEL_REGISTRY`` builds its selectors, where ``STTS.ENABLE``."""
    registry = video_model_builder.MODEL_REGISTRY
    families.register(registry)
    if hasattr(registry.get, "stock"):
        return
    stock_get = registry.get

    @functools.wraps(stock_get)
    def get(name):
        return _build_with_selectors(stock_get(name))

    get.stock = stock_get
    registry.get = get


@wrapt.decorator
def _build_with_selectors(builder, instance, args, kwargs):
    """Stands for a registered class or function, and is it in every other respect."""
    cfg = args[0] if args else kwargs["cfg"]
    if not enabled(cfg):
        model = builder(*args, **kwargs)
    else:
        confirm(cfg)
        refuse(cfg)
        model = add_selectors(builder(*args, **kwargs), cfg)
    weights.note_config(model, cfg)
    return model


def refuse(cfg) -> None:
    """Refuses what token selection cannot do, before a model is built.

    Raises:
        ValueError: naming the key and what would be right.
    """
    backbones.refuse_detached_scorers(cfg)
    name = cfg.MODEL.MODEL_NAME
    if cfg.MASK.ENABLE:
        raise ValueError(
            "MASK.ENABLE is True: masked pretraining predicts every token, so none may be dropped; "
            f"select in fine-tuning, with MASK.ENABLE False (configs/masked_ssl/*_FT.yaml), {OFF}"
        )
    if cfg.MVIT.REV.ENABLE and name == "MViT":
        raise ValueError(
            "MVIT.REV.ENABLE is True: a reversible MViT recomputes its blocks backwards, which "
            f"needs every token; use a plain MViT, with MVIT.REV.ENABLE False, {OFF}"
        )
    for key in ("LONG_CYCLE", "SHORT_CYCLE"):
        if cfg.MULTIGRID[key]:
            raise ValueError(
                f"MULTIGRID.{key} is True: multigrid cycles change the clip's size as they train, "
                f"and a transformer's positions do not; set MULTIGRID.{key} False, {OFF}"
            )
    if cfg.DETECTION.ENABLE and len(cfg.STTS.SPACE.BLOCKS):
        raise ValueError(
            "DETECTION.ENABLE is True and STTS.SPACE.BLOCKS is "
            f"{list(cfg.STTS.SPACE.BLOCKS)}: boxes are pooled from whole frames, so only frames "
            f"can be selected; set STTS.SPACE.BLOCKS [], {OFF}"
        )


def add_selectors(model: nn.Module, cfg) -> nn.Module:
    """Attaches what ``cfg.STTS`` asks for to a model that SlowFast has just built.

    Raises:
        ValueError: for a model that is no video transformer, or a node that does not fit it.
    """
    name = cfg.MODEL.MODEL_NAME
    try:
        attach(model, cfg.STTS, arriving_grids(cfg))
    except ValueError as error:
        raise ValueError(f"STTS.ENABLE is True with MODEL.MODEL_NAME {name!r}: {error}") from error
    if _trains(cfg):
        reset(model)
    if cfg.DETECTION.ENABLE:
        pool_over_frames_left(model.head)
    return model


def arriving_grids(cfg) -> list[tuple[int, int, int]] | None:
    """The token grid at each block, of the clips that the model will see; None if not known.

    Those are of ``DATA.TRAIN_CROP_SIZE`` in training, of ``DATA.TEST_CROP_SIZE`` otherwise.
    """
    if cfg.MODEL.MODEL_NAME not in backbones.FAMILIES:
        return None
    if not _trains(cfg):
        cfg = cfg.clone()
        cfg.DATA.TRAIN_CROP_SIZE = cfg.DATA.TEST_CROP_SIZE
    return backbones.block_grids(cfg)


def _trains(cfg) -> bool:
    return shards.job() == "train" if shards.job() else cfg.TRAIN.ENABLE


def pool_over_frames_left(head: nn.Module) -> None:
    """Makes SlowFast's RoI head average over however many frames arrive, in place.

    Its average pooling is as long as the clip and fails on fewer frames; over all frames both are
    the same mean.
    """
    for name, _ in list(head.named_children()):
        if name.endswith("_tpool"):
            setattr(head, name, nn.AdaptiveAvgPool3d((1, None, None)))
