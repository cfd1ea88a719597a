"""The item that SlowFast's ``Kinetics`` reads now: its dataset, file, and what is wrong with it.

SlowFast opens and decodes files by functions that get no dataset. A call of
``Kinetics.__getitem__`` makes a :class:`ReadContext`, which ends with it.
"""

from contextvars import ContextVar

from stts_slowfast.pyslowfast.compat import patch
from stts_slowfast.pyslowfast.patching import wrap

_current: "ContextVar[ReadContext | None]" = ContextVar("stts_item", default=None)


class LastFile:
    """The open file that a dataset read last: SlowFast asks for the views of a video one after the
    other. Each process has its own.

    Attributes:
        opened: key of the file, options of its decoding, and its reader; None if none is open.
    """

    def __init__(self):
        self.opened: tuple | None = None

    def __reduce__(self):  # datasets are pickled as without this package
        return type(None), ()

    def close(self) -> None:
        if self.opened is not None:
            self.opened[2].close()
        self.opened = None


class ReadContext:
    """One call of ``Kinetics.__getitem__``.

    Attributes:
        dataset: the ``Kinetics``.
        last_file: the dataset's :class:`LastFile`.
        errors: the dataset's :class:`~stts_slowfast.pyslowfast.error_log.ReadErrors`; None outside
            of loops that track them.
        path: the file that was opened last.
        issue: its kind (unreadable or damaged) and reason; None if it is sound.
        is_black: whether black frames replace it.
    """

    def __init__(self, dataset):
        self.dataset = dataset
        self.last_file = vars(dataset).get("stts_last_file") or LastFile()
        vars(dataset)["stts_last_file"] = self.last_file
        self.errors = vars(dataset).get("stts_errors")
        self.path, self.issue, self.is_black = "", None, False

    def abandon_file(self) -> None:
        """Leaves the last file open, for a thread that still reads it."""
        vars(self.dataset)["stts_last_file"] = LastFile()

    def only_crops(self) -> bool:
        """Whether SlowFast only crops the frames, as for a test view of its own ``Kinetics``."""
        return is_kinetics(self.dataset) and self.dataset.mode == "test"


def is_kinetics(dataset) -> bool:
    """Whether a dataset is SlowFast's ``Kinetics`` itself: a subclass may do anything."""
    cls = type(dataset)
    return (cls.__module__, cls.__name__) == ("slowfast.datasets.kinetics", "Kinetics")


def current() -> ReadContext | None:
    """The item that is read now; None outside of ``Kinetics.__getitem__``."""
    return _current.get()


@patch("decoder")
def patch_decoder_items(kinetics) -> bool:
    """``Kinetics.__getitem__``: all views of a file are read in one pass."""
    track_items(kinetics)
    return False  # reported by the patch of the decoder


def track_items(kinetics) -> None:
    """Makes ``Kinetics.__getitem__`` set the :class:`ReadContext`."""
    wrap(kinetics.Kinetics, "__getitem__", _get_item)


def _get_item(getitem, dataset, index):
    context = ReadContext(dataset)
    token = _current.set(context)
    try:
        item = getitem(dataset, index)
    finally:
        _current.reset(token)
    return item if context.errors is None else context.errors.check_item(context, item)
