"""gs:// and az://: the same promises as on S3, through what stands in for Google's store (tests/servers/google.py), and
through a real S3 server where Azure's users have one in front of theirs."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import ClientError
from botocore.stub import Stubber

from made.places import REPOSITORY
from pipeline import train
from pipeline.errors import ConfigError, NotFound, RunError, StorageError
from pipeline.runs.directory import committed
from pipeline.runs.lease import Lease
from pipeline.storage import google as signing
from pipeline.storage import s3 as module
from pipeline.storage.answers import s3_error
from pipeline.storage.base import TEMPORARY
from pipeline.storage.patience import Patience
from pipeline.storage.patterns import expand, sizes
from pipeline.storage.stores import STORES, bucket_of
from pipeline.storage.urls import open_storage
from pipeline.tracking.identity import identity_of
from preprocess.shapes.shards import write_shards
from ranks.faulty_run import BATCH, config_of, make_cache, upload
from servers.google import Google

PAGE = "docs/how_to/use_google_or_azure_storage.md"


@pytest.fixture
def az(s3: str, swift_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The bucket of `s3` as az://, whose variables lead to it as to a server in front of Azure's store. Those of AWS
    hold a key that this server does not know."""
    for ours, theirs in (
        ("AZ_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
        ("AZ_ACCESS_KEY_ID", "AWS_ACCESS_KEY_ID"),
        ("AZ_SECRET_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY"),
    ):
        monkeypatch.setenv(ours, swift_server[theirs])
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "another's")
    return s3.replace("s3://", "az://")


def lead_s3_to(google: Google, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on s3:// is the stand-in, which was asked nothing yet."""
    for name, value in google.as_s3.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "_conditional", set())
    module._clients.clear()


# --------------------------------------------------------------------------------------------------------------------
# Conditional puts


def test_the_stand_in_ignores_amazons_condition_and_refuses_googles_beside_amazons_headers(
    gs: str, google: Google, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What people have met at Google's, and why pipeline/storage/google.py is there."""
    lead_s3_to(google, monkeypatch)
    client, bucket = module.s3_client(), gs.removeprefix("gs://")
    for body in (b"first", b"second"):
        client.put_object(Bucket=bucket, Key="key", Body=body, IfNoneMatch="*")
    assert client.get_object(Bucket=bucket, Key="key")["Body"].read() == b"second"

    def add(request: AWSRequest, **_: object) -> None:
        request.headers.add_header("x-goog-if-generation-match", "0")

    client.meta.events.register("before-sign.s3.PutObject", add)
    with pytest.raises(client.exceptions.ClientError, match="cannot specify both x-amz and x-goog"):
        client.put_object(Bucket=bucket, Key="key", Body=b"third")


def test_a_conditional_put_on_gs_carries_googles_condition_and_signature(gs: str, google: Google) -> None:
    store, before = open_storage(f"{gs}/a b+c"), len(google.signed)
    assert store.put_if_absent("käse/$x", b"first") is True
    assert store.put_if_absent("käse/$x", b"second") is False
    assert store.get("käse/$x") == b"first"
    assert len(google.signed) - before in (2, 4)  # and twice more where this process had not asked before
    store.put("käse/$x", b"third")
    assert store.get("käse/$x") == b"third"


def test_all_of_several_puts_at_once_on_gs_carry_the_condition(gs: str) -> None:
    """The stand-in decides them one by one, as Google's store says that it does."""
    store = open_storage(gs)
    with ThreadPoolExecutor(8) as pool:
        won = Counter(pool.map(lambda number: store.put_if_absent("key", str(number).encode()), range(8)))
    assert won == {True: 1, False: 7}


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_a_run_on_another_store_is_held_by_one_process(scheme: str, request: pytest.FixtureRequest) -> None:
    run = open_storage(f"{request.getfixturevalue(scheme)}/run")
    with Lease.take(run), pytest.raises(RunError, match="one run is trained once at a time"):
        Lease.take(run)


@pytest.mark.parametrize(
    "address",
    ["https://storage.googleapis.com", "https://Storage.GoogleAPIs.com:443", "http://H:80", "http://h:8080"],
)
def test_googles_signature_is_amazons_with_other_words(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore signs the same request once Google's words are Amazon's."""
    now = datetime(2026, 11, 30, 12, 34, 56, tzinfo=UTC)
    monkeypatch.setattr(signing, "ALGORITHM", "AWS4-HMAC-SHA256")
    monkeypatch.setattr(signing, "SCOPE", "auto/storage/aws4_request")
    payload, url = "0" * 64, f"{address}/b/a%20b/%C3%A4"
    ours = signing.signature("PUT", url, payload, signing.ABSENT, "ID", "secret", now)["Authorization"]
    request = AWSRequest("PUT", url, {"x-goog-content-sha256": payload, "x-goog-date": "20261130T123456Z"})
    request.headers["x-goog-if-generation-match"] = "0"
    request.context["timestamp"] = "20261130T123456Z"
    theirs = SigV4Auth(Credentials("ID", "secret"), "storage", "auto")
    monkeypatch.setattr(theirs, "payload", lambda _: payload)
    monkeypatch.setattr(theirs, "_normalize_url_path", lambda path: path)
    text = theirs.string_to_sign(request, theirs.canonical_request(request))
    key = b"GOOG4secret"
    for part in ("20261130", "auto", "storage", "aws4_request"):
        key = theirs._sign(key, part)
    assert ours.endswith(f"Signature={theirs._sign(key, text, hex=True)}")
    assert "SignedHeaders=host;x-goog-content-sha256;x-goog-date;x-goog-if-generation-match," in ours


@pytest.mark.parametrize("named_by", ["the environment", "a profile"])
def test_a_store_that_ignores_the_condition_is_refused_at_its_first_conditional_put(
    named_by: str, gs: str, google: Google, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Google's is behind s3://, which would let two processes train one run. Nothing is written over first."""
    lead_s3_to(google, monkeypatch)
    if named_by == "a profile":
        monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
        (tmp_path / "config").write_text(f"[default]\nendpoint_url = {google.url}\n", encoding="utf-8")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    open_storage(gs).put("run/key", b"theirs")
    run = open_storage(gs.replace("gs://", "s3://")).child("run")
    with pytest.raises(StorageError, match=rf"{google.url} takes a put with If-None-Match.*write gs://bucket/prefix"):
        run.put_if_absent("key", b"ours")
    with pytest.raises(StorageError, match="takes a put with If-None-Match"):
        Lease.take(run)
    assert [info.key for info in run.list()] == ["key"]
    assert run.get("key") == b"theirs"


def test_a_store_that_says_that_it_has_no_conditional_puts_is_refused_alike(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_conditional", set())
    with Stubber(module.s3_client()) as answers:
        answers.add_client_error("put_object", "NotImplemented", http_status_code=501)
        with pytest.raises(StorageError, match=r"as not implemented.*Use a store that has conditional puts"):
            open_storage(s3).put_if_absent("key", b"x")


def test_another_store_is_asked_once_in_a_process(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an object of its own beside the first, which no listing has and which is deleted."""
    monkeypatch.setattr(module, "_conditional", set())
    asked: list[str] = []
    put = module.S3Storage._put_if_absent

    def count(store: module.S3Storage, key: str, data: bytes) -> bool:
        asked.append(key)
        return put(store, key, data)

    monkeypatch.setattr(module.S3Storage, "_put_if_absent", count)
    store = open_storage(s3)
    assert [store.put_if_absent(key, b"x") for key in ("f/a", "f/b", "f/b")] == [True, True, False]
    assert asked == [asked[0], asked[0], "f/a", "f/b", "f/b"]
    assert TEMPORARY.fullmatch(asked[0].removeprefix("f/"))
    assert not store.exists(asked[0])
    store.put(asked[0], b"")
    assert [info.key for info in store.list()] == ["f/a", "f/b"]


@pytest.mark.parametrize(
    ("host", "amazons"),
    [
        *((host, True) for host in ("s3.amazonaws.com", "s3.cn-north-1.amazonaws.com.cn", "a.vpce.amazonaws.com")),
        *((host, False) for host in ("s3.amazonaws.com.example.org", "notamazonaws.com", "127.0.0.1")),
    ],
)
def test_amazons_stores_alone_are_not_asked(host: str, amazons: bool) -> None:
    assert bool(module.AMAZONS.search(host)) is amazons


# --------------------------------------------------------------------------------------------------------------------
# What is said before anything is asked


@pytest.mark.parametrize(("scheme", "variable"), [("gs", "GS_SECRET_ACCESS_KEY"), ("az", "AZ_SECRET_ACCESS_KEY")])
def test_without_its_own_key_a_store_is_not_asked(
    scheme: str, variable: str, gs: str, az: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of AWS are set here and are not sent to another store."""
    monkeypatch.delenv(variable)
    with pytest.raises(ConfigError, match=rf"no credentials for {scheme}://.*{variable}"):
        open_storage(f"{scheme}://b/x")


def test_each_of_several_stores_is_asked_with_its_own_key(
    s3: str, gs: str, google: Google, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither server knows the key of the other, and both take the host as it is sent: in small letters."""
    monkeypatch.setenv("GS_ENDPOINT_URL", google.url.replace("127.0.0.1", "LOCALHOST"))
    module._clients.clear()
    google.key_ids.clear()
    assert open_storage(gs).put_if_absent("key", b"x") is True
    assert open_storage(s3).get("key") == b"x"
    assert google.key_ids == {google.environment["GS_ACCESS_KEY_ID"]}


def test_a_wrong_key_is_one_clear_error_that_names_its_variables(gs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GS_SECRET_ACCESS_KEY", "wrong")
    module._clients.clear()
    store = open_storage(gs)
    for ask in (lambda: store.get("x"), lambda: store.put_if_absent("x", b"")):
        with pytest.raises(StorageError, match=r"access refused.*check GS_ACCESS_KEY_ID and GS_SECRET_ACCESS_KEY"):
            ask()


@pytest.mark.parametrize("code", ["401", "403", "AccessDenied", "InvalidSecurity"])
def test_every_refusal_of_a_key_names_its_variables(code: str) -> None:
    error = s3_error(ClientError({"Error": {"Code": code}}, "HeadObject"), "gs://b/x", "b", Patience())
    said = f"gs://b/x: access refused ({code}); check GS_ACCESS_KEY_ID and GS_SECRET_ACCESS_KEY in the environment"
    assert str(error) == said


def test_a_bucket_that_can_be_none_is_told_its_own_scheme(gs: str) -> None:
    with pytest.raises(ConfigError, match="write gs://bucket/prefix"):
        open_storage("gs://b ucket/x").get("key")


@pytest.mark.usefixtures("_aws")
def test_azure_without_a_server_in_front_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZ_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AZ_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(ConfigError, match=rf"Azure Blob Storage has no S3 interface.*{PAGE}.*AZ_ENDPOINT_URL"):
        open_storage("az://container/x")
    assert (REPOSITORY / PAGE).exists()


@pytest.mark.parametrize(("scheme", "wanted"), [("gs", "GS_ENDPOINT_URL"), ("az", "AZ_ENDPOINT_URL")])
def test_an_endpoint_that_is_no_url_or_holds_a_password_is_refused(
    scheme: str, wanted: str, gs: str, az: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, says in (("nonsense", "nonsense.*write"), ("http://me:sesame@h", "leave them out")):
        monkeypatch.setenv(wanted, value)
        module._clients.clear()
        with pytest.raises(ConfigError, match=says) as raised:
            open_storage(f"{scheme}://b/x").get("key")
        assert "sesame" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("gcs://b/x", "gs://"),
        ("abfss://c@a.dfs.core.windows.net/x", "az://"),
        ("s3a://b", "s3://"),
        ("S3://b", "s3://"),
    ],
)
def test_other_programs_spellings_are_told_ours(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"is not supported; write {says}"):
        open_storage(url)


def test_googles_own_address_is_known() -> None:
    assert STORES["gs"].address == "https://storage.googleapis.com"


# --------------------------------------------------------------------------------------------------------------------
# What is made of them


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_a_pattern_names_shards_and_their_sizes(scheme: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(scheme)
    write_shards(f"{url}/in", 4, 0, "train", shard_size=2)
    places = expand(f"{url}/in/{{00000..00001}}.tar")
    assert [storage.locate(key) for storage, key in places] == [f"{url}/in/0000{i}.tar" for i in range(2)]
    assert [key for _, key in expand(f"{url}/in/*.tar")] == [key for _, key in places]
    assert sizes(places) == [storage.stat(key).size for storage, key in places]
    with pytest.raises(NotFound, match=f"{scheme}://"):
        open_storage(url).get("absent")


def test_a_run_on_gs_is_trained_and_goes_on(gs: str, tmp_path: Path) -> None:
    """Its cache lies there, too."""
    upload(make_cache(tmp_path / "cache"), f"{gs}/cache")
    for samples in (BATCH, 2 * BATCH):
        assert train.main(config_of(f"{gs}/run", f"{gs}/cache", samples=samples, every=BATCH)) == 0
        assert committed(open_storage(f"{gs}/run"))[0] == samples


def test_what_wandb_knows_a_run_by_is_kept_in_any_bucket(gs: str) -> None:
    run = open_storage(f"{gs}/run")
    known = identity_of(run)
    assert identity_of(open_storage(f"{gs}/run")) == known
    copy = open_storage(f"{gs}/copy")
    for info in run.list():
        copy.put(info.key, run.get(info.key))
    assert identity_of(copy) != known
    assert [bucket_of(url) for url in ("gs://b/x/y", "az://c", "s3://b/", "/a", "https://h/x", "gs://")] == (
        ["gs://b", "az://c", "s3://b", "", "", ""]
    )
