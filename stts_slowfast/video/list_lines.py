"""A line of a list of videos: a path and its label, with a separator between."""

import re
from collections.abc import Iterator
from typing import TextIO

MARK = "\ufeff"  # what editors put before UTF-8, the byte-order mark
NO_LABEL = -1  # in a list; what a line without a label has too
_SEPARATED_OTHERWISE = re.compile(r"[\s,;|]\s*-?\d+$")


def numbered(file: TextIO) -> Iterator[tuple[int, str]]:
    """Number and text of the lines of a list that are not empty."""
    for number, line in enumerate(file, 1):
        if line := line.removeprefix(MARK if number == 1 else "").strip():
            yield number, line


def split_line(line: str, separator: str, where: str) -> tuple[str, str]:
    """Path and label of a line; where it has none, the label is ``"-1"``.

    Raises:
        ValueError: beginning with ``where``, for a line that may be meant otherwise.
    """
    fields = line.split(separator)
    if len(fields) == 3 and fields[1].strip() and not fields[1].strip().isdecimal():
        fields = line.rsplit(separator, 1)  # else "path number label", as SlowFast reads it
    if len(fields) > 3:
        raise ValueError(
            f"{where}: {line!r} has {len(fields)} fields: give path and label "
            f"with DATA.PATH_LABEL_SEPARATOR ({separator!r}) between and nowhere else"
        )
    if len(fields) == 1 and _SEPARATED_OTHERWISE.search(line):
        raise ValueError(
            f"{where}: {line!r} ends with a number, but not behind DATA.PATH_LABEL_SEPARATOR, "
            f"which is {separator!r}: set it to what stands before the label"
        )
    return fields[0], fields[-1] if len(fields) > 1 else str(NO_LABEL)


def read_label(text: str | int, num_classes: int, where: str) -> int:
    """A class, or ``NO_LABEL``.

    Raises:
        ValueError: beginning with ``where``, for what is neither.
    """
    try:
        label = int(text) if isinstance(text, str) or type(text) is int else None
    except ValueError:
        label = None
    if label is None:
        raise ValueError(f"{where}: the label {text!r} is not a whole number")
    if label != NO_LABEL and not 0 <= label < num_classes:
        raise ValueError(
            f"{where}: the label is {label} but MODEL.NUM_CLASSES is {num_classes}, "
            f"so labels are 0 .. {num_classes - 1}: mend the key or the list"
        )
    return label
