"""What the pretended GPU runs: hosts and families when small, models of the table when large."""

import contextlib
from bisect import bisect
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import stts_slowfast as stts
from stts_slowfast import backbones
from stts_slowfast.evaluation import half_precision
from stts_slowfast.standalone import evaluator, run_logger, training_loop
from stts_slowfast.standalone.config import load_config
from stts_slowfast.standalone.model import build_model
from stts_slowfast.topk import OPERATORS as REGISTRY
from stts_slowfast.windows import mix_windows
from tests.conftest import Golden
from tests.gpu.pretended_cuda import Event, Record, capturing, pretended, storage, to_cuda
from tests.hosts.examples import EXAMPLES, Example

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
OPERATORS = ("subset", "perturbed")


# --- small models -------------------------------------------------------------------------------


def _standalone(cfg, time: dict, space: dict, batch: int = 2) -> tuple[Example, dict]:
    torch.manual_seed(0)
    side, frames = cfg.DATA.TRAIN_CROP_SIZE, cfg.DATA.NUM_FRAMES
    clips = torch.randn(batch, 3, frames, side, side)
    model = backbones.build(cfg).eval()
    return Example(model, clips, lambda model, clips: model(clips)), {"time": time, "space": space}


def _tiny(name: str, *opts) -> tuple[Example, dict]:
    size = ["DATA.NUM_FRAMES", 8, "DATA.TRAIN_CROP_SIZE", 32, "DATA.TEST_CROP_SIZE", 32]
    cfg = load_config(f"configs/Kinetics/RECOMMENDED_{name}.yaml", [*size, *opts])
    return _standalone(cfg, {0: 0.5}, {2: 0.6})


def _timesformer() -> tuple[Example, dict]:
    node = {"EMBED_DIM": 32, "DEPTH": 3, "NUM_HEADS": 4, "PATCH_SIZE": 8}
    opts = [x for key, value in node.items() for x in (f"TIMESFORMER.{key}", value)]
    return _tiny("TIMESFORMER_8x32_T1_0.9_S4_0.9", *opts, "STTS.SPACE.BLOCKS", [2])


def _swin() -> tuple[Example, dict]:
    node = {"EMBED_DIM": 16, "DEPTHS": [2, 2], "NUM_HEADS": [2, 4], "WINDOW_SIZE": [2, 4, 4]}
    opts = [x for key, value in node.items() for x in (f"VIDEO_SWIN.{key}", value)]
    example, _ = _tiny("SWIN_T_32x2_T0_0.5", *opts)
    return example, {"time": {0: 0.5}}


def _vit() -> tuple[Example, dict]:
    opts = ["MVIT.EMBED_DIM", 32, "MVIT.NUM_HEADS", 4, "MVIT.DEPTH", 3, "STTS.SPACE.BLOCKS", [2]]
    patch = ["MVIT.PATCH_KERNEL", [2, 8, 8], "MVIT.PATCH_STRIDE", [2, 8, 8]]
    return _tiny("VIT_B_16x4_T0_0.9_S4_0.9", *opts, *patch)


def _golden(name: str) -> tuple[Example, dict]:
    return _standalone(Golden(name).cfg(), {0: 0.5}, {2: 0.6})


# Of hosts that others stand for: in one precision.
VARIANTS = {"videomae-token", "videomae-model", "timesformer-joint", "timesformer-space"}
VARIANTS |= {"clip", "dinov2", "timm-registers", "timm-tubelets"}
HOST_SELECTION = {"time": {0: 0.5}, "space": {2: 0.6}}
# Annealed before the step of training, so that it drops and merges.
TOKENS_SELECTION = {"time": {0: 0.5}, "tokens": {2: 0.6}, "tokens_rest": "merge", "shrink": 0.01}
SMALL: dict[str, Callable[[], tuple[Example, dict]]] = {
    **{name: lambda make=make: (make(), HOST_SELECTION) for name, make in EXAMPLES.items()},
    "dinov2": lambda: (EXAMPLES["dinov2"](), TOKENS_SELECTION),
    "MViT": lambda: _golden("slowfast_mvit_v1"),
    "MViTv2": lambda: _golden("slowfast_mvit_v2"),
    "TimeSformer": _timesformer,
    "VideoSwin": _swin,
    "ViT": _vit,
}


# --- models of the table ------------------------------------------------------------------------


def _zoo(config: str, *opts) -> Callable[[], tuple[Example, dict]]:
    def make() -> tuple[Example, dict]:
        cfg = load_config(f"configs/Kinetics/{config}.yaml", list(opts))
        node = cfg.STTS
        time = dict(zip(node.TIME.BLOCKS, node.TIME.KEEP))
        space = dict(zip(node.SPACE.BLOCKS, node.SPACE.KEEP))
        with torch.device("meta"):  # nobody reads its numbers
            return _standalone(cfg, time, space, batch=8)

    return make


def _videomae_b() -> tuple[Example, dict]:
    import transformers

    with torch.device("meta"):
        model = transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig()).eval()
        clips = torch.empty(8, 16, 3, 224, 224)
    example = Example(model, clips, lambda model, clips: model(clips).logits)
    return example, {"time": {0: 0.9}, "space": {4: 0.9}}


FULL: dict[str, Callable[[], tuple[Example, dict]]] = {
    "MViT-B 16x4": _zoo("RECOMMENDED_MVIT_B_16x4_T0_0.9_S4_0.9"),
    "MViT-B, 64 frames": _zoo("RECOMMENDED_MVIT_B_16x4_T0_0.9_S4_0.9", "DATA.NUM_FRAMES", 64),
    "MViTv2-S 16x4": _zoo("RECOMMENDED_MVITv2_S_16x4_T0_0.9_S4_0.9"),
    "TimeSformer 96x4": _zoo("STTS_TIMESFORMER_96x4_T0_0.5_S4_0.9"),
    "Video Swin-T 32x2": _zoo("RECOMMENDED_SWIN_T_32x2_T0_0.5"),
    "ViT-B 16x4": _zoo("RECOMMENDED_VIT_B_16x4_T0_0.9_S4_0.9"),
    "VideoMAE-B 16x4": _videomae_b,
}


# --- what runs ----------------------------------------------------------------------------------


class Run(NamedTuple):
    """A model on the pretended device, and how to call it."""

    model: nn.Module
    clips: Tensor
    logits: Callable
    dtype: torch.dtype | None

    def autocast(self):
        # A fresh one for each pass: it keeps what it has cast.
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast("cuda", self.dtype)

    def choose(self, operator: str) -> None:
        for selector in getattr(self.model, "stts", {}).values():
            selector.operator = REGISTRY.get(operator)

    def evaluate(self) -> Record:
        self.model.eval()
        with torch.no_grad(), self.autocast(), Record() as record:
            self.logits(self.model, self.clips)
        return record

    def train(self, loop: "Loop | None" = None) -> dict[str, Record]:
        """Forward and backward pass; with a loop its schedule before them, its step after."""
        self.model.train()
        self.model.zero_grad()
        parts = {part: Record() for part in ("forward", "backward")}
        if loop:
            with Record():
                loop.schedule.step(0.5)
        with self.autocast(), parts["forward"]:
            logits = self.logits(self.model, self.clips)
        with parts["backward"]:
            logits.float().square().mean().backward()
        if loop:
            with Record():
                loop.optimizer.step()
        return parts


class Loop:
    """Optimizer and schedule of a model."""

    def __init__(self, model: nn.Module):
        groups = stts.param_groups(model.parameters(), model)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
        self.schedule = stts.Schedule(model, self.optimizer, max_epochs=2, pretrained=False)


def precisions(name: str) -> list[str]:
    return ["bf16"] if name in VARIANTS else list(DTYPES)


def run_small(name: str) -> dict:
    """Evaluation and training steps of a small model with selectors.

    Returns:
        By precision, operator and part of the step what waits for the device, and what comes from
        the host; under "capture", see :func:`_capture`. What a first pass alone does (tensors that
        are made once for a size) is left out: if it waits, it is repeated.
    """
    (model, clips, logits), selection = SMALL[name]()
    stts.attach(model, **selection, num_samples=20)
    found = {}
    with pretended():
        clips = torch.empty(clips.shape, device="cuda")
        loop = Loop(to_cuda(model))
        for dtype in precisions(name):
            autocast = DTYPES[dtype]
            run = Run(model, clips, logits, autocast)
            if run.evaluate().waits or not found:
                run.train(loop)
            found[f"{dtype} evaluation"] = run.evaluate()
            for operator in OPERATORS:
                run.choose(operator)
                parts = run.train(loop)
                found |= {f"{dtype} {operator} {part}": r for part, r in parts.items()}
        capture = _capture(run)
        half = Run(model, clips, logits, torch.bfloat16)
        with half_precision(model, torch.bfloat16):
            found["weights cast once"] = half.evaluate()
    parts = {part: {"waits": r.waits, "from_host": r.from_host} for part, r in found.items()}
    return {"parts": parts, "capture": capture}


def _capture(run: Run) -> list[str]:
    """What a captured evaluation reads or writes that may be gone when its graph is replayed: all
    but parameters, buffers, clips and the state that selectors keep."""
    model = run.model
    state = [t for s in model.stts.values() for t in vars(s).values() if isinstance(t, Tensor)]
    with capturing():
        record = run.evaluate()
    static = [*model.parameters(), *model.buffers(), run.clips, *state]
    known = {storage(tensor) for tensor in static}
    strange = [tensor for key, tensor in record.outside.items() if key not in known]
    return [f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}" for tensor in strange]


def count_launches(name: str, selected: bool = True) -> dict[str, dict[str, int]]:
    """Launches of a model of the table, bf16, batch 8, by operator, or of the stock model.

    ``weights cast once`` is evaluation as ``TEST.PRECISION bfloat16`` runs it, ``without flash``
    how many of the attention kernels in evaluation are not flash's.
    """
    (model, clips, logits), settings = FULL[name]()
    if selected:
        stts.attach(model, **settings, shrink=0.0, freeze_backbone_epochs=0, backbone_lr=1.0)
        stts.set_progress(model, 0.5)
    found = {}
    with pretended():
        run = Run(to_cuda(model), torch.empty(clips.shape, device="cuda"), logits, torch.bfloat16)
        run.evaluate()
        evaluation = run.evaluate()
        with half_precision(run.model, torch.bfloat16):
            cast_once = run.evaluate()
        for operator in OPERATORS if selected else ("stock",):
            run.choose(operator)
            parts = {"evaluation": evaluation, "weights cast once": cast_once, **run.train()}
            found[operator] = {part: record.launches.total() for part, record in parts.items()}
    slow = evaluation.launches["_scaled_dot_product_efficient_attention"]
    return {key: {**launches, "without flash": slow} for key, launches in found.items()}


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


def count_window_launches(stride: int) -> int:
    """Launches of a soft selection of windows 28x28 of 56x56, forward and backward."""
    with pretended():
        grid = torch.empty(2, 4, 56, 56, 96, device="cuda", requires_grad=True)
        windows = ((56 - 28) // stride + 1) ** 2
        weights = torch.empty(2, 4, windows, device="cuda", requires_grad=True)
        with Record() as record:
            mix_windows(grid, weights, (28, 28), (stride, stride)).square().mean().backward()
    return record.launches.total()
