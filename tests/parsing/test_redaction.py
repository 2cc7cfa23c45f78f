"""One function says what is secret: the table of kinds, and of what looks like one and is none."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.parsing import redaction
from pipeline.parsing.redaction import REDACTED, hide, is_secret_name, redact, redact_values

PASSWORDS = [
    "pass",
    "p/q",
    "p@q",
    "p@q/r@s",
    "p:q",
    "p#q",
    "p?q=r",
    "p%40q",
    "p q",
    "1p",
    "p'q",
    "p\\q",
    "://p",
    "пароль",
]
"""What stands between the colon and the @ of a URL."""

SECRETS = {
    "a user alone": ("https://{}@github.com/a/b.git", "ghpxuser"),
    "a password without a user": ("redis://{}@host:6379/0", ":hunter2"),
    "AWS, version 4": ("https://b.s3.amazonaws.com/x?X-Amz-Date=1&X-Amz-Signature={}&X-Amz-Expires=3", "0a1b2c"),
    "AWS's credential": ("https://b.s3.amazonaws.com/x?X-Amz-Credential={}", "AKEXAMPLE%2F20261129"),
    "AWS's session": ("https://b.s3.amazonaws.com/x?a=1&x-amz-security-token={}", "FwoGZXIvYXdzE"),
    "AWS, version 2": ("https://b.s3.amazonaws.com/x?AWSAccessKeyId=1&Expires=2&Signature={}", "vjbyPxybdZ%3D"),
    "Google": ("https://storage.googleapis.com/b/x?X-Goog-Signature={}", "0a1b2c"),
    "Azure": ("https://a.blob.core.windows.net/c/x?sv=2024&se=2026&sp=r&sig={}", "a%2Fb%3D"),
    "CloudFront": ("https://d.cloudfront.net/x?Expires=1&Policy={}", "eyABC_"),
    "a token in a query": ("https://h/x?access_token={}&b=2", "abcdef"),
    "a token after a hash": ("https://h/x#access_token={}", "abcdef"),
    "a URL in HTML": ('<a href="https://h/x?a=1&amp;sig={}">', "abcdef"),
    "an id of AWS": ("the key {} is unknown", "AKIAIOSFODNN7EXAMPLE"),
    "a temporary id of AWS": ("({})", "ASIAIOSFODNN7EXAMPLE"),
    "an id of Google's": ("the key {} is unknown", "GOOG1EXAMPLE0123456789ABCDEFGHIJ"),
    "AWS's key by name": ("aws_secret_access_key = {}", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
    "Hugging Face": ("cannot log in with {}.", "hf_abcdefghijklmnopqrstuvwxyz0123456"),
    "GitHub": ("remote: {}", "ghp_abcdefghijklmnopqrstuvwxyz0123456789"),
    "GitHub, fine-grained": ("remote: {}", "github_pat_11ABCDEFG0abcdefghij_klmnop"),
    "GitLab": ("remote: {}", "glpat-abcdefghij0123456789"),
    "OpenAI": ("Incorrect API key provided: {}", "sk-proj-abcdefghij0123456789"),
    "Slack": ("{}", "xoxb-1234567890-abcdef"),
    "Google's API": ("{}", "AIzaSyA1234567890abcdefghijklmnopqrstuv"),
    "wandb": ("WANDB_API_KEY={}", "0123456789abcdef0123456789abcdef01234567"),
    "wandb's netrc": ("machine api.wandb.ai login user password {}", "0123456789abcdef0123456789abcdef01234567"),
    "a bearer": ("Bearer {}", "abc.def-123_456"),
    "a header": ("Authorization: {}", "Basic dXNlcjpwYXNz"),
    "a header in JSON": ('{{"authorization": "{}"}}', "Token abc def"),
    "a cookie": ("Set-Cookie: {}", "session=abc; Path=/"),
    "a JWT": ("jwt {} was refused", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc-_def"),
    "a private key": (
        "before\n{}\nafter",
        "-----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl\n-----END OPENSSH PRIVATE KEY-----",
    ),
    "a private key that is cut": ("{}", "-----BEGIN RSA PRIVATE KEY-----\nMIIE"),
    "password=": ("password={}", "hunter2"),
    "password: ": ("the password: {} is wrong", "hunter2"),
    "a password with a comma": ("x password={} y", "a,b"),
    "a quoted password": ("password='{}', user='me'", "a b, c"),
    "a command line": ("curl --password {} https://h", "hunter2"),
    "JSON": ('{{"client_secret": "{}", "n": 1}}', 'a b\\"c'),
    "JSON in JSON": ('"{{\\"api_key\\": \\"{}\\"}}"', "a b c"),
    "YAML": ("tracking:\n  wandbToken: {}\n", "abcdef"),
    "Python": ("{{'db': {{'PASSWORD': '{}'}}}}", "x,y"),
    "a dotted name": ("db.main.password={}", "hunter2"),
    "PHP's arrow": ("'passwd' => '{}'", "hunter2"),
}
"""kind: (a text, the secret in it)."""

HARMLESS = [
    "tokens=77",
    "text_tokens=7",
    "caption_key=json:caption",
    "encoders.text_pad=49407, text.pad_token=0",
    "a key and a token, a secret garden, the password to heaven",
    "a bearer flag carrier with a basic understanding of signatures",
    "runs/a=b,optim.lr=1e-3/checkpoints/000000000064",
    "/home/me/caches/k=v (copy)/x.tar",
    "s3://bucket/prefix/{00000..00009}.tar",
    "s3://bucket/a@b/c.tar",
    "http://127.0.0.1:9000/bucket/a@2x.png and http://[::1]:9000/a@b",
    "bob@example.com",
    "manifest 3f2a9c0d1e4b: 0123456789abcdef0123456789abcdef01234567 is its SHA-1",
    "sha256=0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
    "optim.lrr: no such key; did you mean optim.lr? (keys of optim: name, lr, betas)",
    "key: 000000001, 12:30:44",
    "https://h/x?a=1&list-type=2&prefix=b%2Fc",
    "password=[redacted] token=${oc.env:TOKEN} api_key=null",
    "",
]


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("scheme", ["s3", "https", "postgresql+psycopg2"])
def test_a_url_loses_its_user_and_password_whatever_they_hold(scheme: str, password: str) -> None:
    for text, after in (("{}", "x"), ("cannot read {}: timed out", "x"), ('{{"url": "{}"}}', "x"), ("<{}>", "x?a=1")):
        url = f"{scheme}://AKIDuser:{password}@host:9000/{after}"
        shown = redact(text.format(url))
        assert "AKIDuser" not in shown and f"{password}@" not in shown
        assert f"{REDACTED}@host:9000/{after}" in shown


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_of_each_kind_is_hidden_and_what_is_around_it_is_not(kind: str) -> None:
    text, secret = SECRETS[kind]
    shown = redact(text.format(secret))
    assert secret not in shown and REDACTED in shown
    before, _, after = text.format("\0").partition("\0")
    assert shown.startswith(before.split(secret[:5])[0][:12])
    assert shown.endswith(after[-2:])
    assert redact(shown) == shown


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *((name, True) for name in ("api_key", "AWS_SECRET_ACCESS_KEY", "AWSAccessKeyId", "wandbToken", "HF_TOKEN")),
        *((name, True) for name in ("PGPASSWORD", "client-secret", "private_key", "Authorization", "DB_PASSWD")),
        *((name, False) for name in ("caption_key", "key", "keys", "tokens", "text_tokens", "eot_token", "monkey")),
        *((name, False) for name in ("AWS_WEB_IDENTITY_TOKEN_FILE", "SSH_AUTH_SOCK", "lr", "", "token_count")),
    ],
)
def test_names_of_secrets(name: str, secret: bool) -> None:
    assert is_secret_name(name) is secret


def test_plain_data_lose_secrets_in_values_in_keys_and_under_names() -> None:
    tree = {
        "https://me:pass@host/x": 1,
        "api_key": "abc",
        "deep": [{"db": {"PASSWORD": 1, "port": 5432}}, ("s3://a:b/c@d", 0.5, None, True)],
        "empty": {"token": "", "secret": None},
        "caption_key": "txt",
    }
    assert redact_values(tree) == {
        f"https://{REDACTED}@host/x": 1,
        "api_key": REDACTED,
        "deep": [{"db": {"PASSWORD": REDACTED, "port": 5432}}, [f"s3://{REDACTED}@d", 0.5, None, True]],
        "empty": {"token": "", "secret": None},
        "caption_key": "txt",
    }


def test_the_environments_own_secrets_are_hidden_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "0123abcd-SENTINEL")
    monkeypatch.setenv("MY_FOLDER", "/shared/SENTINEL-folder")
    assert redact("HTTP 403: 0123abcd-SENTINEL?") == f"HTTP 403: {REDACTED}?"
    assert redact("/shared/SENTINEL-folder/x") == "/shared/SENTINEL-folder/x"


def test_what_came_from_the_environment_is_shown_as_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_references", {})
    hide("a b/SENT'INEL\u00e9", "${oc.env:X}")
    hide("abc", "${oc.env:SHORT}")
    for text in ("{}", "in {}/r", "?prefix={}"):
        assert redact(text.format("a b/SENT'INEL\u00e9")) == text.format("${oc.env:X}")
    for escaped in (
        "a%20b%2FSENT%27INEL%C3%A9",
        json.dumps({"a": "a b/SENT'INEL\u00e9"}),
        "'a b/SENT'\"'\"'INEL\u00e9'",
    ):
        assert "SENT" not in redact(escaped)
    assert redact("abc abcdef") == "abc abcdef"
    hide("cosine", "${oc.env:WORD}")
    assert redact("cosine, cosines") == "${oc.env:WORD}, cosines"
    assert redact("cosine", references=False) == "cosine"


PIECES = [*"ab:/@?#&=%'\"\\ \n{}[],;-.0", "://", "password=", "https://u:p@h", "eyJ"]


@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
@settings(max_examples=300, deadline=None)
def test_any_text_is_taken_and_a_second_time_changes_nothing(text: str) -> None:
    once = redact(text)
    assert redact(once) == once


def test_long_texts_of_special_characters_take_no_time() -> None:
    import time

    pieces = [
        "http://",
        "a:",
        "password=",
        "&a",
        '"',
        "eyJ",
        '\\"',
        "-----BEGIN PRIVATE KEY-----",
        "login x password ",
        "A",
    ]
    began = time.process_time()
    for piece in pieces:
        redact(piece * (60_000 // len(piece)))
    assert time.process_time() - began < 5
