"""Inside SlowFast: scorers that could not learn are refused, and the logged grid is the clip's."""

import logging

import pytest


@pytest.mark.parametrize(
    ("key", "value"), [("SIGMA", 0.0), ("SIGMA", 1e-4), ("NUM_SAMPLES", 1)], ids=str
)
def test_learned_scorers_without_a_gradient_are_refused_in_training(get_cfg, build, key, value):
    from slowfast.models import optimizer as optim

    cfg = get_cfg("STTS.ENABLE", True, f"STTS.{key}", value, "STTS.OPERATOR", "perturbed")
    model = build(cfg)  # testing takes such a node

    def first_iteration():
        optim.set_lr(optim.construct_optimizer(model, cfg), optim.get_epoch_lr(0.0, cfg))

    with pytest.raises(ValueError, match=rf"STTS\.{key} is .*(gradient|baseline)"):
        first_iteration()


@pytest.mark.parametrize(
    ("job", "step"), [("train", "4x8x8 -> 2x8x8"), ("test", "4x16x16 -> 2x16x16")]
)
def test_the_logged_grid_is_that_of_the_clips_to_come(
    get_cfg, build, monkeypatch, caplog, job, step
):
    from stts_slowfast.pyslowfast import shards

    monkeypatch.setattr(shards, "_job", job)
    sizes = {"WINDOW_SIZE": [8, 4, 4], "EMBED_DIM": 12}
    opts = [word for key, size in sizes.items() for word in (f"VIDEO_SWIN.{key}", size)]
    opts += ["MODEL.MODEL_NAME", "VideoSwin", "STTS.SPACE.BLOCKS", []]
    with caplog.at_level(logging.INFO, logger="stts_slowfast.hooks"):
        build(get_cfg("STTS.ENABLE", True, "DATA.TEST_CROP_SIZE", 64, *opts))
    (line,) = [line for line in caplog.messages if line.startswith("STTS time_0")]
    assert step in line
