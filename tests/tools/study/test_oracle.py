"""The oracle selects what has the largest saliency of the clip's own loss."""

import torch
from torch.nn import functional as F

import stts_slowfast as stts
from stts_slowfast import saliency
from stts_slowfast.backbones.timesformer import TimeSformer
from stts_slowfast.tools.study.oracle import Oracle


def test_kept_frames_and_tokens_have_the_largest_saliency():
    torch.manual_seed(0)
    sizes = {"img_size": 16, "num_frames": 4, "patch_size": 4, "embed_dim": 16, "depth": 2}
    kind = {"num_heads": 2, "num_classes": 3, "attention_type": "joint_space_time"}
    model = TimeSformer(**sizes, **kind).eval()
    stts.attach(model, time={0: 0.5}, tokens={1: 0.25}, time_scorer="change")
    model.stts["tokens_1"].scorer.network.requires_grad_(False)
    oracle, clips, labels = Oracle(model), torch.randn(2, 3, 4, 16, 16), torch.tensor([0, 2])
    oracle.labels = labels
    with torch.no_grad():
        model(clips)
    kept = stts.selections(model)
    stts.detach(model)

    tokens = model.embed(clips)[0].detach()
    found = ranked(model, tokens, 0, labels, (4, 4, 4), torch.zeros(2, 4, 1), (4, 4))
    frames = found.topk(2).indices.sort().values
    assert torch.equal(kept["time_0"], frames)
    index = (frames[:, :, None] * 16 + torch.arange(16)).flatten(1) + 1
    x = torch.cat([tokens[:, :1], tokens.gather(1, index[:, :, None].expand(-1, -1, 16))], dim=1)
    x = model.blocks[0](x, (2, 4, 4))[0].detach()
    found = ranked(model, x, 1, labels, (2, 4, 4), torch.zeros(2, 2, 16), (1, 1))
    assert torch.equal(kept["tokens_1"], found.topk(8).indices.sort().values)


def ranked(model, x, first, labels, thw, scores, side):
    """Minus the gradient of scores ``(B, T, d)`` of zero, for patch tokens before a block."""
    scores.requires_grad_()
    grid = x[:, 1:].unflatten(1, thw).requires_grad_()
    taught = saliency.teach(grid, scores, (side, side))
    out = torch.cat([x[:, :1], taught.flatten(1, 3)], dim=1)
    for block in model.blocks[first:]:
        out, _ = block(out, thw)
    F.cross_entropy(model.head(model.norm(out[:, 0])), labels, reduction="sum").backward()
    return -scores.grad.flatten(1)
