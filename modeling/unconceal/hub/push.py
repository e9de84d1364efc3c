"""Sending a folder to the Hub: whole or not at all, and what has arrived is not sent twice."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars, logging, validate_repo_id
from tqdm import tqdm

from ..errors import UserError, one_line
from ..files import is_hub_id


LARGE = 2**20  # bytes


@dataclass(frozen=True)
class Upload:
    """Files and where they go.

    Attributes:
        repo_id: "owner/name".
        repo_type: "model", "dataset" or "space".
        files: Path in the repository -> file here.
        replaces: Patterns of files which an earlier upload left and this one does not hold: they are removed.
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
    """

    url: str
    commit: str
    is_private: bool
    is_new: bool


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
    check_token()
    api = HfApi()
    repo = {"repo_id": upload.repo_id, "repo_type": upload.repo_type}
    disable_progress_bars()  # one bar for all is ours
    logging.set_verbosity_error()  # and what there is to say is said by the caller
    with _explained(upload.repo_id, api.endpoint):
        was_private = _is_private(api, repo)
        if was_private is None:
            api.create_repo(**repo, private=not public, exist_ok=True, space_sdk=upload.sdk)
        elif public is False and not was_private:
            api.update_repo_settings(**repo, private=True)  # before what may be secret arrives
        if revision:
            api.create_branch(**repo, branch=revision, exist_ok=True)
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(**repo).tags}
        head = api.repo_info(**repo, revision=revision).sha
        taken = f"{upload.repo_id} has a tag {tag} already, on another commit; choose another --tag"
        if tags.get(tag, head) != head:
            raise UserError(taken)
        additions = _send_large_files(api, repo, upload.files, revision)
        there = api.list_repo_files(**repo, revision=revision)
        stale = [
            name
            for name in there
            if name not in upload.files and any(fnmatch(name, pattern) for pattern in upload.replaces)
        ]
        commit = api.create_commit(
            **repo,
            operations=[*additions, *(CommitOperationDelete(name) for name in stale)],
            commit_message=message,
            revision=revision,
        ).oid
        _check_arrived(api, repo, upload.files, commit)
        if tags.get(tag, commit) != commit:
            raise UserError(f"the files are there, as commit {commit}, but {taken}")
        if tag and tag not in tags:
            api.create_tag(**repo, tag=tag, revision=commit)
        if public and was_private:
            api.update_repo_settings(**repo, private=False)
        is_private = bool(_is_private(api, repo))
        return Pushed(_url(api.endpoint, upload), commit, is_private, is_new=commit != head)


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


def _check_arrived(api: HfApi, repo: dict[str, str], files: Mapping[str, Path], commit: str):
    found = {info.path: info.size for info in api.get_paths_info(**repo, paths=list(files), revision=commit)}
    lacking = [name for name, path in files.items() if found.get(name) != path.stat().st_size]
    if lacking:
        raise UserError(
            f"{repo['repo_id']} lacks {len(lacking)} of {len(files)} files after the push, such as {lacking[0]}; push again"
        )


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
    # Its client wraps what goes wrong on the way in any of these.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        cause = error.__cause__ or error
        raise UserError(
            f"the push to {repo_id} at {endpoint} was cut off ({one_line(cause)}); run the same command again, what has "
            "arrived is not sent twice"
        ) from None


__all__ = ["Pushed", "Upload", "check_repo_id", "check_token", "push"]
