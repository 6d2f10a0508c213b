"""Open configs, tokenizers and models with transformers.

Code in a checkpoint never runs.

No other file but ``processors.py`` calls ``from_pretrained``. ``prunekit verify`` runs this one as
a script in a fresh process, which imports prunekit only if the checkpoint needs it; a run calls the
same functions in its own process. That is why nothing of prunekit is imported here, and errors are
those of Python.

Shapes: B samples, T tokens, C outputs per token (vocabulary, classes or features), N sampled
outputs.
"""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import dynamic_module_utils as checkpoint_code

PROOF_OUTPUTS = 32
"""Outputs of each token that a proof records: enough to tell any two models apart."""
ADAPTER_FILE = "adapter_config.json"
WITHOUT_ADAPTER = {"subfolder": "config.json"}
"""Where transformers looks for an adapter to apply to the weights: in a file, so it finds none."""


def read_config(folder: str | Path) -> PretrainedConfig:
    """Read ``config.json`` of a checkpoint.

    Raises:
        ValueError: The model needs code of the checkpoint, or attention code from the hub.
    """
    with only_stock_code():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    for part in config_parts(config):
        attention = part._attn_implementation
        if isinstance(attention, str) and "/" in attention:
            raise ValueError(
                f"attn_implementation names code on the hub, {attention!r}, which is never run"
            )
    return config


def config_parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Yield a config and all configs nested in it."""
    yield config
    if getattr(config, "is_heterogeneous", False):
        yield from config.per_layer_config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from config_parts(value)


def config_value(config: PretrainedConfig, name: str) -> Any:  # noqa: ANN401
    """Return a given config value that holds for all layers, or None."""
    if isinstance(getattr(type(config), name, None), property):
        return None  # XLNet computes -1 for the largest position: it has none
    spec = vars(config).get("_heterogeneity_spec")
    varies = spec is not None and name in spec.per_layer_attributes
    return None if varies else getattr(config, name, None)


def named_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the model class that a config names, or None.

    Raises:
        ValueError: transformers has no such model.
    """
    names = config.architectures or []
    if not names:
        return None
    name = names[0] if isinstance(names, list) else names
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if not is_model:
        raise ValueError(f"transformers {transformers.__version__} has no {name!r}")
    return found  # pyright: ignore


def build_model(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build the model of a config without reading weights.

    Args:
        config: From :func:`read_config`.
        dtype: Dtype of the weights; None for that of the config.

    Raises:
        ValueError: transformers has no such model.
    """
    model_class, options = named_class(config), {"dtype": dtype or config.dtype}
    with only_stock_code():
        if model_class is None:
            return AutoModel.from_config(config, trust_remote_code=False, **options)
        return model_class._from_config(config, **options)


def open_model(folder: str | Path, **options: Any) -> PreTrainedModel:  # noqa: ANN401
    """Load a whole model in eval mode, from safetensors alone.

    Args:
        folder: Folder of the checkpoint.
        options: More arguments of ``from_pretrained``, such as ``dtype`` and ``device_map``.

    Raises:
        ValueError: The model needs code of the checkpoint, or weights are missing.
    """
    model_class = named_class(read_config(folder)) or AutoModel
    with only_stock_code():
        opened: Any = model_class.from_pretrained(
            folder,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            adapter_kwargs=WITHOUT_ADAPTER,
            **options,
        )
    model, found = opened
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{len(missing)} weights are missing, which transformers would fill with random "
            f"numbers: {', '.join(missing[:3])}"
        )
    return model.eval()


def read_tokenizer(folder: str | Path) -> Any:  # noqa: ANN401  transformers has no common class
    """Load the tokenizer of a checkpoint.

    Raises:
        ValueError: It needs code of the checkpoint.
    """
    with only_stock_code():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def answers(
    folder: str | Path, asked: dict[str, Any], device_map: dict[str, Any]
) -> Float[Tensor, " N"]:
    """Open a model and return a sample of its outputs.

    Args:
        folder: Folder of the checkpoint.
        asked: ``ids`` [B, T], ``dtype`` and ``device`` of a proof.
        device_map: Options of ``from_pretrained`` that place the model; empty: on the device.

    Raises:
        ValueError: The model cannot be opened (see :func:`open_model`), or transformers would apply
            an adapter to its weights.
    """
    if os.path.lexists(Path(folder, ADAPTER_FILE)):
        raise ValueError(f"it would apply the adapter of {ADAPTER_FILE} to the weights")
    model = open_model(folder, dtype=getattr(torch, asked["dtype"]), **device_map)
    model = model if device_map else model.to(asked["device"])
    ids = torch.tensor(asked["ids"], device=asked["device"])
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
        if shape := feature_shape(model.get_encoder()):
            del inputs["input_ids"]
            inputs["input_features"] = random_features(ids, shape).to(ids.device, model.dtype)
    with torch.inference_mode():
        return sample_outputs(model(**inputs)[0]).cpu()


def feature_shape(encoder: Any) -> tuple[int, int] | None:  # noqa: ANN401
    """Return features per frame and frames per sample of a sound encoder.

    None for an encoder of text. The same as in :mod:`prunekit.architectures.features`, of which
    nothing may be imported here.
    """
    config = getattr(encoder, "config", None)
    bins, positions = (getattr(config, n, None) for n in ("num_mel_bins", "max_source_positions"))
    if getattr(encoder, "main_input_name", None) != "input_features" or not (bins and positions):
        return None
    convolutions = (each for each in encoder.children() if isinstance(each, torch.nn.Conv1d))
    return bins, positions * math.prod(each.stride[0] for each in convolutions)


def random_features(ids: Tensor, shape: tuple[int, int]) -> Float[Tensor, "B F L"]:
    """Return random features for samples, fixed by their tokens.

    Args:
        ids: Tokens [B, T].
        shape: Features of a frame, and frames.
    """
    generators = (torch.Generator().manual_seed(int(row.sum())) for row in ids.cpu())
    return torch.stack([torch.randn(shape, generator=each) for each in generators])


def sample_outputs(outputs: Float[Tensor, "B ... C"]) -> Float[Tensor, " N"]:
    """Return evenly spaced entries of the outputs for each token."""
    rows = outputs.flatten(0, -2).float()
    columns = torch.linspace(0, rows.shape[1] - 1, min(PROOF_OUTPUTS, rows.shape[1])).long()
    return rows[:, columns].flatten()


@contextmanager
def only_stock_code() -> Iterator[None]:
    """Let transformers refuse code of a checkpoint, and show nothing but errors.

    Its report of a loaded model would write names of tensors to the terminal as they are.

    It does not pass ``trust_remote_code`` on to models and tokenizers inside of others
    (encoder-decoders, RAG), and would ask for it on standard input; with a time limit of 0 it
    refuses.
    """
    logging, placing = transformers.utils.logging, getLogger("accelerate")
    limit, shown = checkpoint_code.TIME_OUT_REMOTE_CODE, logging.is_progress_bar_enabled()
    verbosity, level = logging.get_verbosity(), placing.level
    checkpoint_code.TIME_OUT_REMOTE_CODE = 0
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    placing.setLevel(ERROR)  # it tells that weights are offloaded
    try:
        yield
    finally:
        checkpoint_code.TIME_OUT_REMOTE_CODE = limit
        logging.set_verbosity(verbosity)
        placing.setLevel(level)
        if shown:
            logging.enable_progress_bar()


def main(request: str) -> None:
    """Carry out a JSON request; write outputs or error to a file.

    Args:
        request: ``folder``, ``asked``, ``device_map``, ``prunekit`` (whether to import it) and
            ``result`` (path of the file), as JSON.
    """
    given = json.loads(request)
    if given["prunekit"]:
        # By name, since this file stands below it: it registers its formats in transformers.
        import_module("prunekit")
    device_map = given["device_map"]
    if device_map:  # JSON made the GPU numbers strings
        budgets = device_map["max_memory"].items()
        device_map["max_memory"] = {int(k) if k.isdigit() else k: size for k, size in budgets}
    try:
        result = {"answers": answers(given["folder"], given["asked"], device_map).tolist()}
    except Exception as error:
        result = {"error": describe(error)}
    if not given["prunekit"]:
        assert "prunekit" not in sys.modules
    Path(given["result"]).write_text(json.dumps(result), encoding="utf-8")


def describe(error: Exception) -> str:
    """Return kind and message of an exception on one line."""
    return " ".join(f"{type(error).__name__}: {error}".rstrip(": ").split())


if __name__ == "__main__":
    main(sys.argv[1])
