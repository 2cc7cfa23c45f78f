"""The verb that makes datasets of latents that exist already: index."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipeline.config.datasets import LimitsConfig
from pipeline.config.model import EncodersConfig
from pipeline.config.values.bounds import Between, Ge, Gt


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """latentmill index: make a dataset from latents of other software: of WebDataset tars where they lie (dataset=), or
    of tars, MDS shards or files of arrays by converting them into a new cache (dest=); or restore a cache that lost its
    manifest or indexes. What is read is never changed."""

    dataset: str = ""
    """Folder, or URL in a bucket (s3://, gs://, az://), that contains the tars; indexes and manifest are written there.
    "" with dest=."""
    source: str
    """What is read: brace and glob patterns. With dataset=: tars ('DATASET/*.tar'). With dest=: tars, the index.json of
    MDS datasets ('mds/**/index.json'), or files of arrays ('cache/**/*.npz', or *.safetensors); of one kind."""
    dest: str = ""
    """Folder, or URL in a bucket (s3://, gs://, az://), of a new cache into which every record is converted (moments,
    latents and text states as float16), as `encode` writes it; "" = none. Conversion alone reads .npz, .safetensors,
    bfloat16, MDS and separate log-variances."""
    encoders: EncodersConfig | None = None
    """The encoders that made the latents. Without this key they are unknown, and evaluations refuse the dataset."""
    moments_member: str = "moments.npy"
    """Member of a record that holds the moments (2C, h, w), posterior mean then log-variance, unscaled, named without
    the record's key and the dot; a .npy file of float16 or float32. With dest= a place: FILE[:ARRAY][:DTYPE[:SHAPE]],
    such as latent.npy:bfloat16 (stored as uint16), npz:latents, safetensors:mean, or the column of an MDS shard, such
    as latents_256:float16:4x32x32."""
    logvar_member: str = ""
    """Place of the log-variance (C, h, w), where moments_member holds the mean (C, h, w) alone; only with dest=. "" =
    moments_member holds both."""
    stored: Literal["moments", "latents"] = "moments"
    """What moments_member holds. latents: (C, h, w), unscaled, of an encoder without a variance, or of one whose
    variance was not kept; training then sees the same latent of an image at every visit."""
    scaled: bool = False
    """Whether stored latents are scaled already, as (z - shift) * scale; z is stored then. Only with dest= and
    stored=latents."""
    text_member: str = "text.npy"
    """Member of a record that holds the text states (L, D), named as in moments_member; "" = records have no captions,
    and caption_key is not read."""
    text_storage: Literal["full", "tokens"] = "full"
    """What is stored of a caption. full: the text states of text_member. tokens: its token ids, which the text tower of
    `encoders` gives, so that records need no text states and text_member is not read; only with dest=."""
    caption_key: str = "json:caption"
    """Where a sample's caption is: txt (the .txt member) or json:KEY (a key of the .json member). With dest= any file
    or column, such as caption."""
    class_member: str = ""
    """Member of a record that holds its class, named as in moments_member: a .npy file of one int32 without axes;
    "" = none."""
    classes: Annotated[int, Ge(0)] = 0
    """Number of classes of class_member."""
    boxes_member: str = ""
    """Member of a record that holds its boxes, named as in moments_member: a .npy file of float16 (N, 5): class, x0,
    y0, x1, y1 as fractions of the image that was encoded, and -1 in rows without a box; "" = none."""
    box_classes: Annotated[int, Ge(0)] = 0
    """Number of classes of the boxes of boxes_member."""
    channels: Annotated[int, Ge(1)] = 4
    """Channels C of a latent. Where `encoders` is given, its value is used instead."""
    downsampling: Annotated[int, Ge(1)] = 8
    """Pixels per latent position along a side. Where `encoders` is given, its value is used instead."""
    scale: Annotated[float, Gt(0)] = 0.18215
    """A latent is (z - shift) * scale for a posterior sample z; the default is Stable Diffusion's. Where `encoders` is
    given, its value is used instead."""
    shift: float = 0.0
    """See `scale`."""
    unit_size: Annotated[int, Ge(1)] = 1000
    """Files of arrays (.npz, .safetensors) that are converted into one tar; only with dest=."""
    max_rejects: Annotated[float, Between(0, 1)] = 0.0
    """Largest share of records that may be left out because they are incomplete or have another shape."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Limits on the source, checked before decoding."""
