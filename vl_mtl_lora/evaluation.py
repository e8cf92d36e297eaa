"""One arm measured: of a run, of a base or a merged model alone, or of two files of embeddings."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from vl_mtl_lora.checkpoint import load_run
from vl_mtl_lora.config import load_config
from vl_mtl_lora.data.faults import FaultLog
from vl_mtl_lora.embeddings import EmbeddingStore, evaluate_files, made_folder, write_trec
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.evaluate import Evaluation, evaluate_task, evaluation_indices
from vl_mtl_lora.model import build_model
from vl_mtl_lora.results import arm_results, provenance
from vl_mtl_lora.tasks.retrieval import Retrieval


def evaluate_model(target: str | Path, overrides: Sequence[str] = (), *, split: str = "test", limit: int | None = None,
                   zero_shot: bool = False, embeddings: str | Path | None = None,
                   trec: str | Path | None = None, allow_pipe: bool = False) -> dict:
    """Evaluates the tasks of a run, or of a config's base alone.

    Args:
        target: a run's or checkpoint's folder; or a config, a YAML file, whose backbone is evaluated zero-shot. So is a
            merged model: `backbone.pretrained=FILE` among the overrides.
        overrides: of a config's values.
        embeddings: folder where embeddings of retrieval tasks are kept for the next time.
        allow_pipe: of a run; see `load_run`.
        trec: folder for the rankings of retrieval tasks; see `write_trec`.

    Returns:
        {"arm", "tasks": {task: `arm_results` and "notes"}, "seconds"} and `provenance`.

    Raises:
        UserError: a target that is neither, or overrides of a run.
    """
    start = time.perf_counter()
    if Path(target).suffix in (".yaml", ".yml"):
        config = load_config(target, list(overrides))
        model = build_model(config).to("cuda" if torch.cuda.is_available() else "cpu")
        zero_shot = True
    else:
        if overrides:
            raise UserError(f"{target} is a run, which has its config; {overrides[0]!r} belongs to a config's file")
        model, config = load_run(target, allow_pipe=allow_pipe)
    if trec:
        made_folder(trec)  # before the work, not after it
    faults = FaultLog(config.data.max_fault_share)
    indices = evaluation_indices(config, split, faults)
    store = EmbeddingStore(embeddings, model) if embeddings else None
    arm = "zero_shot" if zero_shot else "adapted"
    tasks = {}
    for name, index in indices.items():
        task = model.tasks[name]
        found = evaluate_task(model, index, zero_shot=zero_shot, limit=limit, rows=config.data.eval_batch,
                              faults=faults, thorough=True, store=store)
        if trec and isinstance(task, Retrieval):
            write_trec(trec, task, found.samples, found.predictions, arm)
        tasks[name] = {**arm_results(found), "notes": task.notes(found.samples)}
    return {"arm": arm, "tasks": tasks, **provenance(config, model, indices, split),
            "seconds": {"evaluation": time.perf_counter() - start}, "faults": faults.report()}


def evaluate_embeddings(images: str | Path, texts: str | Path, faiss_from: int | None = None) -> dict:
    """The retrieval metrics of a pair of embedding files, as `evaluate_model` returns those of a task."""
    start = time.perf_counter()
    found = Evaluation([], [], [], evaluate_files(images, texts, faiss_from))
    return {"arm": "embeddings", "tasks": {"retrieval": {**arm_results(found), "notes": []}},
            "files": [str(images), str(texts)], "seconds": {"evaluation": time.perf_counter() - start}}


def check_writable(path: str | Path) -> None:
    """Raises UserError where `write_json` could not write, before the work is done."""
    if not Path(path).absolute().parent.is_dir() or Path(path).is_dir():
        raise UserError(f"--out: cannot write {path}: expected a file in a folder that exists")


def write_json(results: dict, path: str | Path) -> None:
    """Writes results as JSON, whole or not at all. Raises UserError."""
    path = Path(path)
    try:
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise UserError(f"--out: cannot write {path}: {error}") from error
