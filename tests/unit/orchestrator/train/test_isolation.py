"""Nothing that a trial leaves in its process reaches the next one."""

import gc
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

from orchestrator.train.isolation import ProcessState, seed_generators


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    """Whatever a test does or fails to undo, the tests after it get the process as it was."""
    state = ProcessState.capture()
    yield
    state.restore(0)


def make_dirty(directory: Path) -> None:
    """All that a careless trial might do."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_grad_enabled(False)
    torch.autograd.set_detect_anomaly(True, check_nan=False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    torch.set_autocast_enabled("cpu", True)
    torch.set_autocast_dtype("cpu", torch.float16)
    torch.set_autocast_cache_enabled(False)
    np.seterr(all="ignore")
    os.environ["LEFT_BY_A_TRIAL"] = "1"
    os.environ["HOME"] = "/nowhere"
    os.chdir(directory)
    os.umask(0o007)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    sys.path.insert(0, "/nowhere")
    sys.setrecursionlimit(sys.getrecursionlimit() + 17)
    sys.stdout = sys.stderr
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.CRITICAL)
    logging.getLogger().addHandler(logging.NullHandler())
    logging.disable(logging.ERROR)
    gc.disable()
    gc.set_threshold(1, 2, 3)


DIRT = {
    "torch.default_dtype",
    "torch.default_device",
    "torch.num_threads",
    "torch.grad_enabled",
    "torch.anomaly_enabled",
    "torch.deterministic",
    "torch.float32_matmul_precision",
    "torch.backends.cudnn.benchmark",
    "torch.autocast[cpu]",
    "torch.autocast_dtype[cpu]",
    "torch.autocast_cache",
    "numpy.errors",
    "os.environ[LEFT_BY_A_TRIAL]",
    "os.environ[HOME]",
    "os.cwd",
    "os.umask",
    "signal[SIGUSR1]",
    "sys.path",
    "sys.recursion_limit",
    "sys.stdout",
    "warnings.filters",
    "logging.root_level",
    "logging.root_handlers",
    "logging.disabled",
    "gc.enabled",
    "gc.threshold",
}


def test_a_clean_process_has_no_leaks() -> None:
    clean = ProcessState.capture()
    assert clean.leaks() == ()
    assert clean.restore(3) == ()
    assert clean.leaks() == ()


def test_a_dirty_trial_is_named_in_full_and_undone_in_full(tmp_path: Path) -> None:
    clean = ProcessState.capture()
    make_dirty(tmp_path)
    found = set(clean.leaks())
    left = clean.restore(3)
    assert found >= DIRT
    assert {name for name in found - DIRT if not name.startswith("torch.backends.")} == set()
    assert left == ()
    assert clean.leaks() == ()
    assert torch.randn(1).dtype is torch.float32
    assert torch.ones(1).device == torch.device("cpu")


def test_after_a_dirty_trial_the_next_one_draws_the_numbers_of_a_fresh_process(tmp_path: Path) -> None:
    clean = ProcessState.capture()

    def draw() -> tuple[float, float, float]:
        return float(torch.rand(1)), random.random(), float(np.random.rand())

    clean.restore(9)
    first = draw()
    make_dirty(tmp_path)
    assert clean.restore(9) == ()
    assert draw() == first
    clean.restore(10)
    assert draw() != first


def test_new_and_old_precision_settings_mixed_by_a_trial_are_undone() -> None:
    clean = ProcessState.capture()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert "torch.backends.cuda.matmul.fp32_precision" in clean.leaks()
    assert clean.restore(0) == ()
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_working_directory_that_was_removed_is_left(tmp_path: Path) -> None:
    clean = ProcessState.capture()
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    assert clean.leaks() == ("os.cwd",)
    assert clean.restore(0) == ()


def test_a_thread_still_alive_is_reported_until_it_ends() -> None:
    clean = ProcessState.capture()
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="left-behind", daemon=True)
    thread.start()
    assert clean.leaks() == ("thread[left-behind]",)
    assert clean.restore(0) == ("thread[left-behind]",)
    end.set()
    thread.join()
    assert clean.leaks() == ()


def test_a_child_process_still_alive_is_reported() -> None:
    clean = ProcessState.capture()
    child = multiprocessing.get_context("fork").Process(target=signal.pause, name="left-behind")
    child.start()
    try:
        assert "child[left-behind]" in clean.restore(0)
    finally:
        child.kill()
        child.join()
    assert not any(name.startswith("child[") for name in clean.leaks())


def test_process_groups_of_a_trial_are_destroyed(tmp_path: Path) -> None:
    clean = ProcessState.capture()
    dist.init_process_group("gloo", store=FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    dist.new_group([0])
    assert sum(name.startswith("process_group[") for name in clean.leaks()) == 2
    assert clean.restore(0) == ()
    assert not dist.is_initialized()


def test_the_slots_own_process_group_is_kept_and_the_trials_destroyed(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        state = ProcessState.capture()
        dist.new_group([0])
        assert len(state.leaks()) == 1
        assert state.restore(0) == ()
        dist.barrier()
    finally:
        dist.destroy_process_group()
    assert [name for name in state.leaks() if name.startswith("process_group[")] != []


def test_outside_the_main_thread_a_changed_signal_handler_is_reported() -> None:
    clean = ProcessState.capture()
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    left: list[tuple[str, ...]] = []
    thread = threading.Thread(target=lambda: left.append(clean.restore(0)))
    thread.start()
    thread.join()
    assert "signal[SIGUSR2]" in left[0]
    assert clean.restore(0) == ()


def test_a_seed_that_not_every_generator_takes_is_refused() -> None:
    with pytest.raises(ValueError, match="seed=-1"):
        seed_generators(-1)
    seed_generators(2**40)


def test_the_module_imports_without_starting_threads_or_groups() -> None:
    program = (
        "import threading, torch.distributed as d, orchestrator.train.isolation as i; "
        "s = i.ProcessState.capture(); assert not s.leaks() and threading.active_count() == 1 "
        "and not d.is_initialized()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=50)
