"""Read and write schedules as small JSON files. They are written atomically, and validated when they are read."""

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
#: The size limit. A schedule file with the table of its tuning has a few kilobytes.
MAX_BYTES = 1_000_000

MSG_NO_PATH = "A schedule file needs a path, a str or a Path, but got {given!r}."
MSG_NOT_READ = "The schedule file {where} cannot be read: {reason}."
MSG_NOT_WRITTEN = "The schedule file {where} cannot be written: {reason}."
MSG_TOO_LARGE = "{where} has more than {limit} bytes, so it is not a schedule file."
MSG_NO_JSON = "The schedule file {where} is not valid JSON: {reason}."
MSG_NO_OBJECT = "{where}: expected {key} to be a JSON object, but got {given}."
MSG_FORMAT = '{where}: expected "format" to be "{expected}", but got {given}. It is not a schedule file.'
MSG_VERSION = '{where}: expected "version" to be {expected}, but got {given}.'
MSG_NEWER = (
    '{where}: its "version" is {given}, but this tgate_compile reads versions up to {expected}. '
    "Install a newer tgate_compile."
)
MSG_UNKNOWN = "{where}: unknown key {given} in {key}. Known keys: {known}."
MSG_TWICE = "duplicate key {key!r}"
MSG_NO_NUMBER = "{given} is not a valid number"
MSG_ABOUT = "about must be plain data that can be written as JSON: {reason}."


def save_schedule(schedule: Schedule, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
    """Write `schedule` to the file `path`, for `load_schedule`. An existing file is replaced atomically.

    Args:
        schedule: the schedule. All of its fields are written, so it does not depend on the defaults of a later version.
        path: the path of the file, usually `*.json`, in an existing folder.
        about: plain data about the origin of the schedule, stored in the file but not needed to load it.

    Raises:
        ConfigurationError: the file cannot be written, or `about` is not plain data.
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
    """Read the schedule in the file `path`, written by `save_schedule`, `Tuning.save` or by hand.

    Raises:
        ConfigurationError: the file does not exist or is not a valid schedule file. The message names the file and the
            key.
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
    """Return the schedule with these fields, e.g. `{"gate_step": 10, "sp_interval": 5}`, and defaults for the others.

    Args:
        given: the values, by the names of the fields of `Schedule`.
        where: the name of the source, for messages.

    Raises:
        ConfigurationError: a field does not exist, or its value is not valid.
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
    return {**data, **{method.key: _method_data(method) for method in schedule.others}}


def _method_data(method: Method) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(method).items()}


def _fields() -> list[str]:
    return [field.name for field in fields(Schedule) if field.name != "others"]


def _method(kind: type[Method], given: object) -> Method:
    if not isinstance(given, Mapping):
        raise ConfigurationError(f'expected "{kind.key}" to be a JSON object, but got {_shown(given)}.')
    _check_keys(given, [field.name for field in fields(kind)], kind.title, f'"{kind.key}"')
    return kind(**given)


def _schedule_of(content: object, where: str) -> Schedule:
    if not isinstance(content, dict):
        raise ConfigurationError(MSG_NO_OBJECT.format(where=where, key="the file", given=_shown(content)))
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
    """Return a JSON object as a dict, and refuse duplicate keys, of which `json` would silently keep the last."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(MSG_TWICE.format(key=key))
        result[key] = value
    return result


def _no_constant(name: str) -> None:
    raise ValueError(MSG_NO_NUMBER.format(given=name))  # NaN, Infinity, -Infinity


def _shown(value: object) -> str:
    """Return `value` for a message, shortened."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _path(path: object) -> Path:
    if not isinstance(path, (str, Path)):
        raise ConfigurationError(MSG_NO_PATH.format(given=path))
    return Path(path)


def _reason(error: OSError | ValueError) -> str:
    return str(getattr(error, "strerror", None) or error)


def _replace(target: Path, data: bytes) -> None:
    # In the folder of the target, since a rename is atomic only within one file system.
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
