"""Sets of images: reference crops of a data set, ADM's .npz files, and writing them without holding them."""

import hashlib
import os
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch

from ..data import ImageSamples, ImageTransform, load_images
from ..data.batches import image_path
from .arguments import EvaluationArguments

CROP = "center: halved by boxes while twice too large, bicubic to the shorter side, middle cut out (ADM)"
IMAGES, LABELS = "arr_0", "arr_1"  # as the ADM suite names them
EXTRACTOR = "feature_extractor"  # ours: whose statistics a file holds


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """``(B, C, H, W)`` in [-1, 1] to uint8 ``(B, 3, H, W)`` on the host, rounded; grey becomes three channels.

    Raises:
        ValueError: for values that are not finite.
    """
    if not torch.isfinite(images).all():
        raise ValueError("an image is not finite.")
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    return pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels


def to_float(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 to floating point in [-1, 1]."""
    return images.to(dtype) / 127.5 - 1


class DatasetImages:
    """Centre crops of a data set, as the tokenizer sees them.

    All images are read once at the start, so that one that cannot be read stops nothing later: it is left out, and
    replaced by the next one where only some are asked for.

    Args:
        args: names the data set.
        size: (height, width) in pixels.
        channels: 1 or 3.
        count: number of images; None for all.

    Attributes:
        left_out: names of the images that cannot be read.

    Raises:
        ValueError: for a data set that cannot be loaded, holds fewer images than asked for, or more than
            ``args.max_corrupt_images`` that cannot be read.
    """

    def __init__(self, args: EvaluationArguments, size: tuple[int, int], channels: int, count: int | None):
        name = args.dataset_name or ""
        split = args.split or default_split(name)
        dataset = load_images(
            name,
            split,
            config_name=args.dataset_config_name,
            image_column=args.image_column,
            label_column=args.label_column,
        )
        if count is not None and count > len(dataset):
            raise ValueError(f"num_images={count}, but split {split} has {len(dataset)} images.")
        samples = ImageSamples(dataset, ImageTransform(size, channels))
        kept = samples.readable(count)
        checked = kept[-1] + 1 if len(kept) == count else len(samples)
        self.left_out = _left_out(samples, kept, checked, args.max_corrupt_images)
        if count is not None and count > len(kept):
            raise ValueError(f"num_images={count}, but only {len(kept)} images of split {split} can be read.")
        if self.left_out:
            samples = ImageSamples(dataset.select(kept), samples.transform)
        self.samples = samples
        self.count = len(kept)
        self.size = size
        self.num_classes = dataset.features["label"].num_classes if args.label_column else None
        self.description: dict[str, Any] = {
            "dataset": args.dataset_name,
            "config": args.dataset_config_name,
            "split": split,
            "image_column": args.image_column,
            "labels": args.label_column,
            "crop": CROP,
            "size": list(size),
        }
        if self.left_out:
            self.description["left_out"] = self.left_out

    def read(self, indices: range) -> torch.Tensor:
        """uint8 ``(n, 3, H, W)``."""
        return to_uint8(self.samples.stack(indices))

    def labels(self, indices: range) -> torch.Tensor | None:
        """Classes ``(n,)``, where the data set has them."""
        return torch.tensor([self.samples.labels[i] for i in indices]) if self.samples.labels else None


def default_split(name: str) -> str:
    """The split that is compared with where none is named: test, or of a single file all there is."""
    return "train" if Path(name).expanduser().is_file() else "test"


def _left_out(samples: ImageSamples, kept: list[int], checked: int, limit: int) -> list[str]:
    """Names of the first ``checked`` images that are not kept.

    Raises:
        ValueError: for more than ``limit`` of them, or none that is kept.
    """
    names = []
    for index in sorted(set(range(checked)) - set(kept)):
        path = image_path(samples.dataset[index]["image"])
        # of a path only the last part: reports are published
        names.append(f"{index} ({Path(path).name})" if path else str(index))
    if not kept:
        raise ValueError(f"none of the {len(samples)} images can be read.")
    if len(names) > limit:
        raise ValueError(
            f"{len(names)} images cannot be read, more than max_corrupt_images={limit}: {', '.join(names[:3])}, …"
        )
    return names


class NpzImages:
    """Images of an ADM file: ``arr_0``, uint8 ``(N, H, W, 3)``, read from disk piece by piece.

    Raises:
        ValueError: for another type or shape, or an empty set.
    """

    def __init__(self, path: Path, array: np.ndarray, description: Mapping[str, Any]):
        self.array = array
        if self.array.dtype != np.uint8 or self.array.ndim != 4 or self.array.shape[3] != 3:
            raise ValueError(
                f"{IMAGES} of {path} must be uint8 images (N, H, W, 3) from 0 to 255, got {self.array.dtype} "
                f"{self.array.shape}."
            )
        if not len(self.array):
            raise ValueError(f"{path} holds no images.")
        self.count = len(self.array)
        self.size = self.array.shape[1:3]
        self.description: dict[str, Any] = {**description, "size": list(self.size)}

    def read(self, indices: range) -> torch.Tensor:
        """uint8 ``(n, 3, H, W)``."""
        part = np.array(self.array[indices.start : indices.stop])
        return torch.from_numpy(part).permute(0, 3, 1, 2)

    def labels(self, indices: range) -> None:
        """There are none."""
        return None


@dataclass
class NpzReference:
    """What a reference file holds.

    Attributes:
        images: or None.
        statistics: ``pool`` and ``spatial`` to (mean, covariance), as far as they are there.
        extractor: identity of the network of the statistics; None in files that are not ours.
        description: name and SHA-256 of the file, for the report.
    """

    images: NpzImages | None
    statistics: dict[str, tuple[torch.Tensor, torch.Tensor]]
    extractor: str | None
    description: dict[str, Any]


def read_reference(path: str | Path) -> NpzReference:
    """Read an ADM reference file: images (``arr_0``), statistics (``mu``, ``sigma``, ``mu_s``, ``sigma_s``), or both.

    Raises:
        ValueError: if it cannot be read or holds neither.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such reference file: {path}.")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no .npz file.")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            arrays = {name: file[name] for name in names & {"mu", "sigma", "mu_s", "sigma_s"}}
            extractor = str(file[EXTRACTOR]) if EXTRACTOR in names else None
        mapped = _map_array(path, IMAGES) if IMAGES in names else None
        with path.open("rb") as raw:
            digest = hashlib.file_digest(raw, "sha256").hexdigest()
    except Exception as error:  # damage makes zipfile, zlib and numpy's reader of headers raise many types
        raise ValueError(f"{path} cannot be read, it is damaged or no plain .npz: {error}") from error
    statistics = {}
    for kind, mean, covariance in (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
        if {mean, covariance} <= arrays.keys():
            statistics[kind] = _statistics(path, mean, arrays[mean], covariance, arrays[covariance])
    description = {"reference": path.name, "reference_sha256": digest}
    images = None if mapped is None else NpzImages(path, mapped, description)
    if images is None and "pool" not in statistics:
        raise ValueError(f"{path} holds neither images ({IMAGES}) nor statistics (mu and sigma), but {sorted(names)}.")
    return NpzReference(images, statistics, extractor, description)


def _statistics(
    path: Path, mean_name: str, mean: np.ndarray, covariance_name: str, covariance: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    if (
        mean.ndim != 1
        or covariance.shape != (len(mean), len(mean))
        or {mean.dtype.kind, covariance.dtype.kind} != {"f"}
    ):
        raise ValueError(
            f"{path}: {mean_name} and {covariance_name} must be (D,) and (D, D) floats, got {mean.dtype} {mean.shape} "
            f"and {covariance.dtype} {covariance.shape}."
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{path}: {mean_name} or {covariance_name} is not finite.")
    return torch.from_numpy(mean).double(), torch.from_numpy(covariance).double()


def _map_array(path: Path, name: str) -> np.ndarray:
    """An array of an .npz, mapped from disk where it is stored uncompressed, as numpy.savez does."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        with np.load(path, allow_pickle=False) as file:
            return file[name]
    with open(path, "rb") as raw:
        raw.seek(info.header_offset + 26)  # lengths of name and extra field, then both, then the .npy file
        name_length, extra_length = struct.unpack("<HH", raw.read(4))
        raw.seek(name_length + extra_length, os.SEEK_CUR)
        version = np.lib.format.read_magic(raw)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise ValueError(f"{name} has the .npy version {version}.")
        shape, fortran_order, dtype = read_header(raw)
        offset = raw.tell()
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects.")
    if 0 in shape:
        return np.empty(shape, dtype)
    order: Literal["F", "C"] = "F" if fortran_order else "C"
    return np.memmap(path, dtype, "r", offset, shape, order)


def write_npz(
    path: Path, arrays: Mapping[str, np.ndarray], images: Iterable[torch.Tensor] | None = None, count: int = 0
) -> str | None:
    """Write an .npz under a temporary name, then rename.

    Args:
        path: of the file.
        arrays: small ones, by name.
        images: ``arr_0`` in parts, uint8 ``(n, 3, H, W)``, stored as ``(count, H, W, 3)``.
        count: of all images.

    Returns:
        SHA-256 of the pixels, or None without images.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    digest = None
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        if images is not None:
            with archive.open(f"{IMAGES}.npy", "w", force_zip64=True) as file:
                digest = _write_images(file, images, count)
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
    os.replace(temporary, path)
    return digest


def _write_images(file: IO[bytes], images: Iterable[torch.Tensor], count: int) -> str:
    digest = hashlib.sha256()
    started = False
    for part in images:
        array = part.permute(0, 2, 3, 1).numpy()
        if not started:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *array.shape[1:])}
            np.lib.format.write_array_header_1_0(file, header)
            started = True
        pixels = array.tobytes()
        digest.update(pixels)
        file.write(pixels)
    return digest.hexdigest()
