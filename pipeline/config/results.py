"""The verbs that use trained models, and the demo of the whole loop: eval, reconstruct, sample, export, demo."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipeline.config.model import EncodersConfig, FeaturesName, SamplerConfig, SamplerName
from pipeline.config.run import DataConfig, LaunchConfig
from pipeline.config.steering import GuideConfig
from pipeline.config.values.bounds import Between, Ge, Seed


@dataclass(frozen=True, kw_only=True)
class EvalRunConfig:
    """latentmill eval: measure a checkpoint's FID, CLIP score and attribute accuracy, how near an autoencoder's
    reconstructions are to held-out pictures, or how often a classifier is right, and write a card about each."""

    run: str = ""
    """Run directory, of a diffusion model, an autoencoder or a classifier; "" with from_card = the run that the card is
    in."""
    from_card: str = ""
    """Card of an earlier evaluation, whose figures are measured again and compared (also `--from-card CARD`)."""
    features: Literal["", FeaturesName] = ""
    """Feature network of the reference; "" = the run's own."""
    features_weights: str = ""
    """Weights of the feature network; "" = the run's own."""
    perceptual: str = ""
    """Weights of the perceptual distance, as eval.perceptual of train; "" = the run's own."""
    data: DataConfig = field(default_factory=DataConfig)
    """data.val: the cache that is sampled for, reconstructed or classified; "" = the run's own."""
    images: Annotated[int, Ge(2)] = 1000
    """Number of images to sample, reconstruct or classify."""
    caption: str = ""
    """Which of the captions of a record is sampled for, as eval.caption of train; "" = the run's own."""
    guidance: tuple[Annotated[float, Ge(0, "0 or more is wanted (1 = none)")], ...] = (3.0,)
    """Guidance scales, with one evaluation for each; 1 = no guidance. Several scales add a curve of FID against CLIP
    score to the run's report."""
    sampler: tuple[SamplerName, ...] = ("dpmpp_2m",)
    """Samplers; each is evaluated with every number of steps and every guidance scale."""
    steps: tuple[Annotated[int, Ge(1)], ...] = (20,)
    """Numbers of denoising steps."""
    guidance_low: Annotated[float, Ge(0)] = 0.0
    """Guidance is off at noise levels up to this one, as eval.sampler.guidance_low of train."""
    guidance_high: Annotated[float, Ge(0)] = 0.0
    """Guidance is off at noise levels above this one, as eval.sampler.guidance_high of train."""
    rescale: Annotated[float, Between(0, 1)] = 0.0
    """Rescaling of guided predictions, as eval.sampler.rescale of train."""
    batch: Annotated[int, Ge(1)] = 64
    """Images per batch and rank; the images do not depend on it."""
    strength: Annotated[float, Between(0, 1, "(]")] | None = None
    """Begin from each record's own picture, as sample's strength, and measure how near the images stay to it; null =
    from noise."""
    keep: bool = False
    """Keep each record's own picture outside of its mask (encode conditions=[...,mask]), as sample's mask does with any
    model, and measure how near the kept part is before it is put back; not for task=inpaint, which is given the mask
    itself."""
    reference: str = ""
    """File of reference statistics; "" = the run's own."""
    encoders: EncodersConfig | None = None
    """Encoders to load; by default the run's own, else those of the training cache's contract."""
    at: Annotated[int, Ge(0)] = 0
    """Sample count of the checkpoint; 0 = the newest."""
    weights: Literal["ema", "raw"] = "ema"
    """ema: averaged weights. raw: the weights as trained."""
    ema: float = 0.0
    """Which average of the weights. 0: the run's own. 1 or more: the one of ema.half_lives with this half-life. Below
    1: a power-function average of this relative width, made from the snapshots of ema.widths
    (docs/how_to/train_for_weeks.md)."""
    guide: GuideConfig = field(default_factory=GuideConfig)
    """Guidance without retraining. An image's target is its record's own picture, caption or class."""
    tile: str = "off"
    """Denoise and decode in overlapping tiles, as tile of `latentmill sample`; the card says their sides."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the denoiser, as precision of `latentmill sample`. The card says it, and evaluations in different
    precisions lie side by side; with from_card auto is the card's."""
    tf32: bool = False
    """Let denoiser, decoder and the networks of guides round float32 products to TF32, as tf32 of `latentmill sample`.
    What measures the images never does."""
    seed: Seed = 0
    """Seed of the initial noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on; auto = cuda where there is a GPU, else cpu."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Ranks on this machine that share the images, one GPU each; figures do not depend on their number."""
    pending: bool = False
    """Ignore the keys above, device and launch excepted, and make the evaluations that training with eval.where=job
    left to be made, as it would have made them (with at=N, that one alone)."""


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """latentmill reconstruct: measure how near any autoencoder's reconstructions are to the pictures of a cache, and
    show the worst."""

    dataset: str
    """Cache that holds the pictures, of encode stored=pixels or conditions=[pixels]: a folder, or a URL in a bucket
    (s3://, gs://, az://)."""
    dest: str
    """Folder, or URL in a bucket (s3://, gs://, az://), for the figures, their card, the page and the picture of
    pairs."""
    encoders: EncodersConfig = field(default_factory=EncodersConfig)
    """The autoencoder (encoders.vae and what goes with it); no text tower is loaded."""
    images: Annotated[int, Ge(2)] = 1000
    """Number of pictures: the first of the cache, or all where it has fewer."""
    batch: Annotated[int, Ge(1)] = 32
    """Pictures per batch; it changes figures by rounding only."""
    pairs: Annotated[int, Between(0, 1024)] = 16
    """Pairs of a picture and its reconstruction that are shown, the worst first."""
    reference: str = ""
    """Statistics of real images for rFID, a file written by `latentmill reference`; "" = no rFID."""
    features: FeaturesName = "democlip"
    """Feature network of the reference, as eval.features of train."""
    features_weights: str = ""
    """Weights of the feature network; "" = as published."""
    perceptual: str = "none"
    """Weights of the perceptual distance, as eval.perceptual of train; none = no such figure."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on; auto = cuda where there is a GPU, else cpu."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """latentmill sample: sample images from a checkpoint."""

    run: str
    """Run directory."""
    prompt: tuple[str, ...] = ()
    """A caption. Give prompt=... again for another; a caption is taken literally, with commas and brackets. With
    guide=clip of any model."""
    class_: tuple[str, ...] = ()
    """task=class, and guide=classifier of any model: a class, by number or name, as 3 or [3,7]. Give class=... again
    for a name with commas."""
    boxes: tuple[str, ...] = ()
    """task=layout: a JSON file of boxes, [[class, x0, y0, x1, y1], ...], with classes by number or name and edges as
    fractions of the picture."""
    draw_boxes: bool = True
    """task=layout: draw the outlines of a row's boxes over its images; false = the images alone."""
    labels: tuple[str, ...] = ()
    """task=semantic: a label map, an 8-bit PNG with one channel. The images have its size."""
    image: tuple[str, ...] = ()
    """task=superres: a small image, of which the model makes a large one. task=inpaint: an image, of which the model
    makes a part anew. Any other task: an image to begin from (strength) or to make a part of anew (mask); the images
    have its size."""
    mask: tuple[str, ...] = ()
    """A picture of the image's size, white where the image is made anew; elsewhere it stays as it is. task=inpaint was
    trained for this; models of other tasks, but superres, are held to it while they sample."""
    strength: Annotated[float, Between(0, 1, "(]")] | None = None
    """Begin from image instead of from noise: the share of the denoising steps that are taken. Little changes near 0,
    and nearly all at 1; null = begin from noise. Not for task=superres."""
    noise: Annotated[int, Between(0, 999)] = 0
    """task=superres with task.noise: level of the noise that is added to the small image, at most that of training. The
    model, which is told the level, then follows the image's faults less; 0 = none."""
    n: Annotated[int, Ge(1)] = 4
    """Images per row."""
    dest: str = "samples.png"
    """Picture to write, a .png or .jpg: a grid with a row for each caption, class or file. One prompt, class, file or
    size serves all rows; otherwise there is one for each. Files are local, s3://, gs:// or az://."""
    at: Annotated[int, Ge(0)] = 0
    """Sample count of the checkpoint; 0 = the newest."""
    weights: Literal["ema", "raw"] = "ema"
    """ema: averaged weights. raw: the weights as trained."""
    ema: float = 0.0
    """Which average of the weights. 0: the run's own. 1 or more: the one of ema.half_lives with this half-life. Below
    1: a power-function average of this relative width, made from the snapshots of ema.widths
    (docs/how_to/train_for_weeks.md)."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How images are sampled."""
    guide: GuideConfig = field(default_factory=GuideConfig)
    """Guidance without retraining, by a picture, a caption or a class."""
    guidance: Annotated[float, Ge(0, "0 or more is wanted (1 = none)")] | None = None
    """Short for sampler.guidance; null = take sampler.guidance."""
    negative: str = ""
    """Negative prompt: text that guidance leads away from, in place of the empty caption."""
    size: tuple[str, ...] = ()
    """Sizes in pixels (width x height), one for all rows or one for each, as [64x64,96x64]; [] = the cache's, or that
    of the file that is given."""
    tile: str = "off"
    """Denoise and decode pictures larger than this many pixels along a side in overlapping tiles of that side, such as
    512. auto: whole where memory allows it, else in the largest tiles that fit. off: whole, or refused."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision in which the denoiser predicts; samplers compute in fp32, and the decoder in encoders.vae_dtype. auto:
    bf16 on GPUs that have it, else fp32."""
    tf32: bool = False
    """Let denoiser, decoder and the networks of guides round products of fp32 numbers to TF32 on GPUs (10 bits of
    mantissa), which is faster."""
    seed: Seed = 0
    """Seed of the initial noise."""
    encoders: EncodersConfig | None = None
    """Encoders to load; by default the run's own, else those of the training cache's contract."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on; auto = cuda where there is a GPU, else cpu."""

    @property
    def asked(self) -> dict[str, tuple[str, ...]]:
        """What is asked for: the values of the keys that make rows and are given, by key."""
        keys = {"prompt": self.prompt, "class": self.class_, "boxes": self.boxes, "labels": self.labels}
        keys |= {"image": self.image, "mask": self.mask, "guide.target": self.guide.target}
        return {key: values for key, values in keys.items() if values}

    @property
    def rows(self) -> int:
        """Rows of the picture."""
        return max(map(len, self.asked.values()), default=1)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """latentmill export: write weights in a format that other software loads."""

    run: str
    """Run directory, of a diffusion model or of an autoencoder."""
    dest: str
    """Folder (diffusers), or .safetensors or .ckpt file (compvis) to write."""
    format: Literal["diffusers", "compvis"] = "diffusers"
    """diffusers: a folder that StableDiffusionPipeline, or another pipeline of the run's task, loads, with UNet,
    autoencoder, text encoder, tokenizer and scheduler, or with a loop where no pipeline runs the task; of an
    autoencoder a folder that AutoencoderKL or VQModel loads, and encoders.vae takes. compvis: one file, under the names
    of Stable Diffusion's own releases."""
    encoders: EncodersConfig | None = None
    """Encoders to load; by default the run's own, else those of the training cache's contract."""
    at: Annotated[int, Ge(0)] = 0
    """Sample count of the checkpoint; 0 = the newest."""
    weights: Literal["ema", "raw"] = "ema"
    """ema: averaged weights. raw: the weights as trained."""
    ema: float = 0.0
    """Which average of the weights. 0: the run's own. 1 or more: the one of ema.half_lives with this half-life. Below
    1: a power-function average of this relative width, made from the snapshots of ema.widths
    (docs/how_to/train_for_weeks.md)."""
    sampler: SamplerName = "ddim"
    """With format=diffusers: the sampler whose scheduler, with the same noise levels and steps, goes into the folder.
    Refused where diffusers has no scheduler that does the same."""
    check: bool = True
    """Load what was written and compare it: outputs to 1e-4 with diffusers and transformers; every tensor of one
    file."""
    scale_images: Annotated[int, Ge(0)] = 1024
    """Of an autoencoder: pictures of data.train over which the standard deviation of its latents is measured, whose
    reciprocal is the exported scaling_factor; 0 = none are read, and it is 1."""
    push: str = ""
    """hub:OWNER/NAME: upload what was exported, with a model card, to this repository of the Hugging Face hub, as one
    commit; the token is that of HF_TOKEN. "" = nothing contacts the hub (docs/how_to/publish_on_the_hub.md)."""
    public: bool = False
    """With push: whether everybody may see the repository. One that is made is private without it, and one that is
    public is refused."""
    revision: str = "main"
    """With push: branch that the commit goes to, made where there is none."""
    license: str = ""
    """With push: the license in the card's metadata, by the hub's name for it, such as apache-2.0; "" = none is
    stated."""
    datasets: tuple[str, ...] = ()
    """With push: the hub's names of the data sets that the card's metadata says the model was trained on."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """latentmill demo: run the whole loop on captioned shapes, on this machine."""

    dest: str = "runs/demo"
    """Folder for everything the demo makes."""
    images: Annotated[int, Ge(1)] = 10_000
    """Training images. A tenth as many captions are drawn for evaluations, and a fifth as many images for FID."""
    tasks: tuple[str, ...] = ("text",)
    """Tasks to train a model of, such as [class,layout], or all; each in a folder of its own, where there are
    several."""
    task: str = ""
    """Short for tasks=[TASK]."""
    recipe: str = ""
    """The experiment to train (conf/experiment); "" = that of the task. For text there are demo, and shapes, which
    trains for an hour."""
    samples: Annotated[int, Ge(0)] = 0
    """Training samples; 0 = as many as the experiment says."""
    processes: Annotated[int, Ge(1)] = 2
    """Training ranks on this machine."""
    seed: Annotated[int, Between(0, 2**63 - 3, says="a whole number from 0 to 2**63 - 3 is wanted")] = 0
    """Seed of the drawings, the training and the sampling."""
