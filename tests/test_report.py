"""What people look at: numbers in the right cells, every sample with both answers, nothing from the network."""

import io
import json
import re

import pytest
from PIL import Image

from vl_mtl_lora.anatomy import Anatomy, Layer
from vl_mtl_lora.gallery import Example, Found, Said, choose, confusion, picture_url
from vl_mtl_lora.report import (
    arm_lines,
    arm_table,
    html_report,
    loss_curves,
    markdown_report,
    metric_rows,
    text_table,
    write_report,
)

RESULTS = {
    "tasks": {"vqa": {"zero_shot": {"accuracy": 12.34}, "adapted": {"accuracy": 87.65}, "samples": 1234,
                      "n": {"accuracy": 1234}, "interval": {"zero_shot": {"accuracy": [10.0, 14.0]},
                                                            "adapted": {"accuracy": [86.0, 89.0]},
                                                            "change": {"accuracy": [73.0, 77.0]}},
                      "groups": [{"by": "answer_type", "value": "yes/no", "n": 40, "zero_shot": 50.0, "adapted": 75.0,
                                  "change": [20.0, 30.0]}], "notes": ["vqa: by the official VQA rule"]},
              "pictures": {"zero_shot": {"CIDEr": 9.0, "x_rank": 30.0}, "adapted": {"CIDEr": 8.5, "x_rank": 20.0},
                           "samples": 7, "interval": {"change": {"CIDEr": [-2.0, 1.0], "x_rank": [-12.0, -8.0]}}}},
    "held_out": [{"task": "old <set>", "metric": "accuracy@1", "n": 90, "frozen": 60.0, "interval": [55.0, 65.0],
                  "through": {"vqa": {"figure": 40.0, "change": [-25.0, -15.0]}}}],
    "off_equals_base": {"equal": True, "numbers": 19168}, "seconds": {"training": 61.2},
    "run": {"base": "m", "rank": 8, "modules": 41, "trainable": 1000, "share": 1.5, "steps": 10},
}
ANATOMY = Anatomy(["vqa", "pictures"], [Layer("image", 0, "attn.qkv", "image.0.attn.qkv")], [[0.25, 0.5]],
                  [[[0.5, 0.5], [0.1, 0.9]]], [[0.01, None]], [[1.0, -0.3], [-0.3, 1.0]], {})


@pytest.fixture
def picture():
    stream = io.BytesIO()
    Image.new("RGB", (400, 300), "red").save(stream, "PNG")
    return picture_url(stream.getvalue(), 64)


@pytest.fixture
def examples(picture):
    found = (Found(picture, False), Found(picture, True))
    return [Example("vqa", "largest gains", (picture,), "is <b>it</b> red?", "yes", Said("no|never", False),
                    Said("yes", True)),
            Example("pictures", "at even distances", (picture,), "a cat", "", Said("picture at rank 2", False, found),
                    Said("", True))]


def test_text_table_is_aligned_and_plain():
    lines = text_table(RESULTS).splitlines()
    assert lines[2].split() == ["vqa", "accuracy", "1,234", "12.3", "87.7", "+75.3", "+73.0", "to", "+77.0"]
    assert lines[3].split() == ["pictures", "CIDEr", "7", "9.0", "8.5", "-0.5", "-2.0", "to", "+1.0"]
    assert len({len(line) for line in lines[:-1]}) == 1 and "\x1b" not in "".join(lines)
    assert lines[-1] == "held out: old <set> accuracy@1 60.0 frozen, 40.0 through vqa"


def test_figures_of_one_arm():
    arm = {"tasks": {"vqa": {"metrics": {"accuracy": 51.234}, "interval": {"accuracy": (50.0, 52.5)},
                             "n": {"accuracy": 1234}, "groups": [{"by": "answer_type", "value": "number", "n": 9,
                                                                  "figure": 3.0, "interval": None}]}}}
    assert arm_table(arm).splitlines()[2].split() == ["vqa", "accuracy", "1,234", "51.23", "50.0", "to", "52.5"]
    assert arm_table(arm).splitlines()[3].split() == ["vqa", "answer", "type", "number", "9", "3.00"]
    assert arm_lines(arm) == "vqa\taccuracy\t51.23\t50.00\t52.50\t1234"


def test_a_change_counts_as_better_only_where_its_interval_says_so():
    assert [(row.metric, row.better) for row in metric_rows(RESULTS)] == [
        ("accuracy", 1), ("CIDEr", 0), ("x_rank", 1)]  # a lower rank is better


def test_markdown_escapes_cells(examples):
    text = markdown_report(RESULTS, examples)
    assert "| vqa | accuracy | 1,234 | 12.3 | 87.7 | +75.3 | +73.0 to +77.0 |" in text
    assert "| vqa | largest gains | is <b>it</b> red? | yes | ✗ no\\|never | ✓ yes |" in text
    assert "| training | 61 |" in text and "60.0 frozen, 40.0 through vqa (change -25.0 to -15.0)" in text


def test_html_is_one_file_that_escapes_what_it_shows(examples):
    log = [{"step": s, "loss/vqa": 2.0 / s, "loss/total": 1.0} for s in (1, 2, 4)]
    page = html_report(RESULTS, examples, log, {"vqa": (["yes", "no"], [[5, 2], [0, 3]])}, ANATOMY)
    assert "is &lt;b&gt;it&lt;/b&gt; red?" in page and "<b>it</b>" not in page and "old &lt;set&gt;" in page
    assert not re.search(r"(src|href)=[\"']?(http|//)|<script|@import|url\(", page)
    assert page.count("data:image/webp;base64,") == 4 and "alt=\"Test picture of vqa" in page
    assert page.count("<img") == len(re.findall(r"<img[^>]* alt=\"[^\"]+\"", page))
    assert re.findall(r"<img class=\"(right)?\" alt=\"zero-shot, rank (\d): the (\w+) picture", page) == [
        ("right", "2", "right")]
    assert "2.000 at step 1, 0.500 at step 4" in page and "total" not in loss_curves(log)
    assert re.search(r"class=\"n up\">\+75.3<small>\+73.0 to \+77.0", page) and "class=\"n \">-0.5" in page
    assert "40.0<small>-25.0 to -15.0" in page and "answer type: yes/no" in page
    assert "19,168 numbers" in page and "by the official VQA rule" in page
    assert page.count("role='img'") == page.count("<svg class='drawing'") == 6  # curves, confusion, adapters


def test_curves_need_two_points():
    assert loss_curves([]) == "" and loss_curves([{"step": 1, "loss/vqa": 1.0}]) == ""


def test_files(tmp_path, examples):
    write_report(tmp_path / "r", RESULTS, examples, [], {}, None)
    assert json.loads((tmp_path / "r" / "results.json").read_text()) == RESULTS
    assert (tmp_path / "r" / "report.md").stat().st_size and (tmp_path / "r" / "report.html").stat().st_size
    assert len(list((tmp_path / "r").iterdir())) == 3  # nothing half done is left


def test_gains_come_first_then_losses_then_no_choice_and_none_twice():
    change = [0.0, 1.0, -0.5, 0.2, 1.0, 0.0, -1.0, 0.0]
    tells = [(f"question {i}", f"picture {i}") for i in range(8)]
    assert choose(change, tells, 2) == [("largest gains", 1), ("largest gains", 4), ("largest losses", 6),
                                        ("largest losses", 2)]  # 2 and 6 are those at even distances too
    tells[4] = ("another", "picture 1")  # the picture that is shown already
    assert choose(change, tells, 2)[:2] == [("largest gains", 1), ("largest gains", 3)]
    assert choose([0.0] * 9, [(i,) for i in range(9)], 3) == [("at even distances", i) for i in (1, 4, 7)]


def test_confusion_counts_and_gathers_the_rarest():
    labels, counts = confusion([("a", "a"), ("a", "b"), ("b", "b"), ("a", "a")])
    assert labels == ["a", "b"] and counts == [[2, 1], [0, 1]]
    pairs = [(f"l{i}", f"l{i}") for i in range(14) for _ in range(3)] + [("rare", "l0"), ("rarer", "rare")]
    labels, counts = confusion(pairs)
    assert len(labels) == 15 and labels[-1] == "others" and counts[-1][0] == 1 and counts[-1][-1] == 1
    assert sum(map(sum, counts)) == len(pairs)
