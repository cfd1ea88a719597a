"""Selectors in SlowFast's models: the config node, building, and what is refused.

The hooks take the module that was just imported (see ``hook_table.HOOKS``); calling one again does
nothing. With ``STTS.ENABLE`` False SlowFast is unchanged.
"""

from functools import partial
from types import FunctionType, SimpleNamespace

from torch import nn

from stts_slowfast import backbones
from stts_slowfast.annealing import reset
from stts_slowfast.config import Settings, add_stts_config, check_testing
from stts_slowfast.hooks import attach
from stts_slowfast.hosts import modules_with_selectors, resolve_host
from stts_slowfast.pyslowfast import (
    checkpoint_loading,
    compat,
    distributed,
    models,
    precision,
    run_state,
    torchrun,
)
from stts_slowfast.pyslowfast.config_access import is_enabled
from stts_slowfast.pyslowfast.dry_run import check_forward
from stts_slowfast.pyslowfast.patching import wrap
from stts_slowfast.pyslowfast.preflight import TURN_OFF, check_selectors, require_hooks

# SlowFast's models without tokens.
CONVOLUTIONAL = (
    *("SlowFast", "ResNet", "X3D"),
    *("PTVResNet", "PTVSlowFast", "PTVX3D", "PTVCSN", "PTVR2plus1D"),
)

# ---- config ---------------------------------------------------------------------------------


def add_config(defaults) -> None:
    """Adds the node ``STTS`` and those of our backbones to ``slowfast.config.defaults._C``."""
    add_stts_config(defaults._C)
    backbones.add_configs(defaults._C)


def wrap_config(defaults) -> None:
    """``assert_and_infer_cfg``, the last call of a launcher that reads its config."""
    wrap(defaults, "assert_and_infer_cfg", _assert_and_infer_cfg)


def _assert_and_infer_cfg(assert_and_infer_cfg, cfg):
    compat.report(compat.uses_stts(cfg))
    if is_enabled(cfg):
        check_compatible(cfg)
        if cfg.TEST.ENABLE:
            check_testing(cfg.STTS)
    torchrun.set_shards(cfg)
    return assert_and_infer_cfg(cfg)


# ---- models ---------------------------------------------------------------------------------


def wrap_build_model(build) -> None:
    """``slowfast.models.build.build_model``, by which every tool gets its model.

    The registry is unchanged and returns the registered classes.
    """
    wrap(build, "build_model", _build_model)


def wrap_load_test(checkpoint) -> None:
    """``load_test_checkpoint``: refuses a model without the selectors of its config, which was
    built without ``build_model``."""
    wrap(checkpoint, "load_test_checkpoint", _load_test_checkpoint)


def _build_model(build_model, cfg, *args, **kwargs) -> nn.Module:
    compat.report(compat.uses_stts(cfg))
    models.register_family(getattr(build_model, "__globals__", {}).get("MODEL_REGISTRY"), cfg)
    if not is_enabled(cfg):
        return distributed.build_model(build_model, cfg, *args, **kwargs)
    require_hooks(cfg)
    check_compatible(cfg)
    model = distributed.build_model(_with_selectors(build_model), cfg, *args, **kwargs)
    check_selectors(model, cfg)
    precision.log_strict_float32(cfg)
    return model


def _load_test_checkpoint(load_test_checkpoint, cfg, model, *args, **kwargs):
    check_selectors(model, cfg)
    return load_test_checkpoint(cfg, model, *args, **kwargs)


def _with_selectors(build_model):
    """A copy of SlowFast's ``build_model`` that adds selectors to the model from the registry,
    before it is moved to a device and wrapped by DDP.

    Only this copy sees another registry: a model that builds submodules from the registry gets them
    as they were registered.
    """
    names = getattr(build_model, "__globals__", {})
    if "MODEL_REGISTRY" not in names or "MODEL_REGISTRY" not in build_model.__code__.co_names:
        return build_model  # replaced by other code: check_selectors looks at the result
    lookup = SimpleNamespace(get=partial(_builder, names["MODEL_REGISTRY"]))
    copy = FunctionType(
        build_model.__code__,
        {**names, "MODEL_REGISTRY": lookup},
        build_model.__name__,
        build_model.__defaults__,
        build_model.__closure__,
    )
    copy.__kwdefaults__ = build_model.__kwdefaults__
    return copy


def _builder(registry, name: str):
    return lambda cfg: add_selectors(registry.get(name)(cfg), cfg)


def check_compatible(cfg) -> None:
    """Refuses configs that token selection does not support, before a model is built.

    Raises:
        ValueError: naming the key and what would be right.
    """
    name = cfg.MODEL.MODEL_NAME
    if name in CONVOLUTIONAL:
        raise ValueError(_no_transformer(name))
    if cfg.MASK.ENABLE:
        raise ValueError(
            "MASK.ENABLE is True: masked pretraining predicts every token, so none may be dropped; "
            "select in fine-tuning, with MASK.ENABLE False (configs/masked_ssl/*_FT.yaml), "
            f"{TURN_OFF}"
        )
    if cfg.MVIT.REV.ENABLE and name == "MViT":
        raise ValueError(
            "MVIT.REV.ENABLE is True: a reversible MViT recomputes its blocks backwards, which "
            f"needs every token; use a plain MViT, with MVIT.REV.ENABLE False, {TURN_OFF}"
        )
    for key in ("LONG_CYCLE", "SHORT_CYCLE"):
        if cfg.MULTIGRID[key]:
            raise ValueError(
                f"MULTIGRID.{key} is True: multigrid cycles change the clip's size as they train, "
                f"and a transformer's positions do not; set MULTIGRID.{key} False, {TURN_OFF}"
            )
    for dimension in ("SPACE", "TOKENS") if cfg.DETECTION.ENABLE else ():
        if blocks := list(cfg.STTS[dimension].BLOCKS):
            raise ValueError(
                f"DETECTION.ENABLE is True and STTS.{dimension}.BLOCKS is {blocks}: boxes are "
                "pooled from whole frames, so only frames can be selected; set "
                f"STTS.{dimension}.BLOCKS [], {TURN_OFF}"
            )


def add_selectors(model: nn.Module, cfg) -> nn.Module:
    """Attaches the selectors of ``cfg.STTS`` to a model that SlowFast has just built.

    They are attached to the module that has the blocks: the model, or a submodule. A model whose
    submodule already has the same selectors, because it was built on its own, is unchanged.

    Raises:
        ValueError: if the model is not a video transformer, or the node does not fit it.
    """
    name = cfg.MODEL.MODEL_NAME
    if holders := modules_with_selectors(model):
        if len(holders) == 1 and _settings(holders) == [Settings.from_cfg(cfg.STTS)]:
            return model
        raise ValueError(
            f"STTS.ENABLE is True with MODEL.MODEL_NAME {name!r}, but modules of it already have "
            f"other selectors ({', '.join(path or 'the model' for path in holders)}): build its "
            f"submodules with STTS.ENABLE False, {TURN_OFF}"
        )
    inner = transformer_in(model, name)
    backbones.refuse_detached_scorers(cfg)
    try:
        grids = arriving_grids(inner, cfg)
        attach(inner, cfg.STTS, grids)
        if run_state.is_training(cfg):
            reset(inner)
        if cfg.DETECTION.ENABLE and hasattr(inner, "head"):
            make_roi_pool_adaptive(inner.head)
        if grids is None:
            check_forward(model, cfg)
    except ValueError as error:
        raise ValueError(f"STTS.ENABLE is True with MODEL.MODEL_NAME {name!r}: {error}") from error
    checkpoint_loading.register_config(model, cfg)
    return model


def transformer_in(model: nn.Module, name: str) -> nn.Module:
    """The module of a model that has a transformer's blocks: the model itself or a submodule.

    Args:
        model: as SlowFast builds it.
        name: ``MODEL.MODEL_NAME``, for errors.

    Raises:
        ValueError: if there is none, or more than one.
    """
    found = dict(_transformers("", model))
    if not found:
        raise ValueError(_no_transformer(name))
    if len(found) > 1:
        raise ValueError(
            f"STTS.ENABLE is True, but MODEL.MODEL_NAME {name!r} has {len(found)} modules with "
            f"blocks ({', '.join(found)}), and tokens are selected in one: use a model with one, "
            f"{TURN_OFF}"
        )
    return next(iter(found.values()))


def _transformers(path: str, module: nn.Module):
    try:
        _, blocks = resolve_host(module)
    except ValueError:
        blocks = []
    # Convolutional networks have `blocks` too, but without LayerNorm.
    if any(isinstance(m, nn.LayerNorm) for block in blocks for m in block.modules()):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _transformers(f"{path}.{name}".lstrip("."), child)


def _no_transformer(name: str) -> str:
    return (
        f"STTS.ENABLE is True, but MODEL.MODEL_NAME {name!r} is not a video transformer: it has "
        "no tokens to select. Use MViT, TimeSformer, VideoSwin, PTVMViT, or a model of yours "
        f"with blocks that are called as x, thw = block(x, thw); {TURN_OFF}"
    )


def _settings(holders: dict[str, nn.Module]) -> list[Settings]:
    return [module.stts.settings for module in holders.values()]


def arriving_grids(model: nn.Module, cfg) -> list[tuple[int, int, int]] | None:
    """The token grid at each block; None if unknown.

    Clips are of ``DATA.TRAIN_CROP_SIZE`` in training, of ``DATA.TEST_CROP_SIZE`` otherwise.
    """
    # MViT is SlowFast's own; the names of our other families may be a user's models.
    name = cfg.MODEL.MODEL_NAME
    if name not in backbones.FAMILIES or (name != "MViT" and not models.is_family_model(model)):
        return None
    if not run_state.is_training(cfg):
        cfg = cfg.clone()
        cfg.DATA.TRAIN_CROP_SIZE = cfg.DATA.TEST_CROP_SIZE
    return backbones.block_grids(cfg)


def make_roi_pool_adaptive(head: nn.Module) -> None:
    """Makes SlowFast's RoI head average over any number of frames, in place.

    Its average pooling has the clip's length and fails on fewer frames; for all frames both give
    the same mean.
    """
    for name, _ in list(head.named_children()):
        if name.endswith("_tpool"):
            setattr(head, name, nn.AdaptiveAvgPool3d((1, None, None)))
