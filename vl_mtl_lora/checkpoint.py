"""What a run leaves on disk: adapters, heads, task map and config in one folder, and the state to resume from.

Tensors are safetensors under logical names (tower.block.role.parameter), never pickles. A folder is written under a
temporary name and renamed, so that one that can be seen is whole.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vl_mtl_lora.checkpoint_files import (
    FORMAT,
    check_sizes,
    earlier_name,
    find_checkpoint,
    read_description,
    read_tensors,
)
from vl_mtl_lora.config import RunConfig
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.hub import downloaded
from vl_mtl_lora.lora import AdapterSummary
from vl_mtl_lora.model import MultiTaskModel, build_model
from vl_mtl_lora.model_card import data_sources, model_card
from vl_mtl_lora.ranks import everyone, rank, whole
from vl_mtl_lora.sections import DataSection

_PART, _GONE = ".part", ".gone"  # ends of the names of what is being written, and of what is being removed


def save_checkpoint(folder: str | Path, model: MultiTaskModel, config: RunConfig, *, step: int,
                    results: Mapping | None = None, resume: Mapping[str, Tensor] | None = None,
                    keep: int = 0, origin: str | None = None) -> None:
    """Writes a checkpoint folder, replacing an earlier one of that name. Of several processes all must call it, and
    the first one writes.

    Args:
        step: optimizer steps done.
        results: metrics for results.json and the model card.
        resume: tensors of the optimizer and the random generators; see `resume`.
        keep: how many earlier checkpoints of that name stay, as step-N/ beside it.
        origin: where adapters come from that were not trained here.

    Raises:
        UserError: it cannot be written, for want of space or of permission; an earlier one is as it was.
    """
    adapters, heads, resume = (None if state is None else {name: whole(t).detach().cpu() for name, t in state.items()}
                               for state in (model.adapter_state(), model.head_state(), resume))
    problem = None
    if rank() == 0:
        try:
            write_checkpoint(folder, config, model.summary, step=step, base=model.fingerprint, adapters=adapters,
                             heads=heads, results=results, resume=resume, keep=keep, origin=origin)
        except OSError as error:
            problem = f"cannot write the checkpoint {folder}: {error}; make room there and go on with --resume"
    if problem := everyone(problem)[0]:
        raise UserError(problem)


def write_checkpoint(folder: str | Path, config: RunConfig, summary: AdapterSummary, *, step: int, base: str,
                     adapters: Mapping[str, Tensor], heads: Mapping[str, Tensor], results: Mapping | None = None,
                     resume: Mapping[str, Tensor] | None = None, keep: int = 0, origin: str | None = None) -> None:
    """As `save_checkpoint`, of a model's parts, from one process. base: the fingerprint of what the adapters were
    trained on. Raises OSError."""
    folder = Path(folder)
    temporary = folder.with_name(folder.name + _PART)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    description = {
        "format": FORMAT, "method": "MTL-LoRA (arXiv 2410.09437)", "step": step,
        "tasks": list(config.tasks), "base": base, "config": config.model_dump(),
        "modules": summary.modules, "trainable_parameters": summary.parameters, "data": data_sources(config),
    }
    if origin is not None:
        description["origin"] = origin
    _write(temporary / "adapter_config.json", json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    _save(adapters, temporary / "adapter_model.safetensors")
    _save(heads, temporary / "heads.safetensors")
    _write(temporary / "results.json", json.dumps(dict(results or {}), indent=2) + "\n")
    _write(temporary / "README.md", model_card(description, results or {}))
    if resume is not None:
        _save(resume, temporary / "resume.safetensors")
    _sync(temporary)
    old = earlier_name(folder)
    _retire(old, keep)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    _sync(folder.parent)
    _retire(old, keep)
    if keep:
        _remove_but_newest(folder.parent, keep)


def _retire(old: Path, keep: int) -> None:
    """An earlier checkpoint stays as step-N/, or goes."""
    if keep and old.exists():
        earlier = old.with_name(f"step-{read_description(old)['step']}")
        _remove(earlier)
        old.rename(earlier)
    _remove(old)


def _remove_but_newest(folder: Path, keep: int) -> None:
    kept = {int(match[1]): path for path in folder.iterdir() if (match := re.fullmatch(r"step-(\d+)", path.name))}
    for step in sorted(kept)[:-keep]:
        _remove(kept[step])


def _remove(folder: Path) -> None:
    """Under another name, so that nobody takes what is half removed for a checkpoint."""
    gone = folder.with_name(folder.name + _GONE)
    shutil.rmtree(gone, ignore_errors=True)
    if folder.exists():
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def recover_checkpoint(folder: str | Path) -> None:
    """Puts an earlier checkpoint back where `save_checkpoint` was killed between its two renames, and removes what it
    left half written or half removed."""
    folder = Path(folder)
    old = earlier_name(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (*folder.parent.glob(f"*{_GONE}"), folder.with_name(folder.name + _PART)):
        shutil.rmtree(leftover, ignore_errors=True)


def load_checkpoint(folder: str | Path, model: MultiTaskModel) -> dict:
    """Loads adapters and heads into a model built alike; returns the description. Nothing is loaded by halves.

    Raises:
        UserError: another task map, base, set of tensors or shape; an unreadable file or a value that is no number.
    """
    folder = Path(folder)
    description = read_description(folder)
    if description["tasks"] != list(model.router.task_names):
        raise UserError(f"{folder}: its tasks are {description['tasks']}, the model's are "
                        f"{list(model.router.task_names)}; ids would point at other tasks' parameters")
    if description["base"] != model.fingerprint:
        raise UserError(f"{folder}: the adapters were trained on another base "
                        f"({description['config'].backbone.model_dump()}); load that one")
    check_hyperparameters(folder, description["config"], model.summary)
    loaded = [(model.adapter_state(), folder / "adapter_model.safetensors"),
              (model.head_state(), folder / "heads.safetensors")]
    checked = [(own, read_tensors(path, own)) for own, path in loaded]
    with torch.no_grad():
        for own, tensors in checked:
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
    return description


def check_hyperparameters(folder: str | Path, saved: RunConfig, summary: AdapterSummary) -> None:
    """Raises UserError where a checkpoint's adapters are to compute something else than they were trained to."""
    own = asdict(summary.config)
    for name in ("method", "rank", "alpha", "num_up", "temperature", "transform"):
        if (got := getattr(saved.adapter, name)) != own[name]:
            raise UserError(f"{folder}: its adapters have {name} {got}, the model's {own[name]}; with another "
                            "value they would compute something else")


def load_run(folder: str | Path, device: str | torch.device | None = None,
             allow_pipe: bool = False) -> tuple[MultiTaskModel, RunConfig]:
    """Builds the model that a checkpoint was saved from, and loads it, ready for evaluation.

    folder: a checkpoint, or a run, of which the best checkpoint is taken, else the last; or "hf://USER/NAME", with
        "@REVISION" for a branch, tag or commit, of the hub.
    device: where to put the model; None: a GPU where there is one.
    allow_pipe: its `data.allow_pipe` holds. Else it is off in the config returned: a checkpoint may be anyone's, and so
        may be the shell commands in it.
    """
    folder = find_checkpoint(folder)
    config = read_description(folder)["config"]
    config = config.model_copy(update={"data": config.data.model_copy(update={
        "allow_pipe": config.data.allow_pipe and allow_pipe,
        # A stranger's config does not name a folder to write into either.
        "cache": DataSection().cache if downloaded(folder) else config.data.cache})})
    check_sizes(folder, config)
    model = build_model(config)
    load_checkpoint(folder, model)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), config




def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    _sync(path)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Of a file its content, of a folder its list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

