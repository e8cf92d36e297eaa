"""What people look at: numbers in the right cells, every sample with both answers, nothing from the network."""

import io
import json
import re

import pytest
from PIL import Image

from vl_mtl_lora.report import Example, html_report, loss_curves, markdown_report, text_table, write_report

RESULTS = {
    "tasks": {"vqa": {"zero_shot": {"accuracy": 12.34}, "adapted": {"accuracy": 87.65}, "samples": 1234},
              "pictures": {"zero_shot": {"CIDEr": 9.0}, "adapted": {"CIDEr": 8.5}, "samples": 7}},
    "caption_tokenizer": "words", "seconds": {"training": 61.2},
    "run": {"base": "m", "rank": 8, "modules": 41, "trainable": 1000, "share": 1.5, "steps": 10},
}


@pytest.fixture
def examples():
    stream = io.BytesIO()
    Image.new("RGB", (400, 300), "red").save(stream, "PNG")
    return [Example("vqa", (stream.getvalue(),), "is <b>it</b> red?", "yes", ("no|never", False), ("yes", True))]


def test_text_table_is_aligned_and_plain():
    lines = text_table(RESULTS).splitlines()
    assert lines[2].split() == ["vqa", "accuracy", "12.3", "87.7", "+75.3"] and lines[3].split()[-1] == "-0.5"
    assert len({len(line) for line in lines}) == 1 and "\x1b" not in "".join(lines)


def test_markdown_escapes_cells(examples):
    text = markdown_report(RESULTS, examples)
    assert "| vqa | accuracy | 12.3 | 87.7 | +75.3 |" in text
    assert "| vqa | is <b>it</b> red? | yes | ✗ no\\|never | ✓ yes |" in text and "| training | 61 |" in text


def test_html_is_one_file_that_escapes_what_it_shows(examples):
    log = [{"step": s, "loss/vqa": 2.0 / s, "loss/total": 1.0} for s in (1, 2, 4)]
    page = html_report(RESULTS, examples, log)
    assert "is &lt;b&gt;it&lt;/b&gt; red?" in page and "<b>it</b>" not in page
    assert not re.search(r"(src|href)=[\"']?(http|//)|<script|@import", page)
    assert page.count("data:image/png;base64,") == 1 and "alt=\"Test picture of vqa" in page
    assert "2.000 at step 1, 0.500 at step 4" in page and "total" not in loss_curves(log)
    assert "class=\"n up\">+75.3" in page and "class=\"n down\">-0.5" in page


def test_curves_need_two_points():
    assert loss_curves([]) == "" and loss_curves([{"step": 1, "loss/vqa": 1.0}]) == ""


def test_files(tmp_path, examples):
    write_report(tmp_path / "r", RESULTS, examples, [])
    assert json.loads((tmp_path / "r" / "results.json").read_text()) == RESULTS
    assert (tmp_path / "r" / "report.md").stat().st_size and (tmp_path / "r" / "report.html").stat().st_size
