"""Upload of a finished checkpoint to the Hugging Face hub."""

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from prunekit.checkpoint import adapter
from prunekit.checkpoint.atomic import json_bytes
from prunekit.checkpoint.companions import companions
from prunekit.checkpoint.hub import CARD
from prunekit.checkpoint.journal import JOURNAL, read_journal
from prunekit.checkpoint.owned_files import MISLEADING
from prunekit.checkpoint.weight_files import (
    INDEX_FILE,
    is_file,
    read_config,
    read_json,
    weight_files,
)
from prunekit.errors import CheckpointError, ConfigError, HubError

CONFIG_FILE = "config.json"


def check_can_push(repository: str, key: str) -> None:
    """Check name and login before anything is computed.

    Args:
        repository: ``organisation/name`` on the hub.
        key: The option or key that names it, for messages.

    Raises:
        ConfigError: The name is invalid, or nobody is logged in.
        HubError: The hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"{key}: {error}") from None
    if repository.count("/") != 1:
        raise ConfigError(f'{key}: "{repository}" is no name on the hub such as "org/name".')
    if constants.is_offline_mode():
        raise ConfigError(f"{key}: HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it.")
    if not get_token():
        raise ConfigError(f"{key}: nobody is logged in to the hub. Run: hf auth login")
    with _hub_errors(key):
        HfApi().whoami()


def push(folder: Path, repository: str, *, private: bool = False, reports: bool = False) -> str:
    """Upload a finished checkpoint in one commit; return its address.

    Its journal and generated text stay here, and its reports, which name local paths, unless they
    are asked for. Where files name the folder, they name the repository instead. Weights, indices
    and adapters that the repository had before are removed in the same commit, as other tools would
    open them with the new config.

    Args:
        folder: The checkpoint.
        repository: ``organisation/name``; created if there is none.
        private: Create it as a private one.
        reports: Upload ``report.json`` and ``report.html`` too.

    Raises:
        CheckpointError: The folder is no finished checkpoint.
        HubError: The hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    files = published_files(folder, reports=reports)
    changed = renamed_files(folder, repository)
    added = [
        CommitOperationAdd(name, changed[name] if name in changed else str(path))
        for name, path in files.items()
    ]
    with _hub_errors(repository):
        api = HfApi()
        api.create_repo(repository, private=private or None, exist_ok=True)
        old = outdated_files(api.list_repo_files(repository), files)
        removed = [CommitOperationDelete(name, is_folder=False) for name in old]
        done = api.create_commit(
            repository, [*added, *removed], commit_message="Upload a model pruned by prunekit"
        )
    return str(done.commit_url)


def published_files(folder: Path, *, reports: bool = False) -> dict[str, Path]:
    """Return the files of a checkpoint that others need, by name.

    Args:
        folder: The checkpoint.
        reports: Include those of the run.

    Raises:
        CheckpointError: The folder is no checkpoint, or its run is not finished.
    """
    config = read_config(folder)
    if is_file(folder / JOURNAL) and ("finish", "") not in read_journal(folder / JOURNAL):
        raise CheckpointError(f"{folder}: its run is not finished. Run it again with --resume.")
    names = [CARD, CONFIG_FILE, INDEX_FILE]
    names += [f"{adapter.FOLDER}/{name}" for name in (adapter.FILE, adapter.CONFIG)]
    names += ["report.json", "report.html"] * reports
    paths = [folder / name for name in names]
    paths = [*filter(is_file, paths), *weight_files(folder, config), *companions(folder)]
    return {path.relative_to(folder).as_posix(): path for path in paths}


def outdated_files(there: Iterable[str], uploaded: Container[str]) -> list[str]:
    """Return a repository's files that would be opened with the uploaded ones.

    Args:
        there: Names of its files.
        uploaded: Names of those that replace them.
    """
    return [
        name
        for name in there
        if name not in uploaded
        and (
            PurePosixPath(name).parts[0] == adapter.FOLDER
            or ("/" not in name and any(PurePosixPath(name).match(each) for each in MISLEADING))
        )
    ]


def renamed_files(folder: Path, repository: str) -> dict[str, bytes]:
    """Return files in which the repository's name replaces the folder's.

    Raises:
        CheckpointError: The card is no text, or the config of the adapter no JSON object.
    """
    found: dict[str, bytes] = {}
    if is_file(card := folder / CARD):
        try:
            text = card.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{card}: cannot be read as UTF-8 ({error}). Save it as UTF-8, or remove it."
            ) from error
        found[CARD] = text.replace(f'"{folder.resolve().name}"', f'"{repository}"').encode()
    if is_file(config := folder / adapter.FOLDER / adapter.CONFIG):
        values = read_json(config, "peft opens the adapter by it")
        name = f"{adapter.FOLDER}/{adapter.CONFIG}"
        found[name] = json_bytes({**values, "base_model_name_or_path": repository})
    return found


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Turn errors of the network and the hub into one of ours."""
    from huggingface_hub.errors import HfHubHTTPError

    # Of httpx or httpx2, as the version of the client has it.
    network: type[Exception] = HfHubHTTPError.__bases__[0]  # pyright: ignore
    try:
        yield
    except (network, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise HubError(f"{what}: the hub cannot be reached or refuses: {reason}") from error
