"""The manifest: what a cache promises (its contract) and what proves it (hashes and counts of every shard).

It is `manifest.json`, written last: without it there is no dataset. Its bytes are canonical, so equal caches have equal
manifests, and no time, host or absolute path enters it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.errors import ContractMismatch, DatasetError, DestinationExists, NotFound
from pipeline.storage import Storage

MANIFEST = "manifest.json"
UNCOND = "uncond.npy"
FORMAT = 1
ENCODER_FACTS = (  # what two caches, or a cache and loaded encoders, must share to serve one model
    "vae_sha256",
    "text_sha256",
    "pixel_range",
    "channel_order",
    "latent_shape",
    "downsampling",
    "scale",
    "shift",
    "stored",
    "text",
)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Member:
    """One array of every record."""

    name: str
    """moments, text or cond.NAME."""
    shape: tuple[int, ...]
    """Its shape; -1 where a side differs between records."""
    dtype: str
    """numpy's name of its type."""


@dataclass(frozen=True, kw_only=True)
class TextFacts:
    """How captions became states (L, D)."""

    storage: str = "full"
    """full: every position of the context is stored."""
    layer: str
    """Hidden layer, followed by the tower's final norm: last or penultimate."""
    length: int
    """Context length L in tokens, start and end included."""
    width: int
    """Width D of a state."""
    pad: int
    """Token id after the end token."""
    eot: int
    """Token id that ends a caption."""


@dataclass(frozen=True, kw_only=True)
class Contract:
    """Everything that a cache's bytes depend on besides its source. Trainers refuse a cache whose contract differs from
    what they need; a rerun of encode refuses a destination begun under another one."""

    encoders: dict[str, Any]
    """The encoders' configuration, as given."""
    vae_sha256: str
    """Hash of the autoencoder's weights (autoencoder.weights_hash)."""
    text_sha256: str
    """Hash of the text tower's weights."""
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    """Pixel values that the autoencoder was given."""
    channel_order: str = "RGB"
    """Order of the pixels' channels."""
    resolution: int
    """Side of the encoded crop in pixels."""
    crop: str
    """Crop policy."""
    resize: str
    """Resampling filter."""
    latent_shape: tuple[int, int, int]
    """(C, h, w) of a latent."""
    downsampling: int
    """Pixels per latent position, along a side."""
    scale: float
    """A latent is (z - shift) * scale for a posterior sample z. Stored moments are unscaled."""
    shift: float
    """See scale."""
    stored: str = "moments"
    """moments: posterior mean and log-variance, from which the trainer samples anew at every visit."""
    caption_key: str
    """Where captions came from. Captions are never dropped in a cache."""
    text: TextFacts
    """The text states."""
    members: tuple[Member, ...]
    """Arrays of every record."""
    batch: int
    """Images per encoder batch; the last of a unit is padded to it."""
    device: str
    """Kind of device that encoded: cpu or cuda."""
    threads: int
    """CPU threads of each encoding process; 0 when a GPU encoded."""
    versions: dict[str, str]
    """Packages whose arithmetic the bytes depend on."""

    def differences(self, other: Contract, names: tuple[str, ...] | None = None) -> list[str]:
        """One readable line per field (of `names`, or of all) whose values differ: 'name: mine, not other's'."""
        names = names or tuple(f.name for f in dataclasses.fields(self))
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in names)
        return [f"{name}: {_brief(mine)}, not {_brief(theirs)}" for name, mine, theirs in pairs if mine != theirs]


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One cached shard: one unit of work, made from one input shard."""

    name: str
    """Its tar, relative to the manifest."""
    samples: int
    """Records in it (= accepted)."""
    bytes: int
    """Size of the tar."""
    sha256: str
    """Of the tar."""
    index_sha256: str
    """Of its index: record offsets, sizes and hashes."""
    source: str
    """File name of the input shard."""
    source_sha256: str
    """Of the input shard."""
    source_bytes: int
    """Size of the input shard."""
    read: int
    """Samples found in the input shard."""
    accepted: int
    """Samples cached."""
    rejected: dict[str, int]
    """Samples rejected, by reason. accepted + all of these = read."""

    @property
    def index_name(self) -> str:
        """Its index, relative to the manifest."""
        return self.name.removesuffix(".tar") + ".index.json"


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Per-channel statistics of the scaled posterior means, (C,) each."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A finished cache."""

    contract: Contract
    shards: tuple[ShardEntry, ...]
    uncond_sha256: str
    """Of uncond.npy, the encoded empty caption (L, D) float16."""
    statistics: Statistics
    source: str
    """The source pattern as it was given; only its last part when it was an absolute path."""
    version: int = 1
    """Version of this dataset."""
    format: int = FORMAT
    """Version of the layout."""

    @property
    def samples(self) -> int:
        """Records in the cache."""
        return sum(shard.samples for shard in self.shards)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes: the dataset's identity."""
        return hashlib.sha256(manifest_bytes(self)).hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# Bytes


def canonical_json(value: Any) -> bytes:
    """The one JSON of a value: sorted keys, no spaces, floats by shortest round trip, no NaN, newline at the end."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def manifest_bytes(manifest: Manifest) -> bytes:
    """The canonical bytes of a manifest."""
    return canonical_json(dataclasses.asdict(manifest))


def contract_from_json(value: dict[str, Any]) -> Contract:
    """The contract that canonical_json(asdict(...)) wrote."""
    members = tuple(_build(Member, {**m, "shape": tuple(m["shape"])}) for m in value["members"])
    nested = {"text": _build(TextFacts, value["text"]), "members": members}
    tuples = {name: tuple(value[name]) for name in ("pixel_range", "latent_shape")}
    return _build(Contract, {**value, **nested, **tuples})


def parse_manifest(data: bytes) -> Manifest:
    """Reads a manifest. Raises DatasetError when it is damaged or of a format that this version does not know."""
    try:
        value = json.loads(data)
        if value.get("format") != FORMAT:
            raise DatasetError(
                f"its format is {value.get('format')}, this version reads {FORMAT}: use a newer latentmill"
            )
        contract = contract_from_json(value["contract"])
        shards = tuple(_build(ShardEntry, shard) for shard in value["shards"])
        statistics = Statistics(mean=tuple(value["statistics"]["mean"]), std=tuple(value["statistics"]["std"]))
        return _build(Manifest, {**value, "contract": contract, "shards": shards, "statistics": statistics})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"it is damaged ({type(error).__name__}: {error}): encode the cache again") from None


def load_manifest(storage: Storage) -> Manifest:
    """The manifest of the cache at `storage`. Raises DatasetError, saying what to do, when there is none to be read."""
    try:
        data = storage.get(MANIFEST)
    except NotFound:
        begun = any(storage.list(""))
        hint = (
            "its encode was not finished: run the same `latentmill encode` again"
            if begun
            else "nothing is there: encode it first, or mend the path"
        )
        raise DatasetError(f"{storage.url} holds no {MANIFEST}, so it is not a dataset; {hint}") from None
    try:
        return parse_manifest(data)
    except DatasetError as error:
        raise DatasetError(f"{storage.url}/{MANIFEST} cannot be read: {error}") from None


def commit_manifest(storage: Storage, manifest: Manifest) -> bool:
    """Publishes the manifest; False when an identical one is there already. Raises DestinationExists for another."""
    data = manifest_bytes(manifest)
    if storage.put_if_absent(MANIFEST, data):
        return True
    if storage.get(MANIFEST) != data:
        raise DestinationExists(f"{storage.url} holds a finished cache with another {MANIFEST}: choose another dest")
    return False


def require_match(wanted: Contract, found: Contract, what: str, names: tuple[str, ...] = ENCODER_FACTS) -> None:
    """Raises ContractMismatch, which lists the differences, unless both contracts share the facts `names`.

    what: names the cache in the message, for example "data.val=cache-val".
    """
    differences = found.differences(wanted, names)
    if differences:
        raise ContractMismatch(
            f"{what} was made differently: {'; '.join(differences)}. Encode it with the same encoders"
        )


def _build(cls: type[T], value: dict[str, Any]) -> T:
    """cls(**value), strict about names."""
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if set(value) != known:
        raise ValueError(f"{cls.__name__} has {sorted(set(value) ^ known)} too many or too few")
    return cls(**value)


def _brief(value: Any) -> str:
    """A value for a message; hashes are cut to 12 digits."""
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return str(value)
