"""The stores that a URL's scheme names, and the variables of the environment that lead to each."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Store:
    """A store of objects with S3's protocol, or with a server in front of it that has that protocol."""

    scheme: str
    """What stands before :// in its URLs."""
    endpoint: str
    """The variable that says where it is reached."""
    key_id: str
    secret: str
    """The variables with the two halves of its key."""
    address: str = ""
    """Where it is reached when `endpoint` is not set; "" where boto3 knows it, or nobody does."""

    def reached_at(self) -> str:
        """The URL of its endpoint; "" where boto3 finds it. Raises ConfigError where there is none."""
        url = os.environ.get(self.endpoint) or self.address
        if self.scheme == "s3":
            return url or os.environ.get("AWS_ENDPOINT_URL", "")
        if not url:
            raise ConfigError(
                f"{self.scheme}:// needs {self.endpoint}: Azure Blob Storage has no S3 interface of its own. Run a "
                "server in front of it that has one (docs/how_to/use_google_or_azure_storage.md) and set "
                f"{self.endpoint} to its http(s)://host:port"
            )
        return url

    def keys(self) -> tuple[str, str] | None:
        """Its key from the environment; None for S3, whose key boto3 looks for in more places. Raises ConfigError where
        it is not set: another store's key is never sent there."""
        if self.scheme == "s3":
            return None
        key_id, secret = os.environ.get(self.key_id, ""), os.environ.get(self.secret, "")
        if not (key_id and secret):
            what = "an HMAC key of Google Cloud Storage" if self.scheme == "gs" else "the key of the server"
            raise ConfigError(f"no credentials for {self.scheme}://: set {self.key_id} and {self.secret} ({what})")
        return key_id, secret


STORES = {
    store.scheme: store
    for store in (
        Store("s3", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
        Store("gs", "GS_ENDPOINT_URL", "GS_ACCESS_KEY_ID", "GS_SECRET_ACCESS_KEY", "https://storage.googleapis.com"),
        Store("az", "AZ_ENDPOINT_URL", "AZ_ACCESS_KEY_ID", "AZ_SECRET_ACCESS_KEY"),
    )
}
OTHER_SPELLINGS = {"gcs": "gs", "abfs": "az", "abfss": "az", "wasb": "az", "wasbs": "az", "azure": "az", "s3a": "s3"}
"""Schemes of other programs, and ours for the same store."""


def scheme_of(url: str) -> str:
    """What stands before :// in the URL of an object in a store; "" for a path, and for any other URL."""
    scheme, separator, _ = url.partition("://")
    return scheme if separator and scheme in STORES else ""


def bucket_of(url: str) -> str:
    """ "s3://bucket" of the URL of what lies in that bucket; "" for a path, and for any other URL."""
    bucket = url.split("/")[2] if scheme_of(url) else ""
    return f"{scheme_of(url)}://{bucket}" if bucket else ""


def store_of(url: str) -> Store:
    """The store of an object's URL."""
    return STORES[scheme_of(url) or "s3"]
