"""To the Hub and back: an artifact goes there in one commit, and what comes back are the files it consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
    snapshot_download,
)
from huggingface_hub import errors as client
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig

from optimum_order import __version__
from optimum_order.artifact import card, manifest
from optimum_order.artifact.verify import verify
from optimum_order.errors import ArtifactError, HubError, chainable, redacted
from optimum_order.models.source import auto_class

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.spm", "*.tiktoken")
"""What the files of an artifact are called: weights, configurations, and what tokenizers keep. No code, no pickle."""

_CARD = "README.md"
_LIBRARY: Any = {"library_name": "optimum-order", "library_version": __version__}
# What the client raises when an answer is not what it expects, which it does not check.
_UNREADABLE = (LookupError, TypeError, AttributeError)
# What else it may raise: its own errors, and those of the connection.
_FAILURES = (client.HTTPError, OSError, ValueError, RuntimeError, *_UNREADABLE)
_ADVICE = {
    400: "Correct that and push again.",
    401: "Log in with 'hf auth login', set HF_TOKEN or pass a token that is valid; and check the id.",
    403: "Take a token that may write there, or propose the change with create_pr=True (--create-pr).",
    404: "Check the id and the revision; a private model is only there for those who may read it.",
    409: "Somebody else is writing there; try again.",
    412: "Something else was committed there meanwhile; try again.",
}
_T = TypeVar("_T")


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload an artifact as one commit, with a model card, after checking that it is what it says it is.

    Large files are uploaded first and belong to nothing until that commit, so a push that is cut off changes nothing.
    Afterwards the repository holds the files of this artifact: of an earlier model there, weights, configuration and
    tokenizer go with the same commit. A README.md, LICENSE or NOTICE of your own in the folder is pushed with it.
    Otherwise the card is made anew; metadata that was added to the one that is there, such as a licence, stays.

    Args:
        folder: What `save_pretrained` or `optimum-order export` wrote.
        repo_id: `namespace/name`, or `name` for your own namespace; made if there is none.
        private: Whether a new repository is private. One that is there and public is then refused.
        revision: The branch to commit to, made if there is none; the main branch by default.
        create_pr: Whether to open a pull request in place of committing to the branch.
        token: Hub token; by default the one you are logged in with. It is never stored or printed.
        commit_message: By default the order and the format.

    Returns:
        The address of the commit or the pull request.

    Raises:
        ArtifactError: If the folder does not verify, or holds what no artifact does. Nothing is sent.
        HubError: If the Hub cannot be reached or refuses. Nothing is committed.
    """
    folder = Path(folder)
    _check_id(repo_id)
    if problems := verify(folder):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ArtifactError(
            f"'{folder}' is not pushed, because it is not what it says it is: {problems[0]}{more} Save it again; "
            "'optimum-order verify' checks it."
        )
    stated = manifest.load(folder)
    names = [manifest.FILE, *stated["files"]]
    if odd := [name for name in names if not any(fnmatch(name, pattern) for pattern in PATTERNS)]:
        raise ArtifactError(
            f"'{folder}' is not pushed, because it holds '{odd[0]}': an artifact is data, in files called "
            f"{', '.join(PATTERNS)}. Save it without."
        )
    _pages(folder, stated, repo_id, revision, {})  # now, while nothing is there yet
    api = HfApi(token=token, **_LIBRARY)
    repo_id = _ask(token, api.create_repo, repo_id, private=private or None, exist_ok=True).repo_id
    there = _ask(token, _state, api, repo_id, revision, not create_pr)
    if private and not there.private:
        raise HubError(
            f"'{repo_id}' is there already, and public. Make it private on the Hub, or choose another id."
        )
    others = {sibling.rfilename for sibling in there.siblings or []}
    if ".gitignore" in others:
        raise HubError(
            f"'{repo_id}' has a .gitignore, which could keep a file out of the commit. Remove it first."
        )
    kept = _metadata(_ask(token, _card_there, api, repo_id, there.sha)) if _CARD in others else {}
    documents = {
        file.name: file for file in folder.iterdir() if manifest.DOCUMENTS.fullmatch(file.name)
    }
    pages = _pages(folder, stated, repo_id, None if create_pr else revision, kept) | documents
    files = {name: folder / name for name in names} | pages
    stale = {
        name for name in others - set(files) if any(fnmatch(name, pattern) for pattern in PATTERNS)
    }
    commit = _ask(
        token,
        api.create_commit,
        repo_id,
        [
            *(CommitOperationAdd(name, content) for name, content in files.items()),
            *(
                CommitOperationDelete(name)
                for name in sorted(stale)
                if not manifest.DOCUMENTS.fullmatch(name)
            ),
        ],
        commit_message=commit_message or f"{stated['order']} ({stated['format']})",
        revision=revision,
        create_pr=create_pr,
        parent_commit=there.sha,
    )
    return commit.pr_url or commit.commit_url


def check(repo_id: str, token: str | None = None) -> None:
    """Raise HubError if a push to this id could not even begin: to be asked before hours of work."""
    _check_id(repo_id)
    _ask(token, HfApi(token=token, **_LIBRARY).whoami)


def pull(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    manifest_only: bool = False,
) -> Path:
    """Download an artifact into the Hub's cache, or find it there.

    Args:
        repo_id: `namespace/name`.
        revision: Branch, tag or commit; the main branch by default.
        token: As in `push`.
        manifest_only: Whether to leave out everything but the manifest.

    Returns:
        The folder, to be read only. Nothing but the kinds of files in PATTERNS is downloaded, no code among them.

    Raises:
        HubError: If there is no such model, it is not an artifact, or the Hub cannot be reached.
    """
    _check_id(repo_id)
    # The manifest first: a repository without one may be large, and is not ours.
    folder = _download(repo_id, revision, token, [manifest.FILE])
    if not (folder / manifest.FILE).is_file():
        raise HubError(
            f"'{repo_id}' on the Hub has no {manifest.FILE}: it is not a model that optimum-order wrote."
        )
    return folder if manifest_only else _download(repo_id, folder.name, token, list(PATTERNS))


def locate(given: str | Path, *, revision: str | None = None, manifest_only: bool = False) -> Path:
    """The folder of an artifact that is given as such, or as an id on the Hub.

    Raises:
        ArtifactError: If there is no such folder and this is no id.
        HubError: As in `pull`.
    """
    folder = Path(given).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ArtifactError(
                f"'{given}' is a folder; a revision is for a model on the Hub. Leave it out."
            )
        return folder
    try:
        validate_repo_id(str(given))
    except ValueError:
        named = False
    else:
        named = "/" in str(given)
    if not named:
        raise ArtifactError(
            f"There is no folder '{given}'. Give a folder, or an id on the Hub: namespace/name."
        )
    return pull(str(given), revision=revision, manifest_only=manifest_only)


def _check_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise HubError(
            f"'{repo_id}' is no id on the Hub, which is namespace/name: {error}"
        ) from None


def _download(repo_id: str, revision: str | None, token: str | None, patterns: list[str]) -> Path:
    found = _ask(
        token,
        snapshot_download,
        repo_id,
        revision=revision,
        token=token,
        allow_patterns=patterns,
        **_LIBRARY,
    )
    return Path(found)


def _state(api: HfApi, repo_id: str, revision: str | None, may_branch: bool) -> ModelInfo:
    """What the repository holds at this revision, which becomes a new branch where there is none."""
    try:
        return api.model_info(repo_id, revision=revision)
    except client.RevisionNotFoundError:
        if revision is None or not may_branch:
            raise
    api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.model_info(repo_id, revision=revision)


def _card_there(api: HfApi, repo_id: str, commit: str) -> str:
    return Path(api.hf_hub_download(repo_id, _CARD, revision=commit)).read_text(encoding="utf-8")


def _metadata(text: str) -> Mapping[str, Any]:
    """The metadata of a card that anybody may have written."""
    try:
        return ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # whatever a parser of YAML makes of it
        raise HubError(
            f"The metadata of the {_CARD} that is on the Hub cannot be read ({type(error).__name__}). Correct it there."
        ) from None


def _pages(
    folder: Path,
    stated: Mapping[str, Any],
    repo_id: str,
    revision: str | None,
    kept: Mapping[str, Any],
) -> dict[str, Any]:
    """The model card and its picture, by file name."""
    try:
        auto = auto_class(AutoConfig.from_pretrained(folder))
        made = card.make(stated, repo_id, auto, revision=revision, kept=kept)
        return {_CARD: str(made).encode(), manifest.PLOT: card.plot(stated)}
    except KeyError as error:
        raise ArtifactError(
            f"'{folder}' is not pushed, because its manifest lacks {error}, without which there is no model card. It "
            "is probably of an older optimum-order: compress the model again with this one."
        ) from error
    except (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ArtifactError(
            f"No model card can be made of the manifest in '{folder}' ({type(error).__name__}: {error}). Save the "
            "model again."
        ) from error


def _ask(token: str | None, question: Callable[..., _T], /, *args: Any, **kwargs: Any) -> _T:
    """What the Hub's client returns; what it raises becomes a HubError, in which no token stands."""
    secrets = (token, get_token())
    try:
        return question(*args, **kwargs)
    except _FAILURES as error:
        raise HubError(_explained(error, secrets)) from chainable(error, *secrets)


def _explained(error: BaseException, secrets: tuple[str | None, ...]) -> str:
    at: BaseException | None = error
    while at is not None and not isinstance(at, client.HfHubHTTPError):
        at = at.__cause__
    said = (at.server_message if at else str(error)) or ""
    line = redacted(said, *secrets).strip().split("\n")[0][:300].rstrip(".")
    if isinstance(error, _UNREADABLE):
        return f"The Hub gave an answer that cannot be read ({type(error).__name__}: {line}). Try again."
    if at is None:
        return f"The Hub could not be asked: {line or type(error).__name__}. Try again."
    status = at.response.status_code
    advice = _ADVICE.get(status, "Try again later.")
    return f"The Hub answered {status}{f' ({line})' if line else ''}. {advice}"
