"""Whether a file ends early: whether it holds less than it promises."""

import os
from typing import BinaryIO

from stts_slowfast.video.ffmpeg_log import errors
from stts_slowfast.video.stream import Stream


def ends_early(stream: Stream, count: int, last: int, edited: bool, errors_before: int) -> str:
    """Whether a file holds less than it promises: clearly less than the frames of its header, or
    at all less than the bytes of its parts."""
    file, name = stream.file, stream.container.format.name
    entries = getattr(stream.stream, "index_entries", None) or ()
    promised, there = stream.stream.frames, count
    if name == "avi":  # counts frames that were dropped, for which there are no packets
        there = max(count, last + 1)
    elif "mp4" in name and (entries or edited):  # of all frames, its index has those that play
        promised = len(entries)
    if promised and there < 0.98 * promised - 1:
        return f"it ends early: {count} of {promised} frames are there"
    number, said = errors()
    if number != errors_before and "ended prematurely" in said:  # Matroska's elements have sizes
        return "it ends early: in the middle of what its header promises"
    size = file_size(file)
    where = file.tell()
    torn = _is_torn(name, file, size)
    file.seek(where)  # where the container left it
    if torn or any(entry.pos + entry.size > size for entry in entries):
        return f"it ends early: its last part goes on beyond its {size} bytes"
    return ""


def file_size(file: BinaryIO) -> int:
    where, size = file.tell(), file.seek(0, os.SEEK_END)
    file.seek(where)  # where the container left it
    return size


def _is_torn(name: str, file: BinaryIO, size: int) -> bool:
    """Whether the last chunk of an AVI, or the last packet of a transport stream, is not whole."""
    end = 0
    if name == "mpegts":
        file.seek(max(size - 3 * 204, 0))
        tail = file.read()
        # The byte that begins a packet; of 192, the first four are a time.
        ends = (tail[-first::-length][:3] for first, length in ((188, 188), (188, 192), (204, 204)))
        return b"GGG" not in ends
    while name == "avi" and end < size:
        file.seek(end)
        kind, length = file.read(4), file.read(4)
        if kind != b"RIFF":
            return False
        end += 8 + int.from_bytes(length, "little")
    return end > size
