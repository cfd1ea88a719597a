"""TimeSformer's parameters as transformers names them."""

import re

from stts_slowfast.backbones.names import State

# The authors' name, which is ours, to that of transformers.
_WHOLE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "time_embed": "embeddings.time_embeddings",
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "norm.": "layernorm.",
}
_BLOCK = {
    "norm1.": "layernorm_before.",
    "attn.qkv.": "attention.attention.qkv.",
    "attn.proj.": "attention.output.dense.",
    "temporal_norm1.": "temporal_layernorm.",
    "temporal_attn.qkv.": "temporal_attention.attention.qkv.",
    "temporal_attn.proj.": "temporal_attention.output.dense.",
    "temporal_fc.": "temporal_dense.",
    "norm2.": "layernorm_after.",
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
}
_BODY = "timesformer."
_HEAD = {"head.": "classifier."}


def is_transformers(state: State) -> bool:
    """Whether a state dict is one of ``TimesformerForVideoClassification`` or its body's."""
    name = "embeddings.patch_embeddings.projection.weight"
    weight = state.get(_BODY + name, state.get(name))
    layers = any(re.match(rf"({_BODY})?encoder\.layer\.0\.intermediate\.", key) for key in state)
    return weight is not None and weight.dim() == 4 and layers


def from_transformers(state: State) -> State:
    """Parameters of transformers' TimeSformer under the authors' names; others keep theirs."""
    return {_authors(key.removeprefix(_BODY)): value for key, value in state.items()}


def to_transformers(state: State, body: str = _BODY) -> State:
    """The inverse; ``body`` is "" for the names of ``TimesformerModel``, which has no head."""
    return {_transformers(key, body): value for key, value in state.items()}


def _authors(key: str) -> str:
    if match := re.match(r"encoder\.layer\.(\d+)\.", key):
        rest = key[match.end() :]
        return f"blocks.{match.group(1)}.{_replaced(rest, _swapped(_BLOCK))}"
    return _replaced(key, _swapped(_WHOLE | _HEAD))


def _transformers(key: str, body: str) -> str:
    if match := re.match(r"blocks\.(\d+)\.", key):
        return f"{body}encoder.layer.{match.group(1)}.{_replaced(key[match.end() :], _BLOCK)}"
    renamed = _replaced(key, _WHOLE)
    return _replaced(key, _HEAD) if renamed == key else body + renamed


def _replaced(key: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def _swapped(names: dict[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}
