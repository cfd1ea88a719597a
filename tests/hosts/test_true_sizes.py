"""Clips of other sizes than a model was made for, wherever the stock model takes them."""

import pytest
import torch

from stts_slowfast.hooks import attach, selections
from tests.hosts.byhand import frames, windows
from tests.hosts.examples import timesformer, timm_frames, timm_vit, vjepa2


def videos(model, clips):
    return model(clips).logits


def images(model, clips):
    return model(clips.flatten(0, 1))


def timm_dynamic():
    model, _ = timm_vit(dynamic_img_size=True)
    model.num_frames = 8
    return model


# model, how to call it, the sizes (T, H, W) of clips, and of their grids
CASES = {
    "vjepa2-larger": (lambda: vjepa2().model, videos, (8, 48, 48), (4, 6, 6)),
    "vjepa2-wide": (lambda: vjepa2().model, videos, (8, 32, 64), (4, 4, 8)),
    "vjepa2-long": (lambda: vjepa2().model, videos, (14, 32, 32), (7, 4, 4)),
    "timesformer-joint-long": (
        lambda: timesformer("joint_space_time").model, videos, (12, 32, 32), (12, 4, 4),
    ),
    "timesformer-joint-large": (
        lambda: timesformer("joint_space_time").model, videos, (8, 48, 48), (8, 6, 6),
    ),
    "timesformer-space-short": (
        lambda: timesformer("space_only").model, videos, (4, 32, 32), (4, 4, 4),
    ),
    "timesformer-divided-large": (lambda: timesformer().model, videos, (8, 48, 48), (8, 6, 6)),
    "timm-wide": (timm_dynamic, images, (8, 16, 64), (8, 2, 8)),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    make, call, (length, *image), grid = CASES[request.param]
    generator = torch.Generator().manual_seed(0)
    return make(), call, torch.randn(3, length, 3, *image, generator=generator), grid


@torch.no_grad()
def test_keeping_all_changes_no_bit(case):
    model, call, clips, _ = case
    plain = call(model, clips)
    attach(model, time={0: 1.0, 2: 1.0}, space={1: 1.0}, fused_attention=False)
    assert torch.equal(call(model, clips), plain)


@torch.no_grad()
def test_frames_and_windows_are_those_of_the_clips_own_grid(case):
    """Seen by scorers that score the grid which the host reads, block by block."""
    model, call, clips, (length, height, width) = case
    attach(model, time={1: 0.5}, space={2: 0.6}, fused_attention=False)
    seen = {}
    for key, selector in model.stts.items():
        selector.scorer.register_forward_hook(
            lambda scorer, args, out, key=key: seen.update({key: args[0]})
        )
    call(model, clips)
    kept = selections(model)
    assert seen["time_1"].shape[:4] == (3, length, height, width)
    assert seen["space_2"].shape[:4] == (3, length // 2, height, width)
    assert kept["time_1"].shape == (3, length // 2)
    assert frames(seen["time_1"], kept["time_1"]).shape == seen["space_2"].shape
    assert windows(seen["space_2"], kept["space_2"]).shape[0] == 3


@torch.no_grad()
def test_two_videos_of_space_only_attention_are_ranked_apart():
    model, clips, _ = timesformer("space_only")
    attach(model, time={0: 0.5}, fused_attention=False)
    for parameter in model.stts.parameters():
        parameter.normal_()
    model(clips)
    both = selections(model)["time_0"]
    for clip, kept in zip(clips, both):
        model(clip[None])
        assert torch.equal(selections(model)["time_0"][0], kept)


@torch.no_grad()
def test_frames_a_clip_may_change_after_attach():
    model, clips, _ = timm_frames()
    attach(model, time={0: 0.5}, fused_attention=False)
    model(clips.flatten(0, 1))
    assert selections(model)["time_0"].shape == (2, 4)
    model.num_frames = 4
    model(clips.flatten(0, 1))
    assert selections(model)["time_0"].shape == (4, 2)


def test_divided_attention_over_other_lengths_is_refused():
    model, clips, _ = timesformer()
    attach(model, time={0: 0.5})
    with pytest.raises(ValueError, match=r"has 4 frames, but .* config.num_frames \(8\) frames"):
        model(clips[:, :4])


@torch.no_grad()
def test_a_vjepa_of_other_size_has_the_positions_that_the_stock_model_gives():
    """Selecting the same frames by hand, with their positions in the whole clip."""
    model, _, _ = vjepa2()
    clips = torch.randn(2, 8, 3, 48, 48)
    attach(model, time={0: 0.5}, fused_attention=False)
    logits = model(clips).logits
    kept = selections(model)["time_0"]
    encoder = model.vjepa2.encoder
    for layer in encoder.layer:
        layer._forward_pre_hooks.clear()
    x = encoder.embeddings(clips).unflatten(1, (4, 6, 6))
    places = torch.arange(4 * 36).view(1, 4, 6, 6, 1).expand(2, -1, -1, -1, -1)
    x, places = (frames(both, kept).flatten(1, 3) for both in (x, places))
    for layer in encoder.layer:
        x = layer(x, places.flatten(1))[0]
    assert torch.equal(model.classifier(model.pooler(encoder.layernorm(x))), logits)
