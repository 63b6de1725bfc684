"""The image job's data: digits, shapes, CIFAR files, folders of classes, and what is wrong with them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from orchestrator.jobs import build_job
from orchestrator.jobs.image import ImageJob
from orchestrator.jobs.image_data import SHAPES, LabelledImages, from_folder, shapes
from orchestrator.jobs.vision import ResidualNet, VisionTransformer, group_norm

CPU = torch.device("cpu")


def image_job(**params: object) -> ImageJob:
    job = build_job("image", {"width": 16, "layers": 1, "heads": 2, **params})
    assert isinstance(job, ImageJob)
    return job


def random_images(count: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32)).astype(np.uint8)


def write_pictures(root: Path, names: list[str], size: tuple[int, int] = (40, 36)) -> None:
    image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.new("RGB", size, (i * 9 % 256, 100, 200)).save(path)


# Made data.


def test_a_drawn_shape_depends_on_seed_and_number_alone() -> None:
    few, many = shapes(3, None, 10), shapes(3, None, 50)
    assert torch.equal(few.train, many.train[:10])
    assert torch.equal(few.train_labels, many.train_labels[:10])
    assert torch.equal(few.held_out, many.held_out)
    assert not torch.equal(shapes(4, None, 10).train, few.train)
    assert set(many.held_out_labels.tolist()) == set(range(len(SHAPES)))


def test_shapes_of_another_size_are_drawn_at_that_size() -> None:
    assert shapes(0, 24, 4).train.shape == (4, 1, 24, 24)


def test_digits_are_those_of_scikit_learn_with_every_fifth_held_out() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="digits come with scikit-learn")
    images = image_job().images
    assert isinstance(images, LabelledImages)
    assert (len(images.train), len(images.held_out)) == (1438, 359)
    assert images.held_out_labels.tolist() == datasets.load_digits().target[4::5].tolist()
    assert (image_job(size=16).num_train_samples, image_job(size=16).images.shape) == (1438, (1, 16))
    assert image_job(max_samples=100).num_train_samples == 100


def test_batches_are_normalised() -> None:
    job = image_job(data="shapes", patch=4)
    images, labels = job.batch(range(2048), CPU)
    assert abs(images.mean().item()) < 0.05
    assert images.std().item() == pytest.approx(1.0, abs=0.05)
    assert labels.dtype == torch.int64


def test_evaluation_looks_at_pictures_spread_over_the_held_out_part() -> None:
    job = image_job(data="shapes", patch=4, eval_samples=2)
    torch.manual_seed(0)
    model = job.build_model()
    held_out, labels = job.images.held_out[[0, 511]], job.images.held_out_labels[[0, 511]]
    mean, std = job._mean_and_std
    expected = torch.nn.functional.cross_entropy(model((held_out.float() - mean) / std), labels).item()
    assert job.evaluate(model, CPU)["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_side_that_the_patch_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"16 x 16 pixels cannot be cut into patches of 3"):
        image_job(data="shapes", patch=3).prepare()
    image_job(data="shapes", patch=3, model="resnet").prepare()


# CIFAR.


def write_cifar(folder: Path, form: str, count: int = 6) -> npt.NDArray[np.uint8]:
    """Files of one of the four forms; returns the first training file's images."""
    folder.mkdir(exist_ok=True, parents=True)
    labels = np.arange(count) % 10
    binary, ten = form.endswith("bin"), form.startswith("10-")
    names = ["data_batch_1", "data_batch_2", "test_batch"] if ten else ["train", "test"]
    for number, name in enumerate(names):
        images = random_images(count, number).reshape(count, -1)
        if binary:
            fine = labels[:, None]
            both = fine if ten else np.concatenate([np.full_like(fine, 7), fine], axis=1)
            (folder / f"{name}.bin").write_bytes(np.concatenate([both, images], axis=1).astype(np.uint8).tobytes())
        else:
            key = b"labels" if ten else b"fine_labels"
            (folder / name).write_bytes(pickle.dumps({b"data": images, key: labels.tolist()}, protocol=2))
    return random_images(count, 0)


@pytest.mark.parametrize(
    ("form", "inner"), [("10-bin", ""), ("10-py", "cifar-10-batches-py"), ("100-bin", ""), ("100-py", "")]
)
def test_the_four_forms_of_cifar_are_read(tmp_path: Path, form: str, inner: str) -> None:
    first = write_cifar(tmp_path / inner, form)
    images = from_folder(str(tmp_path), None, "stop")
    assert torch.equal(images.train[:6], torch.from_numpy(first))
    assert len(images.train) == (12 if form.startswith("10-") else 6)
    assert images.train_labels[:6].tolist() == [0, 1, 2, 3, 4, 5]
    assert len(images.classes) == (10 if form.startswith("10-") else 100)
    assert len(images.held_out) == 6


def test_a_batch_of_cifar_that_would_run_code_is_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path, "10-py")
    (tmp_path / "data_batch_2").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match=r"data_batch_2 cannot be read: it is no CIFAR batch: it asks for os\.system"):
        from_folder(str(tmp_path), None, "stop")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are no whole number of records of 3073 bytes"),
        (b"\0" * 3000, "3000 bytes"),
        (b"\x0b" + b"\0" * 3072, "labels go up to 11; allowed: 0 to 9"),
    ],
)
def test_a_torn_binary_batch_is_named_or_left_out(tmp_path: Path, content: bytes, message: str) -> None:
    write_cifar(tmp_path, "10-bin")
    (tmp_path / "data_batch_2.bin").write_bytes(content)
    with pytest.raises(ValueError, match=rf"data_batch_2\.bin cannot be read: .*{message}"):
        from_folder(str(tmp_path), None, "stop")
    assert len(from_folder(str(tmp_path), 16, "skip").train) == 6


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps([1]), pickle.dumps({b"data": [1]}), b"\x80\x02}"])
def test_a_torn_python_batch_is_named(tmp_path: Path, content: bytes) -> None:
    write_cifar(tmp_path, "10-py")
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match="test_batch cannot be read: "):
        from_folder(str(tmp_path), None, "stop")
    with pytest.raises(ValueError, match="no usable file among test_batch"):
        from_folder(str(tmp_path), None, "skip")


# Folders of classes.


def test_a_folder_per_class_is_split_by_path(tmp_path: Path) -> None:
    write_pictures(tmp_path, [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(40)])
    (tmp_path / "cat" / "notes.txt").write_text("not a picture")
    images = from_folder(str(tmp_path), None, "stop")
    assert images.classes == ("cat", "dog")
    assert images.train.shape[1:] == (3, 32, 32)
    assert len(images.train) + len(images.held_out) == 80
    assert 2 < len(images.held_out) < 30
    assert images.train_labels.float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_train_and_val_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["train/a/1.png", "train/a/2.jpg", "train/b/x/3.png", "val/b/4.png", "train/loose.png"])
    images = from_folder(str(tmp_path), 8, "stop")
    assert (images.train_labels.tolist(), images.held_out_labels.tolist()) == ([0, 0, 1], [1])
    assert images.train[2, :, 4, 4].tolist() == [18, 100, 200]


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n torn"])
def test_a_broken_picture_is_named_or_left_out(tmp_path: Path, content: bytes) -> None:
    write_pictures(tmp_path, ["train/a/1.png", "train/b/2.png", "val/b/4.png"])
    (tmp_path / "train" / "a" / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"train/a/bad\.png cannot be read: "):
        from_folder(str(tmp_path), None, "stop")
    assert len(from_folder(str(tmp_path), None, "skip").train) == 2


def test_a_truncated_picture_is_a_broken_one(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["train/a/1.png", "train/b/2.png", "val/b/4.png"], size=(300, 300))
    torn = tmp_path / "train" / "a" / "1.png"
    torn.write_bytes(torn.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"a/1\.png cannot be read: "):
        from_folder(str(tmp_path), None, "stop")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "has 0 folders with images"),
        (["a/1.png"], "has 1 folders with images .* at least two folders, one per class"),
        (["train/a/1.png", "train/b/1.png", "val/none.png"], "has no usable held-out image"),
    ],
)
def test_a_folder_that_cannot_be_used_says_what_is_needed(tmp_path: Path, names: list[str], message: str) -> None:
    write_pictures(tmp_path, names)
    with pytest.raises(ValueError, match=message):
        image_job(data_dir=str(tmp_path)).prepare()


def test_pictures_of_a_folder_are_trained_on(tmp_path: Path) -> None:
    write_pictures(tmp_path, [f"{part}/{name}/{i}.png" for part in ("train", "val") for name in "ab" for i in range(3)])
    job = image_job(data_dir=str(tmp_path), size=8, patch=4)
    job.prepare()
    terms = job.loss(job.build_model(), job.batch([0, 5], CPU))
    assert terms.num_elements == 2
    assert 0 <= job.evaluate(job.build_model(), CPU)["val_accuracy"] <= 1


# Networks.


def test_groups_divide_the_channels() -> None:
    assert [group_norm(channels).num_groups for channels in (8, 12, 5, 64)] == [8, 4, 1, 8]


def test_a_residual_net_halves_the_side_twice_and_a_transformer_sees_every_patch() -> None:
    net = ResidualNet(channels=3, width=8, blocks_per_stage=2, num_classes=5)
    assert len(net.blocks) == 6
    assert net(torch.zeros(2, 3, 12, 12)).shape == (2, 5)
    vit = VisionTransformer(channels=3, side=12, patch=4, width=8, layers=1, heads=2, num_classes=5)
    picture = torch.zeros(1, 3, 12, 12, requires_grad=True)
    vit(picture).sum().backward()
    assert picture.grad is not None
    assert (picture.grad != 0).all()


def test_two_parts_are_kept_apart() -> None:
    part = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    images = LabelledImages(
        train=part, train_labels=torch.zeros(3), held_out=part, held_out_labels=torch.zeros(3), classes=("a",)
    )
    assert images.first(None) is images.first(3) is images
    assert (len(images.first(2).train), len(images.first(2).held_out)) == (2, 3)
