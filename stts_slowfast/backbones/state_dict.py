"""Helpers for renaming state dicts, and the names of the STTS authors' scorers."""

import re
from collections.abc import Sequence

from torch import Tensor

State = dict[str, Tensor]


def has(state: State, pattern: str) -> bool:
    """Whether a name in ``state`` begins with the regular expression."""
    return any(re.match(pattern, key) for key in state)


def patches_are(state: State, dims: int) -> bool:
    """Whether the patch embedding's weight has ``dims`` dimensions: 4 for images, 5 for clips."""
    weight = state.get("patch_embed.proj.weight", state.get("model.patch_embed.proj.weight"))
    return weight is not None and weight.dim() == dims


def without_prefix(state: State, prefix: str) -> State:
    """``state`` with ``prefix`` removed from its names."""
    return {key.removeprefix(prefix): value for key, value in state.items()}


_BLOCK = re.compile(r"^blocks\.(\d+)\.")


def replace_prefix(key: str, prefixes: dict[str, str]) -> str:
    """Replaces the prefix of ``key``, after ``blocks.N.`` if it has that."""
    match = _BLOCK.match(key)
    block = match.group() if match else ""
    rest = key.removeprefix(block)
    for old, new in prefixes.items():
        if rest.startswith(old):
            return block + new + rest.removeprefix(old)
    return key


def swapped(names: dict[str, str]) -> dict[str, str]:
    """The inverse of a table of names."""
    return {new: old for old, new in names.items()}


def layer_of(name: str, depth: int) -> int:
    """A parameter's layer: 0 before the blocks, 1 to ``depth`` in them, ``depth + 1`` after."""
    if match := _BLOCK.match(name):
        return int(match.group(1)) + 1
    before = name.startswith(("pos_embed", "time_embed", "patch_embed"))
    return 0 if before or name in ("cls_token", "mask_token") else depth + 1


# --- the STTS authors' score predictors ---------------------------------------------------------

AUTHORS_SCORER = re.compile(
    r"^(time|space)_score_predictor\.(\d+)\.score_network\.(in_conv|out_conv)\.(.+)$"
)
_OUR_SCORER = re.compile(r"^stts\.((time|space)_\d+)\.scorer\.network\.(embed|score)\.(.+)$")
_SCORER_PARTS = {"in_conv": "embed", "out_conv": "score"}
HAS_AUTHORS_SCORER = r"(backbone\.)?(time|space)_score_predictor\."


def selectors_from_authors(state: State, selectors: Sequence[str]) -> State:
    """The authors' ``{time,space}_score_predictor.{n}`` under our selectors' names.

    Args:
        state: parameters.
        selectors: the model's selectors, such as ``["time_0", "space_4"]``: ``n`` counts the
            selections of a dimension in order, our names have the block.
    """

    def ours(key: str) -> str:
        if not (match := AUTHORS_SCORER.match(key)):
            return key
        dimension, number, part, rest = match.groups()
        names = [name for name in selectors if name.startswith(f"{dimension}_")]
        if int(number) >= len(names):
            return key
        return f"stts.{names[int(number)]}.scorer.network.{_SCORER_PARTS[part]}.{rest}"

    return {ours(key): value for key, value in state.items()}


def selectors_to_authors(state: State) -> State:
    """The inverse of :func:`selectors_from_authors`.

    Raises:
        ValueError: for scorers of single tokens, which the authors' code does not have.
    """
    if tokens := [key for key in state if key.startswith("stts.tokens_")]:
        raise ValueError(
            f"the authors' form has scorers of frames and windows, and none of tokens: {tokens[0]}"
        )
    parts = swapped(_SCORER_PARTS)
    names = list(dict.fromkeys(m.group(1) for m in map(_OUR_SCORER.match, state) if m))

    def theirs(key: str) -> str:
        if not (match := _OUR_SCORER.match(key)):
            return key
        name, dimension, part, rest = match.groups()
        number = [other for other in names if other.startswith(dimension)].index(name)
        return f"{dimension}_score_predictor.{number}.score_network.{parts[part]}.{rest}"

    return {theirs(key): value for key, value in state.items()}
