"""What a dataset holds, in text and tables: its contract, the bytes of each member, its latents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from pipeline.conditions.facts import Conditions
from pipeline.config import FiltersConfig
from pipeline.data.format.contract import Contract, plain
from pipeline.data.format.manifest import Manifest
from pipeline.report.elements import LONGEST, amount, cell, counted, folded, meter, prose, table, text

MOST_SOURCES = 20  # patterns listed
MOST_NAMES = 8  # of classes
STORAGES = {
    "full": "the states of every position",
    "trimmed": "the states up to the caption's end token",
    "tokens": "token ids, of which the trainer makes the states",
}
LATENTS = {
    "moments": ("a sample z of the posterior that is stored", "Scaled posterior means"),
    "latents": ("the z that is stored", "Scaled latents"),
    "pixels": ("pixels z that are stored, in the range of −1 to 1", "Scaled pixels"),
}
"""What z is, and what is measured, by what is stored."""


def records_and_bytes(manifest: Manifest) -> tuple[int, int]:
    """Number of records in the tars, including excluded ones, and the tars' size in bytes."""
    return sum(shard.samples for shard in manifest.shards), sum(shard.bytes for shard in manifest.shards)


def in_words(manifest: Manifest) -> str:
    """A table of the contract in words, and the whole contract as folded JSON."""
    contract = manifest.contract
    threads = f" with {counted(contract.threads, 'thread')}" if contract.threads else ""
    crop = f"{contract.crop} crop" + (f" of seed {contract.seed}" if contract.crop == "random" else "")
    colours = ", colour profiles applied" if contract.colour == "srgb" else ""
    ellipsis = " …" if len(manifest.sources) > MOST_SOURCES else ""
    facts = {
        "Images": f"{_sizes(contract)}, {crop}, resized by {contract.resize}{colours}",
        "Flipped": "every image is stored a second time, flipped left to right" if contract.flip else "no",
        "Filters": _comma_separated(f"{name}={_setting_text(value)}" for name, value in _filters(contract)) or "none",
        **_captions(contract),
        **_conditions(contract.conditions),
        "Autoencoder": _autoencoder(contract),
        "Encoded on": f"{contract.device}{threads}, in batches of {contract.batch}; "
        + _comma_separated(f"{name} {version}" for name, version in sorted(contract.versions.items())),
        "Sources": _comma_separated(manifest.sources[:MOST_SOURCES]) + ellipsis,
    }
    rows = (f"<tr><td>{name}</td>{prose(value, 4 * LONGEST)}</tr>" for name, value in facts.items())
    contract_json = json.dumps(plain(contract), indent=2, ensure_ascii=False, sort_keys=True)
    return table((), rows) + folded("The whole contract", f"<pre>{text(contract_json, 100 * LONGEST)}</pre>")


def _autoencoder(contract: Contract) -> str:
    """The autoencoder, or how pixels are stored."""
    if contract.stored == "pixels":
        kind = "a lossless PNG of each crop" if contract.pixels == "png" else "an array of each crop"
        return f"none: pixels are stored, {kind}"
    return f"{_encoder(contract, 'vae', 'vae_subfolder', 'vae_dtype')}, weights {contract.vae_sha256}"


def _captions(contract: Contract) -> dict[str, str]:
    """What is stored of captions."""
    states = contract.text
    if states is None:
        return {"Captions": "none"}
    places = contract.caption_key
    if states.captions > 1:
        shares = states.weights or (1.0,) * len(states.keys)
        weights = (f"{key} (weight {weight:g})" for key, weight in zip(states.keys, shares, strict=True))
        places = f"{_comma_separated(weights)}, {states.captions} of each image at most"
    return {
        "Captions": f"from {places}, never dropped; stored {states.storage}: {STORAGES[states.storage]}",
        "Text states": f"{states.length} × {states.width}, {states.layer} layer; padded with {states.pad}",
        "Text tower": f"{_encoder(contract, 'text', 'text_pretrained')}, weights {contract.text_sha256}",
    }


def _conditions(facts: Conditions) -> dict[str, str]:
    """What is stored beside image and caption."""
    rows = {}
    if facts.classes is not None:
        rows["Classes"] = f"{facts.classes.count:,}, from {facts.classes.key}{_named(facts.classes.names)}"
    if facts.boxes is not None:
        names = _named(facts.boxes.names)
        rows["Boxes"] = f"the {facts.boxes.most} largest of a crop, of {facts.boxes.count:,} classes{names}"
    if facts.labels is not None:
        shift = f"; {facts.labels.offset} was added to the files' values" if facts.labels.offset else ""
        cells = f"{counted(facts.labels.grid, 'cell')} to a latent position, along a side"
        rows["Label maps"] = f"{facts.labels.count} labels{_named(facts.labels.names)}; {cells}{shift}"
    if facts.lowres is not None:
        several = f", {counted(facts.lowres.variants, 'variant')}" if facts.lowres.variants > 1 else ""
        rows["Low resolution"] = f"1/{facts.lowres.factor} along a side, {facts.lowres.degradation}{several}"
    if facts.mask is not None:
        several = f", {counted(facts.mask.variants, 'variant')}" if facts.mask.variants > 1 else ""
        rows["Masks"] = f"{_comma_separated(facts.mask.kinds)}{several}; the hole is {facts.mask.hole}"
    if facts.pixels:
        rows["Pixels"] = "the crops themselves"
    return rows


def _named(names: Sequence[str]) -> str:
    return f" ({_comma_separated(names[:MOST_NAMES])}{', …' if len(names) > MOST_NAMES else ''})" if names else ""


def _sizes(contract: Contract) -> str:
    """The sizes of the crops."""
    sizes = [f"{width} × {height}" for width, height in contract.buckets]
    if len(sizes) == 1:
        return f"{sizes[0]} pixels"
    return f"{len(sizes)} buckets from {sizes[0]} to {sizes[-1]} pixels, of the area of {contract.resolution} squared"


def _filters(contract: Contract) -> list[tuple[str, object]]:
    """Filters whose value is not the default."""
    off = asdict(FiltersConfig())
    return [(name, value) for name, value in sorted(contract.filters.items()) if value and value != off.get(name)]


def _encoder(contract: Contract, *names: str) -> str:
    """Values of the encoders' configuration under these names, without empty ones."""
    return _comma_separated(str(contract.encoders[name]) for name in names if contract.encoders.get(name))


def _comma_separated(words: Iterable[str]) -> str:
    """Words with commas between them."""
    return ", ".join(words)


def _setting_text(value: object) -> str:
    """A setting as text, in which lists and tuples look the same."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def by_member(manifest: Manifest, member_bytes: Mapping[str, int]) -> str:
    """A table of bytes by member, and of the tars' own headers and padding."""
    records, size = records_and_bytes(manifest)
    members = {member.name: member for member in manifest.contract.members}
    lines = [
        (name, " × ".join("*" if side < 0 else str(side) for side in member.shape), member.dtype)
        for name, member in members.items()
    ]
    lines += [(name, "", "") for name in sorted(member_bytes.keys() - members.keys())]
    overhead = {"tar headers and padding": size - sum(member_bytes.values())}
    rows = []
    for name, shape, dtype in [*lines, *((name, "", "") for name in overhead)]:
        member_size = (overhead if name in overhead else member_bytes).get(name, 0)
        cells = map(cell, (name, shape, dtype, amount(member_size / max(records, 1)), amount(member_size)))
        rows.append(f"<tr>{''.join(cells)}{meter(member_size, size)}</tr>")
    cells = map(cell, ("all", "", "", amount(size / max(records, 1)), amount(size), ""))
    rows.append(f'<tr class="sum">{"".join(cells)}</tr>')
    varies = any("*" in shape for _, shape, _ in lines)
    note = '<p class="note">* differs between records</p>' if varies else ""
    return table(("member", "shape", "type", "a record", "all records", "share"), rows) + note


def latents(manifest: Manifest) -> str:
    """How a latent is computed from what is stored, and the latents' statistics."""
    contract, statistics = manifest.contract, manifest.statistics
    shifted = f"(z − {contract.shift:g})" if contract.shift else "z"
    origin, measured = LATENTS[contract.stored]
    definition = (
        f"A latent is {shifted} × {contract.scale:g} for {origin}, "
        f"with {counted(contract.downsampling, 'pixel')} to a position. {measured}, by channel:"
    )
    rows = (
        f"<tr>{cell(str(number))}{cell(f'{mean:+.4f}')}{cell(f'{std:.4f}')}</tr>"
        for number, (mean, std) in enumerate(zip(statistics.mean, statistics.std))
    )
    return f'<p>{definition}</p><div class="beside">{table(("channel", "mean", "standard deviation"), rows)}</div>'
