"""Adapters that others trained, read from their files into one form: the paper's code, the `adapters` library, PEFT.

Which one it is is told by what is in the files. They come from strangers: nothing is unpickled but tensors, and every
name, shape and number is checked.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vl_mtl_lora.errors import UserError
from vl_mtl_lora.safe_files import one_of, read_json, read_tensors, some

_PAPER_FILES = ("final_checkpoint.pt", "checkpoint/final_checkpoint.pt")
_PAPER_PARTS = {"lora_A": "A", "lora_B": "B", "lora_lambdas": "transform", "lora_B_w": "mix"}
_LIBRARY_PARTS = {"lora_A": "A", "lora_B": "B", "task_specific.values": "transform", "weights": "mix"}
_PEFT_PARTS = {"lora_A.weight": "A", "lora_B.weight": "B"}
# PEFT's settings that say nothing about what its layers compute, or that are read here. Any other must be off.
_PEFT_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora"}
# Other ways to start, PiSSA among them, change the base's weights too, and the file holds only half of that.
_PEFT_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LayerAdapter:
    """One layer's adapter. R its rank, I in, O out, T tasks, N up-projections.

    down (R, I): A. up (N, O, R): the B_i, or one for all. transform: Lambda, (T, R, R) or the diagonals (T, R), None
    for the identity. mix (T, N): w, None where it makes no difference. scale: of the whole; None: alpha / R.
    """

    down: Tensor
    up: Tensor
    transform: Tensor | None = None
    mix: Tensor | None = None
    scale: float | None = None


@dataclass(frozen=True)
class Source:
    """What was read.

    kind: its origin in words. layers: by the name that the source gives the adapted layer. tasks: their names, or only
    how many there are, or None where all tasks get the same. settings: values that `adapter` of the config must have.
    unsaid: those of them that the source does not record. least_rank: of PEFT, whose layers may have different ranks.
    """

    kind: str
    layers: Mapping[str, LayerAdapter]
    tasks: Sequence[str] | int | None = None
    settings: Mapping[str, float | str] = field(default_factory=dict)
    unsaid: Mapping[str, str] = field(default_factory=dict)
    least_rank: int = 1


def read_source(path: str | Path, tasks: Sequence[str]) -> Source:
    """Reads a file or folder of another program's adapters; `tasks` is the order in which named ones are stacked.

    Raises:
        UserError: a file that cannot be read, is of no known kind, or asks for what an MTL-LoRA layer cannot compute.
    """
    path = Path(path)
    if path.is_file():
        return _paper(path)
    if not path.is_dir():
        raise UserError(f"no such file or folder: {path}")
    if (path / "adapter_config.json").is_file():
        config = read_json(path / "adapter_config.json")
        if "peft_type" in config:
            return _peft(path, config)
        if isinstance(config.get("config"), dict) and "architecture" in config["config"]:
            return _library({path: config}, tasks)
        if "format" in config:
            raise UserError(f"{path} is a checkpoint of vl-mtl-lora: it needs no import")
        raise UserError(f"{path}/adapter_config.json: neither PEFT's (peft_type) nor the adapters library's "
                        "(config.architecture)")
    if folders := [file.parent for file in sorted(path.glob("*/adapter_config.json"))]:
        return _library({folder: read_json(folder / "adapter_config.json") for folder in folders}, tasks)
    for name in _PAPER_FILES:
        if (path / name).is_file():
            return _paper(path / name)
    raise UserError(f"{path}: nothing to import; expected adapter_config.json, a folder with one for each task, or "
                    f"{_PAPER_FILES[0]}")


# -- the paper's code -------------------------------------------------------------------------------------------------


def _paper(path: Path) -> Source:
    """The paper's own training script: a dict of `LAYER.lora_*`, and no settings; `mLoRALinear` in
    https://github.com/pUmpKin-Co/MTL-LoRA/blob/main/src/adapter/mlora.py computes

        y = W x + (alpha / r) * sum_i softmax(lora_B_w[t] / tau)_i  lora_B[i]  lora_lambdas[t]  lora_A[0]  x
    """
    tensors = {name.removeprefix("module."): tensor for name, tensor in read_tensors(path).items()}  # DDP's prefix
    if not any(name.endswith(".lora_lambdas") for name in tensors):
        raise UserError(f"{path}: no checkpoint of the paper's code, which has tensors LAYER.lora_lambdas; of PEFT or "
                        "the adapters library give the folder, since adapter_config.json counts too")
    found = _grouped(tensors, _PAPER_PARTS, r"(.+)\.(lora_\w+)", path)
    layers, sizes = {}, {}
    for name, parts in found.items():
        down, up, transform, mix = (parts[part] for part in ("A", "B", "transform", "mix"))
        (num_up, _, rank), (tasks, _) = _shape(up, 3, f"{name}.lora_B", path), _shape(mix, 2, f"{name}.lora_B_w", path)
        _expect(down, (1, rank, None), f"{name}.lora_A", path)
        _expect(mix, (tasks, num_up), f"{name}.lora_B_w", path)
        _expect(transform, (tasks, rank) if transform.dim() == 2 else (tasks, rank, rank), f"{name}.lora_lambdas", path)
        layers[name] = LayerAdapter(down[0], up, transform, mix)
        sizes.setdefault((rank, num_up, tasks, "full" if transform.dim() == 3 else "diagonal"), name)
    if len(sizes) > 1:
        raise UserError(f"{path}: layers differ in rank, number of up-projections or tasks: "
                        f"{', '.join(sizes.values())}")
    (rank, num_up, tasks, transform), = sizes
    return Source("the paper's code", layers, tasks,
                  {"rank": rank, "num_up": num_up, "transform": transform},
                  {"alpha": "its --lora_alpha, 16 unless given",
                   "temperature": "its --temperature, 0.1 in its LLaMA script, 1.0 unless given; a layer's own default "
                                  "of 0 divides by zero, so that nothing can have been trained with it"})


# -- the adapters library ---------------------------------------------------------------------------------------------


def _library(folders: Mapping[Path, dict], tasks: Sequence[str]) -> Source:
    """One folder per task as `save_all_adapters` writes them; `MTLLoRA` in
    https://github.com/adapter-hub/adapters/blob/main/src/adapters/methods/lora.py computes, with x as a row,

        y = x W' + (alpha / r) * sum_i softmax(weights / weights_sharpness)_i  x lora_A' diag(values) lora_B[i]'
    """
    read = {}
    for folder, config in folders.items():
        inner = config.get("config")
        if not isinstance(inner, dict) or inner.get("architecture") != "mtl_lora":
            raise UserError(f"{folder}: expected an adapter of the adapters library with architecture mtl_lora; a "
                            "plain PEFT LoRA is imported by its own folder, one for all tasks")
        name = str(config.get("name"))
        if name in read:
            raise UserError(f"{folder}: a second adapter named {name!r}")
        if inner.get("task_specific_matrix_type") != "singular_values":
            raise UserError(f"{folder}: task_specific_matrix_type {inner.get('task_specific_matrix_type')!r} is not "
                            "supported, expected singular_values; the library itself cannot build the other")
        settings = {"rank": _number(inner, "r", folder), "alpha": _number(inner, "alpha", folder),
                    "num_up": _number(inner, "n_up_projection", folder),
                    "temperature": _number(inner, "weights_sharpness", folder), "transform": "diagonal"}
        path = one_of(folder, ("adapter.safetensors", "pytorch_adapter.bin"))
        read[name] = settings, path, _grouped(read_tensors(path), _LIBRARY_PARTS,
                                              rf"(.+)\.loras\.{re.escape(name)}\.([\w.]+)", path)
    if read.keys() != set(tasks):
        raise UserError(f"the adapters are {', '.join(sorted(read))}, the config's tasks {', '.join(sorted(tasks))}: "
                        "they must have the same names")
    settings, first, own = read[tasks[0]]
    layers = {}
    for others, path, found in read.values():
        if others != settings:
            raise UserError(f"{path}: settings {others} differ from {settings} in {first}")
        if odd := sorted(found.keys() ^ own.keys()):
            raise UserError(f"{path} and {first}: only one of them adapts {some(odd)}")
    rank, num_up = settings["rank"], settings["num_up"]
    for name, parts in own.items():
        for _, path, found in read.values():
            _expect(found[name]["transform"], (rank,), f"{name} task_specific.values", path)
            _expect(found[name]["mix"], (num_up,), f"{name} weights", path)
            if not all(torch.equal(found[name][part], parts[part]) for part in "AB"):
                raise UserError(f"{path} and {first}: {name} has another lora_A or lora_B for each task; here tasks "
                                "share them, as after the library's share_parameters")
        _expect(parts["A"], (rank, None), f"{name} lora_A", first)
        _expect(parts["B"], (num_up, None, rank), f"{name} lora_B", first)
        transform, mix = (torch.stack([read[task][2][name][part] for task in tasks]) for part in ("transform", "mix"))
        layers[name] = LayerAdapter(parts["A"], parts["B"], transform, mix)
    return Source("the adapters library", layers, list(tasks), settings)


# -- PEFT -------------------------------------------------------------------------------------------------------------


def _peft(path: Path, config: dict) -> Source:
    """A plain LoRA of PEFT, y = W x + s B A x; s is alpha / r, or alpha / sqrt(r) with use_rslora."""
    if config["peft_type"] != "LORA":
        raise UserError(f"{path}: peft_type {config['peft_type']!r} cannot be imported; expected LORA")
    for key, value in config.items():
        if value and key not in _PEFT_KNOWN:
            raise UserError(f"{path}/adapter_config.json: {key} is {str(value)[:80]!r}; only a plain LoRA can be "
                            "imported, one that is nothing but A and B beside a frozen layer")
    if config.get("bias", "none") != "none":
        raise UserError(f"{path}/adapter_config.json: bias is {config['bias']!r}: it trained biases of the base, which "
                        "stays frozen here")
    if (start := config.get("init_lora_weights", True)) not in _PEFT_STARTS:
        raise UserError(f"{path}/adapter_config.json: init_lora_weights is {start!r}, which changes the base's "
                        "weights; let PEFT convert it to a plain LoRA first (save_pretrained with "
                        "path_initial_model_for_weight_conversion)")
    file = one_of(path, ("adapter_model.safetensors", "adapter_model.bin"))
    rank, alpha = _number(config, "r", path), _number(config, "lora_alpha", path)
    layers = {}
    found = _grouped(read_tensors(file), _PEFT_PARTS, r"base_model\.model\.(.+)\.(lora_[AB]\.weight)", file)
    for name, parts in found.items():
        own = _number(config.get("rank_pattern"), _pattern(config, "rank_pattern", name, path), path, rank)
        _expect(parts["A"], (own, None), f"{name}.lora_A.weight", file)
        _expect(parts["B"], (None, own), f"{name}.lora_B.weight", file)
        scale = _number(config.get("alpha_pattern"), _pattern(config, "alpha_pattern", name, path), path, alpha)
        scale /= math.sqrt(own) if config.get("use_rslora") else own
        layers[name] = LayerAdapter(parts["A"], parts["B"].unsqueeze(0), scale=scale)
    return Source("PEFT", layers, least_rank=max(len(layer.down) for layer in layers.values()))


def _pattern(config: dict, key: str, layer: str, path: Path) -> str | None:
    """The entry of rank_pattern or alpha_pattern that holds for a layer, the first that fits, as PEFT takes it."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{path}/adapter_config.json: {key} must be a JSON object, got {patterns!r}")
    try:
        return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", layer)), None)
    except re.error as error:
        raise UserError(f"{path}/adapter_config.json: {key}: {error}") from error


# -- tensors and numbers ---------------------------------------------------------------------------------------------


def _grouped(tensors: Mapping[str, Tensor], parts: Mapping[str, str], pattern: str, path: Path
             ) -> dict[str, dict[str, Tensor]]:
    """Tensors by layer and part. pattern: of a tensor's name, with the layer and the source's word for the part."""
    layers, unknown = {}, []
    for name, tensor in tensors.items():
        match = re.fullmatch(pattern, name)
        if match and match[2] in parts:
            layers.setdefault(match[1], {})[parts[match[2]]] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise UserError(f"{path}: {len(unknown)} tensors are no part of the adapters and cannot be imported: "
                        f"{some(unknown)}; the base stays frozen here")
    for layer, own in layers.items():
        if missing := [word for word, part in parts.items() if part not in own]:
            raise UserError(f"{path}: {layer} has no {', '.join(missing)}")
    return layers


def _number(config: Mapping | None, key: str | None, path: Path, default: float | None = None) -> float:
    """A positive number of a config; `default` where there is no key."""
    if key is None:
        return default
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{path}/adapter_config.json: {key} must be a positive number, got {value!r}")
    return value


def _shape(tensor: Tensor, dims: int, name: str, path: Path) -> tuple[int, ...]:
    if tensor.dim() != dims:
        raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected {dims} dimensions")
    return tuple(tensor.shape)


def _expect(tensor: Tensor, shape: Sequence[int | None], name: str, path: Path) -> None:
    """None stands for any size."""
    if tensor.dim() != len(shape) or any(want not in (None, got) for want, got in zip(shape, tensor.shape)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected ({wanted})")
