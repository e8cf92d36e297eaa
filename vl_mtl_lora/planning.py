"""How much memory and time a config's training takes on so many GPUs, computed, not measured.

A step takes as long as the slowest of three that go on at the same time: the GPU computes, its processor launches
kernels, and bytes travel between GPUs. Not counted: loading (`bench` tells whether it keeps up), evaluation, saving.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vl_mtl_lora.errors import UserError
from vl_mtl_lora.flops import batch_flops, launches
from vl_mtl_lora.memory import expected_memory
from vl_mtl_lora.model import build_model
from vl_mtl_lora.sections import RunConfig

# As measured on an H200 (README); the rest goes to memory traffic.
_REACHED = 0.3  # of a card's peak rate
_LAUNCH = 50e-6  # seconds of the processor for each kernel, with the conversions around it
_LINKED = 0.7  # of a link's peak
_USABLE = 0.9  # of a card's memory: the rest goes to CUDA, to kernels and to the allocator's gaps
_GRADIENT = 4  # bytes per trained parameter
_SIMILARITIES = 5  # matrices of float32 that a contrastive loss keeps: both directions, their softmax, one gradient
_GPUS_OF_A_MACHINE = 8


@dataclass(frozen=True)
class Card:
    """A GPU by its maker's data sheet.

    memory: bytes. bf16, float32: operations per second, dense, the latter without TF32. link: bytes per second and
    direction, to others in the machine. network: to other machines, of a machine with eight, all together.
    """

    memory: float
    bf16: float
    float32: float
    link: float
    network: float


CARDS = {
    "A100-80GB": Card(memory=80e9, bf16=312e12, float32=19.5e12, link=300e9, network=200e9),
    "H100-80GB": Card(memory=80e9, bf16=989e12, float32=67e12, link=450e9, network=400e9),
    "H200": Card(memory=141e9, bf16=989e12, float32=67e12, link=450e9, network=400e9),
}


@dataclass(frozen=True)
class Plan:
    """A training on `gpus` GPUs, each with batches of its own.

    spread: the weights over them (FSDP2), else copied (DDP). memory: bytes of each GPU. fits: on the card. seconds: of
    an optimizer step. limit: what they are spent on, "computing", "launching" or "links". rows_per_second: of all GPUs.
    hours: of the config's steps.
    """

    gpus: int
    spread: bool
    memory: float
    fits: bool
    seconds: float
    limit: str
    rows_per_second: float
    hours: float


def plan(config: RunConfig, gpu: str = "H100-80GB", gpus: Sequence[int] = (1, 8, 64)) -> list[Plan]:
    """One plan for each number of GPUs, and for several both with the weights copied and spread; with batches of one
    task for one GPU alone, as training. Needs no weights and no shards.

    Raises:
        UserError: an unknown card, or a config that cannot be built.
    """
    if gpu not in CARDS:
        raise UserError(f"unknown GPU {gpu!r}", near=(gpu, CARDS))
    card, train = CARDS[gpu], config.train
    model, probe = build_model(config, dry_run="shapes"), build_model(config, dry_run="narrow")
    memory, _ = expected_memory(model, probe, config)
    operations = batch_flops(model, probe, config).total(train.checkpointing)
    half = train.precision == "bf16" or model.backbone.dtype.itemsize == 2
    forward, backward = launches(probe)
    if config.data.mixing.turns:  # a batch has one task
        forward, backward, gpus = forward / len(config.tasks), backward / len(config.tasks), [1]
    times = {"computing": train.accumulate * operations / (_REACHED * (card.bf16 if half else card.float32)),
             "launching": train.accumulate * _LAUNCH * (forward * (1 + train.checkpointing) + backward)}
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = [sum(p.numel() * p.element_size() for p in block.parameters() if not p.requires_grad)
             for block in model.backbone.blocks()]
    outside = max(memory.weights - sum(sizes), 0)
    contrastive = [task.rows for task in config.tasks.values() if task.kind == "retrieval"]
    kept = memory.checkpointed if train.checkpointing else memory.activations

    def planned(number: int, spread: bool) -> Plan:
        others = (number - 1) / number  # the share of everything that has to come from other GPUs
        reach = _LINKED * (card.link if number <= _GPUS_OF_A_MACHINE else min(card.link, card.network))
        bytes_here = kept + sum(_SIMILARITIES * 4 * rows * rows * number for rows in contrastive)
        if spread:
            # A block's weights are whole where it runs, those of the next one on their way; at an evaluation all are.
            bytes_here += (memory.weights + memory.trained) / number + outside + 2 * max(sizes)
            bytes_here = max(bytes_here, memory.weights)
            # Weights come once for each pass, before and behind; gradients go as far as their owner.
            travels = others * (2 * train.accumulate * (memory.weights + _GRADIENT * parameters)
                                + _GRADIENT * parameters)
        else:
            bytes_here += memory.weights + memory.trained + (_GRADIENT * parameters if number > 1 else 0)
            travels = 2 * others * _GRADIENT * parameters
        seconds, limit = max((time, name) for name, time in {**times, "links": travels / reach}.items())
        return Plan(number, spread, bytes_here, bytes_here <= _USABLE * card.memory, seconds, limit,
                    number * train.accumulate * config.batch_rows / seconds, train.steps * seconds / 3600)

    return [planned(number, spread) for number in gpus for spread in ((False, True) if number > 1 else (False,))]


def table(config: RunConfig, gpu: str) -> Iterator[str]:
    """The plans in lines for people, with what they assume."""
    plans, card = plan(config, gpu), CARDS[gpu]
    rows, steps = config.train.accumulate * config.batch_rows, config.train.steps
    yield f"| {gpu} | weights | memory of each | a step | limited by | rows/s | {steps:,} steps | rows seen |"
    yield "|---:|---|---:|---:|---|---:|---:|---:|"
    for each in plans:
        weights = ("spread (FSDP2)" if each.spread else "copied (DDP)") if each.gpus > 1 else "whole"
        yield (f"| {each.gpus} | {weights} | {each.memory / 1e9:.1f} GB{'' if each.fits else ', too much'} | "
               f"{each.seconds:.2f} s | {each.limit} | {each.rows_per_second:,.0f} | {each.hours:.1f} h | "
               f"{each.gpus * rows * steps / 1e6:,.1f} M |")
    yield ""
    yield (f"Assumed: {_REACHED:.0%} of {card.bf16 / 1e12:.0f} (bf16) or {card.float32 / 1e12:.0f} (float32) TFLOP/s, "
           f"{_LAUNCH * 1e6:.0f} microseconds of the processor for each kernel, {_LINKED:.0%} of "
           f"{card.link / 1e9:.0f} GB/s between the GPUs of a machine and of {card.network / 1e9:.0f} GB/s between "
           f"machines of {_GPUS_OF_A_MACHINE}; {1 - _USABLE:.0%} of the memory left free; a loader that keeps up.")
    if any(each.limit == "launching" for each in plans):
        yield "Where launching is the limit, more rows in a batch take no more time, as long as they fit."
