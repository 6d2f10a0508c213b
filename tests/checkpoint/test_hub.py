"""Local folders are preferred; of a hub id only one checkpoint is downloaded."""

import json
import shutil

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from prunekit.checkpoint.hub import checkpoint_folder
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.checkpoint.weight_files import INDEX_FILE, WEIGHTS_FILE
from prunekit.errors import CheckpointError


def test_a_local_folder_is_found_before_the_hub_is_asked(single):
    assert checkpoint_folder(str(single)) == single


def test_says_that_there_is_neither_a_folder_nor_a_repository():
    with pytest.raises(CheckpointError, match=r"^nobody/nothing: there is no such folder, and"):
        checkpoint_folder("nobody/nothing")


@pytest.mark.parametrize("name", ["x" * 300, "a" * 5000, "a\0b", "~nosuchuser/x", "[/b]"])
def test_a_name_that_no_folder_can_have_is_refused(name):
    with pytest.raises(CheckpointError, match=r"there is no such folder, and"):
        checkpoint_folder(name)


def test_a_file_is_not_taken_for_a_hub_id(single):
    with pytest.raises(CheckpointError, match=rf"^{single / WEIGHTS_FILE}: is not a folder"):
        checkpoint_folder(str(single / WEIGHTS_FILE))


BESIDE = [
    "original/consolidated.00.safetensors", "consolidated.safetensors", "model.fp16.safetensors",
    "checkpoint-10/model.safetensors", "checkpoint-10/tokenizer.json", "onnx/model.onnx",
    "original/LICENSE", "adapter_config.json", "training_args.bin", "modeling_x.py",
    "model.safetensors.index.fp16.json", "unlisted.safetensors", "README.md",
    "additional_chat_templates/notes.txt",
]  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serve the folder ``repository`` as any hub id; return it and what is downloaded."""
    repository, commit = tmp_path / "repository", "0123456789abcdef"
    fetched, revisions = [], []

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns):
        files = [path for path in repository.rglob("*") if path.is_file()]
        names = [path.relative_to(repository).as_posix() for path in files]
        snapshot = tmp_path / "snapshots" / commit
        revisions.append(revision)
        for chosen in filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (snapshot / chosen).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository / chosen, snapshot / chosen)
            fetched.append(chosen)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    def serve(folder):
        shutil.copytree(folder, repository)
        for name in BESIDE:
            (repository / name).parent.mkdir(exist_ok=True)
            (repository / name).write_bytes(b"no")
        templates = repository / "additional_chat_templates"
        (templates / "rag.jinja").write_text("x")
        (repository / "LICENSE").write_text("x")
        return repository, fetched, revisions

    return serve


SMALL = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
SMALL |= {"README.md", "LICENSE", "additional_chat_templates/rag.jinja"}


def test_only_the_shards_that_are_read_are_downloaded(hub, sharded):
    repository, fetched, revisions = hub(sharded)
    folder = checkpoint_folder("acme/model", "main")
    shards = set(json.loads((repository / INDEX_FILE).read_text())["weight_map"].values())
    assert set(fetched) == SMALL | {INDEX_FILE} | shards
    assert len(fetched) == len(set(fetched))
    assert set(revisions) == {"main", folder.name}
    assert revisions[0] == "main"
    assert open_checkpoint(folder).entries


def test_a_single_file_is_downloaded_without_the_shards(hub, single, sharded):
    for file in [*sharded.glob("model-*"), sharded / INDEX_FILE]:
        shutil.copyfile(file, single / file.name)
    _, fetched, _ = hub(single)
    assert open_checkpoint(checkpoint_folder("acme/model")).entries
    assert set(fetched) == SMALL | {INDEX_FILE, WEIGHTS_FILE}


def test_weights_that_the_config_names_are_downloaded(hub, single):
    (single / WEIGHTS_FILE).rename(single / "other[1].safetensors")
    config = json.loads((single / "config.json").read_text())
    named = config | {"transformers_weights": "other[1].safetensors"}
    (single / "config.json").write_text(json.dumps(named))
    _, fetched, _ = hub(single)
    assert open_checkpoint(checkpoint_folder("acme/model")).entries
    assert set(fetched) == SMALL | {"other[1].safetensors"}


def test_a_repository_without_a_config_is_named(hub, single):
    (single / "config.json").unlink()
    hub(single)
    with pytest.raises(CheckpointError, match=r"config\.json: is missing"):
        checkpoint_folder("acme/model")
