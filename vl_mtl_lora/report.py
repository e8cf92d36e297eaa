"""Zero-shot against adapted, for people: for the terminal, report.md, and report.html, which needs no network."""

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment

from vl_mtl_lora.anatomy import Anatomy
from vl_mtl_lora.drawings import STYLE, heat_map, loss_curves, mixture_bars
from vl_mtl_lora.gallery import Example, Said

Interval = Sequence[float] | None


class Row(NamedTuple):
    """One metric of a task under both arms, each with its 95 % interval. n: units (questions, pictures, queries)."""

    task: str
    metric: str
    n: int
    zero_shot: float
    adapted: float
    intervals: tuple[Interval, Interval, Interval]  # zero-shot, adapted, paired change

    @property
    def change(self) -> float:
        return self.adapted - self.zero_shot

    @property
    def better(self) -> int:
        """1, 0 or -1; a rank is the better the lower it is. 0 also where the interval of the change holds 0."""
        low, high = self.intervals[2] or (self.change, self.change)
        sign = 1 if low > 0 else -1 if high < 0 else 0
        return -sign if self.metric.endswith("_rank") else sign


def metric_rows(results: Mapping) -> list[Row]:
    """Every metric of results.json."""
    rows = []
    for task, values in results["tasks"].items():
        known, counts = values.get("interval", {}), values.get("n", {})
        for metric, adapted in values["adapted"].items():
            intervals = tuple(known.get(arm, {}).get(metric) for arm in ("zero_shot", "adapted", "change"))
            rows.append(Row(task, metric, counts.get(metric, values["samples"]), values["zero_shot"][metric], adapted,
                            intervals))
    return rows


def write_report(folder: str | Path, results: Mapping, examples: Sequence[Example], log: Sequence[Mapping],
                 confusions: Mapping[str, tuple[list[str], list[list[int]]]], learned: Anatomy | None) -> None:
    """Writes results.json, report.md and report.html (one file, no network) into a folder.

    Args:
        results: see `results`. log: the run's log entries, for the curves. learned: see `anatomy`.
        confusions: task -> (labels, counts of truths x answers), see `gallery.confusion`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"results.json": json.dumps(results, indent=2, ensure_ascii=False) + "\n",
             "report.md": markdown_report(results, examples),
             "report.html": html_report(results, examples, log, confusions, learned)}
    for name, text in pages.items():
        (folder / f"{name}.part").write_text(text, encoding="utf-8")
    for name in pages:  # only once all are made, so that no file tells of another evaluation
        (folder / f"{name}.part").replace(folder / name)


def text_table(results: Mapping) -> str:
    """The comparison for a terminal; aligned, without colour."""
    cells = [("task", "metric", "n", "zero-shot", "adapted", "change", "95 % interval")]
    cells += [(row.task, row.metric.replace("_", " "), f"{row.n:,}", f"{row.zero_shot:.1f}", f"{row.adapted:.1f}",
               f"{row.change:+.1f}", span(row.intervals[2], "+")) for row in metric_rows(results)]
    lines = [aligned(cells)]
    for found in results.get("held_out", []):
        through = ", ".join(f"{value['figure']:.1f} through {task}" for task, value in found["through"].items())
        lines.append(f"held out: {found['task']} {found['metric'].replace('_', ' ')} {found['frozen']:.1f} frozen, "
                     f"{through}")
    return "\n".join(lines)


def arm_table(results: Mapping) -> str:
    """The figures of one arm for a terminal; see `evaluation`."""
    cells = [("task", "metric", "n", "value", "95 % interval")]
    for task, values in results["tasks"].items():
        cells += [(task, metric.replace("_", " "), f"{values['n'][metric]:,}", f"{value:.2f}",
                   span(values["interval"][metric])) for metric, value in values["metrics"].items()]
        cells += [(task, f"  {group['by'].replace('_', ' ')} {group['value']}", f"{group['n']:,}",
                   f"{group['figure']:.2f}", span(group["interval"])) for group in values["groups"]]
    return aligned(cells)


def arm_lines(results: Mapping) -> str:
    """The same for other programs: task, metric, value, low, high, n, with tabs between; intervals may be empty."""
    rows = [(task, metric, f"{value:.2f}", *(f"{end:.2f}" for end in values["interval"][metric] or ()),
             *([] if values["interval"][metric] else ["", ""]), str(values["n"][metric]))
            for task, values in results["tasks"].items() for metric, value in values["metrics"].items()]
    return "\n".join("\t".join(row) for row in rows)


def aligned(cells: Sequence[Sequence[str]], left: int = 2) -> str:
    """Rows of cells as a table of plain text, the first row its head, the first `left` columns flush left."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
             for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def span(interval: Interval, sign: str = "") -> str:
    """An interval in words; "" where there is none."""
    return f"{interval[0]:{sign}.1f} to {interval[1]:{sign}.1f}" if interval else ""


def markdown_report(results: Mapping, examples: Sequence[Example]) -> str:
    """The comparison as Markdown."""
    lines = ["# Zero-shot against adapted", "", *about(results), "",
             "| task | metric | n | zero-shot | adapted | change | 95 % interval |",
             "|---|---|---:|---:|---:|---:|---|"]
    lines += [f"| {r.task} | {r.metric.replace('_', ' ')} | {r.n:,} | {r.zero_shot:.1f} | {r.adapted:.1f} "
              f"| {r.change:+.1f} | {span(r.intervals[2], '+')} |" for r in metric_rows(results)]
    lines += [""] + [f"- {note}" for note in notes(results)] + [""]
    for found in results.get("held_out", []):
        through = ", ".join(f"{value['figure']:.1f} through {task} (change {span(value['change'], '+')})"
                            for task, value in found["through"].items())
        lines += [f"Held out: {found['task']}, {found['metric'].replace('_', ' ')} (n {found['n']:,}): "
                  f"{found['frozen']:.1f} frozen, {through}.", ""]
    if results.get("seconds"):
        lines += ["## Time", "", "| stage | seconds |", "|---|---:|"]
        lines += [f"| {stage} | {seconds:.0f} |" for stage, seconds in results["seconds"].items()] + [""]
    lines += ["## Test samples", "", "| task | chosen as | question | truth | zero-shot | adapted |",
              "|---|---|---|---|---|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in (
        e.task, e.why, e.question, e.truth, _mark(e.zero_shot), _mark(e.adapted))) + " |" for e in examples]
    return "\n".join(lines) + "\n"


def html_report(results: Mapping, examples: Sequence[Example], log: Sequence[Mapping],
                confusions: Mapping[str, tuple[list[str], list[list[int]]]], learned: Anatomy | None) -> str:
    """The comparison as one HTML page: tables, curves, gallery, confusions, what the adapters learned."""
    gallery = {task: {why: list(shown) for why, shown in groupby(own, lambda e: e.why)}
               for task, own in groupby(examples, lambda e: e.task)}
    maps = {task: heat_map(labels, labels, [[100 * n / sum(row) if sum(row) else None for n in row] for row in counts],
                           f"Answers of {task}, per cent of the samples of each truth", ".0f",
                           axes=("truth", "answer"), off_diagonal=True)
            for task, (labels, counts) in confusions.items()}
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (resources.files("vl_mtl_lora") / "embedded" / "report.html.jinja").read_text(encoding="utf-8"))
    return page.render(about=about(results), notes=notes(results), rows=metric_rows(results), gallery=gallery,
                       groups={task: values["groups"] for task, values in results["tasks"].items()
                               if values.get("groups")},
                       held_out=results.get("held_out", []), curves=loss_curves(log), confusions=maps,
                       learned=learned_drawings(learned) if learned else {}, style=STYLE, span=span,
                       made=made(results), seconds=results.get("seconds", {}))


def learned_drawings(learned: Anatomy) -> dict[str, tuple[str, str]]:
    """Heading -> (what it shows, drawing), of `anatomy`."""
    layers = [layer.name.partition(".")[2] for layer in learned.layers]
    towers = [layer.tower for layer in learned.layers]
    drawings = {
        "Which tasks share": (
            "Cosine of the tasks' whole updates: 1 where two tasks move the weights alike, 0 where they have nothing "
            "to do with one another.",
            heat_map(learned.tasks, learned.tasks, learned.similarity, "Cosine similarity of the tasks' updates",
                     limits=(-1, 1), off_diagonal=True)),
        "How far each task went its own way": (
            "Distance of Lambda from the identity, where it starts, layer by layer: ‖Λ − I‖ / ‖I‖.",
            heat_map(layers, learned.tasks, learned.distance, "Distance of Lambda from the identity", groups=towers,
                     axes=("layer", "task"))),
        "How large the updates are": (
            "‖ΔW‖ / ‖W‖ of each task, layer by layer.",
            heat_map(layers, learned.tasks, learned.size, "Size of the update relative to the frozen weight", ".3f",
                     groups=towers, axes=("layer", "task"))),
        "Which up-projections each task uses": (
            "Shares of the up-projections B, softmax(w / tau), layer by layer.",
            mixture_bars(layers, learned.tasks, learned.mixture, "Mixture of the up-projections", groups=towers,
                         axes=("layer", "task"))),
    }
    return drawings if learned.layers else {}


def about(results: Mapping) -> list[str]:
    """What was run, in sentences."""
    run = results.get("run", {})
    if not run:
        return []
    return [f"Base {run['base']}; MTL-LoRA of rank {run['rank']} on {run['modules']} linear layers, "
            f"{run['trainable']:,} trainable parameters ({run['share']:.1f} % of the base); {run['steps']} steps."]


def notes(results: Mapping) -> list[str]:
    """What must be known to understand the figures, in sentences."""
    counts = ", ".join(f"{task} {values['samples']:,}" for task, values in results["tasks"].items())
    lines = [f"Samples of the {results.get('split', 'test')} split: {counts}. Figures in per cent, but for ranks, and "
             "CIDEr and AUC as told below.", "n counts queries, questions or pictures. Intervals are bootstrap "
             "percentiles over 1,000 draws of whole pictures with all their questions and captions; that of a change "
             "draws the same pictures for both arms."]
    lines += [note for values in results["tasks"].values() for note in values.get("notes", [])]
    if results.get("off_equals_base", {}).get("equal"):
        lines.append(f"With adapters off the model is the frozen base: {results['off_equals_base']['numbers']:,} "
                     "numbers of its outputs were compared with those of the same model without any adapter, and are "
                     "equal bit for bit.")
    return lines


def made(results: Mapping) -> dict[str, str]:
    """What the figures hang on, in pairs of words."""
    if "versions" not in results:
        return {}
    shards = "; ".join(f"{task} {found['hash']} ({found['files']} files)" for task, found in results["shards"].items())
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items() if number)
    return {"date": results["date"], "device": f"{results['device']}, {results['precision']}",
            "seed": str(results["seed"]), "git revision": results["git_revision"] or "(no checkout)",
            "shards": shards, "versions": versions}


def _mark(said: Said) -> str:
    return f"{'✓' if said.right else '✗'} {said.text or '(nothing)'}"
