"""The places of SlowFast that STTS touches: config, model registry, optimizer, schedule, log.

Each function takes the module that was just imported (see ``autoload.HOOKS``) and can be called
again without harm. With ``STTS.ENABLE`` False what SlowFast does is what it does without us.
"""

import functools
import weakref
from decimal import Decimal

import wrapt
from torch import nn

from stts_slowfast import backbones, schedule
from stts_slowfast.config import add_stts_config
from stts_slowfast.hooks import attach
from stts_slowfast.pyslowfast import families, weights
from stts_slowfast.pyslowfast.wrap import wrap

# What the run in this process stands at: `epoch` from get_epoch_lr, `sigma` and `backbone_lr` for
# the log. SlowFast trains one model a process.
_now = {}


# ---- config ---------------------------------------------------------------------------------


def add_config(defaults) -> None:
    """Adds the node ``STTS``, and those of our backbones, to ``slowfast.config.defaults._C``."""
    add_stts_config(defaults._C)
    backbones.add_configs(defaults._C)


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
    if not _enabled(cfg):
        return builder(*args, **kwargs)
    refuse(cfg)
    return add_selectors(builder(*args, **kwargs), cfg)


def refuse(cfg) -> None:
    """Refuses what token selection cannot do, before a model is built.

    Raises:
        ValueError: naming the key and what would be right.
    """
    off = "or set STTS.ENABLE False"
    name = cfg.MODEL.MODEL_NAME
    if cfg.MASK.ENABLE:
        raise ValueError(
            "MASK.ENABLE is True: masked pretraining predicts every token, so none may be dropped; "
            f"select in fine-tuning, with MASK.ENABLE False (configs/masked_ssl/*_FT.yaml), {off}"
        )
    if cfg.MVIT.REV.ENABLE and name == "MViT":
        raise ValueError(
            "MVIT.REV.ENABLE is True: a reversible MViT recomputes its blocks backwards, which "
            f"needs every token; use a plain MViT, with MVIT.REV.ENABLE False, {off}"
        )
    for key in ("LONG_CYCLE", "SHORT_CYCLE"):
        if cfg.MULTIGRID[key]:
            raise ValueError(
                f"MULTIGRID.{key} is True: multigrid cycles change the clip's size as they train, "
                f"and a transformer's positions do not; set MULTIGRID.{key} False, {off}"
            )
    if cfg.DETECTION.ENABLE and len(cfg.STTS.SPACE.BLOCKS):
        raise ValueError(
            "DETECTION.ENABLE is True and STTS.SPACE.BLOCKS is "
            f"{list(cfg.STTS.SPACE.BLOCKS)}: boxes are pooled from whole frames, so only frames "
            f"can be selected; set STTS.SPACE.BLOCKS [], {off}"
        )


def add_selectors(model: nn.Module, cfg) -> nn.Module:
    """Attaches what ``cfg.STTS`` asks for to a model that SlowFast has just built.

    Raises:
        ValueError: for a model that is no video transformer, or a node that does not fit it.
    """
    name = cfg.MODEL.MODEL_NAME
    grids = backbones.block_grids(cfg) if name in backbones.FAMILIES else None
    try:
        attach(model, cfg.STTS, grids)
    except ValueError as error:
        raise ValueError(f"STTS.ENABLE is True with MODEL.MODEL_NAME {name!r}: {error}") from error
    if cfg.DETECTION.ENABLE:
        pool_over_frames_left(model.head)
    return model


def pool_over_frames_left(head: nn.Module) -> None:
    """Makes SlowFast's RoI head average over however many frames arrive, in place.

    Its average pooling is as long as the clip and fails on fewer frames; over all frames both are
    the same mean.
    """
    for name, _ in list(head.named_children()):
        if name.endswith("_tpool"):
            setattr(head, name, nn.AdaptiveAvgPool3d((1, None, None)))


# ---- optimizer and schedule -----------------------------------------------------------------


def wrap_optimizer(optimizer_module) -> None:
    """``construct_optimizer``, ``get_epoch_lr`` and ``set_lr``, which the training loop calls."""
    wrap(optimizer_module, "construct_optimizer", _split_groups)
    wrap(optimizer_module, "get_epoch_lr", _note_epoch)
    wrap(optimizer_module, "set_lr", _set_rates_and_sigma)


def _split_groups(construct_optimizer, model, cfg):
    optimizer = construct_optimizer(model, cfg)
    optimizer.param_groups[:] = families.decay_by_layer(optimizer.param_groups, model, cfg)
    if _enabled(cfg):
        optimizer.param_groups[:] = schedule.param_groups(optimizer.param_groups, model, cfg)
        optimizer.stts_run, optimizer.stts_begun = (weakref.ref(model), cfg), False
    return optimizer


def _note_epoch(get_epoch_lr, cur_epoch, cfg):
    _now["epoch"] = cur_epoch
    return get_epoch_lr(cur_epoch, cfg)


def _set_rates_and_sigma(set_lr, optimizer, new_lr):
    set_lr(optimizer, new_lr)
    for key in ("sigma", "backbone_lr"):
        _now.pop(key, None)
    model_ref, cfg = getattr(optimizer, "stts_run", (None, None))
    if cfg is None or "epoch" not in _now:
        return
    model, groups = model_ref(), optimizer.param_groups
    if not optimizer.stts_begun:  # not before now are weights and optimizer state loaded
        schedule.begin(groups, weights.is_trained(model), cfg)
        optimizer.stts_begun = True
    _now.update(schedule.step(model, groups, new_lr, _now["epoch"], cfg))


# ---- log ------------------------------------------------------------------------------------


def wrap_log(logging) -> None:
    """``slowfast.utils.logging.log_json_stats``: training gains ``sigma`` and ``backbone_lr``."""
    wrap(logging, "log_json_stats", _log_with_schedule)


def _log_with_schedule(log_json_stats, stats, *args, **kwargs):
    if "sigma" in _now and str(stats.get("_type", "")).startswith("train_"):
        # SlowFast cuts floats to five places, too few for a rate that falls to 1e-6.
        extra = {key: Decimal(f"{_now[key]:.6g}") for key in ("sigma", "backbone_lr")}
        stats = {**stats, **extra}
    return log_json_stats(stats, *args, **kwargs)


def _enabled(cfg) -> bool:
    # A config made before the node was there, by a script say, is one without selection.
    return "STTS" in cfg and cfg.STTS.ENABLE
