"""A job that reads its samples while it trains, in a whole run: loader processes inside a slot, and a broken file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.integration.runs import call, results, run_file, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_loader_processes_serve_trials_in_turn_and_a_broken_picture_is_named_in_each_log(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
    for part, count in (("train", 40), ("val", 8)):
        for label, name in enumerate("ab"):
            (tmp_path / "pictures" / part / name).mkdir(parents=True)
            for i in range(count):
                values = np.random.default_rng(i).integers(0, 128, (16, 16, 3)) + 100 * label
                image.fromarray(values.astype(np.uint8)).save(tmp_path / "pictures" / part / name / f"{i}.png")
    (tmp_path / "pictures" / "train" / "a" / "torn.png").write_bytes(b"no picture")
    params = {"data_dir": str(tmp_path / "pictures"), "size": 8, "loader_processes": 1, "on_bad_file": "skip"}
    run = start(
        "run",
        str(
            run_file(
                tmp_path / "pictures.yaml",
                job={"name": "image", "params": {**params, "width": 16, "layers": 1, "heads": 2}},
                search={"space": {"lr": {"choice": [0.001, 0.003]}}, "num_trials": 2, "max_concurrent": 1},
                trial={"samples_per_report": 160, "max_reports": 2, "micro_batch": 8},
                dials={"precision": {"enabled": False}, "batch": {"min_global": 8, "max_global": 16, "max_micro": 16}},
                policy={"name": "goodput", "params": {"cooldown_s": 0.5}},
            )
        ),
        "--plain",
        run_dir=tmp_path / "runs" / "r",
    )
    code, output = run.end()
    assert code == 0, output
    assert run.of("run_ended")[-1]["leaks"] == {"actors": 0, "placement_groups": 0, "processes": 0}
    found = results(run.run_dir)
    assert len(found) == 4
    assert all(num_samples >= 160 * (index + 1) for (_, index), (_, num_samples, _) in found.items())
    for path in (run.run_dir / "trials").glob("*/log.txt"):
        log = path.read_text()
        assert "train/a/torn.png" in log
        assert "1 of 81 files below" in log
        assert " left child[" not in log
        assert " left thread[" not in log
    checked = call("verify", str(run.run_dir))
    assert checked.returncode == 0, checked.stdout
