"""The dual encoders of transformers: CLIPModel, SiglipModel, Siglip2Model (pictures of any aspect ratio)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vl_mtl_lora.attention import split_attention
from vl_mtl_lora.backbones.base import ImageStates, Place, unit
from vl_mtl_lora.backbones.hf_images import Pictures, PictureTransform
from vl_mtl_lora.backbones.hf_text import HFText
from vl_mtl_lora.backbones.open_clip_text import scalar
from vl_mtl_lora.backbones.prefix import PREFIX_GRID, PrefixBackbone, prefix_tokens
from vl_mtl_lora.backbones.roles import block_places, tower_places

_CACHED = "vl_mtl_lora_cached"  # name of our attention function in transformers' table


class HFDual(PrefixBackbone):
    """A `CLIPModel`, `SiglipModel` or `Siglip2Model`."""

    def __init__(self, model: nn.Module, processor, prefix_grid: int | None = None):
        super().__init__()
        self.model, self.processor = model, processor
        # CLIP keeps both projections at its root and SigLIP's image side has none.
        self._has_root_projections = hasattr(model, "text_projection")
        projection = self._text_projection.weight
        self.embed_dim = projection.shape[0]
        back = projection.T
        self.set_projector(back @ model.visual_projection.weight if self._has_root_projections else back,
                           prefix_grid or PREFIX_GRID)
        config = model.config.text_config
        self.text = HFText(processor.tokenizer, config.max_position_embeddings, trims=self._has_root_projections)
        self.log_scale = scalar(model.logit_scale)
        if hasattr(model, "logit_bias"):
            self.contrastive, self.logit_bias = "sigmoid", scalar(model.logit_bias)

    @property
    def _text_projection(self) -> nn.Linear:
        return self.model.text_projection if self._has_root_projections else self.model.text_model.head

    def transform(self, train, **augmentation):
        return PictureTransform(self.processor.image_processor, train, augmentation)

    @staticmethod
    def collate_images(pictures):
        if isinstance(pictures[0], Tensor):
            return PrefixBackbone.collate_images(pictures)
        return Pictures.join(pictures)

    # -- towers ---------------------------------------------------------------------------------------------------

    def image_states(self, images):
        inputs = images.inputs if isinstance(images, Pictures) else {"pixel_values": images}
        inputs = {**inputs, "pixel_values": inputs["pixel_values"].to(self.dtype)}
        out = self.model.get_image_features(**inputs)
        tokens = out.last_hidden_state
        if "spatial_shapes" in inputs:
            prefix = self._pooled_by_shape(tokens, inputs["spatial_shapes"])
        else:
            if self._has_root_projections:  # the hidden states of CLIP's patches are before the last norm
                tokens = self.model.vision_model.post_layernorm(tokens)
                first, tokens = tokens[:, :1], tokens[:, 1:]
            else:
                first = tokens.mean(dim=1, keepdim=True)
            vision = self.model.config.vision_config
            size = tuple(side // vision.patch_size for side in inputs["pixel_values"].shape[-2:])
            prefix = prefix_tokens(first, tokens, size, self.prefix_grid)
        return ImageStates(unit(out.pooler_output), self.prefix(prefix))

    def _pooled_by_shape(self, tokens: Tensor, shapes: Tensor) -> Tensor:
        """(B, patches, W) padded patches of (B, 2) heights and widths -> (B, 1 + grid^2, W): mean and pooled grid."""
        rows = []
        for row, (height, width) in zip(tokens, shapes.tolist()):
            grid = row[:height * width].T.unflatten(1, (height, width))
            grid = F.adaptive_avg_pool2d(grid, self.prefix_grid).flatten(1).T
            rows.append(torch.cat([row[:height * width].mean(dim=0, keepdim=True), grid]))
        return torch.stack(rows)

    def encode_text(self, tokens):
        return unit(self.model.get_text_features(input_ids=tokens).pooler_output)

    def embed_tokens(self, tokens, positions):
        embeddings = self.model.text_model.embeddings
        return embeddings.token_embedding(tokens) + embeddings.position_embedding(positions)

    def read(self, x, mask):
        text = self.model.text_model
        mask = mask[None, None] if mask.dim() == 2 else mask
        x = text.encoder(inputs_embeds=x, attention_mask=mask).last_hidden_state
        return text.final_layer_norm(x)

    def token_weights(self):
        text = self.model.text_model
        return text.embeddings.token_embedding.weight, text.final_layer_norm.weight

    # -- adapters -------------------------------------------------------------------------------------------------

    def express(self):
        self.model.text_model.config._attn_implementation = _cached_attention()
        for block in self.model.text_model.encoder.layers:
            block.self_attn.cache = self.cache
        pool = getattr(self.model.vision_model, "head", None)
        if pool is not None:
            pool.attention = split_attention(pool.attention, where="image.pool", cross=True)

    def places(self, needs):
        self.express()
        found = tower_places("image", self.model.vision_model.encoder.layers, self.left_out)
        pool = getattr(self.model.vision_model, "head", None)
        if pool is not None and "embed" in needs:
            found += block_places("image", -1, pool, self.left_out, stem="pool.")
        found += tower_places("text", self.model.text_model.encoder.layers, self.left_out)
        if "generate" in needs:
            found.append(Place("image", -1, "projector", self, "projector"))
        return found

    hf_class = property(lambda self: type(self.model))

    def hf_names(self, place):
        """SigLIP's pool attends with nn.MultiheadAttention there, which has no linear layers."""
        return {} if hasattr(place.parent, "library_names") else self.layer_names(place)

    def save_library(self, folder, state):
        self.model.save_pretrained(folder, state_dict=dict(state))
        self.processor.save_pretrained(folder)

    def blocks(self):
        return [*self.model.vision_model.encoder.layers, *self.model.text_model.encoder.layers]


def _cached_attention() -> str:
    """Registers, once, transformers' own SDPA attention with a key-value cache where the layer has one."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def attention(module, query, key, value, attention_mask, **options):
        if (cache := getattr(module, "cache", None)) is not None:
            key, value = cache.extend(module, key, value)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    if _CACHED not in AttentionInterface():
        AttentionInterface.register(_CACHED, attention)
        AttentionMaskInterface.register(_CACHED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return _CACHED
