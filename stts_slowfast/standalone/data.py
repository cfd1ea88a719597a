"""Kinetics and Something-Something v2, from the lists that SlowFast reads to mini-batches of clips.

``build_loader(cfg, split)`` gives batches ``(clips, labels, video_index, view_index)``: clips
(B, 3, T, H, W) float32, and three (B,) long. A video that cannot be read is replaced by another in
training and validation; in testing it comes as a clip of zeros with the label ``UNREADABLE``.
"""

import json
import logging
import os
import random
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from iopath.common.file_io import g_pathmgr
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from stts_slowfast.standalone.transforms import (
    batch_mixer,
    train_transform,
    view_scale,
    view_transform,
)
from stts_slowfast.video import (
    Video,
    VideoError,
    clip_size,
    clip_span,
    frame_indices,
    segment_indices,
)

__all__ = ["UNREADABLE", "ClipDataset", "batch_mixer", "build_loader"]

logger = logging.getLogger(__name__)

# The label of a test video that cannot be read: no prediction equals it, so it counts as wrong.
UNREADABLE = -1
# SlowFast tries 100 videos before it gives up; so many broken ones in a row are no accident.
_NUM_RETRIES = 10


class Entry(NamedTuple):
    """A line of a list: a video file, or the image files of its frames; and its label."""

    path: str
    label: int
    frames: tuple[str, ...] = ()


# ---- lists ----------------------------------------------------------------------------------


def list_kinetics(cfg, split: str) -> list[Entry]:
    """Reads ``{split}.csv``: a line ``path label`` for each video (label 0 where there is none)."""
    path = _data_file(cfg, f"{split}.csv", "a line 'path label' for each video")
    separator = cfg.DATA.PATH_LABEL_SEPARATOR
    entries = []
    for number, line in _lines(path):
        fields = line.split(separator)
        if len(fields) > 3:
            raise ValueError(
                f"{path} line {number}: {line!r} has {len(fields)} fields: give path and label "
                f"with DATA.PATH_LABEL_SEPARATOR ({separator!r}) between them and nowhere else"
            )
        label = _label(cfg, fields[-1] if len(fields) > 1 else "0", f"{path} line {number}")
        entries.append(Entry(os.path.join(cfg.DATA.PATH_PREFIX, fields[0]), label))
    return entries


def list_ssv2(cfg, split: str) -> list[Entry]:
    """Reads the labels, ``something-something-v2-{train,validation}.json`` (a list of ``id`` and
    ``template``), and the frame list ``{train,val}.csv`` (a header, then
    ``original_vido_id video_id frame_id path labels``). Testing is on the validation set."""
    name = "train" if split == "train" else "validation"
    labels = _read_json(cfg, "something-something-v2-labels.json", "label numbers by template")
    videos = _read_json(cfg, f"something-something-v2-{name}.json", "id and template of videos")
    frames = _frame_lists(cfg, "train.csv" if split == "train" else "val.csv")
    entries = []
    for number, video in enumerate(videos):
        if not isinstance(video, dict) or not {"id", "template"} <= video.keys():
            raise ValueError(
                f"something-something-v2-{name}.json: entry {number} is {video!r}: "
                "give each video an id and a template"
            )
        template = video["template"].replace("[", "").replace("]", "")
        where = f"something-something-v2-{name}.json, video {video['id']}"
        if template not in labels:
            raise ValueError(f"{where}: template {template!r} has no label in the labels file")
        label = _label(cfg, labels[template], where)
        if video["id"] in frames:
            entries.append(Entry(video["id"], label, tuple(frames[video["id"]])))
    return entries


def _frame_lists(cfg, name: str) -> dict[str, list[str]]:
    path = _data_file(cfg, name, "the frame list that SlowFast's DATASET.md describes")
    frames = defaultdict(list)
    for number, line in _lines(path):
        fields = line.split()
        if fields[0] == "original_vido_id":
            continue
        if len(fields) != 5:
            raise ValueError(
                f"{path} line {number}: {line!r} has {len(fields)} fields: "
                "expected original_vido_id video_id frame_id path labels"
            )
        frames[fields[0]].append(os.path.join(cfg.DATA.PATH_PREFIX, fields[3]))
    return frames


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


def _lines(path: str) -> list[tuple[int, str]]:
    """Number and text of the lines that are not empty."""
    with g_pathmgr.open(path, "r") as file:
        try:
            return [(n, line.strip()) for n, line in enumerate(file, 1) if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _read_json(cfg, name: str, content: str):
    path = _data_file(cfg, name, content)
    with g_pathmgr.open(path, "r") as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error


def _label(cfg, text: str | int, where: str) -> int:
    try:
        label = int(text)
    except ValueError:
        raise ValueError(f"{where}: the label {text!r} is not a whole number") from None
    if not 0 <= label < cfg.MODEL.NUM_CLASSES:
        raise ValueError(
            f"{where}: the label is {label} but MODEL.NUM_CLASSES is {cfg.MODEL.NUM_CLASSES}, "
            f"so labels are 0 .. {cfg.MODEL.NUM_CLASSES - 1}: mend the key or the list"
        )
    return label


# ---- clips ----------------------------------------------------------------------------------


def read_kinetics(cfg, entry: Entry, split: str, view: int, short_side: int) -> torch.Tensor:
    """Frames (T, H, W, 3) uint8 of a video file: a random clip, or in testing view ``view``."""
    target_fps = float(cfg.DATA.TARGET_FPS)
    if split == "train" and cfg.DATA.TRAIN_JITTER_FPS > 0:
        target_fps += random.uniform(0, cfg.DATA.TRAIN_JITTER_FPS)
    threads = 0 if cfg.DATA_LOADER.ENABLE_MULTI_THREAD_DECODE else 1
    with Video(entry.path, threads=threads) as video:
        size = clip_size(cfg.DATA.NUM_FRAMES, cfg.DATA.SAMPLING_RATE, video.fps, target_fps)
        start, end = clip_span(
            video.num_frames,
            size,
            view if split == "test" else -1,
            cfg.TEST.NUM_ENSEMBLE_VIEWS,
            cfg.DATA.USE_OFFSET_SAMPLING,
        )
        indices = frame_indices(start, end, cfg.DATA.NUM_FRAMES, video.num_frames)
        return video.decode(indices, short_side)


def read_ssv2(cfg, entry: Entry, split: str, view: int, short_side: int) -> torch.Tensor:
    """Frames (T, H, W, 3) uint8 from image files, one of each segment of the video. BGR, as
    SlowFast reads them: its SSv2 configs set DATA.REVERSE_INPUT_CHANNEL to get RGB."""
    indices = segment_indices(len(entry.frames), cfg.DATA.NUM_FRAMES, split == "train")
    images = {index: _read_image(entry.frames[index]) for index in sorted(set(indices))}
    return torch.stack([images[index] for index in indices]).flip(-1)


def _read_image(path: str) -> torch.Tensor:
    try:
        with g_pathmgr.open(path, "rb") as file:
            return torch.from_numpy(np.array(Image.open(file).convert("RGB")))
    except (OSError, SyntaxError, ValueError) as error:  # what PIL raises on broken images
        reason = getattr(error, "strerror", None) or "it is no image, or a broken one"
        raise VideoError(path, reason) from error


# What stands in TRAIN.DATASET and TEST.DATASET: how to list videos, and how to read a clip.
DATASETS: dict[str, tuple[Callable, Callable]] = {
    "kinetics": (list_kinetics, read_kinetics),
    "ssv2": (list_ssv2, read_ssv2),
}


class ClipDataset(Dataset):
    """Clips of the ``split`` ("train", "val" or "test") that ``cfg`` describes.

    An item is one decoded video as (clips (S, 3, T, H, W) float32, labels (S,), video_index (S,),
    view_index (S,)): S = AUG.NUM_SAMPLE differently augmented clips in training, else 1. In testing
    there is an item for every view: ``view_index // NUM_SPATIAL_CROPS`` says which clip in time,
    the rest which crop.
    """

    def __init__(self, cfg, split: str):
        name = (cfg.TEST if split == "test" else cfg.TRAIN).DATASET
        key = f"{'TEST' if split == 'test' else 'TRAIN'}.DATASET"
        if name.lower() not in DATASETS:
            raise ValueError(f"{key} is {name!r}: use one of {sorted(DATASETS)}")
        list_videos, self.read = DATASETS[name.lower()]
        self.cfg, self.split = cfg, split
        self.videos: list[Entry] = list_videos(cfg, split)
        if not self.videos:
            raise ValueError(
                f"the {split} list in DATA.PATH_TO_DATA_DIR {cfg.DATA.PATH_TO_DATA_DIR!r} "
                "names no videos"
            )
        if split == "test":
            self.num_views = cfg.TEST.NUM_ENSEMBLE_VIEWS * cfg.TEST.NUM_SPATIAL_CROPS
            self.transforms = _test_transforms(cfg)
            self.short_side = view_scale(cfg)
        else:
            self.num_views = 1
            self.transforms = [train_transform(cfg, split)]
            self.short_side = cfg.DATA.TRAIN_JITTER_SCALES[0]
        self.num_samples = cfg.AUG.NUM_SAMPLE if split == "train" else 1
        # Which videos were warned about; in shared memory, as workers live for an epoch.
        self._warned = torch.zeros(len(self.videos), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.videos) * self.num_views

    def __getitem__(self, item: int):
        index, view = divmod(item, self.num_views)
        for _ in range(1 if self.split == "test" else _NUM_RETRIES):
            try:
                frames = self._read(index, view)
                return self._item(frames, self.videos[index].label, index, view)
            except VideoError as error:
                self._warn(error, index)
                last = error
            if self.split != "test":
                index = random.randrange(len(self.videos))
        if self.split == "test":
            return self._item(self._blank(), UNREADABLE, index, view)
        raise VideoError(
            last.name,
            f"{last.reason}; so were {_NUM_RETRIES - 1} other videos of the {self.split} list. "
            f"Is DATA.PATH_PREFIX ({self.cfg.DATA.PATH_PREFIX!r}) right?",
        )

    def _read(self, index: int, view: int) -> torch.Tensor:
        """(T, 3, H, W) uint8"""
        clip = view // self.cfg.TEST.NUM_SPATIAL_CROPS
        frames = self.read(self.cfg, self.videos[index], self.split, clip, self.short_side)
        return frames.permute(0, 3, 1, 2)

    def _item(self, frames: torch.Tensor, label: int, index: int, view: int):
        transform = self.transforms[view % len(self.transforms)]
        clips = torch.stack([transform(frames) for _ in range(self.num_samples)])
        numbers = torch.tensor([[label], [index], [view]]).expand(3, self.num_samples)
        return clips, *numbers

    def _blank(self) -> torch.Tensor:
        side = self.short_side
        return torch.zeros(self.cfg.DATA.NUM_FRAMES, 3, side, side, dtype=torch.uint8)

    def _warn(self, error: VideoError, index: int) -> None:
        if not self._warned[index]:
            self._warned[index] = True
            fate = "counts as wrong" if self.split == "test" else "another one takes its place"
            logger.warning("%s; %s", error, fate)


def _test_transforms(cfg) -> list[Callable]:
    crops = cfg.TEST.NUM_SPATIAL_CROPS
    if not 1 <= crops <= 3:
        raise ValueError(f"TEST.NUM_SPATIAL_CROPS is {crops}: use 1 (centre), 2 or 3")
    return [view_transform(cfg, position) for position in ([1] if crops == 1 else range(crops))]


# ---- mini-batches ---------------------------------------------------------------------------


def build_loader(cfg, split: str) -> DataLoader:
    """Batches ``(clips, labels, video_index, view_index)`` of a split, as the head of this file
    says; TRAIN.BATCH_SIZE / NUM_GPUS videos each (TEST.BATCH_SIZE in testing).

    Training shuffles and drops what does not fill a batch. Order and augmentation follow
    RNG_SEED. Where several processes train, the caller puts a DistributedSampler in.
    """
    dataset = ClipDataset(cfg, split)
    node, key = (cfg.TEST, "TEST") if split == "test" else (cfg.TRAIN, "TRAIN")
    batch_size = int(node.BATCH_SIZE / max(1, cfg.NUM_GPUS))
    if batch_size < 1:
        raise ValueError(
            f"{key}.BATCH_SIZE is {node.BATCH_SIZE} but NUM_GPUS is {cfg.NUM_GPUS}: "
            "give every GPU one video at least"
        )
    train = split == "train"
    if train and len(dataset) < batch_size:
        raise ValueError(
            f"TRAIN.BATCH_SIZE is {node.BATCH_SIZE}, {batch_size} per GPU, but the train list has "
            f"{len(dataset)} videos: not one batch can be filled"
        )
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=train,
        drop_last=train,
        num_workers=cfg.DATA_LOADER.NUM_WORKERS,
        pin_memory=cfg.DATA_LOADER.PIN_MEMORY and torch.cuda.is_available(),
        persistent_workers=split != "test" and cfg.DATA_LOADER.NUM_WORKERS > 0,
        generator=torch.Generator().manual_seed(cfg.RNG_SEED + rank),
        collate_fn=_collate,
    )


def _collate(items):
    """Joins the samples of all items: (B * S, ...)."""
    return tuple(torch.cat(parts) for parts in zip(*items))
