"""Citation text and tables: measured numbers, and escaping."""

import copy
import json

import pytest

from prunekit.reports import citation
from tests.conftest import ROOT

EXAMPLE = json.loads((ROOT / "tests/support/example_report.json").read_text())


@pytest.fixture
def example():
    return copy.deepcopy(EXAMPLE)


def test_paragraph_says_the_whole_run():
    assert citation.paragraph(EXAMPLE) == (
        "SmolLM2-135M (LlamaForCausalLM, 134.5 M parameters) was pruned with sparsegpt "
        "(damping = 0.01, block = 128), pattern 2:4, allocation uniform: 50.0 % of the 106.2 M "
        "weights in 21 linear layers are zero (39.5 % of the whole model). Calibration used 128 "
        "sequences of 2,048 tokens (262,144 tokens; seed 0): train.txt, 128 windows drawn at "
        "random. Perplexity on wikitext2-test.txt was 20.70 before and 27.11 after pruning "
        "(+31.0 %; 24 windows of 2048 tokens, no overlap, first token of a window not scored, "
        "bfloat16). Perplexity on tinystories-valid.txt was 6.41 before and 7.02 after pruning "
        "(+9.5 %; 40 windows of 2048 tokens, no overlap, first token of a window not scored, "
        "bfloat16). Made with prunekit 0.1.0, torch 2.13.0, transformers 5.23.0 on cpu in "
        "1 min 35 s."
    )


def test_paragraph_does_not_mention_what_was_not_done(example):
    example |= {"calibration": None, "evaluation": []}
    words = citation.paragraph(example)
    assert "Calibration" not in words
    assert "Perplexity" not in words


@pytest.mark.parametrize("path", ["org/Model", "/models/Model/", "Model"])
def test_a_model_is_called_by_the_end_of_its_path(example, path):
    example["model"]["path"] = path
    assert citation.model_name(example) == "Model"


def test_a_training_of_adapters_is_called_apt(example):
    example["config"] = {"apt": {"steps": 9, "rank": 8, "decay": 0.01, "seed": 0}}
    assert citation.method_name(example) == "APT"
    assert citation.settings(example) == "rank = 8, decay = 0.01"


def test_markdown_has_one_row_as_wide_as_its_head(example):
    example["model"]["path"] = "a|b_c\nd"
    head, rule, row = citation.markdown(example).split("\n")
    assert row.startswith(r"| a\|b\_c d | sparsegpt | 2:4 | 50.0 % | 20.70 → 27.11 |")
    assert head.count("|") == rule.count("|") == row.count("|") - 1


def test_latex_is_escaped(example):
    example["model"]["path"] = "a_b&c\\d"
    comment, row = citation.latex(example).split("\n")
    assert comment.startswith("% Model & Method")
    assert row == (
        r"a\_b\&c\textbackslash{}d & sparsegpt & 2:4 & 50.0 \% & "
        r"20.70 $\to$ 27.11 & 6.41 $\to$ 7.02 \\"
    )


@pytest.mark.parametrize(
    ("post", "said"),
    [
        (2.0, "zero (39.5 % of the whole model); the others were trained for 1,000 steps."),
        (None, "zero (39.5 % of the whole model), pruned during a training of 1,000 steps."),
    ],
)
def test_a_training_is_told(example, post, said):
    example["training"] = {"steps": 1000, "post": post}
    assert said in citation.paragraph(example)
