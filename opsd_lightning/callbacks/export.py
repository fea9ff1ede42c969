"""Export of the adapter or the merged model at the end of ``fit``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors import SafetensorError

from opsd_lightning.callbacks.model_card import Kind, Validation, base_model_of, is_local, loaded_commit, model_card
from opsd_lightning.checkpoints.io import read_adapters
from opsd_lightning.distributed.collectives import run_on_all_ranks
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.models.export import ADAPTER, MERGED, inputs_of, merge_adapter, write_adapter
from opsd_lightning.models.sharding import full_tensor
from opsd_lightning.runs.output_checks import output_paths
from opsd_lightning.types import ConfigError
from opsd_lightning.utils.folders import Protected, check_replaceable, free_name, resolve_parent
from opsd_lightning.utils.hub import check_hub_id, check_push, push_command, push_folder
from opsd_lightning.utils.terminal import safe_text, say


class AdapterExport(Callback):
    """Callback that exports the best adapter as a peft folder at the end of ``fit``.

    In full fine-tuning it exports the model and the tokenizer.

    The best adapter is the one of the checkpoint that the first `ModelCheckpoint` with a ``monitor`` kept. Without such a
    callback, the adapter of the last step is exported.

    A folder that is empty or holds only an earlier export is replaced. Any other existing folder is refused before training.
    If the folder changed during training and cannot be replaced, the export is written to ``NAME-1``, ``NAME-2``, ... beside
    it. With ``fast_dev_run`` nothing is written.

    The export has a model card, ``README.md``: base model, settings, data, validation curve, use, limits and licenses. It
    holds no secrets and no paths of this machine. Read it before you publish the export.

    Args:
        folder: Folder for the export, relative to the trainer's ``default_root_dir``.
        merged_folder: Folder for the full model with the adapter merged in. Defaults to no merged model.
        base_model: Hub id of the base model, for a policy that is loaded from a folder or a ``.gguf`` file. The card and the
            adapter's settings name it. A policy that is loaded from the hub names itself. Defaults to none, and the card has
            only the architecture and the SHA-256 of the weights.
        hub_id: Repository of the Hugging Face hub that the export is pushed to at the end of ``fit``, with the token of
            ``hf auth login`` or ``HF_TOKEN``. Defaults to no push.
        hub_private: If True, the repository is created as a private one, and a public one is refused.

    Example::

        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> from opsd_lightning import AdapterExport
        >>> best = ModelCheckpoint(monitor="val/avg@4", mode="max")
        >>> callbacks = [best, AdapterExport(folder="adapter", merged_folder="merged")]
    """

    #: True for callbacks that write to ``default_root_dir`` in ``fit``. `runs.lock` allows one such run at a time.
    writes_to_root = True

    def __init__(
        self,
        folder: str = "adapter",
        merged_folder: str | None = None,
        base_model: str | None = None,
        hub_id: str | None = None,
        hub_private: bool = True,
    ) -> None:
        self.folder, self.merged_folder, self.base_model = folder, merged_folder, base_model
        self.hub_id, self.hub_private = hub_id, hub_private
        self._repo: str | None = None  # `hub_id` with its namespace
        self._commit: str | None = None  # of the base model in the local cache, when training began
        self._history: dict[int, Validation] = {}

    # -- the validation curve of the card. All ranks read metrics, since reading can reduce them over ranks. --------------

    @property
    def state_key(self) -> str:
        return self._generate_state_key(folder=self.folder)

    def state_dict(self) -> dict[str, Any]:
        return {"history": [[step, each.tokens, dict(each.values)] for step, each in self._history.items()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._history = {step: Validation(tokens, values) for step, tokens, values in state_dict["history"]}

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.num_sanity_val_steps == float("inf"):  # metrics of some batches are not comparable with later ones
            self._record(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._record(trainer, pl_module)

    def _record(self, trainer: Trainer, module: LightningModule) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if values:
            self._history[trainer.global_step] = Validation(int(getattr(module, "tokens_generated", 0)), values)

    # -- checks before training ------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(pl_module, PolicyModule):
            self._history = {}
            run_on_all_ranks(lambda: self._check(trainer, pl_module) if trainer.is_global_zero else None)

    def _check(self, trainer: Trainer, module: PolicyModule) -> None:
        root, kept = Path(trainer.default_root_dir), self._kept(trainer, module)
        self._commit = loaded_commit(module.policy)
        folder = check_replaceable(root / self.folder, _SETTING, ADAPTER, kept)
        if self.merged_folder is not None and not module.policy.trains_all:
            setting = "trainer.callbacks.merged_folder"
            merged = check_replaceable(root / self.merged_folder, setting, MERGED, [*kept, ("the adapter's folder", folder)])
            if merged in folder.parents or folder in merged.parents:
                raise ConfigError(f"{merged} and {folder} are inside each other", setting, "Choose another folder")
        if self.base_model is not None:
            check_hub_id(self.base_model, "trainer.callbacks.base_model")
        if self.hub_id is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            if self.base_model is None and is_local(module.policy.model):
                raise ConfigError(
                    "the base model is loaded from this machine, and others need its name to use the export",
                    "trainer.callbacks.base_model",
                    "Set it to the hub id of the base model",
                )
            self._repo = check_push(self.hub_id, self.hub_private, "trainer.callbacks.hub_id")

    def _kept(self, trainer: Trainer, module: PolicyModule) -> list[Protected]:
        checkpoint = trainer.ckpt_path
        given = [("the checkpoint", str(checkpoint))] if checkpoint is not None and Path(str(checkpoint)).exists() else []
        return [*output_paths(trainer), *inputs_of(module.policy), *given]

    # -- the export ------------------------------------------------------------------------------------------------------

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        chosen: Any = next((each for each in trainer.checkpoint_callbacks if getattr(each, "monitor", None)), None)
        best = getattr(chosen, "best_model_path", "")
        chosen = chosen if best else None
        if best and not trainer.is_global_zero:
            return  # the file may exist on the first node only
        # Gathering sharded weights needs every rank.
        found = read_adapters(best) if best else {key: full_tensor(value) for key, value in pl_module.state_dict().items()}
        if not trainer.is_global_zero:
            return
        weights = {key.removeprefix("model."): value for key, value in found.items()}
        root = Path(trainer.default_root_dir)
        kept, policy = self._kept(trainer, pl_module), pl_module.policy
        tokenizer = pl_module.tokenizer if policy.trains_all else None
        exported = "model" if policy.trains_all else "adapter"
        base = base_model_of(policy, self.base_model, self._commit)

        def card(kind: Kind, name: str | None = None) -> str:
            return model_card(trainer, pl_module, kind, base, chosen, self._history, name)

        folder = _written(
            root / self.folder,
            root,
            _SETTING,
            best,
            lambda folder: write_adapter(
                pl_module.model,
                folder,
                weights,
                tokenizer,
                _SETTING,
                kept,
                card("model" if policy.trains_all else "adapter", self._repo),
                base.name,
                base.revision,
            ),
        )
        say(f"The {exported} of {best or 'the last step'} is in {folder}")
        if self.merged_folder is not None and not policy.trains_all:
            setting, adapter = "trainer.callbacks.merged_folder", folder
            merged = _written(
                root / self.merged_folder,
                root,
                setting,
                best,
                lambda folder: merge_adapter(policy, adapter, folder, setting=setting, kept=kept, card=card("merged")),
            )
            say(f"The merged model is in {merged}")
        if self._repo is not None:
            self._push(folder, self._repo, trainer.global_step)

    def _push(self, folder: Path, repo: str, step: int) -> None:
        """Push the export to the hub. A failure is a warning: the export is on disk."""
        try:
            address = push_folder(folder, repo, self.hub_private, f"Export after {step} optimizer steps")
        except ConfigError as error:  # without the command, which would publish the export
            warnings.warn(f"AdapterExport did not push {folder}: {error}", stacklevel=2)
        except Exception as error:  # of the network, of the hub or of the disk
            reason = safe_text(str(error).strip().partition("\n")[0] or type(error).__name__)[:300]
            command = push_command(folder, repo, self.hub_private)
            warnings.warn(
                f"AdapterExport could not push {folder} to {repo} ({reason}). Push it with: {command}", stacklevel=2
            )
        else:
            say(f"The export is at {address}")


_SETTING = "trainer.callbacks.folder"


def _written(folder: Path, root: Path, setting: str, checkpoint: str, write: Callable[[Path], Path]) -> Path:
    """Write an export, under another name if its folder cannot be replaced.

    Args:
        folder: Folder of the export.
        root: The trainer's ``default_root_dir``.
        setting: Name of the setting that holds the folder.
        checkpoint: Path of the exported checkpoint. Empty for the weights of the last step.
        write: Writes the export to the folder that it is given, and returns the folder's real path.

    Raises:
        ConfigError: The export cannot be written, for example because the disk is full.
    """
    try:
        try:
            return write(folder)
        except (ConfigError, PermissionError) as error:
            if isinstance(error, ConfigError) and error.setting != setting:
                raise
            place = resolve_parent(folder)
            inside = (
                place.parent.is_dir()
                and os.access(place.parent, os.W_OK)
                and place not in (root.resolve(), *root.resolve().parents)
            )
            other = free_name(place if inside else root.resolve() / "adapter")
            warnings.warn(f"AdapterExport writes to {other} instead: {error}", stacklevel=3)
            return write(other)
    except (OSError, SafetensorError) as error:
        source = checkpoint or "the run's checkpoints, if it wrote any"
        problem = f"cannot write {folder} ({error}). The folder is unchanged"
        raise ConfigError(problem, setting, f"Export the trained weights from {source}") from error
