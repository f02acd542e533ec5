"""The training loop; `Trainer.train_step` is the step: forward, backward, clip, learning rate, update, average.

Works for any `Task`, in one process or several (accelerate). A step is an optimizer step; batch number
`step * accumulation + micro` is a pure function of that number, so a resumed run sees the same data.
"""

import contextlib
import math
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import Tensor, nn

from apps.training import checkpoint as checkpoints
from apps.training.compile import compile_blocks, uncompiled
from apps.training.config import TrainConfig
from apps.training.ema import weight_average
from apps.training.optimizer import make_optimizer
from apps.training.rounding import RoundedLayers
from apps.training.run_logger import RunLogger
from apps.training.schedule import learning_rate
from apps.training.task import ComparesCheckpoints, Task, TaskContext, task_class


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite; the message names the checkpoint to go back to."""


class LossModule(nn.Module):
    """A task's loss as a forward pass: DDP and autocast then see one module and one call.

    Args:
        task: The task.
        is_shared: Whether several processes exchange gradients. They wait for that of every parameter, so those that
            the loss doesn't depend on get one of zeros; the bits of the others stay.
    """

    def __init__(self, task: Task, is_shared: bool = False) -> None:
        super().__init__()
        self.trained = nn.ModuleDict(task.modules())
        self.task, self.is_shared = task, is_shared

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the task's loss and its log values."""
        loss, values = self.task.loss(batch)
        if self.is_shared:
            nothing = [one.flatten()[:0].sum().float() for one in self.trained.parameters() if one.requires_grad]
            loss = loss + torch.stack(nothing).sum().to(loss.dtype)
        return loss, values


def train(config: TrainConfig, resume: str | None = None) -> str:
    """Train as configured.

    Args:
        config: The validated configuration.
        resume: `latest`, the path of a checkpoint, or None for a new run.

    Returns:
        Why it ended: `finished`, `time` (run.max_minutes) or `interrupted` (Ctrl-C). All three have saved.

    Raises:
        TrainingDiverged: If the loss is no longer finite.
        CheckpointError: If `resume` cannot be used.
        FileExistsError: If a new run would overwrite the checkpoints of an old one.
    """
    threads = torch.get_num_threads()
    try:
        return Trainer(config, resume).run()
    finally:
        torch.set_num_threads(threads)  # `run.num_threads` is a setting of the whole process


class Trainer:
    """One run: the task, its optimizer and its files. See `train`."""

    def __init__(self, config: TrainConfig, resume: str | None = None) -> None:
        self.config = config
        self.options = options = config.run
        self.started = time.monotonic()
        if options.num_threads is not None:
            torch.set_num_threads(options.num_threads)
        # Without `cpu` accelerate ignores the launcher of several processes on a machine without a GPU.
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(), mixed_precision=options.mixed_precision
        )
        found = resume and checkpoints.resolve(options.folder, resume)
        if not found and checkpoints.complete_checkpoints(options.folder):
            raise FileExistsError(f"{options.folder} holds checkpoints; pass --resume latest or another run.name")
        options.folder.mkdir(parents=True, exist_ok=True)
        set_seed(options.seed)  # the same weights on every process
        new_task: Any = task_class(config.task.kind)
        self.task: Task = new_task(config, self._context())
        self.rounded = RoundedLayers(self.task.modules(), config.quantization, options.steps)
        if options.compile:
            compile_blocks(self.task.modules())
        self.model = self.accelerator.prepare(LossModule(self.task, self.accelerator.num_processes > 1))
        modules = self.task.modules()
        parameters = checkpoints.trained_parameters(modules)
        optimizer = make_optimizer(parameters, config)
        self.ema = weight_average(parameters, optimizer, config.optimizer)
        self.state = checkpoints.TrainState(
            parameters, checkpoints.persistent_buffers(modules), self.ema.shadow, optimizer
        )
        set_seed(options.seed, device_specific=True)
        self.saved_step = -1
        if found:
            self._resume(found)
        self.logger = RunLogger(
            options.folder, options.steps, self.state.step, self.accelerator.is_main_process, options.tensorboard
        )
        if self.accelerator.is_main_process:
            (options.folder / "config.json").write_text(config.model_dump_json(indent=1))

    def run(self) -> str:
        """Train until the end, the time limit or Ctrl-C; then save, and export unless interrupted."""
        options, state = self.options, self.state
        size = sum(parameter.numel() for parameter in state.parameters.values())
        with self.logger, _interruptible() as interrupted, BatchPrefetcher(self.task) as batches:
            self.logger.message(f"{options.name}: {size:,} parameters on {self.accelerator.device}, step {state.step}")
            window = MetricWindow(self.accelerator.device)
            while not (reason := self._reason_to_stop(interrupted.is_set())):
                self.train_step(batches, window)
                self.logger.advance(state.step)
                if _due(state.step, options.log_every):
                    self._log(window)
                self._validate_and_save(window)
            self._check_finite(window)
            self._save()
            if reason != "interrupted":
                self._export()
            self.logger.message(f"{reason} at step {state.step}; files in {options.folder}")
        return reason

    def train_step(self, batches: "BatchPrefetcher", window: "MetricWindow") -> None:
        """Take one optimizer step: everything that changes the weights is in here.

        Args:
            batches: Makes the batches.
            window: Collects the values for the log.
        """
        state, accelerator, settings = self.state, self.accelerator, self.config.optimizer
        accumulation = self.options.gradient_accumulation_steps
        self.model.train()
        for micro_step in range(accumulation):
            # fetch a batch; it was made while the last one was trained on
            started = time.monotonic()
            batch = send_to_device(batches.get(state.step * accumulation + micro_step), accelerator.device, True)
            window.waited += time.monotonic() - started
            # forward and backward; processes exchange gradients only at the last micro step
            is_last = micro_step == accumulation - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(self.model):
                loss, values = self.model(batch)
                accelerator.backward(loss / accumulation)
            window.add(loss, values)
        with self.rounded.around_step(state.step):
            # clip the gradient
            norm = nn.utils.clip_grad_norm_(list(state.parameters.values()), settings.max_grad_norm)
            # determine and set the learning rate for this step
            rate = learning_rate(state.step, self.options.steps, settings)
            for group in state.optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            window.rate = rate * state.optimizer.param_groups[0].get("d", 1.0)  # d: Prodigy's estimate
            window.norm = norm
            # update the weights
            state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)  # free the gradients right after
        # update the average of the weights
        self.ema.update(state.step)
        state.step += 1

    def _log(self, window: "MetricWindow") -> None:
        """Write the means since the last line, after a check that the loss is still finite."""
        self._check_finite(window)
        images = window.count * self.options.batch_size * self.accelerator.num_processes
        elapsed = time.monotonic() - window.started
        self.state.seconds += elapsed
        means = torch.stack([total.float() for total in window.totals.values()]) / window.count
        shared: Any = self.accelerator.reduce(means, "mean")  # over the processes
        values = dict(zip(window.totals, shared.tolist(), strict=True))
        values |= {"gradient_norm": float(window.norm), "learning_rate": window.rate}
        values |= {"images_per_second": images / elapsed, "data_wait": window.waited / elapsed}
        self.logger.write("train", self.state.step, {**values, "seconds": self.state.seconds})
        window.restart()

    def _validate_and_save(self, window: "MetricWindow") -> None:
        """Save, validate, preview and export, each when it is due; their time is not training time."""
        step, options = self.state.step, self.options
        started = time.monotonic()
        if _due(step, options.save_every):
            self._check_finite(window)
            self._save()
        if _due(step, options.save_every) or step == options.steps:
            self._score()
        if _due(step, options.validate_every) or (options.validate_every and step == options.steps):
            self._validate()
        if _due(step, options.preview_every) or (options.preview_every and step == options.steps):
            self._preview()
        if _due(step, options.export_every) and step < options.steps:
            self._export()
        window.started += time.monotonic() - started

    def _validate(self) -> None:
        with self._averaged():
            values = self.task.validate()
        self.logger.write("validation", self.state.step, values)

    def _score(self) -> None:
        """Keep and score the present weights, if the task compares checkpoints; processes wait for the first one.

        A failure is reported but does not end the training, which has saved a checkpoint.
        """
        if isinstance(self.task, ComparesCheckpoints) and self.accelerator.is_main_process:
            try:
                with self._averaged():
                    values = self.task.score(self.state.step)
                self.logger.write("score", self.state.step, values)
                self.logger.message(self.task.choose(self.logger.path))
            except Exception as error:
                self.logger.message(f"step {self.state.step}: the score failed: {type(error).__name__}: {error}")
        self.accelerator.wait_for_everyone()

    def _preview(self) -> None:
        """Write the preview; a failure there is reported but does not end the training."""
        if not self.accelerator.is_main_process:
            return
        path = self.options.folder / "previews" / f"step-{self.state.step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        try:
            with self._averaged():
                self.task.preview(path)
        except Exception as error:
            self.logger.message(f"step {self.state.step}: the preview failed: {type(error).__name__}: {error}")

    def _export(self) -> None:
        """Write the averaged weights to `export/`, with the configuration and the log beside them."""
        if self.accelerator.is_main_process:
            folder = self.options.folder / "export"
            folder.mkdir(exist_ok=True)
            with self._averaged():
                self.task.export(folder)
            (folder / "training_config.json").write_text(self.config.model_dump_json(indent=1))
            if self.logger.path.is_file():
                (folder / "training_log.jsonl").write_text(self.logger.path.read_text())
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        """Write a checkpoint of the present step, unless it has one, and delete the oldest."""
        if self.saved_step == self.state.step:
            return
        accelerator, folder = self.accelerator, self.options.folder
        temporary = folder / f"{checkpoints.checkpoint_path(folder, self.state.step).name}.tmp"
        if accelerator.is_main_process:
            checkpoints.begin(folder, self.state.step)
        accelerator.wait_for_everyone()
        checkpoints.write_random_state(temporary, accelerator.process_index)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            checkpoints.commit(temporary, self.state, self.config.model_dump(mode="json"), accelerator.num_processes)
            checkpoints.rotate(folder, self.options.checkpoints_total_limit)
        accelerator.wait_for_everyone()
        self.saved_step = self.state.step

    def _resume(self, path: Path) -> None:
        checkpoints.read(path, self.state, self.accelerator.num_processes, self.config.optimizer.name)
        checkpoints.read_random_state(path, self.accelerator.process_index)
        self.saved_step = self.state.step if path.parent == self.options.folder else -1

    def _check_finite(self, window: "MetricWindow") -> None:
        if math.isfinite(float(window.totals.get("loss", 0.0))) and math.isfinite(float(window.norm)):
            return
        good = checkpoints.complete_checkpoints(self.options.folder)
        advice = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
        raise TrainingDiverged(
            f"the loss is not finite at or before step {self.state.step}; {advice}; lower optimizer.learning_rate"
        )

    def _reason_to_stop(self, interrupted: bool) -> str:
        """Return why to stop before the next step, agreed between the processes; "" for going on."""
        if self.state.step >= self.options.steps:
            return "finished"
        limit = self.options.max_minutes
        out_of_time = limit is not None and time.monotonic() - self.started >= 60 * limit
        flags = torch.tensor([interrupted, out_of_time], dtype=torch.float32)
        if self.accelerator.num_processes > 1:
            shared: Any = self.accelerator.reduce(flags.to(self.accelerator.device))
            flags = shared.cpu()
        return "interrupted" if flags[0] else "time" if flags[1] else ""

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Swap in the averaged weights, in evaluation mode without gradients; restore the random states afterwards."""
        self.model.eval()
        states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 (the global state)
        plainly = uncompiled() if self.options.compile else contextlib.nullcontext()
        try:
            with self.ema.applied(), torch.no_grad(), self.accelerator.autocast(), plainly:
                yield
        finally:  # a failed preview does not end the run
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            random.setstate(states[2])

    def _context(self) -> TaskContext:
        accelerator: Any = self.accelerator
        return TaskContext(
            device=accelerator.device,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            autocast=accelerator.autocast,
            main_process_first=accelerator.main_process_first,
        )


class MetricWindow:
    """Sums since the last line of the log, kept on the device: a step need not wait for a GPU to report."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rate = 0.0
        self.norm = torch.zeros(())
        self.restart()

    def restart(self) -> None:
        """Begin anew after a line of the log."""
        self.totals: dict[str, Tensor] = {}
        self.count = 0
        self.waited = 0.0
        self.started = time.monotonic()

    def add(self, loss: Tensor, values: dict[str, Tensor]) -> None:
        """Add the values of a batch."""
        for name, value in {"loss": loss, **values}.items():
            self.totals[name] = self.totals.get(name, 0) + value.detach()
        self.count += 1


class BatchPrefetcher:
    """Make batch `index + 1` in a second thread while batch `index` is trained on."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.pending: dict[int, Future[dict[str, Any]]] = {}

    def __enter__(self) -> "BatchPrefetcher":
        # One thread of torch in there: a second OpenMP team would compete with the training for the cores.
        self.executor = ThreadPoolExecutor(1, "batches", initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *_: object) -> None:
        self.executor.shutdown(wait=True, cancel_futures=True)

    def get(self, index: int) -> dict[str, Any]:
        """Return batch `index` and start to make the next one."""
        future = self.pending.pop(index, None) or self.executor.submit(self.task.batch, index)
        self.pending = {index + 1: self.executor.submit(self.task.batch, index + 1)}
        return future.result()


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event; a second one ends the process as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
