"""The command ``prunekit evaluate``."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from prunekit.cli.app import Json, app, check_at_least, print_json, print_line
from prunekit.errors import ConfigError

if TYPE_CHECKING:
    from prunekit.distributed.ranks import Ranks


@Parameter(name="*")
@dataclass(frozen=True)
class Measured:
    """Data and tasks that are measured.

    Attributes:
        data: A text file (.txt, .jsonl, .jsonl.gz, .parquet), pydoc:test or hub:NAME:SPLIT; with
            --task a file of rows (.tsv, .csv, .jsonl, .jsonl.gz, .parquet); may be repeated.
        length: Tokens per window; capped at the model's context length.
        windows: Number of windows from the start of the text; all if left out.
        stride: Tokens from the start of a window to that of the next; windows do not overlap if
            left out.
        task: classification (columns text or sentence, label, perhaps pair) or seq2seq (columns
            input, target).
        column: Names of columns that differ from these, as --column.label gold.
        samples: Number of rows from the start, with --task; all if left out.
        tasks: A task of lm-eval, such as arc_easy, or a task file (.yaml); may be repeated.
        few_shot: Solved examples before each question of --tasks; as the task says if left out.
        limit: Number of questions from the start of each of --tasks; all if left out.
    """

    data: Annotated[tuple[str, ...], Parameter(negative=())] = ()
    length: int = 2048
    windows: int | None = None
    stride: int | None = None
    task: Literal["classification", "seq2seq"] | None = None
    column: Annotated[dict[str, str] | None, Parameter(negative=())] = None
    samples: int | None = None
    tasks: Annotated[tuple[str, ...], Parameter(negative=())] = ()
    few_shot: int | None = None
    limit: int | None = None

    def check(self) -> None:
        """Refuse options that are out of range or do not belong together.

        Raises:
            ConfigError: One of them is so.
        """
        for least, option, value in (
            (2, "--length", self.length),
            (1, "--windows", self.windows),
            (1, "--stride", self.stride),
            (1, "--samples", self.samples),
            (0, "--few-shot", self.few_shot),
            (1, "--limit", self.limit),
        ):
            check_at_least(least, option, value)
        for option, why in self._unused():
            raise ConfigError(f"{option}: does not apply {why}.")
        from prunekit.data.labelled import check_labelled_sources
        from prunekit.data.sources import check_sources

        if problems := (check_labelled_sources if self.task else check_sources)(self.data):
            raise ConfigError("\n".join(f"--data {problem}." for problem in problems))

    def _unused(self) -> Iterator[tuple[str, str]]:
        """Yield each option that has no effect, and why."""
        if self.task:
            found = {"--windows": self.windows, "--stride": self.stride}
            yield from ((name, "with --task") for name in found if found[name] is not None)
        elif not self.data:
            found = {"--windows": self.windows, "--stride": self.stride}
            yield from ((name, "without --data") for name in found if found[name] is not None)
        elif self.stride and self.stride > self.length:
            yield "--stride", f"above --length ({self.length}): text would be left out"
        if not self.task:
            found = {"--samples": self.samples, "--column": self.column}
            yield from ((name, "without --task") for name in found if found[name] is not None)
        if not self.tasks:
            found = {"--few-shot": self.few_shot, "--limit": self.limit}
            yield from ((name, "without --tasks") for name in found if found[name] is not None)


NOTHING = Measured()


@app.command
def evaluate(
    model: str,
    /,
    *,
    measured: Measured = NOTHING,
    generate: int = 0,
    as_json: Json = False,
) -> None:
    """Measure perplexity, accuracy on labelled data, or tasks of lm-eval.

    Args:
        model: A checkpoint folder or a hub id.
        measured: Data and tasks that are measured.
        generate: Number of new tokens to generate for each of a few prompts.
        as_json: Print JSON.
    """
    if not (measured.data or measured.tasks or generate):
        raise ConfigError("evaluate: needs --data FILE, --tasks NAME or --generate TOKENS.")
    check_at_least(0, "--generate", generate)
    measured.check()
    from prunekit.distributed.join import join

    with join() as ranks:
        results = _measure(model, measured, ranks) if measured.data else []
        if measured.tasks:
            results += ranks.run_on_main(lambda: _ask(model, measured))
    if ranks.is_main:
        texts = _generated(model, generate) if generate else []
        if as_json:
            print_json({"evaluation": results, "texts": texts})
        else:
            _print_measures(results)
            _print_texts(texts)


def _measure(model: str, measured: Measured, ranks: "Ranks") -> list[dict[str, Any]]:
    """Return the measures of a model on texts or labelled rows."""
    if measured.task:
        from prunekit.evaluation.labelled import Rows, evaluate_rows

        rows = Rows(measured.task, measured.column or {}, measured.length, measured.samples)
        return evaluate_rows(model, measured.data, rows, ranks=ranks)
    from prunekit.evaluation import perplexity

    return perplexity.evaluate(
        model,
        measured.data,
        measured.length,
        measured.windows,
        ranks=ranks,
        stride=measured.stride,
    )


def _ask(model: str, measured: Measured) -> list[dict[str, Any]]:
    """Return the measures of a model on tasks of lm-eval."""
    from prunekit.evaluation.harness import HarnessTasks, evaluate_tasks

    return evaluate_tasks(model, HarnessTasks(measured.tasks, measured.few_shot, measured.limit))


def _print_measures(results: Iterable[dict[str, Any]]) -> None:
    from prunekit.formatting import measured

    for result in results:
        value = measured(result["metric"], result["value"])
        error = result.get("stderr")
        shown = "" if error is None else f" ± {measured(result['metric'], error)}"
        print_line(f"{result['data']}: {result['metric']} {value}{shown}")
        print_line(f"  {result['protocol']}")


def _generated(model: str, tokens: int) -> list[dict[str, Any]]:
    """Return generated texts with their speed and quality."""
    from prunekit.evaluation import generation

    keys = ("prompt", "text", "prefill", "decode", "lexical_diversity", "repetition")
    samples = generation.generate(model, tokens)
    return [{key: getattr(sample, key) for key in keys} for sample in samples]


def _print_texts(texts: Iterable[dict[str, Any]]) -> None:
    from prunekit.formatting import number

    for sample in texts:
        print_line(f"\n{sample['prompt']} …{sample['text']}")
        print_line(
            f"  prefill {number(sample['prefill'])} tokens/s, "
            f"decode {number(sample['decode'])} tokens/s, "
            f"lexical diversity {number(sample['lexical_diversity'])}, "
            f"repetition {number(sample['repetition'])}"
        )
