"""Crops, flips and colour modes against independently written references."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from dar_hf.data import ImageTransform, center_crop, convert_channels, random_crop, ten_crop

ODD_SIZES = [(37, 53), (101, 40), (64, 64), (257, 129), (19, 300), (31, 31)]


def noise_image(width, height, mode="RGB", seed=0):
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def adm_center_crop(image, size):
    """Centre crop of guided-diffusion, written from its description, with numpy for the cutting."""
    width, height = image.size
    while min(width, height) // 2 >= size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), resample=Image.Resampling.BOX)
    ratio = size / min(width, height)
    image = image.resize((round(width * ratio), round(height * ratio)), resample=Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    row, column = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[row : row + size, column : column + size]


def reloaded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, options.pop("format", "PNG"), **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [8, 15, 19])
@pytest.mark.parametrize("width, height", ODD_SIZES)
def test_center_crop_is_adms(width, height, size, mode):
    image = noise_image(width, height, mode)
    assert np.array_equal(np.asarray(center_crop(image, size, size)), adm_center_crop(image, size))


def test_center_crop_to_a_rectangle_covers_it_and_keeps_the_middle():
    image = noise_image(50, 20)
    cut = np.asarray(center_crop(image, 20, 30))
    assert np.array_equal(cut, np.asarray(image)[:, 10:40])
    assert center_crop(noise_image(33, 71), 16, 24).size == (24, 16)


def test_random_crop_follows_its_seed():
    image = noise_image(40, 30)
    first, same, other = (random_crop(image, 16, 16, random.Random(seed)) for seed in (1, 1, 2))
    assert first.tobytes() == same.tobytes() != other.tobytes()


def ramp_window(size, seed):
    """Size of the resized ramp and offset of the window, read off a crop of a picture whose values are its columns."""
    ramp = Image.fromarray(np.broadcast_to(np.arange(250, dtype=np.uint8), (250, 250)).copy())
    row = np.asarray(random_crop(ramp, size, size, random.Random(seed)), dtype=float)[size // 2]
    inner = row[2:-2]  # bicubic bends the ends
    slope = (inner[-1] - inner[0]) / (len(inner) - 1)
    return 250 / slope, (inner[0] / slope) - 2


def test_random_crop_windows_have_eight_to_ten_tenths_of_the_side():
    size = 50
    windows = [ramp_window(size, seed) for seed in range(150)]
    scales = np.array([size / resized for resized, _ in windows])
    assert 0.78 < scales.min() < 0.82 and 0.96 < scales.max() < 1.02
    room = np.array([offset / max(resized - size, 1) for resized, offset in windows if resized > size + 6])
    assert room.min() < 0.2 and room.max() > 0.8  # from the left end to the right one


def test_random_crop_reaches_the_whole_image():
    """ADM draws the resized side from ceil(size / 1.0) .. ceil(size / 0.8), ends included."""
    image = noise_image(8, 8)
    crops = [random_crop(image, 8, 8, random.Random(seed)).tobytes() for seed in range(100)]
    assert image.tobytes() in crops


@pytest.mark.parametrize("index", range(10))
def test_ten_crop_positions(index):
    image = noise_image(22, 22)
    pixels = np.asarray(image)
    corners = [(0, 0), (0, 2), (2, 0), (2, 2), (1, 1)]  # top left, top right, bottom left, bottom right, centre
    top, left = corners[index % 5]
    expected = pixels[top : top + 20, left : left + 20]
    expected = expected[:, ::-1] if index >= 5 else expected
    assert np.array_equal(np.asarray(ten_crop(image, 20, 20, index)), expected)


def test_ten_crop_of_256_is_cut_out_of_281_as_in_the_original():
    image = noise_image(281, 281)  # int(256 * 1.1): no resizing
    assert np.array_equal(np.asarray(ten_crop(image, 256, 256, 3)), np.asarray(image)[25:, 25:])


@pytest.mark.parametrize("index", [-1, 10])
def test_ten_crop_refuses_other_indices(index):
    with pytest.raises(ValueError, match="0 to 9"):
        ten_crop(noise_image(22, 22), 20, 20, index)


TURNS = {1: np.asarray, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 6: lambda a: np.rot90(a, -1), 8: np.rot90}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_rotation_is_applied_once(orientation):
    image = noise_image(6, 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = reloaded(image, exif=exif)
    expected = TURNS[orientation](np.asarray(image))
    upright = convert_channels(loaded, 3)
    assert np.array_equal(np.asarray(upright), expected)
    assert np.array_equal(np.asarray(convert_channels(upright, 3)), expected)
    assert np.array_equal(np.asarray(convert_channels(loaded, 3)), expected)  # the source is left as it was


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 128)])
    assert np.asarray(convert_channels(image, 3)).tolist() == [[[10, 20, 30], [255] * 3, [127] * 3]]


def test_grey_with_alpha():
    image = Image.new("LA", (2, 1))
    image.putdata([(40, 255), (40, 0)])
    assert np.asarray(convert_channels(image, 3)).tolist() == [[[40] * 3, [255] * 3]]
    assert np.asarray(convert_channels(image, 1)).tolist() == [[40, 255]]


def test_palette_with_transparency():
    image = Image.new("P", (3, 1))
    image.putpalette([200, 0, 0, 0, 100, 0, 0, 0, 50])
    image.putdata([0, 1, 2])
    loaded = reloaded(image, transparency=1)
    assert loaded.mode == "P"
    assert np.asarray(convert_channels(loaded, 3)).tolist() == [[[200, 0, 0], [255] * 3, [0, 0, 50]]]


def test_transparent_colour_of_an_rgb_png():
    image = Image.new("RGB", (2, 1))
    image.putdata([(1, 2, 3), (4, 5, 6)])
    loaded = reloaded(image, transparency=(4, 5, 6))
    assert np.asarray(convert_channels(loaded, 3)).tolist() == [[[1, 2, 3], [255] * 3]]


def test_cmyk():
    image = Image.new("CMYK", (3, 1))
    image.putdata([(0, 0, 0, 0), (255, 255, 0, 0), (0, 0, 0, 255)])
    assert np.asarray(convert_channels(image, 3)).tolist() == [[[255] * 3, [0, 0, 255], [0] * 3]]


@pytest.mark.parametrize("mode, dtype", [("I;16", "<u2"), ("I;16B", ">u2"), ("I", "int32")])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_not_clipped(mode, dtype, channels):
    values = np.array([[0, 257, 128 * 257, 65535]])
    image = Image.frombytes(mode, (4, 1), values.astype(dtype).tobytes())
    pixels = np.asarray(convert_channels(image, channels)).reshape(4, -1)
    assert pixels.tolist() == [[v] * channels for v in (0, 1, 128, 255)]


def test_sixteen_bit_png():
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    loaded = reloaded(Image.fromarray(values))
    assert loaded.mode.startswith("I")
    assert np.asarray(convert_channels(loaded, 1)).tolist() == [[0, 1, 128, 255]]


def test_one_bit_images():
    image = Image.new("1", (4, 1))
    ImageDraw.Draw(image).point([(1, 0), (3, 0)], fill=1)
    assert np.asarray(convert_channels(image, 1)).tolist() == [[0, 255, 0, 255]]


def test_grey_to_colour_and_back():
    grey = noise_image(5, 4, "L")
    colour = np.asarray(convert_channels(grey, 3))
    assert np.array_equal(colour, np.repeat(np.asarray(grey)[..., None], 3, axis=2))
    red = Image.new("RGB", (1, 1), (255, 0, 0))
    assert np.asarray(convert_channels(red, 1)).tolist() == [[76]]  # 0.299 of 255


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(ValueError, match="1 or 3 channels, got 4"):
        convert_channels(noise_image(2, 2), 4)


@pytest.mark.parametrize("crop", ["center", "random", "ten"])
@pytest.mark.parametrize("channels", [1, 3])
def test_tensors_have_the_asked_shape_and_range(crop, channels):
    halves = Image.new("RGB", (45, 33), "white")
    halves.paste("black", (0, 0, 22, 33))
    tensor = ImageTransform((16, 20), channels, crop)(halves, seed=3)
    assert tensor.shape == (channels, 16, 20) and tensor.dtype == torch.float32
    assert tensor.min() == -1 and tensor.max() == 1


def test_pixel_values():
    image = Image.fromarray(np.array([[0, 255], [51, 102]], dtype=np.uint8))
    tensor = ImageTransform((2, 2), 1)(image)
    torch.testing.assert_close(tensor, torch.tensor([[[-1.0, 1.0], [-0.6, -0.2]]]))
    colour = ImageTransform((1, 1), 3)(Image.new("RGB", (1, 1), (0, 255, 51)))
    torch.testing.assert_close(colour.flatten(), torch.tensor([-1.0, 1.0, -0.6]))


@pytest.mark.parametrize("crop", ["center", "random"])
def test_flip_mirrors_half_of_the_images(crop):
    image = noise_image(8, 8)
    plain, flipping = ImageTransform((8, 8), 3, crop), ImageTransform((8, 8), 3, crop, flip=True)
    mirrored = 0
    for seed in range(200):
        straight, turned = plain(image, seed), flipping(image, seed)
        if not torch.equal(straight, turned):
            assert torch.equal(straight.flip(-1), turned)
            mirrored += 1
    assert 70 < mirrored < 130


@pytest.mark.parametrize("crop, flip, count", [("center", False, 1), ("center", True, 2), ("ten", False, 10)])
def test_countable_variants(crop, flip, count):
    image, transform = noise_image(30, 30), ImageTransform((20, 20), 3, crop, flip)
    assert transform.num_variants == count
    rendered = [transform.render(image, variant) for variant in range(count)]
    assert len({tensor.numpy().tobytes() for tensor in rendered}) == count
    seen = set()
    for seed in range(200):
        seen.add(transform.variant(seed))
        assert torch.equal(transform(image, seed), rendered[transform.variant(seed)])
    assert seen == set(range(count))


def test_random_crops_cannot_be_counted():
    assert ImageTransform((20, 20), 3, "random").num_variants is None


@pytest.mark.parametrize("crop", ["center", "random", "ten"])
def test_noise_comes_on_top_from_the_same_seed(crop):
    grey = Image.new("L", (60, 60), 128)
    transform = ImageTransform((50, 50), 1, crop, noise=0.1)
    first, same, other = (transform(grey, seed) for seed in (5, 5, 6))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert first.std().item() == pytest.approx(0.1, rel=0.1) and abs(first.mean()) < 0.02
    assert transform.num_variants is None  # no two alike


def test_noise_stays_in_range():
    white = ImageTransform((50, 50), 1, noise=0.5)(Image.new("L", (50, 50), 255))
    assert white.max() == 1 and white.min() >= -1


def test_noisy_images_are_cut_like_clean_ones():
    image = noise_image(30, 30)
    clean, noisy = (ImageTransform((20, 20), 3, "ten", noise=noise) for noise in (0.0, 1e-4))
    for seed in range(20):
        torch.testing.assert_close(noisy(image, seed), clean(image, seed), atol=1e-3, rtol=0)


def test_wrong_options():
    with pytest.raises(ValueError, match="center, random, ten, got 'middle'"):
        ImageTransform((8, 8), crop="middle")
    with pytest.raises(ValueError, match="noise must not be negative"):
        ImageTransform((8, 8), noise=-0.1)
