"""Any picture that occurs in real data -> an upright RGB image, and what a transform makes of it: modes and orientation
are handled here alone."""

import io
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageOps
from torchvision import transforms

from vl_mtl_lora.errors import BadSample

_ORIENTATION = 0x0112  # the EXIF tag
Image.init()
# What pictures of data sets come in. Others are never opened: for some of them Pillow starts another program.
_FORMATS = [name for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO")
            if name in Image.OPEN]


def decode_image(data: bytes, side: int | None = None) -> Image.Image:
    """Bytes of an image file -> upright RGB image. Raises BadSample where they cannot be decoded.

    side: a JPEG that keeps so many pixels on both sides at a half, a quarter or an eighth of its size is decoded at
        that size, which takes a fraction of the time; None: as it is.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if side is not None:
            image.draft(None, (side, side))
        image.load()
        return to_rgb(image)
    except Exception as error:  # Pillow raises many types on broken files
        raise BadSample(f"image cannot be decoded: {type(error).__name__}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode -> upright RGB: EXIF rotation done, transparency on white, 16 bits scaled to 8.

    Palette and CMYK are converted as Pillow does it; of an animation the current frame is taken.

    Raises:
        ValueError: pixels in floating point, whose range nobody knows.
    """
    if image.mode == "F":
        raise ValueError("pixels in floating point have no known range")
    if image.mode == "RGB" and "transparency" not in image.info and image.getexif().get(_ORIENTATION, 1) == 1:
        return image
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        # Transparent pixels hold arbitrary colours: show them on white, as a viewer would.
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode.startswith("I"):  # 16 bits of grey, in some versions of Pillow as 32; convert() would cut them off
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    return image.convert("RGB")


def output_side(transform: Callable[[Image.Image], Any]) -> int | None:
    """Pixels of the longer side of what `transform` makes of a picture; None where that depends on the picture."""
    with torch.random.fork_rng(devices=[]):  # augmentation draws from it
        outputs = [transform(Image.new("RGB", size)) for size in ((640, 480), (200, 300))]
    fixed = all(isinstance(out, torch.Tensor) and out.shape == outputs[0].shape for out in outputs)
    return max(outputs[0].shape[-2:]) if fixed else None


def scaling(transform: Any) -> torch.Tensor | None:
    """(2, 3): mean and deviation of a transform that ends with ToTensor and Normalize, None of another one."""
    *_, to_tensor, normalize = [None, None, *getattr(transform, "transforms", ())]
    if isinstance(to_tensor, transforms.ToTensor) and isinstance(normalize, transforms.Normalize):
        return torch.stack([torch.as_tensor(normalize.mean), torch.as_tensor(normalize.std)])
    return None


class Preprocess:
    """A picture made upright and RGB, then transformed; a class, since loader processes need it pickled."""

    def __init__(self, transform: Callable[[Image.Image], Any]):
        self.transform = transform

    def __call__(self, image: Image.Image) -> Any:
        return self.transform(to_rgb(image))
