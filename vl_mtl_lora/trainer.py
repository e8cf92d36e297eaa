"""The loop: mixed batches -> losses -> AdamW step -> log, evaluation, checkpoints."""

import json
import logging
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from vl_mtl_lora.checkpoint import load_checkpoint, load_resume, save_checkpoint
from vl_mtl_lora.config import RunConfig, dump_config
from vl_mtl_lora.data.reader import build_source
from vl_mtl_lora.data.stream import BatchStream, Quota, train_batches
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.evaluate import evaluate_tasks, primary_mean
from vl_mtl_lora.model import MultiTaskModel, build_model, checkpoint_blocks

log = logging.getLogger(__name__)


def train(config: RunConfig, resume: bool = False, on_step: Callable[[int, dict], None] | None = None) -> Path:
    """Trains the adapters and heads that a config describes; returns the run's folder.

    Args:
        config: the run. Its folder gets config.yaml, log.jsonl, tensorboard/, last/ and best/.
        resume: go on from last/ instead of starting anew.
        on_step: called after each optimizer step with the step number and its logged values.

    Raises:
        UserError: a config, shard or checkpoint that cannot be used; a folder that already holds another run; a loss
            that is no number.
    """
    out, section = Path(config.out), config.train
    last = out / "last"
    if resume and not (last / "adapter_config.json").is_file():
        raise UserError(f"nothing to resume in {out}: there is no checkpoint last/")
    if not resume and (out / "log.jsonl").exists():
        raise UserError(f"{out} already holds a run: add --resume to go on with it, or set another out=FOLDER")
    accelerator = Accelerator()  # its own precision setting is global to the process; ours is the run's
    set_seed(section.seed)
    model = build_model(config)
    if section.checkpointing:
        checkpoint_blocks(model)
    optimizer = build_optimizer(model, section.lr, section.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, section.warmup, section.steps))
    step = 0
    if resume:
        step = load_checkpoint(last, model)["step"]
        _restore(load_resume(last), model, optimizer, schedule, step)
        if step >= section.steps:
            log.warning("%s already has %d of %d steps", out, step, section.steps)
    stream = build_stream(config, model, start=step * section.accumulate)
    batches = train_batches(stream, config.data.workers)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    if resume:
        _cut_log(out / "log.jsonl", step)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    best = _best_so_far(out)
    parameters = [p for p in model.parameters() if p.requires_grad]
    evaluates = any(task.valid for task in config.tasks.values())
    model.train()
    with open(out / "log.jsonl", "a", encoding="utf-8") as journal, SummaryWriter(out / "tensorboard") as board, \
            tqdm(total=section.steps, initial=step, desc="train", unit="step", dynamic_ncols=True) as bar:

        def record(entry: dict) -> None:
            journal.write(json.dumps(entry) + "\n")
            journal.flush()
            for name, value in entry.items():
                if isinstance(value, (int, float)) and name != "step":
                    board.add_scalar(name, value, entry["step"])

        def save(name: str, results: dict | None = None) -> None:
            save_checkpoint(out / name, model, config, step=step, results=results,
                            resume=_resume_state(model, optimizer))

        sums: dict[str, Tensor] = {}
        waited = 0.0
        mark = time.perf_counter()
        try:
            while step < section.steps:
                for _ in range(section.accumulate):
                    asked = time.perf_counter()
                    batch = next(batches)
                    waited += time.perf_counter() - asked
                    for fault in batch.faults:  # their share is watched where they are met
                        record({"step": step, "fault": str(fault)})
                    with torch.autocast(accelerator.device.type, torch.bfloat16, section.precision == "bf16"):
                        losses = wrapped(batch.to(accelerator.device))
                        total = sum(config.tasks[name].weight * loss for name, loss in losses.items())
                    accelerator.backward(total / section.accumulate)
                    for name, loss in {**losses, "total": total}.items():
                        sums[name] = sums.get(name, 0.0) + loss.detach() / section.accumulate
                norm = accelerator.clip_grad_norm_(parameters, section.clip)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                step += 1
                bar.update()
                if on_step:
                    on_step(step, {name: float(value.detach()) for name, value in losses.items()})
                if step % section.log_every == 0 or step == section.steps:
                    now = time.perf_counter()
                    since = (step - 1) % section.log_every + 1
                    entry = {"step": step, **{f"loss/{name}": float(value) / since for name, value in sums.items()},
                             "lr": schedule.get_last_lr()[0], "grad_norm": float(norm),
                             "images_per_second": len(batch.ids) * section.accumulate * since / (now - mark),
                             "data_wait": waited / (now - mark)}
                    if not math.isfinite(entry["loss/total"]):
                        raise UserError(f"the loss is {entry['loss/total']} at step {step}: lower train.lr; the last "
                                        f"good checkpoint is {last if last.exists() else 'missing'}")
                    record(entry)
                    bar.set_postfix({name: f"{float(value) / since:.3f}" for name, value in sums.items()})
                    sums, waited, mark = {}, 0.0, now
                at_end = step == section.steps
                if evaluates and (at_end or section.eval_every and step % section.eval_every == 0):
                    metrics = evaluate_tasks(model, config, split="valid", limit=section.eval_samples)
                    record({"step": step, **{f"valid/{task}/{name}": value for task, values in metrics.items()
                                             for name, value in values.items()}})
                    mean = primary_mean(model, metrics)
                    if mean >= best:
                        best = mean
                        save("best", {"tasks": metrics, "split": "the valid split", "primary_mean": mean})
                    model.train()
                    mark = time.perf_counter()
                if at_end or step % section.save_every == 0:
                    save("last")
        except KeyboardInterrupt:
            save("last")
            bar.close()
            raise UserError(f"stopped at step {step}; {last} is saved, go on with --resume") from None
    return out


def build_stream(config: RunConfig, model: MultiTaskModel, start: int = 0) -> BatchStream:
    """The mixed training stream of a run, from batch `start` on."""
    quotas = [Quota(build_source(name, task, "train"), task.rows, model.backbone.preprocess(task.augment),
                    model.tasks[name].collate) for name, task in config.tasks.items()]
    return BatchStream(quotas, known_tasks=config.data.ignore_tasks, seed=config.train.seed,
                       shuffle=config.data.shuffle, max_fault_share=config.data.max_fault_share, start=start)


def build_optimizer(model: MultiTaskModel, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over adapters and heads. Decay would pull Lambda to zero instead of the identity: only A and B take it."""
    decayed, free = [], []
    for name, parameter in model.adapter_state().items():
        (decayed if name.endswith((".down", ".up")) else free).append(parameter)
    free += model.head_state().values()
    return torch.optim.AdamW([{"params": decayed, "weight_decay": weight_decay},
                              {"params": free, "weight_decay": 0.0}], lr=lr)


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
    random.seed(step)
    torch.set_rng_state(state["random.torch"])
    if "random.cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random.cuda"])


def _cut_log(path: Path, step: int) -> None:
    """Drops what a broken-off run logged after its last checkpoint, so that no step is told twice."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:  # the line that was being written when the run broke off
            continue
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _best_so_far(out: Path) -> float:
    try:
        return json.loads((out / "best" / "results.json").read_text())["primary_mean"]
    except (OSError, ValueError, KeyError):
        return -math.inf
