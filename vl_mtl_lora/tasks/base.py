"""What a task is: one file holds its prompt, loss, prediction and metric."""

import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vl_mtl_lora.backbones.base import Backbone, ImageStates, TextCodec, wide
from vl_mtl_lora.backbones.generation import pad_ids
from vl_mtl_lora.data.schema import Sample
from vl_mtl_lora.metrics.bootstrap import Metric
from vl_mtl_lora.ranks import shared_mean

_KEPT_ROWS = 100_000  # of embeddings
_TEXTS_AT_ONCE = 1024


class Answer(NamedTuple):
    """What a model said of one sample, and whether it counts as right.

    pictures: of a search, the rows of the samples whose pictures it found, best first, and whether each is right.
    """

    text: str
    right: bool
    pictures: tuple[tuple[int, bool], ...] = ()


class Reply(NamedTuple):
    """What a task says of one request, for people to read.

    scores: what was compared, best first, with cosines or probabilities; empty where nothing was.
    """

    answer: str
    scores: tuple[tuple[str, float], ...] = ()


class Task(Protocol):
    """Tasks are `nn.Module`s that follow this protocol; their parameters are the task's head.

    name: the tag. kind: the key in `tasks.KINDS`. needs: capabilities the backbone must have.
    images: of each sample; without any, `states` are None, with several a sample's states follow each other.
    primary: the metric that stands for the task, higher is better.
    example: fields of a sample, for a dry run. asks: those of them that tell what is asked; the others are the truth.
    """

    name: str
    kind: str
    needs: frozenset[str]
    images: int
    primary: str
    example: Mapping[str, Any]
    asks: tuple[str, ...]

    def collate(self, samples: Sequence[Sample], rng: random.Random) -> dict[str, Tensor]:
        """Samples of a training slice -> the tensors that `loss` reads. Runs in loader processes."""

    def loss(self, backbone: Backbone, states: ImageStates | None, inputs: dict[str, Tensor]) -> Tensor:
        """Scalar loss of a slice. Runs under a route that holds the task for any number of text rows."""

    def predict(self, backbone: Backbone, states: ImageStates | None, samples: Sequence[Sample],
                zero_shot: bool) -> list[Any]:
        """One prediction per sample. `zero_shot`: answer as the base alone would, without the task's head."""

    def reply(self, backbone: Backbone, states: ImageStates | None, samples: Sequence[Sample],
              zero_shot: bool) -> list[Reply]:
        """What `predict` finds, in words and with all that it was chosen among. The truth is not looked at."""

    def score(self, predictions: Sequence[Any], samples: Sequence[Sample], thorough: bool = False) -> dict[str, Metric]:
        """Metrics over a whole evaluation, with pictures as clusters. `thorough`: also those that take long."""

    def quality(self, predictions: Sequence[Any], samples: Sequence[Sample]) -> list[float]:
        """How good each prediction is by itself, from 0 to 1, to find gains and losses."""

    def closed(self, predictions: Sequence[Any], samples: Sequence[Sample]) -> list[tuple[str, str]]:
        """(truth, said) of each sample, where both come from a closed list; [] where they do not."""

    def notes(self, samples: Sequence[Sample]) -> list[str]:
        """Sentences without which the figures cannot be understood: rules, tokenizer, warnings."""

    def answers(self, predictions: Sequence[Any], samples: Sequence[Sample],
                rows: Sequence[int]) -> list[Answer]:
        """What was said of some rows, for people to read."""


def numbered(names: Iterable[Hashable]) -> list[int]:
    """Equal names get equal numbers, counted from 0."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(name, len(numbers)) for name in names]


def pictures_of(samples: Sequence[Sample]) -> list[int]:
    """The number of each sample's picture: the clusters of its figures."""
    return numbered(sample.image_id for sample in samples)


class Kept(nn.Module):
    """Tensors computed once for the length of an evaluation, such as the embeddings of the classes: `train` and `eval`
    forget them, since the adapters may have changed since."""

    def __init__(self):
        super().__init__()
        self._kept: dict[Hashable, Tensor] = {}

    def forward(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returned for the key."""
        if key not in self._kept:
            made = make()
            if sum(map(len, self._kept.values())) + len(made) > _KEPT_ROWS:
                self._kept.clear()
            self._kept[key] = made
        return self._kept[key]

    def train(self, mode: bool = True) -> "Kept":
        self._kept.clear()
        return super().train(mode)


def embed_texts(backbone: Backbone, texts: Sequence[str]) -> Tensor:
    """Texts -> (N, E), L2-normalised, some at a time."""
    tokens = backbone.text.rows(texts).to(backbone.device)
    return torch.cat([backbone.encode_text(rows) for rows in tokens.split(_TEXTS_AT_ONCE)])


def next_token_inputs(text: TextCodec, prompts: Sequence[str], targets: Sequence[str],
                      pictures: int = 1) -> dict[str, Tensor]:
    """Prompts, each about so many pictures, and what shall follow -> inputs of a next-token loss on the targets and the
    end mark alone.

    Returns:
        tokens (B, L): prompt, target. positions (K,): flat indices into (B, L) after which a supervised token comes.
        labels (K,): those tokens. Known on the host, so that the loss asks the device for no shape.
    """
    ends = [[*ids[:text.context_length - 2], text.eos_id] for ids in text.ids(targets)]
    starts = text.prompts(prompts, [len(end) for end in ends], [pictures] * len(prompts))
    rows = [[*start, *end[:-1]] for start, end in zip(starts, ends)]  # the end mark is only predicted
    width = max(map(len, rows))
    positions = [i * width + j for i, (start, row) in enumerate(zip(starts, rows))
                 for j in range(len(start) - 1, len(row))]
    return {"tokens": pad_ids(rows, text.pad_id), "positions": torch.tensor(positions),
            "labels": torch.tensor([token for end in ends for token in end])}


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of unit vectors in float32, also under autocast: in bf16 near ones would be equal."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def next_token_loss(backbone: Backbone, states: ImageStates, inputs: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the supervised tokens of `next_token_inputs`, over those of all processes."""
    x = backbone.token_states(states, inputs["tokens"])
    logits = backbone.logits(x.flatten(0, 1)[inputs["positions"]])
    total = torch.nn.functional.cross_entropy(wide(logits), inputs["labels"], reduction="sum")
    return shared_mean(total, torch.tensor(len(inputs["labels"]), device=total.device))
