"""What narrower products in the search of ADMM cost, emulated on a CPU.

    python -m bench.quality.search_products [--models NAME …] [--every N] [--whole]

The search of ``method = "admm"`` multiplies [O, I] by [I, I] once an iteration. Its operands are
rounded here as tensor cores round them; sums stay in float32, and so do inverses and the conjugate
gradients at the end. Layers: relative error over that with float32, on the Gram matrices of the
dense model. ``--whole``: perplexity of the whole model, pruned block by block with its defaults.
Cells already in ``bench/results/quality/search_products.json`` are not measured again.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import prunekit_kernels.admm  # noqa: F401  the module; the package has the function of its name
import torch
from torch import Tensor

import prunekit
from bench.jobs.end_to_end import Job
from bench.quality.quality import FOLDER, _model, _texts, all_jobs, perplexity
from prunekit.architectures import find_architecture
from prunekit.config.prune_table import Prune
from prunekit.methods.layer import Layer
from prunekit.models.layout import LinearSelection, list_blocks, read_weight, stack_runners
from prunekit.models.sequential.pipeline import iterate_blocks, split_batches
from prunekit.sparsify.calibrate import gather_statistics
from prunekit.sparsify.error import relative_error
from prunekit.statistics import Gram

KERNEL = sys.modules["prunekit_kernels.admm"]
PATTERNS: dict[str, dict[str, Any]] = {
    "50 %": {"pattern": "unstructured", "sparsity": 0.5},
    "70 %": {"pattern": "unstructured", "sparsity": 0.7},
    "2:4": {"pattern": "2:4"},
}


def tf32(x: Tensor) -> Tensor:
    """Round to 10 bits of mantissa, as ``cvt.rna.tf32`` does."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def cut(x: Tensor) -> Tensor:
    """Cut to 10 bits of mantissa, as tensor cores do that are given float32."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def bf16(x: Tensor) -> Tensor:
    """Round to bfloat16."""
    return x.bfloat16().float()


def rounded(to: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the product of operands that are rounded."""
    return lambda left, right: to(left.contiguous()) @ to(right.contiguous())


def three(left: Tensor, right: Tensor) -> Tensor:
    """Multiply as high and low bfloat16: all of their products but that of both low parts."""
    above, over = bf16(left), bf16(right)
    return (above + bf16(left - above)) @ over + above @ bf16(right - over)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "float32": torch.matmul,
    "TF32": rounded(tf32),
    "TF32 cut": rounded(cut),
    "bf16x3": three,
    "bf16": rounded(bf16),
}


@contextmanager
def products(name: str) -> Iterator[None]:
    """Let the search multiply as named."""
    multiply, before = PRODUCTS[name], KERNEL.search_product

    def search(
        target: Tensor, difference: Tensor, inverted: Tensor, rho: float, out: Tensor
    ) -> None:
        torch.add(target, multiply(difference, inverted), alpha=rho, out=out)

    KERNEL.search_product = before if name == "float32" else search
    try:
        yield
    finally:
        KERNEL.search_product = before


def layer_errors(job: Job, every: int) -> Iterator[tuple[str, str, str, float]]:
    """Yield linear, pattern, product and relative error, of the first of every few blocks."""
    model, (ids, _) = _model(job), _texts(job, 0)
    stacks = stack_runners(model, find_architecture(model))
    sections = {
        name: Prune.model_validate({"method": "admm", **given}) for name, given in PATTERNS.items()
    }
    blocks = list_blocks(stacks, LinearSelection(next(iter(sections.values())).pattern))
    visits = iterate_blocks(model, stacks, None, split_batches(ids, model.device))
    for number, (loaded, block) in enumerate(zip(visits, blocks, strict=True)):
        if number % every:
            continue
        for linears, stats in gather_statistics(loaded, block.pruned_stages, (Gram,)):
            weights = {each.name: read_weight(loaded.module, each) for each in linears}
            for name, section in sections.items():
                layers = [
                    Layer(linear, weight, stats, section.pattern, section.sparsity)
                    for linear, weight in weights.items()
                ]
                for product in PRODUCTS:
                    with products(product), torch.no_grad():
                        found = section.method.prune_together(layers)
                    for layer, pruned in zip(layers, found, strict=True):
                        error = relative_error(layer.weight, pruned.weight, stats)
                        yield layer.name, name, product, error  # pyright: ignore  on a CPU


def whole(job: Job, pattern: str, product: str) -> float:
    """Return the perplexity of the whole model, pruned with a product."""
    model, (ids, judged) = _model(job), _texts(job, 0)
    with products(product):
        prunekit.prune(model, ids, method="admm", measure_error=False, **PATTERNS[pattern])
    return perplexity(model, judged)


def table(cells: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    others = [name for name in PRODUCTS if name != "float32"]
    lines = [
        'What narrower products in the search of `method = "admm"` cost, emulated on a CPU: TF32',
        "to nearest and cut off, three products of bfloat16 halves, one of bfloat16; one seed.",
        "Made by `python -m bench.quality.search_products`. Of each: the geometric mean over",
        "layers of the relative error over that with float32; that of the worst layer; where it",
        "was measured, the perplexity of the whole model over that with float32.",
        "",
        f"| model | pattern | layers | {' | '.join(others)} |",
        "|---" * (len(others) + 3) + "|",
    ]
    for row in dict.fromkeys(name.rpartition(", ")[0] for name in cells["layers"]):
        of = {product: cells["layers"].get(f"{row}, {product}", {}) for product in PRODUCTS}
        exact, shown = of["float32"], []
        for product in others:
            ratios = [error / exact[layer] for layer, error in of[product].items()]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            text = f"{mean:.5f} / {max(ratios):.5f}"
            found = cells["whole"]
            if f"{row}, {product}" in found:
                text += f" / {found[f'{row}, {product}'] / found[f'{row}, float32']:.5f}"
            shown.append(text)
        model, pattern = row.rsplit(", ", 1)
        lines.append(f"| {model} | {pattern} | {len(exact)} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure missing cells and rewrite the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=[job.name for job in all_jobs()])
    parser.add_argument("--every", type=int, default=1, help="measure the first of so many blocks")
    parser.add_argument("--whole", action="store_true", help="perplexity instead of layers")
    options = parser.parse_args()
    file = FOLDER / "search_products.json"
    cells = json.loads(file.read_text()) if file.is_file() else {"layers": {}, "whole": {}}

    def save() -> None:
        file.write_text(json.dumps(cells, indent=1) + "\n")
        file.with_suffix(".md").write_text(table(cells))

    for job in (job for job in all_jobs() if job.name in options.models):
        if not options.whole:
            for layer, pattern, product, error in layer_errors(job, options.every):
                cells["layers"].setdefault(f"{job.name}, {pattern}, {product}", {})[layer] = error
                save()
            continue
        for pattern in PATTERNS:
            for product in PRODUCTS:
                key = f"{job.name}, {pattern}, {product}"
                if key not in cells["whole"]:
                    cells["whole"][key] = whole(job, pattern, product)
                    print(key, cells["whole"][key], flush=True)
                    save()


if __name__ == "__main__":
    main()
