"""The loop: mixed batches -> losses -> AdamW step -> log, evaluation, checkpoints."""

import copy
import json
import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from vl_mtl_lora.checkpoint import load_checkpoint, recover_checkpoint, save_checkpoint
from vl_mtl_lora.checkpoint_files import load_resume
from vl_mtl_lora.config import RunConfig, dump_config
from vl_mtl_lora.data.faults import FaultLog
from vl_mtl_lora.data.index import TaskIndex, build_indices
from vl_mtl_lora.data.mixing import expected_rows
from vl_mtl_lora.data.pictures import output_side
from vl_mtl_lora.data.stream import Batch, BatchStream, Feed, loader_deaths_told, train_batches
from vl_mtl_lora.errors import Diverged, UserError
from vl_mtl_lora.evaluate import evaluate_tasks, primary_score
from vl_mtl_lora.journal import Journal, Meter
from vl_mtl_lora.model import MultiTaskModel, build_model, checkpoint_blocks
from vl_mtl_lora.ranks import everyone, launched, prepared, rank, wait, whole, whole_weights, world
from vl_mtl_lora.resume import check_resumable, restore_generators, restore_optimizer, resume_state, seed_rank
from vl_mtl_lora.task_sets import start_from, trained_part, with_old_tasks

log = logging.getLogger(__name__)


def train(config: RunConfig, resume: bool = False, on_step: Callable[[int, dict], None] | None = None,
          on_batch: Callable[[Batch], None] | None = None) -> Path:
    """Trains the adapters and heads that a config describes; returns the run's folder.

    Processes that torchrun or accelerate has started train together, each on rows of its own. Started again after a
    death, they go on from the last checkpoint.

    Args:
        config: the run. Its folder gets config.yaml, log.jsonl, tensorboard/, last/ and best/.
        resume: go on from last/ instead of starting anew.
        on_step: called after each optimizer step with the step number and the losses of its last batch.
        on_batch: called with each batch before it is used.

    Raises:
        UserError: a config, shard or checkpoint that cannot be used; a folder that already holds another run; a
            gradient that is no number; another process is lost.
        SystemExit: with 0, after SIGTERM: the step under way is done and saved.
    """
    launcher = os.getppid()
    with launched(config.train.shard) as accelerator:
        out = Path(config.out)
        if rank() == 0:
            for name in ("last", "best"):
                recover_checkpoint(out / name)
        wait()
        started = (out / "last" / "adapter_config.json").is_file()
        resume = resume or started and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if resume and not started:
            raise UserError(f"nothing to resume in {out}: there is no checkpoint last/")
        if started and not resume:
            raise UserError(f"{out} already holds a run: add --resume to go on with it, or set another out=FOLDER")
        _train(accelerator, config, resume, launcher, on_step, on_batch)
    return out


def _train(accelerator: Accelerator, config: RunConfig, resume: bool, launcher: int,
           on_step: Callable[[int, dict], None] | None, on_batch: Callable[[Batch], None] | None) -> None:
    out, section = Path(config.out), config.train
    last = out / "last"
    config = with_old_tasks(config)
    set_seed(section.seed)
    model = build_model(config)
    start_from(model, config)
    if section.checkpointing:
        checkpoint_blocks(model)
    log.debug("base weights: %s", model.fingerprint)  # known before they are spread over processes
    step, state = 0, {}
    if resume:
        description = load_checkpoint(last, model)
        step, state = description["step"], load_resume(last, model.trainable_state())
        check_resumable(description["config"], config)
        if step >= section.steps:
            log.warning("%s already has %d of %d steps", out, step, section.steps)
    fed = trained_part(config)
    faults, valid_faults = FaultLog(config.data.max_fault_share), FaultLog(config.data.max_fault_share)
    with accelerator.local_main_process_first():  # which copies remote shards, for the others to find
        indices = build_indices(fed, "train", faults)
        valid = build_indices(fed, "valid", valid_faults)
    sizes = torch.tensor([size for index in indices.values() for size in (-1, *index.sizes)])
    if not torch.equal(sizes, state.get("data.sizes", sizes)):
        raise UserError("the train shards hold other samples than in the run to resume: put them back, or start "
                        "another run")
    turn, used = step * section.accumulate, state.get("data.used")
    stream = build_stream(fed, model, indices, start=turn, used=None if used is None else used.tolist())
    batches = train_batches(stream, config.data.workers, faults=faults, start=turn, rank=rank())
    optimizer = build_optimizer(model, section.lr, section.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, section.warmup, section.steps))
    wrapped, optimizer = prepared(accelerator, model, optimizer, model.backbone.blocks())
    seed_rank(section.seed)
    if resume:
        restore_optimizer(state, model, optimizer, schedule, step)
        restore_generators(state)
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    parameters = [p for p in model.parameters() if p.requires_grad]
    best = _best_so_far(out) if resume else -math.inf

    meter = Meter()
    model.train()
    with loader_deaths_told(), Journal(out, after=step) as journal, _signals(launcher) as noted, \
            tqdm(total=section.steps, initial=step, desc="train", unit="step", dynamic_ncols=True,
                 disable=rank() > 0) as bar:
        told = [] if resume else [*faults.faults, *valid_faults.faults]
        while step < section.steps:
            for part in range(1, section.accumulate + 1):
                with meter.waiting():
                    batch = next(batches)
                if on_batch:
                    on_batch(batch)
                told += batch.faults
                with nullcontext() if part == section.accumulate else accelerator.no_sync(wrapped):
                    with torch.autocast(accelerator.device.type, torch.bfloat16, section.precision == "bf16"):
                        losses = wrapped(batch.to(accelerator.device))
                        total = sum(config.tasks[name].weight * loss for name, loss in losses.items())
                    accelerator.backward(total / section.accumulate)
                meter.add(len(batch.keys), {**losses, "total": total})
            norm = whole(torch.nn.utils.clip_grad_norm_(parameters, section.clip))
            at_end = step + 1 == section.steps
            logs = (step + 1) % section.log_every == 0 or at_end
            # Several processes agree on when to stop where they talk anyway.
            stop = next(filter(None, everyone(noted()) if logs else [noted()] if world() == 1 else []), None)
            saves = (step + 1) % section.save_every == 0 or at_end or stop
            evaluates = valid and (at_end or section.eval_every and (step + 1) % section.eval_every == 0)
            if (logs or saves or evaluates) and not math.isfinite(norm):  # asked now and then: asking makes a GPU wait
                raise Diverged(f"the gradient is {float(norm)} at step {step + 1}: lower train.lr; the last good "
                               f"checkpoint is {last if last.exists() else 'missing'}")
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            bar.update()
            if on_step:
                on_step(step, {name: float(loss.detach()) for name, loss in losses.items()})
            if logs:
                for fault in dict.fromkeys(fault for faults in everyone(told) for fault in faults):
                    journal.write({"step": step, "fault": str(fault)})
                told = []
                means, speed = meter.read()
                journal.write({"step": step, **{f"loss/{name}": value for name, value in means.items()},
                               **{f"epoch/{name}": epochs for name, epochs in batch.epochs.items()},
                               "lr": schedule.get_last_lr()[0], "grad_norm": float(norm), **speed})
                bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()})
            if evaluates:
                with whole_weights(model):
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
                save_checkpoint(last, model, config, step=step, keep=section.keep, resume={
                    **resume_state(model, optimizer), "data.sizes": sizes,
                    "data.used": torch.tensor(stream.used(step * section.accumulate))})
            if stop and not at_end:
                message = (f"stopped at step {step}; {last} is saved, go on with: vl-mtl-lora train "
                           f"{out / 'config.yaml'} --resume")
                if stop == signal.SIGTERM:
                    log.warning(message)
                    raise SystemExit(0)
                raise UserError(message)


@contextmanager
def _signals(launcher: int) -> Iterator[Callable[[], int | None]]:
    """Ctrl-C and SIGTERM are noted instead of obeyed, so that a step is done whole; a second Ctrl-C breaks off at once.

    Yields what tells the signal noted, None before. Of several processes one whose launcher is gone has got SIGTERM:
    nobody would stop it any more, and a second start would write into the same folder.
    """
    noted: list[int] = []

    def note(number, _):
        if noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        noted.append(number)

    in_main_thread = threading.current_thread() is threading.main_thread()
    kinds = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
    before = {kind: signal.signal(kind, note) for kind in kinds}
    try:
        yield lambda: noted[0] if noted else signal.SIGTERM if world() > 1 and os.getppid() != launcher else None
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def build_stream(config: RunConfig, model: MultiTaskModel, indices: Mapping[str, TaskIndex], start: int = 0,
                 used: Sequence[int] | None = None) -> BatchStream:
    """The mixed training stream of a run over the samples of its tasks. start, used: see `BatchStream`.

    It holds copies of the tasks, since loader processes cannot take over parameters that lie on a GPU.

    Raises:
        UserError: a batch of data.mixing.rows is too small for the tasks; several processes with data.mixing.turns.
    """
    if config.data.mixing.turns and world() > 1:
        raise UserError("data.mixing.turns: several processes train on batches of all tasks only; leave it out")
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
    return BatchStream(feeds, [rows[name] for name in indices], ids=[model.router.index(name) for name in indices],
                       collate_images=model.backbone.collate_images, seed=config.train.seed, window=config.data.shuffle,
                       world=world(), start=start, used=used,
                       turns=config.train.accumulate if mixing.turns else 0)


def build_optimizer(model: MultiTaskModel, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over adapters and heads. Decay would pull Lambda to zero instead of the identity: only A and B take it, and
    what is added to a whole weight."""
    decayed, free = [], []
    for name, parameter in model.adapter_state().items():
        (decayed if name.endswith((".down", ".up", ".delta")) else free).append(parameter)
    free += model.head_state().values()
    return torch.optim.AdamW([{"params": decayed, "weight_decay": weight_decay},
                              {"params": free, "weight_decay": 0.0}], lr=lr, fused=True)


def learning_rate_factor(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up to 1 over `warmup` steps, then cosine to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def _best_so_far(out: Path) -> float:
    try:
        return float(json.loads((out / "best" / "results.json").read_text())["primary_score"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return -math.inf
