"""Promises about whatever comes: nodes, grids, lists, YAML and state dicts, drawn by hypothesis."""

import json
import pickle
import re

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stts_slowfast import backbones, block_hooks, hooks
from stts_slowfast.checkpoints import load_weights
from stts_slowfast.checkpoints.formats import convert, targets
from stts_slowfast.config import add_stts_config, selection_plan, validate_stts
from stts_slowfast.configfiles.files import read_yaml
from stts_slowfast.grid import Grid
from stts_slowfast.standalone.annotations import NO_LABEL, list_kinetics, list_ssv2
from stts_slowfast.standalone.config import get_cfg

# The same examples in every run, on any machine.
settings.register_profile(
    "promises",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("promises")
few, many = settings(max_examples=30), settings(max_examples=100)


# --- nodes --------------------------------------------------------------------------------------


def mostly(usual, *odd):
    """Of ``usual``, and sometimes an invalid value."""
    return st.integers(0, 24).flatmap(lambda n: usual if n else st.sampled_from(odd))


def shares(draw, num_blocks):
    blocks = draw(st.lists(st.integers(0, num_blocks - 1), max_size=2, unique=True))
    keep = draw(st.lists(st.floats(0.1, 1.0), min_size=len(blocks), max_size=len(blocks)))
    return (
        draw(mostly(st.just(blocks), [0, 0], [-1], [num_blocks], ["0"], [True], [0.5], 0, None)),
        draw(mostly(st.just(keep), [0.0], [1.5], ["0.9"], [float("nan")], [True], [], 0.9, None)),
    )


@st.composite
def nodes(draw, num_blocks):
    cfg = get_cfg()
    node, scorers = cfg.STTS, st.sampled_from(["learned", "uniform", "random", "change"])
    node.TIME.BLOCKS, node.TIME.KEEP = shares(draw, num_blocks)
    node.SPACE.BLOCKS, node.SPACE.KEEP = shares(draw, num_blocks)
    for room in (node.TIME, node.SPACE):
        room.SCORER = draw(mostly(scorers, "Learned", "", None, 3))
    node.SPACE.STRIDE = draw(mostly(st.integers(0, 9), -1, 0.5, "1", None))
    node.SPACE.SHARED = draw(mostly(st.booleans(), 1, "yes", None))
    node.OPERATOR = draw(mostly(st.sampled_from(["perturbed", "subset"]), "straight", None))
    node.GRADIENT = draw(mostly(st.sampled_from(["exact", "diagonal"]), "none", None))
    node.SIGMA = draw(mostly(st.floats(0.0, 2.0), -0.1, float("nan"), "0.1", None, True))
    node.SIGMA_DECAY = draw(mostly(st.sampled_from(["linear", "constant"]), "cosine", None))
    node.SHRINK = draw(mostly(st.floats(0.0, 1.0), 1.5, -0.1, float("nan"), "0.5", None))
    node.NUM_SAMPLES = draw(mostly(st.integers(1, 20), 0, 2.5, "10", None, True))
    node.BACKBONE_LR = draw(mostly(st.floats(0.0, 1.0), -1, "a", None))
    node.FUSED_ATTENTION = node.TRUE_DISTANCES = draw(mostly(st.just(False), 0, "no", None))
    return node


@pytest.fixture
def steps_of(tiny_cfg, monkeypatch):
    """A tiny model, its grids, and what selectors do in a pass of it: their grids before, after."""
    model, seen = backbones.build(tiny_cfg), {}

    def watched(selector, tokens, block, select=block_hooks.select):
        after = select(selector, tokens, block)
        seen[selector.key] = tuple(tokens.grid.shape[1:4]), tuple(after.grid.shape[1:4])
        return after

    monkeypatch.setattr(block_hooks, "select", watched)
    clips = torch.randn(1, 3, tiny_cfg.DATA.NUM_FRAMES, 32, 32)

    def run(node, training):
        seen.clear()
        hooks.attach(model, node)
        try:
            with torch.no_grad():
                model.train(training)(clips)
            return dict(seen), hooks.selections(model)
        finally:
            hooks.detach(model)

    return run, backbones.block_grids(tiny_cfg)


@many
@given(data=st.data())
def test_a_node_is_refused_by_its_key_or_does_what_is_planned(steps_of, data):
    run, grids = steps_of
    node = data.draw(nodes(len(grids)))
    try:
        validate_stts(node, len(grids), grids)
    except ValueError as error:
        assert re.search(r"STTS\.[A-Z_.]*[A-Z]", str(error)), error
        return
    steps = selection_plan(node, grids)
    done, kept = run(node, data.draw(st.booleans()))
    assert done == steps and list(kept) == list(steps)
    for key, (before, after) in steps.items():
        if key.startswith("time"):
            assert kept[key].shape == (1, after[0])
            assert (kept[key].diff() > 0).all() and 0 <= kept[key].min() <= kept[
                key
            ].max() < before[0]
        else:
            ends = kept[key][:, :2] + kept[key][:, 2:]
            assert kept[key].shape == (before[0], 4) and kept[key].min() >= 0
            assert (kept[key][:, 2:] == torch.tensor(after[1:])).all()
            assert (ends <= torch.tensor(before[1:])).all()


# --- grids --------------------------------------------------------------------------------------


def ascending(draw, size):
    return sorted(draw(st.sets(st.integers(0, size - 1), min_size=1)))


@many
@given(data=st.data())
def test_a_grid_has_the_positions_of_its_tokens(data):
    """For any selection of frames and windows, compared with coordinates among the channels."""
    draw, batch = data.draw, data.draw(st.integers(1, 2))
    sizes = draw(st.tuples(*[st.integers(1, 6)] * 3))
    axes = torch.meshgrid(*map(torch.arange, sizes), indexing="ij")
    places = torch.stack(axes, dim=3).expand(batch, *sizes, 3)  # (B, T, H, W, 3)
    grid = Grid(sizes)
    for _ in range(draw(st.integers(0, 4))):
        frames, height, width = grid
        if draw(st.booleans()):
            count = draw(st.integers(1, frames))
            kept = [sorted(draw(st.permutations(range(frames)))[:count]) for _ in range(batch)]
            grid = grid.keep_frames(torch.tensor(kept))
            places = torch.stack([places[b, kept[b]] for b in range(batch)])
        else:
            window = draw(st.integers(1, height)), draw(st.integers(1, width))
            rows = st.integers(0, height - window[0])
            corners = st.tuples(rows, st.integers(0, width - window[1]))
            kept = [draw(corners) for _ in range(batch * frames)]
            grid = grid.crop(torch.tensor([[*corner, *window] for corner in kept]), window)
            parts = [
                frame[top : top + window[0], left : left + window[1]]
                for frame, (top, left) in zip(places.flatten(0, 1), kept)
            ]
            places = torch.stack(parts).unflatten(0, (batch, frames))
    assert grid == places.shape[1:4]
    first = places[:, :, 0, 0]  # (B, T, 3)
    if grid.frames is not None:
        assert torch.equal(grid.frames, first[..., 0])
    else:
        assert grid[0] == sizes[0]
    if grid.windows is not None:
        assert torch.equal(grid.windows[..., :2], first[..., 1:])
        assert (grid.windows[..., 2:] == torch.tensor(grid[1:])).all()
    else:
        assert grid[1:] == sizes[1:]
    again = pickle.loads(pickle.dumps(grid))
    assert again == grid and (again.frames is None) == (grid.frames is None)


@many
@given(data=st.data())
def test_a_pooled_grid_has_an_entry_for_each_of_its_frames_and_windows(data):
    draw = data.draw
    sizes = draw(st.tuples(*[st.integers(1, 20)] * 3))
    window = draw(st.integers(1, sizes[1])), draw(st.integers(1, sizes[2]))
    strides = draw(st.tuples(*[st.integers(1, 4)] * 3))
    frames = torch.tensor([ascending(draw, sizes[0])])
    corners = [0, 0, *window]
    grid = Grid(sizes).keep_frames(frames)
    grid = grid.crop(torch.tensor([corners] * grid[0]), window)
    pooled = grid.pooled([-(-size // stride) for size, stride in zip(grid, strides)])
    assert pooled == tuple(-(-size // stride) for size, stride in zip(grid, strides))
    assert pooled.frames.shape == (1, pooled[0])
    assert pooled.windows.shape == (1, pooled[0], 4)
    assert pooled.frames.min() >= 0 and pooled.frames.max() < sizes[0]
    assert (pooled.frames.diff() >= 0).all()
    assert (pooled.windows[..., 2:] == torch.tensor(pooled[1:])).all()


# --- lists --------------------------------------------------------------------------------------


def words(without=""):
    """Texts of any letters that a path may have, and no blanks or line ends."""
    letters = st.characters(
        exclude_categories=("Cs", "Cc", "Zs", "Zl", "Zp"), exclude_characters=without
    )
    return st.text(letters, min_size=1, max_size=8)


@pytest.fixture
def lists_cfg(tmp_path):
    cfg = get_cfg()
    cfg.DATA.PATH_TO_DATA_DIR, cfg.MODEL.NUM_CLASSES = str(tmp_path), 10
    return cfg


blank = st.sampled_from(["", "", "\n", "  \n", "\n\n"])


@many
@given(data=st.data())
def test_kinetics_lists_are_read_as_written(lists_cfg, tmp_path, data):
    separator = data.draw(st.sampled_from([" ", ",", ";", "|", "::", "é"]))
    entry = st.tuples(words(separator), st.integers(0, 9))
    entries = data.draw(st.lists(entry, max_size=6))
    ends = st.sampled_from(["\n", "\r\n", " \n"])
    lines = [f"{data.draw(blank)}{p}{separator}{n}{data.draw(ends)}" for p, n in entries]
    (tmp_path / "val.csv").write_bytes("".join(lines).encode())
    lists_cfg.DATA.PATH_LABEL_SEPARATOR = separator
    videos = list_kinetics(lists_cfg, "val")
    assert [(v.path, v.label) for v in map(videos.__getitem__, range(len(videos)))] == entries


@many
@given(text=st.text(max_size=60), separator=st.sampled_from([" ", ",", "", "\t"]))
def test_any_text_is_a_kinetics_list_or_refused(lists_cfg, tmp_path, text, separator):
    data = text.encode(errors="surrogatepass")
    (tmp_path / "val.csv").write_bytes(data)
    lists_cfg.DATA.PATH_LABEL_SEPARATOR = separator
    try:
        videos = list_kinetics(lists_cfg, "val")
    except ValueError as error:
        assert "val.csv" in str(error) or "DATA.PATH_LABEL_SEPARATOR" in str(error)
    else:
        videos = list(map(videos.__getitem__, range(len(videos))))
        assert all(video.path for video in videos)
        assert all(0 <= video.label < 10 or video.label == NO_LABEL for video in videos)


LABELS, VIDEOS = "something-something-v2-labels.json", "something-something-v2-validation.json"


@many
@given(data=st.data())
def test_ssv2_lists_are_read_as_written(lists_cfg, tmp_path, data):
    draw = data.draw
    templates = draw(st.lists(words("[]"), min_size=1, max_size=4, unique=True))
    names = draw(st.lists(words(), min_size=1, max_size=5, unique=True))
    labels = {template: str(number) for number, template in enumerate(templates)}
    of = {name: draw(st.sampled_from(templates)) for name in names}
    entries = [{"id": name, "template": f"[{of[name]}]", "more": 1} for name in names]
    owners = draw(st.lists(st.sampled_from([*names, "nobody"]), min_size=1, max_size=20))
    lines = [f'{owner} 0 {n} {n}.jpg ""\n{draw(blank)}' for n, owner in enumerate(owners)]
    ascii_only = draw(st.booleans())
    (tmp_path / LABELS).write_bytes(json.dumps(labels, ensure_ascii=ascii_only).encode())
    (tmp_path / VIDEOS).write_bytes(json.dumps(entries, ensure_ascii=ascii_only).encode())
    head = "original_vido_id video_id frame_id path labels\n"
    (tmp_path / "val.csv").write_bytes("".join([head, *lines]).encode())
    videos = list_ssv2(lists_cfg, "val")
    found = [videos[index] for index in range(len(videos))]
    assert [v.path for v in found] == [name for name in names if name in owners]
    for video in found:
        assert video.label == templates.index(of[video.path])
        frames = [f"{n}.jpg" for n, owner in enumerate(owners) if owner == video.path]
        assert list(video.frames) == frames


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
anything = st.recursive(
    scalars | st.sampled_from(["a", "0", "1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "template", "a"]), inner, max_size=3)
    ),
    max_leaves=8,
)
usual_videos = st.lists(
    st.fixed_dictionaries({"id": anything | st.just("1"), "template": anything | st.just("a")}),
    max_size=3,
)


@many
@given(labels=anything | st.dictionaries(st.just("a"), anything), videos=anything | usual_videos)
def test_any_json_is_an_ssv2_list_or_refused(lists_cfg, tmp_path, labels, videos):
    (tmp_path / LABELS).write_text(json.dumps(labels))
    (tmp_path / VIDEOS).write_text(json.dumps(videos))
    (tmp_path / "val.csv").write_text("1 0 0 a.jpg 0\n")
    try:
        found = list_ssv2(lists_cfg, "val")
    except ValueError as error:
        assert "something-something-v2" in str(error)
    else:
        assert len(found) <= len(videos)
        for index in range(len(found)):
            number = labels[videos[index]["template"]]
            assert not isinstance(number, (bool, float)) and found[index].label == int(number)


# --- YAML ---------------------------------------------------------------------------------------

keys = st.sampled_from(["A", "B", "C", "D_E", "é"])
trees = st.recursive(
    st.integers(0, 9) | st.sampled_from(["x", [1, 2], []]),
    lambda inner: st.dictionaries(keys, inner, min_size=1, max_size=3),
    max_leaves=8,
)
roots = st.dictionaries(keys, trees, min_size=1, max_size=4)


def block(tree, indent, path, places):
    """The lines of a tree; ``places`` gets the line, indent and key of each mapping."""
    lines = []
    for key, value in tree.items():
        places.append((len(lines), indent, path + [key]))
        if isinstance(value, dict):
            inner = []
            lines.append(f"{indent}{key}:")
            lines += block(value, indent + "  ", path + [key], inner)
            places += [(len(lines) - len_of(value) + line, i, k) for line, i, k in inner]
        else:
            lines.append(f"{indent}{key}: {json.dumps(value)}")
    return lines


def len_of(tree):
    return sum(1 + (len_of(value) if isinstance(value, dict) else 0) for value in tree.values())


@many
@given(data=st.data())
def test_a_key_given_twice_at_any_depth_is_refused_with_both_lines(tmp_path, data):
    tree, places, path = data.draw(roots), [], tmp_path / "a.yaml"
    lines = block(tree, "", [], places)
    path.write_text("\n".join(lines))
    assert read_yaml(str(path)) == yaml.safe_load(path.read_text()) == tree
    line, indent, key = data.draw(st.sampled_from(places))
    lines.insert(line, f"{indent}{key[-1]}: {{}}")
    path.write_text("\n".join(lines))
    name = re.escape(".".join(key))
    with pytest.raises(
        ValueError, match=rf"{name} is given twice .* lines {line + 1} and {line + 2}"
    ):
        read_yaml(str(path))


@few
@given(length=st.integers(1, 5), data=st.data())
def test_bases_are_merged_or_their_circle_is_refused(tmp_path, length, data):
    back = data.draw(st.none() | st.integers(0, length - 1))
    for number in range(length):
        base = number + 1 if number + 1 < length else back
        text = f"A:\n  K{number}: {number}\n  LAST: {number}\n"
        text = text if base is None else f"_BASE_: {base}.yaml\n{text}"
        (tmp_path / f"{number}.yaml").write_text(text)
    if back is None:
        assert read_yaml(str(tmp_path / "0.yaml"))["A"] == {
            **{f"K{number}": number for number in range(length)},
            "LAST": 0,
        }
    else:
        with pytest.raises(ValueError, match="leads in a circle"):
            read_yaml(str(tmp_path / "0.yaml"))


@many
@given(
    data=st.binary(max_size=80) | st.text("ab:-?&*<![]{}\n\t 1#|>'\"_", max_size=60).map(str.encode)
)
def test_any_bytes_are_a_config_or_refused(tmp_path, data):
    path = tmp_path / "a.yaml"
    path.write_bytes(data)
    try:
        tree = read_yaml(str(path))
    except (ValueError, FileNotFoundError) as error:
        assert "a.yaml" in str(error)
    else:
        assert isinstance(tree, dict)


# --- state dicts --------------------------------------------------------------------------------

# fmt: off
PIECES = [
    "module", "model", "backbone", "cls_head", "head", "patch_embed", "patch_embed3d", "proj",
    "projection", "blocks", "layers", "features", "0", "1", "2", "11", "attn", "self_attn", "qkv",
    "norm1", "weight", "bias", "rel_pos_h", "relative_position_index", "timesformer", "encoder",
    "stts", "time_0", "space_4", "scorer", "predictor", "temporal_attn", "score_predictor",
    "cls_token",
]
# fmt: on
names = st.lists(st.sampled_from([*PIECES, ""]), max_size=6).map(".".join)
shapes = st.sampled_from([(), (0,), (1,), (6,), (3, 4), (1, 8, 4), (4, 3, 3, 7, 7)])
tensors = shapes.map(torch.zeros)
odd_values = st.sampled_from([0, None, "x", {}, []])
states = st.dictionaries(
    names | st.integers() | st.none(), mostly(tensors, 0, None, "x", {}), max_size=8
)
wrapped = states | st.dictionaries(
    st.sampled_from(["model_state", "state_dict", "model", "epoch"]),
    states | odd_values,
    max_size=3,
)


@pytest.fixture
def tiny_model(tiny_cfg):
    add_stts_config(tiny_cfg)
    return hooks.attach(backbones.build(tiny_cfg), tiny_cfg.STTS)


@many
@given(data=st.data())
def test_any_state_dict_is_recognised_or_refused(tiny_model, data):
    own = tiny_model.state_dict()
    state = data.draw(wrapped)
    for key in data.draw(st.lists(st.sampled_from(sorted(own)), max_size=3)):
        state[data.draw(st.sampled_from(["", "module.", "model."])) + key] = own[key].clone()
    for action in (
        lambda: load_weights(tiny_model, state),
        lambda: convert(state, data.draw(st.sampled_from(targets())), ["time_0"]),
    ):
        try:
            action()
        except ValueError as error:
            assert len(str(error)) > 10 and "\n" not in str(error)
