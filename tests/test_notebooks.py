"""The notebooks: each runs from top to bottom in an empty folder and shows what it says; all are without outputs."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# The kernel is a process of its own: it cuts the quickstart's data itself.
FEW_EXAMPLES = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import pytest
from tests.conftest import hide_java
from tests.test_end_to_end import few_examples
few_examples(pytest.MonkeyPatch())
hide_java(pytest.MonkeyPatch())
import torch
torch.set_num_threads(1)  # so little work is not worth two
"""


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Returns a function that runs a notebook with other parameters; it gives what the cells of each tag show."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))

    def call(name, **parameters):
        book = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        first, = [cell for cell in code_cells(book) if "parameters" in cell.metadata.get("tags", [])]
        own = dict(re.findall(r"^(\w+) = (\d+)$", first.source, re.M))
        assert own.keys() == parameters.keys() and first is code_cells(book)[0]
        first.source = FEW_EXAMPLES + "\n".join(f"{key} = {value}" for key, value in parameters.items())
        folder = tmp_path / "empty"
        folder.mkdir()
        NotebookClient(book, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
        assert [path.name for path in folder.iterdir()] == ["runs"]
        assert [path.name for path in (folder / "runs").iterdir()] == [name]
        found = {}
        for cell in code_cells(book):
            for tag in cell.metadata.get("tags", []):
                found.setdefault(tag, []).append("".join(map(shown, cell.outputs)))
        return found
    return call


def shown(output):
    if output.output_type == "stream":
        return output.text if output.name == "stdout" else ""  # what goes to stderr are progress bars
    return output.data.get("text/html", output.data["text/plain"])


def lines_of(table, task):
    """The cells of a printed table's lines of one task."""
    return [re.split(r" {2,}", line) for line in table.splitlines() if line.startswith(f"{task} ")]


def numbers(text):
    return [float(number) for number in re.findall(r"[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?", text.replace(",", ""))]


def test_quickstart(execute):
    found = execute("01_quickstart", STEPS=2)
    table, = found["table"]
    assert table.split("\n")[0].split() == "task metric n zero-shot adapted change 95 % interval".split()
    assert all(lines_of(table, task) for task in ("retrieval", "vqa", "captioning")) and "held out" not in table
    page, = found["report"]
    assert page.startswith("<div><iframe srcdoc=") and "What the adapters learned" in page
    assert found["encode"][0].count("adapted to retrieval") == 4
    assert len(eval(found["generate"][0])) == 2


def test_zero_shot_against_adapted(execute):
    found = execute("02_zero_shot_vs_adapted", STEPS=2, LIMIT=20)
    table, = found["table"]
    assert all(line[2] == "20" for line in lines_of(table, "vqa"))
    assert table.count("held out:") == 2 and "frozen" in table
    page, = found["gallery"]
    assert page.count("class=&quot;found&quot;") == 2 * page.count("&lt;figure&gt;") > 0
    assert "class=&quot;right&quot; alt=" in page and "through captioning" in page and "vqa: test samples" not in page
    assert numbers(found["off"][0])[0] > 1000 and "equal" in found["off"][0]
    off, adapted = numbers(found["fresh"][0])
    assert off < 1e-5 < adapted
    assert re.search(r"zero-shot +alpha 32.0, rank 16 +alpha 4.0, rank 2\n", found["runs"][0])
    assert " ± " in found["runs"][0] and "rank 16" in found["comparison"][0]


def test_own_data(execute):
    found = execute("03_own_data", STEPS=12, FLAGS=60)
    survey, = found["survey"]
    assert "retrieval\n    42 samples" in survey and "faults: 0" in survey and "PIL.Image" in survey
    assert found["inspect"][0].rstrip().endswith("every adapter gets a gradient")
    assert "flags.yaml:25: train.stepz: unknown key; did you mean steps?" in found["mistake"][0]
    table, adapted, merged = (lines_of(found[tag][0], "retrieval") for tag in ("table", "adapted", "merged"))
    assert any(line[3] != line[4] for line in table)  # trained enough to be told from the base
    assert adapted == merged and len(adapted) == len(table)


def test_what_the_adapters_learned(execute):
    found = execute("04_what_the_adapters_learned", STEPS=2)
    assert all(drawing.count("<svg ") == 1 and "--heat:" in drawing for drawing in found["drawing"])
    assert len(found["drawing"]) == 4
    cells = re.findall(r"<title>layer image \S+ and task (\w+): (\S+)</title>", found["drawing"][1])
    assert {float(value) for task, value in cells if task == "reading"} == {0.0} and len(cells) == 4 * 24
    assert [row.split()[0] for row in found["towers"][0].splitlines() if row.endswith("reading")] == ["image", "text"]
    assert len(found["norms"][0].splitlines()) == 2 + 9
    output, update, by_hand, merged = map(float, re.findall(r"  (\S+)$", found["fold"][0], re.M))
    assert output > update > 0 and max(by_hand, merged) < 1e-4
    assert numbers(found["merged"][0])[-1] < 1e-4


def test_every_notebook_is_run_above():
    assert {path.stem for path in NOTEBOOKS} == set(re.findall(r'execute\("(\w+)"', Path(__file__).read_text("utf-8")))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_as_written(path):
    text = path.read_text(encoding="utf-8")
    book = nbformat.reads(text, as_version=4)
    nbformat.validate(book)
    assert text == nbformat.writes(book) + "\n"
    assert book.metadata == {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                             "language_info": {"name": "python"}}
    for cell in code_cells(book):
        assert cell.outputs == [] and cell.execution_count is None
    assert [cell.id for cell in book.cells] == [f"c{i:02d}" for i in range(1, len(book.cells) + 1)]
    assert book.cells[0].cell_type == "markdown" and book.cells[0].source.startswith("# ")
    assert all(set(cell.metadata) <= {"tags"} for cell in book.cells)
