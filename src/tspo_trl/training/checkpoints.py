"""Exact resume: a run that was killed and resumed equals a run without interruption, bit for bit."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers.trainer_utils import TrainOutput

from ..support.files import replace_file

logger = logging.getLogger(__name__)
_COMPLETE = "complete.json"  # written last, after every process has written its files
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
    Find the last complete checkpoint of a run. A checkpoint that was being written when the run was killed is skipped.

    Args:
        output_dir (`str` or `Path`):
            Output folder of the run.

    Returns:
        `str`: Path of the checkpoint.

    Raises:
        `ValueError`: If the run has no complete checkpoint.
    """
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for path in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        if (path / _COMPLETE).is_file():
            return str(path)
        logger.warning("%s is incomplete and is skipped.", path)
    raise ValueError(f"There is no complete checkpoint in {str(output_dir)!r} to resume from.")


def get_rng_state(device: torch.device) -> list[torch.Tensor]:
    """The states of the random generators that sampling uses: of the CPU, and of the devices."""
    return [
        torch.get_rng_state(),
        *([] if device.type == "cpu" else torch.get_device_module(device).get_rng_state_all()),
    ]


def set_rng_state(device: torch.device, states: list[torch.Tensor]) -> None:
    """Restore the states returned by [`get_rng_state`]."""
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.get_device_module(device).set_rng_state_all(states[1:])


class ExactResumeMixin:
    """
    Exact resume for a [`~trl.GRPOTrainer`]: a resumed run equals a run without interruption.

    The changes with respect to the checkpoints of [`~trl.GRPOTrainer`] are:

    - Rollouts that later steps use (with `steps_per_generation` or `num_iterations`) are saved and restored.
    - Rollouts logged after the checkpoint are removed from the log.
    - Adapters keep their data type.
    - Incomplete checkpoints are skipped, and a checkpoint saved with another batch size is refused.
    - A finished run is not trained further.
    """

    args: Any
    state: Any
    accelerator: Any
    model: Any
    _step: int
    _buffered_inputs: Any

    def _growing_files(self) -> list[Path]:
        """Files of this process that each step appends to."""
        return []

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train, see [`~transformers.Trainer.train`].

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Path of a checkpoint, or `True` for the last complete checkpoint in `output_dir`.

        Raises:
            `ValueError`: If there is no complete checkpoint, or it was saved with another batch size.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            self._check_options(Path(resume_from_checkpoint))
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        except _Finished:
            self.callback_handler.on_train_end(self.args, self.state, self.control)  # type: ignore[attr-defined]
            return TrainOutput(self.state.global_step, 0.0, {})

    def _check_options(self, checkpoint: Path) -> None:
        file = checkpoint / _COMPLETE
        for name, saved in json.loads(file.read_text()).items() if file.is_file() else ():
            if (found := getattr(self.args, name)) != saved:
                raise ValueError(
                    f"The checkpoint {str(checkpoint)!r} was saved with `{name}` = {saved}, this run has {found}: it "
                    "cannot continue with the same data. Set it back, or start a new run with the checkpoint as its `model`."
                )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial))  # type: ignore[attr-defined]
        file = folder / f"checkpoint-{self.state.global_step}" / _COMPLETE
        if self.accelerator.is_main_process:
            file.unlink(missing_ok=True)  # a checkpoint is incomplete while it is written again
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            replace_file(file, json.dumps({name: getattr(self.args, name) for name in _DATA_POSITION_OPTIONS}))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        module = self.model if model is None else model
        dtypes = {name: param.dtype for name, param in module.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        for name, param in module.named_parameters():
            if param.dtype != dtypes.get(name, param.dtype):  # peft loads the adapters of TRL's QLoRA in float32
                param.data = param.data.to(dtypes[name])

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        sizes = {file.name: file.stat().st_size for file in self._growing_files() if file.is_file()}
        torch.save({"rollouts": self._buffered_inputs, "sizes": sizes}, self._progress_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        if self._progress_file(checkpoint).is_file():
            progress = torch.load(self._progress_file(checkpoint), weights_only=True, map_location="cpu")
            # TRL would start at 0, and generate new rollouts instead of using the remaining ones
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
            self._buffered_inputs = send_to_device(progress["rollouts"], self.accelerator.device)
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
