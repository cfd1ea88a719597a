"""Restores tensors in transformers' ``Trainer`` by the names that the model has.

``save_pretrained`` writes the names of a model's first release. ``from_pretrained`` converts them,
but ``Trainer`` does not when it resumes or loads the best model: tensors of ViViT and VideoMAE
would keep their values.
"""

import torch
from torch import nn

from stts_slowfast.hosts import is_instance_of


class Restoration:
    """Hooks on a model's ``load_state_dict``: convert names, and record what was not restored.

    Args:
        model: of transformers, wrapped or not; names of any other are not converted.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.restored: set[str] | None = None  # None: nothing was loaded
        for module in _outermost(model):
            module.register_load_state_dict_pre_hook(self._convert)
        model.register_load_state_dict_post_hook(self._record)

    def missing(self) -> list[str]:
        """Names of trainable parameters that were not restored since the last call; none if nothing
        was loaded."""
        restored, self.restored = self.restored, None
        if restored is None:
            return []
        learn = (name for name, p in self.model.named_parameters() if p.requires_grad)
        return [name for name in learn if name not in restored]

    @staticmethod
    @torch.no_grad()
    def _convert(module: nn.Module, state: dict, prefix: str, *_) -> None:
        own = module.state_dict()
        given = {key.removeprefix(prefix): key for key in state if key.startswith(prefix)}
        if given.keys() <= own.keys():
            return
        theirs = {key: state[given[key]] for key in given if "stts" not in key.split(".")}
        kinds = (kind for kind in type(module).__mro__ if "transformers." in kind.__module__)
        kind = next(kinds)  # FSDP2 makes a class of its own
        converted = kind.from_pretrained(None, config=module.config, state_dict=theirs)
        for name, parameter in converted.named_parameters():
            loaded = getattr(parameter, "_is_hf_initialized", False)
            if loaded and name in own and name not in given:
                state[prefix + name] = parameter.detach()
        for key in theirs.keys() - own.keys():
            del state[given[key]]

    def _record(self, module: nn.Module, incompatible) -> None:
        own = {name for name, _ in module.named_parameters()}
        self.restored = (self.restored or set()) | (own - set(incompatible.missing_keys))


def _outermost(model: nn.Module) -> list[nn.Module]:
    """The models of transformers in a model, without those inside another one."""
    if is_instance_of(model, "transformers", "PreTrainedModel"):
        return [model]
    return [found for child in model.children() for found in _outermost(child)]
