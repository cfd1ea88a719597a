"""What values a config's keys may have: the table in ``slowfast_keys.yaml``, and what links keys.

A range is an interval in the usual notation, such as ``(0, 1]``, or a list of the values to choose
from; in a mapping, ``each`` is that of a list's values, ``length`` how many it may have,
``ascending`` that they do not fall, ``or`` one more value.
"""

import itertools
import re
from collections.abc import Mapping

from stts_slowfast.keys import check_choice, leaves


def check_ranges(cfg: Mapping, ranges: Mapping) -> None:
    """Raises ``ValueError`` for the first key whose value lies outside its range, with the range.

    Args:
        ranges: of keys by their full names. A key that the config does not have, and a value of
            None, which the key's type allows or not, pass.
    """
    values = dict(leaves(cfg))
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
    lengths = rules.get("length", [len(found)])
    fits = len(found) in lengths and all(_lies_in(each, rules["each"]) for each in found)
    if rules.get("ascending") and fits:
        fits = all(a <= b for a, b in itertools.pairwise(found))
    if not fits:
        shown = list(value) if several else value
        raise ValueError(f"{key} is {shown!r}: {_described(rules, several)}")


_INTERVAL = re.compile(r"([\[(])(\S+), (\S+)([\])])")


def _lies_in(value, interval: str) -> bool:
    if interval == "text":
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    start, low, high, end = _INTERVAL.fullmatch(interval).groups()
    above = value >= float(low) if start == "[" else value > float(low)
    below = value <= float(high) if end == "]" else value < float(high)
    return above and below


def _described(rules: Mapping, several: bool) -> str:
    one = _in_words(rules["each"])
    text = f"it must be {one}"
    if several:
        counts = " or ".join(map(str, rules["length"])) + " " if "length" in rules else ""
        order = ", in ascending order" if rules.get("ascending") else ""
        text = f"it takes {counts}values{order}, each {one}"
    return f"{text}; or {rules['or']}" if "or" in rules else text


def _in_words(interval: str) -> str:
    if interval == "text":
        return "a text"
    start, low, high, end = _INTERVAL.fullmatch(interval).groups()
    if (low, high) == ("-inf", "inf"):
        return "a finite number"
    words = f"at least {low}" if start == "[" else f"above {low}"
    if high == "inf":
        return words
    return f"{words} and {'at most' if end == ']' else 'below'} {high}"


# ---- keys that must fit each other ------------------------------------------------------------


def check_machines(cfg) -> None:
    """Raises ``ValueError`` for a shard that is none of the run's."""
    if cfg.SHARD_ID >= cfg.NUM_SHARDS:
        raise ValueError(
            f"SHARD_ID is {cfg.SHARD_ID} but NUM_SHARDS is {cfg.NUM_SHARDS}: shards count from 0"
        )


def check_solver(cfg) -> None:
    """Raises ``ValueError`` for a ``SOLVER`` node that no training can follow."""
    solver = cfg.SOLVER
    if solver.LR_POLICY == "cosine":
        if solver.COSINE_END_LR >= solver.BASE_LR:
            raise ValueError(
                f"SOLVER.COSINE_END_LR is {solver.COSINE_END_LR:g}: it must lie below "
                f"SOLVER.BASE_LR, which is {solver.BASE_LR:g}"
            )
        if solver.COSINE_AFTER_WARMUP and solver.WARMUP_EPOCHS >= solver.MAX_EPOCH:
            raise ValueError(
                f"SOLVER.WARMUP_EPOCHS is {solver.WARMUP_EPOCHS:g}: it must lie below "
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
