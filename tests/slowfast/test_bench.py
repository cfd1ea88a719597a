"""SlowFast's own models in ``stts bench``, beside those of this package."""

import json

import pytest
import torch

from stts_slowfast.pyslowfast import bench
from stts_slowfast.tools import cli
from stts_slowfast.tools.bench import spec
from stts_slowfast.tools.bench.published import TABLE

ROWS = {
    "Kinetics/SLOWFAST_8x8_R50": (None, 32),  # the zoo names c2/SLOWFAST_8x8_R50
    "Kinetics/c2/I3D_8x8_R50": (73.5, 8),
    "Kinetics/X3D_M": (76.2, 16),
    "Kinetics/C2D_8x8_R50": (None, 8),
    "Kinetics/MVIT_B_16x4_CONV": (78.4, 16),
    "Kinetics/MVITv2_S_16x4": (81.0, 16),
    "SSv2/MVITv2_S_16x4": (68.2, 16),
}


@pytest.mark.parametrize("name", ROWS)
def test_stock_configs_are_rows(checkout, name):
    top1, frames = ROWS[name]
    path = str(checkout / "configs" / f"{name}.yaml")
    row = spec.BenchSpec(name, path, engine="slowfast")
    model, shapes = spec.build(row, "cpu")
    assert shapes["eval"][1] == frames and row.parameters > 1e6
    assert (row.published and row.published.top1) == top1
    if name == "Kinetics/X3D_M":
        assert shapes["train"][-1] == 224 and shapes["eval"][-1] == 256 and row.views == (10, 3)
        with torch.no_grad():
            assert model.eval()(torch.zeros(1, *shapes["eval"])).shape == (1, 400)


def test_every_published_number_is_of_a_stock_config(checkout):
    for name, results in TABLE.items():
        if "STTS_" not in name:
            path = str(checkout / "configs" / f"{name}.yaml")
            assert bench.read_config(path).TEST.DATASET in results, name


def test_pathways_are_those_of_the_loader(checkout):
    from slowfast.datasets.utils import pack_pathway_output

    cfg = bench.read_config(str(checkout / "configs/Kinetics/SLOWFAST_8x8_R50.yaml"))
    clips = torch.randn(2, 3, 32, 4, 4)
    slow, fast = bench.SingleInput(torch.nn.Identity(), cfg)(clips)
    for item in range(2):
        expected = pack_pathway_output(cfg, clips[item])
        assert torch.equal(slow[item], expected[0]) and torch.equal(fast[item], expected[1])


def test_rows_of_both_kinds_are_measured(checkout, get_cfg, videos, tmp_path, capsys):
    cfg = get_cfg("DATA.PATH_TO_DATA_DIR", str(videos), "DATA.PATH_PREFIX", str(videos))
    path = tmp_path / "tiny.yaml"
    path.write_text(cfg.dump())
    numbers = tmp_path / "numbers.json"
    words = ["bench", f"stock={path}", f"ours={path},STTS.ENABLE=True", "--engine", "slowfast"]
    more = ["--modes", "eval", "--repeats", "1", "--batch-size", "1", "--json", str(numbers)]
    assert cli.main([*words, *more]) == 0
    keys = ",TEST.PRECISION=bfloat16,MODEL.FLOAT32_MATMUL_PRECISION=lowest"
    assert cli.main(["bench", f"{path}{keys}", *words[3:], *more]) == 2
    assert "FLOAT32_MATMUL_PRECISION is 'lowest': use one of '', highest" in capsys.readouterr().err
    rows = json.loads(numbers.read_text())["rows"]
    assert rows[1]["gflops"] < rows[0]["gflops"] and rows[1]["parameters"] > rows[0]["parameters"]
    for what in (["--data", "--batches", "1"], ["--end-to-end"]):
        assert cli.main([*words, *what, "--json", str(numbers)]) == 0
        rows = json.loads(numbers.read_text())
        assert {row["row"] for row in rows} == {"stock", "ours"}
        assert all(row["videos / s"] > 0 for row in rows)
    assert cli.main(["bench", f"{path},NO.SUCH=1", "--engine", "slowfast"]) == 2
    assert "cannot be built by slowfast: " in capsys.readouterr().err
