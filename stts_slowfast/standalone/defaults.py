"""The SlowFast keys that the standalone runner reads, with SlowFast's defaults, and YAML files.

A file for SlowFast is a file for us: keys that nothing here reads are known all the same, and what
only SlowFast can do is refused by name instead of being ignored.
"""

from collections.abc import Iterable, Iterator, Sequence

from fvcore.common.config import CfgNode

from stts_slowfast.backbones import add_configs, settle
from stts_slowfast.config import add_stts_config
from stts_slowfast.keys import all_keys, nearest, read_value
from stts_slowfast.yamlfiles import find_config, read_yaml

_C = CfgNode()

# Misc
# Name of the task; goes in front of checkpoint names.
_C.TASK = ""
# GPUs of this machine to use; 0 for the CPU.
_C.NUM_GPUS = 1
# Machines that share the job.
_C.NUM_SHARDS = 1
# Which of them this is, from 0.
_C.SHARD_ID = 0
# Where checkpoints and logs go.
_C.OUTPUT_DIR = "."
# Seed of everything random.
_C.RNG_SEED = 1
# Iterations between two json_stats lines.
_C.LOG_PERIOD = 10
# Count the model's FLOPs and log them.
_C.LOG_MODEL_INFO = True
# Backend of torch.distributed on GPUs; the CPU always uses gloo.
_C.DIST_BACKEND = "nccl"

# Training
_C.TRAIN = CfgNode()
# Train the model.
_C.TRAIN.ENABLE = True
# kinetics or ssv2.
_C.TRAIN.DATASET = "kinetics"
# Videos of a mini-batch, over all GPUs of one machine.
_C.TRAIN.BATCH_SIZE = 64
# Epochs between two validations.
_C.TRAIN.EVAL_PERIOD = 10
# Epochs between two checkpoints.
_C.TRAIN.CHECKPOINT_PERIOD = 10
# Go on from the last checkpoint in OUTPUT_DIR.
_C.TRAIN.AUTO_RESUME = True
# Checkpoint to start from where there is none to go on from.
_C.TRAIN.CHECKPOINT_FILE_PATH = ""
# pytorch; caffe2 files only load in SlowFast.
_C.TRAIN.CHECKPOINT_TYPE = "pytorch"
# Take the weights of CHECKPOINT_FILE_PATH, but neither its epoch nor its optimizer.
_C.TRAIN.CHECKPOINT_EPOCH_RESET = False
# Parts of parameter names to cut out of CHECKPOINT_FILE_PATH.
_C.TRAIN.CHECKPOINT_CLEAR_NAME_PATTERN = ()
# Make 3D convolutions out of the checkpoint's 2D ones.
_C.TRAIN.CHECKPOINT_INFLATE = False
# Start from an image model's checkpoint.
_C.TRAIN.CHECKPOINT_IN_INIT = False
# Train under autocast, in float16 or bfloat16; empty: float16 on GPUs, bfloat16 on the CPU.
_C.TRAIN.MIXED_PRECISION = False
_C.TRAIN.MIXED_PRECISION_DTYPE = ""
# Minutes between two checkpoints inside an epoch; 0 for none.
_C.TRAIN.CHECKPOINT_EVERY_MINUTES = 0.0
# Stop where the loss is this many times the mean of the five before; 0 never.
_C.TRAIN.KILL_LOSS_EXPLOSION_FACTOR = 0.0

# Augmentation
_C.AUG = CfgNode()
# RandAugment and random erasing.
_C.AUG.ENABLE = False
# Differently augmented clips of each video in a mini-batch.
_C.AUG.NUM_SAMPLE = 1
# Colour jitter of images; not read, as SlowFast does not jitter videos by it.
_C.AUG.COLOR_JITTER = 0.4
# RandAugment policy in timm's notation.
_C.AUG.AA_TYPE = "rand-m9-mstd0.5-inc1"
# Interpolation of RandAugment's geometric operations.
_C.AUG.INTERPOLATION = "bicubic"
# Random erasing: probability, filling, number of boxes. RE_SPLIT is not read, as in SlowFast.
_C.AUG.RE_PROB = 0.25
_C.AUG.RE_MODE = "pixel"
_C.AUG.RE_COUNT = 1
_C.AUG.RE_SPLIT = False
# Masks for masked pretraining; not read.
_C.AUG.GEN_MASK_LOADER = False
_C.AUG.MASK_TUBE = False
_C.AUG.MASK_FRAMES = False
_C.AUG.MASK_WINDOW_SIZE = [8, 7, 7]
_C.AUG.MASK_RATIO = 0.0
_C.AUG.MAX_MASK_PATCHES_PER_BLOCK = None

# Mixup and cutmix
_C.MIXUP = CfgNode()
# Mix the clips of a mini-batch; their labels become soft.
_C.MIXUP.ENABLE = False
# Beta distribution of mixup's share; 0 for no mixup.
_C.MIXUP.ALPHA = 0.8
# Beta distribution of cutmix's share; 0 for no cutmix.
_C.MIXUP.CUTMIX_ALPHA = 1.0
# Probability that a mini-batch is mixed.
_C.MIXUP.PROB = 1.0
# Probability of cutmix where both are on.
_C.MIXUP.SWITCH_PROB = 0.5
# Label smoothing of the mixed labels.
_C.MIXUP.LABEL_SMOOTH_VALUE = 0.1

# Testing
_C.TEST = CfgNode()
# Test the model.
_C.TEST.ENABLE = True
# kinetics or ssv2.
_C.TEST.DATASET = "kinetics"
# Clips of a mini-batch, over all GPUs of one machine.
_C.TEST.BATCH_SIZE = 8
# Checkpoint to test; empty for the last one in OUTPUT_DIR.
_C.TEST.CHECKPOINT_FILE_PATH = ""
# pytorch; caffe2 files only load in SlowFast.
_C.TEST.CHECKPOINT_TYPE = "pytorch"
# Clips per video, evenly spaced in time; -1 tests with 1, 3, 5, 7 and 10.
_C.TEST.NUM_ENSEMBLE_VIEWS = 10
# Crops per clip, side by side.
_C.TEST.NUM_SPATIAL_CROPS = 3
# Several numbers of clips to test with, one after the other; empty for NUM_ENSEMBLE_VIEWS.
_C.TEST.NUM_TEMPORAL_CLIPS = []
# Pickle of [predictions, labels], in OUTPUT_DIR; empty for none.
_C.TEST.SAVE_RESULTS_PATH = ""

# Model
_C.MODEL = CfgNode()
# Architecture; mvit for the models here.
_C.MODEL.ARCH = "slowfast"
# Which model: MViT, TimeSformer or VideoSwin.
_C.MODEL.MODEL_NAME = "SlowFast"
# Classes the head predicts.
_C.MODEL.NUM_CLASSES = 400
# cross_entropy or soft_cross_entropy.
_C.MODEL.LOSS_FUNC = "cross_entropy"
# Dropout in front of the head.
_C.MODEL.DROPOUT_RATE = 0.5
# Drop rate of a ResNet's branches; not read.
_C.MODEL.DROPCONNECT_RATE = 0.0
# Standard deviation of the head's initial weights, where SlowFast uses it.
_C.MODEL.FC_INIT_STD = 0.01
# How logits become predictions in evaluation.
_C.MODEL.HEAD_ACT = "softmax"
# Compute activations again in the backward pass to save memory.
_C.MODEL.ACT_CHECKPOINT = False
# Train the head alone.
_C.MODEL.DETACH_FINAL_FC = False
# Keep batch norm statistics as they are.
_C.MODEL.FROZEN_BN = False
# Send gradients between GPUs as float16.
_C.MODEL.FP16_ALLREDUCE = False
# Which architectures take one pathway, and which several.
_C.MODEL.SINGLE_PATHWAY_ARCH = ["2d", "c2d", "i3d", "slow", "x3d", "mvit", "maskmvit"]
_C.MODEL.MULTI_PATHWAY_ARCH = ["slowfast"]

# MViT, and plain ViT: an MViT that never pools
_C.MVIT = CfgNode()
# How queries, keys and values are pooled: conv, max or avg.
_C.MVIT.MODE = "conv"
# Pool before the projections.
_C.MVIT.POOL_FIRST = False
# A class token in front of the others.
_C.MVIT.CLS_EMBED_ON = True
# Kernel, stride and padding of the patch embedding.
_C.MVIT.PATCH_KERNEL = [3, 7, 7]
_C.MVIT.PATCH_STRIDE = [2, 4, 4]
_C.MVIT.PATCH_PADDING = [2, 4, 4]
# Images instead of clips.
_C.MVIT.PATCH_2D = False
# Width of the tokens in the first block.
_C.MVIT.EMBED_DIM = 96
# Attention heads of the first block.
_C.MVIT.NUM_HEADS = 1
# Width of the MLP's hidden layer, in widths of the tokens.
_C.MVIT.MLP_RATIO = 4.0
# Bias in the projections to queries, keys and values.
_C.MVIT.QKV_BIAS = True
# Stochastic depth of the last block; earlier ones have linearly less.
_C.MVIT.DROPPATH_RATE = 0.1
# Initial value of LayerScale; 0 for none.
_C.MVIT.LAYER_SCALE_INIT_VALUE = 0.0
# Number of blocks.
_C.MVIT.DEPTH = 16
# Kind of normalisation.
_C.MVIT.NORM = "layernorm"
# [block, factor]: where the width grows.
_C.MVIT.DIM_MUL = []
# [block, factor]: where the number of heads grows.
_C.MVIT.HEAD_MUL = []
# [block, t, h, w]: strides of the pooling of keys and values.
_C.MVIT.POOL_KV_STRIDE = []
# Stride of keys and values in block 0, which the query strides then divide.
_C.MVIT.POOL_KV_STRIDE_ADAPTIVE = None
# [block, t, h, w]: strides of the pooling of queries.
_C.MVIT.POOL_Q_STRIDE = []
# Kernel of all pooling; None for stride + 1.
_C.MVIT.POOL_KVQ_KERNEL = None
# No weight decay on position embeddings and class token.
_C.MVIT.ZERO_DECAY_POS_CLS = True
# Normalise after the patch embedding.
_C.MVIT.NORM_STEM = False
# Separate position embeddings for space and time.
_C.MVIT.SEP_POS_EMBED = False
# Dropout in the backbone.
_C.MVIT.DROPOUT_RATE = 0.0
# Absolute position embedding.
_C.MVIT.USE_ABS_POS = True
# Relative positions in space, in time; started at zero.
_C.MVIT.REL_POS_SPATIAL = False
_C.MVIT.REL_POS_TEMPORAL = False
_C.MVIT.REL_POS_ZERO_INIT = False
# Add the pooled queries to the attention's output.
_C.MVIT.RESIDUAL_POOLING = False
# Let the width grow in the attention instead of the MLP.
_C.MVIT.DIM_MUL_IN_ATT = False
# A projection each for queries, keys and values.
_C.MVIT.SEPARATE_QKV = False
# Factor on the head's initial weights.
_C.MVIT.HEAD_INIT_SCALE = 1.0
# Classify the mean of the tokens instead of the class token.
_C.MVIT.USE_MEAN_POOLING = False
# Fixed sine and cosine position embedding.
_C.MVIT.USE_FIXED_SINCOS_POS = False
# Reversible MViT; only in SlowFast.
_C.MVIT.REV = CfgNode()
_C.MVIT.REV.ENABLE = False
_C.MVIT.REV.RESPATH_FUSE = "concat"
_C.MVIT.REV.BUFFER_LAYERS = []
_C.MVIT.REV.RES_PATH = "conv"
_C.MVIT.REV.PRE_Q_FUSION = "avg"

# Data
_C.DATA = CfgNode()
# Folder of train.csv, val.csv and test.csv (kinetics), or of the JSON and frame lists (ssv2).
_C.DATA.PATH_TO_DATA_DIR = ""
# What stands between path and label in a list.
_C.DATA.PATH_LABEL_SEPARATOR = " "
# Folder that paths in the lists are relative to.
_C.DATA.PATH_PREFIX = ""
# Frames of a clip.
_C.DATA.NUM_FRAMES = 8
# Distance of two frames of a clip, in frames of the video.
_C.DATA.SAMPLING_RATE = 8
# Mean and standard deviation of pixels in 0..1.
_C.DATA.MEAN = [0.45, 0.45, 0.45]
_C.DATA.STD = [0.225, 0.225, 0.225]
# Channels of each pathway's input.
_C.DATA.INPUT_CHANNEL_NUM = [3, 3]
# Range of the short side before the random crop in training.
_C.DATA.TRAIN_JITTER_SCALES = [256, 320]
# Range of the area of a random resized crop; given, TRAIN_JITTER_SCALES is not used.
_C.DATA.TRAIN_JITTER_SCALES_RELATIVE = []
# Range of the aspect of a random resized crop.
_C.DATA.TRAIN_JITTER_ASPECT_RELATIVE = []
# Let the crop move over the clip.
_C.DATA.TRAIN_JITTER_MOTION_SHIFT = False
# Sample the clips of a video at evenly spaced offsets.
_C.DATA.USE_OFFSET_SAMPLING = False
# Side of the crop, in training and validation, and in testing.
_C.DATA.TRAIN_CROP_SIZE = 224
_C.DATA.TEST_CROP_SIZE = 256
# Frames per second that SAMPLING_RATE counts in.
_C.DATA.TARGET_FPS = 30
# TARGET_FPS varies by so much in training.
_C.DATA.TRAIN_JITTER_FPS = 0.0
# torchvision: frames are scaled down while they are decoded; pyav: afterwards, by other means,
# which takes longer and changes scores in the third digit. PyAV decodes in either case.
_C.DATA.DECODING_BACKEND = "torchvision"
# Short side to which frames are decoded.
_C.DATA.DECODING_SHORT_SIZE = 256
# Draw the scale of TRAIN_JITTER_SCALES evenly in its reciprocal.
_C.DATA.INV_UNIFORM_SAMPLE = False
# Flip clips left to right in training.
_C.DATA.RANDOM_FLIP = True
# Several labels per video.
_C.DATA.MULTI_LABEL = False
# How the predictions of a video's views become one: sum or max.
_C.DATA.ENSEMBLE_METHOD = "sum"
# BGR instead of RGB.
_C.DATA.REVERSE_INPUT_CHANNEL = False
# Clips, and crops of each, from a video in one training sample.
_C.DATA.TRAIN_CROP_NUM_TEMPORAL = 1
_C.DATA.TRAIN_CROP_NUM_SPATIAL = 1
# The first clip over and over, to time training without reading; only in SlowFast.
_C.DATA.DUMMY_LOAD = False
# For other data sets and for self-supervised training; not read.
_C.DATA.TRAIN_PCA_EIGVAL = [0.225, 0.224, 0.229]
_C.DATA.TRAIN_PCA_EIGVEC = [
    [-0.5675, 0.7192, 0.4009],
    [-0.5808, -0.0045, -0.8140],
    [-0.5836, -0.6948, 0.4203],
]
_C.DATA.PATH_TO_PRELOAD_IMDB = ""
_C.DATA.COLOR_RND_GRAYSCALE = 0.0
_C.DATA.LOADER_CHUNK_SIZE = 0
_C.DATA.LOADER_CHUNK_OVERALL_SIZE = 0
_C.DATA.SKIP_ROWS = 0
_C.DATA.TIME_DIFF_PROB = 0.0
_C.DATA.SSL_COLOR_JITTER = False
_C.DATA.SSL_COLOR_BRI_CON_SAT = [0.4, 0.4, 0.4]
_C.DATA.SSL_COLOR_HUE = 0.1
_C.DATA.SSL_MOCOV2_AUG = False
_C.DATA.SSL_BLUR_SIGMA_MIN = [0.0, 0.1]
_C.DATA.SSL_BLUR_SIGMA_MAX = [0.0, 2.0]
_C.DATA.IN22K_TRAINVAL = False
_C.DATA.IN22k_VAL_IN1K = ""
_C.DATA.IN_VAL_CROP_RATIO = 0.875

# Optimizer
_C.SOLVER = CfgNode()
# Learning rate after the warm-up.
_C.SOLVER.BASE_LR = 0.1
# cosine or steps_with_relative_lrs.
_C.SOLVER.LR_POLICY = "cosine"
# Where the cosine ends.
_C.SOLVER.COSINE_END_LR = 0.0
# The cosine begins after the warm-up, not at epoch 0.
_C.SOLVER.COSINE_AFTER_WARMUP = False
# Epochs at which the steps begin (the first is 0), and their rates as shares of BASE_LR.
_C.SOLVER.STEPS = []
_C.SOLVER.LRS = []
# Epochs of training.
_C.SOLVER.MAX_EPOCH = 300
# Epochs in which the rate climbs from WARMUP_START_LR.
_C.SOLVER.WARMUP_EPOCHS = 0.0
_C.SOLVER.WARMUP_START_LR = 0.01
# Multiply all rates by NUM_SHARDS.
_C.SOLVER.BASE_LR_SCALE_NUM_SHARDS = False
# sgd, adam, adamw or mt_adamw.
_C.SOLVER.OPTIMIZING_METHOD = "sgd"
# SGD's momentum, its dampening, and whether it is Nesterov's.
_C.SOLVER.MOMENTUM = 0.9
_C.SOLVER.DAMPENING = 0.0
_C.SOLVER.NESTEROV = True
# Adam's two decay rates.
_C.SOLVER.BETAS = (0.9, 0.999)
# Weight decay, and whether parameters with one dimension are spared.
_C.SOLVER.WEIGHT_DECAY = 1e-4
_C.SOLVER.ZERO_WD_1D_PARAM = False
# Largest value of a gradient, or largest norm of all gradients; None for no limit.
_C.SOLVER.CLIP_GRAD_VAL = None
_C.SOLVER.CLIP_GRAD_L2NORM = None
# Factor on the rate from each block to the one before it.
_C.SOLVER.LAYER_DECAY = 1.0
# Layer-wise adaptive rates.
_C.SOLVER.LARS_ON = False
# Read by none of the policies.
_C.SOLVER.GAMMA = 0.1
_C.SOLVER.STEP_SIZE = 1
_C.SOLVER.WARMUP_FACTOR = 0.1

# Batch norm: the models here have none, so only its weight decay is read
_C.BN = CfgNode()
_C.BN.USE_PRECISE_STATS = False
_C.BN.NUM_BATCHES_PRECISE = 200
_C.BN.WEIGHT_DECAY = 0.0
_C.BN.NORM_TYPE = "batchnorm"
_C.BN.NUM_SPLITS = 1
_C.BN.NUM_SYNC_DEVICES = 1
_C.BN.GLOBAL_SYNC = False

# Data loader
_C.DATA_LOADER = CfgNode()
# Processes that read videos, per GPU.
_C.DATA_LOADER.NUM_WORKERS = 8
# Copy mini-batches to pinned memory.
_C.DATA_LOADER.PIN_MEMORY = True
# Let the decoder use several threads.
_C.DATA_LOADER.ENABLE_MULTI_THREAD_DECODE = False

# TensorBoard
_C.TENSORBOARD = CfgNode()
# Write loss, rates and errors for TensorBoard.
_C.TENSORBOARD.ENABLE = False
# Folder in OUTPUT_DIR; empty for runs-DATASET.
_C.TENSORBOARD.LOG_DIR = ""

# Ours: what SlowFast has no key for
# Share of the videos that training may find unreadable; above it the run stops.
_C.DATA.MAX_BAD_SHARE = 0.5
# Seconds that opening or reading a video may take; 0 for any time.
_C.DATA.READ_TIMEOUT = 120.0
# Turn videos as their display matrix says, as players do; SlowFast does not.
_C.DATA.ROTATE = True
# Test although videos cannot be read: they count as wrong.
_C.TEST.ALLOW_MISSING = False

# What only SlowFast can do: its switches are known, so that they can be refused
_C.DETECTION = CfgNode({"ENABLE": False})
_C.MASK = CfgNode({"ENABLE": False})
_C.VIS_MASK = CfgNode({"ENABLE": False})
_C.DEMO = CfgNode({"ENABLE": False})
_C.MULTIGRID = CfgNode({"SHORT_CYCLE": False, "LONG_CYCLE": False})

add_stts_config(_C)
add_configs(_C)

# Nodes of SlowFast, or of its files, with keys that none of the models here reads.
_NOT_READ = (
    "AVA",
    "BENCHMARK",
    "CONTRASTIVE",
    "DEMO",
    "DETECTION",
    "MASK",
    "MULTIGRID",
    "NONLOCAL",
    "PREFETCH",
    "RESNET",
    "SLOWFAST",
    "TENSORBOARD",
    "VIS_MASK",
    "X3D",
)

# Keys that must keep SlowFast's default here, and what another value would ask for.
_ONLY_IN_SLOWFAST = {
    "AUG.GEN_MASK_LOADER": "masked pretraining",
    "DATA.DUMMY_LOAD": "training on one clip",
    "DATA.LOADER_CHUNK_SIZE": "reading a list in chunks",
    "DATA.MULTI_LABEL": "training on several labels per video",
    "DATA.COLOR_RND_GRAYSCALE": "self-supervised augmentation",
    "DATA.SSL_COLOR_JITTER": "self-supervised augmentation",
    "DATA.TIME_DIFF_PROB": "self-supervised augmentation",
    "DATA.TRAIN_CROP_NUM_SPATIAL": "self-supervised sampling",
    "DATA.TRAIN_CROP_NUM_TEMPORAL": "self-supervised sampling",
    "DATA.TRAIN_JITTER_MOTION_SHIFT": "moving crops",
    "DEMO.ENABLE": "the demo",
    "DETECTION.ENABLE": "detection",
    "MASK.ENABLE": "masked pretraining",
    "MODEL.FROZEN_BN": "frozen batch norm",
    "MODEL.HEAD_ACT": "another activation of the head",
    "MULTIGRID.LONG_CYCLE": "multigrid training",
    "MULTIGRID.SHORT_CYCLE": "multigrid training",
    "MVIT.REV.ENABLE": "reversible MViT",
    "SOLVER.LARS_ON": "the LARS optimizer",
    "TEST.CHECKPOINT_TYPE": "loading caffe2 files",
    "TRAIN.CHECKPOINT_INFLATE": "inflating a 2D checkpoint",
    "TRAIN.CHECKPOINT_IN_INIT": "starting from an image model",
    "TRAIN.CHECKPOINT_TYPE": "loading caffe2 files",
    "VIS_MASK.ENABLE": "drawing masked predictions",
}

# Keys that may be None, and the type of their other values.
_OPTIONAL = {
    "AUG.COLOR_JITTER": float,
    "AUG.MAX_MASK_PATCHES_PER_BLOCK": int,
    "MVIT.POOL_KV_STRIDE_ADAPTIVE": list,
    "MVIT.POOL_KVQ_KERNEL": list,
    "SOLVER.CLIP_GRAD_L2NORM": float,
    "SOLVER.CLIP_GRAD_VAL": float,
}


def get_cfg() -> CfgNode:
    """A copy of the defaults: SlowFast's keys, the node STTS, and those of all families."""
    add_configs(_C)  # again: a family may have been registered since
    return _C.clone()


def load_config(path: str, opts: Sequence = ()) -> CfgNode:
    """Reads a YAML file as SlowFast does, ``_BASE_`` files included.

    Args:
        path: the file, opened through iopath; or the name of a config that comes along, such as
            ``STTS_MVIT_B_16x4_T0_0.9_S4_0.9``.
        opts: ``KEY VALUE`` pairs that come on top, such as ``("SOLVER.BASE_LR", 0.01)``; a value
            may be text as on a command line.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for an unknown key, a value of the wrong type, and what only SlowFast can do;
            it names the key.
    """
    path = find_config(path)
    cfg = get_cfg()
    values = dict(_leaves(read_yaml(path)))
    for key, value in values.items():
        _set(cfg, key, value, f" in {path}")
    if len(opts) % 2:
        raise ValueError(
            f"--opts takes pairs of KEY and VALUE, but {len(opts)} words were given; "
            f"the last is {opts[-1]!r}"
        )
    for key, value in zip(opts[0::2], opts[1::2]):
        _set(cfg, str(key), value, "")
    check_supported(cfg)
    settle(cfg, {*values, *map(str, opts[0::2])})
    return cfg


def check_supported(cfg: CfgNode) -> None:
    """Raises ``ValueError`` for a key whose value asks for what only SlowFast can do."""
    for key, what in _ONLY_IN_SLOWFAST.items():
        value, default = _get(cfg, key), _get(_C, key)
        if value != default:
            raise ValueError(
                f"{key} is {value!r}: {what} is only in SlowFast itself; leave it at {default!r}, "
                "or run with --engine slowfast"
            )


def check_choice(key: str, value: str, known: Iterable[str]) -> None:
    """Raises ``ValueError`` naming ``key`` where its value is none of the known ones."""
    if value not in known:
        raise ValueError(f"{key} is {value!r}: use one of {', '.join(known)}")


def _leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """``(full key, value)`` of everything in nested mappings."""
    if not isinstance(tree, dict):
        raise ValueError(f"a config file holds KEY: VALUE lines, not {tree!r}")
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{key}.")
        elif value is not None or not isinstance(_get(_C, key), CfgNode):
            yield key, value  # a node without keys says nothing


def _set(cfg: CfgNode, key: str, value, where: str) -> None:
    known = _get(cfg, key)
    if known is _MISSING:
        if key.split(".")[0] in _NOT_READ:
            return
        raise ValueError(f"unknown config key {key}{where}; {nearest(key, all_keys(_C))}")
    if isinstance(known, CfgNode):
        raise ValueError(f"{key}{where} is a group of keys: give one of {_names(known, key)}")
    node, _, leaf = key.rpartition(".")
    value = read_value(key, value, _get(_C, key), where, _OPTIONAL.get(key))
    (_get(cfg, node) if node else cfg)[leaf] = value


_MISSING = object()


def _get(cfg: CfgNode, key: str):
    for name in key.split("."):
        if not isinstance(cfg, CfgNode) or name not in cfg:
            return _MISSING
        cfg = cfg[name]
    return cfg


def _names(node: CfgNode, prefix: str) -> str:
    return ", ".join(f"{prefix}.{name}" for name in node)
