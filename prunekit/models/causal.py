"""Which models predict each token from those before it."""

from typing import Any

from transformers.models.auto import modeling_auto

SUFFIXES = ("ForCausalLM", "LMHeadModel")
"""Ends of the names of classes that do so."""


def predicts_next_token(kind: type, config: Any) -> bool:  # noqa: ANN401  any config
    """Return whether models of a class predict the next token.

    Those for images with text do, unless an encoder reads the text.

    Args:
        kind: The class.
        config: The config of the model.
    """
    if kind.__name__.endswith(SUFFIXES):
        return True
    names = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type, ())
    with_images = kind.__name__ in ([names] if isinstance(names, str) else names)
    return with_images and not getattr(config, "is_encoder_decoder", False)
