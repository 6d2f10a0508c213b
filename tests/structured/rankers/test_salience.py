"""Salience against its formula in float64, however the samples are cut."""

from functools import cache, partial

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import prunekit
from prunekit.errors import ConfigError, ShapeError
from prunekit.models.orientation import weight_matrix
from prunekit.structured.agreement import spearman
from prunekit.structured.rankers.salience import Salience
from tests.support.architectures import tiny
from tests.support.rankers import flat
from tests.support.units import batch, randomized_model

SAMPLES, LENGTH, WINDOW = 16, 12, 4096
TOKENS = torch.randint(3, 96, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(3))
KINDS = ("heads", "neurons", "hidden")
ATTENTIONS = ("q_proj", "k_proj", "v_proj", "Attention.q", "Attention.k", "Attention.v")
STREAM_READERS = (*ATTENTIONS, "gate_proj", "up_proj", "wi", "lm_head")
"""Ends of the names of the linears that read the residual stream of Llama and T5."""


@cache
def gates_on(model_type, kind):
    model = randomized_model(model_type)
    model.requires_grad_(requires_grad=False)
    return getattr(prunekit, kind)(model)


def batches(*sizes):
    return [{"input_ids": part} for part in TOKENS.split(sizes)]


def sums(model, modules, given):
    """Return rows of inputs of modules and of ∂L/∂ these, L the mean loss, in float64."""
    seen = {}

    def alias(module, inputs):
        seen[module] = inputs[0].view_as(inputs[0])
        return (seen[module],)  # its gradient is that through this module alone

    handles = [module.register_forward_pre_hook(alias) for module in modules]
    logits = model(**given).logits
    labels = given.get("labels")
    if labels is None:
        labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
    gradients = torch.autograd.grad(loss, [seen[module] for module in modules])
    for handle in handles:
        handle.remove()
    return [(seen[module].detach(), each) for module, each in zip(modules, gradients, strict=True)]


def root_kurtosis(rows):
    """Return the root of the excess kurtosis of the columns, clamped at 0; of constant ones, 0."""
    z = ((rows - rows.mean(0)) / rows.std(0)).nan_to_num()
    return ((z**4).mean(0) - 3).clamp_min(0).sqrt()


def in_decoder(model, module):
    return model.config.is_encoder_decoder and module in {*model.get_decoder().modules()}


def valid_rows(model, module, values, given):
    mask = given["attention_mask"].bool()
    if in_decoder(model, module):
        mask = given["labels"] != -100
    return values[mask]


def products(model, group, given, kind):
    """Return (Σ|h|)(Σ|g|) of a window, summed over the modules that read a unit."""
    modules = [*group.norms] if kind == "hidden" else [group.reader.linear]
    total = torch.zeros(group.units, dtype=torch.float64)
    for module, pair in zip(modules, sums(model, modules, given), strict=True):
        h, g = (valid_rows(model, module, each, given).abs() for each in pair)
        product = h.sum(0) * (WINDOW / len(h)) * g.sum(0)
        total += product if kind == "hidden" else product[group.reader.index].sum((1, 2))
    return total


def root_kurtoses(model, group, given, kind):
    """Return √Kurt of the weights that read a unit, each times its mean input."""
    if kind == "hidden":
        readers = [m for name, m in model.named_modules() if name.endswith(STREAM_READERS)]
        return sum(root_kurtosis(module.weight.detach()) for module in readers)
    linear = group.reader.linear
    ((h, _),) = sums(model, [linear], given)
    mean = valid_rows(model, linear, h, given).mean(0)
    weighed = (weight_matrix(linear).detach() * mean).T
    return root_kurtosis(weighed[group.reader.index.flatten(1)].flatten(1).T)


@pytest.mark.parametrize(
    ("model_type", "kind", "dtype"),
    [
        *(("llama", kind, torch.float32) for kind in KINDS),
        # Some activations of T5 are so near the edge of ReLU that float32 has no fifth digit.
        *(("t5", kind, torch.float64) for kind in KINDS),
        ("bert", "heads", torch.float32),
        ("bert", "neurons", torch.float32),
    ],
)
def test_the_score_is_a_product_of_two_sums_and_the_root_of_a_kurtosis(model_type, kind, dtype):
    """The score is (Σ|h|)(Σ|g|) + √Kurt, without padding, in both stacks of T5.

    Σ|h| is that of a full window.
    """
    gates = getattr(prunekit, kind)(randomized_model(model_type).to(dtype))
    given = batch(gates.model)
    whole = gates.score("salience", [given])
    product = gates.score("salience", [given], outliers=False)
    model = randomized_model(model_type).double()
    for group in getattr(prunekit, kind)(model).groups:
        truth = products(model, group, given, kind)
        torch.testing.assert_close(product[group.name], truth, rtol=1e-5, atol=0)
        # The root makes 1e-8 of a kurtosis near 0 visible.
        roots = root_kurtoses(model, group, given, kind)
        found = whole[group.name] - product[group.name]
        torch.testing.assert_close(found, roots, rtol=1e-5, atol=1e-3)


def test_without_outliers_the_kurtosis_is_left_out():
    for kind in KINDS:
        gates = gates_on("llama", kind)
        whole = flat(gates.score("salience", TOKENS))
        product = flat(gates.score("salience", TOKENS, outliers=False))
        assert (whole >= product).all()
        assert (whole > product).any()
        assert (product > 0).all()


@pytest.mark.parametrize("smoothing", [0, 0.85])
def test_windows_are_averaged(smoothing):
    """Windows of 4, 4, 4 and 4 samples, each with the mean loss of its own."""
    gates = gates_on("llama", "neurons")
    parts = [
        flat(gates.score("salience", part, window=4 * LENGTH)) for part in TOKENS[:14].split(4)
    ]
    weights = [4 / 14, 4 / 14, 4 / 14, 2 / 14]
    if smoothing:
        weights = [0.85**3, 0.15 * 0.85**2, 0.15 * 0.85, 0.15]
    settings = {"window": 4 * LENGTH, "smoothing": smoothing}
    found = flat(gates.score("salience", TOKENS[:14], **settings))
    mean = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(found, mean, rtol=1e-5, atol=0)


@pytest.mark.parametrize("window", [WINDOW, 3 * LENGTH])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_do_not_depend_on_the_cut_into_batches(kind, window):
    """1, 16, 15 + 1 and 2 + 9 + 5 batches."""
    gates = gates_on("llama", kind)
    whole = flat(gates.score("salience", batches(SAMPLES), window=window))
    for cuts in ([1] * SAMPLES, [15, 1], [2, 9, 5]):
        cut = flat(gates.score("salience", batches(*cuts), window=window))
        torch.testing.assert_close(cut, whole, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["llama", "t5"])
def test_padding_counts_neither_as_tokens_nor_as_samples_cut_elsewhere(model_type, kind):
    gates = gates_on(model_type, kind)
    given = batch(gates.model)
    rows = [
        {name: value[row : row + 1] for name, value in given.items()}
        for row in range(len(given["input_ids"]))
    ]
    torch.testing.assert_close(
        flat(gates.score("salience", rows)),
        flat(gates.score("salience", [given])),
        rtol=1e-5,
        atol=0,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_share_of_the_kurtosis_does_not_vanish_with_the_number_of_samples(kind):
    gates = gates_on("llama", kind)
    tokens = torch.randint(3, 96, (512, LENGTH), generator=torch.Generator().manual_seed(0))
    shares = []
    for count in (16, 512):
        with_it, without = (
            flat(gates.score("salience", given, window=8 * LENGTH, outliers=outliers))
            for given in [[{"input_ids": part} for part in tokens[:count].split(128)]]
            for outliers in (True, False)
        )
        shares.append(float((with_it - without).sum() / with_it.sum()))
    assert shares[1] == pytest.approx(shares[0], rel=0.1)
    assert shares[0] > 0


def test_weights_of_windows_sum_to_one():
    for smoothing in (0, 0.85):
        weights = Salience(smoothing=smoothing).window_weights([7, 7, 7, 5])
        assert sum(weights) == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_counted_once_under_gradient_checkpointing(kind):
    """That of transformers, for a model in train mode, and one whose forward runs twice."""
    gates = getattr(prunekit, kind)(randomized_model("llama"))
    model, whole = gates.model.train(), flat(gates.score("salience", TOKENS))
    for reentrant in (True, False):
        # transformers has renamed it.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
        assert torch.equal(flat(gates.score("salience", TOKENS)), whole)
        assert model.training
    calls = []
    for block in model.model.layers:
        block.mlp.act_fn.register_forward_hook(lambda *_: calls.append(1))
        block.mlp.forward = partial(checkpoint, block.mlp.forward, use_reentrant=False)
    torch.testing.assert_close(flat(gates.score("salience", TOKENS)), whole, rtol=1e-6, atol=0)
    assert len(calls) == 2 * 2 * len(model.model.layers)  # two batches, each twice


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_yields_nearly_the_same_finite_scores(kind):
    """The loss is summed, not averaged, before the backward: fp16 would lose small gradients."""
    model = randomized_model("llama")
    gates = getattr(prunekit, kind)(model)
    whole = flat(gates.score("salience", TOKENS))
    halves = {}
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            halves[f"autocast {dtype}"] = flat(gates.score("salience", TOKENS))
    model.half()
    halves["fp16 weights"] = flat(gates.score("salience", TOKENS))
    for name, found in halves.items():
        torch.testing.assert_close(found, whole, rtol=0.05, atol=0, msg=lambda m, n=name: n + m)


def test_blocks_and_coordinates_under_layer_norm_are_refused():
    with pytest.raises(ConfigError, match="ranks heads and hidden and neurons, not blocks"):
        prunekit.blocks(tiny("llama")).score("salience", TOKENS)
    with pytest.raises(ShapeError, match="'bert' normalise with LayerNorm"):
        prunekit.hidden(tiny("bert"))


def test_coordinates_of_a_trained_model_are_ordered_as_by_leaving_each_out(shared):
    model = prunekit.load(shared / "models/stories260K")
    torch.manual_seed(0)
    start = torch.ones(8, 1, dtype=torch.int64)
    tokens = model.generate(start, do_sample=True, max_new_tokens=63, pad_token_id=0)
    gates = prunekit.hidden(model)
    truth = gates.score("leave-one-out", tokens)
    assert spearman(gates.score("salience", tokens), truth) > 0.5
