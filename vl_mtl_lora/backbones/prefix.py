"""A text decoder for models that have none: the image as a prefix of the text tower, logits tied to the embedding.

CLIP and SigLIP read images and texts, but write nothing. Here the text tower becomes a decoder: the image enters as a
prefix of projected image tokens (class token or mean, and pooled grid), attention is causal, and logits are tied to the
token embedding. The projection needs no new weight: image width -> joint space through the model's own image
projection, joint space -> text width through the transpose of its own text projection. It is kept as one frozen
`nn.Linear`, so that an adapter can sit on it like on any other layer.
"""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vl_mtl_lora.backbones.base import Backbone, ImageStates

PREFIX_GRID = 7
_TOP_LOGIT = 20.0  # what the logit of a perfectly predicted token should be able to reach


class PrefixBackbone(Backbone):
    """What backbones with such a decoder share. Subclasses call `set_projector` and write the three methods below.

    projector: (image width -> text width), frozen.
    """

    capabilities = frozenset({"embed", "generate", "generate_text"})

    def set_projector(self, weight: Tensor, prefix_grid: int) -> None:
        """weight: (text width, image width). prefix_grid: the image enters as 1 + prefix_grid**2 tokens at most."""
        self.prefix_grid = prefix_grid
        self.projector = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.projector.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)

    def embed_tokens(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """(B, L) ids and places -> (B, L, D) input vectors of the text tower."""
        raise NotImplementedError

    def read(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, L, D) input vectors through the text tower and its last norm; mask additive, (L, S) or (B, 1, L, S)."""
        raise NotImplementedError

    def token_weights(self) -> tuple[Tensor, Tensor]:
        """(V, D) token embedding and (D,) gain of the text tower's last norm."""
        raise NotImplementedError

    def prefix(self, tokens: Tensor) -> Tensor:
        """(B, P, image width) image tokens -> (B, P, D) input vectors of the decoder."""
        return scale_prefix(self.projector(tokens), self.embedding_norm)

    def no_pictures(self, rows):
        weight, _ = self.token_weights()
        return ImageStates(weight.new_zeros(rows, 0), weight.new_zeros(rows, 0, weight.shape[1]))

    @cached_property
    def embedding_norm(self) -> float:
        """Mean norm of the token embeddings; asked for at every step, and they are frozen."""
        return float(self.token_weights()[0].detach().float().norm(dim=-1).mean())

    def step(self, states, tokens, positions, readable=None):
        x = self.embed_tokens(tokens, positions)
        if not self.cache.filled:
            x = torch.cat([states.prefix.to(x.dtype), x], dim=1)
        if readable is not None:  # the prefix always is
            readable = F.pad(readable, (states.prefix.shape[1], 0), value=True)
        return self.read(x, causal_mask(x, readable))[:, -tokens.shape[1]:]

    def logits(self, states):
        return tied_logits(states, *self.token_weights(), self.embedding_norm)


def causal_mask(x: Tensor, readable: Tensor | None = None) -> Tensor:
    """Additive mask for (B, L, D) queries at the end of S keys: (L, S), or (B, 1, L, S) with `readable` (B, S).

    A query always sees itself: a row of nothing but -inf would give NaN, also where it is padding.
    """
    length = x.shape[1]
    size = length if readable is None else readable.shape[1]
    mask = torch.full((length, size), float("-inf"), device=x.device, dtype=x.dtype).triu_(size - length + 1)
    if readable is None:
        return mask
    own = torch.eye(length, size, device=x.device, dtype=torch.bool).roll(size - length, dims=1)
    hidden = ~(readable.unsqueeze(1) | own)  # (B, L, S)
    return mask.masked_fill(hidden, float("-inf")).unsqueeze(1)


# The decoder's maths as functions of weights, since pretraining the embedded base needs them with gradients.


def prefix_tokens(first: Tensor, grid: Tensor, grid_size: tuple[int, int], limit: int) -> Tensor:
    """(B, 1, W) class token and (B, H*W', W) grid tokens -> (B, 1 + pooled grid, W), each side at most `limit`."""
    height, width = grid_size
    if max(height, width) > limit:
        x = grid.transpose(1, 2).unflatten(2, (height, width))
        grid = F.adaptive_avg_pool2d(x, (min(height, limit), min(width, limit))).flatten(2).transpose(1, 2)
    return torch.cat([first, grid], dim=1)


def scale_prefix(prefix: Tensor, norm: float | Tensor) -> Tensor:
    """(B, P, D) -> the same directions with the norm of a token embedding."""
    return F.normalize(prefix, dim=-1) * norm


def tied_logits(states: Tensor, embedding: Tensor, gain: Tensor, norm: float | Tensor) -> Tensor:
    """(..., D) states, (V, D) token embedding and its mean norm, (D,) gain of the last norm -> (..., V) logits.

    A CLIP was never asked for logits, and its embedding can be too short for a peaked softmax: the scale lets a state
    that points at a token reach a logit of 20.
    """
    reach = gain.detach().norm() * norm
    return F.linear(states, embedding) * (_TOP_LOGIT / reach).clamp(min=1.0)
