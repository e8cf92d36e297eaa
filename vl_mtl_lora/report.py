"""Zero-shot against adapted: results.json, report.md and report.html from two evaluations of each task."""

import base64
import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment

from vl_mtl_lora.data.pictures import decode_image
from vl_mtl_lora.data.schema import in_words
from vl_mtl_lora.evaluate import Evaluation
from vl_mtl_lora.metrics.caption import TOKENIZER

_GALLERY = 12  # pictures over all tasks
_COLOURS = ("#2a6fbb", "#c2571a", "#3b8c4a", "#8a4fa8", "#a33", "#666")


@dataclass(frozen=True)
class Example:
    """A test sample with what was asked, what is right, and what both arms said. images: the bytes of its files."""

    task: str
    images: tuple[bytes, ...]
    question: str
    truth: str
    zero_shot: tuple[str, bool]
    adapted: tuple[str, bool]

    @property
    def pictures(self) -> list[str]:
        """The images as data URLs, at most 256 pixels wide and high."""
        urls = []
        for data in self.images:
            image = decode_image(data)
            image.thumbnail((256, 256))
            stream = io.BytesIO()
            image.save(stream, "PNG")
            urls.append("data:image/png;base64," + base64.b64encode(stream.getvalue()).decode())
        return urls


def results_dict(zero_shot: Mapping[str, Evaluation], adapted: Mapping[str, Evaluation], **about) -> dict:
    """The content of results.json; `about` is put beside the metrics (seconds per stage, parameters, and so on)."""
    return {"tasks": {name: {"zero_shot": zero_shot[name].metrics, "adapted": adapted[name].metrics,
                             "samples": len(adapted[name].samples)} for name in adapted},
            "caption_tokenizer": TOKENIZER, **about}


def pick_examples(tasks, zero_shot: Mapping[str, Evaluation], adapted: Mapping[str, Evaluation],
                  images_of: Callable[[str, int], tuple[bytes, ...]], count: int = _GALLERY) -> list[Example]:
    """Pictures spread evenly over each task's test samples, whatever the answers: no choice that flatters an arm.

    images_of: (task, row in its index) -> the image files of a sample, which evaluations do not keep.
    """
    examples = []
    share = max(1, count // len(adapted))
    for name, evaluation in adapted.items():
        samples = evaluation.samples
        rows = sorted({(2 * k + 1) * len(samples) // (2 * share) for k in range(share)})
        before = tasks[name].answers(zero_shot[name].predictions, samples, rows)
        after = tasks[name].answers(evaluation.predictions, samples, rows)
        for i, *said in zip(rows, before, after):
            examples.append(Example(name, images_of(name, evaluation.rows[i]), *in_words(samples[i].fields), *said))
    return examples


def write_report(folder: str | Path, results: Mapping, examples: Sequence[Example], log: Sequence[Mapping]) -> None:
    """Writes results.json, report.md and report.html (one file, no network) into a folder.

    Args:
        results: see `results_dict`.
        log: the run's log entries, for the curves.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown_report(results, examples), encoding="utf-8")
    (folder / "report.html").write_text(html_report(results, examples, log), encoding="utf-8")


def metric_rows(results: Mapping) -> list[tuple[str, str, float, float]]:
    """(task, metric, zero-shot, adapted) of every metric."""
    return [(task, metric, values["zero_shot"][metric], adapted) for task, values in results["tasks"].items()
            for metric, adapted in values["adapted"].items()]


def text_table(results: Mapping) -> str:
    """The comparison for a terminal; aligned, without colour."""
    rows = [("task", "metric", "zero-shot", "adapted", "change")]
    rows += [(task, metric.replace("_", " "), f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}")
             for task, metric, before, after in metric_rows(results)]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
             for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown_report(results: Mapping, examples: Sequence[Example]) -> str:
    """The comparison as Markdown."""
    lines = ["# Zero-shot against adapted", "", *_about(results), "",
             "| task | metric | zero-shot | adapted | change |", "|---|---|---:|---:|---:|"]
    lines += [f"| {task} | {metric.replace('_', ' ')} | {before:.1f} | {after:.1f} | {after - before:+.1f} |"
              for task, metric, before, after in metric_rows(results)]
    lines += ["", *_notes(results), ""]
    if results.get("seconds"):
        lines += ["## Time", "", "| stage | seconds |", "|---|---:|"]
        lines += [f"| {stage} | {seconds:.0f} |" for stage, seconds in results["seconds"].items()] + [""]
    lines += ["## Test samples", "", "| task | question | truth | zero-shot | adapted |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in (
        e.task, e.question, e.truth, _mark(e.zero_shot), _mark(e.adapted))) + " |" for e in examples]
    return "\n".join(lines) + "\n"


def html_report(results: Mapping, examples: Sequence[Example], log: Sequence[Mapping]) -> str:
    """The comparison as one HTML page: table, curves, gallery."""
    page = Environment(autoescape=True, trim_blocks=True).from_string(
        (resources.files("vl_mtl_lora") / "embedded" / "report.html.jinja").read_text(encoding="utf-8"))
    return page.render(about=_about(results), notes=_notes(results), rows=metric_rows(results), examples=examples,
                       curves=loss_curves(log), seconds=results.get("seconds", {}))


def loss_curves(log: Sequence[Mapping], width: int = 760, height: int = 260) -> str:
    """Each task's training loss over steps as an SVG, each curve scaled to its first value; "" without any."""
    names = sorted({key for entry in log for key in entry if key.startswith("loss/") and key != "loss/total"})
    curves = {name: [(entry["step"], entry[name]) for entry in log if name in entry] for name in names}
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if not curves:
        return ""
    last = max(points[-1][0] for points in curves.values())
    top = max(1.0, max(y / (points[0][1] or 1.0) for points in curves.values() for _, y in points))
    left, bottom = 44, 30

    def place(x, y):
        return f"{left + x / last * (width - left - 10):.1f},{10 + (1 - y / top) * (height - bottom - 10):.1f}"

    parts = [f"<svg viewBox='0 0 {width} {height + 24 * len(curves)}' role='img' "
             f"aria-label='Training loss per task over {last} steps, relative to its first value'>"]
    for share in (0.0, 0.5, 1.0):
        x, y = place(0, share * top).split(",")
        parts.append(f"<line class='axis' x1='{x}' y1='{y}' x2='{width - 10}' y2='{y}'/>"
                     f"<text x='{left - 6}' y='{float(y) + 4}' text-anchor='end'>{share * top:.2g}</text>")
    parts.append(f"<text x='{width - 10}' y='{height - 10}' text-anchor='end'>step {last}</text>"
                 f"<text x='{left}' y='{height - 10}'>loss / first loss</text>")
    for i, (name, points) in enumerate(curves.items()):
        colour, first = _COLOURS[i % len(_COLOURS)], points[0][1] or 1.0
        line = " ".join(place(x, y / first) for x, y in points)
        parts.append(f"<polyline fill='none' stroke='{colour}' stroke-width='2' points='{line}'/>"
                     f"<rect x='{left}' y='{height + 24 * i}' width='14' height='4' fill='{colour}'/>"
                     f"<text x='{left + 22}' y='{height + 24 * i + 7}'>{html.escape(name.removeprefix('loss/'))}: "
                     f"{points[0][1]:.3f} at step {points[0][0]}, {points[-1][1]:.3f} at step {points[-1][0]}</text>")
    return "".join([*parts, "</svg>"])


def _about(results: Mapping) -> list[str]:
    run = results.get("run", {})
    lines = []
    if run:
        lines.append(f"Base {run['base']}; MTL-LoRA of rank {run['rank']} on {run['modules']} linear layers of both "
                     f"towers, {run['trainable']:,} trainable parameters ({run['share']:.1f} % of the base); "
                     f"{run['steps']} steps.")
    return lines


def _notes(results: Mapping) -> list[str]:
    counts = ", ".join(f"{task} {values['samples']:,}" for task, values in results["tasks"].items())
    lines = [f"Test samples: {counts}. Recall and accuracy in per cent; recall@k is the share of queries with a right "
             "answer among the k nearest."]
    if any("CIDEr" in values["adapted"] for values in results["tasks"].values()):
        lines.append(f"CIDEr is CIDEr-D x 100 with document frequencies from the test references; caption tokenizer: "
                     f"{results['caption_tokenizer']}.")
    if any("AUC" in values["adapted"] for values in results["tasks"].values()):
        lines.append("AUC, in per cent, is the share of pairs of different labels that the score puts in the right "
                     "order; zero-shot labels of a matching task are the cosines cut into equal parts.")
    return lines


def _mark(answer: tuple[str, bool]) -> str:
    text, right = answer
    return f"{'✓' if right else '✗'} {text or '(nothing)'}"
