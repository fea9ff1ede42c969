"""The FSDP2 strategy: sharding of the policy, and its checkpoints.

One training step makes several forward and backward passes, switches the adapter off for the teacher, and calls the decoder
without its head. FSDP2 shards each parameter by itself and supports all of this through its hooks. FSDP1 and DeepSpeed do
not (see `opsd_lightning.distributed.checks`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import MethodType
from typing import Any, final

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from opsd_lightning.checkpoints.file import check_written, load_file, local_path, wrap_restore_errors
from opsd_lightning.checkpoints.io import (
    check_weights_only,
    read_adapters,
    recover,
    replace_checkpoint,
    temporary_name,
    wrap_write_errors,
)
from opsd_lightning.checkpoints.shards import META, is_shards, read_shards, write_meta, write_shards
from opsd_lightning.models.policy import base_of, below_head, is_adapter_key
from opsd_lightning.models.sharding import fsdp_modules, full_tensor
from opsd_lightning.types import ConfigError, PositiveInt, checked
from opsd_lightning.utils.files import is_remote


@checked
@final
class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism (torch's FSDP2) over all devices.

    The weights, gradients and optimizer state of each decoder layer are sharded over the devices, and a layer is gathered
    only while it computes. The embeddings and the head stay gathered from the forward pass to the end of its backward pass.
    ``trainer.strategy: fsdp2`` uses the defaults.

    Args:
        cpu_offload: If True, keep the shards in host memory while they are not in use. Saves device memory and is much
            slower.
        save_distributed_checkpoint: If True, write a checkpoint as a folder with the shards of each rank, which FSDP2 runs
            on any number of devices can load. If False, write one file, which every strategy can load. Both contain the
            adapters only.
        process_group_backend: Backend of ``torch.distributed``, such as ``nccl`` or ``gloo``. Defaults to torch's choice for
            the device.
        timeout_seconds: Seconds, at least 1, after which a collective operation fails.

    Example::

        >>> from opsd_lightning import FSDP2Strategy
        >>> strategy = FSDP2Strategy(cpu_offload=True, timeout_seconds=600)
        >>> strategy.cpu_offload
        True
    """

    def __init__(
        self,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout_seconds: PositiveInt = 1800,
    ) -> None:
        if process_group_backend is None and cpu_offload and torch.cuda.is_available():
            process_group_backend = "cuda:nccl,cpu:gloo"  # offloaded gradients are reduced on the CPU
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout_seconds),
        )
        self.cpu_offload = cpu_offload

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes  # Lightning's "auto" is the number of nodes
        super().setup_environment()
        # torch may create a group of its own for the mesh, with torch's default timeout (10 minutes under NCCL).
        assert self._timeout is not None
        _set_pg_timeout(self._timeout, self.device_mesh.get_group("data_parallel"))

    def model_to_device(self) -> None:
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.lightning_module is not None
        for module in self.lightning_module.modules():  # parameters stay in host memory
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.root_device)
        for metric in self.lightning_module.children():
            if not isinstance(metric, PeftModel):
                metric.to(self.root_device)

    # -- the model ---------------------------------------------------------------------------------------------------

    def shard(self, model: PeftModel) -> None:
        """Shard a newly built policy in place.

        Raises:
            ConfigError: The model has no adapter, does not name its decoder layers, or has 8-bit weights.
        """
        if not isinstance(model, PeftModel):
            raise ConfigError(
                "fsdp2 needs an adapter, and model.policy.lora is null (full fine-tuning)",
                "trainer.strategy",
                "Use ddp or one device, or set model.policy.lora",
            )
        base = base_of(model)
        kinds = set(base._no_split_modules or ())
        layers = [module for module in base.modules() if type(module).__name__ in kinds]
        if not layers:
            raise ConfigError(
                f"fsdp2 cannot find the decoder layers of {type(base).__name__}, which has no _no_split_modules",
                "trainer.strategy",
                "Use ddp",
            )
        _unwrap_quantized_weights(base)
        for name, parameter in model.named_parameters():
            if is_adapter_key(name):  # initialized at random on every rank
                with torch.no_grad():
                    start = parameter.to(self.root_device)
                    dist.broadcast(start, src=0)
                    parameter.copy_(start)
        offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if self.cpu_offload else OffloadPolicy()
        mesh = self.device_mesh["data_parallel"]
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, offload_policy=offload)
        # The root unit holds the embeddings and the head. They stay gathered after the forward pass because the head is
        # called separately. The root is the base model and not the PeftModel, because `generate` runs the base model.
        fully_shard(base, mesh=mesh, reshard_after_forward=False, offload_policy=offload)
        base.hidden_states = MethodType(_hidden_states, base)
        register_fsdp_forward_method(base, "hidden_states")

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulate local gradients in backward passes inside the context, without reducing them over ranks."""
        modules = fsdp_modules(self.model)
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
        return state if self._save_distributed_checkpoint else {key: full_tensor(value) for key, value in state.items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        if self._save_distributed_checkpoint:
            assert self.model is not None
            return get_optimizer_state_dict(self.model, optimizer)
        state: dict[str, Any] = optimizer.state_dict()
        state["state"] = {
            index: {name: full_tensor(value) for name, value in values.items()} for index, values in state["state"].items()
        }
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        name = self.broadcast(str(filepath))
        if not self._save_distributed_checkpoint:
            Strategy.save_checkpoint(self, checkpoint, name, storage_options)
            return
        if is_remote(name):
            raise ConfigError(
                f"{name} is remote, and sharded checkpoints are written to local or shared folders only",
                "trainer.callbacks.dirpath",
                "Choose a local or shared folder, or set save_distributed_checkpoint to false",
            )
        path = Path(name)
        optimizers = checkpoint.pop("optimizer_states", [])
        state = {"state_dict": checkpoint.pop("state_dict")} | {f"optimizer_{i}": s for i, s in enumerate(optimizers)}
        with ExitStack() as stack:
            error: Exception | None = None
            if self.is_global_zero:
                try:
                    stack.enter_context(replace_checkpoint(path, folder=True))
                except Exception as caught:
                    error = caught
            if not self.broadcast(error is None):
                raise error or ConfigError(
                    f"rank 0 could not create {path}", "trainer.callbacks", "See the message of rank 0"
                )
            with wrap_write_errors(path):
                write_shards(state, temporary_name(path))
                if self.is_global_zero:
                    write_meta(checkpoint, temporary_name(path))
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
            raise ConfigError(
                f"{path} is a folder, but not a sharded checkpoint",
                "ckpt_path",
                "Give a checkpoint file, or a folder that save_distributed_checkpoint wrote",
            )
        checkpoint = load_file(path / META, weights=read_adapters(path))
        # Lightning calls this hook too, but only after the optimizers are loaded. Called here, it refuses a checkpoint of
        # another run before the optimizers' shards are read.
        assert self.lightning_module is not None
        self.lightning_module.on_load_checkpoint(checkpoint)
        if "optimizer_states" in checkpoint:  # the hook has replaced them: the run starts with new optimizers
            return checkpoint
        # Optimizers are loaded in place here, so `load_optimizer_state_dict` skips them.
        for i, optimizer in enumerate(self.optimizers):
            assert self.model is not None
            state = {f"optimizer_{i}": get_optimizer_state_dict(self.model, optimizer)}
            read_shards(state, path)
            with wrap_restore_errors(path):
                set_optimizer_state_dict(self.model, optimizer, state[f"optimizer_{i}"])
        checkpoint["optimizer_states"] = [None] * len(self.optimizers)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        with torch.no_grad():
            for key, ours in self.lightning_module.state_dict().items():
                ours.copy_(_shard_like(checkpoint["state_dict"][key], ours))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            if state is None:
                continue
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            sharded = {
                index: {
                    name: _shard_like(value, parameter)
                    if isinstance(value, Tensor) and value.shape == parameter.shape
                    else value
                    for name, value in state["state"][index].items()
                }
                for index, parameter in enumerate(parameters)
                if index in state["state"]
            }
            optimizer.load_state_dict({"state": sharded, "param_groups": state["param_groups"]})


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2: base model and adapters sharded over all devices")


def _hidden_states(base: Any, **inputs: Any) -> Tensor:
    return below_head(base)(**inputs).last_hidden_state


def _shard_like(value: Tensor, reference: Tensor) -> Tensor:
    """Shard a full tensor as a reference tensor is sharded. Return it as it is if the reference is not sharded."""
    if not isinstance(reference, DTensor):
        return value
    return distribute_tensor(value.to(reference.device), reference.device_mesh, reference.placements)


def _unwrap_quantized_weights(base: nn.Module) -> None:
    """Replace 4-bit weights by plain parameters, which FSDP2 can shard.

    The layers keep the quantization state, from which bitsandbytes restores the 4-bit weights in each forward pass.
    """
    for module in base.modules():
        weight = module._parameters.get("weight")
        if type(weight).__name__ == "Int8Params":
            raise ConfigError(
                "fsdp2 cannot shard 8-bit weights",
                "model.policy.quantization.load_in_8bit",
                "Use load_in_4bit, or set trainer.strategy to ddp",
            )
        if weight is not None and type(weight).__name__ == "Params4bit":
            module.quant_state = weight.quant_state  # type: ignore[attr-defined]
            module.weight = nn.Parameter(weight.data, requires_grad=False)
