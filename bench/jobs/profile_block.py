"""Time of the parts of one Llama-2-7B block, pruned 2:4 by SparseGPT.

    python -m bench.jobs.profile_block

Each sweep works on a fresh copy of the weight, whose time counts. Run it on an idle machine.
"""

import json
from collections.abc import Callable, Iterator
from statistics import median

import torch
from prunekit_kernels import NOfM, inverse_factor, obs_sweep

from bench.harness.measure import RESULTS, describe, seconds
from prunekit.sparsify.error import relative_error
from prunekit.statistics import Gram, StageStatistics

TOKENS = 2048
SPENT = ("forward", "gram", "factor", "sweep 2:4", "error")  # by the engine; the rest explains
BLOCK = {  # of Llama-2-7B: the rows of the linears that share so many inputs
    "self_attn.q_proj, k_proj, v_proj": (3 * 4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj, up_proj": (2 * 11008, 4096),
    "mlp.down_proj": (4096, 11008),
}


def profile() -> None:
    """Time the parts of solving one block, and rewrite ``…/profile_block.{json,md}``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name, (outputs, inputs) in BLOCK.items():
        rows.append({"linears": name, "O": outputs, "I": inputs, "seconds": {}})
        for part, value in _parts(outputs, inputs, device):
            rows[-1]["seconds"][part] = value
            print(f"{name:34} {part:22} {value:8.3f} s", flush=True)
    whole = {part: sum(row["seconds"][part] for row in rows) for part in rows[0]["seconds"]}
    print(f"the block, 2:4: {sum(whole[part] for part in SPENT):.2f} s")
    machine = describe(device)
    file = RESULTS / machine["name"] / "profile_block.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine, "tokens": TOKENS, "block_seconds": whole, "rows": rows}
    file.write_text(json.dumps(found, indent=1) + "\n")
    file.with_suffix(".md").write_text(_table(rows, whole))
    print(f"written: {file}")


def _table(rows: list[dict], whole: dict[str, float]) -> str:
    """Return the measurements as Markdown."""
    spent = sum(whole[part] for part in SPENT)
    shares = ", ".join(f"{part} {whole[part] / spent:.0%}" for part in SPENT)
    lines = [
        f"Seconds of one block of Llama-2-7B's shape, pruned 2:4 on {TOKENS} tokens: {spent:.2f},",
        f"of which {shares}.\n",
        f"| linears | O | I | {' | '.join(whole)} |",
        "|---" * (3 + len(whole)) + "|",
    ]
    for row in rows:
        times = " | ".join(f"{row['seconds'][part]:.2f}" for part in whole)
        lines.append(f"| {row['linears']} | {row['O']} | {row['I']} | {times} |")
    return "\n".join(lines) + "\n"


def _parts(outputs: int, inputs: int, device: torch.device) -> Iterator[tuple[str, float]]:
    def timed(contestant: Callable[[], object]) -> float:
        return median(seconds(contestant, device, least=1))

    weight, x = torch.randn(outputs, inputs, device=device), torch.randn(TOKENS, inputs)
    x = x.to(device)
    yield "forward", timed(lambda: x @ weight.T)
    statistic = Gram(inputs, device)
    yield "gram", timed(lambda: statistic.update(x))
    found = StageStatistics([statistic])
    gram = statistic.full
    gram.diagonal().add_(gram.diagonal().mean())
    yield "factor", timed(lambda: inverse_factor(gram, 0.01))
    upper = inverse_factor(gram, 0.01).upper
    keep, product = torch.rand_like(weight) > 0.5, torch.empty_like(weight)
    yield "sweep 2:4", timed(lambda: obs_sweep(weight.clone(), upper, NOfM(2, 4)))
    yield "error", timed(lambda: relative_error(weight, weight * keep, found))
    yield "sweep, mask given", timed(lambda: obs_sweep(weight.clone(), upper, keep))
    # The products of a sweep are half of this one, since U is triangular.
    yield "products of a sweep", timed(lambda: torch.mm(weight, upper, out=product)) / 2


if __name__ == "__main__":
    profile()
