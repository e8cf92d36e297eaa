"""open_clip's CoCa (arXiv 2205.01917): image tower with attention pooling, text tower, and a decoder on top of both."""

from torch import nn

from vl_mtl_lora.attention import split_attention
from vl_mtl_lora.backbones.base import Backbone, ImageStates, unit
from vl_mtl_lora.backbones.open_clip_dual import (
    check_image_tower,
    express_image_tower,
    image_blocks,
    image_places,
    open_clip_transform,
    save_open_clip,
)
from vl_mtl_lora.backbones.open_clip_text import OpenClipText, scalar
from vl_mtl_lora.backbones.prefix import causal_mask
from vl_mtl_lora.backbones.roles import block_places, tower_places
from vl_mtl_lora.errors import UserError


class OpenClipCoCa(Backbone):
    """An `open_clip.CoCa`. It writes through its own decoder, so `states.prefix` are the pooled image tokens that the
    decoder's cross-attention reads."""

    towers = ("image", "text", "decoder")
    text_towers = ("text", "decoder")
    capabilities = frozenset({"embed", "generate"})
    writes = True
    takes_bytes = True
    model_config: dict  # see `OpenClipDual`

    def __init__(self, model: nn.Module, tokenizer):
        from open_clip.transformer import TextTransformer

        super().__init__()
        check_image_tower(model.visual)
        if hasattr(model.visual, "trunk") or model.visual.attn_pool is None or not isinstance(model.text,
                                                                                              TextTransformer):
            raise UserError("backbone: a CoCa is supported with open_clip's own ViT, attention pooling and text tower")
        self.model = model
        self.text = OpenClipText(tokenizer, model.text.context_length, trims=False)  # the class token comes last
        self.embed_dim = model.text.output_dim
        self.log_scale = scalar(model.logit_scale)

    def transform(self, train, **augmentation):
        return open_clip_transform(self.model.visual, train, augmentation)

    # -- towers ---------------------------------------------------------------------------------------------------

    def image_states(self, images):
        pooled, tokens = self.model.visual(self.scaled(images).to(self.dtype))
        # A pool of one query for embeddings keeps its axis: (B, 1, E).
        return ImageStates(unit(pooled.flatten(1)), tokens)

    def encode_text(self, tokens):
        return unit(self.model.encode_text(tokens, normalize=False))

    def step(self, states, tokens, positions, readable=None):
        text, decoder = self.model.text, self.model.text_decoder
        x = text.token_embedding(tokens) + text.positional_embedding[positions]
        x = x.to(text.transformer.get_cast_dtype())
        mask = causal_mask(x, readable)
        x = text.transformer(x, mask)
        for block, cross in zip(decoder.resblocks, decoder.cross_attn):
            x = cross(block(x, attn_mask=mask), k_x=states.prefix, v_x=states.prefix)
        return decoder.ln_final(x)

    def logits(self, states):
        return states @ self.model.text_decoder.text_projection

    # -- adapters -------------------------------------------------------------------------------------------------

    def express(self):
        express_image_tower(self.model.visual)
        decoder = self.model.text_decoder
        self.model.text.transformer.batch_first = decoder.batch_first = True  # rows are dim 0 from here on
        for tower, blocks, cross in (("text", self.model.text.transformer.resblocks, False),
                                     ("decoder", decoder.resblocks, False), ("decoder", decoder.cross_attn, True)):
            for index, block in enumerate(blocks):
                block.attn = split_attention(block.attn, where=f"{tower}.{index}", cross=cross)
                block.attn.cache = self.cache

    def places(self, needs):
        self.express()
        visual = self.model.visual
        # One pool, or the first of two in cascade, serves both heads; of two in parallel each serves its own.
        shared = visual.attn_pool_contrastive is None or visual.attn_pool_type == "cascade"
        found = image_places(visual, self.left_out, pooled=shared or "generate" in needs)
        if visual.attn_pool_contrastive is not None and "embed" in needs:
            found += block_places("image", -1, visual.attn_pool_contrastive, self.left_out, stem="pool_embed.")
        found += tower_places("text", self.model.text.transformer.resblocks, self.left_out)
        if "generate" in needs:
            decoder = self.model.text_decoder
            for index, (block, cross) in enumerate(zip(decoder.resblocks, decoder.cross_attn)):
                found += block_places("decoder", index, block, self.left_out)
                found += block_places("decoder", index, cross, self.left_out, stem="cross.")
        return found

    def save_library(self, folder, state):
        save_open_clip(self, folder, state)

    def blocks(self):
        decoder = self.model.text_decoder
        return [*image_blocks(self.model.visual), *self.model.text.transformer.resblocks, *decoder.resblocks,
                *decoder.cross_attn]
