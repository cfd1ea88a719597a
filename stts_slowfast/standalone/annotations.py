"""Lists of videos as SlowFast reads them (Kinetics, Something-Something v2), in packed arrays.

A list may have ten million entries, and every DataLoader worker has it: Python objects would take
some hundred bytes each, and be copied in every worker once their reference count changes.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from iopath.common.file_io import g_pathmgr

from stts_slowfast.video import list_lines
from stts_slowfast.video.accuracy import NO_LABEL
from stts_slowfast.video.list_lines import read_label, read_labels, read_lines

__all__ = ["NO_LABEL", "VideoList", "VideoRecord", "list_kinetics", "list_ssv2"]


class VideoRecord(NamedTuple):
    """A line of a list: a video file, or the image files of its frames; and its label."""

    path: str
    label: int
    frames: tuple[str, ...] = ()


class PackedStrings:
    """A sequence of strings in one array of bytes; ``folder`` is put before each."""

    def __init__(self, texts: Iterable[str], folder: str = ""):
        self.folder = folder
        data, ends = bytearray(), array("q", [0])
        for text in texts:
            data += text.encode()
            ends.append(len(data))
        self.data, self.ends = np.frombuffer(data, np.uint8), np.frombuffer(ends, np.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        text = self.data[self.ends[index] : self.ends[index + 1]].tobytes().decode()
        return os.path.join(self.folder, text) if self.folder else text


class VideoList:
    """The videos of a list, each a `VideoRecord` made on access.

    ``frames`` are the images of all videos in the order of the list; ``order`` holds their indices
    video after video, those of video i at ``order[bounds[i, 0] : bounds[i, 1]]``.
    """

    def __init__(self, paths: PackedStrings, labels: array, frames=None, order=None, bounds=None):
        self.paths, self.labels = paths, np.frombuffer(labels, np.int64)
        self.frames, self.order, self.bounds = frames, order, bounds

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> VideoRecord:
        index = range(len(self))[index]  # as a list counts, and raises
        frames = ()
        if self.frames is not None:
            start, end = self.bounds[index]
            frames = tuple(self.frames[number] for number in self.order[start:end])
        return VideoRecord(self.paths[index], int(self.labels[index]), frames)

    def digest(self) -> str:
        """SHA-256 of all entries, without the folder."""
        arrays = [self.paths.data, self.paths.ends, self.labels]
        if self.frames is not None:
            arrays += [self.frames.data, self.frames.ends, self.order, self.bounds]
        digest = hashlib.sha256()
        for values in arrays:
            digest.update(values.tobytes())
        return digest.hexdigest()


def list_kinetics(cfg, split: str) -> VideoList:
    """Reads ``{split}.csv``: a line ``path label`` for each video (``NO_LABEL`` if none, or -1).

    Raises:
        FileNotFoundError: if the list does not exist.
        ValueError: if DATA.PATH_TO_DATA_DIR or the separator is empty, or a line is malformed.
    """
    path = _data_file(cfg, f"{split}.csv", "a line 'path label' for each video")
    separator, labels = cfg.DATA.PATH_LABEL_SEPARATOR, array("q")
    if not separator:
        raise ValueError("DATA.PATH_LABEL_SEPARATOR is empty: set the separator before the label")

    def paths() -> Iterator[str]:
        for name, label in read_labels(path, separator, cfg.MODEL.NUM_CLASSES):
            labels.append(_unlabelled_as_ours(label))
            yield name

    return VideoList(PackedStrings(paths(), cfg.DATA.PATH_PREFIX), labels)


def list_ssv2(cfg, split: str) -> VideoList:
    """Reads the labels, ``something-something-v2-{train,validation}.json`` (a list of ``id`` and
    ``template``), and the frame list ``{train,val}.csv`` (a header, then
    ``original_vido_id video_id frame_id path labels``). Testing is on the validation set.

    Raises:
        FileNotFoundError: if one of the files does not exist.
        ValueError: if DATA.PATH_TO_DATA_DIR is empty, a file malformed, or a template unknown.
    """
    name = "train" if split == "train" else "validation"
    known = _read_json(cfg, "something-something-v2-labels.json", dict, "label numbers by template")
    videos = _read_json(cfg, f"something-something-v2-{name}.json", list, "videos' id and template")
    frames, owners, names = _frame_list(cfg, "train.csv" if split == "train" else "val.csv")
    ids, labels, kept = [], array("q"), []
    for number, video in enumerate(videos):
        both = [video.get(key) for key in ("id", "template")] if isinstance(video, dict) else []
        if not both or not all(isinstance(text, str) for text in both):
            raise ValueError(
                f"something-something-v2-{name}.json: entry {number} is {video!r}: "
                "give each video an id and a template, both strings"
            )
        template = video["template"].replace("[", "").replace("]", "")
        where = f"something-something-v2-{name}.json, video {video['id']}"
        if template not in known:
            raise ValueError(f"{where}: template {template!r} has no label in the labels file")
        label = _unlabelled_as_ours(read_label(known[template], cfg.MODEL.NUM_CLASSES, where))
        if video["id"] in names:
            ids.append(video["id"])
            labels.append(label)
            kept.append(names[video["id"]])
    order = np.argsort(owners, kind="stable").astype(np.int32)  # a video's frames as they came
    counts = np.bincount(owners, minlength=len(names))
    ends = np.cumsum(counts)
    bounds = np.stack([ends - counts, ends], 1)[np.array(kept, np.int64)]
    return VideoList(PackedStrings(ids), labels, frames, order, bounds)


def _frame_list(cfg, name: str) -> tuple[PackedStrings, np.ndarray, dict[str, int]]:
    """The images of a list; the index of each image's video; and the videos' indices by name."""
    path = _data_file(cfg, name, "the frame list that SlowFast's DATASET.md describes")
    owners, names = array("q"), {}

    def images() -> Iterator[str]:
        for number, line in read_lines(path):
            fields = line.split()
            if fields[0] == "original_vido_id":
                continue
            if len(fields) != 5:
                raise ValueError(
                    f"{path} line {number}: {line!r} has {len(fields)} fields: "
                    "expected original_vido_id video_id frame_id path labels"
                )
            owners.append(names.setdefault(fields[0], len(names)))
            yield fields[3]

    frames = PackedStrings(images(), cfg.DATA.PATH_PREFIX)
    return frames, np.frombuffer(owners, np.int64), names


def _data_file(cfg, name: str, content: str) -> str:
    folder = cfg.DATA.PATH_TO_DATA_DIR
    if not folder:
        raise ValueError(f"DATA.PATH_TO_DATA_DIR is empty: set it to the folder with {name}")
    path = os.path.join(folder, name)
    if not g_pathmgr.isfile(path):
        found = "which has no" if g_pathmgr.isdir(folder) else "which does not exist, so no"
        raise FileNotFoundError(
            f"DATA.PATH_TO_DATA_DIR is {folder!r}, {found} {name}: write {content} there"
        )
    return path


def _read_json(cfg, name: str, kind: type, content: str):
    path = _data_file(cfg, name, content)
    with g_pathmgr.open(path, "r") as file:
        try:
            found = json.loads(file.read().removeprefix(list_lines.BYTE_ORDER_MARK))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, kind):
        raise ValueError(
            f"{path} holds a {type(found).__name__}: write a {kind.__name__}, {content}"
        )
    return found


def _unlabelled_as_ours(label: int) -> int:
    return NO_LABEL if label == list_lines.UNLABELLED else label
