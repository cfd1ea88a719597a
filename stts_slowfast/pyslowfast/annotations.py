"""Lists of videos inside SlowFast, read as by the standalone runner; refused if no video exists.

SlowFast reads a line without a label as class 0, a path up to its first space, and an empty line as
a video; of missing videos it tries a hundred and fails without naming one.
"""

import os

from stts_slowfast.pyslowfast.config_access import is_enabled
from stts_slowfast.pyslowfast.patching import wrap
from stts_slowfast.pyslowfast.read_context import is_kinetics
from stts_slowfast.video.list_lines import UNLABELLED, read_labels


def wrap_build_dataset(build) -> None:
    """``slowfast.datasets.build.build_dataset``, by which loaders get their dataset."""
    wrap(build, "build_dataset", _build_dataset)


def _build_dataset(build_dataset, dataset_name, cfg, split):
    dataset = build_dataset(dataset_name, cfg, split)
    if is_enabled(cfg):
        if is_kinetics(dataset) and not dataset.use_chunk_loading:
            read_list(dataset, cfg)
        require_files(dataset, cfg, split)
    return dataset


def read_list(dataset, cfg) -> None:
    """Sets the paths and labels of a ``Kinetics`` from its list; -1 for lines without a label.

    Raises:
        ValueError: for a malformed line, and for missing labels in training or validation.
    """
    listed = os.path.join(cfg.DATA.PATH_TO_DATA_DIR, f"{dataset.mode}.csv")
    paths, labels = [], []
    separator = cfg.DATA.PATH_LABEL_SEPARATOR
    for path, label in read_labels(listed, separator, cfg.MODEL.NUM_CLASSES):
        paths.append(os.path.join(cfg.DATA.PATH_PREFIX, path))
        labels.append(label)
    unlabelled = labels.count(UNLABELLED)
    if unlabelled and dataset.mode != "test":
        raise ValueError(
            f"{unlabelled} of the {len(labels)} videos of {listed} have no label: only a test list "
            "may lack labels"
        )
    views = range(dataset._num_clips)
    dataset._path_to_videos = [path for path in paths for _ in views]
    dataset._labels = [label for label in labels for _ in views]
    dataset._spatial_temporal_idx = [view for _ in paths for view in views]
    dataset._video_meta = {index: {} for index in range(len(dataset._labels))}


def require_files(dataset, cfg, split: str) -> None:
    """Refuses a dataset of which no file exists; looks for one only.

    Args:
        dataset: with paths as SlowFast's datasets have them, of videos or of the images of each;
            any other is skipped.
        cfg: with ``DATA``.
        split: ``train``, ``val`` or ``test``.

    Raises:
        FileNotFoundError: naming the list, the folder and the first path.
    """
    entries = getattr(dataset, "_path_to_videos", None)
    if not isinstance(entries, (list, tuple)):
        return
    paths = [entry if isinstance(entry, str) else next(iter(entry), "") for entry in entries]
    # Files behind a URL are not looked up.
    if not paths or any("://" in path or os.path.exists(path) for path in dict.fromkeys(paths)):
        return
    listed = os.path.join(cfg.DATA.PATH_TO_DATA_DIR, f"{split}.csv")
    where = listed if os.path.isfile(listed) else f"the {split} list in {cfg.DATA.PATH_TO_DATA_DIR}"
    raise FileNotFoundError(
        f"none of the {len(set(paths))} videos of {where} exists, such as {paths[0]}: "
        f"DATA.PATH_PREFIX is {cfg.DATA.PATH_PREFIX!r}, set it to the folder of the videos"
    )
