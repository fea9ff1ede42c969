"""The command line: LightningCLI with this package's parts, defaults and links.

All modules with classes that settings may name are imported here, so that YAML may leave out the module.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import opsd_lightning.callbacks.baseline
import opsd_lightning.callbacks.collapse_guard
import opsd_lightning.callbacks.export
import opsd_lightning.callbacks.health
import opsd_lightning.callbacks.kept_skills
import opsd_lightning.callbacks.progress
import opsd_lightning.callbacks.rollouts
import opsd_lightning.data.reworded_problems
import opsd_lightning.data.skill_sources
import opsd_lightning.data.sources
import opsd_lightning.data.task_sources
import opsd_lightning.distributed.fsdp2
import opsd_lightning.evaluation.skill_sets
import opsd_lightning.grading.choice_grader
import opsd_lightning.grading.exact_match
import opsd_lightning.grading.format_grader
import opsd_lightning.grading.json_grader
import opsd_lightning.grading.judge_grader
import opsd_lightning.grading.math_grader
import opsd_lightning.grading.no_grader
import opsd_lightning.grading.python_tests
import opsd_lightning.grading.reasoning_gym_grader
import opsd_lightning.losses.clips
import opsd_lightning.losses.divergences
import opsd_lightning.losses.objectives
import opsd_lightning.losses.position_weights
import opsd_lightning.losses.supports
import opsd_lightning.methods.anchor
import opsd_lightning.methods.grpo
import opsd_lightning.methods.mixed
import opsd_lightning.methods.opsd
import opsd_lightning.methods.sft
import opsd_lightning.prompts.contexts
import opsd_lightning.prompts.online_contexts
import opsd_lightning.reports.run_report
import opsd_lightning.reports.token_report
import opsd_lightning.rollouts.continuous_batching
import opsd_lightning.rollouts.transformers_engine
import opsd_lightning.rollouts.vllm.colocated
import opsd_lightning.rollouts.vllm.engines
import opsd_lightning.teachers
from opsd_lightning.callbacks.rollouts import RolloutWriter
from opsd_lightning.checkpoints.file import check_file, local_path, wrap_restore_errors
from opsd_lightning.checkpoints.io import check_weights_only, recover
from opsd_lightning.cli.allocator import use_expandable_segments
from opsd_lightning.cli.commands import COMMANDS, TITLE
from opsd_lightning.cli.help import HelpFormatter, arrange
from opsd_lightning.cli.mistakes import shortened
from opsd_lightning.cli.parser import Parser, check_nulls, remembering
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.distributed.checks import check_accelerator_name, check_strategy_name, strategy_problem
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.methods.trainer_checks import check_trainer
from opsd_lightning.models.precision import precision_problem
from opsd_lightning.reports.run_report import RunReport
from opsd_lightning.runs import early_signals, lock as run_lock
from opsd_lightning.runs.output_checks import check_checkpoint_alias, check_folders, open_loggers
from opsd_lightning.runs.record import launch_command
from opsd_lightning.runs.requeue import check_evaluation, checkpoint_to_resume
from opsd_lightning.runs.saved_config import SavedConfig, check_no_hidden_values
from opsd_lightning.types import ConfigError, UserError
from opsd_lightning.utils.disk_errors import DISK_FULL
from opsd_lightning.utils.files import is_remote
from opsd_lightning.utils.library_messages import hide_library_messages
from opsd_lightning.utils.redaction import redact_arguments
from opsd_lightning.utils.terminal import safe_messages, say

# Settings of the Trainer that Lightning refuses under manual optimization: the default, the problem and the fix.
_UNSUPPORTED: dict[str, tuple[Any, str, str]] = {
    "accumulate_grad_batches": (
        1,
        "it has no effect here: one training step is one optimizer step, in micro-batches of model.token_budget tokens",
        "Leave it out, and set data.batch_size to the questions of an optimizer step",
    ),
    "gradient_clip_val": (None, "it has no effect here", "Leave it out, and set model.max_grad_norm instead"),
}


class OPSDCLI(LightningCLI):
    """Command line that fits, validates, tests and predicts with a `PolicyModule` and an `OPSDDataModule`."""

    def __init__(
        self,
        model_class: type[LightningModule],
        datamodule_class: type[LightningDataModule],
        args: ArgsType = None,
        **settings: Any,
    ) -> None:
        self.arguments = [str(argument) for argument in args] if isinstance(args, list) else sys.argv[1:]
        super().__init__(model_class, datamodule_class, args=args, **settings)

    def _dump_config(self) -> None:
        """Store the settings as Lightning does, but do not validate them again, which would take most of the time."""
        if not hasattr(self, "config_dump"):
            text = self.parser.dump(self.config, skip_link_targets=False, skip_none=False, skip_validation=True)
            self.config_dump = yaml.safe_load(text)[self.config.subcommand]

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        try:
            with remembering(args if isinstance(args, list) else None):
                super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            raise ConfigError(f"the file is not UTF-8 ({error})", "config", "Save it as UTF-8") from error
        config = self.config[self.config.subcommand]
        check_nulls(self.arguments, config)
        seed = config.seed_everything
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise ConfigError(f"{seed} is no number from 0 to 2^32 - 1", "seed_everything", "Choose one of these")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # With concrete defaults, an overlay can change one setting of a part without repeating its class, and
        # `opsd fit --print_config` alone prints a configuration that runs.
        parser.set_defaults(
            {
                "model": {
                    "class_path": "opsd_lightning.OPSDModule",
                    "init_args": {
                        "policy": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct"},
                        "teacher": {"class_path": "opsd_lightning.FixedTeacher"},
                        "objective": {
                            "class_path": "opsd_lightning.DivergenceObjective",
                            "init_args": {
                                "divergence": {"class_path": "opsd_lightning.ForwardKL"},
                                "support": {"class_path": "opsd_lightning.FullVocabulary"},
                                "clip": {"class_path": "opsd_lightning.NoClip"},
                            },
                        },
                        "rollouts": {"class_path": "opsd_lightning.TransformersEngine"},
                    },
                },
                "data.train": {"class_path": "opsd_lightning.WordProblems"},
                "data.context": {"class_path": "opsd_lightning.TraceContext"},
                "data.grader": {"class_path": "opsd_lightning.MathGrader"},
            }
        )
        parser.add_lightning_class_args(RolloutWriter, "writer")
        parser.link_arguments("model.init_args.policy", "data.policy")
        parser.link_arguments("data.grader", "model.init_args.grader")
        parser.link_arguments("data.prompts", "model.init_args.prompts")
        parser.link_arguments(
            ("model.init_args.sampling", "model.init_args.eval_sampling"), "data.max_new_tokens", compute_fn=_longest
        )
        parser.link_arguments("seed_everything", "model.init_args.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        given, commands = self.arguments[:1], self.subcommands()
        if given and given[0] in commands:  # the parsers of the others would take a quarter of a second
            self.subcommands = lambda: {given[0]: commands[given[0]]}  # type: ignore[method-assign]
        super()._add_subcommands(parser, **kwargs)
        for name, command in self._subcommand_parsers.items():
            command.prog = f"opsd {name}"
            arrange(command, name, COMMANDS[name].summary)
            if name in ("validate", "test"):
                command.set_defaults({"verbose": False})  # `RolloutWriter` prints the metrics, with their intervals

    def _parse_ckpt_path(self) -> None:
        """Do nothing, unlike Lightning, which replaces settings of the command line by the checkpoint's hyperparameters.

        A checkpoint that does not match the command line is refused when it is loaded.
        """

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        check_no_hidden_values(config)
        path = config.get("ckpt_path")
        check_weights_only(config.get("weights_only"))
        if path not in (None, "best", "last", "hpc"):
            if not is_remote(path):
                recover(Path(path))
            if local_path(path).is_file():
                check_file(path)
        trainer = config.trainer
        strategy = getattr(trainer.strategy, "class_path", trainer.strategy)
        shards = path not in (None, "best", "last", "hpc") and Path(path).is_dir()
        if shards and not str(strategy).rpartition(".")[2].lower().startswith("fsdp2"):
            raise ConfigError(
                f"{path} is a folder of shards, which only trainer.strategy fsdp2 reads, on one device or many",
                "ckpt_path",
                "Set trainer.strategy to fsdp2, or save with save_distributed_checkpoint: false, which every strategy reads",
            )
        if isinstance(trainer.accelerator, str):
            check_accelerator_name(trainer.accelerator)
        if isinstance(trainer.strategy, str) and not trainer.strategy.endswith("Strategy"):  # not the name of a class
            check_strategy_name(trainer.strategy)
        if isinstance(strategy, str) and (problem := strategy_problem(strategy)) is not None:
            raise problem
        if (problem := precision_problem(trainer.precision)) is not None:
            raise problem
        for name, (default, problem_text, fix) in _UNSUPPORTED.items():
            if trainer[name] != default:
                raise ConfigError(problem_text, f"trainer.{name}", fix)
        use_expandable_segments(getattr(config.model.init_args.get("rollouts"), "class_path", None))

    def _run_subcommand(self, subcommand: str) -> None:
        connector: Any = self.trainer._checkpoint_connector
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            if not connector._loaded_checkpoint:  # set only while the checkpoint is being restored
                raise
            with wrap_restore_errors(connector._ckpt_path):
                raise error

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
            self.model.command = shlex.join(launch_command() + redact_arguments(_without_checkpoint(self.arguments)))
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, RunReport):
                    callback.arguments = self.arguments
        except (ValueError, TypeError, ImportError) as error:  # raised by a part that checks its settings
            reason = _root_cause(error)
            if isinstance(reason, ConfigError):
                raise _with_full_name(reason, self.config[self.subcommand]) from None
            if isinstance(reason, UserError):
                raise reason from None
            raise UserError(str(reason)) from error

    def before_fit(self) -> None:
        if self.trainer.is_global_zero:
            try:
                run_lock.lock_fit(self.trainer)
            except ConfigError:
                if not run_lock.ranks_started_externally(self.trainer):
                    raise
                return  # `fit` refuses it again, on all ranks together, and nothing is written until then
        try:
            path = self.config.fit.get("ckpt_path")
            if path == "best":
                check_checkpoint_alias(self.trainer, "best")
            if path is None and (found := checkpoint_to_resume(self.trainer)) is not None:
                check_file(found)
                self.config_init.fit.ckpt_path = found
            check_trainer(self.trainer, self.model, self.datamodule)
            self._check_surroundings()
        except BaseException:
            run_lock.release(self.trainer)
            raise
        if run_lock.launches_processes(self.trainer):
            run_lock.release(self.trainer)  # the first of the launched processes takes it

    def before_validate(self) -> None:
        self._before_evaluation()

    def before_test(self) -> None:
        self._before_evaluation()

    def before_predict(self) -> None:
        self._before_evaluation()

    def _before_evaluation(self) -> None:
        check_checkpoint_alias(self.trainer, self.config[self.subcommand].get("ckpt_path"))
        if self.config[self.subcommand].get("ckpt_path") is None:
            check_evaluation(self.trainer)
        try:
            if self.trainer.is_global_zero:
                run_lock.lock_loggers(self.trainer)
            self._check_surroundings()
        except BaseException:
            run_lock.release(self.trainer)
            raise
        if run_lock.launches_processes(self.trainer):
            run_lock.release(self.trainer)

    def _check_surroundings(self) -> None:
        check_folders(self.trainer)
        open_loggers(self.trainer)


def _root_cause(error: BaseException) -> BaseException:
    """Return the error of a part itself, which jsonargparse wraps in errors about types."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        cause = cause.__cause__
    # Another error in a part has no type of its own. jsonargparse raises ValueError around it.
    while str(error).startswith("Does not validate against any of the Union subtypes") and error.__cause__ is not None:
        error = error.__cause__
    return error


def _with_full_name(error: ConfigError, config: Any) -> ConfigError:
    """Return an error of an argument, ``Class.argument``, with the setting's name on the command line."""
    owner, _, argument = error.setting.partition(".")
    names = {"OPSDDataModule": "data."}
    for name, path in config.items():
        if name.endswith(".class_path") and isinstance(path, str):
            names.setdefault(path.rpartition(".")[2], name.removesuffix("class_path") + "init_args.")
    if owner not in names or not argument:
        return error
    prefix = names[owner].replace("model.init_args.", "model.")
    return ConfigError(error.problem, f"{prefix}{argument}", error.fix)


def _without_checkpoint(arguments: list[str]) -> list[str]:
    """Return the arguments without ``--ckpt_path`` and its value."""
    kept, skipped = [], False
    for argument in arguments:
        if not skipped and argument != "--ckpt_path" and not argument.startswith("--ckpt_path="):
            kept.append(argument)
        skipped = not skipped and argument == "--ckpt_path"
    return kept


def _longest(*samplings: Any) -> int:
    # The settings of an optional part are below `init_args`, next to its class.
    settings = [getattr(sampling, "init_args", sampling) for sampling in samplings if sampling is not None]
    return max(setting["max_new_tokens"] for setting in settings)


def cli_settings() -> dict[str, Any]:
    """Return the options with which Lightning builds an `OPSDCLI`, without its classes and arguments."""
    return {
        "seed_everything_default": 0,
        "auto_configure_optimizers": False,
        "subclass_mode_model": True,
        "save_config_callback": SavedConfig,
        "save_config_kwargs": {"overwrite": True},
        "parser_class": Parser,
        "parser_kwargs": {
            "prog": "opsd",
            "description": TITLE,
            "version": opsd_lightning.__version__,
            "formatter_class": HelpFormatter,
        },
    }


def main(args: ArgsType = None) -> OPSDCLI:
    """Run the command line.

    Args:
        args: The arguments. Defaults to those of the process.

    Returns:
        The command line after the run, with its ``trainer``, ``model`` and ``datamodule``.

    Raises:
        SystemExit: With status 2, after one message, for a mistake of the user.
    """
    early_signals.install()
    with safe_messages(), hide_library_messages():
        try:
            return OPSDCLI(PolicyModule, OPSDDataModule, args=args, **cli_settings())
        except (UserError, MisconfigurationException) as error:
            say(f"error: {shortened(str(error))}", error=True)
            raise SystemExit(2) from error
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            say(f"error: {error}. Free some space, and resume from the last checkpoint (ckpt_path)", error=True)
            raise SystemExit(2) from error
        finally:
            early_signals.uninstall()
