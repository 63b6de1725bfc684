"""Every mistake in a run file gives one line with file, line and key, what was seen and what is allowed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.config import load_config
from orchestrator.errors import ConfigError

Write = Callable[[str | bytes], Path]
ROOT = Path(__file__).parents[3]

# The lines of this file are counted by the table below.
GOOD = """\
name: good
storage: runs
seed: 0
job:
  name: language
  params: {layers: 2, context: 64}
search:
  space: {lr: {loguniform: [1.0e-3, 1.0e-2]}, width: {choice: [48, 64]}}
  num_trials: 6
  max_concurrent: 2
  scheduler: {name: asha, grace_reports: 1, reduction_factor: 2}
trial:
  samples_per_report: 4096
  max_reports: 4
  num_workers: 1
  micro_batch: 16
  grad_accum: 1
  share: null
dials:
  share: {enabled: true, min: 0.125, max: 1.0}
  batch: {enabled: true, min_global: 16, max_global: 128, max_micro: 64, change_global: true}
  precision: {enabled: true, tiers: [fp32, bf16]}
policy: {name: goodput, period_s: 0.5, deadline_s: 2.0, params: {}}
slots: {idle_close_s: 60, restart_budget: 2, open_timeout_s: 120}
telemetry: {send_period_s: 0.5, stale_after_s: 10}
cluster: {address: local, num_cpus: null}
"""
BF16 = "precision: {enabled: true, tiers: [fp32, bf16]}"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)

    def write_file(text: str | bytes) -> Path:
        (tmp_path / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return Path("run.yaml")

    return write_file


def refusal(path: Path, overrides: tuple[str, ...] = ()) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    assert str(caught.value).isprintable() or "\n" in str(caught.value)
    return caught.value


def test_the_good_file_is_good(write: Write) -> None:
    assert load_config(write(GOOD)).config.name == "good"


def test_lanes_are_for_declared_trainings_on_one_rank(write: Write) -> None:
    text = GOOD.replace("open_timeout_s: 120}", "open_timeout_s: 120, lanes: 4}")
    assert load_config(write(text)).config.num_processes == 1
    error = refusal(write(text), ("trial.num_workers=2",))
    assert "slots.lanes: got 4; trials side by side in one process are declared trainings on one rank" in str(error)


# (text to replace, its replacement, line, key, words of the message)
BAD: list[tuple[str, str, int, str, str]] = [
    ("name: good", "name: ../x", 1, "name", "a letter or digit"),
    ("name: good", "name: -x", 1, "name", "a letter or digit"),
    ("name: good", "name: " + "x" * 65, 1, "name", "a letter or digit"),
    ("name: good", "name: 2024", 1, "name", "put it in quotes"),
    ("name: good", "name: true", 1, "name", "got true (a boolean)"),
    ("name: good", 'name: "a\\n"', 1, "name", "a letter or digit"),
    ("name: good\n", "", 1, "name", "is missing"),
    ("storage: runs", "storage: ''", 2, "storage", "got '' (text)"),
    ("storage: runs", 'storage: "a\\0b"', 2, "storage", "control characters"),
    ("storage: runs", "storage: ~/runs", 2, "storage", "write the path out"),
    ("seed: 0", "seed: '0'", 3, "seed", "write it without quotes"),
    ("seed: 0", "seed: -1", 3, "seed", "from 0 to 4294967295"),
    ("seed: 0", "seed: 0.5", 3, "seed", "a whole number"),
    ("seed: 0", "seed: true", 3, "seed", "got true (a boolean)"),
    ("seed: 0", "seed: 1000000000000000000", 3, "seed", "from 0 to 4294967295"),
    ("seed: 0", "seed: [1]", 3, "seed", "got a list of 1"),
    ("seed: 0", "seed:", 3, "seed", "got nothing (null)"),
    ("  name: language", "  name: langage", 5, "job.name", "did you mean 'language'?"),
    ("  name: language\n", "", 4, "job.name", "is missing"),
    ("layers: 2", "layer: 2", 6, "job.params.layer", "did you mean 'layers'?"),
    ("layers: 2", "layers: two", 6, "job.params.layers", "allowed: int"),
    ("layers: 2", "layers: true", 6, "job.params.layers", "got true"),
    ("layers: 2", "layers: [2]", 6, "job.params.layers", "got a list of 1"),
    ("layers: 2", "layers: 0", 6, "job.params.layers", "from 1 to 256"),
    ("context: 64", "lr: 0.1", 8, "search.space.lr", "keep one of them"),
    ("{lr: {loguniform", "{lrr: {loguniform", 8, "search.space.lrr", "did you mean 'lr'?"),
    ("[1.0e-3, 1.0e-2]", "[1.0e-2, 1.0e-3]", 8, "search.space.lr", "low < high"),
    ("[1.0e-3, 1.0e-2]", "[0, 1.0e-3]", 8, "search.space.lr", "low > 0"),
    ("[1.0e-3, 1.0e-2]", "[1.0e-3]", 8, "search.space.lr.loguniform[1]", "is missing"),
    ("[1.0e-3, 1.0e-2]", "[1.0e-3, '1']", 8, "search.space.lr.loguniform[1]", "without quotes"),
    ("[1.0e-3, 1.0e-2]", "[.nan, 1]", 8, "search.space.lr.loguniform[0]", "got .nan"),
    ("[1.0e-3, 1.0e-2]", "[1, 1e999]", 8, "search.space.lr.loguniform[1]", "got .inf"),
    ("[1.0e-3, 1.0e-2]", "3", 8, "search.space.lr.loguniform", "[low, high]"),
    ("{loguniform: [1.0e-3, 1.0e-2]}", "0.1", 8, "search.space.lr", "one of {uniform"),
    ("{loguniform: [1.0e-3, 1.0e-2]}", "{}", 8, "search.space.lr", "an empty mapping"),
    ("loguniform", "logunifrom", 8, "search.space.lr.logunifrom", "did you mean 'loguniform'?"),
    ("choice: [48, 64]", "choice: []", 8, "search.space.width.choice", "a non-empty list"),
    ("choice: [48, 64]", "choice: [48, 48]", 8, "search.space.width", "listed twice"),
    ("choice: [48, 64]", "choice: [48, 50]", 8, "search.space.width", "a multiple of heads"),
    ("choice: [48, 64]", "choice: [48.5]", 8, "search.space.width", "allowed: int"),
    ("choice: [48, 64]", "choice: [48], grid: [64]", 8, "search.space.width", "got choice and grid"),
    ("choice: [48, 64]", "choice: [[48]]", 8, "search.space.width", "got a list of 1"),
    ("choice: [48, 64]", "randint: [48, 64]", 8, "search.space.width", "a multiple of heads"),
    ("choice: [48, 64]", "grid: [16, 32, 48, 64]", 9, "search.num_trials", "the grid has 4 points"),
    ("num_trials: 6", "num_trials: 0", 9, "search.num_trials", "from 1 to"),
    ("num_trials: 6", "num_trials: 6.0", 9, "search.num_trials", "got 6.0"),
    ("max_concurrent: 2", "max_concurent: 2", 10, "search.max_concurent", "did you mean 'max_concurrent'?"),
    ("name: asha", "name: asa", 11, "search.scheduler", "did you mean 'asha'?"),
    ("{name: asha, ", "{", 11, "search.scheduler", "without a name"),
    ("grace_reports: 1", "grace_report: 1", 11, "search.scheduler.grace_report", "did you mean 'grace_reports'?"),
    ("grace_reports: 1", "grace_reports: 5", 11, "search.scheduler.grace_reports", "trial.max_reports = 4"),
    ("reduction_factor: 2", "reduction_factor: 1", 11, "search.scheduler.reduction_factor", "from 2 to"),
    ("name: asha", "name: fifo", 11, "search.scheduler.grace_reports", "unknown key"),
    ("samples_per_report: 4096", "samples_per_report: 8", 13, "trial.samples_per_report", "at least one step"),
    ("samples_per_report: 4096", "samples_per_report: 100", 13, "trial.samples_per_report", "max_global = 128"),
    ("micro_batch: 16", "micro_batch: 8", 16, "trial.micro_batch", "from 16 to 128"),
    ("grad_accum: 1", "grad_accum: 16", 16, "trial.micro_batch", "= 256 samples per step"),
    ("share: null", "share: 0.1", 18, "trial.share", "dials.share from 0.125"),
    ("share: null", "share: 1.5", 18, "trial.share", "up to 1"),
    ("share: null", "share: -0.0", 18, "trial.share", "above 0"),
    ("min: 0.125", "min: 0", 20, "dials.share.min", "above 0"),
    ("max: 1.0", "max: 0.1", 20, "dials.share.min", "at most max = 0.1"),
    ("enabled: true, min: 0", "enabled: yes, min: 0", 20, "dials.share.enabled", "true or false"),
    ("enabled: true, min: 0", "enabled: 1, min: 0", 20, "dials.share.enabled", "true or false"),
    ("min_global: 16", "min_global: 256", 21, "dials.batch.min_global", "at most max_global = 128"),
    ("max_micro: 64", "max_micro: 8", 21, "dials.batch.max_micro", "at least trial.micro_batch = 16"),
    ("tiers: [fp32, bf16]", "tiers: []", 22, "dials.precision.tiers", "a non-empty list"),
    ("tiers: [fp32, bf16]", "tiers: [fp32, fp32]", 22, "dials.precision.tiers", "each tier once"),
    ("tiers: [fp32, bf16]", "tiers: [bf16, fp32]", 22, "dials.precision.tiers", "[fp32, bf16]"),
    ("tiers: [fp32, bf16]", "tiers: [fp32, bf61]", 22, "dials.precision.tiers[1]", "did you mean 'bf16'?"),
    ("tiers: [fp32, bf16]", "tiers: fp32", 22, "dials.precision.tiers", "a non-empty list"),
    ("tiers: [fp32, bf16]", "tiers: [fp32, fixed(99,16)]", 22, "dials.precision.tiers[1]", "k=99; allowed: 0 to 40"),
    ("tiers: [fp32, bf16]", "tiers: [fp32], emulate: [fp8]", 22, "dials.precision.emulate", "not among tiers"),
    (BF16, f"{BF16}\n  workers: {{enabled: true}}", 23, "dials.workers.enabled", "policy.name: goodput_joint"),
    (BF16, f"{BF16}\n  workers: {{enabled: true, min: 4}}", 23, "dials.workers.min", "at most max = 2"),
    (BF16, f"{BF16}\n  workers: {{enabled: true, min: 2}}", 15, "trial.num_workers", "dials.workers from 2 to 2"),
    (BF16, f"{BF16}\n  workers: {{enabled: true, max: 3}}", 23, "dials.workers.max", "allowed: 1, 2, 4, 8, 16"),
    (BF16, f"{BF16}\n  workers: {{enabled: true, max: 65}}", 23, "dials.workers.max", "from 1 to 64"),
    ("open_timeout_s: 120}", "open_timeout_s: 120, lanes: 33}", 24, "slots.lanes", "from 1 to 32"),
    (BF16, f"{BF16}\n  workers: [1, 4]", 23, "dials.workers", "a mapping"),
    ("name: goodput", "name: godput", 23, "policy.name", "did you mean 'goodput'?"),
    ("name: goodput", "name: nobody", 23, "policy.name", "allowed: static, fair_share, goodput, goodput_joint"),
    (BF16, f"{BF16}\n  placement: {{enabled: maybe}}", 23, "dials.placement.enabled", "true or false"),
    ("name: goodput", "name: os:system", 23, "policy.name", "standard library"),
    ("name: goodput", "name: no_such_package.mine:Mine", 23, "policy.name", "no module 'no_such_package'"),
    ("name: goodput", "name: 'a:b:c'", 23, "policy.name", "module:Class"),
    ("period_s: 0.5, d", "period_s: 0, d", 23, "policy.period_s", "from 0.05"),
    ("params: {}}", "params: {min_gain: -1}}", 23, "policy.params.min_gain", "min_gain=-1"),
    ("params: {}}", "params: {min_gain: much}}", 23, "policy.params.min_gain", "got 'much' (text)"),
    ("params: {}}", "params: {min_gains: 1}}", 23, "policy.params.min_gains", "did you mean 'min_gain'?"),
    ("params: {}}", "params: {no_such: 1}}", 23, "policy.params.no_such", "unknown parameter"),
    ("restart_budget: 2", "restart_budget: -1", 24, "slots.restart_budget", "from 0 to 100"),
    ("stale_after_s: 10", "stale_after_s: 0.6", 25, "telemetry.stale_after_s", "at least twice"),
    ("address: local", "address: locl", 26, "cluster.address", "did you mean 'local'?"),
    ("address: local", "address: 'h:99999'", 26, "cluster.address", "host:port"),
    (
        "address: local, num_cpus: null",
        "address: auto, num_cpus: 2",
        26,
        "cluster.num_cpus",
        "only with address: local",
    ),
    ("cluster: {", "clustr: {", 26, "clustr", "did you mean 'cluster'?"),
    (
        "cluster: {",
        "micro_batch: {",
        26,
        "micro_batch",
        "did you mean 'trial.micro_batch', which line 16 gives already?",
    ),
    ("cluster: {", "warm_up: {", 26, "warm_up", "unknown key 'warm_up'; allowed: name, storage"),
    ("name: good\n", "name: good\nnam: other\n", 2, "nam", "did you mean 'name', which line 1 gives already?"),
    ("seed: 0", "s\u0435\u0435d: 0", 3, "s\u0435\u0435d", r"unknown key 's\u0435\u0435d'"),
    ("cluster: {", "parameters: {", 26, "parameters", "did you mean 'search.space'?"),
    ("seed: 0", "seed: 0\n<<: {a: 1}", 4, "", "merge keys ('<<') are not read"),
    ("  name: language", "  <<: &x {name: mlp}\n  name: mlp", 5, "job", "merge keys ('<<') are not read"),
    ("{loguniform: [1.0e-3, 1.0e-2]}", "{min: 1, max: 9}", 8, "search.space.lr", "write {randint: [1, 10]}"),
    ("storage: runs", "storage: s3://bucket/runs", 2, "storage", "a URL; allowed: a path of this machine"),
    ("storage: runs", "storage: file:///runs", 2, "storage", "a URL; allowed: a path"),
    ("storage: runs", "storage: file:/runs", 2, "storage", "a URL; allowed: a path"),
    ("storage: runs", "storage: hdfs://h/x", 2, "storage", "a URL; allowed: a path"),
    ("storage: runs", "storage: $HOME/runs", 2, "storage", "variables are not expanded"),
    ("storage: runs", 'storage: "${HOME}/runs"', 2, "storage", "variables are not expanded"),
    ("storage: runs", "storage: /a/%USER%/runs", 2, "storage", "variables are not expanded"),
    (
        "params: {}}",
        'params: {cooldown_s: "5"}}',
        23,
        "policy.params.cooldown_s",
        "allowed: a number; write it without",
    ),
    (
        "params: {}}",
        "params: {cooldown_s: true}}",
        23,
        "policy.params.cooldown_s",
        "got true (a boolean); allowed: a number",
    ),
    (
        "params: {}}",
        "params: {cooldown_s: null}}",
        23,
        "policy.params.cooldown_s",
        "got nothing (null); allowed: a number",
    ),
    ("seed: 0", "name: again", 3, "name", "given twice (first in line 1)"),
    ("seed: 0", "1: 0", 3, "", "put it in quotes"),
]


@pytest.mark.parametrize(("old", "new", "line", "key", "words"), BAD, ids=[f"{new[:40]}" for _, new, *_ in BAD])
def test_a_mistake_is_reported_with_its_line_and_key(
    write: Write, old: str, new: str, line: int, key: str, words: str
) -> None:
    assert old in GOOD
    error = refusal(write(GOOD.replace(old, new, 1)))
    assert (error.file, error.line, error.key or "") == ("run.yaml", line, key), str(error)
    assert words in str(error).splitlines()[0]


# (whole file, line or None, words of the message)
NO_YAML: list[tuple[str | bytes, int | None, str]] = [
    ("", None, "is empty"),
    ("# nothing\n", None, "is empty"),
    ("---\n", None, "is empty"),
    ("null\n", None, "got nothing"),
    ("- a\n- b\n", 1, "got a list of 2"),
    ("just words\n", None, "got 'just words' (text)"),
    ("name: a\n\tseed: 1\n", 2, "spaces, not tabs"),
    ("name: [a\n", 2, "not valid YAML"),
    ("name: 'a\n", 2, "not valid YAML"),
    ("name: a: b\n", 1, "not valid YAML"),
    ("name: a\n---\nname: b\n", 2, "a second document"),
    ("name: !!python/object/apply:os.system ['id']\n", 1, "tag"),
    ("name: !!str a\n", 1, "tag"),
    ("name: !own a\n", 1, "tag"),
    ("name: *a\n", 1, "alias"),
    ("name: &a [*a]\n", 1, "alias"),
    ("? [a]\n: b\n", 1, "used as a key"),
    ("&a x: 1\n*a : 2\n", 2, "used as a key"),
    ("name: a\x00b\n", 1, "U+0000"),
    ("name: a\n\nx: \x1b[31m\n", 3, "U+001B"),
    (b"name: a\nx: \xff\xfe\n", 2, "is not UTF-8"),
    (b"\x7fELF\x02\x01\x01\x00\x00\x00\xf0\xf1", 1, "is not UTF-8"),
    ("a: " + "[" * 100_000, 1, "deeper than"),
    ("a: [" + "1," * 30_000 + "]", 1, "more than 20000 values"),
    ("x: [&a q" + ", *a" * 100 + "]\n", 1, "more than 64 aliases"),
    ("#" * 1_000_001, None, "larger than"),
]


@pytest.mark.parametrize(("text", "line", "words"), NO_YAML, ids=[repr(text[:24]) for text, *_ in NO_YAML])
def test_a_file_that_is_no_run_file_is_refused(write: Write, text: str | bytes, line: int | None, words: str) -> None:
    error = refusal(write(text))
    assert words in str(error)
    assert str(error).startswith("run.yaml:")
    if line is not None:
        assert error.line == line


def test_a_bomb_of_aliases_is_refused_before_it_grows(write: Write) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 7)}]" for n in range(1, 9)]
    assert "values" in str(refusal(write("\n".join(levels) + "\n")))


def test_byte_order_mark_and_windows_line_ends_are_fine(write: Write) -> None:
    assert load_config(write(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())).config.name == "good"


def test_all_problems_are_reported_at_once_in_the_order_of_lines(write: Write) -> None:
    text = GOOD.replace("seed: 0", "seed: x").replace("num_trials: 6", "num_trial: 6").replace("max: 1.0", "max: 2")
    lines = str(refusal(write(text))).splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["run.yaml:3", "seed"],
        ["run.yaml:9", "search.num_trial"],
        ["run.yaml:20", "dials.share.max"],
    ]


def test_a_thousand_problems_are_cut_short(write: Write) -> None:
    lines = str(refusal(write(GOOD + "".join(f"key{n}: 1\n" for n in range(1000))))).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "... and 980 more"


def test_control_characters_do_not_reach_the_terminal(write: Write) -> None:
    error = refusal(write('name: "\\e[31mred\\a"\n"k\\e]0;x": 1\njob: {name: "\\e[2J"}\n'))
    assert "\x1b" not in str(error)
    assert "\x07" not in str(error)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "path=value"),
        ("=3", "path=value"),
        ("a..b=3", "path=value"),
        ("seed=", "has no value"),
        ("sed=3", "--set: sed: unknown key"),
        ("sed=3", "did you mean 'seed'?"),
        ("seed=x", "--set: seed: got 'x'"),
        ("seed.deep=1", "goes through seed"),
        ("search.space.lr=[1, 2", "not valid YAML"),
        ("name=../../x", "--set: name: got '../../x'"),
        ("seed=!!int 3", "tag"),
        ("job={a: 1, a: 2}", "given twice"),
        ("name=\udcff", "surrogate"),
    ],
)
def test_a_wrong_override_is_blamed_on_set(write: Write, override: str, words: str) -> None:
    error = refusal(write(GOOD), (override,))
    assert words in str(error)
    assert error.file == "--set"


def test_a_missing_file_names_the_one_that_is_there(write: Write) -> None:
    write(GOOD)
    assert "did you mean 'run.yaml'?" in str(refusal(Path("rum.yaml")))


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "a device, pipe or socket" in str(refusal(tmp_path / "pipe"))
    assert "a device, pipe or socket" in str(refusal(Path("/dev/zero")))
    assert "is a directory" in str(refusal(tmp_path))
    assert "cannot be read" in str(refusal(Path("x" * 5000)))
    assert "cannot be read" in str(refusal(Path("a\0b")))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_an_unreadable_file_is_refused(write: Write) -> None:
    path = write(GOOD)
    path.chmod(0)
    assert "cannot be read" in str(refusal(path))


KEYS = [
    (section, key)
    for section, keys in {
        "search": ["num_trials", "max_concurrent", "scheduler", "space"],
        "trial": ["samples_per_report", "max_reports", "num_workers", "micro_batch", "grad_accum", "share"],
        "slots": ["idle_close_s", "restart_budget", "open_timeout_s", "lanes"],
        "telemetry": ["send_period_s", "stale_after_s"],
        "policy": ["period_s", "deadline_s", "params", "name"],
        "cluster": ["address", "num_cpus"],
    }.items()
    for key in keys
]


def _typos(key: str) -> set[str]:
    deleted = {key[:i] + key[i + 1 :] for i in range(len(key))}
    swapped = {key[:i] + key[i + 1] + key[i] + key[i + 2 :] for i in range(len(key) - 1)}
    doubled = {key[:i] + key[i] + key[i:] for i in range(len(key))}
    replaced = {key[:i] + "q" + key[i + 1 :] for i in range(len(key))}
    return (deleted | swapped | doubled | replaced | {key.replace("_", "-"), key.upper()}) - {key}


def test_single_typos_of_keys_get_the_right_suggestion(write: Write) -> None:
    right = total = 0
    path = write("name: a\njob: {name: mlp}\n")
    for section, key in KEYS:
        for typo in sorted(_typos(key)):
            error = refusal(path, (f"{section}.{typo}=1",))
            total += 1
            right += f"unknown key '{typo}'" in str(error) and f"did you mean '{key}'?" in str(error)
    assert total > 500
    assert right / total >= 0.97


SEARCHES = [
    ("search.algorithm=optuna", "search.space.width={grid: [48, 64]}", "algorithm: got 'optuna'.*width is a grid"),
    ("search.algorithm=grid", "seed=0", "algorithm: got 'grid', but lr is no grid"),
    ("search.scheduler={name: median, grace_reports: 9}", "seed=0", "grace_reports: got 9; allowed: at most"),
    ("search.scheduler={name: pbt, mutate: [width]}", "seed=0", "mutate: got 'width'; allowed: lr"),
    ("search.scheduler={name: pbt}", "search.num_trials=1", "num_trials: got 1; allowed: at least 2"),
    ("search.scheduler={name: pbt}", "search.algorithm=optuna", "'optuna' with scheduler pbt"),
]


@pytest.mark.parametrize(("first", "second", "message"), SEARCHES, ids=[text[2][:30] for text in SEARCHES])
def test_a_search_that_cannot_work_is_refused_with_what_can(
    write: Write, first: str, second: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(GOOD), [first, second])
