"""What SlowFast loads into a model: whether a run starts from trained weights."""

import weakref

from torch import nn

from stts_slowfast.pyslowfast.wrap import wrap

_trained = weakref.WeakSet()


def wrap_load_checkpoint(checkpoint) -> None:
    """``slowfast.utils.checkpoint.load_checkpoint``, through which every checkpoint comes."""
    wrap(checkpoint, "load_checkpoint", _load)


def _load(load_checkpoint, path_to_checkpoint, model, *args, **kwargs):
    epoch = load_checkpoint(path_to_checkpoint, model, *args, **kwargs)
    note_trained(model)
    return epoch


def note_trained(model: nn.Module) -> None:
    """Notes that a model, wrapped by DDP or not, has weights of an earlier training."""
    _trained.add(getattr(model, "module", model))


def is_trained(model: nn.Module) -> bool:
    """Whether :func:`note_trained` was told of this model."""
    return getattr(model, "module", model) in _trained
