"""Which class a name is: by the config, by number, by order; and what is refused."""

from pathlib import Path

import pytest
from compress.calibration.labels import class_names, class_numbers
from compress.errors import SourceError

CONFIG = {"id2label": {"0": "cat", "1": "dog", "2": "bird"}, "label2id": {"cat": 0, "dog": 1, "bird": 2}}
PLACE = Path("images")


def test_names_of_classes_come_from_the_config():
    assert class_names(CONFIG) == ["cat", "dog", "bird"]
    assert class_names({"id2label": {1: "b", 0: "a"}}) == ["a", "b"]
    assert class_names({"num_labels": 3}) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert len(class_names({})) == 2


@pytest.mark.parametrize("config", [CONFIG, {"id2label": CONFIG["id2label"]}])
def test_known_names(config):
    found = class_numbers(["bird", "cat"], config, PLACE)
    assert found.numbers == {"bird": 2, "cat": 0} and not found.note


def test_numbers_are_classes():
    assert class_numbers(["2", "0"], CONFIG, PLACE).numbers == {"2": 2, "0": 0}
    for number in ("3", "-1"):
        with pytest.raises(SourceError, match=rf"images: the label {number} is out of range; .* 3 classes"):
            class_numbers(["0", number], CONFIG, PLACE)


def test_sorted_order_where_no_name_is_known_and_the_count_fits():
    found = class_numbers(["n03", "n01", "n02"], CONFIG, PLACE)
    assert found.numbers == {"n01": 0, "n02": 1, "n03": 2}
    assert "sorted order is taken" in found.note and "images" in found.note


def test_a_wrong_number_of_classes_is_refused():
    with pytest.raises(
        SourceError, match=r"2 classes \('n01', 'n02'\), the model has 3 \('cat', 'dog', 'bird'\)"
    ):
        class_numbers(["n01", "n02"], CONFIG, PLACE)


def test_one_unknown_name_among_known_ones_is_refused():
    with pytest.raises(SourceError, match="'cow' is no class of the model") as found:
        class_numbers(["cat", "cow", "dog"], CONFIG, PLACE)
    assert "'cat', 'dog', 'bird'" in str(found.value.hint)
