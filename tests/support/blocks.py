"""Run and prune tiny models block by block."""

import torch

from prunekit.architectures import find_architecture
from prunekit.config.prune_table import Prune
from prunekit.models.layout import LinearSelection, list_blocks, stack_runners
from prunekit.models.sequential.pipeline import iterate_blocks, split_batches
from prunekit.sparsify.block_pruner import BlockPruner
from prunekit.sparsify.recipe import Recipe

HALF = {"pattern": "unstructured", "sparsity": 0.5}


def loaded_blocks(model, ids, **options):
    """Yield each loaded block of a model."""
    stacks = stack_runners(model, find_architecture(model))
    yield from iterate_blocks(model, stacks, None, split_batches(ids, ids.device), **options)


def pruning(model, ids, *, dtype=None, **section):
    """Yield each loaded block, its linears, and an iterator that prunes them."""
    recipe = Recipe.of(Prune.model_validate({"method": "wanda", **section}), calibrated=True)
    stacks = stack_runners(model, find_architecture(model))
    blocks = list_blocks(stacks, LinearSelection(recipe.pattern))
    names = [linear.name for block in blocks for linear in block.linears]
    sparsity = section.get("sparsity", 0.5)
    dtypes = {name: dtype or model.get_parameter(f"{name}.weight").dtype for name in names}
    pruner = BlockPruner(recipe, dict.fromkeys(names, sparsity), dtypes)
    for loaded, block in zip(loaded_blocks(model, ids), blocks, strict=True):
        yield loaded, block, pruner.prune(loaded, block)


def all_records(*arguments, **settings):
    """Prune a model and return the records of its linears."""
    return [result.as_record() for *_, found in pruning(*arguments, **settings) for result in found]


def outputs_of_whole(model, ids):
    """Return block outputs and the final output of the model's own forward."""
    outputs = []
    hooks = [
        block.register_forward_hook(
            lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple | list) else out)
        )
        for runner in stack_runners(model, find_architecture(model))
        for block in runner.blocks
    ]
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.inference_mode():
        answer = model(**inputs)[0]
    for hook in hooks:
        hook.remove()
    return outputs, answer


def outputs_block_by_block(model, parts, weights=None):
    """Return outputs of blocks run one by one, and the last block."""
    outputs = []
    stacks = stack_runners(model, find_architecture(model))
    for loaded in iterate_blocks(model, stacks, weights, parts):
        with torch.inference_mode():
            outputs.append([call() for call in loaded.calls()])
    return outputs, loaded
