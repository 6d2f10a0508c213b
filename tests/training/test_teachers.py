"""Teachers: the dense model, in a copy or in the student itself."""

import pytest
import torch

import prunekit
from prunekit.errors import ConfigError
from prunekit.training.apt.growth import grow, ranks_of
from prunekit.training.teachers import DenseTeacher, SharedTeacher, recorded_outputs
from tests.support.adapters import PEFT_WARNS, adapted_model, randomize_adapters
from tests.support.units import batch, randomized_model

pytestmark = [pytest.mark.filterwarnings(each) for each in PEFT_WARNS]


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def pruned(model, part=0.5):
    """Return gates of heads and neurons, half of them closed."""
    every = [prunekit.heads(model), prunekit.neurons(model)]
    for gates in every:
        gates.prune(gates.score("magnitude"), part)
    return every


def outputs(teacher, inputs):
    """Return the teacher's outputs, with the hidden states after all blocks."""
    blocks = [block for stack in teacher.stacks for block in stack.blocks]
    return teacher.outputs(inputs, blocks)


def test_a_copy_is_the_dense_model_whatever_becomes_of_the_student():
    model = randomized_model("llama")
    inputs = batch(model)
    dense = logits(model, inputs)
    every = pruned(model)
    teacher = DenseTeacher(model)
    for gates in every:
        gates.finalize()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = outputs(teacher, inputs)
    assert torch.equal(found.logits, dense)
    assert [each.shape for each in found.hidden] == [(2, 9, 32)] * 2
    assert not any(each.requires_grad for each in teacher.model.parameters())
    assert not found.logits.requires_grad
    teacher.refresh()
    assert torch.equal(outputs(teacher, inputs).logits, dense)
    assert teacher.tensors().keys() == dict(teacher.model.named_parameters()).keys()


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "t5"])
def test_the_student_with_its_gates_open_is_its_own_teacher(model_type):
    """Only adapters are copied; their later values do not reach the teacher until a refresh."""
    model = adapted_model(model_type)
    inputs = batch(model)
    dense = logits(model, inputs)
    teacher = SharedTeacher(model, pruned(model.base_model.model))
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * value.requires_grad)
    student = logits(model, inputs)
    assert torch.equal(outputs(teacher, inputs).logits, dense)
    assert torch.equal(logits(model, inputs), student)
    trained = [each for each in model.parameters() if each.requires_grad]
    assert sum(each.numel() for each in teacher.tensors().values()) == sum(
        each.numel() for each in trained
    )
    teacher.refresh()
    for gates in teacher.gates:
        gates.undo()
    assert torch.equal(outputs(teacher, inputs).logits, logits(model, inputs))
    assert not torch.equal(outputs(teacher, inputs).logits, dense)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_restored_after_a_forward_that_may_fail(fails):
    model = adapted_model("llama").train()
    every = pruned(model.base_model.model)
    every[0].gates[every[0].groups[0].name].value.requires_grad_()
    teacher = SharedTeacher(model, every)
    modules = [*model.modules()]
    before = [(name, value) for module in modules for name, value in module._parameters.items()]
    versions = [value._version for _, value in before if value is not None]
    gates = [gate for each in every for gate in each.gates.values()]
    states = [(gate.value, gate.keep) for gate in gates]
    seen = []

    def watch(module, _):
        seen.append((torch.is_grad_enabled(), module.training, bool(gates[0].keep.all())))
        if fails:
            raise OSError("fails")

    handle = model.get_output_embeddings().register_forward_pre_hook(watch)
    if fails:
        with pytest.raises(OSError, match="fails"):
            outputs(teacher, batch(model))
    else:
        outputs(teacher, batch(model))
    handle.remove()
    assert seen == [(False, False, True)]
    after = [(name, value) for module in modules for name, value in module._parameters.items()]
    assert all(one == two and a is b for (one, a), (two, b) in zip(before, after, strict=True))
    assert [value._version for _, value in after if value is not None] == versions
    assert all(
        gate.value is value and gate.keep is keep
        for gate, (value, keep) in zip(gates, states, strict=True)
    )
    assert all(module.training for module in modules)
    assert not any(block._forward_hooks for block in teacher.stacks[0].blocks)


def test_a_graph_of_the_student_from_before_is_not_disturbed():
    """Gradients are those without a teacher, and their hooks run once."""
    gradients = []
    for runs in (False, True):
        model = adapted_model("gpt2")
        teacher = SharedTeacher(model, pruned(model.base_model.model))
        trained = [each for each in model.parameters() if each.requires_grad]
        calls = []
        for each in trained:
            each.register_hook(lambda gradient, calls=calls: calls.append(gradient))
        loss = model(**batch(model)).logits.square().mean()
        if runs:
            outputs(teacher, batch(model))
        loss.backward()
        assert len(calls) == len(trained)
        gradients.append([each.grad for each in trained])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_tied_weights_are_copied_once_and_stay_tied():
    model = randomized_model("gpt2")
    inputs = batch(model)
    dense = logits(model, inputs)
    teacher = SharedTeacher(model)
    assert teacher.tensors().keys() == dict(model.named_parameters()).keys()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(2)
    assert torch.equal(outputs(teacher, inputs).logits, dense)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_model_without_trained_parameters_has_no_copies():
    model = randomized_model("llama").requires_grad_(requires_grad=False)
    with pytest.raises(ConfigError, match="no parameter of the model is trained"):
        SharedTeacher(model)


def test_adapters_that_grow_do_not_reach_the_teacher():
    model = adapted_model("llama")
    inputs = batch(model)
    teacher = SharedTeacher(model)
    dense = outputs(teacher, inputs).logits
    ranks = dict.fromkeys(ranks_of(model), 5)
    changes = grow(model, ranks, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for change in changes:
            change.after.add_(0.1)
    assert torch.equal(outputs(teacher, inputs).logits, dense)
    teacher.refresh()
    assert torch.equal(outputs(teacher, inputs).logits, logits(model, inputs))


def test_copies_are_saved_and_loaded_by_name():
    model = adapted_model("llama")
    teacher = SharedTeacher(model)
    saved = {name: value.clone() for name, value in teacher.tensors().items()}
    dense = outputs(teacher, batch(model)).logits
    randomize_adapters(model)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * value.requires_grad)
    teacher = SharedTeacher(model)
    assert not torch.equal(outputs(teacher, batch(model)).logits, dense)
    teacher.load_tensors(saved)
    assert torch.equal(outputs(teacher, batch(model)).logits, dense)
    with pytest.raises(ConfigError, match="is of another model: x"):
        teacher.load_tensors({"x": torch.ones(1)} | saved)


def test_hidden_states_are_those_behind_the_gates_of_blocks():
    """A closed block passes on what it reads."""
    model = randomized_model("llama")
    blocks = prunekit.blocks(model)
    blocks.close({"model.layers": torch.tensor([True, False])})
    with recorded_outputs([*model.model.layers]) as found:
        logits(model, batch(model))
    first, second = found.values()
    assert torch.equal(first, second)
