"""To the Hub and back: an artifact is pushed in one commit, and pulled file by file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import AutoConfig

from optimum_order import __version__, formats
from optimum_order.artifact import card, manifest
from optimum_order.artifact.verify import verify
from optimum_order.errors import ArtifactError, HubError, chainable, redacted
from optimum_order.files import is_folder
from optimum_order.models.source import auto_class

_PATTERNS = ("*.json", "recipe.yaml", "*.jinja", "*.txt", "*.model", "*.spm", "*.tiktoken")
"""Names of configurations, and of what tokenizers keep."""
_LIBRARY: Any = {"library_name": "optimum-order", "library_version": __version__}
# What the client raises when an answer is not what it expects, which it does not check.
_UNREADABLE = (LookupError, TypeError, AttributeError)
# What else it may raise: its own errors, and those of the connection.
_FAILURES = (
    client.HTTPError,  # type: ignore[attr-defined]
    OSError,
    ValueError,
    RuntimeError,
    *_UNREADABLE,
)
_ADVICE = {
    400: "Correct that and push again.",
    401: "Log in with 'hf auth login', set HF_TOKEN or pass a valid token; and check the id.",
    403: "Use a token that may write there, or propose the change with create_pr=True "
    "(--create-pr).",
    404: "Check the id and the revision; a private model is only there for those who may read it.",
    409: "Somebody else is writing there; try again.",
    412: "Something else was committed there meanwhile; try again.",
}
_T = TypeVar("_T")


def patterns() -> list[str]:
    """Return what files of an artifact may be called: no code and no pickle among them."""
    weights = [pattern for cls in formats.containers().values() for pattern in cls.patterns]
    return [*weights, *_PATTERNS]


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
    """Upload an artifact as one commit, with a model card, after checking that it verifies.

    Large files are uploaded first and belong to nothing until that commit, so a push that is cut
    off changes nothing. Afterwards the repository holds the files of this artifact: weights,
    configuration and tokenizer of an earlier model are deleted by the same commit. A LICENSE,
    NOTICE or README.md in the folder is pushed too; a README.md that nobody has edited since it was
    saved gives way to a card with the picture and the id on the Hub, made anew each time;
    metadata that was added to the card on the Hub, such as a license, stays.

    Args:
        folder: What `save_pretrained` or `optimum-order compress` wrote.
        repo_id: `namespace/name`, or `name` for your own namespace; made if missing.
        private: Whether a new repository is private. A public one is then refused.
        revision: The branch to commit to, made if missing; the main branch by default.
        create_pr: Whether to open a pull request in place of committing to the branch.
        token: Hub token; by default the one you are logged in with. It is never stored or printed.
        commit_message: By default the order and the format.

    Returns:
        The address of the commit or the pull request.

    Raises:
        ArtifactError: If the folder does not verify, or holds what no artifact does. Nothing is
            sent.
        HubError: If the Hub cannot be reached or refuses. Nothing is committed.
        OptimumOrderError: If the packages of the extra `hub` are not installed. Nothing is sent.
    """
    folder = Path(folder)
    _check_id(repo_id)
    facts = _checked(folder)
    names = [manifest.FILE, *facts["files"]]
    _pages(folder, facts, repo_id, revision)  # now, while nothing is there yet
    api = HfApi(token=token, **_LIBRARY)
    repo_id = _ask(token, api.create_repo, repo_id, private=private or None, exist_ok=True).repo_id
    remote = _ask(token, _state, api, repo_id, revision, not create_pr)
    if private and not remote.private:
        raise HubError(
            f"'{repo_id}' is there already, and public. Make it private on the Hub, or choose "
            "another id."
        )
    others = {sibling.rfilename for sibling in remote.siblings or []}
    if ".gitignore" in others:
        raise HubError(
            f"'{repo_id}' has a .gitignore, which could keep a file out of the commit. Remove it "
            "first."
        )
    text = _ask(token, _remote_card, api, repo_id, remote.sha) if card.FILE in others else None
    pages = _pages(folder, facts, repo_id, None if create_pr else revision, text)
    pages |= _documents(folder)
    added = {name: folder / name for name in names} | pages
    commit = _ask(
        token,
        api.create_commit,
        repo_id,
        [
            *(CommitOperationAdd(name, content) for name, content in added.items()),
            *(CommitOperationDelete(name) for name in _stale(others - set(added))),
        ],
        commit_message=commit_message or f"{facts['order']} ({facts['format']})",
        revision=revision,
        create_pr=create_pr,
        parent_commit=remote.sha,
    )
    return commit.pr_url or commit.commit_url


def contents(folder: str | Path, repo_id: str) -> dict[str, int]:
    """Return the files that `push` would upload, each with its bytes. The Hub is not asked.

    Args:
        folder: As in `push`.
        repo_id: As in `push`. Metadata that was added to a card there is not in these bytes.

    Raises:
        ArtifactError, HubError, OptimumOrderError: As in `push`, of what the folder says.
    """
    folder = Path(folder)
    _check_id(repo_id)
    facts = _checked(folder)
    pages = _pages(folder, facts, repo_id, None) | _documents(folder)
    sizes = {
        name: len(page) if isinstance(page, bytes) else page.stat().st_size
        for name, page in pages.items()
    }
    names = [manifest.FILE, *facts["files"]]
    return {name: (folder / name).stat().st_size for name in names} | sizes


def check(repo_id: str, token: str | None = None) -> None:
    """Check that a push could begin: to be called before hours of work.

    Args:
        repo_id: `namespace/name`, or `name` for your own namespace.
        token: As in `push`.

    Raises:
        HubError: If the id is none, or the Hub cannot be reached or refuses the token.
        OptimumOrderError: If the packages of the extra `hub` are not installed.
    """
    _check_id(repo_id)
    card.check()
    _ask(token, HfApi(token=token, **_LIBRARY).whoami)


def pull(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    manifest_only: bool = False,
) -> Path:
    """Download an artifact into the Hub's cache, or find it there.

    Args:
        repo_id: `namespace/name`.
        revision: Branch, tag or commit; the main branch by default.
        token: As in `push`.
        cache_dir: The folder of downloads from the Hub.
        manifest_only: Whether to leave out everything but the manifest.

    Returns:
        The folder, to be read only. Nothing but the kinds of files in `patterns` is downloaded, no
        code among them.

    Raises:
        HubError: If there is no such model, it is not an artifact, or the Hub cannot be reached.
    """
    _check_id(repo_id)
    # The manifest first: a repository without one may be large, and is not ours.
    place = {"token": token, "cache_dir": cache_dir}
    folder = _download(repo_id, [manifest.FILE], revision=revision, **place)
    if not (folder / manifest.FILE).is_file():
        raise HubError(
            f"'{repo_id}' on the Hub has no {manifest.FILE}: it is not a model that optimum-order "
            "wrote."
        )
    return (
        folder if manifest_only else _download(repo_id, patterns(), revision=folder.name, **place)
    )


def locate(
    path: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    manifest_only: bool = False,
) -> Path:
    """Return the folder of an artifact; one on the Hub is pulled.

    Args:
        path: A folder, or an id on the Hub.
        revision: Of a model on the Hub, as in `pull`.
        token: Of a model on the Hub, as in `pull`.
        cache_dir: Of a model on the Hub, as in `pull`.
        manifest_only: Of a model on the Hub, as in `pull`.

    Raises:
        ArtifactError: If there is no such folder and this is no id.
        HubError: As in `pull`.
    """
    folder = Path(path).expanduser()
    if is_folder(folder):
        if revision is not None:
            raise ArtifactError(
                f"'{path}' is a folder; a revision is for a model on the Hub. Leave it out."
            )
        return folder
    try:
        validate_repo_id(str(path))
    except ValueError:
        is_id = False
    else:
        is_id = "/" in str(path)
    if not is_id:
        raise ArtifactError(
            f"There is no folder '{path}'. Give a folder, or an id on the Hub: namespace/name."
        )
    return pull(
        str(path),
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        manifest_only=manifest_only,
    )


def _check_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise HubError(
            f"'{repo_id}' is no id on the Hub, which is namespace/name: {error}"
        ) from None


def _checked(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder that may be pushed.

    Raises:
        ArtifactError: If the folder does not verify, or holds what no artifact does.
    """
    if problems := verify(folder):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ArtifactError(
            f"'{folder}' is not pushed, because it is not what it says it is: {problems[0]}{more} "
            "Save it again; 'optimum-order verify' checks it."
        )
    facts = manifest.load(folder)
    others = _others(facts["files"])
    if others:
        raise ArtifactError(
            f"'{folder}' is not pushed, because it holds '{others[0]}': an artifact is data, in "
            f"files called {', '.join(patterns())}. Save it without."
        )
    return facts


def _others(names: Iterable[str]) -> list[str]:
    """Return those of these names that no file of an artifact has."""
    allowed = patterns()
    return [name for name in names if not any(fnmatch(name, pattern) for pattern in allowed)]


def _stale(names: set[str]) -> list[str]:
    """Return those of these names that belong to an earlier model."""
    stale = names - set(_others(names))
    return sorted(name for name in stale if not manifest.DOCUMENTS.fullmatch(name))


def _download(
    repo_id: str,
    names: list[str],
    *,
    revision: str | None,
    token: str | None,
    cache_dir: str | None,
) -> Path:
    """Download a snapshot of a repository.

    Args:
        repo_id: `namespace/name`.
        names: Patterns of the files to download.
        revision: Branch, tag or commit.
        token: Hub token.
        cache_dir: The folder of downloads from the Hub.
    """
    folder = _ask(
        token,
        snapshot_download,
        repo_id,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        allow_patterns=names,
        **_LIBRARY,
    )
    return Path(folder)


def _state(api: HfApi, repo_id: str, revision: str | None, may_branch: bool) -> ModelInfo:
    """Return what the repository holds at a revision.

    Args:
        api: The client.
        repo_id: `namespace/name`.
        revision: Branch, tag or commit.
        may_branch: Whether a missing revision becomes a new branch.
    """
    try:
        return api.model_info(repo_id, revision=revision)
    except client.RevisionNotFoundError:
        if revision is None or not may_branch:
            raise
    api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.model_info(repo_id, revision=revision)


def _remote_card(api: HfApi, repo_id: str, commit: str) -> str:
    return Path(api.hf_hub_download(repo_id, card.FILE, revision=commit)).read_text(
        encoding="utf-8"
    )


def _metadata(text: str) -> Mapping[str, Any]:
    """Return the metadata of a card that anybody may have written."""
    try:
        data: dict[str, Any] = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # whatever a parser of YAML makes of it
        raise HubError(
            f"The metadata of the {card.FILE} that is on the Hub cannot be read "
            f"({type(error).__name__}). Correct it there."
        ) from None
    return data


def _pages(
    folder: Path,
    facts: Mapping[str, Any],
    repo_id: str,
    revision: str | None,
    card_text: str | None = None,
) -> dict[str, Any]:
    """Return the model card and its picture, by file name.

    Args:
        folder: The artifact.
        facts: Its manifest.
        repo_id: Where it will be.
        revision: The branch it will be on.
        card_text: The card that is on the Hub now.

    Raises:
        ArtifactError: If the manifest is not enough to make them.
    """
    metadata = {} if card_text is None else _metadata(card_text)
    try:
        auto = auto_class(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        made = card.make(facts, repo_id, auto, revision=revision, metadata=metadata)
        return {card.FILE: str(made).encode(), manifest.PLOT: card.plot(facts)}
    except KeyError as error:
        raise ArtifactError(
            f"'{folder}' is not pushed, because its manifest lacks {error}, without which there is "
            "no model card. It is probably of an older optimum-order: compress the model again "
            "with this one."
        ) from error
    except (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ArtifactError(
            f"No model card can be made of the manifest in '{folder}' ({type(error).__name__}: "
            f"{error}). Save the model again."
        ) from error


def _documents(folder: Path) -> dict[str, Path]:
    """Return the files that people have put in a folder or edited there, by name."""
    documents = {}
    for file in folder.iterdir():
        made = file.name == card.FILE and card.is_untouched(
            file.read_text(encoding="utf-8", errors="replace")
        )
        if manifest.DOCUMENTS.fullmatch(file.name) and not made:
            documents[file.name] = file
    return documents


def _ask(token: str | None, question: Callable[..., _T], /, *args: Any, **kwargs: Any) -> _T:
    """Return what the Hub's client returns; what it raises becomes a HubError without a token.

    Args:
        token: The token that is used, if it is not that of the user who is logged in.
        question: A function of the client.
        *args: Its arguments.
        **kwargs: Its arguments.

    Raises:
        HubError: If the Hub cannot be reached or refuses.
    """
    secrets = (token, get_token())
    try:
        return question(*args, **kwargs)
    except _FAILURES as error:
        raise HubError(_explained(error, secrets)) from chainable(error, *secrets)


def _explained(error: BaseException, secrets: tuple[str | None, ...]) -> str:
    """Return an error of the client as a message.

    Args:
        error: The error.
        secrets: What must not be in the message.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, client.HfHubHTTPError):
        cause = cause.__cause__
    reason = (cause.server_message if cause else str(error)) or ""
    line = redacted(reason, *secrets).strip().split("\n")[0][:300].rstrip(".")
    if isinstance(error, _UNREADABLE):
        return (
            f"The Hub gave an answer that cannot be read ({type(error).__name__}: {line}). Try "
            "again."
        )
    if cause is None:
        return f"The Hub could not be asked: {line or type(error).__name__}. Try again."
    status = cause.response.status_code
    advice = _ADVICE.get(status, "Try again later.")
    return f"The Hub answered {status}{f' ({line})' if line else ''}. {advice}"
