"""Methods held against each other: learning rates tuned on the valid split, then every seed trained and tested."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from vl_mtl_lora.config import dump_config
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.sweep_plan import SweepConfig, SweepRun, check_sweep, sweep_runs, valid_score
from vl_mtl_lora.sweep_run import SCORE

log = logging.getLogger(__name__)

RECORDS = "runs.jsonl"


def sweep(config: SweepConfig) -> list[dict]:
    """Runs what of a sweep is not yet done; returns the records of its tests, and adds each to OUT/runs.jsonl when its
    run ends. A run that broke off goes on from its last checkpoint.

    Raises:
        UserError: a sweep that cannot be run; runs in the folder that were made with other settings; a run that failed,
            once the others are done.
    """
    check_sweep(config)
    settings = [(method, budget) for budget in config.budgets for method in config.methods]
    rates = {setting: config.lr.values for setting in settings}
    if len(config.lr.values) > 1:
        trials = [run for setting in settings for lr in config.lr.values
                  for run in sweep_runs(config, *setting, lr, [config.lr.seed], "valid")]
        tuned, failed = _records(config, trials, "tuning")
        rates = {setting: [_best_rate(config, setting, tuned, failed)] for setting in settings}
    runs = [run for setting in settings for lr in rates[setting]
            for run in sweep_runs(config, *setting, lr, config.seeds, "test")]
    records, failed = _records(config, runs, "runs")
    if failed:
        raise UserError("\n".join([f"{len(failed)} of {len(runs)} runs failed:", *failed.values()]))
    return records


def _best_rate(config: SweepConfig, setting: tuple[str, str], records: Iterable[Mapping],
               failed: Mapping[str, str]) -> float:
    """The learning rate with the best valid score; one with which a training failed is out."""
    scores = {}
    for lr in config.lr.values:
        own = [record for record in records if (record["method"], record["budget"], record["lr"]) == (*setting, lr)]
        lost = [name for name in failed if name.startswith("/".join([*setting, f"lr-{lr:g}", ""]))]
        if own and not lost:
            scores[lr] = valid_score(config, own)
    if not scores:
        raise UserError("\n".join([f"{setting[0]}, {setting[1]}: a training failed with every learning rate:",
                                   *(why for name, why in failed.items() if name.startswith("/".join(setting)))]))
    return max(scores, key=scores.get)


def _records(config: SweepConfig, runs: Sequence[SweepRun], what: str) -> tuple[list[dict], dict[str, str]]:
    """(a record of each run that is done now, by name why others failed)."""
    out = Path(config.out)
    known = read_records(out / RECORDS)
    for run in runs:
        if run.name in known and known[run.name]["digest"] != run.digest:
            raise UserError(f"{out / run.name} was made with other settings than the sweep's: remove its line from "
                            f"{out / RECORDS}, and its folder, or choose another out=FOLDER")
    todo = [run for run in runs if run.name not in known]
    failed = {}
    out.mkdir(parents=True, exist_ok=True)
    pool = ThreadPoolExecutor(config.jobs)
    try:
        started = {pool.submit(_run, run, out / run.name, config.jobs): run for run in todo}
        for future in tqdm(as_completed(started), total=len(todo), desc=what, unit="run", dynamic_ncols=True):
            run = started[future]
            try:
                known[run.name] = future.result()
            except UserError as error:
                log.warning("%s", error)
                failed[run.name] = str(error)
                continue
            part = out / f"{RECORDS}.part"
            part.write_text("".join(json.dumps(record) + "\n" for record in known.values()), encoding="utf-8")
            part.replace(out / RECORDS)
    finally:  # after Ctrl-C those that run save, which they were told too; the others do not start
        pool.shutdown(cancel_futures=True)
    return [known[run.name] for run in runs if run.name in known], failed


def _run(run: SweepRun, folder: Path, jobs: int) -> dict:
    """Trains and measures one run in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(run.config), encoding="utf-8")
    (folder / SCORE).unlink(missing_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with open(folder / "log.txt", "ab") as file:
        done = subprocess.run([sys.executable, "-m", "vl_mtl_lora.sweep_run", str(folder), run.split], stdout=file,
                              stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if done.returncode or not (folder / SCORE).exists():  # it ends with 0 where it was told to stop, and has saved
        told = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").rpartition("\nerror: ")[2].strip()
        raise UserError(f"{folder} failed: {told.splitlines()[0] if told else 'it was stopped'} (more in its log.txt)")
    score = json.loads((folder / SCORE).read_text(encoding="utf-8"))
    return {"run": run.name, "method": run.method, "budget": run.budget, "lr": run.lr, "seed": run.seed,
            "task": run.task, "split": run.split, "steps": run.config.train.steps, "parameters": run.parameters,
            "adapter": run.config.adapter.model_dump(), "digest": run.digest, **score}


def read_records(path: str | Path) -> dict[str, dict]:
    """The runs of a sweep that are done, by name. Raises UserError where the file is damaged."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    try:
        return {record["run"]: record for record in map(json.loads, lines)}
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
