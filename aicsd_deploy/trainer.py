"""The training loop: step, validate, save, resume. Knows no teacher and no method: the loss is a callable."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aicsd_deploy.checkpoint import Checkpoint, save_checkpoint
from aicsd_deploy.config import TrainConfig
from aicsd_deploy.console import percent, progress, say
from aicsd_deploy.data.dataset import SegmentationDataset
from aicsd_deploy.data.loader import Batch, steps_per_epoch, training_batches
from aicsd_deploy.data.transforms import Augmentation
from aicsd_deploy.errors import AicsdError, InputError, Preempted, first_line
from aicsd_deploy.files import DISK_FULL
from aicsd_deploy.metadata import Metadata
from aicsd_deploy.models.checkpointing import checkpoint_activations
from aicsd_deploy.runtime.torch_backend import TorchBackend
from aicsd_deploy.tracking import RunLog
from aicsd_deploy.training import distributed
from aicsd_deploy.training.last import BEST, LAST, LastCheckpoints, is_whole
from aicsd_deploy.training.precision import autocast_dtype, avoid_wrong_gradients
from aicsd_deploy.training.resume import check_same_run
from aicsd_deploy.training.step import Loss, TrainStep
from aicsd_deploy.training.stopping import StopRequest
from aicsd_deploy.training.timing import WAITING, profiled
from aicsd_deploy.training.trouble import BrokenSteps, memory_explained
from aicsd_deploy.training.validation import evaluate_together


@dataclass
class Position:
    """How far a run has come: optimiser steps done, the step of the last validation, the best mIoU, bytes of the log."""

    step: int = 0
    validated: int = 0
    best: float | None = None
    log_bytes: int = 0


@dataclass
class Trainer:
    """Trains one network and keeps its best and its last states in a run folder.

    Nothing random is carried from step to step: the order, the augmentation and the dropout of a step depend on the seed and
    the step alone. So a run that is killed and resumed computes what an uninterrupted one does.
    """

    network: nn.Module
    loss: Loss
    config: TrainConfig
    metadata: Metadata
    train_data: SegmentationDataset
    val_data: SegmentationDataset
    out: Path
    device: torch.device
    identity: dict[str, Any]
    """What else makes it this run and no other, by name: a run is resumed only where all of it is the same."""
    stop: StopRequest = field(default_factory=StopRequest)

    def fit(self) -> None:
        """Train to the end, from the newest saved state if there is one.

        Raises:
            InputError: the saved state belongs to a run with other settings, or another process goes on with it now; or the
                batch cannot be shared out.
            AicsdError: the loss is no longer a number, the memory or the disk is full, or a worker died.
            Preempted: the run was asked to stop, and has saved its state.
        """
        self._per_epoch = steps_per_epoch(self.train_data, self.config.batch_size)
        self._total = self.config.epochs * self._per_epoch
        self._check_parts()
        self._prepare()
        if self._at.step >= self._total and self._at.validated == self._at.step:
            if self._main:
                self._last.clear_leftovers()
            say(f"{self.out}: already trained to the end ({self._total} steps).")
            return
        self._log: RunLog | None = None
        with ExitStack() as stack:
            stack.enter_context(self.stop.held())
            try:
                if self._main:
                    self._log = RunLog(self.out, keep_bytes=self._at.log_bytes, step=self._at.step)
                    stack.callback(self._log.close)
                    self._last.clear_leftovers()
                self._loop()
            except Preempted as reason:
                self._save()
                raise type(reason)(
                    f"{reason} at step {self._at.step} of {self._total}, which {self.out / LAST} holds. "
                    "The same command goes on; a single training needs --resume auto for it."
                ) from None
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                kept = f"Its {LAST} is whole. " if (self.out / LAST).exists() else ""
                raise AicsdError(
                    f"{self.out} cannot be written to: {error.strerror}. {kept}Make room, then go on with --resume auto."
                ) from error
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise AicsdError(
                    f"A process of --workers died ({first_line(error)}). Usually memory or /dev/shm, where batches are "
                    "handed over, is too small: use fewer --workers or a smaller --cache, or give a container more shared "
                    "memory (docker run --shm-size 16g); then go on with --resume auto."
                ) from error

    def _check_parts(self) -> None:
        """Raise InputError unless a step's batch can be cut into equal parts."""
        size, parts = self.config.batch_size, self.config.accumulate * distributed.world_size()
        if size % parts or size // parts < 2:
            raise InputError(
                f"--batch-size {size}, the images of a step, cannot be cut into {parts} parts ({distributed.world_size()} "
                f"processes, --accumulate {self.config.accumulate}) of 2 or more. Give a multiple of {parts}, at least {2 * parts}."
            )

    def _prepare(self) -> None:
        config, device = self.config, self.device
        self._main = distributed.is_main()
        self.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.sync_bn:
            distributed.sync_batch_norm(self.network, device)
        autocast = autocast_dtype(config.precision, device)
        avoid_wrong_gradients(self.network, autocast, device)
        self._step = TrainStep(self.network, self.loss, config, device, autocast=autocast)
        self._last = LastCheckpoints(self.out, keep=config.keep)
        self._resume()
        if config.checkpoint_activations:
            checkpoint_activations(self.network)
        self.loss.student = distributed.parallel(self.loss.student, device)
        if config.compile:
            self.loss.student.compile()
        torch.backends.cudnn.benchmark = True  # all batches have one size
        self._broken = BrokenSteps(config, self.out, self._batches)

    def _loop(self) -> None:
        config, at, clock = self.config, self._at, self._step.clock
        if self._validation_is_due():  # of a run that was stopped in it
            self._validate()
            self._save()
        note = ""
        share = (distributed.rank(), distributed.world_size())
        batches = self._batches(at.step, self._total, workers=config.workers, share=share)
        trace = self.out / "profile.json" if config.profile and self._main else None
        self.network.train()
        clock.restart()
        bar = progress(f"training {self.metadata.model}", self._total, done=at.step)
        with closing(batches), bar as advance, profiled(trace, steps=self._total - at.step) as profile:
            for batch in clock.waiting_for(batches):
                logs = at.step % config.log_every == 0 or at.step == self._total - 1
                values = self._take(batch, logs=logs)
                at.step += 1
                due, saves = self._validation_is_due(), at.step % config.save_every == 0
                if logs or due or saves or self.device.type == "cpu":  # elsewhere nothing is asked of the GPU
                    broken = self._broken.report(self._step.guard.broken_steps(), self._log)
                    if logs and at.step - 1 not in broken:
                        self._write_line(values)
                    self._stop_if_asked()
                elif distributed.world_size() == 1:
                    self.stop.raise_if_received()
                if due:
                    if at.validated == 0:  # a run that is killed now must not have a best.pt alone
                        self._save()
                    self._validate()
                    note = f"epoch {at.step // self._per_epoch}/{config.epochs}, best val mIoU {percent(at.best)}"
                    self._save()
                    clock.restart()
                elif saves:
                    self._save()
                profile()
                advance(note)

    def _batches(
        self, start: int, end: int, *, workers: int = 0, share: tuple[int, int] = (0, 1)
    ) -> Generator[Batch, None, None]:
        """Return the batches of steps `start` to `end - 1`; a share of each, or the whole."""
        config = self.config
        return training_batches(
            self.train_data,
            Augmentation(
                self.metadata.image_size_hw,
                config.scale,
                config.flip,
                config.color_jitter,
                config.crop_size,
                config.keep_aspect,
                self.loss.picture_scale,
            ),
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start,
            total_steps=end,
            workers=workers,
            device=self.device,
            share=share,
        )

    def _take(self, batch: Batch, *, logs: bool) -> dict[str, Any]:
        with memory_explained(self.loss, batch, self.config):
            return self._step(
                batch, step=self._at.step, total=self._total, logs=logs, stop=self.stop.received is not None
            )

    def _write_line(self, values: dict[str, Any]) -> None:
        at, config = self._at, self.config
        timing = self._step.clock.read(batch_size=config.batch_size, steps_left=self._total - at.step)
        if self._log is None:
            return
        self._log.write(at.step, epoch=at.step / self._per_epoch, **values, **timing)
        data_share = timing["speed"]["data_share"]
        if self.device.type == "cuda" and data_share > WAITING and at.step > config.log_every:
            say(
                f"warning: at step {at.step} the GPU waited for data {100 * data_share:.0f} % of the time. "
                f"More --workers (now {config.workers}) or a larger --cache (now {config.cache:g} GiB) would make it faster."
            )

    def _stop_if_asked(self) -> None:
        """Raise Preempted, in all processes at the same step, where any of them was asked to stop."""
        if distributed.world_size() == 1 or self._step.stop_asked():
            self.stop.raise_if_received()
            if distributed.world_size() > 1:
                raise Preempted("stopped by a signal to another process")

    def _validation_is_due(self) -> bool:
        epoch, rest = divmod(self._at.step, self._per_epoch)
        due = rest == 0 and (epoch % self.config.val_every == 0 or self._at.step == self._total)
        return due and self._at.validated < self._at.step

    def _validate(self) -> None:
        at, epoch = self._at, self._at.step // self._per_epoch
        network = self._step.validated_network
        distributed.share_buffers(network)
        backend = TorchBackend(network, self.metadata, device=self.device)
        with self.stop.released():
            matrix = evaluate_together(backend, self.val_data, title="validating")
        self.network.train()
        scores = matrix.scores(self.metadata.class_names)
        at.validated = at.step
        if self._log is not None:
            val = scores.to_dict()
            del val["label_pixels"]  # they never change, and summary.json has them
            self._log.write(at.step, epoch=epoch, val=val)
        if at.best is not None and scores.miou <= at.best:
            return
        at.best = scores.miou
        metadata = self.metadata.replace(
            scores={"miou": scores.miou, "pixel_accuracy": scores.pixel_accuracy, "epoch": float(epoch)}
        )
        if self._main:
            save_checkpoint(self.out / BEST, Checkpoint(metadata, network.state_dict()))

    def _save(self) -> None:
        if self._log is None:
            return
        self._broken.report(self._step.guard.broken_steps(), self._log)
        self._at.log_bytes = self._log.written_bytes()
        training = {
            **vars(self._at),
            **self._step.state_dict(),
            "config": self.config.model_dump(mode="json"),
            "identity": self.identity,
        }
        self._last.save(Checkpoint(self.metadata, self.network.state_dict(), training))

    def _resume(self) -> None:
        checkpoint = distributed.from_main(self._last.load() if self._main else None)
        self._at = Position()
        if checkpoint is None:
            return
        state = checkpoint.training
        ours = self.config.model_dump(mode="json") | self.identity
        defaults = type(self.config)().model_dump(mode="json")
        check_same_run(ours, state["config"] | state["identity"], folder=self.out, defaults=defaults)
        self.network.load_state_dict(checkpoint.model)
        self._step.load_state_dict(state)
        self._at = Position(**{name: state[name] for name in vars(self._at)})
        say(f"{self.out}: going on from step {self._at.step}.")
        if self._at.best is not None and distributed.from_main(self._main and not is_whole(self.out / BEST)):
            say(f"warning: {self.out / BEST} is gone or damaged; the next validation makes it anew.")
            self._at.best, self._at.validated = None, 0
