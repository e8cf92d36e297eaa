"""A picture of samples with their texts, to look at what is in shards."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from vl_mtl_lora.data.pictures import decode_image
from vl_mtl_lora.data.schema import Sample, in_words
from vl_mtl_lora.errors import BadSample

_WIDTH, _PICTURE, _GAP = 240, 220, 12  # pixels
_COLUMNS, _LINES, _LINE = 5, 5, 15
_CHARACTERS = 38  # of a line


def contact_sheet(samples: Sequence[Sample]) -> Image.Image:
    """Samples in rows of five: the pictures, side by side where there are several, and under them tag, question and
    what is right."""
    rows = -(-len(samples) // _COLUMNS)
    height = _PICTURE + _LINES * _LINE + 2 * _GAP
    sheet = Image.new("RGB", (_COLUMNS * (_WIDTH + _GAP) + _GAP, rows * height + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, sample in enumerate(samples):
        left, top = _GAP + number % _COLUMNS * (_WIDTH + _GAP), _GAP + number // _COLUMNS * height
        draw.rectangle((left - 1, top - 1, left + _WIDTH, top + height - _GAP), outline="lightgray")
        share = _WIDTH // max(len(sample.images), 1)
        for i, data in enumerate(sample.images):
            _paste(sheet, draw, data, (left + i * share, top, share, _PICTURE))
        asked, right = in_words(sample.fields)
        texts = [(f"{sample.task}  {sample.key}", "gray"), (asked, "black"), (f"-> {right}" if right else "", "green")]
        lines = [(line, colour) for text, colour in texts for line in textwrap.wrap(text, _CHARACTERS, max_lines=2)]
        start = top + (_PICTURE if sample.images else 0)
        for i, (line, colour) in enumerate(lines[:_LINES]):
            draw.text((left + 4, start + 4 + i * _LINE), line, fill=colour, font=font)
    return sheet


def _paste(sheet: Image.Image, draw: ImageDraw.ImageDraw, data: bytes, box: tuple[int, int, int, int]) -> None:
    left, top, width, height = box
    try:
        picture = decode_image(data, 2 * max(width, height))
    except BadSample as problem:
        draw.text((left + 4, top + 4), "\n".join(textwrap.wrap(str(problem), _CHARACTERS)), fill="red")
        return
    picture = ImageOps.contain(picture, (width - 2, height - 2))
    sheet.paste(picture, (left + (width - picture.width) // 2, top + (height - picture.height) // 2))
