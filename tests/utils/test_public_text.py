"""Names and texts as others may read them."""

from pathlib import Path

import pytest

from lavit_hf.utils.public_text import one_line, public_name, without_paths


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("scenes", "scenes"),
        ("owner/photos", "owner/photos"),
        ("/home/me/pairs.json", "pairs.json"),
        ("/home/me/photos/", "photos"),
        ("~/photos", "photos"),
        ("../photos", "photos"),
        ("out/a/photos", "photos"),
        ("https://example.org/a/photos", "https://example.org/a/photos"),
        (r"C:\Users\me\photos", "photos"),
        ("file:///home/me/photos", "photos"),
    ],
)
def test_paths_go_by_their_last_part(name: str, expected: str) -> None:
    assert public_name(name) == expected


def test_paths_that_look_like_names_are_known_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("owner/photos") == "photos"
    assert public_name(".") == tmp_path.name


def test_what_json_holds_loses_its_paths() -> None:
    content = {"a": ["/home/me/clip", 1, None], "b": {"c": "~/x", "d": "a/b"}, "e": "and/or, / as well"}
    expected = {"a": ["clip", 1, None], "b": {"c": "x", "d": "a/b"}, "e": "and/or, / as well"}
    assert without_paths(content) == expected


def test_one_line() -> None:
    assert one_line(" a\n\n\tb\x00c\ud800\u202ed é ") == "a b c d é"
