"""What training has made of the adapters, in numbers: how far the tasks went, and how far apart.

Shape letters: L adapted layers, T tasks, N up-projections, S adapted slices, R rank, I in, C columns of a slice.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from vl_mtl_lora.layer import MTLLoRALinear
from vl_mtl_lora.model import MultiTaskModel
from vl_mtl_lora.ops import mixture

Similarity = list[list[float | None]]  # (T, T)


@dataclass(frozen=True)
class Layer:
    """An adapted layer's logical place; see `Place`. name: e.g. `image.3.attn.qkv`. block: -1 outside the blocks."""

    tower: str
    block: int
    role: str
    name: str


@dataclass(frozen=True)
class Anatomy:
    """The adapters of a model whose updates are low-rank products, layer by layer in the model's order, as numbers.

    Delta_t is the whole update that a layer adds to its frozen weight for task t (arXiv 2410.09437, eq. 5 and 6).

    distance: (L, T), ||Lambda_t - I||_F / ||I||_F, root of the mean square over slices: 0 as a run starts.
    mixture: (L, T, N), softmax(w_t / tau), mean over slices.
    size: (L, T), ||Delta_t||_F / ||W||_F, W being the adapted slices of the frozen weight; None of a quantised one.
    similarity: (T, T), <Delta_t, Delta_u> / (||Delta_t|| ||Delta_u||), inner products summed over layers: 1 where two
        tasks move the weights alike, 0 where they have nothing to do with one another; None where a task moves none.
    similarity_by_tower: the same over the layers of one tower.
    """

    tasks: list[str]
    layers: list[Layer]
    distance: list[list[float]]
    mixture: list[list[list[float]]]
    size: list[list[float | None]]
    similarity: Similarity
    similarity_by_tower: dict[str, Similarity]

    def to_dict(self) -> dict:
        """The same as dicts, lists and numbers, for JSON."""
        return asdict(self)


@torch.no_grad()
def anatomy(model: MultiTaskModel) -> Anatomy:
    """Measures a model's adapters, in float64, without ever building a Delta. Changes nothing."""
    tasks = list(model.router.task_names)
    layers, distances, mixtures, sizes = [], [], [], []
    grams: dict[str, Tensor] = {}
    for name, layer in model.summary.layers.items():
        if not layer.folds:
            continue
        place = model.summary.places[name]
        layers.append(Layer(place.tower, place.block, place.role, name))
        distances.append(transform_distance(layer).tolist())
        mixtures.append(mixture(layer.mix.double(), layer.temperature, 1.0).mean(0).tolist())
        gram = update_gram(layer)
        norm = _frozen_norm(layer)
        sizes.append([size / norm if norm else None for size in gram.diagonal().sqrt().tolist()])
        grams[place.tower] = grams.get(place.tower, 0) + gram
    total = sum(grams.values(), torch.zeros(len(tasks), len(tasks), dtype=torch.float64))
    return Anatomy(tasks, layers, distances, mixtures, sizes, _cosines(total),
                   {tower: _cosines(gram) for tower, gram in grams.items()})


def transform_distance(layer: MTLLoRALinear) -> Tensor:
    """||Lambda_t - I||_F / ||I||_F, root of the mean square over slices, full and diagonal alike, (T,); 0 of layers
    that have none."""
    matrix = layer.factors()[1].detach().double()
    if matrix.shape[-1] != layer.rank:  # what weighs or chooses among several LoRAs
        return matrix.new_zeros(matrix.shape[1])
    if matrix.dim() == 3:
        matrix = torch.diag_embed(matrix)  # (S, T, R, R)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return ((matrix - eye).square().sum((-2, -1)) / len(eye)).mean(0).sqrt()


def update_gram(layer: MTLLoRALinear) -> Tensor:
    """<Delta_t, Delta_u> for all pairs of tasks, the Frobenius inner product summed over slices, (T, T) on the CPU.

    With Delta_t = B'_t^T A' and A' shared: of A'^T = Q P the columns of Q are orthonormal, so P B'_t (S, R, C) has the
    inner products of Delta_t (S, C, I).
    """
    downs, ups = zip(*map(layer.fold, range(layer.mix.shape[1])))
    triangle = torch.linalg.qr(downs[0].cpu().double().mT, mode="r").R  # (S, R, R)
    small = torch.stack([(triangle @ up.cpu().double()).flatten() for up in ups])
    return small @ small.T


def _frozen_norm(layer: MTLLoRALinear) -> float | None:
    """||W||_F of the adapted slices; None where the weight is quantised or spread over devices."""
    if not layer.plain:
        return None
    columns = layer.up.shape[-1]
    slices = layer.weight.detach().unflatten(0, (-1, columns))  # (splits, C, I)
    if len(layer.slices) < len(slices):
        slices = slices[list(layer.slices)]
    return torch.linalg.vector_norm(slices, dtype=torch.promote_types(slices.dtype, torch.float32)).item()


def _cosines(gram: Tensor) -> Similarity:
    """(T, T) inner products -> cosines; None of a vector of length 0."""
    lengths = gram.diagonal().sqrt()
    cosines = (gram / lengths.outer(lengths)).clamp(-1, 1)  # rounding leads over 1; 0 / 0 is no number
    return [[value if value == value else None for value in row] for row in cosines.tolist()]
