"""Vision-language models behind one contract: `load_backbone` and the dict of libraries it knows."""

import inspect

from vl_mtl_lora.backbones.base import Backbone
from vl_mtl_lora.backbones.open_clip import load as load_open_clip
from vl_mtl_lora.errors import UserError

LOADERS = {"open_clip": load_open_clip}


def load_backbone(library: str, name: str, pretrained: str | None = None, **options) -> Backbone:
    """Loads a frozen vision-language model; `options` are those of the library's own loader.

    Raises:
        UserError: an unknown library, name, weight or option.
    """
    if library not in LOADERS:
        raise UserError(f"backbone.library: unknown library {library!r}", near=(library, LOADERS))
    valid = list(inspect.signature(LOADERS[library]).parameters)[2:]
    for option in options:
        if option not in valid:
            raise UserError(f"backbone.options: {library} knows no option {option!r}", near=(option, valid))
    return LOADERS[library](name, pretrained, **options).eval()
