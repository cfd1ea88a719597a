"""Videos without labels, from a folder or a list, instead of a dataset's lists."""

import os
from array import array
from collections.abc import Sequence

from stts_slowfast.standalone.annotations import NO_LABEL, PackedStrings, VideoList
from stts_slowfast.video import open_video, segment_indices
from stts_slowfast.video.list_lines import read_lines, split_line

# Of video files in a folder; a list may name files with any ending.
ENDINGS = (
    *(".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
    *(".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)


def find_films(cfg, path: str) -> list[str]:
    """The videos of a folder, with those in folders below it, in the order of their paths; or of a
    list, whose lines are as in a dataset's list: a path after DATA.PATH_PREFIX, and a label that is
    not used.

    Raises:
        FileNotFoundError: if the folder, the list or a video of the list does not exist.
        ValueError: if there is no video, a line is ambiguous, or the list is a video.
    """
    if os.path.isdir(path):
        found = sorted(
            os.path.join(folder, name)
            for folder, _, names in os.walk(path)
            for name in names
            if name.lower().endswith(ENDINGS)
        )
        if not found:
            raise ValueError(f"{path} has no videos: their names end in {', '.join(ENDINGS)}")
        return found
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path} does not exist: give a folder of videos, or a list of them"
        )
    if path.lower().endswith(ENDINGS):
        raise ValueError(f"{path} is a video: give a folder of videos, or a list of them")
    separator = cfg.DATA.PATH_LABEL_SEPARATOR
    found = [
        os.path.join(cfg.DATA.PATH_PREFIX, split_line(line, separator, f"{path} line {number}")[0])
        for number, line in read_lines(path)
    ]
    if not found:
        raise ValueError(f"{path} names no videos: give one in each line")
    lost = [video for video in found if not os.path.exists(video)]
    if lost:
        raise FileNotFoundError(
            f"{len(lost)} of the {len(found)} videos of {path} do not exist, such as {lost[0]}: "
            f"is DATA.PATH_PREFIX ({cfg.DATA.PATH_PREFIX!r}) right?"
        )
    return found


def unlabelled(paths: Sequence[str]) -> VideoList:
    """A list of videos without labels."""
    return VideoList(PackedStrings(paths), array("q", [NO_LABEL] * len(paths)))


def read_segments(cfg, path: str, split: str, short_side: int, rng):
    """A frame of each segment of a video file, BGR as `data.read_ssv2` reads image files.

    Returns:
        The images (H, W, 3) uint8, each once; the indices of the clip's frames among them; and what
        is damaged ("" if nothing is).
    """
    with open_video(path, threads=1, rotate=cfg.DATA.ROTATE) as video:
        frames = segment_indices(video.num_frames, cfg.DATA.NUM_FRAMES, split == "train", rng)
        wanted = sorted(set(frames))
        images = [image[..., ::-1] for image in video.iter_frames(wanted, short_side)]
        return images, [wanted.index(frame) for frame in frames], video.damage
