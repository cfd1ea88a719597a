"""Lists of videos, read alike by both engines: a line has a path, a separator and a label."""

import re
from collections.abc import Iterator

from iopath.common.file_io import g_pathmgr

BYTE_ORDER_MARK = "\ufeff"  # some editors write it before UTF-8
UNLABELLED = -1  # in a list, and of a line without a label
_SEPARATED_OTHERWISE = re.compile(r"[\s,;|]\s*-?\d+$")


def read_labels(path: str, separator: str, num_classes: int) -> Iterator[tuple[str, int]]:
    """Video and label of each line of a list; ``UNLABELLED`` if a line has none.

    Raises:
        ValueError: naming the line that is ambiguous or has no valid label.
    """
    for number, line in read_lines(path):
        location = f"{path} line {number}"
        video, label = split_line(line, separator, location)
        yield video, read_label(label, num_classes, location)


def read_lines(path: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line of a file that is not empty.

    Raises:
        ValueError: if the file is not UTF-8.
    """
    with g_pathmgr.open(path, "r") as file:
        try:
            for number, line in enumerate(file, 1):
                if line := line.removeprefix(BYTE_ORDER_MARK if number == 1 else "").strip():
                    yield number, line
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def split_line(line: str, separator: str, location: str) -> tuple[str, str]:
    """Path and label of a line; without a label, ``"-1"``.

    Raises:
        ValueError: beginning with ``location``, for an ambiguous line.
    """
    fields = line.split(separator)
    if len(fields) == 3 and fields[1].strip() and not fields[1].strip().isdecimal():
        fields = line.rsplit(separator, 1)  # else "path number label", as SlowFast reads it
    if len(fields) > 3:
        raise ValueError(
            f"{location}: {line!r} has {len(fields)} fields: give path and label "
            f"with DATA.PATH_LABEL_SEPARATOR ({separator!r}) between and nowhere else"
        )
    if len(fields) == 1 and _SEPARATED_OTHERWISE.search(line):
        raise ValueError(
            f"{location}: {line!r} ends with a number, but not after DATA.PATH_LABEL_SEPARATOR, "
            f"which is {separator!r}: set it to the text before the label"
        )
    return fields[0], fields[-1] if len(fields) > 1 else str(UNLABELLED)


def read_label(text: str | int, num_classes: int, location: str) -> int:
    """A class, or ``UNLABELLED``.

    Raises:
        ValueError: beginning with ``location``, for anything else.
    """
    try:
        label = int(text) if isinstance(text, str) or type(text) is int else None
    except ValueError:
        label = None
    if label is None:
        raise ValueError(f"{location}: the label {text!r} is not a whole number")
    if label != UNLABELLED and not 0 <= label < num_classes:
        raise ValueError(
            f"{location}: the label is {label} but MODEL.NUM_CLASSES is {num_classes}, "
            f"so labels are 0 .. {num_classes - 1}: correct the key or the list"
        )
    return label
