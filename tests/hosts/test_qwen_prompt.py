"""A video language model that gets a quarter of its video tokens, by the code of docs/hosts.md."""

import re
from pathlib import Path

import pytest
import torch

import stts_slowfast as stts

PAGE = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text()
SECTION = PAGE.split("## A video language model")[1].split("\n## ")[0]
(CODE,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
VIDEO, START, END = 61, 62, 63
SIZES = torch.tensor([[4, 8, 8], [2, 4, 12]])  # 64 and 24 patches a frame, of which 4 make a token


def fewer_video_tokens():
    names = {}
    exec(CODE, names)
    return names["fewer_video_tokens"]


def language_model():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [2, 1, 1],
    }
    vision = {"depth": 3, "hidden_size": 24, "num_heads": 2, "intermediate_size": 48}
    vision |= {"patch_size": 4, "out_hidden_size": 16, "num_position_embeddings": 16}
    vision["deepstack_visual_indexes"] = [0, 2]
    tokens = {"image_token_id": 60, "video_token_id": VIDEO}
    tokens |= {"vision_start_token_id": START, "vision_end_token_id": END}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)
    torch.manual_seed(0)
    model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # so that each token matters
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def prompt():
    """As the processor makes it: a time stamp before each frame of a video."""
    ids = [1, 2]
    for frames, height, width in SIZES.tolist():
        for frame in range(frames):
            ids += [3, 4 + frame, START, *[VIDEO] * (height * width // 4), END]
    ids = torch.tensor([[*ids, 5, 6]])
    patches = torch.randn(int(SIZES.prod(1).sum()), 3 * 2 * 4 * 4)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == VIDEO).int() * 2,
        "pixel_values_videos": patches,
        "video_grid_thw": SIZES,
    }


def generate(model, inputs):
    return model.generate(
        **inputs, max_new_tokens=4, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip


def test_keeping_all_generates_what_the_stock_model_generates():
    model, inputs = language_model(), prompt()
    plain = generate(model, inputs)
    stts.attach(model.model.visual, time={0: 1.0}, space={1: 1.0})
    found = generate(model, fewer_video_tokens()(model, inputs))
    assert torch.equal(found.sequences, plain.sequences)
    assert all(torch.equal(*pair) for pair in zip(found.logits, plain.logits))


@torch.no_grad()
def test_a_quarter_of_the_video_tokens_is_the_whole_prompt_with_the_others_hidden():
    model, inputs = language_model(), prompt()
    visual, core = model.model.visual, model.model
    stts.attach(visual, time={0: 0.5}, space={1: 0.5})
    short = fewer_video_tokens()(model, inputs)
    count = (inputs["input_ids"] == VIDEO).sum()
    assert (short["input_ids"] == VIDEO).sum() == 2 * 4 + 1 * 4 < 0.25 * count
    out = generate(model, short)
    assert out.sequences.shape[1] == short["input_ids"].shape[1] + 4

    video = visual(inputs["pixel_values_videos"], grid_thw=SIZES)

    def whole(features):
        return torch.cat([clip.flatten(0, 3) for clip in stts.scatter(features, visual)])

    ones = torch.ones(len(video.pooler_output), 1)
    seen = inputs["attention_mask"].clone()
    seen[inputs["input_ids"] == VIDEO] = whole(ones)[:, 0].long()
    positions, _ = core.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], video_grid_thw=SIZES
    )
    video.pooler_output = [whole(video.pooler_output)]
    video.deepstack_features = [[whole(layer)] for layer in video.deepstack_features]
    control = model(
        input_ids=inputs["input_ids"],
        attention_mask=seen,
        position_ids=positions,
        mm_encoder_outputs={"video": video},
    )
    torch.testing.assert_close(out.logits[0], control.logits[:, -1])
