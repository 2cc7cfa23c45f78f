"""Evaluations of autoencoders that can be taken instead of made again, and their names in a run directory.

    evals/000000032000-reconstruct-n512-democlip-3f2a91c07d11/

A name ends in a digest of all that the figures depend on, as those of diffusion models do (evaluation/kept.py).
"""

from __future__ import annotations

import hashlib
import json

from pipeline.errors import ContractMismatch, NotFound, ParseError
from pipeline.evaluation.reconstruction.card import GIVEN, Card, parse_card
from pipeline.evaluation.reconstruction.evaluate import Reconstructing
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.storage.base import Storage


def made_of(reconstructing: Reconstructing, stage: FirstStage) -> dict[str, str]:
    """Hashes and names of all that figures depend on, numbers aside; "" for what there is none of."""
    reference, features, perceptual = reconstructing.reference, reconstructing.features, reconstructing.perceptual
    network = features if reference is not None else None
    return {
        "autoencoder": stage.weights_sha256,
        "dtype": str(stage.dtype).removeprefix("torch."),
        "pictures": reconstructing.pictures.manifest.digest,
        "reference": reference.sha256 if reference else "",
        "features": network.sha256 if network else "",
        "resize": network.resize if network else "",
        "perceptual": perceptual.sha256 if perceptual else "",
    }


def of_card(card: Card) -> dict[str, str]:
    """The same, of a card."""
    return {
        "autoencoder": card.vae_sha256,
        "dtype": str(card.autoencoder.get("dtype", "")),
        "pictures": str(card.pictures["dataset"]),
        "reference": str((card.reference or {}).get("sha256", "")),
        "features": str((card.features or {}).get("sha256", "")),
        "resize": str((card.features or {}).get("resize", "")),
        "perceptual": card.perceptual.get("sha256", ""),
    }


def differing(card: Card, reconstructing: Reconstructing, stage: FirstStage) -> list[str]:
    """Differences between what a card's figures were made from and what is loaded here, one line each."""
    here, there = made_of(reconstructing, stage), of_card(card)
    return [
        f"{name}: {there[name][:12] or 'none'} on the card, {here[name][:12] or 'none'} here"
        for name in here
        if here[name] != there[name]
    ]


def require(card: Card, reconstructing: Reconstructing, stage: FirstStage) -> None:
    """Raise ContractMismatch, naming every difference, unless the card's figures can be made again here."""
    if lines := differing(card, reconstructing, stage):
        raise ContractMismatch(f"the card's figures cannot be made again from these: {'; '.join(lines)}")


def full_name(reconstructing: Reconstructing, stage: FirstStage, images: int, weights: str) -> str:
    """The name of an evaluation. weights: as on the card."""
    facts = json.dumps(made_of(reconstructing, stage) | {"images": str(images)}, sort_keys=True)
    suffix = "" if weights in ("ema", GIVEN) else f"-{weights.replace('=', '')}"
    features = f"-{reconstructing.features.name}" if reconstructing.reference and reconstructing.features else ""
    return f"reconstruct-n{images}{suffix}{features}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"


def kept_card(
    storage: Storage, prefix: str, reconstructing: Reconstructing, stage: FirstStage, images: int
) -> Card | None:
    """The card of a complete evaluation of `images` pictures whose keys begin with `prefix`, if it is of these; None
    where there is none."""
    try:
        storage.stat(f"{prefix}metrics.json")  # written last
        card = parse_card(storage.get(f"{prefix}card.json"))
    except (NotFound, ParseError):  # no card, or a damaged one
        return None
    return card if card.images == images and not differing(card, reconstructing, stage) else None
