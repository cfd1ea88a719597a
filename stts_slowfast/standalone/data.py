"""Datasets of Kinetics and Something-Something v2: from lists to mini-batches of clips.

``build_loader(cfg, split)`` gives batches ``(clips, labels, video_index, view_index)``: clips
(B, 3, T, H, W), and three (B,) long. Clips are uint8 pixels if possible, else normalised float32;
``normalize_clips(clips, cfg)`` makes either the input of a model, on any device. A video
that cannot be read is replaced by another in training and validation; in testing its views are
zeros with the label ``UNREADABLE``. ``loader.bad`` counts them.
"""

import contextlib
import functools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset

from stts_slowfast.configfiles.values import check_choice
from stts_slowfast.standalone.annotations import (
    NO_LABEL,
    VideoList,
    VideoRecord,
    list_kinetics,
    list_ssv2,
)
from stts_slowfast.standalone.epoch_sampler import EpochSampler
from stts_slowfast.standalone.films import read_segments
from stts_slowfast.standalone.signals import worker_init
from stts_slowfast.standalone.transforms import (
    decode_short_side,
    make_test_views,
    normalize_clips,
    stack_frames,
    test_crops,
    train_transform,
    view_scale,
)
from stts_slowfast.video import (
    VideoError,
    clip_frames,
    open_video,
    run_with_timeout,
    segment_indices,
)
from stts_slowfast.video.error_log import UNREADABLE, VideoErrorLog, VideoIssue, exceeds_limit
from stts_slowfast.video.image_files import read_image

__all__ = ["UNREADABLE", "ClipDataset", "VideoErrorLog", "build_loader", "normalize_clips"]


# ---- reading a video ------------------------------------------------------------------------


def read_kinetics(cfg, entry: VideoRecord, split: str, short_side: int, rng):
    """The clips of a video file, in one pass: a random one, or in testing NUM_ENSEMBLE_VIEWS.

    ``rng`` is a `random.Random` of this item only: a read that timed out may still draw.
    Returns the images (H, W, 3) uint8 that the clips need, each once; for each clip the indices of
    its frames among them; and what is damaged ("" if nothing is).
    """
    data, test = cfg.DATA, split == "test"
    target_fps = float(data.TARGET_FPS)
    if split == "train" and data.TRAIN_JITTER_FPS > 0:
        target_fps += rng.uniform(0, data.TRAIN_JITTER_FPS)
    threads = 0 if cfg.DATA_LOADER.ENABLE_MULTI_THREAD_DECODE else 1
    with open_video(entry.path, threads=threads, rotate=data.ROTATE) as video:
        rule = video.num_frames, video.fps, data.NUM_FRAMES, data.SAMPLING_RATE, target_fps
        views, offset = cfg.TEST.NUM_ENSEMBLE_VIEWS, data.USE_OFFSET_SAMPLING
        clips = [
            video.frames_at(clip_frames(*rule, clip, views, offset, video.ticks, rng))
            for clip in (range(views) if test else [-1])
        ]
        wanted = sorted(set().union(*clips))
        images = list(video.iter_frames(wanted, short_side))
        return images, _indices(wanted, clips), video.damage


def read_ssv2(cfg, entry: VideoRecord, split: str, short_side: int, rng):
    """As `read_kinetics`, from image files or a video file: one of each segment. BGR, as SlowFast
    reads them: its SSv2 configs set DATA.REVERSE_INPUT_CHANNEL to get RGB."""
    clips = cfg.TEST.NUM_ENSEMBLE_VIEWS if split == "test" else 1  # all of the same frames
    if not entry.frames:
        images, indices, damage = read_segments(cfg, entry.path, split, short_side, rng)
        return images, [indices] * clips, damage
    indices = segment_indices(len(entry.frames), cfg.DATA.NUM_FRAMES, split == "train", rng)
    wanted = sorted(set(indices))
    images = [read_image(entry.frames[index]) for index in wanted]
    return images, _indices(wanted, [indices]) * clips, ""


def _indices(wanted: list[int], clips: list[list[int]]) -> list[list[int]]:
    index_of = {frame: index for index, frame in enumerate(wanted)}
    return [[index_of[frame] for frame in clip] for clip in clips]


# The names in TRAIN.DATASET and TEST.DATASET: how to list videos, and how to read one.
DATASETS: dict[str, tuple[Callable, Callable]] = {
    "kinetics": (list_kinetics, read_kinetics),
    "ssv2": (list_ssv2, read_ssv2),
}


class ClipDataset(Dataset):
    """Clips of the ``split`` ("train", "val" or "test") that ``cfg`` describes.

    An item is a video, opened and decoded once, as (clips (S, 3, T, H, W), labels (S,),
    video_index (S,), view_index (S,), list of `VideoIssue`): S = AUG.NUM_SAMPLE augmented clips in
    training, all views in testing, else 1. ``view_index // NUM_SPATIAL_CROPS`` is the
    clip in time, the remainder the crop. ``dataset[epoch, index]`` draws only from RNG_SEED, epoch
    and index; ``dataset[index]`` is that of epoch 0.

    ``films`` are videos without labels, which replace the split's list.
    """

    def __init__(self, cfg, split: str, films: VideoList | None = None):
        name = (cfg.TEST if split == "test" else cfg.TRAIN).DATASET
        key = f"{'TEST' if split == 'test' else 'TRAIN'}.DATASET"
        check_choice(key, name.lower(), sorted(DATASETS))
        list_videos, self.read = DATASETS[name.lower()]
        self.cfg, self.split = cfg, split
        self.videos: VideoList = list_videos(cfg, split) if films is None else films
        if not len(self.videos):
            raise ValueError(
                f"the {split} list in DATA.PATH_TO_DATA_DIR {cfg.DATA.PATH_TO_DATA_DIR!r} "
                "names no videos"
            )
        unlabelled = int((self.videos.labels == NO_LABEL).sum())
        if unlabelled and split != "test" and films is None:
            raise ValueError(
                f"{unlabelled} of the {len(self.videos)} videos of the {split} list in "
                f"DATA.PATH_TO_DATA_DIR {cfg.DATA.PATH_TO_DATA_DIR!r} have no label: only a test "
                "list may lack labels"
            )
        if split == "test":
            self.crops = test_crops(cfg)
            self.num_views = cfg.TEST.NUM_ENSEMBLE_VIEWS * len(self.crops)
            self.short_side = decode_short_side(cfg, view_scale(cfg))
        else:
            self.transform = train_transform(cfg, split)
            self.num_views, self.num_samples = 1, cfg.AUG.NUM_SAMPLE if split == "train" else 1
            self.short_side = decode_short_side(cfg, cfg.DATA.TRAIN_JITTER_SCALES[0])
        # Of each video, shared by all workers: 0 not read yet, 1 readable, 2 unreadable.
        self.read_status = torch.zeros(len(self.videos), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: int | tuple[int, int]):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        issues: list[VideoIssue] = []
        with _seeded(self.cfg.RNG_SEED, epoch, index):
            while True:
                try:
                    return *self._read(index, issues), issues
                except VideoError as error:
                    entry = self.videos[index]
                    reason = error.reason if error.name == entry.path else str(error)
                    issues.append(VideoIssue(index, entry.path, "unreadable", reason))
                    self.read_status[index] = 2
                    if self.split == "test":
                        return *self._item(self._blank(), UNREADABLE, index), issues
                    self._check_share(error)
                while self.read_status[index] == 2:  # another one that is not known to fail
                    index = random.randrange(len(self.videos))

    def _read(self, index: int, issues: list[VideoIssue]):
        entry = self.videos[index]
        read = functools.partial(
            self.read, self.cfg, entry, self.split, self.short_side, random.Random(random.random())
        )
        images, clips, damage = run_with_timeout(self.cfg.DATA.READ_TIMEOUT, entry.path, read)
        if damage:
            issues.append(VideoIssue(index, entry.path, "damaged", damage))
        self.read_status[index] = 1
        if self.split == "test":
            return self._item(
                make_test_views(self.cfg, images, clips, self.crops), entry.label, index
            )
        frames = stack_frames(images, clips[0])
        samples = [self.transform(frames)[None] for _ in range(self.num_samples)]
        return self._item(_joined(self.cfg, samples), entry.label, index)

    def _item(self, clips: torch.Tensor, label: int, index: int):
        count = len(clips)
        views = torch.arange(count) if self.split == "test" else torch.zeros(count).long()
        return clips, torch.full((count,), label), torch.full((count,), index), views

    def _blank(self) -> torch.Tensor:
        side = self.cfg.DATA.TEST_CROP_SIZE
        shape = self.num_views, 3, self.cfg.DATA.NUM_FRAMES, side, side
        return torch.zeros(shape, dtype=torch.uint8)

    def _check_share(self, error: VideoError) -> None:
        bad, seen = int((self.read_status == 2).sum()), int((self.read_status > 0).sum())
        limit = self.cfg.DATA.MAX_BAD_SHARE
        if bad == len(self.videos) or exceeds_limit(bad, seen, len(self.videos), limit):
            raise VideoError(
                error.name,
                f"{error.reason}; so were {bad - 1} other videos of the {seen} read from the "
                f"{self.split} list, more than DATA.MAX_BAD_SHARE {limit:g} allows. "
                f"Is DATA.PATH_PREFIX ({self.cfg.DATA.PATH_PREFIX!r}) right?",
            )


@contextlib.contextmanager
def _seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Seeds Python's and PyTorch's generators while it is open; then restores them, so that reading
    in the training process itself changes nothing there."""
    state, torch_state = random.getstate(), torch.get_rng_state()
    number = random.Random(f"{seed} {epoch} {index}").getrandbits(63)
    random.seed(number)
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(state)
        torch.set_rng_state(torch_state)


# ---- mini-batches ---------------------------------------------------------------------------


class ClipLoader(DataLoader):
    """Batches ``(clips, labels, video_index, view_index)`` of this process' share of a split.

    Order and random numbers depend only on RNG_SEED, the epoch, the rank and the item: not on the
    number of workers, nor on what was read before. ``bad`` counts unreadable videos.
    """

    def __init__(self, dataset: ClipDataset, batch_videos: int | None, views: int, sampler, **keys):
        # No bound method: it would make a cycle, so that workers end while Python collects garbage,
        # when the queue of a worker that never read closes the files of others (PyTorch 2.14).
        collate = functools.partial(_collate, dataset.cfg, batch_videos is None)
        super().__init__(dataset, batch_videos, sampler=sampler, collate_fn=collate, **keys)
        self.views = views  # clips of a batch, if batches are cut from videos' views
        self.bad = VideoErrorLog(dataset.cfg, dataset.split)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is of ``epoch``, from its first batch on."""
        self.sampler.epoch, self.sampler.start = epoch, 0
        self.bad.begin_epoch()

    def skip(self, batches: int) -> None:
        """The next iteration skips its first batches (of training), which were seen before."""
        self.sampler.start = batches * self.batch_size

    def close(self) -> None:
        """Ends the workers; the next iteration starts others."""
        self._iterator = None

    def __len__(self) -> int:
        if self.batch_size is None:
            return math.ceil(len(self.sampler) * self.dataset.num_views / self.views)
        return super().__len__()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        batches = self._checked(super().__iter__())
        return self._cut(batches) if self.batch_size is None else batches

    def _checked(self, batches: Iterable) -> Iterator[tuple[torch.Tensor, ...]]:
        for *batch, issues in batches:
            self.bad.add(issues, self.sampler.epoch)
            yield tuple(batch)

    def _cut(self, videos: Iterable) -> Iterator[tuple[torch.Tensor, ...]]:
        """Batches of ``views`` clips, however many a video has."""
        waiting, count = [], 0
        for video in videos:
            waiting.append(video)
            count += len(video[1])
            while count >= self.views:
                whole = _join(self.dataset.cfg, waiting, self.pin_memory)
                yield tuple(part[: self.views] for part in whole)
                waiting = [tuple(part[self.views :] for part in whole)]
                count -= self.views
        if count:
            yield _join(self.dataset.cfg, waiting, self.pin_memory)


def _collate(cfg, whole_videos: bool, items):
    """Items as a batch, or unchanged if batches are cut from whole videos."""
    if whole_videos:
        return items
    *parts, issues = zip(*items)
    return *_join(cfg, list(zip(*parts))), [each for found in issues for each in found]


def _join(cfg, items: list[tuple], pin: bool = False) -> tuple[torch.Tensor, ...]:
    clips, *numbers = zip(*items)
    return _joined(cfg, clips, pin), *(torch.cat(each) for each in numbers)


def build_loader(
    cfg, split: str, rank: int = 0, world: int = 1, films: VideoList | None = None
) -> ClipLoader:
    """The loader of a split for process ``rank`` of ``world`` on NUM_SHARDS machines.

    The processes of a machine share TRAIN.BATCH_SIZE videos a batch (in testing TEST.BATCH_SIZE
    views; videos are not split between processes).

    Training shuffles and drops what does not fill a batch; all processes have the same number of
    batches. ``films`` replace the split's list, see `ClipDataset`.

    Raises:
        ValueError: if a batch has fewer videos than processes, or the train list fills no batch.
        FileNotFoundError: if a list does not exist.
    """
    dataset = ClipDataset(cfg, split, films)
    node, key = (cfg.TEST, "TEST") if split == "test" else (cfg.TRAIN, "TRAIN")
    processes = world // cfg.NUM_SHARDS
    batch_size = node.BATCH_SIZE // processes
    if batch_size < 1:
        raise ValueError(
            f"{key}.BATCH_SIZE is {node.BATCH_SIZE} but a machine has {processes} processes "
            "(NUM_GPUS): give each at least one video"
        )
    train, test = split == "train", split == "test"
    sampler = EpochSampler(len(dataset), rank, world, cfg.RNG_SEED if train else None)
    if train and len(sampler) < batch_size:
        raise ValueError(
            f"TRAIN.BATCH_SIZE is {node.BATCH_SIZE}, {batch_size} per process, but the train list "
            f"has {len(dataset)} videos: not one batch can be filled"
        )
    workers = cfg.DATA_LOADER.NUM_WORKERS
    return ClipLoader(
        dataset,
        None if test else batch_size,
        batch_size,
        sampler,
        drop_last=train,
        num_workers=workers,
        # Not spawn, the default in a spawned process: forked workers end with their parent.
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=worker_init,
        pin_memory=cfg.DATA_LOADER.PIN_MEMORY and torch.cuda.is_available(),
        persistent_workers=not test and workers > 0,
        generator=torch.Generator().manual_seed(cfg.RNG_SEED + rank),
    )


def _joined(cfg, clips: Sequence[torch.Tensor], pin: bool = False) -> torch.Tensor:
    """Several clips, pinned ones if ``pin``, as one (B, 3, T, H, W); float if some of them are."""
    if len(clips) == 1:
        return clips[0]
    if len({clip.dtype for clip in clips}) > 1:
        clips = [normalize_clips(clip, cfg) for clip in clips]
    size = sum(map(len, clips)), *clips[0].shape[1:]
    out = torch.empty(size, dtype=clips[0].dtype, pin_memory=True) if pin else None
    return torch.cat(list(clips), out=out)
