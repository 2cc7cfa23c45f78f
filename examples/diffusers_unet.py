"""diffusers' UNet2DConditionModel trained by accelerate on a cache with captions, in a loop of its own.

    accelerate launch --multi_gpu --num_processes 8 examples/diffusers_unet.py CACHE OUT --batch 512 --samples 1000000

Run again on as many ranks, it goes on from its newest state. Noise and timesteps are drawn from a rank's first n.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from latentmill import open_dataset


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", help="folder or URL that `latentmill encode` wrote, with text_storage=full")
    parser.add_argument("out", type=Path, help="folder of the states and of the trained network")
    parser.add_argument("--batch", type=int, default=64, help="samples of a step, of all ranks together")
    parser.add_argument("--samples", type=int, default=1_000_000, help="where training ends")
    parser.add_argument("--every", type=int, default=64_000, help="samples between states")
    parser.add_argument("--channels", type=int, nargs="+", default=[320, 640, 1280, 1280], help="of each level")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    accelerator, newest = Accelerator(cpu=not torch.cuda.is_available()), args.out / "newest"
    device = accelerator.device  # the data are not for accelerator.prepare, which would split a rank's part once more
    data = open_dataset(
        args.cache, batch=args.batch, seed=args.seed, samples=args.samples, members=("latents", "text"), device=device
    )
    empty = data.empty
    assert empty is not None, "a cache with text, and no encoded empty caption"
    torch.manual_seed(args.seed)
    unet = network(data.contract.latent_shape, empty.shape[1], args.channels)
    unet, optimizer = accelerator.prepare(unet, torch.optim.AdamW(unet.parameters(), lr=1e-4))
    if newest.exists():
        data.load_state_dict(state := json.loads(newest.read_text()))  # refuses another cache, batch or seed
        accelerator.load_state(args.out / str(state["n"]))
    schedule, empty = DDPMScheduler(), empty.to(device)
    for batch in data:
        latents, draw = batch["latents"], torch.Generator().manual_seed(args.seed + int(batch["n"][0]))
        noise = torch.randn(latents.shape, generator=draw).to(device)
        times = torch.randint(len(schedule), (len(latents),), generator=draw).to(device)
        dropped = (torch.rand(len(latents), 1, 1, generator=draw) < 0.1).to(device)
        text = torch.where(dropped, empty, batch["text"].float())
        predicted = unet(schedule.add_noise(latents, noise, times), times, text).sample
        accelerator.backward(torch.nn.functional.mse_loss(predicted.float(), noise))
        optimizer.step()
        optimizer.zero_grad()
        if (n := int(batch["seen"])) % args.every < args.batch or n >= args.samples:
            accelerator.save_state(args.out / str(n))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:  # last, and whole
                (part := newest.with_suffix(".part")).write_text(json.dumps(data.state_dict()))
                part.replace(newest)
    accelerator.unwrap_model(unet).save_pretrained(args.out / "unet", is_main_process=accelerator.is_main_process)
    return 0


def network(shape: tuple[int, int, int], width: int, channels: list[int]) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=shape[1],
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=tuple(channels),
        down_block_types=("CrossAttnDownBlock2D",) * (len(channels) - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(channels) - 1),
        cross_attention_dim=width,
        norm_num_groups=min(32, channels[0]),
    )


if __name__ == "__main__":
    raise SystemExit(main())
