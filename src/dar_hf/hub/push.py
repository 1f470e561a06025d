"""Uploads: a model, a saved folder or a card, in one commit, with everything kept that people wrote on the Hub."""

import logging
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.repocard import RepoCard

from ..utils.files import INDICES, read_object, read_text, saved_class
from ..weights_dar import stale_weights
from .advice import advice
from .blocks import merge_cards, replace_block
from .cards import empty_model, model_card
from .contents import check_complete, model_files
from .remote_code import is_self_contained

logger = logging.getLogger(__name__)

NUM_NAMED = 8  # of the files that a warning lists


def prepare_repository(
    repo_id: str,
    class_name: str | None,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
) -> str:
    """Make sure that a repository and its branch exist and can take a model, creating them where needed.

    Returns:
        The repository's full id, with the owner.

    Raises:
        ValueError: if it holds another kind of model than ``class_name``.
        huggingface_hub.errors.HfHubHTTPError: and the client's other exceptions.
    """
    api = HfApi(token=token)
    with advice(repo_id):
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        if class_name is not None:
            _check_class(api, repo_id, class_name, revision, subfolder)
    return repo_id


def _check_class(api: HfApi, repo_id: str, class_name: str, revision: str | None, subfolder: str | None) -> None:
    paths = [_path(name, subfolder) for name in INDICES]
    held = next((path for path in paths if api.file_exists(repo_id, path, revision=revision)), None)
    if held is None:
        return
    index = read_object(_download(api, repo_id, held, "model", revision))
    if saved_class(index) != class_name:
        raise ValueError(f"{repo_id} holds a {saved_class(index)}, not a {class_name}: push to another repository.")


def _path(name: str, subfolder: str | None) -> str:
    return str(PurePosixPath(subfolder or "", name))


def _download(api: HfApi, repo_id: str, path: str, repo_type: str, revision: str | None) -> Path:
    return Path(api.hf_hub_download(repo_id, path, repo_type=repo_type, revision=revision))


def push_to_hub(
    model: Any,
    repo_id: str,
    commit_message: str | None = None,
    *,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
    subfolder: str | None = None,
    card: RepoCard | None = None,
) -> CommitInfo:
    """Upload a tokenizer, language model, scheduler or pipeline, with its card, in one commit.

    Args:
        repo_id: ``name`` (under the token's owner) or ``owner/name``; created if missing.
        commit_message, commit_description: default "Upload" and the class.
        private: whether a repository that is created is private.
        token: default the one saved by ``hf auth login``.
        revision: branch to push to, created if missing; default main.
        create_pr: open a pull request instead of committing to the branch.
        variant: part of the weights' file names, such as "bf16"; other variants in the repository stay.
        max_shard_size: largest weights file, as a number of bytes or such as "5GB".
        subfolder: folder in the repository to upload to; no card then.
        card: default one made by `model_card`. What people wrote into an existing card stays (`merge_cards`).

    Raises:
        ValueError: if the repository holds another kind of model.
        huggingface_hub.errors.HfHubHTTPError: and the client's other exceptions. Nothing was
            uploaded then.
    """
    options = {"variant": variant, "max_shard_size": max_shard_size}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **{name: value for name, value in options.items() if value is not None})
        return push_folder(
            folder,
            repo_id,
            commit_message or f"Upload {type(model).__name__}",
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            subfolder=subfolder,
            card=card,
        )


def push_folder(
    folder: str | Path,
    repo_id: str,
    commit_message: str | None = None,
    *,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
    card: RepoCard | None = None,
) -> CommitInfo:
    """Upload a saved model, or a finished run with its images, in one commit.

    Only what belongs to a model or a run goes up: configurations, weights, code, records, the card and images. What
    else is in the folder stays there, with a warning that names it (none for checkpoints and hidden files).

    Takes the arguments of `push_to_hub`. The card is ``card``, else the folder's README.md, else one made by
    `model_card`. Weights in the repository that these ones replace (other shards of the same) are deleted in the
    same commit: loaders would take them. The folder is only read.

    Raises:
        FileNotFoundError: if the folder holds no model, or one without all of its weights.
        OSError: if a file of weights is damaged, or a git-lfs pointer.
        ValueError: if it or the repository holds another kind of model, or a link in it leads out of it: nothing
            outside the folder is uploaded. A snapshot in the Hub's cache consists of such links; copy it first.
        huggingface_hub.errors.HfHubHTTPError: and the client's other exceptions.
    """
    folder = Path(folder)
    local_files, left_out = model_files(folder)  # first: nothing is read through a link that leads out
    model = empty_model(folder)
    if left_out:
        more = f" and {len(left_out) - NUM_NAMED} more" if len(left_out) > NUM_NAMED else ""
        logger.warning("not uploaded from %s: %s%s", folder, ", ".join(left_out[:NUM_NAMED]), more)
    class_name = type(model).__name__
    check_complete(local_files, class_name)
    written = None
    if subfolder is None and "README.md" in local_files:
        written = read_text(local_files.pop("README.md"))
    repo_id = prepare_repository(
        repo_id, class_name, private=private, token=token, revision=revision, subfolder=subfolder
    )
    files = {_path(name, subfolder): path for name, path in local_files.items()}
    text = None
    if subfolder is None:
        text = str(card or model_card(model, repo_id, self_contained=is_self_contained(folder)))
        if card is None and written is not None:
            text = replace_block(written, text, "use")  # it loads from the Hub now
    return _commit(
        repo_id,
        "model",
        files,
        text,
        token,
        revision,
        create_pr,
        commit_message or f"Upload {class_name}",
        commit_description,
    )


def push_card(
    card: RepoCard,
    repo_id: str,
    *,
    commit_message: str = "Update the card",
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload a card to a repository that exists, a model's or a data set's; what people wrote there stays.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: and the client's other exceptions.
    """
    return _commit(repo_id, card.repo_type, {}, str(card), token, revision, create_pr, commit_message, None)


def _commit(
    repo_id: str,
    repo_type: str,
    files: dict[str, Path],
    card: str | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
    message: str,
    description: str | None,
) -> CommitInfo:
    api = HfApi(token=token)
    with advice(repo_id):
        info = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
        there = [sibling.rfilename for sibling in info.siblings or []]
        operations: list = [CommitOperationAdd(path, file) for path, file in files.items()]
        operations += [CommitOperationDelete(path) for path in stale_weights(there, list(files))]
        if card is not None:
            if "README.md" in there:
                card = merge_cards(read_text(_download(api, repo_id, "README.md", repo_type, info.sha)), card)
            operations.append(CommitOperationAdd("README.md", card.encode()))
        return api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            commit_description=description,
            repo_type=repo_type,
            revision=revision,
            create_pr=create_pr,
            parent_commit=info.sha,  # refused if somebody changes the card meanwhile
        )
