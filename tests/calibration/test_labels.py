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


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (["Cat", "DOG", "bird"], {"Cat": 0, "DOG": 1, "bird": 2}),
        (["bird_", "golden-retriever", "Tench"], {"bird_": 3, "golden-retriever": 4, "Tench": 5}),
        (["Tinca tinca", "cat"], {"Tinca tinca": 5, "cat": 0}),
        (["tench, Tinca_tinca"], {"tench, Tinca_tinca": 5}),
    ],
)
def test_names_that_differ_a_little(names, numbers):
    """Not by their order: as many names as classes would give each the wrong one."""
    labels = ["cat", "dog", "bird", "bird!", "Golden Retriever", "tench, Tinca tinca"]
    labels = labels[:3] if "Cat" in names else ["cat", "dog", "cow", *labels[3:]]
    found = class_numbers(names, {"id2label": dict(enumerate(labels))}, PLACE)
    assert found.numbers == numbers and "by similar names" in found.note
    assert any(f"{name!r} as {labels[number]!r}" in found.note for name, number in numbers.items())


def test_similar_names_of_two_classes_are_refused():
    config = {"id2label": {0: "crane, bird", 1: "crane, machine", 2: "cow"}}
    with pytest.raises(
        SourceError, match="'Crane' may be any of the classes 'crane, bird', 'crane, machine'"
    ):
        class_numbers(["Crane", "cow"], config, PLACE)


def test_a_few_similar_names_among_others_are_not_taken_by_order():
    with pytest.raises(SourceError, match="'horse', 'pig' are no class of the model"):
        class_numbers(["Cat", "horse", "pig"], CONFIG, PLACE)


def test_one_name_of_two_classes_is_refused():
    twice = {"id2label": {0: "crane", 1: "cow", 2: "crane"}}
    with pytest.raises(
        SourceError, match=r"images: 'crane' is the name of the classes 0 and 2 in config\.json"
    ):
        class_numbers(["crane", "cow"], twice, PLACE)
    assert class_numbers(["cow"], twice, PLACE).numbers == {"cow": 1}
    with pytest.raises(SourceError, match="'cat' is the name of the classes 0 and 1"):
        class_numbers(["cat"], {**CONFIG, "label2id": {"cat": 1}}, PLACE)


@pytest.mark.parametrize(
    ("names", "label2id", "shown"),
    [
        (["cat", "kitty"], {"cat": 0, "kitty": 0}, "'cat' and 'kitty' are both class 0 \\('cat'\\)"),
        (["1", "01"], {}, "'1' and '01' are both class 1 \\('dog'\\)"),
        (["cat", "Cat"], {}, "are both class 0"),
    ],
)
def test_two_names_of_one_class_are_refused(names, label2id, shown):
    with pytest.raises(SourceError, match=shown):
        class_numbers(names, {**CONFIG, "label2id": label2id}, PLACE)


def test_numbers_that_are_names_as_well():
    stars = {"id2label": {number: str(number + 1) for number in range(5)}}
    with pytest.raises(
        SourceError, match=r"'1' is the name of class 0 in config\.json, and may be the number"
    ):
        class_numbers(["1", "2"], stars, PLACE)
    every = [str(number) for number in range(1, 6)]
    assert class_numbers(every, stars, PLACE).numbers == {name: int(name) - 1 for name in every}, (
        "5 is no number"
    )
    with pytest.raises(SourceError, match="'1' is the name of class 0"):
        class_numbers(["0", "1"], stars, PLACE)
    same = {"id2label": {number: str(number) for number in range(3)}}
    assert class_numbers(["2", "1"], same, PLACE).numbers == {"2": 2, "1": 1}


@pytest.mark.parametrize(
    ("value", "shown"), [(3, "'cow' is class 3 by label2id"), (-1, "class -1"), ("x", "no whole")]
)
def test_classes_out_of_range_are_refused(value, shown):
    with pytest.raises(SourceError, match=shown):
        class_numbers(["cat", "cow"], {**CONFIG, "label2id": {"cat": 0, "cow": value}}, PLACE)


@pytest.mark.parametrize("names", [{1: "a", 2: "b"}, {0: "a", 10**12: "b"}, {"x": "a"}, {-1: "a", 0: "b"}])
def test_outputs_that_are_not_counted_from_0_are_refused(names):
    with pytest.raises(SourceError, match=r"config\.json: id2label has"):
        class_names({"id2label": names})


def test_a_number_of_thousands_of_digits_is_a_name():
    with pytest.raises(SourceError, match="no class of the model"):
        class_numbers(["9" * 5000, "cat"], CONFIG, PLACE)
