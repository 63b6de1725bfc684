"""Labelled images for the `image` job: scikit-learn's digits, drawn shapes, CIFAR files, or a folder per class.

All images of a source are brought to one size and kept in memory as bytes. Knows nothing of models. Called by
`jobs.image`; the loaders of whole folders are cached per process.
"""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator.jobs.extras import load_extra
from orchestrator.jobs.folder import existing_folder, read_files
from orchestrator.jobs.pictures import Bytes, class_files, read_image, usable
from orchestrator.jobs.remember import remembered

logger = logging.getLogger(__name__)

FOLDER_SIZE = 32
MAX_MEASURED = 10_000
"""Images that mean and spread are taken of, about; bounds the memory."""

CIFAR_SIDE = 32
DIGITS_PERIOD = 5
"""Of scikit-learn's 1,797 digits every fifth is held out; they are in the order in which they were written."""

SHAPES = ("disc", "ring", "square", "frame", "triangle", "plus", "cross", "bars")
SHAPE_SIDE = 16
NUM_TRAIN_SHAPES, NUM_HELD_OUT_SHAPES = 4096, 512
SHAPE_NOISE = 0.15
"""Standard deviation of the noise on a drawn shape, of the full range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledImages:
    """Two parts of labelled images, all of one size.

    Attributes:
        train: (N, C, H, W) uint8.
        train_labels: (N,) int64.
        held_out, held_out_labels: the same for the part that is never trained on.
        classes: name of each label.
    """

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.train)

    @property
    def shape(self) -> tuple[int, int]:
        """Channels and side of a picture."""
        return self.train.shape[1], self.train.shape[-1]

    def cut(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The training images of those numbers, (B, C, H, W) uint8, and their labels (B,)."""
        return self.train[indices], self.train_labels[indices]

    @property
    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over the training images, or about `MAX_MEASURED` of them."""
        return mean_and_std(self.train[:: max(1, len(self.train) // MAX_MEASURED)])

    def first(self, max_samples: int | None) -> LabelledImages:
        """The same with at most that many training images."""
        if max_samples is None or max_samples >= len(self.train):
            return self
        return replace(self, train=self.train[:max_samples], train_labels=self.train_labels[:max_samples])


def mean_and_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of images (N, C, H, W), each (C, 1, 1) fp32."""
    values = images.double()
    mean, std = values.mean(dim=(0, 2, 3)), values.std(dim=(0, 2, 3))
    return mean.float()[:, None, None], std.float().clamp_min(1.0)[:, None, None]


def _parts(train: tuple[Bytes, Any], held_out: tuple[Bytes, Any], classes: tuple[str, ...]) -> LabelledImages:
    images, labels = zip(train, held_out, strict=True)
    return LabelledImages(
        train=torch.from_numpy(np.ascontiguousarray(images[0])),
        train_labels=torch.from_numpy(np.asarray(labels[0], dtype=np.int64)),
        held_out=torch.from_numpy(np.ascontiguousarray(images[1])),
        held_out_labels=torch.from_numpy(np.asarray(labels[1], dtype=np.int64)),
        classes=classes,
    )


@lru_cache(maxsize=2)
def digits(size: int | None) -> LabelledImages:
    """Handwritten digits of 8 x 8 pixels, which come with scikit-learn.

    Source: UCI Optical Recognition of Handwritten Digits, Alpaydin and Kaynak 1998.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    datasets = load_extra("sklearn.datasets", "job image: data=digits")
    loaded = datasets.load_digits()
    images = np.round(loaded.images * (255 / 16)).astype(np.uint8)[:, None]
    images = _resized(images, size)
    held_out = np.arange(len(images)) % DIGITS_PERIOD == DIGITS_PERIOD - 1
    labels = loaded.target
    names = tuple(str(name) for name in range(10))
    return _parts((images[~held_out], labels[~held_out]), (images[held_out], labels[held_out]), names)


@lru_cache(maxsize=4)
def shapes(seed: int, size: int | None, max_samples: int | None) -> LabelledImages:
    """Shapes of eight kinds, drawn at random places and sizes with noise; needs no library.

    The first n images are the same whatever `max_samples` is, and torch's generators are left alone.
    """
    count = NUM_TRAIN_SHAPES if max_samples is None else min(max_samples, NUM_TRAIN_SHAPES)
    parts = [_draw(seed, part, number, size or SHAPE_SIDE) for part, number in ((0, count), (1, NUM_HELD_OUT_SHAPES))]
    return _parts(parts[0], parts[1], SHAPES)


def _draw(seed: int, part: int, count: int, side: int) -> tuple[Bytes, npt.NDArray[np.int64]]:
    """`count` grey images (count, 1, side, side) and their labels."""
    # One generator per property, so that a sample does not depend on how many there are.
    labels = np.random.default_rng([seed, part, 0]).integers(0, len(SHAPES), count)
    place = np.random.default_rng([seed, part, 1]).random((count, 4))
    noise = np.random.default_rng([seed, part, 2]).standard_normal((count, side, side), dtype=np.float32)
    radius = (0.22 + 0.16 * place[:, 0])[:, None, None]
    middle = 0.5 + (place[:, 1:3] - 0.5) * 0.24
    grid = (np.arange(side) + 0.5) / side
    x = (grid[None, None, :] - middle[:, 0, None, None]) / radius
    y = (grid[None, :, None] - middle[:, 1, None, None]) / radius
    far, near, round_ = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y)), np.hypot(x, y)
    masks = (
        round_ < 1,
        (round_ < 1) & (round_ > 0.6),
        far < 0.9,
        (far < 0.9) & (far > 0.5),
        (y < 0.8) & (y > 2 * abs(x) - 1),
        (near < 0.28) & (far < 1),
        (abs(abs(x) - abs(y)) < 0.36) & (far < 1),
        (far < 0.95) & (np.floor((y + 0.95) / 0.38) % 2 == 0),
    )
    inside = np.choose(labels[:, None, None], [np.broadcast_to(mask, noise.shape) for mask in masks])
    contrast = (0.35 + 0.4 * place[:, 3])[:, None, None]
    grey = 0.2 + contrast * inside + SHAPE_NOISE * noise
    return (np.clip(grey, 0, 1) * 255).astype(np.uint8)[:, None], labels


@remembered(maxsize=2)
def from_folder(data_dir: str, size: int | None, on_bad_file: str, max_samples: int | None = None) -> LabelledImages:
    """The images of a folder: CIFAR's files where it holds them, else a folder per class.

    Raises:
        ValueError: there is no such folder, nothing usable in it, or a broken file and `on_bad_file` is 'stop'.
    """
    root = existing_folder(data_dir)
    cifar = _find_cifar(root)
    if cifar is not None:
        return _cifar(*cifar, size, on_bad_file).first(max_samples)
    return _class_folders(root, size or FOLDER_SIZE, max_samples, on_bad_file)


def has_cifar(data_dir: str) -> bool:
    """Whether a folder holds CIFAR's files.

    Raises:
        ValueError: there is no such folder.
    """
    return _find_cifar(existing_folder(data_dir)) is not None


def _find_cifar(root: Path) -> tuple[Path, _CifarLayout] | None:
    """Folder and layout of the CIFAR files at or directly below `root`; None where there are none."""
    inner = [root, *(root / name for name in ("cifar-10-batches-bin", "cifar-10-batches-py", "cifar-100-binary"))]
    inner.append(root / "cifar-100-python")
    for folder in inner:
        for layout in _CIFAR_LAYOUTS:
            if (folder / layout.held_out[0]).is_file() and (folder / layout.train[0]).is_file():
                return folder, layout
    return None


# CIFAR.


@dataclass(frozen=True, slots=True)
class _CifarLayout:
    """Names of the files of one of CIFAR's four forms, and how they are read."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    num_classes: int
    read: Callable[[Path], tuple[Bytes, npt.NDArray[np.int64]]]


def _binary_reader(num_label_bytes: int) -> Callable[[Path], tuple[Bytes, npt.NDArray[np.int64]]]:
    """Reads records of label bytes (the last one counts) and 3072 pixel bytes."""
    record = num_label_bytes + 3 * CIFAR_SIDE * CIFAR_SIDE

    def read(path: Path) -> tuple[Bytes, npt.NDArray[np.int64]]:
        raw = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        if not len(raw) or len(raw) % record:
            raise ValueError(f"{len(raw)} bytes are no whole number of records of {record} bytes")
        rows = raw.reshape(-1, record)
        images = rows[:, num_label_bytes:].reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE)
        return images, rows[:, num_label_bytes - 1].astype(np.int64)

    return read


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and plain values, and refuses everything that could run code."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - what pickle asks for
        """The few callables that an array is made with."""
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}:
            return super().find_class(module, name)
        if module in {"numpy.core.multiarray", "numpy._core.multiarray"} and name in {"_reconstruct", "scalar"}:
            return super().find_class("numpy._core.multiarray", name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file does")


def _read_python_batch(path: Path) -> tuple[Bytes, npt.NDArray[np.int64]]:
    try:
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        images = np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE)
        labels = np.asarray(batch[b"fine_labels" if b"fine_labels" in batch else b"labels"], dtype=np.int64)
    except (pickle.UnpicklingError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"it is no CIFAR batch: {error}") from error
    if len(images) != len(labels):
        raise ValueError(f"it has {len(images)} images and {len(labels)} labels")
    return images, labels


_TEN = tuple(f"data_batch_{number}" for number in range(1, 6))
_CIFAR_LAYOUTS = (
    _CifarLayout(tuple(f"{name}.bin" for name in _TEN), ("test_batch.bin",), 10, _binary_reader(1)),
    _CifarLayout(_TEN, ("test_batch",), 10, _read_python_batch),
    _CifarLayout(("train.bin",), ("test.bin",), 100, _binary_reader(2)),
    _CifarLayout(("train",), ("test",), 100, _read_python_batch),
)


def _cifar(folder: Path, layout: _CifarLayout, size: int | None, on_bad_file: str) -> LabelledImages:
    def checked(path: Path) -> tuple[Bytes, npt.NDArray[np.int64]]:
        images, labels = layout.read(path)
        if len(labels) and not 0 <= labels.min() <= labels.max() < layout.num_classes:
            raise ValueError(f"its labels go up to {labels.max()}; allowed: 0 to {layout.num_classes - 1}")
        return _resized(images, size), labels

    parts = []
    for names in (layout.train, layout.held_out):
        present = [name for name in names if (folder / name).is_file()]
        read = [value for _, value in read_files(folder, present, checked, on_bad_file)]
        if not read:
            raise ValueError(f"{folder} has no usable file among {', '.join(names)}")
        parts.append((np.concatenate([value[0] for value in read]), np.concatenate([value[1] for value in read])))
    logger.info("CIFAR files of %s: %d training images, %d held-out", folder, len(parts[0][0]), len(parts[1][0]))
    return _parts(parts[0], parts[1], tuple(str(number) for number in range(layout.num_classes)))


# A folder per class.


def _class_folders(root: Path, size: int, max_samples: int | None, on_bad_file: str) -> LabelledImages:
    """All pictures of a folder per class, decoded."""
    files = class_files(root, max_samples)
    parts = []
    for part in ("training", "held-out"):
        read = usable(files, part, lambda path: read_image(path, size), on_bad_file)
        parts.append((np.stack([image for _, image in read]), [label for (_, label), _ in read]))
    logger.info(
        "images below %s: %d classes, %d training, %d held-out", root, len(files.classes), *(len(p[1]) for p in parts)
    )
    return _parts(parts[0], parts[1], files.classes)


def _resized(images: Bytes, size: int | None) -> Bytes:
    """(N, C, H, W) bytes brought to `size` pixels a side; None leaves them."""
    if size is None or size == images.shape[-1]:
        return images
    batch = torch.from_numpy(np.ascontiguousarray(images)).float()
    scaled = torch.nn.functional.interpolate(batch, size=(size, size), mode="bilinear", antialias=True)
    return scaled.round_().clamp_(0, 255).to(torch.uint8).numpy()
