"""How much a selection keeps: frames, windows, tokens, ranges of shares, and resulting grids."""

from collections.abc import Mapping, Sequence

Sizes = tuple[int, int, int]
# A share of what arrives, or a range (low, high) of it.
Share = float | Sequence[float]
# Nodes of STTS with selectors, in the order in which they run before a block.
DIMENSIONS = ("TIME", "SPACE", "TOKENS")


def kept_frames(frames: int, keep: float) -> int:
    """How many of ``frames`` are kept at the share ``keep``: ``int(frames * keep)``.

    Args:
        frames: frames of tokens that arrive.
        keep: share of them, 0 to 1.
    """
    # The small term only undoes rounding: 0.29 * 100 is 28.999999999999996.
    return int(frames * keep + 1e-6)


def kept_window(height: int, width: int, keep: float) -> tuple[int, int]:
    """Height and width, in tokens, of the window that is kept at the share ``keep``.

    Args:
        height, width: of the frame, in tokens.
        keep: share of its tokens, 0 to 1.
    """
    if height == width:
        side = int(int(height * width * keep + 1e-6) ** 0.5)
        return side, side
    return int(height * keep**0.5 + 1e-6), int(width * keep**0.5 + 1e-6)


def kept_tokens(tokens: int, keep: float) -> int:
    """How many of ``tokens``, of a frame or of a clip, are kept at the share ``keep``.

    Args:
        tokens: number of tokens that arrive.
        keep: share of them, 0 to 1.
    """
    return int(tokens * keep + 1e-6)


def keep_range(keep: Share) -> tuple[float, float]:
    """The low and the high end of a share; a single number is both."""
    low, high = keep if isinstance(keep, Sequence) else (keep, keep)
    return low, high


def interpolate_share(keep: Share, position: float) -> float:
    """A share in a range: its low end at ``position`` 0, its high end at 1, between them on a
    geometric scale."""
    low, high = keep_range(keep)
    return high if low == high else low ** (1.0 - position) * high**position


def interpolate_sizes(low: Sequence[int], high: Sequence[int], sample: float) -> tuple[int, ...]:
    """Sizes between ``low`` and ``high``.

    A uniform ``sample`` in 0..1 gives each of them with equal probability.
    """
    steps = max(b - a for a, b in zip(low, high))
    step = min(int(sample * (steps + 1)), steps)
    return tuple(a + round(step * (b - a) / max(steps, 1)) for a, b in zip(low, high))


def window_stride(size: int, window: int, stride: int) -> int:
    """Tokens between neighbouring windows along one axis; ``stride`` 0 asks for the default."""
    return stride or max((size - window) // 2, 1)


def plan_grids(
    time: Mapping[int, Share],
    space: Mapping[int, Share],
    grids: Sequence[Sizes],
    end: int,
    tokens: Mapping[int, Share] | None = None,
    per_frame: bool = False,
) -> dict[str, tuple[Sizes, Sizes]]:
    """The grid before and after each selection.

    Args:
        time, space, tokens: shares by block.
        grids: the token grid ``(T, H, W)`` that arrives at each block without selection.
        end: of ranges, 0 for the low end and 1 for the high end.
        per_frame: whether single tokens are selected frame by frame.

    Returns:
        ``{"time_0": ((8, 56, 56), (7, 56, 56)), ...}`` in the order in which selectors run; after
        single tokens ``(1, 1, n)``, or, ``per_frame``, ``(T, 1, n)``.

    Raises:
        ValueError: if a share leaves no frame, no window or no token.
    """
    steps = {}
    sizes = grids[0]
    selections = dict(zip(DIMENSIONS, (time, space, tokens or {})))
    for block, full in enumerate(grids):
        if block and full != grids[block - 1]:
            strides = [round(a / b) for a, b in zip(grids[block - 1], full)]
            frames, height, width = (-(-size // stride) for size, stride in zip(sizes, strides))
            sizes = frames, height, width
        for dimension, shares in selections.items():
            if block in shares:
                share = keep_range(shares[block])[end]
                before, sizes = sizes, _after(dimension, sizes, share, per_frame)
                if min(sizes) < 1:
                    raise ValueError(
                        empty_selection_error(dimension, share, block, before, per_frame)
                    )
                steps[f"{dimension.lower()}_{block}"] = before, sizes
    return steps


def _after(dimension: str, sizes: Sizes, share: float, per_frame: bool) -> Sizes:
    """Sizes ``(T, H, W)`` after a selection."""
    frames, height, width = sizes
    if dimension == "TIME":
        return kept_frames(frames, share), height, width
    if dimension == "SPACE":
        return (frames, *kept_window(height, width, share))
    groups = frames if per_frame else 1
    arriving = frames * height * width // groups
    kept = kept_tokens(arriving, share)
    return sizes if kept == arriving else (groups, 1, kept)


def empty_selection_error(
    dimension: str, keep: float, block: int, grid: Sequence[int], per_frame: bool = False
) -> str:
    """The message for a share that keeps nothing of ``grid``, ``(T, H, W)``."""
    frames, height, width = grid
    if dimension == "TIME" and frames == 1:
        return (
            f"STTS.TIME.KEEP {keep:g} leaves no frame: one token frame arrives at block {block}, "
            "as of an image, and it cannot be dropped; set STTS.TIME.BLOCKS []"
        )
    if dimension == "TOKENS":
        count = height * width * (1 if per_frame else frames)
        found, least, unit = f"{count} tokens", 1 / count, "token"
        found = f"{found} of each frame" if per_frame else found
    elif dimension == "TIME":
        found, least, unit = f"{frames} frames", 1 / frames, "frame"
    else:
        found, least, unit = f"{height}x{width} tokens", 1 / min(height, width) ** 2, "window"
    return (
        f"STTS.{dimension}.KEEP {keep:g} leaves no {unit} of the {found} that arrive at "
        f"block {block}: keep at least {min(least + 5e-4, 1):.3f}"
    )
