"""The config nodes we add to SlowFast's: every key, its default, one comment each; STTS checked."""

from collections.abc import Sequence

from stts_slowfast.topk import GRADIENTS

SCORERS = ("learned", "uniform", "random")
SIGMA_DECAYS = ("linear", "constant")


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
    # Share of the arriving frames that goes on, one per block: int(T * keep) frames.
    cfg.STTS.TIME.KEEP = [0.9]
    # What scores a frame: learned, uniform (evenly spaced) or random.
    cfg.STTS.TIME.SCORER = "learned"

    # Spatial selection: each frame is cropped to its best window.
    cfg.STTS.SPACE = node()
    # Before which blocks windows are selected; empty for no spatial selection.
    cfg.STTS.SPACE.BLOCKS = [4]
    # Share of a frame's tokens that goes on, one per block: a window of side
    # int(sqrt(int(H * W * keep))), or of int(side * sqrt(keep)) per axis where H != W.
    cfg.STTS.SPACE.KEEP = [0.9]
    # What scores a window: learned, uniform (the middle one) or random.
    cfg.STTS.SPACE.SCORER = "learned"
    # Tokens between neighbouring windows; 0 for max((H - side) // 2, 1).
    cfg.STTS.SPACE.STRIDE = 0
    # One window for all frames of a clip, its score the mean over the frames.
    cfg.STTS.SPACE.SHARED = False

    # Standard deviation of the noise of the perturbed maximum (scores lie in 0..1).
    cfg.STTS.SIGMA = 0.1
    # How sigma changes over training: linear (to 0) or constant.
    cfg.STTS.SIGMA_DECAY = "linear"
    # Perturbations drawn per row of scores.
    cfg.STTS.NUM_SAMPLES = 500
    # exact (score function with baseline) or diagonal (what the authors' code computes).
    cfg.STTS.GRADIENT = "exact"

    # The backbone's learning rate is at most this share of SOLVER.BASE_LR.
    cfg.STTS.BACKBONE_LR = 0.1
    # For so many epochs the backbone's rate is 0 and only the scorers learn.
    cfg.STTS.FREEZE_BACKBONE_EPOCHS = 3.0

    # Exact fused attention in MViT blocks: faster, the same numbers.
    cfg.STTS.FUSED_ATTENTION = True
    # After a selection, relative positions use the true distances in the video; False stretches
    # the tables over what is left, as SlowFast does for any smaller input.
    cfg.STTS.TRUE_DISTANCES = True


def add_timesformer_config(cfg) -> None:
    """Adds the node ``TIMESFORMER``, TimeSformer-B by default; does nothing where it is there."""
    if "TIMESFORMER" in cfg:
        return
    cfg.TIMESFORMER = type(cfg)()
    # divided_space_time, joint_space_time or space_only.
    cfg.TIMESFORMER.ATTENTION_TYPE = "divided_space_time"
    # A ViT or TimeSformer checkpoint to start from; empty for random weights.
    cfg.TIMESFORMER.PRETRAINED_MODEL = ""
    # Side of a patch, in pixels.
    cfg.TIMESFORMER.PATCH_SIZE = 16
    # Width of the tokens.
    cfg.TIMESFORMER.EMBED_DIM = 768
    # Number of blocks.
    cfg.TIMESFORMER.DEPTH = 12
    # Attention heads per block.
    cfg.TIMESFORMER.NUM_HEADS = 12
    # Width of the MLP's hidden layer, in widths of the tokens.
    cfg.TIMESFORMER.MLP_RATIO = 4.0
    # Bias in the projections to queries, keys and values.
    cfg.TIMESFORMER.QKV_BIAS = True
    # Stochastic depth of the last block; earlier ones have linearly less.
    cfg.TIMESFORMER.DROPPATH_RATE = 0.1


def add_video_swin_config(cfg) -> None:
    """Adds the node ``VIDEO_SWIN``, Video Swin-T by default; does nothing where it is there."""
    if "VIDEO_SWIN" in cfg:
        return
    cfg.VIDEO_SWIN = type(cfg)()
    # Frames, height and width of a patch.
    cfg.VIDEO_SWIN.PATCH_SIZE = [2, 4, 4]
    # Width of the tokens in the first stage; it doubles from stage to stage.
    cfg.VIDEO_SWIN.EMBED_DIM = 96
    # Blocks per stage.
    cfg.VIDEO_SWIN.DEPTHS = [2, 2, 6, 2]
    # Attention heads per stage.
    cfg.VIDEO_SWIN.NUM_HEADS = [3, 6, 12, 24]
    # Frames, height and width of an attention window, in tokens.
    cfg.VIDEO_SWIN.WINDOW_SIZE = [8, 7, 7]
    # Stochastic depth of the last block; earlier ones have linearly less.
    cfg.VIDEO_SWIN.DROPPATH_RATE = 0.1


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


def window_stride(size: int, window: int, stride: int) -> int:
    """Tokens between neighbouring windows along one axis; ``stride`` 0 asks for the default."""
    return stride or max((size - window) // 2, 1)


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
    for dimension in ("TIME", "SPACE"):
        _validate_dimension(f"STTS.{dimension}", node[dimension], num_blocks)
    _one_of("STTS.GRADIENT", node.GRADIENT, GRADIENTS)
    _one_of("STTS.SIGMA_DECAY", node.SIGMA_DECAY, SIGMA_DECAYS)
    _at_least("STTS.SIGMA", node.SIGMA, 0)
    _at_least("STTS.NUM_SAMPLES", node.NUM_SAMPLES, 1)
    _at_least("STTS.BACKBONE_LR", node.BACKBONE_LR, 0)
    _at_least("STTS.FREEZE_BACKBONE_EPOCHS", node.FREEZE_BACKBONE_EPOCHS, 0)
    for key, value in (
        ("STTS.NUM_SAMPLES", node.NUM_SAMPLES),
        ("STTS.SPACE.STRIDE", node.SPACE.STRIDE),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{key} is {value!r}: give a whole number")
    _at_least("STTS.SPACE.STRIDE", node.SPACE.STRIDE, 0)
    if grids is not None:
        plan(node, grids)


def plan(node, grids: Sequence[tuple[int, int, int]]) -> dict[str, tuple[tuple, tuple]]:
    """What each selector will do: its key to the grid before and the grid after it.

    Args:
        node: ``cfg.STTS``.
        grids: the token grid ``(T, H, W)`` that arrives at each block without selection.

    Returns:
        ``{"time_0": ((8, 56, 56), (7, 56, 56)), ...}`` in the order in which they run.

    Raises:
        ValueError: where a share leaves no frame or no window.
    """
    steps = {}
    grid = tuple(grids[0])
    for block, full in enumerate(grids):
        if block:
            strides = [round(a / b) for a, b in zip(grids[block - 1], full)]
            grid = tuple(-(-size // stride) for size, stride in zip(grid, strides))
        for dimension in ("TIME", "SPACE"):
            if block in node[dimension].BLOCKS:
                keep = node[dimension].KEEP[list(node[dimension].BLOCKS).index(block)]
                before = grid
                if dimension == "TIME":
                    grid = (kept_frames(grid[0], keep), *grid[1:])
                else:
                    grid = (grid[0], *kept_window(*grid[1:], keep))
                if min(grid) < 1:
                    raise ValueError(nothing_left(dimension, keep, block, before))
                steps[f"{dimension.lower()}_{block}"] = (before, grid)
    return steps


def nothing_left(dimension: str, keep: float, block: int, grid: Sequence[int]) -> str:
    """The sentence for a share that selects nothing out of ``grid``, ``(T, H, W)``."""
    frames, height, width = grid
    found = f"{frames} frames" if dimension == "TIME" else f"{height}x{width} tokens"
    least = 1 / frames if dimension == "TIME" else 1 / min(height, width) ** 2
    unit = "frame" if dimension == "TIME" else "window"
    return (
        f"STTS.{dimension}.KEEP {keep:g} leaves no {unit} of the {found} that arrive at "
        f"block {block}: keep at least {min(least + 5e-4, 1):.3f}"
    )


def _validate_dimension(key: str, node, num_blocks: int) -> None:
    for leaf in ("BLOCKS", "KEEP"):
        if not isinstance(node[leaf], (list, tuple)):
            raise ValueError(f"{key}.{leaf} is {node[leaf]!r}: give a list")
    blocks, keep = list(node.BLOCKS), list(node.KEEP)
    if blocks and len(blocks) != len(keep):
        raise ValueError(
            f"{key}.KEEP has {len(keep)} values but {key}.BLOCKS has {len(blocks)}: "
            "give one share per block"
        )
    if len(set(blocks)) != len(blocks):
        raise ValueError(f"{key}.BLOCKS is {blocks}: name each block once")
    for block in blocks:
        if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < num_blocks:
            raise ValueError(
                f"{key}.BLOCKS names block {block!r}: the model's blocks are 0 to {num_blocks - 1}"
            )
    for share in keep if blocks else ():
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f"{key}.KEEP holds {share!r}: a share lies above 0 and up to 1")
    _one_of(f"{key}.SCORER", node.SCORER, SCORERS)


def _one_of(key: str, value, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{key} is {value!r}: use one of {', '.join(known)}")


def _at_least(key: str, value, least: int) -> None:
    if not isinstance(value, (int, float)) or not value >= least:
        raise ValueError(f"{key} is {value!r}: it must be at least {least}")
