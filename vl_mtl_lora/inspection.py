"""What a config adapts, in words: towers, layers, trainable parameters, expected memory."""

from collections.abc import Iterator

from vl_mtl_lora.memory import expected_memory
from vl_mtl_lora.model import MultiTaskModel, build_model, check_gradients
from vl_mtl_lora.sections import RunConfig


def inspect(config: RunConfig) -> Iterator[str]:
    """Lines that describe a config. Needs no weights and no shards; large models are never built at full size.

    Raises:
        UserError: a config that cannot be built, or an adapter that would never learn; names it.
    """
    model = build_model(config, dry_run="shapes")
    frozen = [p for p in model.backbone.model.parameters() if not p.requires_grad]
    count = sum(p.numel() for p in frozen)
    kind = config.backbone.options.get("quantize") or str(model.backbone.dtype).removeprefix("torch.")
    yield f"{config.backbone.name}: {count:,} frozen parameters, {_gigabytes(model.backbone.weight_bytes)} as {kind}"
    if config.data.mixing.by == "quotas":
        yield f"tasks: {', '.join(f'{name} ({task.rows} rows of a batch)' for name, task in config.tasks.items())}"
    else:
        yield f"tasks: {', '.join(config.tasks)}; {config.batch_rows} rows of a batch, mixed by {config.data.mixing.by}"
    if config.data.mixing.turns:
        yield "each batch is of one task"
    yield from tree(model)
    yield f"total: {model.summary.total:,} trainable parameters, {100 * model.summary.total / count:.2f} % of the base"
    probe = build_model(config, dry_run="narrow")
    memory, loss = expected_memory(model, probe, config)
    yield (f"expected memory of a step: weights {_gigabytes(memory.weights)}, adapters with gradients and Adam "
           f"{_gigabytes(memory.trained)}, activations {_gigabytes(memory.activations)} "
           f"({_gigabytes(memory.checkpointed)} with checkpointing); in all "
           f"{_gigabytes(memory.total(config.train.checkpointing))}")
    check_gradients(probe, loss)
    yield "every adapter gets a gradient"


def tree(model: MultiTaskModel) -> Iterator[str]:
    """Per tower its blocks, the layers adapted in them, and what is left out."""
    summary = model.summary
    for tower, modules in summary.modules.items():
        yield f"{tower}: {modules} layers adapted, {summary.parameters[tower]:,} trainable parameters"
        groups: dict[tuple, list[int]] = {}  # blocks in which the role has this shape
        for name, place in summary.places.items():
            if place.tower == tower:
                layer = summary.layers[name]
                key = (place.role, layer.in_features, layer.out_features)
                groups.setdefault(key, []).append(place.block)
        for (role, width, out), blocks in groups.items():
            yield f"  {_blocks(blocks):14} {role:16} {width} -> {out}"
        for name, why in summary.left_out.items():
            if name.startswith(tower + "."):
                place = name.removeprefix(tower + ".")
                yield f"  {f'block {place}' if place.isdigit() else place:14} not adapted: {why}"


def _blocks(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "blocks 0-2, 5"."""
    if numbers == [-1]:
        return ""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "blocks " + ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"
