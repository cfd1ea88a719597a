"""Jobs of users who never write STTS, run one after the other in this process.

    python control_jobs.py package|control DATA OUT [job ...]

``package``: this package is there, as PyTorch loads it. ``control``: it is not, and only what every
run on a CPU needs is stubbed: `vision.fair.slowfast` and `torch.cuda.synchronize`. Both read videos
by the same few lines of PyAV, since SlowFast's own decoder cannot run without us. What each job
returned, or the error that ended it, is written to OUT/jobs.json.
"""

import io
import json
import os
import pickle
import random
import re
import sys
import types
from pathlib import Path

MODE, DATA, OUT = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
HERE = Path(__file__).parent
ROOT = Path(os.environ["SLOWFAST_ROOT"])
os.environ["STTS_AUTOLOAD"] = "0" if MODE == "control" else "1"
os.environ["STTS_COMPAT"] = "-decoder"
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "tools"))

import torch  # noqa: E402

if MODE == "package":
    import stts_slowfast.pyslowfast  # noqa: F401
else:
    for name in ("vision", "vision.fair", "vision.fair.slowfast"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(ROOT)] if name.endswith("slowfast") else []
    torch.cuda.synchronize = lambda device=None: None

import av  # noqa: E402
import slowfast.datasets.decoder  # noqa: E402
from slowfast.config.defaults import assert_and_infer_cfg, get_cfg  # noqa: E402
from slowfast.datasets import DATASET_REGISTRY, kinetics  # noqa: E402
from slowfast.models import MODEL_REGISTRY, build_model  # noqa: E402
from slowfast.models import optimizer as optim  # noqa: E402
from slowfast.utils.misc import launch_job  # noqa: E402
from slowfast.utils.parser import load_config  # noqa: E402

import run_net  # noqa: E402  # isort: skip


def torchvision_decode(video_handle, *rules, **others):
    """All frames of a file."""
    with av.open(io.BytesIO(video_handle)) as container:
        fps = float(container.streams.video[0].average_rate)
        frames = [torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    return [torch.stack(frames)], fps, True, None


slowfast.datasets.decoder.torchvision_decode = torchvision_decode


@DATASET_REGISTRY.register()
class Owndata(kinetics.Kinetics):
    """A dataset of the user's own: SlowFast's, with a list that is built otherwise."""

    def _construct_loader(self):
        rows = [row.split() for row in (DATA / f"{self.mode}.csv").read_text().splitlines()]
        rows = [row for row in rows for _ in range(self._num_clips)]
        self._path_to_videos = [path for path, _ in rows]
        self._labels = [int(label) for _, label in rows]
        self._spatial_temporal_idx = [n % self._num_clips for n in range(len(rows))]
        self._video_meta = {number: {} for number in range(len(rows))}
        self.epoch = 0.0

    @property
    def num_videos(self):
        return len(self._path_to_videos)


@MODEL_REGISTRY.register()
class Wrapper(torch.nn.Module):
    """A model of the user's own around one of SlowFast's."""

    def __init__(self, cfg):
        super().__init__()
        self.net = MODEL_REGISTRY.get("MViT")(cfg)

    def forward(self, inputs):
        return self.net(inputs)


def words(text: str) -> list[str]:
    return text.split()


RESNET = words(
    "MODEL.MODEL_NAME ResNet MODEL.ARCH slow RESNET.WIDTH_PER_GROUP 8 RESNET.DEPTH 50 "
    "RESNET.NUM_GROUPS 1 SOLVER.OPTIMIZING_METHOD sgd BN.USE_PRECISE_STATS False"
)
FRAMES = f"DATA.PATH_TO_DATA_DIR {DATA}/frames"
SSV2 = words(f"{FRAMES} TRAIN.DATASET ssv2 TEST.DATASET ssv2")
MULTI = words(
    f"{FRAMES} TRAIN.DATASET charades TEST.DATASET charades DATA.MULTI_LABEL True "
    "DATA.ENSEMBLE_METHOD max MODEL.LOSS_FUNC bce_logit MODEL.HEAD_ACT sigmoid"
)
AVA = RESNET + words(
    "TRAIN.DATASET ava TEST.DATASET ava DETECTION.ENABLE True DETECTION.ALIGNED True "
    "MODEL.LOSS_FUNC bce MODEL.HEAD_ACT sigmoid AVA.TRAIN_GT_BOX_LISTS ['boxes.csv'] "
    "AVA.TEST_PREDICT_BOX_LISTS ['predicted.csv'] AVA.LABEL_MAP_FILE map.pbtxt "
    "AVA.EXCLUSION_FILE excluded.csv AVA.GROUNDTRUTH_FILE boxes.csv AVA.FULL_TEST_ON_VAL True "
    f"AVA.FRAME_DIR {DATA} AVA.FRAME_LIST_DIR {DATA}/ava AVA.ANNOTATION_DIR {DATA}/ava "
    "RESNET.SPATIAL_DILATIONS [[1],[1],[1],[2]] RESNET.SPATIAL_STRIDES [[1],[2],[2],[1]] "
    "DATA.TEST_CROP_SIZE 64 DATA.TRAIN_CROP_SIZE 64 DATA.TRAIN_JITTER_SCALES [64,72]"
)


def config(job: str, *opts: str):
    """A config as the launcher reads it."""
    args = types.SimpleNamespace(opts=options(job, *opts), num_shards=1, shard_id=0)
    return assert_and_infer_cfg(load_config(args, str(DATA / "tiny.yaml")))


def options(job: str, *opts: str) -> list[str]:
    keys = f"""OUTPUT_DIR {OUT / job} DATA.DECODING_BACKEND torchvision
        DATA_LOADER.NUM_WORKERS 0 SOLVER.MAX_EPOCH 1 TEST.SAVE_RESULTS_PATH results.pkl
        LOG_MODEL_INFO False"""
    return [*keys.split(), *opts]


def command(job: str, *opts: str, cfgs: tuple[str, ...] = ("tiny.yaml",)) -> None:
    """``python tools/run_net.py --cfg ... --opts ...``."""
    sys.argv = ["run_net.py", "--cfg", *(str(DATA / cfg) for cfg in cfgs)]
    sys.argv += ["--opts", *options(job, *opts)]
    run_net.main()


def own_loop() -> list:
    cfg = config("own_loop")
    torch.manual_seed(0)
    model = build_model(cfg)
    optimizer = optim.construct_optimizer(model, cfg)
    losses = []
    for step in range(3):
        optim.set_lr(optimizer, optim.get_epoch_lr(step / 3, cfg))
        optimizer.zero_grad()
        loss = model([torch.randn(2, 3, 8, 32, 32)]).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    keys = sorted({key for group in optimizer.param_groups for key in group})
    return [
        losses,
        keys,
        type(model).__qualname__,
        sorted(vars(model)),
        len(optimizer.param_groups),
    ]


def pickled() -> list:
    import cloudpickle

    kind, cfg = MODEL_REGISTRY.get("MViT"), config("pickled")
    again = pickle.loads(pickle.dumps(kind))
    by_value = cloudpickle.loads(cloudpickle.dumps(lambda cfg: kind(cfg)))
    torch.manual_seed(0)
    model = pickle.loads(pickle.dumps(build_model(cfg)))
    optimizer = pickle.loads(pickle.dumps(optim.construct_optimizer(model, cfg)))
    return [
        again is kind, issubclass(again, torch.nn.Module), type(by_value(cfg)) is kind,
        type(model) is kind, sorted(optimizer.state_dict()["param_groups"][0]),
        f"{type(pickle.loads(pickle.dumps(cfg))).__module__}", type(MODEL_REGISTRY).__name__,
    ]  # fmt: skip


def notebook() -> list:
    """Trains twice, then tests the first again, without the launcher."""
    configs = [config(f"notebook_{number}", "RNG_SEED", str(number)) for number in range(2)]
    trained = [run_net.train(cfg) for cfg in configs]
    # What they return ends with sizes of memory and with times.
    accuracies = [re.findall(r"_a([\d.]+)", text) for text in trained]
    return [accuracies, re.findall(r"a([\d.]+)", run_net.test(configs[0]))]


def own_configs() -> list:
    """What is no config of SlowFast's, or is read from a file that only PyYAML would take."""
    from argparse import Namespace

    ended = []
    launch_job(Namespace(NUM_GPUS=0), "", lambda cfg: ended.append("launched"))
    rates = config("own_configs").SOLVER
    ended.append(optim.get_epoch_lr(0.5, Namespace(SOLVER=rates)))
    path = Path(OUT / "twice.yaml")
    path.write_text("TRAIN:\n  BATCH_SIZE: 4\nRNG_SEED: 2\nTRAIN:\n  EVAL_PERIOD: 3\n")
    for name in (str(path), path):
        cfg = get_cfg()
        cfg.merge_from_file(name)
        ended.append([cfg.TRAIN.BATCH_SIZE, cfg.TRAIN.EVAL_PERIOD])
    for text in ("TRAIN: 3", "TRAIN: {NONE: 3}", "[1]", "", "- {", "DATA: {NUM_FRAMES: a}"):
        path.write_text(text)
        try:
            get_cfg().merge_from_file(str(path))
        except Exception as error:
            ended.append(f"{type(error).__name__}: {error}"[:40])
    return [*ended, repr(get_cfg())[:40]]


def old_config() -> list:
    """A config that was pickled before this package was there, and a meter of the user's own."""
    cfg = config("old_config", "TRAIN.AUTO_RESUME", "False")
    for name in ("STTS", "TIMESFORMER", "VIDEO_SWIN"):
        cfg.pop(name, None)
    for node, name in (
        ("DATA", "READ_TIMEOUT"), ("TEST", "ALLOW_MISSING"), ("TRAIN", "MIXED_PRECISION_DTYPE"),
        ("MODEL", "FLOAT32_MATMUL_PRECISION"), ("TEST", "PRECISION"), ("TEST", "COMPILE"),
    ):  # fmt: skip
        cfg[node].pop(name, None)
    cfg = pickle.loads(pickle.dumps(cfg))
    module = sys.modules[run_net.test.__module__]
    stock = module.TestMeter

    class Three(stock):
        def finalize_metrics(self, ks=(1, 3, 5)):
            return super().finalize_metrics(ks)

    module.TestMeter = Three
    try:
        trained, tested = run_net.train(cfg), run_net.test(cfg)
    finally:
        module.TestMeter = stock
    return [re.findall(r"a([\d.]+)", text) for text in (trained, tested)]


def shards() -> list:
    """One process a shard: SlowFast runs each on its own."""
    cfg = config("shards")
    cfg.NUM_SHARDS = 2
    seen = []
    launch_job(
        cfg, "", lambda cfg: seen.append([int(cfg.NUM_GPUS), torch.distributed.is_initialized()])
    )
    return seen


OWN = words("TRAIN.DATASET owndata TEST.DATASET owndata")
NO_LABELS = words(f"TRAIN.ENABLE False DATA.PATH_TO_DATA_DIR {DATA}/no_labels")
TWO = words("TRAIN.AUTO_RESUME False")
JOBS = {
    "k400_mvit": lambda: command("k400_mvit"),
    "k400_r50": lambda: command("k400_r50", *RESNET),
    "ssv2": lambda: command("ssv2", *SSV2),
    "charades": lambda: command("charades", *MULTI),
    "ava": lambda: command("ava", *AVA, "TEST.ENABLE", "False"),
    "ava_test": lambda: command("ava_test", *AVA, "TRAIN.ENABLE", "False"),
    "own_dataset": lambda: command("own_dataset", *OWN),
    "no_labels": lambda: command("no_labels", *NO_LABELS),
    "two_configs": lambda: command("two_configs", *TWO, cfgs=("tiny.yaml", "ssv2.yaml")),
    "wrapper": lambda: command("wrapper", "MODEL.MODEL_NAME", "Wrapper"),
    "own_loop": own_loop,
    "pickled": pickled,
    "notebook": notebook,
    "own_configs": own_configs,
    "old_config": old_config,
    "shards": shards,
}


def main(names: list[str]) -> None:
    ended = {}
    for name in names:
        random.seed(0)
        try:
            ended[name] = JOBS[name]()
        except BaseException as error:
            ended[name] = f"{type(error).__name__}: {error}"
    with open(OUT / "jobs.json", "w") as file:
        json.dump(ended, file)


if __name__ == "__main__":
    main(sys.argv[4:] or list(JOBS))
