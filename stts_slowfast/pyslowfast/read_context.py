"""What is known while SlowFast's ``Kinetics`` fetches one item: of which dataset, from which file.

SlowFast opens and decodes files by functions that get neither. A call of
``Kinetics.__getitem__`` opens an :class:`Item`, which ends with it.
"""

from contextvars import ContextVar

from stts_slowfast.pyslowfast.compat import patch
from stts_slowfast.pyslowfast.patching import wrap

_item: "ContextVar[Item | None]" = ContextVar("stts_item", default=None)


class Files:
    """The file that a dataset read last, and how: SlowFast asks for the views of a video one after
    the other. Each process has its own."""

    def __init__(self):
        self.last: tuple | None = None  # key of the file, rules, the open file

    def __reduce__(self):  # datasets are pickled as they are without us
        return type(None), ()

    def close(self) -> None:
        if self.last is not None:
            self.last[2].close()
        self.last = None


class Item:
    """One call of ``Kinetics.__getitem__``.

    Attributes:
        dataset: whose item it is.
        files: the dataset's :class:`Files`.
        reads: the dataset's :class:`~stts_slowfast.pyslowfast.error_log.Reads`; None outside of the
            loops that keep such an account.
        path: the file that was opened last.
        finding: what is wrong with it: unreadable or damaged, and why.
        blank: whether black frames took its place.
    """

    def __init__(self, dataset):
        self.dataset = dataset
        self.files = vars(dataset).get("stts_files") or Files()
        vars(dataset)["stts_files"] = self.files
        self.reads = vars(dataset).get("stts_reads")
        self.path, self.finding, self.blank = "", None, False

    def leave_file(self) -> None:
        """Leaves the last file as it is: something still reads it."""
        vars(self.dataset)["stts_files"] = Files()

    def crops_alone(self) -> bool:
        """Whether SlowFast's own code takes the frames, crops them and does no more: it does so
        with a test view."""
        return is_kinetics(self.dataset) and self.dataset.mode == "test"


def is_kinetics(dataset) -> bool:
    """Whether a dataset is SlowFast's ``Kinetics``: what a subclass does is not known here."""
    kind = type(dataset)
    return (kind.__module__, kind.__name__) == ("slowfast.datasets.kinetics", "Kinetics")


def item() -> Item | None:
    """The item that is fetched now, if SlowFast's ``Kinetics`` fetches one."""
    return _item.get()


@patch("decoder")
def patch_decoder_items(kinetics) -> bool:
    """``Kinetics.__getitem__``: the views of a file are read in one pass."""
    wrap_items(kinetics)
    return False  # it patches nothing by itself


def wrap_items(kinetics) -> None:
    """``Kinetics.__getitem__``, which opens an :class:`Item`."""
    wrap(kinetics.Kinetics, "__getitem__", _get_item)


def _get_item(getitem, dataset, index):
    current = Item(dataset)
    token = _item.set(current)
    try:
        found = getitem(dataset, index)
    finally:
        _item.reset(token)
    return found if current.reads is None else current.reads.settle(current, found)
