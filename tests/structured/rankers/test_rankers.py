"""Rankers: each against its formula, or against what a model really does."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification

import prunekit
from prunekit.errors import ConfigError, NumericsError
from prunekit.models.units.heads_neurons import matrix, sites
from prunekit.structured.agreement import spearman
from prunekit.structured.batches import losses, mean_loss
from prunekit.structured.rankers import Ranker, rankers
from prunekit.structured.refit import damp, refit
from tests.support.architectures import TINY, tiny
from tests.support.units import batch, needs_interface, restless

TOKENS = torch.randint(3, 96, (10, 12), generator=torch.Generator().manual_seed(3))


def flat(scores):
    return torch.cat([*scores.values()])


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_every_ranker_gives_each_unit_of_each_layer_one_finite_score(model_type):
    """One entry a (layer, head), also under grouped queries, in T5's two stacks and in encoders."""
    model = restless(model_type)
    needs_interface(model)
    given = [batch(model)]
    for gates in (prunekit.heads(model), prunekit.neurons(model)):
        for name, kind in rankers().items():
            if gates.kind not in kind.kinds or (gates.kind, name) == ("neurons", "leave-one-out"):
                continue
            scores = gates.score(name, given)
            assert {site: len(score) for site, score in scores.items()} == {
                site.name: site.units for site in gates.sites
            }
            assert flat(scores).isfinite().all()
            assert len(flat(scores).unique()) > 1, name
        gates.detach()


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "gpt_neox", "llama", "phi3", "t5"])
@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_a_unit_that_was_made_tiny_has_the_lowest_magnitude(model_type, kind):
    """Wrong slices of a fused or inputs-first matrix would spread the change over many units."""
    model = restless(model_type)
    gates = getattr(prunekit, kind)(model)
    site = gates.sites[1]
    with torch.no_grad():
        for part in (*site.writers, site.reader):
            weight = matrix(part.linear)
            rows = part.index[1].flatten()
            if part is site.reader:
                weight[:, rows] *= 1e-3
            else:
                weight[rows] *= 1e-3
    scores = gates.score("magnitude")
    assert gates.prune(scores, 1 / len(flat(scores)))[0][:2] == (1, 1)
    rest = flat({name: score for name, score in scores.items() if name != site.name})
    assert scores[site.name][1] < 0.02 * rest.min()


def test_magnitude_is_the_sum_of_the_norms_of_q_k_v_and_o():
    """Of GPT-2: columns of c_attn's three thirds, rows of c_proj."""
    model = restless("gpt2")
    attention = model.transformer.h[0].attn
    inner, outer = attention.c_attn.weight, attention.c_proj.weight
    head = slice(8, 16)
    q, k, v = (inner[:, third + 8 : third + 16] for third in (0, 32, 64))
    expected = sum(part.double().norm() for part in (q, k, v, outer[head]))
    scores = prunekit.heads(model).score("magnitude")
    torch.testing.assert_close(scores["transformer.h.0.attn"][1], expected.detach())


def test_magnitude_of_a_group_adds_the_queries_and_outputs_of_its_heads():
    model = restless("llama")
    attention = model.model.layers[0].self_attn
    q = attention.q_proj.weight.double().view(4, 8, 32).flatten(1).norm(dim=1)
    o = attention.o_proj.weight.T.double().reshape(4, 8, 32).flatten(1).norm(dim=1)
    k, v = (
        linear.weight.double().view(2, 8, 32).flatten(1).norm(dim=1)
        for linear in (attention.k_proj, attention.v_proj)
    )
    expected = (q + o).view(2, 2).sum(1) + k + v
    scores = prunekit.heads(model).score("magnitude")
    torch.testing.assert_close(scores["model.layers.0.self_attn"], expected.detach())


def test_entropy_prunes_the_head_that_looks_everywhere_alike_first():
    model = restless("gpt2")
    query = sites(model, "heads")[1].writers[0]
    with torch.no_grad():
        matrix(query.linear)[query.index[2].flatten()] = 0
        query.linear.bias[query.index[2].flatten()] = 0
    gates = prunekit.heads(model)
    scores = gates.score("entropy", TOKENS)
    assert scores["transformer.h.1.attn"][2] == pytest.approx(-1, abs=1e-6)
    assert gates.prune(scores, 0.125)[0][:2] == (1, 2)
    nats = flat(gates.score("entropy", TOKENS, normalised=False))
    # ln 12 for the last row, less for those before it.
    assert (-nats).max() < torch.arange(1, 13).double().log().mean() + 1e-6


def test_gradient_is_the_mean_of_each_samples_absolute_gradient_by_the_gate():
    """|∂L/∂ξ| of each sample by itself, not of their sum; padding is not predicted."""
    model = restless("llama")
    gates = prunekit.heads(model)
    given = batch(model)
    expected = {site.name: torch.zeros(2) for site in gates.sites}
    for row, length in ((0, 6), (1, 9)):
        values = [torch.ones(2, requires_grad=True) for _ in gates.sites]
        ids = given["input_ids"][row : row + 1, :length]
        for gate, value in zip(gates.gates.values(), values, strict=True):
            gate.value = value
        model(input_ids=ids, labels=ids).loss.backward()
        for name, value in zip(expected, values, strict=True):
            expected[name] += value.grad.abs() / 2
    for gate in gates.gates.values():
        gate.value = torch.ones(2)
    found = gates.score("gradient", [given])
    for name, score in found.items():
        torch.testing.assert_close(score.float(), expected[name], rtol=1e-4, atol=1e-6)
    for score in gates.score("gradient", [given], normalised=True).values():
        assert float(score.norm()) == pytest.approx(1)


def test_output_norm_is_the_mean_norm_of_what_a_head_adds():
    model = restless("gpt2")
    gates = prunekit.heads(model)
    site = gates.sites[0]
    seen = []
    site.reader.linear.register_forward_hook(lambda _, x, y: seen.append(x[0]))
    found = gates.score("output-norm", TOKENS)[site.name]
    x = torch.cat(seen).flatten(0, 1)
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        given = x[:, part] @ site.reader.linear.weight[part]
        assert float(found[head]) == pytest.approx(given.norm(dim=1).mean().item(), rel=1e-5)


def test_random_is_seeded_and_different_for_another_seed():
    gates = prunekit.heads(tiny("bert"))
    first, again, other = (flat(gates.score("random", seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_leave_one_out_is_the_loss_without_the_unit_less_the_loss():
    model = restless("gpt2")
    gates = prunekit.heads(model)
    found = gates.score("leave-one-out", TOKENS)["transformer.h.1.attn"]
    before = model(TOKENS, labels=TOKENS).loss
    model.transformer.h[1].attn.c_proj.weight.data[16:24] = 0
    after = model(TOKENS, labels=TOKENS).loss
    assert float(found[2]) == pytest.approx((after - before).item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_block_obs_is_what_the_best_refit_without_the_unit_loses(kind):
    """tr(W_P [(H⁻¹)_PP]⁻¹ W_Pᵀ) against least squares over what is left, in float64."""
    model = restless("llama")
    gates = getattr(prunekit, kind)(model)
    site = gates.sites[0]
    seen = []
    handle = site.reader.linear.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    found = gates.score("obs", TOKENS, damping=1e-9, relative=False)[site.name]
    handle.remove()
    x = torch.cat(seen).flatten(0, 1).double()
    weight = site.reader.linear.weight.detach().double()
    for unit in range(2):
        keep = site.owner != unit
        fit = torch.linalg.lstsq(x[:, keep], x @ weight.T).solution
        lost = (x[:, keep] @ fit - x @ weight.T).square().sum() / len(x)
        assert float(found[unit]) == pytest.approx(float(lost), rel=2e-3)


def test_surgeon_weighs_what_a_refit_loses_by_the_gradients_of_the_loss():
    """½ tr(G D H Dᵀ) of the change D of the weights that the best refit makes, in float64."""
    model = restless("llama")
    gates = prunekit.heads(model)
    site = gates.sites[1]
    seen, given = [], []
    linear = site.reader.linear
    handles = [
        linear.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach())),
        linear.register_forward_hook(lambda _, x, y: given.append(y)),
    ]
    loss = model(TOKENS, labels=TOKENS).loss * TOKENS[:, 1:].numel()
    (gradient,) = torch.autograd.grad(loss, given)
    for handle in handles:
        handle.remove()
    found, mean = (
        gates.score("surgeon", TOKENS, damping=1e-9, full=full)[site.name] for full in (True, False)
    )
    x, g = seen[0].flatten(0, 1).double(), gradient.flatten(0, 1).double()
    minded = g.T @ g / TOKENS[:, 1:].numel()
    weight = linear.weight.detach().double()
    for unit in range(2):
        change = weight.clone()
        keep = site.owner != unit
        change[:, keep] -= torch.linalg.lstsq(x[:, keep], x @ weight.T).solution.T
        off = x @ change.T
        rise = (minded * (off.T @ off)).sum() / len(x) / 2
        assert float(found[unit]) == pytest.approx(float(rise), rel=2e-3)
        rise = minded.diagonal().mean() * off.square().sum() / len(x) / 2
        assert float(mean[unit]) == pytest.approx(float(rise), rel=2e-3)


def test_a_refit_gives_the_least_squares_weights_of_the_kept_units():
    model = restless("llama")
    site = sites(model, "heads")[0]
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)).double()
    x[:, :16] += x[:, 16:]
    weight = site.reader.linear.weight.detach().double().clone()
    refit(site, x.T @ x / 200, [1], damping=1e-12)
    fit = torch.linalg.lstsq(x[:, 16:], x @ weight.T).solution.T
    torch.testing.assert_close(
        site.reader.linear.weight[:, 16:].double(), fit, rtol=1e-4, atol=1e-5
    )


def test_what_rounding_left_indefinite_is_damped_further():
    damped, factor = damp(torch.diag(torch.tensor([1, -1e-6])), 1e-9, "a")
    torch.testing.assert_close(
        damped.diagonal(), torch.tensor([1, 4e-6]).double(), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(factor @ factor.T, damped)
    with pytest.raises(NumericsError, match=r"^a: the products .* not positive definite, even"):
        damp(torch.diag(torch.tensor([3.0, -2.0])), 1e-9, "a")
    gates = prunekit.neurons(restless("llama"))
    assert flat(gates.score("obs", TOKENS[:1, :6], damping=1e-12)).isfinite().all()


def test_obs_says_when_inputs_are_all_zero():
    model = restless("llama")
    gates = prunekit.heads(model)
    gates.gate(0, 0, 0.0)
    gates.gate(0, 1, 0.0)
    with pytest.raises(NumericsError, match=r"layers\.0\.self_attn: its inputs have a mean square"):
        gates.score("obs", TOKENS)


def test_a_hybrid_adds_z_scores_or_places_of_its_parts():
    gates = prunekit.heads(restless("gpt2"))
    a, b = (flat(gates.score(name, TOKENS)) for name in ("magnitude", "entropy"))
    of = {"magnitude": 0.7, "entropy": -0.3}
    found = flat(gates.score("hybrid", TOKENS, of=of, by="z-score"))
    z = [(part - part.mean()) / part.std(correction=0) for part in (a, b)]
    torch.testing.assert_close(found, 0.7 * z[0] - 0.3 * z[1])
    found = flat(gates.score("hybrid", TOKENS, of={"magnitude": 1}))
    assert (found * 7).round().tolist() == a.argsort().argsort().double().tolist()
    found = flat(gates.score("hybrid", TOKENS, of={"magnitude": 2, "entropy": 1}, by="product"))
    torch.testing.assert_close(found, a**2 * (b - b.min()))
    with pytest.raises(
        ConfigError, match=r"'weight' is no ranker\. Choose: block-influence, entropy"
    ):
        gates.score("hybrid", TOKENS, of={"weight": 1})
    with pytest.raises(ConfigError, match="product takes weights above 0 only"):
        gates.score("hybrid", TOKENS, of={"magnitude": 1, "entropy": -1}, by="product")


def test_salience_is_the_product_of_two_sums_and_the_root_of_a_kurtosis():
    """(Σ|h|)(Σ|g|) + √Kurt, not Σ|h g|; excess kurtosis of a neuron's weights, not below 0."""
    model = restless("llama")
    model.requires_grad_(requires_grad=False)
    gates = prunekit.neurons(model)
    reader = gates.sites[1].reader.linear
    seen = []
    handle = reader.register_forward_pre_hook(
        lambda _, x: seen.append(x[0].detach().requires_grad_()) or (seen[-1],)
    )
    given = [{"input_ids": part} for part in TOKENS.split(5)]
    sums = [0, 0]
    for part in given:
        loss, predictions = losses(model, part)
        (g,) = torch.autograd.grad(loss.sum() / predictions.sum(), [seen[-1]])
        for index, x in enumerate((seen[-1], g)):
            sums[index] = sums[index] + x.detach().abs().double().sum((0, 1))
    handle.remove()
    weight = reader.weight.double()
    z = (weight - weight.mean(0)) / weight.std(0)
    kurtosis = (z**4).mean(0) - 3
    found = gates.score("salience", given)[gates.sites[1].name]
    torch.testing.assert_close(
        found, sums[0] * sums[1] + kurtosis.clamp_min(0).sqrt(), rtol=1e-4, atol=1e-9
    )
    found = gates.score("salience", given, outliers=False)[gates.sites[1].name]
    torch.testing.assert_close(found, sums[0] * sums[1], rtol=1e-4, atol=1e-9)


def test_spearman_is_that_of_the_textbook():
    """1 − 6 Σ d² / (n (n² − 1)) without ties."""
    a = {"x": torch.tensor([3.0, 1, 4]), "y": torch.tensor([1.5, 9])}
    b = {"x": torch.tensor([10.0, 20, 50]), "y": torch.tensor([30.0, 40])}
    d2 = (3 - 1) ** 2 + (1 - 2) ** 2 + (4 - 5) ** 2 + (2 - 3) ** 2 + (5 - 4) ** 2
    assert spearman(a, b) == pytest.approx(1 - 6 * d2 / (5 * 24))
    assert spearman(a, a) == pytest.approx(1)
    assert spearman(a, {name: -score for name, score in a.items()}) == pytest.approx(-1)
    assert spearman(a, {name: 0 * score for name, score in a.items()}) == 0


def test_heads_that_give_the_same_are_redundant_and_others_less():
    model = restless("gpt2")
    inner = model.transformer.h[0].attn.c_attn
    with torch.no_grad():
        for third in (0, 32, 64):
            inner.weight[:, third + 8 : third + 16] = inner.weight[:, third : third + 8]
            inner.bias[third + 8 : third + 16] = inner.bias[third : third + 8]
    found = prunekit.heads(model).redundancy(TOKENS)["transformer.h.0.attn"]
    torch.testing.assert_close(found.diagonal(), torch.ones(4).double())
    torch.testing.assert_close(found, found.T)
    assert found[0, 1] == pytest.approx(1)
    assert found[0, 2:].max() < 0.95
    assert found.min() >= 0


def test_a_classifier_is_ranked_by_its_labels():
    model = tiny("bert", AutoModelForSequenceClassification)
    given = {"input_ids": TOKENS, "labels": torch.arange(10) % 2}
    loss, count = losses(model, given)
    logits = model(**given).logits
    torch.testing.assert_close(loss, cross_entropy(logits, given["labels"], reduction="none"))
    assert count.tolist() == [1] * 10
    assert flat(prunekit.heads(model).score("gradient", [given])).min() > 0


def test_the_mean_loss_counts_predictions_not_batches_and_leaves_padding_out():
    """A mean of batch means would weigh the short batch like the long one."""
    model = restless("llama")
    given = batch(model)
    parts = [given["input_ids"][:1, :6], given["input_ids"][1:]]
    with torch.no_grad():
        truth = [cross_entropy(model(p).logits[0, :-1], p[0, 1:], reduction="sum") for p in parts]
    assert mean_loss(model, [given]) == pytest.approx(float(sum(truth)) / (5 + 8), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "ranker", "data", "message"),
    [
        ("neurons", "entropy", TOKENS, "ranker entropy: it ranks heads, not neurons"),
        ("heads", "entropie", TOKENS, "'entropie' is none. Choose: block-influence, entropy"),
        ("heads", "gradient", None, "there is none; pass tokens"),
        ("heads", "gradient", [{"ids": TOKENS}], "reads input_ids, and a batch has only ids"),
        ("heads", "random", None, "ranker random: sed: Extra inputs are not permitted"),
    ],
)
def test_refuses_what_cannot_be_scored(kind, ranker, data, message):
    gates = getattr(prunekit, kind)(tiny("llama"))
    settings = {"sed": 1} if ranker == "random" else {}
    with pytest.raises(ConfigError, match=message):
        gates.score(ranker, data, **settings)


def test_losses_without_labels_are_refused_where_they_are_needed():
    with pytest.raises(ConfigError, match="loss of BertForMaskedLM needs labels"):
        prunekit.heads(tiny("bert")).score("gradient", TOKENS)
    with pytest.raises(ConfigError, match="reads decoder_input_ids or labels"):
        prunekit.heads(tiny("t5")).score("output-norm", TOKENS)


def test_a_ranker_of_ones_own_is_taken_as_it_is():
    class First(Ranker):
        name = "first"
        needs_data = False

        def score(self, subject):
            return {site.name: torch.arange(site.units).double() for site in subject.sites}

    found = prunekit.heads(tiny("bert")).score(First())
    assert flat(found).tolist() == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_parameter_gradients_and_llm_pruner_are_sums_over_the_weights_of_a_unit(model_type):
    """Against a backward of the loss of all predictions, frozen weights included."""
    model = restless(model_type)
    gates = prunekit.neurons(model)
    site = gates.sites[1]
    linears = [part.linear for part in (*site.writers, site.reader)]
    for linear in linears:
        linear.weight.requires_grad_(requires_grad=False)
    norms = gates.score("parameter-gradient", TOKENS)[site.name]
    products = gates.score("llm-pruner", TOKENS)[site.name]
    assert not any(linear.weight.requires_grad for linear in linears)
    model.requires_grad_(requires_grad=True)
    loss, predictions = losses(model, {"input_ids": TOKENS})
    (loss.sum() / predictions.sum()).backward()
    expected_norm = expected_product = 0.0
    for part in (*site.writers, site.reader):
        weight, gradient = part.linear.weight, part.linear.weight.grad
        if model_type == "gpt2":
            weight, gradient = weight.T, gradient.T
        if part is site.reader:
            weight, gradient = weight.T, gradient.T
        at = part.index[3].flatten()
        expected_norm += gradient[at].norm().item()
        expected_product += (weight * gradient)[at].abs().sum().item()
    assert float(norms[3]) == pytest.approx(expected_norm, rel=1e-4)
    assert float(products[3]) == pytest.approx(expected_product, rel=1e-4)


def test_flap_is_the_variance_of_inputs_times_the_norm_of_their_weights():
    """Over all batches at once; a layer's scores are then standardised."""
    model = restless("llama")
    gates = prunekit.heads(model)
    site, seen = gates.sites[0], []
    hook = site.reader.linear.register_forward_pre_hook(
        lambda _, x: seen.append(x[0].flatten(0, 1))
    )
    raw = gates.score("flap", TOKENS, standardised=False)[site.name]
    hook.remove()
    x = torch.cat(seen).double()
    each = x.var(0) * site.reader.linear.weight.double().square().sum(0)
    expected = each.detach()[site.reader.index].mean((1, 2))
    torch.testing.assert_close(raw, expected)
    scores = gates.score("flap", TOKENS)[site.name]
    torch.testing.assert_close(scores, (expected - expected.mean()) / expected.std())
