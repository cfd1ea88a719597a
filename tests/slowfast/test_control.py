"""Jobs of users who never write STTS, with this package installed and without: nothing differs.

See ``control_jobs.py`` for the jobs, and for the control's replacements of this package.
"""

import json
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.slowfast.conftest import HERE, LAUNCHER, environment, frame

TIMES = {"dt", "dt_data", "dt_net", "eta", "time_diff", "gpu_mem", "RAM"}
# Jobs that return something.
RETURN = ("own_loop", "pickled", "notebook", "own_configs", "old_config", "shards")
JOBS = re.findall(r'^    "(\w+)": ', (HERE / "control_jobs.py").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def data(videos, tmp_path_factory):
    """Lists of videos, of frames and of boxes, and two configs without the node STTS."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "no_labels").mkdir()
    for split in ("train", "val", "test"):
        rows = (videos / f"{split}.csv").read_text().splitlines()
        rows = [row for row in rows if "broken" not in row][:4]
        (folder / f"{split}.csv").write_text("\n".join(rows) + "\n")
        rows = [f"{row.split()[0]} {-1 if n % 2 else n}" for n, row in enumerate(rows)]
        (folder / "no_labels" / f"{split}.csv").write_text("\n".join(rows) + "\n")
    tiny = (HERE / "tiny.yaml").read_text()
    tiny = tiny[: tiny.index("STTS:")]
    where = "PATH_TO_DATA_DIR: ."
    (folder / "tiny.yaml").write_text(tiny.replace(where, f"PATH_TO_DATA_DIR: {folder}"))
    of_frames = tiny.replace("DATASET: kinetics", "DATASET: ssv2")
    of_frames = of_frames.replace(where, f"PATH_TO_DATA_DIR: {folder}/frames")
    (folder / "ssv2.yaml").write_text(of_frames)
    _write_frames(folder)
    _write_boxes(folder / "ava")
    return folder


def _write_frames(folder) -> None:
    """Frame lists as Charades and SSv2 read them (train.csv and val.csv are lists of videos too,
    so that these are in folders of their own)."""
    rng = np.random.default_rng(0)
    for video in range(4):
        for time in range(12):
            Image.fromarray(frame(video, time, rng)).save(folder / f"{video}_{time}.jpg")
    head = "original_vido_id video_id frame_id path labels"
    rows = [
        f'{video} {video} {time} {folder}/{video}_{time}.jpg "{video},{video + 1}"'
        for video in range(4)
        for time in range(12)
    ]
    (folder / "frames").mkdir()
    for split in ("train", "val"):
        (folder / "frames" / f"{split}.csv").write_text("\n".join([head, *rows]) + "\n")
    labels = {f"class {number}": str(number) for number in range(8)}
    clips = [{"id": str(video), "template": f"[class] {video}"} for video in range(4)]
    for name, content in (("labels", labels), ("train", clips), ("validation", clips)):
        path = folder / "frames" / f"something-something-v2-{name}.json"
        path.write_text(json.dumps(content))


def _write_boxes(folder) -> None:
    """A few boxes in two videos, as AVA has them."""
    folder.mkdir()
    images = ["original_vido_id video_id frame_id path labels"]
    images += [f'{v} {v} {t} {v}_{t % 12}.jpg ""' for v in range(2) for t in range(12)]
    for split in ("train", "val"):
        (folder / f"{split}.csv").write_text("\n".join(images) + "\n")
    rng, boxes = np.random.default_rng(1), []
    for video in range(2):
        for second in (904, 908):
            for _ in range(2):
                left, top = rng.uniform(0, 0.4, 2)
                boxes.append(f"{video},{second},{left:.3f},{top:.3f},0.9,0.95,{rng.integers(1, 8)}")
    (folder / "boxes.csv").write_text("\n".join(boxes) + "\n")
    (folder / "predicted.csv").write_text("\n".join(f"{box},0.95" for box in boxes) + "\n")
    (folder / "excluded.csv").write_text("")
    classes = [f'item {{\n  name: "{n}"\n  id: {n}\n}}\n' for n in range(1, 9)]
    (folder / "map.pbtxt").write_text("".join(classes))


@pytest.fixture(scope="module")
def runs(checkout, data, tmp_path_factory) -> dict:
    """What the jobs left, with the package and without."""
    found = {}
    for mode in ("package", "control"):
        out = tmp_path_factory.mktemp(mode)
        env = {**environment(), "SLOWFAST_ROOT": str(checkout), "PYTHONHASHSEED": "0"}
        words = [sys.executable, HERE / "control_jobs.py", mode, data, out]
        done = subprocess.run(
            list(map(str, words)), cwd=out, env=env, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        found[mode] = out, json.loads((out / "jobs.json").read_text()), done.stderr
    return found


def lines(folder) -> list[dict]:
    """The json_stats of a job, without what clocks and memory say."""
    path = folder / "stdout.log"
    text = path.read_text() if path.exists() else ""
    found = [json.loads(line) for line in re.findall(r"json_stats: (\{.*\})", text)]
    return [{k: None if k in TIMES else v for k, v in line.items()} for line in found]


@pytest.mark.parametrize("job", [job for job in JOBS if job != "ava_test"])
def test_a_job_is_as_without_the_package(runs, job):
    (ours, ended, _), (theirs, control, _) = runs["package"], runs["control"]
    assert ended[job] == control[job]
    if job not in RETURN:
        assert control[job] is None, control[job]
    for name in ("notebook_0", "notebook_1") if job == "notebook" else (job,):
        same_results(ours / name, theirs / name)
        assert lines(theirs / name) or control[job] is not None


def same_results(ours, theirs) -> None:
    assert lines(ours) == lines(theirs)
    files = [
        {str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (ours, theirs)
    ]
    assert files[0] == files[1]
    for name in files[1]:
        if name.endswith(".pyth"):
            mine, other = (torch.load(f / name, weights_only=False) for f in (ours, theirs))
            assert mine.keys() == other.keys()
            assert str(mine["optimizer_state"]) == str(other["optimizer_state"])
            assert mine["model_state"].keys() == other["model_state"].keys()
            for key, value in other["model_state"].items():
                assert torch.equal(mine["model_state"][key], value), key
        if name.endswith(".pkl"):
            mine, other = (pickle.loads((f / name).read_bytes()) for f in (ours, theirs))
            assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_the_jobs_do_what_they_are_for(runs):
    out, ended, _ = runs["control"]
    assert {line.get("mode") for line in lines(out / "ava")} == {"train", "val"}
    assert any("map" in line for line in lines(out / "charades"))
    assert any(line.get("split") == "test_final" for line in lines(out / "no_labels"))
    labels = pickle.loads((out / "no_labels" / "results.pkl").read_bytes())[1]
    assert labels.tolist() == [0, -1, 2, -1]
    assert sum(line.get("split") == "test_final" for line in lines(out / "two_configs")) == 2
    assert ended["own_configs"][0] == "launched" and len(ended["own_configs"]) == 11
    assert isinstance(ended["old_config"], list), ended["old_config"]
    assert any("top3_acc" in line for line in lines(out / "old_config"))
    assert ended["pickled"][:4] == [True] * 4 and ended["shards"] == [[0, False]]


def test_avas_test_runs_with_the_package_alone(runs):
    """The one job of these that SlowFast cannot do: its meter is asked twice."""
    (ours, ended, _), (_, control, _) = runs["package"], runs["control"]
    assert ended["ava_test"] is None and control["ava_test"]
    assert [line for line in lines(ours / "ava_test") if "map" in line]


def test_nothing_is_written_to_stderr(runs):
    assert "stts" not in runs["package"][2].lower()


def test_there_is_a_checkout_with_a_launcher():
    assert LAUNCHER.endswith("run_net.py")
