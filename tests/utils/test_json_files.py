"""Whatever is wrong with a JSON file is an error that names it."""

from pathlib import Path

import pytest

from lavit_hf.utils.json_files import read_json, read_json_object


class RoomError(ValueError):
    """Stands for the error of a room."""


def test_what_is_there_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"ä": [1, null]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == read_json_object(str(tmp_path / "a.json")) == {"ä": [1, None]}
    (tmp_path / "list.json").write_text("[1]")
    assert read_json(tmp_path / "list.json") == [1]


@pytest.mark.parametrize("error", [OSError, RoomError])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not readable as JSON: Expecting value"),
        (b'{"a": ', "is not readable as JSON: Expecting value"),
        (b'"\xff"', "is not readable as JSON: .*decode"),
        (b"[" * 10**5, "is not readable as JSON: .*recursion"),
        (b"[]", "does not hold a JSON object, but a list"),
        (b"null", "does not hold a JSON object, but a NoneType"),
    ],
)
def test_errors_name_the_file(tmp_path: Path, content: bytes, message: str, error: type[Exception]) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(error, match=rf"a\.json {message}") as caught:
        read_json_object(path, error)
    assert type(caught.value) is error


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.json"):
        read_json(tmp_path / "a.json")
    with pytest.raises(RoomError, match=r"a\.json cannot be read: No such file"):
        read_json(tmp_path / "a.json", RoomError)
