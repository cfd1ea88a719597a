"""Lists of which no video is there: SlowFast tries a hundred of them and fails without a name."""

import os

from stts_slowfast.pyslowfast.asked import enabled
from stts_slowfast.pyslowfast.wrap import wrap


def wrap_build_dataset(build) -> None:
    """``slowfast.datasets.build.build_dataset``, through which loaders get their data."""
    wrap(build, "build_dataset", _build_dataset)


def _build_dataset(build_dataset, dataset_name, cfg, split):
    dataset = build_dataset(dataset_name, cfg, split)
    if enabled(cfg):
        require_some(dataset, cfg, split)
    return dataset


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
