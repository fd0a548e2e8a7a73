"""Checkpoints that lose nothing: a run that was killed goes on as if it had not been, and a run can be stopped in time."""

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
_COMPLETE = "complete.json"  # written last, when every process has written its part
# On these the position in the data depends
_SIZES = (
    "world_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_generations",
    "num_iterations",
)


def last_checkpoint(output_dir: str | Path) -> str:
    """
    The last complete checkpoint of a run. One that was being written when the run was killed is passed over.

    Args:
        output_dir (`str` or `Path`):
            The folder of the run.

    Returns:
        `str`: Its path.

    Raises:
        `ValueError`: If there is none.
    """
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for path in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        if (path / _COMPLETE).is_file():
            return str(path)
        logger.warning("%s is incomplete and passed over.", path)
    raise ValueError(f"There is no complete checkpoint in {str(output_dir)!r} to resume from.")


def get_rng_state(device: torch.device) -> list[torch.Tensor]:
    """The states that sampling uses: of the CPU, and of the devices."""
    return [
        torch.get_rng_state(),
        *([] if device.type == "cpu" else torch.get_device_module(device).get_rng_state_all()),
    ]


def set_rng_state(device: torch.device, states: list[torch.Tensor]) -> None:
    """Go back to the states of [`get_rng_state`]."""
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.get_device_module(device).set_rng_state_all(states[1:])


class ExactResumeMixin:
    """
    For a [`~trl.GRPOTrainer`]: a resumed run equals one that was not interrupted.

    The only changes with respect to its checkpoints are that rollouts which are left (with `steps_per_generation` or
    `num_iterations` they serve several steps) are kept and used, that what was logged after the checkpoint is taken back,
    that adapters keep their data type, that incomplete checkpoints are passed over, that a checkpoint of another batch
    size is refused, and that a finished run is not trained any further.
    """

    args: Any
    state: Any
    accelerator: Any
    model: Any
    _step: int
    _buffered_inputs: Any

    def _growing_files(self) -> list[Path]:
        """Files of this process that grow with the steps."""
        return []

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train, see [`~transformers.Trainer.train`].

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint, or `True` for the last complete one in `output_dir`.

        Raises:
            `ValueError`: If there is no complete checkpoint, or it is of another batch size.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            self._check_sizes(Path(resume_from_checkpoint))
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        except _Finished:
            self.callback_handler.on_train_end(self.args, self.state, self.control)  # type: ignore[attr-defined]
            return TrainOutput(self.state.global_step, 0.0, {})

    def _check_sizes(self, checkpoint: Path) -> None:
        file = checkpoint / _COMPLETE
        for name, saved in json.loads(file.read_text()).items() if file.is_file() else ():
            if (found := getattr(self.args, name)) != saved:
                raise ValueError(
                    f"The checkpoint {str(checkpoint)!r} was saved with `{name}` = {saved}, this run has {found}: it could "
                    "not go on with the same data. Set it back, or start a new run with the checkpoint as its `model`."
                )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial))  # type: ignore[attr-defined]
        file = folder / f"checkpoint-{self.state.global_step}" / _COMPLETE
        if self.accelerator.is_main_process:
            file.unlink(missing_ok=True)  # one that is written again is incomplete meanwhile
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            replace_file(file, json.dumps({name: getattr(self.args, name) for name in _SIZES}))

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
            kept = torch.load(self._progress_file(checkpoint), weights_only=True, map_location="cpu")
            # TRL begins at 0, where it generates, and forgets the rollouts that were left
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
            self._buffered_inputs = send_to_device(kept["rollouts"], self.accelerator.device)
            same_run = Path(checkpoint).resolve().parent == Path(self.args.output_dir).resolve()
            for file in self._growing_files() if same_run else ():
                size = kept["sizes"].get(file.name)
                if size is None:  # begun after the checkpoint
                    file.unlink(missing_ok=True)
                elif file.is_file():
                    os.truncate(file, min(file.stat().st_size, size))
        if self.state.global_step >= self.state.max_steps:
            raise _Finished  # transformers would train one more step

    def _progress_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"progress_{self.accelerator.process_index}.pt"


class _Finished(Exception):
    pass
