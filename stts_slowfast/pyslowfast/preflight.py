"""Stops a run with ``STTS.ENABLE`` True if a hook failed or a model lacks its selectors.

Config, launch, model and optimizer call these checks from separate hooks, so that the others still
run if one of the hooks fails.
"""

from torch import nn

from stts_slowfast.budgets import DIMENSIONS
from stts_slowfast.hosts import modules_with_selectors
from stts_slowfast.pyslowfast import autoload
from stts_slowfast.pyslowfast.config_access import is_enabled
from stts_slowfast.pyslowfast.patching import wrap
from stts_slowfast.selectors import Selector

TURN_OFF = "or set STTS.ENABLE False"


def wrap_config(defaults) -> None:
    """``assert_and_infer_cfg``, the last call of a launcher that reads its config."""
    wrap(defaults, "assert_and_infer_cfg", _assert_and_infer_cfg)


def require_hooks(cfg) -> None:
    """Stops a run with selection if a hook of this package failed or never ran.

    Raises:
        RuntimeError: naming the hooks and the way out.
    """
    if not is_enabled(cfg):
        return
    if failed := autoload.failed_hooks():
        raise RuntimeError(
            "STTS.ENABLE is True, but stts_slowfast could not patch SlowFast: "
            f"{'; '.join(failed)}. `stts doctor` shows details; fix that, {TURN_OFF}"
        )


def check_selectors(model: nn.Module, cfg) -> None:
    """Refuses a model that does not have exactly the selectors of a config.

    Args:
        model: its selectors may be in any submodule, such as inside DDP.
        cfg: with the node ``STTS`` or without.

    Raises:
        RuntimeError: naming the selectors of the config and of the model.
    """
    if not is_enabled(cfg):
        return
    wanted = [
        f"{dimension.lower()}_{block}"
        for dimension in DIMENSIONS
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
    modules = f", in {len(holders)} of its modules" if len(holders) > 1 else ""
    raise RuntimeError(
        f"STTS.ENABLE is True and requires the selectors {', '.join(wanted) or 'none'}, but this "
        f"{type(inner).__name__} has {', '.join(found) or 'none'}{modules}: build it with this "
        f"config by slowfast.models.build_model(cfg), {TURN_OFF}"
    )


def _assert_and_infer_cfg(assert_and_infer_cfg, cfg):
    require_hooks(cfg)
    return assert_and_infer_cfg(cfg)
