"""Training, resuming and testing on real video files, with SlowFast's checkpoints and lines."""

import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import simplejson
import torch
from lightning.pytorch.callbacks import Callback

from stts_slowfast.standalone import engine, resume
from stts_slowfast.standalone.model import build_model
from stts_slowfast.standalone.processes import Interrupted, Shards

NUM_VIDEOS = 7  # does not divide by the batch size, nor by the number of processes


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    noise = np.random.default_rng(0)
    lines = []
    for number in range(NUM_VIDEOS):
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=30)
            stream.height = stream.width = 32
            stream.pix_fmt = "yuv420p"
            image = noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            for shift in range(16):
                frame = av.VideoFrame.from_ndarray(np.roll(image, shift, 1), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        lines.append(f"{number}.mp4 {number % 6}\n")
    for split in ("train", "val", "test"):
        (folder / f"{split}.csv").write_text("".join(lines))
    return folder


@pytest.fixture
def cfg(tiny_cfg, videos, tmp_path):
    """Two epochs of three iterations, with everything on that draws random numbers."""
    cfg = tiny_cfg
    cfg.NUM_GPUS, cfg.LOG_PERIOD, cfg.LOG_MODEL_INFO = 0, 1, False
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    cfg.DATA.PATH_TO_DATA_DIR = cfg.DATA.PATH_PREFIX = str(videos)
    cfg.DATA.SAMPLING_RATE, cfg.DATA.TRAIN_JITTER_SCALES = 1, [32, 36]
    cfg.DATA_LOADER.NUM_WORKERS = 0
    cfg.TRAIN.BATCH_SIZE, cfg.TRAIN.EVAL_PERIOD, cfg.TRAIN.CHECKPOINT_PERIOD = 2, 5, 1
    cfg.TEST.BATCH_SIZE, cfg.TEST.NUM_ENSEMBLE_VIEWS, cfg.TEST.NUM_SPATIAL_CROPS = 4, 2, 1
    cfg.MIXUP.ENABLE, cfg.MODEL.DROPOUT_RATE = True, 0.5
    cfg.MODEL.LOSS_FUNC = "soft_cross_entropy"
    cfg.SOLVER.MAX_EPOCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.OPTIMIZING_METHOD = 2, 1e-3, "adamw"
    cfg.STTS.ENABLE, cfg.STTS.FREEZE_BACKBONE_EPOCHS = True, 0.5
    return cfg


class CtrlC(Callback):
    """Stops a run in the middle of its second epoch."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 1):
            raise KeyboardInterrupt


def json_stats(cfg, kind=None, name="stdout.log"):
    text = (Path(cfg.OUTPUT_DIR) / name).read_text()
    stats = [simplejson.loads(line) for line in re.findall(r"json_stats: (.*)", text)]
    return [s for s in stats if kind in (None, s.get("_type"), s.get("split"))]


def checkpoint(cfg, epoch):
    path = Path(cfg.OUTPUT_DIR) / "checkpoints" / f"checkpoint_epoch_{epoch:05d}.pyth"
    return torch.load(path, weights_only=True)


def test_training_and_testing_write_what_slowfast_writes(cfg):
    cfg.TENSORBOARD.ENABLE = True
    result = engine.train(cfg)
    assert result["checkpoint"].endswith("checkpoints/checkpoint_epoch_00002.pyth")
    last = checkpoint(cfg, 2)
    assert set(last) == {"epoch", "model_state", "optimizer_state", "cfg"} and last["epoch"] == 1
    assert "patch_embed.proj.weight" in last["model_state"]

    iterations = json_stats(cfg, "train_iter_")
    fields = {"_type", "epoch", "iter", "dt", "dt_data", "dt_net", "eta", "loss", "lr"}
    fields |= {"grad_norm", "gpu_mem", "top1_err", "top5_err", "sigma", "backbone_lr"}
    assert [set(s) for s in iterations] == [fields] * 6
    assert [s["epoch"] + " " + s["iter"] for s in iterations[2:4]] == ["1/2 3/3", "2/2 1/3"]
    # sigma falls from 0.1 to 0 over 6 iterations; from random weights the backbone never rests
    assert [s["sigma"] for s in iterations] == [0.1, 0.08333, 0.06667, 0.05, 0.03333, 0.01667]
    assert all(s["backbone_lr"] == s["lr"] for s in iterations)
    (val,) = json_stats(cfg, "val_epoch")  # after the last epoch alone: EVAL_PERIOD is 5
    assert val["epoch"] == "2/2" and val["min_top1_err"] == val["top1_err"]
    assert val["top1_err"] == pytest.approx(result["top1_err"], abs=1e-4)
    assert len(json_stats(cfg, "train_epoch", "json_stats.log")) == 2
    assert list(Path(cfg.OUTPUT_DIR, "runs-kinetics").glob("events*"))
    assert not Path(cfg.OUTPUT_DIR, "lightning_logs").exists()

    result = engine.test(cfg)
    (final,) = json_stats(cfg, "test_final")
    assert final["top1_acc"] == f"{result['top1_acc']:.2f}"
    assert (result["num_videos"], result["num_views"]) == (NUM_VIDEOS, 2)
    assert result["top1_acc"] * NUM_VIDEOS / 100 == pytest.approx(
        round(result["top1_acc"] * NUM_VIDEOS / 100), abs=1e-4
    )
    assert result["clips_per_s"] > 0


def test_fine_tuning_holds_the_backbone_back(cfg, tmp_path):
    engine.train(cfg)
    cfg.TRAIN.CHECKPOINT_FILE_PATH = engine.last_checkpoint(cfg)
    cfg.TRAIN.CHECKPOINT_EPOCH_RESET = True
    cfg.OUTPUT_DIR = str(tmp_path / "tuned")
    engine.train(cfg)
    rates = [s["backbone_lr"] > 0 for s in json_stats(cfg, "train_iter_")]
    # half an epoch of three iterations
    assert rates == [False, False, True, True, True, True]


def test_stopped_and_resumed_ends_where_the_whole_run_ends(cfg, tmp_path):
    cfg.STTS.SIGMA_DECAY = "linear"
    engine.train(cfg)
    whole, lines = checkpoint(cfg, 2), json_stats(cfg, "train_iter_")

    cfg.OUTPUT_DIR = str(tmp_path / "stopped")
    with pytest.raises(Interrupted, match=r"goes on from .*checkpoint_epoch_00001\.pyth"):
        engine.train(cfg, callbacks=[CtrlC()])
    engine.train(cfg)
    resumed = checkpoint(cfg, 2)
    exact = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(resumed["model_state"], whole["model_state"], **exact)
    torch.testing.assert_close(resumed["optimizer_state"], whole["optimizer_state"], **exact)

    def course(stats):
        keys = ("epoch", "iter", "lr", "sigma", "backbone_lr", "loss", "grad_norm")
        return [[s[key] for key in keys] for s in stats]

    # 3 of epoch 1, 1 of the epoch that was cut off, 3 of the one that was done again
    assert course(json_stats(cfg, "train_iter_")[4:]) == course(lines[3:])


def test_stopped_before_a_checkpoint_begins_anew(cfg):
    cfg.TRAIN.CHECKPOINT_PERIOD = 2
    with pytest.raises(Interrupted, match="begins anew: there is no checkpoint yet"):
        engine.train(cfg, callbacks=[CtrlC()])


def test_a_finished_run_only_validates(cfg):
    engine.train(cfg)
    first = json_stats(cfg, "val_epoch")
    engine.train(cfg)
    again = json_stats(cfg, "val_epoch")[1:]
    assert len(json_stats(cfg, "train_epoch")) == 2
    assert [(s["epoch"], s["top1_err"]) for s in again] == [
        (s["epoch"], s["top1_err"]) for s in first
    ]


def test_files_that_are_no_whole_checkpoint_are_passed_over(cfg):
    folder = Path(cfg.OUTPUT_DIR, "checkpoints")
    folder.mkdir(parents=True)
    assert resume.last_checkpoint(cfg) is None
    for name in ("checkpoint_epoch_00003.pyth", "checkpoint_epoch_00012.pyth"):
        (folder / name).touch()
    for name in ("checkpoint_epoch_00013.pyth.partial", "best.pyth", "ssl_checkpoint_x.pyth"):
        (folder / name).touch()
    assert resume.last_checkpoint(cfg) == str(folder / "checkpoint_epoch_00012.pyth")
    cfg.TASK = "ssl_eval"
    assert resume.last_checkpoint(cfg) is None
    assert resume.checkpoint_path(cfg, 3).endswith("/ssl_eval_checkpoint_epoch_00003.pyth")


def test_training_starts_from_a_baselines_weights(cfg, tmp_path):
    cfg.STTS.ENABLE, cfg.SOLVER.MAX_EPOCH = False, 1
    baseline = engine.train(cfg)["checkpoint"]
    weights = checkpoint(cfg, 1)["model_state"]
    cfg.OUTPUT_DIR = str(tmp_path / "fine-tuned")
    cfg.TRAIN.CHECKPOINT_FILE_PATH = baseline
    cfg.STTS.ENABLE, cfg.STTS.FREEZE_BACKBONE_EPOCHS = True, 1.0
    with pytest.raises(ValueError, match=r"CHECKPOINT_EPOCH_RESET True to train on from"):
        engine.train(cfg)
    cfg.TRAIN.CHECKPOINT_EPOCH_RESET = True
    engine.train(cfg)
    # the backbone was frozen for the whole epoch: it is the baseline's to the bit
    tuned = checkpoint(cfg, 1)["model_state"]
    torch.testing.assert_close({k: tuned[k] for k in weights}, weights, rtol=0, atol=0)
    assert any(key.startswith("stts.") for key in tuned)


def test_another_models_checkpoint_is_refused(cfg, tmp_path):
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


def test_a_last_checkpoint_without_its_epoch_is_refused(cfg):
    path = Path(resume.checkpoint_path(cfg, 1))
    path.parent.mkdir(parents=True)
    torch.save({"model_state": build_model(cfg).state_dict()}, path)
    with pytest.raises(ValueError, match=r"00001\.pyth does not say after which epoch"):
        engine.train(cfg)


def test_a_test_without_clips_is_refused(cfg):
    cfg.TEST.NUM_ENSEMBLE_VIEWS = 0
    with pytest.raises(ValueError, match=r"TEST\.NUM_ENSEMBLE_VIEWS is 0"):
        engine.test(cfg)
    cfg.TEST.NUM_TEMPORAL_CLIPS = [2, 0]
    with pytest.raises(ValueError, match=r"TEST\.NUM_TEMPORAL_CLIPS is \[2, 0\]"):
        engine.test(cfg)


def test_a_test_that_reads_no_video_fails(cfg):
    cfg.DATA.PATH_PREFIX = "nowhere"
    with pytest.raises(ValueError, match=r"none of the \d+ test videos .*PATH_PREFIX \('nowhere'"):
        engine.test(cfg)


def test_mixed_precision_and_clipping_train(cfg):
    cfg.TRAIN.MIXED_PRECISION, cfg.SOLVER.MAX_EPOCH = True, 1
    cfg.SOLVER.CLIP_GRAD_VAL = 1e-4
    module = {}

    class Look(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if grads:
                module["largest"] = max(grad.abs().max().item() for grad in grads)

    engine.train(cfg, callbacks=[Look()])
    assert 0 < module["largest"] <= 1e-4 * 1.0001
    assert all(s["grad_norm"] > 1e-3 for s in json_stats(cfg, "train_iter_"))  # before clipping


def test_a_loss_that_is_no_number_stops_the_run_before_a_checkpoint(cfg):
    cfg.SOLVER.BASE_LR, cfg.SOLVER.OPTIMIZING_METHOD = 1e18, "sgd"
    cfg.STTS.ENABLE = False
    with pytest.raises(
        ValueError, match=r"the (loss|norm of the gradient) is (nan|inf) at epoch .*SOLVER\.BASE_LR"
    ):
        engine.train(cfg)
    assert resume.last_checkpoint(cfg) is None


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
def test_unusable_settings_are_explained(cfg, key, value, message):
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        engine.train(cfg)
    with pytest.raises(ValueError, match=r"tcp://host:port"):
        Shards(cfg, "file:///x")


def test_ensembles_sum_and_take_the_maximum(cfg):
    results = {}
    for cfg.DATA.ENSEMBLE_METHOD in ("sum", "max"):
        cfg.TEST.SAVE_RESULTS_PATH = f"{cfg.DATA.ENSEMBLE_METHOD}.pkl"
        engine.test(cfg)
        path = Path(cfg.OUTPUT_DIR, cfg.TEST.SAVE_RESULTS_PATH)
        results[cfg.DATA.ENSEMBLE_METHOD], labels = pickle.loads(path.read_bytes())
    assert labels.tolist() == [number % 6 for number in range(NUM_VIDEOS)]
    torch.testing.assert_close(results["sum"].sum(1), torch.full((NUM_VIDEOS,), 2.0))  # 2 views
    assert (results["max"] >= results["sum"] / 2 - 1e-6).all() and results["max"].max() < 1


def test_several_numbers_of_clips_are_tested(cfg):
    cfg.TEST.NUM_TEMPORAL_CLIPS = [1, 3]
    assert engine.test(cfg)["num_views"] == 3
    assert len(json_stats(cfg, "test_final")) == 2


def test_mixed_labels_count_both_classes_as_right():
    logits = torch.tensor([[3.0, 2.5, 0.0, 4.0, -1.0, -2.0]])
    labels = torch.tensor([[0.6, 0.4, 0.0, 0.0, 0.0, 0.0]])
    assert [error.item() for error in engine._train_errors(logits, labels)] == [0.0, 0.0]
    assert engine._errors(logits, torch.tensor([0]))[0].item() == 100.0


def test_two_processes_share_the_videos_and_agree(cfg, tmp_path):
    """Over gloo: weights stay equal, and each view of each video counts exactly once."""
    cfg.SOLVER.MAX_EPOCH, cfg.TEST.SAVE_RESULTS_PATH = 1, "results.pkl"
    config = tmp_path / "cfg.yaml"
    config.write_text(cfg.dump())
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = "import sys; from stts_slowfast.tools.cli import main; sys.exit(main())"
    words = ["run", "--engine", "standalone", "--cfg", str(config), "--num_shards", "2"]
    words += ["--init_method", f"tcp://localhost:{port}"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *words, "--shard_id", str(shard)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for shard in (0, 1)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "json_stats" in outputs[0] and "json_stats" not in outputs[1]
    assert len(json_stats(cfg, "train_iter_")) == 2  # 7 videos, 2 processes of 2: 4 each

    path = Path(cfg.OUTPUT_DIR, "results.pkl")
    shared, labels = pickle.loads(path.read_bytes())
    assert labels.tolist() == [number % 6 for number in range(NUM_VIDEOS)]
    engine.test(cfg)  # in one process
    alone, _ = pickle.loads(path.read_bytes())
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-6)
    (val,) = json_stats(cfg, "val_epoch")
    share = float(val["top1_err"]) * NUM_VIDEOS / 100
    assert share == pytest.approx(round(share), abs=1e-4)  # every video once, none twice
