"""What a run leaves on disk: adapters, heads, task map and config in one folder, and the state to resume from.

Tensors are safetensors under logical names (tower.block.role.parameter), never pickles. A folder is written under a
temporary name and renamed, so that one that can be seen is whole.
"""

import hashlib
import json
import os
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
from vl_mtl_lora.model import MultiTaskModel, build_model

FORMAT = "vl_mtl_lora/1"


def save_checkpoint(folder: str | Path, model: MultiTaskModel, config: RunConfig, *, step: int,
                    results: Mapping | None = None, resume: Mapping[str, Tensor] | None = None) -> None:
    """Writes a checkpoint folder, replacing an earlier one of that name.

    Args:
        step: optimizer steps done.
        results: metrics for results.json and the model card.
        resume: tensors of the optimizer and the random generators; see `trainer`.
    """
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    summary = model.summary
    description = {
        "format": FORMAT, "method": "MTL-LoRA (arXiv 2410.09437)", "step": step,
        "tasks": list(model.router.task_names), "base": fingerprint(model), "config": config.model_dump(),
        "modules": summary.modules, "trainable_parameters": summary.parameters,
    }
    _write(temporary / "adapter_config.json", json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    _save(model.adapter_state(), temporary / "adapter_model.safetensors")
    _save(model.head_state(), temporary / "heads.safetensors")
    _write(temporary / "results.json", json.dumps(dict(results or {}), indent=2) + "\n")
    _write(temporary / "README.md", model_card(config, model, step, results or {}))
    if resume is not None:
        _save(resume, temporary / "resume.safetensors")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


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
        raise UserError(f"{path}: expected format {FORMAT!r}, got {dict(description).get('format')!r}")
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
    if description["base"] != fingerprint(model):
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

    folder: a checkpoint, or a run, of which the best checkpoint is taken, else the last.
    device: where to put the model; None: a GPU where there is one.
    """
    folder = find_checkpoint(folder)
    config = parse_config(read_description(folder)["config"], where=lambda loc: f"{folder}/adapter_config.json")
    model = build_model(config)
    load_checkpoint(folder, model)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), config


def find_checkpoint(folder: str | Path) -> Path:
    """The checkpoint folder that a run or checkpoint folder stands for. Raises UserError where there is none."""
    folder = Path(folder)
    for candidate in (folder, folder / "best", folder / "last"):
        if (candidate / "adapter_config.json").is_file():
            return candidate
    raise UserError(f"no checkpoint in {folder}: expected a run's folder with best/ or last/, or one of those")


def load_resume(folder: str | Path) -> dict[str, Tensor]:
    """The tensors saved as `resume`. Raises UserError where there are none."""
    try:
        return load_file(Path(folder) / "resume.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be resumed: {error}") from error


def fingerprint(model: MultiTaskModel) -> str:
    """A short hash over the shapes and some values of the frozen weights: cheap also for large bases."""
    digest = hashlib.sha256()
    for tensor in model.backbone.library_state().values():
        if type(tensor) is not Tensor or not tensor.is_floating_point():  # quantised: the others tell enough
            continue
        flat = tensor.flatten()
        step = max(1, len(flat) // 64)
        digest.update(repr((tuple(tensor.shape), flat[::step][:64].float().cpu().tolist())).encode())
    return digest.hexdigest()[:16]


def model_card(config: RunConfig, model: MultiTaskModel, step: int, results: Mapping) -> str:
    """README.md of a checkpoint: what it is, what it was trained on, what it scored."""
    base = config.backbone
    lines = ["# MTL-LoRA adapters", "",
             f"Adapters ([MTL-LoRA](https://arxiv.org/abs/2410.09437)) for `{base.name}`"
             + (f" (`{base.pretrained}`)" if base.pretrained else "") + f" from {base.library}, "
             f"trained for {step} steps on the tasks {', '.join(model.router.task_names)}.", "",
             f"Trainable parameters: {model.summary.total:,} "
             f"({', '.join(f'{tower} {count:,}' for tower, count in model.summary.parameters.items())}); "
             f"rank {config.adapter.rank}, alpha {config.adapter.alpha:g}, {config.adapter.num_up} up-projections, "
             f"temperature {config.adapter.temperature:g}.", ""]
    metrics = results.get("tasks", {})
    if metrics:
        lines += ["| task | metric | value |", "|---|---|---|"]
        lines += [f"| {task} | {name} | {value:.2f} |" for task, values in metrics.items()
                  for name, value in values.items()]
        lines += ["", f"Measured on {results.get('split', 'the valid split')}.", ""]
    lines += ["```python", "from vl_mtl_lora import load_run", 'model, config = load_run("THIS_FOLDER")', "```", ""]
    return "\n".join(lines)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    _sync(path)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


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
