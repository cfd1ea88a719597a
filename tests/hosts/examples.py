"""Small models with random weights, one a host, and what it takes to run each."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

WIDTH = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}


class Example(NamedTuple):
    """A model of a host in evaluation, its clips, and how to get logits out of both."""

    model: nn.Module
    clips: Tensor
    logits: Callable[[nn.Module, Tensor], Tensor]


def hugging(name: str, model: str, size: dict, seed: int, **more) -> Example:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = getattr(transformers, f"{name}Config")
    width = {} if "vision_config" in size else WIDTH
    config = config(**width, **size, **{"num_labels": 5, **more})
    model = getattr(transformers, f"{name}{model}")(config).eval()
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():  # biases and cls tokens that start at 0 hide mistakes
        parameter.data.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    clips = torch.randn(2, 8, 3, 32, 32, generator=draw)
    if model.base_model_prefix in model._modules:
        return Example(model, clips, lambda model, clips: model(clips).logits)
    return Example(model, clips, lambda model, clips: model(clips).last_hidden_state)


def videomae(model="ForVideoClassification", **more):
    size = {"num_frames": 8, "image_size": 32, "patch_size": 8, "intermediate_size": 48}
    return hugging("VideoMAE", model, size, 1, **more)


def vivit():
    size = {"num_frames": 8, "image_size": 32, "tubelet_size": [2, 8, 8], "intermediate_size": 48}
    return hugging("Vivit", "ForVideoClassification", size, 2)


def vjepa2():
    size = {"frames_per_clip": 8, "crop_size": 32, "patch_size": 8, "mlp_ratio": 2.0}
    pooler = {"num_pooler_layers": 1, "pred_num_hidden_layers": 1, "pred_hidden_size": 24}
    return hugging("VJEPA2", "ForVideoClassification", size | pooler, 3, pred_num_attention_heads=2)


def timesformer(attention="divided_space_time", model="ForVideoClassification"):
    size = {"num_frames": 8, "image_size": 32, "patch_size": 8, "intermediate_size": 48}
    return hugging("Timesformer", model, size, 4, attention_type=attention)


def hf_frames(name, model="ForImageClassification", **more):
    """Of images, frame by frame; without a head the logits are the first token's channels."""
    size = {"image_size": 32, "patch_size": 8} | more
    if name in ("Siglip", "CLIP"):
        size["intermediate_size"] = 48
        if model == "ForImageClassification":
            vision = {**WIDTH, **size}
            size = {"vision_config": vision, "text_config": {**WIDTH, "intermediate_size": 48}}
        else:
            name += "Vision"
    elif name == "DINOv3ViT":
        size["intermediate_size"] = 48
    else:
        size["mlp_ratio"] = 2
    made = hugging(name, model.removeprefix("Vision"), size, 7).model
    made.num_frames = 8

    def logits(model, clips):
        out = model(clips.flatten(0, 1))
        found = out.logits if hasattr(out, "logits") else out.last_hidden_state.mean(1)
        return found.unflatten(0, (len(clips), -1)).mean(1)

    clips = torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    return Example(made, clips, logits)


def videoprism():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    size = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48}
    size |= {"image_size": 32, "tubelet_size": [1, 8, 8], "num_frames": 8, "num_labels": 5}
    config = transformers.VideoPrismVisionConfig(
        num_spatial_layers=4, num_temporal_layers=1, **size
    )
    torch.manual_seed(9)
    model = transformers.VideoPrismForVideoClassification(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return Example(model, torch.randn(2, 8, 3, 32, 32), lambda model, clips: model(clips).logits)


def timm_vit(**more):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(5)
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, num_classes=5, **more
    ).eval()
    return model, torch.randn(2, 8, 3, 32, 32)


def timm_eva(**more):
    """With rotary positions, as PE and DINOv3 have them."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    kind = {"use_rot_pos_emb": True, "attn_type": "rope", "rope_rotate_half": True} | more
    torch.manual_seed(5)
    model = timm.models.eva.Eva(**sizes, num_classes=5, **kind).eval()
    return timm_frames(model)


def timm_frames(model=None, **more):
    made, clips = timm_vit(**more)
    model = model or made
    model.num_frames = 8

    def logits(model, clips):
        return model(clips.flatten(0, 1)).unflatten(0, (len(clips), -1)).mean(1)

    return Example(model, clips, logits)


class Tubelets(nn.Module):
    """Patches of two frames, as an ``embed_layer`` for timm."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim, **unused):
        super().__init__()
        self.grid_size = (4, img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1] * self.grid_size[2]
        kernel = (2, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel, kernel)

    def forward(self, clips):
        return self.proj(clips).flatten(2).transpose(1, 2)


def timm_tubelets():
    model, clips = timm_vit(embed_layer=Tubelets)
    return Example(model, clips.transpose(1, 2), lambda model, clips: model(clips))


class PlainBlock(nn.Module):
    """Called as x = block(x), as in the code of VideoMAE, VideoMAE v2 and UMT."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def attend(self, x, turn=lambda x: x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(
            turn(q).to(v.dtype), turn(k).to(v.dtype), v
        )
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class RotaryBlock(PlainBlock):
    """Rotates queries and keys by the position of a token, as in the authors' code of V-JEPA 2."""

    def __init__(self, width):
        super().__init__(width)
        speeds = torch.tensor([1.0, 0.5, 0.2]).repeat(2)
        self.register_buffer("speeds", speeds, persistent=False)

    def forward(self, x, mask=None, attn_mask=None, T=None, H_patches=None, W_patches=None):
        if mask is None:
            mask = torch.arange(T * H_patches * W_patches, device=x.device)[None]
        frame, row, column = mask // (H_patches * W_patches), mask // W_patches, mask % W_patches
        angle = (frame + 0.3 * (row % H_patches) + 0.1 * column)[:, None, :, None]
        angle = angle * self.speeds

        def turn(x):
            first, second = x[..., :6].chunk(2, dim=-1)
            turned = x[..., :6] * angle.cos() + torch.cat([-second, first], -1) * angle.sin()
            return torch.cat([turned, x[..., 6:]], dim=-1)

        x = x + self.attend(self.norm1(x), turn)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width, tubelet=2, side=8):
        super().__init__()
        self.proj = nn.Conv3d(3, width, (tubelet, side, side), (tubelet, side, side))

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class ResearchViT(nn.Module):
    """A sequence of blocks after tubelets, in plain PyTorch."""

    def __init__(self, block, width=24):
        super().__init__()
        self.num_frames, self.tubelet_size, self.patch_size = 8, 2, 8
        self.img_height = self.img_width = 32
        self.patch_embed = PatchEmbed(width)
        self.blocks = nn.ModuleList(block(width) for _ in range(4))
        self.head, self.rotary = nn.Linear(width, 5), issubclass(block, RotaryBlock)

    def forward(self, clips):
        _, _, frames, height, width = clips.shape
        x = self.patch_embed(clips)
        sizes = {"T": frames // 2, "H_patches": height // 8, "W_patches": width // 8}
        for block in self.blocks:
            x = block(x, **sizes) if self.rotary else block(x)
        return self.head(x.mean(1))


def research(block):
    torch.manual_seed(8)
    model = ResearchViT(block).eval()
    clips = torch.randn(2, 3, 8, 32, 32)
    return Example(model, clips, lambda model, clips: model(clips))


def pytorchvideo():
    vit = pytest.importorskip(
        "pytorchvideo.models.vision_transformers", reason="pytorchvideo is not installed"
    )
    torch.manual_seed(6)
    model = vit.create_multiscale_vision_transformers(
        spatial_size=32,
        temporal_size=8,
        depth=4,
        patch_embed_dim=24,
        conv_patch_embed_stride=(2, 8, 8),
        num_heads=2,
        head_num_classes=5,
        head_dropout_rate=0.0,
    ).eval()
    return Example(model, torch.randn(2, 3, 8, 32, 32), lambda model, clips: model(clips))


EXAMPLES = {
    "videomae": videomae,
    "videomae-token": lambda: videomae(use_mean_pooling=False),
    "videomae-model": lambda: videomae("Model"),
    "vivit": vivit,
    "vjepa2": vjepa2,
    "timesformer-divided": timesformer,
    "timesformer-joint": lambda: timesformer("joint_space_time"),
    "timesformer-space": lambda: timesformer("space_only"),
    "videoprism": videoprism,
    "siglip": lambda: hf_frames("Siglip"),
    "clip": lambda: hf_frames("CLIP", "VisionModel"),
    "dinov2": lambda: hf_frames("Dinov2WithRegisters"),
    "dinov3": lambda: hf_frames("DINOv3ViT", "Model"),
    "timm-frames": timm_frames,
    "timm-registers": lambda: timm_frames(reg_tokens=2, global_pool="avg"),
    "timm-dinov3": lambda: timm_eva(num_reg_tokens=2, rope_type="dinov3"),
    "timm-tubelets": timm_tubelets,
    "plain": lambda: research(PlainBlock),
    "vjepa2-official": lambda: research(RotaryBlock),
    "pytorchvideo": pytorchvideo,
}
