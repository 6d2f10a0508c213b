"""Low-rank adapters make up for pruned weights."""

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

import prunekit
from prunekit.errors import ConfigError
from prunekit.evaluation.perplexity import evaluate
from prunekit.sparsify.lowrank import low_rank_factors
from tests.kernels.layers import correlated
from tests.support.architectures import tiny
from tests.support.checkpoints import planned, tensors, write

pytestmark = pytest.mark.usefixtures("no_page")

LOW = {"method": "sparsegpt", "pattern": "2:4", "recover": "lowrank", "recover_rank": 6}


@pytest.mark.parametrize("rank", [1, 5, 24, 100])
def test_is_the_best_product_of_its_rank(rank):
    """Compare with the truncated SVD of E H^½ in float64 (EoRA, eq. 4-6)."""
    weight, gram = correlated(24, 40)
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.sqrt()
    left, found, right = torch.linalg.svd(weight @ root, full_matrices=False)
    best = (left[:, :rank] * found[:rank]) @ right[:rank] @ torch.linalg.inv(root)
    adapter = low_rank_factors(weight.float(), gram.float(), rank)
    assert adapter.up.shape == (24, min(rank, 24))
    assert adapter.down.shape == (min(rank, 24), 40)
    error = weight - adapter.product.double()
    least = weight - best
    energy = float(((weight @ gram) * weight).sum())
    assert float(((error @ gram) * error).sum()) <= (
        1.001 * float(((least @ gram) * least).sum()) + 1e-6 * energy
    )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_peft_opens_the_adapter_and_answers_as_measured(tmp_path, model_type):
    folder = write(tmp_path / "m", model_type)
    judged = {"data": str(folder / "text.txt"), "length": 12}
    *_, finish = prunekit.run(planned(folder, tmp_path / "out", prune=LOW, evaluate=judged))
    report = finish.values
    layers = report["layers"]
    assert all(layer["recovered_error"] < layer["relative_error"] for layer in layers)
    assert {layer["sparsity"] for layer in layers} == {0.5}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model = PeftModel.from_pretrained(plain, tmp_path / "out/adapter").eval()
    ids = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(1))
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    dense = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        near, far = ((each(ids)[0] - dense(ids)[0]).square().mean() for each in (model, alone))
    assert near < far
    (judgement,) = report["evaluation"]
    assert "with the adapter" in judgement["protocol"]
    merged = model.merge_and_unload()
    for name, value in tensors(folder).items():
        assert merged.get_parameter(name).shape == value.shape
    merged.save_pretrained(tmp_path / "merged")
    (again,) = evaluate(
        str(write_tokenizer(folder, tmp_path / "merged")), [judged["data"]], 12, None, "cpu"
    )
    assert again["value"] == pytest.approx(judgement["after"], rel=1e-4)


def write_tokenizer(folder, target):
    for file in folder.glob("tokenizer*"):
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_stopped_run_goes_on_in_the_same_bytes(tmp_path):
    folder = write(tmp_path / "m")
    prune = {**LOW, "target": "dense"}
    list(prunekit.run(planned(folder, tmp_path / "whole", prune=prune)))
    records = prunekit.run(planned(folder, tmp_path / "out", prune=prune))
    for record in records:
        if record.kind == "block":
            records.close()
    for _ in range(2):
        list(prunekit.run(planned(folder, tmp_path / "out", prune=prune), resume=True))
        for file in (tmp_path / "whole").glob("**/*.safetensors"):
            other = tmp_path / "out" / file.relative_to(tmp_path / "whole")
            assert file.read_bytes() == other.read_bytes()
    assert len([*(tmp_path / "out/adapter").iterdir()]) == 2


def test_is_refused_where_it_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="recover lowrank: writes an adapter"):
        prunekit.prune(tiny("llama"), torch.ones(2, 4, dtype=torch.int64), **LOW)
    folder = write(tmp_path / "m")
    with pytest.raises(ValidationError, match="writes an adapter for dense linears"):
        planned(folder, tmp_path / "out", prune=LOW, output={"format": "2:4"})
    with pytest.raises(ValidationError, match='only with recover = "lowrank"'):
        planned(folder, tmp_path / "out", prune={**LOW, "recover": "block"})
