"""Encoders that read features of sound."""

import torch
from transformers import WhisperForCausalLM, WhisperForConditionalGeneration

from prunekit.architectures import find_architecture
from prunekit.architectures.features import feature_shape, reads_features
from prunekit.models import stock
from tests.support.architectures import tiny
from tests.support.speech import BINS, FRAMES, whisper_config


def test_the_encoder_of_sound_is_found_with_its_shape():
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(whisper_config())
    encoder, decoder = find_architecture(model).stacks
    assert (encoder.features, decoder.features, decoder.reads) == (True, False, "encoder")
    module = model.get_encoder()
    assert feature_shape(module) == stock.feature_shape(module) == (BINS, FRAMES)
    assert not reads_features(model.get_decoder())


def test_encoders_of_text_read_none():
    model = tiny("t5")
    assert not reads_features(model.get_encoder())
    assert stock.feature_shape(model.get_encoder()) is None
    assert not any(stack.features for stack in find_architecture(model).stacks)


def test_a_decoder_alone_reads_tokens():
    with torch.device("meta"):
        model = WhisperForCausalLM(whisper_config())
    (stack,) = find_architecture(model).stacks
    assert not stack.features
    assert stack.blocks == "decoder.layers"
