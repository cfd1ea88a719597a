"""torch.fx traces models with selectors if it traces the original models."""

import copy
import pickle

import pytest
import torch
from torch import fx
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.video import MViT, SwinTransformer3d
from torchvision.models.video.mvit import MSBlockConfig

from stts_slowfast.hooks import attach, selections
from tests.hosts.examples import timm_frames


def mvit(**more):
    torch.manual_seed(0)
    blocks = [
        MSBlockConfig(
            num_heads=heads,
            input_channels=width,
            output_channels=16 * heads,
            kernel_q=[3, 3, 3],
            kernel_kv=[3, 3, 3],
            stride_q=stride,
            stride_kv=[1, 2, 2],
        )
        for heads, width, stride in ((1, 16, [1, 1, 1]), (2, 16, [1, 2, 2]), (2, 32, [1, 1, 1]))
    ]
    plain = {"residual_pool": False, "residual_with_cls_embed": True}
    plain |= {"rel_pos_embed": False, "proj_after_attn": False, "num_classes": 5}
    model = MViT((32, 32), 8, blocks, **{**plain, **more}).eval()
    for name, parameter in model.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.normal_(parameter)
    return model, torch.randn(2, 3, 8, 32, 32), "blocks.1"


def mvit_v2():
    return mvit(
        residual_pool=True, residual_with_cls_embed=False, rel_pos_embed=True, proj_after_attn=True
    )


def swin():
    torch.manual_seed(0)
    model = SwinTransformer3d([2, 4, 4], 16, [2, 2], [2, 2], [8, 3, 3], num_classes=5).eval()
    return model, torch.randn(2, 3, 8, 32, 32), "features.2"


def timm():
    model, clips, _ = timm_frames()
    return model, clips.flatten(0, 1), "blocks.1"


@pytest.fixture(params=[mvit, mvit_v2, swin, timm])
def case(request):
    model, clips, node = request.param()
    block = 1
    attach(model, time={0: 0.5}, space={block: 0.5}, num_samples=10)
    for parameter in model.stts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model, clips, node


@torch.no_grad()
def test_the_traced_model_computes_the_same(case):
    model, clips, _ = case
    traced = fx.symbolic_trace(model)
    for x in (clips, clips.flip(0)):
        expected, kept = model(x), selections(model)
        torch.testing.assert_close(traced(x), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(traced.stts.time_0.kept, kept["time_0"])
    assert set(dict(traced.named_parameters())) == set(dict(model.named_parameters()))


def test_the_traced_model_trains(case):
    model, clips, _ = case
    traced = fx.symbolic_trace(model.train())
    traced(clips).square().sum().backward()
    for key in ("time_0", "space_1"):
        gradients = [p.grad for p in traced.stts[key].parameters()]
        assert all(gradient is not None for gradient in gradients)
        assert any(gradient.abs().sum() > 0 for gradient in gradients)


@torch.no_grad()
def test_copies_of_the_traced_model_are_whole(case):
    model, clips, _ = case
    traced = fx.symbolic_trace(model)
    expected = traced(clips)
    for twin in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert torch.equal(twin(clips), expected)
        for parameter in twin.stts.parameters():
            parameter.fill_(torch.nan)
        with pytest.raises(ValueError, match="NaN"):
            twin(clips)
        assert torch.equal(traced(clips), expected)


@torch.no_grad()
def test_features_are_extracted(case):
    model, clips, node = case
    if getattr(model, "pos_encoding", None) and not any("rel_pos" in n for n in model.state_dict()):
        pytest.skip(
            "torchvision's extractor takes its addition of positions in place for dead code"
        )
    seen = []
    block = dict(model.named_modules())[node]
    handle = block.register_forward_hook(lambda block, args, out: seen.append(out))
    model(clips)
    handle.remove()
    extractor = create_feature_extractor(model, {node: "features"})
    out = extractor(clips)["features"]
    expected = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_a_block_alone_cannot_be_traced():
    model, _, _ = timm()
    attach(model, time={1: 0.5})
    container = torch.nn.Sequential(model.blocks[1])
    with pytest.raises(ValueError, match="trace the model to which they are attached"):
        fx.symbolic_trace(container)


@pytest.mark.filterwarnings("ignore")
def test_scripting_is_refused_in_words():
    for make in (mvit, timm):
        model, _, _ = make()
        attach(model, time={0: 0.5})
        with pytest.raises(AttributeError, match=r"by torch.jit.script: use torch.compile"):
            torch.jit.script(model)
