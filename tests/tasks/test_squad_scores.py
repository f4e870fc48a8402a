import warnings

import pytest
from torchmetrics.text import SQuAD

from lightning_peft.tasks.squad_scores import AnswerScore, exact_match, f1, normalised_answer

PAIRS = [
    ("the Cat sat", ["a cat sat!"]),
    ("cat", ["the cat sat", "a dog"]),
    ("nothing alike", ["an apple"]),
    ("New  York, N.Y.", ["new york", "New York NY"]),
    ("cat cat", ["cat"]),
    ("Zoë's café", ["zoë's café"]),
    ("伊斯坦布尔", ["伊斯坦布尔"]),
]


def test_scores_are_those_of_torchmetrics():
    official = SQuAD()
    scores = {name: AnswerScore(name) for name in ("exact_match", "f1")}
    for i, (text, answers) in enumerate(PAIRS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            official.update(
                {"prediction_text": text, "id": str(i)},
                {"answers": {"text": answers, "answer_start": [0] * len(answers)}, "id": str(i)},
            )
        for score in scores.values():
            score.update([text], [answers])
    for name, value in official.compute().items():
        assert scores[name].compute().item() * 100 == pytest.approx(value.item())


def test_no_answer_asks_for_an_empty_prediction():
    assert exact_match("", []) == f1("", []) == 1
    assert exact_match("Rome", []) == f1("Rome", []) == 0
    assert exact_match("", ["Rome"]) == f1("", ["Rome"]) == 0
    assert exact_match("the", ["a"]) == f1("the", ["a"]) == 1


def test_articles_and_punctuation_do_not_count():
    assert normalised_answer("The U.S.A.'s  an-cient\tAnthem") == "usas ancient anthem"


def test_a_metric_starts_anew_and_adds_over_batches():
    metric = AnswerScore("f1")
    metric.update(["a b"], [["b c"]])
    assert metric.compute() == pytest.approx(2 / 3)
    metric.reset()
    metric.update(["Rome", "x"], [["Rome"], ["y"]])
    assert metric.compute() == 0.5
