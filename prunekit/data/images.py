"""Rows of images with text, for models that read both.

A ``.jsonl`` or ``.jsonl.gz`` file whose first row has the key ``image`` holds them: a path relative
to the file, a list of paths, or null for a row without an image. Beside it is ``text``, or
``messages``; null is as good as none. A text that holds the processor's token for images is used as
it is; otherwise its images come first, in a turn of the user where the processor has a chat
template.

Each row is a sample and a batch of its own: rows differ in length, and are not padded.

Shapes: T tokens.
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from prunekit.data.chat import ChatTemplate
from prunekit.data.row_samples import RowSamples, first_row_has, named_file, sample_rows
from prunekit.data.rows import given, json_rows, valid_text
from prunekit.errors import ConfigError, is_out_of_memory

IMAGE = "image"
EXAMPLE = (224, 224)
"""Width and height of the image with which towers are found."""
ROW = 'a row needs "image" (a path, a list of paths, or null), and "text" or "messages"'


class ImageRow(NamedTuple):
    """A row as it was read.

    Attributes:
        where: File and line, for messages.
        images: Paths of its images.
        row: Its text or messages.
    """

    where: str
    images: tuple[Path, ...]
    row: dict[str, Any]


def has_images(source: str) -> bool:
    """Return whether a source is a file of images with text."""
    return first_row_has(source, IMAGE)


def image_rows(sources: Sequence[str]) -> list[ImageRow]:
    """Read the rows of files of images with text.

    Raises:
        ConfigError: A file cannot be read, a row is none of these, or an image is missing.
    """
    return [_row(source, *each) for source in sources for each in json_rows(source)]


def _row(source: str, where: str, row: Any) -> ImageRow:  # noqa: ANN401  as parsed
    entries = given(row)
    if not ("text" in entries or "messages" in entries):
        raise ConfigError(f"{where}: {ROW}")
    named = entries.get(IMAGE)
    names = [] if named is None else [named] if isinstance(named, str) else named
    text = entries.get("text", "")
    if not (isinstance(names, list) and all(isinstance(each, str) for each in names)):
        raise ConfigError(f"{where}: {ROW}")
    if not isinstance(text, str):
        raise ConfigError(f'{where}: "text" must be a string, got {type(text).__name__}')
    return ImageRow(where, tuple(named_file(source, name, where) for name in names), entries)


class ImageReader:
    """Makes inputs of rows with the processor of a model.

    Args:
        processor: Processor of images and text.
        limit: Number of token ids that the model knows.
        length: Most tokens of a row, those of images included.
    """

    def __init__(self, processor: Any, limit: int, length: int) -> None:  # noqa: ANN401
        self._processor, self._limit, self._length = processor, limit, length
        self._template = ChatTemplate(processor, images=True)
        self._token = getattr(processor, "image_token", None)

    def sample(self, sources: Sequence[str], count: int, seed: int) -> RowSamples:
        """Return the inputs of rows chosen at random, at most ``count``.

        Longer rows are left out, and others chosen for them; the description says so.

        Raises:
            ConfigError: A file or a row is invalid, the processor fails on one, or all are longer.
        """
        return sample_rows(image_rows(sources), self.inputs, sources, count, self._length, seed)

    def example(self) -> dict[str, Tensor]:
        """Return the inputs of a grey image with a short text.

        Raises:
            ConfigError: The processor fails on it.
        """
        from PIL import Image

        row = ImageRow("an image of one colour", (Path(),), {"text": "a"})
        return self._inputs(row, [Image.new("RGB", EXAMPLE, "grey")])

    def inputs(self, row: ImageRow) -> dict[str, Tensor]:
        """Return the inputs of a row.

        Raises:
            ConfigError: An image cannot be decoded, the processor fails, or makes a token that the
                model lacks.
        """
        return self._inputs(row, _opened(row))

    def _inputs(self, row: ImageRow, images: list[Any]) -> dict[str, Tensor]:
        text, templated = self._text(row)
        options = {"images": [images]} if images else {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of transformers about itself
                made = self._processor(
                    text=[text], return_tensors="pt", add_special_tokens=not templated, **options
                )
        except Exception as error:  # processors raise anything
            if is_out_of_memory(error):
                raise
            kind = type(self._processor).__name__
            raise ConfigError(f"{row.where}: {kind} fails on this row: {error}") from error
        inputs = {name: value for name, value in made.items() if name != "labels"}
        if lists := [name for name, value in inputs.items() if not isinstance(value, Tensor)]:
            raise ConfigError(
                f"{row.where}: {type(self._processor).__name__} makes {', '.join(lists)}, which is "
                "no tensor. Give rows of one image, or calibrate on text"
            )
        largest = int(inputs["input_ids"].max()) if inputs["input_ids"].numel() else 0
        if largest >= self._limit:
            raise ConfigError(
                f"{row.where}: the processor makes token {largest}, but the model has embeddings "
                f"for {self._limit}, 0 to {self._limit - 1}"
            )
        return inputs

    def _text(self, row: ImageRow) -> tuple[str, bool]:
        """Return the text with image tokens, and whether it is templated."""
        messages = row.row.get("messages")
        if "text" in row.row:
            text = valid_text(row.row["text"], row.where)
            if not row.images or self._token is None or self._token in text:
                return text, False
            if not getattr(self._processor, "chat_template", None):
                return self._token * len(row.images) + text, False
            messages = [{"role": "user", "content": text}]
        placed = {**row.row, "messages": _placed(messages, row)}
        return valid_text(self._template.text(placed, row.where), row.where), True


def _placed(messages: Any, row: ImageRow) -> Any:  # noqa: ANN401  as parsed
    """Return messages with a part for each image.

    Images that have no place in them stand before the first text.

    Raises:
        ConfigError: They have another number of such parts than the row has images.
    """
    if not isinstance(messages, list):
        return messages  # refused by the template
    there = sum(1 for part in _parts(messages) if part.get("type") == IMAGE)
    if there == len(row.images):
        return messages
    if there:
        raise ConfigError(
            f'{row.where}: "messages" has {there} parts {{"type": "image"}}, and "image" names '
            f"{len(row.images)}"
        )
    first = next((each for each in messages if isinstance(each, dict)), {})
    content = first.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    images = [{"type": IMAGE} for _ in row.images]
    return [{**each, "content": [*images, *parts]} if each is first else each for each in messages]


def _parts(messages: list[Any]) -> Iterator[dict[str, Any]]:
    contents = (each.get("content") for each in messages if isinstance(each, dict))
    lists = (content for content in contents if isinstance(content, list))
    return (part for content in lists for part in content if isinstance(part, dict))


def _opened(row: ImageRow) -> list[Any]:
    """Return the images of a row in RGB."""
    from PIL import Image  # a package of matplotlib

    found: list[Any] = []
    for path in row.images:
        try:
            with Image.open(path) as image:
                found.append(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ConfigError(
                f"{row.where}: image {str(path)!r} cannot be read: {error}"
            ) from error
    return found
