"""Gradual pruning: exact sparsities at due steps, and nothing returns in between."""

import copy
import io

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

import prunekit
from prunekit.errors import ConfigError
from prunekit.training.gradual import GradualPruner
from prunekit.training.lora import add_adapter, merge_adapters
from prunekit.training.masks import keep_masks
from tests.support.architectures import tiny

CUBIC = {"sparsity": 0.7, "end": 4, "schedule": "cubic"}
OPTIMIZERS = {
    "AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1),
    "SGD": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.1),
}


@pytest.fixture
def ids():
    return torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(1))


def adamw(model):
    return OPTIMIZERS["AdamW"](model.parameters())


def train(model, optimizer, ids, steps=1):
    for _ in range(steps):
        model(input_ids=ids).logits.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def zeros(pruner):
    return {name: int((weight == 0).sum()) for name, weight in pruner.masks.weights.items()}


def masks(pruner):
    return {name: weight.detach() == 0 for name, weight in pruner.masks.weights.items()}


def assert_equal_models(one, other):
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_cubic_schedule_to_70_percent_has_exactly_the_published_counts(ids):
    model = tiny("llama")
    optimizer = adamw(model)
    with prunekit.GradualPruner(model, optimizer, sparsity=0.7, end=8, every=2) as pruner:
        assert (pruner.due, pruner.achieved, pruner.sparsity) == ((2, 4, 6, 8), 0, 0)
        found = []
        for step in range(1, 10):
            before = zeros(pruner)
            train(model, optimizer, ids)
            assert pruner.step == step
            if step % 2 or step > 8:
                assert zeros(pruner) == before
            else:
                assert zeros(pruner) == {
                    name: int(pruner.sparsity * weight.numel() + 1e-6)
                    for name, weight in pruner.masks.weights.items()
                }
                found.append(pruner.sparsity)
            assert pruner.done == (step >= 8)
        assert found == pytest.approx([0.4047, 0.6125, 0.6891, 0.7], abs=5e-5)
        assert pruner.due == ()
        sizes = sum(weight.numel() for weight in pruner.masks.weights.values())
        assert pruner.achieved == sum(zeros(pruner).values()) / sizes


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_pruned_weights_stay_zero_with_their_moments_and_only_more_are_pruned(make, ids):
    model = tiny("llama")
    optimizer = make(model.parameters())
    pruner = GradualPruner(model, optimizer, **CUBIC)
    before = masks(pruner)
    for _ in range(6):
        train(model, optimizer, ids)
        now = masks(pruner)
        assert all(bool(now[name][before[name]].all()) for name in now)
        before = now
    for name, weight in pruner.masks.weights.items():
        state = [each for each in optimizer.state[weight].values() if each.shape == weight.shape]
        assert state
        assert all(bool((each[now[name]] == 0).all()) for each in state)
        assert any(bool((each[~now[name]] != 0).any()) for each in state)
    pruner.remove()
    train(model, optimizer, ids, 2)
    assert pruner.achieved < 0.6


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("wanda", "unstructured"),
        ("ria", "block:2x4"),
        ("sparsegpt", "unstructured"),
        ("admm", "unstructured"),
        ("random", "row"),
    ],
)
def test_methods_with_statistics_gather_them_anew_at_each_due_step(method, pattern, ids):
    model = tiny("llama")
    optimizer = adamw(model)
    pruner = GradualPruner(model, optimizer, method=method, pattern=pattern, tokens=ids, **CUBIC)
    model.train()
    parameters = [*model.parameters()]
    before = masks(pruner)
    for _ in range(4):
        train(model, optimizer, ids)
        now = masks(pruner)
        assert all(bool(now[name][before[name]].all()) for name in now)
        before = now
    assert pruner.done
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert model.training


def test_statistics_are_those_of_the_weights_at_the_due_step(ids):
    """Wanda at a step is Wanda in one shot on the weights of that step."""
    settings = {"method": "wanda", "sparsity": 0.5}
    model = tiny("llama")
    optimizer = adamw(model)
    pruner = GradualPruner(model, optimizer, end=2, schedule="one-shot", tokens=ids, **settings)
    other = tiny("llama")
    train(model, optimizer, ids, 2)
    train(other, adamw(other), ids, 2)
    prunekit.prune(other, ids, **settings)
    for name, weight in pruner.masks.weights.items():
        assert torch.equal(weight, other.get_parameter(name)), name


def test_a_method_with_statistics_needs_tokens():
    model = tiny("llama")
    with pytest.raises(ConfigError, match=r"method wanda: needs calibration tokens"):
        GradualPruner(model, adamw(model), method="wanda", sparsity=0.5, end=3)


@pytest.mark.parametrize(
    ("stop", "settings"),
    [(1, {}), (4, {}), (2, {"method": "sparsegpt"}), (3, {"regrow": 0.3})],
    ids=str,
)
def test_interrupted_is_uninterrupted_bit_for_bit(stop, settings, ids):
    settings = {"sparsity": 0.6, "end": 6, "every": 2, "initial": 0.2, "tokens": ids} | settings
    if "regrow" in settings:
        settings["regrow_every"] = 3
    whole = tiny("llama")
    optimizer = adamw(whole)
    GradualPruner(whole, optimizer, **settings)
    file = io.BytesIO()
    first = tiny("llama")
    began = adamw(first)
    pruner = GradualPruner(first, began, **settings)
    train(whole, optimizer, ids, 7)
    train(first, began, ids, stop)
    torch.save([first.state_dict(), began.state_dict(), pruner.state_dict()], file)
    file.seek(0)
    saved = torch.load(file)
    second = tiny("llama")
    second.load_state_dict(saved[0])
    resumed = adamw(second)
    resumed.load_state_dict(saved[1])
    pruner = GradualPruner(second, resumed, **settings)
    pruner.load_state_dict(saved[2])
    train(second, resumed, ids, 7 - stop)
    assert pruner.done
    assert_equal_models(whole, second)


def test_a_state_of_other_settings_or_weights_is_refused(ids):
    model = tiny("llama")
    optimizer = adamw(model)
    with GradualPruner(model, optimizer, **CUBIC) as pruner:
        train(model, optimizer, ids, 2)
        state = pruner.state_dict()
    other = tiny("llama")
    with GradualPruner(other, adamw(other), **CUBIC) as pruner:
        with pytest.raises(ConfigError, match=r"weights of .* are pruned in them and not zero"):
            pruner.load_state_dict(state)
        assert pruner.step == 0
        assert pruner.achieved == 0
    pruner = GradualPruner(model, optimizer, **CUBIC | {"end": 5})
    with pytest.raises(ConfigError, match="a pruner with the settings"):
        pruner.load_state_dict(state)
    bert = tiny("bert")
    pruner = GradualPruner(bert, adamw(bert), **CUBIC)
    with pytest.raises(ConfigError, match="they are of another model"):
        pruner.load_state_dict(state)


def test_what_is_due_at_step_0_is_pruned_before_the_first_forward_of_training(ids):
    model = tiny("llama")
    optimizer = adamw(model)
    pruner = GradualPruner(model, optimizer, sparsity=0.5, end=0)
    assert pruner.due == (0,)
    with torch.no_grad():
        model(input_ids=ids)
    assert (pruner.achieved, pruner.sparsity, pruner.done) == (0, 0, False)
    copied = copy.deepcopy(model)
    model(input_ids=ids)
    assert pruner.achieved == pytest.approx(0.5, abs=0.01)
    assert pruner.done
    prunekit.prune(copied, method="magnitude", sparsity=0.5)
    assert_equal_models(model, copied)


def test_steps_without_a_forward_of_the_model_are_followed_too(ids):
    model = tiny("llama")
    optimizer = adamw(model)
    pruner = GradualPruner(model, optimizer, sparsity=0.5, end=0)
    optimizer.step()
    assert pruner.done


def test_a_step_is_one_of_the_optimizer_however_many_batches_it_accumulates(ids):
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = tiny("llama")
        model, optimizer = accelerator.prepare(model, adamw(model))
        pruner = GradualPruner(model, optimizer, **CUBIC)
        for _ in range(6):
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=ids).logits.square().mean())
                optimizer.step()
                optimizer.zero_grad()
        assert pruner.step == 3
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_grad_scaler_skips_do_not_count(fused, ids):
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    pruner = GradualPruner(model, optimizer, **CUBIC)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for number in range(4):
        loss = model(input_ids=ids).logits.square().mean()
        scaler.scale(loss * (float("inf") if number == 1 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert pruner.step == number + (number == 0)


def test_two_of_four_is_reached_in_one_step(ids):
    model = tiny("llama")
    optimizer = adamw(model)
    with pytest.raises(ConfigError, match=r'schedule: "2:4" has one sparsity'):
        GradualPruner(model, optimizer, pattern="2:4", end=3, schedule="cubic")
    pruner = GradualPruner(model, optimizer, pattern="2:4", end=3)
    assert pruner.due == (3,)
    train(model, optimizer, ids, 5)
    assert pruner.done
    for weight in pruner.masks.weights.values():
        assert bool(((weight != 0).unflatten(1, (-1, 4)).sum(2) == 2).all())


def test_global_counts_are_those_of_one_threshold_at_each_step(ids):
    model = tiny("llama")
    optimizer = adamw(model)
    pruner = GradualPruner(model, optimizer, allocation="global", **CUBIC)
    for _ in range(4):
        train(model, optimizer, ids)
        size = sum(weight.numel() for weight in pruner.masks.weights.values())
        assert sum(zeros(pruner).values()) == int(pruner.sparsity * size + 1e-6)
    assert (
        len({zeros(pruner)[name] / weight.numel() for name, weight in pruner.masks.weights.items()})
        > 1
    )
    assert pruner.done


def test_an_allocation_by_statistics_is_made_once_and_followed(ids):
    model = tiny("llama")
    optimizer = adamw(model)
    owl = {"method": "wanda", "tokens": ids, "allocation": {"name": "owl", "spread": 0.2}}
    pruner = GradualPruner(model, optimizer, **owl, **CUBIC)
    train(model, optimizer, ids, 4)
    assert pruner.done
    assert pruner.achieved == pytest.approx(0.7, abs=0.02)


def test_experts_in_one_tensor_are_pruned_one_by_one(ids):
    model = tiny("mixtral")
    optimizer = adamw(model)
    pruner = GradualPruner(model, optimizer, **CUBIC)
    train(model, optimizer, ids, 5)
    assert pruner.done
    fused = {name: weight for name, weight in pruner.masks.weights.items() if weight.ndim == 3}
    assert fused
    for name, weight in fused.items():
        for expert in weight:
            for part in expert.chunk(2 if "gate_up" in name else 1):
                assert int((part == 0).sum()) == int(0.7 * part.numel() + 1e-6)


@pytest.mark.parametrize("model_type", ["gpt2", "bert"])
def test_other_families(model_type, ids):
    model = tiny(model_type)
    optimizer = adamw(model)
    pruner = GradualPruner(model, optimizer, scope="row", **CUBIC)
    train(model, optimizer, ids, 4)
    assert pruner.done


def test_bfloat16_and_frozen_weights_are_pruned_exactly(ids):
    model = tiny("llama").bfloat16()
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(requires_grad=False)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])
    pruner = GradualPruner(model, optimizer, **CUBIC)
    train(model, optimizer, ids, 4)
    assert pruner.done
    assert int((frozen == 0).sum()) == int(0.7 * frozen.numel() + 1e-6)
    assert not frozen.requires_grad


def test_gradient_checkpointing_changes_nothing(ids):
    models = [tiny("llama"), tiny("llama")]
    # Its name since transformers 5.24.
    newer = getattr(models[1], "activation_checkpointing_enable", None)
    (newer or models[1].gradient_checkpointing_enable)()
    models[1].train()
    for model in models:
        optimizer = adamw(model)
        GradualPruner(model, optimizer, regrow=0.2, regrow_every=3, **CUBIC)
        train(model, optimizer, ids, 5)
    assert_equal_models(*models)


@pytest.mark.slow
def test_a_compiled_model_is_pruned_like_another(ids):
    models = [tiny("llama"), tiny("llama")]
    for model, called in zip(
        models, [models[0], torch.compile(models[1], backend="eager")], strict=True
    ):
        optimizer = adamw(model)
        pruner = GradualPruner(called, optimizer, **CUBIC)
        train(called, optimizer, ids, 5)
        assert pruner.done
    assert_equal_models(*models)


def test_replaced_weights_are_noticed(ids):
    model = tiny("llama")
    optimizer = adamw(model)
    GradualPruner(model, optimizer, **CUBIC)
    train(model, optimizer, ids)
    model.load_state_dict(tiny("llama").state_dict(), assign=True)
    with pytest.raises(ConfigError, match="is not the masked weight"):
        train(model, optimizer, ids)


def test_only_one_pruner_is_in_force_on_a_weight(ids):
    model = tiny("llama")
    optimizer = adamw(model)
    pruner = GradualPruner(model, optimizer, **CUBIC)
    with pytest.raises(ConfigError, match="has masks already"):
        GradualPruner(model, optimizer, **CUBIC)
    pruner.remove()
    prunekit.prune(model, method="magnitude", sparsity=0.5)
    with keep_masks(model), pytest.raises(ConfigError, match="has masks already"):
        GradualPruner(model, optimizer, **CUBIC)
    with GradualPruner(model, optimizer, **CUBIC) as pruner:
        train(model, optimizer, ids)
        assert pruner.achieved == pytest.approx(0.5, abs=0.01)
        train(model, optimizer, ids, 3)
        assert pruner.done


def test_a_sparsity_below_that_of_the_weights_is_refused_before_training(ids):
    model = tiny("llama")
    prunekit.prune(model, method="magnitude", sparsity=0.5)
    before = copy.deepcopy(model.state_dict())
    optimizer = adamw(model)
    GradualPruner(model, optimizer, sparsity=0.4, end=3)
    with pytest.raises(ConfigError, match=r"sparsity: 0.4 is below the zeros that model\.layers"):
        train(model, optimizer, ids)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 3}, "steps: does not apply while a model is trained"),
        ({"recover": "block"}, "recover: does not apply"),
        ({"every": 0}, "every: 0 is not a whole number of at least 1"),
        ({"end": -1}, "end: -1 is not a whole number of at least start = 0"),
        ({"initial": 0.8}, "initial: 0.8 is not from 0 to the sparsity, 0.7"),
        ({"method": "wander"}, "wander"),
        ({"sparsity": None}, "sparsity: missing"),
        ({"regrow": 0.1}, "regrow and regrow_every: pass both or none"),
        ({"regrow": 1.0, "regrow_every": 2}, "regrow: 1.0 is not a fraction"),
        ({"schedule": "cosine"}, "schedule: 'cosine' is none of one-shot, linear, cubic"),
        ({"method": "sparsegpt", "order": "energy"}, 'order: a sweep while training needs "given"'),
    ],
)
def test_settings_that_do_not_apply_are_named(wrong, message, ids):
    model = tiny("llama")
    hooks = len(model._forward_pre_hooks)
    with pytest.raises(ConfigError, match=message):
        GradualPruner(model, adamw(model), tokens=ids, **CUBIC | wrong)
    assert len(model._forward_pre_hooks) == hooks


def test_what_is_no_optimizer_or_no_model_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer: a list is not a torch.optim.Optimizer"):
        GradualPruner(tiny("llama"), [], **CUBIC)
    with pytest.raises(ConfigError, match="model: a str is not a model"):
        GradualPruner("llama", None, **CUBIC)
    with pytest.raises(ConfigError, match="Linear is not a transformers model"):
        GradualPruner(nn.Linear(2, 2), None, **CUBIC)


def test_those_with_the_largest_gradient_return_and_as_many_go(ids):
    model = tiny("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    settings = {"sparsity": 0.6, "end": 5, "initial": 0.6, "schedule": "one-shot"}
    pruner = GradualPruner(model, optimizer, regrow=0.25, regrow_every=2, **settings)
    train(model, optimizer, ids)
    before, counts = masks(pruner), zeros(pruner)
    model(input_ids=ids).logits.float().square().mean().backward()
    gradients = {name: weight.grad.abs() for name, weight in pruner.masks.weights.items()}
    optimizer.step()
    for name, weight in pruner.masks.weights.items():
        now = ~pruner.masks.keep(weight)
        returned = before[name] & ~now
        assert int(returned.sum()) == int(0.25 * int(before[name].sum()))
        assert int(now.sum()) == int(before[name].sum())
        left = gradients[name][before[name] & now]
        assert gradients[name][returned].min() >= left.max()
    optimizer.zero_grad()
    train(model, optimizer, ids)
    assert zeros(pruner) == counts
    train(model, optimizer, ids, 3)
    assert pruner.done
    weight = model.model.layers[0].mlp.up_proj.weight
    model(input_ids=ids).logits.float().square().mean().backward()
    assert bool((weight.grad[weight == 0] == 0).all())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # of peft
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_adapters_train_under_the_masks_and_merge_into_the_same_function(model_type, ids):
    model = add_adapter(tiny(model_type), rank=2, targets="all-linear")
    frozen = [each for each in model.parameters() if not each.requires_grad]
    optimizer = torch.optim.AdamW([e for e in model.parameters() if e.requires_grad], lr=0.01)
    settings = CUBIC | {"method": "wanda", "tokens": ids}
    with pytest.raises(ConfigError, match="regrow: needs gradients of the weights"):
        GradualPruner(model, optimizer, regrow=0.1, regrow_every=2, **settings)
    with GradualPruner(model, optimizer, **settings) as pruner:
        train(model, optimizer, ids, 6)
        assert pruner.done
        counts = zeros(pruner)
        logits = model(input_ids=ids).logits
        assert not any(each.requires_grad for each in frozen)
        merged = merge_adapters(copy.deepcopy(model))
    assert torch.allclose(merged(input_ids=ids).logits, logits, atol=1e-5)
    for name, count in counts.items():
        weight = merged.get_parameter(name.replace(".base_layer", ""))
        assert int((weight == 0).sum()) == count


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # of peft
def test_a_refused_pruner_leaves_no_hook(ids):
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    adapted = peft.get_peft_model(model, config)
    optimizer = adamw(adapted)
    with pytest.raises(ConfigError, match="which masks cannot follow"):
        prunekit.GradualPruner(adapted, optimizer, **CUBIC)
    train(adapted, optimizer, ids)
    assert not any(module._forward_pre_hooks for module in adapted.modules())
