"""Odd and hostile files, through the command line: one error of ours, or a run that works."""

import json
import os
import struct

import pytest
import torch

from prunekit.checkpoint.weight_files import INDEX_FILE, WEIGHTS_FILE
from prunekit.cli.main import main
from tests.support import checkpoints

pytestmark = pytest.mark.usefixtures("proof_in_process", "no_page")

MAGNITUDE = '[prune]\nmethod = "magnitude"\npattern = "2:4"\n'


@pytest.fixture
def model(tmp_path):
    return checkpoints.write(tmp_path / "m")


def config(model, more=""):
    """Write a config of a run without text; ``more`` is a line of the table of the model."""
    file = model.parent / "c.toml"
    file.write_text(
        f'[model]\npath = "{model}"\ndevice = "cpu"\n{more}\n{MAGNITUDE}'
        f'[output]\npath = "{model.parent / "out"}"\n'
    )
    return file


def with_header(model, edit):
    """Rewrite the header of the weights; ``edit`` returns its bytes."""
    file = model / WEIGHTS_FILE
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = edit(json.loads(content[8 : 8 + length]))
    file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def number_metadata(model):
    with_header(model, lambda table: json.dumps(table | {"__metadata__": {"a": 1}}).encode())


def header_in_utf16(model):
    with_header(model, lambda table: json.dumps(table).encode("utf-16"))


def trailing_bytes(model):
    with (model / WEIGHTS_FILE).open("ab") as file:
        file.write(bytes(64))


def deep_config(model):
    nested = 1
    for _ in range(700):
        nested = {"a": nested}
    checkpoints.configure(model, deep=nested)


def tokenizer_folder(model):
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").mkdir()


def pipe_of_settings(model):
    (model / "generation_config.json").unlink()
    os.mkfifo(model / "generation_config.json")


def list_of_settings(model):
    (model / "generation_config.json").write_text("[]")


def shard_outside(model):
    (model / WEIGHTS_FILE).rename(model / "part.safetensors")
    (model / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "../w.safetensors"}}))


def commanding_shard(model):
    (model / WEIGHTS_FILE).rename(model / "part.safetensors")
    (model / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "b\x1b[31m"}}))


def kernels_of_the_hub(model):
    checkpoints.configure(model, attn_implementation="acme/attention")


REFUSED = {
    number_metadata: "safetensors cannot open it",
    header_in_utf16: "its header is not JSON",
    trailing_bytes: "file not fully covered",
    deep_config: "nests tables and lists over 64 deep",
    tokenizer_folder: "tokenizer.json: cannot be read (it is no file",
    pipe_of_settings: "generation_config.json: cannot be read (it is no file",
    list_of_settings: "transformers opens no model beside one that is not a JSON object",
    shard_outside: "places a at '../w.safetensors', outside the folder",
    commanding_shard: "b\\x1b[31m: is missing",
    kernels_of_the_hub: "names code on the hub, 'acme/attention', which is never run",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_a_model_that_is_refused_is_refused_by_the_plan(model, spoil, capsys):
    spoil(model)
    assert main(["plan", str(config(model))]) == 2
    assert REFUSED[spoil] in capsys.readouterr().err


def surrogates(model):
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace("{", '{"note": "\\ud800",', 1))


def latin_names(model):
    (model / os.fsdecode(b"caf\xe9.txt")).write_text("not UTF-8")


def odd_tensors(model):
    odd = {"a\nb\x1b[31m": torch.ones(2), "": torch.ones(2), "../../x": torch.ones(2)}
    checkpoints.save(model, checkpoints.tensors(model) | odd)


def linked_shard(model):
    (model / WEIGHTS_FILE).rename(model.parent / "w.safetensors")
    (model / WEIGHTS_FILE).symlink_to("../w.safetensors")


def code_of_parts(model):
    checkpoints.configure(model, part={"auto_map": {"AutoModel": "x.M"}})
    (model / "x.py").write_text("raise SystemExit('code of the checkpoint')\n")


@pytest.mark.parametrize(
    "change",
    [surrogates, latin_names, odd_tensors, linked_shard, code_of_parts],
    ids=lambda change: change.__name__,
)
def test_what_is_only_odd_works_to_the_end(model, tmp_path, change, capfd):
    change(model)
    out = str(tmp_path / "out")
    for command in (
        ["run", str(config(model)), "--quiet"],
        ["verify", out],
        ["report", out],
        ["inspect", out],
        ["convert", out, str(tmp_path / "packed"), "--format", "2:4"],
    ):
        assert main(command) == 0, capfd.readouterr()
    said = "".join(capfd.readouterr())
    assert "\x1b" not in said
    assert "auto_map" not in (tmp_path / "out/config.json").read_text()


def test_a_config_cannot_ask_for_code(model, capsys):
    assert main(["plan", str(config(model, "trust_remote_code = true"))]) == 2
    assert "model.trust_remote_code: no such key." in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_a_config_in_another_encoding_is_refused(model, encoding, capsys):
    file = config(model)
    file.write_bytes(f"{file.read_text()}# é\n".encode(encoding))
    assert main(["plan", str(file)]) == (0 if encoding == "utf-8-sig" else 2)
    said = capsys.readouterr().err
    assert said == ("" if encoding == "utf-8-sig" else f"{file}: is not text in UTF-8.\n")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS_FILE, "."])
def test_a_part_of_the_model_is_no_config(model, name, capsys):
    assert main(["run", str(model / name)]) == 2
    assert capsys.readouterr().err.startswith(str(model / name))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('exit') }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(tmp_path, template, capsys):
    model = checkpoints.write(tmp_path / "m")
    checkpoints.templated(template).save_pretrained(model)
    text = tmp_path / "a.jsonl"
    text.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    assert main(["evaluate", str(model), "--data", str(text)]) == 2
    assert "a.jsonl:1: the chat template rejects this row: " in capsys.readouterr().err
