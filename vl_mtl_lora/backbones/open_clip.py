"""open_clip's CLIP models with the built-in ViT and text transformer, by name, tag, checkpoint file or local folder.

CLIP has no decoder. Here its causal text tower becomes one: the image enters as a prefix of projected image tokens
(class token and pooled grid), and logits are tied to the token embedding. The projection needs no new weight: image
width -> joint space through the model's own `visual.proj`, joint space -> text width through the transpose of its own
`text_projection`. It is kept as one frozen `nn.Linear`, so that an adapter can sit on it like on any other layer.
"""

import logging
import warnings
from dataclasses import fields
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vl_mtl_lora.attention import SplitAttention, split_attention
from vl_mtl_lora.backbones.base import Backbone, ImageStates, Place
from vl_mtl_lora.errors import UserError

EMBEDDED = "micro-clip"  # the base that ships with the package
_EMBEDDED_PREFIX_GRID = 3
_PREFIX_GRID = 7
_TOP_LOGIT = 20.0  # what the logit of a perfectly predicted token should be able to reach


def load(name: str, pretrained: str | None = None, *, prefix_grid: int | None = None, image_size: int | None = None,
         random_weights: bool = False) -> "OpenClipBackbone":
    """Builds an open_clip CLIP.

    Args:
        name: an open_clip model name ("ViT-B-32"), "local-dir:PATH", "hf-hub:ORG/NAME", or "micro-clip", the
            embedded base.
        pretrained: an open_clip tag or the path of a checkpoint file; only for plain names, which without it start
            from random weights, as in open_clip.
        prefix_grid: the image enters the decoder as 1 + prefix_grid**2 tokens at most.
        image_size: another input size in pixels; positional embeddings are interpolated.
        random_weights: load no weights, whatever the name (dry runs).

    Raises:
        UserError: unknown name or tag, missing or unfit checkpoint, or a model that is no plain ViT CLIP.
    """
    import open_clip

    if name == EMBEDDED:
        folder = resources.files("vl_mtl_lora") / "embedded" / "micro_clip"
        name, prefix_grid = f"local-dir:{folder}", prefix_grid or _EMBEDDED_PREFIX_GRID
    plain = ":" not in name
    if plain and open_clip.get_model_config(name) is None:
        raise UserError(f"backbone.name: open_clip has no model {name!r}", near=(name, open_clip.list_models()))
    if plain and pretrained and not Path(pretrained).is_file():
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained.lower() not in [tag.lower() for tag in tags]:
            raise UserError(f"backbone.pretrained: {pretrained!r} is neither a file nor a tag of {name}",
                            near=(pretrained, tags))
    options = {} if image_size is None else {"force_image_size": image_size}
    if plain and pretrained:
        options |= _activation(name, pretrained)
    # open_clip logs "no pretrained weights" as a warning where that is asked for.
    random_weights = random_weights or plain and pretrained is None
    level = logging.ERROR if random_weights else logging.WARNING
    root, before = logging.getLogger(), logging.getLogger().level
    root.setLevel(level)
    try:
        model = open_clip.create_model(name, pretrained=pretrained, load_weights=not random_weights, **options)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip raises many types for unfit or unreachable weights
        raise UserError(f"backbone: open_clip could not load {name!r} with pretrained={pretrained!r}: "
                        f"{type(error).__name__}: {error}") from error
    finally:
        root.setLevel(before)
    backbone = OpenClipBackbone(model, tokenizer, prefix_grid or _PREFIX_GRID)
    backbone.random_weights = random_weights
    return backbone


def _activation(name: str, tag: str) -> dict:
    """open_clip only warns where weights and the named model differ in QuickGELU; this mends or refuses it."""
    import open_clip

    trained = open_clip.get_pretrained_cfg(name, tag)  # empty for a checkpoint file
    wanted, has = (trained.get("quick_gelu", False), open_clip.get_model_config(name).get("quick_gelu", False))
    if trained and has and not wanted:
        raise UserError(f"backbone: {tag!r} was trained with GELU, {name} has QuickGELU; "
                        f"take {name.removesuffix('-quickgelu')}")
    return {"force_quick_gelu": True} if wanted else {}


class OpenClipBackbone(Backbone):
    """An `open_clip.CLIP` with a `VisionTransformer` and the causal text transformer at its root."""

    towers = ("image", "text")
    capabilities = frozenset({"embed", "generate"})

    def __init__(self, model: nn.Module, tokenizer, prefix_grid: int = _PREFIX_GRID):
        from open_clip.model import CLIP
        from open_clip.transformer import VisionTransformer

        super().__init__()
        if type(model) is not CLIP or not isinstance(model.visual, VisionTransformer):
            visual = type(getattr(model, "visual", model)).__name__
            raise UserError(f"backbone: {type(model).__name__} with a {visual} image tower is not supported; "
                            "supported are open_clip CLIP models with the built-in ViT and text transformer")
        if model.visual.attn_pool is not None or not isinstance(model.text_projection, nn.Parameter):
            raise UserError("backbone: CLIP with attention pooling or without a plain text projection is not supported")
        if model.attn_mask is None or model.text_pool_type not in ("argmax", "eos"):
            raise UserError(f"backbone: a text tower that is not causal or pools at {model.text_pool_type!r} is not "
                            "supported; expected a causal one that pools at the end of the text")
        self.model = model
        self.text = OpenClipText(tokenizer, model.context_length)
        self.log_scale = float(model.logit_scale.detach())
        self.embed_dim = model.text_projection.shape[1]
        self.prefix_grid = prefix_grid
        with torch.no_grad():
            weight = prefix_weight(model)  # (D, image width)
            self.projector = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            self.projector.weight = nn.Parameter(weight.contiguous())

    def preprocess(self, train, **augmentation):
        from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2

        valid = [field.name for field in fields(AugmentationCfg)]
        for option in augmentation:
            if option not in valid:
                raise UserError(f"augment: open_clip knows no option {option!r}", near=(option, valid))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unused augmentation cfg items")  # said of items that it does use
            try:
                return image_transform_v2(PreprocessCfg(**self.model.visual.preprocess_cfg), is_train=train,
                                          aug_cfg=augmentation or None)
            except (AssertionError, TypeError, ValueError) as error:
                raise UserError(f"augment: open_clip refuses {augmentation}: {error or 'values do not fit'}") from error

    # -- towers ---------------------------------------------------------------------------------------------------

    def image_states(self, images):
        out = self.model.visual.forward_intermediates(
            images, indices=1, normalize_intermediates=True, output_fmt="NLC", output_extra_tokens=True)
        tokens = prefix_tokens(out["image_intermediates_prefix"][0], out["image_intermediates"][0],
                               self.model.visual.grid_size, self.prefix_grid)
        prefix = scale_prefix(self.projector(tokens), self.model.token_embedding.weight)
        return ImageStates(F.normalize(out["image_features"], dim=-1), prefix)

    def encode_text(self, tokens):
        model = self.model
        x = self._decode(model.token_embedding(tokens) + model.positional_embedding[:tokens.shape[1]])
        at_end = tokens if model.text_pool_type == "argmax" else (tokens == model.text_eos_id).int()
        position = at_end.argmax(dim=-1)
        pooled = x[torch.arange(len(x), device=x.device), position]
        return F.normalize(pooled @ model.text_projection, dim=-1)

    def token_states(self, images, tokens):
        states = images if isinstance(images, ImageStates) else self.image_states(images)
        text = self.model.token_embedding(tokens) + self.model.positional_embedding[:tokens.shape[1]]
        prefix = states.prefix.to(text.dtype)
        return self._decode(torch.cat([prefix, text], dim=1))[:, prefix.shape[1]:]

    def logits(self, states):
        return tied_logits(states, self.model.token_embedding.weight, self.model.ln_final.weight)

    def _decode(self, x: Tensor) -> Tensor:
        """(B, L, D) input vectors -> (B, L, D) through the causal text transformer, which may be longer than a text."""
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf"), device=x.device, dtype=x.dtype).triu_(1)
        return self.model.ln_final(self.model.transformer(x.to(self.model.transformer.get_cast_dtype()), mask))

    # -- adapters -------------------------------------------------------------------------------------------------

    def places(self, needs):
        found = []
        for tower, transformer in (("image", self.model.visual.transformer), ("text", self.model.transformer)):
            transformer.batch_first = True  # rows are dim 0 from here on; split_attention expects it
            for index, block in enumerate(transformer.resblocks):
                if not isinstance(block.attn, SplitAttention):  # an earlier call may have done it
                    block.attn = split_attention(block.attn, where=f"{tower}.{index}")
                found += [Place(tower, index, "attn.qkv", block.attn, "qkv", splits=3),
                          Place(tower, index, "attn.out", block.attn, "out_proj"),
                          Place(tower, index, "mlp.in", block.mlp, "c_fc"),
                          Place(tower, index, "mlp.out", block.mlp, "c_proj")]
        if "generate" in needs:
            found.append(Place("image", -1, "projector", self, "projector"))
        return found

    def library_parameters(self):
        adapted = tuple(f".{name}" for name in ("down", "transform", "up", "mix"))
        found = {}
        for name, parameter in self.model.named_parameters():
            if name.endswith(adapted):
                continue
            name = name.replace(".base.", ".")
            found[name.replace(".qkv.weight", ".in_proj_weight").replace(".qkv.bias", ".in_proj_bias")] = parameter
        return found

    def blocks(self):
        return [*self.model.visual.transformer.resblocks, *self.model.transformer.resblocks]


class OpenClipText:
    """The `TextCodec` of an open_clip tokenizer."""

    def __init__(self, tokenizer, context_length: int):
        self.tokenizer, self.context_length = tokenizer, context_length
        empty = tokenizer([""])[0]
        self.bos_id, self.eos_id = int(empty[0]), int(empty[1])

    def tokenize(self, texts):
        return self.tokenizer(list(texts))

    def ids(self, texts):
        rows = self.tokenize(texts).tolist() if texts else []
        return [row[1:row.index(self.eos_id)] for row in rows]

    def decode(self, ids):
        ids = [int(i) for i in ids if int(i) not in (self.bos_id, self.eos_id)]
        # HFTokenizer wraps a tokenizer that can decode, SimpleTokenizer is one.
        return getattr(self.tokenizer, "tokenizer", self.tokenizer).decode(ids).strip()


# The decoder's maths as functions of weights, since pretraining the embedded base needs them with gradients.


def prefix_weight(model: nn.Module) -> Tensor:
    """(text width, image width): `visual.proj` followed by the transpose of `text_projection`."""
    return (model.visual.proj @ model.text_projection.T).T


def prefix_tokens(cls: Tensor, grid: Tensor, grid_size: tuple[int, int], limit: int) -> Tensor:
    """(B, 1, W) class token and (B, H*W', W) grid tokens -> (B, 1 + pooled grid, W), each side at most `limit`."""
    height, width = grid_size
    if max(height, width) > limit:
        x = grid.transpose(1, 2).unflatten(2, (height, width))
        grid = F.adaptive_avg_pool2d(x, (min(height, limit), min(width, limit))).flatten(2).transpose(1, 2)
    return torch.cat([cls, grid], dim=1)


def scale_prefix(prefix: Tensor, embedding: Tensor) -> Tensor:
    """(B, P, D) -> the same directions with the mean norm of a token embedding (V, D)."""
    return F.normalize(prefix, dim=-1) * embedding.detach().norm(dim=-1).mean()


def tied_logits(states: Tensor, embedding: Tensor, gain: Tensor) -> Tensor:
    """(..., D) states, (V, D) token embedding, (D,) gain of the last norm -> (..., V) logits.

    A CLIP was never asked for logits, and its embedding can be too short for a peaked softmax: the scale lets a state
    that points at a token reach a logit of 20.
    """
    reach = gain.detach().norm() * embedding.detach().norm(dim=-1).mean()
    return F.linear(states, embedding) * (_TOP_LOGIT / reach).clamp(min=1.0)
