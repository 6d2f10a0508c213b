"""Find the lists of blocks of a model of an undeclared type."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from prunekit.architectures.coverage import ADVICE, LINEAR_TYPES, named_linears
from prunekit.architectures.expert_layout import fused_experts
from prunekit.errors import CheckpointError

DEPTHS = {
    "encoder": ("encoder_layers", "num_encoder_layers", "num_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers", "num_layers"),
}
"""Entries of ``config.json`` that hold the number of blocks of a stack; the first one counts."""


@dataclass(frozen=True)
class BlockList:
    """A list of blocks and the module whose forward runs it.

    Attributes:
        blocks: Name of the list, relative to the base model.
        module: Name of the module, relative to the base model; "" is the base model itself.
        reads: Module whose final hidden states the blocks attend to, if any.
        depth: Entry of ``config.json`` for the number of blocks.
    """

    blocks: str
    module: str = ""
    reads: str | None = None
    depth: str = "num_hidden_layers"


def find_block_lists(base: PreTrainedModel) -> tuple[BlockList, ...]:
    """Return the lists of blocks in execution order.

    A list is an outermost ``ModuleList`` whose modules contain linears; of several, the one in the
    text backbone. An encoder-decoder has two.

    Raises:
        CheckpointError: There is no such list, or more than one.
    """
    lists = outermost_lists(base)
    if not lists:
        refuse(base, "no ModuleList was found whose modules contain linears")
    if len(lists) > 1 and getattr(base.config, "is_encoder_decoder", False):
        return _encoder_and_decoder(base, lists)
    return (BlockList(_single(base, base, lists)),)


def refuse(base: PreTrainedModel, reason: str) -> NoReturn:
    """Refuse to probe a model.

    Raises:
        CheckpointError: Always.
    """
    raise CheckpointError(
        f"Model type {base.config.model_type!r} is not declared and cannot be probed: {reason}. "
        f"{ADVICE}"
    )


def own_embeddings(stack: Any) -> nn.Module | None:  # noqa: ANN401
    """Return the token embeddings of a stack, or None."""
    try:
        return stack.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # it only wraps the module that has them
        return None


def part_of_config(base: PreTrainedModel, blocks: str) -> str:
    """Return the part of the config that describes a block list.

    It is a dotted path, or "" for the whole: that of the part with the kind of config that the
    module around the blocks has; of several of a kind, such as of encoder and decoder, the one that
    is named like a module around them.
    """
    path = blocks
    while path:
        path = path.rpartition(".")[0]
        config = getattr(base.get_submodule(path), "config", None)
        if config is None:
            continue
        if type(config) is type(base.config):
            break
        found = [at for at, each in parts_of(base.config) if type(each) is type(config)]
        around = blocks.split(".")
        return next((at for at in found if at.rpartition(".")[2] in around), (*found, "")[0])
    return ""


def config_part(config: Any, path: str) -> Any:  # noqa: ANN401  a config, or its entries
    """Return the part that a dotted path names; "" is the whole.

    Args:
        config: A config, or its entries.
        path: The path.
    """
    for name in filter(None, path.split(".")):
        config = config[name] if isinstance(config, Mapping) else getattr(config, name)
    return config


def parts_of(config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    """Yield the parts of a config by dotted path."""
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield name, part
            yield from ((f"{name}.{inner}", each) for inner, each in parts_of(part))


def outermost_lists(base: nn.Module) -> list[str]:
    """Return the names of candidate block lists, without lists nested inside them."""
    names: list[str] = []
    for name, module in base.named_modules():
        inside = any(name.startswith(f"{other}.") for other in names)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            single = isinstance(module[0], LINEAR_TYPES)
            if not single and all(named_linears(child) or fused_experts(child) for child in module):
                names.append(name)
    return names


def _encoder_and_decoder(base: PreTrainedModel, lists: list[str]) -> tuple[BlockList, ...]:
    paths = {module: name for name, module in base.named_modules()}
    found: list[BlockList] = []
    for side, model in (("encoder", base.get_encoder()), ("decoder", base.get_decoder())):
        # Without a head, which may be the embeddings, of another model inside of this one.
        stack = getattr(model, "base_model", model)
        module = paths.get(stack, "")
        inside = [name for name in lists if module and name.startswith(f"{module}.")]
        if not inside:
            refuse(base, f"of its lists of blocks {', '.join(lists)} none is in its {side}")
        depth = next((key for key in DEPTHS[side] if hasattr(base.config, key)), BlockList.depth)
        reads = found[0].module if found else None
        found.append(BlockList(_single(base, stack, inside), module, reads, depth))
    return tuple(found)


def _single(base: PreTrainedModel, stack: nn.Module, lists: list[str]) -> str:
    """Return the only list of a stack, or that of its text."""
    if len(lists) > 1:
        lists = _of_text(base, stack, lists)
    if len(lists) > 1:
        refuse(base, f"probing runs one list of blocks, this model has {', '.join(lists)}")
    return lists[0]


def _of_text(base: PreTrainedModel, stack: Any, lists: list[str]) -> list[str]:  # noqa: ANN401
    paths = {module: name for name, module in base.named_modules()}
    decoder = paths.get(getattr(stack, "get_decoder", lambda: stack)(), "")
    inside = [name for name in lists if name.startswith(f"{decoder}.")] if decoder else lists
    nearest = min((name.count(".") for name in inside), default=0)
    found = [name for name in inside if name.count(".") == nearest] or lists
    alike = [
        name
        for name in found
        if len({type(child) for child in base.get_submodule(name).children()}) == 1
    ]
    return alike if len(alike) == 1 else found
