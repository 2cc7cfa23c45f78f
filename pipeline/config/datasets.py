"""The verbs that make datasets, prove them and look into them: fetch, synth, encode, index, verify, reference, data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.model import EncodersConfig, FeaturesName
from pipeline.config.train import LaunchConfig


@dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """latentmill synth: write captioned-shapes shards in img2dataset's layout."""

    dest: str
    """Folder or s3:// URL for the shards."""
    images: int = 10_000
    """Number of images."""
    seed: int = 0
    """Seed of the world; image i depends on (seed, i, split) alone."""
    split: Literal["train", "val", "heldout", "all"] = "train"
    """train; val: as train, with captions that train never uses; heldout: every image shows a combination of size,
    colour and shape that train and val never show; all: no restriction."""
    shard_size: int = 1000
    """Images per tar."""


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """latentmill fetch: bring the weights of the encoders into a folder or bucket once, as safetensors with a manifest
    of their hashes, for nodes without internet. What is there already is not brought again."""

    dest: str
    """Folder or s3:// URL, empty or from an earlier fetch of the same encoders; later encoders.weights=DEST."""
    encoders: EncodersConfig = field(default_factory=EncodersConfig)
    """The autoencoder and the text tower to bring."""


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """Bounds that hold before a hostile source is decoded (docs/explained/promises.md, 7)."""

    member_bytes: int = 64 * 1024 * 1024
    """Largest member of an input tar."""
    members: int = 2_000_000
    """Most members of one input tar."""
    pixels: int = 64_000_000
    """Most pixels of one image, read from its header before decoding."""
    caption_bytes: int = 65_536
    """Longest caption in bytes."""


@dataclass(frozen=True, kw_only=True)
class FiltersConfig:
    """Samples that are whole but not wanted: each is rejected, and counted under `filter:...`. Part of the contract."""

    min_side: int = 0
    """Smallest shorter side of an image in pixels; 0 = any."""
    max_aspect: float = 0.0
    """Largest ratio of an image's longer side to its shorter; 0 = any."""
    min_caption: int = 0
    """Fewest characters of a caption."""
    max_caption: int = 0
    """Most characters of a caption; 0 = any number."""
    keep: tuple[str, ...] = ()
    """Rules on columns of the json, all of which must hold: KEY OP VALUE with >=, <=, >, <, == or !=
    ("[similarity>=0.28,punsafe<0.1,NSFW==UNLIKELY]"). A sample without the column counts as a defect."""
    duplicates: Literal["keep", "image", "pair"] = "keep"
    """keep; image: of samples whose image files are equal byte for byte only the first is kept; pair: of those whose
    captions are equal as well. Within a shard at once, across shards as a list of excluded records in the manifest."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """latentmill encode: image-text shards in, cached latents and text states out."""

    source: str
    """Input shards: brace and glob patterns, local or s3:// ('shapes/{00000..00009}.tar')."""
    dest: str
    """Folder or s3:// URL of the cache."""
    encoders: EncodersConfig = field(default_factory=EncodersConfig)
    """Autoencoder and text tower."""
    resolution: tuple[int, ...] = (64,)
    """Side in pixels of the square crop that is encoded; a multiple of the autoencoder's downsampling factor. Several
    ([256,512]) are encoded in one pass, into one dataset each: dest/256 and dest/512."""
    crop: Literal["centre", "random"] = "centre"
    """Resize with antialiasing until the crop is covered, then take its middle (centre), or a place that depends on the
    sample's key and `seed` alone (random)."""
    buckets: int = 0
    """0: square crops. N: aspect-ratio buckets as SDXL's, sides multiples of N pixels (64 is usual), with the area of
    the square at most; each output shard holds one bucket."""
    bucket_aspect: float = 2.0
    """Largest ratio of a bucket's longer side to its shorter."""
    flip: bool = False
    """Also store every image flipped left to right, as a record of its own. "left of" becomes wrong in captions."""
    seed: int = 0
    """Of random crops. Part of the contract."""
    filters: FiltersConfig = field(default_factory=FiltersConfig)
    """Samples that are not wanted."""
    caption_key: str = "txt"
    """Where captions are: txt (the .txt member) or json:KEY (a key of the .json member)."""
    conditions: tuple[Literal["boxes", "labels", "lowres", "mask"], ...] = ()
    """The task's members to store as cond.*: any of boxes, labels, lowres, mask."""
    text_storage: Literal["full", "trimmed", "tokens"] = "full"
    """What is stored of a caption. full: the states of every position, as Stable Diffusion is trained. trimmed: those
    up to its end token; the model then attends to nothing else. tokens: ids only; the trainer runs the text tower."""
    batch: int = 64
    """Images per encoder batch; batches never cross input shards. Part of the contract."""
    workers: int = 0
    """Decoding workers per process; 0 = the machine's cores / processes, at least 1."""
    decode_in: Literal["processes", "threads"] = "processes"
    """Worker processes, or threads of this process (starts sooner; slower with many cores)."""
    max_rejects: float = 0.1
    """Largest share of defective samples (what filters reject does not count); beyond it the stage fails."""
    claim_seconds: float = 120.0
    """A worker that has not renewed its claim on an input shard for this long is taken for dead."""
    finalize: bool = False
    """Encode nothing: check that every input shard is done, count, and write the manifest and the dataset card."""
    dry_run: bool = False
    """Encode nothing: try a few samples, and print what the whole would take in time, storage and objects."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Bounds on what a source may contain."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Processes on this machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto, cpu or cuda. Its kind is part of the contract."""


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """latentmill index: make a dataset of plain WebDataset tars of latents that lie there already, or of a cache that
    lost its manifest or indexes. The tars are never changed."""

    dataset: str
    """Folder or s3:// URL below which the tars lie; indexes and manifest are written there."""
    source: str
    """The tars: brace and glob patterns ('DATASET/*.tar')."""
    encoders: EncodersConfig | None = None
    """The encoders that made the latents; without them they are unknown, which evaluations refuse."""
    moments_member: str = "moments.npy"
    """File of a record with the moments (2C, h, w), posterior mean then log-variance, unscaled: its name after the
    key and a dot; .npy of float16 or float32."""
    text_member: str = "text.npy"
    """File with the text states (L, D), as moments_member."""
    caption_key: str = "json:caption"
    """Where captions are: txt (the .txt member) or json:KEY (a key of the .json member)."""
    channels: int = 4
    """Channels C of a latent; with encoders, theirs."""
    downsampling: int = 8
    """Pixels per latent position along a side; with encoders, theirs."""
    scale: float = 0.18215
    """A latent is (z - shift) * scale for a posterior sample z; with encoders, theirs. This is Stable Diffusion's."""
    shift: float = 0.0
    """See scale."""
    max_rejects: float = 0.0
    """Largest share of records that may be left out because they are incomplete or of another shape."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Bounds on what the tars may contain."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """latentmill verify: prove a cache."""

    dataset: str
    """The cache."""
    source: str = ""
    """Where its input shards are, to decode latents and compare them with the images; "" = the manifest's own record
    of the pattern when it can be reached, else only the cache is checked."""
    samples: int = 64
    """Records decoded and compared with their images."""
    min_psnr: float = 20.0
    """Smallest median PSNR in dB between decoded latents and source images."""
    encoders: EncodersConfig | None = None
    """Encoders to load; by default those of the cache's contract."""
    report: str = ""
    """HTML page to write; "" = none."""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """latentmill reference: feature statistics of real images, for FID, with their floors."""

    dataset: str
    """A cache whose source images are the reference (same resolution and crop)."""
    source: str = ""
    """Where its input shards are; "" = the manifest's own record of the pattern."""
    dest: str = ""
    """File to write (.safetensors); "" = reference-FEATURES.safetensors inside the cache."""
    encoders: EncodersConfig | None = None
    """Encoders to load; by default those of the cache's contract."""
    features: FeaturesName = "democlip"
    """Feature network, as eval.features of train."""
    features_weights: str = ""
    """Its weights, as eval.features_weights of train."""
    images: int = 0
    """Images used; 0 = all."""


@dataclass(frozen=True, kw_only=True)
class DataVerbConfig:
    """latentmill data: what ranks and nodes would read: the next batches, bytes, read amplification, bandwidth, memory.
    Asks the dataset's manifest alone."""

    dataset: str = ""
    """The cache; "" = that of `run`."""
    mix: tuple[str, ...] = ()
    """Further caches, as data.mix of train; [] = those of `run`, if it has any."""
    weights: tuple[float, ...] = ()
    """As data.weights of train; [] = the run's, else in proportion to numbers of records."""
    run: str = ""
    """Run directory whose dataset, batch, seed, tail, rate and newest commit hold where they are not given."""
    at: int = -1
    """Number of the sample from which on; a multiple of the batch. -1 = the run's newest commit, else 0."""
    world: int = 8
    """Ranks; they must divide the batch."""
    nodes: int = 1
    """Machines that the ranks are on, equally many on each."""
    batch: int = 0
    """Global batch; 0 = the run's, else 64."""
    seed: int = -1
    """Seed of the order; -1 = the run's, else 0."""
    tail: Literal["", "drop", "wrap"] = ""
    """As data.tail of train; "" = the run's, else drop."""
    batches: int = 16
    """Coming batches that are looked at."""
    images_per_s: float = 0.0
    """Images per second of all ranks together, for the bandwidth; 0 = what the run measured, else none is told."""
