"""What adaptation did to what it was not for: held-out sets answered through each task's adapters, and the base proven
untouched."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from vl_mtl_lora.data.faults import FaultLog
from vl_mtl_lora.data.index import TaskIndex
from vl_mtl_lora.data.stream import Batch
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.evaluate import evaluate_task
from vl_mtl_lora.metrics.bootstrap import interval, paired_interval
from vl_mtl_lora.model import MultiTaskModel, example_batch
from vl_mtl_lora.sections import RunConfig
from vl_mtl_lora.tasks import build_tasks


def forgetting(model: MultiTaskModel, config: RunConfig, indices: Mapping[str, TaskIndex], limit: int | None,
               faults: FaultLog) -> list[dict]:
    """Evaluates the held-out tasks zero-shot, with adapters off and then with those of each trained task.

    Returns:
        One {"task", "metric", "n", "frozen", "interval", "through": {trained task: {"figure", "change"}}} for each
        held-out task, of its primary metric; `change` is the 95 % interval of the paired difference.
    """
    out = []
    tasks = build_tasks(config.held_out, model.backbone).to(model.backbone.device)
    for name, index in indices.items():
        def measured(through: str | None, task=tasks[name], index=index):
            return evaluate_task(model, index, zero_shot=True, task=task, through=through, limit=limit, faults=faults,
                                 rows=config.data.eval_batch).metrics[task.primary]
        frozen = measured(None)
        through = {trained: measured(trained) for trained in model.tasks}
        out.append({"task": name, "metric": tasks[name].primary, "n": frozen.n, "frozen": float(frozen),
                    "interval": interval(frozen),
                    "through": {trained: {"figure": float(metric), "change": paired_interval(frozen, metric)}
                                for trained, metric in through.items()}})
    return out


@torch.no_grad()
def check_base(model: MultiTaskModel) -> int:
    """Compares what the model computes under `router.off()` with what it computes without any adapter in it.

    Every output that the tasks read must be equal bit for bit. The weights themselves are those that the adapters were
    trained on: loading a checkpoint compares their fingerprint.

    Returns:
        How many numbers were compared.

    Raises:
        UserError: one differs.
    """
    model.eval()
    batch = example_batch(model)  # of noise, another each time
    with model.router.off():
        off = _outputs(model, batch)
    with _taken_out(model):
        bare = _outputs(model, batch)
    for name, tensor in off.items():
        if not torch.equal(tensor, bare[name]):
            raise UserError(f"with adapters off, {name} differs from the frozen base's: this model's zero-shot figures "
                            "would not be the base's")
    return sum(tensor.numel() for tensor in off.values())


def _outputs(model: MultiTaskModel, batch: Batch) -> dict[str, torch.Tensor]:
    backbone = model.backbone
    tokens = backbone.text.rows(["a photo of a red circle", "what is in the picture?"]).to(backbone.device)
    found = {}
    if "embed" in backbone.capabilities:
        found["encode_text"] = backbone.encode_text(tokens)
    if batch.images is not None:
        states = backbone.image_states(batch.images).rows(slice(0, 2))
        if "embed" in backbone.capabilities:
            found["encode_image"] = backbone.encode_image(states)
        if "generate" in backbone.capabilities:
            found["token_logits"] = backbone.token_logits(states, tokens)
    return found


@contextmanager
def _taken_out(model: MultiTaskModel) -> Iterator[None]:
    """Every adapted layer replaced by the frozen one that it holds."""
    places = [(place.parent, place.attribute, model.summary.layers[name])
              for name, place in model.summary.places.items()]
    try:
        for parent, attribute, layer in places:
            setattr(parent, attribute, layer.base)
        yield
    finally:
        for parent, attribute, layer in places:
            setattr(parent, attribute, layer)
