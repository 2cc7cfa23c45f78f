"""Rates of training, encoding and sampling: each says what it is based on.

In this order: what `latentmill calibrate` measured of the very network on this kind of machine; what it measured of
others, carried over by the layers (layers.py); a committed measurement (measured.py); the GPU's peak times a stated
efficiency (gpus.py). Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import replace

from pipeline.planning.fit import LEARNED
from pipeline.planning.memory import Precision
from pipeline.planning.parts import Cost
from pipeline.planning.plan import machines
from pipeline.planning.plan.figures import Basis, Rate
from pipeline.planning.plan.job import FROZEN
from pipeline.planning.rates.calibration import Calibration, Optimizer, place_of, read
from pipeline.planning.rates.gpus import EFFICIENCY, gpu_of, peak_flops
from pipeline.planning.rates.layers import Layers, pass_seconds
from pipeline.planning.rates.measured import (
    CPU_FLOPS,
    CPU_WHERE,
    DECODED_PIXELS,
    DECODED_WHERE,
    PROFILES,
    carried_over,
    is_profiled,
)

CPU = "cpu"
IMAGES = "images/s"
SAME_FLOPS = 1e-3
"""Largest relative difference of FLOPs of an image at which a network counts as the calibrated one."""


class Rates:
    """What is known of this and of other machines. calibrations: the newest last. path: the file that they are from."""

    def __init__(self, calibrations: Sequence[Calibration] = (), path: str = "") -> None:
        self.calibrations, self.path = tuple(calibrations), path
        self._layers = [Layers(one.layers) for one in self.calibrations]

    @classmethod
    def load(cls, path: str | None = None) -> Rates:
        """The rates of a file that `latentmill calibrate` wrote. path: "" or None = LATENTMILL_RATES, else
        ~/.config/latentmill/rates.json, which need not be there. Raises ConfigError."""
        place = place_of(path or "")
        named = bool(path) or place_of() != place_of("", {})
        return cls(read(place), str(place)) if named or place.exists() else cls()

    # ----------------------------------------------------------------------------------------------------------------
    # Training

    def training(
        self,
        cost: Cost,
        images: int,
        *,
        precision: Precision,
        compile: bool = False,
        gpu: str,
        world: int = 1,
        ranks: int = 0,
        micro_batches: int = 1,
        optimizer: Optimizer = "adamw",
        recomputed: Collection[str] = (),
        efficiency: float = 0.0,
    ) -> Rate:
        """Images that one rank of the `world` on a machine trains on in a second, between evaluations and commits.

        cost: of a micro-batch of so many images. gpu: a name in the table of GPUs, or cpu. ranks: of the whole run,
        which share Muon's products; 0 = world. efficiency: share of the GPU's peak, in place of any measurement; 0 =
        not given. What ranks send each other within a machine is in a calibrated rate, for as many ranks as its
        `reduced` says; what they send between machines is in none. Raises ConfigError for a GPU that nothing is known
        of.
        """
        ranks, per_step = ranks or world, images * micro_batches
        if efficiency:
            return self._by_peak(per_step, cost, micro_batches, gpu, precision, efficiency, "as given")
        found = self._trained(gpu, precision, compile, world)
        if found is not None:
            one = self.calibrations[found]
            share = one.processes / world if gpu == CPU else 1.0  # ranks of one machine share its cores
            layers = self._layers[found]
            if not recomputed and (own := own_seconds(layers, one, cost, images, micro_batches, optimizer, ranks)):
                where = f"this network itself on {one.words} ({self.path})"
                return Rate(per_step / own * share, IMAGES, "calibrated", where, one.processes)
            seconds = step_seconds(layers, one, cost, micro_batches, optimizer, recomputed, ranks)
            where = f"carried over by its layers from {len(one.networks)} networks on {one.words} ({self.path})"
            if compile and not one.compile:
                where += "; those were not compiled"
            return Rate(per_step / seconds * share, IMAGES, "calibrated", where, one.processes)
        return self._without(cost, per_step, micro_batches, gpu, precision, compile, world, optimizer)

    def _without(
        self,
        cost: Cost,
        per_step: int,
        micro_batches: int,
        device: str,
        precision: Precision,
        compile: bool,
        world: int,
        optimizer: Optimizer,
    ) -> Rate:
        """The rate of training where nobody has calibrated."""
        flops = sum(cost.training_flops().values()) * micro_batches
        if device == CPU:
            return _by_cores(per_step, flops, world)
        gpu = gpu_of(device)
        for profile in PROFILES:
            if (profile.gpu, profile.precision, profile.compile) == (gpu.name, precision, compile):
                if is_profiled(cost) and optimizer == "adamw":
                    return Rate(profile.images_per_s, IMAGES, "measured", profile.where)
                seconds = carried_over(profile, cost, micro_batches)
                where = f"carried over by kind of FLOPs from {profile.where}; smaller layers are slower than that"
                if optimizer != "adamw":
                    where += f"; measured with AdamW, and {optimizer} takes longer"
                return Rate(per_step / seconds, IMAGES, "arithmetic", where)
        share = EFFICIENCY[compile]
        return self._by_peak(per_step, cost, micro_batches, device, precision, share, "assumed")

    def _by_peak(
        self,
        per_step: int,
        cost: Cost,
        micro_batches: int,
        device: str,
        precision: Precision,
        efficiency: float,
        whence: str,
    ) -> Rate:
        flops = sum(cost.training_flops().values()) * micro_batches
        peak = peak_flops(gpu_of(device), precision)
        where = f"{efficiency:.0%} ({whence}) of {device}'s {peak / 1e12:g} TFLOP/s in {precision}"
        return Rate(per_step * peak * efficiency / flops, IMAGES, "arithmetic", where)

    # ----------------------------------------------------------------------------------------------------------------
    # Prediction

    def sampling(
        self,
        denoiser: Cost,
        images: int,
        passes: float,
        *,
        decoder: Cost | None = None,
        beside: Sequence[Cost] = (),
        precision: Precision = "fp32",
        gpu: str,
        world: int = 1,
    ) -> Rate:
        """Images that one rank of the `world` on a machine samples in a second.

        denoiser: of a prediction for so many images. passes: predictions of an image, two for each guided step.
        decoder: of decoding as many images. beside: of other networks that look at as many, such as features.
        """
        parts = [(denoiser, passes, False), *([(decoder, 1.0, True)] if decoder else [])]
        parts += [(cost, 1.0, False) for cost in beside]
        seconds, basis, where = self._forward(parts, precision, gpu, world)
        return Rate(images / seconds, IMAGES, basis, where)

    def encoding(
        self,
        encoder: Cost | None,
        images: int,
        *,
        text: Cost | None = None,
        source_pixels: float = 0.0,
        precision: Precision = "fp32",
        gpu: str,
        processes: int = 1,
        cores: int = 0,
    ) -> Rate:
        """Images that one process of the `processes` on a machine encodes in a second.

        encoder, text: of encoding so many images and their captions; None = no such network. source_pixels: pixels of
        an input picture; 0 = decoding is not counted. cores: of each process; 0 = as calibrated, where on a CPU the
        processes share those of all that were calibrated, or else a share of this machine's.
        """
        found = self._predicted(gpu, precision, processes)
        one = None if found is None else self.calibrations[found]
        if not cores and one is not None:
            cores = one.threads if gpu != CPU else max(1, one.threads * one.processes // processes)
        cores = cores or max(1, own_cores() // processes)
        per_core, decoded_where = (one.decoded_pixels_s, one.words) if one else (DECODED_PIXELS, DECODED_WHERE)
        parts = [*([(encoder, 1.0, True)] if encoder else []), *([(text, 1.0, False)] if text else [])]
        decode = images * source_pixels / (per_core * cores)
        if not parts:
            basis: Basis = "calibrated" if one else "measured"
            return Rate(images / max(decode, 1e-12), IMAGES, basis, f"decoding alone: {decoded_where}")
        seconds, basis, where = self._forward(parts, precision, gpu, processes)
        # On a CPU the same cores decode and encode; beside a GPU workers decode meanwhile.
        seconds = seconds + decode if gpu == CPU else max(seconds, decode)
        return Rate(images / seconds, IMAGES, basis, f"{where}; decoding: {decoded_where}, {cores} cores a process")

    def _forward(
        self, parts: Sequence[tuple[Cost, float, bool]], precision: Precision, device: str, world: int
    ) -> tuple[float, Basis, str]:
        """Seconds of passes (cost, how many, whether of an autoencoder), their basis and where it is from."""
        found = self._predicted(device, precision, world)
        if found is not None:
            one, layers = self.calibrations[found], self._layers[found]
            seconds = 0.0
            for cost, times, stage in parts:
                if precision == one.precision == "bf16" and not stage:  # a forward pass is a third of a step's FLOPs
                    seconds += times * pass_seconds(layers.amounts(cost, "training"), one.training) / 3
                else:
                    terms = one.first_stage if stage else one.forward
                    seconds += times * pass_seconds(layers.amounts(cost, "forward"), terms)
            share = world / one.processes if device == CPU else 1.0
            return seconds * share, "calibrated", f"carried over by layers on {one.words} ({self.path})"
        flops = sum(times * sum(cost.forward_flops().values()) for cost, times, _ in parts)
        if device == CPU:
            rate = _by_cores(1, flops, world)
            return 1 / rate.per_s, rate.basis, rate.where
        peak, share = peak_flops(gpu_of(device), precision), EFFICIENCY[False]
        where = f"{share:.0%} (assumed) of {device}'s {peak / 1e12:g} TFLOP/s in {precision}"
        return flops / (peak * share), "arithmetic", where

    def _trained(self, gpu: str, precision: Precision, compile: bool, processes: int) -> int | None:
        """Place of the calibration that says most of training: of this device and precision, compiled or not as asked
        where there is one, of as many processes, then the newest. None where there is none."""
        fitting = [
            (one.compile == compile, one.processes == processes, place)
            for place, one in enumerate(self.calibrations)
            if one.precision == precision and _same_device(one.device, gpu) and (compile or not one.compile)
        ]
        return max(fitting)[-1] if fitting else None

    def _predicted(self, gpu: str, precision: Precision, processes: int) -> int | None:
        """The same of predictions, which every calibration measured in float32 and not compiled: of this device, of
        this precision where there is one, not compiled, of as many processes, then the newest."""
        fitting = [
            (one.precision == precision, not one.compile, one.processes == processes, place)
            for place, one in enumerate(self.calibrations)
            if _same_device(one.device, gpu)
        ]
        return max(fitting)[-1] if fitting else None


def step_seconds(
    layers: Layers,
    one: Calibration,
    cost: Cost,
    micro_batches: int = 1,
    optimizer: Optimizer = "adamw",
    recomputed: Collection[str] = (),
    ranks: int = 0,
) -> float:
    """Seconds of a training step of a network, carried over from a calibration. cost: of a micro-batch. ranks: of the
    run, 0 = as calibrated."""
    passes = micro_batches * pass_seconds(layers.amounts(cost, "training", recomputed), one.training)
    return passes + once_seconds(layers, one, cost, optimizer, ranks)


def once_seconds(layers: Layers, one: Calibration, cost: Cost, optimizer: Optimizer, ranks: int = 0) -> float:
    """Seconds of a training step beside its passes: gradients that the calibrated ranks send each other and their norm,
    optimizer, average, agreements of ranks. ranks: that share Muon's products, 0 = as calibrated."""
    muon = one.muon * layers.muon(cost, one.precision) / (ranks or one.processes) if optimizer == "muon" else 0.0
    return muon + one.parameter_s * cost.parameters + one.step_s


def own_seconds(
    layers: Layers,
    one: Calibration,
    cost: Cost,
    images: int,
    micro_batches: int,
    optimizer: Optimizer,
    ranks: int = 0,
) -> float:
    """Seconds of a step of a network that was measured itself, in one micro-batch; 0 for one that was not. What a task
    learns beside the network was not measured, and is carried over. ranks: of the run, 0 = as calibrated."""
    network = replace(cost, parts=tuple(part for part in cost.parts if not part.name.startswith((LEARNED, FROZEN))))
    flops = sum(network.training_flops().values()) / images
    for own in reversed(one.networks):
        same = (own.parameters, own.images, own.optimizer) == (network.parameters, images, optimizer)
        if same and abs(own.flops / flops - 1) < SAME_FLOPS:
            once = min(once_seconds(layers, one, network, optimizer), own.step_s / 2)
            beside = step_seconds(layers, one, cost, micro_batches, optimizer, (), ranks)
            beside -= step_seconds(layers, one, network, micro_batches, optimizer)
            return max(micro_batches * (own.step_s - once) + once + beside, own.step_s / 2)
    return 0.0


def own_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _by_cores(images: int, flops: float, world: int) -> Rate:
    """The rate of one rank of this machine's CPU, which `world` ranks share."""
    cores = own_cores()
    where = f"{CPU_FLOPS / 1e9:g} GFLOP/s a core in fp32 as on {CPU_WHERE}, for this machine's {cores} cores"
    return Rate(images * CPU_FLOPS * cores / world / flops, IMAGES, "arithmetic", where)


def _same_device(calibrated: str, asked: str) -> bool:
    if calibrated == asked:
        return True
    ours = machines.gpu_of(calibrated)
    return ours is not None and ours == machines.gpu_of(asked)
