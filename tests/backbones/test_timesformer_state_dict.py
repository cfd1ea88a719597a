"""TimeSformer's weights move between transformers, the authors and us, and logits stay."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import stts_slowfast as stts
from stts_slowfast.backbones.timesformer import TimeSformer
from stts_slowfast.checkpoints import convert, detect_format, state_dict_of

ATTENTION = ["divided_space_time", "joint_space_time"]
FIXTURES = Path(__file__).parents[1] / "fixtures"


def authors(attention):
    """The authors' weights, a clip, their logits, and what their model was made of."""
    data = np.load(FIXTURES / f"timesformer_{attention}.npz")
    arrays = {name: torch.from_numpy(data[name]) for name in data.files if name != "config"}
    weights = {
        name.removeprefix("weights/"): value
        for name, value in arrays.items()
        if name.startswith("weights/")
    }
    return weights, arrays["input"], arrays["logits"], json.loads(str(data["config"]))


def transformers_model(made, kind="TimesformerForVideoClassification"):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.TimesformerConfig(
        image_size=made["img_size"],
        patch_size=made["patch_size"],
        num_frames=made["num_frames"],
        hidden_size=made["embed_dim"],
        num_hidden_layers=made["depth"],
        num_attention_heads=made["num_heads"],
        intermediate_size=made["embed_dim"] * made["mlp_ratio"],
        attention_type=made["attention_type"],
        num_labels=made["num_classes"],
    )
    return getattr(transformers, kind)(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTION)
def test_transformers_takes_the_authors_weights(attention):
    weights, clip, logits, made = authors(attention)
    model = transformers_model(made)
    loaded = stts.load_weights(model, {f"model.{key}": value for key, value in weights.items()})
    assert (loaded.missing, loaded.unexpected, loaded.mismatched) == ([], [], [])
    torch.testing.assert_close(model(clip.transpose(1, 2)).logits, logits, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTION)
def test_ours_takes_the_weights_of_transformers(attention):
    _, clip, _, made = authors(attention)
    theirs = transformers_model(made)
    for parameter in theirs.parameters():
        parameter.normal_(std=0.2)
    ours = TimeSformer(**made).eval()
    loaded = stts.load_weights(ours, theirs.state_dict())
    assert loaded.format == "a TimeSformer of transformers"
    assert (loaded.missing, loaded.unexpected, loaded.mismatched) == ([], [], [])
    logits = theirs(clip.transpose(1, 2)).logits
    torch.testing.assert_close(ours(clip), logits, atol=1e-5, rtol=0)

    selection = {"time": {1: 0.5}, "space": {2: 0.6}, "fused_attention": False}
    stts.attach(theirs, **selection)
    for parameter in theirs.stts.parameters():
        parameter.normal_(std=0.2)
    stts.attach(ours, **selection)
    stts.load_weights(ours, theirs.state_dict())
    logits = theirs(clip.transpose(1, 2)).logits
    torch.testing.assert_close(ours(clip), logits, atol=1e-5, rtol=0)
    kept = stts.selections(theirs)
    assert all(torch.equal(kept[key], value) for key, value in stts.selections(ours).items())


@torch.no_grad()
def test_the_body_alone():
    _, clip, _, made = authors("divided_space_time")
    body = transformers_model(made, "TimesformerModel")
    ours = TimeSformer(**made).eval()
    loaded = stts.load_weights(body, ours.state_dict(), strict=False)
    assert loaded.missing == [] and loaded.unexpected == ["head.weight", "head.bias"]
    tokens = body(clip.transpose(1, 2)).last_hidden_state
    torch.testing.assert_close(ours.head(tokens[:, 0]), ours(clip), atol=1e-5, rtol=0)
    loaded = stts.load_weights(TimeSformer(**made), body.state_dict(), strict=False)
    assert loaded.missing == ["head.weight", "head.bias"]


@torch.no_grad()
def test_convert_goes_all_ways_and_back():
    weights, _, _, made = authors("divided_space_time")
    theirs, source, _ = convert({"model_state": weights}, "transformers", [])
    assert source.name == "a TimeSformer"
    assert {k: v.shape for k, v in theirs.items()} == {
        key: value.shape for key, value in transformers_model(made).state_dict().items()
    }
    assert detect_format(theirs).name == "a TimeSformer of transformers"
    for to in ("timesformer", "slowfast"):
        back, _, _ = convert(theirs, to, [])
        back = {key.removeprefix("model."): value for key, value in state_dict_of(back).items()}
        assert back.keys() == weights.keys()
        assert all(torch.equal(back[key], weights[key]) for key in weights)
