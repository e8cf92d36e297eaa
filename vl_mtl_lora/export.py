"""A trained task folded into the base, as a checkpoint that the model's own library loads."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from vl_mtl_lora.checkpoint import load_run
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.model import MultiTaskModel


def merged_state(model: MultiTaskModel, task: str) -> dict[str, torch.Tensor]:
    """The backbone's state dict under its library's own names, with one task's adapters folded in."""
    index = model.router.index(task)
    merged = {layer.base.weight: layer.merged(index).weight.detach() for layer in model.summary.layers.values()}
    return model.backbone.library_state(merged)


def export_merged(run: str | Path, task: str, out: str | Path) -> None:
    """Writes the merged weights of one task as safetensors.

    Raises:
        UserError: an unknown task, or a file name that is not *.safetensors.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise UserError(f"--out: {out} must end in .safetensors")
    model, _ = load_run(run)
    state = {name: tensor.cpu().contiguous() for name, tensor in merged_state(model, task).items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".part")
    save_file(state, temporary)
    temporary.replace(out)
