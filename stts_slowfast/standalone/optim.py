"""Learning rate, parameter groups, optimizer and optimizer state as in SlowFast.

The optimizer has its parameters in the order and its state in the shapes of SlowFast's own model,
so that a run of either engine can be resumed in the other.
"""

import math
import re
from bisect import bisect_right

import torch
from torch import Tensor, nn

from stts_slowfast.backbones import family_of
from stts_slowfast.checkpoints import slowfast_state
from stts_slowfast.checkpoints.optimizer_state import optimizer_mismatch
from stts_slowfast.hosts import find_blocks
from stts_slowfast.optimizer_groups import run_groups


def lr_at(epoch: float, cfg) -> float:
    """The learning rate at an exact epoch: ``SOLVER.LR_POLICY`` after a linear warm-up.

    Args:
        epoch: epochs done, a fraction of one included.
        cfg: with ``SOLVER``.
    """
    solver = cfg.SOLVER
    policy = _POLICIES[solver.LR_POLICY]
    if epoch >= solver.WARMUP_EPOCHS:
        return policy(solver, epoch)
    start, end = solver.WARMUP_START_LR, policy(solver, solver.WARMUP_EPOCHS)
    return start + (end - start) * epoch / solver.WARMUP_EPOCHS


def _cosine(solver, epoch: float) -> float:
    """Half a cosine from BASE_LR to COSINE_END_LR (arXiv 1608.03983, without restarts)."""
    offset = solver.WARMUP_EPOCHS if solver.COSINE_AFTER_WARMUP else 0.0
    done = (epoch - offset) / (solver.MAX_EPOCH - offset)
    height = (math.cos(math.pi * done) + 1.0) * 0.5
    return solver.COSINE_END_LR + (solver.BASE_LR - solver.COSINE_END_LR) * height


def _steps(solver, epoch: float) -> float:
    return solver.LRS[bisect_right(solver.STEPS, epoch) - 1] * solver.BASE_LR


_POLICIES = {"cosine": _cosine, "steps_with_relative_lrs": _steps}


def scale_lr_by_shards(cfg) -> None:
    """Multiplies the rates in place by ``NUM_SHARDS`` if ``SOLVER.BASE_LR_SCALE_NUM_SHARDS``."""
    if cfg.SOLVER.BASE_LR_SCALE_NUM_SHARDS:
        for key in ("BASE_LR", "WARMUP_START_LR", "COSINE_END_LR"):
            cfg.SOLVER[key] *= cfg.NUM_SHARDS


# --- optimizer ----------------------------------------------------------------------------------


def build_optimizer(model: nn.Module, cfg, state: dict | None = None) -> torch.optim.Optimizer:
    """A config's optimizer; its groups are :func:`groups`, split by ``run_groups``.

    Args:
        model, cfg: what is trained.
        state: of the optimizer of the resumed run, whose groups show which parameters were new.
    """
    solver = cfg.SOLVER
    names = {id(parameter): name for name, parameter, _ in slowfast_parameters(model)}
    saved = (state or {}).get("param_groups", ())
    split = run_groups(groups(model, cfg), model, names, saved)
    common = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    if solver.OPTIMIZING_METHOD == "sgd":
        return torch.optim.SGD(
            split,
            momentum=solver.MOMENTUM,
            dampening=solver.DAMPENING,
            nesterov=solver.NESTEROV,
            **common,
        )
    kind = torch.optim.Adam if solver.OPTIMIZING_METHOD == "adam" else torch.optim.AdamW
    return kind(split, betas=tuple(solver.BETAS), **common)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the rate of each group to ``lr`` times its ``layer_decay``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["layer_decay"]


def groups(model: nn.Module, cfg) -> list[dict]:
    """SlowFast's parameter groups, with its keys ``weight_decay`` and ``layer_decay``.

    ``SOLVER.LAYER_DECAY`` 1: batch norm, the parameters that decay, the ones that do not. Below 1:
    these last two for every block (a stage of Video Swin), its rate smaller by that factor for
    every block above it.
    """
    layered = cfg.SOLVER.LAYER_DECAY < 1.0
    depth, layer_of = len(find_blocks(model)), family_of(cfg).layer
    undecayed = _no_weight_decay(model, cfg)
    batch_norm = _batch_norm_parameters(model)
    found: dict[tuple[int, int], dict] = {}
    for name, parameter, shape in slowfast_parameters(model):
        if not parameter.requires_grad:
            continue
        named = name in undecayed if layered else any(part in name for part in undecayed)
        one_dimension = len(shape) == 1 or name.endswith(".bias")
        zero = named or (cfg.SOLVER.ZERO_WD_1D_PARAM and one_dimension)
        kind, weight_decay = (2, 0.0) if zero else (1, cfg.SOLVER.WEIGHT_DECAY)
        if id(parameter) in batch_norm:
            kind, weight_decay = 0, cfg.BN.WEIGHT_DECAY
        layer = layer_of(name, depth) if layered else depth + 1
        group = {
            "params": [],
            "weight_decay": weight_decay,
            "layer_decay": cfg.SOLVER.LAYER_DECAY ** (depth + 1 - layer),
        }
        found.setdefault((layer, kind), group)["params"].append(parameter)
    # With layer decay SlowFast has the groups in order of their first parameter, else by kind.
    return list(found.values()) if layered else [found[key] for key in sorted(found)]


def _batch_norm_parameters(model: nn.Module) -> set[int]:
    return {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for parameter in module.parameters(recurse=False)
    }


def _no_weight_decay(model: nn.Module, cfg) -> list[str]:
    """Substrings of the names of parameters without weight decay: those that the model lists, or
    for MViT SlowFast's rule."""
    if hasattr(model, "no_weight_decay"):
        return list(model.no_weight_decay())
    if cfg.MODEL.MODEL_NAME != "MViT" or not cfg.MVIT.ZERO_DECAY_POS_CLS:
        return []
    names = []
    if cfg.MVIT.USE_ABS_POS:
        names += [f"pos_embed_{x}" for x in ("spatial", "temporal", "class")]
    if cfg.MVIT.REL_POS_SPATIAL:
        names += ["rel_pos_h", "rel_pos_w"]
    if cfg.MVIT.REL_POS_TEMPORAL:
        names += ["rel_pos_t"]
    return [*names, "cls_token"]


# --- SlowFast's order and shapes ----------------------------------------------------------------

_BLOCK = re.compile(r"^blocks\.(\d+)\.(.*)$")
_STEM_ORDER = ("cls_token", "pos_embed_spatial", "pos_embed_temporal", "pos_embed_class")
_BLOCK_ORDER = (
    "norm1.",
    "attn.rel_pos_h",
    "attn.rel_pos_w",
    "attn.rel_pos_t",
    "attn.qkv.",
    "attn.proj.",
    *(f"attn.{part}_{x}." for x in "qkv" for part in ("pool", "norm")),
    "norm2.",
    "mlp.fc1.",
    "mlp.fc2.",
    "proj.",
)


def slowfast_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter, torch.Size]]:
    """``(SlowFast's name, parameter, SlowFast's shape)`` in SlowFast's order.

    A model that SlowFast does not have has its own names, shapes and order.
    """
    parameters = dict(model.named_parameters())
    listed = [
        (theirs, parameters[ours], value.shape)
        for ours, (theirs, value) in zip(model.state_dict(), slowfast_state(model).items())
        if ours in parameters
    ]
    return sorted(listed, key=lambda entry: _sort_key(entry[0]))


def _sort_key(name: str) -> tuple[int, int, int]:
    if name in _STEM_ORDER:
        return 0, _STEM_ORDER.index(name), 0
    if name.startswith("patch_embed."):
        return 1, 0, 0
    if match := _BLOCK.match(name):
        rest = match.group(2)
        ranks = (rank for rank, prefix in enumerate(_BLOCK_ORDER) if rest.startswith(prefix))
        return 2, int(match.group(1)), next(ranks, len(_BLOCK_ORDER))
    return 3, 0, 0


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict:
    """``optimizer.state_dict()`` with every tensor in the shape that SlowFast's parameter has."""
    shapes = {id(parameter): shape for _, parameter, shape in slowfast_parameters(model)}
    state = optimizer.state_dict()
    state["state"] = _reshaped(state["state"], optimizer, lambda p: shapes[id(p)])
    return state


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict, source: str) -> None:
    """Loads what :func:`optimizer_state` or SlowFast saved.

    Raises:
        ValueError: if the state is of an optimizer with other parameters.
    """
    advice = (
        "to load only its weights set TRAIN.CHECKPOINT_EPOCH_RESET True (or another OUTPUT_DIR)"
    )
    if mismatch := optimizer_mismatch(state, optimizer, reshaped=True):
        raise ValueError(
            f"{source} holds the state of an optimizer for other parameters ({mismatch}): {advice}"
        )
    for key in ("momentum", "betas"):  # SGD has the one, Adam and AdamW the other
        if key in optimizer.param_groups[0] and key not in state["param_groups"][0]:
            raise ValueError(
                f"{source} holds the state of another optimizer than {type(optimizer).__name__}, "
                f"which SOLVER.OPTIMIZING_METHOD asks for: {advice}"
            )
    tensors = _reshaped(state["state"], optimizer, lambda p: p.shape)
    optimizer.load_state_dict({**state, "state": tensors})


def _reshaped(state: dict[int, dict], optimizer: torch.optim.Optimizer, shape_of) -> dict:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        number: {
            key: value.reshape(shape_of(parameters[number]))
            if isinstance(value, Tensor) and value.dim()
            else value
            for key, value in entries.items()
        }
        for number, entries in state.items()
    }
