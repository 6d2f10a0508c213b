"""Tiny random vision-language checkpoints with processors, and rows of images with text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.support.checkpoints import tokenizer
from tests.support.family_configs import IMAGE_TOKEN, model_class, tiny_config

CHAT = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
)
"""Chat template in which IMAGE stands for the tokens of an image."""
SIDE = {"height": 32, "width": 32}
IDEFICS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")


def _tokens(image: str, *others: str, **named: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer with the token of an image, others around it, and names of tokens."""
    made = tokenizer()
    filling = [f"<unused{number}>" for number in range(IMAGE_TOKEN - len(made) - len(others))]
    special = [AddedToken(each, special=True) for each in (*filling, *others, image)]
    made.add_tokens(special, special_tokens=True)
    assert made.convert_tokens_to_ids(image) == IMAGE_TOKEN
    options = {**made.special_tokens_map, "extra_special_tokens": named}
    return PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer, **options)


def _llava() -> Any:
    image = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIDE)
    return transformers.LlavaProcessor(
        image, _tokens("<image>"), patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT.replace("IMAGE", "<image>"),
    )  # fmt: skip


class _WithoutVideos:
    """A processor without its part for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument is not None:
            return super().check_argument_for_proper_class(argument_name, argument)  # type: ignore
        return type(None)


class _Qwen2_5(_WithoutVideos, transformers.Qwen2_5_VLProcessor):  # noqa: N801
    pass


class _Qwen3(_WithoutVideos, transformers.Qwen3VLProcessor):
    pass


def _qwen(kind: Any) -> Any:
    image = transformers.Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2,
        size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64},
    )  # fmt: skip
    around = ("<|vision_start|>", "<|vision_end|>")
    chat = CHAT.replace("IMAGE", f"{around[0]}<|image_pad|>{around[1]}")
    return kind(image, _tokens("<|image_pad|>", *around), None, chat_template=chat)


def _gemma3() -> Any:
    image = transformers.Gemma3ImageProcessorPil(size=SIDE)
    named = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<soft>"}
    made = _tokens("<soft>", "<boi>", "<eoi>", **named)
    return transformers.Gemma3Processor(
        image, made, image_seq_length=4, chat_template=CHAT.replace("IMAGE", "<boi>")
    )


def _idefics3() -> Any:
    image = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    chat = CHAT.replace("IMAGE", "<image>")
    made = _tokens("<image>", *IDEFICS)
    return transformers.Idefics3Processor(image, made, image_seq_len=4, chat_template=chat)


def _paligemma() -> Any:
    image = transformers.SiglipImageProcessorPil(size=SIDE)
    image.image_seq_length = 16
    return transformers.PaliGemmaProcessor(image, _tokens("<image>", image_token="<image>"))


PROCESSORS: dict[str, Callable[[], Any]] = {
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "llava": _llava,
    "paligemma": _paligemma,
    "qwen2_5_vl": lambda: _qwen(_Qwen2_5),
    "qwen3_vl": lambda: _qwen(_Qwen3),
}


CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {"mm_tokens_per_image": 4, "image_token_index": IMAGE_TOKEN},
    "llava": {"image_token_index": IMAGE_TOKEN, "image_seq_length": 16},
    "paligemma": {"image_token_index": IMAGE_TOKEN},
    "qwen3_vl": {"vision_config.deepstack_visual_indexes": [0, 1]},
}
"""Entries of configs besides those of ``tiny_config``."""
CAPTIONS = ("a fox", "the lazy dog jumps", "five dozen jugs", "my box", "no picture")


def write_vision(folder: Path, model_type: str, **entries: Any) -> Path:
    """Write a tiny random model with its processor, and ``rows.jsonl`` with images.

    Args:
        folder: Folder of the checkpoint.
        model_type: One of ``PROCESSORS``.
        entries: Further entries of the config.
    """
    config = _config(model_type, **entries)
    write_random(model_class("vlm", config), config, folder)
    _write_processor(PROCESSORS[model_type](), folder)
    write_rows(folder)
    return folder


def tiny_vision(model_type: str) -> PreTrainedModel:
    """Return a tiny random model of images and text."""
    config = _config(model_type)
    return model_class("vlm", config)(config).eval()


def _config(model_type: str, **entries: Any) -> Any:
    config = tiny_config(model_type)
    for name, value in {**CONFIGS.get(model_type, {}), **entries}.items():
        owner, _, attribute = name.rpartition(".")
        setattr(getattr(config, owner) if owner else config, attribute, value)
    return config


def _write_processor(processor: Any, folder: Path) -> None:
    """Write the parts of a processor, which as a whole needs torchvision for some."""
    named = [kind.__name__ for kind in type(processor).__mro__ if kind.__name__[0] != "_"]
    entries = {"image_seq_len", "patch_size", "vision_feature_select_strategy", "image_seq_length"}
    entries |= {"num_additional_image_tokens"}
    values = {key: value for key, value in vars(processor).items() if key in entries}
    processor.image_processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    content = {"processor_class": named[0], **values}
    (folder / "processor_config.json").write_text(json.dumps(content))
    if processor.chat_template:
        (folder / "chat_template.jinja").write_text(processor.chat_template)


@torch.no_grad()
def write_random(kind: type[PreTrainedModel], config: Any, folder: Path) -> None:
    """Write a model in which no weight is zero or constant."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).eval()
        for name, weight in model.named_parameters():
            if weight.ndim > 1 or not weight.isfinite().all():
                weight.normal_(0, 0.1)
            elif weight.numel() > 1 and weight.std() == 0:
                weight.add_(torch.randn_like(weight) * (0.05 if "norm" in name.lower() else 0.02))
    model.save_pretrained(folder)


def write_rows(folder: Path) -> Path:
    """Write ``rows.jsonl``: captions of unlike lengths with none, one and two images."""
    generator = np.random.default_rng(0)
    images = folder / "images"
    images.mkdir()
    for number in range(len(CAPTIONS)):
        size = (40 + 8 * number, 60, 3)
        image = Image.fromarray(generator.integers(0, 255, size, dtype=np.uint8))
        image.save(images / f"{number}.png")
    named = ["images/0.png", ["images/1.png"], "images/2.png", ["images/3.png", "images/4.png"]]
    rows = [
        {"image": image, "text": text} for image, text in zip([*named, None], CAPTIONS, strict=True)
    ]
    return write_lines(folder / "rows.jsonl", rows)


def write_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
