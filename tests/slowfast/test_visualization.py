"""What SlowFast writes for TensorBoard, read back: scalars, weights, activations and Grad-CAM.

Trained and visualized by the launcher, unmodified, with selection and without.
"""

import json
import subprocess
import sys

import pytest
import torch

from tests.slowfast.conftest import HERE, LAUNCHER, environment

LAYERS = ["patch_embed/proj", "blocks/0", "blocks/3", "head/projection"]


@pytest.fixture(scope="module", params=[True, False], ids=["STTS", "stock"])
def visualized(request, checkout, videos, tmp_path_factory):
    """``(with STTS, event files of a run)``: one epoch of training, then the visualization."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path_factory.mktemp("visualized")
    classes = folder / "classes.json"
    classes.write_text(json.dumps({f"row {number}": number for number in range(8)}))
    shown = {
        "ACTIVATIONS": True, "MODEL_WEIGHTS": True, "TOPK_PREDS": 2, "LAYER_LIST": LAYERS,
        "GRAD_CAM.ENABLE": True, "GRAD_CAM.LAYER_LIST": ["patch_embed/proj"], "ENABLE": True,
    }  # fmt: skip
    keys = {
        "STTS.ENABLE": request.param, "STTS.NUM_SAMPLES": 10, "OUTPUT_DIR": folder,
        "DATA.PATH_TO_DATA_DIR": videos, "SOLVER.MAX_EPOCH": 1, "TEST.ENABLE": False,
        "TEST.NUM_ENSEMBLE_VIEWS": 1, "TENSORBOARD.ENABLE": True,
        "TENSORBOARD.CLASS_NAMES_PATH": classes,
        **{f"TENSORBOARD.MODEL_VIS.{key}": value for key, value in shown.items()},
    }  # fmt: skip
    words = [sys.executable, "-m", "stts_slowfast.pyslowfast.launch", LAUNCHER]
    words += ["--cfg", HERE / "tiny.yaml", "--opts", *(w for pair in keys.items() for w in pair)]
    done = subprocess.run(
        list(map(str, words)), cwd=checkout, env=environment(), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    runs = []
    for path in folder.glob("runs-*/events.*"):
        runs.append(loader.EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 0}))
        runs[-1].Reload()
    return request.param, runs


def scalars(runs, tag: str) -> list[float]:
    runs = [run for run in runs if tag in run.Tags()["scalars"]]
    return [point.value for run in runs for point in run.Scalars(tag)]


def test_sigma_and_the_backbone_lr_are_logged_beside_the_lr(visualized):
    selects, runs = visualized
    rates = scalars(runs, "Train/lr")
    assert len(rates) == 3 and min(rates) > 0  # three batches of four
    if not selects:
        assert not scalars(runs, "Train/sigma") + scalars(runs, "Train/backbone_lr")
        return
    # From random weights nothing is frozen or capped; sigma falls linearly with the epoch.
    assert scalars(runs, "Train/backbone_lr") == pytest.approx(rates)
    assert scalars(runs, "Train/sigma") == pytest.approx([0.1, 0.1 * 2 / 3, 0.1 / 3])


def test_weights_and_activations_are_drawn(visualized):
    tags = {tag for run in visualized[1] for tag in run.Tags()["images"]}
    assert {tag for tag in tags if "Weights" in tag} == {
        "Layer Weights/patch_embed/proj",
        "Layer Weights/head/projection",
    }
    drawn = {tag for tag in tags if "Activations" in tag}
    assert drawn == {f"Input {n}/Activations: {layer}" for n in range(8) for layer in LAYERS}


def test_a_blocks_activations_are_its_tokens(get_cfg, build):
    from slowfast.visualization.utils import GetWeightAndActivation

    cfg = get_cfg("STTS.ENABLE", True)
    model = build(cfg).eval()
    tokens = []
    model.blocks[1].register_forward_hook(lambda block, inputs, output: tokens.append(output[0]))
    shown, _ = GetWeightAndActivation(model, ["blocks/1", "norm"]).get_activations(
        [torch.randn(2, 3, 8, 32, 32)]
    )
    assert torch.equal(shown["blocks/1"], tokens[0]) and shown["blocks/1"].dim() == 3
    assert not shown["blocks/1"].requires_grad and shown["norm"].is_contiguous()


def test_grad_cam_maps_a_clip_through_the_selection(get_cfg, build):
    from slowfast.visualization.gradcam_utils import GradCAM

    from stts_slowfast.hooks import selections

    cfg = get_cfg("STTS.ENABLE", True)
    cam = GradCAM(build(cfg), ["patch_embed/proj"], cfg.DATA.MEAN, cfg.DATA.STD)
    clip = torch.randn(2, 3, 8, 32, 32)
    (seen,), logits = cam([clip])
    assert seen.shape == (2, 8, 3, 32, 32) and logits.shape == (2, 8)
    (maps,), _ = cam._calculate_localization_map([clip])
    kept = [set(row.tolist()) for row in selections(cam.model)["time_0"]]
    gradients = cam.gradients["patch_embed/proj"]  # (2, 16, 4, 8, 8)
    assert maps.min() >= 0.0 and maps.max() > 0.5
    for gradient, frames in zip(gradients, kept, strict=True):
        moved = {t for t in range(gradient.shape[1]) if gradient[:, t].abs().max() > 0}
        assert moved == frames
