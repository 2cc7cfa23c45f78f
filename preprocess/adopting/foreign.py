"""Facts about adopted tars of latents that the tars do not state: a contract made from the configuration, the encoders
if they are given, and the first records."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.conditions.facts import BoxFacts, ClassFacts, Conditions
from pipeline.config import EncodersConfig, FiltersConfig, IndexConfig
from pipeline.data.format.contract import Contract, Member, TextFacts, stored_filters, stored_limits
from pipeline.data.format.contract_json import require_readable
from pipeline.data.format.manifest import FORMAT, UNCOND
from pipeline.data.format.objects import read_bounded
from pipeline.data.format.records import Record, npy_bytes
from pipeline.data.format.uncond import most_uncond_bytes, parse_uncond
from pipeline.errors import ContractMismatch, DatasetError, NotFound, ShardCorrupt, SourceError
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.text import TextTower, load_text
from pipeline.storage.base import Storage
from preprocess.adopting.scan import LatentShard, read_records, wanted_files
from preprocess.encoding.contract import portable
from preprocess.encoding.plan import read_plan
from preprocess.proving.against_source import STATE_TOLERANCE

UNKNOWN = "unknown"
OWN = {
    "moments": "moments.npy",
    "latents": "latents.npy",
    "text": "text.npy",
    "caption": "json:caption",
    "cond.boxes": "cond.boxes.npy",
    "cond.class": "cond.class.npy",
}
CAPTIONS_PROVED = 16  # captions that are encoded again and compared with the stored text states
DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class Facts:
    """Facts about all tars. layout: names of the members, None when they are those of `encode`. made: whether `encode`
    began this dataset; its contract is kept then. format: of the manifest. towers: the encoders, if they are given; no
    text tower where there are no captions."""

    contract: Contract
    layout: dict[str, str] | None
    made: bool
    format: Literal[2, 3] = FORMAT
    towers: tuple[FirstStage, TextTower | None] | None = None


def facts_of(storage: Storage, names: list[str], config: IndexConfig) -> Facts:
    """Contract and layout: those of the `encode` that began this dataset, or made from configuration and first
    record."""
    plan = read_plan(storage)
    format = plan.format if plan is not None else FORMAT
    if plan is not None and plan.contract.device != UNKNOWN:
        return Facts(plan.contract, None, made=True, format=format)
    names_of_members = _names(config)
    members = tuple(name for name in names_of_members if name != "caption")
    layout = None if all(OWN[name] == file for name, file in names_of_members.items()) else names_of_members
    towers = None
    if config.encoders:
        towers = (load_autoencoder(config.encoders), load_text(config.encoders) if config.text_member else None)
        refuse_other_kind(towers[0], config)
    records = first_records(storage, names, members, layout, config)
    contract = contract_of(records[0], towers, layout, config)
    require_readable(contract)
    if towers is not None and towers[1] is not None:
        prove_texts(records, towers[1], config)
    return Facts(contract, layout, made=False, format=format, towers=towers)


def refuse_other_kind(stage: FirstStage, config: IndexConfig) -> None:
    """Raises ContractMismatch for an autoencoder that gives no such arrays. Latents may be moments whose variance was
    not kept."""
    if stage.stored == config.stored or (stage.stored, config.stored) == ("moments", "latents"):
        return
    raise ContractMismatch(
        f"encoders.vae={config.encoders.vae if config.encoders else ''} gives {stage.stored} and stored="
        f"{config.stored}: " + ("give stored=latents" if stage.stored == "latents" else "name the one that made them")
    )


def _names(config: IndexConfig) -> dict[str, str]:
    """The file of each array, and of the caption, that records have."""
    names = {
        config.stored: config.moments_member,
        "text": config.text_member,
        "caption": config.caption_key if config.text_member else "",
        "cond.boxes": config.boxes_member,
        "cond.class": config.class_member,
    }
    return {name: file for name, file in names.items() if file}


def first_records(
    storage: Storage,
    names: list[str],
    members: tuple[str, ...],
    layout: dict[str, str] | None,
    config: IndexConfig,
) -> list[Record]:
    """The first few readable records of the first tar that has any. All other records must have the shapes of the
    first. Raises SourceError when there is none."""
    problem, advice = "", ""
    for name in names:
        records = list[Record]()
        with LatentShard(storage, name, config.limits) as shard:
            for scanned in read_records(shard, members, layout):
                if scanned.record is not None:
                    records.append(scanned.record)
                elif not problem:
                    problem = f"{storage.locate(name)}, byte {scanned.offset}: {scanned.detail}"
                    if scanned.reason == "member_unreadable":
                        advice = f"Write arrays as .npy of {' or '.join(DTYPES)}, and captions as UTF-8"
                        if "holds uint16" in scanned.detail:
                            advice = "If these are the bits of bfloat16, convert them: dest=CACHE in place of dataset="
                            advice += f", and moments_member={config.moments_member}:bfloat16"
                if len(records) == CAPTIONS_PROVED or (scanned.record is None and not config.max_rejects):
                    break
        if records or (problem and not config.max_rejects):
            break
    if not records:
        advice = advice or (
            f"Records of {', '.join(wanted_files(members, layout))} are looked for: say what yours are called with "
            "moments_member=, text_member= and caption_key=; text_member= alone for records without captions"
        )
        raise SourceError(f"{problem or config.source + ' holds no record'}. {advice}")
    return records


def prove_texts(records: list[Record], tower: TextTower, config: IndexConfig) -> None:
    """Raises ContractMismatch unless the text tower reproduces the stored text states of these captions."""
    fresh = tower.encode(tower.tokenize([record.meta["caption"] for record in records])).cpu().numpy()
    for record, states in zip(records, fresh, strict=True):
        stored = record.members["text"].astype(np.float32)
        far = float(np.abs(states - stored).max()) if states.shape == stored.shape else math.inf
        if not far <= STATE_TOLERANCE:
            raise ContractMismatch(
                f"record {record.key}: the text tower of encoders= gives states that differ by {far:.3g} from those "
                f"stored for its caption (caption_key={config.caption_key}): give the encoders that made them, or the "
                "captions that they are of"
            )


def contract_of(
    record: Record,
    towers: tuple[FirstStage, TextTower | None] | None,
    layout: dict[str, str] | None,
    config: IndexConfig,
) -> Contract:
    """The contract of tars with records like this one. Raises SourceError when its members cannot be used."""
    stage, tower = towers or (None, None)
    image, text, files = record.members[config.stored], record.members.get("text"), layout or OWN
    channels = stage.latent_channels if stage else config.channels
    factor = stage.downsampling if stage else config.downsampling
    stored_channels = 2 * channels if config.stored == "moments" else channels
    if image.ndim != 3 or image.shape[0] != stored_channels:
        kinds = {
            "moments": f"moments are ({2 * channels}, h, w), mean and log-variance of {channels} channels",
            "latents": f"latents are ({channels}, h, w)",
        }
        other = {2 * channels: "moments", channels: "latents"}.get(image.shape[0] if image.ndim == 3 else 0)
        explanation = {
            "latents": "it is a latent without its log-variance: give stored=latents",
            "moments": "it is a latent with its log-variance: give stored=moments",
        }.get(other or "", "it is neither moments nor latents")
        raise SourceError(
            f"record {record.key}: {files[config.stored]} has shape {image.shape}, and {kinds[config.stored]}: "
            f"{explanation}"
        )
    if text is not None and (text.ndim != 2 or (tower is not None and text.shape != (tower.length, tower.width))):
        expected_shape = f"({tower.length}, {tower.width})" if tower else "(L, D)"
        raise SourceError(
            f"record {record.key}: {files['text']} has shape {text.shape}, text states are {expected_shape}"
        )
    for name, dtypes in (
        (config.stored, DTYPES),
        ("text", DTYPES),
        ("cond.boxes", DTYPES[:1]),
        ("cond.class", ("int32",)),
    ):
        if name in record.members and record.members[name].dtype.name not in dtypes:
            wanted = " or ".join(dtypes)
            raise SourceError(f"record {record.key}: {files[name]} is {record.members[name].dtype}, not {wanted}")
    height, width = image.shape[1] * factor, image.shape[2] * factor
    return Contract(
        encoders=portable(config.encoders or EncodersConfig(name=UNKNOWN, vae=UNKNOWN, text=UNKNOWN)),
        vae_sha256=stage.weights_sha256 if stage else "",
        text_sha256=tower.weights_sha256 if tower else "",
        resolution=round(math.sqrt(width * height)),
        buckets=((width, height),),
        crop=UNKNOWN,
        seed=0,
        flip=False,
        filters=stored_filters(FiltersConfig()),
        limits=stored_limits(config.limits),
        resize=UNKNOWN,
        latent_shape=(channels, *image.shape[1:]),
        downsampling=factor,
        scale=stage.scale if stage else config.scale,
        shift=stage.shift if stage else config.shift,
        stored=config.stored,
        caption_key=config.caption_key if text is not None else "",
        text=_text_facts(text, tower) if text is not None else None,
        conditions=_conditions(record, layout, config),
        members=tuple(
            Member(name=name, shape=record.members[name].shape, dtype=record.members[name].dtype.name)
            for name in OWN
            if name in record.members
        ),
        batch=0,
        device=UNKNOWN,
        threads=0,
        versions={},
    )


def _text_facts(text: np.ndarray, tower: TextTower | None) -> TextFacts:
    """The facts of text states (L, D)."""
    return TextFacts(
        layer=tower.layer if tower else UNKNOWN,
        length=text.shape[0],
        width=text.shape[1],
        pad=tower.pad if tower else -1,
        eot=tower.eot if tower else -1,
        quick_gelu=tower.quick_gelu if tower else False,
    )


def _conditions(record: Record, layout: dict[str, str] | None, config: IndexConfig) -> Conditions:
    """The facts of the conditions that records like this one have. Raises SourceError for arrays of other shapes."""
    classes, boxes = (record.members.get(f"cond.{name}") for name in ("class", "boxes"))
    for name, array, wanted in (("cond.class", classes, ()), ("cond.boxes", boxes, (-1, 5))):
        if array is not None and (array.ndim != len(wanted) or array.shape[1:] != wanted[1:] or 0 in array.shape):
            shape = str(wanted).replace("-1", "N")
            raise SourceError(
                f"record {record.key}: {(layout or OWN)[name]} has shape {array.shape}, and {name} is {shape}"
            )
    return Conditions(
        classes=ClassFacts(count=config.classes, key=UNKNOWN) if classes is not None else None,
        boxes=BoxFacts(count=config.box_classes, most=len(boxes)) if boxes is not None else None,
    )


def empty_caption(storage: Storage, facts: Facts) -> bytes:
    """The bytes of uncond.npy: those of the existing file, or else the text tower's states (L, D) float16; b"" where
    there are no captions. Raises DatasetError when there is neither a file nor a tower or the file is unusable, and
    ContractMismatch when the file is not what the tower gives."""
    text = facts.contract.text
    if text is None:
        return b""
    tower = facts.towers[1] if facts.towers else None
    tower_states = tower.encode(tower.tokenize([""]))[0].half().cpu().numpy() if tower else None
    try:
        data = read_bounded(storage, UNCOND, most_uncond_bytes(facts.contract))
    except NotFound:
        if tower_states is None:
            raise DatasetError(
                f"{storage.url} has no {UNCOND}, the encoded empty caption ({text.length}, {text.width}): put it "
                "there, or give the encoders (encoders=sd1), which make it"
            ) from None
        return npy_bytes(tower_states)
    advice = "put the right one there, or delete it and give the encoders (encoders=sd1), which make it"
    try:
        stored = parse_uncond(data, facts.contract)
    except ShardCorrupt as error:
        raise DatasetError(f"{storage.locate(UNCOND)} {error}: {advice}") from None
    if tower_states is not None and np.abs(stored.astype(np.float32) - tower_states).max() > STATE_TOLERANCE:
        raise ContractMismatch(f"{storage.locate(UNCOND)} is not what encoders= give for the empty caption: {advice}")
    return data
