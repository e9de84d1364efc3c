"""Complete replacement of files, Hub ids, and opening images."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from huggingface_hub import DatasetCard
from PIL import Image

from unconceal.data.cards import section
from unconceal.utils.errors import UserError
from unconceal.utils.files import is_hub_id, replacing, restore
from unconceal.utils.images import open_image
from unconceal.utils.signatures import is_unedited, read_signature, sign


def write_folder(folder, text):
    folder.mkdir()
    (folder / "inner").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_files_and_folders_are_replaced(tmp_path):
    for text in ("old", "new"):
        with replacing(tmp_path / "file.txt") as temporary:
            temporary.write_text(text)
        with replacing(tmp_path / "folder") as temporary:
            write_folder(temporary, text)
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
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        write_folder(temporary, "new")
    assert names(tmp_path) == ["folder"]
    assert (path / "inner").read_text() == "old"


def test_the_next_replacement_repairs_a_killed_one(tmp_path):
    write_folder(tmp_path / ".folder.unconceal-old", "old")  # as a kill between the two renames leaves it
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "folder"):
        raise ZeroDivisionError
    assert names(tmp_path) == ["folder"]
    assert (tmp_path / "folder" / "inner").read_text() == "old"


def test_two_processes_restore_one_folder(tmp_path, monkeypatch):
    write_folder(tmp_path / ".folder.unconceal-old", "old")
    rename = os.rename
    # The first call is the other process.
    monkeypatch.setattr(os, "rename", lambda *paths: rename(*paths) or rename(*paths))
    restore(tmp_path / "folder")
    assert (tmp_path / "folder" / "inner").read_text() == "old"


def test_a_hidden_folder_of_the_user_is_left_alone(tmp_path):
    write_folder(tmp_path / ".folder.old", "mine")
    restore(tmp_path / "folder")
    for text in ("first", "second"):
        with replacing(tmp_path / "folder") as temporary:
            write_folder(temporary, text)
    assert names(tmp_path) == [".folder.old", "folder"]
    assert (tmp_path / ".folder.old" / "inner").read_text() == "mine"
    assert (tmp_path / "folder" / "inner").read_text() == "second"


def test_of_a_link_the_folder_is_replaced(tmp_path):
    path, link = tmp_path / "disk" / "folder", tmp_path / "link"
    path.parent.mkdir()
    write_folder(path, "old")
    link.symlink_to(path)
    with replacing(link) as temporary:
        write_folder(temporary, "new")
    assert link.is_symlink() and names(tmp_path) == ["disk", "link"] and names(path.parent) == ["folder"]
    assert (path / "inner").read_text() == "new"
    path.rename(path.with_name(".folder.unconceal-old"))  # as a kill between the two renames leaves it
    restore(link)
    assert (link / "inner").read_text() == "new"


def test_a_link_to_a_file_is_replaced_itself(tmp_path):
    (tmp_path / "photo").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "photo")
    with replacing(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "photo").read_text() == "mine"
    assert (tmp_path / "link").read_text() == "new"


def test_a_file_never_replaces_a_folder(tmp_path):
    write_folder(tmp_path / "folder", "mine")
    with pytest.raises(IsADirectoryError), replacing(tmp_path / "folder") as temporary:
        temporary.write_text("a file")
    assert names(tmp_path) == ["folder"]
    assert (tmp_path / "folder" / "inner").read_text() == "mine"


def test_names_of_the_largest_length(tmp_path):
    path = tmp_path / f"{'a' * 251}.png"
    for text in ("old", "new"):
        with replacing(path) as temporary:
            temporary.write_text(text)
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


def test_threads_open_images_under_different_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # so that Pillow itself would stop at 200
    for suffix in ("png", "gif", "tiff", "jpg", "bmp"):
        Image.new("RGB", (30, 20)).save(tmp_path / f"a.{suffix}")

    def is_opened(job):
        path, limit = job
        try:
            with open_image(path, limit) as image:
                image.load()
                return image.size == (30, 20)
        except UserError as error:
            assert "got 30x20, expected at most 599 pixels" in str(error)
            return False

    jobs = [(path, limit) for path in sorted(tmp_path.iterdir()) for limit in (599, 600) for _ in range(20)]
    with warnings.catch_warnings(), ThreadPoolExecutor(8) as threads:
        warnings.simplefilter("error")
        assert list(threads.map(is_opened, jobs)) == [limit == 600 for _, limit in jobs]
    with pytest.raises(Image.DecompressionBombError):  # outside, Pillow's own limit holds
        Image.open(tmp_path / "a.png")


def test_a_card_has_one_signature():
    once = sign("# Card\n\n## Terms\n\nNone.\n", "ab12")
    again = sign(f"{once}\n## This copy\n\nIts own text.\n")
    assert is_unedited(once) and is_unedited(again)
    assert read_signature(once)["weights"] == "ab12" and read_signature(again)["weights"] is None
    assert again.count("<!-- ") == 1 and not is_unedited(again.replace("None", "Any"))
    assert section(DatasetCard(once), "Terms") == "None."
