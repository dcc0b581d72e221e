"""Paths that somebody else wrote into a file."""

from pathlib import Path

import pytest

from lavit_hf.utils.paths import check_links, resolve_inside


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with a file, beside a file that is none of it."""
    (tmp_path / "root" / "sub").mkdir(parents=True)
    (tmp_path / "root" / "sub" / "file").write_text("own")
    (tmp_path / "secret").write_text("secret")
    return tmp_path / "root"


def test_paths_inside(root):
    for name in ("sub/file", "sub/../sub/file", "not/there", "sub", str(root / "sub" / "file")):
        assert resolve_inside(root, name, "x") == root / name
    (root / "link").symlink_to("sub/file")
    assert resolve_inside(root, "link", "x").read_text() == "own"


@pytest.mark.parametrize("name", ["../secret", "sub/../../secret", "/etc/passwd", "..", "not/../../there"])
def test_paths_outside(root, name):
    with pytest.raises(ValueError, match=f"list.json names {name}, which is outside of .*root; only files in it"):
        resolve_inside(root, name, "list.json")


@pytest.mark.parametrize("name", [None, 5, "", ["a"], "a\0b"])
def test_what_is_no_path(root, name):
    with pytest.raises(ValueError, match="list.json has .* where the path of a file is needed"):
        resolve_inside(root, name, "list.json")


def test_links_that_lead_out(root):
    (root / "link").symlink_to(root.parent / "secret")
    (root / "sub" / "up").symlink_to("../..")
    for name in ("link", "sub/up/secret"):
        with pytest.raises(
            ValueError, match=f"list.json has {name}, which links to .*secret outside of it: put a copy"
        ):
            resolve_inside(root, name, "list.json")
    with pytest.raises(ValueError, match="links to"):
        check_links(root)
    (root / "link").unlink()
    (root / "sub" / "up").unlink()
    (root / "circle").symlink_to("circle")
    with pytest.raises(ValueError, match="circle"):
        check_links(root)


def test_the_root_itself_may_be_a_link(root, tmp_path):
    (tmp_path / "other").symlink_to(root)
    assert resolve_inside(tmp_path / "other", "sub/file", "x").read_text() == "own"
    check_links(tmp_path / "other")


def test_snapshots_of_a_hub_cache(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    (snapshot / "sub").mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "hash").write_text("own")
    (snapshot / "sub" / "file").symlink_to("../../../blobs/hash")
    assert resolve_inside(snapshot, "sub/file", "x").read_text() == "own"
    assert resolve_inside(snapshot / "sub", "file", "x").read_text() == "own"
    check_links(snapshot)
    (tmp_path / "models--c").mkdir()
    (snapshot / "other").symlink_to(tmp_path / "models--c")
    with pytest.raises(ValueError, match="outside"):
        check_links(snapshot)
