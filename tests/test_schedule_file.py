"""Schedule files: reading returns what was written, and other files are rejected."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tgate_compile._errors import ConfigurationError
from tgate_compile.methods.pab import PAB
from tgate_compile.methods.schedule import Schedule
from tgate_compile.methods.schedule_file import MAX_BYTES, load_schedule, read_schedule, save_schedule

#: Together they set every field to a value other than its default.
SCHEDULES = [
    Schedule(7, sp_interval=3, fi_interval=2, warm_up=1, keep="cond", anchor_weight=0.75),
    Schedule(0.4, anchor_weight=0.25, keep="uncond"),
    Schedule(5, text_interval=2),
    Schedule(None, deepcache_interval=3, deepcache_branch=1),
    Schedule(None, guidance_step=0.3, keep="uncond"),
    Schedule(None, guidance_similarity=0.991),
    PAB(4, 2, begin=0.25) + Schedule(6),
]
SHORT = [field.name for field in fields(Schedule) if field.name != "others"]


def written(folder: Path, content: object) -> Path:
    path = folder / "schedule.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def file_of(**schedule: Any) -> dict[str, Any]:
    return {"format": "tgate_compile.schedule", "version": 1, "schedule": schedule}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_saved_schedules_can_be_loaded(schedule: Schedule, tmp_path: Path) -> None:
    save_schedule(schedule, tmp_path / "a.json", {"prompts": ["ein Fuchs im Schnee, 雪"], "drift": 0.05})
    loaded = load_schedule(str(tmp_path / "a.json"))
    assert loaded == schedule
    assert {name: type(value) for name, value in asdict(loaded).items()} == {
        name: type(value) for name, value in asdict(schedule).items()
    }
    content = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert content["about"] == {"prompts": ["ein Fuchs im Schnee, 雪"], "drift": 0.05}
    assert list(content["schedule"]) == [*SHORT, *(method.key for method in schedule.others)]


def test_the_schedules_of_these_tests_set_every_field() -> None:
    never_set = [f.name for f in fields(Schedule) if all(getattr(s, f.name) == f.default for s in SCHEDULES)]
    assert not never_set


def test_a_short_file_by_hand_is_enough(tmp_path: Path) -> None:
    path = written(tmp_path, file_of(gate_step=12, sp_interval=4))
    assert load_schedule(path) == Schedule(12, sp_interval=4)
    assert read_schedule({"gate_step": 12, "sp_interval": 4}) == Schedule(12, sp_interval=4)


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ("", "not valid JSON"),
        ("\x00", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("9" * 10_000, "not valid JSON"),
        ('{"version": NaN}', "NaN"),
        ('{"version": 1, "version": 1}', "duplicate key 'version'"),
        ([], "expected the file to be a JSON object"),
        ({}, '"format"'),
        (file_of() | {"format": "png"}, "'png'"),
        (file_of() | {"version": 2}, "newer"),
        (file_of() | {"version": True}, '"version"'),
        (file_of() | {"version": "1"}, "'1'"),
        (file_of() | {"version": 0}, "got 0"),
        (file_of() | {"shedule": {}}, "'shedule'"),
        (file_of() | {"schedule": [10]}, '"schedule"'),
        (file_of() | {"about": "a model"}, '"about"'),
        ({"format": "tgate_compile.schedule", "version": 1}, '"schedule"'),
        (file_of(gatestep=10), "'gatestep'"),
        (file_of(gate_step="10"), "gate_step"),
        (file_of(gate_step=True), "gate_step"),
        (file_of(gate_step=0), "gate_step"),
        (file_of(gate_step=10.0), "gate_step"),
        (file_of(sp_interval=2.5), "sp_interval"),
        (file_of(sp_interval=None), "sp_interval"),
        (file_of(warm_up=-1), "warm_up"),
        (file_of(keep="both"), "keep"),
        (file_of(keep=[]), "keep"),
        (file_of(anchor_weight="half"), "anchor_weight"),
        (file_of(anchor_weight=10**400), "anchor_weight"),
        ('{"format": "tgate_compile.schedule", "version": 1, "schedule": {"anchor_weight": 1e999}}', "anchor_weight"),
        (file_of(gate_step=None), "Nothing to do"),
        (file_of(gate_step=10, guidance_step=5), "Guidance can end in only one way"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_other_files_are_refused(content: object, shown: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ConfigurationError) as caught:
        load_schedule(path)
    assert shown in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b'"\xff"')
    (tmp_path / "large.json").write_bytes(b" " * (MAX_BYTES + 1))
    for name, shown in (
        ("latin.json", "not valid JSON"),
        ("large.json", "bytes"),
        ("none.json", "No such"),
        (".", "director"),
    ):
        with pytest.raises(ConfigurationError, match=shown):
            load_schedule(tmp_path / name)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_schedule("a\x00b")
    with pytest.raises(ConfigurationError, match="got 10"):
        load_schedule(10)  # type: ignore[arg-type]


def test_an_older_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    save_schedule(SCHEDULES[0], path)
    save_schedule(SCHEDULES[1], path)
    for about in ({"drift": float("nan")}, {"pipe": object()}, {"prompt": "\ud800"}):
        with pytest.raises(ConfigurationError, match="plain data"):
            save_schedule(SCHEDULES[2], path, about)
    assert load_schedule(path) == SCHEDULES[1]
    (tmp_path / "folder").mkdir()
    for unwritable in (tmp_path / "none" / "a.json", tmp_path / "folder", "a\x00b"):
        with pytest.raises(ConfigurationError, match="cannot be written"):
            save_schedule(SCHEDULES[0], unwritable)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.json", "folder"]


# Fuzzing: any content gives a schedule or a ConfigurationError.

_FUZZ = settings(
    max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
_FIELDS = st.dictionaries(st.sampled_from([*SHORT, "pab"]), _JSON)
_VALID = st.fixed_dictionaries({"format": st.just("tgate_compile.schedule"), "version": st.just(1)})


def _loads_or_is_refused(path: Path) -> None:
    try:
        schedule = load_schedule(path)
    except ConfigurationError as error:
        message = str(error)
    else:
        for steps in (1, 4, 25):
            assert len(schedule.strip(steps)) == steps
        return
    assert str(path) in message


@_FUZZ
@given(raw=st.binary(max_size=200))
def test_any_bytes(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(raw)
    _loads_or_is_refused(tmp_path / "a.json")


@_FUZZ
@given(content=st.one_of(_JSON, st.builds(lambda a, b: {**a, "schedule": b}, _VALID, _FIELDS | _JSON)))
def test_any_json(content: object, tmp_path: Path) -> None:
    _loads_or_is_refused(written(tmp_path, content))


@_FUZZ
@given(
    at=st.integers(min_value=0, max_value=400),
    length=st.integers(min_value=0, max_value=20),
    inserted=st.text(max_size=10),
    which=st.sampled_from(SCHEDULES),
)
def test_damaged_files(at: int, length: int, inserted: str, which: Schedule, tmp_path: Path) -> None:
    save_schedule(which, tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "a.json").write_text(text[:at] + inserted + text[at + length :], encoding="utf-8", errors="replace")
    _loads_or_is_refused(tmp_path / "a.json")


@_FUZZ
@given(
    gate=st.none() | st.integers(1, 2**70) | st.floats(0, 1, exclude_min=True, exclude_max=True),
    deep=st.integers(1, 5),
    weight=st.floats(allow_nan=False, allow_infinity=False),
    keep=st.sampled_from([None, "uncond", "cond"]),
)
def test_every_schedule_comes_back(gate: Any, deep: int, weight: float, keep: Any, tmp_path: Path) -> None:
    try:
        schedule = Schedule(gate, deepcache_interval=deep, anchor_weight=weight, keep=keep)
    except ConfigurationError:
        return
    save_schedule(schedule, tmp_path / "a.json")
    assert load_schedule(tmp_path / "a.json") == schedule
