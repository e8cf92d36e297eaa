"""Both arms of a run over its test shards, what adaptation did elsewhere, and the report on all that."""

import json
import time
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

from vl_mtl_lora.anatomy import anatomy
from vl_mtl_lora.checkpoint import load_run
from vl_mtl_lora.checkpoint_files import find_checkpoint, read_description
from vl_mtl_lora.data.faults import FaultLog
from vl_mtl_lora.data.index import build_indices
from vl_mtl_lora.embeddings import EmbeddingStore, made_folder
from vl_mtl_lora.evaluate import Evaluation, evaluate_task, evaluation_indices
from vl_mtl_lora.forgetting import check_base, forgetting
from vl_mtl_lora.gallery import confusion, pick_examples
from vl_mtl_lora.hub import hub_address
from vl_mtl_lora.journal import read_log
from vl_mtl_lora.report import write_report
from vl_mtl_lora.results import paired_results, provenance


def results_of(checkpoint: Path, folder: Path) -> dict | None:
    """The results.json that an earlier `compare` of this checkpoint left in a folder; None where there is none."""
    try:
        results = json.loads((folder / "results.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(results, dict) or not isinstance(results.get("run"), dict):
        return None
    same = (results["run"].get("checkpoint") == checkpoint.name
            and results["run"].get("steps") == read_description(checkpoint)["step"])
    return results if same else None


def known_results(run: str | Path, split: str, limit: int | None, out: str | Path = "comparison") -> dict | None:
    """The results of an earlier `compare` of the same checkpoint; None where that is not what is asked for."""
    results = results_of(find_checkpoint(run), report_folder(run, out))
    return results if results and (results.get("split"), results.get("limit")) == (split, limit) else None


def report_folder(run: str | Path, out: str | Path = "comparison") -> Path:
    """Where `compare` writes: beside a checkpoint on disk (it has a results.json of its own); of a run on the hub into
    OUT/USER--NAME. Raises UserError where there is no run."""
    if address := hub_address(run):
        return Path(out) / str(address).removeprefix("hf://").replace("/", "--")
    return find_checkpoint(run).parent


def compare(run: str | Path, split: str = "test", limit: int | None = None,
            seconds: Mapping[str, float] | None = None, embeddings: str | Path | None = None,
            out: str | Path = "comparison", allow_pipe: bool = False) -> dict:
    """Evaluates a run's tasks zero-shot and adapted, writes results.json, report.md and report.html.

    Args:
        run: a run's folder, or a checkpoint in one; or hf://USER/NAME.
        limit: the most samples of each task.
        seconds: stages timed before, for the report.
        embeddings: folder where embeddings of retrieval tasks are kept for the next time.
        out: of a run on the hub: the folder in which that of its report is made; see `report_folder`.
        allow_pipe: see `load_run`.

    Returns:
        The content of results.json.
    """
    checkpoint = find_checkpoint(run)
    folder = made_folder(report_folder(run, out))
    seconds = dict(seconds or {})

    @contextmanager
    def timed(stage: str):
        start = time.perf_counter()
        yield
        seconds[stage] = time.perf_counter() - start

    model, config = load_run(checkpoint, allow_pipe=allow_pipe)
    arms: dict[str, dict[str, Evaluation]] = {}
    faults = FaultLog(config.data.max_fault_share)
    indices = evaluation_indices(config, split, faults)
    store = EmbeddingStore(embeddings, model) if embeddings else None
    for arm in ("zero_shot", "adapted"):
        with timed(f"evaluation, {arm.replace('_', '-')}"):
            arms[arm] = {name: evaluate_task(model, index, zero_shot=arm == "zero_shot", rows=config.data.eval_batch,
                                             limit=limit, faults=faults, thorough=True, store=store)
                         for name, index in indices.items()}
    held_out, compared = [], 0
    with timed("held-out sets"):
        if config.held_out:
            held_out = forgetting(model, config, build_indices(config, "test", faults, held_out=True), limit, faults)
        compared = check_base(model)
    with timed("intervals"):
        tasks = {name: paired_results(arms["zero_shot"][name], arms["adapted"][name],
                                      model.tasks[name].notes(arms["adapted"][name].samples)) for name in indices}
    frozen = sum(p.numel() for p in model.backbone.parameters() if not p.requires_grad)
    about = {"base": config.backbone.name, "rank": config.adapter.rank, "modules": sum(model.summary.modules.values()),
             "trainable": model.summary.total, "share": 100.0 * model.summary.total / frozen,
             "steps": read_description(checkpoint)["step"], "checkpoint": checkpoint.name}
    results = {"tasks": tasks, "held_out": held_out, "off_equals_base": {"equal": True, "numbers": compared},
               "run": about, "limit": limit, **provenance(config, model, indices, split),
               "seconds": seconds, "faults": faults.report()}
    closed = {name: confusion(pairs) for name, evaluation in arms["adapted"].items()
              if (pairs := model.tasks[name].closed(evaluation.predictions, evaluation.samples))}
    examples = pick_examples(model.tasks, arms["zero_shot"], arms["adapted"],
                             lambda task, row: indices[task].sample(row).images)
    write_report(folder, results, examples, read_log(folder), closed, anatomy(model))
    return results
