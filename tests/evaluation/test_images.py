"""Sets of images: 8 bit, and files that numpy and the ADM suite read."""

import contextlib
import hashlib
import math
import zipfile

import numpy as np
import pytest
import torch

from dar_hf.evaluation.images import read_reference, to_float, to_uint8, write_npz

PIXELS = torch.randint(0, 256, (10, 3, 5, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
STORED = PIXELS.permute(0, 2, 3, 1).numpy()


def test_every_grey_level_survives_and_values_are_rounded():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, -1, -1)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    values = torch.tensor([-3.0, -1 + 0.6 / 127.5, -1 + 0.4 / 127.5, 2.0]).reshape(1, 1, 2, 2)
    assert to_uint8(values)[0, :, 0].tolist() == [[0, 1]] * 3  # grey becomes three channels
    assert to_uint8(values)[0, :, 1].tolist() == [[0, 255]] * 3
    with pytest.raises(ValueError, match="not finite"):
        to_uint8(torch.full((1, 3, 2, 2), math.nan))


def test_an_npz_written_in_parts_is_numpys(tmp_path):
    path = tmp_path / "set.npz"
    labels = np.arange(10)
    digest = write_npz(path, {"arr_1": labels}, PIXELS.split(4), 10)
    assert digest == hashlib.sha256(STORED.tobytes()).hexdigest()
    with np.load(path) as file:
        assert file.files == ["arr_0", "arr_1"]
        assert np.array_equal(file["arr_0"], STORED) and file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_1"], labels)
    assert [p.name for p in tmp_path.iterdir()] == ["set.npz"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_read_piece_by_piece(save, tmp_path):
    save(tmp_path / "set.npz", other=np.arange(3), arr_0=STORED)
    images = read_reference(tmp_path / "set.npz").images
    assert (images.count, images.size) == (10, (5, 4))
    assert isinstance(images.array, np.memmap) == (save is np.savez)  # not read as a whole
    assert torch.equal(images.read(range(3, 7)), PIXELS[3:7])
    assert images.labels(range(2)) is None


def test_fortran_order_and_our_own_files(tmp_path):
    np.savez(tmp_path / "fortran.npz", arr_0=np.asfortranarray(STORED))
    assert torch.equal(read_reference(tmp_path / "fortran.npz").images.read(range(10)), PIXELS)
    write_npz(tmp_path / "ours.npz", {}, [PIXELS], 10)
    assert torch.equal(read_reference(tmp_path / "ours.npz").images.read(range(2, 3)), PIXELS[2:3])


def test_a_reference_may_hold_images_statistics_or_both(tmp_path):
    mu, sigma = np.arange(3.0), np.eye(3, dtype=np.float32)
    np.savez(tmp_path / "both.npz", arr_0=STORED, mu=mu, sigma=sigma, mu_s=mu[:2], sigma_s=sigma[:2, :2])
    both = read_reference(tmp_path / "both.npz")
    assert both.images is not None and both.extractor is None
    assert {name: mean.tolist() for name, (mean, _) in both.statistics.items()} == {
        "pool": [0, 1, 2],
        "spatial": [0, 1],
    }
    assert both.statistics["pool"][1].dtype == torch.float64
    write_npz(tmp_path / "ours.npz", {"mu": mu, "sigma": sigma, "feature_extractor": np.array("network 123")})
    ours = read_reference(tmp_path / "ours.npz")
    assert ours.images is None and ours.extractor == "network 123" and ours.statistics.keys() == {"pool"}


def test_what_is_no_reference(tmp_path):
    (tmp_path / "text.npz").write_text("no zip")
    np.savez(tmp_path / "objects.npz", arr_0=np.array([object()]))
    np.save(tmp_path / "array.npy", STORED)
    np.savez(tmp_path / "statistics.npz", mu=np.array([object()]), sigma=np.eye(1))
    np.savez(tmp_path / "complex.npz", mu=np.zeros(2), sigma=np.eye(2) * 1j)
    np.savez(tmp_path / "header.npz", **{"arr_0": STORED[:0]})
    with zipfile.ZipFile(tmp_path / "member.npz", "w") as archive:
        archive.writestr("arr_0", b"no array")
    names = ("none", "text", "objects", "statistics", "complex", "header", "member")
    for name in (*(f"{name}.npz" for name in names), "array.npy"):
        with pytest.raises(ValueError, match=name):
            read_reference(tmp_path / name)


def test_every_damage_to_a_compressed_reference_is_a_clear_error(tmp_path):
    path = tmp_path / "set.npz"
    np.savez_compressed(path, arr_0=np.tile(STORED // 50, (20, 1, 1, 1)))
    whole, kinds = path.read_bytes(), set()
    for place in range(40, len(whole) - 150, 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with contextlib.suppress(ValueError):  # damaged; any other exception fails the test
            read_reference(path)
            continue
        kinds.add(place)
    assert len(kinds) > 5
