"""Inside SlowFast: scorers that could not learn are refused, and the logged grid is the clip's;
checkpoints without scorers are refused however SlowFast reads them."""

import logging
from types import SimpleNamespace

import pytest
import torch
from iopath.common.file_io import PathHandler


@pytest.mark.parametrize(
    ("key", "value"), [("SIGMA", 0.0), ("SIGMA", 1e-4), ("NUM_SAMPLES", 1)], ids=str
)
def test_learned_scorers_without_a_gradient_are_refused_in_training(get_cfg, build, key, value):
    from slowfast.models import optimizer as optim

    cfg = get_cfg("STTS.ENABLE", True, f"STTS.{key}", value, "STTS.OPERATOR", "perturbed")
    model = build(cfg)  # testing takes such a node

    def first_iteration():
        optim.set_lr(optim.construct_optimizer(model, cfg), optim.get_epoch_lr(0.0, cfg))

    with pytest.raises(ValueError, match=rf"STTS\.{key} is .*(gradient|baseline)"):
        first_iteration()


@pytest.mark.parametrize(
    ("job", "step"), [("train", "4x8x8 -> 2x8x8"), ("test", "4x16x16 -> 2x16x16")]
)
def test_the_logged_grid_is_that_of_the_clips_to_come(get_cfg, build, caplog, job, step):
    from stts_slowfast.pyslowfast import run_state

    sizes = {"WINDOW_SIZE": [8, 4, 4], "EMBED_DIM": 12}
    opts = [word for key, size in sizes.items() for word in (f"VIDEO_SWIN.{key}", size)]
    opts += ["MODEL.MODEL_NAME", "VideoSwin", "STTS.SPACE.BLOCKS", []]
    cfg = get_cfg("STTS.ENABLE", True, "DATA.TEST_CROP_SIZE", 64, *opts)
    function = SimpleNamespace(__name__=job)
    with caplog.at_level(logging.INFO), run_state.enter_job(cfg, function):
        build(cfg)
    (line,) = [line for line in caplog.messages if line.startswith("STTS time_0")]
    assert step in line


class Remote(PathHandler):
    """Files of a folder under another name, as of a bucket."""

    def __init__(self, folder):
        self.folder = folder

    def _get_supported_prefixes(self):
        return ["bucket://"]

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        return open(self.folder / path.removeprefix("bucket://"), mode)


@pytest.mark.parametrize("how", ["zip", "old", "extras", "remote"])
def test_learned_scorers_that_the_file_does_not_have_are_not_tested(
    get_cfg, build, tmp_path, monkeypatch, how
):
    from slowfast.utils import checkpoint as cu

    state = {"epoch": 0, "model_state": build(get_cfg()).state_dict()}
    if how == "extras":
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        state["extras"] = Remote(tmp_path)
    path = tmp_path / "stock.pyth"
    torch.save(state, path, _use_new_zipfile_serialization=how != "old")
    if how == "remote":
        cu.pathmgr.register_handler(Remote(tmp_path), allow_override=True)
        path = "bucket://stock.pyth"
    cfg = get_cfg("STTS.ENABLE", True, "TEST.CHECKPOINT_FILE_PATH", str(path))
    with pytest.raises(ValueError, match=r"stock\.pyth has no trained scorers"):
        cu.load_test_checkpoint(cfg, build(cfg))
    cfg.STTS.TIME.SCORER = cfg.STTS.SPACE.SCORER = "uniform"
    cu.load_test_checkpoint(cfg, build(cfg))


def test_a_truncated_last_checkpoint_is_named_with_the_one_before(get_cfg, build, tmp_path):
    from slowfast.models import optimizer as optim
    from slowfast.utils import checkpoint as cu

    cfg = get_cfg("STTS.ENABLE", True, "OUTPUT_DIR", str(tmp_path), "TEST.ENABLE", False)
    model = build(cfg)
    optimizer = optim.construct_optimizer(model, cfg)
    first, last = (cu.save_checkpoint(str(tmp_path), model, optimizer, n, cfg) for n in (0, 1))
    with open(last, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(RuntimeError, match=f"{last} cannot be read .* to resume from {first}"):
        cu.load_train_checkpoint(cfg, model, optimizer)
    cu.load_checkpoint(first, model, False, optimizer)


def test_lists_of_which_no_video_exists_are_refused(get_cfg, videos, tmp_path):
    from slowfast.datasets import build_dataset

    rows = [f"{number}.mp4 0" for number in range(3)]
    (tmp_path / "train.csv").write_text("\n".join(rows) + "\n")
    opts = ("STTS.ENABLE", True, "DATA.PATH_TO_DATA_DIR", str(tmp_path))
    cfg = get_cfg(*opts, "DATA.PATH_PREFIX", "/nowhere")
    message = rf"none of the 3 videos of {tmp_path}/train\.csv exists, such as /nowhere/0\.mp4"
    with pytest.raises(FileNotFoundError, match=message):
        build_dataset("kinetics", cfg, "train")
    rows += [f"{videos / 'val_0.mp4'} 1"]
    (tmp_path / "train.csv").write_text("\n".join(rows) + "\n")
    assert len(build_dataset("kinetics", get_cfg(*opts), "train")) == 4
    cfg.STTS.ENABLE = False
    build_dataset("kinetics", cfg, "train")


@pytest.mark.parametrize("dimension", ["TIME", "SPACE"])
def test_a_range_is_not_trained_if_a_test_follows(get_cfg, dimension):
    from slowfast.config.defaults import assert_and_infer_cfg

    cfg = get_cfg("STTS.ENABLE", True, f"STTS.{dimension}.KEEP", [[0.25, 0.9]])
    message = rf'STTS\.{dimension}\.KEEP is \[\[0\.25, 0\.9\]\], a range.*KEEP "\[0\.9\]"'
    with pytest.raises(ValueError, match=message):
        assert_and_infer_cfg(cfg)
    cfg.TEST.ENABLE = False
    assert_and_infer_cfg(cfg)


# ---- counting FLOPs -------------------------------------------------------------------------


@pytest.mark.parametrize("enable", [False, True])
def test_models_that_recompute_are_counted(get_cfg, build, caplog, enable):
    pytest.importorskip("fairscale")
    from slowfast.utils.misc import get_model_stats

    plain, cfg = (
        get_cfg("STTS.ENABLE", enable, "MODEL.ACT_CHECKPOINT", again) for again in (False, True)
    )
    counts = [get_model_stats(build(each), each, "flop", True) for each in (plain, cfg)]
    assert counts[0] == counts[1] > 0
    # fvcore's lines are of runs with selection alone left out.
    assert any("Unsupported operator" in line for line in caplog.messages) is not enable


@pytest.fixture
def listed(get_cfg, tmp_path):
    """``listed(mode, text)``: SlowFast's dataset of a list."""
    from slowfast.datasets.build import build_dataset

    def make(mode, text):
        (tmp_path / f"{mode}.csv").write_text(text)
        (tmp_path / "my vids").mkdir(exist_ok=True)
        (tmp_path / "my vids" / "a.mp4").touch()
        places = "DATA.PATH_TO_DATA_DIR", str(tmp_path), "DATA.PATH_PREFIX", str(tmp_path)
        return build_dataset("kinetics", get_cfg("STTS.ENABLE", True, *places), mode)

    return make


@pytest.mark.parametrize("mode", ["val", "test"])
def test_lists_are_read_as_by_the_standalone_runner(listed, tmp_path, mode):
    data = listed(mode, "\ufeffmy vids/a.mp4 3\n\nb.mp4 300 1\nc.mp4  0\n")
    views = data._num_clips
    paths = [str(tmp_path / name) for name in ("my vids/a.mp4", "b.mp4", "c.mp4")]
    assert data._path_to_videos == [path for path in paths for _ in range(views)]
    assert data._labels == [label for label in (3, 1, 0) for _ in range(views)]
    assert data._spatial_temporal_idx == [*range(views)] * 3
    assert data._video_meta.keys() == set(range(3 * views)) and data.num_videos == 3 * views


def test_lines_without_labels_are_not_class_0(listed):
    data = listed("test", "my vids/a.mp4\n".replace(" ", "_") + "my vids/a.mp4 -1\n")
    assert set(data._labels) == {-1}
    for mode in ("train", "val"):
        with pytest.raises(ValueError, match=r"1 of the 2 videos of .* have no label"):
            listed(mode, "my vids/a.mp4 1\na.mp4\n")
    with pytest.raises(ValueError, match=r"line 1: the label is 99 but MODEL\.NUM_CLASSES is 8"):
        listed("test", "my vids/a.mp4 99\n")
    with pytest.raises(ValueError, match=r"DATA\.PATH_LABEL_SEPARATOR, which is ' '"):
        listed("test", "a.mp4,4\nmy vids/a.mp4 1\n")
