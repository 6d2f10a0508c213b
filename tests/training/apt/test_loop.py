"""APT as a whole: adapters train, prune, grow and are merged, in every family."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import prunekit
from prunekit.architectures.adapters import adapter_layers
from prunekit.config.apt_table import Apt
from prunekit.config.distill_table import Distill
from prunekit.errors import ConfigError, NumericsError, PrunekitError, ShapeError
from prunekit.models.units.removal import count_parameters
from prunekit.structured.gate_set import attached_gates
from prunekit.structured.parameter_budget import counted_parameters
from prunekit.training.apt.growth import low_rank_layers
from prunekit.training.apt.loop import apt, default_targets
from prunekit.training.apt.pruner import AptPruner
from tests.support.adapters import PEFT_WARNS
from tests.support.architectures import tiny
from tests.support.units import batch, randomized_model, valid_logits

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(*PEFT_WARNS)

SETTINGS = {
    "parameters": 0.5, "rank": 2, "most_rank": 6, "warmup": 2, "window": 3, "windows": 3,
    "decay": 0.4, "steps": 14, "rate": 1e-2, "batch": 2, "held_out": 1, "every": 7,
}  # fmt: skip
CLASSIFIER = AutoModelForSequenceClassification


def settings(**values) -> Apt:
    return Apt.model_validate({**SETTINGS, **values})


def labelled(model) -> dict[str, torch.Tensor]:
    """Return a padded batch of two sentences with labels."""
    given = batch(model)
    return {**given, "labels": torch.tensor([0, 1])}


def trained(model, asked, given=None):
    """Run APT; return the records."""
    given = given or batch(model)
    return [*apt(model, [given, given], [given], asked)]


@pytest.mark.parametrize(
    ("model_type", "kinds", "head"),
    [
        ("bert", ["heads", "neurons"], CLASSIFIER),
        pytest.param("roberta", ["heads", "neurons"], None, marks=pytest.mark.soak),
        pytest.param("distilbert", ["heads", "neurons"], CLASSIFIER, marks=pytest.mark.soak),
        ("t5", ["hidden", "heads", "neurons"], None),
        ("gpt2", ["heads", "neurons"], None),
        ("llama", ["hidden", "heads", "neurons"], None),
        pytest.param("qwen3", ["hidden", "heads", "neurons"], None, marks=pytest.mark.soak),
    ],
)
def test_a_family_meets_its_budget_and_no_cut_growth_or_merge_changes_it(
    model_type, kinds, head, monkeypatch
):
    model = tiny(model_type, head=head) if head else randomized_model(model_type)
    given = labelled(model) if head else batch(model)
    dense, whole = valid_logits(model, given), count_parameters(model)
    differences: dict[str, list[float]] = {}
    for name in ("cut", "_grow"):
        _measure(monkeypatch, name, model, given, differences)
    asked = settings(kinds=kinds, parameters_of="model" if "hidden" in kinds else "blocks")
    counted = sum(each.numel() for each in counted_parameters(model, asked.parameters_of))
    records = [*apt(model, [given, given], [given], asked)]
    last = records[-1]
    assert len(differences["cut"]) == len(differences["_grow"]) == asked.windows
    assert max(differences["cut"]) < 1e-5
    assert max(differences["_grow"]) < 1e-5
    assert last.done
    assert last.details["parameters"] <= asked.parameters * counted
    left = sum(each.numel() for each in counted_parameters(model, asked.parameters_of))
    assert left == last.details["parameters"]
    assert count_parameters(model) - whole == left - counted
    assert not adapter_layers(model)
    assert not torch.equal(valid_logits(model, given), dense)
    assert not any(gates.closed for gates in map(prunekit.heads, [model]))
    assert last.held_out is not None


def _measure(monkeypatch, name, model, given, differences):
    """Record how much a method of the pruner changes the logits, of the largest one."""
    method = getattr(AptPruner, name)

    def measured(self):
        before = valid_logits(model, given)
        method(self)
        after = valid_logits(model, given)
        largest = max(1.0, float(before.abs().max()))
        differences.setdefault(name, []).append(float((after - before).abs().max()) / largest)

    monkeypatch.setattr(AptPruner, name, measured)


def test_the_start_is_the_dense_model_and_only_adapters_have_moments():
    model = randomized_model("llama")
    given = batch(model)
    dense = valid_logits(model, given)
    steps = apt(model, [given], [given], settings())
    assert next(steps).step == 0
    assert torch.equal(valid_logits(model, given), dense)
    trains = {name for name, each in model.named_parameters() if each.requires_grad}
    assert trains
    assert all("lora_" in name for name in trains)
    steps.close()


def test_the_merged_model_answers_as_the_one_with_adapters(monkeypatch):
    model, found = randomized_model("llama"), {}
    given = batch(model)

    def merged(adapted):
        found["before"] = valid_logits(model, given)
        return merge(adapted)

    from prunekit.training.apt import loop

    merge = loop.merge_adapters
    monkeypatch.setattr(loop, "merge_adapters", merged)
    trained(model, settings(), given)
    torch.testing.assert_close(valid_logits(model, given), found["before"], atol=1e-5, rtol=0)


def test_masks_fall_by_steps_and_are_hard_at_the_end_of_a_window():
    model, seen = randomized_model("llama"), []
    given = batch(model)
    asked = settings(decay=0.3, windows=1, steps=6, kinds=["neurons"])
    original = AptPruner._move_gates

    def watched(self):
        original(self)
        seen.append(torch.cat([gate.factor.detach() for gate in self._every_gate().values()]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AptPruner, "_move_gates", watched)
        trained(model, asked, given)
    lowest = [float(each.min()) for each in seen]
    assert lowest == pytest.approx([0.7, 0.4, 0.1])
    assert all(float(each.max()) == 1 for each in seen)


def test_a_budget_that_cannot_be_met_is_refused_before_training():
    model = randomized_model("bert")
    with pytest.raises(ConfigError, match=r"parameters: 2.0 % cannot be had"):
        trained(model, settings(parameters=0.02, least=3))


def test_coordinates_under_a_layer_norm_are_refused_before_training():
    with pytest.raises(ShapeError, match="LayerNorm"):
        trained(randomized_model("bert"), settings(kinds=["hidden"]))


def test_encoders_adapt_the_up_projection_too():
    assert default_targets(tiny("llama")) == ["query", "value"]
    assert default_targets(tiny("bert")) == ["query", "value", "up"]
    assert default_targets(tiny("t5")) == ["query", "value", "up"]


def test_with_a_teacher_masks_hold_until_the_end_and_the_model_is_cut_then():
    model = tiny("bert", head=CLASSIFIER)
    given = labelled(model)
    whole = sum(each.numel() for each in counted_parameters(model, "blocks"))
    steps = apt(model, [given, given], [given], settings(), distill=Distill(start=1))
    records = []
    for record in steps:
        records.append(record)
        gates = prunekit.neurons(model)
        assert gates.units == 2 * 64
        before = valid_logits(model, given)
    left = sum(each.numel() for each in counted_parameters(model, "blocks"))
    assert left <= SETTINGS["parameters"] * whole
    assert left == records[-1].details["parameters"]
    assert records[-1].distillation["layer"] > 0
    assert valid_logits(model, given).shape == before.shape


def check_plain(model):
    """Check that no adapter, gate or hook is left, and that all weights can be trained."""
    assert not adapter_layers(model)
    assert not [kind for kind in ("heads", "neurons") if attached_gates(model, kind)]
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(each.requires_grad for each in model.parameters())


@pytest.mark.parametrize("distill", [None, Distill(start=1)])
@pytest.mark.parametrize("failing", [None, "_move_gates", "_before_step"])
def test_an_early_end_leaves_the_model_as_trained_so_far(failing, distill, monkeypatch, tmp_path):
    """At step 7: the first window has ended, in the second gates are half closed."""
    model = randomized_model("llama")
    given = batch(model)
    steps = apt(model, [given, given], [given], settings(every=1), distill=distill)
    for record in steps:
        if record.step == 7:
            break
    expected = record.details
    adapters = {name: merged_weight(each) for name, each in low_rank_layers(model).items()}
    if failing:
        monkeypatch.setattr(AptPruner, failing, lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(steps)
    else:
        steps.close()
    check_plain(model)
    left = sum(each.numel() for each in counted_parameters(model, "blocks"))
    assert left == expected["parameters"]
    if failing == "_before_step" and distill is None:
        for name, weight in adapters.items():
            assert torch.equal(model.get_parameter(f"{name}.weight"), weight)
    model.save_pretrained(tmp_path)
    opened = prunekit.load(tmp_path)
    assert torch.equal(valid_logits(opened, given), valid_logits(model, given))


def merged_weight(layer):
    return layer.base_layer.weight.detach() + layer.get_delta_weight("default").detach()


def test_adapters_that_are_not_finite_are_left_out():
    model = randomized_model("llama")
    given = batch(model)
    steps = apt(model, [given], [given], settings(every=1, parameters=0.9))
    next(steps)
    before = {name: each.base_layer.weight.clone() for name, each in low_rank_layers(model).items()}
    next(steps)
    for layer in low_rank_layers(model).values():
        layer.lora_B["default"].weight.data.fill_(torch.nan)
    with pytest.raises(NumericsError, match=r"apt: the loss is nan at step 2\. Lower apt\.rate"):
        next(steps)
    check_plain(model)
    for name, weight in before.items():
        assert torch.equal(model.get_parameter(f"{name}.weight"), weight)


@pytest.mark.parametrize(
    "wrong", [{"parameters": 0.02, "least": 3}, {"targets": ["nothing"]}, {"kinds": ["hidden"]}]
)
def test_a_refused_training_leaves_the_model_and_its_own_gates_as_they_were(wrong):
    model = randomized_model("bert")
    given = batch(model)
    gates = prunekit.heads(model)
    gates.gate(0, 1, 0.5)
    before = valid_logits(model, given)
    weights = {name: (each, each.clone()) for name, each in model.named_parameters()}
    with pytest.raises(PrunekitError):
        trained(model, settings(**wrong), given)
    assert torch.equal(valid_logits(model, given), before)
    assert prunekit.heads(model) is gates
    gates.detach()
    check_plain(model)
    for name, parameter in model.named_parameters():
        same, value = weights[name]
        assert parameter is same
        assert torch.equal(parameter, value)


def test_after_the_training_all_weights_can_be_trained_again():
    model = randomized_model("gpt2")
    model.transformer.wte.weight.requires_grad = False
    trained(model, settings())
    frozen = [name for name, each in model.named_parameters() if not each.requires_grad]
    assert frozen == ["transformer.wte.weight"]
