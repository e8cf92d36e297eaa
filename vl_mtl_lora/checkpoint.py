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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vl_mtl_lora.config import RunConfig, parse_config
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.hub import download, downloaded, hub_address
from vl_mtl_lora.model import MultiTaskModel, build_model
from vl_mtl_lora.model_card import data_sources, model_card
from vl_mtl_lora.ranks import everyone, rank, whole
from vl_mtl_lora.sections import DataSection

FORMAT = "vl_mtl_lora/1"


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
            _write_checkpoint(Path(folder), model, config, step, adapters, heads, results or {}, resume, keep, origin)
        except OSError as error:
            problem = f"cannot write the checkpoint {folder}: {error}; make room there and go on with --resume"
    if problem := everyone(problem)[0]:
        raise UserError(problem)


def _write_checkpoint(folder: Path, model: MultiTaskModel, config: RunConfig, step: int, adapters: Mapping[str, Tensor],
                      heads: Mapping[str, Tensor], results: Mapping, resume: Mapping[str, Tensor] | None,
                      keep: int, origin: str | None) -> None:
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    summary = model.summary
    description = {
        "format": FORMAT, "method": "MTL-LoRA (arXiv 2410.09437)", "step": step,
        "tasks": list(model.router.task_names), "base": model.fingerprint, "config": config.model_dump(),
        "modules": summary.modules, "trainable_parameters": summary.parameters, "data": data_sources(config),
    }
    if origin is not None:
        description["origin"] = origin
    _write(temporary / "adapter_config.json", json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    _save(adapters, temporary / "adapter_model.safetensors")
    _save(heads, temporary / "heads.safetensors")
    _write(temporary / "results.json", json.dumps(dict(results), indent=2) + "\n")
    _write(temporary / "README.md", model_card(description, results))
    if resume is not None:
        _save(resume, temporary / "resume.safetensors")
    _sync(temporary)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    _sync(folder.parent)
    if keep and old.exists():
        earlier = folder.with_name(f"step-{read_description(old)['step']}")
        shutil.rmtree(earlier, ignore_errors=True)
        old.rename(earlier)
    shutil.rmtree(old, ignore_errors=True)
    if keep:
        _remove_but_newest(folder.parent, keep)


def _remove_but_newest(folder: Path, keep: int) -> None:
    kept = {int(match[1]): path for path in folder.iterdir() if (match := re.fullmatch(r"step-(\d+)", path.name))}
    for step in sorted(kept)[:-keep]:
        shutil.rmtree(kept[step], ignore_errors=True)


def recover_checkpoint(folder: str | Path) -> None:
    """Puts an earlier checkpoint back where `save_checkpoint` was killed between its two renames."""
    folder = Path(folder)
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)


def read_description(folder: str | Path) -> dict:
    """The parsed adapter_config.json. Raises UserError where there is none of our format."""
    path = Path(folder) / "adapter_config.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no checkpoint: cannot read {path.name}: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        got = description.get("format") if isinstance(description, dict) else description
        raise UserError(f"{path}: expected format {FORMAT!r}, got {got!r:.50}")
    if missing := {"tasks", "base", "config", "step"} - description.keys():
        raise UserError(f"{path}: {', '.join(sorted(missing))} missing")
    return description


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
                        f"({description['config']['backbone']}); load that one")
    saved, own = description["config"]["adapter"], asdict(model.summary.config)
    for name in ("rank", "alpha", "num_up", "temperature", "transform"):
        if saved[name] != own[name]:
            raise UserError(f"{folder}: its adapters have {name} {saved[name]}, the model's {own[name]}; with another "
                            "value they would compute something else")
    loaded = [(model.adapter_state(), folder / "adapter_model.safetensors"),
              (model.head_state(), folder / "heads.safetensors")]
    checked = [(own, _load(own, path)) for own, path in loaded]
    with torch.no_grad():
        for own, tensors in checked:
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
    return description


def load_run(folder: str | Path, device: str | torch.device | None = None) -> tuple[MultiTaskModel, RunConfig]:
    """Builds the model that a checkpoint was saved from, and loads it, ready for evaluation.

    folder: a checkpoint, or a run, of which the best checkpoint is taken, else the last; or "hf://USER/NAME", with
        "@REVISION" for a branch, tag or commit, of the hub.
    device: where to put the model; None: a GPU where there is one.
    """
    folder = find_checkpoint(folder)
    config = parse_config(read_description(folder)["config"], where=lambda loc: f"{folder}/adapter_config.json")
    if downloaded(folder):  # a stranger's config names neither commands to run nor a folder to write into
        config = config.model_copy(update={"data": config.data.model_copy(
            update={"allow_pipe": False, "cache": DataSection().cache})})
    model = build_model(config)
    load_checkpoint(folder, model)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), config


def find_checkpoint(folder: str | Path) -> Path:
    """The checkpoint folder that a run, a checkpoint folder or an address on the hub stands for; what lies on the hub
    is downloaded. Raises UserError where there is none."""
    if address := hub_address(folder):
        return download(address)
    folder = Path(folder)
    for candidate in (folder, folder / "best", folder / "last"):
        if (candidate / "adapter_config.json").is_file():
            return candidate
    raise UserError(f"no checkpoint in {folder}: expected a run's folder with best/ or last/, or one of those")




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


def _load(own: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if missing := sorted(own.keys() - tensors.keys()):
        raise UserError(f"{path}: tensors are missing: {', '.join(missing[:5])} ({len(missing)} in all)")
    if unknown := sorted(tensors.keys() - own.keys()):
        raise UserError(f"{path}: unknown tensors: {', '.join(unknown[:5])} ({len(unknown)} in all)")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds a value that is no number")
    return tensors
