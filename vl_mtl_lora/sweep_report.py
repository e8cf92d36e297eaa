"""A sweep's records -> which method was better, by how much, on which tasks, at what cost.

Intervals are Student's t over seeds, of 95 %; differences are paired: seed by seed, over the same test samples.
"""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from vl_mtl_lora.errors import UserError
from vl_mtl_lora.sweep_plan import SweepConfig, above_zero, task_values

Interval = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """A method under a budget.

    parameters: trainable ones. lr: as tuned. speed: training samples per second, the median of its runs; None where
    tasks are trained alone, or at another revision than the reference, so at another time. tasks: each one's figure by
    seed. shares: the same in per cent of the measure's mean. scores: by seed, the mean of shares. groups: the same over
    some tasks.
    """

    method: str
    parameters: int
    lr: float
    speed: float | None
    tasks: dict[str, np.ndarray]
    shares: dict[str, np.ndarray]
    scores: np.ndarray
    groups: dict[str, np.ndarray]


def write_report(config: SweepConfig, records: Sequence[Mapping], out: str | Path) -> str:
    """Writes report.md and parameters.svg into a folder; returns the report.

    records: those of the sweep's tests.

    Raises:
        UserError: matplotlib is missing; runs were measured on different shards.
    """
    pyplot = plotting()
    _check_shards(records)
    out = Path(out)
    tables = {budget: compared(config, [r for r in records if r["budget"] == budget]) for budget in config.budgets}
    text = "\n".join(_report(config, tables, records)) + "\n"
    (out / "report.md").write_text(text, encoding="utf-8")
    figure, axes = pyplot.subplots(1, len(tables), figsize=(5 * len(tables) + 2.6, 4), sharey=True, squeeze=False,
                                   layout="constrained")
    for axis, (budget, rows) in zip(axes[0], tables.items()):
        for row, marker in zip(rows, "osD^v<>pPX*hd8H" * len(rows)):
            low, high = interval_of_mean(row.scores)
            mean = row.scores.mean()
            axis.errorbar(row.parameters, mean, [[mean - low], [high - mean]], marker=marker, capsize=3, ls="none",
                          label=row.method)
        axis.set(xscale="log", xlabel="trainable parameters", title=budget)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"score, {_unit(config)}")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    pyplot.rcParams["svg.hashsalt"] = "sweep"  # the same records make the same file
    figure.savefig(out / "parameters.svg", metadata={"Date": None})
    pyplot.close(figure)
    return text


def _check_shards(records: Sequence[Mapping]) -> None:
    seen: dict[str, str] = {}
    for record in records:
        for task, shards in record["shards"].items():
            if seen.setdefault(task, shards["hash"]) != shards["hash"]:
                raise UserError(f"{record['run']} was measured on other shards of {task} than the runs before it: "
                                "remove the lines of one or the other from runs.jsonl, and run the sweep again")


def plotting():
    """matplotlib.pyplot. Raises UserError where it is missing."""
    try:
        import matplotlib
        matplotlib.use("svg")
        from matplotlib import pyplot
    except ImportError as error:
        raise UserError("a sweep's report needs matplotlib: pip install 'vl_mtl_lora[sweep]'") from error
    return pyplot


def compared(config: SweepConfig, records: Sequence[Mapping]) -> list[Row]:
    """A row for each method, from the records of one budget. A task on which what they are measured by is not above 0
    is left out of scores and groups.

    Raises:
        UserError: no task is left.
    """
    found = {method: [r for r in records if r["method"] == method] for method in config.methods}
    tasks = {method: _by_task(config, own) for method, own in found.items()}
    base = above_zero(config, {task: values.mean() for task, values in tasks[config.measure].items()})
    revisions = {r["git_revision"] for r in found[config.reference]}
    rows = []
    for method, own in found.items():
        speeds = [r["samples_per_second"] for r in own if r["git_revision"] in revisions]
        shares = {task: 100 * tasks[method][task] / value for task, value in base.items()}
        groups = {group: [shares[task] for task in names if task in shares] for group, names in config.groups.items()}
        rows.append(Row(
            method, sum(r["parameters"] for r in own) // len(config.seeds), own[0]["lr"],
            None if config.methods[method].alone or not speeds else statistics.median(speeds), tasks[method], shares,
            np.mean(list(shares.values()), axis=0),
            {group: np.mean(values, axis=0) for group, values in groups.items() if values}))
    return rows


def _by_task(config: SweepConfig, records: Sequence[Mapping]) -> dict[str, np.ndarray]:
    """task -> (seeds,) its figure, in the order of the seeds."""
    values = {(task, record["seed"]): value
              for record in records for task, value in task_values(config, record).items()}
    tasks = dict.fromkeys(task for task, _ in values)
    return {task: np.array([values[task, seed] for seed in config.seeds]) for task in tasks}


def _unit(config: SweepConfig) -> str:
    return f"% of {config.measure}, mean over tasks"


def interval_of_mean(values: Sequence[float]) -> Interval:
    """The 95 % interval of the mean of the normal distribution that values (n,), n > 1, come from, by Student's t."""
    mean, error = float(np.mean(values)), float(stats.sem(values))
    if error <= 1e-9 * max(1.0, abs(mean)):  # all the same but for rounding
        return mean, mean
    return stats.t.interval(0.95, len(values) - 1, mean, error)


def outcome(difference: Sequence[float]) -> int:
    """1 where the interval of the mean difference lies above 0, -1 where below, else 0. Of differences that are all the
    same nothing is known."""
    low, high = interval_of_mean(difference)
    return int(low > 0) - int(high < 0) if low < high else 0


def won_and_lost(row: Row, other: Row) -> tuple[list[str], list[str]]:
    """Tasks on which a method is better than another, and on which it is worse, beyond the interval over seeds."""
    outcomes = {task: outcome(values - other.tasks[task]) for task, values in row.tasks.items()}
    return [task for task, o in outcomes.items() if o > 0], [task for task, o in outcomes.items() if o < 0]


def _report(config: SweepConfig, tables: Mapping[str, Sequence[Row]], records: Sequence[Mapping]) -> Iterator[str]:
    metrics = {task: config.metrics.get(task, metric) for r in records for task, metric in r["primary"].items()}
    yield f"# {len(config.methods)} methods, {len(metrics)} tasks, {len(config.seeds)} seeds"
    yield ""
    yield ("Figures are of the test split: " + "; ".join(
        f"{metric.replace('_', ' ')} of {', '.join(task for task, m in metrics.items() if m == metric)}"
        for metric in dict.fromkeys(metrics.values())) + ".")
    yield ""
    rates = ", ".join(f"{lr:g}" for lr in config.lr.values)
    yield (f"The score of a method is these figures in {_unit(config)}. ± and ranges are 95 % intervals over "
           f"{len(config.seeds)} seeds (Student's t); differences to {config.reference} are paired by seed; one "
           "interval in twenty misses by chance. "
           + (f"For each method and budget the learning rate is the one of {rates} with the best score on the valid "
              f"split, with seed {config.lr.seed}." if config.tuned else f"The learning rate is {rates} for all."))
    ends = {min(config.lr.values), max(config.lr.values)}
    if len(config.lr.values) > 2 and (at_end := [f"{row.method} ({row.lr:g}, {budget})"
                                                for budget, rows in tables.items() for row in rows if row.lr in ends]):
        yield f"At an end of these, so that one beyond might be better: {', '.join(at_end)}."
    measure = config.measure
    if zero := [f"{task} ({budget})" for budget, rows in tables.items() for row in rows if row.method == measure
                for task, values in row.tasks.items() if not values.mean() > 0]:
        yield f"Left out of the scores, since {measure} is not above 0 there: {', '.join(zero)}."
    for budget, rows in tables.items():
        reference = next(row for row in rows if row.method == config.reference)
        yield from ["", f"## {budget}", ""]
        yield from (f"- {sentence}" for sentence in findings(rows, reference))
        yield from ["", *_scores(rows, reference), "", *_tasks(rows, reference), "", *_pairs(rows)]
    yield from ["", "![score against trainable parameters](parameters.svg)", "", "## Where the figures come from", ""]
    yield (f"runs.jsonl has a line for each run with its seed, learning rate, adapter, every metric and the shards' "
           f"hashes; the run's folder has its whole config. {_listed(r['device'] for r in records)}, torch "
           f"{_listed(r['versions']['torch'] for r in records)}; revision "
           f"{_listed(r['git_revision'] or 'unknown' for r in records)}.")


def findings(rows: Sequence[Row], reference: Row) -> Iterator[str]:
    """One plain sentence for each method but the reference."""
    for row in rows:
        if row is reference:
            continue
        difference = row.scores - reference.scores
        better, worse = won_and_lost(row, reference)
        verdict = {1: f"is better than {reference.method}", -1: f"is worse than {reference.method}",
                   0: f"cannot be told from {reference.method} with {len(difference)} seeds"}[outcome(difference)]
        parts = [f"{_signed(difference)} points",
                 *(f"{group} {_signed(values - reference.groups[group])}" for group, values in row.groups.items())]
        left = _with_one_task_less(row, reference)
        cost = f"with {row.parameters / reference.parameters:.2f} times its parameters"
        if row.speed:
            cost += f" and at {row.speed / reference.speed:.2f} of its speed"
        yield (f"**{row.method}** {verdict}: {', '.join(parts)}; {left}{cost}; better on {_names(better)}, worse on "
               f"{_names(worse)}.")


def _with_one_task_less(row: Row, reference: Row) -> str:
    """How far the mean difference of scores hangs on one task."""
    if len(row.shares) < 2:
        return ""
    gains = {task: float(np.mean(share - reference.shares[task])) for task, share in row.shares.items()}
    left = {task: (sum(gains.values()) - gain) / (len(gains) - 1) for task, gain in gains.items()}
    low, high = min(left, key=left.get), max(left, key=left.get)
    return f"with any one task left out {left[low]:+.1f} ({low}) to {left[high]:+.1f} ({high}); "


def _signed(difference: np.ndarray) -> str:
    low, high = interval_of_mean(difference)
    return f"{difference.mean():+.1f} ({low:+.1f} to {high:+.1f})"


def _listed(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))


def _names(tasks: Sequence[str]) -> str:
    return f"{len(tasks)} ({', '.join(tasks)})" if tasks else "none"


def _scores(rows: Sequence[Row], reference: Row) -> Iterator[str]:
    groups = list(rows[0].groups)
    heads = ["method", "parameters", "lr", "score", "difference", "won, lost", *groups, "speed"]
    yield f"| {' | '.join(heads)} |"
    yield "|---|" + "---:|" * (len(heads) - 1)
    for row in sorted(rows, key=lambda row: -row.scores.mean()):
        low, high = interval_of_mean(row.scores - reference.scores)
        better, worse = won_and_lost(row, reference)
        versus = ["", ""] if row is reference else [f"{low:+.1f} to {high:+.1f}", f"{len(better)}, {len(worse)}"]
        cells = [row.method, f"{row.parameters:,}", f"{row.lr:g}", _figure(row.scores), *versus,
                 *(_figure(row.groups[group]) for group in groups),
                 f"{row.speed / reference.speed:.2f}" if row.speed else ""]
        yield f"| {' | '.join(cells)} |"


def _tasks(rows: Sequence[Row], reference: Row) -> Iterator[str]:
    yield f"| method | {' | '.join(reference.tasks)} |"
    yield "|---|" + "---:|" * len(reference.tasks)
    for row in rows:
        cells = [_marked(values - reference.tasks[task], ".1f", values.mean()) for task, values in row.tasks.items()]
        yield f"| {row.method} | {' | '.join(cells)} |"
    yield ""
    yield f"Each task's own metric, the mean over seeds; ▲ above, ▼ below {reference.method} beyond the interval."


def _pairs(rows: Sequence[Row]) -> Iterator[str]:
    yield f"| score less that of | {' | '.join(row.method for row in rows)} |"
    yield "|---|" + "---:|" * len(rows)
    for row in rows:
        cells = ["" if row is other else _marked(row.scores - other.scores, "+.1f") for other in rows]
        yield f"| {row.method} | {' | '.join(cells)} |"
    yield ""
    yield "The mean difference of scores, paired by seed; ▲ above 0, ▼ below 0 beyond the interval."


def _marked(difference: np.ndarray, spec: str, mean: float | None = None) -> str:
    shown = difference.mean() if mean is None else mean
    return f"{round(shown, 1) + 0.0:{spec}}" + {1: " ▲", 0: "", -1: " ▼"}[outcome(difference)]


def _figure(values: np.ndarray) -> str:
    low, high = interval_of_mean(values)
    return f"{values.mean():.1f} ± {(high - low) / 2:.1f}"
