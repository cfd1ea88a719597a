"""Where ``STTS.ENABLE`` is True, what did not happen stops the run.

Every stage that a run passes (config, launch, model, optimizer) asks here, each from a hook of its
own, so that one of them failing leaves the others.
"""

from torch import nn

from stts_slowfast.hosts import modules_with_selectors
from stts_slowfast.pyslowfast import autoload
from stts_slowfast.pyslowfast.config_access import is_enabled
from stts_slowfast.pyslowfast.patching import wrap
from stts_slowfast.selectors import Selector

OFF = "or set STTS.ENABLE False"


def wrap_config(defaults) -> None:
    """``assert_and_infer_cfg``, with which a launcher ends reading its config."""
    wrap(defaults, "assert_and_infer_cfg", _assert_config)


def require_hooks(cfg) -> None:
    """Stops a run with selection where a hook of this package failed, or never ran.

    Raises:
        RuntimeError: naming the hooks and the way out.
    """
    if not is_enabled(cfg):
        return
    if troubles := autoload.failed_hooks():
        raise RuntimeError(
            "STTS.ENABLE is True, but stts_slowfast has not taken hold of SlowFast: "
            f"{'; '.join(troubles)}. `stts doctor` tells more; mend that, {OFF}"
        )


def check_selectors(model: nn.Module, cfg) -> None:
    """Refuses a model that has not exactly the selectors that a config asks for.

    Args:
        model: with selectors anywhere in it: in a DDP wrapper, in a wrapper of the user's.
        cfg: with ``STTS``, or without.

    Raises:
        RuntimeError: naming what the model has, and what it lacks.
    """
    if not is_enabled(cfg):
        return
    wanted = [
        f"{dimension.lower()}_{block}"
        for dimension in ("TIME", "SPACE")
        for block in cfg.STTS[dimension].BLOCKS
    ]
    holders = modules_with_selectors(model)
    found = [
        key
        for holder in holders.values()
        for key, module in holder.stts.items()
        if isinstance(module, Selector)
    ]
    if sorted(found) == sorted(wanted) and len(holders) <= 1:
        return
    inner = getattr(model, "module", model)
    places = f", in {len(holders)} modules of it" if len(holders) > 1 else ""
    raise RuntimeError(
        f"STTS.ENABLE is True and asks for the selectors {', '.join(wanted) or 'none'}, but this "
        f"{type(inner).__name__} has {', '.join(found) or 'none'}{places}: build it with this "
        f"config by slowfast.models.build_model(cfg), {OFF}"
    )


def _assert_config(assert_and_infer_cfg, cfg):
    require_hooks(cfg)
    return assert_and_infer_cfg(cfg)
