"""Lists inside SlowFast: read as by the standalone runner, and refused if no video is there.

SlowFast takes a line without a label for class 0, a space in a path for its end, and an empty line
for a video; of videos that are not there it tries a hundred and fails without a name.
"""

import os

from stts_slowfast.pyslowfast.config_access import is_enabled
from stts_slowfast.pyslowfast.patching import wrap
from stts_slowfast.pyslowfast.read_context import is_kinetics
from stts_slowfast.video.list_lines import UNLABELLED, read_labels


def wrap_build_dataset(build) -> None:
    """``slowfast.datasets.build.build_dataset``, through which loaders get their data."""
    wrap(build, "build_dataset", _build_dataset)


def _build_dataset(build_dataset, dataset_name, cfg, split):
    dataset = build_dataset(dataset_name, cfg, split)
    if is_enabled(cfg):
        if is_kinetics(dataset) and not dataset.use_chunk_loading:
            read_again(dataset, cfg)
        require_some(dataset, cfg, split)
    return dataset


def read_again(dataset, cfg) -> None:
    """Gives ``Kinetics`` the paths and labels that its list says; -1 for what has no label.

    Raises:
        ValueError: for a line that cannot be read, and for training without labels.
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
            "can do without"
        )
    views = range(dataset._num_clips)
    dataset._path_to_videos = [path for path in paths for _ in views]
    dataset._labels = [label for label in labels for _ in views]
    dataset._spatial_temporal_idx = [view for _ in paths for view in views]
    dataset._video_meta = {index: {} for index in range(len(dataset._labels))}


def require_some(dataset, cfg, split: str) -> None:
    """Refuses a dataset of files of which none exists; if some do, the first ends the search.

    Args:
        dataset: one that holds its paths as SlowFast's do, of videos or of the images of each; any
            other is passed over.
        cfg: with ``DATA``.
        split: ``train``, ``val`` or ``test``.

    Raises:
        FileNotFoundError: naming the list, the folder and the first path.
    """
    entries = getattr(dataset, "_path_to_videos", None)
    if not isinstance(entries, (list, tuple)):
        return
    paths = [entry if isinstance(entry, str) else next(iter(entry), "") for entry in entries]
    # Whether a file is behind an address is for who opens it.
    if not paths or any("://" in path or os.path.exists(path) for path in dict.fromkeys(paths)):
        return
    listed = os.path.join(cfg.DATA.PATH_TO_DATA_DIR, f"{split}.csv")
    where = listed if os.path.isfile(listed) else f"the {split} list in {cfg.DATA.PATH_TO_DATA_DIR}"
    raise FileNotFoundError(
        f"none of the {len(set(paths))} videos of {where} is there, such as {paths[0]}: "
        f"DATA.PATH_PREFIX is {cfg.DATA.PATH_PREFIX!r}, set it to the folder of the videos"
    )
