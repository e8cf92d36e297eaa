"""Checkpoints on the hub: which address names one, fetching it into the hub's cache, uploading one.

`huggingface_hub` reads its environment (HF_HUB_OFFLINE, HF_ENDPOINT, HF_HOME) when it is imported, so it is imported by
the functions that need it.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from vl_mtl_lora.errors import UserError

FILES = ("adapter_config.json", "adapter_model.safetensors", "heads.safetensors", "README.md", "results.json")
_REPO = re.compile(r"\w(?:[-.]?\w)*/\w(?:[-.]?\w)*", re.ASCII)
_REVISION = re.compile(r"\w(?:[-./]?\w)*", re.ASCII)  # so ".." and "//" are none
_LONGEST = 96  # characters of a repository's id, as the hub counts
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


class Address(NamedTuple):
    """USER/NAME and a branch, tag or commit; None: the main branch."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return f"hf://{self.repo}" + (f"@{self.revision}" if self.revision else "")


def hub_address(run: str | Path) -> Address | None:
    """What hf://USER/NAME[@REVISION] names; None of a local path. `Path` makes hf:/ of hf://: that is taken too.

    Raises:
        UserError: an hf:// that is followed by no such name.
    """
    prefix = re.match(r"hf:/{1,2}", str(run))
    if prefix is None:
        return None
    repo, at, revision = str(run)[prefix.end():].partition("@")
    if at and not _REVISION.fullmatch(revision):
        raise UserError(f"{run}: {revision!r} is no name of a branch, tag or commit")
    return Address(check_repo(repo), revision or None)


def check_repo(repo: str) -> str:
    """The id of a repository as it is. Raises UserError for what cannot be one."""
    if not _REPO.fullmatch(repo) or len(repo) > _LONGEST or repo.endswith(".git"):
        raise UserError(f"{repo!r} is no name of a repository on the hub: expected USER/NAME of letters, digits and "
                        f"single - _ . within, at most {_LONGEST} characters")
    return repo


def download(address: Address) -> Path:
    """The folder in the hub's cache that holds a checkpoint's files, and no others. Without network, or with
    HF_HUB_OFFLINE=1, what the cache has of it.

    Raises:
        UserError: there is no such repository or revision, or it can neither be reached nor is it in the cache.
    """
    from huggingface_hub import snapshot_download

    with _told(f"{address} cannot be loaded"):
        folder = Path(snapshot_download(address.repo, revision=address.revision, allow_patterns=list(FILES)))
    if not (folder / FILES[0]).is_file():
        raise UserError(f"{address} holds no checkpoint of vl_mtl_lora: there is no {FILES[0]} in it")
    return folder


def downloaded(folder: str | Path) -> bool:
    """Whether a folder lies in the hub's cache, so that what it says may be a stranger's."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).resolve() in Path(folder).resolve().parents


def upload(address: Address, files: Mapping[str, Path | bytes], *, private: bool, message: str) -> str:
    """Uploads files in one commit, into a repository and a branch that are made where there are none yet.

    Args:
        files: the name of each in the repository, and its path or content.
        private: make the repository a private one.

    Returns:
        The URL of the repository.

    Raises:
        UserError: no token, no right to write, no network, a repository that is public already and should be private.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    api = HfApi()
    with _told(f"cannot push to {address}"):
        if get_token() is None and not constants.HF_HUB_OFFLINE:
            raise UserError(f"cannot push to {address}: there is no token: {_LOGIN}")
        url = str(api.create_repo(address.repo, private=private or None, exist_ok=True))
        if private and not api.repo_info(address.repo).private:
            raise UserError(f"{address} is there already and is public: make it private in its settings, or leave out "
                            "--private")
        if address.revision:
            api.create_branch(address.repo, branch=address.revision, exist_ok=True)
        api.create_commit(address.repo, [CommitOperationAdd(name, content) for name, content in files.items()],
                          commit_message=message, revision=address.revision)
    return url + (f"/tree/{address.revision}" if address.revision else "")


@contextmanager
def _told(failure: str) -> Iterator[None]:
    """Whatever huggingface_hub raises becomes one line that begins with `failure`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # it raises many types, also of the libraries it uses
        raise UserError(f"{failure}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "it is not in the cache, and " + ("HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE or not
                                                error.__cause__ else _reason(error.__cause__))
    if isinstance(error, errors.GatedRepoError):
        return f"its owner grants access on request: ask on its page, then {_LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such branch, tag or commit"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no such repository; for a private one {_LOGIN}"
    if status == 401:
        return f"the hub refuses the token: {_LOGIN}"
    if status == 403:
        return "the token may not: USER must be you or an organisation of yours, and the token one to write with"
    if isinstance(error, errors.HfHubHTTPError):
        return f"{constants.ENDPOINT} answered {status}" + (f": {_line(error.server_message)}"
                                                          if error.server_message else "")
    if isinstance(error, errors.HTTPError):
        return f"{constants.ENDPOINT} cannot be reached: {type(error).__name__}: {_line(error)}"
    if isinstance(error, RuntimeError) and error.__cause__:  # of an upload: names the file
        return f"{_line(error)} {_reason(error.__cause__)}"
    return f"{type(error).__name__}: {_line(error)}"


def _line(text: object) -> str:
    return " ".join(str(text).split())
