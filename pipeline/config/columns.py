"""The verb that makes columns for a cache that is there: columns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipeline.config.datasets import LimitsConfig
from pipeline.config.model import EncodersConfig
from pipeline.config.run import LaunchConfig
from pipeline.config.values.bounds import Between, Ge, Gt


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """latentmill columns: captions, features or scores for the records of a cache, in a dataset of their own that is
    bound to the cache and joined to it when it is read (data.columns of train). The cache is not changed."""

    dataset: str
    """The cache: a folder, or a URL in a bucket (s3://, gs://, az://)."""
    source: str
    """What holds the values: a .tar or .jsonl for each input shard of the cache, named like it ('captions/*.jsonl' for
    00000.tar and so on), as brace and glob patterns, local, s3://, gs:// or az://. A sample belongs to the records that
    were made of the sample with the same key."""
    dest: str
    """Folder, or URL in a bucket (s3://, gs://, az://), of the columns."""
    caption_key: str = ""
    """Where a sample's caption is: txt (the .txt member of a tar) or json:KEY (a key of the .json member, or of the
    line); "" = no captions. A model then is given these captions in place of the cache's."""
    text_storage: Literal["tokens", "trimmed", "full"] = "tokens"
    """What is stored of a caption. tokens: token ids only; the trainer runs the text tower. trimmed: text states up to
    the end token. full: text states of every position."""
    encoders: EncodersConfig | None = None
    """The encoders, of which the text tower is used; by default those of the cache's contract."""
    features: tuple[str, ...] = ()
    """Arrays of a sample: each NAME is the member KEY.NAME.npy of a tar (float16, float32, uint8 or int32, of one
    shape), and becomes the array column.NAME of the records."""
    scores: tuple[str, ...] = ()
    """Numbers of a sample: each NAME is a key of its .json member, or of its line, and becomes the float32 column.NAME
    of the records."""
    max_rejects: Annotated[float, Between(0, 1)] = 0.0
    """Largest share of the cache's records that may have no value; they are counted by reason, and left out of what is
    read of the cache together with the columns. Above it, columns fails."""
    batch: Annotated[int, Ge(1)] = 64
    """Captions per batch of the text tower."""
    claim_seconds: Annotated[float, Gt(0)] = 120.0
    """A process that has not renewed its claim on an input shard for this many seconds is considered dead."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Limits on the source, checked before anything is decoded; pixels and seconds have no meaning here."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Processes on this machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the text tower; auto = cuda where there is a GPU, else cpu."""
