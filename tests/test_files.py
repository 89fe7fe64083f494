"""Files that are there whole or not at all."""

import re

import pytest
from safetensors import SafetensorError

from dfsq.files import write_whole


def test_files_are_written_beside_and_moved(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert path.read_text() == "old"

    write_whole(str(path), write)
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left"),
        RuntimeError("unexpected pos"),  # of torch.save, where a disk is full
        SafetensorError("I/O error: No space left"),
    ],
)
def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("ne")
        raise error

    with pytest.raises(OSError, match=r"cannot write .*file: .*(space|pos).*still stands"):
        write_whole(path, write)
    assert path.read_text() == "old"
    path.unlink()
    with pytest.raises(OSError, match=r"cannot write .*file: .*(space left|pos)$"):
        write_whole(path, write)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, write)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_places_that_cannot_hold_a_file_are_named(tmp_path):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder").mkdir()
    for place in ("gone/x", "file/x", "folder"):
        with pytest.raises(OSError, match=re.escape(f"cannot write {tmp_path / place}: ")):
            write_whole(tmp_path / place, lambda path: path.write_text("new"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
