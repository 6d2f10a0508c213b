"""Recovery training: lower loss, early stopping, and no reopened unit."""

import json
from contextlib import nullcontext

import pytest
import torch

import prunekit
from prunekit.cli.main import main
from prunekit.config.distill_table import Distill
from prunekit.config.load import load_config
from prunekit.config.train_table import Train
from prunekit.errors import ConfigError, NumericsError
from prunekit.structured.batches import mean_loss
from prunekit.training.lora import add_adapter, merge_adapters
from prunekit.training.recover import learning_rate, recover, recovered_fraction, summarize
from prunekit.training.teachers import DenseTeacher, SharedTeacher
from tests.support import checkpoints
from tests.support.structured import write_config
from tests.support.units import randomized_model

TOKENS = torch.randint(3, 96, (12, 9), generator=torch.Generator().manual_seed(4))
QUICK = Train(steps=20, rate=1e-3, batch=4, every=5)


def test_recovery_is_the_part_of_the_lost_loss_that_was_won_back():
    """Half of the lost loss recovered is 0.5; further loss is negative."""
    assert recovered_fraction(2.0, 4.0, 3.0) == 0.5
    assert recovered_fraction(2.0, 4.0, 5.0) == -0.5
    assert recovered_fraction(2.0, 2.0, 1.0) is None


def test_what_was_lost_is_won_back_and_closed_heads_get_no_update():
    """The loss falls, gate factors are recorded, pruned heads are unchanged."""
    model = randomized_model("gpt2")
    heads = prunekit.heads(model)
    base = mean_loss(model, [{"input_ids": TOKENS}])
    heads.prune(heads.score("magnitude"), 0.5)
    site = heads.linear_groups[0]
    gone = (~heads.keep[site.name]).nonzero().flatten()
    rows = site.reader.index[gone].flatten()
    before = site.reader.linear.weight[rows].clone()
    open_gate = heads.gates[site.name].value.requires_grad_()
    moments = [*recover(model, TOKENS, TOKENS, QUICK, [heads])]
    found = summarize(base, moments)
    assert (
        found["post"] > found["final"] == pytest.approx(mean_loss(model, [{"input_ids": TOKENS}]))
    )
    assert found["recovery"] == pytest.approx(
        (found["post"] - found["final"]) / (found["post"] - base)
    )
    assert [moment.step for moment in moments] == [0, 5, 10, 15, 20]
    assert torch.equal(site.reader.linear.weight[rows], before)
    factors = torch.tensor(moments[-1].factors[site.name])
    assert (factors[gone] == 0).all()
    assert bool((open_gate[heads.keep[site.name]] != 1).any())


def test_nothing_is_dropped_of_a_model_in_training_mode_which_it_is_again_afterwards():
    found = []
    for mode in (False, True):
        model = randomized_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5).train(mode)
        moments = recover(model, TOKENS, TOKENS, QUICK)
        found.append([moment.held_out for moment in moments])
        assert {module.training for module in model.modules()} == {mode}
    assert found[0] == found[1]


def test_stops_where_held_out_text_gains_no_more_and_takes_what_was_best():
    model = randomized_model("llama")
    held_out = TOKENS.flip(0, 1)[:4]
    before = mean_loss(model, [{"input_ids": held_out}])
    settings = Train(steps=200, rate=0.05, every=1, patience=3)
    moments = [*recover(model, TOKENS[:4], held_out, settings)]
    looked = [moment.held_out for moment in moments]
    assert len(moments) < 200
    assert min(looked[-3:]) >= min(looked[:-3])
    assert mean_loss(model, [{"input_ids": held_out}]) == pytest.approx(min(looked))
    assert min(looked) <= before


def test_a_loss_that_is_no_number_is_named_with_its_step():
    model = randomized_model("llama")
    model.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(
        NumericsError, match=r"train: the loss is nan at step 1\. Lower train\.rate"
    ):
        list(recover(model, TOKENS, TOKENS, QUICK))


def test_a_loss_that_is_no_number_changes_no_weight():
    model = randomized_model("llama")
    steps = recover(model, TOKENS, TOKENS, Train(steps=5, rate=1e-3, every=1))
    for _ in range(3):
        next(steps)
    weights = [each.detach().clone() for each in model.parameters()]
    handle = model.lm_head.register_forward_hook(lambda *parts: parts[2] * torch.nan)
    with pytest.raises(NumericsError, match="at step 3"):
        next(steps)
    handle.remove()
    for before, after in zip(weights, model.parameters(), strict=True):
        assert torch.equal(before, after)


def test_a_model_of_which_nothing_is_trained_is_refused():
    model = randomized_model("llama").requires_grad_(requires_grad=False)
    with pytest.raises(ConfigError, match="no parameter of the model requires a gradient"):
        list(recover(model, TOKENS, TOKENS, QUICK))


class Damage:
    """Pruning that turns a weight around at a step, after which the loss is higher."""

    def __init__(self, weight, optimizer, end):
        self.weight, self.end, self.step = weight, end, 0
        optimizer.register_step_post_hook(lambda *_: self.count())

    def count(self):
        self.step += 1
        if self.step == self.end:
            self.weight.data.neg_()

    sparsity = property(lambda self: 0.5 * self.done)
    achieved = property(lambda self: 0.25 * self.done)
    done = property(lambda self: self.step >= self.end)
    details = property(lambda self: {})
    weights = property(lambda self: {})

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        """Do nothing."""


def damage(model, end):
    return lambda optimizer: nullcontext(Damage(model.model.norm.weight, optimizer, end))


def test_weights_from_before_the_end_of_pruning_are_never_the_best():
    """Their loss is lower; nor does training stop before, however often the loss rises."""
    model = randomized_model("llama")
    settings = Train(steps=200, rate=0.05, every=2, patience=2)
    moments = [*recover(model, TOKENS[:4], TOKENS[4:], settings, during=damage(model, 15))]
    losses = [each.held_out for each in moments if each.held_out is not None]
    assert losses[0] == min(losses)
    assert max(losses[1:3]) > losses[0]
    found = [(each.step >= 15, each.sparsity, each.achieved) for each in moments]
    assert found == [(each.done, 0.5 * each.done, 0.25 * each.done) for each in moments]
    assert 16 < moments[-1].step < 200
    best = min(each.held_out for each in moments if each.done)
    assert summarize(0.0, moments)["final"] == best
    assert mean_loss(model, [{"input_ids": TOKENS[4:]}]) == pytest.approx(best, rel=1e-6)


def test_pruning_that_has_not_ended_with_the_training_is_an_error():
    model = randomized_model("llama")
    with pytest.raises(
        ConfigError, match=r"train\.steps: after 20 steps the sparsity is 0, 0 is due"
    ):
        list(recover(model, TOKENS, TOKENS, QUICK, during=damage(model, 21)))


def test_records_have_the_learning_rate_of_their_step():
    moments = [*recover(randomized_model("llama"), TOKENS, TOKENS, QUICK)]
    rates = [None, *(learning_rate(step, QUICK) for step in (5, 10, 15, 20))]
    assert [each.rate for each in moments] == rates
    assert {(each.sparsity, each.achieved, each.done) for each in moments} == {(None, None, True)}


def divergence_from(teacher, model):
    """Return the mean divergence of predictions from those of a teacher."""
    with torch.no_grad():
        old, new = (each(input_ids=TOKENS).logits.log_softmax(-1) for each in (teacher, model))
    return float((old.exp() * (old - new)).sum(-1).mean())


def test_a_pruned_model_is_trained_towards_the_one_before():
    """It gets closer to the teacher than by the text alone; records have the losses."""
    found = {}
    for distill in (None, Distill(map="closest", end=1)):
        model = randomized_model("llama")
        before = DenseTeacher(model)
        heads = prunekit.heads(model)
        heads.prune(heads.score("magnitude"), 0.5)
        heads.finalize()
        teacher = {"distill": distill, "teacher": before} if distill else {}
        moments = [*recover(model, TOKENS, TOKENS, QUICK, **teacher)]
        found[distill is not None] = divergence_from(before.model, model)
        names = {"prediction", "layer"} if distill else set()
        assert [each.distillation.keys() for each in moments] == [set(), *[names] * 4]
    assert found[True] < 0.8 * found[False]


def test_a_model_that_is_pruned_while_training_is_its_own_dense_teacher():
    model = randomized_model("llama")
    dense = randomized_model("llama")
    pruner = prunekit.GradualPruner
    during = {"sparsity": 0.5, "end": 10, "every": 5}
    moments = [
        *recover(
            model,
            TOKENS,
            TOKENS,
            QUICK,
            during=lambda optimizer: pruner(model, optimizer, **during),
            distill=Distill(),
        )
    ]
    assert moments[-1].done
    assert moments[-1].distillation["prediction"] > 0
    assert divergence_from(dense, model) < 1


@pytest.mark.filterwarnings("ignore::FutureWarning")  # raised in peft, about transformers
def test_adapters_of_a_gated_model_have_the_model_itself_as_teacher(monkeypatch):
    """No second model is made; the best adapters so far become the teacher's."""
    pytest.importorskip("peft")
    model = randomized_model("llama")
    heads = prunekit.heads(model)
    heads.prune(heads.score("magnitude"), 0.5)
    adapted = add_adapter(model, 2)
    monkeypatch.setattr("prunekit.training.recover.DenseTeacher", None)
    refreshed = []
    monkeypatch.setattr(SharedTeacher, "refresh", spied(SharedTeacher.refresh, refreshed))
    moments = [*recover(adapted, TOKENS, TOKENS, QUICK, [heads], distill=Distill())]
    losses = [each.held_out for each in moments]
    lower = sum(loss < min(losses[:n]) for n, loss in enumerate(losses) if n)
    assert len(refreshed) == 1 + lower > 1


def spied(method, calls):
    return lambda self: calls.append(self) or method(self)


def test_a_distillation_without_a_teacher_or_beyond_the_training_is_refused():
    model = randomized_model("llama")
    with pytest.raises(ConfigError, match=r"Pass teacher=DenseTeacher\(model\), made before"):
        next(recover(model, TOKENS, TOKENS, QUICK, distill=Distill()))
    with pytest.raises(ConfigError, match=r"distill\.end: 21 is beyond the training"):
        next(recover(model, TOKENS, TOKENS, QUICK, distill=Distill(end=21)))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # raised in peft, about transformers
def test_adapters_of_peft_are_trained_alone_and_merged():
    """Only adapters are trained, and the merged model equals the trained one."""
    peft = pytest.importorskip("peft")
    model = randomized_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    moments = [*recover(wrapped, TOKENS, TOKENS, Train(steps=20, rate=1e-2, every=10))]
    assert moments[-1].held_out < moments[0].held_out
    merged = merge_adapters(wrapped)
    changed = {name for name, value in merged.state_dict().items()
               if not torch.equal(value, before[name])}  # fmt: skip
    assert changed == {name for name in before if "q_proj" in name}
    assert mean_loss(merged, [{"input_ids": TOKENS}]) == pytest.approx(
        moments[-1].held_out, rel=1e-5
    )


PRUNE = 'method = "magnitude"\npattern = "heads"\nsparsity = 0.5'
TRAIN = "[train]\nsteps = 20\nrate = 1e-3\nevery = 10\nheld_out = 2\n"


def written(tmp_path, train=TRAIN):
    model = checkpoints.write(tmp_path / "model")
    path = write_config(model, tmp_path / "out", PRUNE, evaluate=False)
    path.write_text(path.read_text() + train)
    return path


def test_a_run_trains_what_is_left_and_shows_how_it_went(tmp_path):
    """The report records and draws every tenth training step."""
    path = written(tmp_path)
    assert main(["plan", str(path)]) == 0
    assert main(["run", str(path), "--quiet"]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    found = report["training"]
    assert [moment["step"] for moment in found["history"]] == [0, 10, 20]
    assert found["final"] < found["post"]
    assert report["seconds"]["train"] > 0
    assert "Loss during training" in (tmp_path / "out/report.html").read_text()
    untrained = written(tmp_path, "")
    assert main(["run", str(untrained), "--quiet", "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("[train]\nheld_out = 8\n", "train.held_out: 8 of 8 calibration samples leave none"),
        ("[train]\nstep = 8\n", "train.step: no such key. Did you mean"),
    ],
)
def test_mistakes_about_training_are_said(tmp_path, train, message):
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, train))
    assert message in str(caught.value)
