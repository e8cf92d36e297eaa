"""A trained task in other programs' formats: folded into the base as the model's library saves it, or a PEFT LoRA."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vl_mtl_lora.backbones.base import Place
from vl_mtl_lora.checkpoint import load_run
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.layer import MTLLoRALinear
from vl_mtl_lora.model import MultiTaskModel
from vl_mtl_lora.safe_files import some
from vl_mtl_lora.sections import RunConfig


def export(run: str | Path, task: str, out: str | Path, format: str = "merged") -> list[str]:
    """Writes one task of a run to the new folder `out`; returns what to tell.

    format: "merged", the base with the task folded in, as the model's own library saves it (where `out` ends in
        .safetensors, its weights alone), or "peft", an ordinary LoRA for the model of transformers.

    Raises:
        UserError: an unknown task or format, a folder in use, a layer that the format has no place for.
    """
    out = Path(out)
    if format not in FORMATS:
        raise UserError(f"--format: there is no {format!r}", near=(format, FORMATS))
    if out.is_dir() and any(out.iterdir()) or out.is_file() and out.suffix != ".safetensors":
        raise UserError(f"--out: {out} is in use: name another folder, or remove it")
    model, config = load_run(run)
    model.router.index(task)
    try:
        return FORMATS[format](model, config, task, out)
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error}") from error


# -- merged -----------------------------------------------------------------------------------------------------------


def merged_state(model: MultiTaskModel, task: str) -> dict[str, Tensor]:
    """The backbone's state dict under its library's own names, with one task's adapters folded in."""
    index = model.router.index(task)
    merged = {layer.base.weight: layer.merged(index).weight.detach() for layer in model.summary.layers.values()}
    return model.backbone.library_state(merged)


def _merged(model: MultiTaskModel, config: RunConfig, task: str, out: Path) -> list[str]:
    state = {name: tensor.cpu().contiguous() for name, tensor in merged_state(model, task).items()}
    if out.suffix == ".safetensors":
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_suffix(".part")
        save_file(state, temporary, {"format": "pt"})
        temporary.replace(out)
    else:
        with _new_folder(out) as folder:
            model.backbone.save_library(folder, state)
    return _left_behind(model, task)


# -- PEFT -------------------------------------------------------------------------------------------------------------


def peft_lora(model: MultiTaskModel, task: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A task's adapters by the names of transformers' layers: lora_A (r, I) and lora_B (O, r), the scale in B.

    Raises:
        UserError: an adapted layer that transformers' model does not have as an `nn.Linear`.
    """
    found, missing = {}, []
    for name, layer in model.summary.layers.items():
        place = model.summary.places[name]
        if _is_ours(model, place):
            continue
        if not (names := model.backbone.hf_names(place)):
            missing.append(name)
        for target, part in names.items():
            if part is None or part in layer.slices:
                found[target] = _factors(layer, model.router.index(task), part)
    if missing:
        raise UserError(f"--format peft: transformers has no model with a linear layer for {some(missing)} "
                        f"({len(missing)} in all); --format merged writes this task, or train with adapter.targets "
                        "that leave them out")
    return found


def _factors(layer: MTLLoRALinear, index: int, part: int | None) -> tuple[Tensor, Tensor]:
    """A and B of one of the layer's output slices; None: of all, whose ranks then stand side by side."""
    down, up = (factor.cpu() for factor in layer.fold(index))  # (S, R, I), (S, R, C)
    if part is not None:
        at = layer.slices.index(part)
        return down[at].contiguous(), up[at].T.contiguous()
    slices, rank, columns = up.shape
    whole = torch.zeros(layer.out_features // columns, columns, slices, rank, dtype=up.dtype)
    for at, part in enumerate(layer.slices):
        whole[part, :, at] = up[at].T
    return down.flatten(0, 1), whole.reshape(layer.out_features, slices * rank)


def _peft(model: MultiTaskModel, config: RunConfig, task: str, out: Path) -> list[str]:
    """B holds the scale, so that alpha is the rank; fused layers have a rank of their own."""
    layers = peft_lora(model, task)
    rank = config.adapter.rank
    others = {name: len(a) for name, (a, _) in layers.items() if len(a) != rank}
    kind = model.backbone.hf_class
    settings = {
        "peft_type": "LORA", "task_type": None, "inference_mode": True, "bias": "none", "lora_dropout": 0.0,
        "base_model_name_or_path": None if kind is None else config.backbone.name,
        "auto_mapping": kind and {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others,
        "target_modules": sorted(layers)}
    tensors = {f"base_model.model.{name}.lora_{letter}.weight": tensor
               for name, factors in layers.items() for letter, tensor in zip("AB", factors)}
    with _new_folder(out) as folder:
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return _left_behind(model, task)


FORMATS: dict[str, Callable[[MultiTaskModel, RunConfig, str, Path], list[str]]] = {"merged": _merged, "peft": _peft}


def _is_ours(model: MultiTaskModel, place: Place) -> bool:
    """Whether the layer is the backbone's own, beside the library's model."""
    return place.parent is model.backbone


def _left_behind(model: MultiTaskModel, task: str) -> list[str]:
    """What of the task the export does not hold."""
    ours = [name for name, place in model.summary.places.items() if _is_ours(model, place)]
    heads = [name for name, _ in model.tasks[task].named_parameters()]
    told = []
    if ours:
        told.append(f"left out, since the library's model has no such layer: {some(ours)}; texts are written with the "
                    "run itself")
    if heads:
        told.append(f"left out, the task's own head: {some(heads)}, in the run's heads.safetensors")
    return told


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder that takes its name when it is whole."""
    temporary = path.with_name(path.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.replace(path)  # also over an empty folder
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
