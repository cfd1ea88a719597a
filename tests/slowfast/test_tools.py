"""Parts of SlowFast that few runs reach, and that are mended: each fails without its mend."""

import argparse

import numpy as np
import pytest
import torch

SMALL = [
    "MODEL.NUM_CLASSES",
    "8",
    "DATA.NUM_FRAMES",
    "8",
    "DATA.TRAIN_CROP_SIZE",
    "64",
    "DATA.TEST_CROP_SIZE",
    "64",
    "MVIT.DEPTH",
    "4",
    "MVIT.EMBED_DIM",
    "16",
    "MVIT.DIM_MUL",
    "[[1,2.0]]",
    "MVIT.HEAD_MUL",
    "[[1,2.0]]",
    "MVIT.POOL_Q_STRIDE",
    "[[1,1,2,2]]",
    "STTS.SPACE.BLOCKS",
    "[2]",
    "STTS.TIME.KEEP",
    "[0.5]",
    "STTS.NUM_SAMPLES",
    "9",
]


def test_mt_adamw_trains(get_cfg, build):
    from slowfast.models.optimizer import construct_optimizer

    cfg = get_cfg("SOLVER.OPTIMIZING_METHOD", "mt_adamw")
    optimizer = construct_optimizer(build(cfg), cfg)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["foreach"] is True


def test_pytorchvideos_mvit_builds_by_its_own_config_and_selects(get_cfg, build):
    stock = "configs/Kinetics/pytorchvideo/MVIT_B_16x4_CONV.yaml"
    model = build(get_cfg("STTS.ENABLE", True, *SMALL, stock=stock))
    assert type(model).__name__ == "PTVMViT"
    clip = torch.randn(2, 3, 8, 64, 64)
    model.eval()([clip])
    from stts_slowfast.hooks import selections

    assert selections(model)["time_0"].shape == (2, 2)
    model.train()([clip]).sum().backward()
    assert all(p.grad is not None for p in model.stts.parameters())


def test_a_batch_of_the_visualization_has_four_parts(get_cfg, videos, monkeypatch):
    from slowfast.datasets import loader

    from stts_slowfast.pyslowfast import shards

    cfg = get_cfg("DATA.PATH_TO_DATA_DIR", str(videos), "DATA_LOADER.NUM_WORKERS", 0)
    assert len(next(iter(loader.construct_loader(cfg, "test")))) == 5
    monkeypatch.setattr(shards, "_job", "visualize")
    four = loader.construct_loader(cfg, "test")
    inputs, labels, indices, meta = next(iter(four))
    assert (inputs[0].shape[:2], labels.shape, indices.shape) == ((4, 3), (4,), (4,))
    assert isinstance(meta, dict) and len(four) == 4


def test_the_benchmark_reads_its_config(checkout, tmp_path):
    from slowfast.utils.parser import load_config

    (tmp_path / "run.yaml").write_text(f"TRAIN:\n  BATCH_SIZE: 3\nOUTPUT_DIR: {tmp_path}\n")
    args = argparse.Namespace(cfg_files=[str(tmp_path / "run.yaml")], opts=None)
    assert load_config(args).TRAIN.BATCH_SIZE == 3


@pytest.mark.parametrize(("arch", "shape"), [("mvit", (32, 32)), ("slow", (32, 48))])
def test_the_demo_crops_for_mvit_alone(get_cfg, arch, shape):
    from slowfast.visualization import predictor

    frames = [np.zeros((32, 48, 3), np.uint8)] * 8
    (clip,) = predictor.process_cv2_inputs(frames, get_cfg("MODEL.ARCH", arch))
    assert tuple(clip.shape[-2:]) == shape


def test_avas_meter_takes_the_end_of_a_test_iteration_once(get_cfg, monkeypatch):
    from fvcore.common.timer import Timer
    from slowfast.utils import meters

    lines = []
    monkeypatch.setattr(meters.logging, "log_json_stats", lines.append)
    meter = object.__new__(meters.AVAMeter)
    meter.cfg, meter.mode, meter.overall_iters = get_cfg("LOG_PERIOD", 1), "test", 2
    meter.iter_timer, meter.data_timer, meter.net_timer = Timer(), Timer(), Timer()
    meter.all_preds, meter.all_ori_boxes, meter.all_metadata = [], [], []
    meter.iter_tic()
    for number in range(2):  # in the order of perform_test
        meter.data_toc()
        meter.iter_toc()
        meter.update_stats(torch.ones(3, 8), torch.ones(3, 5), torch.ones(3, 2))
        meter.log_iter_stats(None, number)
        meter.iter_toc()
        meter.update_stats(torch.ones(3, 8), torch.ones(3), torch.ones(1))
        meter.log_iter_stats(number)
        meter.iter_tic()
    assert [line["cur_iter"] for line in lines] == ["1", "2"]
    assert [boxes.shape for boxes in meter.all_ori_boxes] == [(3, 5), (3, 5)]
