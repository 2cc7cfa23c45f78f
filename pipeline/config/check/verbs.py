"""The check of a whole configuration: texts that must be given, bounds of single fields, and contradictions between
fields, each refused with one line that says how to resolve it."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

from pipeline import config as c
from pipeline.config.check.adoption import check_index
from pipeline.config.check.cluster import check_plan, check_submit
from pipeline.config.check.columns import check_columns_verb
from pipeline.config.check.converting import check_convert
from pipeline.config.check.first_stage import check_reconstruct
from pipeline.config.check.groups import (
    check_average,
    check_columns,
    check_guidance,
    check_mix,
    check_sampler,
    check_start,
)
from pipeline.config.check.hub import check_push
from pipeline.config.check.runs import check_autoencoder, check_train
from pipeline.config.check.steering import check_guide_of_eval, check_guide_of_sample
from pipeline.config.values.bounds import check_bounds, require, some_text
from pipeline.config.values.captions import require_choice, require_places
from pipeline.config.values.distances import require_distance
from pipeline.config.values.rules import parse_rules


def check(config: Any) -> None:
    """Check one verb's configuration. Raises ConfigError for the first thing that is wrong."""
    for key, what in GIVEN.get(type(config), {}).items():
        some_text(key, operator.attrgetter(key)(config), what)
    check_bounds(config)
    CHECKS[type(config)](config)


def no_contradictions(config: Any) -> None:
    """For verbs whose fields do not depend on each other: synth, verify, reference."""


def check_encode(config: c.EncodeConfig) -> None:
    """latentmill encode."""
    require(len(config.resolution) > 0, "resolution=[]: one side in pixels or more is wanted, such as [256,512]")
    require(
        len(set(config.resolution)) == len(config.resolution),
        f"resolution={list(config.resolution)}: one of them is given twice",
    )
    require(not (config.finalize and config.dry_run), "finalize=true and dry_run=true: choose one")
    require(
        not (config.forget and (config.finalize or config.dry_run)),
        "forget= goes with neither finalize=true nor dry_run=true: run it alone first",
    )
    for key, names in {"leave_out": config.leave_out, "forget": config.forget}.items():
        require(all(name.strip("/") for name in names), f"{key}: the name of an input shard is empty")
    parse_rules(config.filters.keep)
    check_stored(config)
    check_captions(config)
    check_conditions(config)


def check_captions(config: c.EncodeConfig) -> None:
    """What is read of captions, and whether any are."""
    if config.text_kind != "none":
        require_places(config.caption_places, config.captions_most, config.caption_weights)
        return
    require(
        config.caption_key in ((), ("",), ("txt",)),
        f"caption_key={','.join(config.caption_key)} with text_storage=none: no caption is read, so leave caption_key "
        "out",
    )
    filters, none = config.filters, "text_storage=none"
    if config.text_storage != "none":
        none = "stored=pixels and no caption_key"
        require(
            config.text_storage in ("", "full"),
            f"text_storage={config.text_storage} with {none}: no caption is read, so give caption_key=txt, or leave "
            "text_storage out",
        )
    for key in ("min_caption", "max_caption", "clip_score"):
        require(
            not getattr(filters, key),
            f"filters.{key}={getattr(filters, key)} with {none}: no caption is read, so leave it out",
        )
    for key in ("captions_most", "caption_weights"):
        require(not getattr(config, key), f"{key} is given with {none}: no caption is read, so leave it out")
    require(filters.duplicates != "pair", f"filters.duplicates=pair with {none}: give image, or keep")


def check_stored(config: c.EncodeConfig) -> None:
    """What is stored of a crop, and what goes with it."""
    if config.stored != "pixels":
        require(config.encoders.vae != "pixels", "encoders.vae=pixels is no autoencoder: give stored=pixels")
        require(
            config.pixels == "array",
            f"pixels={config.pixels} is for stored=pixels: add that, or leave pixels out (conditions=[pixels] stores "
            "arrays)",
        )
        return
    require(
        "pixels" not in config.conditions,
        "conditions=[pixels] with stored=pixels: a record holds its crop already, so leave that condition out",
    )
    require(
        "labels" not in config.conditions or config.labels.grid == 1,
        f"labels.grid={config.labels.grid} with stored=pixels: a latent position is a pixel, which has one label; give "
        "labels.grid=1",
    )


def check_conditions(config: c.EncodeConfig) -> None:
    """The conditions that are asked for, and the groups that say how they are made."""
    asked = ",".join(config.conditions)
    require(len(set(config.conditions)) == len(config.conditions), f"conditions=[{asked}]: one of them is given twice")
    groups = {"class": "classes", "boxes": "boxes", "labels": "labels", "lowres": "lowres", "mask": "mask"}
    for condition, group in groups.items():
        value = getattr(config, group)
        require(
            condition in config.conditions or value == type(value)(),
            f"{group}.* is given, but conditions=[{asked}] has no {condition}: add it, or leave {group}.* out",
        )
        require(
            condition not in config.conditions
            or getattr(value, "count", 1) > 0
            or value.names != ""
            or (group == "classes" and value.key == "folder"),
            f"{group}.count=0 and {group}.names is empty: give one of them, so that it is known how many there are",
        )
    key = config.classes.key
    require(
        key in ("cls", "folder") or (key.startswith("json:") and len(key) > 5),
        f"classes.key={key}: cls, or json:KEY for a key of the .json member, or folder",
    )
    kinds = config.mask.kinds
    require(len(kinds) > 0, "mask.kinds=[]: one or more is wanted, such as [thin,rectangles]")
    require(
        len(set(kinds)) == len(kinds),
        f"mask.kinds=[{','.join(kinds)}]: one of them is given twice, and all have equal chances: give each once",
    )
    require(
        kinds not in (("file",), ("all",)) or config.mask.variants == 1,
        f"mask.variants={config.mask.variants} with mask.kinds=[{','.join(kinds)}]: nothing is drawn, so all would be "
        "equal; leave variants out, or give a kind that is drawn beside it",
    )
    require(
        config.lowres.degradation == "bsr" or config.lowres.variants == 1,
        f"lowres.variants={config.lowres.variants} with lowres.degradation={config.lowres.degradation}: all would be "
        "equal, so leave variants out, or give lowres.degradation=bsr",
    )


def check_fetch(config: c.FetchConfig) -> None:
    """latentmill fetch."""
    require(config.encoders.vae != "pixels", "encoders.vae=pixels names no network, so there is nothing to fetch")


def check_data(config: c.DataVerbConfig) -> None:
    """latentmill data."""
    require(config.dataset + config.run != "", "dataset is missing: give dataset=CACHE, or run=RUN for a run's own")
    check_columns("columns", config.columns)
    if config.dataset:
        check_mix("", config.dataset, config.mix, () if config.run else config.weights)
    require(config.world % config.nodes == 0, f"world={config.world} does not divide among nodes={config.nodes}")


def check_eval(config: c.EvalRunConfig) -> None:
    """latentmill eval."""
    check_average(config.weights, config.ema)
    if config.from_card == "":
        some_text("run", config.run, "a run directory")
    for name, example in (("guidance", "[1,2,3]"), ("sampler", "[ddim,dpmpp_2m]"), ("steps", "[10,20]")):
        values = getattr(config, name)
        require(len(values) > 0, f"{name}=[]: one or more is wanted, such as {example}")
        require(len(set(values)) == len(values), f"{name}=[{','.join(map(str, values))}]: one is given twice")
    check_guidance(config.guidance, config.guidance_low, config.guidance_high, config.rescale)
    if config.perceptual:
        require_distance(config.perceptual, "perceptual")
    if config.caption:
        require_choice(config.caption, "caption")
    for steps in config.steps:
        check_start(config.strength, steps)
    check_guide_of_eval(config)
    check_tile(config.tile)


def check_sample(config: c.SampleConfig) -> None:
    """latentmill sample."""
    check_average(config.weights, config.ema)
    check_sampler(config.sampler, 1000, "sampler.")
    guidance = config.sampler.guidance if config.guidance is None else config.guidance
    require(
        config.negative == "" or guidance != 1,
        "negative is given but guidance=1 leads away from nothing: give a guidance scale, or leave negative out",
    )
    for size in config.size:
        require(
            re.fullmatch(r"[1-9]\d*x[1-9]\d*", size) is not None,
            f"size={size}: width and height in pixels are wanted, as 512x768",
        )
    for key, values in {**config.asked, "size": config.size}.items():
        require(
            len(values) in (0, 1, config.rows),
            f"{key}: {len(values)} for {config.rows} rows; give one for all rows, or one for each",
        )
    check_tile(config.tile)
    require(
        config.mask == () or config.image != (),
        "mask is given without image: give image=FILE, the picture of which the mask hides a part",
    )
    require(
        config.strength is None or config.image != (),
        f"strength={config.strength} is given without image: give image=FILE, the picture to begin from",
    )
    check_start(config.strength, config.sampler.steps)
    check_guide_of_sample(config)


def check_tile(tile: str) -> None:
    """In what pictures are cut."""
    require(
        re.fullmatch(r"off|auto|[1-9]\d{0,5}", tile) is not None,
        f"tile={tile}: off, auto, or a side in pixels is wanted, such as 512",
    )


def check_export(config: c.ExportConfig) -> None:
    """latentmill export."""
    check_average(config.weights, config.ema)
    require(
        config.format != "compvis" or config.dest.endswith((".safetensors", ".ckpt")),
        f"dest={config.dest}: format=compvis writes one file whose name ends in .safetensors or .ckpt",
    )
    require(
        config.format != "compvis" or config.sampler == "ddim",
        f"sampler={config.sampler}: a file of format=compvis holds no scheduler; leave sampler out",
    )
    check_push(config)


def check_calibrate(config: c.CalibrateConfig) -> None:
    """latentmill calibrate."""
    require("://" not in config.dest, f"dest={config.dest}: rates are kept in a file of this machine")
    require(
        config.experiment != "" or not (config.data or config.side or config.micro_batch),
        "data, side and micro_batch are of an experiment's network: give experiment=NAME, or leave them out",
    )


def check_demo(config: c.DemoConfig) -> None:
    """latentmill demo."""
    require("://" not in config.dest, f"dest={config.dest}: the demo works in a folder of this machine")


GIVEN: dict[type, dict[str, str]] = {
    c.SynthConfig: {"dest": "a folder, or a URL in a bucket (s3://, gs://, az://), for the shards"},
    c.FetchConfig: {"dest": "a folder, or a URL in a bucket (s3://, gs://, az://), for the encoders"},
    c.ConvertConfig: {
        "images": "the folder of the images",
        "dest": "a folder, or a URL in a bucket (s3://, gs://, az://), for the tars",
    },
    c.EncodeConfig: {
        "source": "the input shards, such as 'shapes/{00000..00009}.tar'",
        "dest": "a folder, or a URL in a bucket (s3://, gs://, az://), for the cache",
    },
    c.ColumnsConfig: {
        "dataset": "the cache that they are for",
        "source": "what holds the values, such as 'captions/*.jsonl'",
        "dest": "a folder, or a URL in a bucket (s3://, gs://, az://), for the columns",
    },
    c.IndexConfig: {
        "source": "the tars, such as 'DATASET/*.tar'",
    },
    c.VerifyConfig: {"dataset": "the cache"},
    c.ReferenceConfig: {"dataset": "a cache"},
    c.TrainConfig: {
        "run": "a folder, or a URL in a bucket (s3://, gs://, az://), for the run",
        "data.train": "the cache that `latentmill encode` wrote",
    },
    c.AutoencoderConfig: {
        "run": "a folder, or a URL in a bucket (s3://, gs://, az://), for the run",
        "data.train": "the cache of pixels that `latentmill encode stored=pixels` wrote",
    },
    c.ReconstructConfig: {"dataset": "a cache that holds pictures", "dest": "a folder for the figures"},
    c.SampleConfig: {"run": "a run directory", "dest": "the picture to write"},
    c.ExportConfig: {
        "run": "a run directory",
        "dest": "a folder, or for format=compvis a .safetensors or .ckpt file",
    },
    c.DemoConfig: {"dest": "a folder"},
    c.SubmitConfig: {"cluster.logs": "a folder that the compute nodes see"},
}
"""Texts that must be given and not be empty: key -> what it names."""

CHECKS: dict[type, Callable[[Any], None]] = {
    c.SynthConfig: no_contradictions,
    c.FetchConfig: check_fetch,
    c.ConvertConfig: check_convert,
    c.EncodeConfig: check_encode,
    c.ColumnsConfig: check_columns_verb,
    c.IndexConfig: check_index,
    c.VerifyConfig: no_contradictions,
    c.ReferenceConfig: no_contradictions,
    c.TrainConfig: check_train,
    c.AutoencoderConfig: check_autoencoder,
    c.DataVerbConfig: check_data,
    c.EvalRunConfig: check_eval,
    c.ReconstructConfig: check_reconstruct,
    c.SampleConfig: check_sample,
    c.ExportConfig: check_export,
    c.DemoConfig: check_demo,
    c.SubmitConfig: check_submit,
    c.PlanConfig: check_plan,
    c.CalibrateConfig: check_calibrate,
}
"""The configuration of a verb -> the check of contradictions between its fields."""
