"""Commits of one rank: durable, verified, kept few, and refused where they would not be worth having."""

import hashlib
import json
import logging
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from orchestrator.errors import CheckpointError
from orchestrator.train import checkpoint, manifest


def build(seed: int = 0, lr: float = 0.01) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 1))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=lr)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(torch.randn(8, 4) + random.random() + np.random.rand()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def commit(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, **extra: Any) -> Path:
    return checkpoint.commit(
        directory,
        model=model,
        optimizer=optimizer,
        extra={"step": step, **extra},
        rank=0,
        world_size=1,
        group=None,
    )


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return checkpoint.load(path, model=model, optimizer=optimizer, rank=0, world_size=1, group=None)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_training_goes_on_bit_for_bit_after_a_load(tmp_path: Path) -> None:
    model, optimizer = build()
    train(model, optimizer, 3)
    path = commit(tmp_path / "trial", model, optimizer, 3, position=24, rate={"ramp_from": 1.5}, batches=[8, 16])
    straight = train(model, optimizer, 4)
    again, again_optimizer = build(seed=5, lr=0.5)
    train(again, again_optimizer, 1)
    extra = load(path, again, again_optimizer)
    assert extra == {"step": 3, "position": 24, "rate": {"ramp_from": 1.5}, "batches": [8, 16]}
    assert train(again, again_optimizer, 4) == straight
    wanted, got = state_of(model), state_of(again)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_a_commit_before_the_first_step_loads_an_untouched_optimizer(tmp_path: Path) -> None:
    model, optimizer = build()
    path = commit(tmp_path, model, optimizer, 0)
    straight = train(model, optimizer, 3)
    again, again_optimizer = build(seed=5)
    load(path, again, again_optimizer)
    assert not again_optimizer.state
    assert train(again, again_optimizer, 3) == straight


def test_saving_does_not_disturb_the_generators(tmp_path: Path) -> None:
    model, optimizer = build()
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    commit(tmp_path, model, optimizer, 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_plain_sgd_is_kept_too(tmp_path: Path, momentum: float) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(2)
        model = nn.Linear(4, 1)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)

    model, optimizer = make()
    train(model, optimizer, 2)
    path = commit(tmp_path, model, optimizer, 2)
    straight = train(model, optimizer, 2)
    again = make()
    load(path, *again)
    assert train(*again, 2) == straight


def test_a_fused_optimizer_stays_fused_and_a_plain_one_plain(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    fused = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    x = torch.ones(2, 3)
    model(x).sum().backward()
    fused.step()
    path = commit(tmp_path, model, fused, 1)
    plain = torch.optim.AdamW(model.parameters(), lr=0.7)
    load(path, model, plain)
    assert plain.param_groups[0]["fused"] is None
    assert plain.param_groups[0]["lr"] == 0.1
    assert plain.param_groups[0]["betas"] == (0.9, 0.999)
    plain.step()
    assert float(plain.state[model.weight]["step"]) == 2


def test_a_learning_rate_held_in_a_tensor_is_filled_in_place(tmp_path: Path) -> None:
    model, held = nn.Linear(3, 1), torch.tensor(0.25)
    optimizer = torch.optim.Adam(model.parameters(), lr=held, capturable=True, foreach=False)
    path = commit(tmp_path, model, optimizer, 1)
    held.fill_(0.5)
    load(path, model, optimizer)
    assert optimizer.param_groups[0]["lr"] is held
    assert float(held) == 0.25


def test_the_same_commit_twice_is_one(tmp_path: Path) -> None:
    model, optimizer = build()
    first = commit(tmp_path, model, optimizer, 4)
    before = (first / "manifest.json").stat().st_mtime_ns
    assert commit(tmp_path, model, optimizer, 4) == first
    assert (first / "manifest.json").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]


def test_a_damaged_commit_is_written_anew(tmp_path: Path) -> None:
    model, optimizer = build()
    path = commit(tmp_path, model, optimizer, 4)
    (path / "rng_rank0.pt").write_bytes(b"")
    assert commit(tmp_path, model, optimizer, 4) == path
    assert checkpoint.verify(path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]


def test_two_commits_are_kept_and_leftovers_removed(tmp_path: Path) -> None:
    model, optimizer = build()
    (tmp_path / "step-1.tmp-0123456789ab").mkdir()
    (tmp_path / "notes").mkdir()
    for step in (1, 2, 10):
        commit(tmp_path, model, optimizer, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-10", "step-2"]


def test_commits_of_an_abandoned_course_are_removed(tmp_path: Path) -> None:
    model, optimizer = build()
    commit(tmp_path, model, optimizer, 10)
    commit(tmp_path, model, optimizer, 20)
    commit(tmp_path, model, optimizer, 15)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-15"]


def damage(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def test_behind_a_damaged_commit_the_newest_whole_one_is_loaded_and_the_cost_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The trial had failed for good, with a whole commit beside the damaged one."""
    model, optimizer = build()
    good = commit(tmp_path, model, optimizer, 7, note="good")
    before = state_of(model)
    train(model, optimizer, 3)
    bad = commit(tmp_path, model, optimizer, 10, note="bad")
    assert checkpoint.newest_whole(bad)[0] == bad
    damage(bad)
    train(model, optimizer, 2)
    with caplog.at_level(logging.WARNING):
        extra = load(bad, model, optimizer)
    assert extra == {"step": 7, "note": "good"}
    assert all(torch.equal(value, before[name]) for name, value in state_of(model).items())
    assert f"going on from {good}, 3 steps are done again" in caplog.text
    assert str(bad) in caplog.text
    damage(good)
    with pytest.raises(CheckpointError, match="step-10"):
        load(bad, model, optimizer)


def test_a_later_commit_never_stands_in_for_an_earlier_one(tmp_path: Path) -> None:
    """It belongs to a course that the trial has left."""
    model, optimizer = build()
    early = commit(tmp_path, model, optimizer, 5)
    commit(tmp_path, model, optimizer, 9)
    damage(early)
    with pytest.raises(CheckpointError, match="step-5"):
        load(early, model, optimizer)


def test_every_single_bit_flip_is_found(tmp_path: Path) -> None:
    model, optimizer = build()
    train(model, optimizer, 1)
    path = commit(tmp_path, model, optimizer, 1, position=8)
    files = sorted(file for file in path.iterdir())
    draw = random.Random(20)
    flips = [(file, draw.randrange(file.stat().st_size * 8)) for file in draw.choices(files, k=100)]
    assert {file.name for file, _ in flips} == {"manifest.json", ".metadata", "__0_0.distcp", "rng_rank0.pt"}
    for file, bit in flips:
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        file.write_bytes(damaged)
        assert checkpoint.verify(path) != [], f"bit {bit} of {file.name}"
        file.write_bytes(whole)
    assert checkpoint.verify(path) == []


def test_many_tensors_go_into_several_files_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_BYTES_PER_FILE", 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    model, optimizer = build()
    train(model, optimizer, 2)
    path = commit(tmp_path, model, optimizer, 2)
    files = sorted(path.glob("*.distcp"))
    assert [file.name for file in files] == ["__0_0.distcp", "__0_1.distcp", "__0_2.distcp"], "a file for each core"
    other, other_optimizer = build(seed=1)
    load(path, other, other_optimizer)
    assert all(torch.equal(value, state_of(other)[name]) for name, value in state_of(model).items())
    files[1].write_bytes(files[1].read_bytes()[:-1])
    assert checkpoint.verify(path) != []


def test_a_damaged_commit_is_refused_before_anything_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (tmp_path / "sprung",)  # type: ignore[return-value]

    model, optimizer = build()
    path = commit(tmp_path, model, optimizer, 1)
    (path / ".metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match=r"\.metadata has .* bytes"):
        load(path, model, optimizer)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "..", "sub/../../file", "sub//file", "./file"])
def test_a_manifest_cannot_name_a_file_elsewhere(tmp_path: Path, name: str) -> None:
    model, optimizer = build()
    path = commit(tmp_path, model, optimizer, 1)
    record = manifest.read(path)
    entry = manifest.FileEntry(name=name, size_bytes=0, sha256=hashlib.sha256(b"").hexdigest())
    forged = {field: getattr(record, field) for field in manifest.Manifest.__dataclass_fields__}
    forged["files"] = (*record.files, entry)
    (path / "manifest.json").write_bytes(manifest.encode(manifest.Manifest(**forged)))
    assert any("not a plain name" in problem for problem in checkpoint.verify(path))


def test_a_link_is_not_a_file_of_a_commit(tmp_path: Path) -> None:
    model, optimizer = build()
    path = commit(tmp_path, model, optimizer, 1)
    (path / "rng_rank0.pt").rename(tmp_path / "elsewhere")
    (path / "rng_rank0.pt").symlink_to(tmp_path / "elsewhere")
    assert any("not a regular file" in problem for problem in checkpoint.verify(path))


def test_a_commit_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    model, optimizer = build()
    path = commit(tmp_path, model, optimizer, 1)
    shutil.copytree(path, tmp_path / "step-7")
    assert any("manifest is of step 1" in problem for problem in checkpoint.verify(tmp_path / "step-7"))
    shutil.copytree(path, tmp_path / "other")
    assert any("not named like a commit" in problem for problem in checkpoint.verify(tmp_path / "other"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_parameters_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    model, optimizer = build()
    with torch.no_grad():
        dict(model.named_parameters())["3.bias"].fill_(value)
    with pytest.raises(CheckpointError, match=r"'3\.bias' is not finite"):
        commit(tmp_path, model, optimizer, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [-1, 1.5, "1", True, None, "../../1"])
def test_a_step_that_names_no_commit_is_refused(tmp_path: Path, step: Any) -> None:
    with pytest.raises(CheckpointError, match="names no commit"):
        commit(tmp_path, *build(), step)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, torch.ones(1)])
def test_what_is_not_json_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match="allowed: str, int, finite float"):
        commit(tmp_path, *build(), 1, thing=value)
    assert list(tmp_path.iterdir()) == []


def test_another_model_optimizer_or_grouping_is_refused_by_name(tmp_path: Path) -> None:
    model, optimizer = build()
    train(model, optimizer, 1)
    path = commit(tmp_path, model, optimizer, 1)
    wider = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 1))
    with pytest.raises(CheckpointError, match=r"does not fit the model in 7 tensors \(model\.0\.bias"):
        load(path, wider, torch.optim.AdamW(wider.parameters()))
    with pytest.raises(CheckpointError, match="holds state of AdamW, the trial uses SGD"):
        load(path, model, torch.optim.SGD(model.parameters()))
    with pytest.raises(CheckpointError, match=r"groups differ.*\[2, 4\].*\[6\]"):
        load(path, model, torch.optim.AdamW(model.parameters()))


def test_an_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="are not the model's"):
        commit(tmp_path, build()[0], build()[1], 1)


def test_a_directory_that_cannot_be_written_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot commit to"):
        commit(tmp_path / "file", *build(), 1)


def test_the_manifest_says_what_is_in_the_commit(tmp_path: Path) -> None:
    path = commit(tmp_path, *build(), 6, position=48)
    body = json.loads((path / "manifest.json").read_bytes())["manifest"]
    assert (body["schema"], body["step"], body["world_size"]) == (manifest.SCHEMA, 6, 1)
    assert body["extra"] == {"step": 6, "position": 48}
    assert body["torch_version"] == str(torch.__version__)
    assert {entry["name"] for entry in body["files"]} == {p.name for p in path.iterdir()} - {"manifest.json"}
