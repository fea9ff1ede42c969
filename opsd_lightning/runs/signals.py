"""Stop all ranks together when a signal arrives or a rank dies.

After a signal, all ranks stop at the end of the same step, with one checkpoint (`stop_if_signalled`). A second signal ends
the process at once. On each rank, a thread receives signals while the main thread is blocked in a collective. It also holds
a connection to rank 0, or on rank 0 to all ranks. The system closes the connection of a process that dies, so that the
other ranks end as well, instead of waiting in a collective until it times out.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import re
import secrets
import selectors
import shlex
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from opsd_lightning.runs import early_signals
from opsd_lightning.runs.early_signals import SECOND_SIGNAL_SECONDS
from opsd_lightning.runs.requeue import requeue_job, save_for_requeue

#: Seconds after a signal until the process ends even if its step is not finished.
DEADLINE_SECONDS = 900.0
# Seconds after the loss of a rank until collectives are aborted, until the process ends, and until it ends even while it
# writes its report.
_ABORT_SECONDS, _END_SECONDS, _LAST_SECONDS = 2.0, 6.0, 40.0
# Seconds after a second signal until the process ends even if its main thread is blocked.
_STUCK_SECONDS = 4.0
_OWN_ERROR_SECONDS = 1.0  # delay before the failure of another rank ends this one
_CONNECT_SECONDS = 60.0
_GOODBYE = "bye"


class Stopped(SIGTERMException):
    """Exit of a run that was stopped by a signal. The exit status is 128 plus the signal number.

    Args:
        number: Number of the signal.
        launched: If True, the process was started by the first rank and exits with status 0.
    """

    def __init__(self, number: int, launched: bool = False) -> None:
        # Lightning kills the first rank if a rank that it started exits with another status than 0.
        super().__init__(0 if launched else 128 + number)
        self.number = number

    @property
    def signal_name(self) -> str:
        """Name of the signal, such as ``SIGTERM``."""
        return signal.Signals(self.number).name


class RankLost(RuntimeError):
    """Another rank has failed or was killed."""


class Signals(_SignalConnector):
    """Signal connector of the trainer. Replaces Lightning's, whose handlers wait for other ranks.

    Attributes:
        received: Number of the signal that stops the run, or 0.
        agreed: True if all ranks have agreed to stop.
        requeued: True if SLURM has accepted to requeue the job, and so will end this one.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.received, self.agreed, self._received_at = 0, False, 0.0
        self.requeued = False
        self._monitor: _RankMonitor | None = None
        self._former_handlers: dict[int, Any] = {}

    @property
    def requeue_signal(self) -> int | None:
        """Number of the signal after which SLURM is asked to requeue the job, or None."""
        environment = self.trainer._accelerator_connector.cluster_environment
        if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
            return None
        return environment.requeue_signal

    def connect(self) -> bool:
        """Connect the ranks once their process group exists. All ranks must call this method.

        Returns:
            True if this call connected them.
        """
        if self._monitor is None and self.trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
            self._monitor = _RankMonitor(self)
            self._monitor.connect(self.trainer)
            return True
        return False

    def register_signal_handlers(self) -> None:
        self.received, self.agreed, self.requeued = 0, False, False
        if threading.current_thread() is not threading.main_thread():
            return
        numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
        if (own := self.requeue_signal) is not None:
            numbers.append(signal.Signals(own))
            if shutil.which("scontrol") is None:
                rank_zero_warn(
                    f"scontrol is not on PATH. After {numbers[-1].name}, a checkpoint is saved and the run ends, but SLURM "
                    "is not asked to requeue the job"
                )
        for number in numbers:
            if (before := signal.getsignal(number)) is not signal.SIG_IGN:  # ignored under nohup
                self._former_handlers[number] = before
                signal.signal(number, self._handle)
        self._monitor = self._monitor or _RankMonitor(self)
        self._monitor.start(set(self._former_handlers))

    def _handle(self, number: int, frame: Any) -> None:
        if self._monitor is not None and self._monitor.lost is not None:
            if not self._monitor.raised:
                self._monitor.raised = True
                raise RankLost(self._monitor.lost)
            return
        if self.received:
            if time.monotonic() - self._received_at >= SECOND_SIGNAL_SECONDS and not self.requeued:
                raise Stopped(number)
            return
        self.received, self._received_at = number, time.monotonic()
        before = self._former_handlers.get(number)
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)

    def teardown(self) -> None:
        """Restore the former handlers, at the end of a run or after a failure."""
        if threading.current_thread() is threading.main_thread():
            for number, before in self._former_handlers.items():
                signal.signal(number, signal.SIG_DFL if before is None else before)
        self._former_handlers = {}
        if self._monitor is not None and self.trainer.state.status == TrainerStatus.INTERRUPTED:
            self.release()

    def release(self) -> None:
        """Close the connections to the other ranks."""
        watch, self._monitor = self._monitor, None
        if watch is not None:
            watch.close(failed=self.trainer.state.status == TrainerStatus.INTERRUPTED and not self.agreed)


def watch_signals(trainer: Trainer) -> None:
    """Install `Signals` in a trainer and connect its ranks. Call it on all ranks in ``setup``, before any long work.

    Raises:
        Stopped: A signal arrived before the ranks were connected.
    """
    if not isinstance(trainer._signal_connector, Signals):
        trainer._signal_connector = Signals(trainer)
    connected, number = trainer._signal_connector.connect(), early_signals.uninstall()
    if connected:
        number = _max_over_ranks(trainer, number)
    if number:
        if trainer.is_global_zero:
            _write_stderr(f"Stopped by {signal.Signals(number).name} before the run began")
        trainer._signal_connector.agreed = True
        raise _stop_error(trainer, number)


def disconnect(trainer: Trainer) -> None:
    """Tell the other ranks that this rank has finished. Call it in ``teardown``."""
    if isinstance(trainer._signal_connector, Signals):
        trainer._signal_connector.release()


def stop_if_signalled(trainer: Trainer, command: str | None = None) -> None:
    """Stop after a step or an evaluation batch if any rank has received a signal. All ranks must call this function.

    In a fit, a checkpoint of the step is saved unless there is one already.

    Args:
        trainer: Trainer of the run.
        command: Command line of the run, or None for a run started from Python.

    Raises:
        Stopped: A rank has received a signal. Raised on all ranks.
    """
    connector = trainer._signal_connector
    number = connector.received if isinstance(connector, Signals) else 0
    if trainer.world_size > 1:
        number = _max_over_ranks(trainer, number)
    if not number or not isinstance(connector, Signals):
        return
    connector.received = number
    how = f"Stopped by {signal.Signals(number).name}"
    if trainer.state.fn == "fit" and not trainer.sanity_checking:
        how += f" after step {trainer.global_step}. {_save_and_advise(trainer, connector, command)}"
    if trainer.is_global_zero:
        _write_stderr(how)
    connector.agreed = True
    raise _stop_error(trainer, number)


def _max_over_ranks(trainer: Trainer, number: int) -> int:
    """All-reduce a number with max."""
    return int(trainer.strategy.reduce(torch.tensor(number, device=trainer.strategy.root_device), None, "max"))


def _stop_error(trainer: Trainer, number: int) -> Stopped:
    environment = trainer._accelerator_connector.cluster_environment
    return Stopped(number, launched=isinstance(environment, LightningEnvironment) and trainer.global_rank > 0)


def _save_and_advise(trainer: Trainer, connector: Signals, command: str | None) -> str:
    """Make sure that there is a checkpoint of this step, and return a text on how to resume. All ranks must call it."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return "fast_dev_run saves no checkpoint"
    if connector.received == connector.requeue_signal:
        path = save_for_requeue(trainer)
        connector.requeued = trainer.is_global_zero and requeue_job(path)
        return f"The checkpoint is {path}"
    if not trainer.checkpoint_callbacks:
        return "No checkpoint was saved, because the trainer has no ModelCheckpoint"
    path = _checkpoint_of_step(trainer) or _save_last(trainer)
    if command is None:
        return f"Resume with trainer.fit(..., ckpt_path={path!r})"
    return f"Resume with: {command} --ckpt_path {shlex.quote(path)}"


def _checkpoint_of_step(trainer: Trainer) -> str | None:
    """Return the full checkpoint of the current step, if there is one."""
    callbacks: list[Any] = trainer.checkpoint_callbacks
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and not callback.save_weights_only:
            saved = callback._last_checkpoint_saved
            if saved and callback._last_global_step_saved == trainer.global_step:
                return callback.last_model_path if callback.save_last and callback.last_model_path else saved
    return None


def _save_last(trainer: Trainer) -> str:
    """Save the checkpoint that ``--ckpt_path last`` finds, without overwriting the last checkpoint of another run."""
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    callback = next((callback for callback in callbacks if callback.save_last), callbacks[0] if callbacks else None)
    path = ""
    if trainer.is_global_zero:
        own = {str(callback.last_model_path) if callback else "", str(trainer.ckpt_path)}
        folder = Path(callback.dirpath or trainer.default_root_dir) if callback else Path(trainer.default_root_dir)
        names = (
            f"{ModelCheckpoint.CHECKPOINT_NAME_LAST}{ending}.ckpt" for ending in ("", *(f"-v{n}" for n in range(1, 10**6)))
        )
        found = (folder / name for name in names)
        path = str(callback.last_model_path) if callback and callback.last_model_path else ""
        path = path or str(next(p for p in found if not p.exists() or str(p) in own))
    path = str(trainer.strategy.broadcast(path))
    if callback is not None:
        callback.last_model_path = path  # set before saving, since the checkpoint contains it
    trainer.save_checkpoint(path)
    return path


class _RankMonitor:
    """Thread that receives signals, and detects lost ranks by their closed connections."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self.rank = signals.trainer.global_rank
        #: Message about a lost rank.
        self.lost: str | None = None
        #: True once the main thread has raised `RankLost`.
        self.raised = False
        self._numbers: set[int] = set()
        self._first_at = self._second_at = self._lost_at = 0.0
        self._second_signal = 0
        self._failure_announced = False
        self._aborted = False
        self._others: dict[socket.socket, int] = {}
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._wakeup: int | None = None
        self._ended, self._send_lock = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None
        _monitors.append(self)

    @property
    def received(self) -> int:
        return self._signals.received

    # -- connections -------------------------------------------------------------------------------------------------------

    def connect(self, trainer: Trainer) -> None:
        """Connect every rank with rank 0. If the network does not allow it, the run continues without the connections."""
        listener, address = None, None
        if self.rank == 0:
            with contextlib.suppress(OSError):
                listener = _listen(trainer.world_size)
                address = (listener.getsockname()[1], secrets.token_hex(16))
        address = trainer.strategy.broadcast(address)
        connected = False
        if address is not None:
            with contextlib.suppress(OSError, ValueError):
                port, token = address
                if listener is not None:
                    self._others = _accept(listener, token, trainer.world_size)
                else:
                    self._others = {_connect(port, token, self.rank): 0}
                connected = True
        if listener is not None:
            listener.close()
        if not trainer.strategy.reduce_boolean_decision(connected):  # type: ignore[attr-defined]
            for other in self._others:
                other.close()
            self._others = {}
            rank_zero_warn(
                "the ranks could not open connections in addition to their process group (a firewall?). If a rank is "
                "killed, the others notice it only when a collective fails or times out"
            )
        self._run()

    def start(self, numbers: set[int]) -> None:
        """Start to receive signals. Call it in the main thread."""
        self._numbers = numbers
        with contextlib.suppress(ValueError):
            before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._wakeup = before if self._wakeup is None else self._wakeup
        self._run()

    def _run(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="opsd-signals", daemon=True)
            self._thread.start()

    def close(self, failed: bool) -> None:
        """End the thread and tell the other ranks whether this rank has failed."""
        if failed:
            self._announce_failure()
        with self._send_lock:
            for other in self._others:
                with contextlib.suppress(OSError):
                    other.sendall(f"{_GOODBYE}\n".encode())
        self._ended.set()
        self._wake()
        if self._wakeup is not None and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._wakeup)
        if self._thread is not None:
            self._thread.join(5)
        self._close_all()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._writer, b"\0")

    def _close_all(self) -> None:
        if self in _monitors:
            _monitors.remove(self)
        for other in self._others:
            other.close()
        self._others = {}
        os.close(self._reader)
        os.close(self._writer)

    def forget(self) -> None:
        """Restore the former handlers and close the connections in a forked child."""
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
        for number in self._numbers:
            with contextlib.suppress(ValueError):
                if signal.getsignal(number) == self._signals._handle:
                    before = self._signals._former_handlers.get(number)
                    signal.signal(number, signal.SIG_DFL if before is None else before)
        self._close_all()

    # -- the thread --------------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        with selectors.DefaultSelector() as found:
            found.register(self._reader, selectors.EVENT_READ)
            for other in self._others:
                found.register(other, selectors.EVENT_READ)
            while not self._ended.is_set():
                for key, _ in found.select(0.5):
                    if key.fileobj == self._reader:
                        with contextlib.suppress(OSError):
                            self._handle_signals([n for n in os.read(self._reader, 4096) if n in self._numbers])
                    elif not self._receive(key.fileobj):  # type: ignore[arg-type]
                        found.unregister(key.fileobj)
                if not self._ended.is_set():
                    self._check_deadlines()

    def _handle_signals(self, numbers: list[int]) -> None:
        now = time.monotonic()
        for number in numbers:
            if self.lost is not None or self._signals.requeued:
                continue
            name = signal.Signals(number).name
            if not self._first_at:
                self._first_at = now
                _write_stderr(
                    f"rank {self.rank} received {name}: the run stops after this step. A second signal after "
                    f"{SECOND_SIGNAL_SECONDS:.0f} seconds ends it at once, without a checkpoint"
                )
            elif now - self._first_at >= SECOND_SIGNAL_SECONDS:
                self._second_signal, self._second_at = number, self._second_at or now

    def _receive(self, other: socket.socket) -> bool:
        """Read a message of another rank, and return False once its connection is closed."""
        try:
            text = other.recv(4096)
        except OSError:
            text = b""
        rank = self._others[other]
        lines = text.decode("ascii", "replace").splitlines()
        for line in lines:
            if (found := re.fullmatch(r"failed (\d+)", line)) is not None:
                # The same call may fail on this rank too. Wait, so that its own error is reported.
                self._ended.wait(_OWN_ERROR_SECONDS)
                self._report_lost(int(found[1]), "has failed (see its own message)")
        if _GOODBYE in lines:
            return False
        if not text:
            self._report_lost(rank, "has ended unexpectedly (it was killed, or its machine is down)")
        return bool(text)

    def _report_lost(self, rank: int, how: str) -> None:
        if self.lost is not None or self._ended.is_set() or self._failure_announced:
            return
        self.lost = f"rank {rank} {how}, and this rank cannot continue without it. The last checkpoint is still valid"
        self._lost_at = time.monotonic()
        if self.rank == 0:
            self._send(f"failed {rank}")
        if self._signals.trainer.state.status != TrainerStatus.INTERRUPTED:
            _write_stderr(f"error: rank {rank} {how}: rank {self.rank} ends as well")
            if signal.getsignal(signal.SIGTERM) == self._signals._handle:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)  # also interrupts a sleep
            else:  # before or after the run: the main thread may be about to report its own error
                _thread.interrupt_main(signal.SIGTERM)

    def _send(self, text: str) -> None:
        with self._send_lock:
            for other in self._others:
                with contextlib.suppress(OSError):
                    other.sendall(text.encode() + b"\n")

    def _announce_failure(self) -> None:
        if not self._failure_announced and self.lost is None:
            self._failure_announced = True
            self._send(f"failed {self.rank}")

    def _check_deadlines(self) -> None:
        now, trainer = time.monotonic(), self._signals.trainer
        interrupted = trainer.state.status == TrainerStatus.INTERRUPTED
        if interrupted and not self._signals.agreed:
            self._announce_failure()
        if self._first_at and self.lost is None and now - self._first_at > DEADLINE_SECONDS:
            _write_stderr(f"rank {self.rank} did not finish its step within {DEADLINE_SECONDS:.0f} seconds and ends at once")
            os._exit(128 + (self._signals.received or signal.SIGTERM))
        if self._second_signal and now - self._second_at > _STUCK_SECONDS:
            _write_stderr(f"rank {self.rank} is stuck and ends at once")
            os._exit(128 + self._second_signal)
        if self.lost is None:
            return
        if now - self._lost_at > (_LAST_SECONDS if interrupted else _END_SECONDS):
            _write_stderr(f"rank {self.rank} is stuck and ends at once")
            os._exit(1)
        if now - self._lost_at > _ABORT_SECONDS and not interrupted and not self._aborted:
            self._aborted = True
            threading.Thread(target=_abort_collectives, daemon=True).start()


_monitors: list[_RankMonitor] = []


def _after_fork() -> None:
    for watch in list(_monitors):
        watch.forget()


os.register_at_fork(after_in_child=_after_fork)


def stop_signal() -> int:
    """Return the number of the signal that stops a run of this process, or 0."""
    return next((watch.received for watch in list(_monitors) if watch.received), 0)


def _write_stderr(text: str) -> None:
    """Write a line without buffering: the process may end next, and the main thread may hold the stream's lock."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def _abort_collectives() -> None:
    """Abort pending collectives. NCCL does not end them when a rank dies, unlike gloo."""
    with contextlib.suppress(Exception):
        dist.distributed_c10d._abort_process_group()


def _listen(world: int) -> socket.socket:
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    family, *_, found = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind(found)
    except OSError:  # MASTER_ADDR may not be an address of a local interface
        listener.bind(("", 0))
    listener.listen(world)
    return listener


def _accept(listener: socket.socket, token: str, world: int) -> dict[socket.socket, int]:
    others: dict[socket.socket, int] = {}
    deadline = time.monotonic() + _CONNECT_SECONDS
    while len(others) < world - 1:
        listener.settimeout(max(deadline - time.monotonic(), 0.01))
        other = listener.accept()[0]
        other.settimeout(5)
        try:
            given, rank = _read_line(other).split()
        except (OSError, ValueError):
            given, rank = "", ""
        if not secrets.compare_digest(given, token) or not rank.isdigit():
            other.close()  # not a rank of this run
            continue
        others[other] = int(rank)
    for other in others:
        other.settimeout(5)
    return others


def _connect(port: int, token: str, rank: int) -> socket.socket:
    found = socket.create_connection((os.environ.get("MASTER_ADDR", "127.0.0.1"), port), timeout=_CONNECT_SECONDS)
    found.sendall(f"{token} {rank}\n".encode())
    found.settimeout(5)
    return found


def _read_line(connection: socket.socket) -> str:
    text = b""
    while not text.endswith(b"\n") and len(text) < 100:
        if not (more := connection.recv(1)):
            break
        text += more
    return text.decode("ascii", "replace")
