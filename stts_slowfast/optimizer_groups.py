"""Optimizer groups: a trained backbone apart from new parameters (scorers, adapters, a head)."""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from stts_slowfast.annealing import check_training
from stts_slowfast.frozen_gradients import turn_on
from stts_slowfast.hooks import all_selectors, settings_of
from stts_slowfast.hosts import is_instance_of
from stts_slowfast.selectors import Selector

logger = logging.getLogger(__name__)

# A group of parameters as PyTorch's optimizers take it.
Group = dict[str, Any]


def param_groups(params: Any, model: nn.Module, new: Iterable[str] = ()) -> list[Group]:
    """Splits an optimizer's parameters into those of the backbone and those that are new.

    New are the scorers, adapters of peft with the modules saved beside them, parameters for which
    ``from_pretrained`` or :func:`load_weights` found no weights (such as a head for other classes),
    and those that ``new`` names. They learn from the first step, while a trained backbone may be
    frozen.

    Args:
        params: what PyTorch's optimizers take: parameters, ``(name, parameter)`` pairs, or groups
            (dicts) of either; in a list, a generator, or a single one.
        model: with selectors or without, wrapped or not.
        new: names of further new parameters or modules, as in ``model.named_parameters()``.

    Returns:
        Groups with the keys they had, and ``backbone``: whether their parameters are the
        backbone's; ``new`` names the others that are not of a scorer. Empty groups are left out.
        If no scorer learns (``uniform``, ``random``, no selector), groups are not split.

    Raises:
        TypeError: for what PyTorch's optimizers do not take.
        ValueError: if the scorers would not learn, because of the settings, because their
            parameters are frozen, or because none of them is among ``params``; for names in ``new``
            that the model does not have.
    """
    turn_on(model)
    groups = as_groups(params)
    scorers = {id(parameter) for _, parameter in scorer_parameters(model)}
    if not scorers:
        return groups
    check_scorers(model)
    found = new_parameters(model, new)
    given = {id(parameter) for group in groups for parameter in tensors(group)}
    if not given & scorers:
        raise ValueError(
            "none of the scorers' parameters is among these, so they would never learn: give "
            "model.parameters() of the whole model"
        )
    return split_groups(groups, model, found)


def split_groups(groups: list[Group], model: nn.Module, new: Mapping[int, str]) -> list[Group]:
    """Groups of :func:`as_groups`, each split into the backbone's parameters and new ones.

    Args:
        groups: a saved optimizer state fits them if it was split by the same names.
        model: with the scorers that ``new`` has.
        new: names of parameters by their ``id``.
    """
    scorers = {id(parameter) for _, parameter in scorer_parameters(model)}
    split = []
    for group in groups:
        for backbone in (True, False):
            part = _part(group, [(id(p) not in new) == backbone for p in tensors(group)])
            if not part["params"]:
                continue
            part["backbone"] = backbone
            names = [new[id(p)] for p in tensors(part) if id(p) in new.keys() - scorers]
            split.append({**part, "new": names} if names else part)
    return split


def run_groups(
    groups: list[Group], model: nn.Module, names: Mapping[int, str], saved: Iterable[Group] = ()
) -> list[Group]:
    """:func:`param_groups` for a run that may be resumed.

    Args:
        groups: of parameters, as the run's config makes them.
        model: with the weights that the run starts from.
        names: of the model's parameters, by their ``id``, the same in both engines.
        saved: groups of the optimizer state in the checkpoint that is resumed: they name the
            parameters that were new when the run began.
    """
    found = list(saved)
    if not found:
        split = param_groups(groups, model)
        for group in split:
            if "new" in group:
                ids = {plain(n): id(p) for n, p in model.named_parameters()}
                group["new"] = [names.get(ids[name], name) for name in group["new"]]
        return split
    apart = {id(parameter): name for name, parameter in scorer_parameters(model)}
    if not apart:
        return groups
    check_scorers(model)
    new = {name for group in found for name in group.get("new", ())}
    apart.update((number, name) for number, name in names.items() if name in new)
    return split_groups(groups, model, apart)


def as_groups(params: Any) -> list[Group]:
    """Any form of ``params`` that PyTorch's optimizers take, as a list of groups with lists.

    Raises:
        TypeError: for any other form.
    """
    entries: list[Any] = [params] if isinstance(params, (Tensor, dict)) else list(params)
    if not any(isinstance(entry, dict) for entry in entries):
        entries = [{"params": entries}] if entries else []
    groups = []
    for group in entries:
        if not isinstance(group, dict) or "params" not in group or isinstance(group["params"], set):
            raise TypeError(
                f"{type(group).__name__} beside groups: give parameters, (name, parameter) pairs, "
                "or groups, dicts whose params are an ordered collection of either"
            )
        inner = group["params"]
        groups.append({**group, "params": [inner] if isinstance(inner, Tensor) else list(inner)})
    for group in groups:
        for tensor in tensors(group):
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"an optimizer's parameters hold {tensor!r}: give tensors, or (name, tensor)"
                )
    return groups


def tensors(group: Group) -> list[Tensor]:
    """The tensors of a group, named or not."""
    return [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]


def _part(group: Group, which: list[bool]) -> Group:
    part = {**group, "params": [entry for entry, mine in zip(group["params"], which) if mine]}
    if "param_names" in group:  # of an optimizer that was made
        part["param_names"] = [n for n, mine in zip(group["param_names"], which) if mine]
    return part


def scorer_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of the scorers in use: not the originals that peft keeps."""
    for path, module in model.named_modules():
        if isinstance(module, Selector) and "original_module" not in path.split("."):
            for name, parameter in module.named_parameters():
                yield f"{path}.{name}", parameter


def check_scorers(model: nn.Module) -> None:
    """Raises ``ValueError`` if scorers that learn would get no gradient."""
    check_training(settings_of(model), all_selectors(model))
    frozen = [name for name, parameter in scorer_parameters(model) if not parameter.requires_grad]
    if frozen:
        raise ValueError(
            f"{len(frozen)} parameters of the scorers have requires_grad False ({frozen[0]}, ...): "
            "they would learn nothing; with peft give modules_to_save=['stts'], else call "
            "requires_grad_(True) on them, or attach scorers that do not learn (uniform)"
        )


def new_parameters(model: nn.Module, more: Iterable[str] = ()) -> dict[int, str]:
    """Names of new parameters, see :func:`param_groups`, by their ``id``.

    Raises:
        ValueError: for names in ``more`` that the model does not have.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    found = {id(parameter): plain(name) for name, parameter in scorer_parameters(model)}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        inside = {name: p for name, p in named.items() if name.startswith(prefix)}
        for name in _new_in(module, prefix, inside):
            found[id(named[name])] = plain(name)
    for wanted in more:
        names = [name for name in named if _is_or_in(plain(name), plain(wanted))]
        if not names:
            raise ValueError(f"new names {wanted!r}, but the model has no such parameter or module")
        found.update((id(named[name]), plain(name)) for name in names)
    return found


def _new_in(module: nn.Module, prefix: str, inside: dict[str, nn.Parameter]) -> Iterator[str]:
    """Names of new parameters in a module that is an adapter or was loaded."""
    for library_class, old in (
        ("BaseTunerLayer", "base_layer"),
        ("AuxiliaryTrainingWrapper", "original_module"),
    ):
        if is_instance_of(module, "peft", library_class):
            yield from (name for name in inside if not _is_or_in(name, prefix + old))
    if is_instance_of(module, "transformers", "PreTrainedModel"):
        loaded = {name for name, p in inside.items() if getattr(p, "_is_hf_initialized", False)}
        if loaded:
            yield from inside.keys() - loaded
        elif getattr(module, "name_or_path", ""):
            logger.warning(
                "STTS: it is unknown which parameters of this %s are new (copied or sharded since "
                "from_pretrained): name a new head, param_groups(..., new=[...])",
                type(module).__name__,
            )
    known = getattr(module, "stts_new", ())
    yield from (n for n in inside if any(_is_or_in(n[len(prefix) :], part) for part in known))


def _is_or_in(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def plain(name: str) -> str:
    """A parameter's name without the prefixes of wrappers (DDP, ``torch.compile``)."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def missing_scorers(groups: Collection[Group], model: nn.Module) -> list[str]:
    """Names of scorers' parameters that are in no group."""
    given = {id(parameter) for group in groups for parameter in tensors(group)}
    return [name for name, p in scorer_parameters(model) if id(p) not in given]


def with_hooks(optimizer: Optimizer) -> Optimizer:
    """PyTorch's optimizer inside the wrappers of accelerate or SlowFast (LARS)."""
    inner: Any = optimizer
    while not hasattr(inner, "_optimizer_step_pre_hooks"):
        inner = getattr(inner, "optimizer", None) or getattr(inner, "optim", None)
        if inner is None:
            raise TypeError(
                f"{type(optimizer).__name__} has no hooks on its step: give a torch.optim.Optimizer"
            )
    if isinstance(inner, LBFGS):
        raise TypeError(
            "LBFGS has one rate for all parameters, so a backbone cannot be frozen or capped apart "
            "from the scorers: use another optimizer, or set_progress(model, fraction)"
        )
    return inner
