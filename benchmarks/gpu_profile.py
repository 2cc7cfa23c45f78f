"""Where a training step of the UNet spends its time on one NVIDIA GPU, by kind of kernel:

    python -m benchmarks.gpu_profile [KEY=VALUE ...]

It prints images/s of benchmarks.gpu's training at one batch and a profile of two steps, not compiled and compiled, each
with the longest kernels by name, and then PyTorch's attention kernels side by side at the sizes of the network.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.encoding.presets import changed
from pipeline.distributed.exits import guarded

KINDS = {
    "attention": ("flash", "fmha", "cudnn_generated_fort_native_sdpa", "sdpa", "attention"),
    "convolution": ("conv", "xmma_fprop", "xmma_dgrad", "xmma_wgrad", "implicit", "wgrad", "dgrad", "fprop"),
    "matrix product": ("gemm", "nvjet", "cutlass", "splitk", "cublas", "matmul"),
    "norm": ("norm", "rowwisemoments", "welford"),
    "layout copy": ("nchwtonhwc", "nhwctonchw", "transpose", "direct_copy", "copy_kernel"),
    "optimizer": ("multi_tensor", "adam"),
    "reduction": ("reduce", "triton_red", "triton_per"),
    "elementwise": ("elementwise", "triton_poi", "cat", "memcpy", "memset"),
}
"""kind -> parts of kernel names in lower case; the first kind that fits counts."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every field but the name can be given as key=value."""

    name: str = "gpu_profile"
    model: str = "sd2"
    """Name in conf/model."""
    pixels: int = 512
    """Side of the images."""
    tokens: int = 77
    """Length of a context."""
    batch: int = 64
    """Images a step."""
    compile: Literal["inductor", "off"] = "inductor"
    """off leaves the compiled side out."""
    kernels: int = 16
    """Number of the longest kernels that are listed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return exit status 0."""
    overrides = list(sys.argv[1:] if arguments is None else arguments)
    return guarded("benchmarks.gpu_profile", lambda: run(changed(Settings(), overrides)))


def run(settings: Settings) -> int:
    import torch

    from benchmarks.network.gpu_parts import Side, Training, inputs_of, model_of, seconds_each, weights_of

    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda")
    config = model_of(settings.model)
    side = Side("ours", config, weights_of(config), device)
    training = Training(side)
    inputs = inputs_of(config, settings.batch, settings.pixels // 8, settings.tokens, device)
    for compiled in (False, True) if settings.compile != "off" else (False,):
        if compiled:
            side.compile("inductor")
        training.step(inputs)
        speed = settings.batch / seconds_each(lambda: training.step(inputs), device, 2.0)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(2):
                training.step(inputs)
            torch.cuda.synchronize()
        times: Counter[str] = Counter()
        for event in profile.key_averages():
            times[event.key] += event.self_device_time_total / 2e3
        print(
            f"\n## {settings.model}, {settings.pixels} px, batch {settings.batch}, "
            f"compiled: {compiled}: {speed:.1f} images/s"
        )
        print("\n".join(_report(times, settings.kernels)), flush=True)
    print("\n".join(["", "## Attention, forward + backward, ms", *_attention(settings)]), flush=True)
    return 0


def kind_of(kernel: str) -> str:
    """The kind of a kernel's name."""
    lower = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), "other")


def _report(times: Counter[str], longest: int) -> Iterator[str]:
    kinds: Counter[str] = Counter()
    for kernel, ms in times.items():
        kinds[kind_of(kernel)] += ms
    total = sum(kinds.values())
    for kind, ms in kinds.most_common():
        yield f"{kind:16} {ms:9.2f} ms {100 * ms / total:5.1f}%"
    yield f"{'all':16} {total:9.2f} ms"
    for kernel, ms in times.most_common(longest):
        yield f"  {ms:8.2f} ms  [{kind_of(kernel)}] {kernel[:110]}"


def _attention(settings: Settings) -> Iterator[str]:
    """PyTorch's kernels at the sizes of SD2's levels."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from benchmarks.network.gpu_parts import seconds_each

    device = torch.device("cuda")
    side = settings.pixels // 8
    for heads, queries in ((5, side**2), (10, side**2 // 4), (20, side**2 // 16)):
        for keys in (queries, settings.tokens):
            times = []
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
                shapes = (queries, keys, keys)
                q, k, v = (
                    torch.randn(settings.batch, n, heads, 64, device=device, dtype=torch.bfloat16)
                    .transpose(1, 2)
                    .requires_grad_()
                    for n in shapes
                )
                grad = torch.randn_like(q)

                def work(q=q, k=k, v=v, grad=grad, backend=backend) -> None:  # type: ignore[no-untyped-def]
                    with sdpa_kernel(backend):
                        F.scaled_dot_product_attention(q, k, v).backward(grad)

                try:
                    time_text = f"{1e3 * seconds_each(work, device, 0.2):.3f}"
                except RuntimeError as error:
                    time_text = f"failed ({str(error).splitlines()[0][:40]})"
                times.append(f"{backend.name.split('_')[0].lower()} {time_text}")
            yield f"{heads} heads, {queries} x {keys}: " + ", ".join(times)


if __name__ == "__main__":
    raise SystemExit(main())
