"""Methods held against each other: learning rates tuned on the valid split, then every seed trained and tested."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from vl_mtl_lora.config import dump_config
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.sweep_plan import SweepConfig, SweepRun, check_sweep, sweep_runs, task_values, valid_scores
from vl_mtl_lora.sweep_run import SCORE, alone_in

log = logging.getLogger(__name__)

RECORDS = "runs.jsonl"
_DIGEST = "digest.txt"  # in a run's folder: of the settings it was begun with


def sweep(config: SweepConfig) -> list[dict]:
    """Runs what of a sweep is not yet done; returns the records of its tests, and adds each to OUT/runs.jsonl when its
    run ends. A run that broke off goes on from its last checkpoint. Ctrl-C and SIGTERM let those under way save.

    Raises:
        UserError: a sweep that cannot be run; runs in the folder that were made with other settings; another sweep in
            it; runs that failed or diverged, once the others are done.
    """
    check_sweep(config)
    settings = [(method, budget) for budget in config.budgets for method in config.methods]
    rates = {setting: config.lr.values for setting in settings}
    with alone_in(Path(config.out)), _sigterm_as_ctrl_c():
        if config.tuned:
            trials = [run for setting in settings for lr in config.lr.values
                      for run in sweep_runs(config, *setting, lr, [config.lr.seed], "valid")]
            best = best_rates(config, _records(config, trials, "tuning"))
            rates = {setting: [best[setting]] for setting in settings}
        runs = [run for seed in config.seeds for setting in settings for lr in rates[setting]
                for run in sweep_runs(config, *setting, lr, [seed], "test")]
        records = _records(config, runs, "runs")
    if diverged := [f"{record['run']}: {record['diverged']}" for record in records if "diverged" in record]:
        raise UserError("\n".join([f"{len(diverged)} of {len(records)} trainings diverged; leave such learning rates "
                                   "out of lr.values:", *diverged]))
    return records


def best_rates(config: SweepConfig, records: Sequence[Mapping]) -> dict[tuple[str, str], float]:
    """(method, budget) -> the learning rate with the best score on the valid split, among those with which no training
    diverged."""
    diverged = {(record["method"], record["budget"], record["lr"]) for record in records if "diverged" in record}
    left = [record for record in records if (record["method"], record["budget"], record["lr"]) not in diverged]
    rates = {}
    for budget in config.budgets:
        own = [record for record in left if record["budget"] == budget]
        if gone := config.methods.keys() - {record["method"] for record in own}:
            raise UserError(f"{min(gone)}, {budget}: a training diverged with every learning rate; try lower ones")
        scores = valid_scores(config, own)
        for method in config.methods:
            rates[method, budget] = max((lr for lr in config.lr.values if (method, lr) in scores),
                                        key=lambda lr: scores[method, lr])
    return rates


def _records(config: SweepConfig, runs: Sequence[SweepRun], what: str) -> list[dict]:
    """A record of each run; those that are not done are run."""
    out = Path(config.out)
    known = read_records(out / RECORDS)
    for run in runs:
        if run.name in known and known[run.name]["digest"] != run.digest:
            raise UserError(f"{out / run.name} was made with other settings than the sweep's: remove its line from "
                            f"{out / RECORDS}, and its folder, or choose another out=FOLDER")
    todo = [run for run in runs if run.name not in known]
    failed, under_way = [], _UnderWay()
    pool = ThreadPoolExecutor(config.jobs)
    try:
        started = {pool.submit(_run, run, out / run.name, config.jobs, under_way): run for run in todo}
        for future in tqdm(as_completed(started), total=len(todo), desc=what, unit="run", dynamic_ncols=True):
            run = started[future]
            try:
                known[run.name] = future.result()
            except (UserError, OSError) as error:
                log.warning("%s", error)
                failed.append(str(error))
                continue
            if "tasks" in known[run.name]:
                task_values(config, known[run.name])  # raises UserError where `metrics` is wrong
            part = out / f"{RECORDS}.part"
            part.write_text("".join(json.dumps(record) + "\n" for record in known.values()), encoding="utf-8")
            part.replace(out / RECORDS)
    except BaseException:
        under_way.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        raise UserError("\n".join([f"{len(failed)} of {len(runs)} runs failed; the same command tries them again:",
                                   *failed]))
    return [known[run.name] for run in runs]


def _run(run: SweepRun, folder: Path, jobs: int, under_way: "_UnderWay") -> dict:
    """Trains and measures one run in a process of its own. Raises UserError where that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / _DIGEST
    if not begun.exists():
        part = folder / f"{_DIGEST}.part"
        part.write_text(run.digest, encoding="utf-8")
        part.replace(begun)
    elif begun.read_text(encoding="utf-8") != run.digest:
        raise UserError(f"{folder} holds a training that was begun with other settings: remove the folder")
    (folder / "config.yaml").write_text(dump_config(run.config), encoding="utf-8")
    (folder / SCORE).unlink(missing_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with open(folder / "log.txt", "ab") as file:
        start = file.tell()
        code = _process([sys.executable, "-m", "vl_mtl_lora.sweep_run", str(folder), run.split], file,
                        {**os.environ, "OMP_NUM_THREADS": str(threads)}, under_way)
    if code or not (folder / SCORE).exists():  # it ends with 0 where it was told to stop, and has saved
        lines = (folder / "log.txt").read_bytes()[start:].decode(errors="replace").splitlines()
        told = [line for line in lines if line.startswith("error: ")]
        raise UserError(f"{folder}: {told[-1] if told else f'it ended with exit code {code}'} (see its log.txt)")
    score = json.loads((folder / SCORE).read_text(encoding="utf-8"))
    return {"run": run.name, "method": run.method, "budget": run.budget, "lr": run.lr, "seed": run.seed,
            "task": run.task, "split": run.split, "steps": run.config.train.steps, "parameters": run.parameters,
            "adapter": run.config.adapter.model_dump(), "digest": run.digest, **score}


class _UnderWay:
    """The processes that run, to be stopped together; after that none starts."""

    def __init__(self):
        self._lock, self._stopped = threading.Lock(), False
        self._processes: set[subprocess.Popen] = set()

    def start(self, command: Sequence[str], **options) -> subprocess.Popen:
        with self._lock:
            if self._stopped:
                raise UserError("the sweep has been stopped")
            process = subprocess.Popen(command, **options)
            self._processes.add(process)
        return process

    def ended(self, process: subprocess.Popen) -> None:
        with self._lock:
            self._processes.discard(process)

    def stop(self) -> None:
        """Lets each save and end."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.terminate()


def _process(command: Sequence[str], log, environment: Mapping[str, str], under_way: _UnderWay) -> int:
    with under_way.start(command, stdout=log, stderr=subprocess.STDOUT, env=environment) as process:
        try:
            return process.wait()
        finally:
            under_way.ended(process)


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    def interrupt(*_):
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def read_records(path: str | Path) -> dict[str, dict]:
    """The runs of a sweep that are done, by name. Raises UserError where the file is damaged."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    try:
        return {record["run"]: record for record in map(json.loads, lines)}
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
