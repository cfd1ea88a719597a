"""The node ``STTS``: every key, its default, one comment each; checks; what a share keeps."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from fvcore.common.config import CfgNode

from stts_slowfast.configfiles.values import check_choice
from stts_slowfast.plugins import load_extensions
from stts_slowfast.scorers import SCORERS
from stts_slowfast.topk import GRADIENTS, OPERATORS, SMALLEST_SIGMA

SIGMA_DECAYS = ("linear", "constant")
TEACHERS = ("mixture", "saliency", "both")
_MOST = 1_000_000  # of any number that has an effect


def add_stts_config(cfg) -> None:
    """Adds the node ``STTS`` to a yacs or fvcore ``CfgNode``; does nothing where it is there."""
    if "STTS" in cfg:
        return
    node = type(cfg)

    # Turns selection on.
    cfg.STTS = node({"ENABLE": False})

    # Temporal selection: whole frames are dropped.
    cfg.STTS.TIME = node()
    # Before which blocks frames are selected; empty for no temporal selection.
    cfg.STTS.TIME.BLOCKS = [0]
    # Share of the arriving frames that goes on, one per block: int(T * keep) frames. A range
    # inside the list, [[0.25, 0.9]], is drawn from in each iteration of training; a test needs one.
    cfg.STTS.TIME.KEEP = [0.9]
    # What scores a frame: learned, uniform (evenly spaced), random, change (from the frame
    # before), or what is registered in scorers.SCORERS.
    cfg.STTS.TIME.SCORER = "learned"

    # Spatial selection: each frame is cropped to its best window.
    cfg.STTS.SPACE = node()
    # Before which blocks windows are selected; empty for no spatial selection.
    cfg.STTS.SPACE.BLOCKS = [4]
    # Share of a frame's tokens that goes on, one per block: a window of side
    # int(sqrt(int(H * W * keep))), or of int(side * sqrt(keep)) per axis where H != W. A range as
    # for TIME.
    cfg.STTS.SPACE.KEEP = [0.9]
    # What scores a window: learned, uniform (the middle one), random, change, or what is
    # registered in scorers.SCORERS.
    cfg.STTS.SPACE.SCORER = "learned"
    # Tokens between neighbouring windows; 0 for max((H - side) // 2, 1). Best even on Video Swin,
    # as the window's side is: its patch merging pairs the tokens that it pairs in a whole frame.
    cfg.STTS.SPACE.STRIDE = 0
    # One window for all frames of a clip, its score the mean over the frames. Best where
    # things move on TimeSformer, whose attention over time is at one place of the windows.
    cfg.STTS.SPACE.SHARED = False

    # What teaches learned scorers: mixture (training mixes candidates by OPERATOR's weights, which
    # gradients pass through); saliency (training chooses as a test does; in iterations in which all
    # tokens pass, their gradient says on which candidates the loss depends, and scorers learn to
    # rank so); or both (saliency in those iterations, mixture in all others). All tokens pass while
    # the backbone is frozen and, ever more rarely, during SHRINK.
    cfg.STTS.TEACHER = "mixture"
    # How gradients pass through the choice: subset (exact, without noise), perturbed (the paper's
    # perturbed maximum), or what is registered in topk.OPERATORS.
    cfg.STTS.OPERATOR = "subset"
    # Temperature of subset, standard deviation of the perturbed maximum's noise (0.1 in the paper;
    # scores lie in 0..1).
    cfg.STTS.SIGMA = 0.2
    # How sigma changes over training: linear (to 0) or constant.
    cfg.STTS.SIGMA_DECAY = "linear"
    # In this share of training, from its start, each iteration draws its budget, in four steps from
    # KEEP to a widest, which shrinks from all that arrives to KEEP: so a trained backbone gets used
    # to it (0 in the paper: KEEP from the first iteration on, and its speed and memory).
    cfg.STTS.SHRINK = 0.5
    # Of perturbed: how many perturbations are drawn per row of scores.
    cfg.STTS.NUM_SAMPLES = 500
    # Of perturbed: exact (score function with baseline) or diagonal (as in the authors' code).
    cfg.STTS.GRADIENT = "exact"

    # The backbone's learning rate is at most this share of SOLVER.BASE_LR (0.1 in the paper; a
    # backbone that is held back does not get used to what is left of a clip).
    cfg.STTS.BACKBONE_LR = 1.0
    # For so many epochs the backbone's rate is 0 and only the scorers learn.
    cfg.STTS.FREEZE_BACKBONE_EPOCHS = 3.0

    # Inside SlowFast, RandAugment on bytes instead of PIL's images: faster, the same draws, at most
    # a grey level apart at each operation. The standalone runner always does so.
    cfg.STTS.FAST_AUGMENT = False
    # Exact fused attention in MViT blocks: faster, the same numbers.
    cfg.STTS.FUSED_ATTENTION = True
    # After a selection, relative positions use the true distances in the video; False stretches
    # the tables over what is left, as SlowFast does for any smaller input.
    cfg.STTS.TRUE_DISTANCES = True


def kept_frames(frames: int, keep: float) -> int:
    """How many of ``frames`` go on at the share ``keep``: ``int(frames * keep)``."""
    # The small term only undoes rounding: 0.29 * 100 is 28.999999999999996.
    return int(frames * keep + 1e-6)


def kept_window(height: int, width: int, keep: float) -> tuple[int, int]:
    """Height and width, in tokens, of the window that goes on at the share ``keep``."""
    if height == width:
        side = int(int(height * width * keep + 1e-6) ** 0.5)
        return side, side
    return int(height * keep**0.5 + 1e-6), int(width * keep**0.5 + 1e-6)


def keep_range(keep: float | Sequence[float]) -> tuple[float, float]:
    """The low and the high end of a share: a number is both."""
    low, high = keep if isinstance(keep, (list, tuple)) else (keep, keep)
    return low, high


def interpolate_sizes(low: Sequence[int], high: Sequence[int], draw: float) -> tuple[int, ...]:
    """The sizes at ``draw``, in 0..1, of all from ``low`` to ``high``, each of them as likely."""
    steps = max(b - a for a, b in zip(low, high))
    step = min(int(draw * (steps + 1)), steps)
    return tuple(a + round(step * (b - a) / max(steps, 1)) for a, b in zip(low, high))


def window_stride(size: int, window: int, stride: int) -> int:
    """Tokens between neighbouring windows along one axis; ``stride`` 0 asks for the default."""
    return stride or max((size - window) // 2, 1)


@dataclass(frozen=True)
class Settings:
    """What the node ``STTS`` says, as plain values: each key of it, by its name in small letters.

    ``time`` and ``space`` are the blocks with their shares, ``{4: 0.9}`` or a range
    ``{4: (0.25, 0.9)}``; in the node they stand in the lists ``BLOCKS`` and ``KEEP``.
    """

    time: Mapping[int, float | Sequence[float]]
    space: Mapping[int, float | Sequence[float]]
    time_scorer: str
    space_scorer: str
    space_stride: int
    space_shared: bool
    teacher: str
    sigma: float
    sigma_decay: str
    shrink: float
    num_samples: int
    gradient: str
    operator: str
    backbone_lr: float
    freeze_backbone_epochs: float
    fused_attention: bool
    true_distances: bool

    @classmethod
    def from_cfg(cls, node) -> "Settings":
        """The settings of a node ``cfg.STTS``.

        Raises:
            ValueError: where blocks and shares do not make pairs.
        """
        values = {
            "time": _shares("STTS.TIME", node.TIME),
            "space": _shares("STTS.SPACE", node.SPACE),
        }
        for name in (leaf.name for leaf in fields(cls) if leaf.name not in values):
            *room, leaf = _key(name).split(".")
            values[name] = (node[room[0]] if room else node)[leaf]
        return cls(**values)

    @classmethod
    def from_kwargs(cls, **arguments) -> "Settings":
        """The settings of plain keyword arguments.

        What is left out has the node's default, but for blocks: nothing is selected unless named.

        Raises:
            TypeError: for a name that is none of the settings', with the nearest one.
        """
        known = [leaf.name for leaf in fields(cls)]
        for name in arguments:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"use {', '.join(known)}"
                raise TypeError(f"no argument is called {name!r}: {hint}")
        for name in ("time", "space"):
            arguments[name] = {} if arguments.get(name) is None else arguments[name]
            if not isinstance(arguments[name], Mapping):
                raise ValueError(f"{name} is {arguments[name]!r}: give shares by block, {{4: 0.9}}")
        cfg = CfgNode()
        add_stts_config(cfg)
        return replace(cls.from_cfg(cfg.STTS), **arguments)

    def check(
        self, num_blocks: int, grids: Sequence[tuple[int, int, int]] | None = None
    ) -> dict[str, tuple[tuple, tuple]]:
        """Raises what :func:`validate_stts` raises; gives what :func:`selection_plan` gives."""
        load_extensions()
        for dimension, shares in (("TIME", self.time), ("SPACE", self.space)):
            _check_shares(f"STTS.{dimension}", shares, num_blocks)
        for key, value, registry in (
            ("STTS.TIME.SCORER", self.time_scorer, SCORERS),
            ("STTS.SPACE.SCORER", self.space_scorer, SCORERS),
            ("STTS.OPERATOR", self.operator, OPERATORS),
        ):
            check_choice(key, value, [name for name, _ in registry])
        check_choice("STTS.TEACHER", self.teacher, TEACHERS)
        check_choice("STTS.GRADIENT", self.gradient, GRADIENTS)
        check_choice("STTS.SIGMA_DECAY", self.sigma_decay, SIGMA_DECAYS)
        for name in (
            "sigma",
            "shrink",
            "num_samples",
            "backbone_lr",
            "freeze_backbone_epochs",
            "space_stride",
        ):
            _at_least(f"STTS.{_key(name)}", getattr(self, name), int(name == "num_samples"))
        for kind, right, names in (
            (int, "a whole number", ("num_samples", "space_stride")),
            (bool, "True or False", ("space_shared", "fused_attention", "true_distances")),
        ):
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, kind):
                    raise ValueError(f"STTS.{_key(name)} is {value!r}: give {right}")
        for name in ("sigma", "num_samples", "backbone_lr", "space_stride"):
            if (value := getattr(self, name)) > _MOST:
                raise ValueError(f"STTS.{_key(name)} is {value!r:.40}: give at most {_MOST}")
        if self.shrink > 1:
            raise ValueError(f"STTS.SHRINK is {self.shrink:g}: a share of training is 1 at most")
        return {} if grids is None else selection_plan(self, grids)


def _key(name: str) -> str:
    """The node's key, behind ``STTS.``, of a setting."""
    return re.sub("^(TIME|SPACE)_", r"\1.", name.upper())


def rename_keys_in_message(message: str) -> str:
    """A message about keys of the node, about plain arguments instead."""
    names = {f"STTS.{_key(leaf.name)}": leaf.name for leaf in fields(Settings)}
    names |= {
        f"STTS.{room}.{leaf}": room.lower()
        for room in ("TIME", "SPACE")
        for leaf in ("KEEP", "BLOCKS")
    }
    return re.sub(r"STTS\.[A-Z_.]*[A-Z]", lambda key: names.get(key[0], key[0]), message)


def validate_stts(
    node, num_blocks: int, grids: Sequence[tuple[int, int, int]] | None = None
) -> None:
    """Checks an STTS node against a model.

    Args:
        node: ``cfg.STTS``.
        num_blocks: how many blocks (or stages) of the model can be selected before.
        grids: the token grid ``(T, H, W)`` that arrives at each block without selection; given,
            shares that would leave no frame or no window are found here.

    Raises:
        ValueError: naming the key, its value and what would be right.
    """
    Settings.from_cfg(node).check(num_blocks, grids)


def check_training(settings: Settings, held_back: bool = True) -> None:
    """Checks that scorers which learn would get a gradient; call it where training begins.

    Args:
        settings: of a model with scorers that learn.
        held_back: whether the backbone is frozen at first, if the settings say so.

    Raises:
        ValueError: naming the key by which their gradient would be exactly 0.
    """
    all_pass = settings.shrink or (held_back and settings.freeze_backbone_epochs)
    if settings.teacher != "mixture" and not all_pass:
        raise ValueError(
            f"STTS.TEACHER is {settings.teacher}, but STTS.SHRINK is 0 and the backbone never "
            "frozen: saliency teaches in iterations in which all tokens pass, and there would be "
            "none; give SHRINK more than 0, or start from trained weights with "
            "STTS.FREEZE_BACKBONE_EPOCHS above 0"
        )
    if settings.teacher == "saliency":
        return
    if settings.sigma <= SMALLEST_SIGMA:
        raise ValueError(
            f"STTS.SIGMA is {settings.sigma:g}: in training the scorers would get no gradient and "
            f"learn nothing; give more than {SMALLEST_SIGMA:g}, or scorers that do not learn"
        )
    if (settings.operator, settings.gradient, settings.num_samples) == ("perturbed", "exact", 1):
        raise ValueError(
            "STTS.NUM_SAMPLES is 1: a single sample is its own baseline, so in training the "
            "scorers would get no gradient and learn nothing; give at least 2, or STTS.GRADIENT "
            "diagonal, or STTS.OPERATOR subset"
        )


def check_testing(node) -> None:
    """Checks that a node names one budget, as a test takes; call it before any training.

    Args:
        node: ``cfg.STTS`` of a run that tests.

    Raises:
        ValueError: naming the range, and how to train with it and test without.
    """
    for dimension in ("TIME", "SPACE"):
        keep = node[dimension].KEEP if node[dimension].BLOCKS else ()
        ranges = [share for share in keep if isinstance(share, (list, tuple)) and len(share) == 2]
        if any(low != high for low, high in ranges):
            high = ",".join(f"{share[1] if share in ranges else share:g}" for share in keep)
            raise ValueError(
                f"STTS.{dimension}.KEEP is {list(keep)}, a range, and TEST.ENABLE is True: give "
                f'one share to test (--opts STTS.{dimension}.KEEP "[{high}]"); to train with the '
                "range, set TEST.ENABLE False, and test afterwards with TRAIN.ENABLE False"
            )


def selection_plan(node, grids: Sequence[tuple[int, int, int]]) -> dict[str, tuple[tuple, tuple]]:
    """What each selector will do: its key to the grid before and the grid after it.

    Args:
        node: ``cfg.STTS``, or the settings of one.
        grids: the token grid ``(T, H, W)`` that arrives at each block without selection.

    Returns:
        ``{"time_0": ((8, 56, 56), (7, 56, 56)), ...}`` in the order in which they run; of ranges,
        what their high ends do.

    Raises:
        ValueError: where a share, or an end of its range, leaves no frame or no window.
    """
    settings = node if isinstance(node, Settings) else Settings.from_cfg(node)
    _selection_plan(settings, grids, 0)
    return _selection_plan(settings, grids, 1)


def _selection_plan(settings: Settings, grids, end: int) -> dict[str, tuple[tuple, tuple]]:
    steps = {}
    grid = tuple(grids[0])
    for block, full in enumerate(grids):
        if block:
            strides = [round(a / b) for a, b in zip(grids[block - 1], full)]
            grid = tuple(-(-size // stride) for size, stride in zip(grid, strides))
        for dimension, shares in (("TIME", settings.time), ("SPACE", settings.space)):
            if block in shares:
                before, share = grid, keep_range(shares[block])[end]
                if dimension == "TIME":
                    grid = (kept_frames(grid[0], share), *grid[1:])
                else:
                    grid = (grid[0], *kept_window(*grid[1:], share))
                if min(grid) < 1:
                    raise ValueError(empty_selection_error(dimension, share, block, before))
                steps[f"{dimension.lower()}_{block}"] = (before, grid)
    return steps


def empty_selection_error(dimension: str, keep: float, block: int, grid: Sequence[int]) -> str:
    """The sentence for a share that selects nothing out of ``grid``, ``(T, H, W)``."""
    frames, height, width = grid
    if dimension == "TIME" and frames == 1:
        return (
            f"STTS.TIME.KEEP {keep:g} leaves no frame: one token frame arrives at block {block}, "
            "as of an image, and it cannot be dropped; set STTS.TIME.BLOCKS []"
        )
    found = f"{frames} frames" if dimension == "TIME" else f"{height}x{width} tokens"
    least = 1 / frames if dimension == "TIME" else 1 / min(height, width) ** 2
    unit = "frame" if dimension == "TIME" else "window"
    return (
        f"STTS.{dimension}.KEEP {keep:g} leaves no {unit} of the {found} that arrive at "
        f"block {block}: keep at least {min(least + 5e-4, 1):.3f}"
    )


def _shares(key: str, node) -> dict:
    """The blocks of a dimension's node with their shares."""
    for leaf in ("BLOCKS", "KEEP"):
        if not isinstance(node[leaf], (list, tuple)):
            raise ValueError(f"{key}.{leaf} is {node[leaf]!r}: give a list")
    blocks, keep = list(node.BLOCKS), list(node.KEEP)
    if blocks and len(blocks) != len(keep):
        raise ValueError(
            f"{key}.KEEP has {len(keep)} values but {key}.BLOCKS has {len(blocks)}: "
            "give one share per block; a range is a list in it, [[0.25, 0.9]]"
        )
    for block in blocks:
        if isinstance(block, bool) or not isinstance(block, int):
            raise ValueError(f"{key}.BLOCKS names block {block!r}: give whole numbers")
        if blocks.count(block) > 1:
            raise ValueError(f"{key}.BLOCKS is {blocks}: name each block once")
    return dict(zip(blocks, keep))


def _check_shares(key: str, shares: Mapping, num_blocks: int) -> None:
    for block, share in shares.items():
        if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < num_blocks:
            raise ValueError(
                f"{key}.BLOCKS names block {block!r}: the model's blocks are 0 to {num_blocks - 1}"
            )
        pair = share if isinstance(share, (list, tuple)) else (share, share)
        numbers = len(pair) == 2 and all(map(_is_number, pair))
        if not numbers or not 0 < pair[0] <= pair[1] <= 1:
            raise ValueError(
                f"{key}.KEEP holds {share!r}: a share lies above 0 and up to 1; a range of them is "
                "[low, high]"
            )


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _at_least(key: str, value, least: int) -> None:
    if not _is_number(value) or not value >= least:
        raise ValueError(f"{key} is {value!r}: it must be at least {least}")
