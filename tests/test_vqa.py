"""VQA accuracy against what the official script and lmms-eval's VQAv2 task told of the same answers.

data/vqa.json holds their figures: "normalized" is the official script's text of the prediction. A figure is null where
this project means to differ: fewer than four answers, and for "official" also fewer than ten that are all the same.
"""

import json
from pathlib import Path

import pytest

from vl_mtl_lora.metrics.vqa import normalize_answer, vqa_accuracy

CASES = json.loads((Path(__file__).parent / "data" / "vqa.json").read_text(encoding="utf-8"))


def test_normalised_text_equals_the_official_scripts():
    wrong = {case["prediction"]: normalize_answer(case["prediction"]) for case in CASES
             if normalize_answer(case["prediction"]) != case["normalized"]}
    assert not wrong


@pytest.mark.parametrize("rule", ["official", "lenient"])
def test_accuracy_equals_that_of_its_source(rule):
    told = [case for case in CASES if case[rule] is not None]
    assert len(told) > 600 and len({case[rule] for case in told}) > 10
    got = [vqa_accuracy(case["prediction"], case["answers"], rule) for case in told]
    wrong = [(case, accuracy) for case, accuracy in zip(told, got) if accuracy != pytest.approx(case[rule], abs=1e-9)]
    assert not wrong


def test_the_cases_tell_the_rules_apart():
    both = [case for case in CASES if case["official"] is not None and case["official"] != case["lenient"]]
    assert any(len(set(case["answers"])) == 1 for case in both)  # unanimous answers, left as they are
    assert any(len(set(case["answers"])) > 1 and ",," in case["prediction"] for case in both)  # commas in a row
    assert normalize_answer("1,,000", "official") == "1 000" and normalize_answer("1,,000", "lenient") == "1000"


@pytest.mark.parametrize("rule", ["official", "lenient"])
def test_fewer_than_four_answers_are_compared_as_they_are_normalised(rule):
    assert vqa_accuracy("The red.", ["red"], rule) == 1.0 and vqa_accuracy("blue", ["red"], rule) == 0.0
    assert vqa_accuracy("red", ["blue", "Red!"], rule) == 1.0 and vqa_accuracy("red", ["red"] * 3, rule) == 1.0
    assert vqa_accuracy("red", [], rule) == 0.0


def test_four_to_nine_equal_answers_are_normalised_too():
    assert vqa_accuracy("The cat!", ["cat"] * 9) == 1.0 and vqa_accuracy("The cat!", ["cat"] * 10) == 0.0
    assert vqa_accuracy("cat", ["Cat"] * 4) == 1.0
