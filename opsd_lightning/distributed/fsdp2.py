"""What the trainer's strategy may be, and FSDP2 under a name of its own.

The training step makes several forward and backward passes inside one call, the teacher's with the adapter off, and calls
the network below its head. Plain data parallelism (``ddp``) does not mind. FSDP2 shards parameter by parameter and lets all
of this pass through its hooks. FSDP1 and DeepSpeed do not (see `check_strategy`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from opsd_lightning.checkpoints.file import check_written, is_remote, load_file, local_path, restoring
from opsd_lightning.checkpoints.io import check_weights_only, explained, read_adapters, recover, replacing, temporary_name
from opsd_lightning.checkpoints.shards import META, is_shards, read_shards, write_rest, write_shards
from opsd_lightning.distributed.tensor_parallel import plan_of, split
from opsd_lightning.models.policy import base_of, below_head, is_adapter_key
from opsd_lightning.models.sharding import _sharded_modules, whole
from opsd_lightning.types import ConfigError, PositiveInt, UserError, checked


@checked
class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism (torch's FSDP2): every decoder layer's weights, gradients and optimizer state are
    spread over all devices, and gathered a layer at a time when they are needed.

    ``trainer.strategy: fsdp2`` takes the defaults. Embeddings and head stay gathered from a pass's forward to its backward.

    Args:
        tensor_parallel_size: Devices that split every layer's products among them; they work on the same questions. Divides
            the number of devices, and should be at most those of one node.
        cpu_offload: Keep the shards in the host's memory between uses: less device memory, much slower.
        save_distributed_checkpoint: Write each rank's shards of a checkpoint to a folder, for `fsdp2` runs on any number of
            devices, instead of one file, which every strategy reads. Either holds the adapters alone.
        process_group_backend: ``nccl``, ``gloo``, ...; torch's choice for the device unless given.
        timeout_seconds: How long a rank waits for the others before it gives up, at least 1.
    """

    def __init__(
        self,
        tensor_parallel_size: PositiveInt = 1,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout_seconds: PositiveInt = 1800,
    ) -> None:
        if process_group_backend is None and cpu_offload and torch.cuda.is_available():
            process_group_backend = "cuda:nccl,cpu:gloo"  # the norm of gradients that lie on the host is summed there
        super().__init__(
            "auto",
            tensor_parallel_size,
            save_distributed_checkpoint,
            process_group_backend,
            timedelta(seconds=timeout_seconds),
        )
        if cpu_offload and tensor_parallel_size > 1:
            raise UserError("trainer.strategy.tensor_parallel_size does not go with cpu_offload: leave out one of them")
        self.tensor_parallel_size = tensor_parallel_size
        self.cpu_offload = cpu_offload

    def setup_environment(self) -> None:
        size, world = self.tensor_parallel_size, self.num_nodes * self.num_processes
        if world % size:
            raise UserError(f"trainer.strategy.tensor_parallel_size is {size}, which does not divide the {world} devices")
        self._data_parallel_size = world // size
        super().setup_environment()

    def model_to_device(self) -> None:
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.lightning_module is not None
        for module in self.lightning_module.modules():  # weights stay on the host
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.root_device)
        for metric in self.lightning_module.children():
            if not isinstance(metric, PeftModel):
                metric.to(self.root_device)

    # -- the model ---------------------------------------------------------------------------------------------------

    def shard(self, model: PeftModel) -> None:
        """Shard a freshly built policy in place.

        Raises:
            UserError: Its decoder layers cannot be found, or not be split, or it has no adapter.
        """
        if not isinstance(model, PeftModel):
            raise UserError(
                "trainer.strategy fsdp2 shards a policy with an adapter, and model.policy.lora is null (full fine-tuning): "
                "use ddp or one device, or set model.policy.lora"
            )
        base = base_of(model)
        kinds = set(base._no_split_modules or ())
        layers = [module for module in base.modules() if type(module).__name__ in kinds]
        if not layers:
            raise UserError(
                f"trainer.strategy is fsdp2, but {type(base).__name__} does not say which of its modules are decoder layers "
                "(_no_split_modules): use ddp"
            )
        plan = plan_of(model, self.tensor_parallel_size) if self.tensor_parallel_size > 1 else None
        _plain_quantized_weights(base)
        for name, parameter in model.named_parameters():
            if is_adapter_key(name):  # drawn at random on every rank
                with torch.no_grad():
                    start = parameter.to(self.root_device)
                    dist.broadcast(start, src=0)
                    parameter.copy_(start)
        offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if self.cpu_offload else OffloadPolicy()
        mesh = self.device_mesh["data_parallel"]
        for layer in layers:
            if plan is not None:
                split(layer, plan, self.device_mesh["tensor_parallel"])
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, offload_policy=offload)
        if plan is not None:
            split(base, plan, self.device_mesh["tensor_parallel"])
        # The root holds the embeddings and the head, which is called on its own after a pass: they stay gathered till then.
        # A PeftModel as the root would break `generate`, which runs the model below it.
        fully_shard(base, mesh=mesh, reshard_after_forward=False, offload_policy=offload)
        base.hidden_states = MethodType(_hidden_states, base)
        register_fsdp_forward_method(base, "hidden_states")

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Inside, backward passes add to the ranks' own gradients, without summing them over ranks."""
        modules = _sharded_modules(self.model)
        for module in modules:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for module in modules:
                module.set_requires_gradient_sync(True, recurse=False)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict()
        return state if self._save_distributed_checkpoint else {key: whole(value) for key, value in state.items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        if self._save_distributed_checkpoint:
            assert self.model is not None
            return get_optimizer_state_dict(self.model, optimizer)
        state: dict[str, Any] = optimizer.state_dict()
        state["state"] = {
            index: {name: whole(value) for name, value in values.items()} for index, values in state["state"].items()
        }
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        name = self.broadcast(str(filepath))
        if not self._save_distributed_checkpoint:
            Strategy.save_checkpoint(self, checkpoint, name, storage_options)
            return
        if is_remote(name):
            problem = f"shards are written to local or shared folders, and {name} is remote"
            raise ConfigError(
                problem, "a ModelCheckpoint's dirpath", "Choose a folder, or leave out save_distributed_checkpoint"
            )
        path = Path(name)
        optimizers = checkpoint.pop("optimizer_states", [])
        state = {"state_dict": checkpoint.pop("state_dict")} | {f"optimizer_{i}": s for i, s in enumerate(optimizers)}
        with ExitStack() as stack:
            error: Exception | None = None
            if self.is_global_zero:
                try:
                    stack.enter_context(replacing(path, folder=True))
                except Exception as caught:
                    error = caught
            if not self.broadcast(error is None):
                raise error or ConfigError(f"rank 0 could not begin {path}", "trainer.callbacks", "See its message")
            with explained(path):
                write_shards(state, temporary_name(path))
                if self.is_global_zero:
                    write_rest(checkpoint, temporary_name(path))
                    check_written(temporary_name(path) / META, checkpoint)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        check_weights_only(weights_only)
        if self.is_global_zero and not is_remote(checkpoint_path):
            recover(Path(checkpoint_path))
        self.barrier()
        path = local_path(self.broadcast(os.fspath(checkpoint_path)))
        if not path.is_dir():
            return Strategy.load_checkpoint(self, path, True)
        if not is_shards(path):
            raise UserError(f"ckpt_path: {path} is a folder, but no checkpoint of save_distributed_checkpoint")
        checkpoint = load_file(path / META, weights=read_adapters(path))
        # Lightning calls this as well, but after the optimizers: what does not fit is refused before their shards are read.
        assert self.lightning_module is not None
        self.lightning_module.on_load_checkpoint(checkpoint)
        if "optimizer_states" in checkpoint:  # they are not wanted
            return checkpoint
        # Optimizers are loaded in place; `load_optimizer_state_dict` then finds nothing left to do.
        for i, optimizer in enumerate(self.optimizers):
            assert self.model is not None
            state = {f"optimizer_{i}": get_optimizer_state_dict(self.model, optimizer)}
            read_shards(state, path)
            with restoring(path):
                set_optimizer_state_dict(self.model, optimizer, state[f"optimizer_{i}"])
        checkpoint["optimizer_states"] = [None] * len(self.optimizers)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        with torch.no_grad():
            for key, ours in self.lightning_module.state_dict().items():
                ours.copy_(_like(checkpoint["state_dict"][key], ours))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            if state is None:
                continue
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            sharded = {
                index: {
                    name: _like(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
                    for name, value in state["state"][index].items()
                }
                for index, parameter in enumerate(parameters)
                if index in state["state"]
            }
            optimizer.load_state_dict({"state": sharded, "param_groups": state["param_groups"]})


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2: base and adapters sharded over all devices")


def _hidden_states(base: Any, **inputs: Any) -> Tensor:
    return below_head(base)(**inputs).last_hidden_state


def _like(value: Tensor, ours: Tensor) -> Tensor:
    """A whole tensor, sharded as another is."""
    if not isinstance(ours, DTensor):
        return value
    return distribute_tensor(value.to(ours.device), ours.device_mesh, ours.placements)


def _plain_quantized_weights(base: nn.Module) -> None:
    """4-bit weights as plain parameters, which FSDP2 can shard; their layers keep how to read them, and put them back
    together at each pass (bitsandbytes does so for FSDP)."""
    for module in base.modules():
        weight = module._parameters.get("weight")
        if type(weight).__name__ == "Int8Params":
            raise UserError(
                "model.policy.quantization has load_in_8bit, whose weights trainer.strategy fsdp2 cannot shard: use "
                "load_in_4bit, or ddp"
            )
        if weight is not None and type(weight).__name__ == "Params4bit":
            module.quant_state = weight.quant_state  # type: ignore[attr-defined]
            module.weight = nn.Parameter(weight.data, requires_grad=False)
