"""Processors of images and text, and extractors of features of sound."""

import pytest
import transformers

from prunekit.checkpoint.reader import open_checkpoint
from prunekit.errors import ConfigError
from prunekit.models import processors
from tests.support import checkpoints, vision


def test_a_processor_is_read_without_its_part_for_videos(tmp_path):
    folder = vision.write_vision(tmp_path, "qwen2_5_vl")
    before = transformers.processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING
    found = processors.read_processor(folder)
    assert found.image_processor.patch_size == 8
    assert found.video_processor is None
    assert transformers.processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING is before


def test_a_tokenizer_alone_is_no_processor(tmp_path):
    checkpoints.write(tmp_path)
    with pytest.raises(ValueError, match=r"Unrecognized|alone"):
        processors.read_processor(tmp_path)


def test_damaged_files_of_a_processor_are_named(tmp_path):
    folder = vision.write_vision(tmp_path, "llava")
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigError, match="has no processor that can be loaded"):
        processors.load_processor(open_checkpoint(folder))


def test_an_extractor_is_none_without_its_file(tmp_path):
    checkpoint = open_checkpoint(checkpoints.write(tmp_path))
    assert processors.load_extractor(checkpoint) is None
    transformers.WhisperFeatureExtractor(feature_size=8).save_pretrained(tmp_path)
    assert processors.load_extractor(checkpoint).feature_size == 8
    (tmp_path / processors.EXTRACTOR_FILE).write_text("{")
    with pytest.raises(ConfigError, match="no extractor of features can be made of it"):
        processors.load_extractor(checkpoint)
