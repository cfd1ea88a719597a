"""Backbones of this package in SlowFast's model registry."""

import torch
from torch import Tensor, nn

from stts_slowfast import backbones
from stts_slowfast.configfiles.values import check_choice
from stts_slowfast.hosts import find_blocks
from stts_slowfast.pyslowfast import compat
from stts_slowfast.pyslowfast.checkpoint_loading import mark_pretrained
from stts_slowfast.pyslowfast.config_access import get_value

# MODEL.HEAD_ACT, which SlowFast's transformer head applies to logits in evaluation.
ACTIVATIONS = {
    "softmax": lambda logits: logits.softmax(dim=1),
    "sigmoid": torch.sigmoid,
    "none": lambda logits: logits,
}


class SlowFastModel(nn.Module):
    """A backbone with the inputs and outputs of SlowFast's models: a list of one pathway, and
    probabilities in evaluation.

    The backbone's parameters, buffers and children are this module's own, so that their names, and
    checkpoints, are the same with and without SlowFast.

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
        self.__dict__["backbone"] = backbone  # nn.Module.__setattr__ would make it a child
        self._parameters = backbone._parameters
        self._buffers = backbone._buffers
        self._modules = backbone._modules

    def train(self, mode: bool = True) -> "SlowFastModel":
        self.backbone.training = mode
        return super().train(mode)

    def no_weight_decay(self):
        """Names of parameters without weight decay, for SlowFast's optimizer."""
        names = getattr(self.backbone, "no_weight_decay", None)
        return names() if names else []

    def forward(self, inputs: list[Tensor], bboxes=None) -> Tensor:
        """``[(B, 3, T, H, W)]`` to logits in training, and to probabilities in evaluation."""
        logits = self.backbone(inputs[0])
        return logits if self.training else ACTIVATIONS[self.head_act](logits)


def register_family(registry, cfg) -> None:
    """Registers the family that a config names, unless ``MODEL_REGISTRY`` has that name.

    Only when a model is built: a user's own model of that name may be registered late. Names with a
    colon (``hf:...``) are not registered: the registry holds whole names.
    """
    name = get_value(cfg, "MODEL.MODEL_NAME", "")
    if registry is not None and name in backbones.FAMILIES and name not in registry:
        registry.register(FamilyBuilder(name))
        compat.report(requested=True)


class FamilyBuilder:
    """Registry entry of a family: called with a config, it builds the model."""

    def __init__(self, name: str):
        self.__name__ = name  # the registry's key

    def __call__(self, cfg) -> SlowFastModel:
        if cfg.DETECTION.ENABLE:
            raise ValueError(
                f"DETECTION.ENABLE is True, but {self.__name__} has no RoI head: use "
                "MODEL.MODEL_NAME MViT"
            )
        # Late: it imports torchvision's models.
        from stts_slowfast.checkpoints import load_pretrained

        model = backbones.build(cfg)
        loaded = load_pretrained(model, cfg)
        model = SlowFastModel(model, cfg.MODEL.HEAD_ACT)
        if loaded is not None:
            mark_pretrained(model)
        return model


def is_family_model(model: nn.Module) -> bool:
    """Whether a model is a backbone of this package, not SlowFast's or the user's own."""
    return isinstance(model, SlowFastModel)


def layer_decay_groups(groups: list[dict], model: nn.Module, cfg) -> list[dict]:
    """``SOLVER.LAYER_DECAY`` for backbones of this package: SlowFast's rule reads ``MVIT.DEPTH``.

    Args:
        groups: of ``construct_optimizer``.
        model: inside DDP or not.

    Returns:
        The groups split by the family's own layers, each with its ``layer_decay``; the same groups
        for SlowFast's own models and without layer decay.
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
