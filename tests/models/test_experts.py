"""Pruning fused experts equals a float64 loop over experts."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunekit
from prunekit.architectures import find_architecture
from prunekit.architectures.expert_layout import FUSED_PARTS
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.errors import CheckpointError, ConfigError, NumericsError
from prunekit.evaluation.verify import verify
from prunekit.models.empty_model import empty_model
from prunekit.models.experts import expert_of, unfuse, unfused
from prunekit.models.sequential.activation_cache import ActivationCache
from prunekit.models.weight_names import check_whole_tensors
from prunekit.runs.sparsify import run
from tests.support import checkpoints
from tests.support.architectures import (
    FUSED,
    OWN_EXPERTS,
    assert_stages_match_forward,
    tiny,
)
from tests.support.checkpoints import planned

pytestmark = pytest.mark.usefixtures("no_page")

HALF = {"pattern": "unstructured", "sparsity": 0.5}


@pytest.fixture(scope="module", params=FUSED)
def folder(request, tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("model"), request.param)


def ids_of(plan):
    return run.SparsifyRun(plan)._texts()[0].ids


def exact(folder):
    """Return the model as loaded by stock transformers, in float64."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )
    return model.eval().requires_grad_(requires_grad=False)


def linears(block):
    """Yield the matrices of a stock block and functions for their inputs.

    Each item is (prunekit name, weight, module to hook, function from the module's inputs to those
    of the matrix).
    """
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        module = block.self_attn.get_submodule(name)
        yield f"self_attn.{name}", module.weight, module, lambda x: x.flatten(0, -2)
    experts = block.mlp.experts
    for number in range(len(experts.down_proj)):

        def routed(x, index, _, number=number):
            return x[(index == number).any(1)]

        def neurons(x, index, shares, number=number):
            rows = routed(x, index, shares, number)
            gate, up = (rows @ experts.gate_up_proj[number].T).chunk(2, -1)
            return experts.act_fn(gate) * up

        where = f"mlp.experts.{number}"
        gate, up = experts.gate_up_proj[number].chunk(2)
        yield f"{where}.gate_proj", gate, experts, routed
        yield f"{where}.up_proj", up, experts, routed
        yield f"{where}.down_proj", experts.down_proj[number], experts, neurons


def weights_and_inputs(model, index, ids, *, everything=False):
    """Return the float64 weight and input of each matrix of a block."""
    given = {}
    block = model.model.layers[index]
    found = list(linears(block))
    hooks = [
        module.register_forward_pre_hook(lambda module, x: given.update({module: x}))
        for module in {module for _, _, module, _ in found}
    ]
    model(ids)
    if everything:
        experts = block.mlp.experts
        x, index, shares = given[experts]
        given[experts] = x, torch.arange(len(experts.down_proj)).expand(len(x), -1), shares
    result = {name: (weight, look(*given[module])) for name, weight, module, look in found}
    for hook in hooks:
        hook.remove()
    return result


def wanda(weight, x, n_of_m):
    """Return the keep mask of Wanda, computed row by row."""
    score = weight.abs() * x.square().sum(0).sqrt()
    keep = torch.zeros_like(score, dtype=torch.bool)
    for row, scores in enumerate(score):
        for group in range(0, len(scores), 4) if n_of_m else [0]:
            part = scores[group : group + 4] if n_of_m else scores
            best = part.argsort(descending=True, stable=True)[: (len(part) + 1) // 2]
            keep[row, group + best] = True
    return keep


def written(folder):
    """Return the weights of a folder under prunekit's names of linears."""
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    tensors = {}
    for name, tensor in checkpoints.tensors(folder).items():
        *path, part, _ = name.replace("block_sparse_moe", "mlp").rsplit(".", 2)
        tensors[".".join([*path, names.get(part, part)])] = tensor
    return tensors


@pytest.mark.parametrize("section", [{"pattern": "2:4"}, HALF])
def test_wanda_is_that_of_a_loop_over_the_experts(folder, tmp_path, section):
    prune = {"method": "wanda", "starved_below": 1, **section}
    plan = planned(folder, tmp_path / "out", prune=prune)
    report = [*run.run(plan)][-1].values
    model, found = exact(folder), written(tmp_path / "out")
    tokens = {layer["name"]: layer.get("tokens") for layer in report["layers"]}
    for index in range(2):
        for name, (weight, x) in weights_and_inputs(model, index, ids_of(plan)).items():
            full = f"model.layers.{index}.{name}"
            keep = wanda(weight, x, section["pattern"] == "2:4")
            assert torch.equal(found[full] != 0, keep), full
            assert torch.equal(found[full], (weight * keep).float())
            assert tokens[full] == (len(x) if "experts" in name else None)
            weight.mul_(keep)
    # Stock transformers loads the output, and the router is unchanged.
    ids = ids_of(plan)
    opened = exact(tmp_path / "out")
    torch.testing.assert_close(opened(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("section", "propagation"), [({"pattern": "2:4"}, "block"), (HALF, "stage")]
)
def test_the_error_of_sparsegpt_is_that_on_routed_tokens(folder, tmp_path, section, propagation):
    prune = {"method": "sparsegpt", "propagation": propagation, "starved_below": 1, **section}
    plan = planned(folder, tmp_path / "out", prune=prune)
    report = [*run.run(plan)][-1].values
    model, found = exact(folder), written(tmp_path / "out")
    told = {layer["name"]: layer["relative_error"] for layer in report["layers"]}
    dense = {
        name: weight.clone()
        for name, (weight, _) in weights_and_inputs(model, 0, ids_of(plan)).items()
    }
    for name in list(dense):
        weight, x = weights_and_inputs(model, 0, ids_of(plan))[name]
        full = f"model.layers.0.{name}"
        new = found[full].double()
        error = ((new - dense[name]) @ x.T).square().sum() / (dense[name] @ x.T).square().sum()
        assert told[full] == pytest.approx(float(error), rel=1e-3)
        if propagation == "stage":
            weight.copy_(new)


def test_a_starved_expert_is_pruned_by_magnitude_where_that_is_said(folder, tmp_path):
    prune = {"method": "sparsegpt", "pattern": "2:4", "starved": "magnitude"}
    prune |= {"starved_below": 10**6, "refine": "pcg"}
    plan = planned(folder, tmp_path / "out", prune=prune)
    report = [*run.run(plan)][-1].values
    dense, found = written(folder), written(tmp_path / "out")
    for layer in report["layers"]:
        if "experts" in layer["name"]:
            name = f"{layer['name']}"
            keep = wanda(dense[name], torch.ones(1, layer["shape"][1]), n_of_m=True)
            assert torch.equal(found[name], dense[name] * keep)
            assert layer["starved"] == "magnitude"
        else:
            assert "starved" not in layer


def test_a_starved_expert_reads_all_tokens_where_that_is_said(folder, tmp_path):
    prune = {"method": "wanda", "pattern": "2:4", "starved_below": 10**6}
    plan = planned(folder, tmp_path / "out", prune=prune)
    report = [*run.run(plan)][-1].values
    found, every = (
        written(tmp_path / "out"),
        weights_and_inputs(exact(folder), 0, ids_of(plan), everything=True),
    )
    routed = weights_and_inputs(exact(folder), 0, ids_of(plan))
    told = {layer["name"]: layer for layer in report["layers"]}
    for name, (weight, x) in every.items():
        full = f"model.layers.0.{name}"
        assert torch.equal(found[full] != 0, wanda(weight, x, n_of_m=True))
        if "experts" in name:
            assert told[full]["starved"] == "all-tokens"
            assert told[full]["tokens"] == len(routed[name][1]) < len(x)


def test_stage_by_stage_a_starved_expert_reads_all_tokens_of_the_pruned_block(
    folder, tmp_path, monkeypatch
):
    outputs = []
    for known in ("all", "nothing"):
        if known == "nothing":
            monkeypatch.setattr(ActivationCache, "around", lambda *arguments: arguments[-1])
        prune = {"method": "sparsegpt", "pattern": "2:4", "starved_below": 10**6}
        [*run.run(planned(folder, tmp_path / known, prune=prune | {"propagation": "stage"}))]
        outputs.append(written(tmp_path / known))
    for name, tensor in outputs[0].items():
        assert torch.equal(tensor, outputs[1][name]), name


def test_a_starved_expert_is_an_error_where_that_is_said(folder, tmp_path):
    prune = {"method": "wanda", "pattern": "2:4", "starved": "error", "starved_below": 49}
    plan = planned(folder, tmp_path / "out", prune=prune)
    message = r"layers.0.mlp.experts.\d.gate_proj: \d+ tokens are routed to its expert, fewer than"
    with pytest.raises(NumericsError, match=message):
        [*run.run(plan)]


def test_an_expert_without_a_token_has_no_error(folder, tmp_path):
    """Three tokens with two experts each reach at most 6 of 8."""
    count = {"num_local_experts": 8, "num_experts": 8}
    few = checkpoints.write(tmp_path / "few", exact(folder).config.model_type, **count)
    calibration = {"samples": 1, "length": 3}
    prune = {"method": "admm", "pattern": "2:4", "starved": "magnitude", "starved_below": 1}
    plan = planned(few, tmp_path / "out", calibration=calibration, prune=prune)
    report = [*run.run(plan)][-1].values
    none = [layer for layer in report["layers"] if layer.get("tokens") == 0]
    assert none
    assert all(layer["relative_error"] is None for layer in none)
    assert {layer["starved"] for layer in none} == {"magnitude"}
    assert all(layer["sparsity"] == 0.5 for layer in report["layers"])


@pytest.mark.parametrize("model_type", FUSED)
def test_a_model_in_memory_is_pruned_in_place_and_stays_fused(model_type):
    model = tiny(model_type)
    names, before = [*model.state_dict()], model.config._experts_implementation
    router = model.model.layers[0].mlp.gate.weight.clone()
    ids = torch.randint(0, 96, (4, 12))
    entries = prunekit.prune(model, ids, method="wanda", pattern="2:4")
    assert [*model.state_dict()] == names
    assert model.config._experts_implementation == before
    experts = model.model.layers[0].mlp.experts
    for fused in FUSED_PARTS:
        assert int((getattr(experts, fused) == 0).sum()) == getattr(experts, fused).numel() // 2
    assert torch.equal(model.model.layers[0].mlp.gate.weight, router)
    assert len(entries) == 2 * (4 + 3 * 4)
    assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize("model_type", FUSED)
def test_declaration_tells_the_truth_of_experts_as_linears(model_type):
    model = tiny(model_type)
    unfuse(model)
    assert_stages_match_forward(model, find_architecture(model))


@pytest.mark.parametrize("model_type", ["mixtral", *OWN_EXPERTS, "switch_transformers"])
def test_as_linears_experts_answer_as_they_did(model_type):
    model, ids = tiny(model_type), torch.randint(0, 96, (2, 9))
    inputs = {"input_ids": ids}
    inputs |= {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    names = [*model.state_dict()]
    with torch.no_grad():
        before = model(**inputs).logits
        with unfused(model):
            torch.testing.assert_close(model(**inputs).logits, before)
        assert torch.equal(model(**inputs).logits, before)
    assert [*model.state_dict()] == names


@pytest.mark.parametrize("model_type", ["llama4_text", "longcat_flash", "switch_transformers"])
def test_experts_that_read_all_tokens_are_observed_on_each_once(model_type):
    model, ids = tiny(model_type), torch.randint(0, 96, (1, 9))
    inputs = {"input_ids": ids}
    inputs |= {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad(), unfused(model):
        experts = [
            module
            for path, module in model.named_modules()
            if expert_of(model, f"{path}.any") == path and path
        ]
        assert experts
        seen = []
        for expert in experts:
            expert.reads_all = True
            first = next(iter(expert.children()))
            first.register_forward_hook(lambda _, x, __: seen.append(len(x[0])))
        model(**inputs)
    assert sum(seen) == 9 * len(experts)


def test_blocks_without_experts_have_one_feed_forward(tmp_path):
    folder = checkpoints.write(tmp_path / "m", "qwen3_moe", mlp_only_layers=[0])
    plan = planned(folder, tmp_path / "out")
    dense, sparse = ([linear.path for linear in block.linears] for block in plan.blocks)
    assert "mlp.gate_proj" in dense
    assert "mlp.experts.3.down_proj" in sparse
    assert len(dense) == 7
    assert len(sparse) == 4 + 3 * 4


def test_experts_in_one_tensor_are_pruned_like_those_in_a_tensor_each(tmp_path):
    outputs = []
    for original in (True, False):
        folder = checkpoints.write(tmp_path / f"m{original}", "mixtral")
        tiny("mixtral").save_pretrained(folder, save_original_format=original)
        list(run.run(planned(folder, tmp_path / f"out{original}")))
        assert checkpoints.tensors(tmp_path / f"out{original}").keys() == (
            checkpoints.tensors(folder).keys()
        )
        outputs.append(exact(tmp_path / f"out{original}").state_dict())
    each, together = outputs
    for name, tensor in each.items():
        assert torch.equal(tensor, together[name]), name
    report = verify(tmp_path / "outFalse")
    assert all(check.passed for check in report)


@pytest.mark.parametrize("model_type", ["gpt_oss", "granitemoe"])
def test_a_resumed_run_writes_experts_in_one_tensor_as_an_uninterrupted_one(model_type, tmp_path):
    folder = checkpoints.write(tmp_path / "m", model_type)
    prune = {"method": "sparsegpt", "pattern": "2:4"}
    whole, stopped = checkpoints.run_whole_and_stopped(folder, tmp_path, prune=prune)
    checkpoints.same_bytes(whole, stopped)


def test_experts_in_one_tensor_are_not_trained(tmp_path):
    checkpoint = open_checkpoint(checkpoints.write(tmp_path / "m", "granitemoe"))
    with pytest.raises(CheckpointError, match=r"input_linear\.weight is not all of \S+experts"):
        check_whole_tensors(empty_model(checkpoint), checkpoint)


def test_experts_are_written_dense(tmp_path):
    folder = checkpoints.write(tmp_path / "m", "mixtral")
    with pytest.raises(ConfigError, match=r'output.format: .*experts.*"dense"'):
        planned(folder, tmp_path / "out", output={"format": "bitmask"})


@pytest.mark.parametrize("recover", ["block", "lowrank"])
def test_experts_are_not_recovered(tmp_path, recover):
    folder = checkpoints.write(tmp_path / "m", "mixtral")
    with pytest.raises(ConfigError, match=rf'recover = "{recover}": \S*experts\.0\S* is of an exp'):
        planned(folder, tmp_path / "out", prune={"recover": recover})
