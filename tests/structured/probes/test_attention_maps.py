"""Attention maps and output norms of single heads."""

import pytest
import torch

from prunekit.models.orientation import weight_matrix
from prunekit.models.units.heads_neurons import linear_groups
from prunekit.reports.figures.heads import head_figures
from prunekit.structured.probes.attention_maps import attention_maps, head_output_norms
from tests.support.units import batch, randomized_model, skip_without_attention_interface


@pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "llama", "t5"])
def test_a_map_is_that_of_eager_attention(model_type):
    """Covers soft caps, sliding windows, position bias and grouped queries."""
    model = randomized_model(model_type)
    skip_without_attention_interface(model)
    given = {name: part[1:] for name, part in batch(model).items()}
    heads = [(site, 3) for site in linear_groups(model, "heads")]
    with attention_maps(model, heads) as maps, torch.no_grad():
        model(**given)
    found = maps()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        shown = model(**given, output_attentions=True)
    if model_type == "t5":
        decoded = zip(shown.decoder_attentions, shown.cross_attentions, strict=True)
        maps = [*shown.encoder_attentions, *(each for pair in decoded for each in pair)]
    else:
        maps = shown.attentions
    for seen, truth in zip(found, maps, strict=True):
        torch.testing.assert_close(seen, truth[0, 3], rtol=1e-4, atol=1e-5)


def test_what_passes_a_gate_is_the_norm_of_what_its_head_adds():
    """The norm of a head's output times its output-projection columns."""
    model = randomized_model("llama")
    site = linear_groups(model, "heads")[1]
    ids, seen = torch.arange(3, 12)[None], []
    handle = site.reader.linear.register_forward_pre_hook(lambda _, x: seen.append(x[0][0]))
    with head_output_norms([(site, 2)]) as norms, torch.no_grad():
        model(ids)
    found = norms()
    handle.remove()
    size = model.config.head_dim or 8
    part = slice(2 * size, 3 * size)
    truth = (seen[0][:, part] @ weight_matrix(site.reader.linear)[:, part].T).norm(dim=1)
    torch.testing.assert_close(found[0], truth.detach())


def test_pictures_name_heads_tokens_and_layers_that_repeat_themselves():
    """Head similarity is drawn, most similar layers first, with its data attached."""
    layer = "model.layers.1.self_attn"
    report = {
        "views": {
            "tokens": ["", " <b"],
            "heads": [
                {"layer": layer, "head": 2, "kept": False, "score": 0.5, "activity": [1.0, 2.0],
                 "attention": [[1.0, 0.0], [0.25, 0.75]]},
            ],
            "redundancy": {layer: [[1.0, 0.875], [0.875, 1.0]]},
        },
    }  # fmt: skip
    maps, gates, alike = head_figures(report)
    assert maps.title == "Attention of block 1, head 2, removed"
    assert "&lt;b → &lt;b: 0.750" in maps.svg
    assert [row["norm"] for row in gates.rows] == [1.0, 2.0]
    assert "most alike: 0.875" in alike.caption
    assert alike.csv.splitlines()[:2] == ["first,second,alike", "0,0,1.0"]
    assert head_figures({}) == []
