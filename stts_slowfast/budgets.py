"""How much a selection keeps: frames, windows, ranges of shares, and the grids that result."""

from collections.abc import Mapping, Sequence

Sizes = tuple[int, int, int]
# A share of what arrives, or a range (low, high) of it.
Share = float | Sequence[float]


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
    time: Mapping[int, Share], space: Mapping[int, Share], grids: Sequence[Sizes], end: int
) -> dict[str, tuple[Sizes, Sizes]]:
    """The grid before and after each selection.

    Args:
        time, space: shares by block.
        grids: the token grid ``(T, H, W)`` that arrives at each block without selection.
        end: of ranges, 0 for the low end and 1 for the high end.

    Returns:
        ``{"time_0": ((8, 56, 56), (7, 56, 56)), ...}`` in the order in which selectors run.

    Raises:
        ValueError: if a share leaves no frame or no window.
    """
    steps = {}
    frames, height, width = grids[0]
    for block, full in enumerate(grids):
        if block:
            strides = [round(a / b) for a, b in zip(grids[block - 1], full)]
            frames, height, width = (
                -(-size // stride) for size, stride in zip((frames, height, width), strides)
            )
        for dimension, shares in (("TIME", time), ("SPACE", space)):
            if block not in shares:
                continue
            before, share = (frames, height, width), keep_range(shares[block])[end]
            if dimension == "TIME":
                frames = kept_frames(frames, share)
            else:
                height, width = kept_window(height, width, share)
            if min(frames, height, width) < 1:
                raise ValueError(empty_selection_error(dimension, share, block, before))
            steps[f"{dimension.lower()}_{block}"] = before, (frames, height, width)
    return steps


def empty_selection_error(dimension: str, keep: float, block: int, grid: Sequence[int]) -> str:
    """The message for a share that keeps nothing of ``grid``, ``(T, H, W)``."""
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
