"""Value ranges of a config's keys: the table in ``slowfast_defaults.yaml``, and relations of keys.

A range is an interval in the usual notation, such as ``(0, 1]``, with ``whole`` before it one of
whole numbers; or a list of the values to choose from. In a mapping, ``each`` is the range of a
list's values, ``length`` how many it may have, ``ascending`` that they do not decrease, ``or`` one
more value; or ``rows`` has an interval for each item of a list's values, which are lists too.
"""

import itertools
import re
from collections.abc import Mapping

from stts_slowfast.configfiles.values import check_choice, flatten


def check_ranges(cfg: Mapping, ranges: Mapping) -> None:
    """Raises ``ValueError`` for the first key whose value is outside its range, with the range.

    Args:
        ranges: of keys by their full names. A key that the config does not have, and a value of
            None, which the key's type allows or not, pass.
    """
    values = dict(flatten(cfg))
    for key, range_of in ranges.items():
        if values.get(key) is not None:
            _check(key, values[key], range_of)


def _check(key: str, value, range_of) -> None:
    if isinstance(range_of, list):
        check_choice(key, value, range_of)
        return
    rules = range_of if isinstance(range_of, Mapping) else {"each": range_of}
    if "or" in rules and value == rules["or"]:
        return
    several = isinstance(value, (list, tuple))
    found = value if several else [value]
    if "rows" in rules:
        if not all(_is_row(each, rules["rows"]) for each in found):
            row = ", ".join(map(_as_text, rules["rows"]))
            raise ValueError(f"{key} is {list(value)!r}: it takes lists, each of [{row}]")
        return
    lengths = rules.get("length", [len(found)])
    fits = len(found) in lengths and all(_is_within(each, rules["each"]) for each in found)
    if rules.get("ascending") and fits:
        fits = all(a <= b for a, b in itertools.pairwise(found))
    if not fits:
        shown = list(value) if several else value
        raise ValueError(f"{key} is {shown!r}: {_described(rules, several)}")


def _is_row(value, intervals: list[str]) -> bool:
    fits = isinstance(value, (list, tuple)) and len(value) == len(intervals)
    return fits and all(map(_is_within, value, intervals))


_INTERVAL = re.compile(r"(whole )?([\[(])(\S+), (\S+)([\])])")


def _is_within(value, interval: str) -> bool:
    if interval == "text":
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    whole, start, low, high, end = _INTERVAL.fullmatch(interval).groups()
    if whole and not isinstance(value, int):
        return False
    above = value >= float(low) if start == "[" else value > float(low)
    below = value <= float(high) if end == "]" else value < float(high)
    return above and below


def _described(rules: Mapping, several: bool) -> str:
    one = _as_text(rules["each"])
    text = f"it must be {one}"
    if several:
        counts = " or ".join(map(str, rules["length"])) + " " if "length" in rules else ""
        order = ", in ascending order" if rules.get("ascending") else ""
        text = f"it takes {counts}values{order}, each {one}"
    return f"{text}; or {rules['or']}" if "or" in rules else text


def _as_text(interval: str) -> str:
    if interval == "text":
        return "a string"
    whole, start, low, high, end = _INTERVAL.fullmatch(interval).groups()
    words = f"at least {low}" if start == "[" else f"above {low}"
    if high != "inf":
        words += f" and {'at most' if end == ']' else 'below'} {high}"
    return f"a whole number {words}" if whole else words


# ---- keys that must fit each other ------------------------------------------------------------


def check_machines(cfg) -> None:
    """Raises ``ValueError`` for a shard number that the run does not have."""
    if cfg.SHARD_ID >= cfg.NUM_SHARDS:
        raise ValueError(
            f"SHARD_ID is {cfg.SHARD_ID} but NUM_SHARDS is {cfg.NUM_SHARDS}: shards count from 0"
        )


def check_patches(cfg) -> None:
    """Raises ``ValueError`` for patches of another number of dimensions than the model's input."""
    dims = 2 if cfg.MVIT.PATCH_2D else 3
    for name in ("PATCH_KERNEL", "PATCH_STRIDE", "PATCH_PADDING"):
        if len(cfg.MVIT[name]) != dims:
            raise ValueError(
                f"MVIT.{name} is {list(cfg.MVIT[name])}: it takes {dims} values, "
                f"as MVIT.PATCH_2D is {cfg.MVIT.PATCH_2D}"
            )


def check_solver(cfg) -> None:
    """Raises ``ValueError`` for a ``SOLVER`` node whose keys contradict each other."""
    solver = cfg.SOLVER
    if solver.LR_POLICY == "cosine":
        if solver.COSINE_END_LR >= solver.BASE_LR:
            raise ValueError(
                f"SOLVER.COSINE_END_LR is {solver.COSINE_END_LR:g}: it must be below "
                f"SOLVER.BASE_LR, which is {solver.BASE_LR:g}"
            )
        if solver.COSINE_AFTER_WARMUP and solver.WARMUP_EPOCHS >= solver.MAX_EPOCH:
            raise ValueError(
                f"SOLVER.WARMUP_EPOCHS is {solver.WARMUP_EPOCHS:g}: it must be below "
                f"SOLVER.MAX_EPOCH, which is {solver.MAX_EPOCH}"
            )
    elif not solver.STEPS or solver.STEPS[0] != 0 or len(solver.STEPS) != len(solver.LRS):
        raise ValueError(
            f"SOLVER.STEPS is {list(solver.STEPS)} and SOLVER.LRS is {list(solver.LRS)}: the steps "
            "begin with 0, and every step has a rate"
        )
    plain = solver.MOMENTUM == 0 or solver.DAMPENING != 0
    if solver.OPTIMIZING_METHOD == "sgd" and solver.NESTEROV and plain:
        raise ValueError(
            f"SOLVER.NESTEROV is True with SOLVER.MOMENTUM {solver.MOMENTUM:g} and "
            f"SOLVER.DAMPENING {solver.DAMPENING:g}: it needs momentum, and no dampening"
        )
