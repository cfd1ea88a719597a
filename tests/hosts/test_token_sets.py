"""Single tokens, with every host: the same numbers as windows and frames of the same tokens."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from stts_slowfast.hooks import attach, detach, selections
from stts_slowfast.hosts import find_blocks, resolve_host
from tests.hosts.examples import EXAMPLES

NEED_A_GRID = ("timesformer-divided", "videoprism")


class Chosen(torch.nn.Module):
    """Scores that the test decides on."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def forward(self, *_):
        return self.scores


def run(example, scores, **selection):
    attach(example.model, fused_attention=False, **selection)
    (key,) = example.model.stts
    example.model.stts[key].scorer = Chosen(scores)
    with torch.no_grad():
        found = example.logits(example.model, example.clips)
    kept = selections(example.model)[key]
    detach(example.model)
    return found, kept


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in NEED_A_GRID])
def test_tokens_of_windows_and_of_frames_give_the_numbers_of_these(name):
    example = EXAMPLES[name]()
    by_frame = getattr(resolve_host(example.model)[0], "by_frame", False)
    count = 8 if by_frame or "timesformer" in name else 4  # frames of 4x4 tokens
    windows, corners = run(example, torch.rand(2 * count, 9), space={1: 0.25})
    marks = torch.zeros(2 * count, 4, 4)
    for mark, (top, left, height, width) in zip(marks, corners.tolist()):
        mark[top : top + height, left : left + width] = 1
    marks = marks.view(2, -1)
    tokens, kept = run(example, marks, tokens={1: 0.25}, tokens_per_frame=True)
    assert kept.tolist() == [mark.nonzero()[:, 0].tolist() for mark in marks]
    torch.testing.assert_close(tokens, windows, rtol=1e-5, atol=1e-6)
    if by_frame:
        return
    frames, chosen = run(example, torch.rand(2, count), time={1: 0.5})
    marks = torch.zeros(2, count, 16).scatter(1, chosen[:, :, None].expand(-1, -1, 16), 1.0)
    tokens, _ = run(example, marks.flatten(1), tokens={1: 0.5})
    torch.testing.assert_close(tokens, frames, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["vjepa2", "dinov3", "timm-registers", "timesformer-joint"])
@torch.no_grad()
def test_the_rest_changes_tokens_but_no_positions_and_masks(name):
    example, seen = EXAMPLES[name](), []
    for rest in ("drop", "merge"):
        attach(example.model, tokens={1: 0.25}, tokens_scorer="norm", tokens_rest=rest)
        handle = find_blocks(example.model)[1].register_forward_pre_hook(
            lambda block, args, kwargs: seen.append(tree_leaves((args, kwargs))), with_kwargs=True
        )
        example.logits(example.model, example.clips)
        handle.remove()
        detach(example.model)
    (dropped, *others), (merged, *again) = seen
    assert all(torch.equal(*pair) for pair in zip(others, again) if torch.is_tensor(pair[0]))
    assert merged.shape == dropped.shape and not torch.equal(merged, dropped)


@pytest.mark.parametrize("name", NEED_A_GRID)
def test_attention_over_time_at_each_position_is_refused(name):
    model = EXAMPLES[name]().model
    with pytest.raises(ValueError, match=r"tokens is \[1\], .* attend over time .*\(space\)"):
        attach(model, tokens={1: 0.5})
    assert not hasattr(model, "stts")
