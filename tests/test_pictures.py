"""Any picture comes out upright and RGB, or is refused."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from tests.shard_files import encode
from vl_mtl_lora.data.pictures import decode_image, output_side, to_rgb
from vl_mtl_lora.errors import BadSample


def test_unusual_images_come_out_upright_and_rgb():
    rotated = Image.new("RGB", (8, 4), "red")
    exif = rotated.getexif()
    exif[0x0112] = 6
    assert decode_image(encode(rotated, "JPEG", exif=exif)).size == (4, 8)
    assert decode_image(encode(Image.new("CMYK", (4, 4)), "JPEG")).mode == "RGB"
    assert decode_image(encode(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("RGB", (4, 4), "blue").convert("P")
    assert decode_image(encode(palette, "PNG")).getpixel((0, 0)) == (0, 0, 255)
    deep = Image.new("I;16", (4, 4), 0x8080)
    assert decode_image(encode(deep, "PNG")).getpixel((0, 0)) == (128, 128, 128)
    wide = Image.new("I", (4, 4), 128 * 257)
    assert to_rgb(wide).getpixel((0, 0)) == (128, 128, 128)
    plain = Image.new("RGB", (4, 4))
    assert to_rgb(plain) is plain
    with pytest.raises(ValueError, match="floating point"):
        to_rgb(Image.new("F", (4, 4)))
    with pytest.raises(BadSample, match="cannot be decoded"):
        decode_image(encode(Image.effect_noise((64, 64), 50), "JPEG")[:200])


def test_large_jpegs_are_decoded_smaller_where_nothing_is_lost_by_it():
    photo = Image.radial_gradient("L").resize((800, 600)).convert("RGB")
    photo.paste((200, 30, 60), (100, 200, 340, 420))
    data = encode(photo, "JPEG", quality=95)
    assert decode_image(data).size == decode_image(data, 301).size == (800, 600)
    half = decode_image(data, 300)
    assert half.size == (400, 300)
    exact, near = (np.asarray(image.resize((150, 150), Image.Resampling.BICUBIC)).astype(int)
                   for image in (decode_image(data), half))
    assert abs(exact - near).mean() < 1 and abs(exact - near).max() < 24  # of 255, at the edge of the square
    assert decode_image(data, 75).size == (100, 75)
    assert decode_image(encode(photo, "PNG"), 75).size == (800, 600)


def test_the_size_that_comes_out_is_found_without_touching_the_generator(tiny_backbone):
    transform, state = tiny_backbone().preprocess(True), torch.get_rng_state()
    assert output_side(transform) == 32
    assert output_side(lambda image: torch.zeros(3, *image.size)) is None
    assert output_side(lambda image: [image]) is None
    assert torch.equal(torch.get_rng_state(), state)




def png_of(width, height, data):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_before_it_goes_off():
    assert decode_image(png_of(2, 1, b"\0" + bytes([1, 2, 3, 4, 5, 6]))).getpixel((1, 0)) == (4, 5, 6)
    tracemalloc.start()
    try:
        with pytest.raises(BadSample, match="cannot be decoded: DecompressionBombError"):
            decode_image(png_of(60_000, 60_000, bytes(100_000)))
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_picture_is_taken(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    image = decode_image(data)
    assert image.mode == "RGB" and image.getpixel((4, 4)) == (255, 0, 0)


def test_truncated_and_empty_files_are_refused():
    photo = Image.effect_noise((64, 64), 50).convert("RGB")
    for format in ("JPEG", "PNG", "WEBP"):
        data = encode(photo, format)
        for cut in (0, 1, 10, len(data) // 2):
            with pytest.raises(BadSample, match="cannot be decoded"):
                decode_image(data[:cut])


def test_formats_for_which_pillow_starts_a_program_are_never_opened():
    with pytest.raises(BadSample, match="cannot be decoded: UnidentifiedImageError"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
