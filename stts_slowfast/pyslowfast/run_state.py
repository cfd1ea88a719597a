"""The state of a run inside SlowFast: one `RunState` per job, one `Training` per optimizer.

A job is what SlowFast's launcher runs: ``train``, ``test``, ... or a user's function. A
training in a user's own loop has no job. Nothing of a run is kept in a module: the state ends with
the job, and a `Training` with its optimizer.
"""

import contextlib
import weakref
from contextvars import ContextVar

from torch import nn

_job: "ContextVar[RunState | None]" = ContextVar("stts_job", default=None)
# Weak: a training lives as long as its optimizer.
_training: "ContextVar[weakref.ref | None]" = ContextVar("stts_training", default=None)

TRAINING_JOBS, OTHER_JOBS = {"train"}, {"test", "visualize", "demo", "benchmark_data_loading"}


class RunState:
    """A job.

    Attributes:
        cfg: the config that the job was started with.
        function: the function that the job runs.
        job: its name: ``train``, ``test``, ...
    """

    def __init__(self, cfg, function):
        self.cfg, self.function = cfg, function
        self.job: str = getattr(function, "__name__", "")

    def is_training(self) -> bool:
        """Whether the job trains; for a user's own function ``TRAIN.ENABLE`` decides."""
        if self.job in TRAINING_JOBS | OTHER_JOBS:
            return self.job in TRAINING_JOBS
        return self.cfg.TRAIN.ENABLE


@contextlib.contextmanager
def enter_job(cfg, function):
    """Context manager: :func:`current_job` is the job. The launcher and the function that it calls
    may both enter the same one."""
    state, outer = RunState(cfg, function), _job.get()
    if outer is not None and (outer.cfg is cfg and outer.job == state.job):
        yield outer
        return
    tokens = _job.set(state), _training.set(None)
    try:
        yield state
    finally:
        _job.reset(tokens[0])
        _training.reset(tokens[1])


def current_job() -> RunState | None:
    """The current job; None in a user's own loop that no launcher started."""
    return _job.get()


def is_training(cfg) -> bool:
    """Whether a model that is built now will be trained."""
    state = current_job()
    return state.is_training() if state else cfg.TRAIN.ENABLE


class Clock:
    """The current epoch of a config's schedule; all clones of the config in a process share it."""

    epoch: float | None = None

    def __deepcopy__(self, memo) -> "Clock":
        return self

    def __reduce__(self):
        return Clock, ()


def schedule_clock(cfg) -> Clock:
    """The clock of a config; it gets one if it has none."""
    found = vars(cfg).get("stts_clock")
    if found is None:
        found = Clock()
        object.__setattr__(cfg, "stts_clock", found)  # CfgNode.__setattr__ would make it a key
    return found


class Training:
    """A model with selectors in training. Its optimizer holds it.

    Attributes:
        cfg: the config that the optimizer was made with.
        clock: that of the config; ``get_epoch_lr`` sets it.
        schedule: ``schedule.Schedule`` from the first iteration on; None before.
        split: ``split(state=None)`` splits the optimizer's groups, as in a saved state if given.
        rates: the values that are added to the log's lines of training.
    """

    def __init__(self, model: nn.Module, cfg):
        self._model, self.cfg, self.clock = weakref.ref(model), cfg, schedule_clock(cfg)
        self.clock.epoch = None
        self.schedule = self.split = None
        self.rates: dict[str, float] = {}

    @property
    def model(self) -> nn.Module | None:
        return self._model()

    def __deepcopy__(self, memo) -> "Training":
        return self

    def __reduce__(self):  # optimizers are pickled as without this package
        return type(None), ()


def set_training(training: Training | None) -> None:
    """Sets whose iteration this is: a training's, or of a model without selectors (None)."""
    _training.set(weakref.ref(training) if training is not None else None)


def current_training() -> Training | None:
    """The training whose iteration this is."""
    reference = _training.get()
    return reference() if reference is not None else None
