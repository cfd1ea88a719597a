"""Pages, links and references of the documentation are complete. mkdocs is not needed."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml

import stts_slowfast as stts
from stts_slowfast.configfiles import values
from stts_slowfast.tools import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
spec = importlib.util.spec_from_file_location("build", ROOT / "docs" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


class Loader(yaml.SafeLoader):
    """Loads mkdocs.yml, in which ``!ENV`` reads an environment variable."""


Loader.add_constructor("!ENV", lambda loader, node: "")
EVERY_PAGE = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


def expanded(path):
    return build.expand(path.read_text(), path.name)


def leaves(tree):
    if isinstance(tree, str):
        yield tree
    for value in (
        tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    ):
        yield from leaves(value)


def test_the_navigation_has_every_page_once():
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]
    assert sorted(leaves(nav)) == [path.name for path in PAGES]


@EVERY_PAGE
def test_a_page_has_one_title_and_no_broken_link(path):
    text = expanded(path)
    rest = re.sub(r"<!-- (model zoo|table: [\w. ]+|end of table) -->", "", text)
    assert "<!-- " not in rest, "a line was not expanded"
    titles = [title for _, level, title in build.headings(text) if level == 1]
    assert len(titles) == 1 and text.lstrip().startswith(f"# {titles[0]}")
    pictures = {build.picture_uri(picture) for picture in build.pictures()}
    code = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
    for mark, _, target in build.LINK.findall(code.sub("", text)):
        name, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        if mark:
            assert name in pictures or (ROOT / "docs" / name).is_file(), target
            continue
        page = ROOT / "docs" / (name or path.name)
        assert page.is_file(), target
        anchors = {build.slug(title) for _, _, title in build.headings(expanded(page))}
        assert not anchor or anchor in anchors, target


@pytest.mark.parametrize("name", stts.__all__)
def test_every_public_name_is_documented(name):
    assert f"::: stts_slowfast.{build.public_names()[name]}.{name}\n" in build.api() + "\n"
    thing = getattr(stts, name)
    text = inspect.getdoc(thing)
    assert text and text.split("\n")[0].endswith("."), name
    if inspect.isfunction(thing) and len(inspect.signature(thing).parameters) > 1:
        assert "Args:" in text, name


def test_what_the_api_page_names_has_a_docstring():
    names = re.findall(r"^::: ([\w.]+)$", expanded(ROOT / "docs" / "api.md"), re.MULTILINE)
    assert len(names) > len(stts.__all__)
    for path in names:
        module, _, name = path.rpartition(".")
        if name == "SelectionCallback":
            pytest.importorskip("transformers", reason="transformers is not installed")
        thing = getattr(importlib.import_module(module), name)
        assert inspect.getdoc(thing), path


README = (ROOT / "README.md").read_text()


def test_the_readme_is_short_and_has_no_broken_link():
    assert len(README.splitlines()) <= 150
    for _, _, target in build.LINK.findall(re.sub(r"```.*?```", "", README, flags=re.DOTALL)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        assert (ROOT / path).exists(), target
        if anchor:
            titles = build.headings((ROOT / path).read_text())
            assert anchor in {build.slug(title) for _, _, title in titles}, target
    rows = re.findall(r"^\| `stts ([\w-]+)` \|", README, re.MULTILINE)
    assert set(rows) == set(cli.COMMANDS)
    for name in re.findall(r"STTS_[\w.]+\.yaml", README):
        assert list((ROOT / "configs").glob(f"*/{name}")), name


@pytest.fixture
def small_mvit(monkeypatch):
    """Replaces torchvision's MViT-B by a small one with the same grids up to block 4."""
    video = pytest.importorskip("torchvision", reason="torchvision is not installed").models.video
    block = video.mvit.MSBlockConfig(1, 8, 8, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 8, 8])
    small = {"spatial_size": (224, 224), "temporal_size": 16, "block_setting": [block] * 5}
    ways = {"residual_pool": False, "residual_with_cls_embed": True, "rel_pos_embed": False}
    monkeypatch.setattr(
        video, "mvit_v1_b", lambda: video.MViT(**small, **ways, proj_after_attn=False)
    )


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_readmes_example_runs(small_mvit):
    (example,) = python_blocks(README)
    names = {}
    exec(example, names)
    kept = stts.selections(names["model"])
    assert kept["time_0"].shape == (1, 7) and len(kept["space_4"]) == 7


def test_the_tour_runs(small_mvit):
    look, kept, train = python_blocks((ROOT / "docs" / "tour.md").read_text())
    names = {}
    exec(look, names)
    exec(kept, names)
    found = stts.selections(names["model"])
    assert found["time_0"].shape == (1, 4) and found["space_4"].shape == (4, 4)
    names["model"].train()
    names["loader"] = [(torch.randn(1, 3, 16, 224, 224), torch.tensor([3]))] * 2
    before = [p.clone() for p in names["model"].stts.parameters()]
    exec(train, names)
    after = names["model"].stts.parameters()
    assert any(not torch.equal(old, new) for old, new in zip(before, after))


def test_the_config_reference_has_every_key_with_its_default(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("{}\n")
    rows = re.findall(
        r"^\| `([\w.]+)` \| `(.*?)` \| (.*) \|$", expanded(ROOT / "docs/config.md"), re.M
    )
    table = {key: default for key, default, _ in rows}
    nodes = {key.partition(".")[0] for key in table}  # the runner ignores the others
    for key, value in values.flatten(stts.load_config(str(path))):
        if key.partition(".")[0] not in nodes:
            continue
        assert yaml.safe_load(table[key]) == yaml.safe_load(repr(value)), key
    ours = [
        text for key, _, text in rows if key.startswith(("STTS.", "TIMESFORMER.", "VIDEO_SWIN."))
    ]
    assert len(ours) > 30 and all(len(text) > 8 for text in ours)


def test_every_command_and_option_is_on_its_page(capsys):
    sections = expanded(ROOT / "docs" / "commands.md").split("\n## stts ")[1:]
    assert [text.split("\n")[0] for text in sections] == list(cli.COMMANDS)
    for text, name in zip(sections, cli.COMMANDS):
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        options = set(re.findall(r"^ +(--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
        assert options - {"--help", "--traceback"} == set(re.findall(r"`(--[\w-]+)", text)), name


def test_messages_of_the_troubleshooting_page_are_in_the_sources():
    """Each heading in code, split at its dots, is in one file of the package."""
    source = [
        re.sub(r"""["']\s*\n\s*f?["']""", "", path.read_text()).replace("{{", "{")
        for path in (ROOT / "stts_slowfast").rglob("*.py")
    ]
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"`([^`]+)`", "\n".join(re.findall(r"^### (.*`.*)$", text, re.MULTILINE)))
    assert len(messages) > 25
    for message in messages:
        parts = [part.strip(" .") for part in re.split(r"\.{3,}", message)]
        parts = [part for part in parts if len(part) > 3]
        assert parts and any(all(part in text for part in parts) for text in source), message
