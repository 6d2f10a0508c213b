"""Token ids as callers pass them: read alike in every form, or refused with the reason."""

import numpy as np
import pytest
import torch

import prunekit
from prunekit.errors import ConfigError
from prunekit.structured.batches import losses, to_batches
from prunekit.structured.token_ids import token_ids
from tests.support.architectures import tiny

IDS = torch.randint(0, 96, (4, 12), generator=torch.Generator().manual_seed(1))
FORMS = {
    "lists": IDS.tolist(),
    "tuples": tuple(map(tuple, IDS.tolist())),
    "an array": IDS.numpy(),
    "int32": IDS.int(),
    "not contiguous": IDS.T.contiguous().T,
    "tensors": [*IDS],
    "arrays": [*IDS.numpy()],
}
WRONG = {
    "a text": ("the text", "is no tensor, array or list"),
    "a number": (5, r"have the shape \[samples, tokens\]"),
    "an object": (object(), "is no tensor, array or list"),
    "one sample": (IDS[0], r"not \[12\]. Of a single sample: \[ids\]"),
    "three dimensions": (IDS[None], r"not \[1, 4, 12\]"),
    "no samples": (IDS[:0], r"not \[0, 12\]"),
    "no tokens": (IDS[:, :0], r"not \[4, 0\]"),
    "an empty list": ([], r"not \[0\]|whole numbers"),
    "ragged": ([[1, 2], [3]], "lists of equal lengths|list of lists"),
    "floats": (IDS.float(), "whole numbers, not float32"),
    "an array of floats": (np.ones((2, 3)), "whole numbers, not float64"),
    "bools": (IDS > 3, "whole numbers, not bool"),
    "beyond": (IDS + 90, r"there is no token \d+; LlamaForCausalLM knows 0 to 95"),
    "negative": (IDS - 96, "there is no token -"),
    "huge": ([[2**70, 1]], "is no tensor, array or list"),
    "meta": (IDS.to("meta"), "on the meta device"),
}


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_the_same_tokens(llama, form):
    ids = token_ids(FORMS[form], llama)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, IDS)
    batches = to_batches(FORMS[form], llama)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), IDS)


@pytest.mark.parametrize("name", WRONG)
def test_what_are_no_tokens_of_the_model_is_refused_everywhere(llama, name):
    data, message = WRONG[name]
    with pytest.raises(ConfigError, match=f"data: .*({message})"):
        prunekit.heads(llama).score("gradient", data)
    with pytest.raises(ConfigError, match=f"tokens: .*({message})"):
        prunekit.prune(llama, data, method="wanda", pattern="2:4")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (3, "a batch of type int|whole numbers|the shape"),
        ({"input_ids": IDS.float()}, "input_ids: token ids are whole numbers"),
        ({"input_ids": IDS + 96}, "input_ids: there is no token"),
        ({"input_ids": IDS, "labels": IDS + 96}, "labels: there is no token"),
        ({"input_ids": IDS, "labels": IDS[:, :3]}, r"labels of shape \[4, 3\] do not fit"),
        ({"input_ids": IDS, "attention_mask": IDS[:1] > 0}, "unlike numbers of samples"),
        ({"input_ids": IDS, "attention_mask": IDS[:, :3] > 0}, r"attention_mask has the shape"),
        ({"input_ids": IDS, "labels": "x"}, "labels: a value of type str"),
        ({"input_ids": IDS[:, :1]}, "a sample of one token has none to predict"),
    ],
)
def test_batches_that_do_not_fit_are_refused(llama, batch, message):
    with pytest.raises(ConfigError, match=message):
        prunekit.heads(llama).score("gradient", [batch])


def test_ignored_labels_are_no_tokens(llama):
    labels = IDS.masked_fill(IDS < 48, -100)
    (batch,) = to_batches([{"input_ids": IDS.tolist(), "labels": labels.tolist()}], llama)
    assert int(losses(llama, batch)[1].sum()) == int((labels[:, 1:] != -100).sum())


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "bert"])
def test_samples_longer_than_the_learned_positions_are_refused(model_type):
    model = tiny(model_type)
    longest = model.config.max_position_embeddings
    token_ids(torch.zeros(1, longest, dtype=torch.long), model)
    with pytest.raises(ConfigError, match=f"knows {longest} positions"):
        token_ids(torch.zeros(1, longest + 1, dtype=torch.long), model)
