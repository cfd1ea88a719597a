"""Classifiers of transformers by their folder: what it says holds, and every command takes it."""

import json
from pathlib import Path

import pytest
import torch

import stts_slowfast as stts
from stts_slowfast import backbones
from stts_slowfast.config import selection_plan
from stts_slowfast.standalone import checkpointing, engine
from stts_slowfast.standalone.data import normalize_clips
from stts_slowfast.tools import cli
from stts_slowfast.tools.demo import make_data
from tests.hosts.examples import EXAMPLES, videomae

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

PROCESSORS = {
    "videomae": "VideoMAEVideoProcessor",
    "vivit": "VivitVideoProcessor",
    "vjepa2": "VJEPA2VideoProcessor",
    "timesformer-divided": "TimesformerVideoProcessor",
    "timesformer-space": "TimesformerVideoProcessor",
}
SIZE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


def save(folder, name="videomae", selection=None, **processor):
    """A folder of ``save_pretrained``: model, selectors, processor."""
    example = EXAMPLES[name]()
    if selection:
        stts.attach(example.model, **selection, fused_attention=False)
    example.model.save_pretrained(folder)
    getattr(transformers, PROCESSORS[name])(**{**SIZE, **processor}).save_pretrained(folder)
    return example


def config(folder, text="", opts=()):
    path = folder / "config.yaml"
    path.write_text(f"MODEL: {{MODEL_NAME: 'hf:{folder}'}}\nNUM_GPUS: 0\n{text}")
    return stts.load_config(str(path), opts)


@torch.no_grad()
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_become_the_logits_of_transformers(tmp_path, name):
    example = save(tmp_path, name, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    cfg = config(tmp_path)
    clips = torch.randint(256, (2, 3, 8, 32, 32), dtype=torch.uint8)
    processor = transformers.AutoVideoProcessor.from_pretrained(tmp_path)
    pixels = processor(list(clips.transpose(1, 2)), do_resize=False, return_tensors="pt")
    logits = example.model(next(iter(pixels.values()))).logits
    if name == "timesformer-space":
        logits = logits.unflatten(0, (2, 8)).mean(1)
    model = stts.build_model(cfg).eval()
    torch.testing.assert_close(model(normalize_clips(clips, cfg)), logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", PROCESSORS)
def test_grids_are_those_that_arrive(tmp_path, name):
    save(tmp_path, name)
    text = "STTS: {ENABLE: True, TIME: {BLOCKS: [1], KEEP: [0.5]}, "
    cfg = config(tmp_path, text + "SPACE: {BLOCKS: [2], KEEP: [0.6]}}")
    model = stts.build_model(cfg).eval()
    assert model(torch.randn(2, 3, 8, 32, 32)).shape == (2, 5)
    kept = stts.selections(model)
    (before, after), (_, last) = selection_plan(cfg.STTS, backbones.block_grids(cfg)).values()
    assert before[1:] == (4, 4) and kept["time_1"].shape == (2, after[0])
    assert kept["space_2"].shape == (2 * after[0], 4)
    assert kept["space_2"][0, 2:].tolist() == [3, 3] == list(last[1:])


def test_the_folder_completes_the_config(tmp_path):
    save(tmp_path, image_mean=[0.1, 0.2, 0.3], size={"shortest_edge": 36})
    cfg = config(tmp_path)
    assert list(cfg.DATA.MEAN) == pytest.approx([0.1, 0.2, 0.3])
    assert list(cfg.DATA.STD) == pytest.approx([0.5] * 3)
    assert cfg.DATA.TRAIN_JITTER_SCALES == [36, 45]
    assert (cfg.DATA.NUM_FRAMES, cfg.DATA.TRAIN_CROP_SIZE, cfg.DATA.TEST_CROP_SIZE) == (8, 32, 32)
    assert cfg.MODEL.NUM_CLASSES == 5 and not cfg.DATA.REVERSE_INPUT_CHANNEL
    assert config(tmp_path, "TRAIN: {DATASET: ssv2}").DATA.REVERSE_INPUT_CHANNEL


@pytest.mark.parametrize(
    "key, value",
    [
        ("DATA.NUM_FRAMES", 16),
        ("DATA.TEST_CROP_SIZE", 64),
        ("DATA.MEAN", [0.45, 0.45, 0.45]),
        ("MODEL.DROPOUT_RATE", 0.5),
    ],
)
def test_contradictions_are_refused(tmp_path, key, value):
    save(tmp_path)
    with pytest.raises(ValueError, match=rf"{key} is .*, but {tmp_path} has .*: leave it out"):
        config(tmp_path, opts=[key, value])


def test_what_is_no_such_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        config(tmp_path)
    save(tmp_path)
    (tmp_path / "video_preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"no processor .* or give DATA\.MEAN and DATA\.STD"):
        config(tmp_path)
    cfg = config(tmp_path, opts=["DATA.MEAN", [0.1, 0.1, 0.1], "DATA.STD", [1, 1, 1]])
    assert cfg.DATA.STD == [1, 1, 1]
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a vit: use one of videomae, vivit, vjepa2"):
        config(tmp_path)
    with pytest.raises(ValueError, match=r"crops to .*64.*, its model takes 32"):
        save(tmp_path, crop_size={"height": 64, "width": 64})
        config(tmp_path)


def test_all_but_the_last_word_of_a_model_is_trained(tmp_path):
    save(tmp_path)
    cfg = config(tmp_path, opts=["MODEL.NUM_CLASSES", 7])
    model = stts.build_model(cfg)
    assert model(torch.randn(1, 3, 8, 32, 32)).shape == (1, 7)
    assert checkpointing.load_initial_state(cfg, model).trained
    with pytest.raises(ValueError, match="has a head for other classes"):
        checkpointing.load_for_test(cfg, model)


def test_selectors_of_the_folder_are_tested_or_refused(tmp_path):
    example = save(tmp_path, selection={"time": {0: 0.5}, "space": {2: 0.6}})
    text = "STTS: {ENABLE: True, TIME: {KEEP: [0.5]}, SPACE: {BLOCKS: [2], KEEP: [0.6]}}"
    cfg = config(tmp_path, text)
    for load in (checkpointing.load_for_test, checkpointing.load_initial_state):
        model = stts.build_model(cfg).eval()
        load(cfg, model)
        for key, value in example.model.stts.state_dict().items():
            assert torch.equal(model.stts.state_dict()[key], value), key
    with pytest.raises(ValueError, match=r"STTS\.ENABLE is False"):
        plain = config(tmp_path)
        checkpointing.load_for_test(plain, stts.build_model(plain))
    with pytest.raises(ValueError, match=r"STTS\.SPACE\.BLOCKS is \[3\], but .* with \[2\]"):
        other = config(tmp_path, text, ["STTS.SPACE.BLOCKS", [3]])
        checkpointing.load_for_test(other, stts.build_model(other))


def test_untrained_scorers_are_not_tested(tmp_path):
    save(tmp_path)
    cfg = config(tmp_path, "STTS: {ENABLE: True}")
    cfg.STTS.SPACE.BLOCKS = [2]
    with pytest.raises(ValueError, match=r"has no trained scorers for STTS\.TIME\.BLOCKS \[0\]"):
        checkpointing.load_for_test(cfg, stts.build_model(cfg))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Videos, a folder of VideoMAE, and a config that trains its scorers on them."""
    folder = tmp_path_factory.mktemp("hf")
    make_data.write_dataset(str(folder), "needle", 16, 8, seed=0)
    save(folder)
    videomae(num_labels=make_data.NUM_CLASSES).model.save_pretrained(folder)
    keys = make_data.config(str(folder), 0)
    keys["DATA"].update(NUM_FRAMES=8, SAMPLING_RATE=4)
    del keys["MVIT"], keys["MODEL"]["DROPOUT_RATE"]
    keys["MODEL"]["MODEL_NAME"] = f"hf:{folder}"
    keys["DATA_LOADER"]["NUM_WORKERS"] = 0
    keys["SOLVER"].update(MAX_EPOCH=2, WARMUP_EPOCHS=0.0)
    keys["TRAIN"].update(BATCH_SIZE=8, CHECKPOINT_PERIOD=1)
    keys["STTS"] = {
        "ENABLE": True,
        "NUM_SAMPLES": 20,
        "FREEZE_BACKBONE_EPOCHS": 1.0,
        "TIME": {"BLOCKS": [0], "KEEP": [0.5]},
        "SPACE": {"BLOCKS": [2], "KEEP": [0.6]},
    }
    make_data.write_config(str(folder / "job.yaml"), keys)
    return folder


def test_the_runner_trains_resumes_and_tests(job, capsys):
    words = ["run", "--engine", "standalone", "--cfg", str(job / "job.yaml")]
    cli.main(words)
    cfg = stts.load_config(str(job / "job.yaml"))
    last = Path(checkpointing.checkpoint_path(cfg, 2))
    whole = checkpointing.read_checkpoint(last)
    first = checkpointing.read_checkpoint(checkpointing.checkpoint_path(cfg, 1))["model_state"]
    start = stts.build_model(cfg).state_dict()
    for key in whole["model_state"]:
        if not key.startswith("stts."):
            assert torch.equal(first[key], start[key]), key  # frozen from its trained weights
    changed = {
        key for key, value in whole["model_state"].items() if not torch.equal(first[key], value)
    }
    assert any(key.startswith("model.videomae.encoder.layer.3") for key in changed)
    last.unlink()
    engine.train(cfg)
    again = checkpointing.read_checkpoint(checkpointing.checkpoint_path(cfg, 2))["model_state"]
    assert all(torch.equal(again[key], value) for key, value in whole["model_state"].items())
    assert "top1_acc" in engine.test(cfg)


def test_the_tools_take_it(job, tmp_path, capsys):
    cfg = ["--cfg", str(job / "job.yaml")]
    video = next((job / "videos").rglob("*.mp4"))
    untrained = ["STTS.TIME.SCORER", "uniform", "STTS.SPACE.SCORER", "uniform"]
    strip = tmp_path / "strip.png"
    words = ["visualize", *cfg, "--video", str(video), "--out", str(strip), "--opts", *untrained]
    assert cli.main([*words, "OUTPUT_DIR", str(tmp_path)]) == 0
    assert strip.read_bytes()[:4] == b"\x89PNG"

    rows = tmp_path / "rows.json"
    words = ["bench", f"{job / 'job.yaml'}", f"all={job / 'job.yaml'},STTS.ENABLE=False"]
    cli.main([*words, "--repeats", "1", "--no-memory", "--json", str(rows)])
    selected, everything = json.loads(rows.read_text())["rows"]
    assert 0 < selected["gflops"] < 0.8 * everything["gflops"]

    words = ["study", *cfg, "--out", str(tmp_path / "study"), "--time", "0.5", "--space", "--both"]
    assert cli.main([*words, "--scorers", "uniform", "learned", "--seeds", "1"]) == 0
    table = json.loads((tmp_path / "study" / "study.json").read_text())
    assert [row["name"] for row in table] == ["all-seed0", "time0.5-uniform-seed0"]
    assert "has no weights" in capsys.readouterr().err


def test_a_folder_adapts_without_labels(tmp_path):
    save(tmp_path / "model")
    make_data.write_dataset(str(tmp_path / "data"), "needle", 4, 4, seed=0, side=32, num_frames=16)
    text = "STTS: {TIME: {BLOCKS: []}, SPACE: {BLOCKS: []}, TOKENS: {BLOCKS: [1], KEEP: [0.25]}}\n"
    text += "DATA_LOADER: {NUM_WORKERS: 0}\nTRAIN: {BATCH_SIZE: 2}\nTEST: {NUM_ENSEMBLE_VIEWS: 1}\n"
    text += "DATA: {SAMPLING_RATE: 2}\n"
    cfg = config(tmp_path / "model", text)
    words = ["adapt", "--cfg", str(tmp_path / "model" / "config.yaml"), "--steps", "1"]
    words += ["--films", str(tmp_path / "data" / "videos"), "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--backbone"]) == 0
    adapted = str(tmp_path / "out" / "adapted.pyth")
    cfg.TEST.CHECKPOINT_FILE_PATH, cfg.STTS.ENABLE = adapted, True
    model = stts.build_model(cfg)
    checkpointing.load_for_test(cfg, model)
    assert model(torch.randn(1, 3, 8, 32, 32)).shape == (1, 5)
