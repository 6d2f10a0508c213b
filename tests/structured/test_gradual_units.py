"""Units pruned on a schedule while a model is trained."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback, TrainingArguments

import prunekit
from prunekit.errors import ConfigError
from prunekit.structured.gradual_units import regrown
from prunekit.structured.rankers.obs import BlockObs
from tests.support.units import batch, randomized_model, valid_logits

TOKENS = torch.randint(3, 96, (4, 10), generator=torch.Generator().manual_seed(4))
OPTIMIZERS = {
    "AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1),
    "SGD": lambda weights: torch.optim.SGD(weights, lr=0.01, momentum=0.9, weight_decay=0.1),
}


def train_step(model, optimizer, seed):
    ids = torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(seed))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


class Training:
    """A model with gates, an optimizer and a pruner."""

    def __init__(self, kind="neurons", optimizer="AdamW", ranker="gradient", **settings):
        self.model = randomized_model("llama")
        self.gates = getattr(prunekit, kind)(self.model)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        settings = {"sparsity": 0.5, "end": 4, **settings}
        self.pruner = self.gates.during(self.optimizer, ranker, TOKENS, **settings)
        self.seed = 0

    def step(self):
        self.seed += 1
        train_step(self.model, self.optimizer, self.seed)

    def weights_of_closed(self, keep):
        return [
            parameter.detach().index_select(axis, (~keep[group.name])[owner].nonzero().flatten())
            for group in self.gates.groups
            for parameter, axis, owner in group.parameter_axes
        ]


def test_gates_are_closed_at_due_steps_in_exact_numbers_and_counted():
    """A cubic schedule to 70 %: 0.4047, 0.6125, 0.6891, 0.7 of 128 neurons."""
    training = Training(sparsity=0.7, end=8, every=2)
    pruner, gates = training.pruner, training.gates
    assert pruner.due == (2, 4, 6, 8)
    closed = []
    for _ in range(8):
        assert not pruner.done
        training.step()
        closed.append(gates.closed)
    assert closed == [0, 52, 52, 78, 78, 88, 88, 90]
    assert pruner.due == ()
    assert pruner.achieved == 90 / 128
    assert pruner.sparsity == 0.7
    assert pruner.done
    gates.reactivate([(0, unit) for unit in range(64)])
    assert not pruner.done


def test_units_that_are_pruned_at_the_start_are_so_in_the_first_forward():
    training = Training(ranker="magnitude", initial=0.25, end=2)
    assert training.gates.closed == 0
    with torch.no_grad():
        training.model(TOKENS)
    assert training.gates.closed == 0
    training.model(TOKENS)
    assert training.gates.closed == 32


def test_the_lowest_units_are_closed_by_scores_with_the_gates_and_weights_of_the_step():
    training = Training(end=3)
    for _ in range(2):
        training.step()
    twin, before = copy.deepcopy(training.model), training.gates.keep
    optimizer = OPTIMIZERS["AdamW"](twin.parameters())
    optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
    gates = prunekit.neurons(twin)
    with gates.hold(optimizer):
        train_step(twin, optimizer, training.seed + 1)
    training.step()
    scores = gates.score("gradient", TOKENS)
    gates.prune(scores, 0.5)
    assert gates.kept == training.gates.kept
    assert all(bool((before[name] | ~keep).all()) for name, keep in gates.keep.items())


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("kind", ["heads", "hidden"])
def test_weights_of_closed_units_do_not_move(kind, optimizer):
    settings = {"sparsity": 0.25, "round_to": 4} if kind == "hidden" else {}
    training = Training(kind, optimizer, ranker="random", end=1, **settings)
    training.step()
    keep = training.gates.keep
    assert training.gates.closed
    before = training.weights_of_closed(keep)
    for _ in range(3):
        training.step()
    for old, new in zip(before, training.weights_of_closed(keep), strict=True):
        assert torch.equal(old, new)
    training.pruner.remove()
    training.step()
    moved = zip(before, training.weights_of_closed(keep), strict=True)
    assert any(not torch.equal(old, new) for old, new in moved)


@pytest.mark.parametrize("kind", ["heads", "neurons", "blocks", "hidden"])
def test_the_masked_model_is_the_one_that_is_cut_and_trains_on(kind):
    settings = {"sparsity": 0.25, "round_to": 4} if kind == "hidden" else {}
    training = Training(kind, **settings)
    gates = training.gates
    with training.pruner as pruner:
        for _ in range(5):
            training.step()
        with pytest.raises(ConfigError, match=r"finalize: .* Call remove\(\)"):
            gates.finalize(optimizer=training.optimizer)
    assert pruner.done
    given = batch(gates.model)
    expected = valid_logits(gates.model, given)
    gates.finalize(optimizer=training.optimizer)
    found = valid_logits(gates.model, given)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    before = [each.detach().clone() for each in gates.model.parameters()]
    training.step()
    after = gates.model.parameters()
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))


REGROWING = {"sparsity": 0.5, "end": 8, "every": 4, "regrow": 0.3, "regrow_every": 3}


@pytest.mark.parametrize(("optimizer", "stop"), [("AdamW", 0), ("AdamW", 3), ("SGD", 4)])
def test_interrupted_is_uninterrupted_bit_for_bit(optimizer, stop, tmp_path):
    whole, first = (Training("neurons", optimizer, initial=0.1, **REGROWING) for _ in range(2))
    for _ in range(9):
        whole.step()
    for _ in range(stop):
        first.step()
    parts = (first.model, first.optimizer, first.pruner)
    torch.save([part.state_dict() for part in parts], tmp_path / "state")
    second = Training("neurons", optimizer, initial=0.1, **REGROWING)
    second.seed = stop
    states = torch.load(tmp_path / "state")
    for part, state in zip((second.model, second.optimizer, second.pruner), states, strict=True):
        part.load_state_dict(state)
    for _ in range(9 - stop):
        second.step()
    assert second.gates.kept == whole.gates.kept
    assert second.pruner.done
    for old, new in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_regrowth_opens_those_with_the_largest_gradient_and_keeps_the_number():
    training = Training(sparsity=0.5, end=8, every=4, regrow=0.25, regrow_every=3)
    for _ in range(5):
        training.step()
    before, closed = training.gates.keep, training.gates.closed
    assert closed == 56
    training.step()
    after = training.gates.keep
    opened = sum(int((after[name] & ~before[name]).sum()) for name in before)
    assert opened == 14
    assert training.gates.closed == closed


def test_regrown_units_are_chosen_by_gradient_and_others_by_score():
    keep = {"a": torch.tensor([1, 1, 1, 0, 0]) > 0, "b": torch.tensor([1, 1, 0, 0]) > 0}
    scores = {"a": torch.tensor([5.0, 1, 4, 0, 0]), "b": torch.tensor([2.0, 3, 0, 0])}
    gradients = {"a": torch.tensor([9.0, 9, 9, 1, 3]), "b": torch.tensor([9.0, 9, 4, 2])}
    found = regrown(keep, scores, gradients, 0.5, 1)
    assert found["a"].tolist() == [True, False, True, False, True]
    assert found["b"].tolist() == [False, True, True, False]
    assert regrown(keep, scores, gradients, 0.2, 1)["a"].tolist() == keep["a"].tolist()
    few = {"a": torch.tensor([1, 0, 0, 0]) > 0}
    found = regrown(few, {"a": torch.ones(4)}, {"a": torch.arange(4.0)}, 0.9, 1)
    assert found["a"].tolist() == [False, False, False, True]


def test_with_rounded_widths_as_many_units_of_each_layer_are_exchanged():
    training = Training(round_to=8, sparsity=0.6, end=6, every=3, regrow=0.5, regrow_every=4)
    for _ in range(3):
        training.step()
    widths = [len(units) for units in training.gates.kept.values()]
    before = training.gates.kept
    training.step()
    assert [len(units) for units in training.gates.kept.values()] == widths
    assert not any(width % 8 for width in widths)
    assert training.gates.kept != before


def test_units_that_are_closed_already_count_and_nothing_opens():
    model = randomized_model("llama")
    gates = prunekit.neurons(model)
    gates.prune(gates.score("magnitude"), 0.4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(ConfigError, match="more than that are pruned already"):
        gates.during(optimizer, "magnitude", sparsity=0.3, end=3)
    kept = gates.kept
    with gates.during(optimizer, "random", sparsity=0.5, end=3, schedule="linear") as pruner:
        for closed in (51, 51, 64):
            model(TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            assert gates.closed == closed
    assert pruner.done
    gates.undo()
    assert gates.kept == kept


def test_a_wrapped_optimizer_and_accumulation_count_its_own_steps():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = randomized_model("llama")
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(model.parameters()))
    gates = prunekit.heads(model)
    with gates.during(optimizer, "random", sparsity=0.5, end=2, schedule="one-shot") as pruner:
        for _ in range(6):
            with accelerator.accumulate(model):
                accelerator.backward(model(TOKENS, labels=TOKENS).loss)
                optimizer.step()
                optimizer.zero_grad()
    assert pruner.step == 2
    assert pruner.done


class UnitsCallback(TrainerCallback):
    """Prunes neurons while a Trainer trains, with a state beside each checkpoint."""

    def __init__(self, gates):
        self.gates = gates

    def on_train_begin(self, args, state, control, optimizer=None, **_):
        self.pruner = self.gates.during(optimizer, "gradient", TOKENS, sparsity=0.5, end=6, every=2)
        if state.global_step:
            self.pruner.load_state_dict(torch.load(self.file(args, state)))

    def on_save(self, args, state, control, **_):
        torch.save(self.pruner.state_dict(), self.file(args, state))

    def on_train_end(self, args, state, control, **_):
        self.pruner.remove()

    def file(self, args, state):
        return Path(args.output_dir, f"checkpoint-{state.global_step}", "units.pt")


def trainer(folder):
    gates = prunekit.neurons(randomized_model("llama"))
    gates.dense_saves = True
    data = [
        {"input_ids": ids, "labels": ids}
        for ids in torch.randint(3, 96, (20, 8), generator=torch.Generator().manual_seed(1))
    ]
    options = {"max_steps": 8, "save_steps": 4, "per_device_train_batch_size": 2}
    args = TrainingArguments(
        str(folder), weight_decay=0.1, report_to=[], use_cpu=True, disable_tqdm=True, **options
    )
    made = Trainer(gates.model, args, train_dataset=data, callbacks=[UnitsCallback(gates)])
    return made, gates


def test_a_trainer_that_resumes_prunes_and_trains_as_one_that_was_not_interrupted(tmp_path):
    (whole, gates), (resumed, other) = trainer(tmp_path), trainer(tmp_path)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert gates.closed == 64
    assert other.kept == gates.kept
    for old, new in zip(gates.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(old, new)
    other.finalize(optimizer=resumed.optimizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 0.001}, "of 128 neurons 0.001 prunes none"),
        ({"sparsity": 0.99, "least": 8}, "Ask for less"),
        ({"end": -1}, "end: -1"),
        ({"every": 0}, "every: 0"),
        ({"schedule": "steep"}, "schedule: 'steep'"),
        ({"ranker": "block-influence"}, "it ranks blocks, not neurons"),
        ({"ranker": "none"}, "ranker: 'none' is none"),
        ({"scope": "model"}, "scope: 'model'"),
        ({"regrow": 0.1}, "pass both or none"),
        ({"round_to": 0}, "round_to: 0"),
    ],
)
def test_settings_are_checked_before_the_training(settings, message):
    with pytest.raises(ConfigError, match=message):
        Training(**settings)


def test_gates_have_one_pruner_and_an_optimizer_of_their_model():
    training = Training()
    gates = training.gates
    with pytest.raises(ConfigError, match="during: these gates are pruned during a training"):
        gates.during(training.optimizer, "random", sparsity=0.5, end=3)
    training.pruner.remove()
    other = torch.optim.SGD(randomized_model("llama").parameters())
    with pytest.raises(ConfigError, match="the SGD trains no parameter of this model"):
        gates.during(other, "random", sparsity=0.5, end=3)
    with pytest.raises(ConfigError, match="data: there is none"):
        gates.during(training.optimizer, "gradient", sparsity=0.5, end=3)
    with gates.during(training.optimizer, "random", sparsity=0.5, end=3) as pruner:
        state = pruner.state_dict()
    assert not training.optimizer._optimizer_step_post_hooks
    with gates.during(training.optimizer, "random", sparsity=0.6, end=3) as pruner:
        with pytest.raises(ConfigError, match="of a pruner with the settings"):
            pruner.load_state_dict(state)
        with pytest.raises(ConfigError, match="load_state_dict: keep"):
            pruner.load_state_dict({**state, "keep": {}})
    copy.deepcopy(training.model)
    gates.during(training.optimizer, "random", sparsity=0.6, end=3)
    gates.detach()
    assert not training.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("ranker", "options"), [("gradient", {}), ("obs", {"relative": False}), ("llm-pruner", {})]
)
def test_layers_without_open_units_are_left_out_of_the_scores(ranker, options):
    training = Training(
        "heads", ranker=ranker, settings=options, initial=0.5, sparsity=0.75, end=3, least=0,
        regrow=0.4, regrow_every=1,
    )  # fmt: skip
    with torch.no_grad():
        training.model.model.layers[0].self_attn.o_proj.weight *= 1e-4
    for _ in range(3):
        training.step()
    assert training.gates.closed == 3
    assert not training.gates.keep["model.layers.0.self_attn"].any()
    scores = training.gates.score(ranker, TOKENS, **options)
    assert scores["model.layers.0.self_attn"].tolist() == [0, 0]
    training.pruner.remove()
    expected = valid_logits(training.model, batch(training.model))
    training.gates.finalize(optimizer=training.optimizer)
    logits = valid_logits(training.model, batch(training.model))
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    train_step(training.model, training.optimizer, 9)


def test_steps_may_prune_whole_layers():
    gates = prunekit.heads(randomized_model("llama"))
    with torch.no_grad():
        gates.model.model.layers[1].self_attn.o_proj.weight *= 1e-4
    gates.prune_in_steps(BlockObs(relative=False), TOKENS, 0.5, steps=2, least=0)
    assert [len(units) for units in gates.kept.values()] == [2, 0]


def test_uniform_keeps_the_same_heads_where_blocks_share_a_bias():
    model = randomized_model("t5")
    heads, given = prunekit.heads(model), batch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    options = {"sparsity": 0.5, "end": 2, "uniform": True, "settings": {"seed": 1}}
    with heads.during(optimizer, "random", **options) as pruner:
        for _ in range(2):
            model(**given).loss.backward()
            optimizer.step()
    assert pruner.done
    assert heads.finalize(stock=True, optimizer=optimizer).stock
