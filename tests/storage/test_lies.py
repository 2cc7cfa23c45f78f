"""A store that lies, by mistake or on purpose, ends in one line within a bounded time and memory, or is asked again."""

from __future__ import annotations

import http.server
import resource
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest

from pipeline.errors import StorageError
from pipeline.storage.urls import open_storage

ITEM = "<Contents><Key>{}</Key><Size>{}</Size>{}</Contents>"
ETAG = '<ETag>"e"</ETag>'


def listing(inside: str) -> bytes:
    return f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name>{inside}</ListBucketResult>'.encode()


class _Liar(http.server.BaseHTTPRequestHandler):
    """Answers every request with `headers`, then `body`; `drip` seconds lie between its bytes."""

    headers_sent: ClassVar[dict[str, str]] = {}
    body: ClassVar[bytes | Callable[[str], bytes]] = b""
    drip: ClassVar[float] = 0.0
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        body = self.body if isinstance(self.body, bytes) else type(self).body(self.path)  # type: ignore[operator,misc]
        self.send_response(200)
        for name, value in ({"Content-Length": str(len(body))} | self.headers_sent).items():
            if value:
                self.send_header(name, value)
        self.close_connection = True
        try:
            self.end_headers()
            if self.command == "HEAD":
                return
            for piece in [body] if not self.drip else [body[i : i + 1] for i in range(len(body))]:
                self.wfile.write(piece)
                time.sleep(self.drip)
        except OSError:
            pass  # the client had enough

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def liar(_aws: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Liar]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Liar)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    _aws.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
    _aws.setenv("AWS_ACCESS_KEY_ID", "key")
    _aws.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr("pipeline.storage.patience.PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr("pipeline.storage.patience.STRANGER_SECONDS", 0.3)
    _Liar.headers_sent, _Liar.body, _Liar.drip, _Liar.asked = {"ETag": '"e"'}, b"x" * 100, 0.0, []
    yield _Liar
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("length", [10**15, 50 * 10**9, 2**63, -5, "many"])
def test_a_length_that_is_a_lie_ends_in_one_line_without_the_memory_for_it(liar: type[_Liar], length: Any) -> None:
    liar.headers_sent = {"ETag": '"e"', "Content-Length": str(length)}
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(StorageError, match="s3://b/key"):
        open_storage("s3://b").get("key")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert time.monotonic() - began < 5


def test_an_object_without_an_etag_is_read(liar: type[_Liar]) -> None:
    liar.headers_sent = {}
    assert open_storage("s3://b").get("key") == b"x" * 100
    assert open_storage("s3://b").stat("key").size == 100


def test_a_body_without_an_etag_that_breaks_off_begins_anew(liar: type[_Liar]) -> None:
    liar.headers_sent, liar.body = {"Content-Length": "150"}, lambda path: b"x" * 100
    with pytest.raises(StorageError, match="the body broke off"):
        open_storage("s3://b").get("key")


@pytest.mark.parametrize("length", ["", "-5", "abc"])
def test_a_head_without_a_length_is_one_line(liar: type[_Liar], length: str) -> None:
    liar.headers_sent = {"ETag": '"e"', "Content-Length": length}
    with pytest.raises(StorageError, match="s3://b/key"):
        open_storage("s3://b").stat("key")


@pytest.mark.parametrize(
    ("inside", "says"),
    [
        (ITEM.format("a", "-1", ETAG), "size -1"),
        (ITEM.format("a", "abc", ETAG), "cannot be read"),
        (ITEM.format("a", 2**70, ETAG), "size"),
        ("<Contents><Key>a</Key></Contents>", "no size"),
        (ITEM.format("other/a", 5, ETAG), "holds 'other/a'"),
        (ITEM.format("p/a", 5, ETAG) + "<IsTruncated>true</IsTruncated>", "nothing does"),
        ("<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>", "nothing does"),
        (
            ITEM.format("p/a", 5, ETAG)
            + "<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>",
            "nothing does",
        ),
    ],
)
def test_a_listing_that_lies_or_never_ends_is_one_line(liar: type[_Liar], inside: str, says: str) -> None:
    liar.body = listing(inside)
    prefix = "" if "other" not in inside else "p/"
    with pytest.raises(StorageError, match=says):
        open_storage("s3://b").list(prefix)


def test_pages_with_new_tokens_that_bring_nothing_end(liar: type[_Liar]) -> None:
    more = "<IsTruncated>true</IsTruncated><NextContinuationToken>{}</NextContinuationToken>"
    liar.body = lambda path: listing(more.format(len(liar.asked)))
    with pytest.raises(StorageError, match="nothing does"):
        open_storage("s3://b").list()


def test_an_empty_answer_is_no_empty_folder(liar: type[_Liar]) -> None:
    liar.body = b""
    with pytest.raises(StorageError, match="s3://b"):
        open_storage("s3://b").list()
    assert len(liar.asked) > 1


@pytest.mark.parametrize("body", [b"<html>login</html>", b"not xml", b"<a" * 1000, b"\x00" * 50])
def test_an_answer_of_something_else_is_one_line(liar: type[_Liar], body: bytes) -> None:
    liar.body = body
    with pytest.raises(StorageError, match="s3://b"):
        open_storage("s3://b").list()


def test_a_listing_without_etags_is_read(liar: type[_Liar]) -> None:
    liar.body = listing(ITEM.format("a", 5, ""))
    assert [(info.key, info.size) for info in open_storage("s3://b").list()] == [("a", 5)]


def test_an_answer_that_drips_is_given_up(liar: type[_Liar], monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then, so that no timeout of silence ever passes."""
    monkeypatch.setattr("pipeline.storage.pace.SLOW_SECONDS", 0.4)
    liar.drip = 0.05
    began = time.monotonic()
    with pytest.raises(StorageError, match="s3://b/key: the body broke off"):
        open_storage("s3://b").get("key")
    assert time.monotonic() - began < 5


def test_a_slow_but_steady_answer_is_waited_for(liar: type[_Liar], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.pace.SLOW_SECONDS", 0.1)
    monkeypatch.setattr("pipeline.storage.pace.LEAST_RATE", 5.0)
    liar.drip, liar.body = 0.02, b"x" * 20
    assert open_storage("s3://b").get("key") == b"x" * 20


@pytest.mark.parametrize("marker", ["", "plans/", "claims/", "a//b", "./c", "x/../y", "/"])
def test_keys_that_stand_for_folders_or_cannot_be_asked_for_are_no_objects(s3: str, marker: str) -> None:
    from pipeline.storage.s3 import s3_client

    bucket = s3.removeprefix("s3://").partition("/")[0]
    prefix = s3.removeprefix("s3://").partition("/")[2]
    s3_client().put_object(Bucket=bucket, Key=f"{prefix}/m/{marker}" if prefix else f"m/{marker}", Body=b"")
    store = open_storage(f"{s3}/m")
    store.put("00000.tar", b"x")
    assert [info.key for info in store.list()] == ["00000.tar"]
