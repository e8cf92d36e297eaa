"""The contract that every backbone fulfils: what the rest of the package may ask of a vision-language model."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import default_collate
from torchvision import transforms

from vl_mtl_lora.attention import KeyValueCache
from vl_mtl_lora.backbones.generation import generate
from vl_mtl_lora.data.pictures import Preprocess, scaling
from vl_mtl_lora.errors import UserError

Size = Annotated[int, Field(ge=1, le=4096)]  # of a picture or a grid: another's config may ask for all memory


@dataclass(frozen=True)
class ImageStates:
    """What the image tower saw. Rows are samples.

    embedding: (B, E), L2-normalised, comparable with `Backbone.encode_text`.
    prefix:    (B, P, D), what the text decoder reads of the image; None where the backbone cannot generate.
    """

    embedding: Tensor
    prefix: Tensor | None

    def rows(self, part: slice | Tensor) -> "ImageStates":
        """The states of some rows: a slice, or (N,) row numbers."""
        return ImageStates(self.embedding[part], None if self.prefix is None else self.prefix[part])


class TextCodec(Protocol):
    """Between texts and token ids; usable in loader processes, where the model is not.

    eos_id: ends an answer. pad_id: fills rows on the right. context_length: the most tokens of a text, marks included.
    """

    eos_id: int
    pad_id: int
    context_length: int

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (B, L) token ids as `encode_text` reads them, padded; too long ones are cut.

        L is context_length, but for chat models, whose context is long, that of the longest text.
        """

    def rows(self, texts: Sequence[str]) -> Tensor:
        """As `tokenize`, with no more columns than `encode_text` needs."""

    def prompts(self, texts: Sequence[str], room: Sequence[int],
                pictures: Sequence[int] | None = None) -> list[list[int]]:
        """Texts -> the ids that the decoder reads before its answer, marks included; cut where `room[i]` ids more
        would not fit. pictures: how many each text is about; one where None."""

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Answers -> their ids as they follow a prompt, without marks and padding."""

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids -> text, marks left out."""


class Place(NamedTuple):
    """One adaptable `nn.Linear`: `getattr(parent, attribute)`, whose output is `splits` equal slices side by side."""

    tower: str  # of `Backbone.towers`
    block: int  # index of the transformer block, -1 outside the blocks
    role: str  # attn.qkv or attn.q|k|v, attn.out, mlp.in, mlp.gate, mlp.out, projector; pool.* and cross.* alike
    parent: nn.Module
    attribute: str
    splits: int = 1
    rows: str | None = None  # the router's name of the rows it sees, where they are not simply the tower's

    @property
    def name(self) -> str:
        """The logical name under which the place's adapter is stored, e.g. `image.3.attn.qkv`."""
        return f"{self.tower}.{self.block}.{self.role}" if self.block >= 0 else f"{self.tower}.{self.role}"


class Backbone(nn.Module):
    """A vision-language model behind one interface. Subclasses set the attributes and write the methods they can.

    model:        the library's own module, weights under the library's own names until `express` is called, by
                  `inject` or `generate`; `library_state` has those names always.
    towers:       names of the adaptable towers.
    text_towers:  those of them whose rows are texts.
    capabilities: any of "embed" (encode_image, encode_text), "generate" (token_states, generate), and "generate_text"
                  (the same of texts about no picture, see `no_pictures`).
    writes:       whether the base itself was trained to write, so that its zero-shot answer is what it writes.
    takes_bytes:  whether `image_states` passes its pictures through `scaled`; see `loader_preprocess`.
    prompts:      default prompt of each task kind, where the config has none.
    embed_dim:    E, the width of the joint embedding.
    contrastive:  "softmax" or "sigmoid", the loss the base's embeddings were trained with.
    log_scale, logit_bias: that loss's similarities were exp(log_scale) * cosine + logit_bias.
    text:         between texts and token ids.
    cache:        keys and values during generation.
    left_out:     name of a layer -> why it is no place, filled by `places`.
    router:       the TaskRouter of the adapters, set by `inject`; None on a model without.
    random_weights: whether the model was built without pretrained weights.
    """

    model: nn.Module
    towers: tuple[str, ...] = ("image", "text")
    text_towers: tuple[str, ...] = ("text",)
    capabilities: frozenset[str]
    writes = False
    takes_bytes = False
    prompts: Mapping[str, str] = MappingProxyType({"vqa": "question : {question} answer :", "captioning": ""})
    embed_dim: int
    contrastive = "softmax"
    log_scale: float
    logit_bias = 0.0
    text: TextCodec
    router = None
    random_weights = False

    def __init__(self):
        super().__init__()
        self.cache = KeyValueCache()
        self._scaling: Tensor | None = None  # (2, 1, 3, 1, 1): mean and deviation of the model's pictures
        self.left_out: dict[str, str] = {}

    # -- pictures and texts in ------------------------------------------------------------------------------------

    def preprocess(self, train: bool, **augmentation) -> Callable[[Image.Image], Any]:
        """Returns a function from a PIL image of any mode and orientation to what `collate_images` takes.

        For most backbones that is a (3, H, W) float tensor. `train` adds augmentation, with options of its own.

        Raises:
            UserError: an unknown augmentation option.
        """
        return Preprocess(self.transform(train, **augmentation))

    def loader_preprocess(self, augmentations: Sequence[Mapping[str, Any] | None]
                          ) -> list[Callable[[Image.Image], Any]]:
        """`preprocess` for the pictures of one batch in loader processes; `image_states` takes them alike.

        Of a backbone that takes bytes, where all end with torchvision's ToTensor and the model's own Normalize: those
        are left to `scaled`. A picture then travels as (3, H, W) bytes, a quarter of the size, and becomes the same
        floats later.

        augmentations: of each kind of picture the options of its augmentation, None for none at all.
        """
        found = [self.transform(options is not None, **(options or {})) for options in augmentations]
        scalings = [scaling(transform) for transform in found]
        own = scaling(self.transform(False)) if self.takes_bytes else None
        if own is not None and all(scaling is not None and torch.equal(scaling, own) for scaling in scalings):
            found = [transforms.Compose([*each.transforms[:-2], transforms.PILToTensor()]) for each in found]
        return [Preprocess(transform) for transform in found]

    def scaled(self, images: Tensor) -> Tensor:
        """A batch of pictures as bytes -> floats as `preprocess` gives them; floats stay as they are."""
        if images.dtype != torch.uint8:
            return images
        if self._scaling is None:
            self._scaling = scaling(self.transform(False)).view(2, 1, -1, 1, 1)
        mean, std = self._scaling.to(images.device)
        return images.float().div_(255).sub_(mean).div_(std)

    def transform(self, train: bool, **augmentation) -> Callable[[Image.Image], Any]:
        """`preprocess` for upright RGB images: the model's own preprocessing."""
        raise NotImplementedError

    @staticmethod  # loader processes call it, and must not take the model along
    def collate_images(pictures: Sequence[Any]) -> Any:
        """Preprocessed pictures, one per row -> the batch that `image_states` takes, here (B, 3, H, W)."""
        return default_collate(list(pictures))  # in a loader process straight into the memory shared with the main one

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (B, L) token ids with begin and end marks, padded, as `encode_text` reads them."""
        return self.text.tokenize(texts)

    # -- towers ---------------------------------------------------------------------------------------------------

    def image_states(self, images: Any) -> ImageStates:
        """A batch of pictures -> everything that the tasks read of it, in one pass of the image tower.

        `ImageStates`, or another type with its `rows` that the backbone's own methods take.
        """
        raise NotImplementedError

    def no_pictures(self, rows: int) -> ImageStates:
        """The states of rows without a picture, for `token_states` and `generate`."""
        raise NotImplementedError

    def encode_image(self, images: Any) -> Tensor:
        """Pictures or their states -> (B, E), L2-normalised."""
        return self._states(images).embedding

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) token ids of `tokenize` or `TextCodec.rows` -> (B, E), L2-normalised."""
        raise NotImplementedError

    def token_states(self, images: Any, tokens: Tensor) -> Tensor:
        """Pictures or states, and (B, L) token ids -> (B, L, D): what the decoder knows after each token."""
        states = self._states(images)
        return self.step(states, tokens, torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens))

    def step(self, states: ImageStates, tokens: Tensor, positions: Tensor, readable: Tensor | None = None) -> Tensor:
        """The decoder over (B, L) further tokens -> (B, L, D); with an open cache, after all that it has seen.

        positions: (B, L), each token's place in its text. readable: (B, all tokens so far), False where padding.
        """
        raise NotImplementedError

    def logits(self, states: Tensor) -> Tensor:
        """(..., D) decoder states -> (..., V) logits of the next token."""
        raise NotImplementedError

    def token_logits(self, images: Any, tokens: Tensor) -> Tensor:
        """Pictures or states, and (B, L) token ids -> (B, L, V): at position i the logits of token i + 1."""
        return self.logits(self.token_states(images, tokens))

    def generate(self, images: Any, prompts: Sequence[str], *, max_new_tokens: int = 20, num_beams: int = 1,
                 temperature: float = 0.0, top_p: float = 1.0, seed: int | Sequence[int] = 0) -> list[str]:
        """Continues each prompt about its image until the end mark.

        Args:
            images: B rows of pictures, or states. prompts: B texts, "" for none.
            max_new_tokens: the most tokens to add; the context may end sooner.
            num_beams: more than 1 for beam search.
            temperature: above 0 for sampling, from the smallest set of tokens that holds `top_p` of the probability.
            seed: of row 0, the others follow; or one per row. What a row says does not depend on its neighbours.

        Returns:
            B texts, prompts left out.
        """
        return generate(self, self._states(images), prompts, max_new_tokens, num_beams, temperature, top_p, seed)

    def _states(self, images: Any) -> ImageStates:
        return images if isinstance(images, ImageStates) else self.image_states(images)

    # -- adapters -------------------------------------------------------------------------------------------------

    def express(self) -> None:
        """Re-expresses fused attention with plain `nn.Linear`, and lets the decoder's attention use the cache.

        The model computes the same function before and after; a second call changes nothing.
        """

    def places(self, needs: Set[str]) -> list[Place]:
        """Every adaptable linear layer of a model without adapters, fused attention re-expressed.

        needs: the capabilities that will be used; layers that only others read are left out.
        """
        raise NotImplementedError

    def layer_names(self, place: Place) -> dict[str, int | None]:
        """What a place's layer is called in this model, and in others that have the same one -> which of its output
        slices it is there, None for the whole layer."""
        path = next((name for name, module in self.model.named_modules() if module is place.parent), None)
        return {} if path is None else {f"{path}.{place.attribute}".lstrip("."): None}

    def hf_names(self, place: Place) -> dict[str, int | None]:
        """As `layer_names`, in the model of transformers with the same weights; empty where it has no such layer."""
        return {}

    @property
    def hf_class(self) -> type | None:
        """The class of transformers that `model` is of, None where it is another library's."""
        return None

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, each of which gradient checkpointing may run again in the backward pass."""
        raise NotImplementedError

    def library_state(self, replaced: Mapping[nn.Parameter, Tensor] = MappingProxyType({})) -> dict[str, Tensor]:
        """Every frozen tensor under the name that the library's own checkpoint gives it.

        replaced: tensors to take instead of parameters. Re-expressed layers are put together again.
        """
        parts: dict[str, list[Tensor]] = {}
        seen: set[int] = set()  # a tied parameter has its first name alone
        for name, parameter in _library_parameters(self.model):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                parts.setdefault(name, []).append(replaced.get(parameter, parameter.detach()))
        return {name: tensors[0] if len(tensors) == 1 else torch.cat(tensors) for name, tensors in parts.items()}

    def save_library(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Writes weights and all that goes with them into a folder that the model's library loads.

        state: weights as `library_state` names them, on the CPU.
        """
        raise UserError(f"{type(self).__name__} has no folder of its library's: write the weights alone, "
                        "--out FILE.safetensors")

    @property
    def weight_bytes(self) -> int:
        """What the frozen weights take."""
        return sum(p.numel() * p.element_size() for p in self.parameters() if not p.requires_grad)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights, and of what the towers are given."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())


def _library_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by their library names: a module that stands for another says in `library_names` what its own are
    called there, None for those that the library does not have."""
    renamed = getattr(module, "library_names", {})
    own = [(name, p) for name, p in module.named_parameters(recurse=False)]
    below = [(f"{child}.{name}", p) for child, part in module.named_children() for name, p in _library_parameters(part)]
    for name, parameter in (*own, *below):
        if (name := renamed.get(name, name)) is not None:
            yield name, parameter


def unit(x: Tensor) -> Tensor:
    """(..., E) vectors of length one, in float32 or wider: similarities decide by small differences."""
    return F.normalize(wide(x), dim=-1)


def wide(x: Tensor) -> Tensor:
    """In float32, or in float64 where it is so already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
