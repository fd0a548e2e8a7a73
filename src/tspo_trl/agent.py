"""Inference with a trained model: an agent that answers questions by searching."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from .engines.endpoint import EndpointEngine
from .engines.sampling import sampling_by
from .engines.static import TransformersEngine
from .retrieval.base import Retriever
from .retrieval.results import check_retriever, is_number
from .rollout.limits import SearchLimits
from .rollout.loop import SearchLoop
from .rollout.protocol import SearchProtocol
from .rollout.protocols import make_protocol
from .rollout.search_config import SEARCH_CONFIG_NAME, SearchConfig
from .rollout.trajectory import Trajectory
from .sharing.load import ModelPlace, load_model, load_search_config
from .support.devices import check_device, check_dtype
from .support.http import check_url
from .support.paths import check_model_path, check_place

Prompt = str | list[dict[str, str]]


class SearchAgent:
    """
    Answers questions by searching, as the model was trained to do.

    Args:
        search_loop ([`SearchLoop`]):
            The search loop, with the model, the retriever and the protocol. [`SearchAgent.from_pretrained`] creates it
            from a saved model.
        config ([`SearchConfig`], *optional*):
            The settings of the search loop.
        batch_size (`int`, *optional*, defaults to `32`):
            Maximum number of questions that are rolled out together. Memory use grows with it, but not with the number
            of questions.

    Example:

    ```python
    >>> from tspo_trl import BM25Retriever, SearchAgent

    >>> agent = SearchAgent.from_pretrained("my-search-agent", retriever=BM25Retriever.from_jsonl("corpus.jsonl"))
    >>> trajectory = agent("Who wrote Emma?")
    >>> trajectory.answer
    'Jane Austen'
    >>> trajectory.queries
    ['Emma author', '']
    ```
    """

    def __init__(self, search_loop: SearchLoop, *, config: SearchConfig | None = None, batch_size: int = 32):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.search_loop = search_loop
        self.config = config
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        retriever: Retriever,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        batch_size: int = 32,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        base_model: str | Path | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        revision: str | None = None,
        subfolder: str = "",
        token: str | bool | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
        **search_settings: Any,
    ) -> "SearchAgent":
        """
        Load a model with its tokenizer and its `search_config.json`.

        Args:
            model (`str` or `Path`):
                The folder or the name on the Hub of a full model or a LoRA adapter. The base model of an adapter is
                loaded too. For a model without `search_config.json`, the defaults of [`SearchConfig`] apply.
            retriever ([`Retriever`]):
                Executes the searches, for instance a [`BM25Retriever`].
            do_sample (`bool`, *optional*, defaults to `False`):
                Whether to sample. Otherwise decoding is greedy. Of the model's own `generation_config.json`, only the
                end-of-sequence tokens are used, not the sampling settings.
            temperature (`float`, *optional*, defaults to `1.0`):
                Sampling temperature.
            top_p (`float`, *optional*, defaults to `1.0`):
                Sample from the smallest set of most probable tokens whose probabilities sum to at least this value.
            top_k (`int`, *optional*, defaults to `0`):
                Sample from this many most probable tokens. `0` means all tokens.
            batch_size (`int`, *optional*, defaults to `32`):
                Maximum number of questions that are rolled out together.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
                Data type of the weights. `"auto"` uses the data type of the saved weights.
            device (`str` or `torch.device`, *optional*):
                Device of the model. Defaults to the accelerator if there is one, else to the CPU.
            base_model (`str` or `Path`, *optional*):
                The base model of an adapter. Defaults to the base model named in its `adapter_config.json`.
            processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
                The tokenizer. Defaults to the tokenizer saved with the model, or to that of the base model if an
                adapter has none.
            revision (`str`, *optional*):
                Branch, tag or commit on the Hub.
            subfolder (`str`, *optional*, defaults to `""`):
                Subfolder of the repository, for instance `"last-checkpoint"`.
            token (`str` or `bool`, *optional*):
                Hub token, for private repositories.
            model_init_kwargs (`dict[str, Any]`, *optional*):
                Further arguments of [`~transformers.AutoModelForCausalLM.from_pretrained`], for instance
                `{"attn_implementation": "sdpa"}`. If it contains a `device_map`, `device` must be `None`.
            search_settings:
                Values of [`SearchConfig`] that override `search_config.json`, for instance `max_searches=2`.

        Raises:
            `ValueError`: If the base model of an adapter cannot be found, or a setting, `temperature`, `dtype` or `device`
                is wrong.
            `OSError`: If the model cannot be found.
        """
        if not isinstance(model, (str, Path)):
            raise TypeError(
                f"`model` must be a name or a path, got `{type(model).__name__}`. For a model in memory, use "
                "`SearchAgent.from_model`."
            )
        if device is not None and "device_map" in (model_init_kwargs or {}):
            raise ValueError(
                "`device` and the `device_map` of `model_init_kwargs` cannot both be set: set one of them."
            )
        # The retriever and the settings come first, so that a mistake in them is reported before the model is loaded
        check_retriever(retriever)
        _check_temperature(temperature)
        check_dtype(dtype)
        check_device(device)
        check_place(base_model, "`base_model`")
        if subfolder:
            check_place(model, "`model`")
        else:
            check_model_path(model)
        place = ModelPlace(str(model), revision=revision, subfolder=subfolder, token=token)
        config = load_search_config(place, search_settings)
        loaded, processing_class = load_model(
            place,
            processing_class=processing_class,
            base_model=base_model,
            device=device,
            model_init_kwargs={"dtype": dtype, **(model_init_kwargs or {})},
        )
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if do_sample else None
        return cls.from_model(
            loaded, processing_class, retriever=retriever, config=config, sampling=sampling, batch_size=batch_size
        )

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel | PeftModel,
        processing_class: PreTrainedTokenizerBase,
        *,
        retriever: Retriever,
        config: SearchConfig | None = None,
        sampling: dict[str, Any] | None = None,
        batch_size: int = 32,
    ) -> "SearchAgent":
        """
        Create an agent from a model in memory.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                A causal language model. It is in evaluation mode while it generates.
            processing_class ([`~transformers.PreTrainedTokenizerBase`]):
                Its tokenizer.
            retriever ([`Retriever`]):
                Executes the searches.
            config ([`SearchConfig`], *optional*):
                The settings of the search loop. Defaults to `SearchConfig()`.
            sampling (`dict[str, Any]`, *optional*):
                Sampling parameters of [`~transformers.GenerationConfig`], for instance `{"temperature": 0.7}`. By
                default, decoding is greedy.
            batch_size (`int`, *optional*, defaults to `32`):
                Maximum number of questions that are rolled out together.
        """
        check_retriever(retriever)
        config = config or SearchConfig()
        network: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        eos_token_ids = end_token_ids(processing_class, network.generation_config.eos_token_id)
        if not eos_token_ids:
            raise ValueError(
                "Neither the tokenizer nor the model has an end-of-sequence token. Set `tokenizer.eos_token`."
            )
        pad = processing_class.pad_token_id
        generation_config = GenerationConfig(
            eos_token_id=eos_token_ids,
            pad_token_id=eos_token_ids[0] if pad is None else pad,
            do_sample=sampling is not None,
            disable_compile=True,
            **({"top_p": 1.0, "top_k": 0, **sampling} if sampling is not None else {}),
        )
        protocol = _protocol(config, processing_class, eos_token_ids)
        engine = TransformersEngine(
            lambda: _evaluating(model, generation_config), processing_class, generation_config, protocol.stop_strings
        )
        loop = SearchLoop(
            engine,
            retriever,
            protocol,
            eos_token_ids=eos_token_ids,
            limits=SearchLimits.of(config),
            max_context_length=getattr(network.config.get_text_config(), "max_position_embeddings", None),
        )
        return cls(loop, config=config, batch_size=batch_size)

    @classmethod
    def from_endpoint(
        cls,
        url: str,
        model: str,
        *,
        tokenizer: str | PreTrainedTokenizerBase,
        retriever: Retriever,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 256,
        max_requests: int = 32,
        api_key: str | None = None,
        **search_settings: Any,
    ) -> "SearchAgent":
        """
        Create an agent whose model runs on a server with an OpenAI-compatible completions API.

        Args:
            url (`str`):
                The address of the server, see [`EndpointEngine`].
            model (`str`):
                The name of the model on the server.
            tokenizer (`str` or [`~transformers.PreTrainedTokenizerBase`]):
                Its tokenizer: a folder, a name on the Hub, or a tokenizer object. If the folder or repository has a
                `search_config.json`, its settings apply. If it has a `generation_config.json`, its end-of-sequence tokens
                apply too: some chat templates end a tool call with another token than an answer.
            retriever ([`Retriever`]):
                Executes the searches.
            temperature (`float`, *optional*, defaults to `0.0`):
                Sampling temperature. `0` means greedy decoding.
            seed (`int`, *optional*, defaults to `0`):
                Seed of sampling.
            batch_size (`int`, *optional*, defaults to `256`):
                Maximum number of questions that are rolled out together.
            max_requests (`int`, *optional*, defaults to `32`):
                Maximum number of simultaneous requests.
            api_key (`str`, *optional*):
                Sent as a bearer token.
            search_settings:
                Values of [`SearchConfig`], for instance `max_searches=2`.

        Raises:
            [`~tspo_trl.engines.endpoint.EndpointError`]: If the server cannot be reached, does not have the model, or
                refuses completions.
            `OSError`: If the tokenizer cannot be found.
            `ValueError`: If the tokenizer has no end-of-sequence token, or if `url`, `temperature` or a setting is wrong.
        """
        check_retriever(retriever)
        _check_temperature(temperature)
        check_url(url)
        check_place(tokenizer, "`tokenizer`")
        config, generation_config = SearchConfig(), GenerationConfig()
        if isinstance(tokenizer, str):
            path = cached_file(tokenizer, SEARCH_CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
            config = config if path is None else SearchConfig.load(path)
            path = cached_file(tokenizer, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
            generation_config = (
                generation_config if path is None else GenerationConfig.from_pretrained(Path(path).parent)
            )
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        config = config.replace(**search_settings)
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no end-of-sequence token. Set its `eos_token`.")
        eos_token_ids = end_token_ids(tokenizer, generation_config.eos_token_id)
        protocol = _protocol(config, tokenizer, eos_token_ids)
        engine = EndpointEngine(
            url,
            model,
            tokenizer,
            stop_strings=protocol.stop_strings,
            eos_token_ids=eos_token_ids,
            temperature=temperature,
            seed=seed,
            max_requests=max_requests,
            api_key=api_key,
        )
        loop = SearchLoop(engine, retriever, protocol, eos_token_ids=eos_token_ids, limits=SearchLimits.of(config))
        return cls(loop, config=config, batch_size=batch_size)

    def __call__(self, question: str) -> Trajectory:
        """
        Answer one question.

        Args:
            question (`str`):
                The question.

        Returns:
            [`Trajectory`]: The turns, queries, passages and answer (`trajectory.answer`) of the rollout.

        Raises:
            `ValueError`: If `question` is not a text, and in the cases of [`~SearchAgent.rollout`].
        """
        if not isinstance(question, str):
            raise ValueError(
                f"`question` must be a text, got a {type(question).__name__}. For several questions, call "
                "`agent.rollout(questions)`."
            )
        return self.rollout([question])[0]

    def rollout(self, questions: Sequence[str]) -> list[Trajectory]:
        """
        Answer several questions. The protocol writes the prompts, as in training.

        Args:
            questions (`Sequence[str]`):
                N questions. Repeat a question to get several trajectories of it.

        Returns:
            `list[Trajectory]`: N trajectories in the order of the questions. A trajectory whose search failed has the
                status `"retrieval_failed"`.

        Raises:
            `ValueError`: If a question is not a text, is empty or is too long for the model, or if the model was
                trained on prompts that cannot be written from a question.
        """
        if isinstance(questions, str):
            raise ValueError(
                f"`questions` must be a list of texts, got a single text: {questions!r}. For one question, call "
                "`agent(question)`."
            )
        if self.config is not None and self.config.prompt_template is None:
            raise ValueError(
                f"This model was trained on the prompts of its data set ('prompt_template' in its {SEARCH_CONFIG_NAME} "
                "is null), so a prompt cannot be written from a question. Pass prompts to `rollout_prompts`, or set "
                "`prompt_template` to a text that contains '{question}'."
            )
        for index, question in enumerate(questions):
            if not isinstance(question, str) or not question.strip():
                raise ValueError(f"Question {index} must be a non-empty text, found {question!r}.")
            if not question.isascii() and any("\ud800" <= char <= "\udfff" for char in question):
                raise ValueError(
                    f"Question {index} must be valid Unicode, found a lone surrogate, half of a character: {question!r}."
                )
        return self.rollout_prompts([self.search_loop.protocol.prompt(question) for question in questions])

    def rollout_prompts(self, prompts: Sequence[Prompt]) -> list[Trajectory]:
        """
        Roll out given prompts without a template.

        Args:
            prompts (`Sequence[str]` or `Sequence[list[dict[str, str]]]`):
                N prompts: texts or conversations.

        Returns:
            `list[Trajectory]`: N trajectories in the order of the prompts.
        """
        if not prompts:
            return []
        prompt_ids = self.search_loop.protocol.encode_prompts(prompts)
        # Longest first, so that a batch that does not fit into memory fails at the start and not at the end
        order = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))
        trajectories: list[Any] = [None] * len(prompt_ids)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            rolled_out, _ = self.search_loop.run([prompt_ids[i] for i in batch])
            for i, trajectory in zip(batch, rolled_out, strict=True):
                trajectories[i] = trajectory
        return trajectories


def _check_temperature(temperature: Any) -> None:
    """Refuse a temperature that cannot be one, such as NaN."""
    if not (is_number(temperature) and 0 <= temperature < float("inf")):
        raise ValueError(f"`temperature` must be a number of at least 0, got {temperature!r}.")


def end_token_ids(tokenizer: PreTrainedTokenizerBase, eos: int | list[int] | None) -> list[int]:
    """
    The tokens that end a message of a model.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        eos (`int` or `list[int]`, *optional*):
            The `eos_token_id` of the generation configuration.

    Returns:
        `list[int]`: That of the tokenizer, and those of the generation configuration; possibly none.
    """
    eos_token_ids = [eos] if isinstance(eos, int) else list(eos or [])
    if tokenizer.eos_token_id not in (None, *eos_token_ids):
        eos_token_ids = [tokenizer.eos_token_id, *eos_token_ids]
    return eos_token_ids


def _protocol(config: SearchConfig, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int]) -> SearchProtocol:
    return make_protocol(
        config.protocol,
        tokenizer,
        config.max_searches,
        eos_token_ids=eos_token_ids,
        prompt_template=config.prompt_template,
        chat_template_kwargs=config.chat_template_kwargs,
    )


@contextmanager
def _evaluating(model: Any, generation_config: GenerationConfig) -> Iterator[Any]:
    """Evaluation mode, with `generation_config` in place of the model's own."""
    training = model.training
    model.eval()
    try:
        with sampling_by(model, generation_config):
            yield model
    finally:
        model.train(training)
