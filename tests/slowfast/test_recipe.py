"""What the standalone runner does "as in SlowFast", beside SlowFast's own functions doing it."""

import random
import runpy

import numpy as np
import pytest
import torch
from PIL import Image

from stts_slowfast import checkpoints
from stts_slowfast.standalone import mixup, optim, run_logger
from stts_slowfast.standalone.checkpointing import ResumeState
from stts_slowfast.standalone.cluster import ProcessInfo
from stts_slowfast.standalone.config import get_cfg as standalone_cfg
from stts_slowfast.standalone.data import ClipDataset, build_loader, normalize_clips
from stts_slowfast.standalone.evaluator import ViewEnsemble
from stts_slowfast.standalone.launch import open_fabric
from stts_slowfast.standalone.model import build_model
from stts_slowfast.standalone.optim import lr_at
from stts_slowfast.standalone.run_logger import RunLogger
from stts_slowfast.standalone.signals import SignalState
from stts_slowfast.standalone.training_loop import TrainingLoop, iteration_seed
from stts_slowfast.standalone.transforms import train_transform
from stts_slowfast.standalone.value_ranges import check_solver
from stts_slowfast.video.accuracy import topk_errors


def theirs_as_ours(cfg):
    """A config of SlowFast's as one of ours."""
    ours = standalone_cfg()
    for node in ("TRAIN", "TEST", "DATA", "AUG", "MIXUP", "MODEL", "MVIT", "SOLVER", "STTS"):
        ours[node].update({key: cfg[node][key] for key in ours[node] if key in cfg[node]})
    for key in ("NUM_GPUS", "RNG_SEED", "OUTPUT_DIR", "LOG_PERIOD"):
        ours[key] = cfg[key]
    ours.DATA_LOADER.NUM_WORKERS = 0
    return ours


# ---- mini-batches -----------------------------------------------------------------------------


def test_a_thousand_batches_are_mixed_alike(checkout):
    from slowfast.datasets.mixup import MixUp

    cfg = standalone_cfg()
    cfg.MIXUP.ENABLE, cfg.MODEL.NUM_CLASSES = True, 7
    draw, mixed_with_another = random.Random(0), 0
    for seed in range(1000):
        node = cfg.MIXUP
        node.ALPHA, node.CUTMIX_ALPHA = draw.choice([(0.8, 1.0), (0.0, 0.3), (0.4, 0.0)])
        node.PROB, node.SWITCH_PROB = draw.choice([0.5, 1.0]), draw.random()
        node.LABEL_SMOOTH_VALUE = draw.choice([0.0, 0.1])
        theirs = MixUp(node.ALPHA, node.CUTMIX_ALPHA, node.PROB, node.SWITCH_PROB, True,
                       node.LABEL_SMOOTH_VALUE, 7)  # fmt: skip
        clips = torch.rand(draw.randrange(2, 7), 3, 1, draw.randrange(1, 9), 6)
        labels = torch.randint(7, (len(clips),))
        np.random.seed(seed)
        found = mixup.batch_mixer(cfg)(clips, labels)
        np.random.seed(seed)
        expected = theirs(clips.clone(), labels)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        mixed_with_another += not torch.equal(found[0], clips)
    assert mixed_with_another > 500


def test_batches_of_repeated_samples_have_slowfasts_layout(get_cfg, videos):
    """Labels, indices and the neighbours that mixing pairs: all samples of a video in a row."""
    from slowfast.datasets import build_dataset
    from slowfast.datasets.loader import multiple_samples_collate

    cfg = get_cfg("DATA.PATH_TO_DATA_DIR", str(videos), "AUG.ENABLE", True, "AUG.NUM_SAMPLE", 2,
                  "AUG.AA_TYPE", "", "TRAIN.BATCH_SIZE", 3)  # fmt: skip
    dataset = build_dataset("kinetics", cfg, "train")
    loader = build_loader(theirs_as_ours(cfg), "train")
    loader.set_epoch(0)
    clips, labels, numbers, _ = next(iter(loader))
    items = [dataset[number] for number in numbers[::2].tolist()]
    inputs, their_labels, their_numbers, *_ = multiple_samples_collate(items)
    assert clips.shape == inputs[0].shape
    assert torch.equal(labels, their_labels) and torch.equal(numbers, their_numbers)


# ---- crops ------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("relative", [[], [0.2, 1.0]])
@pytest.mark.parametrize("inverse", [False, True])
def test_crops_have_slowfasts_places_and_sizes(get_cfg, split, relative, inverse, monkeypatch):
    """A clip whose pixels are their coordinates tells where each crop was taken, and how large:
    the same everywhere in the frame, on average, and at the extremes."""
    from slowfast.datasets.utils import spatial_sampling

    cfg = get_cfg("DATA.INV_UNIFORM_SAMPLE", inverse, "DATA.TRAIN_JITTER_SCALES", [36, 60])
    cfg.DATA.TRAIN_JITTER_SCALES_RELATIVE = relative
    cfg.DATA.TRAIN_JITTER_ASPECT_RELATIVE = [0.75, 1.3333] if relative else []
    ours = train_transform(theirs_as_ours(cfg), split)
    height, width = 48, 64
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    clip = torch.stack([rows, columns, rows]).float()

    def place(crop):
        """Middle row, middle column, scale down and across (negative if flipped)."""
        rows, columns = crop[0], crop[1]
        down = (rows[-4] - rows[4])[10] / (len(rows) - 8)
        across = (columns[:, -4] - columns[:, 4])[10] / (len(rows) - 8)
        return torch.stack([rows.mean(), columns.mean(), down, across])

    relative = relative if split == "train" else []
    keys = {
        **{"min_scale": 36, "max_scale": 60, "crop_size": 32, "inverse_uniform_sampling": inverse},
        **{"scale": relative or None, "aspect_ratio": [0.75, 1.3333] if relative else None},
    }
    theirs = [place(spatial_sampling(clip[:, None], **keys)[:, 0]) for _ in range(1500)]
    found = [place(ours(clip[None])[:, 0]) for _ in range(1500)]
    theirs, found = torch.stack(theirs).abs(), torch.stack(found)
    assert 0.4 < (found[:, 3] < 0).float().mean() < 0.6
    found = found.abs()
    # Standard errors of 1500 draws are a fortieth of a deviation: five of them, twice.
    deviation = theirs.std(0)
    assert ((theirs.mean(0) - found.mean(0)).abs() < deviation * 0.26).all()
    assert ((theirs.std(0) - found.std(0)).abs() < deviation * 0.2).all()
    for quantile in (0.1, 0.5, 0.9):
        apart = theirs.quantile(quantile, 0) - found.quantile(quantile, 0)
        assert (apart.abs() < deviation * 0.3).all(), quantile


@pytest.fixture
def ssv2(get_cfg, tmp_path):
    """``ssv2(*opts)``: a config on one video of 12 images of noise, 40x56."""
    rng = np.random.default_rng(0)
    rows = ["original_vido_id video_id frame_id path labels"]
    for number in range(12):
        image = Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8))
        image.save(tmp_path / f"{number}.png")
        rows.append(f'7 0 {number} {number}.png ""')
    (tmp_path / "something-something-v2-labels.json").write_text('{"Holding": "3"}')
    for split, name in (("train", "train"), ("val", "validation")):
        (tmp_path / f"{split}.csv").write_text("\n".join(rows) + "\n")
        videos = '[{"id": "7", "template": "[Holding]"}]'
        (tmp_path / f"something-something-v2-{name}.json").write_text(videos)

    def make(*opts):
        places = ("DATA.PATH_TO_DATA_DIR", str(tmp_path), "DATA.PATH_PREFIX", str(tmp_path))
        names = ("TRAIN.DATASET", "ssv2", "TEST.DATASET", "ssv2")
        return get_cfg(*places, *names, "DATA.REVERSE_INPUT_CHANNEL", True, *opts)

    return make


@pytest.mark.parametrize("crops", [1, 2, 3])
def test_views_of_ssv2_are_slowfasts(ssv2, crops):
    """One crop is the first of three there, not the middle one."""
    from slowfast.datasets import build_dataset

    cfg = ssv2("TEST.NUM_SPATIAL_CROPS", crops)
    ours = theirs_as_ours(cfg)
    views = normalize_clips(ClipDataset(ours, "test")[0][0], ours)
    dataset = build_dataset("ssv2", cfg, "test")
    assert len(views) == len(dataset) == 2 * crops
    for number, view in enumerate(views):
        torch.testing.assert_close(view, dataset[number][0][0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("split", ["train", "val"])
def test_crops_of_ssv2_are_as_large_as_slowfasts(ssv2, augmented, split):
    """Their relative scales count in training with AUG.ENABLE alone."""
    from slowfast.datasets import build_dataset

    cfg = ssv2("AUG.ENABLE", augmented, "AUG.AA_TYPE", "", "AUG.RE_PROB", 0.0,
               "DATA.TRAIN_JITTER_SCALES", [40, 40],
               "DATA.TRAIN_JITTER_SCALES_RELATIVE", [0.1, 0.1],
               "DATA.TRAIN_JITTER_ASPECT_RELATIVE", [1.0, 1.0])  # fmt: skip
    ours = theirs_as_ours(cfg)
    dataset, theirs = ClipDataset(ours, split), build_dataset("ssv2", cfg, split)

    def roughness(clip):
        """Of noise that is scaled up less."""
        return clip.diff(dim=-1).abs().mean().item()

    found = np.mean([roughness(normalize_clips(dataset[n, 0][0], ours)) for n in range(8)])
    expected = np.mean([roughness(theirs[0][0][0]) for _ in range(8)])
    assert found == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("size", [33, 35])
def test_random_crops_reach_slowfasts_offsets(checkout, get_cfg, size):
    from slowfast.datasets.transform import random_crop

    ours = theirs_as_ours(
        get_cfg("DATA.TRAIN_JITTER_SCALES", [size, size], "DATA.RANDOM_FLIP", False)
    )
    crop = train_transform(ours, "train")
    clip = torch.arange(size * 40.0).view(1, 1, size, 40)
    found = {crop(clip.expand(1, 3, size, 40))[0, 0, 0, 0].item() for _ in range(600)}
    assert found == {random_crop(clip, 32)[0][0, 0, 0, 0].item() for _ in range(600)}


# ---- schedule and optimizer -------------------------------------------------------------------


def test_rates_are_slowfasts_for_hundreds_of_solvers(get_cfg):
    from slowfast.utils.lr_policy import get_lr_at_epoch

    draw, tried = random.Random(0), 0
    for _ in range(400):
        cfg = get_cfg()
        node = cfg.SOLVER
        node.BASE_LR, node.COSINE_END_LR = draw.uniform(0.01, 1), draw.uniform(0, 0.009)
        node.MAX_EPOCH, node.WARMUP_EPOCHS = draw.randrange(2, 60), draw.choice([0.0, 0.5, 1.9])
        node.WARMUP_START_LR = draw.uniform(0, 0.2)
        node.COSINE_AFTER_WARMUP = draw.random() < 0.5
        if draw.random() < 0.5:
            node.LR_POLICY = "steps_with_relative_lrs"
            node.STEPS = [0, *sorted(draw.sample(range(1, 70), draw.randrange(3)))]
            node.LRS = [draw.uniform(0, 1) for _ in node.STEPS]
        ours = theirs_as_ours(cfg)
        check_solver(ours)
        for _ in range(20):
            epoch = draw.uniform(0, node.MAX_EPOCH - 1e-9)
            assert lr_at(epoch, ours) == pytest.approx(get_lr_at_epoch(cfg, epoch), rel=1e-12)
            tried += 1
    assert tried == 8000


@pytest.mark.parametrize("decay", [1.0, 0.7])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("positions", [(), ("USE_ABS_POS", False, "REL_POS_SPATIAL", True,
                                            "REL_POS_TEMPORAL", True)])  # fmt: skip
@pytest.mark.parametrize("spared", [False, True])
def test_groups_are_slowfasts(get_cfg, build, decay, flat, positions, spared):
    from slowfast.models.optimizer import construct_optimizer

    opts = [f"MVIT.{w}" if isinstance(w, str) else w for w in positions]
    cfg = get_cfg("SOLVER.LAYER_DECAY", decay, "SOLVER.ZERO_WD_1D_PARAM", flat,
                  "MVIT.ZERO_DECAY_POS_CLS", spared, *opts)  # fmt: skip
    model = build(cfg)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    theirs = construct_optimizer(model, cfg).param_groups
    ours = theirs_as_ours(cfg)
    our_model = build_model(ours)
    our_names = {id(p): name for name, p, _ in optim.slowfast_parameters(our_model)}
    found = optim.build_optimizer(our_model, ours).param_groups

    def described(groups, names):
        keys = ("weight_decay", "layer_decay", "betas", "eps", "amsgrad")
        return [
            [sorted(names[id(p)] for p in group["params"]), *(group[key] for key in keys)]
            for group in groups
        ]

    assert described(found, our_names) == described(theirs, names)


def test_paths_are_dropped_as_often_as_in_slowfast(get_cfg, build):
    cfg = get_cfg("MVIT.DROPPATH_RATE", 0.3, "MODEL.DROPOUT_RATE", 0.4)
    theirs, ours = build(cfg), build_model(theirs_as_ours(cfg))
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in theirs.blocks]
    assert [block.stochastic_depth.p for block in ours.blocks] == pytest.approx(rates)
    assert ours.head[0].p == theirs.head.dropout.p == 0.4


# ---- losses and errors ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cross_entropy", "soft_cross_entropy"])
@pytest.mark.parametrize("soft", [False, True])
def test_losses_are_slowfasts(checkout, name, soft):
    from slowfast.models.losses import get_loss_func

    logits = torch.randn(6, 5, requires_grad=True)
    labels = torch.randint(5, (6,))
    if soft:
        share = 0.3
        labels = mixup.smooth_labels(labels, 5, 0.1)
        labels = share * labels + (1 - share) * labels.flip(0)
    expected = get_loss_func(name)(reduction="mean")(logits, labels)
    found = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("method", ["sum", "max"])
def test_views_become_slowfasts_predictions(checkout, method):
    from slowfast.utils.meters import TestMeter

    views, videos, classes = 6, 5, 7
    meter = TestMeter(videos, views, classes, 1, ensemble_method=method)
    ours = standalone_cfg()
    ours.DATA.ENSEMBLE_METHOD, ours.MODEL.NUM_CLASSES = method, classes
    ensemble = ViewEnsemble(ours, videos, views)
    predictions = torch.randn(videos * views, classes).softmax(1)
    labels = torch.randint(classes, (videos,)).repeat_interleave(views)
    for part in torch.randperm(videos * views).split(4):
        meter.update_stats(predictions[part], labels[part], part)
        ensemble.add(predictions[part], labels[part], part // views, part % views)
    torch.testing.assert_close(ensemble.predictions, meter.video_preds)
    meter.finalize_metrics()
    top1, top5 = (100 - e.item() for e in topk_errors(ensemble.predictions, ensemble.labels))
    assert f"{top1:.2f}" == meter.stats["top1_acc"] and f"{top5:.2f}" == meter.stats["top5_acc"]


# ---- whole iterations -------------------------------------------------------------------------


class Batches:
    """The same batches for both loops, as a loader."""

    def __init__(self, batches, seeds):
        self.batches, self.seeds, self.batch_size = batches, seeds, len(batches[0][0])
        self.dataset = self.videos = self.bad = self

    def __len__(self):
        return len(self.batches)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def count(self):
        return {}

    def __iter__(self):
        for iteration, (clips, labels) in enumerate(self.batches):
            np.random.seed(self.seeds(self.epoch, iteration))
            yield clips.clone(), labels, labels, labels

    def theirs(self):
        for clips, labels, *_ in self:
            yield [clips], labels, labels, labels, {}


RECIPES = {
    "paper": ("MIXUP.ENABLE", True, "MODEL.LOSS_FUNC", "soft_cross_entropy",
              "SOLVER.CLIP_GRAD_L2NORM", 0.05, "SOLVER.LAYER_DECAY", 0.8),
    "norm": ("SOLVER.CLIP_GRAD_L2NORM", 1e-3, "SOLVER.OPTIMIZING_METHOD", "sgd"),
    "value": ("SOLVER.CLIP_GRAD_VAL", 1e-4, "SOLVER.OPTIMIZING_METHOD", "sgd"),
    "float16": ("TRAIN.MIXED_PRECISION", True, "SOLVER.CLIP_GRAD_L2NORM", 1e-3,
                "SOLVER.OPTIMIZING_METHOD", "sgd"),
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_iterations_are_slowfasts(checkout, get_cfg, build, recipe, monkeypatch, tmp_path):
    """Two epochs of three iterations in both loops: weights, and every number that is logged."""
    import slowfast.utils.logging as logging
    from slowfast.models.optimizer import construct_optimizer
    from slowfast.utils.meters import TrainMeter, ValMeter

    cfg = get_cfg("OUTPUT_DIR", str(tmp_path), "LOG_PERIOD", 2, "TRAIN.EVAL_PERIOD", 1,
                  "SOLVER.WARMUP_EPOCHS", 1.0, "SOLVER.WARMUP_START_LR", 1e-4,
                  "MVIT.ZERO_DECAY_POS_CLS", False, *RECIPES[recipe])  # fmt: skip
    ours = theirs_as_ours(cfg)
    ours.TRAIN.MIXED_PRECISION_DTYPE = "float16"
    check_solver(ours)
    torch.manual_seed(0)
    batches = [(torch.randn(5, 3, 8, 32, 32), torch.randint(8, (5,))) for _ in range(3)]
    loader = Batches(batches, lambda *place: iteration_seed(cfg.RNG_SEED, *place, 0))
    model, our_model = build(cfg), build_model(ours)
    checkpoints.load_weights(our_model, model.state_dict())

    train_net = runpy.run_path(str(checkout / "tools" / "train_net.py"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # a build for GPUs wants one
    theirs, found = [], []
    monkeypatch.setattr(logging, "log_json_stats", lambda stats, *_: theirs.append(dict(stats)))
    optimizer = construct_optimizer(model, cfg)
    scaler = torch.amp.GradScaler("cpu", enabled=cfg.TRAIN.MIXED_PRECISION)
    monkeypatch.setattr(
        torch.cuda.amp, "autocast", lambda enabled: torch.autocast("cpu", torch.float16, enabled)
    )
    if cfg.SOLVER.CLIP_GRAD_VAL:  # its norm is None, which the loop then reads
        clip = torch.nn.utils.clip_grad_value_
        norm = torch.tensor(0.0)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_value_", lambda *words: clip(*words) or norm)
    meter, val_meter = TrainMeter(len(loader), cfg), ValMeter(len(loader), cfg)
    for epoch in range(2):
        loader.set_epoch(epoch)
        feed = type("Feed", (), {"__iter__": lambda _: loader.theirs(), "__len__": lambda _: 3})()
        train_net["train_epoch"](feed, model, optimizer, scaler, meter, epoch, cfg)
        train_net["eval_epoch"](feed, model, val_meter, epoch, cfg, feed, None)
    monkeypatch.undo()

    monkeypatch.setattr("stts_slowfast.standalone.training_loop.build_loader", lambda *_: loader)
    monkeypatch.setattr(run_logger, "log_json_stats", lambda stats, *_: found.append(dict(stats)))
    monkeypatch.setattr(TrainingLoop, "save", lambda *_: None)
    with RunLogger(ours, True, tensorboard=False) as run_log:
        fabric = open_fabric(ours, ProcessInfo(0, 1, 0, 1, "localhost", 0))
        training = TrainingLoop(
            ours, fabric, our_model, ResumeState(), run_log, SignalState(), None
        )
        for epoch in range(2):
            training.train_epoch(epoch)

    keys = ["_type", "epoch", "iter", "loss", "lr", "top1_err", "top5_err", "min_top1_err"]
    keys += [] if cfg.SOLVER.CLIP_GRAD_VAL else ["grad_norm"]
    assert len(theirs) == len(found) == 8
    tolerance = {"rel": 5e-2, "abs": 1e-4} if recipe == "float16" else {"rel": 2e-4, "abs": 1e-5}
    for one, other in zip(theirs, found):
        for key in keys:
            expected = one.get(key)
            assert other.get(key) == (
                pytest.approx(expected, **tolerance) if isinstance(expected, float) else expected
            ), key
    weights = checkpoints.slowfast_state(our_model)
    for name, value in model.state_dict().items():
        scale = 2e-3 if recipe == "float16" else 2e-5
        torch.testing.assert_close(weights[name].view_as(value), value, rtol=0, atol=scale)
