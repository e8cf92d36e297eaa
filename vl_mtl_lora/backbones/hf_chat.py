"""The chat models of transformers: LLaVA, LLaVA-NeXT, Qwen-VL, SmolVLM, InternVL and what else
AutoModelForImageTextToText loads; pictures and texts go into one language model.

Texts go through the model's own chat template; a picture stands in them as one placeholder until the model runs, when
the placeholder becomes the ids that the processor made for that picture. The image tower runs once per picture; its
output is handed to the library's forward and generate. An embedding is the state of the last token of an instruction,
as in E5-V (arXiv 2407.12580).
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import MappingProxyType

import torch
from PIL import Image
from torch import Tensor, nn

from vl_mtl_lora.backbones.base import Backbone, Place, unit
from vl_mtl_lora.backbones.generation import build_sampler, pad_ids
from vl_mtl_lora.backbones.hf_chat_text import ChatText, expand
from vl_mtl_lora.backbones.hf_images import Pictures, PictureTransform
from vl_mtl_lora.backbones.roles import outermost_stack, tower_places
from vl_mtl_lora.errors import UserError

_IMAGE_INSTRUCTION = "Summarize the image in one word."
_TYPE_INPUTS = ("mm_token_type_ids", "token_type_ids")  # 1 where an id is of a picture
_QUANTIZED_BYTES = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}  # a value; NF4 has a float32 scale for 64 of them
_LOG_SCALE = 3.0  # exp(3) = 20: states of one model lie close together, and a temperature is learned


@dataclass(frozen=True)
class ChatStates:
    """What the image tower made of a batch. Rows are samples, each with `counts` of the pictures.

    features: per picture, as the library returns it, in an output of type `kind`. deep: the same of each layer that
    reaches into the text model. tokens: per picture, the ids that stand for it. positions: per-picture tensors that the
    positions of tokens depend on.
    """

    features: Sequence[Tensor]
    deep: Sequence[Sequence[Tensor]]
    tokens: Sequence[Sequence[int]]
    counts: Sequence[int]
    positions: Mapping[str, Tensor]
    kind: type

    def rows(self, part: slice | Tensor) -> "ChatStates":
        """The states of some rows: a slice, or (N,) row numbers."""
        numbers = range(len(self.counts))[part] if isinstance(part, slice) else part.tolist()
        starts = [0, *torch.tensor(self.counts).cumsum(0).tolist()]
        pictures = [i for row in numbers for i in range(starts[row], starts[row + 1])]
        return ChatStates([self.features[i] for i in pictures], [[layer[i] for i in pictures] for layer in self.deep],
                          [self.tokens[i] for i in pictures], [self.counts[row] for row in numbers],
                          {name: tensor[pictures] for name, tensor in self.positions.items()}, self.kind)


class HFChat(Backbone):
    """A vision-language chat model of transformers.

    Pictures are `Pictures`, made by `preprocess` and `collate_images`; (B, 3, H, W) tensors are no input here.
    """

    capabilities = frozenset({"embed", "generate", "generate_text"})
    writes = True
    prompts = MappingProxyType({"vqa": "{question}\nAnswer the question using a single word or phrase.",
                                "captioning": "Describe the image in one short sentence."})
    log_scale = _LOG_SCALE
    will_quantize: str | None = None

    def __init__(self, model: nn.Module, processor, max_length: int):
        super().__init__()
        config, base = model.config.get_text_config(), model.base_model
        self.model, self.processor = model, processor
        self._takes = frozenset(inspect.signature(base.forward).parameters)
        if not isinstance(getattr(processor, "image_token", None), str):
            raise UserError(f"backbone: {type(processor).__name__} names no token that stands for a picture")
        if "mm_encoder_outputs" not in self._takes:
            raise UserError(f"backbone: {type(model).__name__} does not take encoded pictures (mm_encoder_outputs); "
                            "it is not supported")
        if getattr(config, "use_bidirectional_attention", None) is True:
            raise UserError(f"backbone: {type(model).__name__} reads whole prompts in both directions; chat models "
                            "are supported where a token is read after those before it alone")
        self._feature_inputs = frozenset(inspect.signature(base.get_image_features).parameters)
        self.image_id = model.config.image_token_id  # what a picture's features replace, as often as it has features
        self.text = ChatText(processor, min(max_length, config.max_position_embeddings))
        self.embed_dim = config.hidden_size
        rope = getattr(base, "get_rope_index", None)
        self._position_inputs = () if rope is None else tuple(inspect.signature(rope).parameters)
        self._check_processor()
        self._check_logits()

    def _check_processor(self) -> None:
        """Raises UserError unless our ids and inputs for a picture and a text are those that the processor makes."""
        image = Image.new("RGB", (64, 48))
        rendered = self.text.render("what is it?", 1)
        try:
            theirs = self.processor(images=[[image]], text=[rendered], return_tensors="pt",
                                    add_special_tokens=self.text.adds_marks(rendered))
        except Exception as error:
            raise UserError(f"backbone: the {type(self.processor).__name__} of this model fails on a picture with a "
                            f"text: {type(error).__name__}: {error}") from error
        pictures = self.preprocess(False)(image)
        (ours,), _ = expand(self.text.prompts(["what is it?"], [1]), self.text.image_id, pictures.tokens, [1])
        given = {"input_ids", "attention_mask", "labels", *_TYPE_INPUTS, *self._position_inputs, *self._feature_inputs}
        unread = sorted(set(theirs.keys()) & self._takes - given)
        if unread or ours != theirs["input_ids"][0].tolist():
            why = f"it reads {', '.join(unread)} of its processor" if unread else "its processor rearranges texts"
            raise UserError(f"backbone: {type(self.model).__name__} is not supported: {why}")

    def _check_logits(self) -> None:
        """Raises UserError unless logits are the output layer's, for a model whose config names a change of them."""
        config = self.model.config.get_text_config()
        named = [name for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")
                 if getattr(config, name, None) not in (None, 1.0)]
        if not named or self.device.type == "meta":
            return
        ids = torch.tensor([[self.text.eos_id]], device=self.device)
        with torch.no_grad():
            if not torch.allclose(self.model(input_ids=ids).logits, self.logits(self._run(ids, None)), rtol=1e-2):
                raise UserError(f"backbone: {type(self.model).__name__} changes its logits ({', '.join(named)}); that "
                                "is not supported")

    # -- pictures and texts in ------------------------------------------------------------------------------------

    def transform(self, train, **augmentation):
        return PictureTransform(self.processor.image_processor, train, augmentation, self.processor)

    @staticmethod
    def collate_images(pictures):
        """One `Pictures` per row, or a list of them where a row shows several."""
        return Pictures.join([p if isinstance(p, Pictures) else Pictures.join(p, one_row=True) for p in pictures])

    # -- towers ---------------------------------------------------------------------------------------------------

    def image_states(self, images: Pictures):
        inputs = {**images.inputs, "pixel_values": images.inputs["pixel_values"].to(self.dtype)}
        with self._picture_rows(images):
            out = self.model.base_model.get_image_features(
                **{name: tensor for name, tensor in inputs.items() if name in self._feature_inputs}, return_dict=True)
        pooled = out.pooler_output
        if isinstance(pooled, Tensor):  # crops of all pictures in one tensor
            pooled = pooled.split(list(images.rows))
        deep = getattr(out, "deepstack_features", None) or []
        positions = {name: inputs[name] for name in self._position_inputs if name in inputs}
        return ChatStates(list(pooled), [list(layer) for layer in deep], images.tokens, images.counts, positions,
                          type(out))

    def no_pictures(self, rows):
        return ChatStates([], [], [], [0] * rows, {}, type(None))

    def _picture_rows(self, images: Pictures):
        """The route of the image tower's rows: pictures, their crops, or patches in a tower without a batch axis.

        What comes after the tower sees patches merged, so that there a token of the text is a row.
        """
        if self.router is None:
            return nullcontext()
        flat = images.inputs["pixel_values"].dim() == 2
        merged = [ids.count(self.image_id) for ids in images.tokens] if flat else images.rows
        return self.router.repeat(**{"image": _per_row(images.rows, images.counts),
                                     "image.merged": _per_row(merged, images.counts)})

    def _encoded(self, states: ChatStates) -> dict:
        """What the library's forward and generate take instead of pixels; made anew, since they change it."""
        if not states.features:
            return {}
        pooled = list(states.features)
        output = states.kind(pooler_output=torch.cat(pooled) if pooled[0].dim() == 3 else pooled)
        if states.deep:
            output["deepstack_features"] = [list(layer) for layer in states.deep]
        return {"mm_encoder_outputs": {"image": output}, **states.positions}

    def _token_types(self, ids: Tensor, states: ChatStates) -> dict[str, Tensor]:
        """Which ids are of pictures, where there are any, for models that place or mask those in a way of their own."""
        if not states.features:
            return {}
        return {name: (ids == self.image_id).long() for name in _TYPE_INPUTS if name in self._takes}

    def _run(self, ids: Tensor, states: ChatStates | None) -> Tensor:
        """(B, W) ids with pictures expanded -> (B, W, D) states of the language model."""
        extra = {} if states is None else {**self._encoded(states), **self._token_types(ids, states)}
        # Causal, and padded on the right: no mask is needed for what is read.
        return self.model.base_model(input_ids=ids, use_cache=False, **extra).last_hidden_state

    def _states(self, images):
        return images if isinstance(images, ChatStates) else self.image_states(images)

    def encode_image(self, images):
        states = self._states(images)
        prompts = self.text.prompts([_IMAGE_INSTRUCTION] * len(states.counts), [0] * len(states.counts), states.counts)
        x = self.token_states(states, pad_ids(prompts, self.text.pad_id).to(self.device))
        last = torch.tensor([len(ids) - 1 for ids in prompts], device=x.device)
        return unit(x[torch.arange(len(x), device=x.device), last])

    def encode_text(self, tokens):
        x = self._run(tokens, None)
        column = torch.arange(tokens.shape[1], device=tokens.device)
        last = (column * (tokens != self.text.pad_id)).argmax(dim=1)
        return unit(x[torch.arange(len(x), device=x.device), last])

    def token_states(self, images, tokens):
        states = self._states(images)
        rows, ends = expand(tokens.tolist(), self.text.image_id, states.tokens, states.counts)
        x = self._run(pad_ids(rows, self.text.pad_id).to(tokens.device), states)
        return x[torch.arange(len(x), device=x.device).unsqueeze(1), torch.tensor(ends, device=x.device)]

    def logits(self, states):
        return self.model.get_output_embeddings()(states)

    @torch.no_grad()
    def generate(self, images, prompts, *, max_new_tokens=20, num_beams=1, temperature=0.0, top_p=1.0, seed=0):
        """See `Backbone.generate`; by the library's own generate, rows padded on the left."""
        if not prompts:
            return []
        from transformers import GenerationConfig

        states = self._states(images)
        sampler = build_sampler(len(prompts), num_beams, temperature, top_p, seed)
        starts = self.text.prompts(prompts, [max_new_tokens] * len(prompts), states.counts)
        rows, _ = expand(starts, self.text.image_id, states.tokens, states.counts)
        width = max(map(len, rows))
        ids = torch.tensor([[self.text.pad_id] * (width - len(row)) + row for row in rows], device=self.device)
        readable = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)
        types = {name: kind * readable for name, kind in self._token_types(ids, states).items()}
        # The model's own settings may hold penalties that count a row's padding, and so its neighbours; what a config
        # given to generate leaves open would be taken from them.
        own, self.model.generation_config = self.model.generation_config, GenerationConfig(
            max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=False, eos_token_id=self.text.eos_id,
            pad_token_id=self.text.pad_id, suppress_tokens=[*{self.image_id, self.text.image_id}])
        try:
            with nullcontext() if self.router is None else self.router.repeat(text=num_beams):
                out = self.model.generate(
                    input_ids=ids, attention_mask=readable, **self._encoded(states), **types,
                    logits_processor=[] if sampler is None else [lambda _, scores: sampler(scores)])
        finally:
            self.model.generation_config = own
        return [self.text.decode(row) for row in out[:, width:].tolist()]

    # -- adapters -------------------------------------------------------------------------------------------------

    @property
    def weight_bytes(self):
        """In a dry run, of the quantised model that the real run will have."""
        whole = super().weight_bytes
        layers = [m for block in outermost_stack(self.model.get_decoder()) for m in block.modules()
                  if isinstance(m, nn.Linear)] if self.will_quantize else []
        values = sum(layer.weight.numel() for layer in layers)
        return round(whole - values * (self.dtype.itemsize - _QUANTIZED_BYTES.get(self.will_quantize, 0)))

    def places(self, needs):
        base, vision, language = self._parts()
        blocks = outermost_stack(vision)
        used = self._vision_blocks_used(len(blocks))
        for index in range(used, len(blocks)):
            self.left_out[f"image.{index}"] = "the language model reads the states before this block"
        found = tower_places("image", blocks[:used], self.left_out)
        found += self._projectors(base, vision, language)
        return found + tower_places("text", outermost_stack(language), self.left_out)

    def _parts(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        base = self.model.base_model
        return base, self.model.get_encoder(modality="image"), self.model.get_decoder()

    def _vision_blocks_used(self, count: int) -> int:
        """How many blocks of the image tower lie below the states that are taken from it."""
        layers = getattr(self.model.config, "vision_feature_layer", None)
        if layers is None:
            return count
        layers = [layers] if isinstance(layers, int) else layers
        return max(layer if layer >= 0 else count + 1 + layer for layer in layers)

    def _projectors(self, base, vision, language):
        """The linear layers between the image tower's blocks and the language model, numbered in the model's order."""
        blocks = {id(m) for block in outermost_stack(vision) for m in block.modules()}
        inside = {id(m) for m in (*language.modules(), *vision.modules())}
        # Some models keep theirs, called merger, in the image tower.
        names = [name for name, layer in base.named_modules() if isinstance(layer, nn.Linear)
                 and (id(layer) not in inside or "merger" in name and id(layer) not in blocks)]
        found = []
        for number, name in enumerate(names, 1):
            parent, _, attribute = name.rpartition(".")
            role = "projector" if len(names) == 1 else f"projector.{number}"
            found.append(Place("image", -1, role, base.get_submodule(parent), attribute, rows="image.merged"))
        return found

    hf_class = property(lambda self: type(self.model))

    def hf_names(self, place):
        return super().layer_names(place)

    def save_library(self, folder, state):
        self.model.save_pretrained(folder, state_dict=dict(state))
        self.processor.save_pretrained(folder)

    def layer_names(self, place):
        """Also as in transformers before 5 and before 4.52, and in the language model alone."""
        (name, whole), = super().layer_names(place).items()
        language = next(path for path, module in self.model.named_modules() if module is self.model.get_decoder())
        names = [name, name.replace("vision_tower.", "vision_tower.vision_model.")]
        names += [name.removeprefix("model.") for name in names]
        if name.startswith(f"{language}."):
            names += [f"{stem}{name.removeprefix(language)}" for stem in ("model", "language_model.model")]
        return dict.fromkeys(names, whole)

    def blocks(self):
        _, vision, language = self._parts()
        return [*outermost_stack(vision), *outermost_stack(language)]


def _per_row(sizes: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Sizes of pictures -> their sums over each row's pictures."""
    sizes = iter(sizes)
    return [sum(next(sizes) for _ in range(count)) for count in counts]
