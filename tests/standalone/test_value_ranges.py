"""Values out of range are refused when a config is read, by the key's name; one table has all."""

import logging
from pathlib import Path

import pytest
import torch

from stts_slowfast.configfiles.values import flatten
from stts_slowfast.standalone import config
from stts_slowfast.standalone.config import check_values, get_cfg, load_config
from stts_slowfast.standalone.launch import PRECISIONS
from stts_slowfast.standalone.transforms import normalize_clips
from stts_slowfast.standalone.value_ranges import check_solver

WRONG = {
    "SOLVER.CLIP_GRAD_L2NORM": [-1.0, "nan"],
    "SOLVER.CLIP_GRAD_VAL": [-0.1],
    "MIXUP.LABEL_SMOOTH_VALUE": [1.5, 1.0, -0.1],
    "MIXUP.PROB": [2, -0.1],
    "MIXUP.SWITCH_PROB": [-1, 1.1],
    "MIXUP.ALPHA": [-0.5],
    "MIXUP.CUTMIX_ALPHA": [-1],
    "AUG.RE_PROB": [1.5, -1],
    "AUG.RE_COUNT": [0],
    "AUG.RE_MODE": ["noise"],
    "AUG.NUM_SAMPLE": [0],
    "AUG.INTERPOLATION": ["box"],
    "SOLVER.MOMENTUM": [-1, 1.0],
    "SOLVER.DAMPENING": [-1, 1.5],
    "SOLVER.BETAS": [[0.9, 1.0], [0.9], [-0.1, 0.9]],
    "SOLVER.WEIGHT_DECAY": [-0.1],
    "SOLVER.BASE_LR": [0, -1.0, "inf"],
    "SOLVER.LR_POLICY": ["exp"],
    "SOLVER.OPTIMIZING_METHOD": ["lion"],
    "SOLVER.LAYER_DECAY": [1.5, 0],
    "SOLVER.MAX_EPOCH": [0],
    "SOLVER.WARMUP_EPOCHS": [-1],
    "SOLVER.STEPS": [[0, 4, 2], [-1]],
    "SOLVER.LRS": [["fast"], [-1.0]],
    "DATA.MEAN": [[], [0.4, 0.5], ["a"]],
    "DATA.STD": [[0.0], [0.2, 0.2, -0.2]],
    "DATA.TRAIN_JITTER_SCALES": [[256], [320, 256], [0, 1]],
    "DATA.TRAIN_JITTER_SCALES_RELATIVE": [[1.0, 0.08], [0.0, 1.0], [0.5]],
    "DATA.TRAIN_JITTER_ASPECT_RELATIVE": [[1.3333, 0.75], [0.75]],
    "DATA.SAMPLING_RATE": [0],
    "DATA.NUM_FRAMES": [-8],
    "DATA.TARGET_FPS": [0],
    "DATA.TRAIN_JITTER_FPS": [-5.0],
    "DATA.DECODING_BACKEND": ["decord"],
    "DATA.ENSEMBLE_METHOD": ["mean"],
    "DATA.MAX_BAD_SHARE": [1.5],
    "DATA.READ_TIMEOUT": [-1],
    "RNG_SEED": [-1, 2**32],
    "NUM_GPUS": [-1],
    "LOG_PERIOD": [0],
    "DATA_LOADER.NUM_WORKERS": [-1],
    "TRAIN.BATCH_SIZE": [0],
    "TRAIN.MIXED_PRECISION_DTYPE": ["half"],
    "TRAIN.CHECKPOINT_CLEAR_NAME_PATTERN": [[1]],
    "TEST.NUM_ENSEMBLE_VIEWS": [0, -2],
    "TEST.NUM_SPATIAL_CROPS": [0, 4],
    "TEST.NUM_TEMPORAL_CLIPS": [[2, 0]],
    "MODEL.NUM_CLASSES": [0],
    "MODEL.LOSS_FUNC": ["bce"],
    "MODEL.DROPOUT_RATE": [1.5],
    "MVIT.DROPPATH_RATE": [1.0],
    "MVIT.PATCH_STRIDE": [[2, 0, 4], [4]],
    "TIMESFORMER.DEPTH": [0],
    "VIDEO_SWIN.WINDOW_SIZE": [[8, 7]],
    # What no machine holds, or no clock counts to; fractions of what has none.
    **dict.fromkeys(["NUM_GPUS", "TRAIN.BATCH_SIZE", "MODEL.NUM_CLASSES", "MVIT.EMBED_DIM",
                     "MVIT.DEPTH", "DATA.NUM_FRAMES", "SOLVER.MAX_EPOCH"],
                    (10**18, 10**400)),
    **dict.fromkeys(["MVIT.MLP_RATIO", "MIXUP.ALPHA", "DATA.READ_TIMEOUT", "MVIT.HEAD_INIT_SCALE",
                     "SOLVER.WEIGHT_DECAY"],
                    (1e308, 10**400)),
    "MVIT.PATCH_KERNEL": [[1.5, 7, 7], [7, 7], [10**400] * 3],
    "VIDEO_SWIN.DEPTHS": [[2, 2, 6.5, 2]],
    **dict.fromkeys(["MVIT.DIM_MUL", "MVIT.HEAD_MUL"],
                    ([1, 2.0], [[1]], [["a", 2.0]], [[1.5, 2]], [[1, -2.0]], [[-1, 2.0]], [None],
                     [[1, "inf"]], [[1, True]])),
    **dict.fromkeys(["MVIT.POOL_Q_STRIDE", "MVIT.POOL_KV_STRIDE"],
                    ([1, 1, 2, 2], [[1, 2]], [[1, 1, 0, 2]], [[1, 1, 2, "x"]], [[1, 1, 1.5, 2]])),
}  # fmt: skip


@pytest.fixture
def read(tmp_path):
    """``read(*opts)``: an empty config with options."""
    path = tmp_path / "cfg.yaml"
    path.write_text("RNG_SEED: 0\n")
    return lambda *opts: load_config(str(path), opts)


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in WRONG.items() for v in values])
def test_a_value_out_of_range_is_refused_by_its_keys_name(read, key, value):
    with pytest.raises(ValueError, match=rf"^{key.replace('.', '[.]')} is .*: "):
        read(key, value if value not in ("nan", "inf") else float(value))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("SOLVER.CLIP_GRAD_L2NORM", -1.0, "is -1.0: it must be at least 0"),
        ("MIXUP.LABEL_SMOOTH_VALUE", 1.5, "is 1.5: it must be at least 0 and below 1"),
        ("DATA.MEAN", [1.0, 2.0], "it takes 1 or 3 values, each at least -1e6"),
        ("DATA.TRAIN_JITTER_SCALES_RELATIVE", [1.0, 0.08],
         "it takes 0 or 2 values, in ascending order, each above 0 and at most 1"),
        ("TEST.NUM_ENSEMBLE_VIEWS", 0, "it must be at least 1 and at most 1e6; or -1"),
        ("MVIT.DIM_MUL", [[1, -2]],
         "it takes lists, each of [a whole number at least 0 and below 1000, above 0 and at most"),
        ("MVIT.PATCH_KERNEL", [7, 7], "it takes 3 values, as MVIT.PATCH_2D is False"),
        ("SOLVER.LR_POLICY", "exp", "is 'exp': use one of cosine, steps"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_would_be_right(read, key, value, says):
    with pytest.raises(ValueError) as error:
        read(key, value)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_ends_of_ranges_and_none_pass(read):
    for key, value in [
        *(("SOLVER.CLIP_GRAD_L2NORM", each) for each in (None, 0.0, 1.0)),
        *(("MIXUP.PROB", each) for each in (0, 1)),
        *(("DATA.MEAN", each) for each in ([0.45], [0.45, 0.4, 0.4])),
        *(("TEST.NUM_ENSEMBLE_VIEWS", each) for each in (1, -1)),
        ("TEST.NUM_TEMPORAL_CLIPS", [-1]),
        ("SOLVER.LAYER_DECAY", 1.0),
        ("MVIT.DIM_MUL", [[0, 2.0], [999, 2]]),
        ("MVIT.POOL_Q_STRIDE", [[1, 1, 2, 2]]),
    ]:
        read(key, value)


def test_a_config_that_was_changed_is_checked_before_a_run(run):
    from stts_slowfast.standalone import engine

    for key, value in (("LOG_PERIOD", 0), ("RNG_SEED", -1)):
        cfg = run.cfg.clone()
        cfg[key] = value
        for job in (engine.train, engine.test):
            with pytest.raises(ValueError, match=f"^{key} is {value}: it must be"):
                job(cfg)
    assert not run.folder.exists()


def test_every_key_is_in_one_table():
    """A key is checked, refused, or said not to be read; yes and no, and names, need no range."""
    cfg = dict(flatten(get_cfg()))
    tables = config._RANGES, config._ONLY_IN_SLOWFAST, config._NOT_READ
    for table in tables:
        assert set(table) <= set(cfg)
    for key in config._KEYS:
        names = dict(flatten({key: config._KEYS[key]}))
        for name, value in names.items():
            count = sum(name in table for table in tables)
            assert count <= 1, name
            elsewhere = isinstance(value, (bool, str))
            assert count or elsewhere, f"{name} has no range"
    assert set(config._RANGES["TRAIN.MIXED_PRECISION_DTYPE"]) == set(PRECISIONS)


def test_what_nothing_reads_is_logged(read, caplog):
    with caplog.at_level(logging.WARNING):
        read("SOLVER.GAMMA", 0.5, "BN.NORM_TYPE", "batchnorm", "AUG.RE_SPLIT", True)
    assert [record.getMessage() for record in caplog.records] == [
        "AUG.RE_SPLIT is True, which nothing reads: SlowFast does not read it either, the "
        "number of splits is AUG.RE_COUNT",
        "SOLVER.GAMMA is 0.5, which nothing reads: no policy reads it, in SlowFast neither",
    ]
    with pytest.raises(ValueError, match=r"^DATA\.IN22k_VAL_IN1K is 'x': .*--engine slowfast"):
        read("DATA.IN22k_VAL_IN1K", "x")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"COSINE_END_LR": 0.2}, r"SOLVER\.COSINE_END_LR is 0\.2: it must be below"),
        ({"COSINE_AFTER_WARMUP": True, "WARMUP_EPOCHS": 400.0}, r"SOLVER\.WARMUP_EPOCHS is 400"),
        ({"LR_POLICY": "steps_with_relative_lrs"}, r"SOLVER\.STEPS is \[\] and SOLVER\.LRS"),
        ({"MOMENTUM": 0.0}, r"SOLVER\.NESTEROV is True with SOLVER\.MOMENTUM 0"),
        ({"DAMPENING": 0.5}, r"SOLVER\.NESTEROV is True .*SOLVER\.DAMPENING 0\.5"),
    ],
)
def test_solvers_that_contradict_themselves_are_explained(keys, message):
    cfg = get_cfg()
    check_solver(cfg)
    cfg.SOLVER.update(keys)
    check_values(cfg)
    with pytest.raises(ValueError, match=message):
        check_solver(cfg)


def test_one_mean_is_that_of_all_channels():
    cfg = get_cfg()
    clip = torch.randint(0, 256, (1, 3, 2, 4, 4), dtype=torch.uint8)
    expected = normalize_clips(clip, cfg)
    for reverse in (False, True):
        cfg.DATA.MEAN, cfg.DATA.STD, cfg.DATA.REVERSE_INPUT_CHANNEL = [0.45], [0.225], reverse
        torch.testing.assert_close(normalize_clips(clip, cfg), expected)


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].glob("configs/*/*.yaml")), ids=str
)
def test_our_own_configs_are_in_range(path):
    check_solver(load_config(str(path)))
