"""pytorchvideo's MViT: fused by views of its own, outside of SlowFast and as ``PTVMViT``."""

import copy

import pytest
import torch
from torch import nn

import stts_slowfast as stts
from stts_slowfast.fused import fuse_model
from stts_slowfast.fused.attention import AttentionReplacement
from stts_slowfast.fused.blocks import BlockReplacement

pytorchvideo = pytest.importorskip("pytorchvideo.models.vision_transformers")
layers = pytest.importorskip("pytorchvideo.layers.attention")


def mvit(**options) -> nn.Module:
    """Four blocks on 4x8x8 tokens."""
    return pytorchvideo.create_multiscale_vision_transformers(
        spatial_size=32,
        temporal_size=8,
        depth=4,
        patch_embed_dim=16,
        conv_patch_embed_kernel=(3, 7, 7),
        conv_patch_embed_stride=(2, 4, 4),
        conv_patch_embed_padding=(1, 3, 3),
        num_heads=1,
        droppath_rate_block=0.5,
        embed_dim_mul=[[1, 2.0]],
        atten_head_mul=[[1, 2.0]],
        pool_q_stride_size=[[1, 1, 2, 2]],
        pool_kv_stride_adaptive=[1, 4, 4],
        pool_kvq_kernel=[3, 3, 3],
        head_num_classes=5,
        **options,
    )


def results(model, clips, seed=0):
    torch.manual_seed(seed)
    out = model(clips)
    out.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return out.detach(), grads


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"residual_pool": True}, {"cls_embed_on": False}, {"separate_qkv": False}],
    ids=str,
)
def test_fused_numbers_are_the_stock_ones(options, training):
    model = mvit(**options).train(training)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    clips = torch.randn(2, 3, 8, 32, 32)
    stock = results(model, clips)
    assert fuse_model(model, True, True) == 4
    assert all(isinstance(block, BlockReplacement) for block in model.blocks)
    assert all(block.is_fused() for block in model.blocks)
    fused = results(model, clips)
    torch.testing.assert_close(fused[0], stock[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused[1], stock[1], rtol=1e-4, atol=1e-4)


def test_selection_outside_of_slowfast():
    model = mvit().train()
    clips = torch.randn(2, 3, 8, 32, 32)
    outputs = []
    for fuse in (True, False):
        twin = copy.deepcopy(model)
        torch.manual_seed(0)
        stts.attach(twin, time={0: 0.75}, space={2: 0.6}, num_samples=20, fused_attention=fuse)
        for parameter in twin.stts.parameters():
            nn.init.normal_(parameter, std=0.3)
        outputs.append(results(twin, clips))
        assert all(grad is not None for grad in outputs[-1][1].values())
        assert stts.selections(twin)["time_0"].shape == (2, 3)
    (out, grads), (expected, expected_grads) = outputs
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    scale = max(grad.abs().max() for grad in expected_grads.values()).item()
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=3e-5 * scale)


def test_pooling_before_the_projection_and_hooks_stay_stock():
    model = mvit(pool_first=True).eval()
    assert fuse_model(model, True, True) == 0
    model, clips, calls = mvit().eval(), torch.randn(1, 3, 8, 32, 32), []
    plain = model(clips)
    fuse_model(model, True, True)
    model.blocks[1].attn._attention_pool_k.register_forward_hook(lambda *args: calls.append(1))
    torch.testing.assert_close(model(clips), plain, rtol=1e-5, atol=1e-5)
    assert calls == [1]


def test_slowfasts_ptvmvit_is_fused(get_cfg, build):
    from slowfast.models.build import MODEL_REGISTRY

    cfg = get_cfg(stock="configs/Kinetics/pytorchvideo/MVIT_B_16x4_CONV.yaml")
    cfg.DATA.TRAIN_CROP_SIZE = cfg.DATA.TEST_CROP_SIZE = 64
    cfg.DATA.NUM_FRAMES = 8
    cfg.MVIT.POOL_KV_STRIDE = None  # its stock YAML does not build without
    model = MODEL_REGISTRY.get("PTVMViT")(cfg).eval()
    clips = [torch.randn(1, 3, 8, 64, 64)]
    stock = model(clips)
    assert fuse_model(model, True, True) == 16
    assert sum(isinstance(module, AttentionReplacement) for module in model.modules()) == 16
    torch.testing.assert_close(model(clips), stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["pyav", "torchvision"])
def test_slowfasts_loops_take_pytorchvideos_datasets(
    checkout, get_cfg, build, videos, monkeypatch, backend
):
    from slowfast.datasets import loader as loaders
    from slowfast.models import optimizer as optim
    from slowfast.utils.meters import TestMeter, TrainMeter

    monkeypatch.syspath_prepend(str(checkout / "tools"))  # as running a launcher there does
    import test_net
    import train_net

    opts = ("DATA.PATH_TO_DATA_DIR", str(videos), "DATA.DECODING_BACKEND", backend)
    cfg = get_cfg(*opts, "TRAIN.DATASET", "ptvkinetics", "TEST.DATASET", "ptvkinetics")
    cfg.DATA_LOADER.NUM_WORKERS = 0
    model = build(cfg)
    train, test = (loaders.construct_loader(cfg, split) for split in ("train", "test"))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    meter = TrainMeter(len(train), cfg)
    optimizer = optim.construct_optimizer(model, cfg)
    before = [parameter.clone() for parameter in model.parameters()]
    train_net.train_epoch(train, model, optimizer, scaler, meter, 0, cfg)
    assert not any(map(torch.equal, before, model.parameters()))
    meter = TestMeter(8, 2, 8, len(test), False, "sum")
    meter = test_net.perform_test(test, model, meter, cfg)
    assert meter.clip_count.tolist() == [2] * 8
