"""Replacing files and folders whole, and telling Hub ids from paths."""

import os

import pytest

from unconceal.utils.files import is_hub_id, replacing, restore


def write_folder(folder, text):
    folder.mkdir()
    (folder / "inner").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_files_and_folders_are_replaced(tmp_path):
    for text in ("old", "new"):
        with replacing(tmp_path / "file.txt") as beside:
            beside.write_text(text)
        with replacing(tmp_path / "folder") as beside:
            write_folder(beside, text)
    assert names(tmp_path) == ["file.txt", "folder"]
    assert (tmp_path / "file.txt").read_text() == (tmp_path / "folder" / "inner").read_text() == "new"


@pytest.mark.parametrize("moved", [False, True])
def test_ctrl_c_between_the_renames_keeps_the_old_folder(tmp_path, monkeypatch, moved):
    path = tmp_path / "folder"
    write_folder(path, "old")
    rename = os.rename

    def interrupted(source, target):
        monkeypatch.setattr(os, "rename", rename)
        if moved:
            rename(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing(path) as beside:
        write_folder(beside, "new")
    assert names(tmp_path) == ["folder"]
    assert (path / "inner").read_text() == "old"


def test_a_killed_replacement_is_mended_by_the_next(tmp_path):
    write_folder(tmp_path / ".folder.old", "old")  # as a kill between the two renames leaves it
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "folder"):
        raise ZeroDivisionError
    assert names(tmp_path) == ["folder"]
    assert (tmp_path / "folder" / "inner").read_text() == "old"


def test_restoring_while_another_process_does(tmp_path, monkeypatch):
    write_folder(tmp_path / ".folder.old", "old")
    rename = os.rename

    def late(source, target):
        rename(source, target)  # the other process
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    restore(tmp_path / "folder")
    assert (tmp_path / "folder" / "inner").read_text() == "old"


def test_a_file_never_replaces_a_folder(tmp_path):
    write_folder(tmp_path / "folder", "mine")
    with pytest.raises(IsADirectoryError), replacing(tmp_path / "folder") as beside:
        beside.write_text("a file")
    assert names(tmp_path) == ["folder"]
    assert (tmp_path / "folder" / "inner").read_text() == "mine"


def test_names_as_long_as_the_file_system_takes(tmp_path):
    path = tmp_path / f"{'a' * 251}.png"
    for text in ("old", "new"):
        with replacing(path) as beside:
            beside.write_text(text)
    assert names(tmp_path) == [path.name]
    assert path.read_text() == "new"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *[(name, True) for name in ("owner/name", "an-owner/a.name_1")],
        *[(name, False) for name in ("name", "a/b/c", "./name", "../name", "/name", "owner/", "an owner/name")],
    ],
)
def test_hub_ids_have_an_owner_and_a_name(name, expected):
    assert is_hub_id(name) == expected
