"""Predictions become accuracies, or are refused; what has no label gets none."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from stts_slowfast.checkpoints import save_checkpoint
from stts_slowfast.standalone import engine
from stts_slowfast.standalone.annotations import NO_LABEL
from stts_slowfast.standalone.config import get_cfg
from stts_slowfast.standalone.data import UNREADABLE, ClipDataset
from stts_slowfast.standalone.evaluator import ViewEnsemble
from stts_slowfast.standalone.model import build_model
from stts_slowfast.tools.report.run_log import read_output
from stts_slowfast.video.accuracy import video_accuracies


def together(method, scores, labels, videos):
    cfg = get_cfg()
    cfg.DATA.ENSEMBLE_METHOD, cfg.MODEL.NUM_CLASSES = method, scores.shape[1]
    views = ViewEnsemble(cfg, 2, 2)
    views.add(scores, labels, videos, torch.tensor([0, 1, 0, 1]))
    return video_accuracies(views.predictions, views.labels)


def test_views_of_a_video_are_put_together():
    # Video 0 is right by its sum alone, video 1 by its highest score alone.
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.5, 0.4], [0.8, 0.1, 0.1], [0.0, 0.55, 0.45]])
    videos, labels = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1, 0, 0])
    assert together("sum", scores, labels, videos) == {"top1_acc": 100.0, "top5_acc": 100.0}
    scores[1, 1] = 0.45
    assert together("max", scores, labels, videos)["top1_acc"] == 50.0


def test_unreadable_videos_are_wrong_and_videos_without_label_are_neither():
    predictions = torch.tensor([[6.0, 5, 4, 3, 2, 1, 0]] * 4)
    labels = torch.tensor([0, 4, 5, UNREADABLE])
    found = video_accuracies(predictions, labels)
    assert (found["top1_acc"], found["top5_acc"]) == (25.0, 50.0)
    assert found["top1_acc_readable"] == pytest.approx(100 / 3)
    found = video_accuracies(predictions, torch.tensor([0, 4, NO_LABEL, NO_LABEL]))
    assert found == {"top1_acc": 50.0, "top5_acc": 100.0}
    found = video_accuracies(predictions, torch.full((4,), NO_LABEL))
    assert found == {"top1_acc": None, "top5_acc": None}


def lists_without_labels(run, cfg, tail):
    """A copy of the test list whose lines end so; the others stay."""
    folder = Path(cfg.DATA.PATH_TO_DATA_DIR)
    os.makedirs(cfg.OUTPUT_DIR)
    for split in ("train", "val", "test"):
        Path(cfg.OUTPUT_DIR, f"{split}.csv").write_text((folder / f"{split}.csv").read_text())
    lines = [f"{number}.mp4{tail}\n" for number in range(run.num_videos)]
    Path(cfg.OUTPUT_DIR, "test.csv").write_text("".join(lines))
    cfg.DATA.PATH_TO_DATA_DIR = cfg.OUTPUT_DIR


@pytest.mark.parametrize("tail", ["", " -1"])
def test_a_list_without_labels_gives_scores_and_no_accuracy(run, tail):
    cfg = run.cfg
    lists_without_labels(run, cfg, tail)
    result = engine.test(cfg)
    assert result["top1_acc"] is None and result["top5_acc"] is None
    assert result["unlabelled"] == run.num_videos and result["num_videos"] == run.num_videos
    (final,) = run.json_stats("test_final")
    assert "top1_acc" not in final and final["unlabelled"] == run.num_videos
    assert read_output(cfg.OUTPUT_DIR).final("top1_acc") is None
    with open(Path(cfg.OUTPUT_DIR, "scores.pkl"), "rb") as file:
        scores, labels = pickle.load(file)
    assert labels.tolist() == [-1] * run.num_videos
    torch.testing.assert_close(scores.sum(1), torch.full((run.num_videos,), 2.0))  # of two views
    assert (
        f"scores are in {Path(cfg.OUTPUT_DIR, 'scores.pkl')}"
        in (run.folder / "stdout.log").read_text()
    )


def test_an_unreadable_video_without_a_label_is_not_wrong(run):
    cfg = run.cfg
    lists_without_labels(run, cfg, "")
    test = Path(cfg.OUTPUT_DIR, "test.csv")
    test.write_text(test.read_text() + "missing.mp4\n")
    cfg.TEST.ALLOW_MISSING = True
    result = engine.test(cfg)
    assert result["top1_acc"] is None and result["unreadable"] == 1
    assert result["unlabelled"] == result["num_videos"] == run.num_videos + 1
    assert Path(cfg.OUTPUT_DIR, "scores.pkl").exists()


def test_training_needs_labels(run):
    cfg = run.cfg
    lists_without_labels(run, cfg, " 1")
    train = Path(cfg.OUTPUT_DIR, "train.csv")
    train.write_text(train.read_text().replace(" 1\n", " -1\n"))
    with pytest.raises(ValueError, match=r"1 of the 7 videos of the train list .* have no label"):
        ClipDataset(cfg, "train")


def spoil(model, kind):
    with torch.no_grad():
        if kind == "head":
            model.head[1].weight[3, 2] = torch.nan
        elif kind == "norm":
            model.blocks[2].norm1.bias[1] = torch.inf
        else:  # too large a number, though finite
            model.blocks[3].mlp[0].weight.fill_(3e38)


@pytest.mark.parametrize(
    ("job", "selection", "kind", "reason"),
    [
        ("test", False, "head", r"the weights head\.1\.weight have"),
        ("validation", True, "head", r"the weights head\.1\.weight have"),
        ("test", True, "norm", r"the weights blocks\.2\.norm1\.bias have"),
        ("test", False, "overflow", r"the first such layer is blocks\.3\.mlp\.0"),
        ("validation", True, "overflow", r"the first such layer is blocks\.3\.mlp\.0"),
    ],
)
def test_outputs_that_are_not_finite_are_refused(run, tmp_path, kind, reason, job, selection):
    cfg = run.cfg
    cfg.STTS.ENABLE = selection
    model = build_model(cfg)
    spoil(model, kind)
    path = str(tmp_path / "spoilt.pyth")
    save_checkpoint(path, model, cfg, epoch=1)
    match = rf"outputs for .*0\.mp4 are not finite: {reason}"
    if job == "test":
        cfg.TEST.CHECKPOINT_FILE_PATH = path
        with pytest.raises(ValueError, match=match):
            engine.test(cfg)
    else:  # a run that is over only validates
        os.makedirs(Path(cfg.OUTPUT_DIR, "checkpoints"))
        os.rename(path, Path(cfg.OUTPUT_DIR, "checkpoints", "checkpoint_epoch_00002.pyth"))
        with pytest.raises(ValueError, match=match):
            engine.train(cfg)
    assert not run.json_stats("test_final") and not run.json_stats("val_epoch")


def test_the_video_is_named_whose_outputs_are_not_finite(run, monkeypatch):
    from stts_slowfast.standalone import predictions

    normalize, batches = predictions.normalize_clips, []

    def spoilt(clips, cfg):
        batches.append(clips)
        clips = normalize(clips, cfg)
        if len(batches) > 1 and batches[-1] is batches[1]:
            clips[2, 0, 0, 0, 0] = torch.inf
        return clips

    monkeypatch.setattr(predictions, "normalize_clips", spoilt)
    # Batches of 4 views of 2 a video: the third of the second batch is of video 3.
    with pytest.raises(ValueError, match=r"3\.mp4 are not finite: its clip has values"):
        engine.test(run.cfg)
