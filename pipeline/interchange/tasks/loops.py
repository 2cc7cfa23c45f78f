"""The code of README.md that samples a model which no pipeline of diffusers runs.

Each task's part defines `given` and `nothing`: arguments of `predict` for what is asked, and for the second half of
guidance. A test runs every code here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Readme = Callable[[str, str, int], str]
"""(version, which weights, samples seen) -> the text of README.md."""

HEAD = """\
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, {scheduler}, {unet}
from safetensors.torch import load_file

facts = json.loads(Path(folder, "task.json").read_text())
unet = {unet}.from_pretrained(folder, subfolder="unet").requires_grad_(False)
scheduler = {scheduler}.from_pretrained(folder, subfolder="scheduler")
vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").requires_grad_(False)
scale, shift = facts["latents"]["scale"], facts["latents"]["shift"]


def predict(x, t, planes=None, **said):
    return unet(x if planes is None else torch.cat([x, planes], dim=1), t, **said).sample


"""

TAIL = """\
scheduler.set_timesteps(steps)
x = noise{spread}
for t in scheduler.timesteps:
    scaled = {scaled}
    prediction = predict(scaled, t, **given)
    if guidance != 1:
        null = predict(scaled, t, **nothing)
        prediction = null + guidance * (prediction - null)
    x = scheduler.step(prediction, t, x).prev_sample
pictures = vae.decode(x / scale + shift).sample.clamp(-1, 1)
"""

WEIGHTS = """\
weights = load_file(f"{folder}/task.safetensors")
"""

NETWORK = """\


def linear(name, x):
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def norm(name, x):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def transformer(name, x, mask=None):
    for i in range(facts["task"]["depth"]):
        block, split = f"{name}.blocks.{i}", (*x.shape[:2], 3, facts["task"]["heads"], -1)
        q, k, v = linear(f"{block}.qkv", norm(f"{block}.norm1", x)).view(split).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + linear(f"{block}.out", attended.transpose(1, 2).flatten(2))
        x = x + linear(f"{block}.down", F.gelu(linear(f"{block}.up", norm(f"{block}.norm2", x))))
    return norm(f"{name}.norm", x)


"""

TOKENIZER = """\
from transformers import CLIPTokenizer

tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")


def ids_of(captions):
    padded = {"padding": "max_length", "max_length": facts["text"]["length"], "truncation": True}
    return tokenizer(list(captions), return_tensors="pt", **padded).input_ids


"""

STATES = (
    TOKENIZER.replace("CLIPTokenizer\n", "CLIPTextModel, CLIPTokenizer\n", 1)
    + """\
encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").requires_grad_(False)


def states_of(captions):
    ids = ids_of(captions)
    end = (ids == tokenizer.eos_token_id).int()
    mask = end.cumsum(dim=1) - end == 0  # up to the caption's end
    trimmed = facts["text"]["storage"] == "trimmed"
    return encoder(ids).last_hidden_state, mask if trimmed else torch.ones_like(mask)


"""
)

README = """Exported by latentmill {version} from {weights} weights at {n:,} samples seen.

"""

LOOP = """unet, vae and scheduler are in diffusers' format, task.json has what a reader of them must know. No pipeline
of diffusers runs the model: {why}. This samples it. It is given `folder`, `noise` (B, C, h, w) standard normal,
`steps`, `guidance` (1 = none; a model that was trained with drop = 0 knows no other) and {asks}; `pictures`
(B, 3, H, W) are in [-1, 1].

```python
{code}```
"""

PIPELINE = """Load it with diffusers:

```python
{code}```

{words}"""


def with_autoencoder(text: str, architecture: str) -> str:
    """A text of this module with the class of the folder's autoencoder, and the way in which it encodes."""
    if architecture == "VQModel":
        text = text.replace("AutoencoderKL", architecture).replace(".latent_dist.mean", ".latents")
    return text


def loop_readme(why: str, asks: str, code: str, scheduler: Mapping[str, Any], unet: str, after: str = "") -> Readme:
    """The text of a folder that no pipeline runs, by (version, weights, n). why: the reason. asks: what the task's code
    is given. scheduler: its configuration. unet: class of diffusers. after: code behind the last line."""
    flow = scheduler["_class_name"].startswith("FlowMatch")  # whose schedulers scale nothing
    names = {"scheduler": scheduler["_class_name"], "unet": unet}
    tail = TAIL.format(
        spread="" if flow else " * scheduler.init_noise_sigma",
        scaled="x" if flow else "scheduler.scale_model_input(x, t)",
    )
    text = LOOP.format(why=why, asks=asks, code=HEAD.format(**names) + code + tail + after)
    return lambda version, weights, n: README.format(version=version, weights=weights, n=n) + text


def pipeline_readme(code: str, words: str) -> Readme:
    """The text of a folder that a pipeline runs, by (version, weights, n). words: what else is to be known."""
    text = PIPELINE.format(code=code, words=words)
    return lambda version, weights, n: README.format(version=version, weights=weights, n=n) + text
