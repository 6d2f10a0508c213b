"""OBS sweep: bound by matrix products; the published code by touching memory column by column.

    python -m bench obs_sweep
    python -m bench.obs_sweep      where the time of one block of Llama-2-7B's shape goes

Each run works on a fresh copy of the weight, and the time of that copy is counted.
"""

import json
from collections.abc import Iterator
from statistics import median

import torch
from prunekit_kernels import Groups, NOfM, choose, inverse_factor, obs_sweep
from torch import Tensor

from bench.harness import RESULTS, Case, describe, seconds

WHY = {
    "cpu": "within a block a column is taken from those to come one at a time, at the speed of"
    " cache and not of products, the more so the fewer rows and columns there are; n:m is chosen"
    " between the columns, four at a time.",
}
LAYERS = [
    ("smollm2-135m.gate_proj", 1536, 576),
    ("smollm2-135m.down_proj", 576, 1536),
    ("llama-7b.q_proj", 4096, 4096),
    ("llama-7b.down_proj", 4096, 11008),
]
BLOCK = {  # of Llama-2-7B: the rows of the linears that share so many inputs
    "self_attn.q_proj, k_proj, v_proj": (3 * 4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj, up_proj": (2 * 11008, 4096),
    "mlp.down_proj": (4096, 11008),
}


def cases(device: torch.device) -> Iterator[Case]:
    """Yield real layers, 2:4 and half of each block of 128 columns."""
    for name, outputs, inputs in LAYERS:
        weight, upper = _layer(outputs, inputs, device)
        for choice, m in ((f"{name} 2:4", 4), (f"{name} half", 0)):
            yield Case(
                choice,
                {"O": outputs, "I": inputs},
                weight.dtype,
                bytes=2 * weight.nbytes + upper.nbytes // 2,
                flops=outputs * inputs * inputs,
                contestants=_contestants(weight, upper, m),
            )


def _contestants(weight: Tensor, upper: Tensor, m: int) -> dict:
    way = NOfM(m // 2, m) if m else half
    return {
        "prunekit": lambda: obs_sweep(weight.clone(), upper, way),
        "published": lambda: published(weight.clone(), upper, m),
    }


def published(weight: Tensor, upper: Tensor, m: int) -> None:
    """Sweep by the loop of the paper's repository: m // 2 of every m go, or half of each block."""
    for start in range(0, weight.shape[1], 128):
        end = min(start + 128, weight.shape[1])
        columns, factor = weight[:, start:end].clone(), upper[start:end, start:end]
        pruned, errors = torch.zeros_like(columns), torch.zeros_like(columns)
        gone = torch.zeros_like(columns, dtype=torch.bool)
        if not m:
            score = columns**2 / factor.diagonal() ** 2
            gone = score <= score.flatten().sort()[0][score.numel() // 2]
        for j in range(end - start):
            column, root = columns[:, j], factor[j, j]
            if m and j % m == 0:
                score = columns[:, j : j + m] ** 2 / factor.diagonal()[j : j + m] ** 2
                gone.scatter_(1, j + score.topk(m // 2, dim=1, largest=False)[1], True)  # noqa: FBT003
            kept = column.clone()
            kept[gone[:, j]] = 0
            pruned[:, j] = kept
            error = (column - kept) / root
            columns[:, j:] -= error.unsqueeze(1).matmul(factor[j, j:].unsqueeze(0))
            errors[:, j] = error
        weight[:, start:end] = pruned
        weight[:, end:] -= errors.matmul(upper[start:end, end:])


def half(score: Tensor, start: int) -> Tensor:  # noqa: ARG001  a choose
    """Keep the higher half of all scores, as the engine does."""
    return choose(score, Groups(None, None, (score.numel() // 2,)))


def profile() -> None:
    """Time the parts of solving one block, and rewrite ``…/profile_obs_sweep.{json,md}``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name, (outputs, inputs) in BLOCK.items():
        rows.append({"linears": name, "O": outputs, "I": inputs, "seconds": {}})
        for part, value in _parts(outputs, inputs, device):
            rows[-1]["seconds"][part] = value
            print(f"{name:34} {part:22} {value:8.3f} s", flush=True)
    solved = sum(row["seconds"]["factor"] + row["seconds"]["sweep 2:4"] for row in rows)
    print(f"the block, 2:4: {solved:.2f} s")
    machine = describe(device)
    file = RESULTS / machine["name"] / "profile_obs_sweep.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine, "block_seconds": solved, "rows": rows}
    file.write_text(json.dumps(found, indent=1) + "\n")
    file.with_suffix(".md").write_text(_table(rows, solved))
    print(f"written: {file}")


def _table(rows: list[dict], solved: float) -> str:
    """Return what was measured as Markdown."""
    parts = [*rows[0]["seconds"]]
    lines = [
        f"Seconds of one block of Llama-2-7B's shape: {solved:.2f} to factor and to sweep 2:4.\n",
        f"| linears | O | I | {' | '.join(parts)} |",
        "|---" * (3 + len(parts)) + "|",
    ]
    for row in rows:
        times = " | ".join(f"{row['seconds'][part]:.2f}" for part in parts)
        lines.append(f"| {row['linears']} | {row['O']} | {row['I']} | {times} |")
    return "\n".join(lines) + "\n"


def _parts(outputs: int, inputs: int, device: torch.device) -> Iterator[tuple[str, float]]:
    gram, weight = _gram(inputs, device), torch.randn(outputs, inputs, device=device)
    yield "factor", median(seconds(lambda: inverse_factor(gram, 0.01), device))
    upper = inverse_factor(gram, 0.01).upper
    keep, product = torch.rand_like(weight) > 0.5, torch.empty_like(weight)
    yield "sweep 2:4", median(seconds(lambda: obs_sweep(weight.clone(), upper, NOfM(2, 4)), device))
    yield (
        "sweep, mask given",
        median(seconds(lambda: obs_sweep(weight.clone(), upper, keep), device)),
    )
    # The products of a sweep are half of this one, since U is triangular.
    whole = median(seconds(lambda: torch.mm(weight, upper, out=product), device))
    yield "of which products", whole / 2


def _gram(inputs: int, device: torch.device) -> Tensor:
    x = torch.randn(1024, inputs, device=device)
    gram = x.T @ x
    gram.diagonal().add_(1024)
    return gram


def _layer(outputs: int, inputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    weight = torch.randn(outputs, inputs, device=device)
    return weight, inverse_factor(_gram(inputs, device), 0.01).upper


if __name__ == "__main__":
    profile()
