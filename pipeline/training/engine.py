"""The engine: forward, backward, gradient reduction and the optimizer step, partitioned over ranks by DeepSpeed ZeRO.

The only importer of deepspeed. Two engines behind one interface: DeepSpeedEngine (ZeRO stages 0 to 3) and TorchEngine
(plain PyTorch on one process, the oracle that every stage is compared with). What differs between the stages is where
a rank's share of the fp32 master weights, their gradients and the optimizer's state lie: see training/placement.py.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.checkgroups import check_world
from pipeline.config import OptimConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.training.distributed import World
from pipeline.training.muon import Muon
from pipeline.training.optimizer import STATE, hidden_matrices, make_optimizer
from pipeline.training.placement import Flat, Fragment, Placement, Sharded, Whole

KINDS = sorted({kind for kinds in STATE.values() for kind in kinds})
BUCKET = 50_000_000  # elements reduced or gathered at once (200 MB)
IDLE = ("report_ipg_memory_usage", "_update_model_bit16_weights")
IDLE_ALONE = ("process_gradients", "buffered_reduce_fallback")
"""Methods of DeepSpeed's ZeRO 1 and 2 that do nothing for us: see _leave_out_idle_work."""
RUN = 1 << 16  # elements whose squares are summed in float32 on a CPU: within 1e-5, of random ones 4e-7

Read = Callable[[str, str, int, int], Tensor]
"""(kind, parameter, start, stop) -> flat fp32 values; kind is "weights" or one of optimizer.STATE."""


class Engine(ABC):
    """Trains one module. module: with its parameters as they are between steps. micro_batches: backward calls per step.

    A step is: for each micro-batch, `backward(loss of engine(...))`; then `grad_norm()`, the same on all ranks and not
    finite when any rank's share of the gradient is not; then, if the caller so decides, `step(lr, norm)`.
    """

    def __init__(self, module: nn.Module, optim: OptimConfig, world: World, micro_batches: int) -> None:
        self.module = module
        self.world = world
        self.micro_batches = micro_batches
        self.clip = optim.clip
        self.shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        self._optim, self._matrices = optim, hidden_matrices(module) if optim.name == "muon" else {}
        self._muon: Muon | None = None
        self._placement: Placement

    def _place(self, placement: Placement, dtype: torch.dtype) -> None:
        """Take up where things lie. dtype: of forward and backward passes, and of Muon's products. Collective."""
        self._placement = placement
        if self._matrices:
            self._muon = Muon(self._optim, placement, self._matrices, self.shapes, self.world, dtype)

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch's mean loss (scalar); reduced over ranks by the last of them."""

    @abstractmethod
    def _step(self) -> None: ...

    def grad_norm(self) -> float:
        """L2 norm of the global batch's gradient, the same on all ranks: each measures its share; one all-reduce."""
        grads = self._placement.own_gradients()
        total = self.world.sum([_square_sum(grads)])[0]
        return math.sqrt(total) if math.isfinite(total) else math.nan

    def weight_norm(self) -> float:
        """L2 norm of the fp32 master weights. Collective."""
        views = [fragment.view for fragment in self.owned()]
        return math.sqrt(self.world.sum([_square_sum(views)])[0])

    def step(self, lr: float, norm: float) -> None:
        """Clip by the global norm, and step with this learning rate. Collective."""
        if 0 < self.clip < norm:
            torch._foreach_mul_(self._placement.gradients(), self.clip / norm)
        if self._muon is not None:
            self._muon()
        for group in self._placement.optimizer.param_groups:
            group["lr"] = lr
        self._step()

    def skip(self) -> None:
        """Drop the gradient: weights and optimizer state stay, and the next step begins anew. Collective."""
        optimizer = self._placement.optimizer
        # DeepSpeed is to do all that belongs to the end of a step but this.
        optimizer.step = _nothing  # type: ignore[method-assign,assignment]
        try:
            self._step()
        finally:
            del optimizer.step  # that of its class

    def owned(self) -> list[Fragment]:
        """This rank's share of the fp32 master weights."""
        return [Fragment(slot.name, slot.offset, slot.of(slot.base)) for slot in self._placement.owned]

    def moments(self) -> dict[str, list[Fragment]]:
        """This rank's share of the optimizer's moments, by kind."""
        state = self._placement.optimizer.state
        return {
            kind: [
                Fragment(slot.name, slot.offset, slot.of(state[slot.base][kind]))
                for slot in self._placement.owned
                if kind in state[slot.base]
            ]
            for kind in KINDS
        }

    @torch.no_grad()
    def load(self, read: Read, steps: int) -> None:
        """Take weights and moments from `read`, and the number of optimizer steps behind them. Collective."""
        state = self._placement.optimizer.state
        for kind in ("weights", *KINDS):
            for slot in self._placement.held:
                target = slot.base if kind == "weights" else state[slot.base].get(kind)
                if target is None:
                    continue
                slot.of(target).copy_(read(kind, slot.name, slot.offset, slot.offset + slot.length))
        for base in self._placement.bases():
            state[base]["step"].fill_(float(steps))
        self._placement.refresh()

    def gather(self, fragments: Iterable[Fragment]) -> dict[str, Tensor]:
        """Whole fp32 tensors by parameter name, on every rank, from every rank's fragments. Collective."""
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        flat = torch.zeros(sum(sizes.values()), device=self.world.device)
        full = dict(zip(sizes, flat.split(list(sizes.values())), strict=True))
        for fragment in fragments:
            full[fragment.name][fragment.offset : fragment.offset + len(fragment.view)] = fragment.view
        if self.world.size > 1:
            for part in flat.split(BUCKET):
                dist.all_reduce(part)  # one rank's value and zeros: exact
        return {name: values.view(self.shapes[name]) for name, values in full.items()}

    def full_weights(self) -> dict[str, Tensor]:
        """All fp32 master weights, on every rank. Collective."""
        return self.gather(self.owned())

    @abstractmethod
    def destroy(self) -> None:
        """Give everything back; the engine cannot be used after. Before the process group ends."""


def _square_sum(tensors: Sequence[Tensor]) -> float:
    """Of all elements. PyTorch sums float32 squares on a CPU one after another, which is 2% off after 2^24 equal ones:
    there in runs, and float64 beyond them. On a GPU it sums as a tree."""
    runs = [run for tensor in tensors for run in (tensor.reshape(-1).split(RUN) if tensor.is_cpu else (tensor,))]
    return torch.stack(torch._foreach_norm(runs)).double().square().sum().item() if runs else 0.0


def _nothing(*arguments: Any, **options: Any) -> None:
    """In place of what is not to be done."""


def make_engine(module: nn.Module, config: TrainConfig, world: World) -> Engine:
    """The engine that the configuration names, around a module with fp32 parameters that are equal on all ranks."""
    return ENGINES[config.deepspeed.engine](module, config, world)


def pick_precision(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype of forward and backward passes: torch.float32 or torch.bfloat16. Master weights are always fp32."""
    able = config.deepspeed.engine == "torch" or config.deepspeed.stage >= 1
    if config.precision == "auto":
        return torch.bfloat16 if able and device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if config.precision == "fp32":
        return torch.float32
    if not able:
        raise ConfigError(
            "precision=bf16 needs deepspeed.stage >= 1, which keeps fp32 master weights; or set precision=fp32"
        )
    return torch.bfloat16


def split_batch(config: OptimConfig, ranks: int) -> tuple[int, int]:
    """(samples per micro-batch, micro-batches per step) of each rank. ConfigError when the batch does not divide."""
    check_world(config, ranks)
    share = config.batch // ranks
    micro = config.micro_batch or share
    return micro, share // micro


# --------------------------------------------------------------------------------------------------------------------
# Engines


class TorchEngine(Engine):
    """Plain PyTorch on one process; precision=bf16 is autocast around fp32 parameters."""

    def __init__(self, module: nn.Module, config: TrainConfig, world: World) -> None:
        if world.size > 1:
            raise ConfigError(
                "deepspeed.engine=torch trains on one process; set launch.processes=1 or engine=deepspeed"
            )
        super().__init__(module.to(world.device), config.optim, world, split_batch(config.optim, 1)[1])
        dtype = pick_precision(config, world.device)
        self._autocast = dtype == torch.bfloat16
        self._optimizer = make_optimizer(self.module, config.optim)
        self._place(Whole(self._optimizer, self.module, world), dtype)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self._autocast):
            return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        (loss / self.micro_batches).backward()

    def _step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def destroy(self) -> None:
        del self._optimizer, self._placement, self._muon, self.module


class DeepSpeedEngine(Engine):
    """DeepSpeed ZeRO. Gradients accumulate and are reduced in fp32; Adam is PyTorch's, so nothing is compiled."""

    def __init__(self, module: nn.Module, config: TrainConfig, world: World) -> None:
        stage, offload = config.deepspeed.stage, config.deepspeed.offload
        if offload and stage == 0:
            raise ConfigError("deepspeed.offload=true needs deepspeed.stage >= 1")
        micro, micro_batches = split_batch(config.optim, world.size)
        super().__init__(module, config.optim, world, micro_batches)
        dtype = pick_precision(config, world.device)
        bf16 = dtype == torch.bfloat16
        exact = {name: p.detach().clone() for name, p in module.named_parameters()} if bf16 else {}
        settings = deepspeed_settings(config, micro, micro_batches, bf16, world.device.type)
        self._engine = _initialize(module, make_optimizer(module, config.optim), settings, world.device.type)
        self.module = self._engine.module
        zero = self._engine.optimizer
        if stage in (1, 2) and not hasattr(zero, "fp32_groups_flat_partition"):  # bf16 in stage 1: another class
            _leave_out_idle_work(zero, world)
        if stage == 0:
            self._place(Whole(self._engine.basic_optimizer, self.module, world), dtype)
        elif stage == 3:
            self._place(Sharded(zero, self.module, self.shapes, world.rank, offload), dtype)
        else:
            self._place(Flat(zero, self.module, offload), dtype)
        if bf16:  # DeepSpeed makes the master weights from parameters that it has already rounded
            with torch.no_grad():
                for slot in self._placement.held:
                    values = exact[slot.name].reshape(-1)[slot.offset : slot.offset + slot.length]
                    slot.of(slot.base).copy_(values)
            self._placement.refresh()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # moves DeepSpeed's count of micro-batches on; no optimizer step

    def _step(self) -> None:
        self._engine.step()

    def destroy(self) -> None:
        self._engine.destroy()
        del self._engine, self._placement, self._muon, self.module


def deepspeed_settings(config: TrainConfig, micro: int, micro_batches: int, bf16: bool, device: str) -> dict[str, Any]:
    """DeepSpeed's own configuration. Clipping and the gradient's norm are the Engine's, not DeepSpeed's."""
    stage = config.deepspeed.stage
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": device == "cuda",  # against fragmentation; on a CPU the copies cost 10% of a small step
        "overlap_comm": device == "cuda",  # on a CPU, communication takes the cores that backward computes on
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if stage in (1, 2) and not config.deepspeed.offload and not (bf16 and stage == 1):
        zero["compute_grad_norm"] = False
    if config.deepspeed.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }


def _initialize(module: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], device: str) -> Any:
    """DeepSpeed's engine, quietly and without compiling anything."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # of DeepSpeed's calls
    if device == "cpu":
        # DeepSpeed asks this table which C++ operators can be built here, and builds shm_comm when it is among them.
        # gloo does without, and a machine without a compiler can train.
        deepspeed.ops.__compatible_ops__ = dict.fromkeys(ALL_OPS, False)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    return engine


def _leave_out_idle_work(zero: Any, world: World) -> None:
    """Spare ZeRO 1 and 2 what changes nothing and costs every step: a sentence on memory for every parameter, which is
    dropped unread; every parameter made anew as the view that it is; and, on one rank, to gather fp32 gradients into
    buckets, "average" them and copy them back (three passes over all of them), where nothing else hangs on the buckets.
    """
    needed = zero.dtype != zero.gradient_accumulation_dtype or zero.contiguous_gradients or zero.cpu_offload
    for name in IDLE + (IDLE_ALONE if world.size == 1 and not needed else ()):
        if hasattr(zero, name):
            setattr(zero, name, _nothing)


ENGINES: dict[str, Callable[[nn.Module, TrainConfig, World], Engine]] = {
    "deepspeed": DeepSpeedEngine,
    "torch": TorchEngine,
}
