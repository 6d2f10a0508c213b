"""Images with text: rows, the processor's inputs, and what is refused."""

import gzip
import json

import pytest
import torch

from prunekit.data.images import ImageReader, has_images, image_rows
from prunekit.data.row_samples import RowSamples
from prunekit.errors import ConfigError
from tests.support.family_configs import IMAGE_TOKEN
from tests.support.vision import PROCESSORS, write_lines, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("rows")
    write_rows(made)
    return made


def reader(model_type="llava", limit=96, length=64):
    return ImageReader(PROCESSORS[model_type](), limit, length)


def inputs_of(folder, row, model_type="llava"):
    file = write_lines(folder / "one.jsonl", [row])
    return reader(model_type).inputs(image_rows([str(file)])[0])


def words(inputs, model_type="llava"):
    """Return the text of the tokens, without those of images."""
    ids = [number for number in inputs["input_ids"][0].tolist() if number != IMAGE_TOKEN]
    return "".join(PROCESSORS[model_type]().tokenizer.convert_ids_to_tokens(ids))


def test_the_first_row_says_whether_a_file_has_images(tmp_path, folder):
    text = write_lines(tmp_path / "text.jsonl", [{"text": "a"}, {"text": "b", "image": "c.png"}])
    null = write_lines(tmp_path / "null.jsonl", [{"text": "a", "image": None}])
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(null.read_bytes()))
    found = [has_images(str(each)) for each in (folder / "rows.jsonl", null, packed, text)]
    assert found == [True, True, True, False]
    assert not has_images("pydoc:train")


def test_paths_are_relative_to_the_file(folder):
    rows = image_rows([str(folder / "rows.jsonl")])
    assert [len(row.images) for row in rows] == [1, 1, 1, 2, 0]
    assert rows[0].images[0] == folder / "images/0.png"
    assert rows[3].where == f"{folder / 'rows.jsonl'}:4"


@pytest.mark.parametrize("model_type", sorted(PROCESSORS))
def test_images_come_before_a_text_that_names_none(folder, model_type):
    inputs = inputs_of(folder, {"image": "images/0.png", "text": "a fox"}, model_type)
    ids = inputs["input_ids"][0]
    places = (ids == IMAGE_TOKEN).nonzero().flatten()
    assert len(places)
    assert "a fox" in words({"input_ids": ids[None, int(places[-1]) :]}, model_type)
    assert "pixel_values" in inputs
    assert "labels" not in inputs


def test_a_text_that_names_its_images_is_used_as_it_is(folder):
    inputs = inputs_of(folder, {"image": "images/0.png", "text": "see <image> here"})
    assert words(inputs) == "see  here"
    assert (
        inputs["input_ids"][0, :4].tolist()
        == inputs_of(folder, {"image": None, "text": "see "})["input_ids"][0].tolist()
    )


def test_messages_may_place_their_images(folder):
    part = {"type": "text", "text": "now"}
    content = [part, {"type": "image"}, {"type": "text", "text": "then"}]
    placed = inputs_of(
        folder, {"image": "images/0.png", "messages": [{"role": "user", "content": content}]}
    )
    before = inputs_of(
        folder, {"image": "images/0.png", "messages": [{"role": "user", "content": "now"}]}
    )
    assert placed["input_ids"][0, 3] == IMAGE_TOKEN
    assert before["input_ids"][0, 0] == IMAGE_TOKEN


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "images/0.png"}, 'a row needs "image"'),
        ({"image": 3, "text": "a"}, 'a row needs "image"'),
        ({"image": ["images/0.png", 3], "text": "a"}, 'a row needs "image"'),
        ({"image": "images/9.png", "text": "a"}, "no such file"),
        ({"image": "x" * 5000, "text": "a"}, "x…': no such file"),
        ({"image": "\ud800", "text": "a"}, "no such file"),
        ({"image": None, "text": None}, 'a row needs "image"'),
        ([], 'a row needs "image"'),
        ({"image": "images", "text": "a"}, "no such file"),
        ({"image": "a\0b", "text": "a"}, "no such file"),
        ({"image": "rows.jsonl", "text": "a"}, "cannot be read"),
        ({"image": "images/0.png", "text": 3}, '"text" must be a string'),
        ({"image": "images/0.png", "text": "\ud800"}, "surrogate"),
        ({"image": "images/0.png", "text": "<image><image>"}, "LlavaProcessor fails on this row"),
        ({"image": "images/0.png", "messages": []}, '"messages" must be a list'),
        ({"image": "images/0.png", "messages": "a"}, '"messages" must be a list'),
        (
            {
                "image": ["images/0.png", "images/1.png"],
                "messages": [{"role": "user", "content": [{"type": "image"}]}],
            },
            '"messages" has 1 parts {"type": "image"}, and "image" names 2',
        ),
        (
            {"image": None, "messages": [{"role": "user", "content": [{"type": "video"}]}]},
            "a part of type 'video'",
        ),
    ],
)
def test_a_row_that_cannot_be_read_is_refused_with_its_place(folder, row, message):
    with pytest.raises(ConfigError) as error:
        inputs_of(folder, row)
    assert message in str(error.value)
    assert "one.jsonl:1" in str(error.value)


def test_an_image_that_is_cut_off_is_refused(folder, tmp_path):
    content = (folder / "images/0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"cut\.png' cannot be read"):
        inputs_of(tmp_path, {"image": "cut.png", "text": "a"})


def test_tokens_that_the_model_lacks_are_refused(folder):
    rows = image_rows([str(folder / "rows.jsonl")])
    with pytest.raises(ConfigError, match="makes token 90, but the model has embeddings for 90"):
        reader(limit=90).inputs(rows[0])


def test_longer_rows_are_left_out_and_counted(folder):
    source = str(folder / "rows.jsonl")
    every = reader().sample([source], 9, seed=1)
    assert len(every) == 5
    assert "5 of 5 rows of" in every.description
    short = reader(length=30).sample([source], 9, seed=1)
    assert len(short) < 5
    assert short.longest <= 30
    assert f"{5 - len(short)} longer than 30 tokens left out" in short.description
    with pytest.raises(ConfigError, match="each row has more than 3 tokens, the shortest 10"):
        reader(length=3).sample([source], 9, seed=1)


def test_rows_are_chosen_by_the_seed(folder):
    source = str(folder / "rows.jsonl")
    digests = [reader().sample([source], 2, seed).digest for seed in (0, 0, 1, 2, 3)]
    assert digests[0] == digests[1]
    assert len(set(digests)) > 1


def test_a_digest_sees_pixels(folder):
    found = reader().sample([str(folder / "rows.jsonl")], 2, seed=0)
    rows = [dict(row) for row in found.rows]
    changed = next(row for row in rows if "pixel_values" in row)
    changed["pixel_values"] = changed["pixel_values"].clone()
    changed["pixel_values"].view(-1)[0] += 1
    assert RowSamples(rows, "").digest != found.digest
    assert RowSamples([*found.rows], "other").digest == found.digest


def test_each_row_is_a_batch(folder):
    found = reader().sample([str(folder / "rows.jsonl")], 5, seed=0)
    batches = found.even_batches(10_000)
    assert [len(batch["input_ids"]) for batch in batches] == [1] * 5
    assert found.even_batches(1, slice(1, 3)) == batches[1:3]
    assert found.tokens == sum(batch["input_ids"].numel() for batch in batches)
    assert found.nbytes > 4 * 3 * 32 * 32 * 4


def test_a_processor_without_a_template_gets_its_token_first(folder):
    inputs = inputs_of(folder, {"image": ["images/0.png"], "text": "a fox"}, "paligemma")
    assert inputs["input_ids"][0, :16].tolist() == [IMAGE_TOKEN] * 16


def test_inputs_that_are_no_tensors_are_refused(folder):
    class Listing(type(PROCESSORS["llava"]())):
        def __call__(self, **options):
            return {**super().__call__(**options), "sizes": [1, 2]}

    processor = PROCESSORS["llava"]()
    processor.__class__ = Listing
    rows = image_rows([str(folder / "rows.jsonl")])
    with pytest.raises(ConfigError, match="makes sizes, which is no tensor"):
        ImageReader(processor, 96, 64).inputs(rows[0])


def test_an_image_in_rows_of_text_is_refused(tmp_path):
    from prunekit.data.sources import documents
    from tests.support.checkpoints import tokenizer

    rows = [{"text": "a"}, {"text": "b", "image": "c.png"}]
    file = write_lines(tmp_path / "text.jsonl", rows)
    with pytest.raises(ConfigError, match=r'text\.jsonl:2: has the key "image"'):
        documents(str(file), tokenizer())


def test_rows_that_are_no_json_are_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"image": None, "text": "a"}) + "\n{")
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: not JSON"):
        image_rows([str(file)])


def test_null_is_as_good_as_none(folder):
    messages = [{"role": "user", "content": "a fox"}]
    row = {"image": "images/0.png", "messages": messages}
    expected = inputs_of(folder, row)["input_ids"]
    found = inputs_of(folder, {"text": None, "tools": None, **row})["input_ids"]
    assert torch.equal(found, expected)
    inputs_of(folder, {"image": None, "text": "a fox", "messages": None})


def test_a_row_without_an_image_has_no_pixels(folder):
    inputs = inputs_of(folder, {"image": None, "text": "a fox"})
    assert "pixel_values" not in inputs
    assert inputs["input_ids"].dtype == torch.int64
