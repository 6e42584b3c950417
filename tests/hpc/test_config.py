"""Tables become models, or one line that names file, key and nearest valid name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from hpc.cli import UserError
from hpc.config import Name, Settings, did_you_mean, parse, read_toml, shown, user_path


class Engine(Settings):
    cylinders: Annotated[int, Field(ge=1)] = 4
    fuel: Literal["petrol", "diesel"] = "petrol"


class Car(Settings):
    name: str
    price: float = 1.0
    tank: float | None = None
    doors: Annotated[tuple[str, ...], Field(min_length=1)] = ("left", "right")
    size: tuple[float, float] = (1.0, 2.0)
    fast: bool = False
    engine: Engine = Engine()
    extra: dict[str, str | int] = Field({})

    @model_validator(mode="after")
    def _is_affordable(self) -> Car:
        if self.price > 1000:
            raise ValueError("price must not be more than 1000")
        return self


def refusal(**table):
    with pytest.raises(UserError) as refused:
        parse(Car, {"name": "a", **table}, "cars.toml: [car]")
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith("cars.toml: [car]: ")
    return message.removeprefix("cars.toml: [car]: ")


def test_toml_integers_and_lists_are_accepted_for_floats_and_tuples():
    car = parse(Car, {"name": "a", "price": 3, "tank": 4, "doors": ["l"], "size": [1, 2.5]}, "x")
    assert (car.price, car.tank, car.doors, car.size) == (3.0, 4.0, ("l",), (1.0, 2.5))
    assert type(car.price) is type(car.tank) is float


def test_nested_tables_keep_their_defaults():
    car = parse(Car, {"name": "a", "engine": {"fuel": "diesel"}}, "x")
    assert car.engine == Engine(cylinders=4, fuel="diesel")


def test_settings_are_frozen():
    car = parse(Car, {"name": "a"}, "x")
    with pytest.raises(ValidationError):
        car.name = "b"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"colour": 3}, ("unknown key 'colour'; valid: doors, engine, extra, fast, name, price, "
          "size, tank")),
        ({"prices": 3}, "unknown key 'prices'; did you mean 'price'?"),
        ({"engine": {"cylinder": 3}}, "unknown key 'engine.cylinder'; did you mean 'cylinders'?"),
        ({"engine": {"x": 3}}, "unknown key 'engine.x'; valid: cylinders, fuel"),
        ({"price": "3"}, "price: Input should be a valid number, not '3'"),
        ({"price": True}, "price: Input should be a valid number, not True"),
        ({"fast": 1}, "fast: Input should be a valid boolean, not 1"),
        ({"doors": 3}, "doors: Input should be a valid list, not 3"),
        ({"doors": ["left", 3]}, "doors.1: Input should be a valid string, not 3"),
        ({"doors": []}, "doors: List should have at least 1 item, not 0"),
        ({"size": [1, 2, 3]}, "size: List should have at most 2 items, not 3"),
        ({"engine": 3}, "engine: Input should be a valid table, not 3"),
        ({"engine": {"cylinders": 0}}, ("engine.cylinders: Input should be greater than or equal"
          " to 1, not 0")),
        ({"engine": {"fuel": "coal"}}, ("engine.fuel: Input should be 'petrol' or 'diesel', not"
          " 'coal'")),
        ({"extra": {"roof": 1.5}}, ("extra.roof: Input should be a valid string or Input should be"
          " a valid integer, not 1.5")),
        ({"price": 2000}, "price must not be more than 1000"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_place(table, message):
    assert refusal(**table) == message


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match=r"^f: the key 'name' is missing$"):
        parse(Car, {"price": 3}, "f")


def test_a_misspelled_key_is_called_misspelled_rather_than_missing():
    with pytest.raises(UserError, match=r"^f: unknown key 'nmae'; did you mean 'name'\?$"):
        parse(Car, {"nmae": "a"}, "f")


def test_a_value_that_is_no_table_is_refused():
    with pytest.raises(UserError, match=r"^f: \[car\] must be a table, not \[1\]$"):
        parse(Car, [1], "f: [car]")


def test_names_are_suggested_nearest_first_or_all_of_them():
    assert did_you_mean("ressnet50", ["resnet101", "resnet50", "unet"]) == (
        "did you mean 'resnet50' or 'resnet101'?"
    )
    assert did_you_mean("zzz", ["b", "a"]) == "valid: a, b"
    assert did_you_mean("zzz", []) == "none is valid here"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = ", "is not valid TOML: Invalid value (at end of document)"),
        (b"a = 1\na = 2\n", "is not valid TOML: Cannot overwrite a value"),
        ("name = 'Zürich'".encode("latin-1"), "is not UTF-8 text; save it as UTF-8"),
        (b"a = " + b"[" * 5000, "is not valid TOML: "),
        (b"a = " + b"1" * 5000, "is not valid TOML: "),
    ],
)
def test_a_file_that_is_no_toml(tmp_path, content, message):
    path = tmp_path / "grid.toml"
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_toml(path)
    assert str(refused.value).startswith(f"{path} {message}")


def test_a_file_that_is_not_there_or_is_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*/none.toml: No such file or directory"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        read_toml(tmp_path)


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfa = 'x'\n", b"a = 'x'\r\n"])
def test_a_file_saved_on_windows_is_read(tmp_path, content):
    path = tmp_path / "grid.toml"
    path.write_bytes(content)
    assert read_toml(path) == {"a": "x"}


@pytest.mark.parametrize("price", [math.inf, -math.inf, math.nan, 10**400])
def test_a_number_is_finite(price):
    assert refusal(price=price).startswith("price: Input should be a finite number, not ")


@pytest.mark.parametrize("huge", [16**5000, "x" * 10_000, ["x"] * 10_000], ids=["", "text", "list"])
def test_a_huge_value_is_refused_in_a_short_line(huge):
    assert len(refusal(fast=huge)) < 300
    assert len(refusal(**{"x" * 10_000: 1})) < 400


def test_a_value_that_cannot_be_shown_is_described():
    assert shown(16**5000) == "a number of thousands of digits"
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    assert shown(deep) == "the given value"


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "\x1b[31m", "a\0b"])
def test_a_name_is_one_line_of_text(name):
    class Ship(Settings):
        name: Name

    with pytest.raises(UserError, match=r"^f: name: must be one line of text, and not blank$"):
        parse(Ship, {"name": name}, "f")
    assert parse(Ship, {"name": "a / b & ü"}, "f").name == "a / b & ü"


def test_a_path_starts_at_the_working_directory_or_at_the_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_path("a/b", "f") == tmp_path / "a/b"
    assert user_path("~/a", "f") == tmp_path / "home/a"
    assert user_path("/a", "f") == Path("/a")


@pytest.mark.parametrize("text", ["~nobody-of-that-name/x", "a\0b", "x" * 300, "x/" * 3000])
def test_a_path_that_no_file_can_have_is_refused(text):
    with pytest.raises(UserError) as refused:
        user_path(text, "f: run_dir")
    assert str(refused.value).startswith("f: run_dir: ")
    assert "cannot be a path: " in str(refused.value) and len(str(refused.value)) < 400


def test_a_lone_carriage_return_is_no_end_of_a_line(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_bytes(b"a = 1 # \rb = 2\n")
    with pytest.raises(UserError, match="is not valid TOML"):
        read_toml(path)
