"""Which files of a folder are ours, and their removal."""

import json

import pytest

from prunekit.checkpoint import owned_files
from prunekit.checkpoint.journal import START, Journal


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "out"
    made.mkdir()
    return made


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def owned(folder, *writes, **entries):
    values = {START: {"writes": writes}} | {("block", name): it for name, it in entries.items()}
    found = owned_files.owned_files(folder, values)
    return [file.relative_to(folder).as_posix() for file in found]


def test_ours_are_the_named_files_and_what_of_them_is_half_written(folder):
    fill(folder, "a", ".a.tmp", ".b.tmp", "c", "d/e", "f", ".other.tmp", "report.json")
    (folder / "report.json").write_text(json.dumps({"files": {"f": "digest"}}))
    found = owned(folder, "a", "b", "gone", x={"files": {"c": "digest", "d/e": "digest"}})
    assert found == ["a", ".a.tmp", ".b.tmp", "c", "d/e", "f"]


def test_files_that_a_later_entry_announces_are_ours(folder):
    fill(folder, "a", "b", ".b.tmp", "other")
    assert owned(folder, "a", shards={"writes": ["b", "c"]}) == ["a", "b", ".b.tmp"]


def test_what_opens_as_a_model_goes_first(folder):
    names = ["a", "model.safetensors.index.json", "config.json"]
    fill(folder, *names)
    assert owned(folder, *names) == names[::-1]


@pytest.mark.parametrize(
    "name", ["../up", "/etc/hostname", "a/../../up", "", ".", "..", "a\0b", None, 3, ["a"], "sub"]
)
def test_a_name_that_leads_elsewhere_is_never_ours(folder, name):
    fill(folder.parent, "up")
    fill(folder, "a/b", "sub/c")
    if isinstance(name, str):
        (folder / "report.json").write_text(json.dumps({"files": {name: "digest"}}))
    hashable = name if not isinstance(name, list) else str(name)
    assert owned(folder, hashable) == []


def test_what_is_behind_a_link_is_never_ours_but_the_link_is(folder):
    fill(folder.parent, "elsewhere/a", "b")
    (folder / "sub").symlink_to("../elsewhere")
    (folder / "link").symlink_to("../b")
    files = owned_files.owned_files(folder, {START: {"writes": ["sub/a", "link"]}})
    assert [file.name for file in files] == ["link"]
    owned_files.remove(folder, files)
    assert (folder.parent / "b").exists()
    assert not (folder / "link").is_symlink()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"files": 3}', '{"files": ["a"]}', "[" * 9999])
def test_a_damaged_report_names_nothing(folder, content):
    fill(folder, "a")
    (folder / "report.json").write_text(content)
    assert owned(folder) == []


def test_all_else_is_foreign_and_empty_subfolders_are_not(folder):
    fill(folder, "a", "d/mine", "d/yours", "own/x/y", "b")
    (folder / "empty").mkdir()
    files = [folder / "a", folder / "d/mine"]
    assert owned_files.foreign_files(folder, files) == ["b", "d/yours", "own"]
    owned_files.remove(folder, files)
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["b", "y", "yours"]


def test_a_journal_of_another_program_is_foreign(folder):
    fill(folder, "journal.jsonl")
    assert owned_files.foreign_files(folder, []) == ["journal.jsonl"]
    (folder / "journal.jsonl").write_bytes(b"")
    assert owned_files.foreign_files(folder, []) == []


@pytest.mark.parametrize(
    ("foreign", "writes", "found"),
    [
        (["notes.md"], ["config.json"], None),
        (["notes.md", "config.json"], ["config.json"], "config.json"),
        (["adapter"], ["adapter/a"], "adapter"),
        (["model.safetensors"], [], "model.safetensors"),
        (["sub/x.safetensors"], [], "sub/x.safetensors"),
        (["adapter_config.json"], [], "adapter_config.json"),
        (["pytorch_model.bin"], [], "pytorch_model.bin"),
    ],
)
def test_what_would_be_taken_for_a_part_of_the_result_is_in_the_way(foreign, writes, found):
    assert owned_files.in_the_way(foreign, writes) == found


def test_the_runs_of_a_sweep_go_with_it(folder):
    run = folder / "runs/one"
    fill(run, "a", "notes.md")
    journal = Journal(run)
    journal.start({"fingerprint": "f", "writes": ["a"]})
    journal.close()
    entries = {
        (owned_files.RUN, "one"): {"folder": "runs/one"},
        (owned_files.RUN, "two"): {"folder": "runs/two"},
        (owned_files.RUN, "up"): {"folder": "../out/runs/one"},
    }
    files = owned_files.owned_files(folder, entries)
    assert [file.name for file in files] == ["a", "journal.jsonl"]
    owned_files.remove(folder, files)
    assert [path.name for path in run.iterdir()] == ["notes.md"]
