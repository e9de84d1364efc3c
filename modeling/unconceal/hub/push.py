"""Send files to the Hub as one commit: all or nothing."""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, HfFileSystem, RepoCard, get_token
from huggingface_hub.constants import DEFAULT_REVISION
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, logging, validate_repo_id
from huggingface_hub.utils.sha import git_hash

from ..utils.errors import UserError, one_line
from ..utils.files import file_sha256, is_hub_id
from .card_on_hub import CARD


CUT_OFF = (HTTPError, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Upload:
    """Hold files and where they go."""

    repo_id: str  # owner/name
    repo_type: str  # "model", "dataset" or "space"
    files: Mapping[str, Path]  # path in the repository -> local file
    replaces: tuple[str, ...] = ()  # patterns of earlier files; matches that are not in `files` are removed
    sdk: str | None = None  # of a Space


def check_token():
    """Raise `UserError` without a token of the Hub."""
    if not get_token():
        raise UserError("got no token of the Hub; log in with `hf auth login`, or set HF_TOKEN")


def check_names(repo_id: str, revision: str | None = None, tag: str | None = None):
    """Raise `UserError` for names that the Hub or git would not accept."""
    try:
        if not is_hub_id(repo_id):
            raise HFValidationError("it has no owner, or forbidden characters")
        validate_repo_id(repo_id)
    except HFValidationError as error:
        expected = "expected owner/name, such as org/run-cos"
        raise UserError(f"got {repo_id!r} as the repository, {expected}: {one_line(error)}") from error
    for kind, name in (("revision", revision), ("tag", tag)):
        if name is None:
            continue
        # The rules of git-check-ref-format that people run into. A commit's id cannot name a branch.
        parts = name.split("/")
        if (
            not re.fullmatch(r"[\w./+-]+", name)
            or ".." in name
            or name.startswith(("-", "refs/"))
            or re.fullmatch("[0-9a-f]{40}", name)
            or any(not part or part.startswith(".") or part.endswith((".", ".lock")) for part in parts)
        ):
            raise UserError(f"got {name!r} as the {kind}, which git does not accept; choose one such as v1.0")
    if tag == DEFAULT_REVISION:
        raise UserError(f"got {tag} as the tag, which is the branch; choose one such as v1.0")


def push(
    upload: Upload, message: str, public: bool | None = None, revision: str | None = None, tag: str | None = None
) -> str:
    """Send an upload as one commit.

    Large files are sent first. The commit that makes them visible comes last, so nobody sees half an upload. After an
    interruption the same call sends only what is missing.

    Args:
        upload: What to send.
        message: Commit message.
        public: Whether everybody may see it. None makes a new repository private and leaves an existing one as it is.
        revision: Branch, created if missing; the main one by default.
        tag: Name for the commit.

    Returns:
        A report for people: address, visibility, commit, removed files of an earlier upload.

    Raises:
        UserError: If the Hub cannot be reached or refuses the name, the token or a file, or if the tag is taken.
    """
    check_names(upload.repo_id, revision, tag)
    api = HfApi()
    repo = {"repo_id": upload.repo_id, "repo_type": upload.repo_type}
    logging.set_verbosity_error()  # the report says what matters
    if not sys.stderr.isatty():
        disable_progress_bars()
    with _explained(upload.repo_id, api.endpoint):
        check_card(upload)
        if not api.repo_exists(**repo):
            api.create_repo(**repo, private=not public, exist_ok=True, space_sdk=upload.sdk)
        elif public is False and not api.repo_info(**repo).private:
            api.update_repo_settings(**repo, private=True)  # before files arrive that may be secret
        refs = api.list_repo_refs(**repo)
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        branches = {ref.name: ref.target_commit for ref in refs.branches}
        if revision in tags:
            advice = "choose another, or use --tag"
            raise UserError(f"{upload.repo_id} has a tag {revision}, which cannot be a branch too; {advice}")
        head = commit = branches.get(revision or DEFAULT_REVISION) or api.repo_info(**repo).sha
        changed, stale, present = _compare(api, repo, upload, head)
        replaces_card = CARD in changed and CARD in present
        if tag in tags and (changed or stale or tags[tag] != head):  # nothing is sent yet
            raise UserError(f"{upload.repo_id} has a tag {tag} already, on another commit; choose another --tag")
        if revision and revision not in branches:
            api.create_branch(**repo, branch=revision)
        if changed or stale:
            # Not `upload_folder`: with hf_xet, which is its default, it splits a long upload into several commits.
            operations = [CommitOperationAdd(name, upload.files[name]) for name in changed]
            operations += [CommitOperationDelete(name) for name in stale]
            commit = api.create_commit(**repo, operations=operations, commit_message=message, revision=revision).oid
            missing, *_ = _compare(api, repo, upload, commit)  # such as files that a .gitignore there excludes
            if missing:
                what = f"{len(missing)} of {len(upload.files)} files after the push, such as {missing[0]}"
                raise UserError(f"{upload.repo_id} lacks {what}; check its .gitignore and push again")
        if tag and tag not in tags:
            api.create_tag(**repo, tag=tag, revision=commit)
        if public and api.repo_info(**repo).private:
            api.update_repo_settings(**repo, private=False)
        is_private = api.repo_info(**repo).private
    kind = "" if upload.repo_type == "model" else f"{upload.repo_type}s/"
    unchanged = "; nothing has changed since" if commit == head else ""
    replaced = f"\nreplaced {CARD}; commit {head} has the one before" if replaces_card else ""
    removed = f"\nremoved files of an earlier push: {', '.join(stale)}" if stale else ""
    seen_by = "private" if is_private else "public"
    return f"{api.endpoint}/{kind}{upload.repo_id} ({seen_by}), commit {commit}{unchanged}{replaced}{removed}"


def read_card(repo_id: str, repo_type: str, revision: str | None = None) -> str | None:
    """Return the card in a repository, or None without one.

    A branch that does not exist yet will begin with the card of the main one.

    Raises:
        UserError: If the name is none of the Hub's, or the Hub cannot be reached.
    """
    check_names(repo_id)
    api, repo = HfApi(), {"repo_id": repo_id, "repo_type": repo_type}
    with _explained(repo_id, api.endpoint):
        if not api.repo_exists(**repo):
            return None
        branches = {ref.name: ref.target_commit for ref in api.list_repo_refs(**repo).branches}
        commit = branches.get(revision) or branches.get(DEFAULT_REVISION)
        if not commit or not api.file_exists(repo_id, CARD, repo_type=repo_type, revision=commit):
            return None
        path = api.hf_hub_download(repo_id, CARD, repo_type=repo_type, revision=commit)
        return Path(path).read_text(encoding="utf-8", errors="replace")


def list_files(repo_id: str, repo_type: str) -> list[str]:
    """Return the files of a repository; none if it does not exist.

    Raises:
        UserError: If the Hub cannot be reached, or the name is none of its.
    """
    check_names(repo_id)
    api = HfApi()
    with _explained(repo_id, api.endpoint):
        if not api.repo_exists(repo_id, repo_type=repo_type):
            return []
        return api.list_repo_files(repo_id, repo_type=repo_type)


@contextmanager
def open_file(repo_id: str, repo_type: str, path: str) -> Iterator[BinaryIO]:
    """Open a file in a repository without downloading all of it.

    Raises:
        UserError: If the Hub cannot be reached, or there is no such file.
    """
    api = HfApi()
    with _explained(repo_id, api.endpoint), HfFileSystem().open(f"{repo_type}s/{repo_id}/{path}", "rb") as file:
        yield file


def check_card(upload: Upload):
    """Let the Hub check the card before anything is created or sent.

    Raises:
        UserError: If the Hub refuses it, for example for an unknown license. Errors of the connection pass.
    """
    try:
        RepoCard(upload.files[CARD].read_text(encoding="utf-8")).validate(repo_type=upload.repo_type)
    except ValueError as error:
        raise UserError(f"the Hub refuses the card of {upload.repo_id}: {one_line(error)}; correct it") from error


def _compare(api: HfApi, repo: dict[str, str], upload: Upload, commit: str) -> tuple[list[str], list[str], set[str]]:
    """Return names of files to send, stale files, and all present ones."""
    entries = api.list_repo_tree(**repo, recursive=True, revision=commit)
    present = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    changed = [name for name, path in upload.files.items() if name not in present or not _is_same(path, present[name])]
    stale = [
        name
        for name in present.keys() - upload.files.keys()
        if any(name.count("/") == pattern.count("/") and fnmatch(name, pattern) for pattern in upload.replaces)
    ]
    return changed, sorted(stale), set(present)


def _is_same(path: Path, info: RepoFile) -> bool:
    if path.stat().st_size != info.size:
        return False
    if not info.lfs:
        return git_hash(path.read_bytes()) == info.blob_id
    return file_sha256(path) == info.lfs.sha256


@contextmanager
def _explained(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turn errors of the Hub's client into one line."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = one_line(error.server_message or error)
        if status == 401:
            raise UserError(f"the Hub refuses the token; log in again with `hf auth login` ({reason})") from error
        if status in (403, 404):
            what = f"the Hub does not let this token write to {repo_id}"
            raise UserError(f"{what}; use an owner and a token that may ({reason})") from error
        raise UserError(f"the Hub refused {repo_id} (status {status}): {reason}") from error
    except OfflineModeIsEnabled as error:
        raise UserError("got HF_HUB_OFFLINE, which forbids sending; unset it") from error
    except json.JSONDecodeError as error:
        raise UserError(f"the answer of {endpoint} is not that of a Hub; check HF_ENDPOINT and the proxy") from error
    # The client wraps failures of the network in any of these.
    except (HTTPError, OSError, RuntimeError) as error:
        cause = error.__cause__ or error
        where = f"the push to {repo_id} at {endpoint}"
        if isinstance(error, CUT_OFF) or isinstance(cause, CUT_OFF):
            advice = "rerun the command, uploaded files are skipped"
            raise UserError(f"{where} was cut off ({one_line(cause)}); {advice}") from error
        raise UserError(f"{where} failed: {one_line(cause)}") from error
