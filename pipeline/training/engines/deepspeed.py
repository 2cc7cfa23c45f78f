"""The engine of DeepSpeed ZeRO, stages 0 to 3. The only module that imports deepspeed."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.distributed.world import World
from pipeline.errors import ConfigError
from pipeline.training.engines.base import BUCKET, Engine, do_nothing, pick_precision, split_batch
from pipeline.training.engines.optimizer import make_optimizer
from pipeline.training.engines.placement import Flat, Sharded, Whole

IDLE = ("report_ipg_memory_usage", "_update_model_bit16_weights")
"""Methods of DeepSpeed's ZeRO 1 and 2 that change nothing here: see _skip_idle_work."""
IDLE_ALONE = ("process_gradients", "buffered_reduce_fallback")
"""Methods that change nothing on a single rank."""


class DeepSpeedEngine(Engine):
    """DeepSpeed ZeRO. Gradients accumulate and are reduced in fp32. Adam is PyTorch's, so no C++ is compiled."""

    def __init__(self, module: nn.Module, config: RunConfig, world: World) -> None:
        stage, offload = config.deepspeed.stage, config.deepspeed.offload
        if offload and stage == 0:
            raise ConfigError("deepspeed.offload=true needs deepspeed.stage >= 1")
        micro_batch, micro_batches = split_batch(config.optim, world.size)
        super().__init__(module, config.optim, world, micro_batches)
        dtype = pick_precision(config, world.device)
        bf16 = dtype == torch.bfloat16
        fp32_weights = {name: p.detach().clone() for name, p in module.named_parameters()} if bf16 else {}
        settings = deepspeed_settings(config, micro_batch, micro_batches, bf16, world.device.type)
        self._engine = _initialize(module, make_optimizer(module, config.optim), settings, world.device.type)
        self.module = self._engine.module
        zero = self._engine.optimizer
        if stage in (1, 2) and not hasattr(zero, "fp32_groups_flat_partition"):  # bf16 in stage 1 has another class
            _skip_idle_work(zero, world)
        if stage == 0:
            self._place(Whole(self._engine.basic_optimizer, self.module, world), dtype)
        elif stage == 3:
            self._place(Sharded(zero, self.module, self.shapes, world.rank, offload), dtype)
        else:
            self._place(Flat(zero, self.module, offload), dtype)
        if bf16:  # DeepSpeed makes the master weights from parameters that it has rounded already
            with torch.no_grad():
                for slot in self._placement.stored_slots:
                    values = fp32_weights[slot.name].reshape(-1)[slot.offset : slot.offset + slot.length]
                    slot.view_of(slot.base).copy_(values)
            self._placement.refresh()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # advances DeepSpeed's count of micro-batches; the optimizer does not step

    def _step(self) -> None:
        self._engine.step()

    def destroy(self) -> None:
        self._engine.destroy()
        del self._engine, self._placement, self._muon, self.module


def deepspeed_settings(
    config: RunConfig, micro_batch: int, micro_batches: int, bf16: bool, device: str
) -> dict[str, Any]:
    """DeepSpeed's configuration. Engine, not DeepSpeed, computes the gradient's norm and clips."""
    stage = config.deepspeed.stage
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": device == "cuda",  # against fragmentation; on a CPU its copies cost 10% of a small step
        "overlap_comm": device == "cuda",  # on a CPU, communication would take cores from the backward pass
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if stage in (1, 2) and not config.deepspeed.offload and not (bf16 and stage == 1):
        zero["compute_grad_norm"] = False
    if config.deepspeed.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        # Engine has seen that the gradient is finite: DeepSpeed would pass over it once more and wait for the answer.
        "bf16": {"enabled": bf16, "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }


def _initialize(module: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], device: str) -> Any:
    """DeepSpeed's engine, without its log messages and without compiling anything."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # of DeepSpeed's calls
    if device == "cpu":
        # This table tells DeepSpeed which C++ operators can be built, and it builds shm_comm if that is among them.
        # gloo does not need it, and without it a machine that has no compiler can train.
        deepspeed.ops.__compatible_ops__ = dict.fromkeys(ALL_OPS, False)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    return engine


def _skip_idle_work(zero: Any, world: World) -> None:
    """Replace methods of ZeRO 1 and 2 that change nothing but take time in every step.

    They format a message about memory for every parameter, which is never shown, and make every parameter again the
    view that it already is. On one rank they also gather fp32 gradients into buckets, "average" them and copy them back
    (three passes over all gradients); these methods stay where anything else depends on the buckets.
    """
    buckets_needed = zero.dtype != zero.gradient_accumulation_dtype or zero.contiguous_gradients or zero.cpu_offload
    for name in IDLE + (IDLE_ALONE if world.size == 1 and not buckets_needed else ()):
        if hasattr(zero, name):
            setattr(zero, name, do_nothing)
