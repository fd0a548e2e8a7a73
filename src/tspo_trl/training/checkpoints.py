"""Exact resume: a run that was killed and resumed equals a run without interruption, bit for bit."""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list, send_to_device
from transformers.trainer_utils import TrainOutput

from ..support.devices import get_rng_state, set_rng_state
from ..support.files import replace_file
from .weights import load_renamed

logger = logging.getLogger(__name__)
_COMPLETE = "complete.json"  # written last, after every process has written its files
_RENAMED = (
    "%s holds weights under the names of the published model. All of them were loaded, also those reported as missing."
)
# The position in the data depends on these options
_DATA_POSITION_OPTIONS = (
    "world_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_generations",
    "num_iterations",
)


def last_checkpoint(output_dir: str | Path) -> str:
    """
    Find the last complete checkpoint of a run: the one that was saved last, whatever its number. A checkpoint that was
    being written or deleted when the run was killed is skipped.

    Args:
        output_dir (`str` or `Path`):
            Output folder of the run.

    Returns:
        `str`: Path of the checkpoint.

    Raises:
        `ValueError`: If the run has no complete checkpoint.
    """
    found = sorted(_checkpoints(Path(output_dir)), key=_step)
    complete = [path for path in found if _is_complete(path)]
    last = max(complete, key=lambda path: (_number(path), _step(path)), default=None)
    for path in found:
        if path not in complete and (last is None or _step(path) > _step(last)):
            logger.warning("%s is incomplete and is skipped.", path)
    if last is not None:
        return str(last)
    message = f"There is no complete checkpoint in {str(output_dir)!r} to resume from."
    if any((path / "trainer_state.json").is_file() and not _has_state(path) for path in found):
        message += (
            " Checkpoints with `save_only_model=True` cannot be resumed: start a new run with one as its `model`."
        )
    raise ValueError(message)


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, complete or not."""
    return [
        path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()
    ]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _read_mark(checkpoint: Path) -> dict[str, Any] | None:
    """The content of the mark of completeness. `None` without a mark, or with one that was lost in part."""
    try:
        mark = json.loads((checkpoint / _COMPLETE).read_text())
    except (OSError, ValueError):
        return None
    return mark if isinstance(mark, dict) else None


def _number(checkpoint: Path) -> int:
    """The number of the mark: a checkpoint that was saved later has a higher one."""
    return int((_read_mark(checkpoint) or {}).get("number", 0))


def _damage(checkpoint: Path, mark: dict[str, Any]) -> str | None:
    """A file of a marked checkpoint that is missing or truncated, as happens when a deletion or a copy is killed."""
    for name, size in mark.get("files", {}).items():
        try:
            if (checkpoint / name).stat().st_size < size:
                return f"{name!r} is truncated"
        except OSError:
            return f"{name!r} is missing"
    return None


def _is_complete(checkpoint: Path) -> bool:
    mark = _read_mark(checkpoint)
    return mark is not None and _damage(checkpoint, mark) is None


def _has_state(checkpoint: Path) -> bool:
    """Whether a checkpoint holds the states of the optimizer, the scheduler and the random generators."""
    deepspeed = any(checkpoint.glob("global_step*"))  # holds the optimizer, and maybe the scheduler
    trained = deepspeed or (any(checkpoint.glob("optimizer*")) and (checkpoint / "scheduler.pt").is_file())
    return trained and any(checkpoint.glob("rng_state*.pth"))


def _write_mark(checkpoint: Path, options: dict[str, Any]) -> None:
    """Mark a checkpoint as complete. The mark lists the files, so that no deletion leaves a checkpoint that counts."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and not path.name.startswith(f".{_COMPLETE}"):
            with path.open("rb") as file:  # network file systems update the size of a file when it is opened
                files[path.relative_to(checkpoint).as_posix()] = os.fstat(file.fileno()).st_size
    number = 1 + max(map(_number, _checkpoints(checkpoint.parent)), default=0)
    replace_file(checkpoint / _COMPLETE, json.dumps({**options, "number": number, "files": files}))


@contextmanager
def _without_rotation() -> Iterator[None]:
    """Disable deletion by transformers, which would delete before the new checkpoint is complete, and in any order."""
    module = transformers.trainer
    rotate = module.rotate_checkpoints
    module.rotate_checkpoints = lambda *args, **kwargs: None
    try:
        yield
    finally:
        module.rotate_checkpoints = rotate


def _rotate(newest: Path, limit: int | None, best: str | None, only_models: bool) -> None:
    """
    Delete checkpoints until `limit` are left: incomplete ones first, then those of earlier runs, which may have a higher
    step, then the oldest. The newest and the best one are never deleted, and times of modification are not used.
    """
    if limit is None or limit <= 0:
        return

    def age(path: Path) -> tuple[Any, ...]:
        complete = () if only_models else (_is_complete(path), _number(path))
        return (*complete, _step(path) <= _step(newest), _step(path))

    protected = {newest.absolute(), Path(best or newest).absolute()}
    found = [path for path in _checkpoints(newest.parent) if not path.is_symlink()]
    old = sorted((path for path in found if path.absolute() not in protected), key=age)
    for path in old[: max(0, len(found) - limit)]:
        try:
            (path / _COMPLETE).unlink(missing_ok=True)  # first: a checkpoint that is being deleted is incomplete
        except OSError as error:
            logger.warning("%s cannot be deleted: %s", path, error)
        else:
            shutil.rmtree(path, ignore_errors=True)


class ExactResumeMixin:
    """
    Exact resume for a [`~trl.GRPOTrainer`]: a resumed run equals a run without interruption.

    The changes with respect to the checkpoints of [`~trl.GRPOTrainer`] are:

    - Rollouts that later steps use (with `steps_per_generation` or `num_iterations`) are saved and restored.
    - Rollouts logged after the checkpoint are removed from the log.
    - Adapters keep their data type.
    - Incomplete checkpoints are skipped, and a checkpoint saved with another batch size is refused.
    - A checkpoint is complete before an older one is deleted, and incomplete as soon as its deletion begins.
    - Checkpoints saved with `save_only_model=True` are not marked as complete, and resuming from one is refused.
    - A finished run is not trained further.
    """

    args: Any
    state: Any
    accelerator: Any
    model: Any
    _step: int
    _buffered_inputs: Any
    _saved_step: int | None = None  # the step of the last checkpoint, saved or resumed from, if it is complete

    def _growing_files(self) -> list[Path]:
        """Files of this process that each step appends to."""
        return []

    def _resumed_state(self) -> dict[str, Any]:
        """What else later steps of this process depend on, as plain data."""
        return {}

    def _resume_state(self, state: dict[str, Any]) -> None:
        """Restore what `_resumed_state` returned. Empty for a checkpoint of an older version."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train, see [`~transformers.Trainer.train`].

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Path of a checkpoint, or `True` for the last complete checkpoint in `output_dir`.

        Raises:
            `ValueError`: If there is no complete checkpoint, or the checkpoint is incomplete, holds only the model, or was
                saved with another batch size.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        self._saved_step = None
        if resume_from_checkpoint:
            self._check_options(Path(resume_from_checkpoint))
            checkpoint = Path(resume_from_checkpoint).resolve()
            if checkpoint in _checkpoints(Path(self.args.output_dir).resolve()) and _is_complete(checkpoint):
                self._saved_step = _step(checkpoint)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        except _Finished:
            self.callback_handler.on_train_end(self.args, self.state, self.control)  # type: ignore[attr-defined]
            return TrainOutput(self.state.global_step, 0.0, {})

    def _check_options(self, checkpoint: Path) -> None:
        if not checkpoint.is_dir():
            return  # transformers reports it
        mark = _read_mark(checkpoint)
        if mark is None and not _has_state(checkpoint):
            raise ValueError(
                f"The checkpoint {str(checkpoint)!r} cannot be resumed: it lacks the state of the optimizer, the scheduler "
                "or the random generators. It was saved with `save_only_model=True`, or its saving or deletion was "
                "interrupted. Start a new run with the checkpoint as its `model`."
            )
        if mark is None:
            logger.warning("%s is not marked as complete: the resumed run may differ.", checkpoint)
            return
        if damage := _damage(checkpoint, mark):
            raise ValueError(
                f"The checkpoint {str(checkpoint)!r} is incomplete: {damage}. Resume from another checkpoint."
            )
        for name in _DATA_POSITION_OPTIONS:
            if (found := getattr(self.args, name)) != (saved := mark.get(name, found)):
                raise ValueError(
                    f"The checkpoint {str(checkpoint)!r} was saved with `{name}` = {saved}, this run has {found}: it "
                    "cannot continue with the same data. Set it back, or start a new run with the checkpoint as its `model`."
                )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        args, step = self.args, self.state.global_step
        folder = Path(self._get_output_dir(trial=trial))  # type: ignore[attr-defined]
        checkpoint = folder / f"checkpoint-{step}"
        if self._saved_step == step and self._is_only_complete(checkpoint):
            return  # nothing was trained since, and a kill while it is written again would leave no complete checkpoint
        if args.should_save:
            (checkpoint / _COMPLETE).unlink(missing_ok=True)  # a checkpoint is incomplete while it is written again
            for file in checkpoint.glob("rng_state*.pth") if args.save_only_model else ():
                file.unlink()  # of an earlier run: the new model must not be resumed with its state
        self.accelerator.wait_for_everyone()
        with _without_rotation():
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()
        if args.should_save:
            if not args.save_only_model:  # a model alone cannot be resumed
                _write_mark(checkpoint, {name: getattr(args, name) for name in _DATA_POSITION_OPTIONS})
            _rotate(checkpoint, args.save_total_limit, self.state.best_model_checkpoint, args.save_only_model)
        self._saved_step = None if args.save_only_model else step

    def _is_only_complete(self, checkpoint: Path) -> bool:
        """Whether this is the only complete checkpoint of the run, as process 0 finds it."""
        complete = [path for path in _checkpoints(checkpoint.parent) if _is_complete(path)]
        return bool(broadcast_object_list([complete == [checkpoint]])[0])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        module = self.model if model is None else model
        dtypes = {name: param.dtype for name, param in module.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        for name, param in module.named_parameters():
            if param.dtype != dtypes.get(name, param.dtype):  # peft loads the adapters of TRL's QLoRA in float32
                param.data = param.data.to(dtypes[name])
        if not self.is_fsdp_enabled and load_renamed(module, resume_from_checkpoint):  # type: ignore[attr-defined]
            logger.warning(_RENAMED, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        best = self.state.best_model_checkpoint
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled) and load_renamed(self.model, best):  # type: ignore[attr-defined]
            logger.warning(_RENAMED, best)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        sizes = {file.name: file.stat().st_size for file in self._growing_files() if file.is_file()}
        # transformers saves neither the generators of all kinds of devices, nor those of all devices of a process
        random = get_rng_state(self.accelerator.device)
        progress = {"rollouts": self._buffered_inputs, "sizes": sizes, "random": random}
        progress["state"] = self._resumed_state()
        torch.save(progress, self._progress_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        if self._progress_file(checkpoint).is_file():
            progress = torch.load(self._progress_file(checkpoint), weights_only=True, map_location="cpu")
            if "random" in progress:
                set_rng_state(self.accelerator.device, progress["random"])
            # TRL would start at 0, and generate new rollouts instead of using the remaining ones
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
            self._buffered_inputs = send_to_device(progress["rollouts"], self.accelerator.device)
            self._resume_state(progress.get("state", {}))
            same_run = Path(checkpoint).resolve().parent == Path(self.args.output_dir).resolve()
            for file in self._growing_files() if same_run else ():
                size = progress["sizes"].get(file.name)
                if size is None:  # created after the checkpoint
                    file.unlink(missing_ok=True)
                elif file.is_file():
                    os.truncate(file, min(file.stat().st_size, size))
        if self.state.global_step >= self.state.max_steps:
            raise _Finished  # otherwise transformers would train one more step

    def _progress_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"progress_{self.accelerator.process_index}.pt"


class _Finished(Exception):
    pass
