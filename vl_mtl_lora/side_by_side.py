"""Several runs side by side: methods, ranks, seeds; runs that differ in nothing but their seed are taken together."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment

from vl_mtl_lora.errors import UserError
from vl_mtl_lora.report import aligned, span

_NO_DIFFERENCE = ("out", "train.seed", "data.workers", "data.cache", "train.log_every", "train.save_every")


class Cell(NamedTuple):
    """A metric over the seeds of a group: mean, standard deviation (None of one seed), and of a single run the 95 %
    interval over its samples."""

    mean: float
    deviation: float | None
    interval: Sequence[float] | None

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + (f" ± {self.deviation:.1f}" if self.deviation is not None else "")


class Table(NamedTuple):
    """columns: "zero-shot", then each group by what is its own. seeds: of each group. runs: the folders of each.
    rows: (task, metric) -> a cell per column, None where the group has no such metric."""

    columns: list[str]
    seeds: list[list[int]]
    runs: list[list[str]]
    rows: dict[tuple[str, str], list[Cell | None]]


def side_by_side(results: Mapping[str, Mapping], out: str | Path) -> Table:
    """Writes comparison.json, comparison.md and comparison.html into a folder.

    results: run's folder -> the content of its results.json.

    Raises:
        UserError: runs of different test shards, so that their figures cannot be compared.
    """
    table = compare_results(results)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rows = [{"task": task, "metric": metric,
             "cells": {name: cell._asdict() for name, cell in zip(table.columns, cells) if cell}}
            for (task, metric), cells in table.rows.items()]
    groups = [{"name": name, "seeds": seeds, "runs": runs}
              for name, seeds, runs in zip(table.columns[1:], table.seeds, table.runs)]
    (out / "comparison.json").write_text(json.dumps({"groups": groups, "rows": rows}, indent=2) + "\n", "utf-8")
    (out / "comparison.md").write_text(_markdown(table), "utf-8")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (resources.files("vl_mtl_lora") / "embedded" / "comparison.html.jinja").read_text("utf-8"))
    (out / "comparison.html").write_text(page.render(table=table, best=_best, span=span), "utf-8")
    return table


def compare_results(results: Mapping[str, Mapping]) -> Table:
    """The table of some runs' results. Raises UserError as `side_by_side`."""
    shards = {run: {task: found["hash"] for task, found in result["shards"].items()} for run, result in results.items()}
    first = next(iter(results))
    for run, hashes in shards.items():
        if different := [task for task, value in hashes.items() if shards[first].get(task, value) != value]:
            raise UserError(f"{run} and {first} were measured on different shards of {', '.join(different)}: compare "
                            "each on the same (vl-mtl-lora compare RUN)")
    flat = {run: dict(_flat(result["config"])) for run, result in results.items()}
    differing = sorted({key for one in flat.values() for key in one if not key.startswith(_NO_DIFFERENCE)
                        and any(other.get(key) != one[key] for other in flat.values())})
    groups: dict[str, list[str]] = {}
    for run in results:
        name = ", ".join(f"{key.partition('.')[2] or key} {flat[run].get(key, 'none')}" for key in differing)
        groups.setdefault(name or "adapted", []).append(run)
    rows: dict[tuple[str, str], list[Cell | None]] = {}
    of_groups = list(groups.values())
    for task, metric in dict.fromkeys((task, metric) for result in results.values()
                                      for task, values in result["tasks"].items() for metric in values["adapted"]):
        zero = [_cell([results[run]], task, metric, "zero_shot") for run in results
                if metric in results[run]["tasks"].get(task, {"zero_shot": ()})["zero_shot"]]
        rows[task, metric] = [zero[0] if len({cell.mean for cell in zero}) == 1 else None,
                              *(_cell([results[run] for run in runs], task, metric, "adapted") for runs in of_groups)]
    return Table(["zero-shot", *groups], [[results[run]["seed"] for run in runs] for runs in of_groups], of_groups,
                 rows)


def text_table(table: Table) -> str:
    """The table for a terminal; aligned, without colour."""
    head = [("task", "metric", *table.columns)]
    body = [(task, metric.replace("_", " "), *("" if cell is None else str(cell) for cell in cells))
            for (task, metric), cells in table.rows.items()]
    return aligned(head + body)


def _cell(results: Sequence[Mapping], task: str, metric: str, arm: str) -> Cell | None:
    found = [result["tasks"][task] for result in results if metric in result["tasks"].get(task, {}).get(arm, ())]
    if not found:
        return None
    values = [values[arm][metric] for values in found]
    if len(values) > 1:
        return Cell(statistics.fmean(values), statistics.stdev(values), None)
    return Cell(values[0], None, found[0].get("interval", {}).get(arm, {}).get(metric))


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a config; shards are compared by their hashes."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif key not in ("train", "valid", "test"):
            yield prefix + key, value


def _best(metric: str, cells: Sequence[Cell | None]) -> int | None:
    """Which of the adapted cells is the best; a rank is the better the lower it is."""
    known = [(cell.mean * (-1 if metric.endswith("_rank") else 1), -i) for i, cell in enumerate(cells) if i and cell]
    return -max(known)[1] if len(known) > 1 else None


def _markdown(table: Table) -> str:
    lines = ["# Runs side by side", "", "| task | metric | " + " | ".join(table.columns) + " |",
             "|---|---|" + "---:|" * len(table.columns)]
    lines += [f"| {task} | {metric.replace('_', ' ')} | " + " | ".join(str(cell or "") for cell in cells) + " |"
              for (task, metric), cells in table.rows.items()]
    lines += ["", "± is the standard deviation over seeds.", ""]
    lines += [f"- {name}: {', '.join(runs)} (seeds {', '.join(map(str, seeds))})"
              for name, runs, seeds in zip(table.columns[1:], table.runs, table.seeds)]
    return "\n".join(lines) + "\n"
