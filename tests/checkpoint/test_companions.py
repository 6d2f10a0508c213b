"""Companions: what a checkpoint consists of is copied, everything else stays behind."""

import json
import os
from pathlib import Path

import pytest
import transformers

from prunekit.checkpoint import companions
from prunekit.checkpoint.companions import companion_content, companion_notes
from prunekit.errors import CheckpointError

COPIED = [
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "merges.txt",
    "tokenizer.4.0.0.json", "tokenizer.model.v3", "qwen.tiktoken", "tekken.json", "spiece.model",
    "generation_config.json", "preprocessor_config.json", "chat_template.jinja",
    "LICENSE", "LICENSE.txt", "Notice", "USE_POLICY.md", "llama_LICENCE.md", "COPYING",
]  # fmt: skip
LEFT = [
    "adapter_config.json", "pytorch_model.bin.index.json", "model.safetensors.index.fp16.json",
    "trainer_state.json", "training_args.bin", "optimizer.pt", "modeling_x.py", "README.md",
    "notes.txt", "tf_model.h5", "consolidated.safetensors",
]  # fmt: skip


def filled(folder, names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def names(folder):
    return [path.relative_to(folder).as_posix() for path in companions.companions(folder)]


def test_what_a_checkpoint_consists_of_is_copied_and_nothing_else(tmp_path):
    filled(tmp_path, [*COPIED, *LEFT, "config.json", "original/tokenizer.model"])
    assert names(tmp_path) == sorted(COPIED)


def test_every_file_of_a_tokenizer_of_transformers_is_known():
    root = Path(transformers.__file__).parent
    tokenizers = [*root.glob("models/*/tokenization_*.py"), *root.glob("tokenization_*.py")]
    assert len(tokenizers) > 50
    for file in tokenizers:
        for line in file.read_text().split("VOCAB_FILES_NAMES = {")[1:]:
            for entry in line.split("}")[0].split(","):
                name = entry.rpartition(":")[2].strip().strip('"')
                assert not name or name.isupper() or name in companions.NAMES or "_FILE" in name


def test_further_chat_templates_are_copied_from_their_folder(tmp_path):
    filled(tmp_path, ["additional_chat_templates/rag.jinja", "additional_chat_templates/x.py"])
    assert names(tmp_path) == ["additional_chat_templates/rag.jinja"]


@pytest.mark.parametrize("make", ["mkdir", "dangling", "pipe"])
@pytest.mark.parametrize("name", ["special_tokens_map.json", "chat_template.jinja"])
def test_a_companion_that_cannot_be_read_is_named(tmp_path, make, name):
    file = tmp_path / name
    if make == "mkdir":
        file.mkdir()
    elif make == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("../blobs/gone")
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read \(it is no file, or"):
        companions.companions(tmp_path)


def test_what_only_looks_like_a_companion_may_be_anything(tmp_path):
    for name in ("old.json", "LICENSES", "extra.model"):
        (tmp_path / name).mkdir()
    (tmp_path / "stale.index.json").symlink_to("gone")
    assert names(tmp_path) == []
    note = "Not copied, as no part of a pruned checkpoint: LICENSES/, extra.model/, old.json/, "
    assert [*companion_notes(tmp_path, set())] == [f"{note}stale.index.json."]


def test_links_of_a_hub_cache_are_companions(tmp_path):
    snapshot, blobs = tmp_path / "snapshots/1", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    filled(tmp_path, ["blobs/a1"])
    (snapshot / "tokenizer.json").symlink_to("../../blobs/a1")
    assert names(snapshot) == ["tokenizer.json"]
    assert companion_content(snapshot / "tokenizer.json") == (blobs / "a1").read_bytes()


@pytest.mark.parametrize(
    ("references", "kept"),
    [
        ({"AutoTokenizer": ["tokenization_x.T", None]}, False),
        ({"AutoProcessor": "processing_x.P"}, False),
        ({"AutoTokenizer": ["acme/code--tokenization_x.T", None]}, True),
    ],
)
def test_code_that_is_not_copied_is_not_named(tmp_path, references, kept):
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({"a": "é", "auto_map": references}))
    found = json.loads(companion_content(file))
    assert found.pop("auto_map", None) == (references if kept else None)
    assert found == {"a": "é"}


@pytest.mark.parametrize("content", ['{"a": 1}\n\n', '{"auto_map', '["auto_map"]', '"auto_map"'])
def test_other_companions_are_the_same_bytes(tmp_path, content):
    file = tmp_path / "tokenizer_config.json"
    file.write_text(content)
    assert companion_content(file) == content.encode()


def test_notes_name_what_stays_behind(tmp_path):
    filled(tmp_path, [*LEFT, ".gitattributes", "config.json", "report.json", "journal.jsonl"])
    first, adapter, code = companion_notes(tmp_path, {tmp_path / "consolidated.safetensors"})
    assert first.endswith(
        "adapter_config.json, model.safetensors.index.fp16.json, modeling_x.py, notes.txt, "
        "optimizer.pt, pytorch_model.bin.index.json and 3 more."
    )
    assert "LoRA adapter" in adapter
    assert "never run nor copied, and auto_map" in code


def test_code_of_a_part_is_not_named_either(tmp_path):
    file = tmp_path / "processor_config.json"
    part = {"auto_map": {"AutoImageProcessor": "image_x.P"}, "size": 3}
    file.write_text(json.dumps({"image_processor": part}))
    assert json.loads(companion_content(file)) == {"image_processor": {"size": 3}}
    assert companions.without_code({"text_config": part}) == {"text_config": {"size": 3}}


@pytest.mark.parametrize(("content", "refused"), [("[]", True), ("{", False), ("{}", False)])
def test_a_generation_config_beside_which_no_model_opens_is_refused(tmp_path, content, refused):
    (tmp_path / "generation_config.json").write_text(content)
    if not refused:
        assert names(tmp_path) == ["generation_config.json"]
        return
    with pytest.raises(CheckpointError, match="transformers opens no model beside one"):
        names(tmp_path)


def test_a_link_out_of_the_folder_is_noted(tmp_path):
    """An archive may hold a link to any file of the user, and the output a copy of it."""
    (tmp_path / "secret").write_text("secret")
    snapshot = tmp_path / "hub/snapshots/1"
    filled(tmp_path, ["model/README.md", "hub/a1"])
    snapshot.mkdir(parents=True)
    (tmp_path / "model/LICENSE").symlink_to("../secret")
    (tmp_path / "model/NOTICE").symlink_to("README.md")
    (snapshot / "LICENSE").symlink_to("../../a1")
    found = [*companion_notes(tmp_path / "model", {*companions.companions(tmp_path / "model")})]
    said = "Links out of the folder, whose targets are read in their place: LICENSE to "
    assert [note for note in found if "Links" in note] == [f"{said}{tmp_path / 'secret'}."]
    (tmp_path / "other").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "other"):
        assert [*companion_notes(folder, {*companions.companions(folder)})] == []
