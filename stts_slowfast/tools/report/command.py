"""``stts report``: one HTML page about runs and studies, a file that needs no other."""

import argparse
import base64
import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stts_slowfast.annealing import reset
from stts_slowfast.checkpoints.io import atomic_write, check_output_path
from stts_slowfast.plugins import require
from stts_slowfast.tools.cli import add_force
from stts_slowfast.tools.inspection import draw_test_videos, load_trained_model, stored_config
from stts_slowfast.tools.markdown import format_cell
from stts_slowfast.tools.report.run_log import RunOutput, config_diff, read_output
from stts_slowfast.tools.study.results import plot, summarize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STUDY_COLUMNS = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "top1_agreement": "same class as all tokens %",
    "kl": "KL to all tokens",
    "logits_cosine": "centred cosine of logits",
    "features_cosine": "centred cosine of features",
    "gflops": "GFLOPs / clip",
    "clips_per_s": "clips / s",
    "agreement": "views that agree",
    "frame_recall": "true frames kept",
    "box_recall": "true area kept",
}
# Type and key of the json_stats lines that a curve is drawn from, and its title.
CURVES = (
    ("train_epoch", "loss", "training loss"),
    ("train_epoch", "top1_err", "training top-1 error (%)"),
    ("val_epoch", "top1_err", "validation top-1 error (%)"),
    ("train_epoch", "lr", "learning rate"),
    ("train_epoch", "sigma", "sigma"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``stts report``."""
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="OUTPUT_DIR",
        help="folders of runs, the baseline first, and of studies",
    )
    parser.add_argument(
        "--out", metavar="HTML", help="page to write (default: report.html in the first folder)"
    )
    parser.add_argument("--strips", type=int, default=3, metavar="N", help="test videos to show")
    add_force(parser)


def main(args: argparse.Namespace) -> int:
    """Writes the page.

    Raises:
        ValueError: for a folder without a run, or a page that exists already.
    """
    path = args.out or os.path.join(args.folders[0], "report.html")
    check_output_path(path, args.force, ())
    outputs = [read_output(folder) for folder in args.folders]
    write_report(path, outputs, args.strips)
    print(f"wrote {path}")
    return 0


def write_report(
    path: str, outputs: Sequence[RunOutput], num_strips: int, title: str = "", note: str = ""
) -> None:
    """Writes the page about some runs to ``path``; ``note`` is a sentence below the title."""
    names = [output.name for output in outputs]
    for output in outputs:
        if names.count(output.name) > 1:
            output.name = output.folder
    text = render(
        title=title or f"Token selection: {', '.join(output.name for output in outputs)}",
        note=note,
        results=_results(outputs),
        studies=_studies(outputs),
        coverage=_coverage(outputs),
        strips=_strips(outputs, num_strips) if num_strips else [],
        curves=_curves(outputs),
        configurations=_configurations(outputs),
    )

    def write(partial: str) -> None:
        with open(partial, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)

    atomic_write(path, write)


def render(**sections: Any) -> str:
    """The page ``page.html.jinja`` with its sections; texts are escaped."""
    jinja2 = require("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = format_cell
    return environment.get_template("page.html.jinja").render(sections)


# ---- sections; empty if there is nothing to show --------------------------------------------


def _results(outputs: Sequence[RunOutput]) -> list[list[str | float | None]]:
    rows = []
    for output in outputs:
        if output.stats:
            errors = output.curve("val_epoch", "top1_err")[1]
            validation = 100 - errors[-1] if errors else None
            tests = (output.final("top1_acc"), output.final("top5_acc"))
            rows.append([output.name, *tests, validation, output.gflops, output.params])
    return rows


def _studies(outputs: Sequence[RunOutput]) -> list[dict]:
    studies = []
    for output in outputs:
        if output.study:
            columns, rows = summarize(output.study)
            figure = io.BytesIO()
            plot(output.study, figure)
            studies.append(
                {
                    "name": output.name,
                    "plot": _picture(figure.getvalue(), "png", "accuracy against GFLOPs"),
                    "header": ["row", *(STUDY_COLUMNS[column] for column in columns)],
                    "rows": rows,
                }
            )
    return studies


def _coverage(outputs: Sequence[RunOutput]) -> list[dict]:
    return [
        {"name": row["name"], "frames": row["frames_kept"], "tokens": row["tokens_kept"]}
        for output in outputs
        for row in output.study
        if row["scorer"] != "all"
    ]


def _strips(outputs: Sequence[RunOutput], number: int) -> list[dict]:
    strips = []
    for output in outputs:
        if output.checkpoint and output.config.get("STTS.ENABLE"):
            try:
                cfg = stored_config(output.checkpoint)
                model = load_trained_model(cfg)
                reset(model)  # a range of budgets is drawn at its high end
                figure = draw_test_videos(cfg, model, number)
                picture = _draw(figure, "png", "what was kept of some test videos")
                strips.append({"name": output.name, "picture": picture})
            except (ValueError, OSError, RuntimeError) as error:  # the other sections remain
                strips.append({"name": output.name, "error": str(error)})
    return strips


def _curves(outputs: Sequence[RunOutput]) -> list[dict]:
    figure_module = require("matplotlib.figure")
    pictures = []
    for kind, key, title in CURVES:
        lines = [(output.name, *output.curve(kind, key)) for output in outputs]
        lines = [line for line in lines if line[1]]
        if not lines:
            continue
        figure = figure_module.Figure(figsize=(4.4, 3), layout="constrained")
        axes = figure.subplots()
        for name, epochs, values in lines:
            (line,) = axes.plot(epochs, values, marker="o", markersize=3)
            # Matplotlib takes no surrogates, and hides labels that begin with an underscore.
            line.set_label(name.encode(errors="replace").decode().lstrip("_"))
        axes.set(title=title, xlabel="epoch")
        for label in axes.legend(fontsize=7).get_texts():
            label.set_parse_math(False)
        pictures.append(_draw(figure, "svg", title))
    return pictures


def _configurations(outputs: Sequence[RunOutput]) -> dict:
    known = [output for output in outputs if output.config]
    if not known:
        return {}
    header = ["key", *(output.name for output in known)]
    if len(known) == 1:
        ours = {key: [value] for key, value in known[0].config.items() if key.startswith("STTS.")}
        return {"header": header, "rows": _config_rows(ours)}
    rows = _config_rows(config_diff(known))
    return {"baseline": known[0].name, "header": header, "rows": rows}


def _config_rows(values: dict[str, list]) -> list[list[str]]:
    return [[key, *map(str, row)] for key, row in values.items()]


# ---- pictures -------------------------------------------------------------------------------


def _draw(figure: "Figure", kind: str, alt: str) -> dict[str, str]:
    content = io.BytesIO()
    figure.savefig(content, format=kind)
    return _picture(content.getvalue(), {"svg": "svg+xml"}.get(kind, kind), alt)


def _picture(content: bytes, kind: str, alt: str) -> dict[str, str]:
    """An image as a data URI, and the text instead of it."""
    return {"source": f"data:image/{kind};base64,{base64.b64encode(content).decode()}", "alt": alt}
