"""Names of checkpoint files: written, read back, sorted."""

import pytest

from stts_slowfast.checkpoints.names import (
    checkpoint_name,
    latest_first,
    parse_name,
    previous_checkpoint,
)

NAMES = [
    "checkpoint_epoch_100000.pyth",
    "within_epoch_99999_iteration_0000007.pyth",
    "checkpoint_epoch_99999.pyth",
    "within_epoch_00003_iteration_0000010.pyth",
    "checkpoint_epoch_00003.pyth",
]
OTHERS = [
    "best.pyth",
    "ssl_checkpoint_x.pyth",
    "checkpoint_epoch_00013.pyth.partial",
    "validations.json",
]


@pytest.mark.parametrize("task", ["", "ssl", "ssl_eval"])
@pytest.mark.parametrize(("epoch", "iteration"), [(1, 0), (0, 2), (100000, 0), (3, 12345678)])
def test_names_are_read_back(task, epoch, iteration):
    assert parse_name(checkpoint_name(epoch, iteration, task)) == (epoch, iteration, task)


def test_names_are_slowfasts():
    assert checkpoint_name(3, task="ssl_eval") == "ssl_eval_checkpoint_epoch_00003.pyth"
    assert "checkpoint" not in checkpoint_name(3, 4)  # SlowFast resumes from all with that word


def test_the_latest_is_that_of_the_largest_number():
    files = sorted(NAMES + OTHERS + ["ssl_checkpoint_epoch_200000.pyth"])
    assert latest_first(files) == NAMES
    assert latest_first(files, mid_epoch=False) == NAMES[::2]
    assert latest_first(files, task="ssl") == ["ssl_checkpoint_epoch_200000.pyth"]
    assert latest_first(files, task=None)[1:] == NAMES


def test_the_previous_checkpoint_is_after_an_earlier_epoch(tmp_path):
    for name in NAMES + OTHERS:
        (tmp_path / name).touch()
    assert previous_checkpoint(str(tmp_path / NAMES[0])) == str(tmp_path / NAMES[2])
    assert previous_checkpoint(str(tmp_path / NAMES[3])) == str(tmp_path / NAMES[4])
    assert previous_checkpoint(str(tmp_path / NAMES[4])) is None
    assert previous_checkpoint(str(tmp_path / "best.pyth")) is None
