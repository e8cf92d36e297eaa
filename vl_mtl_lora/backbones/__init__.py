"""Vision-language models behind one contract: `load_backbone` and the dict of libraries it knows."""

import inspect
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from vl_mtl_lora.backbones.base import Backbone
from vl_mtl_lora.backbones.hf import load as load_transformers
from vl_mtl_lora.backbones.open_clip import load as load_open_clip
from vl_mtl_lora.errors import UserError

# "hf" is what many call the library.
LOADERS = {"open_clip": load_open_clip, "transformers": load_transformers, "hf": load_transformers}


def load_backbone(library: str, name: str, pretrained: str | None = None, *,
                  dry_run: Literal["shapes", "narrow", "random"] | None = None, **options) -> Backbone:
    """Loads a frozen vision-language model; `options` are those of the library's own loader.

    dry_run: looks for no weights. "shapes": the real sizes on the meta device, which holds no values. "narrow": values
        to compute with, each layer in its place, but narrow where the real model would not fit a small machine.
        "random": the real sizes, with random values.

    Raises:
        UserError: an unknown library, name, weight or option.
    """
    if library not in LOADERS:
        raise UserError(f"backbone.library: unknown library {library!r}", near=(library, LOADERS))
    load = LOADERS[library]
    valid = [name for name in inspect.signature(load).parameters if name not in ("name", "pretrained", "dry_run")]
    for option, value in options.items():
        if option not in valid:
            raise UserError(f"backbone.options: {library} knows no option {option!r}", near=(option, valid))
        kind = inspect.signature(load).parameters[option].annotation
        try:
            TypeAdapter(Any if kind is inspect.Parameter.empty else kind).validate_python(value, strict=True)
        except ValidationError as error:
            raise UserError(f"backbone.options.{option}: got {repr(value)[:60]}; expected: "
                            f"{error.errors()[0]['msg']}") from error
    return load(name, pretrained, dry_run=dry_run, **options).eval()
