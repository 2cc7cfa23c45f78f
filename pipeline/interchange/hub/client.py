"""A repository of the Hugging Face hub, by the interface of huggingface_hub. Only this module imports it.

Large files go by Git LFS, which the hub takes from every client, and not by hf_xet, whose protocol no test here speaks.
The client tells the hub no more than its own version, huggingface_hub's and Python's: telemetry is off.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pipeline
from pipeline.errors import ConfigError, LatentmillError, StorageError
from pipeline.models.encoders.fetched import quiet_hub_clients
from pipeline.parsing.text import one_line

T = TypeVar("T")
LIBRARY: dict[str, Any] = {"library_name": "latentmill", "library_version": pipeline.__version__}
TOKEN = "HF_TOKEN"
MAIN = "main"
HTTP = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
"""Packages whose errors are the network's."""
AGAIN = (408, 429, 500, 502, 503, 504)
"""HTTP statuses of requests that may do better later."""
SECONDS = 120.0
"""Of silence after which a request has failed; huggingface_hub waits for ever."""
MOVED = (409, 412)
"""HTTP statuses of a commit onto what is no longer the newest."""
LOCAL = re.compile(r"http://(127\.0\.0\.1|localhost|\[::1\])(:\d+)?(/|$)")


class Again(StorageError):
    """The hub or the way to it failed for now."""


class Moved(StorageError):
    """Others committed in the meantime."""


@dataclass(frozen=True)
class Remote:
    """A file of a repository. sha256: of a file of Git LFS, "" of any other. blob: git's hash of any other."""

    size: int
    sha256: str
    blob: str


class Hub:
    """A branch of a model's repository.

    Raises ConfigError without a token, offline, and for an address of the hub over which the token could be read.
    From here on every request that huggingface_hub makes in this process fails after SECONDS without an answer.
    """

    def __init__(self, repo: str, branch: str = MAIN) -> None:
        self.repo, self.branch = repo, branch
        self.url = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
        token = os.environ.get(TOKEN, "").strip()
        if not token:
            raise ConfigError(
                f"push=hub:{repo}: {TOKEN} is not set: make a token that may write at {self.url}/settings/tokens, and "
                f"give it by the environment ({TOKEN}=... latentmill export ...)"
            )
        if not self.url.startswith("https://") and not LOCAL.match(self.url):
            raise ConfigError(f"HF_ENDPOINT={self.url}: a token is sent over https:// alone; give such an address")
        import huggingface_hub
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            raise ConfigError(f"push=hub:{repo}: HF_HUB_OFFLINE is set; unset it, or export without push")
        self._api = huggingface_hub.HfApi(endpoint=self.url, token=token, **LIBRARY)
        huggingface_hub.set_client_factory(_client)

    @property
    def page(self) -> str:
        """The address of the repository."""
        return f"{self.url}/{self.repo}"

    def is_private(self) -> bool | None:
        """Whether the repository is private; None where there is none that the token may see."""
        try:
            return bool(self._call("read", lambda: self._api.repo_info(self.repo, timeout=SECONDS)).private)
        except _Missing:
            return None

    def may_write(self) -> bool:
        """False where the hub says that the token may only read. It says nothing of a fine-grained token, whose rights
        show at the first request that writes."""
        try:
            told = self._call("read", self._api.whoami)
        except (Again, _Missing):
            return True
        role = ((told.get("auth") or {}).get("accessToken") or {}).get("role")
        return role != "read"

    def head(self) -> str | None:
        """The hash of the branch's newest commit; None where there is no such branch."""
        try:
            info = self._call("read", lambda: self._api.repo_info(self.repo, revision=self.branch, timeout=SECONDS))
        except _Missing:
            return None
        if not isinstance(info.sha, str):
            raise StorageError(f"{self.url} names no commit of {self.repo}: is it a hub?")
        return info.sha

    def create(self, *, public: bool) -> None:
        """Make the repository, where there is none, and the branch, where it is another than main."""
        self._call("create", lambda: self._api.create_repo(self.repo, private=not public, exist_ok=True))
        if self.branch != MAIN:
            self._call("write", lambda: self._api.create_branch(self.repo, branch=self.branch, exist_ok=True))

    def files(self, commit: str) -> dict[str, Remote]:
        """The files of a commit, by path."""

        def listed() -> dict[str, Remote]:  # list_repo_tree takes no time-out
            info = self._api.model_info(self.repo, revision=commit, files_metadata=True, timeout=SECONDS)
            return {
                entry.rfilename: Remote(entry.size or 0, entry.lfs.sha256 if entry.lfs else "", str(entry.blob_id))
                for entry in info.siblings or ()
            }

        return self._call("read", listed)

    def read(self, path: str, commit: str, most: int) -> bytes:
        """The bytes of a small file of a commit. Raises StorageError for more than `most` bytes."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import hf_raise_for_status, http_backoff

        def fetched() -> bytes:
            url = hf_hub_url(self.repo, path, revision=commit, endpoint=self.url)
            answer = http_backoff("GET", url, headers=self._headers())
            hf_raise_for_status(answer)
            return bytes(answer.content)

        data = self._call("read", fetched)
        if len(data) > most:
            raise StorageError(f"{self.page}: {path} has {len(data):,} bytes, more than {most:,}")
        return data

    def validate(self, card: str) -> None:
        """Raise ConfigError for a README.md whose metadata the hub would refuse in a commit."""
        from huggingface_hub.utils import hf_raise_for_status, http_backoff

        def validated() -> None:
            answer = http_backoff(
                "POST",
                f"{self.url}/api/validate-yaml",
                headers=self._headers(),
                json={"content": card, "repoType": "model"},
            )
            if answer.status_code == 400:
                said = "; ".join(str(error.get("message")) for error in answer.json().get("errors", []))
                raise ConfigError(
                    f"the hub refuses the metadata of README.md ({_short(said)}): mend license= or datasets=, or the "
                    "README.md of dest, where it is yours"
                )
            hf_raise_for_status(answer)

        self._call("read", validated)

    def additions(self, files: Mapping[str, Path]) -> list[Any]:
        """What `upload` and `commit` take, by path there -> file here."""
        from huggingface_hub import CommitOperationAdd

        return [CommitOperationAdd(path_in_repo=path, path_or_fileobj=file) for path, file in files.items()]

    def upload(self, addition: Any) -> None:
        """Send a file's bytes, where it is one of Git LFS and the hub has not got them already: no commit names them
        yet. Raises ConfigError for a file that .gitignore there names: a commit would be without it."""
        self._call(
            "write",
            lambda: self._api.preupload_lfs_files(
                self.repo, additions=[addition], revision=self.branch, free_memory=False
            ),
        )
        if getattr(addition, "_should_ignore", False):  # as the hub has just answered
            raise ConfigError(
                f"{self.page}: its .gitignore leaves out {addition.path_in_repo}, which is to be pushed: take that "
                "line out there, or choose another push="
            )

    def commit(self, additions: Sequence[Any], deleted: Sequence[str], message: str, parent: str) -> str:
        """One commit of all; its hash. Raises Moved where `parent` is not the newest any more."""
        from huggingface_hub import CommitOperationDelete

        operations = [*additions, *(CommitOperationDelete(path_in_repo=path) for path in deleted)]
        info = self._call(
            "write",
            lambda: self._api.create_commit(
                self.repo, operations, commit_message=message, revision=self.branch, parent_commit=parent
            ),
        )
        return str(info.oid)

    def _headers(self) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers

        return build_hf_headers(token=self._api.token, **LIBRARY)

    def _call(self, what: str, request: Callable[[], T]) -> T:
        """A request, whose errors become ours. what: the token's right that it needs, for messages."""
        try:
            with quiet_hub_clients(), _private():
                return request()
        except LatentmillError:
            raise
        except Exception as error:
            self._fail(what, error)

    def _fail(self, what: str, error: Exception) -> NoReturn:
        chain: list[BaseException] = []
        link: BaseException | None = error
        while link is not None and link not in chain:
            chain.append(link)
            link = link.__cause__ or link.__context__
        answered = next((one for one in chain if getattr(one, "response", None) is not None), None)
        if answered is not None:
            raise self._refused(what, answered) from error
        for one in chain:
            if type(one).__module__.partition(".")[0] in HTTP or isinstance(one, ConnectionError | TimeoutError):
                raise Again(f"cannot reach {self.url} ({type(one).__name__}: {_short(str(one))})") from error
        if isinstance(chain[-1], OSError):
            raise StorageError(f"cannot read what is to be pushed ({_short(str(chain[-1]))})") from error
        for one in chain:
            if isinstance(one, ValueError | KeyError | TypeError):
                raise StorageError(
                    f"{self.url} answers otherwise than the hub ({type(one).__name__}: {_short(str(one))})"
                ) from error
        raise error

    def _refused(self, what: str, error: BaseException) -> Exception:
        """The error of ours for an answer of the hub."""
        response = error.response  # type: ignore[attr-defined]
        status = int(response.status_code)
        said = _short(str(response.headers.get("x-error-message") or getattr(error, "server_message", "") or ""))
        because = f" ({said})" if said else ""
        if status == 401:
            return ConfigError(
                f"{self.url} does not take the token of {TOKEN}{because}: make another at {self.url}/settings/tokens"
            )
        if status == 403 and "authorization" not in response.request.headers:  # an address that has run out
            return Again(f"the storage of {self.page} answers 403 to an upload{because}")
        if status == 403:
            return ConfigError(
                f"the token of {TOKEN} may not {what} {self.repo}{because}: make one with the right to write there, or "
                "choose another push="
            )
        if status == 404:
            return _Missing(f"{self.page} has no such repository, branch or file{because}")
        if status in MOVED:
            return Moved(f"{self.page} was committed to by others in the meantime{because}")
        if status in AGAIN:
            return Again(f"{self.url} answers {status}{because}")
        return StorageError(f"{self.url} refuses the request with status {status}{because}")


def _client() -> Any:
    """What huggingface_hub makes its requests with: as by default, but for the time-out and the name of the client."""
    from huggingface_hub.utils import _http, build_hf_headers

    client = _http.default_client_factory()
    client.timeout = SECONDS  # type: ignore[assignment]
    client.headers["user-agent"] = build_hf_headers(token=False, **LIBRARY)["user-agent"]
    return client


class _Missing(StorageError):
    """There is no such repository, branch or file."""


@contextmanager
def _private() -> Iterator[None]:
    """A context in which huggingface_hub tells nothing of this machine, draws no bars, and uploads by Git LFS."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    wanted = {"HF_HUB_DISABLE_TELEMETRY": True, "HF_HUB_DISABLE_XET": True}
    before = {name: getattr(constants, name) for name in wanted}
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    for name, value in wanted.items():
        setattr(constants, name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own calls of other packages
            yield
    finally:
        for name, value in before.items():
            setattr(constants, name, value)


def _short(text: str) -> str:
    """At most 200 characters of what the hub says, in one safe line."""
    line = one_line(text)
    return line if len(line) <= 200 else f"{line[:200]}..."
