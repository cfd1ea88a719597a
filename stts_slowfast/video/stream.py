"""`Stream`: the packets of an open file's video stream, and the frames decoded from them."""

import re
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import av

from stts_slowfast.video.ffmpeg_log import errors
from stts_slowfast.video.io import VideoError

# Codecs whose decoders can skip packets that no other needs, without changing any other frame.
# (VP9's do not skip; AV1's lose frames; HEVC's skip pictures that a higher temporal layer needs.)
_CAN_SKIP = {"h264", "mpeg4", "mpeg2video", "mpeg1video"}
# FFmpeg's messages of damage, after which it invents pixels. It logs other errors for intact files
# too, such as missing references of frames before a keyframe.
_DAMAGE = re.compile("error while decoding|damaged|Error splitting|overread|no frame", re.I)


class Stream:
    """The video stream of ``file``, opened. All methods are called inside `ffmpeg_log.quiet`.

    Attributes:
        container, stream: PyAV's.
        num_decoded: frames decoded so far.
        damage: what is wrong with the file, as far as it was read ("" if nothing is).
        decode_error: the decoder's first error ("" if none): later frames may be damaged.
    """

    def __init__(self, file: BinaryIO, name: str, threads: int):
        self.file, self.name, self.threads = file, name, threads
        self.num_decoded, self.damage, self.decode_error = 0, "", ""
        self.container = None

    def open(self) -> None:
        self.close()
        self.file.seek(0)
        self.container = av.open(self.file, "r", metadata_errors="ignore")
        streams = self.container.streams
        videos = [each for each in streams.video if not _is_cover(each)]
        if not videos:
            cover = ", only the cover picture of a sound file" if streams.video else ""
            raise VideoError(self.name, f"it has no video stream{cover}")
        best = streams.best("video")
        self.stream = best if best is not None and not _is_cover(best) else videos[0]
        if self.stream.codec_context is None:
            raise VideoError(self.name, "this build of FFmpeg cannot decode its codec")
        self.stream.codec_context.thread_count = self.threads
        # Not by frames: PyAV 18 can hang if a decoder with frame threads is released early.
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
        """Packets from the container's position for ``time`` on; None if it cannot seek."""
        try:
            self.container.seek(time, stream=self.stream)
        except av.FFmpegError:
            return None
        return self.container.demux(self.stream)

    def frames(self, packets: Iterable[av.Packet], wanted=None) -> Iterator[av.VideoFrame]:
        """Decoded frames; continues after a broken packet. With ``wanted`` times, frames that are
        neither wanted nor needed for others may be skipped."""
        context = self.stream.codec_context
        skip = wanted is not None and self.can_skip
        for packet in packets:
            if skip:
                skippable = packet.pts is not None and packet.pts not in wanted
                context.skip_frame = "NONREF" if skippable else "DEFAULT"
            before, _ = errors()
            try:
                frames = packet.decode()
            except av.InvalidDataError as error:
                self._record_decode_error(f"a packet cannot be decoded: {error.strerror}")
                continue
            count, last = errors()
            if count != before and _DAMAGE.search(last):
                self._record_decode_error(f"the decoder says: {last.strip()}")
            for frame in frames:
                self.num_decoded += 1
                if frame.is_corrupt:
                    self._record_decode_error("the decoder marks a frame as corrupt")
                yield frame

    def _record_decode_error(self, damage: str) -> None:
        self.decode_error = self.decode_error or damage
        self.record_damage(damage)

    def record_damage(self, damage: str) -> None:
        self.damage = self.damage or damage


def _is_cover(stream) -> bool:
    disposition = getattr(stream, "disposition", None)  # since PyAV 14.1
    return disposition is not None and bool(disposition & type(disposition).attached_pic)
