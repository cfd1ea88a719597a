"""Loops that the pretended GPU runs, and what the host waits for in each of their steps."""

import contextlib
import math
from bisect import bisect
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import stts_slowfast as stts
from stts_slowfast import adaptation
from stts_slowfast.standalone import evaluator, run_logger, training_loop
from stts_slowfast.standalone.model import build_model
from tests.conftest import Golden
from tests.gpu.pretended_cuda import Event, Record, pretended, to_cuda
from tests.hosts.examples import EXAMPLES


class PretendedFabric:
    """What the training loop asks of Fabric, in one process."""

    global_rank, world_size, is_global_zero = 0, 1, True
    device = "cuda"

    def to_device(self, what):
        if isinstance(what, nn.Module):
            return to_cuda(what)
        return [tensor.to("cuda", non_blocking=True) for tensor in what]

    def setup(self, model: nn.Module, optimizer):
        for group in optimizer.param_groups:
            group["fused"] = True  # PyTorch's other ways do not know fake tensors

        def network(clips: Tensor) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                return model(clips).float()

        return network, optimizer

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_gradients(self, network, optimizer, **arguments) -> Tensor:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return nn.utils.clip_grad_norm_(parameters, arguments["max_norm"])

    def all_reduce(self, tensor: Tensor, reduce_op: str = "mean") -> Tensor:
        return np.ones(3) if reduce_op == "sum" else tensor  # a validation's totals


class Waits:
    """What the host waits for in each step.

    Attributes:
        found: of each step, what waits, and how many steps before it those are whose numbers are
            read.
    """

    def __init__(self):
        self.found, self._begun = [], []

    @contextlib.contextmanager
    def step(self):
        Event.waited_for.clear()
        self._begun.append(Event.recorded)
        with Record() as record:
            yield
        step_of = [bisect(self._begun, number) for number in Event.waited_for]
        behind = [len(self._begun) - step for step in step_of]
        self.found.append({"waits": record.waits, "behind": behind})

    def each(self, batches: list) -> Iterator:
        """The batches; a step lasts until the next is requested."""
        for batch in batches:
            with self.step():
                yield batch


BATCH = {"clips": (2, 3, 8, 32, 32), "numbers": (2,)}


def _batch() -> list[Tensor]:
    numbers = [torch.zeros(BATCH["numbers"], dtype=torch.long) for _ in range(3)]
    return [torch.zeros(BATCH["clips"], dtype=torch.uint8), *numbers]


def _standalone_cfg(folder: str, log_period: int):
    cfg = Golden("slowfast_mvit_v1").cfg()
    cfg.STTS.NUM_SAMPLES, cfg.LOG_PERIOD, cfg.OUTPUT_DIR = 20, log_period, folder
    cfg.STTS.SHRINK = 0.0  # what depends on sizes is made once for each
    cfg.STTS.SPACE.BLOCKS, cfg.STTS.SPACE.KEEP = [2], [0.6]
    cfg.MIXUP.ENABLE, cfg.SOLVER.CLIP_GRAD_L2NORM = True, 1.0
    cfg.SOLVER.OPTIMIZING_METHOD = "adamw"
    cfg.STTS.ENABLE = True
    return cfg


def _training_loop(cfg, model: nn.Module, steps: int) -> training_loop.TrainingLoop:
    loader = mock.MagicMock(batch_size=2)
    loader.__len__.return_value = steps
    loader.bad.count.return_value = {}
    start = mock.Mock(optimizer_state=None, scaler_state=None, iteration=0, path="", trained=False)
    signals, run_log = mock.Mock(save=False, number=0), mock.MagicMock()
    run_log.progress.side_effect = lambda batches, *_: iter(batches)
    with mock.patch.object(training_loop, "build_loader", return_value=loader):
        return training_loop.TrainingLoop(
            cfg, PretendedFabric(), model, start, run_log, signals, None
        )


def train_standalone(folder: str, steps: int, log_period: int) -> list[dict]:
    """:class:`Waits` of steps of the standalone training loop with MIXUP."""
    waits, cfg = Waits(), _standalone_cfg(folder, log_period)
    model = build_model(cfg)
    with pretended():
        loop = _training_loop(cfg, model, steps)
        loop.timer = run_logger.Timer()
        meter = run_logger.Meter(("loss", "top1_err", "top5_err"), log_period)
        loop.model.train()
        batch = _batch()[:2]
        for iteration in range(steps):
            with waits.step():
                loop.step(0, iteration, batch, meter)
    return waits.found


def validate_standalone(folder: str, steps: int, log_period: int) -> list[dict]:
    """:class:`Waits` of the batches of a validation in the standalone training loop."""
    waits, cfg = Waits(), _standalone_cfg(folder, log_period)
    model = build_model(cfg)
    with pretended(), mock.patch.object(training_loop, "checkpointing") as files:
        files.past_validations.return_value = {}
        loop = _training_loop(cfg, model, steps)
        loop.val_loader.__iter__.side_effect = lambda: waits.each([_batch()] * steps)
        loop.validate(0)
    return waits.found


def evaluate_standalone(folder: str, steps: int, log_period: int) -> list[dict]:
    """:class:`Waits` of the batches of a test by the standalone engine."""
    waits, cfg = Waits(), _standalone_cfg(folder, log_period)
    model = build_model(cfg).eval()
    loader, run_log = mock.MagicMock(), mock.MagicMock()
    loader.__len__.return_value, loader.dataset.num_views = steps, 2
    loader.dataset.videos.__len__.return_value = steps
    run_log.progress.side_effect = lambda batches, *_: iter(batches)
    with pretended(), contextlib.ExitStack() as patches:
        # What has no numbers has no accuracy.
        for name in ("ViewEnsemble", "_result"):
            patches.enter_context(mock.patch.object(evaluator, name))
        patches.enter_context(mock.patch.object(evaluator, "build_loader", return_value=loader))
        loader.__iter__.side_effect = lambda: waits.each([_batch()] * steps)
        evaluator.run_test(cfg, PretendedFabric(), to_cuda(model), run_log, mock.Mock(), None)
    return waits.found


def adapt_small(steps: int) -> list[dict[str, int]]:
    """What the host waits for in each step of ``stts.adapt``, scorers and backbone."""
    model, clips, _ = EXAMPLES["vjepa2"]()
    stts.attach(model, time={0: (0.25, 0.75)}, tokens={2: 0.5})
    waits = Waits()
    changed = {"raise_on_nan": mock.Mock(), "LOG_SECONDS": math.inf}
    with pretended(), mock.patch.multiple(adaptation, **changed):
        adapter = adaptation._Adapter(to_cuda(model), True, 1e-3, 1e-5, True, 0)
        for group in adapter.optimizer.param_groups:
            group["fused"] = True
        batches = waits.each([torch.empty(clips.shape, device="cuda")] * steps)
        adapter.learn(batches, steps, 1e9)
    return [step["waits"] for step in waits.found]
