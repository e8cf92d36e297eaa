"""Drawings as what a reader, a screen reader and an XML parser make of them."""

import xml.etree.ElementTree as ET

import pytest

from vl_mtl_lora.drawings import curves, heat_map, loss_curves, mixture_bars

ROWS, GROUPS, COLUMNS = ["0 attn.qkv", "11 attn.qkv", "0 mlp.in"], ["image", "image", "text"], ["vqa", "cap", "ret"]
VALUES = [[0.1, 0.25, 0.0], [0.9, 0.3, None], [0.5, float("nan"), 0.75]]
HOSTILE = "<script>alert('x')</script> & \"q\""


def parsed(drawing):
    tree = ET.fromstring(drawing)
    assert tree.tag == "svg" and tree.get("role") == "img" and tree.get("aria-label")
    return tree


def of_class(tree, name):
    return [element for element in tree.iter() if element.get("class") == name]


def texts(tree):
    return ["".join(element.itertext()) for element in tree.iter("text")]


def opacity(cell):
    return float(cell.get("fill-opacity"))


def test_heat_map_shows_every_value():
    tree = parsed(heat_map(ROWS, COLUMNS, VALUES, "Distance", groups=GROUPS, axes=("layer", "task")))
    cells = of_class(tree, "cell")
    assert [cell.find("title").text for cell in cells][3] == "layer image 11 attn.qkv and task vqa: 0.90"
    assert [text.text for text in of_class(tree, "value")] == ["0.10", "0.25", "0.00", "0.90", "0.30", "0.50", "0.75"]
    assert len(cells) == 7 and len(of_class(tree, "empty")) == 2 and "no value" in texts(tree)
    assert [text.text for text in of_class(tree, "group")] == ["image", "text"]
    assert [text.text for text in of_class(tree, "row")] == ROWS
    assert [text.text for text in of_class(tree, "column")] == COLUMNS * 2  # over each group
    assert sorted(map(opacity, cells)) == [opacity(cells[i]) for i in (2, 0, 1, 4, 5, 6, 3)]  # as the values
    peak, = of_class(tree, "peak")
    assert [peak.get(k) for k in "xy"] == [cells[3].get(k) for k in "xy"]
    assert tree.get("aria-label") == "Distance: highest is 0.90 for layer image 11 attn.qkv and task vqa"


def test_cells_do_not_overlap_and_lie_inside():
    for rows, columns in ((3, 3), (100, 5), (30, 40), (1, 1)):
        tree = parsed(heat_map([f"row {i}" for i in range(rows)], [f"a long name {i}" for i in range(columns)],
                               [[i + j for j in range(columns)] for i in range(rows)], "x", "d"))
        _, _, width, height = map(float, tree.get("viewBox").split())
        cells = of_class(tree, "cell")
        boxes = [[float(cell.get(k)) for k in ("x", "y", "width", "height")] for cell in cells]
        assert len(boxes) == len({(x, y) for x, y, *_ in boxes}) == rows * columns
        assert all(w >= 12 and h >= 12 and x + w <= width and y + h <= height for x, y, w, h in boxes)
        xs, ys = sorted({x for x, *_ in boxes}), sorted({y for _, y, *_ in boxes})
        for starts, size in ((xs, boxes[0][2]), (ys, boxes[0][3])):
            assert all(b - a >= size for a, b in zip(starts, starts[1:]))


def test_negative_values_have_a_hue_of_their_own_and_the_diagonal_is_no_finding():
    values = [[1, -0.8, 0.1], [-0.8, 1, 0.4], [0.1, 0.4, 1]]
    tree = parsed(heat_map(COLUMNS, COLUMNS, values, "Similarity", limits=(-1, 1), off_diagonal=True))
    cells = of_class(tree, "cell")
    assert ["--cold" in cell.get("style") for cell in cells] == [value < 0 for row in values for value in row]
    assert opacity(cells[2]) < opacity(cells[5]) < opacity(cells[1]) < opacity(cells[0])
    assert tree.get("aria-label") == "Similarity: highest is 0.40 for cap and ret; lowest is -0.80 for vqa and cap"
    assert {"-1.00", "1.00"} <= set(texts(tree))


def test_confusions_have_whole_numbers():
    tree = parsed(heat_map(["yes", "no"], ["yes", "no"], [[12, 3], [4, 7]], "Answers", "d", axes=("truth", "answer"),
                           off_diagonal=True))
    assert [text.text for text in of_class(tree, "value")] == ["12", "3", "4", "7"]
    assert tree.get("aria-label") == "Answers: highest is 4 for truth no and answer yes"


def test_many_columns_leave_the_numbers_to_tooltips():
    names = [str(i) for i in range(30)]
    tree = parsed(heat_map(names, names, [[i * 30 + j for j in range(30)] for i in range(30)], "x", "d"))
    assert not of_class(tree, "value") and of_class(tree, "cell")[31].find("title").text == "1 and 1: 31"


@pytest.mark.parametrize("values, finding", [([[0.0, 0.0]], "0.00 everywhere"), ([[None, None]], "no values"),
                                             ([[0.0, 5e-324]], "highest is 0.00 for r and b")])
def test_values_without_a_range(values, finding):
    assert parsed(heat_map(["r"], ["a", "b"], values, "x")).get("aria-label") == f"x: {finding}"


def test_nothing_to_draw():
    assert heat_map([], ["a"], [], "x") == mixture_bars([], ["a"], [], "x") == curves({}, "x", axes=("x", "y")) == ""
    assert loss_curves([]) == ""


def test_bars_have_the_lengths_of_their_shares():
    weights = [[[0.5, 0.25, 0.25], [0.1, 0.9, 0.0]]]
    tree = parsed(mixture_bars(["0 mlp.in"], ["vqa", "cap"], weights, "Mixtures", groups=["text"]))
    bars = of_class(tree, "bar")
    assert [bar.find("title").text for bar in bars] == ["text 0 mlp.in and vqa: 0.50, 0.25, 0.25",
                                                        "text 0 mlp.in and cap: 0.10, 0.90, 0.00"]
    for bar, shares in zip(bars, weights[0]):
        lengths = [float(part.get("width")) for part in bar.iter("rect")]
        assert lengths == pytest.approx([share * sum(lengths) for share in shares], abs=0.2)
        starts = [float(part.get("x")) for part in bar.iter("rect")]
        assert starts[1] == pytest.approx(starts[0] + lengths[0], abs=0.2)
    assert tree.get("aria-label") == ("Mixtures: the largest share is 0.90, of up-projection 2, for text 0 mlp.in and "
                                      "cap")


def test_names_from_users_are_escaped():
    tile = heat_map([HOSTILE], [HOSTILE], [[1.0]], HOSTILE, groups=[HOSTILE], axes=(HOSTILE, HOSTILE))
    bars = mixture_bars([HOSTILE], [HOSTILE], [[[1.0]]], HOSTILE, groups=[HOSTILE], part=HOSTILE)
    lines = curves({HOSTILE: [(0, 1), (1, 2)]}, HOSTILE, axes=(HOSTILE, HOSTILE), notes={HOSTILE: HOSTILE})
    for drawing in (tile, bars, lines):
        tree = parsed(drawing)
        assert "<script" not in drawing and HOSTILE in tree.get("aria-label")
        assert any(HOSTILE in text for text in texts(tree))


def test_curves_are_told_apart_without_colour():
    series = {f"task{i}": [(0, 1.0), (500, 0.5 + i / 10), (1000, float("nan"))] for i in range(6)}
    tree = parsed(curves(series, "Loss", axes=("step", "loss")))
    lines = list(tree.iter("polyline"))
    assert len(lines) == len({line.get("stroke-dasharray") for line in lines}) == 6
    assert all(len(line.get("points").split()) == 2 for line in lines)
    assert "task5 ends at 1" in tree.get("aria-label")


@pytest.mark.parametrize("top", [0.003, 0.7, 1.0, 1.04, 3.0, 9.99, 12.5, 12345.0, 0.0, -1.0])
@pytest.mark.parametrize("last", [1, 2, 7, 1980, 100000])
def test_ticks_are_few_and_lie_apart(top, last):
    tree = parsed(curves({"a": [(0, top / 2), (last, top)]}, "x", axes=("step", "y")))
    ticks = of_class(tree, "tick")
    down = [tick for tick in ticks if not tick.get("x").endswith("%")]
    along = [tick for tick in ticks if tick.get("x").endswith("%")]
    heights = sorted(float(tick.get("y")) for tick in down)
    assert all(b - a >= 30 for a, b in zip(heights, heights[1:]))
    places = [float(tick.get("x")[:-1]) for tick in along]
    assert all(b - a >= 15 for a, b in zip(places, places[1:])) and max(places) <= 100
    for some in (down, along):
        assert 2 <= len(some) <= 5 and len({tick.text for tick in some}) == len(some)


def test_loss_curves_are_relative_to_their_first_value():
    log = [{"step": s, "loss/vqa": 2.0 / s, "loss/total": 1.0} for s in (1, 2, 4)] + [{"step": 4, "seconds": 1.0}]
    drawing = loss_curves(log)
    tree = parsed(drawing)
    assert "total" not in drawing and "vqa: 2.000 at step 1, 0.500 at step 4" in texts(tree)
    line, = tree.iter("polyline")
    assert line.get("points") == "250.0,0.0 500.0,500.0 1000.0,750.0"
    assert tree.get("aria-label") == ("Training loss per task, relative to its first value: vqa ends at 0.25")
