"""Records of backbone families and of checkpoint formats; the registry ``FAMILIES``."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from fvcore.common.config import CfgNode
from fvcore.common.registry import Registry
from torch import nn

from stts_slowfast.backbones.state_dict import State, layer_of

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Format:
    """A checkpoint format, recognised by the names and shapes of its parameters.

    Attributes:
        name: for messages.
        recognize: whether a state dict is of this format.
        to_slowfast: (state, the model's selectors) to the names in a run's checkpoints:
            SlowFast's, or the family's own if SlowFast does not have it. The order of parameters is
            kept unless some are merged.
        from_slowfast: the inverse, to this format's names; None if it is not written.
        target: its name for ``stts convert --to``; "" if it is not written.
        wrapper: the key of the parameters in a file of this format; "" for none.
        metadata: entries that differ from the family's ``metadata`` in models of this format.
    """

    name: str
    recognize: Callable[[State], bool]
    to_slowfast: Callable[[State, list[str]], State]
    from_slowfast: Callable[[State], State] | None = None
    target: str = ""
    wrapper: str = ""
    metadata: Mapping = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A family of backbones. ``FAMILIES.register(record)`` is all it takes to add one.

    Attributes:
        name: ``MODEL.MODEL_NAME``.
        build: a config to a model with random weights that maps clips ``(B, 3, T, H, W)`` to
            logits ``(B, MODEL.NUM_CLASSES)``, its classifier at ``model.head``; raises ValueError
            for a setting that it does not have.
        block_grids: a config to the token grid ``(T, H, W)`` that arrives at each block.
        add_config: adds the family's node with its defaults to a config, unless it is there.
        models: the classes that ``build`` returns.
        formats: the checkpoint formats of the family, by name; the first that matches is used.
        from_slowfast: (state under the names of a run's checkpoints, model) to the model's names
            and sizes, the state's parameters first.
        to_slowfast: (the model's state dict, model) to the names of a run's checkpoints.
        pretrained: a config to the file of initial weights; "" for none.
        layer: (a parameter's name, number of blocks) to its layer for ``SOLVER.LAYER_DECAY``: 0
            before the blocks, block + 1, number of blocks + 1 after them.
        metadata: entries of checkpoints beside parameters, with their defaults;
            ``read_metadata(model)`` gives a model's, ``set_metadata(model, metadata)`` sets them
            and returns a sentence for each change.
        resolve_config: (a config, the keys that a file or command line sets) completes the config
            from the model's own files; raises ValueError if they contradict a given key.
        init_folder: a config to the folder of the initial weights and selectors; "" for none.
    """

    name: str
    build: Callable[[CfgNode], nn.Module]
    block_grids: Callable[[CfgNode], list[Grid]]
    add_config: Callable[[CfgNode], None] = lambda cfg: None
    models: tuple[type, ...] = ()
    formats: Mapping[str, Format] = field(default_factory=dict)
    from_slowfast: Callable[[State, nn.Module], State] = lambda state, model: state
    to_slowfast: Callable[[State, nn.Module], State] = lambda state, model: dict(state)
    pretrained: Callable[[CfgNode], str] = lambda cfg: ""
    layer: Callable[[str, int], int] = layer_of
    metadata: Mapping = field(default_factory=dict)
    read_metadata: Callable[[nn.Module], dict] = lambda model: {}
    set_metadata: Callable[[nn.Module, Mapping], list[str]] = lambda model, metadata: []
    resolve_config: Callable[[CfgNode, Collection[str]], None] = lambda cfg, given: None
    init_folder: Callable[[CfgNode], str] = lambda cfg: ""

    @property
    def __name__(self) -> str:  # the key in fvcore's Registry
        return self.name


FAMILIES = Registry("FAMILIES")
FAMILIES.__doc__ = """The families of backbones, by ``MODEL.MODEL_NAME``.

.. code-block:: python

    from stts_slowfast.backbones import FAMILIES, Family

    FAMILIES.register(Family("MyViT", build=build_my_vit, block_grids=my_grids))
"""
