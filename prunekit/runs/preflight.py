"""Plans for this machine or another: its memory, its device, its files."""

import sys
from dataclasses import dataclass

import torch

from prunekit.checkpoint.hub import checkpoint_folder
from prunekit.checkpoint.reader import Checkpoint, open_checkpoint
from prunekit.config.run_config import Config, StructuredConfig
from prunekit.distributed.ranks import Ranks
from prunekit.models.devices import resolve_device
from prunekit.models.empty_model import checkpoint_from_config, has_weights
from prunekit.models.memory import free_bytes, free_host_bytes
from prunekit.models.sequential.hidden_states import Where
from prunekit.runs.checks import check_output_path


@dataclass(frozen=True)
class Preflight:
    """Memory of another machine, for a plan without local weights.

    Attributes:
        device_memory: Bytes of memory of each GPU; None plans for the device of this machine.
        host_memory: Bytes of main memory for each process; None sets no limit.
    """

    device_memory: int | None = None
    host_memory: int | None = None


def planned_checkpoint(
    config: Config | StructuredConfig, preflight: Preflight | None
) -> tuple[Checkpoint, bool]:
    """Return the checkpoint, and whether only its config.json is here.

    Args:
        config: The user's config.
        preflight: Memory of another machine; the weights may then be missing here.

    Raises:
        PrunekitError: The checkpoint cannot be read, or the output folder is not usable.
    """
    folder = checkpoint_folder(config.model.path, config.model.revision)
    if preflight is not None and not has_weights(folder):
        return checkpoint_from_config(folder), True
    checkpoint = open_checkpoint(folder)
    check_output_path(config, checkpoint)
    return checkpoint, False


def planned_device(
    config: Config | StructuredConfig, ranks: Ranks, preflight: Preflight | None
) -> torch.device:
    """Return the device for blocks, here or on the planned machine.

    Args:
        config: The user's config.
        ranks: Processes that share the run.
        preflight: Memory of another machine, which has a GPU.
    """
    if preflight and preflight.device_memory is not None:
        return torch.device("cuda")
    device = resolve_device(config.model.device)
    return device if preflight else ranks.local_device(device)


def requested_placement(config: Config | StructuredConfig) -> Where | None:
    """Return where the config places hidden states; None: the plan chooses."""
    where = config.calibration.hidden if config.calibration else "auto"
    return None if where == "auto" else where


def available_memory(device: torch.device, preflight: Preflight | None) -> tuple[int, int]:
    """Return the free bytes of the compute device and of main memory."""
    if preflight and preflight.device_memory:
        return preflight.device_memory, preflight.host_memory or sys.maxsize
    return free_bytes(device), free_host_bytes()
