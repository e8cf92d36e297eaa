"""open_clip's dual encoders: CLIP and CustomTextCLIP (SigLIP), ViTs of its own or of timm, causal, bidirectional or
Hugging Face text towers."""

import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vl_mtl_lora.attention import split_attention
from vl_mtl_lora.backbones.base import Backbone, ImageStates, Place, unit
from vl_mtl_lora.backbones.open_clip_text import OpenClipText, scalar
from vl_mtl_lora.backbones.prefix import PREFIX_GRID, PrefixBackbone, causal_mask, prefix_tokens
from vl_mtl_lora.backbones.roles import block_places, outermost_stack, tower_places
from vl_mtl_lora.errors import UserError


class OpenClipDual(PrefixBackbone):
    """An `open_clip.CLIP` or `CustomTextCLIP`. With a Hugging Face text tower it embeds and does not generate."""

    takes_bytes = True
    model_config: dict  # what open_clip_config.json says of the model, set by who loads it

    def __init__(self, model: nn.Module, tokenizer, prefix_grid: int | None = None):
        from open_clip.hf_model import HFTextEncoder
        from open_clip.model import CLIP, CustomTextCLIP

        super().__init__()
        if type(model) not in (CLIP, CustomTextCLIP):
            raise UserError(f"backbone: {type(model).__name__} is not supported; supported are open_clip's CLIP, "
                            "CustomTextCLIP and CoCa")
        check_image_tower(model.visual)
        if getattr(model.visual, "attn_pool", None) is not None:
            raise UserError("backbone: a CLIP with attention pooling in open_clip's own ViT is not supported")
        self.model = model
        tower = self._text_tower
        trims = False
        if isinstance(tower, HFTextEncoder):
            self.capabilities = frozenset({"embed"})
        else:
            self.set_projector(self._projection(), prefix_grid or PREFIX_GRID)
            # A causal tower that pools at the end mark does not see the columns after it.
            trims = tower.attn_mask is not None and text_pooling(tower)[0] in ("argmax", "eos")
        self.text = OpenClipText(tokenizer, model.context_length, trims)
        self.embed_dim = tower.output_dim if hasattr(tower, "output_dim") else model.text_projection.shape[-1]
        self.log_scale, self.logit_bias = scalar(model.logit_scale), scalar(model.logit_bias)
        if model.logit_bias is not None:  # open_clip trains with SigLIP's loss exactly where there is a bias
            self.contrastive = "sigmoid"

    @property
    def _text_tower(self) -> nn.Module:
        """CLIP keeps its text transformer's parts at its root, under the same names."""
        return getattr(self.model, "text", self.model)

    def transform(self, train, **augmentation):
        return open_clip_transform(self.model.visual, train, augmentation)

    # -- towers ---------------------------------------------------------------------------------------------------

    def image_states(self, images):
        visual, images = self.model.visual, self.scaled(images).to(self.dtype)
        if "generate" not in self.capabilities:
            return ImageStates(unit(self.model.encode_image(images)), None)
        out = visual.forward_intermediates(
            images, indices=1, normalize_intermediates=True, output_fmt="NLC", output_extra_tokens=True)
        grid = out["image_intermediates"][0]
        first = out["image_intermediates_prefix"][0][:, :1] if "image_intermediates_prefix" in out else None
        if first is None or not first.shape[1]:  # no class token
            first = grid.mean(dim=1, keepdim=True)
        tokens = prefix_tokens(first, grid, self._grid_size, self.prefix_grid)
        return ImageStates(unit(out["image_features"]), self.prefix(tokens))

    @property
    def _grid_size(self) -> tuple[int, int]:
        visual = self.model.visual
        return visual.grid_size if hasattr(visual, "grid_size") else visual.trunk.patch_embed.grid_size

    def encode_text(self, tokens):
        if not self.text.trims:
            return unit(self.model.encode_text(tokens))
        tower = self._text_tower
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.embed_tokens(tokens, positions)
        x = self.read(x, causal_mask(x))
        pool, eos_id = text_pooling(tower)
        at_end = tokens if pool == "argmax" else (tokens == eos_id).int()
        pooled = x[torch.arange(len(x), device=x.device), at_end.argmax(dim=-1)]
        projection = tower.text_projection
        return unit(projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection)

    def embed_tokens(self, tokens, positions):
        tower = self._text_tower
        x = tower.token_embedding(tokens) + tower.positional_embedding[positions]
        return x.to(tower.transformer.get_cast_dtype())

    def read(self, x, mask):
        tower = self._text_tower
        return tower.ln_final(tower.transformer(x, mask))

    def token_weights(self):
        return self._text_tower.token_embedding.weight, self._text_tower.ln_final.weight

    def _projection(self) -> Tensor:
        """(text width, image width): the image projection followed by the transpose of the text projection."""
        text = self._text_tower.text_projection
        width = self._text_tower.token_embedding.weight.shape[1]
        if text is None:
            back = torch.eye(width, device=self._text_tower.token_embedding.weight.device)
        else:
            back = text.weight.T if isinstance(text, nn.Linear) else text  # (text width, joint)
        return back if (image := image_projection(self.model.visual)) is None else back @ image

    # -- adapters -------------------------------------------------------------------------------------------------

    def express(self):
        express_image_tower(self.model.visual)
        if "generate" in self.capabilities:
            self._text_tower.transformer.batch_first = True  # rows are dim 0 from here on
            for index, block in enumerate(self._text_tower.transformer.resblocks):
                block.attn = split_attention(block.attn, where=f"text.{index}")
                block.attn.cache = self.cache

    def places(self, needs):
        self.express()
        found = image_places(self.model.visual, self.left_out, pooled="embed" in needs)
        found += tower_places("text", self._text_blocks(), self.left_out)
        if "generate" in needs:
            found.append(Place("image", -1, "projector", self, "projector"))
        return found

    def layer_names(self, place):
        return super().layer_names(place) | self.hf_names(place)

    def hf_names(self, place):
        """In CLIPModel, for a CLIP with open_clip's own ViT, or in SiglipModel, for one of timm pooled by attention."""
        visual = self.model.visual
        kind = visual.trunk.global_pool if hasattr(visual, "trunk") else visual.pool_type
        if kind not in ("map", "tok") or "generate" not in self.capabilities:
            return {}
        stem = {"image": "vision_model", "text": "text_model"}[place.tower] + f".encoder.layers.{place.block}"
        theirs = {"attn.out": "self_attn.out_proj", "mlp.in": "mlp.fc1", "mlp.out": "mlp.fc2"}
        names = {f"{stem}.{theirs[place.role]}": None} if place.block >= 0 and place.role in theirs else {}
        if place.block >= 0 and place.splits == 3:
            names = {f"{stem}.self_attn.{part}_proj": index for index, part in enumerate("qkv")}
        return names

    def save_library(self, folder, state):
        save_open_clip(self, folder, state)

    def _text_blocks(self) -> list[nn.Module]:
        if "generate" in self.capabilities:
            return list(self._text_tower.transformer.resblocks)
        return outermost_stack(self._text_tower.transformer)

    def blocks(self):
        return [*image_blocks(self.model.visual), *self._text_blocks()]


def text_pooling(tower: nn.Module) -> tuple[str, int]:
    """How a CLIP's or TextTransformer's text is pooled, and its end mark."""
    if hasattr(tower, "text_pool_type"):
        return tower.text_pool_type, tower.text_eos_id
    return tower.pool_type, tower.eos_id


def open_clip_transform(visual: nn.Module, train: bool, augmentation: dict):
    """open_clip's own preprocessing for an image tower. Raises UserError for an augmentation it does not know."""
    from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2

    valid = [field.name for field in fields(AugmentationCfg)]
    for option in augmentation:
        if option not in valid:
            raise UserError(f"augment: open_clip knows no option {option!r}", near=(option, valid))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unused augmentation cfg items")  # said of items that it does use
        try:
            return image_transform_v2(PreprocessCfg(**visual.preprocess_cfg), is_train=train,
                                      aug_cfg=augmentation or None)
        except (AssertionError, TypeError, ValueError) as error:
            raise UserError(f"augment: open_clip refuses {augmentation}: {error or 'values do not fit'}") from error


def save_open_clip(backbone: Backbone, folder: Path, state: Mapping[str, Tensor]) -> None:
    """A folder for `local-dir:`, whose weights `pretrained=` takes too; see `Backbone.save_library`."""
    from open_clip.push_to_hf_hub import save_config_for_hf

    save_file(dict(state), folder / "open_clip_model.safetensors", {"format": "pt"})
    save_config_for_hf(backbone.model, folder / "open_clip_config.json", backbone.model_config)
    if hasattr(backbone.text.tokenizer, "save_pretrained"):  # the other one comes with open_clip
        backbone.text.tokenizer.save_pretrained(folder)


# -- image towers, open_clip's own and timm's -------------------------------------------------------------------------


def check_image_tower(visual: nn.Module) -> None:
    """Raises UserError unless the image tower is a ViT whose layers can be adapted; says why."""
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, VisionTransformer):
        return
    trunk = getattr(visual, "trunk", None)
    blocks = getattr(trunk, "blocks", None)
    if not isinstance(visual, TimmModel) or not isinstance(blocks, nn.ModuleList | nn.Sequential):
        raise UserError(f"backbone: the image tower {type(trunk or visual).__name__} is not supported; supported are "
                        "open_clip's ViT and the ViTs of timm")
    for module in trunk.modules():
        if isinstance(getattr(module, "qkv", None), nn.Linear) and getattr(module, "q_bias", None) is not None \
                and not getattr(module, "qkv_bias_separate", False):
            raise UserError(f"backbone: {type(trunk).__name__} reads the weight of its fused qkv layer and never calls "
                            f"it ({type(module).__name__} with q_bias), so an adapter there would be dead; EVA towers "
                            "with separate q, k and v (EVA02-B-16, EVA02-L-14) are supported")


def image_blocks(visual: nn.Module) -> list[nn.Module]:
    return list(visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks)


def express_image_tower(visual: nn.Module) -> None:
    """Attention of open_clip's own ViT as plain linear layers; timm's is already."""
    if hasattr(visual, "trunk"):
        return
    visual.transformer.batch_first = True
    for index, block in enumerate(visual.transformer.resblocks):
        block.attn = split_attention(block.attn, where=f"image.{index}")
    for pool in (visual.attn_pool, getattr(visual, "attn_pool_contrastive", None)):
        if pool is not None:
            pool.attn = split_attention(pool.attn, where="image.pool", cross=True)


def image_places(visual: nn.Module, left_out: dict[str, str], pooled: bool) -> list[Place]:
    """Places of an image tower: its blocks, and its attention pool where what that gives is used."""
    found = tower_places("image", image_blocks(visual), left_out)
    pool = getattr(getattr(visual, "trunk", visual), "attn_pool", None)
    if pool is not None and pooled:
        found += block_places("image", -1, pool, left_out, stem="pool.")
    return found


def image_projection(visual: nn.Module) -> Tensor | None:
    """(joint width, image width), or None where image tokens are in the joint space already.

    Of a projection that is an MLP, its two matrices without what lies between: a start that the adapter bends.
    """
    if not hasattr(visual, "trunk"):
        return None if visual.proj is None else visual.proj.T
    linear = [m.weight for part in (visual.trunk.head, visual.head) for m in part.modules() if isinstance(m, nn.Linear)]
    weight = None
    for matrix in linear:
        weight = matrix if weight is None else matrix @ weight
    return weight
