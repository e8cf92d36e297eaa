"""open_clip's models by name, tag, checkpoint file or local folder."""

import logging
from importlib import resources
from pathlib import Path

import torch

from vl_mtl_lora.backbones.base import Backbone, Size
from vl_mtl_lora.backbones.open_clip_coca import OpenClipCoCa
from vl_mtl_lora.backbones.open_clip_dual import OpenClipDual
from vl_mtl_lora.backbones.open_clip_text import StandInTokenizer
from vl_mtl_lora.errors import UserError

EMBEDDED = "micro-clip"  # the base that ships with the package
_PRECISION = {"float32": "fp32", "bfloat16": "pure_bf16"}  # our names -> open_clip's
_EMBEDDED_PREFIX_GRID = 3


def load(name: str, pretrained: str | None = None, *, prefix_grid: Size | None = None, image_size: Size | None = None,
         dtype: str = "float32", random_weights: bool = False, dry_run: str | None = None) -> Backbone:
    """Builds a CLIP, SigLIP or CoCa of open_clip.

    Args:
        name: an open_clip model name ("ViT-B-32"), "local-dir:PATH", "hf-hub:ORG/NAME", or "micro-clip", the
            embedded base.
        pretrained: the path of a checkpoint file, for a plain name also an open_clip tag. Without it a plain name
            starts from random weights, as in open_clip, the others from their own.
        prefix_grid: the image enters a CLIP's decoder as 1 + prefix_grid**2 tokens at most; a CoCa has its own.
        image_size: another input size in pixels; positional embeddings are interpolated.
        dtype: of the frozen weights, "float32" or "bfloat16".
        random_weights: load no weights, whatever the name.
        dry_run: see `load_backbone`.

    Raises:
        UserError: unknown name or tag, missing or unfit checkpoint, or a model that is not supported.
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
    if not plain and pretrained and not Path(pretrained).is_file():
        raise UserError(f"backbone.pretrained: there is no file {pretrained!r}; {name} has weights of its own")
    options = {} if image_size is None else {"force_image_size": image_size}
    if plain and pretrained:
        options |= _activation(name, pretrained)
    random_weights = random_weights or plain and pretrained is None or dry_run is not None
    if plain and dry_run == "narrow":
        options |= narrow(open_clip.get_model_config(name))
    if dtype not in _PRECISION:
        raise UserError(f"backbone.options.dtype: got {dtype!r}", near=(str(dtype), _PRECISION))
    options["precision"] = _PRECISION[dtype]
    # open_clip logs "no pretrained weights" as a warning where that is asked for.
    level = logging.ERROR if random_weights else logging.WARNING
    root, before = logging.getLogger(), logging.getLogger().level
    root.setLevel(level)
    try:
        if not plain:
            _no_code(open_clip.get_model_config(name))
        with torch.device("meta" if dry_run == "shapes" else "cpu"):
            model = open_clip.create_model(name, pretrained=pretrained if plain else None,
                                           load_weights=not random_weights, pretrained_hf=not random_weights,
                                           device="meta" if dry_run == "shapes" else "cpu", **options)
        if not plain and pretrained and not random_weights:  # open_clip would pass it over
            open_clip.load_checkpoint(model, pretrained)
        tokenizer = _tokenizer(name, model) if dry_run and plain else open_clip.get_tokenizer(name)
    except UserError:
        raise
    except Exception as error:  # open_clip raises many types for unfit or unreachable weights
        raise UserError(f"backbone: open_clip could not load {name!r} with pretrained={pretrained!r}: "
                        f"{type(error).__name__}: {error}") from error
    finally:
        root.setLevel(before)
    if isinstance(model, open_clip.CoCa):
        if random_weights:  # open_clip leaves this one as the memory happens to be
            torch.nn.init.normal_(model.text_decoder.text_projection, std=model.text_decoder.width ** -0.5)
        backbone = OpenClipCoCa(model, tokenizer)
    else:
        backbone = OpenClipDual(model, tokenizer, prefix_grid)
    backbone.random_weights = random_weights
    backbone.model_config = _model_config(name, options)
    return backbone


def _model_config(name: str, options: dict) -> dict:
    """What open_clip_config.json says of a model that was created with these options."""
    import open_clip

    config = open_clip.get_model_config(name)
    if "force_image_size" in options:
        config["vision_cfg"]["image_size"] = options["force_image_size"]
    if options.get("force_quick_gelu"):
        config["quick_gelu"] = True
    return config


def _no_code(config: dict) -> None:
    """Raises UserError for a folder's or hub's config that lets its tokenizer run code of its own; open_clip passes the
    config's options on to transformers. Weights are read without code by both (`weights_only`)."""
    if "trust_remote_code" in (config.get("text_cfg", {}).get("tokenizer_kwargs") or {}):
        raise UserError("backbone: text_cfg.tokenizer_kwargs.trust_remote_code of its open_clip_config.json would run "
                        "code that comes with the model; such models are not loaded")


def _tokenizer(name: str, model: torch.nn.Module):
    """A tokenizer for a dry run: the model's own where it ships with open_clip, else a stand-in, not one from a hub."""
    import open_clip

    if "hf_tokenizer_name" not in open_clip.get_model_config(name)["text_cfg"]:
        return open_clip.get_tokenizer(name)
    text = getattr(model, "text", model)
    return StandInTokenizer(text.context_length, text.vocab_size)


def narrow(config: dict) -> dict:
    """Parts of a model's config that make it compute with two heads in each layer; depth and picture size stay.

    A timm tower has the width that its name says, and with it the joint space.
    """
    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    if "hf_model_name" in text:
        return {}
    width = 2 * text["width"] // text["heads"]
    text |= {"width": width, "heads": 2}
    options = {"text_cfg": text}
    if "timm_model_name" not in vision:
        options |= {"vision_cfg": {**vision, "width": 2 * vision.get("head_width", 64)}, "embed_dim": width}
        if "multimodal_cfg" in config:
            options["multimodal_cfg"] = {**config["multimodal_cfg"], "width": width, "heads": 2}
    return options


def _activation(name: str, tag: str) -> dict:
    """open_clip only warns where weights and the named model differ in QuickGELU; this mends or refuses it."""
    import open_clip

    trained = open_clip.get_pretrained_cfg(name, tag)  # empty for a checkpoint file
    wanted, has = (trained.get("quick_gelu", False), open_clip.get_model_config(name).get("quick_gelu", False))
    if trained and has and not wanted:
        raise UserError(f"backbone: {tag!r} was trained with GELU, {name} has QuickGELU; "
                        f"take {name.removesuffix('-quickgelu')}")
    return {"force_quick_gelu": True} if wanted else {}
