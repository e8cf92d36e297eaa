"""What a run needs to go on as if it had not stopped: Adam's moments, the random generators, and the samples used."""

from collections.abc import Mapping

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor

from vl_mtl_lora.errors import UserError
from vl_mtl_lora.model import MultiTaskModel
from vl_mtl_lora.ranks import everyone, rank, spread_like
from vl_mtl_lora.sections import RunConfig


def resume_state(model: MultiTaskModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's moments under the parameters' logical names, and each process's random generator; all must call it."""
    state = {}
    for number, (cpu, cuda) in enumerate(everyone(_generators())):
        state[f"random.torch.{number}"] = cpu
        if cuda is not None:
            state[f"random.cuda.{number}"] = cuda
    for name, parameter in model.trainable_state().items():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"adam.{key}.{name}"] = torch.as_tensor(value)
    return state


def restore_optimizer(state: Mapping[str, Tensor], model: MultiTaskModel, optimizer: torch.optim.Optimizer,
                      schedule: torch.optim.lr_scheduler.LambdaLR, step: int) -> None:
    """Puts Adam's moments and the learning rate back where they were after `step` steps."""
    for name, parameter in model.trainable_state().items():
        moments = {key: state[f"adam.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
                   if f"adam.{key}.{name}" in state}
        if moments:
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if key == "step" else spread_like(value, parameter)
                for key, value in moments.items()}
    schedule.last_epoch = step
    for group, base in zip(optimizer.param_groups, schedule.base_lrs):
        group["lr"] = base * schedule.lr_lambdas[0](step)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def restore_generators(state: Mapping[str, Tensor]) -> None:
    """Puts this process's random generator back; one that was not there before keeps its seed."""
    cpu, cuda = (state.get(f"random.{kind}.{rank()}") for kind in ("torch", "cuda"))
    if cpu is not None:
        torch.set_rng_state(cpu)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)


def seed_rank(seed: int) -> None:
    """Gives each process but the first a seed of its own, so that dropout differs among them."""
    if rank() > 0:
        set_seed(int(np.random.SeedSequence([seed, rank()]).generate_state(1)[0]))


def check_resumable(saved: RunConfig, config: RunConfig) -> None:
    """Raises UserError unless what decides the order of samples, or what a head's outputs mean, is as it was."""
    def settings(data: dict) -> dict:
        return {"train.seed": data["train"]["seed"], "train.accumulate": data["train"]["accumulate"],
                "data.shuffle": data["data"]["shuffle"], "data.mixing": data["data"]["mixing"],
                "start.train": data["start"]["train"], "start.rehearse": data["start"]["rehearse"],
                **{f"tasks.{name}.{key}": task.get(key) for name, task in data["tasks"].items()
                   for key in ("kind", "tag", "rows", "images", "train", "format", "augment", "labels", "answers")}}

    before, after = settings(saved.model_dump()), settings(config.model_dump())
    for key in before:
        if before[key] != after.get(key):
            raise UserError(f"{key} was {before[key]} in the run to resume and is {after.get(key)} now: set it back "
                            "or start another run")


def _generators() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None
