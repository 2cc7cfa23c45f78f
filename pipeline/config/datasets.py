"""The verbs that make, prove and inspect datasets: fetch, synth, encode, verify, reference, data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pipeline.config.conditions import BoxesConfig, ClassesConfig, LabelsConfig, LowresConfig, MaskConfig
from pipeline.config.model import EncodersConfig, FeaturesName
from pipeline.config.run import LaunchConfig, Weights
from pipeline.config.values.bounds import Between, Ge, Gt, OrZero, Seed, SeedOrNone

COSINE = "100 x cosine is wanted, as eval's clip_score: 28 stands for a cosine of 0.28; or 0 for any"


@dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """latentmill synth: write captioned-shapes shards in img2dataset's layout."""

    dest: str
    """Folder, or URL in a bucket (s3://, gs://, az://), for the shards."""
    images: Annotated[int, Ge(1)] = 10_000
    """Number of images."""
    seed: Seed = 0
    """Seed of the drawings; image i depends on (seed, i, split) alone."""
    split: Literal["train", "val", "heldout", "all"] = "train"
    """Which scenes are drawn. train: for training. val: as train, with captions that train never uses. heldout: every
    image shows a combination of size, colour and shape that train and val never show. all: no restriction."""
    shard_size: Annotated[int, Ge(1)] = 1000
    """Images per tar."""
    single: bool = False
    """Draw exactly one object in each image, instead of one to three."""
    classes: bool = False
    """Also write the class of the largest object of each image, 0 to 23, as KEY.cls, and the names of the classes to
    classes.txt, those of label maps and boxes (0 is the background) to labels.txt."""


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """latentmill fetch: download the weights of the encoders into a folder or bucket once, as safetensors with a
    manifest of their hashes, for nodes without internet. Files that are there already are not downloaded again."""

    dest: str
    """Folder, or URL in a bucket (s3://, gs://, az://), empty or from an earlier fetch of the same encoders. Other
    verbs then take encoders.weights=DEST."""
    encoders: EncodersConfig = field(default_factory=EncodersConfig)
    """The autoencoder and the text tower to download."""


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """Limits on a source, which may be hostile (docs/explained/promises.md, 7). All but `seconds` are checked before
    anything is decoded, and part of the contract."""

    member_bytes: Annotated[int, Ge(1)] = 64 * 1024 * 1024
    """Largest size in bytes of a member of an input tar."""
    members: Annotated[int, Ge(1)] = 2_000_000
    """Largest number of members of an input tar."""
    pixels: Annotated[int, Ge(1)] = 64_000_000
    """Largest number of pixels of an image, as its header gives it, and once it is resized to cover its crop (then 16
    times the crop at the least)."""
    caption_bytes: Annotated[int, Ge(1)] = 65_536
    """Largest length of a caption in bytes."""
    seconds: Annotated[float, Gt(0)] = 60.0
    """Longest time in seconds that a processor may work on one sample before it is rejected as too_slow. This limit
    alone depends on the machine; it is no part of the contract."""


@dataclass(frozen=True, kw_only=True)
class FiltersConfig:
    """Filters: samples that are intact but unwanted are rejected and counted as `filter:...`. Part of the contract."""

    min_side: Annotated[int, Ge(0)] = 0
    """Smallest length in pixels of an image's shorter side; 0 = any."""
    max_aspect: Annotated[float, OrZero(Ge(1), "1 or more is wanted, or 0 for any")] = 0.0
    """Largest ratio of an image's longer side to its shorter side; 0 = any."""
    min_caption: Annotated[int, Ge(0)] = 0
    """Smallest number of characters of a caption."""
    max_caption: Annotated[int, Ge(0)] = 0
    """Largest number of characters of a caption; 0 = any. Of several captions, each must be within these bounds."""
    keep: tuple[str, ...] = ()
    """Rules on keys of the .json member, all of which must hold: KEY OP VALUE with >=, <=, >, <, == or !=
    ("[similarity>=0.28,punsafe<0.1,NSFW==UNLIKELY]"). A sample without the key counts as defective."""
    duplicates: Literal["keep", "image", "pair"] = "keep"
    """keep: keep duplicates. image: of samples whose image files are equal byte for byte, keep only the first. pair:
    the same, for samples whose captions are equal as well (all of them). Duplicates within a shard are never stored;
    those across shards are listed as excluded records in the manifest."""
    near_duplicates: Annotated[int, Between(0, 4)] = 0
    """Of samples whose pictures look alike, keep only the first of the source: those whose 64-bit perceptual hashes
    differ in at most this many bits; 0 = keep all. The others are listed as excluded records in the manifest."""
    clip_score: Annotated[float, OrZero(Ge(1), COSINE)] = 0.0
    """Smallest similarity of picture and caption, 100 x cosine, by the CLIP whose text tower encodes the captions; of
    several captions the first is compared. 0 = any."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """latentmill encode: turn image-text shards into a cache of latents and text states."""

    source: str
    """Input shards: brace and glob patterns, local, s3://, gs:// or az:// ('shapes/{00000..00009}.tar'); a folder of
    images; Parquet files ('train-*.parquet'); or a folder that Hugging Face's datasets saved
    (docs/how_to/folders_and_tables.md)."""
    dest: str
    """Folder, or URL in a bucket (s3://, gs://, az://), of the cache."""
    unit_size: Annotated[int, Between(1, 1_000_000)] = 1000
    """Samples of a folder or rows of a table that are encoded as one input shard. Tars are what they are."""
    image_column: str = ""
    """Column of a table that holds the images, as bytes or as Hugging Face's datasets do; "" = the one called image, or
    the only one that can hold them. A caption is read with caption_key=json:COLUMN."""
    encoders: EncodersConfig = field(default_factory=EncodersConfig)
    """The autoencoder and the text tower."""
    stored: Literal["latents", "pixels"] = "latents"
    """What is stored of each crop. latents: what the autoencoder gives; moments of an AutoencoderKL, of a VQModel the
    latents before they are quantised. pixels: the crop itself, for training an autoencoder, or a model of pixels; no
    autoencoder is loaded, and captions are read only where caption_key is given."""
    pixels: Literal["array", "png"] = "array"
    """How stored=pixels stores a crop. array: three bytes a pixel. png: a lossless PNG, which takes less storage and
    bandwidth, and time of the reading threads (docs/how_to/cache_pixels.md). Part of the contract."""
    resolution: tuple[Annotated[int, Ge(1)], ...] = (64,)
    """Side in pixels of the square crop that is encoded; a multiple of the autoencoder's downsampling factor. Several
    resolutions ([256,512]) are encoded in one pass, each into its own dataset: dest/256 and dest/512."""
    crop: Literal["centre", "random"] = "centre"
    """Where an image is cropped after it was resized, with antialiasing, to just cover the crop. centre: in the middle.
    random: at a place that depends on the sample's key and `seed` alone."""
    buckets: Annotated[int, Ge(0)] = 0
    """0: square crops. N: aspect-ratio buckets as in SDXL, whose sides are multiples of N pixels (64 is usual) and
    whose area is at most that of the square; each output shard holds one bucket."""
    bucket_aspect: Annotated[float, Ge(1)] = 2.0
    """Largest ratio of a bucket's longer side to its shorter side."""
    flip: bool = False
    """Also store every image flipped left to right, as a separate record. Captions that say "left of" become wrong."""
    seed: Seed = 0
    """Seed of random crops. Part of the contract."""
    colour: Literal["", "srgb", "as_stored"] = ""
    """What is done with colour profiles (ICC) in pictures. srgb: a picture whose profile is another than sRGB is
    converted to it. as_stored: profiles are not looked at. "" = as the cache there was begun, and srgb for a new one.
    Part of the contract."""
    filters: FiltersConfig = field(default_factory=FiltersConfig)
    """Samples to leave out."""
    caption_key: tuple[str, ...] = ()
    """Where a sample's captions are: txt (the .txt member) or json:KEY (a key of the .json member), or several of them,
    as [txt,json:long], each of which a sample must have; [] = txt, and with stored=pixels nowhere. Which of several
    captions is seen is drawn for each sample of training (docs/how_to/several_captions.md). With text_storage=none no
    caption is read, and a sample needs none."""
    captions_most: Annotated[int, Between(0, 64)] = 0
    """Captions that are stored of a sample, at most; a json:KEY may then be a list of captions. Of samples with more,
    the first of each key are taken, then the second, and so on. 0 = one of each key. Part of the contract."""
    caption_weights: Annotated[tuple[float, ...], Ge(0, "numbers of 0 or more are wanted")] = ()
    """Chances of the keys of caption_key by which training draws one, in any unit; a list of captions shares that of
    its key evenly. [] = equal. Part of the contract."""
    conditions: tuple[Literal["class", "boxes", "labels", "lowres", "mask", "pixels"], ...] = ()
    """What is stored of each sample beside its image and caption, for tasks that are given it (cond.*). pixels: the
    crop itself, with which evaluations compare."""
    classes: ClassesConfig = field(default_factory=ClassesConfig)
    """How a sample's class is read."""
    boxes: BoxesConfig = field(default_factory=BoxesConfig)
    """Which boxes are stored."""
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    """How label maps are stored."""
    lowres: LowresConfig = field(default_factory=LowresConfig)
    """How crops are made smaller."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    """How holes are drawn."""
    text_storage: Literal["", "full", "trimmed", "tokens", "none"] = ""
    """What is stored of a caption; "" = full, and tokens where a sample has several. full: the text states of every
    position, as Stable Diffusion is trained. trimmed: the text states up to the end token; the model then attends to
    nothing else. tokens: token ids only; the trainer runs the text tower. none: nothing; no text tower is loaded."""
    batch: Annotated[int, Ge(1)] = 64
    """Images per encoder batch; no batch has images of two input shards. Part of the contract."""
    workers: Annotated[int, Ge(0)] = 0
    """Decoding workers per process; 0 = the machine's cores / processes, at least 1."""
    decode_in: Literal["processes", "threads"] = "processes"
    """processes: decode in worker processes. threads: in threads of this process (starts faster, but is slower with
    many cores)."""
    max_rejects: Annotated[float, Between(0, 1)] = 0.1
    """Largest share of samples that may be defective (samples that filters reject do not count); above it, encode
    fails."""
    claim_seconds: Annotated[float, Gt(0)] = 120.0
    """A process that has not renewed its claim on an input shard for this many seconds is considered dead."""
    leave_out: tuple[str, ...] = ()
    """Names of input shards that are not encoded, such as damaged ones that cannot be fetched again ("[00007.tar]"; as
    many of their folders as tell them apart). They are counted in the manifest, and stay left out in later runs; to
    encode one after all, forget it."""
    forget: tuple[str, ...] = ()
    """Encode nothing: delete what was made of the input shards of these names, and the manifests that hold them, so
    that the next run encodes them anew."""
    finalize: bool = False
    """Encode nothing: check that every input shard is done, count, and write the manifest and the dataset card."""
    dry_run: bool = False
    """Encode nothing: try a few samples, and print the time, storage and objects that encoding all would take."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Limits on the source, checked before decoding."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Processes on this machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the encoders; auto = cuda where there is a GPU, else cpu. Its kind is part of the contract."""

    @property
    def text_kind(self) -> Literal["full", "trimmed", "tokens", "none"]:
        """What is stored of captions: text_storage, and "none" of pixels whose caption_key is not given."""
        if self.stored == "pixels" and not self._keys:
            return "none"
        several = len(self._keys) > 1 or self.captions_most > 1
        return self.text_storage or ("tokens" if several else "full")

    @property
    def caption_places(self) -> tuple[str, ...]:
        """Where captions are read, each "txt" or "json:KEY"; () where none are."""
        return () if self.text_kind == "none" else self._keys or ("txt",)

    @property
    def _keys(self) -> tuple[str, ...]:
        """caption_key, of which an empty text is none."""
        return () if self.caption_key == ("",) else self.caption_key

    @property
    def captions(self) -> int:
        """Captions that a record holds, at most; 0 where none are read."""
        places = self.caption_places
        return max(self.captions_most, len(places)) if places else 0

    @property
    def used_encoders(self) -> EncodersConfig:
        """The encoders that are loaded and that the contract names: of stored pixels there is no autoencoder."""
        if self.stored != "pixels":
            return self.encoders
        return replace(self.encoders, vae="pixels", vae_subfolder="", vae_dtype="float32")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """latentmill verify: prove a cache: check hashes and counts, decode latents and compare them with the images."""

    dataset: str
    """The cache."""
    source: str = ""
    """Input shards of the cache, to compare decoded latents with their images; "" = looked for by name in
    the folders that the manifest records, below the working directory or in the cache's own bucket; where they are not
    there, the cache alone is checked."""
    samples: Annotated[int, Ge(0)] = 64
    """Number of records that are decoded and compared with their images."""
    min_psnr: float = 20.0
    """Smallest median PSNR in dB between decoded latents and source images."""
    encoders: EncodersConfig | None = None
    """Encoders to load; by default those of the cache's contract."""
    of: str = ""
    """Where `dataset` holds columns: the cache that they belong to, with which their keys are compared; source then
    names what their values were made from."""
    report: str = ""
    """HTML page to write about the result; "" = none."""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """latentmill reference: feature statistics of real images, for FID, with the floors that no generator can pass."""

    dataset: str
    """A cache whose source images are the reference, at its resolution and crop."""
    source: str = ""
    """Input shards of the cache; "" = looked for by name in the folders that the manifest records, below the working
    directory or in the cache's own bucket."""
    dest: str = ""
    """File to write (.safetensors); "" = reference-FEATURES.safetensors inside the cache."""
    encoders: EncodersConfig | None = None
    """Encoders to load; by default those of the cache's contract."""
    features: FeaturesName = "democlip"
    """Feature network, as eval.features of train."""
    features_weights: str = ""
    """Weights of the feature network, as eval.features_weights of train."""
    images: Annotated[int, Ge(0)] = 0
    """Number of images to use; 0 = all."""


@dataclass(frozen=True, kw_only=True)
class DataVerbConfig:
    """latentmill data: show what ranks and nodes would read: the next batches, bytes, read amplification, bandwidth and
    memory. Reads the dataset's manifest alone."""

    dataset: str = ""
    """The cache; "" = that of `run`."""
    mix: tuple[str, ...] = ()
    """Further caches, as data.mix of train; [] = those of `run`, if it has any."""
    columns: tuple[str, ...] = ()
    """Columns of the caches, as data.columns of train; [] = those of `run`, if it has any."""
    weights: Weights = ()
    """Shares of the caches, as data.weights of train; [] = the run's, else in proportion to numbers of records."""
    run: str = ""
    """Run directory that provides the dataset, batch, seed, tail, rate and newest commit where they are not given."""
    at: Annotated[int, Ge(-1)] = -1
    """Sample number to begin at; a multiple of the batch. -1 = the run's newest commit, else 0."""
    world: Annotated[int, Ge(1)] = 8
    """Number of ranks; it must divide the batch."""
    nodes: Annotated[int, Ge(1)] = 1
    """Number of machines, each with the same number of ranks."""
    batch: Annotated[int, Ge(0)] = 0
    """Global batch in samples; 0 = the run's, else 64."""
    seed: SeedOrNone = -1
    """Seed of the sample order; -1 = the run's, else 0."""
    tail: Literal["", "drop", "wrap"] = ""
    """As data.tail of train; "" = the run's, else drop."""
    batches: Annotated[int, Ge(1)] = 16
    """Number of coming batches to look at."""
    images_per_s: Annotated[float, Ge(0)] = 0.0
    """Images per second of all ranks together, from which the bandwidth follows; 0 = the rate that the run measured,
    else no bandwidth is shown."""
