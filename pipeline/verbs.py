"""The table of verbs: the module of each, and what it does."""

from __future__ import annotations

VERBS = {
    "synth": ("preprocess.synthetic", "write captioned-shapes shards in img2dataset's layout"),
    "convert": ("preprocess.convert", "COCO, OpenImages, label maps, class folders to shards that encode takes"),
    "encode": ("preprocess.encode", "image-text shards to a cached latent dataset"),
    "columns": ("preprocess.columns", "captions, features or scores for the records of a cache, joined to it later"),
    "index": ("preprocess.index", "a dataset from tars of latents made elsewhere, in place"),
    "verify": ("preprocess.verify", "prove a cache: hashes, counts, statistics, decode and compare"),
    "reference": ("preprocess.reference", "feature statistics of real images, for FID"),
    "train": ("pipeline.train", "train a latent diffusion model on a cache"),
    "autoencoder": ("pipeline.autoencoder", "train an autoencoder (first stage) on a cache of pixels"),
    "eval": ("pipeline.eval", "a checkpoint's FID, CLIP score and attribute accuracy"),
    "reconstruct": (
        "pipeline.reconstruct",
        "how near an autoencoder's reconstructions are, figures and the worst pairs",
    ),
    "sample": ("pipeline.sample", "images from a checkpoint"),
    "export": ("pipeline.export", "weights that other software loads"),
    "fetch": ("pipeline.fetch", "encoders into a folder or bucket, for nodes without internet"),
    "status": ("pipeline.status", "what runs are doing: state, samples, images/s, last commit, restarts, loss"),
    "data": ("pipeline.preview", "what ranks and nodes would read: batches, bytes, bandwidth, memory"),
    "ledger": ("pipeline.ledger", "prove that a run trained on every sample once"),
    "report": ("pipeline.report.page", "one HTML page about one run or several"),
    "demo": ("pipeline.demo", "the whole loop on captioned shapes, on this machine"),
    "plan": ("pipeline.plan", "what a run will take before it is paid: hours, memory, bytes, price"),
    "calibrate": ("pipeline.calibrate", "how fast this machine trains, encodes and samples, for plan and submit"),
    "submit": ("pipeline.submit", "verbs as jobs of Slurm: latentmill submit train KEY=VALUE ..."),
}
"""verb: (module with main(config), what it does)."""


TAKES_PATHS = {
    "ledger": "usage: latentmill ledger RUN [RUN ...] [dataset=URL] [columns=URL]",
    "status": "usage: latentmill status RUN [RUN ...] [--watch [SECONDS]], or a folder of runs",
    "report": "usage: latentmill report RUN [RUN ...] dest=report.html",
}
"""Verbs that only read runs and take paths instead of a configuration: main(arguments)."""


TAKES_WORDS = ("submit", "plan")
"""Verbs that take keys of other verbs beside their own: main(arguments)."""


ENVIRONMENT = {"encode": {"OMP_WAIT_POLICY": "passive"}}
"""Environment variables that a verb needs before PyTorch is imported, unless the user has set them. encode: OpenMP's
threads would otherwise spin while they wait, on cores that its decoding workers need."""


TRAINS = ("train", "autoencoder")
"""Verbs that train a run up to its last sample, however often they are started (pipeline/training/life.py)."""


STOPS = (*TRAINS, "convert", "encode", "columns", "eval", "reconstruct")
"""Verbs that SIGTERM and SIGUSR1 end with status 75 from their first moment on, because jobs of Slurm run them."""


HANDED_OVER = "--handed-over"
"""The only word of a verb whose words its parent has handed over as standard input (distributed/children.py)."""
