"""Statistics of real images, to which generated images are compared, and the floors that no generator can pass.

A reference dataset is cut in two. The features of the later part give the reference Gaussian. The first part is held
out: the features of its real images and of their reconstructions by the autoencoder replace generated ones. So
    FID(N generated, reference), FID(N reconstructed, reference), FID(N real, reference)
have the same N, the same reference and disjoint sets of images, and can be compared, although each of them depends on
N. The features themselves are stored, so that floors are exact for any N up to the number held out.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from pipeline.data.format.bounds import Side
from pipeline.data.format.contract import Contract
from pipeline.data.format.objects import read_bounded
from pipeline.errors import ContractMismatch, DatasetError, DestinationExists, NotFound, ParseError, StorageError
from pipeline.evaluation.features.networks import Features
from pipeline.evaluation.metrics.fid import Gaussian, RankDeficient, Statistics, fid
from pipeline.log import log
from pipeline.parsing.bounds import Whole
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.storage.urls import open_storage, split_url

FORMAT: Literal[1] = 1
LARGEST = 1 << 30
"""Bytes of a file."""
FLOOR_SIZES = (256, 512, 1000, 2000, 5000)
"""Numbers of images in the file's table of floors. Floors for other numbers are computed on demand."""


@dataclass(frozen=True, kw_only=True)
class ReferenceFacts:
    """What a reference was made from, which evaluations must match."""

    features: str
    """Name of the feature network."""
    features_sha256: str
    """Hash of its weights."""
    resolution: Side
    """Side of the images in pixels."""
    crop: str
    """Crop policy."""
    resize: str
    """Resampling filter."""
    dataset: str
    """Digest of the manifest of the dataset."""
    vae_sha256: str
    """Hash of the autoencoder that made the reconstructions."""
    clip_sha256: str
    """The towers of the CLIP scores in `scores` (hash of both hashes)."""
    images: Annotated[int, Whole(2, 2**40)]
    """Real images in the reference Gaussian."""
    held: Annotated[int, Whole(2, 10**6)]
    """Other real images, held out for floors."""
    scores: dict[str, Any] = field(default_factory=dict)
    """Other metrics of the held-out images: clip_score_real, clip_score_reconstruction, attribute_accuracy_..."""
    floors: dict[str, dict[str, float]] = field(default_factory=dict)
    """FID of the first N held-out images against the reference, {"N": {"real": ..., "reconstruction": ...}}."""
    format: Literal[1] = FORMAT
    """Version of this file's layout."""


@dataclass(frozen=True)
class Reference:
    """A reference file. real, reconstruction (M, E): features of the held-out images and of their reconstructions."""

    facts: ReferenceFacts
    gaussian: Gaussian
    real: Tensor
    reconstruction: Tensor
    sha256: str = ""

    def floors(self, images: int) -> dict[str, float]:
        """FID of `images` real images and of as many reconstructions, and the number used: at most all that are held
        out."""
        count = min(images, len(self.real))
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", RankDeficient
            )  # reported once, where the FID of generated images is computed
            return {
                "real": fid(Statistics.of(self.real[:count]).gaussian(), self.gaussian),
                "reconstruction": fid(Statistics.of(self.reconstruction[:count]).gaussian(), self.gaussian),
                "images": count,
            }

    def require(self, contract: Contract, features: Features, what: str, *, floors: bool = True) -> None:
        """Raise ContractMismatch, naming every difference, unless images of this contract and these features compare
        with the reference. what: name of the reference in the message. floors: whether its reconstructions must be of
        the contract's autoencoder, too."""
        pairs = {
            "resolution": (self.facts.resolution, contract.resolution),
            "crop": (self.facts.crop, contract.crop),
            "resize": (self.facts.resize, contract.resize),
            "features": (self.facts.features, features.name),
            "features' weights": (self.facts.features_sha256[:12], features.sha256[:12]),
        }
        if floors:
            pairs["autoencoder"] = (self.facts.vae_sha256[:12], contract.vae_sha256[:12])
        differing = [
            f"{name} {of_reference}, not {of_run}"
            for name, (of_reference, of_run) in pairs.items()
            if of_reference != of_run
        ]
        if differing:
            raise ContractMismatch(
                f"{what} does not fit this run: {'; '.join(differing)}. Make one with `latentmill reference` from a "
                "dataset that was encoded like this run's"
            )


def save_reference(url: str, reference: Reference) -> None:
    """Write the file at a path or URL in a bucket, whole or not at all."""
    tensors = {
        "mean": reference.gaussian.mean,
        "cov": reference.gaussian.cov,
        "held.real": reference.real,
        "held.reconstruction": reference.reconstruction,
    }
    metadata = {"latentmill.reference": json.dumps(asdict(reference.facts), sort_keys=True)}
    root, key = split_url(url)
    open_storage(root).put(key, to_safetensors({name: t.contiguous() for name, t in tensors.items()}, metadata))


def fitting(given: str, own: str, val: str, contract: Contract) -> Reference | None:
    """The reference at `given`, or else a run's own, for pictures of the cache at `val` with this contract; None where
    there is none, and, with a warning, where the run's own is of pictures of another resolution."""
    if not (given or own):
        return None
    reference = load_reference(given or own)
    if given or reference.facts.resolution == contract.resolution:
        return reference
    log.warning(
        f"eval: no FID: the run's reference is of {reference.facts.resolution} pixels, and data.val={val} of "
        f"{contract.resolution}; give reference= for those"
    )
    return None


def load_reference(url: str) -> Reference:
    """Read a file that save_reference wrote. Raises DatasetError, StorageError."""
    root, key = split_url(url)
    try:
        return _parse(read_bounded(open_storage(root), key, LARGEST))
    except NotFound:
        raise DatasetError(
            f"there are no reference statistics at {url}: make them with `latentmill reference`"
        ) from None
    except (SafetensorError, ParseError) as error:
        raise DatasetError(
            f"{url} holds no reference statistics of this version ({error}): make them again with `latentmill "
            "reference`"
        ) from None


def _parse(data: bytes) -> Reference:
    """The reference of a file's bytes. Raises ParseError, SafetensorError."""
    tensors = from_safetensors(data)
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__") if type(header) is dict else None
    if type(metadata) is not dict or type(metadata.get("latentmill.reference")) is not str:
        raise ParseError("it has no facts of a reference")
    facts = build(ReferenceFacts, parse_json(metadata["latentmill.reference"]), unknown="pass")
    width = len(tensors["mean"]) if "mean" in tensors and tensors["mean"].ndim == 1 else 0
    shapes = {"mean": (width,), "cov": (width, width), "held.real": (facts.held, width)}
    shapes["held.reconstruction"] = shapes["held.real"]
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        dtypes = (torch.float64,) if name in ("mean", "cov") else (torch.float16, torch.float32, torch.float64)
        if tensor is None or not width or tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            raise ParseError(f"its {name} is not {shape} of {' or '.join(str(d)[6:] for d in dtypes)}")
        if not bool(tensor.isfinite().all()):
            raise ParseError(f"its {name} holds NaN or infinity")
    cov = tensors["cov"]
    if not torch.allclose(cov, cov.T) or bool((cov.diagonal() < 0).any()):
        raise ParseError("its cov is no covariance")
    gaussian = Gaussian(facts.images, tensors["mean"], cov)
    held_out = tensors["held.real"], tensors["held.reconstruction"]
    return Reference(facts, gaussian, *held_out, sha256=hashlib.sha256(data).hexdigest())


def require_free_or_own(url: str, made_of: dict[str, str], images: int) -> None:
    """Raise DestinationExists when something is at `url` that is not the reference which would be written there.

    made_of: some of its facts. images: real images in it and held out, together.
    """
    root, key = split_url(url)
    storage = open_storage(root)
    path = storage.local_path(key)
    if path is not None and path.is_dir():
        raise DestinationExists(f"dest={url} is a folder: name a file, for example {url.rstrip('/')}/ref.safetensors")
    above = next((folder for folder in path.parents if folder.exists()), None) if path is not None else None
    if above is not None and not above.is_dir():
        raise DestinationExists(f"dest={url} lies below {above}, which is a file: name another place")
    if not storage.exists(key) and (path is None or not path.is_symlink()):
        return
    try:
        facts = load_reference(url).facts
    except (DatasetError, StorageError):
        raise DestinationExists(f"{url} is there, and is no reference: give another dest=, or move it") from None
    differing = [name for name, value in made_of.items() if getattr(facts, name) != value]
    if differing or facts.images + facts.held != images:
        raise DestinationExists(
            f"{url} is there, and of {', '.join(differing) or 'another number of images'} other than this one: give "
            "another dest=, or delete it"
        )
