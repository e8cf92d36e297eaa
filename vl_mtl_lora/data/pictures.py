"""Any picture that occurs in real data -> an upright RGB image: modes and orientation are handled here alone."""

import io

from PIL import Image, ImageOps

from vl_mtl_lora.errors import BadSample


def decode_image(data: bytes) -> Image.Image:
    """Bytes of an image file -> upright RGB image. Raises BadSample where they cannot be decoded."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return to_rgb(image)
    except Exception as error:  # Pillow raises many types on broken files
        raise BadSample(f"image cannot be decoded: {type(error).__name__}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode -> upright RGB: EXIF rotation done, transparency on white, 16 bits scaled to 8.

    Palette and CMYK are converted as Pillow does it; of an animation the current frame is taken.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        # Transparent pixels hold arbitrary colours: show them on white, as a viewer would.
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode.startswith("I;16"):  # convert() would cut 16 bits off at 255 instead of scaling them
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    return image.convert("RGB")
