"""Attention masks that were made once for all blocks, cut to the tokens that are left."""

from torch import Tensor, arange


def cut(mask, entries: Tensor, places: Tensor, padding: bool = False):
    """A mask between the tokens that are left, of one between all that entered.

    Args:
        mask: ``(..., N or 1, N)`` with a batch in front if it has 3 dimensions or more, of any
            dtype; or a ``BlockMask`` of ``flex_attention``.
        entries: LongTensor ``(b,)``, which entries of the batch are left.
        places: LongTensor ``(b, n)``, which tokens are left of each.
        padding: a mask of 2 dimensions is ``(B, N)``, of keys alone.

    Returns:
        The mask ``(b, ..., n or 1, n)``; or a ``BlockMask``.
    """
    if not isinstance(mask, Tensor):
        return _cut_blocks(mask, entries, places)
    if mask.dim() == 2 and padding:
        return mask[entries[:, None] if len(mask) > 1 else 0, places]
    if mask.dim() == 2:  # (N, N) for all
        return mask[places[:, None, :, None], places[:, None, None, :]]
    mask = mask[entries] if len(mask) > 1 else mask.expand(len(entries), *mask.shape[1:])
    mask = mask if mask.dim() == 4 else mask[:, None]  # (b, heads or 1, N or 1, N)
    batch = arange(len(mask), device=mask.device)[:, None, None, None]
    heads = arange(mask.shape[1], device=mask.device)[None, :, None, None]
    queries = places[:, None, :, None] if mask.shape[2] > 1 else batch.new_zeros(1, 1, 1, 1)
    return mask[batch, heads, queries, places[:, None, None, :]]


def _cut_blocks(mask, entries: Tensor, places: Tensor):
    from torch.nn.attention.flex_attention import create_block_mask

    inside = mask.mask_mod

    def mask_mod(batch, head, query, key):
        return inside(entries[batch], head, places[batch, query], places[batch, key])

    size = places.shape[1]
    return create_block_mask(mask_mod, len(places), mask.shape[1], size, size, places.device)
