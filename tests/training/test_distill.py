"""The objective of distillation, against its formula in float64, and what becomes of it."""

import copy

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import prunekit
from prunekit.config.distill_table import Distill
from prunekit.distributed.ranks import SINGLE
from prunekit.errors import NumericsError
from prunekit.training.data_parallel import training_step
from prunekit.training.distill import Distiller
from prunekit.training.distill_losses import drawn_blocks
from prunekit.training.teachers import DenseTeacher, SharedTeacher
from tests.support.adapters import PEFT_WARNS, adapted_model
from tests.support.architectures import tiny
from tests.support.threads import on_ranks
from tests.support.units import batch, randomized_model

pytestmark = [pytest.mark.filterwarnings(each) for each in PEFT_WARNS]

LAYERS = {
    "bert": ["encoder.layer"],
    "gpt2": ["h"],
    "llama": ["layers"],
    "t5": ["encoder.block", "decoder.block"],
}
"""Lists of blocks of the families, from their base model."""


def samples(model_type):
    """Return a classifier or a language model, and a padded batch with labels for it."""
    if model_type != "bert":
        model = randomized_model(model_type)
        return model, batch(model)
    model = tiny("bert", AutoModelForSequenceClassification, num_labels=3)
    inputs = batch(model)
    return model, inputs | {"labels": torch.tensor([2, 0])}


def nudged(model, by=0.5):
    """Change all weights of a model a little."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(
                by * value.std().nan_to_num(0.1) * torch.randn(value.shape, generator=generator)
            )
    return model


def distilled(model, settings, steps=(0, 4), step=1, **options):
    """Return a distiller whose next step is ``step``."""
    teacher = options.pop("teacher", None) or DenseTeacher(model)
    made = Distiller(model, teacher, settings, steps, 3, **options)
    made.step = step - 1
    return made


def a_step(model, distiller, inputs, ranks=SINGLE):
    """Do a step that changes nothing; return losses and gradients."""
    weights = [*model.parameters(), *distiller.parameters]
    optimizer = torch.optim.SGD(weights, lr=0.0)
    losses = training_step(model, inputs, optimizer, ranks, distiller)
    return losses, [each.grad for each in weights]


def assert_close(gradients, others):
    """Assert that gradients differ by little of the largest of their parameter."""
    for one, two in zip(gradients, others, strict=True):
        assert (one is None) == (two is None)
        if two is None:  # of a quarter of depth without a block
            continue
        torch.testing.assert_close(one, two, rtol=0, atol=float(1e-4 * two.abs().max()) + 1e-8)


def exact(model, inputs, lists):
    """Return logits and hidden states after all blocks, in float64."""
    model, hidden = copy.deepcopy(model).double(), []
    for name in lists:
        for block in model.base_model.get_submodule(name):
            block.register_forward_hook(
                lambda _, __, out: hidden.append(out if isinstance(out, torch.Tensor) else out[0])
            )
    with torch.no_grad():
        return model(**inputs).logits, hidden


@pytest.mark.parametrize("model_type", LAYERS)
def test_the_loss_is_that_of_the_formula_in_float64(model_type):
    """Of encoders, decoders and both; blocks of unlike lengths and padding included."""
    model, inputs = samples(model_type)
    settings = Distill(prediction=0.3, layers=0.7, temperature=1.5)
    distiller = distilled(model, settings, step=3)
    truth, theirs = exact(model, inputs, LAYERS[model_type])
    nudged(model)
    for each in distiller.parameters:
        each.data = 0.1 * torch.randn(each.shape, generator=torch.Generator().manual_seed(2))
    found, ours = exact(model, inputs, LAYERS[model_type])

    mask = inputs["attention_mask"].bool()
    labels = inputs.get("labels", inputs["input_ids"].masked_fill(~mask, -100))
    if model_type in {"gpt2", "llama"}:
        found, truth, labels = found[:, :-1], truth[:, :-1], labels[:, 1:]
    valid = labels != -100
    counted = found[valid].log_softmax(-1)
    tuned = -counted.gather(-1, labels[valid][:, None]).mean()
    old, new = ((z[valid] / 1.5).log_softmax(-1) for z in (truth, found))
    prediction = 1.5**2 * (old.exp() * (old - new)).sum(-1).mean()
    encoded = len(ours) if model_type != "t5" else 2
    layer = 0.0
    for quarter, number in drawn_blocks(len(ours), 3, 3).items():
        part = distiller.transformations
        matrix = torch.eye(32).double() + part.up[quarter].double() @ part.down[quarter].double()
        difference = ours[number] @ matrix.T.detach() - theirs[number]
        layer += difference[mask if number < encoded else valid].square().mean()
    assert len(drawn_blocks(len(ours), 3, 3)) == (4 if model_type == "t5" else 2)

    losses, _ = a_step(model, distiller, inputs)
    assert losses.loss == pytest.approx(float(tuned), rel=1e-5)
    assert losses.parts == pytest.approx(
        {"prediction": float(prediction), "layer": float(layer)}, rel=1e-4, abs=1e-6
    )
    objective = distilled(model, settings, step=3, teacher=distiller.teacher)
    objective.transformations = distiller.transformations
    expected = 0.75 * (0.3 * prediction + 0.7 * layer) + 0.25 * tuned
    assert differentiated(model, objective, inputs) == pytest.approx(float(expected), rel=1e-4)


class Watched:
    """An objective that keeps the scalar that is differentiated."""

    def __init__(self, distiller):
        self.distiller, self.objective = distiller, None

    def __call__(self, model, share):
        found = self.distiller(model, share)
        self.objective = float(found.objective.detach())
        return found


def differentiated(model, distiller, inputs):
    watched = Watched(distiller)
    training_step(model, inputs, torch.optim.SGD(model.parameters(), lr=0.0), SINGLE, watched)
    return watched.objective


@pytest.mark.parametrize("model_type", LAYERS)
@pytest.mark.parametrize("how", ["same", "closest"])
def test_a_student_that_is_its_teacher_has_no_distance(model_type, how):
    model, inputs = samples(model_type)
    # The position bias of T5 requires a gradient, for which torch has another attention.
    slack = 1e-6 if model_type == "t5" else 0.0
    for step in (1, 2, 3):
        losses, _ = a_step(model, distilled(model, Distill(map=how), step=step), inputs)
        assert losses.parts == pytest.approx({"prediction": 0.0, "layer": 0.0}, abs=slack)


@pytest.mark.parametrize("model_type", LAYERS)
def test_padding_has_no_influence(model_type):
    """Other tokens there, and as many ignored labels more, change no loss and no gradient."""
    model, inputs = samples(model_type)
    distiller, found = distilled(model, Distill()), []
    nudged(model)
    padded = inputs | {"input_ids": inputs["input_ids"] + 7 * (1 - inputs["attention_mask"])}
    longer = {
        name: torch.nn.functional.pad(value, (0, 4), value=-100 * (name == "labels"))
        if value.ndim == 2 else value
        for name, value in inputs.items()
    }  # fmt: skip
    for each in (inputs, padded, longer):
        distiller.step = 0
        losses, gradients = a_step(model, distiller, each)
        found.append((losses, gradients))
    for losses, gradients in found[1:]:
        assert losses.loss == pytest.approx(found[0][0].loss, rel=1e-5)
        assert losses.parts == pytest.approx(found[0][0].parts, rel=1e-4)
        assert_close(gradients, found[0][1])


def test_the_share_of_the_distance_rises_from_start_to_end():
    model, inputs = samples("llama")
    distiller = distilled(model, Distill(), steps=(2, 6))
    calls = []
    model_of = distiller.teacher.model
    handle = model_of.register_forward_pre_hook(lambda *_: calls.append(distiller.step))
    shares = []
    for _ in range(8):
        losses, _ = a_step(model, distiller, inputs)
        shares.append(distiller.mu)
        assert bool(losses.parts) == (distiller.mu > 0)
    handle.remove()
    assert shares == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert calls == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("weights", "parts"), [({"layers": 0.0}, {"prediction"}), ({"prediction": 0.0}, {"layer"})]
)
def test_a_part_without_weight_is_not_computed(weights, parts):
    model, inputs = samples("llama")
    losses, _ = a_step(nudged(model), distilled(model, Distill(**weights)), inputs)
    assert losses.parts.keys() == parts


def test_the_closest_block_is_the_one_with_the_smallest_distance():
    """Blocks of the student are in another order than those of the teacher."""
    model, inputs = samples("llama")
    model = randomized_model("llama", num_hidden_layers=4)
    distiller = distilled(model, Distill(map="closest", prediction=0))
    layers = model.model.layers
    for first, second in ((0, 3), (1, 2)):
        layers[first], layers[second] = layers[second], layers[first]
    distiller = distilled(
        model, Distill(map="closest", prediction=0), teacher=distiller.teacher, steps=(0, 1)
    )
    _, ours = exact(model, inputs, LAYERS["llama"])
    _, theirs = exact(distiller.teacher.model, inputs, LAYERS["llama"])
    mask = inputs["attention_mask"].bool()
    distances = torch.tensor(
        [[float((one - two)[mask].square().mean()) for one in ours] for two in theirs]
    )
    assert distances.argmin(1).tolist() != [0, 1, 2, 3]
    losses, _ = a_step(model, distiller, inputs)
    assert losses.parts["layer"] == pytest.approx(float(distances.min(1).values.sum()), rel=1e-4)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("how", ["same", "closest"])
def test_ranks_have_the_losses_and_gradients_of_one_process(size, how):
    """Also a rank without a sample; predictions and tokens are those of the whole batch."""

    _, inputs = samples("t5")
    models = []
    for _ in range(size + 1):
        model, _ = samples("t5")
        distiller = distilled(model, Distill(map=how), step=2)
        models.append((nudged(model), distiller))
    losses, gradients = a_step(*models[-1], inputs)
    for other, others in on_ranks(size, lambda ranks: a_step(*models[ranks.rank], inputs, ranks)):
        assert other.loss == pytest.approx(losses.loss, rel=1e-5)
        assert other.parts == pytest.approx(losses.parts, rel=1e-4)
        assert_close(others, gradients)


def test_a_student_that_is_smaller_is_compared_in_the_teachers_coordinates():
    """Blocks and coordinates were removed before; what is missing is zero at first."""
    model, inputs = samples("llama")
    teacher, kept = DenseTeacher(model), {}
    for kind in (prunekit.blocks, prunekit.hidden):
        gates = kind(model)
        gates.prune(gates.score("random"), 0.5)
        kept |= gates.finalize().kept
    distiller = distilled(model, Distill(), teacher=teacher, kept=kept, steps=(0, 1))
    places = kept["model.embed_tokens"]
    (_, (ours,)), (_, theirs) = (exact(m, inputs, LAYERS["llama"]) for m in (model, teacher.model))
    placed = torch.zeros(2, 9, 32, dtype=torch.float64)
    placed[..., places] = ours
    mask = inputs["attention_mask"].bool()
    expected = sum(float((placed - each)[mask].square().mean()) for each in theirs)
    losses, gradients = a_step(model, distiller, inputs)
    assert losses.parts["layer"] == pytest.approx(expected, rel=1e-4)
    assert all(each is None or bool(each.isfinite().all()) for each in gradients)


def test_a_loss_that_is_not_finite_is_named_with_its_part_and_step():
    model, inputs = samples("llama")
    distiller = distilled(model, Distill(), step=5)
    nudged(model)
    distiller.transformations.up[1].data.fill_(torch.inf)
    losses, _ = a_step(model, distiller, inputs)
    with pytest.raises(
        NumericsError, match=r"train: the layer loss is (nan|inf) at step 5\. Lower"
    ):
        losses.check_finite(5)


def shared(seed=3):
    """Return a model with adapters and closed gates, its distiller, and a batch."""
    model = adapted_model("llama")
    gates = prunekit.heads(model.base_model.model)
    gates.prune(gates.score("magnitude"), 0.5)
    teacher = SharedTeacher(model, [gates])
    return model, Distiller(model, teacher, Distill(), (0, 10), seed), batch(model)


def trained(model, distiller, inputs, steps):
    weights = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD([*weights, *distiller.parameters], lr=1e-4)
    return [training_step(model, inputs, optimizer, SINGLE, distiller) for _ in range(steps)]


def test_a_state_continues_the_same_training():
    """Step, transformations, the best loss and the teacher's copies are in it."""
    model, distiller, inputs = shared()
    distiller.measured(2.0)
    trained(model, distiller, inputs, 3)
    distiller.measured(1.0)
    state = copy.deepcopy(distiller.state_dict())
    weights = copy.deepcopy(model.state_dict())
    expected = trained(model, distiller, inputs, 3)
    other, again, _ = shared()
    other.load_state_dict(weights)
    again.load_state_dict(state)
    assert trained(other, again, inputs, 3) == expected
    assert again.step == 6
    assert again.state_dict()["lowest"] == 1.0
    assert state["transformations"]["transformation.3.up"].any()


def test_the_teacher_learns_of_the_student_when_its_loss_improves():
    model, distiller, inputs = shared()
    name, first = next(iter(distiller.teacher.tensors().items()))
    first = first.clone()
    now = []
    for held_out in (2.0, 2.5, 1.5, 1.7):
        trained(model, distiller, inputs, 1)
        distiller.measured(held_out)
        now.append(distiller.teacher.tensors()[name].clone())
    assert torch.equal(now[0], first)
    assert torch.equal(now[1], first)
    assert not torch.equal(now[2], first)
    assert torch.equal(now[3], now[2])
    assert distiller.tensors().keys() >= {f"teacher.{name}", "transformation.3.down"}
