"""A stand-in for Google Cloud Storage's XML API, in front of a real S3 server. It is not Google's.

What it does as Google's documentation and other people's measurements say that Google's does:

- `If-None-Match` on a put is ignored;
- `x-goog-if-generation-match: 0` on a put is obeyed;
- headers of both families, x-amz- and x-goog-, in one request are refused (400 ExcessHeaderValues);
- a request with x-goog- headers is taken with Google's own signature alone, GOOG4-HMAC-SHA256;
- every place ("auto") is a signature's place.

Both kinds of signatures are checked here, made with a key that the server behind does not know, and each request is
signed anew for that one.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import http.server
import re
import threading
from types import TracebackType
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

KEY_ID, SECRET = "GOOG1ESTANDIN", "a secret of the stand-in alone"
ERROR = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{}</Code><Message>{}</Message></Error>"
AUTHORIZATION = re.compile(r"(AWS4|GOOG4)-HMAC-SHA256 Credential=(.+), SignedHeaders=(.+), Signature=([0-9a-f]{64})")
KINDS = {"AWS4": ("x-amz-", "s3", "aws4_request"), "GOOG4": ("x-goog-", "storage", "goog4_request")}
"""Of each signature the headers that it must cover, its service and its last word."""


class Google:
    """`with Google(backend, key) as server:` runs it. key: (id, secret), as the server behind knows them.
    `server.environment` holds the variables for gs://, `server.as_s3` those with which s3:// leads here."""

    def __init__(self, backend: str, key: tuple[str, str]) -> None:
        self.backend, self.key = backend, key
        self.key_ids: set[str] = set()
        """Of the keys with which requests were signed."""
        self.signed: list[str] = []
        """Paths of the requests that came with Google's signature."""
        self.deciding = threading.Lock()
        """One conditional put at a time, as Google decides them; the server behind may let two through at once."""
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"google": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = {"GS_ENDPOINT_URL": self.url, "GS_ACCESS_KEY_ID": KEY_ID, "GS_SECRET_ACCESS_KEY": SECRET}
        self.as_s3 = {"AWS_ENDPOINT_URL_S3": self.url, "AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET}

    def __enter__(self) -> Google:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    google: Google

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        names = [name.lower() for name in self.headers]
        googles = any(name.startswith("x-goog-") for name in names)
        if googles and any(name.startswith("x-amz-") for name in names):
            return self._refuse(400, "ExcessHeaderValues", "Requests cannot specify both x-amz and x-goog headers.")
        if wrong := self._wrong(body, names, "GOOG4" if googles else "AWS4"):
            return self._refuse(403, "SignatureDoesNotMatch", wrong)
        if googles:
            self.google.signed.append(self.path)
        if self.headers.get("x-goog-if-generation-match") == "0":
            with self.google.deciding:
                return self._pass_on(body, {"If-None-Match": "*"})
        kept = ("range", "if-match", "content-type") if self.command != "PUT" else ("content-type",)
        return self._pass_on(body, {name: self.headers[name] for name in kept if name in names})

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _wrong(self, body: bytes, names: list[str], kind: str) -> str:
        """What is wrong with a request's signature; "" where nothing is."""
        found = AUTHORIZATION.fullmatch(self.headers.get("Authorization", ""))
        if not found or found[1] != kind:
            return f"no signature of the kind {kind}"
        _, credential, covered, given = found.groups()
        key_id, day, place, service, last = credential.split("/")
        self.google.key_ids.add(key_id)
        family, *words = KINDS[kind]
        if {"host", *(name for name in names if name.startswith(family))} - set(covered.split(";")):
            return "headers that are not signed"
        payload = self.headers[f"{family}content-sha256"]
        if payload not in (hashlib.sha256(body).hexdigest(), "UNSIGNED-PAYLOAD"):
            return "another body"
        path, _, query = self.path.partition("?")
        query = "&".join(sorted(one if "=" in one else f"{one}=" for one in query.split("&") if one))
        lines = "".join(f"{name}:{self.headers[name].strip()}\n" for name in covered.split(";"))
        canonical = f"{self.command}\n{path}\n{query}\n{lines}\n{covered}\n{payload}"
        text = f"{kind}-HMAC-SHA256\n{self.headers[f'{family}date']}\n{day}/{place}/{service}/{last}\n"
        text += hashlib.sha256(canonical.encode()).hexdigest()
        key = f"{kind}{SECRET}".encode()
        for part in (day, place, service, last, text):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        fine = (key_id, service, last) == (KEY_ID, *words)
        return "" if fine and hmac.compare_digest(key.hex(), given) else "another signature"

    def _signed_anew(self, body: bytes, headers: dict[str, str]) -> dict[str, str]:
        """`headers`, and those with which the server behind takes this request."""
        request = AWSRequest(self.command, self.google.backend + self.path, headers, body)
        S3SigV4Auth(Credentials(*self.google.key), "s3", "us-east-1").add_auth(request)
        return dict(request.headers.items())

    def _pass_on(self, body: bytes, headers: dict[str, str]) -> None:
        backend = urlsplit(self.google.backend)
        connection = http.client.HTTPConnection(backend.hostname or "", backend.port, timeout=60)
        try:
            signed = self._signed_anew(body, headers)
            connection.request(self.command, self.path, body or None, {**signed, "Content-Length": str(len(body))})
            answer = connection.getresponse()
            status, sent, data = answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()
        self.send_response_only(status)
        for name, value in sent:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = {name.lower(): value for name, value in sent}.get("content-length", "0")
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, code: str, message: str) -> None:
        data = ERROR.format(code, message).encode()
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
