"""Read TOML files into frozen models.

Unknown keys and wrong values are refused in one line that names file, key and nearest valid name.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from hpc.cli import UserError

_MAX_SHOWN = 200  # characters of a wrong value


class Settings(BaseModel):
    """Base of all configuration tables: frozen, strict types, finite numbers, no unknown keys."""

    # build a model's validator at its first use: a command uses few of them
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_toml_spelling(cls, table: Any) -> Any:
        # users write 1 for 1.0, and TOML has lists only, no tuples
        return _with_python_types(cls, table) if isinstance(table, dict) else table

    def __copy__(self) -> Self:
        # leave out cached properties: `model_copy(update=...)` may change their values
        return self.model_construct(
            set(self.model_fields_set),
            **{name: getattr(self, name) for name in type(self).model_fields},
        )


SettingsT = TypeVar("SettingsT", bound=Settings)


def _require_one_line(name: str) -> str:
    if not name.strip() or not name.isprintable():
        raise ValueError("must be one line of text, and not blank")
    return name


# A name that the user chooses; it appears in logs and tables.
Name = Annotated[str, AfterValidator(_require_one_line)]


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Raises:
        UserError: the file cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # ValueError: also for huge integers
        raise UserError(f"{path} is not valid TOML: {error}") from error


def user_path(text: str, where: str) -> Path:
    """Return the absolute path for `text` of a configuration.

    `~` is the home; a relative path starts at the working directory.

    Raises:
        UserError: no file can have this path. The message begins with `where`.
    """
    try:
        path = Path(text).expanduser().absolute()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{where}: {shown(text)} cannot be a path: {reason}") from error
    return path


def shown(value: Any) -> str:
    """Return a wrong value as messages show it: one line, at most 200 characters and `…`."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return "a number of thousands of digits" if isinstance(value, int) else "the given value"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return the end of an error message: the valid names nearest to `name`, or all of them."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    return f"valid: {', '.join(names)}" if names else "none is valid here"


def parse(model: type[SettingsT], table: Any, where: str) -> SettingsT:
    """Return `table` as a `model`.

    Args:
        model: the class to make.
        table: a TOML table.
        where: the table's place, for messages, such as `grid.toml: [protocol]`.

    Raises:
        UserError: a key or value is wrong; the message is about the first one.
    """
    if not isinstance(table, dict):
        raise UserError(f"{where} must be a table, not {shown(table)}")
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise UserError(f"{where}: {_first_problem(model, table, error)}") from error


def _with_python_types(model: type[BaseModel], table: dict[str, Any]) -> dict[str, Any]:
    loose = {}
    for key, value in table.items():
        field = model.model_fields.get(key)
        kinds = _kinds(field) if field else set()
        if float in kinds and int not in kinds and type(value) is int:
            value = _float(value)
        elif tuple in kinds and isinstance(value, list):
            value = _tuples(value)
        loose[key] = value
    return loose


def _float(number: int) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf  # which the model refuses


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _kinds(field: FieldInfo) -> set[Any]:
    """Return the plain types of an annotation such as `float | None` or `tuple[int, ...]`."""
    annotation = field.annotation
    origin = getattr(annotation, "__origin__", None)
    if origin is tuple:
        return {tuple}
    members = get_args(annotation) or (annotation,)
    return {getattr(member, "__origin__", member) for member in members}


def _first_problem(model: type[BaseModel], table: dict[str, Any], error: ValidationError) -> str:
    problems = error.errors()
    # a misspelled key is also missing: report the misspelling
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path = _place(problem, table)
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {shown(key)}; {did_you_mean(path[-1], _fields_at(model, path[:-1]))}"
    if problem["type"] == "missing":
        return f"the key {key!r} is missing"
    messages = dict.fromkeys(_in_toml_terms(p) for p in problems if _place(p, table) == path)
    message = " or ".join(messages)
    given = problem["input"]
    complete = isinstance(given, dict) or problem["type"] in (
        "value_error",
        "too_short",
        "too_long",
    )
    return f"{key}: {message}{'' if complete else f', not {shown(given)}'}" if key else message


def _place(problem: ErrorDetails, table: dict[str, Any]) -> list[str]:
    """Return the keys that lead to a problem, without pydantic's names of a union's members."""
    path: list[str] = []
    value: Any = table
    for part in problem["loc"]:
        try:
            value = value[part]
        except (LookupError, TypeError):
            if problem["type"] != "missing":
                continue
        path.append(str(part))
    return path


def _in_toml_terms(problem: ErrorDetails) -> str:
    message = problem["msg"].removeprefix("Value error, ").replace(" after validation", "")
    message = re.sub(r" or instance of \w+$", "", message)
    for python, toml in (("tuple", "list"), ("Tuple", "List"), ("dictionary", "table")):
        message = message.replace(python, toml)
    return message


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    current: Any = model
    for part in path:
        field = current.model_fields.get(part) if hasattr(current, "model_fields") else None
        current = _nested_model(field.annotation) if field else None
    return list(current.model_fields) if current is not None else []


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
