"""TimeSformer's parameters as transformers names them."""

import re

from stts_slowfast.backbones.state_dict import State, has, replace_prefix, swapped

# Prefixes of names, after "blocks.N." if there is one: ours (the authors') and transformers'.
_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "time_embed": "embeddings.time_embeddings",
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "norm.": "layernorm.",
    "head.": "classifier.",
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


def is_transformers(state: State) -> bool:
    """Whether a state dict is one of ``TimesformerForVideoClassification`` or its body's."""
    name = "embeddings.patch_embeddings.projection.weight"
    weight = state.get(_BODY + name, state.get(name))
    layers = has(state, rf"({_BODY})?encoder\.layer\.0\.intermediate\.")
    return weight is not None and weight.dim() == 4 and layers


def from_transformers(state: State) -> State:
    """Parameters of transformers' TimeSformer under the authors' names; others keep theirs."""

    def ours(key: str) -> str:
        key = re.sub(r"^encoder\.layer\.", "blocks.", key.removeprefix(_BODY))
        return replace_prefix(key, swapped(_NAMES))

    return {ours(key): value for key, value in state.items()}


def to_transformers(state: State, body: str = _BODY) -> State:
    """The inverse; ``body`` is "" for the names of ``TimesformerModel``, which has no head."""

    def theirs(key: str) -> str:
        renamed = re.sub(r"^blocks\.", "encoder.layer.", replace_prefix(key, _NAMES))
        return renamed if renamed == key or key.startswith("head.") else body + renamed

    return {theirs(key): value for key, value in state.items()}
