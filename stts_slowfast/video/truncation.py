"""Whether a file is truncated: shorter than its header declares."""

import os
from typing import BinaryIO

from stts_slowfast.video.ffmpeg_log import errors
from stts_slowfast.video.stream import Stream


def ends_early(stream: Stream, count: int, last: int, edited: bool, errors_before: int) -> str:
    """How a file is truncated ("" if it is not): clearly fewer frames than its header declares, or
    any byte less than the sizes of its parts.

    Args:
        stream: the file's stream, of which all packets were read.
        count: its packets.
        last: the decoding time of the last one.
        edited: whether an edit list discards some.
        errors_before: FFmpeg's errors before the packets were read.
    """
    file, name = stream.file, stream.container.format.name
    entries = getattr(stream.stream, "index_entries", None) or ()
    declared, found = stream.stream.frames, count
    if name == "avi":  # counts frames that were dropped, for which there are no packets
        found = max(count, last + 1)
    elif "mp4" in name and (entries or edited):  # of all frames, its index has those that play
        declared = len(entries)
    if declared and found < 0.98 * declared - 1:
        return f"it ends early: only {count} of {declared} frames are present"
    number, message = errors()
    if number != errors_before and "ended prematurely" in message:  # Matroska's elements have sizes
        return "it ends early: before the size that its header declares"
    size = file_size(file)
    before = file.tell()
    torn = _is_torn(name, file, size)
    file.seek(before)  # the container reads on from there
    if torn or any(entry.pos + entry.size > size for entry in entries):
        return f"it ends early: its last chunk is longer than the file, {size} bytes"
    return ""


def file_size(file: BinaryIO) -> int:
    """Bytes of an open file, whose position stays."""
    before, size = file.tell(), file.seek(0, os.SEEK_END)
    file.seek(before)  # the container reads on from there
    return size


def _is_torn(name: str, file: BinaryIO, size: int) -> bool:
    """Whether the last chunk of an AVI, or the last packet of a transport stream, is incomplete."""
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
