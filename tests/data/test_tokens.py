"""Windows of token ids for calibration and evaluation."""

import json
import logging
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunekit.data import tokens as data
from prunekit.data.sources import Document
from prunekit.data.tokens import Tokens, calibration_tokens, evaluation_tokens
from prunekit.errors import ConfigError

BOS, END, EOT, UNKNOWN = "<s>", "</s>", "<|endoftext|>", "<unk>"
CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }} {% endfor %}"


def make_tokenizer(*special, adds=None, **named):
    """Return a tokenizer of special tokens, then words w0, w1, …."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = [UNKNOWN, *special]
    vocabulary = [*marks, *(f"w{number}" for number in range(3000))]
    ids = {word: index for index, word in enumerate(vocabulary)}
    core = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(marks)
    if adds:
        core.post_processor = processors.TemplateProcessing(
            single=f"{adds} $A", special_tokens=[(adds, ids[adds])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token=UNKNOWN, model_max_length=16, **named
    )


@pytest.fixture(scope="module")
def plain():
    """A tokenizer without BOS; the word w<n> has id n + 1."""
    return make_tokenizer()


def words(*numbers):
    return " ".join(f"w{number}" for number in numbers)


def write(path, *texts):
    path.write_text(f"\n{EOT}\n".join(texts))
    return [str(path)]


def test_evaluation_windows_stand_side_by_side(tmp_path, plain):
    tokens = evaluation_tokens(plain, write(tmp_path / "a.txt", words(*range(11))), 3)
    assert tokens.ids.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert tokens.ids.dtype == torch.int64
    assert tokens.description == (
        "3 non-overlapping windows of 3 tokens (remainder of 2 dropped) of "
        f"{tmp_path.name}/a.txt: 1 document, tokenised whole, nothing in front"
    )


def test_evaluation_of_the_first_windows(tmp_path, plain):
    source = write(tmp_path / "a.txt", words(*range(11)))
    tokens = evaluation_tokens(plain, source, 3, windows=2)
    assert tokens.ids.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert tokens.description.startswith("the first 2 of 3 non-overlapping windows of 3 tokens")
    assert torch.equal(evaluation_tokens(plain, source, 3, windows=9).ids[:2], tokens.ids)


def test_evaluation_windows_that_overlap(tmp_path, plain):
    source = write(tmp_path / "a.txt", words(*range(12)))
    tokens = evaluation_tokens(plain, source, 5, stride=3)
    assert tokens.ids.tolist() == [[1, 2, 3, 4, 5], [4, 5, 6, 7, 8], [7, 8, 9, 10, 11]]
    assert tokens.stride == 3
    assert tokens.description.startswith(
        "3 windows of 5 tokens, each 3 tokens after the one before (remainder of 1 dropped) of "
    )
    first = evaluation_tokens(plain, source, 5, 2, stride=3)
    assert torch.equal(first.ids, tokens.ids[:2])
    apart = evaluation_tokens(plain, source, 5, stride=5)
    assert apart.stride is None
    assert apart.digest == evaluation_tokens(plain, source, 5).digest


def test_evaluation_of_a_text_shorter_than_one_window(tmp_path, plain):
    tokens = evaluation_tokens(plain, write(tmp_path / "a.txt", words(0, 1)), 2048)
    assert tokens.ids.tolist() == [[1, 2]]
    assert "1 non-overlapping window of 2 tokens (the text is shorter than 2048)" in (
        tokens.description
    )


@pytest.mark.parametrize(
    ("special", "settings", "front"),
    [
        ((BOS,), {"bos_token": BOS, "adds": BOS}, [1]),
        ((BOS,), {"bos_token": BOS}, [1]),
        ((BOS, EOT), {"bos_token": BOS, "eos_token": EOT}, [2]),
        ((BOS, EOT), {"bos_token": BOS, "eos_token": EOT, "adds": BOS}, [1]),
        ((END,), {"eos_token": END}, []),
    ],
    ids=["adds its BOS", "has a BOS", "knows endoftext", "own BOS wins", "has neither"],
)
def test_what_several_documents_begin_with(tmp_path, special, settings, front):
    tokenizer = make_tokenizer(*special, **settings)
    first = 1 + len(special)
    tokens = evaluation_tokens(tokenizer, write(tmp_path / "a.txt", "w0 w1", "w2"), 99)
    assert tokens.ids.tolist() == [[*front, first, first + 1, *front, first + 2]]
    name = tokenizer.decode(front) or "nothing"
    assert f"2 documents, each tokenised whole, {name} in front of each" in tokens.description


def test_one_document_stays_as_its_tokenizer_makes_it(tmp_path):
    source = write(tmp_path / "a.txt", "w0 w1")
    silent = make_tokenizer(BOS, bos_token=BOS)
    assert evaluation_tokens(silent, source, 9).ids.tolist() == [[2, 3]]
    adding = make_tokenizer(BOS, bos_token=BOS, adds=BOS)
    tokens = evaluation_tokens(adding, source, 9)
    assert tokens.ids.tolist() == [[1, 2, 3]]
    assert tokens.description.endswith("1 document, tokenised whole, <s> in front")


def test_files_are_documents_too(tmp_path):
    sources = [*write(tmp_path / "a.txt", "w0"), *write(tmp_path / "b.txt", "w1")]
    tokenizer = make_tokenizer(BOS, bos_token=BOS)
    tokens = evaluation_tokens(tokenizer, sources, 9)
    assert tokens.ids.tolist() == [[1, 2, 1, 3]]
    assert f"{tmp_path.name}/a.txt, {tmp_path.name}/b.txt" in tokens.description


def test_chat_template_is_not_given_a_second_bos(tmp_path):
    path = tmp_path / "a.jsonl"
    chat = {"messages": [{"role": "user", "content": "w0"}]}
    path.write_text(f"{json.dumps(chat)}\n{json.dumps({'text': 'w1'})}\n{json.dumps(chat)}")
    tokenizer = make_tokenizer(BOS, bos_token=BOS, adds=BOS, chat_template=CHAT_TEMPLATE)
    tokens = evaluation_tokens(tokenizer, [str(path)], 9)
    assert tokens.ids.tolist() == [[1, 2, 1, 3, 1, 2]]


def test_no_warning_about_long_texts(tmp_path, plain, caplog, capfd):
    source = write(tmp_path / "a.txt", words(*range(40)))
    assert plain.model_max_length < 40
    with caplog.at_level(logging.DEBUG):
        evaluation_tokens(plain, source, 8)
        calibration_tokens(plain, source, 2, 8, 0)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_text_of_which_no_tokens_are_made_is_refused(tmp_path, plain):
    source = write(tmp_path / "a.txt", "\u2028\u2003x")

    def tokenizer(texts, **_):
        return {"input_ids": [[] for _ in texts]}

    with pytest.raises(ConfigError, match=r"a\.txt: the tokenizer returns no tokens"):
        evaluation_tokens(tokenizer, source, 4)


def test_a_token_that_the_model_lacks_is_named(tmp_path, plain):
    source = write(tmp_path / "a.txt", "w0 w7 w3")
    message = r"makes 'w7' token 8, but the model has embeddings for 8, 0 to 7\. Take it out"
    for tokens in (
        lambda limit: evaluation_tokens(plain, source, 4, limit=limit),
        lambda limit: calibration_tokens(plain, source, 1, 4, 0, limit=limit),
    ):
        assert tokens(9).ids.max() == 8
        with pytest.raises(ConfigError, match=message):
            tokens(8)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_text_is_refused_by_name(tmp_path, plain, text):
    source = write(tmp_path / "a.txt", text)
    with pytest.raises(ConfigError, match=r"a\.txt: (the file is empty|contains no text)"):
        calibration_tokens(plain, source, 1, 4, 0)


def test_calibration_windows_do_not_overlap(tmp_path, plain):
    source = write(tmp_path / "a.txt", words(*range(1003)))
    tokens = calibration_tokens(plain, source, 10, 100, 0)
    ids = tokens.ids
    assert ids.shape == (10, 100)
    assert ids.is_contiguous()
    assert ids.flatten().unique().numel() == 1000
    assert torch.equal(ids, ids[:, :1] + torch.arange(100))
    assert ids[:, 0].tolist() != sorted(ids[:, 0].tolist())
    assert tokens.description == (
        f"10 windows of 100 tokens from {tmp_path.name}/a.txt (1,003 tokens), seed 0"
    )


def test_same_seed_same_windows_another_seed_others(tmp_path, plain):
    source = write(tmp_path / "a.txt", words(*range(1000)))
    digests = [calibration_tokens(plain, source, 5, 10, seed).digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_global_seed_is_neither_read_nor_moved(tmp_path, plain):
    source = write(tmp_path / "a.txt", words(*range(1000)))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = calibration_tokens(plain, source, 5, 10, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert calibration_tokens(plain, source, 5, 10, 0).digest == first.digest


def test_too_little_text_overlaps_and_says_so(tmp_path, plain):
    source = write(tmp_path / "a.txt", words(*range(20)))
    tokens = calibration_tokens(plain, source, 6, 10, 0)
    assert tokens.ids.shape == (6, 10)
    assert tokens.ids[:, 0].unique().numel() == 6
    assert tokens.description.endswith("seed 0, overlapping, for want of text")


def test_fewer_windows_where_there_are_no_more_places(tmp_path, plain):
    source = write(tmp_path / "a.txt", words(*range(11)))
    tokens = calibration_tokens(plain, source, 6, 10, 0)
    assert sorted(tokens.ids[:, 0].tolist()) == [1, 2]
    assert tokens.description.startswith("2 windows of 10 tokens")


def test_calibration_text_shorter_than_one_window(tmp_path, plain):
    tokens = calibration_tokens(plain, write(tmp_path / "a.txt", words(0, 1, 2)), 128, 2048, 0)
    assert tokens.ids.tolist() == [[1, 2, 3]]
    assert tokens.description.startswith("1 window of 3 tokens from")


def test_windows_may_begin_at_every_place():
    offsets = set()
    for seed in range(50):
        starts = data._window_starts(23, 2, 10, torch.Generator().manual_seed(seed))
        offsets |= {int(start) % 10 for start in starts}
    assert offsets == {0, 1, 2, 3}


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 12), st.integers(0, 3))
def test_windows_lie_inside_and_are_distinct(total, samples, length, seed):
    length = min(length, total)
    starts = data._window_starts(
        total, samples, length, torch.Generator().manual_seed(seed)
    ).tolist()
    assert len(set(starts)) == len(starts) == min(samples, total - length + 1)
    assert all(0 <= start <= total - length for start in starts)
    if samples <= total // length:
        assert all(later - start >= length for start, later in pairwise(sorted(starts)))


@given(st.text("ab\n", max_size=60), st.integers(1, 9))
def test_passages_of_a_document_add_up_to_it(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "PASSAGE_CHARACTERS", size)
        parts = [part.text for part in data._split_passages(Document(text))]
    assert "".join(parts) == text
    assert all(0 < len(part) <= size for part in parts)
    assert all(part.endswith("\n") or "\n" not in part for part in parts[:-1])


def test_chosen_passages_keep_their_order_and_are_just_enough():
    found = [Document(f"passage {number:03}") for number in range(100)]
    chosen = data._sample_passages(found, 115, torch.Generator().manual_seed(0))
    texts = [document.text for document in chosen]
    assert len(texts) == 11
    assert texts == sorted(texts)
    assert texts != [document.text for document in found[:11]]


def test_only_enough_of_a_long_text_is_tokenised(tmp_path, plain, monkeypatch):
    monkeypatch.setattr(data, "MIN_CHARACTERS", 2000)
    monkeypatch.setattr(data, "PASSAGE_CHARACTERS", 500)
    source = write(
        tmp_path / "a.txt", "\n".join(words(*range(i, i + 10)) for i in range(0, 3000, 10))
    )
    tokens = [calibration_tokens(plain, source, 3, 10, seed) for seed in (0, 0, 1)]
    assert tokens[0].digest == tokens[1].digest != tokens[2].digest
    assert tokens[0].ids.shape == (3, 10)
    assert tokens[0].description.endswith("seed 0, from 5 passages chosen at random")
    assert "passages" not in evaluation_tokens(plain, source, 10).description


def test_digest_tells_apart_what_has_the_same_bytes():
    ids = torch.arange(6)
    wide, tall = Tokens.of(ids.view(2, 3), "wide"), Tokens.of(ids.view(3, 2), "tall")
    assert wide.digest != tall.digest
    assert wide.digest == Tokens.of(ids.view(2, 3).clone(), "another description").digest
    # Fixed values: digests in existing reports must remain valid.
    assert wide.digest == "2fe769f9bd3465a44d6938d75a85ced2c553e823833ffbb1586a5bb09d6acb8a"


@pytest.mark.parametrize(
    ("model", "windows", "rest", "front"),
    [
        ("stories15M", 244, 85, "<s>"),
        ("stories260K", 461, 7, "<s>"),
        ("gpt2-tinystories", 301, 119, EOT),
    ],
)
def test_stories_are_cut_by_the_recipe_of_their_models(shared, model, windows, rest, front):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / model)
    tokens = evaluation_tokens(tokenizer, [str(shared / "data/tinystories/valid.txt")], 256)
    assert tokens.ids.shape == (windows, 256)
    assert tokens.description == (
        f"{windows} non-overlapping windows of 256 tokens (remainder of {rest} dropped) of "
        f"tinystories/valid.txt: 255 documents, each tokenised whole, {front} in front of each, "
        "joined"
    )
