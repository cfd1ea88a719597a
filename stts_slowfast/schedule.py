"""What changes while training runs: the noise of the selectors and the backbone's learning rate."""

import logging
import math

from torch import nn

from stts_slowfast.selectors import Selector

logger = logging.getLogger(__name__)


def sigma(initial: float, decay: str, fraction: float) -> float:
    """Noise level after a fraction of training.

    Args:
        initial: ``STTS.SIGMA``.
        decay: ``STTS.SIGMA_DECAY``: ``linear`` goes to 0, ``constant`` stays.
        fraction: 0 to 1 of training done.
    """
    return initial * (1.0 - fraction) if decay == "linear" else initial


def set_progress(model: nn.Module, fraction: float) -> None:
    """Sets every selector's sigma to what belongs to this point of training.

    It depends on nothing but the fraction, so a resumed run is where it was.

    Args:
        model: with selectors, wrapped (DDP) or not; a model without is left as it is.
        fraction: 0 to 1 of training done.

    Raises:
        ValueError: for a fraction outside 0 to 1.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction is {fraction!r}: the share of training done lies in 0 to 1")
    for module in model.modules():
        if isinstance(module, Selector):
            module.sigma.fill_(sigma(module.initial_sigma, module.sigma_decay, fraction))


def backbone_lr(lr: float, epoch: float, cfg) -> float:
    """The backbone's learning rate, where the scorers' is ``lr`` (paper section 4.1).

    Args:
        lr: what SlowFast's schedule gives for this epoch.
        epoch: exact epoch, a fraction of it included.
        cfg: with ``STTS`` and ``SOLVER.BASE_LR``.
    """
    if epoch < cfg.STTS.FREEZE_BACKBONE_EPOCHS:
        return 0.0
    return min(lr, cfg.STTS.BACKBONE_LR * cfg.SOLVER.BASE_LR)


def param_groups(optimizer_groups: list[dict], model: nn.Module, cfg) -> list[dict]:
    """Splits each optimizer group into the backbone's part and the scorers' part.

    Args:
        optimizer_groups: groups as optimizers take them, ``params`` a list of parameters.
        model: with selectors in ``model.stts``.
        cfg: with ``STTS`` and ``SOLVER.MAX_EPOCH``.

    Returns:
        Groups with the keys they had, and ``backbone``: whether :func:`backbone_lr` governs it.
        Empty parts are left out. Where ``STTS.ENABLE`` is off, or no scorer learns (``uniform``,
        ``random``, no selector at all), there is nothing to hold the backbone back for: the
        groups are returned as they are.
    """
    scorers = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, Selector)
        for parameter in module.parameters()
    }
    if not cfg.STTS.ENABLE or not scorers:
        return optimizer_groups
    if cfg.STTS.FREEZE_BACKBONE_EPOCHS >= cfg.SOLVER.MAX_EPOCH:
        logger.warning(
            "STTS.FREEZE_BACKBONE_EPOCHS is %g and SOLVER.MAX_EPOCH %g: only scorers will learn",
            cfg.STTS.FREEZE_BACKBONE_EPOCHS,
            cfg.SOLVER.MAX_EPOCH,
        )
    groups = []
    for group in optimizer_groups:
        for backbone in (True, False):
            params = [p for p in group["params"] if (id(p) not in scorers) == backbone]
            if params:
                groups.append({**group, "params": params, "backbone": backbone})
    return groups


def set_group_lrs(groups: list[dict], lr: float, epoch: float, cfg) -> float:
    """Writes the learning rate of this moment into the groups of :func:`param_groups`.

    Args:
        groups: ``optimizer.param_groups``; each rate is multiplied by the group's ``layer_decay``,
            as SlowFast does.
        lr: the schedule's rate; epoch, cfg: see :func:`backbone_lr`.

    Returns:
        The backbone's rate.

    Raises:
        ValueError: where ``lr`` is not finite.
    """
    if not math.isfinite(lr):
        raise ValueError(f"the learning rate is {lr} at epoch {epoch:.3f}: look at SOLVER.*")
    held_back = any(group.get("backbone") for group in groups)
    backbone = backbone_lr(lr, epoch, cfg) if held_back else lr
    for group in groups:
        rate = backbone if group.get("backbone") else lr
        group["lr"] = rate * group.get("layer_decay", 1.0)
    return backbone
