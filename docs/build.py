"""Hooks of mkdocs: they generate pages from files of the repository.

A page may contain these lines, each alone:

- ``<!-- include: PATH -->`` a Markdown file of the repository; ``PATH#heading`` is one section;
- ``<!-- config: PATH -->`` the table of keys, defaults and comments of a Python or YAML file;
- ``<!-- cli -->`` the commands of ``stts`` with their options;
- ``<!-- api -->`` the public names of ``stts_slowfast/__init__.py``, for mkdocstrings;
- ``<!-- notebook: PATH -->`` a notebook with its output.

So everything is written once. The package is not imported.
"""

import ast
import base64
import copy
import json
import os
import re
import textwrap
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINE = re.compile(r"^<!-- (include|config|cli|api|notebook)(?:: (\S+))? -->$", re.MULTILINE)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


# --- mkdocs' hooks --------------------------------------------------------------------------------


def on_files(files, config):
    """Adds the pictures that included files show."""
    from mkdocs.structure.files import File

    for picture in pictures():
        files.append(File.generated(config, picture_uri(picture), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Expands the lines that the module's docstring lists."""
    return expand(markdown, page.file.src_uri, config.repo_url or "")


def on_page_content(html, page, config, files):
    """Shows the roles of docstrings (``:func:`name```) as code."""
    return re.sub(r":(?:func|class|meth|attr|data|mod):<code>~?", "<code>", html)


# --- pages ----------------------------------------------------------------------------------------


def expand(markdown: str, page: str, repo: str = "") -> str:
    """A page with these lines expanded.

    Args:
        markdown: the page's text.
        page: its path in docs/.
        repo: URL of the repository, for links to files that no page shows.

    Raises:
        ValueError: if a file or a section does not exist.
    """

    def fill(match):
        kind, source = match.groups()
        if kind == "include":
            return include(source, page, repo)
        if kind == "config":
            return config_table(ROOT / source)
        if kind == "notebook":
            return relink(notebook(ROOT / source), source, page, repo)
        return {"api": api, "cli": cli}[kind]()

    return LINE.sub(fill, markdown)


def shown() -> dict[str, str]:
    """The page that shows a file or a section of it: ``{"README.md": "index.md", ...}``."""
    found = {}
    for page in sorted(DOCS.glob("*.md")):
        for kind, source in LINE.findall(page.read_text()):
            if kind in ("include", "notebook"):
                found[source] = page.name
    return found


def include(source: str, page: str, repo: str) -> str:
    """A Markdown file, or one section of it, with links that work in ``page``."""
    name, _, anchor = source.partition("#")
    text = (ROOT / name).read_text()
    text = section(text, anchor, source) if anchor else text
    return relink(text, name, page, repo)


def section(text: str, anchor: str, source: str) -> str:
    """The section under the heading with this anchor, its headings raised to the first level."""
    chapters = headings(text)
    for number, (start, level, title) in enumerate(chapters):
        if slug(title) == anchor:
            later = [other for other in chapters[number + 1 :] if other[1] <= level]
            found = text[start : later[0][0] if later else len(text)]
            found = re.sub(r"<!--.*?-->\n?", "", found, flags=re.DOTALL)
            return re.sub(rf"^#{{{level - 1}}}(?=#)", "", found, flags=re.MULTILINE)
    raise ValueError(f"{source}: there is no such heading; use one of {[h[2] for h in chapters]}")


def headings(text: str) -> list[tuple[int, int, str]]:
    """Offset, level and title of each heading outside blocks of code."""
    code = [match.span() for match in re.finditer(r"^```.*?^```", text, re.M | re.S)]
    return [
        (match.start(), len(match[1]), match[2])
        for match in re.finditer(r"^(#+) (.+)$", text, re.MULTILINE)
        if not any(start <= match.start() < end for start, end in code)
    ]


def slug(title: str) -> str:
    """The anchor that GitHub and mkdocs give a heading."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def relink(text: str, name: str, page: str, repo: str) -> str:
    """A text of the repository with links that work in the documentation."""
    folder = (ROOT / name).parent

    def change(match):
        mark, label, target = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        path, _, anchor = target.partition("#")
        file = Path(os.path.normpath(folder / path)) if path else ROOT / name
        place = file.relative_to(ROOT).as_posix()
        if mark:
            return f"![{label}]({picture_uri(file)})"
        found = page_of(place, anchor)
        if found:
            ours = "" if found == page else found
            return f"[{label}]({ours}{'#' + anchor if anchor else ''})" if ours or anchor else label
        return f"[{label}]({repo.rstrip('/')}/blob/main/{place})" if repo else label

    return LINK.sub(change, text)


def page_of(place: str, anchor: str) -> str | None:
    """The page that shows a file of the repository, or the section of it with this anchor."""
    pages = shown()
    if place in pages:
        return pages[place]
    if place.startswith("docs/") and (ROOT / place).is_file():
        return place.removeprefix("docs/")
    sections = {key: page for key, page in pages.items() if key.startswith(f"{place}#")}
    for key, page in sections.items():
        text = section((ROOT / place).read_text(), key.partition("#")[2], key)
        if anchor in [slug(title) for _, _, title in headings(text)]:
            return page
    return None if anchor or not sections else next(iter(sections.values()))


def pictures() -> list[Path]:
    """The pictures in files that pages include."""
    found = set()
    for source in shown():
        name = source.partition("#")[0]
        if name.endswith(".md"):
            for mark, _, target in LINK.findall((ROOT / name).read_text()):
                if mark and not re.match(r"[a-z]+:", target):
                    found.add(Path(os.path.normpath((ROOT / name).parent / target)))
    return sorted(path for path in found if DOCS not in path.parents)


def picture_uri(path: Path) -> str:
    """The path of a picture in the site."""
    if DOCS in path.parents:
        return path.relative_to(DOCS).as_posix()
    return f"images/{path.name}"


# --- tables ---------------------------------------------------------------------------------------


def config_keys(path: Path) -> list[tuple[str, str, str]]:
    """Key, default and comment of each key that a Python or YAML file defines."""
    return yaml_keys(path) if path.suffix == ".yaml" else python_keys(path)


def python_keys(path: Path) -> list[tuple[str, str, str]]:
    """The keys of lines such as ``cfg.STTS.SIGMA = 0.2``, with the comments above them."""
    lines = path.read_text().splitlines()
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Assign):
            continue
        if ast.unparse(node.targets[0]) == "EXTRA_KEYS":
            for group, keys in zip(node.value.keys, node.value.values):
                for name, value in zip(keys.keys, keys.values):
                    comment = comment_above(lines, name.lineno - 1)
                    key = f"{group.value}.{name.value}"
                    found.append((name.lineno, key, repr(ast.literal_eval(value)), comment))
            continue
        key = re.fullmatch(r"cfg\.([A-Z_0-9.]+)", ast.unparse(node.targets[0]))
        if not key:
            continue
        comment = comment_above(lines, node.lineno - 1)
        if isinstance(node.value, ast.Call):  # a node, with or without its first keys
            inner = node.value.args[0] if node.value.args else None
            for name, value in ast.literal_eval(inner).items() if inner else ():
                found.append((node.lineno, f"{key[1]}.{name}", repr(value), comment))
        else:
            value = repr(ast.literal_eval(node.value))
            found.append((node.lineno, key[1], value, comment))
    return [row[1:] for row in sorted(found)]


def yaml_keys(path: Path) -> list[tuple[str, str, str]]:
    """The keys of a YAML file's first document, with the comments above them."""
    text = path.read_text().split("\n---")[0]
    return list(yaml_rows(yaml.compose(text), yaml.safe_load(text), text.splitlines(), ""))


def yaml_rows(node: yaml.MappingNode, values: dict, lines: list[str], prefix: str):
    """A row for each key of a node; keys on one line share its comment."""
    for key, value in node.value:
        name, default = f"{prefix}{key.value}", values[key.value]
        if isinstance(default, dict):
            yield from yaml_rows(value, default, lines, f"{name}.")
        else:
            yield name, repr(default), comment_above(lines, key.start_mark.line)


def comment_above(lines: list[str], number: int) -> str:
    """The comment above a line as one text; consecutive keys share the comment above the first."""
    start = number - 1
    while start >= 0 and re.match(r"""\s*["\w.]+( =|:) """, lines[start]):
        start -= 1
    block = []
    while start >= 0 and lines[start].strip().startswith("#"):
        block.insert(0, lines[start].strip().lstrip("# "))
        start -= 1
    return " ".join(block)


def config_table(path: Path) -> str:
    """The Markdown table of a file's keys."""
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for key, value, comment in config_keys(path):
        rows.append(f"| `{key}` | `{value}` | {comment.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def cli() -> str:
    """A section for each command of ``stts``, and its options, read from the sources."""
    tools = ROOT / "stts_slowfast" / "tools"
    tree = ast.parse((tools / "cli.py").read_text())
    (commands,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMMANDS"
    )
    shared = {
        node.name: list(options(node)) for node in tree.body if isinstance(node, ast.FunctionDef)
    }
    parts = []
    for name, (module, text) in commands.items():
        source = ROOT / (module.replace(".", "/") + ".py")
        parts += [f"## stts {name}", f"{text[0].upper()}{text[1:]}."]
        rows = []
        for node in ast.parse(source.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == "add_arguments":
                rows += options(node)
                for call in ast.walk(node):
                    if isinstance(call, ast.Call):
                        rows += shared.get(getattr(call.func, "id", ""), [])
        if rows:
            parts.append("\n".join(["| option | meaning |", "| --- | --- |", *rows]))
    return "\n\n".join(parts)


def options(function: ast.FunctionDef):
    """A row for each ``add_argument`` in a function, also in loops over literals."""
    for call in ast.walk(Unrolled().visit(function)):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument":
            words = {word.arg: word.value for word in call.keywords}
            (name, *_) = (ast.literal_eval(arg) for arg in call.args)
            shape = literal(words.get("metavar")) or (
                "" if literal(words.get("action")) else "VALUE" * name.startswith("--")
            )
            shape = shape if name.startswith("--") else (shape or name)
            name = name if name.startswith("--") else ""
            choices, default = literal(words.get("choices")), literal(words.get("default"))
            text = literal(words.get("help")) or ""
            text += f" (one of {', '.join(map(str, choices))})" if choices else ""
            text += f" (default: {default})" if default not in (None, [], "", False) else ""
            yield f"| `{f'{name} {shape}'.strip()}` | {text.strip().replace('|', chr(92) + '|')} |"


class Unrolled(ast.NodeTransformer):
    """Replaces ``for a, b in ((1, 2), ...)`` by its body, once for each pair."""

    def visit_For(self, node):
        names = [part.id for part in ast.walk(node.target) if isinstance(part, ast.Name)]
        body = []
        for values in literal(node.iter) or ():  # none in a loop over what is not literal
            known = dict(zip(names, values if len(names) > 1 else [values]))
            body += [Known(known).visit(copy.deepcopy(line)) for line in node.body]
        return body


class Known(ast.NodeTransformer):
    """Replaces names by their values."""

    def __init__(self, known):
        self.known = known

    def visit_Name(self, node):
        return ast.Constant(self.known[node.id]) if node.id in self.known else node


def literal(node):
    """The value of a literal; None for what is only known when the program runs."""
    if isinstance(node, ast.JoinedStr):
        parts = [
            literal(getattr(part, "value", part))
            if isinstance(part, ast.FormattedValue)
            else part.value
            for part in node.values
        ]
        return None if None in parts else "".join(map(str, parts))
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


def public_names() -> dict[str, str]:
    """The public names with the modules that define them, without importing the package."""
    tree = ast.parse((ROOT / "stts_slowfast" / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES":
            return ast.literal_eval(node.value)
    raise ValueError("stts_slowfast/__init__.py has no table _HOMES of its public names")


def api() -> str:
    """A line of mkdocstrings for each public name."""
    return "\n\n".join(
        f"::: stts_slowfast.{module}.{name}" for name, module in sorted(public_names().items())
    )


# --- notebooks ------------------------------------------------------------------------------------


def notebook(path: Path) -> str:
    """A notebook as Markdown, with its output."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"^#(?=#* )", "##", source, flags=re.MULTILINE))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                picture = re.sub(r"\s", "", "".join(data["image/png"]))
                base64.b64decode(picture, validate=True)
                parts.append(f'<img alt="output" src="data:image/png;base64,{picture}">')
            else:
                text = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f"```text\n{textwrap.dedent(text).rstrip()}\n```")
    return "\n\n".join(parts)
