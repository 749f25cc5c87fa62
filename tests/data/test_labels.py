"""What labels are taken for: never another task for a single record, and every record without a label is named."""

import json

import pytest

from deltaw.config import DataConfig
from deltaw.data import read
from deltaw.data.forms import Record
from deltaw.data.labels import are_quantities, class_indices, class_name, class_names, number, quantities
from deltaw.errors import DataError
from deltaw.training.tasks import check_labels, recognised

DECIMALS = ["1.5", "2", "3.25", "4", "0.5", "-1.75", "2e-1"]


def records(labels):
    return [Record("labelled", "a text", None, f"data.csv:{i + 2}", label=label) for i, label in enumerate(labels)]


def csv(path, labels):
    path.write_text("text,label\n" + "".join(f'a text,"{label}"\n' for label in labels))
    return path


@pytest.mark.parametrize(
    "cell",
    [
        "nan",
        "NaN",
        "NAN",
        "inf",
        "-inf",
        "Infinity",
        "None",
        "null",
        "NULL",
        "<NA>",
        "n/a",
        "NA",
        "none",
        "x",
        "1,5",
        "1_0",
    ],
)
def test_one_cell_among_decimals_makes_no_classes_of_them(tmp_path, cell):
    """A nan among 29 decimals made a problem of 12 classes."""
    path = csv(tmp_path / "data.csv", [*DECIMALS, cell, *DECIMALS])
    for task in ("auto", "regression"):
        config = DataConfig(task=task)
        with pytest.raises(DataError, match=rf"data\.csv:{len(DECIMALS) + 2}: "):
            data = recognised(config, read(path, config), None)
            check_labels(data, [read(path, config)])


def test_an_empty_cell_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data\.csv:4: field 'label'"):
        read(csv(tmp_path / "data.csv", ["1.5", "2.5", "", "3.5"]), DataConfig())


@pytest.mark.parametrize("cell", ["nan", "NaN", "None", "null", "<NA>"])
def test_a_cell_without_value_is_no_class(cell):
    for others in (["red", "blue"], ["0", "1"]):
        with pytest.raises(DataError, match=r"data\.csv:4: .* stands for no label(.|\n)*name all classes with labels"):
            class_names(records([*others, cell]), "data.csv")
    assert class_indices(records(["red", cell]), ["red", cell], "data.csv") == [0, 1]  # where it is named as a class


def test_none_is_a_class_among_words_and_none_among_numbers():
    assert class_names(records(["anger", "none", "joy", "NA"])) == ["NA", "anger", "joy", "none"]
    assert class_names(records(["+", "-", "?"])) == ["+", "-", "?"]
    for cell in (
        "none",
        "?",
        "-",
        "--",
        "n/a",
        ".",
        "_",
        "\u2014",
        "\u2013",
        "\u200b",
        "N.A.",
        "nil",
        "\\N",
        "(blank)",
        "missing",
    ):
        with pytest.raises(DataError, match="stands for no label"):
            class_names(records(["0", "1", cell]))


@pytest.mark.parametrize(
    "cell",
    ["#DIV/0!", "#VALUE!", "#REF!", "#NUM!", "#NAME?", "#N/A", "#NULL!", "1e400", "-1e999", "-nan", "+nan", "nan(ind)", "-inf",
     "1.#QNAN", "-1.#IND", "1.#INF"],
)  # fmt: skip
def test_what_a_program_writes_for_a_number_that_is_none_is_no_class_among_numbers(cell):
    """It became a class beside the numbers' own."""
    with pytest.raises(DataError, match=r"data\.csv:4: .* stands for no label"):
        class_names(records(["0", "1", cell]), "data.csv")


def test_classes_of_other_writings_are_classes():
    for labels in (
        ["0", "1", "other"],
        ["1", "2", "\U0001f600"],
        ["1", "2", "3+"],
        ["#nlp", "#vision"],
        ["nano", "info"],
        ["\u597d", "1"],
    ):
        assert class_names(records(labels)) == sorted(labels)


@pytest.mark.parametrize(
    ("labels", "quantity"),
    [
        (["1", "2", "3"], False), ([1, 2.0, 3], False), (["1", "2.5"], True), ([1, 2.5], True), (["1.0", "2.0"], False),
        ([True, False], False), (["007", "7"], False), (["red", "1"], False), (["1e3", "2"], False), (["0.1", "1e-3"], True),
        (["1.5x", "2"], False), ([0.0, 1.0], False), (["-0.5", "+0.5"], True),
    ],
)  # fmt: skip
def test_quantities_are_numbers_that_are_not_all_whole(labels, quantity):
    assert are_quantities(records(labels)) is quantity


def test_numbers_with_commas_are_refused_and_words_with_commas_are_names():
    for labels in (["1,5", "2,5", "3,0"], ["1,000", "2", "3"], ["0.5", "1,5"]):
        with pytest.raises(DataError, match=r"has a comma; write 1\.5 for one and a half"):
            are_quantities(records(labels), "data.csv")
    with pytest.raises(DataError, match="'1,5' is no number"):
        quantities(records(["0.5", "1,5"]), "data.csv")
    assert not are_quantities(records(["1,5", "red", "blue"]))


def test_truth_values_are_classes_and_no_quantities():
    assert class_names(records([True, False, 1])) == ["0", "1"]
    with pytest.raises(DataError, match="True is no number, and others are decimals"):
        are_quantities(records([0.5, True]))


def test_every_bad_record_is_named_in_one_error():
    with pytest.raises(DataError) as error:
        are_quantities(records(["0.5", "nan", "1.5", "high", "inf"]), "data.csv")
    assert [n in str(error.value) for n in ("csv:2:", "csv:3:", "csv:4:", "csv:5:", "csv:6:")] == [
        False,
        True,
        False,
        True,
        True,
    ]


def test_a_classs_name_is_its_label_as_text():
    for label, name in [
        (1, "1"),
        (1.0, "1"),
        ("1", "1"),
        ("1.0", "1"),
        (" a ", "a"),
        (True, "1"),
        ("007", "007"),
        ("1.5", "1.5"),
    ]:
        assert class_name(label) == name
    assert class_indices(records(["1.0", 2, "1"]), ["1", "2.0"], "here") == [0, 1, 0]
    assert number("1_0") is None and number(" 1.5 ") == 1.5 and number(10**400) is None


def test_explicit_classes_may_be_decimals_but_not_missing(tmp_path):
    config = DataConfig(task="classification")
    assert recognised(config, read(csv(tmp_path / "a.csv", ["1.5", "2.5", "2.0-beta"]), config), None).labels == [
        "1.5", "2.0-beta", "2.5",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"b\.csv:4: 'nan' stands for no label"):
        recognised(config, read(csv(tmp_path / "b.csv", ["1.5", "2.5", "nan"]), config), None)


@pytest.mark.parametrize("unlabelled", [1, 25])
def test_records_without_a_label_do_not_make_texts_of_the_others(tmp_path, unlabelled):
    """Twenty null labels at the beginning made it a text to learn, silently."""
    rows = [{"text": "a", "label": None}] * unlabelled + [{"text": "a", "label": n % 2} for n in range(6)]
    path = tmp_path / "data.jsonl"
    for name in (None, "label"):  # null, and not there at all
        path.write_text(
            "".join(json.dumps({k: v for k, v in row.items() if k != name or v is not None}) + "\n" for row in rows)
        )
        with pytest.raises(
            DataError, match=rf"{unlabelled} of {unlabelled + 6} records cannot be used(.|\n)*data\.jsonl:1: "
        ):
            read(path, DataConfig())
    assert read(path, DataConfig(task="causal")).form == "text"
    path.write_text(json.dumps({"text": "a", "label": None}) + "\n")
    with pytest.raises(DataError, match="field 'label' is null; fill it in, leave the record out, or set task: causal"):
        read(path, DataConfig())


def test_not_a_number_in_json_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a", "label": 1.5}\n{"text": "a", "label": NaN}\n{"text": "a", "label": -Infinity}\n')
    with pytest.raises(
        DataError, match=r"data\.jsonl:2: field 'label' must be(.|\n)*data\.jsonl:3: field 'label' must be"
    ):
        read(path, DataConfig())
