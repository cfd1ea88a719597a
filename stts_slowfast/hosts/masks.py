"""Attention masks that were made once for all blocks, cut to the kept tokens."""

from typing import Any

from torch import Tensor, arange


def cut(mask: Any, entries: Tensor, tokens: Tensor, padding: bool = False) -> Any:
    """A mask between kept tokens, from one between all tokens.

    Args:
        mask: ``(..., N or 1, N)`` of any dtype, with a batch as its first dimension if it has 3 or
            more; or a ``BlockMask`` of ``flex_attention``.
        entries: LongTensor ``(b,)``, indices of the kept entries of the batch.
        tokens: LongTensor ``(b, n)``, indices of the kept tokens of each.
        padding: whether a mask of 2 dimensions is ``(B, N)``, of keys only.

    Returns:
        The mask ``(b, ..., n or 1, n)``; or a ``BlockMask``.
    """
    if not isinstance(mask, Tensor):
        return _cut_blocks(mask, entries, tokens)
    if mask.dim() == 2 and padding:
        return mask[entries[:, None] if len(mask) > 1 else 0, tokens]
    if mask.dim() == 2:  # (N, N) for all
        return mask[tokens[:, None, :, None], tokens[:, None, None, :]]
    mask = mask[entries] if len(mask) > 1 else mask.expand(len(entries), *mask.shape[1:])
    mask = mask if mask.dim() == 4 else mask[:, None]  # (b, heads or 1, N or 1, N)
    batch = arange(len(mask), device=mask.device)[:, None, None, None]
    heads = arange(mask.shape[1], device=mask.device)[None, :, None, None]
    queries = tokens[:, None, :, None] if mask.shape[2] > 1 else batch.new_zeros(1, 1, 1, 1)
    return mask[batch, heads, queries, tokens[:, None, None, :]]


def _cut_blocks(mask: Any, entries: Tensor, tokens: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    whole = mask.mask_mod

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Any:
        return whole(entries[batch], head, tokens[batch, query], tokens[batch, key])

    size = tokens.shape[1]
    return create_block_mask(mask_mod, len(tokens), mask.shape[1], size, size, tokens.device)
