"""DeepSpeed ZeRO 0 to 3: the only importer of deepspeed."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import TrainConfig
from pipeline.distributed.world import World
from pipeline.errors import ConfigError
from pipeline.training.engines.base import BUCKET, Engine, _nothing, pick_precision, split_batch
from pipeline.training.engines.optimizer import make_optimizer
from pipeline.training.engines.placement import Flat, Sharded, Whole

IDLE = ("report_ipg_memory_usage", "_update_model_bit16_weights")


IDLE_ALONE = ("process_gradients", "buffered_reduce_fallback")
"""Methods of DeepSpeed's ZeRO 1 and 2 that do nothing for us: see _leave_out_idle_work."""


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
