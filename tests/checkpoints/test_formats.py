import pytest
import torch
from torchvision.models.video import mvit_v1_b, mvit_v2_s, swin3d_b, swin3d_t

from stts_slowfast import backbones
from stts_slowfast.backbones.mvit_state_dict import (
    pytorchvideo_from_slowfast,
    torchvision_from_slowfast,
    torchvision_to_slowfast,
)
from stts_slowfast.backbones.state_dict import selectors_from_authors, selectors_to_authors
from stts_slowfast.backbones.timesformer import TimeSformer
from stts_slowfast.backbones.video_swin import swin_from_mmaction
from stts_slowfast.checkpoints import detect_format, load_weights, read_checkpoint, save_checkpoint
from stts_slowfast.hooks import attach, selections
from stts_slowfast.standalone.config import get_cfg
from stts_slowfast.standalone.model import build_model

FORMATS = {key: known for _, family in backbones.FAMILIES for key, known in family.formats.items()}


@pytest.mark.parametrize("name", ["slowfast_mvit_v1", "slowfast_mvit_v2"])
def test_names_go_to_torchvision_and_back(golden, name):
    weights = golden(name).weights
    there = torchvision_from_slowfast(weights)
    back = torchvision_to_slowfast(there)
    assert not set(there) & set(weights) - {
        k for k in weights if "norm" in k or "qkv" in k or "rel_pos" in k
    }
    assert list(back) == list(weights)
    assert all(torch.equal(back[key], weights[key]) for key in weights)


def test_written_files_are_slowfasts(golden, tiny_cfg, tmp_path):
    case = golden("slowfast_mvit_v1")
    tiny_cfg.STTS.ENABLE = True
    model = build_model(tiny_cfg).eval()
    load_weights(model, case.weights, strict=False)
    path = tmp_path / "checkpoint_epoch_00003.pyth"
    save_checkpoint(path, model, tiny_cfg, 2, {"state": {}}, {"scale": 2.0})
    checkpoint = read_checkpoint(path)
    assert checkpoint["epoch"] == 2 and checkpoint["scaler_state"] == {"scale": 2.0}
    assert "DEPTH: 4" in checkpoint["cfg"]
    state = checkpoint["model_state"]
    assert {k for k in state if not k.startswith("stts.")} == set(case.weights)
    assert all(torch.equal(state[k], v) for k, v in case.weights.items())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]

    other = build_model(tiny_cfg).eval()
    loaded = load_weights(other, path)
    assert loaded.format == "a SlowFast MViT" and not loaded.missing + loaded.unexpected
    assert torch.equal(other(case["input"]), model(case["input"]))


def test_a_baseline_starts_a_run_with_selection(golden, tiny_cfg):
    tiny_cfg.STTS.ENABLE = True
    loaded = load_weights(build_model(tiny_cfg), golden("slowfast_mvit_v1").weights, strict=False)
    assert loaded.missing and all(key.startswith("stts.") for key in loaded.missing)
    assert not loaded.unexpected


def test_authors_norms_are_set_and_survive_saving(golden, tiny_cfg, tmp_path):
    case = golden("official_stts_mvit")
    tiny_cfg.STTS.ENABLE = True
    model = build_model(tiny_cfg).eval()
    loaded = load_weights(model, case.weights)
    assert loaded.format == "an STTS authors' MViT"
    assert "eps 1e-05" in str(loaded)
    save_checkpoint(tmp_path / "ours.pyth", model, tiny_cfg, 0)
    other = build_model(tiny_cfg).eval()
    load_weights(other, tmp_path / "ours.pyth")
    assert torch.equal(other(case["input"]), model(case["input"]))
    load_weights(other, golden("slowfast_mvit_v1").weights, strict=False)
    assert {m.eps for n, m in other.named_modules() if n.endswith("norm_act.0")} == {1e-6}


def test_authors_selectors_without_a_place_are_left_over(golden, tiny_cfg):
    loaded = load_weights(
        backbones.build(tiny_cfg), golden("official_stts_mvit").weights, strict=False
    )
    assert loaded.unexpected and all("score_predictor" in key for key in loaded.unexpected)


def test_authors_selectors_go_to_the_configured_block(golden, tiny_cfg):
    tiny_cfg.STTS.TIME.BLOCKS, tiny_cfg.STTS.SPACE.BLOCKS = [0], [3]
    model = attach(backbones.build(tiny_cfg), tiny_cfg.STTS)
    weights = golden("official_stts_mvit").weights
    assert not load_weights(model, weights).missing
    theirs = weights["space_score_predictor.0.score_network.out_conv.4.weight"]
    assert torch.equal(model.stts["space_3"].scorer.network.score[4].weight, theirs)


def test_another_head_is_reported_and_left(golden, tiny_cfg):
    tiny_cfg.MODEL.NUM_CLASSES = 5
    loaded = load_weights(
        backbones.build(tiny_cfg), golden("slowfast_mvit_v1").weights, strict=False
    )
    assert len(loaded.mismatched) == 2
    assert "head.1.weight (11, 32), the model's is (5, 32)" in loaded.mismatched


def test_ddp_prefixes_are_taken_off(golden, tiny_cfg):
    weights = {f"module.{k}": v for k, v in golden("slowfast_mvit_v1").weights.items()}
    assert not load_weights(backbones.build(tiny_cfg), {"model_state": weights}).missing


def test_what_holds_no_parameters_is_refused(tiny_cfg):
    model = backbones.build(tiny_cfg)
    with pytest.raises(ValueError, match="no parameters"):
        load_weights(model, {"epoch": 3})
    with pytest.raises(ValueError, match="no parameters"):
        load_weights(model, {"model_state": {0: torch.zeros(2), 1: torch.zeros(2)}})
    with pytest.raises(ValueError, match="no parameter of it fits this MViT"):
        load_weights(model, {"fc.weight": torch.zeros(2, 2)})


# --- the other families -------------------------------------------------------------------------


def timesformer(golden, attention_type="divided_space_time", **changes):
    case = golden(f"timesformer_{attention_type}")
    return TimeSformer(**{**case.config, **changes}).eval(), case


@pytest.mark.parametrize("prefix", ["", "model."])
@torch.no_grad()
def test_timesformer_loads_with_and_without_its_prefix(golden, prefix, tmp_path):
    model, case = timesformer(golden)
    path = tmp_path / "TimeSformer_divST_8x32_224_K400.pyth"
    torch.save({"model_state": {f"{prefix}{k}": v for k, v in case.weights.items()}}, path)
    loaded = load_weights(model, path)
    assert loaded.format == "a TimeSformer"
    assert not loaded.missing + loaded.unexpected + loaded.mismatched
    torch.testing.assert_close(model(case["input"]), case["logits"], atol=1e-5, rtol=0)


def test_timesformer_positions_fit_other_sizes(golden):
    model, case = timesformer(golden, img_size=48, num_frames=8)
    loaded = load_weights(model, case.weights)
    assert not loaded.missing + loaded.mismatched
    assert torch.equal(model.time_embed[:, ::2], case.weights["time_embed"])
    assert torch.equal(model.pos_embed[:, 0], case.weights["pos_embed"][:, 0])
    middle = model.pos_embed[0, 1:].mean(0)
    torch.testing.assert_close(
        middle, case.weights["pos_embed"][0, 1:].mean(0), atol=0.01, rtol=0.1
    )


def image_weights(golden):
    """ViT weights as timm names them, with a head for other classes."""
    weights = dict(golden("timesformer_space_only").weights)
    return {**weights, "head.weight": torch.randn(21, 32), "head.bias": torch.randn(21)}


@torch.no_grad()
def test_image_weights_start_a_timesformer_as_the_image_model(golden):
    """Time adds nothing yet: on a still clip the model is the image model on its frame."""
    model, case = timesformer(golden)
    torch.nn.init.normal_(model.time_embed)
    torch.nn.init.normal_(model.blocks[0].temporal_fc.weight)
    loaded = load_weights(model, image_weights(golden), strict=False)
    assert loaded.missing == [] and loaded.unexpected == []
    assert len(loaded.mismatched) == 2, "the head is for other classes"

    image_model, _ = timesformer(golden, "space_only")
    load_weights(image_model, image_weights(golden), strict=False)
    image_model.head.load_state_dict(model.head.state_dict())
    still = case["input"][:, :, :1].expand(-1, -1, 4, -1, -1)
    torch.testing.assert_close(model(still), image_model(still), atol=1e-5, rtol=0)


def test_attention_over_time_starts_as_attention_over_space(golden):
    model, _ = timesformer(golden)
    load_weights(model, image_weights(golden), strict=False)
    block = model.blocks[1]
    assert torch.equal(block.temporal_attn.qkv.weight, block.attn.qkv.weight)
    assert torch.equal(block.temporal_norm1.bias, block.norm1.bias)
    assert not block.temporal_fc.weight.any() and not model.time_embed.any()


def test_config_names_weights_to_start_from(golden, tmp_path):
    cfg = get_cfg()
    cfg.MODEL.MODEL_NAME, cfg.MODEL.NUM_CLASSES = "TimeSformer", 5
    cfg.DATA.NUM_FRAMES, cfg.DATA.TRAIN_CROP_SIZE = 4, 32
    node = cfg.TIMESFORMER
    node.PATCH_SIZE, node.EMBED_DIM, node.DEPTH, node.NUM_HEADS = 8, 32, 3, 4
    node.PRETRAINED_MODEL = str(tmp_path / "vit.pth")
    with pytest.raises(FileNotFoundError, match=r"vit\.pth does not exist"):
        build_model(cfg)
    weights = image_weights(golden)
    torch.save(weights, node.PRETRAINED_MODEL)
    model = build_model(cfg)
    assert torch.equal(model.blocks[2].mlp.fc1.weight, weights["blocks.2.mlp.fc1.weight"])


def swin_cfg(golden, name="videoswin"):
    cfg = get_cfg()
    node = golden(name).config
    cfg.MODEL.MODEL_NAME, cfg.MODEL.NUM_CLASSES = "VideoSwin", 11
    cfg.DATA.NUM_FRAMES, cfg.DATA.TRAIN_CROP_SIZE = node["num_frames"], node["image_size"]
    for ours in ("PATCH_SIZE", "EMBED_DIM", "DEPTHS", "NUM_HEADS", "WINDOW_SIZE"):
        cfg.VIDEO_SWIN[ours] = node[ours.lower()]
    cfg.STTS.ENABLE, cfg.STTS.TIME.KEEP, cfg.STTS.SPACE.BLOCKS = True, [0.5], []
    return cfg


def mmaction_weights(golden, name):
    """A file as mmaction writes it: the backbone and the head, each under its prefix."""
    weights = {f"backbone.{k}": v for k, v in golden(name).weights.items()}
    return {
        **weights,
        "cls_head.fc_cls.weight": torch.randn(11, 32),
        "cls_head.fc_cls.bias": torch.randn(11),
    }


def test_mmaction_swin_loads_with_its_head(golden):
    cfg = swin_cfg(golden)
    cfg.STTS.ENABLE = False
    model, weights = build_model(cfg), mmaction_weights(golden, "videoswin")
    loaded = load_weights(model, {"state_dict": weights})
    assert loaded.format == "an mmaction Video Swin"
    assert not loaded.missing + loaded.unexpected + loaded.mismatched
    assert torch.equal(model.head.weight, weights["cls_head.fc_cls.weight"])


def test_authors_swin_loads_with_its_scorers(golden):
    model = build_model(swin_cfg(golden))
    weights = mmaction_weights(golden, "official_stts_videoswin")
    loaded = load_weights(model, {"state_dict": weights})
    assert loaded.format == "an STTS authors' Video Swin"
    assert not loaded.missing + loaded.unexpected + loaded.mismatched


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda cfg, golden: swin_cfg(golden), "a torchvision Video Swin"),
        (lambda cfg, golden: cfg, "a torchvision MViT"),
    ],
)
def test_torchvision_weights_load(golden, tiny_cfg, make, name):
    """KINETICS400_V1 files are bare state dicts of torchvision's models."""
    cfg = make(tiny_cfg, golden)
    cfg.STTS.ENABLE = False
    weights = build_model(cfg).state_dict()
    model = build_model(cfg)
    loaded = load_weights(model, weights)
    assert loaded.format == name
    assert not loaded.missing + loaded.unexpected + loaded.mismatched
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_published_torchvision_models_have_the_names_we_know():
    """Full-size names and shapes, without data: what the published files hold."""
    for builder in (mvit_v1_b, mvit_v2_s, swin3d_t, swin3d_b):
        with torch.device("meta"):
            state = builder().state_dict()
        known = detect_format(state)
        assert known.name.startswith("a torchvision")
        ours = known.to_slowfast(state, [])
        assert list(known.from_slowfast(ours)) == list(state)


FILES = {
    "authors-mvit": lambda golden: golden("official_stts_mvit").weights,
    "authors-swin": lambda golden: mmaction_weights(golden, "official_stts_videoswin"),
    "mmaction-swin": lambda golden: mmaction_weights(golden, "videoswin"),
    "pytorchvideo-mvit": lambda golden: pytorchvideo_from_slowfast(
        golden("slowfast_mvit_v1").weights
    ),
    "torchvision-mvit": lambda golden: torchvision_from_slowfast(
        golden("slowfast_mvit_v2").weights
    ),
    "torchvision-swin": lambda golden: swin_from_mmaction(golden("videoswin").weights),
    "timesformer": lambda golden: {
        f"model.{k}": v for k, v in golden("timesformer_divided_space_time").weights.items()
    },
    "slowfast": lambda golden: golden("slowfast_mvit_v1").weights,
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_is_recognised_and_round_trips(golden, name):
    state = FILES[name](golden)
    known = FORMATS[name]
    assert detect_format(state) is known
    back = known.from_slowfast(known.to_slowfast(state, ["time_0", "space_2"]))
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_scorers_are_counted_per_dimension():
    keys = [f"stts.{name}.scorer.network.embed.0.weight" for name in ("time_3", "space_4")]
    state = {key: torch.zeros(1) for key in [*keys, keys[0].replace("time_3", "time_9")]}
    theirs = list(selectors_to_authors(state))
    assert theirs == [
        "time_score_predictor.0.score_network.in_conv.0.weight",
        "space_score_predictor.0.score_network.in_conv.0.weight",
        "time_score_predictor.1.score_network.in_conv.0.weight",
    ]
    assert list(selectors_from_authors(dict.fromkeys(theirs), ["time_3", "space_4", "time_9"])) == (
        list(state)
    )


@torch.no_grad()
def test_budget_at_test_time(golden, tiny_cfg, tmp_path):
    """Scorers do not depend on k: what was trained at one share is tested at another."""
    tiny_cfg.STTS.ENABLE, tiny_cfg.STTS.TIME.KEEP = True, [0.9]
    trained = build_model(tiny_cfg).eval()
    save_checkpoint(tmp_path / "trained.pyth", trained, tiny_cfg, 0)
    tiny_cfg.STTS.TIME.KEEP, tiny_cfg.STTS.SPACE.KEEP = [0.5], [0.3]
    model = build_model(tiny_cfg).eval()
    loaded = load_weights(model, tmp_path / "trained.pyth")
    assert not loaded.missing + loaded.unexpected + loaded.mismatched
    clip = torch.randn(2, 3, 8, 32, 32)
    trained(clip), model(clip)
    kept, fewer = selections(trained), selections(model)
    assert kept["time_0"].shape == (2, 3) and fewer["time_0"].shape == (2, 2)
    assert fewer["space_2"][:, 2:].tolist() == [[2, 2]] * 4
    for row, few in zip(kept["time_0"].tolist(), fewer["time_0"].tolist()):
        assert set(few) <= set(row), "the best frames stay the best"
