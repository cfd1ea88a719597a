"""Videos that cannot be read inside SlowFast are named, written down, and count as wrong."""

import json
import os
import random
import shutil
import time

import pytest
import torch


@pytest.fixture
def dataset(get_cfg, bad_lists):
    from slowfast.datasets import build_dataset

    def make(mode, *opts):
        places = "DATA.PATH_TO_DATA_DIR", str(bad_lists), "OUTPUT_DIR", str(bad_lists / "out")
        return build_dataset("kinetics", get_cfg(*places, *opts), mode)

    return make


def records(folder) -> dict[str, dict]:
    lines = (folder / "out" / "bad_videos.jsonl").read_text().splitlines()
    found = {os.path.basename(record["path"]): record for record in map(json.loads, lines)}
    assert len(found) == len(lines)
    return found


BACKENDS = pytest.mark.parametrize("backend", ["pyav", "torchvision"])


@BACKENDS
def test_a_test_video_that_cannot_be_read_has_no_label(dataset, bad_lists, backend):
    data = dataset("test", "DATA.DECODING_BACKEND", backend)
    views = data._num_clips
    items = [data[index] for index in range(len(data))]
    assert [item[1] for item in items] == [1] * views + [-1] * views + [1] * views + [
        -1
    ] * views + [1] * views
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
    labels = [data[index][1] for index in range(3 * views)]
    assert labels == [-1] * 2 * views + [1] * views
    assert time.monotonic() - start < 3.0
    reasons = {name: record["reason"] for name, record in records(bad_lists).items()}
    assert "no regular file" in reasons.pop("broken.mp4")
    (reason,) = reasons.values()
    assert "DATA.READ_TIMEOUT 1 s" in reason


def test_damage_is_written_down(dataset, bad_lists, monkeypatch):
    from stts_slowfast.pyslowfast import decoder

    class Damaged(decoder.Video):
        def iterate(self, *args):
            self.damage = "frames are made up"
            return super().iterate(*args)

    monkeypatch.setattr(decoder, "Video", Damaged)
    monkeypatch.setattr(decoder, "_last", None)
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


@pytest.mark.parametrize("views", [[-1, 1], [1, -1], [-1, -1]])
def test_unreadable_in_a_view_is_unreadable(checkout, views):
    tested = meter()
    fill(tested, [1, 1, *views, 0, 0, 1, 1])
    assert tested.video_labels.tolist() == [1, -1, 0, 1]


def test_a_test_ends_with_the_list_or_with_both_accuracies(dataset, bad_lists, caplog):
    data = dataset("test", "TEST.NUM_ENSEMBLE_VIEWS", "1", "TEST.NUM_SPATIAL_CROPS", "1")
    labels = [data[index][1] for index in range(5)]
    tested = meter(5, 1)
    fill(tested, labels)
    with pytest.raises(ValueError, match=r"(?s)^2 of the test videos .*broken\.mp4: .*half\.mp4: "):
        tested.finalize_metrics()
    data.cfg.TEST.ALLOW_MISSING = True
    caplog.set_level("INFO")
    tested.finalize_metrics()
    assert tested.stats["top1_acc"] == "60.00"
    line = json.loads(caplog.messages[-1].partition("json_stats: ")[2])
    assert line["unreadable"] == 2 and line["damaged"] == 0
    assert (line["top1_acc"], line["top1_acc_readable"]) == ("60.00", "100.00")
    nothing = meter(5, 1)
    fill(nothing, [-1] * 5)
    with pytest.raises(ValueError, match="5 of the test videos"):
        nothing.finalize_metrics()
