"""latentmill plan: what encoding, training and evaluations will take, before anything is run.

    latentmill plan experiment=sd1_256 cluster=a100 nodes=8 source='s3://b/laion/{00000..09999}.tar' price=2.0
    latentmill plan experiment=sd1_256 images=100M gpu=h100 cluster.processes=8 nodes=8
    latentmill plan experiment=demo images=10000

Words are the verb's own, those of the verb that trains, and those of encode after `encode.`. Reads configurations,
manifests and a few shards; imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.config import AutoencoderConfig, PlanConfig, RunConfig, TrainConfig
from pipeline.config.check.groups import check_world
from pipeline.config.loading.folders import groups
from pipeline.config.loading.load import load
from pipeline.config.values.counts import parse_count
from pipeline.data.format.manifest import MANIFEST, Manifest
from pipeline.data.joined.opening import joined
from pipeline.errors import ConfigError, DestinationExists, NotFound, ParseError
from pipeline.log import show
from pipeline.parsing.values import parse_json
from pipeline.planning.happened import PLAN_BYTES
from pipeline.planning.plan.encoding import Cached, cached
from pipeline.planning.plan.expected import expected_words
from pipeline.planning.plan.job import Machines
from pipeline.planning.plan.machines import gpu_of, names
from pipeline.planning.plan.networks import Encoders
from pipeline.planning.plan.page import page
from pipeline.planning.plan.sections import Plan
from pipeline.planning.plan.speeds import Speeds
from pipeline.planning.plan.whole import Asked, encoders_of, job_of, plan_of
from pipeline.planning.rates.rates import Rates
from pipeline.runs.datasets import check_against_contract, require_pixels
from pipeline.runs.directory import dataset_urls
from pipeline.storage.urls import open_storage, split_url

ENCODE = "encode."
RUN, CACHE, HELD_OUT = "planned-run", "planned-cache", "planned-cache-val"
"""Places that stand for those that are not given. Nothing is opened there."""


def main(arguments: Sequence[str]) -> int:
    """Print the plan of a command line, and write it where json= says so. Returns 0. Raises ConfigError, OverrideError,
    DatasetError, SourceError, StorageError, DestinationExists."""
    words = divided(arguments)
    config: PlanConfig = load("plan", words.own)
    if config.json:
        require_plan(config.json)
    plan = planned(config, words)
    if config.json:
        put_plan(config.json, plan)
    show(page(plan))
    return 0


def planned(config: PlanConfig, words: Words) -> Plan:
    """The plan that words describe. config: of the verb's own."""
    verb = words.verb(config.verb)
    run: RunConfig = load(verb, words.filled)
    machines = machines_of(config, words, run)
    if run.deepspeed.engine == "torch" and machines.world > 1:
        raise ConfigError(
            f"deepspeed.engine=torch trains in one process, and {machines.world} are asked for: deepspeed=zero2"
        )
    check_world(run.optim, machines.world)
    given, downsampling = expected_words(words.experiment, run, words.encode)
    places = [f"source={config.source or 'planned-source'}", f"dest={CACHE}"]
    named = {word.partition("=")[0] for word in given}
    encode = load("encode", [*(place for place in places if place.partition("=")[0] not in named), *given])
    manifests = manifests_of(run, bool(config.images or config.source)) if run.data.train != CACHE else ()
    if manifests:
        largest = max(manifests, key=lambda manifest: math.prod(manifest.contract.latent_shape))
        found = Cached(largest.contract, manifests=manifests)
    else:
        source = encode.source if config.source or "source" in named else ""
        images = parse_count(config.images, "images") if config.images else 0
        encode = replace(encode, source=source)
        found = cached(encode, run, images, config.trial, config.downsampling or downsampling)
    encoders = encoders_of(run, found.contract) if manifests else Encoders.of(encode.used_encoders, found.contract)
    job = job_of(run, found, encoders, machines)
    title = f"latentmill {verb}{f' experiment={words.experiment}' if words.experiment else ''} on {machines.words}"
    speeds = Speeds(Rates.load(config.rates or None), config.efficiency)
    return plan_of(Asked(title, job, found, encode, encoders, config.price or config.cluster.price), speeds)


def machines_of(config: PlanConfig, words: Words, run: RunConfig) -> Machines:
    """The machines that a cluster, a kind of GPU, or neither describes. Raises ConfigError."""
    cluster = config.cluster
    with_gpus = bool(config.gpu) or run.device == "cuda" or (words.machines and cluster.gpus > 0)
    if run.device == "cpu":
        if config.gpu:
            raise ConfigError(f"gpu={config.gpu} and device=cpu contradict each other: leave one out")
        with_gpus = False
    if config.efficiency and not with_gpus:
        raise ConfigError(f"efficiency={config.efficiency:g} is a share of a GPU's peak: name the GPU with gpu=NAME")
    gpu = (config.gpu or cluster.gpu_type) if with_gpus else ""
    if with_gpus and not gpu:
        raise ConfigError(f"gpu=NAME is missing: which GPU is it to be? {names()}; without one, device=cpu")
    if words.machines and run.launch.processes > 1:
        raise ConfigError("launch.processes starts ranks on one machine: here cluster.nodes and cluster.processes do")
    same = not (config.gpu and cluster.gpu_type) or gpu_of(config.gpu) == gpu_of(cluster.gpu_type)
    return Machines(
        nodes=cluster.nodes if words.machines else 1,
        ranks=cluster.processes if words.machines else run.launch.processes,
        gpu=gpu,
        memory_gb=cluster.gpu_memory_gb if same or words.gives("cluster.gpu_memory_gb") else 0.0,
        network_gb_s=cluster.network_gb_s,
        storage_gb_s=cluster.storage_gb_s,
        threads=cluster.cpus if words.machines else run.launch.threads,
    )


def manifests_of(run: RunConfig, planned: bool) -> tuple[Manifest, ...]:
    """The manifests of the caches that are trained on, checked against the network. planned: whether they are to be
    made, where none is there: then (). Raises DatasetError, ContractMismatch, StorageError."""
    storages = [open_storage(url) for url in dataset_urls(run.data)]
    if planned and not any(storage.exists(MANIFEST) for storage in storages):
        return ()
    found = tuple(joined(storage, run.data.columns) for storage in storages)
    for manifest, url in zip(found, dataset_urls(run.data), strict=True):
        if isinstance(run, AutoencoderConfig):
            require_pixels(run, manifest.contract, f"data.train={url}")
        elif isinstance(run, TrainConfig):
            check_against_contract(run, manifest, None)
    return found


# --------------------------------------------------------------------------------------------------------------------
# Words


@dataclass(frozen=True)
class Words:
    """own: keys of PlanConfig. run: of the verb that trains. encode: of encode, without the prefix. machines: whether a
    cluster is described."""

    own: tuple[str, ...]
    run: tuple[str, ...]
    encode: tuple[str, ...]
    machines: bool

    def verb(self, named: str) -> str:
        """The verb that trains. named: the one that is asked for, "" = what knows the words."""
        if named:
            return named
        keys = {key_of(word).split(".")[0] for word in self.run}
        only = {field.name for field in dataclasses.fields(AutoencoderConfig)} - {
            field.name for field in dataclasses.fields(TrainConfig)
        }
        experiment = self.experiment
        # An experiment of a user that chooses of no group of either verb is listed by both.
        of_autoencoders = bool(experiment) and experiment in groups("autoencoder")["experiment"]
        of_autoencoders = of_autoencoders and experiment not in groups("train")["experiment"]
        return "autoencoder" if of_autoencoders or keys & only else "train"

    def gives(self, key: str) -> bool:
        """Whether a word of the command line gives a key of PlanConfig."""
        return any(key_of(word) == key for word in self.own)

    @property
    def experiment(self) -> str:
        """The experiment that is chosen; "" for none."""
        return next((word.partition("=")[2] for word in self.run if key_of(word) == "experiment"), "")

    @property
    def filled(self) -> list[str]:
        """The words of the verb that trains, with places that stand for those that are not given."""
        given = {key_of(word) for word in self.run}
        places = {"run": RUN, "data.train": CACHE, "data.val": HELD_OUT}
        return [*(f"{key}={place}" for key, place in places.items() if key not in given), *self.run]


def divided(words: Sequence[str]) -> Words:
    """The words of a command line by whose they are. `encoders=` is of both, where encode has no own."""
    fields = {field.name for field in dataclasses.fields(PlanConfig)}
    own, run, encode, machines = list[str](), list[str](), list[str](), False
    for word in words:
        key = key_of(word)
        if key == "nodes" or key.split(".")[0] == "cluster":
            machines = True
            own.append(f"cluster.{word}" if key == "nodes" else word)
        elif key in fields:
            own.append(word)
        elif key.startswith(ENCODE):
            encode.append(word.replace(ENCODE, "", 1))
        else:
            run.append(word)
    if not any(key_of(word) == "encoders" for word in encode):
        encode = [word for word in run if key_of(word) == "encoders"] + encode
    return Words(tuple(own), tuple(run), tuple(encode), machines)


def key_of(word: str) -> str:
    """The key of KEY=VALUE."""
    return word.lstrip("+~").partition("=")[0]


# --------------------------------------------------------------------------------------------------------------------
# The file


def require_plan(url: str) -> None:
    """Raise DestinationExists where a path or URL holds anything but a plan."""
    root, key = split_url(url)
    try:
        held = parse_json(open_storage(root).get(key), PLAN_BYTES)
    except NotFound:
        return
    except ParseError:
        held = None
    if not (isinstance(held, dict) and {"format", "sections", "choices"} <= set(held)):
        raise DestinationExists(f"{url} exists and is no plan: choose another place, or move it away")


def put_plan(url: str, plan: Plan) -> None:
    """Write a plan to a path or URL, whole or not at all."""
    root, key = split_url(url)
    open_storage(root).put(key, plan.json())


if __name__ == "__main__":
    from pipeline import cli

    raise SystemExit(cli.main(["plan", *sys.argv[1:]]))
