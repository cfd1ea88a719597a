"""`Stream`: the packets of an open file's video stream, and the frames that they decode to."""

import re
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import av

from stts_slowfast.video.ffmpeg_log import errors
from stts_slowfast.video.io import VideoError

# Codecs whose decoders, told so, pass over a packet that no other needs, and give all other frames
# as they would have. (VP9's do not pass over; AV1's lose frames; HEVC's take a picture for unneeded
# that a higher temporal layer may need.)
_CAN_SKIP = {"h264", "mpeg4", "mpeg2video", "mpeg1video"}
# What FFmpeg says of damage, after which it makes pixels up. It complains of more in whole files:
# of references that frames before a keyframe lack, for one.
_DAMAGE = re.compile("error while decoding|damaged|Error splitting|overread|no frame", re.I)


class Stream:
    """The video stream of ``file``, opened. All of it is called inside of `log.quiet`.

    Attributes:
        container, stream: PyAV's.
        num_decoded: frames that the decoder gave out so far.
        damage: what is wrong as far as was seen ("" if nothing is).
        spoilt: of what the decoder complained, if it did: later frames may show it.
    """

    def __init__(self, file: BinaryIO, name: str, threads: int):
        self.file, self.name, self.threads = file, name, threads
        self.num_decoded, self.damage, self.spoilt = 0, "", ""
        self.container = None

    def open(self) -> None:
        self.close()
        self.file.seek(0)
        self.container = av.open(self.file, "r", metadata_errors="ignore")
        streams = self.container.streams
        films = [each for each in streams.video if not _is_cover(each)]
        if not films:
            cover = ", only the cover picture of a sound file" if streams.video else ""
            raise VideoError(self.name, f"it has no video stream{cover}")
        best = streams.best("video")
        self.stream = best if best is not None and not _is_cover(best) else films[0]
        if self.stream.codec_context is None:
            raise VideoError(self.name, "this build of FFmpeg cannot decode its codec")
        self.stream.codec_context.thread_count = self.threads
        # Not by frames: PyAV 18 can hang where a decoder with frame threads is let go early.
        self.stream.thread_type = "SLICE" if self.threads != 1 else "NONE"

    def close(self) -> None:
        if self.container is not None:
            self.container.close()
            self.container = None

    @property
    def can_skip(self) -> bool:
        return self.stream.codec_context.name in _CAN_SKIP

    def packets(self) -> Iterator[av.Packet]:
        """All packets, from the first one on."""
        self.open()
        return self.container.demux(self.stream)

    def seek(self, time: int) -> Iterator[av.Packet] | None:
        """Packets from where the container takes ``time`` to be; None: it cannot seek."""
        try:
            self.container.seek(time, stream=self.stream)
        except av.FFmpegError:
            return None
        return self.container.demux(self.stream)

    def frames(self, packets: Iterable[av.Packet], wanted=None) -> Iterator[av.VideoFrame]:
        """Decoded frames; past a broken packet it continues. With ``wanted`` times, frames that
        neither are among them nor needed for others may be left out."""
        context = self.stream.codec_context
        skip = wanted is not None and self.can_skip
        for packet in packets:
            if skip:
                leave_out = packet.pts is not None and packet.pts not in wanted
                context.skip_frame = "NONREF" if leave_out else "DEFAULT"
            before, _ = errors()
            try:
                frames = packet.decode()
            except av.InvalidDataError as error:
                self._spoil(f"a packet cannot be decoded: {error.strerror}")
                continue
            count, last = errors()
            if count != before and _DAMAGE.search(last):
                self._spoil(f"the decoder says: {last.strip()}")
            for frame in frames:
                self.num_decoded += 1
                if frame.is_corrupt:
                    self._spoil("the decoder marks a frame as corrupt")
                yield frame

    def _spoil(self, damage: str) -> None:
        self.spoilt = self.spoilt or damage
        self.record_damage(damage)

    def record_damage(self, damage: str) -> None:
        self.damage = self.damage or damage


def _is_cover(stream) -> bool:
    kind = getattr(stream, "disposition", None)  # an enumeration, which PyAV 14.1 brought
    return kind is not None and bool(kind & type(kind).attached_pic)
