"""What a run inside SlowFast knows: one object a job, made when it starts and gone when it ends.

A job is what SlowFast's launcher runs: ``train``, ``test``, ... or a function of the user's own.
A training within it, or in a loop of the user's own without any job, has an object of its own,
which is held by its optimizer. Nothing of a run is kept in a module.
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
    """A job: its config, and the name of the function that it runs.

    Attributes:
        cfg: the config that the job was started with.
        job: ``train``, ``test``, ...
        function: what the job runs.
    """

    def __init__(self, cfg, function):
        self.cfg, self.function = cfg, function
        self.job: str = getattr(function, "__name__", "")

    def trains(self) -> bool:
        """Whether the job trains; a function of the user's own does so as ``TRAIN.ENABLE`` says."""
        if self.job in TRAINING_JOBS | OTHER_JOBS:
            return self.job in TRAINING_JOBS
        return self.cfg.TRAIN.ENABLE


@contextlib.contextmanager
def started(cfg, function):
    """While a job runs, :func:`running` is its state. Both the launcher and the function that it
    calls may start the same one."""
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


def running() -> RunState | None:
    """The job that runs here; None in a loop of the user's own that no launcher started."""
    return _job.get()


def trains(cfg) -> bool:
    """Whether a model that is built now is to be trained."""
    state = running()
    return state.trains() if state else cfg.TRAIN.ENABLE


class Clock:
    """Where a config's schedule stands: its clones in this process share it."""

    epoch: float | None = None

    def __deepcopy__(self, memo) -> "Clock":
        return self

    def __reduce__(self):
        return Clock, ()


def clock(cfg) -> Clock:
    """The clock of a config, which is given one where it has none."""
    found = vars(cfg).get("stts_clock")
    if found is None:
        found = Clock()
        object.__setattr__(cfg, "stts_clock", found)  # past yacs, which would make it a key
    return found


class Training:
    """A model with selectors in training. Its optimizer holds it.

    Attributes:
        cfg: the config that the optimizer was made with.
        clock: that of the config; ``get_epoch_lr`` sets it.
        schedule: ``schedule.Schedule``, once the first iteration has come; else None.
        split: splits the optimizer's groups anew, as a saved state had them, or by what is new.
        rates: what a training line of the log gains.
    """

    def __init__(self, model: nn.Module, cfg):
        self._model, self.cfg, self.clock = weakref.ref(model), cfg, clock(cfg)
        self.clock.epoch = None
        self.schedule = self.split = None
        self.rates: dict[str, float] = {}

    @property
    def model(self) -> nn.Module | None:
        return self._model()

    def __deepcopy__(self, memo) -> "Training":
        return self

    def __reduce__(self):  # optimizers are pickled as they are without us
        return type(None), ()


def note_step(training: Training | None) -> None:
    """Notes whose iteration it is: a training's, or that of a model without selectors (None)."""
    _training.set(weakref.ref(training) if training is not None else None)


def training() -> Training | None:
    """The training whose iteration it is."""
    reference = _training.get()
    return reference() if reference is not None else None
