"""The contract that every backbone fulfils: what the rest of the package may ask of a vision-language model."""

from collections.abc import Callable, Sequence, Set
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vl_mtl_lora.backbones.generation import generate


class ImageStates(NamedTuple):
    """What the image tower saw. Rows are images.

    embedding: (B, E), L2-normalised, comparable with `Backbone.encode_text`.
    prefix:    (B, P, D), the image as P input vectors of the text decoder; None where the backbone cannot generate.
    """

    embedding: Tensor
    prefix: Tensor | None

    def rows(self, part: slice) -> "ImageStates":
        """The states of some rows."""
        return ImageStates(self.embedding[part], None if self.prefix is None else self.prefix[part])


class TextCodec(Protocol):
    """Between texts and token ids. context_length: the most tokens of a text, the marks at both ends included."""

    bos_id: int
    eos_id: int
    context_length: int

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (B, context_length) token ids with begin and end marks, padded; too long ones are cut."""

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Texts -> token ids without marks and padding."""

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids -> text, marks left out."""


class Place(NamedTuple):
    """One adaptable `nn.Linear`: `getattr(parent, attribute)`, whose output is `splits` equal slices side by side."""

    tower: str  # whose rows it sees: "image" or "text"
    block: int  # index of the transformer block, -1 outside the blocks
    role: str  # "attn.qkv", "attn.out", "mlp.in", "mlp.out", "projector" (the last reads image rows)
    parent: nn.Module
    attribute: str
    splits: int = 1

    @property
    def name(self) -> str:
        """The logical name under which the place's adapter is stored, e.g. `image.3.attn.qkv`."""
        return f"{self.tower}.{self.block}.{self.role}" if self.block >= 0 else self.role


class Backbone(nn.Module):
    """A vision-language model behind one interface. Subclasses set the attributes and write the methods they can.

    model:        the library's own module, weights under the library's own names until adapters are injected.
    towers:       names of the adaptable towers, e.g. ("image", "text").
    capabilities: any of "embed" (encode_image, encode_text) and "generate" (token_states, generate).
    random_weights: whether the model was built without pretrained weights.
    router:       the TaskRouter of the adapters, set by `inject`; None on a model without.
    embed_dim:    E, the width of the joint embedding.
    log_scale:    logarithm of the scale that the base's own contrastive loss gave to similarities.
    text:         between texts and token ids, usable in loader processes, where the model is not.
    """

    model: nn.Module
    towers: tuple[str, ...]
    capabilities: frozenset[str]
    embed_dim: int
    log_scale: float
    text: TextCodec
    router = None
    random_weights = False

    def preprocess(self, train: bool, **augmentation) -> Callable:
        """Returns a function PIL image -> (3, H, W) float tensor; `train` adds the library's augmentation.

        augmentation: options of the library's own augmentation. Raises UserError for an unknown one.
        """
        raise NotImplementedError

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (B, context_length) token ids with begin and end marks, padded, as `encode_text` reads them."""
        return self.text.tokenize(texts)

    def image_states(self, images: Tensor) -> ImageStates:
        """(B, 3, H, W) pixels -> everything that the tasks read of an image, in one pass of the image tower."""
        raise NotImplementedError

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) pixels -> (B, E), L2-normalised."""
        return self.image_states(images).embedding

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) token ids, L up to context_length -> (B, E), L2-normalised."""
        raise NotImplementedError

    def token_states(self, images: Tensor | ImageStates, tokens: Tensor) -> Tensor:
        """Images (pixels or states) and (B, L) token ids -> (B, L, D): what the decoder knows after each token."""
        raise NotImplementedError

    def logits(self, states: Tensor) -> Tensor:
        """(..., D) decoder states -> (..., V) logits of the next token."""
        raise NotImplementedError

    def token_logits(self, images: Tensor | ImageStates, tokens: Tensor) -> Tensor:
        """Images (pixels or states) and (B, L) token ids -> (B, L, V): at position i the logits of token i + 1."""
        return self.logits(self.token_states(images, tokens))

    def generate(self, images: Tensor | ImageStates, prompts: Sequence[str], *, max_new_tokens: int = 20,
                 num_beams: int = 1) -> list[str]:
        """Continues each prompt about its image, greedily or by beam search, until the end mark.

        Args:
            images: (B, 3, H, W) pixels, or states. prompts: B texts, "" for none.
            max_new_tokens: the most tokens to add; the context may end sooner.
            num_beams: 1 is greedy.

        Returns:
            B texts, prompts left out.
        """
        states = images if isinstance(images, ImageStates) else self.image_states(images)
        return generate(self, states, prompts, max_new_tokens, num_beams)

    def places(self, needs: Set[str]) -> list[Place]:
        """Every adaptable linear layer, after fused attention is re-expressed with plain `nn.Linear`.

        needs: the capabilities that will be used; layers that only others read are left out.
        The model computes the same function before and after.
        """
        raise NotImplementedError

    def library_parameters(self) -> dict[str, nn.Parameter]:
        """Every frozen parameter under the name that the library's own checkpoint gives it."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, each of which gradient checkpointing may run again in the backward pass."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
