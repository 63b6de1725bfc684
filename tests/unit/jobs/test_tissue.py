"""The tissue job's pictures, masks and patches, and what is wrong with a folder of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.jobs import build_job
from orchestrator.jobs.folder import is_held_out
from orchestrator.jobs.tissue import TissueJob
from orchestrator.jobs.tissue_data import HELD_OUT_PER_256, bundled, from_folder, patches_of

CPU = torch.device("cpu")


def tissue_job(**params: object) -> TissueJob:
    job = build_job("tissue", {"width": 4, "levels": 2, "size": 16, **params})
    assert isinstance(job, TissueJob)
    return job


def write_pair(root: Path, name: str, size: tuple[int, int] = (24, 20)) -> None:
    image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
    (root / "images").mkdir(exist_ok=True)
    (root / "masks").mkdir(exist_ok=True)
    mask = np.zeros(size[::-1], dtype=np.uint8)
    mask[:, 10:] = 255
    image.fromarray(np.stack([mask, mask // 2, 255 - mask], axis=-1)).save(root / "images" / f"{name}.png")
    image.fromarray(mask).save(root / "masks" / f"{name}.png")


def names(count: int, *, held_out: bool) -> list[str]:
    """That many names of pictures that belong to one of the parts."""
    return [f"p{i}" for i in range(500) if is_held_out(f"p{i}", HELD_OUT_PER_256) == held_out][:count]


def write_folder(root: Path) -> None:
    for name in names(2, held_out=False) + names(1, held_out=True):
        write_pair(root, name)


# Patches.


def test_patches_are_cut_where_they_lie_in_each_picture() -> None:
    draw = np.random.default_rng(0)
    pictures = [
        (draw.integers(0, 256, (*shape, 3)).astype(np.uint8), draw.random(shape) < 0.5) for shape in ((8, 12), (9, 7))
    ]
    patches = patches_of(pictures, 4, 4)
    assert len(patches) == 6 + 3 * 2
    pixels, mask = patches.cut(torch.arange(len(patches)))
    for number, (picture, top, left) in enumerate(
        [(0, 0, 0), (0, 0, 4), (0, 0, 8), (0, 4, 0), (0, 4, 4), (0, 4, 8)]
        + [(1, top, left) for top in (0, 4, 5) for left in (0, 3)]
    ):
        expected, truth = pictures[picture]
        square = np.s_[top : top + 4, left : left + 4]
        assert np.array_equal(pixels[number].permute(1, 2, 0).numpy(), expected[square])
        assert np.array_equal(mask[number].numpy().astype(bool), truth[square])


def test_a_picture_smaller_than_a_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="8 x 3 pixels is smaller than a patch of size=4"):
        patches_of([(np.zeros((3, 8, 3), dtype=np.uint8), np.zeros((3, 8), dtype=bool))], 4, 4)


def test_drawn_cells_follow_from_the_seed_alone() -> None:
    cells = bundled("cells", 16, 1)
    bundled.cache_clear()
    again, other = bundled("cells", 16, 1), bundled("cells", 16, 2)
    assert torch.equal(cells.train.pixels, again.train.pixels)
    assert not torch.equal(cells.train.pixels, other.train.pixels)
    assert 0.1 < cells.held_out.mask.float().mean().item() < 0.4


@pytest.mark.parametrize(("data", "side"), [("ihc", 512), ("fundus", 706)])
def test_the_two_parts_of_a_bundled_picture_are_two_regions(data: str, side: int) -> None:
    pytest.importorskip("skimage", reason="the picture comes with scikit-image")
    tissue = bundled(data, 32, 0)
    column = side * 3 // 4
    assert len(tissue.train.pixels) == side * column
    assert len(tissue.held_out.pixels) == side * (side - column)
    assert tissue.train.row[0] == column
    for part in (tissue.train, tissue.held_out):
        assert 0.02 < part.mask.float().mean().item() < 0.6


def test_a_patch_larger_than_the_held_out_region_is_refused() -> None:
    pytest.importorskip("skimage", reason="the picture comes with scikit-image")
    with pytest.raises(ValueError, match=r"size=256 is larger than the held-out part .* at most 128"):
        tissue_job(data="ihc", size=256).prepare()


def test_a_size_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(ValueError, match="size=18 cannot be halved levels=2 times; allowed: a multiple of 4"):
        tissue_job(data="cells", size=18).prepare()


def test_dice_is_that_of_all_held_out_pixels_together() -> None:
    job = tissue_job(data="cells")

    class RedIsLow(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -x[:, :1]

    pixels, mask = job.tissue.held_out.cut(torch.arange(len(job.tissue.held_out)))
    mean, _ = job._mean_and_std
    marked, truth = pixels[:, 0].float() < mean[0, 0, 0], mask.bool()
    expected = 2 * (marked & truth).sum().item() / (marked.sum() + truth.sum()).item()
    result = job.evaluate(RedIsLow(), CPU)
    assert result["val_dice"] == pytest.approx(expected)
    assert result["val_marked_ratio"] == pytest.approx(marked.float().mean().item())


# Folders.


def test_pictures_and_masks_are_paired_by_name(tmp_path: Path) -> None:
    write_folder(tmp_path)
    tissue = from_folder(str(tmp_path), 16, "stop")
    pixels, mask = tissue.train.cut(torch.tensor([0, len(tissue.train) - 1]))
    assert mask[0, 0].tolist() == [0] * 10 + [1] * 6
    assert torch.equal(pixels[:, 0], mask * 255)
    assert len(tissue.held_out.pixels) == 24 * 20
    job = tissue_job(data_dir=str(tmp_path))
    job.prepare()
    assert job.loss(job.build_model(), job.batch([0, 1], CPU)).num_elements == 512


@pytest.mark.parametrize(
    ("mask", "message"),
    [(None, r"it has no mask; needed: .*masks/"), (b"torn", "cannot identify image"), ((9, 9), "another size")],
)
def test_a_picture_without_a_good_mask_is_named_or_left_out(tmp_path: Path, mask: object, message: str) -> None:
    write_folder(tmp_path)
    bad = names(3, held_out=False)[2]
    write_pair(tmp_path, bad)
    path = tmp_path / "masks" / f"{bad}.png"
    path.unlink()
    if isinstance(mask, bytes):
        path.write_bytes(mask)
    elif isinstance(mask, tuple):
        pytest.importorskip("PIL.Image").new("L", mask).save(path)
    with pytest.raises(ValueError, match=rf"images/{bad}\.png cannot be read: .*{message}"):
        from_folder(str(tmp_path), 16, "stop")
    assert len(from_folder(str(tmp_path), 16, "skip").train.pixels) == 2 * 24 * 20


def test_a_picture_smaller_than_a_patch_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be read: it has 24 x 20 pixels, less than a patch of size=32"):
        from_folder(str(tmp_path), 32, "stop")


def test_too_few_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no picture in a folder `images`"):
        from_folder(str(tmp_path), 16, "stop")
    write_pair(tmp_path, names(1, held_out=False)[0])
    with pytest.raises(ValueError, match="1 pictures and no usable held-out one"):
        from_folder(str(tmp_path), 16, "stop")
