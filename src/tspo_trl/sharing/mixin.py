"""Saving and pushing by the trainer: `search_config.json` beside the weights, the model card, and push errors."""

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel
from trl.trainer.utils import get_config_model_id

from ..retrieval import CachedRetriever, LoggedRetriever
from ..rollout.search_config import SearchConfig
from .model_card import extend_model_card
from .training_facts import TrainingFacts

logger = logging.getLogger(__name__)


class SharingMixin:
    """
    Extends a [`~trl.GRPOTrainer`], so that saved and pushed models can be used as search agents.

    It changes saving and pushing as follows: `search_config.json` is written beside the weights, the model card describes
    the search agent, rollouts are not pushed to the Hub, and a failed push loses nothing and is reported.
    """

    args: Any
    state: Any
    accelerator: Any
    model: Any
    train_dataset: Any
    eval_dataset: Any
    is_in_train: bool
    hub_model_id: Any
    search_config: SearchConfig
    rollout_func: Any

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the model, its tokenizer and `search_config.json`, see [`~transformers.Trainer.save_model`].

        Args:
            output_dir (`str`, *optional*):
                The folder. Defaults to `output_dir` of the configuration.
        """
        if self.args.should_save:
            run = Path(self.args.output_dir)
            # Also save to the folder of the run: at a checkpoint, transformers pushes that folder
            for folder in {Path(output_dir or run), run}:
                folder.mkdir(parents=True, exist_ok=True)
                self.search_config.save(folder)
            beside = (self.args.retrieval_log, self.args.retrieval_cache_dir)
            keep_from_hub(run, [run / "trajectories", *(path for path in beside if path is not None)])
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Save the model and push the folder of the run, see [`~transformers.Trainer.push_to_hub`]. The model is saved even if
        the push fails.

        Raises:
            `RuntimeError`: If the push fails; the message says where the model is saved, and how to push it again.
        """
        options = {} if private is None else {"private": private}  # older versions of transformers do not have it
        try:
            if self.hub_model_id is None:
                self.init_hf_repo(token=token, **options)  # type: ignore[attr-defined]
        except Exception as error:  # transformers has not saved anything yet
            self.save_model(_internal_call=True)
            name = kwargs.get("model_name") or Path(self.args.output_dir).resolve().name
            self.create_model_card(name, kwargs.get("dataset_name"), kwargs.get("tags"))
            raise self._push_error(error) from error
        try:
            return super().push_to_hub(commit_message, blocking, token, revision, **options, **kwargs)  # type: ignore[misc]
        except Exception as error:
            raise self._push_error(error) from error

    def _push_error(self, error: Exception) -> RuntimeError:
        folder, repository = str(self.args.output_dir), self.hub_model_id or self.args.hub_model_id or "<user>/<name>"
        return RuntimeError(
            f"The model is saved in {folder!r}, but pushing it to the Hub failed: {error}\nTo try again, call "
            f"`trainer.push_to_hub()`, or run `hf upload {repository} {folder} . --exclude 'checkpoint-*'`."
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        earlier = self._push_jobs()
        super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]
        for job in self._push_jobs():
            if job not in earlier:
                job.add_done_callback(_warn_of_failure)  # transformers does not report a failure

    def _push_jobs(self) -> list[Any]:
        return list(getattr(getattr(self, "push_in_progress", None), "jobs", []))

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """
        Write the model card `README.md`, see [`~transformers.Trainer.create_model_card`].

        Args:
            model_name (`str`, *optional*):
                The name of the model.
            dataset_name (`str` or `list[str]`, *optional*):
                One or several names of the training data, on the Hub or elsewhere.
            tags (`str` or `list[str]`, *optional*):
                Additional tags.
        """
        if not self.accelerator.is_main_process:
            return
        names = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name or [])
        # The metadata may contain only names on the Hub, and TRL supports only one: they are added below
        super().create_model_card(model_name=model_name, dataset_name=None, tags=tags)  # type: ignore[misc]
        file = Path(self.args.output_dir) / "README.md"
        try:
            card = ModelCard.load(file)
            extend_model_card(card, self._facts_to_share(names))
            card.save(file)
        except Exception:  # data and retrievers can be of any kind, and an error here must not end the run
            logger.warning(
                "The model card %s is that of TRL, without the sections that this library adds.", file, exc_info=True
            )

    def _facts_to_share(self, dataset_names: list[str]) -> TrainingFacts:
        args, state = self.args, self.state
        model = self.accelerator.unwrap_model(self.model)
        adapter = model.active_peft_config if isinstance(model, PeftModel) else None
        retriever = self.rollout_func.search_loop.retriever
        while isinstance(retriever, (CachedRetriever, LoggedRetriever)) and retriever.retriever is not None:
            retriever = retriever.retriever
        best_step = state.best_global_step if args.load_best_model_at_end and not self.is_in_train else None
        processes = f"{args.world_size} processes ({self.accelerator.distributed_type.value})"
        return TrainingFacts(
            model=self.hub_model_id or args.hub_model_id or Path(args.output_dir).resolve().name,
            base_model=get_config_model_id(model.config) if adapter is None else adapter.base_model_name_or_path,
            adapter=adapter,
            args=args,
            search_config=self.search_config,
            retriever=retriever,
            train_dataset=self.train_dataset,
            eval_dataset=self.eval_dataset,
            dataset_names=dataset_names,
            log_history=state.log_history,
            step=best_step or state.global_step,
            processes="one process" if args.world_size == 1 else processes,
        )


def _warn_of_failure(job: "Future[Any]") -> None:
    if not job.cancelled() and (error := job.exception()) is not None:
        logger.warning("A checkpoint could not be pushed to the Hub. It is saved, and training continues. %s", error)


def keep_from_hub(run: str | Path, folders: Sequence[str | Path]) -> None:
    """
    Write a `.gitignore` in the folder of a run, so that some files are not pushed to the Hub: rollouts are large, and
    contain questions and passages that may be private; `training_args.bin` is a pickle of all options, including paths and
    `hub_token`, and is not needed. An existing `.gitignore` is not changed.

    Args:
        run (`str` or `Path`):
            The folder of the run.
        folders (`Sequence[str | Path]`):
            The folders to exclude. Folders outside the folder of the run are skipped.
    """
    root = Path(run).resolve()
    paths = [Path(folder).resolve() for folder in folders]
    lines = [f"/{path.relative_to(root).as_posix()}/" for path in paths if path.is_relative_to(root) and path != root]
    file = root / ".gitignore"
    if not file.exists():
        file.write_text(
            "\n".join(["# Not pushed to the Hub. Remove a line to publish it.", "training_args.bin", *lines]) + "\n"
        )
