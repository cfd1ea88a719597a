"""The oracle selects what has the largest saliency of the clip's own loss."""

import torch
from torch.nn import functional as F

import stts_slowfast as stts
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

    tokens, _ = model.embed(clips)
    tokens = tokens.detach().requires_grad_()
    found = saliency(model, tokens, 0, labels)  # (B, 4*16)
    frames = found.view(2, 4, 16).sum(2).topk(2).indices.sort().values
    assert torch.equal(kept["time_0"], frames)
    index = (frames[:, :, None] * 16 + torch.arange(16)).flatten(1) + 1
    x = torch.cat([tokens[:, :1], tokens.gather(1, index[:, :, None].expand(-1, -1, 16))], dim=1)
    x = model.blocks[0](x, (2, 4, 4))[0].detach().requires_grad_()
    found = saliency(model, x, 1, labels)
    assert torch.equal(kept["tokens_1"], found.topk(8).indices.sort().values)


def saliency(model, x, first, labels):
    """Of the patch tokens that arrive at block ``first``."""
    out = x
    for block in model.blocks[first:]:
        out, _ = block(out, (1, 1, out.shape[1] - 1))
    loss = F.cross_entropy(model.head(model.norm(out[:, 0])), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    return (gradient * x).abs().sum(2)[:, 1:].detach()
