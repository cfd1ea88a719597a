"""This project's own YAMLs, read by SlowFast."""

from pathlib import Path

import pytest
import torch

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_our_recipes_are_slowfast_configs(get_cfg, recipe):
    from slowfast.config.defaults import assert_and_infer_cfg
    from slowfast.datasets.utils import pack_pathway_output
    from slowfast.models.build import MODEL_REGISTRY

    cfg = assert_and_infer_cfg(get_cfg(stock=str(CONFIGS / recipe)))
    assert cfg.STTS.ENABLE
    assert cfg.MODEL.MODEL_NAME in MODEL_REGISTRY
    (pathway,) = pack_pathway_output(cfg, torch.zeros(3, 4, 8, 8))
    assert pathway.shape == (3, 4, 8, 8)
    assert cfg.TRAIN.DATASET in ("kinetics", "ssv2")
