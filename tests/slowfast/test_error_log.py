"""Videos that cannot be read inside SlowFast are named, written down, and count as wrong."""

import contextlib
import json
import os
import pickle
import random
import shutil
import time
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def alone(get_cfg, bad_lists):
    """A dataset that no loop of SlowFast's reads."""
    from slowfast.datasets import build_dataset

    def make(mode, *opts):
        places = "DATA.PATH_TO_DATA_DIR", str(bad_lists), "OUTPUT_DIR", str(bad_lists / "out")
        return build_dataset("kinetics", get_cfg(*places, *opts), mode)

    return make


@pytest.fixture
def dataset(alone):
    """A dataset as a loop of SlowFast's reads it; ``meter`` is what the loop counts with."""
    from stts_slowfast.pyslowfast import error_log

    with contextlib.ExitStack() as loops:

        def make(mode, *opts, meter=None):
            data = alone(mode, *opts)
            counts = {} if mode == "test" else {"log_epoch_stats": print}
            meter = meter or SimpleNamespace(
                multi_label=False, update_stats=print, finalize_metrics=print, **counts
            )
            loader = SimpleNamespace(dataset=data)
            loops.enter_context(error_log.track_errors(loader, meter, mode))
            return data

        yield make


def records(folder) -> dict[str, dict]:
    lines = (folder / "out" / "bad_videos.jsonl").read_text().splitlines()
    found = {os.path.basename(record["path"]): record for record in map(json.loads, lines)}
    assert len(found) == len(lines)
    return found


BACKENDS = pytest.mark.parametrize("backend", ["pyav", "torchvision"])


@BACKENDS
def test_a_test_video_that_cannot_be_read_is_marked(dataset, bad_lists, backend):
    from stts_slowfast.pyslowfast.error_log import UNREAD_LABEL

    data = dataset("test", "DATA.DECODING_BACKEND", backend)
    views = data._num_clips
    items = [data[index] for index in range(len(data))]
    marks = [1, UNREAD_LABEL, 1, UNREAD_LABEL, 1]
    assert [item[1] for item in items] == [mark for mark in marks for _ in range(views)]
    unread = [number for number in range(len(data)) if data.stts_errors.kinds[number]]
    assert {data._path_to_videos[n].rpartition("/")[2] for n in unread} == {
        "broken.mp4", "half.mp4"
    }  # fmt: skip
    assert [item[2] for item in items] == list(range(len(data)))
    batch = torch.utils.data.default_collate(items)
    assert batch[0][0].shape == (5 * views, 3, 8, 32, 32)
    assert batch[0][0][views].std() < 1e-6 < batch[0][0][0].std()
    found = records(bad_lists)
    assert {name: record["split"] for name, record in found.items()} == {
        "broken.mp4": "test",
        "half.mp4": "test",
    }
    assert all(record["kind"] == "unreadable" and record["reason"] for record in found.values())


@BACKENDS
@pytest.mark.parametrize("mode", ["train", "val"])
def test_others_take_their_place_in_training(dataset, bad_lists, backend, mode):
    random.seed(0)
    data = dataset(mode, "DATA.DECODING_BACKEND", backend)
    data._set_epoch_num(2)
    for _ in range(2):
        items = [data[index] for index in range(5)]
    indices = [
        item[2][0] if mode == "train" and isinstance(item[2], list) else item[2] for item in items
    ]
    assert indices[::2] == [0, 2, 4] and set(indices[1::2]) <= {0, 2, 4}
    assert records(bad_lists).keys() == {"broken.mp4", "half.mp4"}
    assert {record.get("epoch") for record in records(bad_lists).values()} == (
        {3} if mode == "train" else {None}
    )


@BACKENDS
def test_a_pipe_and_a_hung_file_do_not_stop_a_test(dataset, bad_lists, backend, monkeypatch):
    from stts_slowfast.pyslowfast import decoder

    (bad_lists / "broken.mp4").unlink()
    os.mkfifo(bad_lists / "broken.mp4")
    shutil.copy(bad_lists / "val.csv", bad_lists / "test.csv")
    data = dataset("test", "DATA.DECODING_BACKEND", backend, "DATA.READ_TIMEOUT", "1")
    assert data.cfg.DATA.READ_TIMEOUT == 1.0
    views, video = data._num_clips, decoder.Video
    start, slow = time.monotonic(), [3.0]

    def hung(*args, **kwargs):
        time.sleep(slow.pop() if slow else 0.0)
        return video(*args, **kwargs)

    monkeypatch.setattr(decoder, "Video", hung)
    read = [data[index][1] == 1 for index in range(3 * views)]
    assert read == [False] * 2 * views + [True] * views
    assert time.monotonic() - start < 3.0
    reasons = {name: record["reason"] for name, record in records(bad_lists).items()}
    assert "not a regular file" in reasons.pop("broken.mp4")
    (reason,) = reasons.values()
    assert "DATA.READ_TIMEOUT, 1 s" in reason


def test_damage_is_written_down(dataset, bad_lists, monkeypatch):
    from stts_slowfast.pyslowfast import decoder

    class Damaged(decoder.Video):
        def iter_frames(self, *args):
            self.damage = "frames are made up"
            return super().iter_frames(*args)

    monkeypatch.setattr(decoder, "Video", Damaged)
    data = dataset("test")
    assert data[0][1] == 1
    assert records(bad_lists)["val_0.mp4"]["kind"] == "damaged"


def meter(num_videos=4, views=2):
    from slowfast.utils.meters import TestMeter

    return TestMeter(num_videos, views, 8, 8)


def fill(meter, labels):
    """One view after the other; all predictions say class 1."""
    predictions = torch.eye(8)[1].repeat(len(labels), 1)
    for begin in range(0, len(labels), 3):
        part = slice(begin, begin + 3)
        clips = torch.arange(len(labels))[part]
        meter.update_stats(predictions[part], torch.tensor(labels)[part], clips)


@pytest.mark.parametrize("views", [[0, 1], [1, 0], [0, 0]])
def test_unreadable_in_a_view_is_unreadable(dataset, views):
    from stts_slowfast.pyslowfast.error_log import UNREAD_LABEL

    tested = meter(5)
    dataset("test", meter=tested)
    views = [1 if read else UNREAD_LABEL for read in views]
    fill(tested, [1, 1, *views, 0, 0, 1, 1, 1, 1])
    assert tested.video_labels.tolist() == [1, -1, 0, 1, 1]


@pytest.fixture
def relabelled(bad_lists):
    """``relabelled(labels)``: the test list with these."""

    def write(labels):
        lines = (bad_lists / "test.csv").read_text().splitlines()
        lines = [f"{line.split()[0]} {label}\n" for line, label in zip(lines, labels, strict=True)]
        (bad_lists / "test.csv").write_text("".join(lines))

    return write


def test_a_video_with_the_label_minus_one_is_in_no_accuracy(dataset, relabelled, caplog):
    relabelled([-1, -1, -1, 0, 1])
    tested = meter(5)
    dataset("test", "STTS.ENABLE", True, meter=tested)
    fill(tested, [-1] * 6 + [0, 0, 1, 1])
    caplog.set_level("INFO")
    tested.finalize_metrics()
    assert tested.video_labels.tolist() == [-1, -1, -1, 0, 1] and len(tested.video_preds) == 5
    assert tested.stats["top1_acc"] == "50.00"
    line = json.loads(caplog.messages[-1].partition("json_stats: ")[2])
    assert line["top1_acc"] == "50.00" and line["unlabelled"] == 3 and "unreadable" not in line


def test_a_list_without_labels_gives_scores_and_no_accuracy(dataset, relabelled, bad_lists, caplog):
    relabelled([-1] * 5)
    (bad_lists / "out").mkdir()
    tested = meter(5)
    dataset("test", "STTS.ENABLE", True, meter=tested)
    fill(tested, [-1] * 10)
    caplog.set_level("INFO")
    tested.finalize_metrics()
    line = json.loads(caplog.messages[-1].partition("json_stats: ")[2])
    assert line["unlabelled"] == 5 and "top1_acc" not in line
    assert tested.stats["top1_acc"] == "none"  # what SlowFast puts into its last line
    with open(bad_lists / "out" / "scores.pkl", "rb") as file:
        scores, labels = pickle.load(file)
    assert labels.tolist() == [-1] * 5 and scores.sum() == 10


def test_outputs_that_are_no_numbers_are_refused(dataset):
    tested = meter(5)
    data = dataset("test", "STTS.ENABLE", True, meter=tested)
    scores = torch.eye(8)[:3].clone()
    scores[2, 3] = float("nan")
    with pytest.raises(ValueError, match=f"{data._path_to_videos[5]} are not finite"):
        tested.update_stats(scores, torch.ones(3).long(), torch.tensor([0, 1, 5]))


def test_a_test_ends_with_the_list_or_with_both_accuracies(dataset, bad_lists, caplog):
    tested = meter(5, 1)
    data = dataset(
        "test", "TEST.NUM_ENSEMBLE_VIEWS", "1", "TEST.NUM_SPATIAL_CROPS", "1", meter=tested
    )
    labels = [data[index][1] for index in range(5)]
    fill(tested, labels)
    with pytest.raises(ValueError, match=r"(?s)^2 of the test videos .*broken\.mp4: .*half\.mp4: "):
        tested.finalize_metrics()
    data.cfg.TEST.ALLOW_MISSING = True
    caplog.set_level("INFO")
    tested.finalize_metrics()
    assert tested.stats["top1_acc"] == "60.00"
    line = json.loads(caplog.messages[-1].partition("json_stats: ")[2])
    assert line["unreadable"] == 2 and "damaged" not in line
    assert (line["top1_acc"], line["top1_acc_readable"]) == ("60.00", "100.00")


def test_a_test_of_nothing_readable_is_refused(dataset):
    from stts_slowfast.pyslowfast.error_log import UNREAD_LABEL

    tested = meter(5, 1)
    one = "TEST.NUM_ENSEMBLE_VIEWS", "1", "TEST.NUM_SPATIAL_CROPS", "1"
    dataset("test", "TEST.ALLOW_MISSING", True, *one, meter=tested)
    fill(tested, [UNREAD_LABEL] * 5)
    with pytest.raises(ValueError, match="5 of the test videos"):
        tested.finalize_metrics()


def test_meter_and_dataset_are_slowfasts_again_after_the_loop(alone):
    from stts_slowfast.pyslowfast import error_log

    data, tested = alone("test"), meter(5)
    with error_log.track_errors(SimpleNamespace(dataset=data), tested, "test"):
        assert "update_stats" in vars(tested) and hasattr(data, "stts_errors")
    assert not {"update_stats", "finalize_metrics"} & vars(tested).keys()
    assert not hasattr(data, "stts_errors")
    assert pickle.loads(pickle.dumps(data))._labels == data._labels


def test_without_a_tracking_loop_slowfast_gives_up_as_before(alone):
    data = alone("test")
    data._num_retries = 2
    views = data._num_clips
    assert data[0][1] == 1 and data[views] is None


def test_a_dataset_of_the_users_own_is_left_alone(get_cfg, bad_lists):
    """One whose list is built otherwise, and one for another task."""
    from slowfast.datasets.kinetics import Kinetics

    from stts_slowfast.pyslowfast import error_log, read_context

    class Own(Kinetics):
        def _construct_loader(self):
            self._path_to_videos = [str(bad_lists / "broken.mp4"), PATH]
            self._labels, self._spatial_temporal_idx = [3, 5], [0, 0]
            self._video_meta = {0: {}, 1: {}}
            self.epoch = 0.0

    PATH = (bad_lists / "val.csv").read_text().split()[0]
    data = Own(get_cfg("OUTPUT_DIR", str(bad_lists / "out")), "val")
    counted = SimpleNamespace(log_epoch_stats=print)
    with error_log.track_errors(SimpleNamespace(dataset=data), counted, "val"):
        assert counted.log_epoch_stats is print and not hasattr(data, "stts_errors")
        assert data[1][1] == 5 and data[0][1] == 5
        frames = data[1][0][0]
    assert type(frames) is torch.Tensor and not read_context.is_kinetics(data)
    assert not (bad_lists / "out" / "bad_videos.jsonl").exists()
