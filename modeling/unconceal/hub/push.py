"""Sending a folder to the Hub: whole or not at all, and what has arrived is not sent twice."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard, get_token
from huggingface_hub.constants import DEFAULT_REVISION
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, logging, validate_repo_id
from tqdm import tqdm

from ..utils.errors import UserError, one_line
from ..utils.files import is_hub_id


CARD = "README.md"
LARGE = 2**20  # bytes


@dataclass(frozen=True)
class Upload:
    """Files and where they go.

    Attributes:
        repo_id: "owner/name".
        repo_type: "model", "dataset" or "space".
        files: Path in the repository -> file here.
        replaces: Patterns of names that an earlier upload may have left; what this one does not hold of them is removed.
        sdk: Of a Space.
    """

    repo_id: str
    repo_type: str
    files: Mapping[str, Path]
    replaces: tuple[str, ...] = ()
    sdk: str | None = None

    @property
    def num_bytes(self) -> int:
        """Sum of the files' sizes."""
        return sum(path.stat().st_size for path in self.files.values())


@dataclass(frozen=True)
class Pushed:
    """Where an upload has arrived.

    Attributes:
        url: Of the repository.
        commit: Full name of the commit.
        is_private: Whether the world cannot see it.
        is_new: Whether the push made the commit; else all files were there already.
        removed: Files of an earlier upload that it took away.
    """

    url: str
    commit: str
    is_private: bool
    is_new: bool
    removed: tuple[str, ...] = ()


def check_repo_id(repo_id: str):
    """Refuse what cannot be the name of a repository.

    Raises:
        UserError: If it is not "owner/name" by the Hub's rules.
    """
    try:
        if not is_hub_id(repo_id):
            raise HFValidationError("it has no owner, or letters that names may not have")
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            f"got {repo_id!r} as the repository, expected owner/name, such as org/run-cos: {one_line(error)}"
        ) from None


def check_token():
    """Refuse to go on without a token of the Hub.

    Raises:
        UserError: If there is none.
    """
    if not get_token():
        raise UserError("got no token of the Hub; log in by `hf auth login`, or set HF_TOKEN")


def push(
    upload: Upload,
    *,
    public: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    message: str = "Upload by Unconceal",
) -> Pushed:
    """Send an upload as one commit.

    Large files go first, each as a whole; the commit that makes them visible comes last. So a repository is never seen
    half, and after an interruption the same call sends only what is missing.

    Args:
        upload: What to send.
        public: Whether the world may see it. None makes a new repository private and leaves an old one as it is.
        revision: Branch, made if it does not exist; the main one by default.
        tag: Name to give to the commit.
        message: Of the commit.

    Raises:
        UserError: If the Hub cannot be reached or refuses the name, the token or a file, or if the tag is taken.
    """
    check_repo_id(upload.repo_id)
    check_references(revision=revision, tag=tag)
    if not message.strip():
        raise UserError("got an empty message; give one, or leave it out")
    check_token()
    api = HfApi()
    repo = {"repo_id": upload.repo_id, "repo_type": upload.repo_type}
    disable_progress_bars()  # one bar for all is ours
    logging.set_verbosity_error()  # and what there is to say is said by the caller
    with _explained(upload.repo_id, api.endpoint):
        if CARD in upload.files:  # what is wrong with it, before anything large is sent
            RepoCard(upload.files[CARD].read_text(encoding="utf-8")).validate(repo_type=upload.repo_type)
        was_private = _is_private(api, repo)
        if was_private is None:
            api.create_repo(**repo, private=not public, exist_ok=True, space_sdk=upload.sdk)
        elif public is False and not was_private:
            api.update_repo_settings(**repo, private=True)  # before what may be secret arrives
        refs = api.list_repo_refs(**repo)
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        if revision in tags:
            raise UserError(
                f"{upload.repo_id} has a tag {revision}, which cannot be a branch too; choose another, or use --tag"
            )
        branches = {ref.name: ref.target_commit for ref in refs.branches}
        head = commit = branches.get(revision or DEFAULT_REVISION) or api.repo_info(**repo).sha
        changed = _differing(api, repo, upload.files, head)
        stale = _stale(api, repo, upload, head)
        # Nothing is sent for a tag that cannot be set.
        if tag in tags and (changed or stale or tags[tag] != head):
            raise UserError(f"{upload.repo_id} has a tag {tag} already, on another commit; choose another --tag")
        if revision and revision not in branches:
            api.create_branch(**repo, branch=revision)
        if changed or stale:
            additions = _send_large_files(api, repo, {name: upload.files[name] for name in changed}, revision)
            operations = [*additions, *(CommitOperationDelete(name) for name in stale)]
            commit = api.create_commit(**repo, operations=operations, commit_message=message, revision=revision).oid
            lacking = _differing(api, repo, upload.files, commit)
            if lacking:
                raise UserError(
                    f"{upload.repo_id} lacks {len(lacking)} of {len(upload.files)} files after the push, such as "
                    f"{lacking[0]}; push again"
                )
        if tag and tag not in tags:
            api.create_tag(**repo, tag=tag, revision=commit)
        if public and was_private:
            api.update_repo_settings(**repo, private=False)
        is_private = bool(_is_private(api, repo))
        return Pushed(_url(api.endpoint, upload), commit, is_private, commit != head, tuple(stale))


def check_references(**references: str | None):
    """Refuse names that git would not take for a branch or a tag, given by what they are.

    Raises:
        UserError: If one is none.
    """
    for kind, name in references.items():
        if name is None:
            continue
        # The rules of git-check-ref-format that people run into; a commit's name is none for a branch.
        parts = name.split("/")
        bad = not re.fullmatch(r"[\w./+-]+", name) or ".." in name or name.startswith("-") or name.startswith("refs/")
        if (
            bad
            or re.fullmatch("[0-9a-f]{40}", name)
            or any(not part or part.startswith(".") or part.endswith((".", ".lock")) for part in parts)
        ):
            raise UserError(f"got {name!r} as the {kind}, which git does not take; give one such as v1.0")
        if kind == "tag" and name == DEFAULT_REVISION:
            raise UserError(f"got {name} as the tag, which is the branch; give one such as v1.0")


def _differing(api: HfApi, repo: dict[str, str], files: Mapping[str, Path], commit: str) -> list[str]:
    """Names of the files that a commit lacks or holds with another content."""
    there = {info.path: info for info in api.get_paths_info(**repo, paths=list(files), revision=commit)}
    return [name for name, path in files.items() if name not in there or not _is_same(path, there[name])]


def _is_same(path: Path, info: RepoFile) -> bool:
    size = path.stat().st_size
    if size != info.size:
        return False
    with path.open("rb") as file:
        if info.lfs:
            return hashlib.file_digest(file, "sha256").hexdigest() == info.lfs.sha256
        # As git names a file's content.
        return hashlib.sha1(b"blob %d\0" % size + file.read()).hexdigest() == info.blob_id


def _stale(api: HfApi, repo: dict[str, str], upload: Upload, commit: str) -> list[str]:
    """Names of the files which an earlier upload left and this one does not hold."""
    if not upload.replaces:
        return []
    return [
        name
        for name in api.list_repo_files(**repo, revision=commit)
        if name not in upload.files
        and any(name.count("/") == pattern.count("/") and fnmatch(name, pattern) for pattern in upload.replaces)
    ]


def _send_large_files(
    api: HfApi, repo: dict[str, str], files: Mapping[str, Path], revision: str | None
) -> list[CommitOperationAdd]:
    """Upload what goes into large file storage; the rest travels with the commit."""
    sizes = {name: path.stat().st_size for name, path in files.items()}
    # One question for all small files, since each costs a round trip; one for each large file, so that the bar moves.
    small = [name for name in files if sizes[name] < LARGE]
    groups = [small, *([name] for name in sorted(files.keys() - set(small), key=sizes.get))]
    additions = []
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, disable=None) as bar:
        for names in filter(None, groups):
            bar.set_description(names[0] if len(names) == 1 else f"{len(names)} small files")
            group = [CommitOperationAdd(name, files[name]) for name in names]
            api.preupload_lfs_files(**repo, additions=group, revision=revision)
            additions += group
            bar.update(sum(sizes[name] for name in names))
        bar.set_description("done")
    return additions


def _is_private(api: HfApi, repo: dict[str, str]) -> bool | None:
    try:
        return bool(api.repo_info(**repo).private)
    except RepositoryNotFoundError:
        return None


def _url(endpoint: str, upload: Upload) -> str:
    kind = "" if upload.repo_type == "model" else f"{upload.repo_type}s/"
    return f"{endpoint}/{kind}{upload.repo_id}"


@contextmanager
def _explained(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turn what the Hub's client raises into one line."""
    try:
        yield
    except UserError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = one_line(error.server_message or error)
        if status == 401:
            raise UserError(f"the Hub refuses the token; log in again by `hf auth login` ({said})") from None
        if status in (403, 404):
            raise UserError(
                f"the Hub does not let this token write to {repo_id}; take an owner and a token that may ({said})"
            ) from None
        raise UserError(f"the Hub refused {repo_id} (status {status}): {said}") from None
    except OfflineModeIsEnabled:
        raise UserError("got HF_HUB_OFFLINE, under which nothing can be sent; unset it") from None
    # Its client wraps what goes wrong on the way in any of these.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        cause = error.__cause__ or error
        if any(isinstance(each, (HTTPError, ConnectionError, TimeoutError)) for each in (error, cause)):
            raise UserError(
                f"the push to {repo_id} at {endpoint} was cut off ({one_line(cause)}); run the same command again, what has "
                "arrived is not sent twice"
            ) from None
        raise UserError(f"the push to {repo_id} failed: {one_line(cause)}") from None


__all__ = ["Pushed", "Upload", "check_repo_id", "check_token", "push"]
