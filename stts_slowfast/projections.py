"""Queries and keys of a transformer block's attention, found by the usual names of its layers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

QUERIES, KEYS = ("q_proj", "query", "q"), ("k_proj", "key", "k")
HEADS = ("num_heads", "num_attention_heads")


@dataclass(frozen=True)
class Projections:
    """Where a block has what makes queries and keys, and how many heads there are.

    Attributes:
        norm: path of the norm before the attention; None if it comes after it.
        holder: path of the module that has the projections.
        query, key: their names there; the same name if one layer makes queries, keys and values.
        heads: their number.
    """

    norm: str | None
    holder: str
    query: str
    key: str
    heads: int

    def __call__(self, block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys ``(B, heads, N, D)`` of the tokens ``x`` ``(B, N, C)`` of a block."""
        x = x if self.norm is None else block.get_submodule(self.norm)(x)
        holder = block.get_submodule(self.holder)
        if self.query == self.key:
            layer: Any = holder.get_submodule(self.query)
            query, key, _ = layer(x).chunk(3, dim=2)
            if layer.bias is None and isinstance(getattr(holder, "q_bias", None), Tensor):
                query = query + holder.q_bias
        else:
            query, key = holder.get_submodule(self.query)(x), holder.get_submodule(self.key)(x)
        query, key = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (query, key))
        return _normed(holder, "q_norm", query), _normed(holder, "k_norm", key)


def _normed(holder: nn.Module, name: str, heads: Tensor) -> Tensor:
    norm = getattr(holder, name, None)
    normed: Tensor = norm(heads) if isinstance(norm, nn.Module) else heads
    return normed


def find_projections(block: nn.Module) -> Projections:
    """The projections of a block.

    Raises:
        ValueError: if it has none under the usual names, or the number of heads is not known.
    """
    found = next(_candidates(block), None)
    norms = _norms(block)
    if found is None or not norms:
        raise ValueError(
            "STTS.TOKENS.SCORER is attention, but no projections to queries and keys were found in "
            f"{type(block).__name__} (qkv, or one of {', '.join(QUERIES)}, with num_heads): give "
            "another scorer"
        )
    norm = None if "Post" in type(block).__name__ else norms[0]
    return Projections(norm, *found)


def _candidates(block: nn.Module) -> Iterator[tuple[str, str, str, int]]:
    for path, module in block.named_modules():
        heads = next((h for h in (getattr(module, name, None) for name in HEADS) if h), None)
        if not isinstance(heads, int):
            continue
        if isinstance(getattr(module, "qkv", None), nn.Module):
            yield path, "qkv", "qkv", heads
        for query, key in zip(QUERIES, KEYS):
            if isinstance(getattr(module, query, None), nn.Linear):
                yield path, query, key, heads


def _norms(block: nn.Module) -> list[str]:
    """Paths of the norms of a block outside of its attention, also in a wrapper of it."""
    for path, module in block.named_modules():
        names = [name for name, child in module.named_children() if _is_norm(child)]
        if names:
            return [f"{path}.{name}" if path else name for name in names]
    return []


def _is_norm(module: nn.Module) -> bool:
    return hasattr(module, "normalized_shape")
