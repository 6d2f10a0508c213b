"""Writing of tiny random checkpoint folders with a character-level tokenizer."""

import json
import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from prunekit.checkpoint.weight_files import INDEX_FILE, WEIGHTS_FILE
from prunekit.config.run_config import Config
from prunekit.runs.sparsify.plan import Plan
from prunekit.runs.sparsify.planner import plan
from prunekit.runs.sparsify.run import run
from tests.support.architectures import tiny

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *string.ascii_letters, *string.digits, *" .,\n"]
TEXT = "the quick brown fox jumps over the lazy dog. pack my box with five dozen jugs.\n" * 20
NOT_COPIED = "Not copied, as no part of a pruned checkpoint: text.txt."
"""Note of each plan for a checkpoint that :func:`write` has written."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with ids below the tiny models' vocabulary size, 96."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def templated(template: str | dict[str, str]) -> PreTrainedTokenizerFast:
    """Return the tokenizer with a chat template."""
    made = tokenizer()
    made.chat_template = template
    return made


def write(
    folder: Path,
    model_type: str = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    shard_size: str = "5GB",
    head: Any = None,
    **overrides: Any,
) -> Path:
    """Write the tiny model of ``model_type``, its tokenizer and a calibration text."""
    model = tiny(model_type, head, **overrides).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


def planned(folder: Path, output: Path, /, **sections: Any) -> Plan:
    """Return the plan of a config whose sections override small defaults.

    ``None`` omits a section, or a key within a section.
    """
    values: dict[str, Any] = {
        "model": {"path": str(folder), "device": "cpu"},
        "calibration": {"data": str(folder / "text.txt"), "samples": 4, "length": 12},
        "prune": {"method": "wanda", "pattern": "2:4"},
        "output": {"path": str(output)},
    }
    for name, section in sections.items():
        merged = None if section is None else values.get(name, {}) | section
        values[name] = merged and {key: value for key, value in merged.items() if value is not None}
    given = {name: section for name, section in values.items() if section is not None}
    return plan(Config.model_validate(given))


def run_whole_and_stopped(folder: Path, place: Path, /, **sections: Any) -> tuple[Path, Path]:
    """Return the output folders of an uninterrupted and a resumed run.

    The second run is stopped after a block.
    """
    whole, stopped = place / "whole", place / "out"
    list(run(planned(folder, whole, **sections)))
    records = run(planned(folder, stopped, **sections))
    for record in records:
        if record.kind == "block":
            records.close()
    list(run(planned(folder, stopped, **sections), resume=True))
    return whole, stopped


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint folder."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def change(folder: Path, name: str, edit: Any) -> None:
    """Rewrite one tensor of a checkpoint.

    ``edit`` changes it in place, or returns its replacement.
    """
    for file in folder.glob("*.safetensors"):
        held = load_file(file)
        if name in held:
            held[name] = held[name].clone()
            result = edit(held[name])
            held[name] = held[name] if result is None else result
            save_file(held, file, metadata={"format": "pt"})
            return
    raise KeyError(name)


def configure(folder: Path, **entries: Any) -> None:
    """Change entries of ``config.json``; None removes one."""
    file = folder / "config.json"
    values = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def single(folder: Path) -> Path:
    """Return the one safetensors file of a checkpoint."""
    return folder / WEIGHTS_FILE


def save(folder: Path, held: dict[str, Tensor]) -> None:
    """Replace the weights of a single-file checkpoint."""
    save_file(held, single(folder), metadata={"format": "pt"})


def same_bytes(mine: Path, theirs: Path) -> None:
    """Assert equal weights and config in two folders without unfinished files."""
    found, expected = (
        {
            path.name: path.read_bytes()
            for path in folder.iterdir()
            if path.suffix == ".safetensors" or path.name in {"config.json", INDEX_FILE}
        }
        for folder in (mine, theirs)
    )
    assert found.keys() == expected.keys()
    assert [name for name, content in found.items() if content != expected[name]] == []
    assert not list(mine.glob(".*"))


WITNESS = "witness"
"""File that the code of a hostile checkpoint would create."""


def hostile(folder: Path, model_type: str = "llama", **overrides: Any) -> Path:
    """Write a checkpoint with code for its config, model, tokenizer and generation.

    The code writes a witness into the folder if it ever runs.
    """
    write(folder, model_type, **overrides)
    code = (
        f"open({str(folder / WITNESS)!r}, 'w').close()\n"
        "class C:\n    from_pretrained = from_config = _from_config = classmethod(print)\n"
        "def generate(*arguments, **options): ...\n"
    )
    places = ("configuration_x", "modeling_x", "tokenization_x", "custom_generate/generate")
    for place in places:
        file = folder / f"{place}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)
    models = ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM")
    code_of = {"AutoConfig": "configuration_x.C", **dict.fromkeys(models, "modeling_x.C")}
    configure(folder, auto_map=code_of, trust_remote_code=True)
    file = folder / "tokenizer_config.json"
    tokenizer_code = {"AutoTokenizer": ["tokenization_x.C", "tokenization_x.C"]}
    told = json.loads(file.read_text()) | {"auto_map": tokenizer_code, "trust_remote_code": True}
    file.write_text(json.dumps(told))
    return folder
