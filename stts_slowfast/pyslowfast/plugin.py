"""SlowFast's config and models with STTS: the node, the selectors, what is refused.

Each function takes the module that was just imported (see ``autoload.HOOKS``) and can be called
again without harm. With ``STTS.ENABLE`` False what SlowFast does is what it does without us.
"""

from functools import partial
from types import FunctionType, SimpleNamespace

from torch import nn

from stts_slowfast import backbones
from stts_slowfast.config import Settings, add_stts_config, check_testing
from stts_slowfast.hooks import attach
from stts_slowfast.hosts import modules_with_selectors, resolve_host
from stts_slowfast.pyslowfast import (
    checkpoint_loading,
    compat,
    distributed,
    models,
    run_state,
    torchrun,
)
from stts_slowfast.pyslowfast.config_access import is_enabled
from stts_slowfast.pyslowfast.dry_run import check_forward
from stts_slowfast.pyslowfast.patching import wrap
from stts_slowfast.pyslowfast.preflight import OFF, check_selectors, require_hooks
from stts_slowfast.annealing import reset

# Models of SlowFast's that have no tokens.
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
    """``assert_and_infer_cfg``, with which a launcher ends reading its config."""
    wrap(defaults, "assert_and_infer_cfg", _infer_config)


def _infer_config(assert_and_infer_cfg, cfg):
    compat.report(compat.asks_for_us(cfg))
    if is_enabled(cfg):
        check_compatible(cfg)
        if cfg.TEST.ENABLE:
            check_testing(cfg.STTS)
    torchrun.count_machines(cfg)
    return assert_and_infer_cfg(cfg)


# ---- models ---------------------------------------------------------------------------------


def wrap_build_model(build) -> None:
    """``slowfast.models.build.build_model``, through which every tool gets its model.

    The registry stays as it is, and hands out what was registered.
    """
    wrap(build, "build_model", _build_model)


def wrap_load_test(checkpoint) -> None:
    """``load_test_checkpoint``: a model that was built past :func:`build_model` is not tested
    without the selectors of its config."""
    wrap(checkpoint, "load_test_checkpoint", _load_test_checkpoint)


def _build_model(build_model, cfg, *args, **kwargs) -> nn.Module:
    compat.report(compat.asks_for_us(cfg))
    models.offer(getattr(build_model, "__globals__", {}).get("MODEL_REGISTRY"), cfg)
    if not is_enabled(cfg):
        return distributed.build(build_model, cfg, *args, **kwargs)
    require_hooks(cfg)
    check_compatible(cfg)
    model = distributed.build(_with_selectors(build_model), cfg, *args, **kwargs)
    check_selectors(model, cfg)
    return model


def _load_test_checkpoint(load_test_checkpoint, cfg, model, *args, **kwargs):
    check_selectors(model, cfg)
    return load_test_checkpoint(cfg, model, *args, **kwargs)


def _with_selectors(build_model):
    """SlowFast's ``build_model``, in whose one look into the registry selectors are added: before
    it moves the model to a device and wraps it for several.

    It is a copy that sees another registry under that name. A model that looks for its parts in
    the registry finds them there as they were registered.
    """
    names = getattr(build_model, "__globals__", {})
    if "MODEL_REGISTRY" not in names or "MODEL_REGISTRY" not in build_model.__code__.co_names:
        return build_model  # replaced by somebody else: what it lacks is found afterwards
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
    """Refuses what token selection cannot do, before a model is built.

    Raises:
        ValueError: naming the key and what would be right.
    """
    name = cfg.MODEL.MODEL_NAME
    if name in CONVOLUTIONAL:
        raise ValueError(_no_transformer(name))
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
    """Attaches what ``cfg.STTS`` asks for to a model that SlowFast has just built, once.

    The selectors are put where the blocks are: in the model, or in the one module of it that has
    some. A model that got the same selectors earlier, as a part that was built on its own, keeps
    them.

    Raises:
        ValueError: for a model that is no video transformer, or a node that does not fit it.
    """
    name = cfg.MODEL.MODEL_NAME
    if holders := modules_with_selectors(model):
        if len(holders) == 1 and _settings(holders) == [Settings.from_cfg(cfg.STTS)]:
            return model
        raise ValueError(
            f"STTS.ENABLE is True with MODEL.MODEL_NAME {name!r}, but modules of it have selectors "
            f"already, of another config ({', '.join(path or 'itself' for path in holders)}): "
            f"build its parts with STTS.ENABLE False, {OFF}"
        )
    inner = transformer_in(model, name)
    backbones.refuse_detached_scorers(cfg)
    try:
        grids = arriving_grids(inner, cfg)
        attach(inner, cfg.STTS, grids)
        if run_state.trains(cfg):
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
    """The module of a model that has a transformer's blocks: itself, or one inside a wrapper.

    Args:
        model: as SlowFast builds it.
        name: ``MODEL.MODEL_NAME``, for messages.

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
            f"{OFF}"
        )
    return next(iter(found.values()))


def _transformers(path: str, module: nn.Module):
    try:
        _, blocks = resolve_host(module)
    except ValueError:
        blocks = []
    # Convolutional networks have `blocks` as well; a transformer's have a LayerNorm.
    if any(isinstance(part, nn.LayerNorm) for block in blocks for part in block.modules()):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _transformers(f"{path}.{name}".lstrip("."), child)


def _no_transformer(name: str) -> str:
    return (
        f"STTS.ENABLE is True, but MODEL.MODEL_NAME {name!r} is no video transformer: there are no "
        "tokens to select among. Use MViT, TimeSformer, VideoSwin, PTVMViT, or a model of yours "
        f"with blocks that are called as x, thw = block(x, thw); {OFF}"
    )


def _settings(holders: dict[str, nn.Module]) -> list[Settings]:
    return [module.stts.settings for module in holders.values()]


def arriving_grids(model: nn.Module, cfg) -> list[tuple[int, int, int]] | None:
    """The token grid at each block, of the clips that a model will see; None if not known.

    Those are of ``DATA.TRAIN_CROP_SIZE`` in training, of ``DATA.TEST_CROP_SIZE`` otherwise.
    """
    # MViT is SlowFast's own; under the names of our other families there may be others.
    name = cfg.MODEL.MODEL_NAME
    if name not in backbones.FAMILIES or (name != "MViT" and not models.is_ours(model)):
        return None
    if not run_state.trains(cfg):
        cfg = cfg.clone()
        cfg.DATA.TRAIN_CROP_SIZE = cfg.DATA.TEST_CROP_SIZE
    return backbones.block_grids(cfg)


def make_roi_pool_adaptive(head: nn.Module) -> None:
    """Makes SlowFast's RoI head average over however many frames arrive, in place.

    Its average pooling is as long as the clip and fails on fewer frames; over all frames both are
    the same mean.
    """
    for name, _ in list(head.named_children()):
        if name.endswith("_tpool"):
            setattr(head, name, nn.AdaptiveAvgPool3d((1, None, None)))
