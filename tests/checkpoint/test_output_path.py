"""The output folder can be made, and shares nothing with what is read."""

import os
import subprocess

import pytest

from prunekit.checkpoint.output_path import check_apart, nearest_existing_folder
from prunekit.errors import ConfigError


def test_the_nearest_folder_is_one_that_exists(tmp_path):
    assert nearest_existing_folder(tmp_path / "a" / "b") == tmp_path
    assert nearest_existing_folder(tmp_path) == tmp_path
    (tmp_path / "link").symlink_to(tmp_path)
    assert nearest_existing_folder(tmp_path / "link") == tmp_path / "link"
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^--to: .*file is a file, so .* cannot be a folder"):
        nearest_existing_folder(tmp_path / "file" / "b", "--to")


def links(place):
    (place / "gone").symlink_to("nothing")
    (place / "loop").symlink_to("loop")
    return [("gone", "a link to nothing"), ("gone/a", "a link to"), ("loop", "a link to nothing")]


def test_what_cannot_be_a_folder_is_said(tmp_path):
    names = [
        ("a" * 256, "has 256 bytes, more than 255"),
        ("ü" * 128, "has 256 bytes"),
        ("/".join(["a" * 200] * 21), "longer than the file system allows"),
        ("a\0b", "null character"),
        *links(tmp_path),
    ]
    for name, said in names:
        with pytest.raises(ConfigError, match=rf"^output\.path: .*{said}"):
            nearest_existing_folder(tmp_path / name)
    assert nearest_existing_folder(tmp_path / ("a" * 255)) == tmp_path


@pytest.fixture
def place(tmp_path):
    """A folder with a model, an output, a text and a link to each."""
    for name in ("model/sub", "out/sub"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "out/text.txt").touch()
    for name in ("model", "out"):
        (tmp_path / f"{name}-link").symlink_to(name)
    (tmp_path / "model/file").symlink_to("../out/text.txt")
    (tmp_path / "parent-link").symlink_to(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("output", "given"),
    [
        ("out", "out"),
        ("out", "out-link"),
        ("out-link", "out"),
        ("out-link", "parent-link/out"),
        ("out", "out/text.txt"),
        ("out", "parent-link/out-link/text.txt"),
        ("out", "model/file"),
        ("out", "out/sub/../text.txt"),
        ("model", "model/sub"),
        ("model/new", "model"),
        ("model-link/new/er", "model"),
        ("parent-link/model/new", "model-link"),
        (".", "model"),
    ],
)
def test_an_output_that_shares_files_with_an_input_is_refused(place, output, given):
    with pytest.raises(ConfigError, match=r"which is read\. Name a folder elsewhere"):
        check_apart(place / output, [place / given])


@pytest.mark.parametrize(
    ("output", "given"),
    [("new", "model"), ("out/new", "model"), ("modelling", "model"), ("out", "gone"),
     ("out/sub", "out/text.txt"), ("new", "a\0b")],
)  # fmt: skip
def test_an_output_elsewhere_is_accepted(place, output, given):
    check_apart(place / output, [place / given])


def test_a_folder_that_is_mounted_twice_is_one(place):
    (place / "mounted").mkdir()
    command = ["mount", "--bind", str(place / "out"), str(place / "mounted")]
    if os.getuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mount is not permitted here")
    try:
        with pytest.raises(ConfigError, match=r"is the same folder as .*, which is read"):
            check_apart(place / "mounted", [place / "out"])
    finally:
        subprocess.run(["umount", str(place / "mounted")], check=True)


def test_a_path_that_is_not_utf8_is_refused(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    with pytest.raises(ConfigError, match="a name in it is not UTF-8, and safetensors"):
        nearest_existing_folder(tmp_path / name)
