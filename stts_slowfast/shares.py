"""Shares that are kept, by block: read from a node of ``STTS``, and checked."""

import math
from collections.abc import Mapping
from typing import Any

from fvcore.common.config import CfgNode

from stts_slowfast.budgets import Share
from stts_slowfast.configfiles.values import check_choice

RESTS = ("drop", "merge")  # of STTS.TOKENS.REST


def read_shares(key: str, node: CfgNode) -> dict[int, Share]:
    """Shares by block, of the node of a dimension."""
    for leaf in ("BLOCKS", "KEEP"):
        if not isinstance(node[leaf], (list, tuple)):
            raise ValueError(f"{key}.{leaf} is {node[leaf]!r}: give a list")
    blocks, keep = list(node.BLOCKS), list(node.KEEP)
    if blocks and len(blocks) != len(keep):
        raise ValueError(
            f"{key}.KEEP has {len(keep)} values but {key}.BLOCKS has {len(blocks)}: "
            "give one share per block; a range is a list in it, [[0.25, 0.9]]"
        )
    for block in blocks:
        if isinstance(block, bool) or not isinstance(block, int):
            raise ValueError(f"{key}.BLOCKS names block {block!r}: give whole numbers")
        if blocks.count(block) > 1:
            raise ValueError(f"{key}.BLOCKS is {blocks}: name each block once")
    return dict(zip(blocks, keep))


def check_shares(key: str, shares: Mapping[int, Share], num_blocks: int) -> None:
    """Raises ``ValueError`` for a block that the model lacks, or a share that cannot be kept."""
    for block, share in shares.items():
        if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < num_blocks:
            raise ValueError(
                f"{key}.BLOCKS names block {block!r}: the model's blocks are 0 to {num_blocks - 1}"
            )
        pair = share if isinstance(share, (list, tuple)) else (share, share)
        numbers = len(pair) == 2 and all(map(is_number, pair))
        if not numbers or not 0 < pair[0] <= pair[1] <= 1:
            raise ValueError(
                f"{key}.KEEP holds {share!r}: a share is above 0 and at most 1; a range of shares "
                "is [low, high]"
            )


def check_order(
    time: Mapping[int, Share], space: Mapping[int, Share], tokens: Mapping[int, Share], scorer: str
) -> None:
    """Raises ``ValueError`` if a grid is needed behind the first selection of single tokens."""
    first = min(tokens, default=math.inf)
    for dimension, shares in (("TIME", time), ("SPACE", space)):
        if late := sorted(block for block in shares if block > first):
            raise ValueError(
                f"STTS.{dimension}.BLOCKS names block {late[0]}, behind the selection of single "
                f"tokens before block {first}, after which tokens make no grid: name blocks up to "
                f"{first}, or select only tokens from there on (STTS.TOKENS)"
            )
    if len(tokens) > 1 and scorer == "change":
        raise ValueError(
            "STTS.TOKENS.SCORER is change, which compares whole frames, but STTS.TOKENS.BLOCKS is "
            f"{sorted(tokens)}: after the first of these blocks frames have holes; name one block, "
            "or give another scorer"
        )


def check_rest(rest: str, tokens: Mapping[int, Share], teacher: str) -> None:
    """Raises ``ValueError`` for an unknown use of the tokens that are not kept, or if they would be
    merged into mixtures."""
    check_choice("STTS.TOKENS.REST", rest, RESTS)
    if tokens and (rest, teacher) == ("merge", "mixture"):
        raise ValueError(
            "STTS.TOKENS.REST is merge, but STTS.TEACHER is mixture: in training tokens would be "
            "mixtures, into which none can be merged; set STTS.TEACHER saliency, or "
            "STTS.TOKENS.REST drop"
        )


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
