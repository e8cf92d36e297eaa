"""Tiny models of many architectures with random weights, written as the folders that open_clip and transformers load.

Importing this file registers the tiny timm towers, which an open_clip folder can name but not hold.
"""

import json
import math
import shutil
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import timm
import torch
import transformers as hf  # loads its parts when they are first asked for
from safetensors.torch import save_model
from timm.models import register_model
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = ("a photo of the color is what shape there no yes red green blue yellow circle square triangle picture shows "
         "describe image in one short sentence answer question using single word or phrase summarize user assistant "
         "system : ? . , 0 1 2 3 4 5 6 7 8 9 it this with an object and small big left right top bottom on").split()
SPECIAL = ["<pad>", "<unk>", "<bos>", "<eos>"]
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokenizer(special=(), *, start=None, end=None, length=512, **options):
    """A lower-case tokenizer with one id per word of `WORDS`, punctuation mark and line break.

    Args:
        special: tokens beyond `SPECIAL`, which have the ids 0 to 3.
        start: the special token put before every text.
        end: the special token put after every text.
        length: the longest text.
        options: of `PreTrainedTokenizerFast`.
    """
    special = [*SPECIAL, *special]
    vocab = {word: i for i, word in enumerate([*special, "\n", *WORDS])}
    fast = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), behavior="removed", invert=True)
    fast.add_special_tokens(special)
    fast.post_processor = around(start, end)
    options = {"bos_token": "<bos>", "eos_token": "<eos>", "model_input_names": ["input_ids", "attention_mask"],
               "pad_token": "<pad>", "unk_token": "<unk>", "model_max_length": length, **options}
    return hf.PreTrainedTokenizerFast(tokenizer_object=fast, **options)


def around(start, end):
    """Puts the tokens `start` and `end`, each of `SPECIAL` or None, around a text."""
    known = [(token, SPECIAL.index(token)) for token in (start, end) if token]
    return processors.TemplateProcessing(single=f"{start or ''} $A {end or ''}".strip(), special_tokens=known)


def siglip2_tokenizer(length):
    """A `Siglip2Tokenizer`, which transformers takes for that model whatever its folder says, with the same words."""
    words = dict.fromkeys([f"▁{word}" for word in WORDS] + WORDS)  # merges of the former come first
    merges = list(dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word))))
    pieces = dict.fromkeys([*SPECIAL, *sorted(set("".join(words))), *map("".join, merges)])
    tokens = hf.Siglip2Tokenizer({piece: i for i, piece in enumerate(pieces)}, merges, mask_token=None,
                                 padding_side="right", model_max_length=length, max_length=length,
                                 model_input_names=["input_ids"])
    tokens.backend_tokenizer.post_processor = around(None, "<eos>")
    return tokens


@contextmanager
def seeded(seed=0):
    """Random numbers from `seed` inside, and as if none had been drawn afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def draw(model, seed=1):
    """Draws weights large enough for every output to depend on every input; norms and scalars stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                std = 0.5 if isinstance(module, torch.nn.Embedding) else 1.5 / math.sqrt(parameter[0].numel())
            elif name.endswith("bias") and name != "logit_bias" and "Norm" not in type(module).__name__:
                std = 0.2
            else:
                continue
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


# -- open_clip ----------------------------------------------------------------------------------------------------


def _register(name, like, **fixed):
    """Registers the timm model `like` at the size of the tiny towers as `name`."""
    fixed |= {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}

    def build(**options):
        options = {key: value for key, value in options.items() if not key.startswith(("pretrained", "cache_dir"))}
        return timm.create_model(like, **options, **fixed)
    build.__name__ = name
    if not timm.is_model(name):
        register_model(build)


_register("vit_tiny_test_siglip", "vit_base_patch16_siglip_224")
_register("vit_tiny_test_token", "vit_base_patch16_clip_224")
_register("eva02_tiny_test_clip", "eva02_base_patch16_clip_224", ref_feat_shape=(4, 4))
_register("eva_tiny_test_giant", "eva_giant_patch14_224")
TEXT = {"context_length": 16, "vocab_size": 1166, "hf_tokenizer_name": "local", "width": 24, "heads": 2, "layers": 2}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}


def _open_clip(folder, vision, text=TEXT, tokens=None, **config):
    """Writes an open_clip folder, which has the embedded CLIP's tokenizer unless `tokens` is another."""
    from open_clip.coca_model import CoCa
    from open_clip.model import CustomTextCLIP

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokens:
        tokens.save_pretrained(folder)
    else:
        embedded = resources.files("vl_mtl_lora") / "embedded" / "micro_clip"
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(str(embedded / name), folder / name)
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, **config}
    content = {"model_cfg": {**config, "custom_text": True}, "preprocess_cfg": {"resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    with seeded():
        model = (CoCa if "multimodal_cfg" in config else CustomTextCLIP)(**config)
    save_model(draw(model), str(folder / "open_clip_model.safetensors"))
    return str(folder)


def _timm(name, pool="token", proj=None):
    return {"image_size": 32, "timm_model_name": name, "timm_pool": pool, "timm_proj": proj}


def oc_siglip(folder):
    """SigLIP: a timm tower pooled by attention, a text that is not causal and pools at its last token, a bias."""
    tokens = tokenizer(end="<eos>", length=16)
    text = {**TEXT, "vocab_size": len(tokens), "width": 32, "no_causal_mask": True, "pool_type": "last",
            "proj_bias": True, "tokenizer_kwargs": {"clean": "canonicalize"}, "norm_kwargs": {"eps": 1e-6}}
    return _open_clip(folder, _timm("vit_tiny_test_siglip", "map", "none"), text, tokens, embed_dim=32,
                      init_logit_bias=-10, init_logit_scale=math.log(10))


def oc_timm_vit(folder):
    """A timm ViT with a class token and fused qkv before a linear projection, and the plain causal text."""
    return _open_clip(folder, _timm("vit_tiny_test_token", proj="linear"))


def oc_eva02(folder):
    """EVA02-CLIP: a timm tower with separate q, k, v and rotary positions, whose own head projects."""
    return _open_clip(folder, _timm("eva02_tiny_test_clip"))


def oc_eva_dead(folder):
    """EVA01-CLIP: a timm tower that takes the weight of its qkv layers but never calls them."""
    return _open_clip(folder, _timm("eva_tiny_test_giant"))


def oc_coca(folder, pool=True, width=48):
    """CoCa with one pooler, as in coca_ViT-B-32."""
    text = {**TEXT, "context_length": 15, "width": 32}
    vision = {**VIT, "width": width, "attentional_pool": pool, "attn_pooler_heads": 2, "attn_pooler_queries": 6}
    return _open_clip(folder, {**vision, "output_tokens": True}, {**text, "embed_cls": True, "output_tokens": True},
                      embed_dim=32, multimodal_cfg={**text, "attn_pooler_heads": 2})


def oc_coca_parallel(folder):
    """CoCa with two poolers, which open_clip can run only where image width and joint width agree."""
    return oc_coca(folder, "parallel", 32)


def oc_hf_text(folder):
    """open_clip's ViT beside a text tower of transformers: a BERT, averaged and projected by a linear layer."""
    bert = Path(folder) / "bert"
    with seeded():
        config = hf.BertConfig(**SIZE, vocab_size=1166, max_position_embeddings=16, pad_token_id=0)
        hf.BertModel(config, add_pooling_layer=False).save_pretrained(bert)
    text = {"hf_model_name": str(bert), "hf_model_pretrained": False, "hf_tokenizer_name": "local",
            "hf_proj_type": "linear", "hf_pooler_type": "mean_pooler", "context_length": 16}
    return _open_clip(folder, VIT, text)


# -- transformers -------------------------------------------------------------------------------------------------

VISION = {**SIZE, "image_size": 16, "patch_size": 4}
SQUARE = {"height": 16, "width": 16}
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def _save(folder, config, processor, auto=None, **scalars):
    """Writes a transformers folder; `auto` defaults to the class of models that write about images."""
    with seeded():
        model = draw((auto or hf.AutoModelForImageTextToText).from_config(config))
    for name, value in scalars.items():
        getattr(model, name).data.fill_(value)
    if model.can_generate():
        model.generation_config = hf.GenerationConfig(**_ids(processor.tokenizer))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def _ids(tokens):
    return {name: getattr(tokens, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _text(tokens):
    return {**SIZE, **_ids(tokens), "vocab_size": len(tokens), "max_position_embeddings": 16}


def _decoder(tokens, kind, **options):
    return {**_text(tokens), "model_type": kind, "num_key_value_heads": 1, "max_position_embeddings": 512, **options}


def hf_clip(folder):
    """CLIP: pictures of 16 px in patches of 4 px."""
    tokens = tokenizer(start="<bos>", end="<eos>", length=16)
    config = hf.CLIPConfig(text_config=_text(tokens), vision_config={**VISION, "hidden_size": 48}, projection_dim=24)
    images = hf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SQUARE)
    return _save(folder, config, hf.CLIPProcessor(images, tokens), hf.AutoModel)


def hf_siglip(folder):
    """SigLIP: like `hf_clip`; its texts need padding to 16 tokens and have no attention mask."""
    tokens = tokenizer(end="<eos>", length=16, model_input_names=["input_ids"])
    config = hf.SiglipConfig(text_config=_text(tokens), vision_config=VISION)
    return _save(folder, config, hf.SiglipProcessor(hf.SiglipImageProcessor(size=SQUARE), tokens), hf.AutoModel,
                 logit_scale=math.log(10), logit_bias=-10)


def hf_siglip2(folder):
    """SigLIP 2 for any aspect ratio: up to 16 patches of 16 px; the processor as a whole makes 256 unless told."""
    tokens = siglip2_tokenizer(16)
    config = hf.Siglip2Config(text_config=_text(tokens), vision_config={**SIZE, "num_patches": 16, "patch_size": 16})
    images = hf.Siglip2ImageProcessor(patch_size=16, max_num_patches=16)
    return _save(folder, config, hf.Siglip2Processor(images, tokens), hf.AutoModel,
                 logit_scale=math.log(10), logit_bias=-10)


def _llava(folder, config, images, processor, **grid):
    tokens = tokenizer(["<image>"], start="<bos>", padding_side="left")
    config = config(text_config=_decoder(tokens, "llama"), image_token_index=tokens.convert_tokens_to_ids("<image>"),
                    vision_config={**VISION, "model_type": "clip_vision_model", "num_hidden_layers": 3},
                    vision_feature_layer=-2, image_seq_length=16, **grid)
    images = images(size={"shortest_edge": 16}, crop_size=SQUARE, **grid)
    return _save(folder, config, processor(images, tokens, patch_size=4, vision_feature_select_strategy="default",
                                           num_additional_image_tokens=1, chat_template=LLAVA_TEMPLATE))


def hf_llava(folder):
    """LLaVA 1.5: 16 tokens per image."""
    return _llava(folder, hf.LlavaConfig, hf.CLIPImageProcessor, hf.LlavaProcessor)


def hf_llava_next(folder):
    """LLaVA-NeXT: an image becomes up to four crops and one view of the whole."""
    return _llava(folder, hf.LlavaNextConfig, hf.LlavaNextImageProcessor, hf.LlavaNextProcessor,
                  image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]])


def _qwen(folder, config, videos, processor, vision, decoder, **options):
    kinds = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    special = ["<|im_start|>", "<|im_end|>", *(f"<|{kind}|>" for kind in kinds.values())]
    tokens = tokenizer(special, bos_token=None, eos_token="<|im_end|>")
    options |= {f"{name}_token_id": tokens.convert_tokens_to_ids(f"<|{kind}|>") for name, kind in kinds.items()}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
              "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, **vision}
    pixels = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2,
              "size": {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}}
    template = CHATML_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = processor(hf.Qwen2VLImageProcessor(**pixels), tokens, videos(**pixels), chat_template=template)
    return _save(folder, config(text_config=_decoder(tokens, **decoder), vision_config=vision, **options), processor)


def hf_qwen2_5_vl(folder):
    """Qwen2.5-VL: up to 16 tokens per image, windows of 2x2 tokens in the first block of the image tower."""
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    return _qwen(folder, hf.Qwen2_5_VLConfig, hf.Qwen2VLVideoProcessor, hf.Qwen2_5_VLProcessor,
                 {"window_size": 16, "fullatt_block_indexes": [1]}, {"kind": "qwen2_5_vl_text", "rope_scaling": rope})


def hf_qwen3_vl(folder):
    """Qwen3-VL: up to 16 tokens per image, which also enter after the decoder's first block; tied embeddings."""
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    return _qwen(folder, hf.Qwen3VLConfig, hf.Qwen3VLVideoProcessor, hf.Qwen3VLProcessor,
                 {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
                 {"kind": "qwen3_vl_text", "rope_scaling": rope, "head_dim": 16}, tie_word_embeddings=True)


def hf_smolvlm(folder):
    """SmolVLM: an image becomes up to four crops and one view of the whole, of 4 tokens each. Needs `num2words`."""
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

    tokens = tokenizer(["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>", "<image>",
                        "<video>", *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))],
                       bos_token="<|im_start|>", eos_token="<end_of_utterance>", padding_side="left")
    config = hf.SmolVLMConfig(text_config=_decoder(tokens, "llama"), vision_config=VISION, scale_factor=2,
                              image_token_id=tokens.convert_tokens_to_ids("<image>"), pad_token_id=0)
    pixels = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    return _save(folder, config, hf.SmolVLMProcessor(
        hf.SmolVLMImageProcessor(**pixels), tokens, hf.SmolVLMVideoProcessor(**pixels), image_seq_len=4,
        chat_template=DEFAULT_CHAT_TEMPLATE))


def hf_internvl(folder):
    """InternVL: an image becomes up to four crops and one view of the whole, of 4 tokens each."""
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
             "video_token": "<video>"}
    tokens = tokenizer(["<|im_start|>", "<|im_end|>", *named.values()], bos_token=None, eos_token="<|im_end|>",
                       padding_side="left", extra_special_tokens=named)
    config = hf.InternVLConfig(text_config=_decoder(tokens, "qwen2"), image_seq_length=4, tie_word_embeddings=False,
                               vision_config={**VISION, "layer_scale_init_value": 1.0},
                               image_token_id=tokens.convert_tokens_to_ids("<IMG_CONTEXT>"))
    images = hf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4)
    return _save(folder, config, hf.InternVLProcessor(
        images, tokens, hf.InternVLVideoProcessor(size=SQUARE), image_seq_length=4,
        chat_template=CHATML_TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>\n")))


def hf_llava_onevision(folder):
    """LLaVA-OneVision: crops where a text shows one image, and the SigLIP tower's last states."""
    tokens = tokenizer(["<|im_start|>", "<|im_end|>", "<image>", "<video>"], bos_token=None, eos_token="<|im_end|>",
                       padding_side="left")
    grid = {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32], [16, 16]]}
    images, videos = (tokens.convert_tokens_to_ids(token) for token in ("<image>", "<video>"))
    config = hf.LlavaOnevisionConfig(
        text_config=_decoder(tokens, "qwen2"), image_token_id=images, image_token_index=images, video_token_id=videos,
        video_token_index=videos, vision_feature_layer=-1, vision_feature_select_strategy="full",
        tie_word_embeddings=False, **grid,
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False})
    return _save(folder, config, hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=SQUARE, **grid), tokens, hf.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=16, vision_feature_select_strategy="full",
        chat_template=CHATML_TEMPLATE.replace("IMAGE", "<image>\n")))


def hf_gemma3(folder):
    """Gemma 3: a begin token stands for an image, whose 4 tokens see each other; sliding and full attention."""
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokens = tokenizer(["<start_of_turn>", "<end_of_turn>", *named.values()], start="<bos>", padding_side="left",
                       extra_special_tokens=named)
    text = _decoder(tokens, "gemma3_text", head_dim=16, sliding_window=8, query_pre_attn_scalar=16,
                    layer_types=["sliding_attention", "full_attention"])
    config = hf.Gemma3Config(
        text_config=text, mm_tokens_per_image=4, boi_token_index=tokens.boi_token_id,
        eoi_token_index=tokens.eoi_token_id, image_token_index=tokens.image_token_id,
        image_token_id=tokens.image_token_id,
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False})
    template = CHATML_TEMPLATE.replace("<|im_start|>", "<start_of_turn>").replace("<|im_end|>", "<end_of_turn>")
    return _save(folder, config, hf.Gemma3Processor(
        hf.Gemma3ImageProcessor(size=SQUARE, image_seq_length=4), tokens, image_seq_length=4,
        chat_template="{{ bos_token }}" + template.replace("IMAGE", "<start_of_image>")))


def hf_paligemma(folder):
    """PaliGemma, which reads a whole prompt in both directions."""
    tokens = tokenizer(["<image>"], start="<bos>", extra_special_tokens={"image_token": "<image>"})
    config = hf.PaliGemmaConfig(
        text_config=_decoder(tokens, "gemma", head_dim=16), image_token_index=tokens.image_token_id,
        image_token_id=tokens.image_token_id, projection_dim=32,
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False})
    images = hf.SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = 16
    return _save(folder, config, hf.PaliGemmaProcessor(images, tokens))
