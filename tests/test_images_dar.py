"""How images are read: what is refused, what must not spoil an image, and that every way of reading gives the same."""

import io
import random
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import Image, TiffImagePlugin
from scripts import load_script

from dar_hf import images_dar
from dar_hf.data import ImageTransform, center_crop, convert_channels, random_crop, read_image, ten_crop, to_tensor
from dar_hf.data.batches import UNREADABLE, open_image

TURNED = 6  # EXIF: stored a quarter turn to the left
ORIENTATION = struct.pack("<HHIHH", 0x112, 3, 1, TURNED, 0)


def noise_image(width=12, height=8, channels=3, seed=0):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def content(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def exif_block(*entries):
    """An EXIF block of raw directory entries."""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


def png(width, height, depth, color, data, **chunks):
    """A PNG written by hand, for what pillow does not write."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))]
    parts += [chunk(name.encode(), body) for name, body in chunks.items()]
    parts += [chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# Damaged EXIF blocks

DAMAGED = {
    "header": b"Exif\0\0\x00\x08\x00\x02\x01\x12\x00\x03",
    "empty": b"Exif\0\0",
    "short header": b"Exif\0\0II*\0",
    "text": b"nonsense",
    "cut off": exif_block(ORIENTATION)[:-9],
    "offset beyond the end": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "too many entries": b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
    "orientation 0": exif_block(struct.pack("<HHIHH", 0x112, 3, 1, 0, 0)),
    "orientation 9": exif_block(struct.pack("<HHIHH", 0x112, 3, 1, 9, 0)),
    "orientation as text": exif_block(struct.pack("<HHI4s", 0x112, 2, 4, b"six\0")),
    "orientation as a fraction by zero": exif_block(struct.pack("<HHII", 0x112, 5, 1, 0)),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("block", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_exif_block_leaves_the_image_upright(block, file_format):
    image = noise_image()
    options = {"lossless": True} if file_format == "WEBP" else {}
    expected = np.asarray(Image.open(io.BytesIO(content(image, file_format, **options))))
    loaded = read_image(content(image, file_format, exif=block, **options))
    assert np.array_equal(np.asarray(convert_channels(loaded, 3)), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "other",
    [
        struct.pack("<HHI4s", 0x11A, 2, 4, b"72/1"),  # the resolution as text
        struct.pack("<HHI4s", 0x11A, 77, 4, b"    "),  # no such type
        struct.pack("<HHII", 0x8769, 4, 1, 1 << 30),  # a directory beyond the end
        struct.pack("<HHII", 0x9286, 7, 1 << 20, 8),  # longer than the file
    ],
    ids=["text", "type", "directory", "length"],
)
def test_what_is_wrong_elsewhere_in_the_block_does_not_hide_the_orientation(other, file_format):
    image = noise_image()
    loaded = read_image(content(image, file_format, exif=exif_block(ORIENTATION, other)))
    upright = convert_channels(loaded, 3)
    assert upright.size == (8, 12)
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(loaded), -1))
    assert np.array_equal(np.asarray(convert_channels(upright, 3)), np.asarray(upright))  # not turned again


def test_an_orientation_in_xmp_is_applied_once():
    xmp = b'<x xmlns:tiff="t" tiff:Orientation="6"/>'
    loaded = read_image(content(noise_image(), "WEBP", xmp=xmp, lossless=True))
    upright = convert_channels(loaded, 3)
    assert upright.size == (8, 12) and convert_channels(upright, 3).size == (8, 12)


def test_a_tiff_with_its_xmp_as_text_is_read():
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[700] = "text"
    tags.tagtype[700] = 2
    data = content(noise_image(), "TIFF", tiffinfo=tags)
    with pytest.raises(TypeError):
        Image.open(io.BytesIO(data)).load()  # what pillow makes of it
    assert np.array_equal(np.asarray(read_image(data)), np.asarray(noise_image()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_large_images_are_turned_as_small_ones(orientation, monkeypatch):
    exif = Image.Exif()
    exif[0x112] = orientation
    data = content(noise_image().convert("RGBA"), exif=exif)
    whole = convert_channels(read_image(data), 3)
    monkeypatch.setattr(images_dar, "STRIP_PIXELS", 30)
    assert np.array_equal(np.asarray(convert_channels(read_image(data), 3)), np.asarray(whole))


# Ranges

GREYS = np.arange(64).reshape(8, 8)


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8),
        np.linspace(0, 255, 64, dtype=np.float32).reshape(8, 8),
        np.full((8, 8), np.nan, dtype=np.float32),
        (GREYS * 4).astype(np.int32),
        (GREYS * 1000).astype(np.int32),
        (GREYS << 20).astype(np.int32),
        (GREYS - 32).astype(np.int16),
    ],
    ids=["unit", "bytes", "nan", "int32 bytes", "int32 words", "int32", "int16"],
)
def test_images_of_unknown_range_are_unreadable(values, tmp_path):
    path = tmp_path / "a.tiff"
    Image.fromarray(values).save(path)
    for row in ({"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)}):
        with pytest.raises(ValueError, match="of 8 bits a channel"):
            open_image(row)
    with pytest.raises(ValueError, match="a.tiff"):
        read_image(path)
    with pytest.raises(UNREADABLE, match="of 8 bits a channel"):
        ImageTransform((8, 8), 1)(Image.open(path))


def test_32_bits_without_a_file_are_refused_unless_they_are_16(tmp_path):
    for values in (GREYS, GREYS << 20, GREYS - 1, np.zeros((8, 8))):
        with pytest.raises(ValueError, match="got mode 'I'"):
            convert_channels(Image.fromarray(values.astype(np.int32)), 1)
    pixels = convert_channels(Image.fromarray((GREYS * 1024).astype(np.int32)), 1)
    assert np.array_equal(np.asarray(pixels), GREYS * 4)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("factor", [1, 1024])
def test_sixteen_bit_files_are_read(file_format, factor):
    """Dark ones, too: a file says that it has 16 bits."""
    values = (GREYS * factor).astype(np.uint16)
    image = read_image(content(Image.fromarray(values), file_format))
    assert np.array_equal(np.asarray(convert_channels(image, 1)), values >> 8)


def test_twelve_bit_tiffs_are_refused():
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    image = Image.fromarray(np.zeros((4, 4), dtype=np.uint16))
    data = content(image, "TIFF", tiffinfo=tags).replace(
        struct.pack("<HHIHH", 258, 3, 1, 16, 0), struct.pack("<HHIHH", 258, 3, 1, 12, 0)
    )
    assert Image.open(io.BytesIO(data)).mode == "I;16"
    with pytest.raises(ValueError, match="of 8 bits a channel"):
        read_image(data)


def test_sixteen_bits_that_pillow_reads_wrongly_are_refused():
    values = np.full((8, 8), 1000, dtype=np.uint16)
    white_is_zero = content(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
    header = ["SIMPLE  = T", "BITPIX  = 16", "NAXIS   = 2", "NAXIS1  = 8", "NAXIS2  = 8", "END"]
    fits = "".join(line.ljust(80) for line in header).ljust(2880).encode() + values.astype(">u2").tobytes()
    for data in (white_is_zero, fits.ljust(5760, bytes(1))):
        assert Image.open(io.BytesIO(data)).mode == "I;16"
        with pytest.raises(ValueError, match="with zero as black"):
            read_image(data)


def test_a_transparent_grey_of_16_bits_becomes_white():
    data = png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 1000, 0x5678), tRNS=struct.pack(">H", 1000))
    assert np.asarray(convert_channels(read_image(data), 1)).tolist() == [[255, 0x56]]


@pytest.mark.parametrize("size", [(0, 8), (8, 0), (0, 0)])
def test_images_without_pixels_are_refused(size):
    with pytest.raises(ValueError, match="must have pixels"):
        convert_channels(Image.new("RGB", size), 3)


# Modes

MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "RGBX", "RGBa", "La", "I;16")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", [*MODES, "I;16B"])
def test_every_mode_is_converted_and_strips_change_nothing(mode, channels, monkeypatch):
    size = len(Image.new(mode, (12, 8)).tobytes())
    image = Image.frombytes(mode, (12, 8), np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8).tobytes())
    if mode in ("P", "PA"):
        image.putpalette(np.random.default_rng(1).integers(0, 256, 768, dtype=np.uint8).tobytes())
    whole = convert_channels(image, channels)
    assert whole.mode == images_dar.MODES[channels] and whole.size == (12, 8)
    assert len(np.unique(np.asarray(whole))) > 1
    monkeypatch.setattr(images_dar, "STRIP_PIXELS", 30)
    assert np.array_equal(np.asarray(convert_channels(image, channels)), np.asarray(whole))


def test_palettes_with_alpha_are_laid_on_white():
    image = Image.new("P", (2, 1))
    image.putdata([0, 1])
    image.putpalette([10, 20, 30, 255, 1, 2, 3, 0], "RGBA")
    assert np.asarray(convert_channels(image, 3)).tolist() == [[[10, 20, 30], [255] * 3]]
    data = content(noise_image(channels=1).convert("P"), transparency=bytes(256))
    assert np.asarray(convert_channels(read_image(data), 3)).min() == 255


@pytest.mark.parametrize("transparency", [(1, 2), b"abc", "x", 1.5])
def test_a_senseless_transparency_is_a_clear_error(transparency):
    image = Image.new("L", (2, 2))
    image.info["transparency"] = transparency
    with pytest.raises(ValueError, match="an image of mode 'L' cannot be converted"):
        convert_channels(image, 3)


def test_an_image_that_is_right_already_is_not_copied():
    image = noise_image()
    assert convert_channels(image, 3) is image


# Files

ANIMATION = content(noise_image(), "GIF", save_all=True, append_images=[noise_image(seed=1)])


def test_the_first_frame_of_an_animation():
    first = Image.open(io.BytesIO(ANIMATION)).convert("RGB")
    assert np.array_equal(np.asarray(convert_channels(read_image(ANIMATION), 3)), np.asarray(first))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "AVIF"])
def test_damaged_files_are_one_kind_of_error(file_format, monkeypatch):
    data, rng = content(noise_image(), file_format), random.Random(0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 20)  # damage may make an image large
    refused = 0
    for _ in range(60):
        damaged = bytearray(data[: rng.randrange(len(data))] if rng.random() < 0.5 else data)
        for _ in range(3):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            image = convert_channels(read_image(bytes(damaged), "cat.png"), 3)
        except ValueError as error:
            assert "cat.png: " in str(error) or "converted" in str(error)
            assert "\n" not in str(error) and "BytesIO" not in str(error)
            refused += 1
        else:
            assert image.mode == "RGB"
    assert refused > 20


def test_errors_name_the_file(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000, 8, 2, b""))
    for path, reason in (
        (tmp_path / "gone.png", "No such file"),
        (tmp_path / "text.png", "no image in a known format"),
        (tmp_path / "bomb.png", "decompression bomb"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(ValueError, match=f"{path.name}: .*{reason}"):
            read_image(path)


# Long thin images


def fine_image(width, height):
    return Image.effect_noise((width, height), 60).convert("RGB")


@pytest.mark.parametrize("width, height", [(300, 3), (3, 300), (64, 40), (41, 16), (500, 9)])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_a_part_computed_alone_equals_the_part_of_the_whole(width, height, size, monkeypatch):
    image = fine_image(width, height)

    def crops():
        yield center_crop(image, *size)
        for seed in range(4):
            yield random_crop(image, *size, random.Random(seed))
        for index in range(10):
            yield ten_crop(image, *size, index)

    whole = [np.asarray(crop, dtype=int) for crop in crops()]
    monkeypatch.setattr(images_dar, "MAX_RESIZED", 0)
    for expected, crop in zip(whole, crops(), strict=True):
        assert crop.size == size[::-1]
        assert np.abs(np.asarray(crop, dtype=int) - expected).max() <= 1


@pytest.mark.parametrize("crop", ["center", "random", "ten"])
@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (3_000_000, 2)])
def test_thin_images_need_little_memory(crop, size, monkeypatch):
    made, resize = [], Image.Image.resize

    def recorded(image, target, *args, **options):
        assert target[0] * target[1] <= images_dar.MAX_RESIZED, "a long image is enlarged"
        made.append(target)
        return resize(image, target, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    ramp = np.add.outer(np.linspace(0, 120, size[1]), np.linspace(0, 120, size[0])).astype(np.uint8)
    image = Image.fromarray(ramp).convert("RGB")
    pixels = ImageTransform((256, 256), 3, crop)(image, seed=1)
    assert made and pixels.shape == (3, 256, 256)
    if crop != "random":  # which may lie anywhere
        assert (pixels[:, 128, 128] - to_tensor(image)[:, size[1] // 2, size[0] // 2]).abs().max() < 0.6


# One way of reading everywhere


def logo():
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((200, 200, 200, 255), (8, 8, 24, 24))
    return content(image)


def photograph():
    exif = Image.Exif()
    exif[0x112] = TURNED
    return content(noise_image(33, 21), "JPEG", exif=exif)


SOURCES = {
    "transparent": logo(),
    "photograph": photograph(),
    "damaged EXIF": content(noise_image(30, 20), exif=DAMAGED["header"]),
    "16 bits": content(Image.fromarray((np.arange(900).reshape(30, 30) * 70).astype(np.uint16))),
    "palette": content(noise_image(40, 20).convert("P"), transparency=3),
    "odd size": content(noise_image(57, 41)),
    "enlarged": content(noise_image(5, 7)),
    "thin": content(noise_image(200, 4)),
    "cmyk": content(noise_image(20, 20).convert("CMYK"), "TIFF"),
    "grey": content(noise_image(20, 31, channels=1)),
    "animation": ANIMATION,
}


@pytest.fixture(scope="module")
def read_upload():
    pytest.importorskip("gradio")
    return load_script("examples/app.py").read_upload


@pytest.mark.parametrize("name", SOURCES)
def test_the_pipeline_training_and_the_page_read_the_same(name, tiny_pipeline, read_upload, tmp_path):
    data = SOURCES[name]
    trained = ImageTransform((8, 8), 3)(open_image({"bytes": data, "path": None}))
    lazy, decoded = PIL.Image.open(io.BytesIO(data)), PIL.Image.open(io.BytesIO(data))
    decoded.load()
    for image in (lazy, decoded):
        assert torch.equal(tiny_pipeline.prepare_images("image", image)[0], trained)
    (tmp_path / "upload").write_bytes(data)
    uploaded, _ = read_upload(str(tmp_path / "upload"), 8, 8, 3)
    assert torch.equal(tiny_pipeline.prepare_images("image", uploaded)[0], trained)


@pytest.mark.parametrize("argument", ["layout_image", "image", "images"])
def test_the_pipeline_names_the_argument_that_cannot_be_read(argument, tiny_pipeline):
    cut = PIL.Image.open(io.BytesIO(SOURCES["odd size"][:2000]))
    with pytest.raises(ValueError, match=f"^{argument}: the image cannot be decoded"):
        if argument == "images":
            tiny_pipeline.reconstruct([noise_image(), cut])
        elif argument == "image":
            tiny_pipeline(0, image=cut, strength=0.5)
        else:
            tiny_pipeline(0, layout_image=cut, layout_tokens=4)
