"""Pictures with a mask for the `tissue` job: stained tissue, a fundus, drawn cells, or a folder of pictures and masks.

The masks of the two bundled pictures are COMPUTED from the same pixels (stain separation, a ridge filter), not drawn by
a physician: a network that learns them has learned the filter. Pictures stay whole in memory; patches are cut when
they are asked for. Training and held-out patches never share a pixel. Knows nothing of models. Called by `jobs.tissue`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator.jobs.extras import load_extra
from orchestrator.jobs.folder import existing_folder, files_below, is_held_out, read_files
from orchestrator.jobs.pictures import IMAGE_ENDINGS
from orchestrator.jobs.remember import remembered

logger = logging.getLogger(__name__)

Picture = tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]
"""Pixels (H, W, 3) and mask (H, W)."""

HELD_OUT_PER_256 = 51
"""Pictures of a folder held out of 256: 20 %."""

TRAIN_COLUMNS = 0.75
"""Left part of a bundled picture that is trained on; the rest is held out, so that the two parts are two regions."""

FUNDUS_STEP = 2
FUNDUS_VESSEL_RATIO = 0.1
"""Every second pixel of the fundus is used, and the tenth of them with the strongest ridges counts as vessel."""

CELL_SIDE = 128
NUM_TRAIN_CELL_PICTURES, NUM_HELD_OUT_CELL_PICTURES, CELLS_PER_PICTURE = 12, 4, 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches:
    """Square patches of pictures, cut when they are asked for.

    Attributes:
        pixels: (M, 3) uint8, all pictures one after another, row by row.
        mask: (M,) uint8 of 0 and 1.
        first: (N,) int64, the pixel in the upper left corner of each patch.
        row: (N,) int64, pixels per row of the picture it lies in.
        size: side of a patch in pixels.
    """

    pixels: Tensor
    mask: Tensor
    first: Tensor
    row: Tensor
    size: int

    def __len__(self) -> int:
        return len(self.first)

    def cut(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The patches of those numbers: pixels (B, 3, S, S) and masks (B, S, S), uint8."""
        side = torch.arange(self.size, device="cpu")
        rows = self.first[indices, None] + side * self.row[indices, None]
        places = rows[:, :, None] + side
        return self.pixels[places].permute(0, 3, 1, 2), self.mask[places]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tissue:
    """The two parts."""

    train: Patches
    held_out: Patches


def patches_of(pictures: list[Picture], size: int, stride: int) -> Patches:
    """Patches on a grid of `stride` pixels; the last of a row or column ends at the picture's edge.

    Raises:
        ValueError: a picture is smaller than a patch.
    """
    first, row, begin = [], [], 0
    for pixels, _ in pictures:
        height, width = pixels.shape[:2]
        if min(height, width) < size:
            raise ValueError(f"a picture of {width} x {height} pixels is smaller than a patch of size={size}")
        corners = np.array(_starts(height, size, stride))[:, None] * width + np.array(_starts(width, size, stride))
        first.append(corners.ravel() + begin)
        row.append(np.full(corners.size, width))
        begin += height * width
    return Patches(
        pixels=torch.from_numpy(np.concatenate([pixels.reshape(-1, 3) for pixels, _ in pictures])),
        mask=torch.from_numpy(np.concatenate([mask.ravel().astype(np.uint8) for _, mask in pictures])),
        first=torch.from_numpy(np.concatenate(first)),
        row=torch.from_numpy(np.concatenate(row)),
        size=size,
    )


def _starts(length: int, size: int, stride: int) -> list[int]:
    starts = list(range(0, length - size + 1, stride))
    return starts if starts[-1] == length - size else [*starts, length - size]


def _tissue(train: list[Picture], held_out: list[Picture], size: int) -> Tissue:
    # Training patches overlap by half: more of them out of few pictures. Held-out ones tile, so that pixels count once.
    return Tissue(train=patches_of(train, size, max(1, size // 2)), held_out=patches_of(held_out, size, size))


def _by_region(picture: Picture, size: int) -> Tissue:
    """Left columns to train on, right ones held out."""
    pixels, mask = picture
    column = int(pixels.shape[1] * TRAIN_COLUMNS)
    if min(pixels.shape[1] - column, column) < size:
        raise ValueError(
            f"job tissue: size={size} is larger than the held-out part of this picture; "
            f"allowed: at most {pixels.shape[1] - column}"
        )
    left, right = (pixels[:, :column], mask[:, :column]), (pixels[:, column:], mask[:, column:])
    return _tissue([left], [right], size)


# Bundled pictures.


def _ihc() -> Picture:
    """Colon tissue, stained; the mask is where the brown stain (DAB) is above Otsu's threshold.

    Source of the stain separation: Ruifrok and Johnston 2001, as in scikit-image.
    """
    purpose = "job tissue: data=ihc"
    pixels = load_extra("skimage.data", purpose).immunohistochemistry()
    stains = load_extra("skimage.color", purpose).rgb2hed(pixels)
    filters = load_extra("skimage.filters", purpose)
    brown = filters.gaussian(stains[:, :, 2], sigma=1.5)
    return pixels, brown > filters.threshold_otsu(brown)


def _fundus() -> Picture:
    """A retina; the mask is where a ridge filter on the green channel is strongest inside the eye, mostly vessels."""
    purpose = "job tissue: data=fundus"
    pixels = np.ascontiguousarray(load_extra("skimage.data", purpose).retina()[::FUNDUS_STEP, ::FUNDUS_STEP])
    filters = load_extra("skimage.filters", purpose)
    green = pixels[:, :, 1] / 255
    ridges = filters.sato(green, sigmas=(1.5, 3.0), black_ridges=True)
    # The rim of the eye is the strongest ridge of all: only what is well inside it counts.
    inside = filters.gaussian(pixels.max(axis=2) > 40, sigma=8.0) > 0.99
    return pixels, inside & (ridges > np.quantile(ridges[inside], 1 - FUNDUS_VESSEL_RATIO))


def _drawn_cells(seed: int, part: int, count: int) -> list[Picture]:
    """Dark ellipses on a pale, uneven ground, with their exact masks; needs no library."""
    pictures = []
    grid = np.arange(CELL_SIDE)
    for number in range(count):
        draw = np.random.default_rng([seed, part, number])
        mask = np.zeros((CELL_SIDE, CELL_SIDE), dtype=bool)
        for y, x, long, ratio, angle in draw.random((CELLS_PER_PICTURE, 5)):
            dy, dx = grid[:, None] - y * CELL_SIDE, grid[None, :] - x * CELL_SIDE
            u = dx * np.cos(np.pi * angle) + dy * np.sin(np.pi * angle)
            v = dy * np.cos(np.pi * angle) - dx * np.sin(np.pi * angle)
            radius = 4 + 6 * long
            mask |= (u / radius) ** 2 + (v / (radius * (0.5 + 0.5 * ratio))) ** 2 < 1
        coarse = draw.standard_normal((CELL_SIDE // 16, CELL_SIDE // 16))
        uneven = np.kron(coarse, np.ones((16, 16)))[:, :, None] * np.array([8.0, 14.0, 8.0])
        ground, cell = np.array([228.0, 190.0, 214.0]), np.array([150.0, 110.0, 168.0])
        noise = 24 * draw.standard_normal((CELL_SIDE, CELL_SIDE, 3))
        pixels = np.where(mask[:, :, None], cell, ground) + uneven + noise
        pictures.append((np.clip(pixels, 0, 255).astype(np.uint8), mask))
    return pictures


@lru_cache(maxsize=4)
def bundled(data: str, size: int, seed: int) -> Tissue:
    """Patches of one of the pictures that need no download: 'ihc', 'fundus' (scikit-image) or 'cells' (drawn here).

    Raises:
        ValueError: scikit-image is not installed, or a patch is larger than a part.
    """
    if data == "cells":
        train = _drawn_cells(seed, 0, NUM_TRAIN_CELL_PICTURES)
        return _tissue(train, _drawn_cells(seed, 1, NUM_HELD_OUT_CELL_PICTURES), size)
    return _by_region(_PICTURES[data](), size)


_PICTURES: dict[str, Callable[[], Picture]] = {"ihc": _ihc, "fundus": _fundus}


# A folder.


@remembered(maxsize=2)
def from_folder(data_dir: str, size: int, on_bad_file: str) -> Tissue:
    """Pictures in `images` and their masks in `masks`, paired by name without ending; 20 % of the pictures held out.

    Raises:
        ValueError: no such folder, a picture without a mask, too few pictures, or a broken file and `on_bad_file` is
            'stop'.
    """
    root = existing_folder(data_dir)
    masks = {_stem(path): path for path in files_below(root / "masks", IMAGE_ENDINGS)}
    images = files_below(root / "images", IMAGE_ENDINGS)
    if not images:
        raise ValueError(
            f"data_dir={data_dir!r} has no picture in a folder `images`; needed: pictures in `images` and for each a "
            f"mask of the same name in `masks`, white where the structure is"
        )
    load_extra("PIL.Image", "reading pictures")  # before the first file, so that it is not taken for a broken one

    def read(path: Path) -> Picture:
        stem = _stem(path.relative_to(root / "images").as_posix())
        if stem not in masks:
            raise ValueError(f"it has no mask; needed: {root / 'masks' / stem} with the ending of a picture")
        return _read_pair(path, root / "masks" / masks[stem], size)

    parts: dict[bool, list[Picture]] = {False: [], True: []}
    for path, picture in read_files(root / "images", images, read, on_bad_file):
        parts[is_held_out(_stem(path), HELD_OUT_PER_256)].append(picture)
    for held_out, name in ((False, "training"), (True, "held-out")):
        if not parts[held_out]:
            raise ValueError(
                f"data_dir={data_dir!r} has {len(images)} pictures and no usable {name} one among them (1 in 5 is held "
                f"out, by a hash of its name); add pictures"
            )
    logger.info("pictures below %s: %d training, %d held out", root, len(parts[False]), len(parts[True]))
    return _tissue(parts[False], parts[True], size)


def _stem(relative_path: str) -> str:
    return relative_path.rpartition(".")[0]


def _read_pair(path: Path, mask_path: Path, size: int) -> Picture:
    """A picture and its mask, which is wherever a grey value is above half.

    Raises:
        ValueError: one of them is no picture, or they do not fit each other or a patch.
    """
    pillow = load_extra("PIL.Image", "reading pictures")
    try:
        with pillow.open(path) as opened:
            pixels = np.asarray(opened.convert("RGB"), dtype=np.uint8)
        with pillow.open(mask_path) as opened:
            mask = np.asarray(opened.convert("L"), dtype=np.uint8) > 127
    except pillow.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    if pixels.shape[:2] != mask.shape:
        raise ValueError(
            f"it has {pixels.shape[1]} x {pixels.shape[0]} pixels and its mask {mask_path} has another size"
        )
    if min(mask.shape) < size:
        raise ValueError(f"it has {mask.shape[1]} x {mask.shape[0]} pixels, less than a patch of size={size}")
    return pixels, mask


def iterate(patches: Patches, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All patches in order, `batch` at a time."""
    for part in torch.split(torch.arange(len(patches), device="cpu"), batch):
        yield patches.cut(part)
