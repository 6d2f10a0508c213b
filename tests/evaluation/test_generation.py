"""Generated text and its speed, self-generated calibration text, error cases."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunekit
from prunekit.errors import ConfigError
from prunekit.evaluation.generation import generate
from tests.support.checkpoints import planned, write

pytestmark = pytest.mark.usefixtures("no_page")


def test_writes_what_greedy_decoding_writes(tmp_path: Path):
    folder = write(tmp_path / "model")
    (found,) = generate(str(folder), 6, ["the quick"], device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer("the quick", return_tensors="pt", return_token_type_ids=False)["input_ids"]
    read = ids.shape[1]
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert found.text == tokenizer.decode(ids[0, read:], skip_special_tokens=True)
    assert found.prefill > 0
    assert found.decode > 0
    assert 0 <= found.repetition <= 1


def test_refuses_a_model_that_does_not_generate(tmp_path: Path):
    folder = write(tmp_path / "model", "bert")
    with pytest.raises(ConfigError, match="does not generate text"):
        generate(str(folder), 4, ["the"], device="cpu")


def test_refuses_more_than_the_model_takes(tmp_path: Path):
    folder = write(tmp_path / "model", "gpt2")
    with pytest.raises(ConfigError, match=r"cannot generate 10000 tokens .* at most \d+ fit"):
        generate(str(folder), 10_000, ["the"], device="cpu")


def test_calibrates_on_what_the_dense_model_writes(tmp_path):
    folder = write(tmp_path / "m")
    own = {"data": "self", "samples": 20, "length": 10}
    plan = planned(folder, tmp_path / "out", calibration=own)
    assert plan.memory.writer > 0
    *_, finish = prunekit.run(plan)
    wrote = torch.tensor(json.loads((tmp_path / "out/calibration.json").read_text()))
    assert wrote.shape == (20, 10)
    assert set(wrote[:, 0].tolist()) == {1}  # <s>
    assert len(set(wrote.flatten().tolist())) > 50  # sampled at temperature 1 from a random model
    assert "that the dense model wrote, seed 0" in finish.values["calibration"]["description"]
    other = planned(folder, tmp_path / "other", calibration={**own, "seed": 1})
    list(prunekit.run(other))
    again = torch.tensor(json.loads((tmp_path / "other/calibration.json").read_text()))
    assert not torch.equal(again, wrote)


def test_a_resumed_run_reads_what_was_written(tmp_path):
    folder = write(tmp_path / "m")
    sections = {"calibration": {"data": "self"}, "prune": {"method": "wanda", "pattern": "2:4"}}
    list(prunekit.run(planned(folder, tmp_path / "whole", **sections)))
    records = prunekit.run(planned(folder, tmp_path / "out", **sections))
    for record in records:
        if record.kind == "block":
            records.close()
    file = tmp_path / "out/calibration.json"
    stamp = file.stat().st_mtime_ns
    list(prunekit.run(planned(folder, tmp_path / "out", **sections), resume=True))
    assert file.stat().st_mtime_ns == stamp
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()


def test_self_is_refused_where_it_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="BertForMaskedLM does not write text"):
        planned(write(tmp_path / "b", "bert"), tmp_path / "out", calibration={"data": "self"})
    folder = write(tmp_path / "m")
    two = ["self", str(folder / "text.txt")]
    with pytest.raises(ValidationError, match='"self" cannot be combined'):
        planned(folder, tmp_path / "out", calibration={"data": two})
    with pytest.raises(ValidationError, match="not a supported kind of text"):
        planned(folder, tmp_path / "out", evaluate={"data": "self"})
