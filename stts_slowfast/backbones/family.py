"""What a family of backbones is: one record, in the registry ``FAMILIES``."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from fvcore.common.config import CfgNode
from fvcore.common.registry import Registry
from torch import nn

from stts_slowfast.backbones.state_dict import State, layer_of

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Format:
    """A checkpoint format, told by the names and shapes of its parameters.

    Attributes:
        name: what a user reads.
        detect_format: whether a state dict is of this format.
        to_slowfast: (state, the model's selectors) to the names that checkpoints of a run have:
            SlowFast's, or the family's own where SlowFast does not have it. Where nothing is merged
            parameters keep their order.
        from_slowfast: the inverse, in this format's names; None where nobody writes it.
        target: what ``stts convert --to`` calls it; "" where nobody writes it.
        wrapper: the key under which a file of this format holds its parameters; "" for none.
        metadata: what a model of this format has that its parameters do not say, where it differs
            from the family's ``metadata``.
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
            for what it cannot express.
        block_grids: a config to the token grid ``(T, H, W)`` that arrives at each block.
        add_config: adds the family's node with its defaults to a config, once.
        models: the classes that ``build`` returns.
        formats: the checkpoint formats of the family, by name; the first that recognises wins.
        from_slowfast: (state under the names of a run's checkpoints, model) to the model's names
            and sizes, the state's parameters first.
        to_slowfast: (the model's state dict, model) to the names of a run's checkpoints.
        pretrained: a config to the file of weights to start from; "" for none.
        layer: (a parameter's name, number of blocks) to its layer for ``SOLVER.LAYER_DECAY``: 0
            before the blocks, block + 1, number of blocks + 1 behind them.
        metadata: what checkpoints carry beside parameters, with the values they have where they do
            not say; ``read_metadata(model)`` finds them, ``set_metadata(model, metadata)`` sets
            them and says in sentences what it changed.
        resolve_config: (a config, the keys that a file or command line gives) completes the config
            with what the model's own files say; raises ValueError where that contradicts a given
            key.
        init_folder: a config to the folder whose weights, and selectors, ``build`` starts from; "".
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
    def __name__(self) -> str:  # what fvcore's Registry files it under
        return self.name


FAMILIES = Registry("FAMILIES")
FAMILIES.__doc__ = """The families of backbones, by ``MODEL.MODEL_NAME``.

.. code-block:: python

    from stts_slowfast.backbones import FAMILIES, Family

    FAMILIES.register(Family("MyViT", build=build_my_vit, block_grids=my_grids))
"""
