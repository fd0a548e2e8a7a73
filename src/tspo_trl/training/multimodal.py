"""The text part of multimodal models, which is all that a search loop uses."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from trl.trainer import grpo_trainer

from .config import TSPOConfig


def load_options(args: Any) -> dict[str, Any]:
    """
    The arguments of `from_pretrained` that say which version of a model is loaded.

    Args:
        args ([`TSPOConfig`] or [`~trl.SFTConfig`]):
            The configuration.
    """
    given: Any = args.model_init_kwargs or {}
    options = {"trust_remote_code": args.trust_remote_code}
    return options | {name: given[name] for name in ("revision", "trust_remote_code") if name in given}


def multimodal_config(model: Any, args: TSPOConfig) -> Any:
    """
    The configuration of a model that reads more than text.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The model.
        args ([`TSPOConfig`]):
            The configuration of the run.

    Returns:
        [`~transformers.PreTrainedConfig`] or `None`: `None` for a model of text, for one in memory, and for one without a
        configuration, which TRL reports.
    """
    if not isinstance(model, str):
        return None
    try:
        config = AutoConfig.from_pretrained(model, **load_options(args))
    except (OSError, ValueError):
        return None
    return None if config.get_text_config() is config else config


@contextmanager
def text_part(trainer: Any, model: Any, args: TSPOConfig) -> Iterator[None]:
    """
    A context in which TRL sets up the text part of a multimodal model. It loads the class of the text part if
    `transformers` has one that reads the checkpoint. vLLM needs the names of the whole model: there, and for other
    models, the whole is loaded, and the parts that never get a gradient are frozen. DDP would wait for them.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer, whose `model` TRL sets within the context.
        model (`str` or [`~transformers.PreTrainedModel`]):
            The model. Nothing changes if it is a model of text.
        args ([`TSPOConfig`]):
            The configuration of the run.
    """
    config = multimodal_config(model, args)
    load = grpo_trainer.create_model_from_path
    if config is not None and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not args.use_vllm:
        grpo_trainer.create_model_from_path = partial(load, architecture=AutoModelForCausalLM)  # type: ignore[arg-type]
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = load
    freeze_other_parts(trainer.model)


def freeze_other_parts(model: Any) -> None:
    """
    Freeze the parts of a multimodal model that text does not pass, such as its vision tower.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model. Nothing changes if it is a model of text.
    """
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    if network.config.get_text_config() is network.config:
        return
    parts = [network.get_decoder(), network.get_output_embeddings()]
    used = {id(parameter) for part in parts for parameter in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)
