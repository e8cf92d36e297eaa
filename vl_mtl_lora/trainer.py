"""The loop: mixed batches -> losses -> AdamW step -> log, evaluation, checkpoints."""

import copy
import json
import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from tqdm import tqdm

from vl_mtl_lora.checkpoint import load_checkpoint, load_resume, recover_checkpoint, save_checkpoint
from vl_mtl_lora.config import RunConfig, dump_config, parse_config
from vl_mtl_lora.data.faults import FaultLog
from vl_mtl_lora.data.index import TaskIndex, build_indices
from vl_mtl_lora.data.mixing import expected_rows
from vl_mtl_lora.data.pictures import output_side
from vl_mtl_lora.data.stream import Batch, BatchStream, Feed, loader_deaths_told, train_batches
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.evaluate import evaluate_tasks, primary_score
from vl_mtl_lora.journal import Journal, Meter
from vl_mtl_lora.model import MultiTaskModel, build_model, checkpoint_blocks

log = logging.getLogger(__name__)


def train(config: RunConfig, resume: bool = False, on_step: Callable[[int, dict], None] | None = None,
          on_batch: Callable[[Batch], None] | None = None) -> Path:
    """Trains the adapters and heads that a config describes; returns the run's folder.

    Args:
        config: the run. Its folder gets config.yaml, log.jsonl, tensorboard/, last/ and best/.
        resume: go on from last/ instead of starting anew.
        on_step: called after each optimizer step with the step number and the losses of its last batch.
        on_batch: called with each batch before it is used.

    Raises:
        UserError: a config, shard or checkpoint that cannot be used; a folder that already holds another run; a
            gradient that is no number.
    """
    out, section = Path(config.out), config.train
    last = out / "last"
    for name in ("last", "best"):
        recover_checkpoint(out / name)
    started = (last / "adapter_config.json").is_file()
    if resume and not started:
        raise UserError(f"nothing to resume in {out}: there is no checkpoint last/")
    if started and not resume:
        raise UserError(f"{out} already holds a run: add --resume to go on with it, or set another out=FOLDER")
    accelerator = Accelerator()  # its own precision setting is global to the process; ours is the run's
    if accelerator.num_processes > 1:
        raise UserError(f"training runs in one process, got {accelerator.num_processes}: start it without a launcher")
    set_seed(section.seed)
    model = build_model(config)
    if section.checkpointing:
        checkpoint_blocks(model)
    optimizer = build_optimizer(model, section.lr, section.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, section.warmup, section.steps))
    step = 0
    if resume:
        description = load_checkpoint(last, model)
        step = description["step"]
        _check_resumable(parse_config(description["config"]), config)
        state = load_resume(last)
        _restore(state, model, optimizer, schedule, step)
        if step >= section.steps:
            log.warning("%s already has %d of %d steps", out, step, section.steps)
    faults = FaultLog(config.data.max_fault_share)
    indices = build_indices(config, "train", faults)
    sizes = torch.tensor([size for index in indices.values() for size in (-1, *index.sizes)])
    if resume and not torch.equal(sizes, state.get("data.sizes", sizes)):
        raise UserError("the train shards hold other samples than in the run to resume: put them back, or start "
                        "another run")
    stream = build_stream(config, model, indices)
    valid_faults = FaultLog(config.data.max_fault_share)
    valid = build_indices(config, "valid", valid_faults)
    found = [] if resume else [*faults.faults, *valid_faults.faults]
    batches = train_batches(stream, config.data.workers, faults=faults, start=step * section.accumulate)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    parameters = [p for p in model.parameters() if p.requires_grad]
    best = _best_so_far(out) if resume else -math.inf

    meter = Meter()
    model.train()
    with loader_deaths_told(), Journal(out, after=step) as journal, _interrupts() as interrupted, \
            tqdm(total=section.steps, initial=step, desc="train", unit="step", dynamic_ncols=True) as bar:
        for fault in found:
            journal.write({"step": step, "fault": str(fault)})
        while step < section.steps:
            for _ in range(section.accumulate):
                with meter.waiting():
                    batch = next(batches)
                if on_batch:
                    on_batch(batch)
                for fault in batch.faults:
                    journal.write({"step": step, "fault": str(fault)})
                with torch.autocast(accelerator.device.type, torch.bfloat16, section.precision == "bf16"):
                    losses = wrapped(batch.to(accelerator.device))
                    total = sum(config.tasks[name].weight * loss for name, loss in losses.items())
                accelerator.backward(total / section.accumulate)
                meter.add(len(batch.keys), {**losses, "total": total})
            norm = accelerator.clip_grad_norm_(parameters, section.clip)
            at_end, stop = step + 1 == section.steps, interrupted()
            logs = (step + 1) % section.log_every == 0 or at_end
            saves = (step + 1) % section.save_every == 0 or at_end or stop
            evaluates = valid and (at_end or section.eval_every and (step + 1) % section.eval_every == 0)
            if (logs or saves or evaluates) and not math.isfinite(norm):  # asked now and then: asking makes a GPU wait
                raise UserError(f"the gradient is {float(norm)} at step {step + 1}: lower train.lr; the last good "
                                f"checkpoint is {last if last.exists() else 'missing'}")
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            bar.update()
            if on_step:
                on_step(step, {name: float(loss.detach()) for name, loss in losses.items()})
            if logs:
                means, speed = meter.read()
                journal.write({"step": step, **{f"loss/{name}": value for name, value in means.items()},
                               **{f"epoch/{name}": epochs for name, epochs in batch.epochs.items()},
                               "lr": schedule.get_last_lr()[0], "grad_norm": float(norm), **speed})
                bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()})
            if evaluates:
                metrics = evaluate_tasks(model, valid, rows=config.data.eval_batch, limit=section.eval_samples,
                                         faults=valid_faults)
                score = primary_score(model, metrics)
                journal.write({"step": step, "valid/score": score,
                               **{f"valid/{task}/{name}": value for task, values in metrics.items()
                                  for name, value in values.items()}})
                if score >= best:
                    best = score
                    save_checkpoint(out / "best", model, config, step=step, results={
                        "tasks": metrics, "split": "the valid split", "primary_score": score})
                model.train()
                meter.restart()
            if saves:
                save_checkpoint(last, model, config, step=step, resume={
                    **_resume_state(model, optimizer), "data.sizes": sizes})
            if stop and not at_end:
                raise UserError(f"stopped at step {step}; {last} is saved, go on with: "
                                f"vl-mtl-lora train {out / 'config.yaml'} --resume")
    return out


def _check_resumable(saved: RunConfig, config: RunConfig) -> None:
    """What decides the order of samples, or what a head's outputs mean, must be as it was."""
    def settings(data: dict) -> dict:
        return {"train.seed": data["train"]["seed"], "train.accumulate": data["train"]["accumulate"],
                "data.shuffle": data["data"]["shuffle"], "data.mixing": data["data"]["mixing"],
                **{f"tasks.{name}.{key}": task.get(key) for name, task in data["tasks"].items()
                   for key in ("kind", "tag", "rows", "images", "train", "format", "augment", "labels", "answers")}}

    before, after = settings(saved.model_dump()), settings(config.model_dump())
    for key in before:
        if before[key] != after.get(key):
            raise UserError(f"{key} was {before[key]} in the run to resume and is {after.get(key)} now: set it back "
                            "or start another run")


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted instead of raised, so that a step is done whole; a second one breaks off at once."""
    noted = []

    def note(*_):
        if noted:
            raise KeyboardInterrupt
        noted.append(True)

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, note) if in_main_thread else None
    try:
        yield lambda: bool(noted)
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, before)


def build_stream(config: RunConfig, model: MultiTaskModel, indices: Mapping[str, TaskIndex]) -> BatchStream:
    """The mixed training stream of a run over the samples of its tasks.

    It holds copies of the tasks, since loader processes cannot take over parameters that lie on a GPU.

    Raises:
        UserError: a batch of data.mixing.rows is too small for the tasks.
    """
    feeds = []
    options = [({} if section.augment is True else section.augment) if section.augment else None
               for section in config.tasks.values()]
    for name, augmentation, transform in zip(config.tasks, options, model.backbone.loader_preprocess(options)):
        # Twice what comes out: resizing by half or more hides what was left out. Of a crop, so much must be left.
        cropped = 1.0 if augmentation is None else math.sqrt(min(augmentation.get("scale") or (0.9,)))
        side = output_side(transform)
        feeds.append(Feed(indices[name], transform, copy.deepcopy(model.tasks[name]).cpu().collate,
                          side and math.ceil(2 * side / cropped)))
    mixing, rows = config.data.mixing, {name: section.rows for name, section in config.tasks.items()}
    if mixing.by != "quotas":
        rows = expected_rows(mixing.by, {name: len(index) for name, index in indices.items()},
                             config.batch_rows, {name: section.least_rows for name, section in config.tasks.items()},
                             temperature=mixing.temperature, cap=mixing.cap, weights=mixing.weights)
    return BatchStream(feeds, [rows[name] for name in indices], collate_images=model.backbone.collate_images,
                       seed=config.train.seed, window=config.data.shuffle)


def build_optimizer(model: MultiTaskModel, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over adapters and heads. Decay would pull Lambda to zero instead of the identity: only A and B take it."""
    decayed, free = [], []
    for name, parameter in model.adapter_state().items():
        (decayed if name.endswith((".down", ".up")) else free).append(parameter)
    free += model.head_state().values()
    return torch.optim.AdamW([{"params": decayed, "weight_decay": weight_decay},
                              {"params": free, "weight_decay": 0.0}], lr=lr, fused=True)


def learning_rate_factor(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up to 1 over `warmup` steps, then cosine to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def _trainable(model: MultiTaskModel) -> dict[str, Tensor]:
    return {**model.adapter_state(), **model.head_state()}


def _resume_state(model: MultiTaskModel, optimizer) -> dict[str, Tensor]:
    """Adam's moments under the parameters' logical names, and the random generators."""
    moments = optimizer.state  # by parameter
    state = {"random.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in _trainable(model).items():
        for key, value in moments.get(parameter, {}).items():
            state[f"adam.{key}.{name}"] = torch.as_tensor(value)
    return state


def _restore(state: dict[str, Tensor], model: MultiTaskModel, optimizer, schedule, step: int) -> None:
    for name, parameter in _trainable(model).items():
        moments = {key: state[f"adam.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
                   if f"adam.{key}.{name}" in state}
        if moments:
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()}
    schedule.last_epoch = step
    for group, base in zip(optimizer.param_groups, schedule.base_lrs):
        group["lr"] = base * schedule.lr_lambdas[0](step)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
    torch.set_rng_state(state["random.torch"])
    if "random.cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random.cuda"])


def _best_so_far(out: Path) -> float:
    try:
        return json.loads((out / "best" / "results.json").read_text())["primary_score"]
    except (OSError, ValueError, KeyError):
        return -math.inf
