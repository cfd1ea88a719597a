"""Tables of single tokens, from the reports that scripts in this folder write."""

import statistics

from stts_slowfast.tools.markdown import markdown_table


def train_tokens(reports: list[dict]) -> str:
    """Top-1 of each seed in ``train_tokens.py``, by kind, model and scorer."""
    rows = reports[0]["rows"]
    budgets = ("1", "0.25", "0.12")
    head = ["kind", "model", "tokens", "all", "25%", "12%"]
    names = {"videomae": "VideoMAE", "vjepa2": "V-JEPA 2"}
    lines = []
    for key, group in grouped(rows, "kind", "model", "scorer").items():
        cells = [", ".join(f"{row[b]:.1f}" for row in group if b in row) for b in budgets]
        lines.append([names.get(each, each) for each in key] + cells)
    return markdown_table(head, lines)


def tokens(reports: list[dict]) -> str:
    """Speed of single tokens, of ``tokens.py``."""
    rows = reports[0]["rows"]
    head = ["model", "mode", "GFLOPs, all", "selected", "ideal", "measured", "share"]
    lines = [
        [row["model"], row["mode"], *(f"{count:.1f}" for count in row["gflops"])]
        + [f"{row['ideal']:.2f}", f"{row['ratio']:.2f}", f"{row['ratio'] / row['ideal']:.0%}"]
        for row in rows
    ]
    return markdown_table(head, lines)


def features(reports: list[dict]) -> str:
    """Centred cosines of ``real_features.py``, by scorer and share of tokens."""
    rows = reports[0]["rows"]
    budgets = sorted({row["keep"] for row in rows if row["keep"] < 1}, reverse=True)
    frames = next(row for row in rows if row["keep"] == 1)
    lines = [["all tokens", *[f"{frames['features_cosine']:.3f}"] * len(budgets)]]
    for (scorer,), group in grouped(rows, "scorer").items():
        if scorer != "all tokens":
            found = [[row["features_cosine"] for row in group if row["keep"] == k] for k in budgets]
            lines.append([scorer, *(spread(each) for each in found)])
    lines[1:] = sorted(lines[1:], key=lambda line: line[2], reverse=True)
    return markdown_table(["scorer", *(f"{budget:.3g}" for budget in budgets)], lines)


def adapted(reports: list[dict]) -> str:
    """Agreement with all tokens before and after ``adapt``, by budget: top-1 of a classifier, of
    which each seed is shown, else the centred cosine."""
    rows = [
        {"kind": "", **row, "share": float(row["budget"].split()[-1])} for row in reports[0]["rows"]
    ]
    classes = rows[0]["top1_agreement"] is not None
    scorers = list(dict.fromkeys(row["scorer"] for row in rows))
    head = ["kind", "kept"] if classes else ["kept"]
    head += [f"{scorer}, {when}" for scorer in scorers for when in ("before", "after")]
    lines = []
    rows.sort(key=lambda row: (row["kind"], -row["share"]))
    for (kind, share), group in grouped(rows, "kind", "share").items():
        line = [kind, f"{share:.0%}"] if classes else [f"{share:.3g}"]
        parts = grouped(group, "scorer", "when")
        for scorer in scorers:
            for when in ("before", "after"):
                part = parts[scorer, when]
                agreement = ", ".join(f"{row['top1_agreement'] or 0:.1f}" for row in part)
                cosines = spread([row["features_cosine"] for row in part])
                line.append(agreement if classes else cosines)
        lines.append(line)
    return markdown_table(head, lines)


def spread(values: list[float]) -> str:
    """The mean with the range."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def grouped(rows: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """The rows by their values of ``keys``, in the order of the first of each."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


# By the file of their results.
LAYOUTS = {
    "train_tokens.json": train_tokens,
    "tokens.json": tokens,
    "real_features.json": features,
    "real_adapt.json": adapted,
    "adapt.json": adapted,
}
