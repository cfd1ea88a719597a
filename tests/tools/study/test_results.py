"""The plot of a study tells its scorers apart."""

from stts_slowfast.tools.study.results import SCORERS, plot


def line(scorer, trained):
    share = None if scorer == "all" else 0.25
    return {
        **{
            "name": f"{scorer}-{trained}-seed0",
            "dimension": "none" if share is None else "time",
        },
        **{"time": share, "space": None, "scorer": scorer, "trained": trained, "seed": 0},
        **{"top1": 50.0, "top5": 100.0, "gflops": 0.1, "clips_per_s": 1.0, "agreement": None},
        **{"frame_recall": None, "box_recall": None},
    }


def test_every_scorer_has_a_colour_and_what_was_not_fine_tuned_is_hollow(tmp_path):
    names = ("all", *SCORERS, "mine")
    rows = [line(name, trained) for name in names for trained in (False, True)]
    figure = plot(rows, str(tmp_path / "study.png"))
    (axes,) = figure.axes
    drawn = {
        container.get_label(): (container[0].get_color(), container[0].get_markerfacecolor())
        for container in axes.containers
    }
    assert len({colour for colour, _ in drawn.values()}) == len(names)
    for name in names:
        colour, inside = drawn[name]
        assert inside == "white" and drawn[f"{name}, fine-tuned"] == (colour, colour)
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == set(drawn)
