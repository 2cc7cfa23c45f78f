"""The README.md of an exported folder: what is in it, and how to sample with it."""

from __future__ import annotations

import re
from itertools import product

TEXT = """Exported by latentmill {version} from {weights} weights at {n:,} samples seen.

unet, vae and scheduler are in diffusers' format{text}.
"""

WITHOUT_INDEX = """, text_encoder and tokenizer in transformers'. There is no
model_index.json: the run's latents are shifted, which StableDiffusionPipeline does not undo"""

WITH_TEXT = """, text_encoder and tokenizer in transformers': load all of it with
StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)"""

WITHOUT_TEXT = """. There is no text encoder, since transformers' CLIPTextModel cannot
hold this run's: encode captions as run.json of the run says, and give them as prompt_embeds"""

WITH_TEXT_ALONE = ", text_encoder and tokenizer in transformers'"

WITHOUT_PIPELINE = """
StableDiffusionPipeline cannot run this model, so there is no model_index.json: the model predicts rectified flow, and
that pipeline does not take its scheduler. This samples it, from noise and the states of captions and of the empty one:

```python
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel

unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
x = noise
scheduler.set_timesteps(steps)
with torch.no_grad():
    for t in scheduler.timesteps:
        conditional, null = unet(torch.cat([x, x]), t, torch.cat([text, empty])).sample.chunk(2)
        x = scheduler.step(null + guidance * (conditional - null), t, x).prev_sample
    images = vae.decode(x / vae.config.scaling_factor).sample
```
"""

EULER = "FlowMatchEulerDiscreteScheduler"  # in that example; replaced by the exported scheduler, whose loop is the same

TRIMMED_WORDS = """

The UNet was trained to attend to a caption's own tokens alone: give it an
encoder_attention_mask, which StableDiffusionPipeline does not"""

NOTES = (WITH_TEXT, WITH_TEXT_ALONE, WITHOUT_INDEX, WITHOUT_TEXT)
LOOPS = (EULER, "FlowMatchHeunDiscreteScheduler")


def readme(version: str, weights: str, n: int, note: str, *, trimmed: bool, loop: str) -> str:
    """The text. weights, n: which weights of the run. note: one of NOTES. loop: the scheduler's class where no pipeline
    runs the model, else ""."""
    note += TRIMMED_WORDS if trimmed else ""
    return TEXT.format(version=version, weights=weights, n=n, text=note) + (
        WITHOUT_PIPELINE.replace(EULER, loop) if loop else ""
    )


def is_readme(text: str) -> bool:
    """Whether nobody has edited the text since an export wrote it."""
    first = re.match(r"Exported by latentmill (\S+) from (\S+) weights at ([\d,]{1,30}) samples seen\.\n", text)
    if first is None:
        return False
    facts = first[1], first[2], int(first[3].replace(",", "") or 0)
    return any(
        text == readme(*facts, note, trimmed=trimmed, loop=loop)
        for note, trimmed, loop in product(NOTES, (False, True), ("", *LOOPS))
    )
