"""Pictures of class folders that stay on disk: decoded by loader processes while a network trains on them.

Each file's beginning is looked at once; one that turns out to be broken behind it stops the trial, or counts as a
sample without loss. Held-out pictures are decoded at the start. Knows nothing of models. Called by `jobs.image`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from orchestrator.jobs.folder import existing_folder
from orchestrator.jobs.image_data import FOLDER_SIZE, mean_and_std
from orchestrator.jobs.loading import MapLoader
from orchestrator.jobs.pictures import Bytes, PictureDataset, check_header, class_files, evenly, read_image, usable
from orchestrator.jobs.remember import remembered

logger = logging.getLogger(__name__)

MAX_MEASURED = 512
"""Training pictures that are decoded at the start, for the mean and spread of each channel."""

NO_LABEL = -100
"""The label of a broken picture: torch's cross-entropy counts nothing for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureFiles:
    """What is known of a folder's pictures without decoding those that are trained on.

    Attributes:
        dataset: the training pictures, by number.
        mean_and_std: of each channel over some of them, see `jobs.image_data.mean_and_std`.
        train_labels: (N,) int64.
        held_out: (M, 3, S, S) uint8, decoded.
        held_out_labels: (M,) int64.
        classes: name of each label.
    """

    dataset: PictureDataset
    mean_and_std: tuple[Tensor, Tensor]
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    classes: tuple[str, ...]


@remembered(maxsize=2)
def look_through(
    data_dir: str, size: int | None, on_bad_file: str, max_samples: int | None, eval_samples: int
) -> PictureFiles:
    """The pictures of a folder per class, of the held-out ones `eval_samples` at most. Cached per process.

    Raises:
        ValueError: no such folder, nothing usable in it, or a broken file and `on_bad_file` is 'stop'.
    """
    root = existing_folder(data_dir)
    side = size or FOLDER_SIZE

    def decode(path: Path) -> Bytes:
        return read_image(path, side)

    files = class_files(root, max_samples)
    train = [file for file, _ in usable(files, "training", check_header, on_bad_file)]
    held_out = usable(replace(files, held_out=evenly(files.held_out, eval_samples)), "held-out", decode, on_bad_file)
    measured = usable(replace(files, train=evenly(train, MAX_MEASURED)), "training", decode, on_bad_file)
    logger.info(
        "pictures below %s stay on disk: %d classes, %d training, %d held-out in memory",
        root,
        len(files.classes),
        len(train),
        len(held_out),
    )
    return PictureFiles(
        dataset=PictureDataset(root=root, paths=tuple(path for path, _ in train), size=side, on_bad_file=on_bad_file),
        mean_and_std=mean_and_std(torch.from_numpy(np.stack([image for _, image in measured]))),
        train_labels=torch.tensor([label for _, label in train], device="cpu"),
        held_out=torch.from_numpy(np.stack([image for _, image in held_out])),
        held_out_labels=torch.tensor([label for (_, label), _ in held_out], device="cpu"),
        classes=files.classes,
    )


class LoadedPictures:
    """The pictures of one trial, read by its own loader processes."""

    def __init__(self, files: PictureFiles, num_processes: int) -> None:
        self._files = files
        self.held_out, self.held_out_labels = files.held_out, files.held_out_labels
        self.classes, self.mean_and_std = files.classes, files.mean_and_std
        self.loader: MapLoader[Bytes | None] = MapLoader(files.dataset, num_processes=num_processes)
        self._broken: set[int] = set()

    def __len__(self) -> int:
        return len(self._files.dataset)

    @property
    def shape(self) -> tuple[int, int]:
        """Channels and side of a picture."""
        return 3, self._files.dataset.size

    def cut(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The training pictures of those numbers, (B, 3, S, S) uint8, and their labels (B,).

        Raises:
            ValueError: one of them is broken and such files stop the trial.
        """
        numbers = indices.tolist()
        pictures = self.loader.fetch(numbers)
        labels = self._files.train_labels[indices]
        channels, side = self.shape
        pixels = np.zeros((len(numbers), channels, side, side), dtype=np.uint8)
        for place, (number, picture) in enumerate(zip(numbers, pictures, strict=True)):
            if picture is None:
                labels[place] = NO_LABEL
                self._say_broken(number)
            else:
                pixels[place] = picture
        return torch.from_numpy(pixels), labels

    def _say_broken(self, number: int) -> None:
        """Name a broken picture the first time it is met."""
        if number not in self._broken:
            self._broken.add(number)
            dataset = self._files.dataset
            logger.warning(
                "%s cannot be decoded: it counts as a sample without loss", dataset.root / dataset.paths[number]
            )
