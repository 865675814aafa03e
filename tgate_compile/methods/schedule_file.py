"""Schedules as small JSON files, to be kept beside a model: written all or nothing, read with suspicion."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tgate_compile._errors import ConfigurationError
from tgate_compile.methods.method import Method, methods
from tgate_compile.methods.schedule import IN_SHORT, Schedule

FORMAT = "tgate_compile.schedule"
VERSION = 1
#: A schedule with the table that justifies it has a few kilobytes.
MAX_BYTES = 1_000_000

MSG_NO_PATH = "A schedule file needs a path, a str or a Path, but got {given!r}."
MSG_NOT_READ = "The schedule file {where} cannot be read: {reason}."
MSG_NOT_WRITTEN = "The schedule file {where} cannot be written: {reason}."
MSG_TOO_LARGE = "{where} has more than {limit} bytes, and is no schedule file."
MSG_NO_JSON = "{where} is no JSON file, and a schedule file is one: {reason}."
MSG_NO_OBJECT = "{where}: expected {key} to be a JSON object, but got {given}."
MSG_FORMAT = '{where}: expected "format" to be "{expected}", but got {given}. It is no schedule file.'
MSG_VERSION = '{where}: expected "version" to be {expected}, but got {given}.'
MSG_NEWER = (
    '{where}: its "version" is {given}, and this tgate_compile reads versions up to {expected}. '
    "Install a newer tgate_compile."
)
MSG_UNKNOWN = "{where}: unknown key {given} in {key}. Known ones: {known}."
MSG_TWICE = "the key {key!r} is there twice"
MSG_NO_NUMBER = "{given} is no number of JSON"
MSG_ABOUT = "What a schedule file says about its schedule must be plain data for JSON: {reason}."


def save_schedule(schedule: Schedule, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
    """Write `schedule` to `path`, for `load_schedule`. An older file there is replaced as a whole or not at all.

    Args:
        schedule: what to write. All of its fields are, so that other defaults in a later version change nothing.
        path: a file, usually called *.json, in a folder that exists.
        about: plain data on where the schedule comes from; kept in the file, and not needed to load it.

    Raises:
        ConfigurationError: the file cannot be written, or `about` is no plain data.
    """
    target = _path(path)
    content = {"format": FORMAT, "version": VERSION, "schedule": schedule_data(schedule), "about": dict(about or {})}
    try:
        data = (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(MSG_ABOUT.format(reason=error)) from error
    try:
        _replace(target, data)
    except (OSError, ValueError) as error:
        raise ConfigurationError(MSG_NOT_WRITTEN.format(where=target, reason=_reason(error))) from error


def load_schedule(path: str | Path) -> Schedule:
    """The schedule in the file at `path`, which `save_schedule`, `Tuning.save` or a person has written.

    Raises:
        ConfigurationError: there is no such file, or it is none of a schedule. The message names the file and the key.
    """
    where = _path(path)
    try:
        with where.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise ConfigurationError(MSG_NOT_READ.format(where=where, reason=_reason(error))) from error
    if len(raw) > MAX_BYTES:
        raise ConfigurationError(MSG_TOO_LARGE.format(where=where, limit=MAX_BYTES))
    try:
        content = json.loads(raw.decode(), object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of too many digits
        raise ConfigurationError(MSG_NO_JSON.format(where=where, reason=error)) from error
    return _schedule_of(content, str(where))


def read_schedule(given: Mapping[str, Any], where: str = "schedule") -> Schedule:
    """The schedule with these fields, e.g. `{"gate_step": 10, "sp_interval": 5}`; those left out have their defaults.

    Args:
        given: values by the names of `Schedule`'s fields.
        where: what messages call it.

    Raises:
        ConfigurationError: there is no such field, or its value is none that it takes.
    """
    further = {key: kind for key, kind in methods().items() if kind not in IN_SHORT}
    _check_keys(given, [*_fields(), *further], where, "the schedule")
    try:
        others = tuple(_method(kind, given[key]) for key, kind in further.items() if key in given)
        return Schedule(**{key: value for key, value in given.items() if key not in further}, others=others)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from error


def schedule_data(schedule: Schedule) -> dict[str, Any]:
    """Return `schedule` as plain data, for `read_schedule`: its fields, and an object for each further method."""
    data = {name: getattr(schedule, name) for name in _fields()}
    return {**data, **{method.key: asdict(method) for method in schedule.others}}


def _fields() -> list[str]:
    return [field.name for field in fields(Schedule) if field.name != "others"]


def _method(kind: type[Method], given: object) -> Method:
    if not isinstance(given, Mapping):
        raise ConfigurationError(f'expected "{kind.key}" to be a JSON object, but got {_shown(given)}.')
    _check_keys(given, [field.name for field in fields(kind)], kind.title, f'"{kind.key}"')
    return kind(**given)


def _schedule_of(content: object, where: str) -> Schedule:
    if not isinstance(content, dict):
        raise ConfigurationError(MSG_NO_OBJECT.format(where=where, key="the whole", given=_shown(content)))
    if content.get("format") != FORMAT:
        given = _shown(content.get("format"))
        raise ConfigurationError(MSG_FORMAT.format(where=where, expected=FORMAT, given=given))
    version = content.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ConfigurationError(MSG_VERSION.format(where=where, expected=VERSION, given=_shown(version)))
    if version > VERSION:
        raise ConfigurationError(MSG_NEWER.format(where=where, expected=VERSION, given=_shown(version)))
    _check_keys(content, ["format", "version", "schedule", "about"], where, "the file")
    for key in ("schedule", "about"):
        value = content.get(key, {} if key == "about" else None)
        if not isinstance(value, dict):
            raise ConfigurationError(MSG_NO_OBJECT.format(where=where, key=f'"{key}"', given=_shown(value)))
    return read_schedule(content["schedule"], where)


def _check_keys(given: Mapping[str, Any], known: list[str], where: str, key: str) -> None:
    for name in given:
        if name not in known:
            raise ConfigurationError(
                MSG_UNKNOWN.format(where=where, given=_shown(name), key=key, known=", ".join(known))
            )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that is there twice, Python would silently take the last."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(MSG_TWICE.format(key=key))
        result[key] = value
    return result


def _no_constant(name: str) -> None:
    raise ValueError(MSG_NO_NUMBER.format(given=name))  # NaN, Infinity, -Infinity


def _shown(value: object) -> str:
    """`value` in a message, cut short."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _path(path: object) -> Path:
    if not isinstance(path, (str, Path)):
        raise ConfigurationError(MSG_NO_PATH.format(given=path))
    return Path(path)


def _reason(error: OSError | ValueError) -> str:
    return str(getattr(error, "strerror", None) or error)


def _replace(target: Path, data: bytes) -> None:
    # Beside the target: a rename is atomic only within one file system.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
