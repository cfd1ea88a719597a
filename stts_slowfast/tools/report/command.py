"""``stts report``: one HTML page about a run or several, which needs nothing but itself."""

import argparse
import base64
import html
import io
import os
import tempfile
from collections.abc import Iterable, Sequence

from stts_slowfast.checkpoints.io import atomic_write, check_output_path
from stts_slowfast.tools.report.run_log import Output, config_diff, read_output
from stts_slowfast.tools.study.results import NUMBERS, aggregate_seeds, plot

TITLES = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "gflops": "GFLOPs / clip",
    "clips_per_s": "clips / s",
    "agreement": "views that agree",
    "frame_recall": "true frames kept",
    "box_recall": "true area kept",
}
STYLE = """
:root { color-scheme: light; font: 16px/1.5 system-ui, sans-serif; color: #1c2330; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: #fff; }
h1 { font-size: 1.6rem; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #d5dae3; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; overflow-wrap: anywhere; }
p, .note { color: #5a6577; margin: .3rem 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e4e8ef; text-align: right; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
tbody tr:hover { background: #f4f6fa; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
img { max-width: 100%; height: auto; display: block; }
.strip img { max-width: none; width: max(100%, 44rem); }
.bars { display: inline-flex; align-items: flex-end; gap: 2px; height: 2.2rem;
  border-bottom: 1px solid #9aa5b8; }
.bars i { display: block; width: .6rem; background: #3b76c4; }
.map { display: inline-grid; vertical-align: middle; }
.map i { width: .5rem; height: .5rem; }
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``stts report``."""
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="OUTPUT_DIR",
        help="of runs, the baseline first, and of studies",
    )
    parser.add_argument(
        "--out", metavar="HTML", help="page to write; report.html in the first folder else"
    )
    parser.add_argument("--strips", type=int, default=3, metavar="N", help="test videos to show")
    parser.add_argument("--force", action="store_true", help="write over a page that is there")


def main(args: argparse.Namespace) -> int:
    """Writes the page.

    Raises:
        ValueError: for a folder without a run in it, or a page that is there already.
    """
    path = args.out or os.path.join(args.folders[0], "report.html")
    check_output_path(path, args.force, ())
    outputs = [read_output(folder) for folder in args.folders]
    write_report(path, outputs, args.strips)
    print(f"wrote {path}")
    return 0


def write_report(path: str, outputs: Sequence[Output], strips: int, title: str = "") -> None:
    """Writes the page about some runs to ``path``."""
    _name_apart(outputs)
    title = title or f"Token selection: {', '.join(output.name for output in outputs)}"
    sections = [
        ("Results", _results(outputs)),
        ("Study", _study(outputs)),
        ("What is kept", _statistics(outputs)),
        ("Film strips", _strips(outputs, strips)),
        ("Curves", _curves(outputs)),
        ("Configurations", _configurations(outputs)),
    ]
    text = page(title, [(name, body) for name, body in sections if body])

    def write(partial: str) -> None:
        with open(partial, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)

    atomic_write(path, write)


def page(title: str, sections: Iterable[tuple[str, str]]) -> str:
    """A whole page; the policy in its head has the browser refuse anything from outside."""
    body = "".join(f"<section><h2>{_text(name)}</h2>{text}</section>" for name, text in sections)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{_text(title)}</h1>{body}</body></html>\n"
    )


def _name_apart(outputs: Sequence[Output]) -> None:
    """Runs of one name get their whole paths."""
    names = [output.name for output in outputs]
    for output in outputs:
        if names.count(output.name) > 1:
            output.name = output.folder


# ---- sections; "" where there is nothing to show --------------------------------------------


def _results(outputs: Sequence[Output]) -> str:
    rows = []
    for output in outputs:
        if not output.stats:
            continue
        errors = output.curve("val_epoch", "top1_err")[1]
        rows.append(
            [
                output.name,
                _number(output.final("top1_acc")),
                _number(output.final("top5_acc")),
                _number(100 - errors[-1] if errors else None),
                _number(output.gflops),
                _number(output.params),
            ]
        )
    head = ["run", "test top-1 %", "test top-5 %", "val top-1 %", "GFLOPs / clip", "params (M)"]
    return _table(head, rows)


def _study(outputs: Sequence[Output]) -> str:
    parts = []
    for output in outputs:
        if not output.study:
            continue
        columns = [c for c in NUMBERS if any(row.get(c) is not None for row in output.study)]
        rows = []
        for row in aggregate_seeds(output.study):
            cells = [_number(row[column]) for column in columns]
            if row["seeds"] > 1:
                cells[0] += f" ± {row['top1_std']:.1f}"
            rows.append([row["name"], *cells])
        figure = io.BytesIO()
        plot(output.study, figure)
        parts.append(f"<h3>{_text(output.name)}</h3>")
        parts.append(_image(figure.getvalue(), "png", "accuracy against GFLOPs"))
        parts.append(_table(["row", *(TITLES[column] for column in columns)], rows))
    return "".join(parts)


def _statistics(outputs: Sequence[Output]) -> str:
    rows = []
    for output in outputs:
        for row in output.study:
            if row["scorer"] == "all":
                continue
            bars = "".join(
                f'<i style="height:{100 * share:.0f}%" title="frame {number}: {share:.0%}"></i>'
                for number, share in enumerate(row["frames_kept"])
            )
            width = len(row["tokens_kept"][0])
            most = max(max(line) for line in row["tokens_kept"]) or 1
            cells = "".join(
                f'<i style="background:rgba(59,118,196,{share / most:.2f})"></i>'
                for line in row["tokens_kept"]
                for share in line
            )
            grid = f"grid-template-columns:repeat({width},.5rem)"
            rows.append(
                f'<tr><td>{_text(row["name"])}</td><td><span class="bars">{bars}</span></td>'
                f'<td><span class="map" style="{grid}">{cells}</span></td></tr>'
            )
    if not rows:
        return ""
    head = "<tr><th>row</th><th>how often each frame</th><th>and each place in a frame</th></tr>"
    body = f"<thead>{head}</thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="wide"><table>{body}</table></div>'


def _curves(outputs: Sequence[Output]) -> str:
    from matplotlib.figure import Figure

    wanted = [
        ("train_epoch", "loss", "training loss"),
        ("train_epoch", "top1_err", "training top-1 error (%)"),
        ("val_epoch", "top1_err", "validation top-1 error (%)"),
        ("train_epoch", "lr", "learning rate"),
        ("train_epoch", "sigma", "sigma"),
    ]
    images = []
    for kind, key, title in wanted:
        lines = [(output.name, *output.curve(kind, key)) for output in outputs]
        lines = [line for line in lines if line[1]]
        if not lines:
            continue
        figure = Figure(figsize=(4.4, 3), layout="constrained")
        axes = figure.subplots()
        for name, epochs, values in lines:
            (line,) = axes.plot(epochs, values, marker="o", markersize=3)
            line.set_label(_plain(name))
        axes.set(title=title, xlabel="epoch")
        for label in axes.legend(fontsize=7).get_texts():
            label.set_parse_math(False)
        images.append(_image(_figure(figure), "svg+xml", title))
    return f'<div class="curves">{"".join(images)}</div>' if images else ""


def _strips(outputs: Sequence[Output], number: int) -> str:
    parts = []
    for output in outputs:
        if not (number and output.checkpoint and output.config.get("STTS.ENABLE")):
            continue
        parts.append(f"<h3>{_text(output.name)}</h3>")
        try:
            parts.append(f'<div class="wide strip">{_strip(output, number)}</div>')
        except (ValueError, OSError, RuntimeError) as error:  # the page is about more than these
            parts.append(f'<p class="note">not drawn: {_text(str(error))}</p>')
    return "".join(parts)


def _strip(output: Output, number: int) -> str:
    """Film strips of the first test videos."""
    from stts_slowfast.annealing import reset
    from stts_slowfast.standalone.checkpointing import load_for_test
    from stts_slowfast.standalone.config import load_config
    from stts_slowfast.standalone.data import ClipDataset
    from stts_slowfast.standalone.model import build_model
    from stts_slowfast.tools.study.evaluate import find_truth, shown_boxes
    from stts_slowfast.tools.visualize import read_clip
    from stts_slowfast.visualization import draw, inspect_clip, make_film_strip_row, predicted

    cfg = config_of(output, load_config)
    videos = ClipDataset(cfg, "test").videos
    model = build_model(cfg)
    load_for_test(cfg, model)
    reset(model)  # of a range of budgets, the high end
    truth, strips = find_truth(cfg), []
    for index in range(min(number, len(videos))):
        path, label = videos[index].path, videos[index].label
        clip = read_clip(cfg, path)
        seen = inspect_clip(cfg, model, clip)
        name = os.path.basename(path)
        title = f"{name}, class {label}: {predicted(seen.probs, None)}"
        marked = sorted(shown_boxes(cfg, truth[name])) if name in truth else ()
        strips.append(make_film_strip_row(cfg, clip, seen, title, marked))
    figure = io.BytesIO()
    draw(strips).savefig(figure, format="png")
    return _image(figure.getvalue(), "png", "what was kept of some test videos")


def config_of(output: Output, load_config):
    """The config in a run's checkpoint, as the standalone runner's; tests that checkpoint."""
    from stts_slowfast.checkpoints import read_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "config.yaml")
        with open(path, "w") as file:
            file.write(read_checkpoint(output.checkpoint)["cfg"])
        return load_config(path, ["TEST.CHECKPOINT_FILE_PATH", output.checkpoint, "NUM_GPUS", 0])


def _configurations(outputs: Sequence[Output]) -> str:
    known = [output for output in outputs if output.config]
    if not known:
        return ""
    if len(known) == 1:
        stts = {key: [value] for key, value in known[0].config.items() if key.startswith("STTS.")}
        return _table(["key", known[0].name], [[key, str(v[0])] for key, v in stts.items()])
    rows = [[key, *map(str, values)] for key, values in config_diff(known).items()]
    note = f"<p>Only keys whose values differ; the baseline is {_text(known[0].name)}.</p>"
    return note + _table(["key", *(output.name for output in known)], rows)


# ---- pieces of HTML -------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    titles = "".join(f"<th>{_text(title)}</th>" for title in head)
    lines = "".join(
        f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _image(content: bytes, kind: str, text: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img alt="{_text(text)}" src="data:image/{kind};base64,{data}">'


def _figure(figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="svg")
    return content.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _plain(text: str) -> str:
    return text.encode(errors="replace").decode().lstrip("_")


def _text(text: str) -> str:
    return html.escape(text.encode(errors="replace").decode())
