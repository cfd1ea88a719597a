"""SlowFast's keys and defaults: those that the standalone runner reads, and those it does not."""

from fvcore.common.config import CfgNode

KEYS = CfgNode()

# Misc
# Name of the task; goes in front of checkpoint names.
KEYS.TASK = ""
# GPUs of this machine to use; 0 for the CPU.
KEYS.NUM_GPUS = 1
# Machines that share the job.
KEYS.NUM_SHARDS = 1
# Which of them this is, from 0.
KEYS.SHARD_ID = 0
# Where checkpoints and logs go.
KEYS.OUTPUT_DIR = "."
# Seed of everything random.
KEYS.RNG_SEED = 1
# Iterations between two json_stats lines.
KEYS.LOG_PERIOD = 10
# Count the model's FLOPs and log them.
KEYS.LOG_MODEL_INFO = True
# Backend of torch.distributed on GPUs; the CPU always uses gloo.
KEYS.DIST_BACKEND = "nccl"

# Training
KEYS.TRAIN = CfgNode()
# Train the model.
KEYS.TRAIN.ENABLE = True
# kinetics or ssv2.
KEYS.TRAIN.DATASET = "kinetics"
# Videos of a mini-batch, over all GPUs of one machine.
KEYS.TRAIN.BATCH_SIZE = 64
# Epochs between two validations.
KEYS.TRAIN.EVAL_PERIOD = 10
# Epochs between two checkpoints.
KEYS.TRAIN.CHECKPOINT_PERIOD = 10
# Go on from the last checkpoint in OUTPUT_DIR.
KEYS.TRAIN.AUTO_RESUME = True
# Checkpoint to start from where there is none to go on from.
KEYS.TRAIN.CHECKPOINT_FILE_PATH = ""
# pytorch; caffe2 files only load in SlowFast.
KEYS.TRAIN.CHECKPOINT_TYPE = "pytorch"
# Take the weights of CHECKPOINT_FILE_PATH, but neither its epoch nor its optimizer.
KEYS.TRAIN.CHECKPOINT_EPOCH_RESET = False
# Parts of parameter names to cut out of CHECKPOINT_FILE_PATH.
KEYS.TRAIN.CHECKPOINT_CLEAR_NAME_PATTERN = ()
# Make 3D convolutions out of the checkpoint's 2D ones.
KEYS.TRAIN.CHECKPOINT_INFLATE = False
# Start from an image model's checkpoint.
KEYS.TRAIN.CHECKPOINT_IN_INIT = False
# Train under autocast, in float16 or bfloat16; empty: float16 on GPUs, bfloat16 on the CPU.
KEYS.TRAIN.MIXED_PRECISION = False
KEYS.TRAIN.MIXED_PRECISION_DTYPE = ""
# Minutes between two checkpoints inside an epoch; 0 for none.
KEYS.TRAIN.CHECKPOINT_EVERY_MINUTES = 0.0
# Stop where the loss is this many times the mean of the five before; 0 never.
KEYS.TRAIN.KILL_LOSS_EXPLOSION_FACTOR = 0.0

# Augmentation
KEYS.AUG = CfgNode()
# RandAugment and random erasing.
KEYS.AUG.ENABLE = False
# Differently augmented clips of each video in a mini-batch.
KEYS.AUG.NUM_SAMPLE = 1
# Colour jitter of images; not read, as SlowFast does not jitter videos by it.
KEYS.AUG.COLOR_JITTER = 0.4
# RandAugment policy in timm's notation.
KEYS.AUG.AA_TYPE = "rand-m9-mstd0.5-inc1"
# Interpolation of RandAugment's geometric operations.
KEYS.AUG.INTERPOLATION = "bicubic"
# Random erasing: probability, filling, number of boxes. RE_SPLIT is not read, as in SlowFast.
KEYS.AUG.RE_PROB = 0.25
KEYS.AUG.RE_MODE = "pixel"
KEYS.AUG.RE_COUNT = 1
KEYS.AUG.RE_SPLIT = False
# Masks for masked pretraining; not read.
KEYS.AUG.GEN_MASK_LOADER = False
KEYS.AUG.MASK_TUBE = False
KEYS.AUG.MASK_FRAMES = False
KEYS.AUG.MASK_WINDOW_SIZE = [8, 7, 7]
KEYS.AUG.MASK_RATIO = 0.0
KEYS.AUG.MAX_MASK_PATCHES_PER_BLOCK = None

# Mixup and cutmix
KEYS.MIXUP = CfgNode()
# Mix the clips of a mini-batch; their labels become soft.
KEYS.MIXUP.ENABLE = False
# Beta distribution of mixup's share; 0 for no mixup.
KEYS.MIXUP.ALPHA = 0.8
# Beta distribution of cutmix's share; 0 for no cutmix.
KEYS.MIXUP.CUTMIX_ALPHA = 1.0
# Probability that a mini-batch is mixed.
KEYS.MIXUP.PROB = 1.0
# Probability of cutmix where both are on.
KEYS.MIXUP.SWITCH_PROB = 0.5
# Label smoothing of the mixed labels.
KEYS.MIXUP.LABEL_SMOOTH_VALUE = 0.1

# Testing
KEYS.TEST = CfgNode()
# Test the model.
KEYS.TEST.ENABLE = True
# kinetics or ssv2.
KEYS.TEST.DATASET = "kinetics"
# Clips of a mini-batch, over all GPUs of one machine.
KEYS.TEST.BATCH_SIZE = 8
# Checkpoint to test; empty for the last one in OUTPUT_DIR.
KEYS.TEST.CHECKPOINT_FILE_PATH = ""
# pytorch; caffe2 files only load in SlowFast.
KEYS.TEST.CHECKPOINT_TYPE = "pytorch"
# Clips per video, evenly spaced in time; -1 tests with 1, 3, 5, 7 and 10.
KEYS.TEST.NUM_ENSEMBLE_VIEWS = 10
# Crops per clip, side by side.
KEYS.TEST.NUM_SPATIAL_CROPS = 3
# Several numbers of clips to test with, one after the other; empty for NUM_ENSEMBLE_VIEWS.
KEYS.TEST.NUM_TEMPORAL_CLIPS = []
# Pickle of [predictions, labels], in OUTPUT_DIR; empty for none.
KEYS.TEST.SAVE_RESULTS_PATH = ""

# Model
KEYS.MODEL = CfgNode()
# Architecture; mvit for the models here.
KEYS.MODEL.ARCH = "slowfast"
# Which model: MViT, TimeSformer or VideoSwin.
KEYS.MODEL.MODEL_NAME = "SlowFast"
# Classes the head predicts.
KEYS.MODEL.NUM_CLASSES = 400
# cross_entropy or soft_cross_entropy.
KEYS.MODEL.LOSS_FUNC = "cross_entropy"
# Dropout in front of the head.
KEYS.MODEL.DROPOUT_RATE = 0.5
# Drop rate of a ResNet's branches; not read.
KEYS.MODEL.DROPCONNECT_RATE = 0.0
# Standard deviation of the head's initial weights, where SlowFast uses it.
KEYS.MODEL.FC_INIT_STD = 0.01
# How logits become predictions in evaluation.
KEYS.MODEL.HEAD_ACT = "softmax"
# Compute activations again in the backward pass to save memory.
KEYS.MODEL.ACT_CHECKPOINT = False
# Train the head alone.
KEYS.MODEL.DETACH_FINAL_FC = False
# Keep batch norm statistics as they are.
KEYS.MODEL.FROZEN_BN = False
# Send gradients between GPUs as float16.
KEYS.MODEL.FP16_ALLREDUCE = False
# Which architectures take one pathway, and which several.
KEYS.MODEL.SINGLE_PATHWAY_ARCH = ["2d", "c2d", "i3d", "slow", "x3d", "mvit", "maskmvit"]
KEYS.MODEL.MULTI_PATHWAY_ARCH = ["slowfast"]

# MViT, and plain ViT: an MViT that never pools
KEYS.MVIT = CfgNode()
# How queries, keys and values are pooled: conv, max or avg.
KEYS.MVIT.MODE = "conv"
# Pool before the projections.
KEYS.MVIT.POOL_FIRST = False
# A class token in front of the others.
KEYS.MVIT.CLS_EMBED_ON = True
# Kernel, stride and padding of the patch embedding.
KEYS.MVIT.PATCH_KERNEL = [3, 7, 7]
KEYS.MVIT.PATCH_STRIDE = [2, 4, 4]
KEYS.MVIT.PATCH_PADDING = [2, 4, 4]
# Images instead of clips.
KEYS.MVIT.PATCH_2D = False
# Width of the tokens in the first block.
KEYS.MVIT.EMBED_DIM = 96
# Attention heads of the first block.
KEYS.MVIT.NUM_HEADS = 1
# Width of the MLP's hidden layer, in widths of the tokens.
KEYS.MVIT.MLP_RATIO = 4.0
# Bias in the projections to queries, keys and values.
KEYS.MVIT.QKV_BIAS = True
# Stochastic depth of the last block; earlier ones have linearly less.
KEYS.MVIT.DROPPATH_RATE = 0.1
# Initial value of LayerScale; 0 for none.
KEYS.MVIT.LAYER_SCALE_INIT_VALUE = 0.0
# Number of blocks.
KEYS.MVIT.DEPTH = 16
# Kind of normalisation.
KEYS.MVIT.NORM = "layernorm"
# [block, factor]: where the width grows.
KEYS.MVIT.DIM_MUL = []
# [block, factor]: where the number of heads grows.
KEYS.MVIT.HEAD_MUL = []
# [block, t, h, w]: strides of the pooling of keys and values.
KEYS.MVIT.POOL_KV_STRIDE = []
# Stride of keys and values in block 0, which the query strides then divide.
KEYS.MVIT.POOL_KV_STRIDE_ADAPTIVE = None
# [block, t, h, w]: strides of the pooling of queries.
KEYS.MVIT.POOL_Q_STRIDE = []
# Kernel of all pooling; None for stride + 1.
KEYS.MVIT.POOL_KVQ_KERNEL = None
# No weight decay on position embeddings and class token.
KEYS.MVIT.ZERO_DECAY_POS_CLS = True
# Normalise after the patch embedding.
KEYS.MVIT.NORM_STEM = False
# Separate position embeddings for space and time.
KEYS.MVIT.SEP_POS_EMBED = False
# Dropout in the backbone.
KEYS.MVIT.DROPOUT_RATE = 0.0
# Absolute position embedding.
KEYS.MVIT.USE_ABS_POS = True
# Relative positions in space, in time; started at zero.
KEYS.MVIT.REL_POS_SPATIAL = False
KEYS.MVIT.REL_POS_TEMPORAL = False
KEYS.MVIT.REL_POS_ZERO_INIT = False
# Add the pooled queries to the attention's output.
KEYS.MVIT.RESIDUAL_POOLING = False
# Let the width grow in the attention instead of the MLP.
KEYS.MVIT.DIM_MUL_IN_ATT = False
# A projection each for queries, keys and values.
KEYS.MVIT.SEPARATE_QKV = False
# Factor on the head's initial weights.
KEYS.MVIT.HEAD_INIT_SCALE = 1.0
# Classify the mean of the tokens instead of the class token.
KEYS.MVIT.USE_MEAN_POOLING = False
# Fixed sine and cosine position embedding.
KEYS.MVIT.USE_FIXED_SINCOS_POS = False
# Reversible MViT; only in SlowFast.
KEYS.MVIT.REV = CfgNode()
KEYS.MVIT.REV.ENABLE = False
KEYS.MVIT.REV.RESPATH_FUSE = "concat"
KEYS.MVIT.REV.BUFFER_LAYERS = []
KEYS.MVIT.REV.RES_PATH = "conv"
KEYS.MVIT.REV.PRE_Q_FUSION = "avg"

# Data
KEYS.DATA = CfgNode()
# Folder of train.csv, val.csv and test.csv (kinetics), or of the JSON and frame lists (ssv2).
KEYS.DATA.PATH_TO_DATA_DIR = ""
# What stands between path and label in a list.
KEYS.DATA.PATH_LABEL_SEPARATOR = " "
# Folder that paths in the lists are relative to.
KEYS.DATA.PATH_PREFIX = ""
# Frames of a clip.
KEYS.DATA.NUM_FRAMES = 8
# Distance of two frames of a clip, in frames of the video.
KEYS.DATA.SAMPLING_RATE = 8
# Mean and standard deviation of pixels in 0..1.
KEYS.DATA.MEAN = [0.45, 0.45, 0.45]
KEYS.DATA.STD = [0.225, 0.225, 0.225]
# Channels of each pathway's input.
KEYS.DATA.INPUT_CHANNEL_NUM = [3, 3]
# Range of the short side before the random crop in training.
KEYS.DATA.TRAIN_JITTER_SCALES = [256, 320]
# Range of the area of a random resized crop; given, TRAIN_JITTER_SCALES is not used.
KEYS.DATA.TRAIN_JITTER_SCALES_RELATIVE = []
# Range of the aspect of a random resized crop.
KEYS.DATA.TRAIN_JITTER_ASPECT_RELATIVE = []
# Let the crop move over the clip.
KEYS.DATA.TRAIN_JITTER_MOTION_SHIFT = False
# Sample the clips of a video at evenly spaced offsets.
KEYS.DATA.USE_OFFSET_SAMPLING = False
# Side of the crop, in training and validation, and in testing.
KEYS.DATA.TRAIN_CROP_SIZE = 224
KEYS.DATA.TEST_CROP_SIZE = 256
# Frames per second that SAMPLING_RATE counts in.
KEYS.DATA.TARGET_FPS = 30
# TARGET_FPS varies by so much in training.
KEYS.DATA.TRAIN_JITTER_FPS = 0.0
# torchvision: frames are scaled down while they are decoded; pyav: afterwards, by other means,
# which takes longer and changes scores in the third digit. PyAV decodes in either case.
KEYS.DATA.DECODING_BACKEND = "torchvision"
# Short side to which frames are decoded.
KEYS.DATA.DECODING_SHORT_SIZE = 256
# Draw the scale of TRAIN_JITTER_SCALES evenly in its reciprocal.
KEYS.DATA.INV_UNIFORM_SAMPLE = False
# Flip clips left to right in training.
KEYS.DATA.RANDOM_FLIP = True
# Several labels per video.
KEYS.DATA.MULTI_LABEL = False
# How the predictions of a video's views become one: sum or max.
KEYS.DATA.ENSEMBLE_METHOD = "sum"
# BGR instead of RGB.
KEYS.DATA.REVERSE_INPUT_CHANNEL = False
# Clips, and crops of each, from a video in one training sample.
KEYS.DATA.TRAIN_CROP_NUM_TEMPORAL = 1
KEYS.DATA.TRAIN_CROP_NUM_SPATIAL = 1
# The first clip over and over, to time training without reading; only in SlowFast.
KEYS.DATA.DUMMY_LOAD = False
# For other data sets and for self-supervised training; not read.
KEYS.DATA.TRAIN_PCA_EIGVAL = [0.225, 0.224, 0.229]
KEYS.DATA.TRAIN_PCA_EIGVEC = [
    [-0.5675, 0.7192, 0.4009],
    [-0.5808, -0.0045, -0.8140],
    [-0.5836, -0.6948, 0.4203],
]
KEYS.DATA.PATH_TO_PRELOAD_IMDB = ""
KEYS.DATA.COLOR_RND_GRAYSCALE = 0.0
KEYS.DATA.LOADER_CHUNK_SIZE = 0
KEYS.DATA.LOADER_CHUNK_OVERALL_SIZE = 0
KEYS.DATA.SKIP_ROWS = 0
KEYS.DATA.TIME_DIFF_PROB = 0.0
KEYS.DATA.SSL_COLOR_JITTER = False
KEYS.DATA.SSL_COLOR_BRI_CON_SAT = [0.4, 0.4, 0.4]
KEYS.DATA.SSL_COLOR_HUE = 0.1
KEYS.DATA.SSL_MOCOV2_AUG = False
KEYS.DATA.SSL_BLUR_SIGMA_MIN = [0.0, 0.1]
KEYS.DATA.SSL_BLUR_SIGMA_MAX = [0.0, 2.0]
KEYS.DATA.IN22K_TRAINVAL = False
KEYS.DATA.IN22k_VAL_IN1K = ""
KEYS.DATA.IN_VAL_CROP_RATIO = 0.875

# Optimizer
KEYS.SOLVER = CfgNode()
# Learning rate after the warm-up.
KEYS.SOLVER.BASE_LR = 0.1
# cosine or steps_with_relative_lrs.
KEYS.SOLVER.LR_POLICY = "cosine"
# Where the cosine ends.
KEYS.SOLVER.COSINE_END_LR = 0.0
# The cosine begins after the warm-up, not at epoch 0.
KEYS.SOLVER.COSINE_AFTER_WARMUP = False
# Epochs at which the steps begin (the first is 0), and their rates as shares of BASE_LR.
KEYS.SOLVER.STEPS = []
KEYS.SOLVER.LRS = []
# Epochs of training.
KEYS.SOLVER.MAX_EPOCH = 300
# Epochs in which the rate climbs from WARMUP_START_LR.
KEYS.SOLVER.WARMUP_EPOCHS = 0.0
KEYS.SOLVER.WARMUP_START_LR = 0.01
# Multiply all rates by NUM_SHARDS.
KEYS.SOLVER.BASE_LR_SCALE_NUM_SHARDS = False
# sgd, adam, adamw or mt_adamw.
KEYS.SOLVER.OPTIMIZING_METHOD = "sgd"
# SGD's momentum, its dampening, and whether it is Nesterov's.
KEYS.SOLVER.MOMENTUM = 0.9
KEYS.SOLVER.DAMPENING = 0.0
KEYS.SOLVER.NESTEROV = True
# Adam's two decay rates.
KEYS.SOLVER.BETAS = (0.9, 0.999)
# Weight decay, and whether parameters with one dimension are spared.
KEYS.SOLVER.WEIGHT_DECAY = 1e-4
KEYS.SOLVER.ZERO_WD_1D_PARAM = False
# Largest value of a gradient, or largest norm of all gradients; None for no limit.
KEYS.SOLVER.CLIP_GRAD_VAL = None
KEYS.SOLVER.CLIP_GRAD_L2NORM = None
# Factor on the rate from each block to the one before it.
KEYS.SOLVER.LAYER_DECAY = 1.0
# Layer-wise adaptive rates.
KEYS.SOLVER.LARS_ON = False
# Read by none of the policies.
KEYS.SOLVER.GAMMA = 0.1
KEYS.SOLVER.STEP_SIZE = 1
KEYS.SOLVER.WARMUP_FACTOR = 0.1

# Batch norm: the models here have none, so only its weight decay is read
KEYS.BN = CfgNode()
KEYS.BN.USE_PRECISE_STATS = False
KEYS.BN.NUM_BATCHES_PRECISE = 200
KEYS.BN.WEIGHT_DECAY = 0.0
KEYS.BN.NORM_TYPE = "batchnorm"
KEYS.BN.NUM_SPLITS = 1
KEYS.BN.NUM_SYNC_DEVICES = 1
KEYS.BN.GLOBAL_SYNC = False

# Data loader
KEYS.DATA_LOADER = CfgNode()
# Processes that read videos, per GPU.
KEYS.DATA_LOADER.NUM_WORKERS = 8
# Copy mini-batches to pinned memory.
KEYS.DATA_LOADER.PIN_MEMORY = True
# Let the decoder use several threads.
KEYS.DATA_LOADER.ENABLE_MULTI_THREAD_DECODE = False

# TensorBoard
KEYS.TENSORBOARD = CfgNode()
# Write loss, rates and errors for TensorBoard.
KEYS.TENSORBOARD.ENABLE = False
# Folder in OUTPUT_DIR; empty for runs-DATASET.
KEYS.TENSORBOARD.LOG_DIR = ""

# Ours: what SlowFast has no key for
# Share of the videos that training may find unreadable; above it the run stops.
KEYS.DATA.MAX_BAD_SHARE = 0.5
# Seconds that opening or reading a video may take; 0 for any time.
KEYS.DATA.READ_TIMEOUT = 120.0
# Turn videos as their display matrix says, as players do; SlowFast does not.
KEYS.DATA.ROTATE = True
# Test although videos cannot be read: they count as wrong.
KEYS.TEST.ALLOW_MISSING = False

# What only SlowFast can do: its switches are known, so that they can be refused
KEYS.DETECTION = CfgNode({"ENABLE": False})
KEYS.MASK = CfgNode({"ENABLE": False})
KEYS.VIS_MASK = CfgNode({"ENABLE": False})
KEYS.DEMO = CfgNode({"ENABLE": False})
KEYS.MULTIGRID = CfgNode({"SHORT_CYCLE": False, "LONG_CYCLE": False})

# Nodes of SlowFast, or of its files, with keys that none of the models here reads.
NOT_READ = (
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
ONLY_IN_SLOWFAST = {
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
OPTIONAL = {
    "AUG.COLOR_JITTER": float,
    "AUG.MAX_MASK_PATCHES_PER_BLOCK": int,
    "MVIT.POOL_KV_STRIDE_ADAPTIVE": list,
    "MVIT.POOL_KVQ_KERNEL": list,
    "SOLVER.CLIP_GRAD_L2NORM": float,
    "SOLVER.CLIP_GRAD_VAL": float,
}
