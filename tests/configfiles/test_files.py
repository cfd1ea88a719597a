import pytest
import yaml

from stts_slowfast.configfiles.files import CONFIGS, _check_duplicates, find_config, read_yaml
from stts_slowfast.standalone.config import load_config


def write(path, text):
    path.write_text(text)
    return str(path)


def test_configs_are_found_by_name():
    name = "STTS_MVIT_B_16x4_T0_0.9_S4_0.9"
    assert find_config(name) == str(CONFIGS / "Kinetics" / f"{name}.yaml")
    assert find_config(f"SSv2/{name}.yaml") == str(CONFIGS / "SSv2" / f"{name}.yaml")
    assert load_config(name).STTS.TIME.KEEP == [0.875]
    assert load_config(f"SSv2/{name}").TRAIN.DATASET == "ssv2"
    assert load_config(name, ("STTS.SIGMA", 0.5)).STTS.SIGMA == 0.5


def test_a_file_here_comes_before_one_that_comes_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "STTS_MVIT_B_16x4_T0_0.9_S4_0.9", "RNG_SEED: 17")
    assert load_config("STTS_MVIT_B_16x4_T0_0.9_S4_0.9").RNG_SEED == 17


def test_an_unknown_name_says_the_nearest():
    with pytest.raises(FileNotFoundError, match=r"did you mean STTS_SWIN_T_32x2_T0_0\.9\?"):
        load_config("STTS_SWIN_T_32x2_T0_0.99")
    with pytest.raises(
        FileNotFoundError, match=r"config file zzz does not exist, and .* none of that"
    ):
        load_config("zzz")
    with pytest.raises(FileNotFoundError, match=r"config file /x/zzz\.yaml does not exist$"):
        load_config("/x/zzz.yaml")


def test_a_key_given_twice_is_refused_with_both_lines(tmp_path):
    path = write(tmp_path / "a.yaml", "STTS:\n  ENABLE: True\nRNG_SEED: 1\nSTTS:\n  SIGMA: 0.1\n")
    with pytest.raises(ValueError, match=r"STTS is given twice in .*a\.yaml, in lines 1 and 4"):
        load_config(path)
    path = write(tmp_path / "b.yaml", "STTS:\n  SIGMA: 0.1\n  TIME: {KEEP: [1], KEEP: [2]}\n")
    with pytest.raises(ValueError, match=r"STTS\.TIME\.KEEP is given twice .* lines 3 and 3"):
        load_config(path)
    base = write(tmp_path / "c.yaml", f"_BASE_: {path}\n")
    with pytest.raises(ValueError, match=r"twice in .*b\.yaml"):
        load_config(base)


def test_of_a_slowfast_key_given_twice_the_last_counts_and_is_logged(tmp_path, caplog):
    path = write(tmp_path / "a.yaml", "SOLVER:\n  LAYER_DECAY: 0.75\n  LAYER_DECAY: 0.65\n")
    assert load_config(path).SOLVER.LAYER_DECAY == 0.65
    assert "SOLVER.LAYER_DECAY is given twice" in caplog.text and "lines 2 and 3" in caplog.text
    caplog.clear()
    path = write(tmp_path / "b.yaml", "SOLVER: {MAX_EPOCH: 7, MAX_EPOCH: 7}\n")
    assert load_config(path).SOLVER.MAX_EPOCH == 7 and not caplog.text


def test_bases_are_merged(tmp_path):
    write(tmp_path / "base.yaml", "RNG_SEED: 5\nSOLVER: {BASE_LR: 0.3, MAX_EPOCH: 7}\n")
    path = write(tmp_path / "top.yaml", "_BASE_: base.yaml\nSOLVER: {MAX_EPOCH: 9}\n")
    cfg = load_config(path)
    assert (cfg.RNG_SEED, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_EPOCH) == (5, 0.3, 9)


def test_circular_bases_are_refused(tmp_path):
    path = write(tmp_path / "self.yaml", "_BASE_: self.yaml\n")
    with pytest.raises(ValueError, match=r"leads in a circle: .*self\.yaml -> .*self\.yaml"):
        load_config(path)
    write(tmp_path / "x.yaml", "_BASE_: y.yaml\n")
    path = write(tmp_path / "y.yaml", "_BASE_: x.yaml\n")
    with pytest.raises(ValueError, match=r"circle: .*y\.yaml -> .*x\.yaml -> .*y\.yaml"):
        load_config(path)


def test_a_missing_base_is_named_with_who_asks(tmp_path):
    path = write(tmp_path / "top.yaml", "_BASE_: gone.yaml\n")
    with pytest.raises(
        FileNotFoundError, match=r"gone\.yaml does not exist \(asked for by .*top\.yaml\)"
    ):
        load_config(path)


def test_what_lists_hold_is_looked_at_too(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("A:\n- B: {}\n  C: 2\n  B: {}\n")
    with pytest.raises(ValueError, match=r"A\.B is given twice .* lines 2 and 4"):
        read_yaml(str(path))


def test_a_node_that_contains_itself_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("A: 1\nB: &b\n  C: [*b]\n")
    with pytest.raises(ValueError, match=r"a\.yaml: the value in line . contains itself"):
        read_yaml(str(path))


def test_what_many_places_name_is_looked_at_once(tmp_path):
    path = tmp_path / "a.yaml"
    lines = ["A0: &a0 [1]"]
    lines += [f"A{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    path.write_text("\n".join(lines))
    _check_duplicates(yaml.compose(path.read_text()), "")  # ten to the eighth, place by place
