"""Atomic replacement of files and folders."""

import pytest

from tspo_trl.support.files import replace_file, replacing, replacing_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced(tmp_path):
    for text in ("old", "new \ud800"):
        replace_file(tmp_path / "file", text)
    assert (tmp_path / "file").read_text() == "new \\ud800"
    assert names(tmp_path) == ["file"]


def test_a_file_is_unchanged_after_an_error(tmp_path):
    replace_file(tmp_path / "file", "old")

    def write_half():
        with replacing(tmp_path / "file") as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_folder_is_replaced_with_all_its_files(tmp_path):
    target = tmp_path / "new" / "parents" / "folder"
    for name in ("old", "new"):
        with replacing_folder(target) as unfinished:
            (unfinished / name).touch()
            assert not (target / name).exists()
        assert names(target) == [name]
    assert names(target.parent) == ["folder"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_folder_is_unchanged_after_an_error(tmp_path, error):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").touch()

    def write_half():
        with replacing_folder(target) as unfinished:
            (unfinished / "half").touch()
            raise error

    with pytest.raises(error):
        write_half()
    assert names(target) == ["old"]
    assert names(tmp_path) == ["folder"]
