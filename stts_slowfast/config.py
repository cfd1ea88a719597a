"""The node ``STTS``: its keys with defaults, the same as plain settings, and their checks."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from fvcore.common.config import CfgNode

from stts_slowfast.budgets import DIMENSIONS, Share, Sizes, plan_grids
from stts_slowfast.configfiles.values import check_choice, flatten
from stts_slowfast.plugins import load_extensions
from stts_slowfast.scorers import SCORERS
from stts_slowfast.shares import check_order, check_rest, check_shares, is_number, read_shares
from stts_slowfast.token_scorers import TOKEN_SCORERS
from stts_slowfast.topk import GRADIENTS, OPERATORS

SIGMA_DECAYS = ("linear", "constant")
TEACHERS = ("mixture", "saliency", "both")
LARGEST_VALUE = 1_000_000  # of sigma, num_samples, backbone_lr and space_stride


def add_stts_config(cfg: CfgNode) -> None:
    """Adds the node ``STTS`` to a yacs or fvcore ``CfgNode`` that does not have it."""
    if "STTS" in cfg:
        return
    node = type(cfg)

    # Turns selection on.
    cfg.STTS = node({"ENABLE": False})

    # Temporal selection: whole frames are dropped.
    cfg.STTS.TIME = node()
    # Before which blocks frames are selected; empty for no temporal selection.
    cfg.STTS.TIME.BLOCKS = [0]
    # Share of the arriving frames that is kept, one per block: int(T * keep) frames. In training a
    # range inside the list, [[0.25, 0.9]], is sampled in each iteration; a test needs one share.
    cfg.STTS.TIME.KEEP = [0.9]
    # What scores a frame: learned, uniform (evenly spaced), random, change (from the frame
    # before), or a name registered in scorers.SCORERS.
    cfg.STTS.TIME.SCORER = "learned"

    # Spatial selection: each frame is cropped to its best window.
    cfg.STTS.SPACE = node()
    # Before which blocks windows are selected; empty for no spatial selection.
    cfg.STTS.SPACE.BLOCKS = [4]
    # Share of a frame's tokens that is kept, one per block: a window of side
    # int(sqrt(int(H * W * keep))), or of int(side * sqrt(keep)) per axis if H and W differ. A range
    # as for TIME.
    cfg.STTS.SPACE.KEEP = [0.9]
    # What scores a window: learned, uniform (the middle one), random, change, or a name registered
    # in scorers.SCORERS.
    cfg.STTS.SPACE.SCORER = "learned"
    # Tokens between neighbouring windows; 0 for max((H - side) // 2, 1). Best even on Video Swin,
    # like the side of the window: patch merging then pairs the same tokens as in a whole frame.
    cfg.STTS.SPACE.STRIDE = 0
    # One window for all frames of a clip, scored by its mean over the frames. Best for moving
    # objects on TimeSformer, whose temporal attention compares the same position of all windows.
    cfg.STTS.SPACE.SHARED = False

    # Selection of single tokens, anywhere in a clip: for plain ViTs, whose blocks need no grid.
    cfg.STTS.TOKENS = node()
    # Before which blocks tokens are selected; empty for no such selection. Frames and windows are
    # selected before them, not after.
    cfg.STTS.TOKENS.BLOCKS = []
    # Share of the arriving tokens that is kept, one per block: int(T * H * W * keep) of a clip. A
    # range as for TIME.
    cfg.STTS.TOKENS.KEEP = [0.25]
    # What scores a token: learned, uniform (a lattice), random, change (from the frame before),
    # norm, attention (of the cls token or the mean query in that block), unique (distance from the
    # most similar token), or a name registered in token_scorers.TOKEN_SCORERS.
    cfg.STTS.TOKENS.SCORER = "learned"
    # The same number of tokens of each frame, int(H * W * keep), instead of any of a clip. Always
    # so in models that see each frame alone.
    cfg.STTS.TOKENS.PER_FRAME = False
    # What becomes of the other tokens: drop, or merge: each kept token becomes the mean of itself
    # and of those that are most similar to it.
    cfg.STTS.TOKENS.REST = "drop"

    # How learned scorers are trained: mixture (the paper's: training mixes candidates by OPERATOR's
    # weights, through which gradients pass); saliency (training selects as a test does; in
    # iterations that keep all tokens, the gradient of the tokens shows which candidates the loss
    # depends on, and scorers learn that ranking); or both (saliency in those iterations, mixture in
    # all others; for single tokens the same as saliency, since mixtures of tokens from anywhere are
    # like none of them). With saliency or both, all tokens are kept in the FREEZE_BACKBONE_EPOCHS
    # and, less and less often, during SHRINK.
    cfg.STTS.TEACHER = "both"
    # How gradients pass through a selection: subset (exact, without noise), perturbed (the paper's
    # perturbed maximum), or a name registered in topk.OPERATORS.
    cfg.STTS.OPERATOR = "subset"
    # Temperature of subset, or standard deviation of the perturbed maximum's noise (0.1 in the
    # paper; scores are in 0..1).
    cfg.STTS.SIGMA = 0.2
    # How sigma changes over training: linear (to 0) or constant.
    cfg.STTS.SIGMA_DECAY = "linear"
    # Fraction of training with budget annealing, so that a trained backbone adapts: iterations keep
    # all tokens, less and less often, or KEEP. With TEACHER mixture each iteration samples a
    # budget, in four steps between KEEP and an upper bound that decays from all tokens to KEEP.
    # 0, as in the paper: KEEP from the first iteration that is not frozen, with its memory.
    cfg.STTS.SHRINK = 0.5
    # Of perturbed: number of perturbations per row of scores.
    cfg.STTS.NUM_SAMPLES = 500
    # Of perturbed: exact (score function with baseline) or diagonal (as in the authors' code).
    cfg.STTS.GRADIENT = "exact"

    # Upper bound of the backbone's learning rate as a share of SOLVER.BASE_LR (0.1 in the paper; a
    # backbone with a low bound does not adapt to clips of fewer tokens).
    cfg.STTS.BACKBONE_LR = 1.0
    # Epochs in which the backbone is frozen and only the scorers learn.
    cfg.STTS.FREEZE_BACKBONE_EPOCHS = 3.0

    # Inside SlowFast, RandAugment on bytes instead of PIL images: faster, the same random draws, at
    # most one grey level apart at each operation. The standalone runner always does so.
    cfg.STTS.FAST_AUGMENT = False
    # Exact fused attention: in MViT blocks, and in Video Swin, which then computes no padded
    # frames. Faster, the same numbers.
    cfg.STTS.FUSED_ATTENTION = True
    # After a selection, relative positions use the true distances in the video; False stretches
    # the tables over the kept tokens, as SlowFast does for any smaller input.
    cfg.STTS.TRUE_DISTANCES = True


@dataclass(frozen=True)
class Settings:
    """The node ``STTS`` as plain values: each key by its name in small letters.

    ``time``, ``space`` and ``tokens`` are shares by block, ``{4: 0.9}``, or ranges,
    ``{4: (0.25, 0.9)}``; in the node they are the lists ``BLOCKS`` and ``KEEP``.
    """

    time: Mapping[int, Share]
    space: Mapping[int, Share]
    tokens: Mapping[int, Share]
    time_scorer: str
    space_scorer: str
    space_stride: int
    space_shared: bool
    tokens_scorer: str
    tokens_per_frame: bool
    tokens_rest: str
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
    def from_cfg(cls, node: CfgNode) -> "Settings":
        """The settings of a node ``cfg.STTS``.

        Raises:
            ValueError: if blocks and shares do not make pairs, or a key is missing.
        """
        try:
            values: dict[str, Any] = {
                name.lower(): read_shares(f"STTS.{name}", node[name]) for name in DIMENSIONS
            }
            for name in (leaf.name for leaf in fields(cls) if leaf.name not in values):
                *parent, leaf = _key(name).split(".")
                values[name] = (node[parent[0]] if parent else node)[leaf]
        except (AttributeError, KeyError):
            _check_complete(node)
            raise
        return cls(**values)

    @classmethod
    def from_kwargs(cls, **arguments: Any) -> "Settings":
        """The settings of plain keyword arguments.

        An argument that is left out has the node's default, except ``time``, ``space`` and
        ``tokens``: without them nothing is selected.

        Raises:
            TypeError: for an unknown name, with the nearest known one.
            ValueError: if one of these is not a mapping.
        """
        known = [leaf.name for leaf in fields(cls)]
        for name in arguments:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"use {', '.join(known)}"
                raise TypeError(f"no argument is called {name!r}: {hint}")
        for name in map(str.lower, DIMENSIONS):
            arguments[name] = {} if arguments.get(name) is None else arguments[name]
            if not isinstance(arguments[name], Mapping):
                raise ValueError(f"{name} is {arguments[name]!r}: give shares by block, {{4: 0.9}}")
        cfg = CfgNode()
        add_stts_config(cfg)
        return replace(cls.from_cfg(cfg.STTS), **arguments)

    def validate(
        self, num_blocks: int, grids: Sequence[Sizes] | None = None
    ) -> dict[str, tuple[Sizes, Sizes]]:
        """Raises as :func:`validate_stts`; returns :func:`selection_plan`, if there are grids."""
        load_extensions()
        for dimension in DIMENSIONS:
            check_shares(f"STTS.{dimension}", self.shares(dimension), num_blocks)
        check_order(self.time, self.space, self.tokens, self.tokens_scorer)
        for key, value, registry in (
            ("STTS.TIME.SCORER", self.time_scorer, SCORERS),
            ("STTS.SPACE.SCORER", self.space_scorer, SCORERS),
            ("STTS.TOKENS.SCORER", self.tokens_scorer, TOKEN_SCORERS),
            ("STTS.OPERATOR", self.operator, OPERATORS),
        ):
            check_choice(key, value, [name for name, _ in registry])
        check_choice("STTS.TEACHER", self.teacher, TEACHERS)
        check_rest(self.tokens_rest, self.tokens, self.teacher)
        check_choice("STTS.GRADIENT", self.gradient, GRADIENTS)
        check_choice("STTS.SIGMA_DECAY", self.sigma_decay, SIGMA_DECAYS)
        for name, least, most in (
            ("sigma", 0, LARGEST_VALUE),
            ("shrink", 0, 1),
            ("num_samples", 1, LARGEST_VALUE),
            ("backbone_lr", 0, LARGEST_VALUE),
            ("freeze_backbone_epochs", 0, math.inf),
            ("space_stride", 0, LARGEST_VALUE),
        ):
            self._check_number(name, least, most)
        for name in ("space_shared", "tokens_per_frame", "fused_attention", "true_distances"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"STTS.{_key(name)} is {value!r}: give True or False")
        return {} if grids is None else selection_plan(self, grids)

    def shares(self, dimension: str) -> Mapping[int, Share]:
        """Shares by block of one of ``budgets.DIMENSIONS``."""
        found: Mapping[int, Share] = getattr(self, dimension.lower())
        return found

    def _check_number(self, name: str, least: float, most: float) -> None:
        key, value = f"STTS.{_key(name)}", getattr(self, name)
        if not is_number(value) or not value >= least:
            raise ValueError(f"{key} is {value!r}: it must be at least {least}")
        if name in ("num_samples", "space_stride") and not isinstance(value, int):
            raise ValueError(f"{key} is {value!r}: give a whole number")
        if value > most:
            raise ValueError(f"{key} is {value!r:.40}: give at most {most}")


def _key(name: str) -> str:
    """The node's key of a setting, without ``STTS.``."""
    return re.sub("^(TIME|SPACE|TOKENS)_", r"\1.", name.upper())


def _check_complete(node: CfgNode) -> None:
    """Raises ``ValueError`` if a node lacks a key, as one of an older version does."""
    cfg = CfgNode()
    add_stts_config(cfg)
    have = dict(flatten(node))
    if missing := [key for key, _ in flatten(cfg.STTS) if key not in have]:
        raise ValueError(
            f"the node has no STTS.{missing[0]}: make it with add_stts_config(cfg), and merge your "
            "keys into it"
        )


def rename_keys_in_message(message: str) -> str:
    """A message about keys of the node, rewritten for plain arguments."""
    names = {f"STTS.{_key(leaf.name)}": leaf.name for leaf in fields(Settings)}
    names |= {
        f"STTS.{dimension}.{leaf}": dimension.lower()
        for dimension in DIMENSIONS
        for leaf in ("KEEP", "BLOCKS")
    }
    return re.sub(r"STTS\.[A-Z_.]*[A-Z]", lambda key: names.get(key[0], key[0]), message)


def validate_stts(node: CfgNode, num_blocks: int, grids: Sequence[Sizes] | None = None) -> None:
    """Checks an STTS node against a model.

    Args:
        node: ``cfg.STTS``.
        num_blocks: number of blocks (or stages) of the model.
        grids: the token grid ``(T, H, W)`` that arrives at each block without selection; with it,
            shares that would leave no frame or no window are found.

    Raises:
        ValueError: naming the key, its value and what would be right.
    """
    Settings.from_cfg(node).validate(num_blocks, grids)


def check_testing(node: CfgNode) -> None:
    """Checks, before any training, that a node has one budget, as a test needs.

    Args:
        node: ``cfg.STTS`` of a run that tests.

    Raises:
        ValueError: naming the range, and how to train with it and test without.
    """
    for dimension in DIMENSIONS:
        keep = node[dimension].KEEP if node[dimension].BLOCKS else ()
        ranges = [share for share in keep if isinstance(share, (list, tuple)) and len(share) == 2]
        if any(low != high for low, high in ranges):
            high = ",".join(f"{share[1] if share in ranges else share:g}" for share in keep)
            raise ValueError(
                f"STTS.{dimension}.KEEP is {list(keep)}, a range, and TEST.ENABLE is True: give "
                f'one share to test (--opts STTS.{dimension}.KEEP "[{high}]"); to train with the '
                "range, set TEST.ENABLE False, and test afterwards with TRAIN.ENABLE False"
            )


def selection_plan(
    node: "CfgNode | Settings", grids: Sequence[Sizes]
) -> dict[str, tuple[Sizes, Sizes]]:
    """What each selector will do: its key to the grid before and the grid after it.

    Args:
        node: ``cfg.STTS``, or its settings.
        grids: the token grid ``(T, H, W)`` that arrives at each block without selection.

    Returns:
        ``{"time_0": ((8, 56, 56), (7, 56, 56)), ...}`` in the order in which they run; for ranges,
        at their high ends.

    Raises:
        ValueError: if a share, or an end of its range, leaves nothing.
    """
    settings = node if isinstance(node, Settings) else Settings.from_cfg(node)
    selected = settings.time, settings.space
    more: dict[str, Any] = {"tokens": settings.tokens, "per_frame": settings.tokens_per_frame}
    plan_grids(*selected, grids, end=0, **more)
    return plan_grids(*selected, grids, end=1, **more)
