"""Spatial-temporal token selection (STTS, arXiv 2111.11591) for video transformers.

The names below are the whole public surface; each is documented where it is defined. They are
imported when first used, so that ``import stts_slowfast`` costs nothing: PyTorch loads this package
at ``import torch`` (see ``pyslowfast/autoload.py``).
"""

import importlib

_HOMES = {
    "hard_topk": "topk",
    "perturbed_topk": "topk",
    "adapt": "adaptation",
    "add_stts_config": "config",
    "attach": "hooks",
    "detach": "hooks",
    "selections": "hooks",
    "Schedule": "schedule",
    "positions": "dense_features",
    "scatter": "dense_features",
    "set_progress": "annealing",
    "param_groups": "optimizer_groups",
    "load_weights": "checkpoints",
    "load_config": "standalone.config",
    "build_model": "standalone.model",
}

__all__ = sorted(_HOMES)
__version__ = "0.2.0"


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])
