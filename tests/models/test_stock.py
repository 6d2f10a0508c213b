"""Opening checkpoints with transformers: code in a checkpoint never runs."""

import ast
import io
import json
import sys

import pytest
import torch
import transformers
from transformers import PretrainedConfig, dynamic_module_utils

from prunekit.models import stock
from tests.conftest import ROOT
from tests.support import checkpoints

OPENS = {"from_pretrained", "from_config", "_from_config", "get_class_from_dynamic_module"}
STARTS = {"run", "Popen", "call", "check_call", "check_output"}
UNITS = "prunekit/models/units"
ALLOWED = {
    "prunekit/models/stock.py",
    "prunekit/models/processors.py",
    "prunekit/evaluation/harness.py",
    f"{UNITS}/meta_model.py",
    f"{UNITS}/removal.py",
}
"""Files that may build or open models; those on units build the class of a model in memory, and the
harness has peft read an adapter of safetensors, which has no code."""


def calls(folder):
    """Yield file, called name and call of each call in a folder of Python files."""
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                yield str(file.relative_to(ROOT)), node.func, node


def arguments(call):
    return {word.arg: ast.unparse(word.value) for word in call.keywords}


@pytest.mark.parametrize("folder", ["prunekit", "bench"])
def test_no_other_file_lets_transformers_run_code_of_a_checkpoint(folder):
    for file, function, call in calls(folder):
        if function.attr in OPENS and file not in ALLOWED:
            given = arguments(call)
            assert given.get("trust_remote_code") == "False", f"{file}:{call.lineno}"


@pytest.mark.parametrize("folder", ["prunekit", "bench"])
def test_no_child_inherits_standard_input(folder):
    for file, function, call in calls(folder):
        if function.attr in STARTS and ast.unparse(function.value) == "subprocess":
            assert arguments(call).get("stdin") == "subprocess.DEVNULL", f"{file}:{call.lineno}"


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A checkpoint with code, and a user who answers "y" to every question."""
    folder = checkpoints.hostile(tmp_path / "m")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    return folder


def ran(folder):
    return (folder / checkpoints.WITNESS).exists()


OPENERS = (stock.read_config, stock.open_model, stock.read_tokenizer)


@pytest.mark.parametrize("opens", [stock.read_config, stock.open_model])
def test_code_is_refused_where_the_model_needs_it(hostile, opens):
    checkpoints.configure(hostile, model_type="unheard_of")
    with pytest.raises(ValueError, match="custom code"):
        opens(hostile)
    assert not ran(hostile)


def test_code_of_an_unknown_tokenizer_is_refused(hostile):
    file = hostile / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "X"}))
    checkpoints.configure(hostile, model_type="unheard_of")
    with pytest.raises(ValueError, match="custom code"):
        stock.read_tokenizer(hostile)
    assert not ran(hostile)


@pytest.mark.parametrize("opens", OPENERS)
def test_code_beside_a_known_model_is_ignored(hostile, opens):
    assert type(opens(hostile)).__module__.startswith("transformers.")
    assert not ran(hostile)


def test_code_of_a_model_inside_of_a_model_is_refused(hostile):
    """transformers itself would ask here, since it passes on no ``trust_remote_code``."""
    inner = {"model_type": "t5", "auto_map": {"AutoModelForCausalLM": f"{hostile}--modeling_x.C"}}
    nested = {"architectures": ["EncoderDecoderModel"], "model_type": "encoder-decoder"}
    nested |= {"encoder": {"model_type": "bert"}, "decoder": inner, "auto_map": None}
    checkpoints.configure(hostile, **nested)
    config = stock.read_config(hostile)
    with pytest.raises(ValueError, match="execute custom code"):
        stock.build_model(config)
    with pytest.raises(ValueError, match="execute custom code"):
        stock.open_model(hostile)
    assert not ran(hostile)


def test_code_of_a_tokenizer_inside_of_a_tokenizer_is_refused(hostile):
    file = hostile / "tokenizer_config.json"
    told = json.loads(file.read_text())
    for part in ("question_encoder", "generator"):
        inner = hostile / f"{part}_tokenizer"
        inner.mkdir()
        inner.joinpath("tokenizer_config.json").write_text(
            json.dumps({"auto_map": told["auto_map"], "tokenizer_class": "X"})
        )
    file.write_text(json.dumps({"tokenizer_class": "RagTokenizer"}))
    checkpoints.configure(
        hostile,
        model_type="rag",
        question_encoder={"model_type": "vit"},
        generator={"model_type": "bart"},
    )
    with pytest.raises(ValueError, match="execute custom code"):
        stock.read_tokenizer(hostile)
    assert not ran(hostile)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["kernels-community/flash-attn", "a/b@main:c", {"": "a/b"}])
def test_attention_code_on_the_hub_is_refused(tmp_path, key, value):
    checkpoints.configure(checkpoints.write(tmp_path), **{key: value})
    with pytest.raises(ValueError, match="names code on the hub"):
        stock.read_config(tmp_path)


def test_pickled_weights_are_not_opened(tmp_path):
    folder = checkpoints.write(tmp_path)
    torch.save(checkpoints.tensors(folder), folder / "pytorch_model.bin")
    checkpoints.single(folder).unlink()
    with pytest.raises(OSError, match="safetensors"):
        stock.open_model(folder)


def test_an_adapter_beside_the_weights_is_not_applied(tmp_path):
    folder = checkpoints.write(tmp_path)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "megatron_core": "evil"}')
    opened = stock.open_model(folder)
    assert opened.state_dict().keys() == checkpoints.tiny("llama").state_dict().keys()


def test_missing_weights_are_named_instead_of_made_up(tmp_path):
    folder = checkpoints.write(tmp_path)
    held = checkpoints.tensors(folder)
    del held["model.norm.weight"]
    checkpoints.save(folder, held)
    with pytest.raises(ValueError, match=r"1 weights are missing.*model\.norm\.weight"):
        stock.open_model(folder)


@pytest.mark.parametrize(
    "names", [["Nothing"], "Nothing", 3, [3], {"a": 1}, ["AutoModel"], ["pipeline"]]
)
def test_what_is_no_model_class_is_named(names):
    config = PretrainedConfig()
    config.architectures = names
    with pytest.raises(ValueError, match=f"transformers {transformers.__version__} has no "):
        stock.named_class(config)


def test_transformers_is_left_as_it_was(hostile):
    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    stock.open_model(hostile)
    checkpoints.configure(hostile, model_type="unheard_of")
    with pytest.raises(ValueError, match="custom code"):
        stock.read_config(hostile)
    assert before == dynamic_module_utils.TIME_OUT_REMOTE_CODE > 0
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_a_sample_is_spread_over_all_answers():
    answers = torch.arange(2 * 3 * 100.0).view(2, 3, 100)
    found = stock.sample_outputs(answers)
    assert len(found) == 6 * 32
    assert found[0] == 0
    assert found[-1] == 599
    assert torch.equal(stock.sample_outputs(answers[:, :, :5]), answers[:, :, :5].flatten())


def test_a_request_is_answered_in_a_file(tmp_path):
    folder, result = checkpoints.write(tmp_path / "m"), tmp_path / "result.json"
    asked = {"ids": [[1, 2]], "dtype": "float32", "device": "cpu"}
    request = {"folder": str(folder), "asked": asked, "device_map": {}, "prunekit": True}
    stock.main(json.dumps(request | {"result": str(result)}))
    expected = stock.answers(folder, asked, {}).tolist()
    assert json.loads(result.read_text()) == {"answers": expected}
    checkpoints.configure(folder, architectures=["Nothing"])
    stock.main(json.dumps(request | {"result": str(result)}))
    assert json.loads(result.read_text())["error"].startswith("ValueError: transformers ")


def test_names_of_tensors_do_not_reach_the_terminal(tmp_path, capfd):
    """transformers reports tensors that it does not use, by their names as they are."""
    folder, before = checkpoints.write(tmp_path), transformers.utils.logging.get_verbosity()
    checkpoints.save(folder, checkpoints.tensors(folder) | {"\x1b[31mred": torch.ones(1)})
    capfd.readouterr()
    stock.open_model(folder)
    assert "red" not in "".join(capfd.readouterr())
    assert transformers.utils.logging.get_verbosity() == before
