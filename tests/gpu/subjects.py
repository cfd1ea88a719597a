"""What the pretended GPU runs: hosts and families when small, models of the table when large."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import stts_slowfast as stts
from stts_slowfast import backbones
from stts_slowfast.evaluation import half_precision
from stts_slowfast.hooks import all_selectors
from stts_slowfast.standalone.config import load_config
from stts_slowfast.topk import OPERATORS as REGISTRY
from stts_slowfast.windows import mix_windows
from tests.conftest import Golden
from tests.gpu.pretended_cuda import Record, capturing, pretended, storage, to_cuda
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


def _tokens(host: str, scorer: str, **more) -> Callable[[], tuple[Example, dict]]:
    return lambda: (EXAMPLES[host](), {"tokens": {2: 0.5}, "tokens_scorer": scorer, **more})


TOKENS = {
    f"tokens-{scorer}": _tokens("vjepa2", scorer)
    for scorer in ("learned", "uniform", "change", "norm", "unique")
}
TOKENS["tokens-attention"] = _tokens("timm-frames", "attention")
TOKENS["tokens-per-frame"] = _tokens("vivit", "unique", tokens_per_frame=True)
VARIANTS |= {*TOKENS, "tokens-random", "random"}
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
    **TOKENS,
}
# Whose numbers differ from one device to another.
RANDOM: dict[str, Callable[[], tuple[Example, dict]]] = {
    "tokens-random": _tokens("vjepa2", "random"),
    "random": lambda: (
        EXAMPLES["vjepa2"](),
        {**HOST_SELECTION, "time_scorer": "random", "space_scorer": "random"},
    ),
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


def _videomae_b(**selection) -> tuple[Example, dict]:
    import transformers

    with torch.device("meta"):
        model = transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig()).eval()
        clips = torch.empty(8, 16, 3, 224, 224)
    example = Example(model, clips, lambda model, clips: model(clips).logits)
    return example, selection or {"time": {0: 0.9}, "space": {4: 0.9}}


FULL: dict[str, Callable[[], tuple[Example, dict]]] = {
    "MViT-B 16x4": _zoo("RECOMMENDED_MVIT_B_16x4_T0_0.9_S4_0.9"),
    "MViT-B, 64 frames": _zoo("RECOMMENDED_MVIT_B_16x4_T0_0.9_S4_0.9", "DATA.NUM_FRAMES", 64),
    "MViTv2-S 16x4": _zoo("RECOMMENDED_MVITv2_S_16x4_T0_0.9_S4_0.9"),
    "TimeSformer 96x4": _zoo("STTS_TIMESFORMER_96x4_T0_0.5_S4_0.9"),
    "Video Swin-T 32x2": _zoo("RECOMMENDED_SWIN_T_32x2_T0_0.5"),
    "ViT-B 16x4": _zoo("RECOMMENDED_VIT_B_16x4_T0_0.9_S4_0.9"),
    "VideoMAE-B 16x4": _videomae_b,
    "VideoMAE-B 16x4, single tokens": lambda: _videomae_b(time={0: 0.5}, tokens={4: 0.25}),
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

    def train(self, loop: "Loop | None" = None, keep_all: bool = False) -> dict[str, Record]:
        """Forward and backward pass; with a loop its schedule before them, its step after.

        With ``keep_all``, saliency teaches (``STTS.TEACHER``).
        """
        self.model.train()
        self.model.zero_grad()
        parts = {part: Record() for part in ("forward", "backward")}
        if loop:
            with Record():
                loop.schedule.step(0.5)
        for selector in all_selectors(self.model) if keep_all else ():
            selector.keep_all()
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
    (model, clips, logits), selection = (SMALL | RANDOM)[name]()
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
        parts = run.train(loop, keep_all=True)
        found |= {f"saliency {part}": r for part, r in parts.items()}
        capture = _capture(run)
        half = Run(model, clips, logits, torch.bfloat16)
        with half_precision(model, torch.bfloat16):
            found["weights cast once"] = half.evaluate()
    parts = {part: {"waits": r.waits, "from_host": r.from_host} for part, r in found.items()}
    return {"parts": parts, "capture": capture}


def _capture(run: Run) -> list[str]:
    """What a captured evaluation waits for or takes from the host, which ends a capture, and what
    it reads or writes that may be gone when its graph is replayed: all but parameters, buffers,
    clips and the state that selectors keep."""
    model = run.model
    state = [t for s in model.stts.values() for t in vars(s).values() if isinstance(t, Tensor)]
    with capturing():
        record = run.evaluate()
    static = [*model.parameters(), *model.buffers(), run.clips, *state]
    known = {storage(tensor) for tensor in static}
    strange = [tensor for key, tensor in record.outside.items() if key not in known]
    found = [f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}" for tensor in strange]
    return [*record.waits, *record.from_host, *found]


def count_launches(name: str) -> dict[str, dict[str, int]]:
    """Launches of a model of the table with selectors, bf16, batch 8, by operator.

    ``weights cast once`` is evaluation as ``TEST.PRECISION bfloat16`` runs it, ``without flash``
    how many of the attention kernels in evaluation are not flash's. What only the first pass of a
    process does (tensors that are made once for a size) is not counted.
    """
    (model, clips, logits), settings = FULL[name]()
    stts.attach(model, **settings, shrink=0.01, freeze_backbone_epochs=0, backbone_lr=1.0)
    stts.set_progress(model, 0.5)
    found = {}
    with pretended():
        run = Run(to_cuda(model), torch.empty(clips.shape, device="cuda"), logits, torch.bfloat16)
        run.evaluate()
        evaluation = run.evaluate()
        with half_precision(run.model, torch.bfloat16):
            cast_once = run.evaluate()
        for operator in OPERATORS:
            run.choose(operator)
            run.train()
            parts = {"evaluation": evaluation, "weights cast once": cast_once, **run.train()}
            found[operator] = {part: record.launches.total() for part, record in parts.items()}
    slow = evaluation.launches["_scaled_dot_product_efficient_attention"]
    return {key: {**launches, "without flash": slow} for key, launches in found.items()}


def count_stock_launches(name: str) -> int:
    """Launches of an evaluation of a model of the table without selectors, bf16, batch 8."""
    (model, clips, logits), _ = FULL[name]()
    with pretended():
        run = Run(to_cuda(model), torch.empty(clips.shape, device="cuda"), logits, torch.bfloat16)
        run.evaluate()
        return run.evaluate().launches.total()


def count_window_launches(stride: int) -> int:
    """Launches of a soft selection of windows 28x28 of 56x56, forward and backward."""
    with pretended():
        grid = torch.empty(2, 4, 56, 56, 96, device="cuda", requires_grad=True)
        windows = ((56 - 28) // stride + 1) ** 2
        weights = torch.empty(2, 4, windows, device="cuda", requires_grad=True)
        with Record() as record:
            mix_windows(grid, weights, (28, 28), (stride, stride)).square().mean().backward()
    return record.launches.total()
