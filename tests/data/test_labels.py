import pytest
from datasets import ClassLabel, Dataset, Features, Value

from lightning_peft.data.labels import encode, infer_labels
from lightning_peft.errors import DataError


def rows(values):
    return Dataset.from_dict({"label": values})


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["b", "a", "b"], ("a", "b")),
        (["10", "9", "-1"], ("-1", "9", "10")),
        ([10, 9, 9], ("9", "10")),
        ([1.0, 0.0, 1.0], ("0", "1")),
        ([True, False], ("False", "True")),
        (["1", "1st"], ("1", "1st")),
        (["1", "--3", "-"], ("-", "--3", "1")),
        (["1", "01", "001", "0"], ("0", "001", "01", "1")),
        (["2", "1" * 5000], ("1" * 5000, "2")),
        ([" good", "good ", "bad"], ("bad", "good")),
    ],
)
def test_labels_are_in_ascending_order_numbers_by_value(values, labels):
    assert infer_labels(rows(values), "label", "`f.csv`") == labels
    numbers = encode(rows(values), "label", labels, "`f.csv`")
    assert set(numbers) == set(range(len(labels)))


def test_a_data_set_that_names_its_classes_keeps_their_order():
    features = Features(
        {"label": ClassLabel(names=["neg", "pos", "mixed"]), "text": Value("string")}
    )
    data = Dataset.from_dict({"label": [1, 0], "text": ["a", "b"]}, features=features)
    assert infer_labels(data, "label", "hub") == ("neg", "pos", "mixed")
    assert encode(data, "label", ("pos", "neg", "mixed"), "hub") == [0, 1]
    hidden = Dataset.from_dict({"label": [1, -1], "text": ["a", "b"]}, features=features)
    with pytest.raises(DataError, match="row 2"):
        encode(hidden, "label", ("neg", "pos", "mixed"), "hub")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", "a"], r"two different labels, but all 2 rows of `f.csv` have 'a'"),
        (["a", None, "b"], "missing in row 2"),
        (["a", "b", " "], "missing in row 3"),
        ([0.0, 1.5], "is 1.5 in row 2"),
        ([[1, 0], [1]], r"is \[1, 0\] in row 1"),
        ([f"text {i}" for i in range(50)], "50 different values in 50 rows"),
    ],
)
def test_a_column_that_holds_no_classes_is_refused(values, message):
    with pytest.raises(DataError, match=message) as caught:
        infer_labels(rows(values), "label", "`f.csv`")
    assert "\n" not in str(caught.value)


def test_a_label_outside_the_set_is_told_by_row_with_near_misses():
    with pytest.raises(
        DataError,
        match=r"must be one of bad, good, but is 'goood' in row 2 of `f.csv`. Did you mean `good`",
    ):
        encode(rows(["good", "goood"]), "label", ("bad", "good"), "`f.csv`")
