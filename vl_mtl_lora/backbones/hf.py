"""transformers' models by local folder or hub name: CLIP, SigLIP, SigLIP 2, and chat models that see pictures."""

import copy
from importlib import resources
from pathlib import Path

import torch

from vl_mtl_lora.backbones.base import Backbone, Size
from vl_mtl_lora.backbones.hf_chat import HFChat
from vl_mtl_lora.backbones.hf_dual import HFDual
from vl_mtl_lora.errors import UserError

DUAL = ("clip", "siglip", "siglip2")  # model types with two encoders
DTYPES = ("float32", "bfloat16")
# Quantised is the language model alone: its output layer and what sees pictures stay as they are.
_KEPT = ["lm_head", ".*vision.*", ".*visual.*", ".*project.*", ".*connector.*"]


def load(name: str, pretrained: str | None = None, *, dtype: str = "float32", quantize: str | None = None,
         prefix_grid: Size | None = None, max_length: int = 2048, random_weights: bool = False,
         dry_run: str | None = None) -> Backbone:
    """Builds a model of transformers with its processor.

    Args:
        name: a folder written by `save_pretrained`, or a name on the hub.
        pretrained: not used here; the weights come with the name.
        dtype: of the frozen weights, "float32" or "bfloat16".
        quantize: the language model's layers of a chat model as "4bit" (NF4, by bitsandbytes) or "8bit" (by torchao);
            adapters stay in float32.
        prefix_grid: the image enters the decoder of a CLIP or SigLIP as 1 + prefix_grid**2 tokens.
        max_length: the most tokens of a text, where a picture counts as one; for chat models.
        random_weights: load no weights.
        dry_run: see `load_backbone`. The architectures in embedded/architectures need no folder and no hub then.

    Raises:
        UserError: a model that cannot be found, read or supported; a missing package for `quantize`.
    """
    import transformers

    if pretrained is not None:
        raise UserError(f"backbone.pretrained: weights of transformers come with backbone.name; got {pretrained!r}")
    for option, value, valid in (("dtype", dtype, DTYPES), ("quantize", quantize, (None, "4bit", "8bit"))):
        if value not in valid:
            raise UserError(f"backbone.options.{option}: got {value!r}", near=(str(value), [str(v) for v in valid]))
    source = name
    if dry_run and not Path(name).is_dir():
        embedded = Path(str(resources.files("vl_mtl_lora") / "embedded" / "architectures" / name))
        source = str(embedded) if embedded.is_dir() else name
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        processor = transformers.AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for what it cannot find or read
        raise UserError(f"backbone: transformers could not load {name!r}, expected a folder written by save_pretrained "
                        f"or a name on the hub: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    quantization = None if quantize is None else _quantization(quantize)  # a missing package shows in a dry run too
    if config.model_type in DUAL:
        if quantize is not None:
            raise UserError(f"backbone.options.quantize: only chat models are quantised, got a {config.model_type}")
        auto = transformers.AutoModel
    elif type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        auto = transformers.AutoModelForImageTextToText
    else:
        raise UserError(f"backbone: {name!r} is of type {config.model_type}; supported are {', '.join(DUAL)} and the "
                        "types of AutoModelForImageTextToText")
    if dry_run == "narrow":
        config, dtype = narrow(config), "float32"  # processors without half-precision arithmetic take a minute
    if dry_run or random_weights:
        with torch.device("meta" if dry_run == "shapes" else "cpu"):
            model = auto.from_config(config, dtype=getattr(torch, dtype))
        for parameter in model.parameters():  # some projections start at zero, and let no gradient through
            if parameter.dim() > 1 and not parameter.is_meta and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    else:
        options = {} if quantization is None else {"quantization_config": quantization}
        try:
            model = auto.from_pretrained(source, dtype=getattr(torch, dtype), trust_remote_code=False, **options)
        except Exception as error:
            raise UserError(f"backbone: transformers could not load the weights of {name!r}: {type(error).__name__}: "
                            f"{str(error).splitlines()[0]}") from error
        for layer in model.modules():
            # bitsandbytes would repack such a layer on first use, and its gradient would be gone.
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False
    if config.model_type in DUAL:
        backbone = HFDual(model, processor, prefix_grid)
    else:
        backbone = HFChat(model, processor, max_length)
        backbone.will_quantize = quantize if dry_run else None
    backbone.random_weights = bool(random_weights or dry_run)
    return backbone


def _quantization(kind: str):
    """The library's description of a quantised base. Raises UserError where the package for it is missing."""
    import transformers

    try:
        if kind == "4bit":
            import bitsandbytes  # noqa: F401

            return transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
                llm_int8_skip_modules=_KEPT)
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=_KEPT)
    except ImportError as error:
        raise UserError(f"backbone.options.quantize={kind} needs a package that is missing ({error.name}): "
                        "pip install 'vl_mtl_lora[quantize]'") from error


def narrow(config):
    """A config with the same layers, each of one head: what a dry run computes with in place of billions of weights.

    Vocabulary, patch and picture sizes stay, and so does every layer's name.
    """
    config = copy.deepcopy(config)
    parts = [config.text_config, config.vision_config]
    for part in parts:
        heads = "num_attention_heads" if hasattr(part, "num_attention_heads") else "num_heads"
        hidden = "embed_dim" if hasattr(part, "embed_dim") else "hidden_size"
        head_dim = getattr(part, "head_dim", None) or getattr(part, hidden) // getattr(part, heads)
        setattr(part, heads, 1)
        setattr(part, hidden, head_dim)
        for name in ("intermediate_size", "projection_dim", "projection_size"):
            if hasattr(part, name):
                setattr(part, name, 2 * head_dim)
        if hasattr(part, "num_key_value_heads"):
            part.num_key_value_heads = 1
    if hasattr(config.vision_config, "out_hidden_size"):
        config.vision_config.out_hidden_size = config.text_config.hidden_size
    if hasattr(config.text_config, "projection_size"):  # SigLIP's texts end in the width of its pictures
        config.text_config.projection_size = config.vision_config.hidden_size
    return config
