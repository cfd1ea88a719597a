"""pytorchvideo's MViT, and SlowFast's PTVMViT around it: names there and back, equal logits."""

import inspect

import pytest
import torch
from torch import nn

from stts_slowfast import backbones
from stts_slowfast.checkpoints import convert, detect_format, load_weights, slowfast_state

transformers = pytest.importorskip("pytorchvideo.models.vision_transformers")
create = transformers.create_multiscale_vision_transformers
if "separate_qkv" not in inspect.signature(create).parameters:
    pytest.skip(
        "pytorchvideo 0.1.5 lacks separate_qkv; its repository has it", allow_module_level=True
    )


class PTVMViT(nn.Module):
    """Parameters as in SlowFast's PTVMViT: pytorchvideo's model under ``model``."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, clips):
        return self.model(clips)


def pytorchvideo(cfg, **changes):
    mvit = cfg.MVIT
    model = create(
        spatial_size=cfg.DATA.TRAIN_CROP_SIZE,
        temporal_size=cfg.DATA.NUM_FRAMES,
        depth=mvit.DEPTH,
        patch_embed_dim=mvit.EMBED_DIM,
        conv_patch_embed_kernel=tuple(mvit.PATCH_KERNEL),
        conv_patch_embed_stride=tuple(mvit.PATCH_STRIDE),
        conv_patch_embed_padding=tuple(mvit.PATCH_PADDING),
        num_heads=mvit.NUM_HEADS,
        embed_dim_mul=mvit.DIM_MUL,
        atten_head_mul=mvit.HEAD_MUL,
        pool_q_stride_size=mvit.POOL_Q_STRIDE,
        pool_kv_stride_size=mvit.POOL_KV_STRIDE or None,
        pool_kv_stride_adaptive=mvit.POOL_KV_STRIDE_ADAPTIVE,
        pool_kvq_kernel=mvit.POOL_KVQ_KERNEL,
        head_num_classes=cfg.MODEL.NUM_CLASSES,
        **changes,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("wrap", [lambda model: model, PTVMViT])
@torch.no_grad()
def test_its_weights_give_its_logits_here(tiny_cfg, wrap, separate):
    theirs = wrap(pytorchvideo(tiny_cfg, separate_qkv=separate))
    ours = backbones.build(tiny_cfg).eval()
    loaded = load_weights(ours, theirs.state_dict())
    assert "pytorchvideo" in loaded.format or "PTVMViT" in loaded.format
    assert not loaded.missing + loaded.unexpected + loaded.mismatched
    clips = torch.randn(2, 3, 8, 32, 32)
    torch.testing.assert_close(ours(clips), theirs(clips), rtol=0, atol=1e-5)


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("wrap", [lambda model: model, PTVMViT])
@torch.no_grad()
def test_slowfasts_weights_load_into_it(tiny_cfg, golden, wrap, separate):
    case = golden("slowfast_mvit_v1")
    theirs = wrap(pytorchvideo(tiny_cfg, separate_qkv=separate))
    loaded = load_weights(theirs, case.weights)
    assert not loaded.missing + loaded.unexpected + loaded.mismatched
    clips = torch.randn(2, 3, 8, 32, 32)
    ours = backbones.build(tiny_cfg).eval()
    load_weights(ours, case.weights)
    torch.testing.assert_close(theirs(clips), ours(clips), rtol=0, atol=1e-5)
    back = slowfast_state(theirs)
    assert set(back) == set(case.weights)
    assert all(torch.equal(back[key], case.weights[key]) for key in back)


@pytest.mark.parametrize(
    ("wrap", "target"), [(lambda model: model, "pytorchvideo"), (PTVMViT, "ptvmvit")]
)
def test_files_convert_there_and_back(tiny_cfg, wrap, target):
    state = wrap(pytorchvideo(tiny_cfg)).state_dict()
    scorer = {"stts.time_0.scorer.network.embed.0.weight": torch.ones(3)}
    there, source, _ = convert({"model_state": {**state, **scorer}}, "slowfast", [])
    assert source.target == target
    assert detect_format(there["model_state"]).name == "a SlowFast MViT"
    back, _, _ = convert(there, target, [])
    back = back.get("model_state", back)
    assert set(back) == {*state, *scorer}
    assert all(torch.equal(back[key], state[key]) for key in state)
