"""Up to the Hugging Face hub, and down from it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from sauce_hooks.bank.format import TENSORS_FILES
from sauce_hooks.errors import SAEFileError

CARD_FILE = "README.md"


def has(repo_id: str, file: str) -> bool:
    """Whether a repository exists and has such a file."""
    from huggingface_hub import HfApi

    return HfApi().file_exists(repo_id, file)


def upload(repo_id: str, save: Callable[[Path], None], card: str, *, replaces: Sequence[str], private: bool) -> str:
    """Upload what `save` writes into a folder, and a card; returns the repository's address.

    Args:
        repo_id: made if there is none.
        save: writes the files into the folder it is given, which does not exist yet.
        card: the text of README.md.
        replaces: marks of cards that this one may replace. A card without any is somebody's own, and stays.
        private: whether nobody else sees a repository that is made.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    address = api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "files"
        save(folder)
        if not api.file_exists(repo_id, CARD_FILE) or _is_ours(api.hf_hub_download(repo_id, CARD_FILE), replaces):
            (folder / CARD_FILE).write_text(card, encoding="utf-8")
        # Tensors of an earlier bank go; those of this one do not, though they match.
        api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns=[TENSORS_FILES])
    return str(address)


def _is_ours(path: str, marks: Sequence[str]) -> bool:
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    return any(mark in text for mark in marks)


def download(repo_id: str, patterns: Sequence[str]) -> Path:
    """The folder that holds those of a repository's files whose names match.

    Raises:
        SAEFileError: there is no such repository, or it cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as problem:
        raise SAEFileError(f"{repo_id!r} is neither a folder here nor a repository on the hub: {problem}") from problem
