"""The final norm in place of the model: its gradients are those of the model's loss."""

import torch

from prunekit.architectures import find_architecture
from prunekit.models.layout import stack_runners
from prunekit.structured.batches import losses
from prunekit.structured.blockwise.block_passes import BlockPasses
from prunekit.structured.blockwise.outside_forward import OutsideForward
from tests.support.units import randomized_model

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(2))


def outside_of(model, batch):
    """Yield the parts outside of the blocks; each has its inputs until the next one."""
    stacks = stack_runners(model, find_architecture(model))
    names = "RMSNorm", "T5LayerNorm"
    norms = [each for each in model.modules() if type(each).__name__.endswith(names)]
    parts = BlockPasses(model, stacks, None, [batch]).backward(norms)
    return (part for part in parts if isinstance(part, OutsideForward))


def test_gradients_by_the_norm_are_those_of_the_model():
    batch = {"input_ids": IDS}
    model = randomized_model("llama")
    (part,) = outside_of(model, batch)
    assert part.norm is model.model.norm
    assert {part.norm, model.lm_head, model.model.embed_tokens} <= part.modules
    assert not part.modules & {*model.model.layers[0].modules()}
    weight = part.norm.weight
    (expected,) = torch.autograd.grad(losses(model, batch)[0].sum(), weight)
    (found,), predictions = part.gradients(batch, lambda: [weight])
    torch.testing.assert_close(found, expected)
    assert predictions.tolist() == [8, 8]


def test_each_stack_of_an_encoder_decoder_has_its_norm_and_one_the_vocabulary():
    batch = {"input_ids": IDS, "labels": IDS[:, :5].contiguous()}
    model = randomized_model("t5")
    norms = [model.decoder.final_layer_norm, model.encoder.final_layer_norm]
    expected = torch.autograd.grad(losses(model, batch)[0].sum(), [each.weight for each in norms])
    for part, norm, wanted in zip(outside_of(model, batch), norms, expected, strict=True):
        assert part.norm is norm
        assert (model.shared in part.modules) == (norm is norms[0])
        (found,), _ = part.gradients(batch, lambda part=part: [part.norm.weight])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)  # float32 sums of 20


def test_a_run_calls_the_hooks_of_the_norm():
    batch, seen = {"input_ids": IDS}, []
    (part,) = outside_of(randomized_model("llama"), batch)
    part.norm.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    part.run(batch)
    assert seen == [False]
