import pytest

from stts_slowfast.configfiles.values import read_value, suggest_key


@pytest.mark.parametrize(
    ("value", "default", "read"),
    [
        ("0", 0.1, 0.0),
        (3, 0.5, 3.0),
        ("(1, 2)", [0], [1, 2]),
        ("0.5", "", "0.5"),
        (None, "", ""),
        ("False", True, False),
    ],
)
def test_values_are_read_as_the_keys_type(value, default, read):
    found = read_value("STTS.KEY", value, default)
    assert found == read and type(found) is type(read)


@pytest.mark.parametrize(
    ("value", "default", "told"),
    [
        (0.5, [0.9], r"STTS.KEY in a.yaml is 0.5: it takes a list, such as \[0.9\]"),
        ("yes", True, "is 'yes': it takes True or False, such as True"),
        (True, 1, "is True: it takes a whole number, such as 1"),
        (None, 1.0, "is None: it takes a number, such as 1.0"),
    ],
)
def test_values_of_another_type_are_refused_with_an_example(value, default, told):
    with pytest.raises(ValueError, match=told):
        read_value("STTS.KEY", value, default, " in a.yaml")


def test_optional_keys_may_be_none():
    assert read_value("KEY", "None", None, optional=float) is None
    with pytest.raises(ValueError, match="takes a number or None"):
        read_value("KEY", "much", None, optional=float)


def test_the_nearest_key_is_one_of_the_same_node_if_it_can_be():
    known = ["STTS.TIME.KEEP", "STTS.SPACE.KEEP", "MVIT.DEPTH"]
    assert suggest_key("STTS.SPACE.KEPE", known) == "did you mean STTS.SPACE.KEEP?"
    assert suggest_key("STTS.KEEP", known).startswith("the nearest known key is STTS.")
