"""``MODEL.MODEL_NAME hf:FOLDER``: a video classifier of transformers from ``save_pretrained``.

Sizes, classes, mean and standard deviation are the folder's. A config that contradicts them is
refused, except for ``MODEL.NUM_CLASSES``: another number gives the model a new classifier.
"""

import logging
import os
import re
from collections.abc import Collection
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from stts_slowfast.backbones.family import FAMILIES, Family
from stts_slowfast.backbones.state_dict import State
from stts_slowfast.backbones.timesformer_state_dict import is_transformers, to_transformers
from stts_slowfast.hosts import HOSTS
from stts_slowfast.plugins import require

logger = logging.getLogger(__name__)

PREFIX = "hf:"
# model_type of transformers to the host of its layers.
_HOSTS = {
    "videomae": "VideoMAE",
    "vivit": "ViViT",
    "vjepa2": "VJEPA2",
    "timesformer": "HFTimeSformer",
}


class VideoClassifier(nn.Module):
    """A classifier of transformers that maps clips ``(B, 3, T, H, W)`` to logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        if hasattr(model, "vjepa2"):  # only pretraining uses it
            model.vjepa2.predictor.requires_grad_(False)

    @property
    def hosted(self) -> nn.Module:
        """The model that has the blocks, see ``hosts.base_model``."""
        return self.model

    def no_weight_decay(self) -> list[str]:
        return ["cls_token", "position_embeddings", "time_embeddings"]

    def forward(self, clips: Tensor) -> Tensor:
        logits = self.model(clips.transpose(1, 2)).logits
        if len(logits) != len(clips):  # TimeSformer with attention in space only: one per frame
            logits = logits.unflatten(0, (len(clips), -1)).mean(1)
        return logits


def folder_of(cfg) -> str:
    """The folder that a config names.

    Raises:
        FileNotFoundError: if it was not written by ``save_pretrained``.
    """
    folder = cfg.MODEL.MODEL_NAME.removeprefix(PREFIX)
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise FileNotFoundError(
            f"MODEL.MODEL_NAME is {cfg.MODEL.MODEL_NAME!r}, but {folder or 'that'} holds no "
            "config.json: name a folder that save_pretrained wrote"
        )
    return folder


def resolve_config(cfg, given: Collection[str]) -> None:
    """Completes a config from its folder.

    Args:
        cfg: the config, changed in place.
        given: keys that a file or a command line sets.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if a given key contradicts the folder.
    """
    folder, config = folder_of(cfg), _config(cfg)
    frames = getattr(config, "num_frames", None) or config.frames_per_clip
    side = getattr(config, "image_size", None) or config.crop_size
    if not isinstance(side, int):
        if len(set(side)) > 1:
            raise ValueError(f"{folder} takes clips of {side}: only square ones can be read here")
        side = side[0]
    settings = {
        "DATA.NUM_FRAMES": frames,
        "DATA.TRAIN_CROP_SIZE": side,
        "DATA.TEST_CROP_SIZE": side,
        "MODEL.NUM_CLASSES": config.num_labels,
        "MODEL.DROPOUT_RATE": 0.0,  # the folder's config has its own
        # Lists of SSv2 are read as BGR; these models take RGB.
        "DATA.REVERSE_INPUT_CHANNEL": cfg.TRAIN.DATASET == "ssv2",
    }
    if not {"DATA.MEAN", "DATA.STD"} <= set(given):
        mean, std, short = _processing(folder, side)
        settings.update({"DATA.MEAN": mean, "DATA.STD": std})
        # The short side is scaled to the first value if one crop is tested, else to the crop.
        if "DATA.TRAIN_JITTER_SCALES" not in given:
            cfg.DATA.TRAIN_JITTER_SCALES = [short, short * 5 // 4]
    for key, value in settings.items():
        node, _, leaf = key.partition(".")
        if key in given and not _same(cfg[node][leaf], value):
            if key == "MODEL.NUM_CLASSES":
                continue
            raise ValueError(f"{key} is {cfg[node][leaf]}, but {folder} has {value}: leave it out")
        cfg[node][leaf] = value


def build(cfg) -> VideoClassifier:
    """The model of a config's folder, with its weights; a classifier of other classes is new."""
    folder = folder_of(cfg)
    if cfg.MODEL.DETACH_FINAL_FC:
        raise ValueError("MODEL.DETACH_FINAL_FC is not for MODEL.MODEL_NAME hf:")
    new = _config(cfg).num_labels != cfg.MODEL.NUM_CLASSES
    classes = {"num_labels": cfg.MODEL.NUM_CLASSES, "ignore_mismatched_sizes": True} if new else {}
    if new:
        logger.warning("%s: its classifier is new, for %d classes", folder, cfg.MODEL.NUM_CLASSES)
    auto = require("transformers").AutoModelForVideoClassification
    model = VideoClassifier(auto.from_pretrained(folder, local_files_only=True, **classes))
    model.stts_new = ("model.classifier",) if new else ()
    return model


def block_grids(cfg) -> list[tuple[int, int, int]]:
    """The token grid ``(T, H, W)`` that arrives at each layer without selection."""
    config = _config(cfg)
    host = HOSTS.get(_HOSTS[config.model_type])(SimpleNamespace(config=config))
    return [host.sizes] * config.num_hidden_layers


def layer(name: str, depth: int) -> int:
    """A parameter's layer for ``SOLVER.LAYER_DECAY``."""
    if match := re.search(r"\.layers?\.(\d+)\.", name):
        return int(match.group(1)) + 1
    return 0 if ".embeddings." in name else depth + 1


def from_slowfast(state: State, model: nn.Module) -> State:
    """Names of the classifier, of transformers or of TimeSformer's authors, to the model's."""
    if is_transformers(model.model.state_dict()) and "patch_embed.proj.weight" in state:
        state = to_transformers(state)
    own = model.state_dict()
    return {f"model.{key}" if f"model.{key}" in own else key: value for key, value in state.items()}


def _config(cfg):
    folder = folder_of(cfg)
    config = require("transformers").AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in _HOSTS:
        raise ValueError(f"{folder} is a {config.model_type}: use one of {', '.join(_HOSTS)}")
    return config


def _processing(folder: str, side: int) -> tuple[list[float], list[float], int]:
    """Mean and deviation of pixels in 0..1, and the short side, by the folder's processor.

    Each family normalises by its own formula, so they are found by processing black and white.
    """
    try:
        auto = require("transformers").AutoVideoProcessor
        processor = auto.from_pretrained(folder, local_files_only=True)
    except OSError as error:
        raise ValueError(
            f"{folder} has no processor (preprocessor_config.json): save it there, or give "
            "DATA.MEAN and DATA.STD"
        ) from error
    crop = getattr(processor, "crop_size", None)
    if getattr(processor, "do_center_crop", False) and crop and crop["height"] != side:
        raise ValueError(f"{folder}: its processor crops to {crop}, its model takes {side}")

    def processed(value: int) -> Tensor:
        clip = torch.full((4, 3, side, side), value, dtype=torch.uint8)
        found = processor(clip, do_resize=False, return_tensors="pt")
        return next(iter(found.values()))[0, 0, :, 0, 0].double()

    black, white = processed(0), processed(255)
    std = 1 / (white - black)
    mean, std = ([round(value, 6) for value in each.tolist()] for each in (-black * std, std))
    size = processor.size or {}
    return mean, std, getattr(size, "shortest_edge", None) or size.get("shortest_edge") or side


def _same(given, expected) -> bool:
    if isinstance(expected, list):
        close = all(abs(a - b) < 1e-3 for a, b in zip(given, expected))
        return len(given) == len(expected) and close
    return given == expected


FAMILIES.register(
    Family(
        "hf",
        build,
        block_grids,
        models=(VideoClassifier,),
        from_slowfast=from_slowfast,
        layer=layer,
        resolve_config=resolve_config,
        init_folder=folder_of,
    )
)
