"""Config files: SlowFast's are read as they are, and mistakes are named."""

import pytest
import yaml

from stts_slowfast.standalone.config import check_values, get_cfg, load_config

# The keys of SlowFast's MViT configs, with values of the types that stand there.
MVIT_KEYS = """
TRAIN: {ENABLE: True, DATASET: kinetics, BATCH_SIZE: 16, EVAL_PERIOD: 10, CHECKPOINT_PERIOD: 10,
        AUTO_RESUME: True, CHECKPOINT_TYPE: pytorch, CHECKPOINT_EPOCH_RESET: True,
        MIXED_PRECISION: False}
DATA: {USE_OFFSET_SAMPLING: True, DECODING_BACKEND: torchvision, NUM_FRAMES: 16, SAMPLING_RATE: 4,
       TRAIN_JITTER_SCALES: [256, 320], TRAIN_CROP_SIZE: 224, TEST_CROP_SIZE: 224,
       INPUT_CHANNEL_NUM: [3], TRAIN_JITTER_SCALES_RELATIVE: [0.08, 1.0],
       TRAIN_JITTER_ASPECT_RELATIVE: [0.75, 1.3333], INV_UNIFORM_SAMPLE: True, RANDOM_FLIP: False,
       REVERSE_INPUT_CHANNEL: True, DECODING_SHORT_SIZE: 320, MEAN: [0.45, 0.45, 0.45]}
MVIT: {ZERO_DECAY_POS_CLS: False, SEP_POS_EMBED: True, USE_ABS_POS: False, REL_POS_SPATIAL: True,
       REL_POS_TEMPORAL: True, DEPTH: 16, NUM_HEADS: 1, EMBED_DIM: 96, PATCH_KERNEL: "(3, 7, 7)",
       PATCH_STRIDE: "(2, 4, 4)", PATCH_PADDING: "(1, 3, 3)", MLP_RATIO: 4.0, QKV_BIAS: True,
       DROPPATH_RATE: 0.2, NORM: layernorm, MODE: conv, CLS_EMBED_ON: True,
       DIM_MUL: [[1, 2.0], [3, 2.0]], HEAD_MUL: [[1, 2.0], [3, 2.0]], POOL_KVQ_KERNEL: [3, 3, 3],
       POOL_KV_STRIDE_ADAPTIVE: [1, 8, 8], POOL_Q_STRIDE: [[1, 1, 2, 2]], DROPOUT_RATE: 0.0,
       DIM_MUL_IN_ATT: True, RESIDUAL_POOLING: True, LAYER_SCALE_INIT_VALUE: 0.0,
       USE_MEAN_POOLING: True, HEAD_INIT_SCALE: 0.001}
AUG: {NUM_SAMPLE: 2, ENABLE: True, COLOR_JITTER: None, AA_TYPE: rand-m7-n4-mstd0.5-inc1,
      INTERPOLATION: bicubic, RE_PROB: 0.25, RE_MODE: pixel, RE_COUNT: 1, RE_SPLIT: False}
MIXUP: {ENABLE: True, ALPHA: 0.8, CUTMIX_ALPHA: 1.0, PROB: 1.0, SWITCH_PROB: 0.5,
        LABEL_SMOOTH_VALUE: 0.1}
BN: {USE_PRECISE_STATS: False, NUM_BATCHES_PRECISE: 200}
SOLVER: {ZERO_WD_1D_PARAM: True, CLIP_GRAD_L2NORM: 1.0, BASE_LR_SCALE_NUM_SHARDS: True,
         BASE_LR: 1e-4, COSINE_AFTER_WARMUP: True, COSINE_END_LR: 1e-6, WARMUP_START_LR: 1e-6,
         WARMUP_EPOCHS: 30.0, LR_POLICY: cosine, MAX_EPOCH: 200, MOMENTUM: 0.9, WEIGHT_DECAY: 5e-2,
         OPTIMIZING_METHOD: adamw, LAYER_DECAY: 0.75}
MODEL: {NUM_CLASSES: 400, ARCH: mvit, MODEL_NAME: MViT, LOSS_FUNC: soft_cross_entropy,
        DROPOUT_RATE: 0.5}
TEST: {ENABLE: True, DATASET: kinetics, BATCH_SIZE: 64, NUM_SPATIAL_CROPS: 1,
       NUM_ENSEMBLE_VIEWS: 5, NUM_TEMPORAL_CLIPS: [5, 7, 10]}
DATA_LOADER: {NUM_WORKERS: 8, PIN_MEMORY: True}
PREFETCH: {NUM_LOADERS: 3}
TASK: ssl_eval
NUM_GPUS: 8
NUM_SHARDS: 1
RNG_SEED: 0
OUTPUT_DIR: .
"""


@pytest.fixture
def write(tmp_path):
    def _write(text, name="config.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return _write


def test_every_key_of_slowfasts_mvit_configs_is_read(write):
    cfg = load_config(write(MVIT_KEYS))
    assert cfg.SOLVER.BASE_LR == 1e-4  # YAML calls this text
    assert cfg.MVIT.PATCH_KERNEL == [3, 7, 7]  # and this too
    assert cfg.AUG.COLOR_JITTER is None
    assert cfg.STTS.ENABLE is False and cfg.TIMESFORMER.DEPTH == 12
    assert cfg.VIDEO_SWIN.WINDOW_SIZE == [8, 7, 7]


def test_a_dumped_config_reads_back_as_itself(write):
    cfg = load_config(write(MVIT_KEYS), ["STTS.ENABLE", "True"])
    assert load_config(write(cfg.dump(), "dump.yaml")) == cfg


def test_defaults_are_a_copy():
    get_cfg().SOLVER.BASE_LR = 5.0
    assert get_cfg().SOLVER.BASE_LR == 0.1


def test_options_come_on_top_and_may_be_text(write):
    opts = ["SOLVER.BASE_LR", "1e-3", "STTS.TIME.KEEP", "[0.5]", "OUTPUT_DIR", "123", "NUM_GPUS", 0]
    cfg = load_config(write("SOLVER: {BASE_LR: 0.5, MAX_EPOCH: 3}"), opts)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_EPOCH) == (1e-3, 3)
    assert cfg.STTS.TIME.KEEP == [0.5] and cfg.OUTPUT_DIR == "123" and cfg.NUM_GPUS == 0


def test_a_base_file_is_read_first(write):
    write("SOLVER: {BASE_LR: 0.5, MAX_EPOCH: 3}", "base.yaml")
    cfg = load_config(write("_BASE_: base.yaml\nSOLVER: {MAX_EPOCH: 4}"))
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_EPOCH) == (0.5, 4)


def test_a_whole_number_is_a_number(write):
    warmup = load_config(write("SOLVER: {WARMUP_EPOCHS: 3}")).SOLVER.WARMUP_EPOCHS
    assert warmup == 3.0 and isinstance(warmup, float)


def test_nodes_of_other_models_are_ignored(write):
    load_config(write("RESNET: {DEPTH: 101}\nSLOWFAST: {ALPHA: 4}\nAVA: {BGR: True}"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SOLVER: {BASE_LRR: 0.1}", r"unknown config key SOLVER\.BASE_LRR.*SOLVER\.BASE_LR\?"),
        ("STTS: {TIME: {BLOKS: [0]}}", r"STTS\.TIME\.BLOKS.*did you mean STTS\.TIME\.BLOCKS\?"),
        ("SLOVER: {BASE_LR: 0.1}", r"unknown config key SLOVER\.BASE_LR.*SOLVER\.BASE_LR"),
        ("SOLVER: {MAX_EPOCH: 2.5}", r"SOLVER\.MAX_EPOCH.* is 2\.5: it takes a whole number"),
        ("SOLVER: {BASE_LR: fast}", r"SOLVER\.BASE_LR.* is 'fast': it takes a number"),
        ("TRAIN: {ENABLE: 1}", r"TRAIN\.ENABLE.* is 1: it takes True or False"),
        ("TRAIN: 3", r"TRAIN.* is a group of keys: give one of TRAIN\.ENABLE"),
        ("SOLVER: {CLIP_GRAD_L2NORM: yes}", r"CLIP_GRAD_L2NORM.*a number or None"),
        ("MVIT: {REV: {ENABLE: True}}", r"MVIT\.REV\.ENABLE is True: reversible MViT is only in"),
        ("TRAIN: {CHECKPOINT_TYPE: caffe2}", r"TRAIN\.CHECKPOINT_TYPE is 'caffe2'"),
        ("MODEL: {FROZEN_BN: True}", r"MODEL\.FROZEN_BN is True: frozen"),
        ("DATA: {DUMMY_LOAD: True}", r"DATA\.DUMMY_LOAD is True"),
        ("TRAIN: [", r"config\.yaml is not YAML"),
        ("- 1", r"is not a mapping"),
        ("", r"config\.yaml is empty"),
    ],
)
def test_mistakes_in_a_file_are_named(write, text, message):
    with pytest.raises(ValueError, match=message) as error:
        load_config(write(text))
    assert "\n" not in str(error.value)


def test_missing_files_are_named(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config file .*nothing\.yaml does not exist"):
        load_config(str(tmp_path / "nothing.yaml"))
    with pytest.raises(
        FileNotFoundError, match=r"config file .*gone\.yaml does not exist .*config\.yaml"
    ):
        load_config(write("_BASE_: gone.yaml"))


def test_an_option_without_value_is_an_error(write):
    with pytest.raises(ValueError, match=r"pairs of KEY and VALUE.*3 words.*'NUM_GPUS'"):
        load_config(write("NUM_GPUS: 0"), ["SOLVER.BASE_LR", "1", "NUM_GPUS"])


def test_the_defaults_are_supported():
    check_values(get_cfg())
    assert yaml.safe_load(get_cfg().dump())["TRAIN"]["AUTO_RESUME"] is True
