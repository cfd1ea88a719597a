"""Our backbones that SlowFast does not have, in its model registry, called as it calls its own."""

import torch
from torch import Tensor, nn

from stts_slowfast import backbones
from stts_slowfast.configfiles.values import check_choice
from stts_slowfast.hosts import find_blocks
from stts_slowfast.pyslowfast import compat
from stts_slowfast.pyslowfast.checkpoint_loading import mark_pretrained
from stts_slowfast.pyslowfast.config_access import value

# What MODEL.HEAD_ACT makes of logits in evaluation, as SlowFast's transformer head does.
ACTIVATIONS = {
    "softmax": lambda logits: logits.softmax(dim=1),
    "sigmoid": torch.sigmoid,
    "none": lambda logits: logits,
}


class SlowFastModel(nn.Module):
    """A backbone that takes SlowFast's list of one pathway and ends as SlowFast's models end.

    The backbone's parameters, buffers and children are this module's own, not those of a child, so
    that all of them keep their names, and checkpoints are the same with and without SlowFast.

    Args:
        backbone: maps clips ``(B, 3, T, H, W)`` to logits ``(B, classes)``.
        head_act: ``MODEL.HEAD_ACT``: ``softmax``, ``sigmoid`` or ``none``.

    Raises:
        ValueError: for another ``head_act``.
    """

    def __init__(self, backbone: nn.Module, head_act: str = "softmax"):
        super().__init__()
        check_choice("MODEL.HEAD_ACT", head_act, ACTIVATIONS)
        self.head_act = head_act
        self.__dict__["backbone"] = backbone  # past nn.Module, which would make it a child
        self._parameters = backbone._parameters
        self._buffers = backbone._buffers
        self._modules = backbone._modules

    def train(self, mode: bool = True) -> "SlowFastModel":
        self.backbone.training = mode
        return super().train(mode)

    def no_weight_decay(self):
        """Names of the parameters without weight decay; SlowFast's optimizer asks for them."""
        names = getattr(self.backbone, "no_weight_decay", None)
        return names() if names else []

    def forward(self, inputs: list[Tensor], bboxes=None) -> Tensor:
        """``[(B, 3, T, H, W)]`` to logits in training, and to probabilities in evaluation."""
        logits = self.backbone(inputs[0])
        return logits if self.training else ACTIVATIONS[self.head_act](logits)


def offer(registry, cfg) -> None:
    """Registers the family that a config names, if ``MODEL_REGISTRY`` has nothing of that name.

    Not before it is built: the name may be that of a model of the user's own, registered late. Not
    those whose ``MODEL.MODEL_NAME`` continues behind a colon: a registry holds whole names.
    """
    name = value(cfg, "MODEL.MODEL_NAME", "")
    if registry is not None and name in backbones.FAMILIES and name not in registry:
        registry.register(FamilyBuilder(name))
        compat.report(asked=True)


class FamilyBuilder:
    """What the registry holds of one of our families: called with a config, it builds the model."""

    def __init__(self, name: str):
        self.__name__ = name  # the registry's key

    def __call__(self, cfg) -> SlowFastModel:
        if cfg.DETECTION.ENABLE:
            raise ValueError(
                f"DETECTION.ENABLE is True, but {self.__name__} has no RoI head: use "
                "MODEL.MODEL_NAME MViT"
            )
        # Only now, for it imports torchvision's models.
        from stts_slowfast.checkpoints import load_pretrained

        model = backbones.build(cfg)
        loaded = load_pretrained(model, cfg)
        model = SlowFastModel(model, cfg.MODEL.HEAD_ACT)
        if loaded is not None:
            mark_pretrained(model)
        return model


def is_ours(model: nn.Module) -> bool:
    """Whether a model is of one of our families, rather than SlowFast's or the user's own."""
    return isinstance(model, SlowFastModel)


def layer_decay_groups(groups: list[dict], model: nn.Module, cfg) -> list[dict]:
    """``SOLVER.LAYER_DECAY`` for the families here: SlowFast's own rule reads ``MVIT.DEPTH``.

    Args:
        groups: the optimizer's, as ``construct_optimizer`` makes them.
        model: wrapped for several GPUs or not.

    Returns:
        The groups split so that ``layer_decay`` follows the family's own layers; as they were for
        models of SlowFast's own, and without decay.
    """
    model = getattr(model, "module", model)
    if not isinstance(model, SlowFastModel) or cfg.SOLVER.LAYER_DECAY == 1.0:
        return groups
    layer, depth = backbones.family_of(cfg).layer, len(find_blocks(model))
    layers = {id(p): layer(name, depth) for name, p in model.named_parameters()}
    split = []
    for group in groups:
        for number in sorted({layers[id(p)] for p in group["params"]}):
            params = [p for p in group["params"] if layers[id(p)] == number]
            decay = cfg.SOLVER.LAYER_DECAY ** (depth + 1 - number)
            split.append({**group, "params": params, "layer_decay": decay})
    return split
