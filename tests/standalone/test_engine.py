"""Training, resuming and testing on real video files, with SlowFast's checkpoints and lines."""

import gc
import json
import os
import pickle
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stts_slowfast.standalone import checkpointing, engine, run_logger
from stts_slowfast.standalone.data import ClipLoader
from stts_slowfast.standalone.model import build_model
from stts_slowfast.standalone.signals import Interrupted
from stts_slowfast.standalone.training_loop import TrainingLoop
from stts_slowfast.video.accuracy import mixed_topk_errors, topk_errors


@pytest.fixture
def cfg(run):
    return run.cfg


class Watch:
    """Remembers the batches of a run; ``look`` is called after each with split, model, batch."""

    def __init__(self, look=None):
        self.look, self.batches = look, []

    def __call__(self, split, model, batch):
        self.batches.append((split, [part.clone() for part in batch]))
        if self.look:
            self.look(split, model, batch)

    def of(self, split):
        return [batch for name, batch in self.batches if name == split]


class CtrlC:
    """Stops a run after so many batches: after 4, in the middle of its second epoch."""

    def __init__(self, batches=4):
        self.left = batches

    def __call__(self, split, model, batch):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_training_and_testing_write_what_slowfast_writes(run, cfg):
    cfg.TENSORBOARD.ENABLE = True
    result = engine.train(cfg)
    assert result["checkpoint"].endswith("checkpoints/checkpoint_epoch_00002.pyth")
    last = run.checkpoint(2)
    assert set(last) == {"epoch", "model_state", "optimizer_state", "cfg", "stts"}
    assert last["epoch"] == 1
    assert "patch_embed.proj.weight" in last["model_state"]

    iterations = run.json_stats("train_iter_")
    fields = {"_type", "epoch", "iter", "dt", "dt_data", "dt_net", "eta", "loss", "lr"}
    fields |= {"grad_norm", "gpu_mem", "top1_err", "top5_err", "sigma", "backbone_lr"}
    assert [set(s) for s in iterations] == [fields] * 6
    assert [s["epoch"] + " " + s["iter"] for s in iterations[2:4]] == ["1/2 3/3", "2/2 1/3"]
    # sigma falls from 0.1 to 0 over 6 iterations; from random weights the backbone never rests
    assert [s["sigma"] for s in iterations] == [0.1, 0.08333, 0.06667, 0.05, 0.03333, 0.01667]
    assert all(s["backbone_lr"] == s["lr"] for s in iterations)
    (val,) = run.json_stats("val_epoch")  # after the last epoch alone: EVAL_PERIOD is 5
    assert val["epoch"] == "2/2" and val["min_top1_err"] == val["top1_err"]
    assert val["top1_err"] == pytest.approx(result["top1_err"], abs=1e-4)
    assert len(run.json_stats("train_epoch", "json_stats.log")) == 2
    events = EventAccumulator(str(run.folder / "runs-kinetics"))
    events.Reload()
    for name in ("sigma", "backbone_lr", "lr", "loss"):
        scalars = events.Scalars(f"Train/{name}")
        assert [each.step for each in scalars] == list(range(6))
        expected = [s[name] for s in iterations]
        assert [each.value for each in scalars] == pytest.approx(expected, abs=1e-5)
    (shown,) = events.Images("Val/kept")  # a row for each of two clips
    assert shown.step == 1 and shown.width > shown.height > 300
    assert not Path(cfg.OUTPUT_DIR, "lightning_logs").exists()

    result = engine.test(cfg)
    (final,) = run.json_stats("test_final")
    assert final["top1_acc"] == f"{result['top1_acc']:.2f}"
    assert (result["num_videos"], result["num_views"]) == (run.num_videos, 2)
    assert result["top1_acc"] * run.num_videos / 100 == pytest.approx(
        round(result["top1_acc"] * run.num_videos / 100), abs=1e-4
    )
    assert result["clips_per_s"] > 0


def test_fine_tuning_freezes_and_caps_the_backbone(run, cfg, tmp_path):
    cfg.TRAIN.CHECKPOINT_FILE_PATH = engine.train(cfg)["checkpoint"]
    cfg.TRAIN.CHECKPOINT_EPOCH_RESET = True
    cfg.OUTPUT_DIR = str(tmp_path / "tuned")
    with pytest.raises(Interrupted):
        engine.train(cfg, watch=CtrlC())
    engine.train(cfg)  # a resumed run is what it was
    rates = [s["backbone_lr"] > 0 for s in run.json_stats("train_iter_")]
    # half an epoch of three iterations; the second epoch, which was cut off, and again
    assert rates == [False, False, True, True, True, True, True]


def test_the_lowest_errors_survive_a_stop(run, cfg, tmp_path, monkeypatch):
    errors = iter([[60.0, 50.0], [20.0, 10.0], [90.0, 80.0], [40.0, 30.0]] + [[70.0, 60.0]] * 2)
    monkeypatch.setattr(
        run_logger.Meter, "means", lambda meter: dict(zip(meter.names, next(errors)))
    )

    def validate_alone(training, epoch, first=0):
        training.save(epoch + 1)
        training.validate(epoch)
        if epoch == stop_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingLoop, "train_epoch", validate_alone)
    cfg.SOLVER.MAX_EPOCH, stop_after = 4, 1
    with pytest.raises(Interrupted):
        engine.train(cfg)
    stop_after = 9
    engine.train(cfg)
    stats = run.json_stats("val_epoch")
    assert [s["min_top1_err"] for s in stats] == [60.0, 20.0, 20.0, 20.0]
    assert [s["min_top5_err"] for s in stats] == [50.0, 10.0, 10.0, 10.0]
    # From an earlier checkpoint on, or anew in the same folder, what came later does not count.
    for epoch in (4, 3, 2):
        (run.folder / "checkpoints" / f"checkpoint_epoch_{epoch:05d}.pyth").unlink()
    stop_after = 1
    with pytest.raises(Interrupted):
        engine.train(cfg)
    cfg.TRAIN.AUTO_RESUME, stop_after = False, 0
    with pytest.raises(Interrupted):
        engine.train(cfg)
    stats = run.json_stats("val_epoch")[4:]
    assert [s["min_top1_err"] for s in stats] == [60.0, 70.0]


def assert_equal(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_stopped_and_resumed_ends_where_the_whole_run_ends(run, cfg, tmp_path):
    cfg.STTS.SIGMA_DECAY = "linear"
    engine.train(cfg)
    whole, lines = run.checkpoint(2), run.json_stats("train_iter_")

    cfg.OUTPUT_DIR = str(tmp_path / "stopped")
    with pytest.raises(Interrupted, match=r"resumes from .*checkpoint_epoch_00001\.pyth"):
        engine.train(cfg, watch=CtrlC())
    engine.train(cfg)
    resumed = run.checkpoint(2)
    assert_equal(resumed["model_state"], whole["model_state"])
    assert_equal(resumed["optimizer_state"], whole["optimizer_state"])

    def course(stats):
        keys = ("epoch", "iter", "lr", "sigma", "backbone_lr", "loss", "grad_norm")
        return [[s[key] for key in keys] for s in stats]

    # 3 of epoch 1, 1 of the epoch that was cut off, 3 of the one that was done again
    assert course(run.json_stats("train_iter_")[4:]) == course(lines[3:])


def test_stopped_before_a_checkpoint_begins_anew(cfg):
    cfg.TRAIN.CHECKPOINT_PERIOD = 2
    with pytest.raises(Interrupted, match="starts again: there is no checkpoint yet"):
        engine.train(cfg, watch=CtrlC())


@pytest.mark.parametrize("seed", [0, 4])
def test_a_finished_run_only_validates_on_the_same_clips(run, cfg, seed):
    cfg.RNG_SEED = seed
    first, again = Watch(), Watch()
    engine.train(cfg, watch=first)
    engine.train(cfg, watch=again)
    assert not again.of("train") and len(run.json_stats("train_epoch")) == 2
    assert_equal(again.of("val"), first.of("val"))
    stats = run.json_stats("val_epoch")
    assert [(s["epoch"], s["top1_err"]) for s in stats[1:]] == [("2/2", stats[0]["top1_err"])]


def test_training_shuffles_anew_in_every_epoch(cfg):
    cfg.TRAIN.BATCH_SIZE, cfg.MIXUP.ENABLE = 1, False
    watch = Watch()
    engine.train(cfg, watch=watch)
    order = [int(batch[2]) for batch in watch.of("train")]
    first, second = order[:7], order[7:]
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second and list(range(7)) not in (first, second)


def test_a_runs_loaders_go_with_it(cfg):
    """Else the workers of the next run in this process find them, and print errors."""
    cfg.DATA_LOADER.NUM_WORKERS, cfg.SOLVER.MAX_EPOCH = 1, 1
    gc.collect()
    gc.disable()
    try:
        engine.train(cfg)
        assert not [thing for thing in gc.get_objects() if type(thing) is ClipLoader]
    finally:
        gc.enable()


def test_every_iteration_has_its_own_seed(cfg):
    def seeds():
        found = []
        engine.train(cfg, watch=lambda split, *_: found.append((split, torch.initial_seed())))
        return [seed for split, seed in found if split == "train"]

    first = seeds()
    assert len(set(first)) == 6
    cfg.TRAIN.AUTO_RESUME = False
    assert seeds() == first
    cfg.RNG_SEED += 1
    assert not set(seeds()) & set(first)


def test_validation_and_testing_leave_autocast(cfg, monkeypatch):
    cfg.TRAIN.MIXED_PRECISION, cfg.SOLVER.MAX_EPOCH = True, 1
    seen = set()

    def watched(cfg):
        model = build_model(cfg)
        forward = model.forward

        def look(clips):
            seen.add((model.training, torch.is_autocast_enabled("cpu")))
            return forward(clips)

        model.forward = look
        return model

    monkeypatch.setattr(engine, "build_model", watched)
    engine.train(cfg)
    assert seen == {(True, True), (False, False)}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):  # whatever is around it
        engine.test(cfg)
    assert seen == {(False, False)}


def test_testing_prefers_the_runs_own_last_checkpoint(run, cfg, tmp_path):
    cfg.SOLVER.MAX_EPOCH = 1
    other = engine.train(cfg)["checkpoint"]
    cfg.OUTPUT_DIR, cfg.RNG_SEED = str(tmp_path / "own"), 1
    own = engine.train(cfg)["checkpoint"]
    cfg.TRAIN.CHECKPOINT_FILE_PATH = other
    assert f"Loaded {own}" in said_in_testing(run, cfg)
    cfg.TEST.CHECKPOINT_FILE_PATH = other
    assert f"Loaded {other}" in said_in_testing(run, cfg)
    cfg.TEST.CHECKPOINT_FILE_PATH, cfg.OUTPUT_DIR = "", str(tmp_path / "new")
    assert f"Loaded {other}" in said_in_testing(run, cfg)


def said_in_testing(run, cfg):
    """What the log says of a test."""
    log = run.folder / "stdout.log"
    before = log.read_text() if log.exists() else ""
    engine.test(cfg)
    return log.read_text()[len(before) :]


def test_float16_resumes_with_the_scale_of_the_gradients(run, cfg, tmp_path):
    cfg.TRAIN.MIXED_PRECISION, cfg.TRAIN.MIXED_PRECISION_DTYPE = True, "float16"
    engine.train(cfg)
    whole = run.checkpoint(2)
    assert whole["scaler_state"]["scale"] > 0
    cfg.OUTPUT_DIR = str(tmp_path / "stopped")
    with pytest.raises(Interrupted):
        engine.train(cfg, watch=CtrlC())
    engine.train(cfg)
    for key in ("scaler_state", "model_state"):
        assert_equal(run.checkpoint(2)[key], whole[key])
    cfg.TRAIN.MIXED_PRECISION_DTYPE = "half"
    with pytest.raises(ValueError, match=r"MIXED_PRECISION_DTYPE is 'half': use one of"):
        engine.train(cfg)


def test_files_that_are_no_whole_checkpoint_are_ignored(run, cfg):
    folder = Path(cfg.OUTPUT_DIR, "checkpoints")
    folder.mkdir(parents=True)
    assert checkpointing.last_checkpoint(cfg) is None
    for name in ("checkpoint_epoch_00003.pyth", "checkpoint_epoch_00012.pyth"):
        (folder / name).touch()
    for name in ("checkpoint_epoch_00013.pyth.partial", "best.pyth", "ssl_checkpoint_x.pyth"):
        (folder / name).touch()
    assert checkpointing.last_checkpoint(cfg) == str(folder / "checkpoint_epoch_00012.pyth")
    cfg.TASK = "ssl_eval"
    assert checkpointing.last_checkpoint(cfg) is None
    assert checkpointing.checkpoint_path(cfg, 3).endswith("/ssl_eval_checkpoint_epoch_00003.pyth")


def test_training_starts_from_a_baselines_weights(run, cfg, tmp_path):
    cfg.STTS.ENABLE, cfg.SOLVER.MAX_EPOCH = False, 1
    baseline = engine.train(cfg)["checkpoint"]
    weights = run.checkpoint(1)["model_state"]
    cfg.OUTPUT_DIR = str(tmp_path / "fine-tuned")
    cfg.TRAIN.CHECKPOINT_FILE_PATH = baseline
    cfg.STTS.ENABLE, cfg.STTS.FREEZE_BACKBONE_EPOCHS = True, 1.0
    with pytest.raises(ValueError, match=r"CHECKPOINT_EPOCH_RESET True to train from"):
        engine.train(cfg)
    cfg.TRAIN.CHECKPOINT_EPOCH_RESET = True
    engine.train(cfg)
    # the backbone was frozen for the whole epoch: it is the baseline's to the bit
    tuned = run.checkpoint(1)["model_state"]
    torch.testing.assert_close({k: tuned[k] for k in weights}, weights, rtol=0, atol=0)
    assert any(key.startswith("stts.") for key in tuned)


def test_another_models_checkpoint_is_refused(run, cfg, tmp_path):
    cfg.SOLVER.MAX_EPOCH = 1
    path = engine.train(cfg)["checkpoint"]
    cfg.SOLVER.MAX_EPOCH, cfg.MODEL.NUM_CLASSES = 2, 12
    with pytest.raises(ValueError, match=r"00001\.pyth .*OUTPUT_DIR"):
        engine.train(cfg)
    cfg.TEST.CHECKPOINT_FILE_PATH = path
    with pytest.raises(ValueError, match=r"head for other .*MODEL\.NUM_CLASSES"):
        engine.test(cfg)
    cfg.TEST.CHECKPOINT_FILE_PATH = str(tmp_path / "gone.pyth")
    with pytest.raises(FileNotFoundError, match=r"gone\.pyth does not exist"):
        engine.test(cfg)


def test_a_last_checkpoint_without_its_epoch_is_refused(run, cfg):
    path = Path(checkpointing.checkpoint_path(cfg, 1))
    path.parent.mkdir(parents=True)
    torch.save({"model_state": build_model(cfg).state_dict()}, path)
    with pytest.raises(ValueError, match=r"00001\.pyth does not contain its epoch"):
        engine.train(cfg)


def test_a_clip_alone_is_not_mixed(cfg):
    cfg.TRAIN.BATCH_SIZE = 1
    with pytest.raises(ValueError, match=r"MIXUP\.ENABLE is True but TRAIN\.BATCH_SIZE 1"):
        engine.train(cfg)


def test_a_test_without_clips_is_refused(run, cfg):
    cfg.TEST.NUM_ENSEMBLE_VIEWS = 0
    with pytest.raises(ValueError, match=r"TEST\.NUM_ENSEMBLE_VIEWS is 0"):
        engine.test(cfg)
    cfg.TEST.NUM_ENSEMBLE_VIEWS, cfg.TEST.NUM_TEMPORAL_CLIPS = 1, [2, 0]
    with pytest.raises(ValueError, match=r"TEST\.NUM_TEMPORAL_CLIPS is \[2, 0\]"):
        engine.test(cfg)


def test_a_test_that_reads_no_video_fails(run, cfg):
    cfg.DATA.PATH_PREFIX = "nowhere"
    with pytest.raises(ValueError, match=r"none of the \d+ test videos .*PATH_PREFIX \('nowhere'"):
        engine.test(cfg)


def test_testing_ends_with_the_list_of_unreadable_videos_unless_they_are_allowed(run, cfg):
    folder, known = cfg.DATA.PATH_PREFIX, range(run.num_videos - 1)
    lines = [f"{folder}/{number}.mp4 {number % 6}\n" for number in known]
    cfg.DATA.PATH_PREFIX = ""
    cfg.DATA.PATH_TO_DATA_DIR = cfg.OUTPUT_DIR
    os.makedirs(cfg.OUTPUT_DIR)
    with open(os.path.join(cfg.OUTPUT_DIR, "test.csv"), "w") as file:
        file.writelines([*lines, "gone.mp4 0\n"])
    with pytest.raises(ValueError, match=r"1 of the test videos .*ALLOW_MISSING.*\n  gone.mp4"):
        engine.test(cfg)
    cfg.TEST.ALLOW_MISSING = True
    result = engine.test(cfg)
    assert (result["unreadable"], result["damaged"]) == (1, 0)
    count = run.num_videos - 1
    for name in ("top1_acc", "top5_acc"):  # the lost one counts as wrong
        expected = result[f"{name}_readable"] * count / (count + 1)
        assert result[name] == pytest.approx(expected, abs=1e-3)
    with open(os.path.join(cfg.OUTPUT_DIR, "json_stats.log")) as file:
        assert '"unreadable": 1' in file.read().splitlines()[-1]


def test_mixed_precision_and_clipping_train(run, cfg):
    cfg.TRAIN.MIXED_PRECISION, cfg.SOLVER.MAX_EPOCH = True, 1
    cfg.SOLVER.CLIP_GRAD_VAL = 1e-4
    largest = []

    def look(split, model, batch):
        if split == "train":
            largest.append(max(p.grad.abs().max().item() for p in model.parameters()))

    engine.train(cfg, watch=look)
    assert len(largest) == 3 and all(0 < value <= 1e-4 * 1.0001 for value in largest)
    assert all(s["grad_norm"] > 1e-3 for s in run.json_stats("train_iter_"))  # before clipping


@pytest.mark.parametrize(
    ("job", "mixed", "precision", "said"),
    [
        ("Training", False, "highest", "FLOAT32_MATMUL_PRECISION high, or TRAIN.MIXED_PRECISION"),
        ("Training", True, "highest", ""),
        ("Testing", True, "highest", "FLOAT32_MATMUL_PRECISION high, or TEST.PRECISION bfloat16"),
        ("Testing", False, "high", ""),
    ],
)
def test_slow_float32_on_a_gpu_is_logged(cfg, monkeypatch, caplog, job, mixed, precision, said):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    cfg.NUM_GPUS, cfg.TRAIN.MIXED_PRECISION = 1, mixed
    with caplog.at_level("INFO", "stts_slowfast"):
        engine._log_environment(cfg, Mock(device="cuda", world_size=1), job)
    assert len(caplog.messages) == 1 + bool(said) and said in caplog.messages[-1]


def test_nan_scores_on_a_device_stop_training_by_the_selectors_name(cfg, monkeypatch):
    """Together with the loss; here the machine's memory passes for a device's."""
    for module in ("selector_state", "topk"):
        monkeypatch.setattr(f"stts_slowfast.{module}.is_cpu", lambda tensor: False)
    steps = []

    def poison(split, model, batch):
        steps.append(split)
        with torch.no_grad():
            next(model.stts["time_0"].parameters()).fill_(torch.nan)

    with pytest.raises(ValueError, match="STTS time_0: scores hold NaN"):
        engine.train(cfg, watch=Watch(poison))
    assert steps == ["train"]


def test_a_loss_that_is_not_finite_stops_the_run_before_a_checkpoint(run, cfg):
    cfg.SOLVER.BASE_LR, cfg.SOLVER.OPTIMIZING_METHOD = 1e6, "sgd"
    cfg.STTS.ENABLE = False
    with pytest.raises(
        ValueError, match=r"the (loss|norm of the gradient) is (nan|inf) at epoch .*SOLVER\.BASE_LR"
    ):
        engine.train(cfg)
    assert checkpointing.last_checkpoint(cfg) is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("NUM_GPUS", 99, r"NUM_GPUS is 99 but this machine has \d+"),
        ("SHARD_ID", 1, r"SHARD_ID is 1 but NUM_SHARDS is 1"),
        ("LOG_PERIOD", 0, r"LOG_PERIOD is 0"),
        ("AUG.NUM_SAMPLE", 0, r"AUG\.NUM_SAMPLE is 0"),
        ("DATA.TARGET_FPS", 0, r"DATA\.TARGET_FPS is 0"),
        ("DATA.TRAIN_JITTER_SCALES", [32], r"DATA\.TRAIN_JITTER_SCALES is \[32\]"),
        ("MODEL.LOSS_FUNC", "bce", r"MODEL\.LOSS_FUNC is 'bce'"),
        ("MVIT.REV.ENABLE", True, r"MVIT\.REV\.ENABLE is True"),
    ],
)
def test_unusable_settings_are_explained(run, cfg, key, value, message):
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        engine.train(cfg)


def test_ensembles_sum_and_take_the_maximum(run, cfg):
    results = {}
    for cfg.DATA.ENSEMBLE_METHOD in ("sum", "max"):
        cfg.TEST.SAVE_RESULTS_PATH = f"{cfg.DATA.ENSEMBLE_METHOD}.pkl"
        engine.test(cfg)
        path = Path(cfg.OUTPUT_DIR, cfg.TEST.SAVE_RESULTS_PATH)
        results[cfg.DATA.ENSEMBLE_METHOD], labels = pickle.loads(path.read_bytes())
    assert labels.tolist() == [number % 6 for number in range(run.num_videos)]
    torch.testing.assert_close(results["sum"].sum(1), torch.full((run.num_videos,), 2.0))  # 2 views
    assert (results["max"] >= results["sum"] / 2 - 1e-6).all() and results["max"].max() < 1


def test_several_numbers_of_clips_are_tested(run, cfg):
    cfg.TEST.NUM_TEMPORAL_CLIPS = [1, 3]
    assert engine.test(cfg)["num_views"] == 3
    assert len(run.json_stats("test_final")) == 2


def test_what_a_run_found_is_in_a_file(run, cfg):
    """For programs, which must not read logs; it survives the next job in the folder."""
    cfg.LOG_MODEL_INFO = True
    trained = engine.train(cfg)
    tested = engine.test(cfg)
    record = json.loads((run.folder / "run.json").read_text())
    results = record.pop("results")
    assert results["test"]["top1_acc"] == tested["top1_acc"]
    assert results["train"] == {key: trained[key] for key in ("top1_err", "top5_err")}
    assert record.pop("config")["STTS"]["ENABLE"] is True
    expected = {"schema": 1, "engine": "standalone", "params": tested["params"]}
    assert record == {**expected, "gflops": tested["gflops"]} and tested["gflops"] > 0


def test_mixed_labels_count_both_classes_as_right():
    logits = torch.tensor([[3.0, 2.5, 0.0, 4.0, -1.0, -2.0]])
    labels = torch.tensor([[0.6, 0.4, 0.0, 0.0, 0.0, 0.0]])
    assert [error.item() for error in mixed_topk_errors(logits, labels)] == [0.0, 0.0]
    assert topk_errors(logits, torch.tensor([0]))[0].item() == 100.0
