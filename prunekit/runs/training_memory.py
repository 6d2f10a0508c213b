"""Memory and disk that a training within a run needs."""

from prunekit.config.distill_table import Distill
from prunekit.config.run_config import Config
from prunekit.formatting import size
from prunekit.runs.plan_base import PlanBase
from prunekit.runs.training import trained_adapter, trained_apart
from prunekit.training.distill_blocks import stream_width
from prunekit.training.distill_losses import QUARTERS

VECTORS = 12
"""Activations of a block that are held for its gradient, in vectors of its width."""
LOGITS = 3
"""Copies of the logits that a gradient needs."""
DISTILLED_LOGITS = 8
"""Vectors of logits of a prediction that the divergence and its gradient need."""
DISTILLED_STATES = 6
"""Vectors of hidden states of a token that the distance and its gradient need, for each block."""
VALUES = 4
"""Numbers for each parameter of a transformation: value, gradient, two moments."""


def training_state_bytes(plan: PlanBase) -> int:
    """Return each process's bytes of float32 weights and training state.

    Of each weight that is trained: its gradient, two moments, and its best value so far. Sharded
    weights are whole before the training, and where single weights are pruned meanwhile.
    """
    apart = trained_apart(plan)
    trained = plan.parameters if apart is None else apart
    if not plan.sharded:
        return 4 * ((0 if apart is None else plan.parameters) + 5 * trained)
    shared = 5 * plan.parameters if apart is None else plan.parameters
    state = -(-shared // plan.ranks.size) + (0 if apart is None else 5 * trained)
    if isinstance(plan.config, Config) and plan.config.prune.gradual:
        return 4 * (state + plan.parameters)
    return 4 * max(plan.parameters, state + _gathered(plan, trains=apart is None))


def _gathered(plan: PlanBase, *, trains: bool) -> int:
    """Return how many numbers a process gathers of sharded weights.

    At a time these are the weights outside of blocks, and of two blocks, as the next one is
    fetched; with ``trains`` also their gradients, and a copy that is exchanged.
    """
    blocks = [block for runner in plan.stacks for block in runner.blocks]
    sizes = [sum(each.numel() for each in block.parameters()) for block in blocks]
    outside = plan.parameters - sum(sizes)
    return (2 + 2 * trains) * max(sizes) + (1 + 2 * trains) * outside


def saved_state_disk(plan: PlanBase) -> int:
    """Return the bytes that saved states need on disk beside the checkpoint.

    A state has value, best value and two moments of each parameter that is trained, and the values
    and masks of frozen ones that are pruned. While one is written the one before it is there too,
    but no weight of the checkpoint.
    """
    training, apart = plan.config.training, trained_apart(plan)
    if training is None or training.save_every == 0:
        return 0
    state = 4 * 4 * (plan.parameters if apart is None else apart)
    if isinstance(plan.config, Config) and plan.config.prune.gradual:
        state += plan.prunable // 8 + (0 if apart is None else 4 * plan.prunable)
    if plan.config.distill:
        state += 3 * 4 * _transformations(plan, plan.config.distill)
        state += 4 * (apart or 0)
    return max(state, 2 * state - plan.checkpoint.nbytes)


def saved_state_words(plan: PlanBase) -> str:
    """Return the disk that saved states need, in words."""
    disk = saved_state_disk(plan)
    return f"; {size(disk)} more while it trains" if disk else ""


def training_activations(plan: PlanBase) -> int:
    """Return the bytes of activations that the gradient of a batch needs."""
    train = plan.config.training
    assert train is not None
    blocks = [block for runner in plan.stacks for block in runner.blocks]
    matrices = (each for block in blocks for each in block.parameters() if each.ndim == 2)
    width = max((max(each.shape) for each in matrices), default=plan.stacks[0].features)
    vocabulary = getattr(plan.model.config, "vocab_size", 0)
    vectors = len(blocks) * VECTORS * width + LOGITS * vocabulary
    if train.checkpoint_activations:
        features = max(runner.features for runner in plan.stacks)
        vectors = len(blocks) * features + VECTORS * width + LOGITS * vocabulary
    return 4 * train.batch * plan.lengths[0] * vectors


def distillation_memory(plan: PlanBase, *, gated: bool) -> dict[str, int]:
    """Return the bytes of teacher, transformations and distances; empty without [distill].

    Args:
        plan: The plan of the run.
        gated: Gates are all that prunes the model during the training, so that a teacher shares
            frozen weights.
    """
    distill, training = plan.config.distill, plan.config.training
    if distill is None or training is None:
        return {}
    teacher, adapter = plan.parameters, trained_adapter(plan.config, plan.model)
    if gated and adapter:
        teacher = trained_apart(plan) or 0
    elif plan.sharded:
        teacher = max(teacher, teacher // plan.ranks.size + _gathered(plan, trains=False))
    width = stream_width(plan.model)
    transformations = VALUES * _transformations(plan, distill)
    has_head = plan.model.get_output_embeddings() is not None
    vocabulary = getattr(plan.model.config, "vocab_size", 0) if has_head else 0
    vectors = DISTILLED_LOGITS * vocabulary + DISTILLED_STATES * QUARTERS * width
    distances = training.batch * plan.lengths[0] * vectors
    return {"distillation": 4 * (teacher + transformations + distances)}


def _transformations(plan: PlanBase, distill: Distill) -> int:
    """Return the number of parameters of all transformations."""
    return QUARTERS * 2 * distill.rank * stream_width(plan.model)
