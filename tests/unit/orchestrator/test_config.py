"""A good run file: its values, the origin of each, precedence, and the way back to YAML."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config import Machine, RunConfig, fit_problems, load_config, require_fit
from orchestrator.config.render import to_yaml
from orchestrator.config.source import parse
from orchestrator.errors import ConfigError
from orchestrator.policies.tier import DeviceFacts, Tier
from orchestrator.run_spec import allowed_tiers, run_spec

Write = Callable[[str], Path]
ROOT = Path(__file__).parents[3]
TWO_CORES = Machine(num_cores=2, num_gpus=0)
H200 = DeviceFacts(name="H200", capability=(9, 0))
OLD_GPU = DeviceFacts(name="V100", capability=(7, 0))
PROCESSOR = DeviceFacts(name="this processor", cpu_flags=frozenset({"avx512_bf16"}))
MINIMAL = "name: one\njob: {name: mlp}\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)

    def write_file(text: str) -> Path:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return Path("run.yaml")

    return write_file


def test_a_run_file_needs_only_a_name_and_a_job(write: Write) -> None:
    config = load_config(write(MINIMAL)).config
    assert (config.search.num_trials, config.search.space, config.trial.global_batch) == (1, {}, 16)
    assert config.start_share == 1.0


def test_set_wins_over_the_file_and_the_file_over_the_default(write: Write) -> None:
    path = write(MINIMAL + "seed: 3\nsearch:\n  num_trials: 6\n")
    resolved = load_config(path, ["search.num_trials=12", "trial.share=0.5"])
    assert (resolved.config.search.num_trials, resolved.config.seed) == (12, 3)
    origins = resolved.origins
    assert origins["search.num_trials"] == "--set"
    assert origins["trial.share"] == "--set"
    assert origins["seed"] == "run.yaml:3"
    assert origins["policy.period_s"] == "default"


def test_the_last_of_two_overrides_wins(write: Write) -> None:
    assert load_config(write(MINIMAL), ["seed=1", "seed=2"]).config.seed == 2


def test_an_override_may_hold_a_mapping(write: Write) -> None:
    resolved = load_config(write(MINIMAL), ["search.space.lr={loguniform: [1e-3, 1e-2]}"])
    assert resolved.config.search.one_space["lr"].values == (0.001, 0.01)
    assert resolved.origins["search.space.lr.loguniform"] == "--set"


def test_an_override_does_not_leak_through_an_alias(write: Write) -> None:
    text = "name: one\njob: {name: mlp}\nsearch:\n  space: {lr: &a {uniform: [0.1, 0.2]}, width: {choice: [1]}}\n"
    resolved = load_config(write(text), ["search.space.width={choice: [2]}"])
    assert resolved.config.search.one_space["lr"].values == (0.1, 0.2)


def test_every_leaf_has_an_origin(write: Write) -> None:
    resolved = load_config(write(MINIMAL))

    def leaves(data: dict[str, object], prefix: str = "") -> set[str]:
        found: set[str] = set()
        for key, value in data.items():
            found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}"}
        return found

    assert set(resolved.origins) == leaves(resolved.to_dict())


def test_the_resolved_run_file_reads_back_to_the_same_configuration(write: Write, tmp_path: Path) -> None:
    first = load_config(ROOT / "demo.yaml", ["storage=some where/yes", "telemetry.stale_after_s=1e3"])
    for with_origins in (False, True):
        copy = tmp_path / "copy.yaml"
        copy.write_text(first.to_yaml(with_origins=with_origins), encoding="utf-8")
        assert load_config(copy).config == first.config


scalars = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text(max_size=20)
params = st.dictionaries(st.text(min_size=1, max_size=10), scalars | st.lists(scalars, max_size=3), max_size=5)


@given(st.dictionaries(st.text(min_size=1, max_size=10), params, max_size=4))
def test_whatever_is_written_as_yaml_reads_back(data: dict[str, object]) -> None:
    if data:
        assert parse(to_yaml(data), "f").data == data


def test_the_configuration_is_frozen(write: Write) -> None:
    resolved = load_config(write(MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        resolved.config.seed = 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved.config = resolved.config  # type: ignore[misc]


def test_every_field_has_a_description() -> None:
    schema = RunConfig.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    lacking = [name for s in sections for name, f in s.get("properties", {}).items() if "description" not in f]
    assert lacking == []


def test_the_demo_is_valid_and_writes_out_every_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    resolved = load_config(ROOT / "demo.yaml")
    require_fit(resolved, TWO_CORES)
    assert "default" not in resolved.origins.values()
    assert (resolved.config.search.num_trials, resolved.config.search.num_slots) == (6, 2)


def test_more_smallest_shares_than_devices_are_refused_with_the_number_that_fits(write: Write) -> None:
    text = MINIMAL + "search: {max_concurrent: 8, num_trials: 9}\ntrial: {num_workers: 2}\n"
    problems = fit_problems(load_config(write(text), ["dials.share.min=0.25"]), TWO_CORES)
    assert [p.key for p in problems] == ["dials.share.min"]
    assert "search.max_concurrent at most 2" in problems[0].text
    fitting = load_config(write(text), ["dials.share.min=0.25", "search.max_concurrent=2"])
    assert fit_problems(fitting, TWO_CORES) == []
    assert fit_problems(fitting, Machine(num_cores=2, num_gpus=4)) == []


def test_a_share_that_one_trial_alone_exceeds_names_the_ranks_that_fit(write: Write) -> None:
    text = MINIMAL + "trial: {num_workers: 4, share: 0.5}\n"
    problems = fit_problems(load_config(write(text)), TWO_CORES)
    assert problems[0].key == "trial.share"
    assert "trial.num_workers at most 2, or trial.share at most 0.25" in problems[0].text


def test_a_range_of_ranks_must_fit_at_its_largest_and_leaves_room_for_a_second_group(write: Write) -> None:
    dials = "dials: {share: {min: 0.25}, workers: {enabled: true, max: 4}}\npolicy: {name: goodput_joint}\n"
    resolved = load_config(write(MINIMAL + dials))
    assert fit_problems(resolved, TWO_CORES) == []
    assert (resolved.config.most_workers, resolved.config.num_ranks, resolved.config.start_share) == (4, 8, 0.25)
    spec = run_spec(resolved)
    assert (spec.limits.min_workers, spec.limits.max_workers, spec.max_running) == (1, 4, 1)
    assert spec.start_on(4).global_batch == spec.start.global_batch
    assert "workers" in spec.dials
    (problem,) = fit_problems(load_config(write(MINIMAL + dials), ["dials.share.min=0.5"]), TWO_CORES)
    assert "dials.workers.max at most 2" in problem.text


def test_without_a_range_of_ranks_nothing_is_reserved_for_it(write: Write) -> None:
    config = load_config(write(MINIMAL + "trial: {num_workers: 2}\n")).config
    assert (config.most_workers, config.num_ranks) == (2, 2)
    assert run_spec(load_config(write(MINIMAL))).limits.max_workers is None


def test_equal_parts_stay_inside_the_range_of_the_dial(write: Write) -> None:
    path = write(MINIMAL + "search: {max_concurrent: 4, num_trials: 4}\n")
    assert load_config(path).config.start_share == 0.25
    assert load_config(path, ["dials.share.max=0.2"]).config.start_share == 0.2
    assert load_config(path, ["dials.share.max=0.2", "dials.share.enabled=false"]).config.start_share == 0.25


def test_a_global_batch_that_never_changes_has_no_range(write: Write) -> None:
    path = write(MINIMAL + "trial: {micro_batch: 8}\ndials: {batch: {min_global: 16, max_global: 1}}\n")
    assert load_config(path, ["dials.batch.change_global=false"]).config.trial.global_batch == 8


def test_a_sample_of_a_larger_batch_keeps_its_worth_unless_the_run_file_says_otherwise(write: Write) -> None:
    path = write(MINIMAL)
    assert run_spec(load_config(path)).limits.min_efficiency == 0.9
    assert run_spec(load_config(path, ["dials.batch.min_efficiency=0"])).limits.min_efficiency == 0.0
    assert run_spec(load_config(path, ["dials.batch.change_global=false"])).limits.min_efficiency == 0.0


def test_fewer_trials_than_max_concurrent_need_fewer_slots(write: Write) -> None:
    text = MINIMAL + "search: {max_concurrent: 100}\n"
    assert fit_problems(load_config(write(text)), TWO_CORES) == []


@pytest.mark.parametrize(
    ("settings", "module", "key", "message"),
    [
        (["job.name=image"], "sklearn", "job.params.data", "digits needs scikit-learn, which is not installed here"),
        (["job.name=tissue", "job.params.data=fundus"], "skimage", "job.params.data", "without it: cells, or a data"),
        (["job.name=tissue", "job.params.data_dir=x"], "PIL", "job.params.data_dir", "pip install pillow (or this"),
        (
            ["job.name=image", "search.space.data.choice=[shapes, digits]"],
            "sklearn",
            "search.space.data",
            "pip install",
        ),
    ],
)
def test_a_missing_library_is_told_with_what_to_install(
    write: Write, monkeypatch: pytest.MonkeyPatch, settings: list[str], module: str, key: str, message: str
) -> None:
    resolved = load_config(write(MINIMAL), settings)
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    (problem,) = fit_problems(resolved, TWO_CORES)
    assert problem.key == key
    assert message in problem.text
    elsewhere = load_config(write(MINIMAL), [*settings, "cluster.address=auto"])
    assert fit_problems(elsewhere, TWO_CORES) == []


@pytest.mark.parametrize(
    "settings", [["job.params.data=shapes"], ["job.params.data_dir=x"], ["search.space.data.choice=[shapes]"]]
)
def test_a_library_that_the_data_does_not_need_may_be_missing(
    write: Write, monkeypatch: pytest.MonkeyPatch, settings: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert fit_problems(load_config(write(MINIMAL), ["job.name=image", *settings]), TWO_CORES) == []


def test_more_cores_than_the_process_may_use_are_refused(write: Write) -> None:
    problems = fit_problems(load_config(write(MINIMAL), ["cluster.num_cpus=64"]), TWO_CORES)
    assert [(p.key, p.file) for p in problems] == [("cluster.num_cpus", "--set")]


def test_another_cluster_is_not_held_against_this_machine(write: Write) -> None:
    text = MINIMAL + "search: {max_concurrent: 100, num_trials: 100}\ncluster: {address: '10.0.0.1:6379'}\n"
    assert fit_problems(load_config(write(text)), TWO_CORES) == []


def test_an_existing_run_directory_is_never_taken(write: Write, tmp_path: Path) -> None:
    resolved = load_config(write(MINIMAL))
    (tmp_path / "runs" / "one").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"run.yaml:1: name: .*exists already.*orchestrator resume one") as caught:
        require_fit(resolved, TWO_CORES)
    assert caught.value.exit_code == 2
    assert fit_problems(resolved, TWO_CORES, is_new=False) == []


def test_a_run_directory_that_is_a_link_is_refused(write: Write, tmp_path: Path) -> None:
    resolved = load_config(write(MINIMAL))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one").symlink_to(tmp_path.parent)
    assert "symbolic link" in fit_problems(resolved, TWO_CORES, is_new=False)[0].text


def test_a_storage_that_is_a_file_is_refused(write: Write, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x", encoding="utf-8")
    problems = fit_problems(load_config(write(MINIMAL), ["storage=taken/deeper"]), TWO_CORES)
    assert [p.key for p in problems] == ["storage"]


def test_checking_the_fit_creates_nothing(write: Write, tmp_path: Path) -> None:
    require_fit(load_config(write(MINIMAL)), TWO_CORES)
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("tiers", "device", "expected"),
    [
        ("[fp32, bf16]", H200, ()),
        ("[fp32, bf16]", OLD_GPU, ("compute capability 7.0; bf16 needs 8.0; nearest tier: fp32",)),
        (
            "[fp32, fp8]",
            PROCESSOR,
            ("no processor has; nearest tier: bf16; to emulate it, slower, add emulate: [fp8]",),
        ),
        ("[fp32, fp8], emulate: [fp8]", PROCESSOR, ()),
        ("[fp32, fixed(k=8,bits=16), fixed(k=4,bits=8,floor)]", PROCESSOR, ()),
        ("auto", OLD_GPU, ()),
    ],
)
def test_a_tier_without_a_unit_is_refused_unless_its_emulation_is_asked_for_by_name(
    tiers: str, device: DeviceFacts, expected: tuple[str, ...], write: Write
) -> None:
    resolved = load_config(write(f"{MINIMAL}dials:\n  precision: {{tiers: {tiers}}}\n"))
    machine = Machine(num_cores=2, num_gpus=0, device=device)
    problems = [str(problem) for problem in fit_problems(resolved, machine)]
    assert len(problems) == len(expected)
    for problem, words in zip(problems, expected, strict=True):
        assert words in problem


def test_auto_is_what_the_device_has_units_for_and_reads_back(write: Write) -> None:
    resolved = load_config(write(f"{MINIMAL}dials:\n  precision: {{tiers: auto}}\n"))
    assert resolved.config.dials.precision.tiers == ()
    assert allowed_tiers(resolved.config)[0] is Tier.FP32
    assert resolved.config.model_dump(mode="json")["dials"]["precision"]["tiers"] == "auto"
    assert load_config(write(resolved.to_yaml())).config == resolved.config
