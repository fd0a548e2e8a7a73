"""The warm start: supervised demonstrations that teach the format and the copying of names, followed by wrong ones.

Reinforcement learning needs a policy that writes well-formed actions, can copy a name from a passage, and is sometimes
correct. Stage one teaches this with correct demonstrations. Stage two repeats them with most queries and answers replaced
by other names. So the policy starts weak: most of its answers are wrong, and many are near misses.

The demonstrations use other worlds than training does, so the policy cannot memorise facts.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..engines.static import TransformersEngine
from ..retrieval import BM25Retriever, Retriever
from ..rollout.limits import SearchLimits
from ..rollout.loop import SearchLoop
from ..rollout.scripted import follow_scripts
from ..rollout.tags import TagProtocol
from ..rollout.trajectory import Trajectory
from ..scoring import exact_match
from .model import make_model
from .world import Question, World, make_world

#: Budgets of the search loop that fit the demo; the recipe's configuration has the same.
LIMITS = SearchLimits(max_searches=4, num_passages=2, max_turn_tokens=16, max_observation_tokens=64)


def demonstrate(
    tokenizer: PreTrainedTokenizerBase,
    retriever: Retriever,
    prompts: Sequence[str],
    scripts: Sequence[Sequence[str]],
    limits: SearchLimits = LIMITS,
) -> list[Trajectory]:
    """
    Roll out prepared turns with the real search loop and retriever.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer, for instance of [`make_tokenizer`].
        retriever ([`Retriever`]):
            Retriever that executes the searches.
        prompts (`Sequence[str]`):
            B prompts as plain text.
        scripts (`Sequence[Sequence[str]]`):
            The turns to write for each prompt.
        limits ([`SearchLimits`], *optional*):
            Limits of the search loop.

    Returns:
        `list[Trajectory]`: B trajectories.
    """
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    script_ids = [[tokenizer(turn)["input_ids"] for turn in script] for script in scripts]
    protocol, ends = TagProtocol(tokenizer), [tokenizer.eos_token_id]
    return follow_scripts(prompt_ids, script_ids, retriever, protocol, eos_token_ids=ends, limits=limits)


def demonstrate_world(
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    *,
    wrong_query: float = 0.0,
    wrong_answer: float = 0.0,
    seed: int = 0,
) -> list[Trajectory]:
    """
    Make demonstrations of all questions about a world.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The demo tokenizer.
        world ([`World`]):
            The world, with its questions and passages.
        wrong_query (`float`, *optional*, defaults to `0.0`):
            Probability that a query names another entity of the same kind.
        wrong_answer (`float`, *optional*, defaults to `0.0`):
            Probability that the answer is another name of the same kind.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the mistakes.

    Returns:
        `list[Trajectory]`: A trajectory for each question.
    """
    rng = random.Random(seed)
    kind_of = {name: kind for kind, names in world.names.items() for name in names}

    def maybe_other(name: str, probability: float) -> str:
        return rng.choice(world.names[kind_of[name]]) if rng.random() < probability else name

    questions = [*world.train_questions, *world.heldout_questions]
    scripts = [
        [f"<search> {maybe_other(query, wrong_query)}</search>" for query in question.queries]
        + [f"<answer> {maybe_other(question.answer, wrong_answer)}</answer>"]
        for question in questions
    ]
    return demonstrate(tokenizer, BM25Retriever(world.passages), [str(q.row()["prompt"]) for q in questions], scripts)


def supervise(
    model: PreTrainedModel,
    demonstrations: Sequence[Trajectory],
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
    until: Callable[[], bool] | None = None,
    check_every: int = 50,
    progress: str | None = None,
) -> int:
    """
    Fit a model to the turns of demonstrations by cross-entropy. Prompts and observations are read and not fitted.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model. It is changed in place.
        demonstrations (`Sequence[Trajectory]`):
            The demonstrations.
        steps (`int`):
            Maximum number of optimizer steps.
        batch_size (`int`, *optional*, defaults to `32`):
            Number of demonstrations in a step, of similar length.
        learning_rate (`float`, *optional*, defaults to `3e-3`):
            The learning rate of AdamW, after a linear warm-up over 50 steps.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order.
        until (`Callable[[], bool]`, *optional*):
            Called every `check_every` steps. Fitting ends when it returns `True`.
        check_every (`int`, *optional*, defaults to `50`):
            Number of steps between two calls of `until`.
        progress (`str`, *optional*):
            Label of the progress bar. There is none if `None`.

    Returns:
        `int`: Number of steps made.
    """
    rng = random.Random(seed)
    by_length = sorted(demonstrations, key=lambda t: len(t.prompt_ids) + len(t.completion_ids))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 50, 1.0))
    step = 0
    with tqdm(total=steps, desc=progress, disable=progress is None) as bar:
        while step < steps:
            start = rng.randrange(max(1, len(by_length) - 4 * batch_size))
            nearby = by_length[start : start + 4 * batch_size]
            model.train()
            _loss(model, rng.sample(nearby, min(batch_size, len(nearby)))).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            model.eval()
            step += 1
            bar.update()
            if until is not None and step % check_every == 0 and until():
                break
    return step


def _loss(model: PreTrainedModel, batch: Sequence[Trajectory]) -> torch.Tensor:
    """The cross-entropy of the tokens of turns. Rows are padded on the right, where causal attention ignores padding."""

    def padded(rows: list[list[int]]) -> torch.Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(model.device)

    input_ids = padded([t.prompt_ids + t.completion_ids for t in batch])
    fitted = padded([[0] * len(t.prompt_ids) + t.loss_mask for t in batch])[:, 1:] == 1
    hidden_states = model.base_model(input_ids=input_ids).last_hidden_state[:, :-1]
    # Project only the few fitted positions on the vocabulary
    logits = model.get_output_embeddings()(hidden_states[fitted])
    return torch.nn.functional.cross_entropy(logits, input_ids[:, 1:][fitted])


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    questions: Sequence[Question],
    *,
    greedy: bool = False,
    max_batch: int = 256,
) -> list[Trajectory]:
    """
    Let a model answer questions about a world.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The policy.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        world ([`World`]):
            The world to search in.
        questions (`Sequence[Question]`):
            The questions.
        greedy (`bool`, *optional*, defaults to `False`):
            Whether to take the most probable token instead of sampling at temperature 1.
        max_batch (`int`, *optional*, defaults to `256`):
            Maximum number of questions in a batch.

    Returns:
        `list[Trajectory]`: A trajectory for each question.
    """
    protocol = TagProtocol(tokenizer)
    config = GenerationConfig(
        do_sample=not greedy,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        disable_compile=True,
        **({} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}),
    )
    engine = TransformersEngine(lambda: nullcontext(model), tokenizer, config, protocol.stop_strings)
    loop = SearchLoop(
        engine, BM25Retriever(world.passages), protocol, eos_token_ids=[tokenizer.eos_token_id], limits=LIMITS
    )
    prompts = [tokenizer(str(question.row()["prompt"]))["input_ids"] for question in questions]
    return [t for i in range(0, len(prompts), max_batch) for t in loop.run(prompts[i : i + max_batch])[0]]


def answer_rate(trajectories: Sequence[Trajectory], questions: Sequence[Question]) -> float:
    """The share of questions answered exactly."""
    scores = [exact_match(t.answer, [q.answer]) for t, q in zip(trajectories, questions, strict=True)]
    return sum(scores) / len(scores)


def warm_start(
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    worlds: int = 8,
    target: float = 0.9,
    max_steps: int = 600,
    weaken_steps: int = 80,
    wrong_query: float = 0.5,
    wrong_answer: float = 0.8,
    progress: bool = False,
) -> PreTrainedModel:
    """
    Make a policy that knows the format and can copy names, but whose queries and answers are mostly wrong.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The demo tokenizer.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights, of the worlds of the demonstrations, and of the order of the demonstrations.
        worlds (`int`, *optional*, defaults to `8`):
            Number of worlds of the demonstrations. None of them is `make_world(s)` for a small `s`.
        target (`float`, *optional*, defaults to `0.9`):
            Stage one ends when the greedy exact match on unseen questions reaches this value.
        max_steps (`int`, *optional*, defaults to `600`):
            Maximum number of steps of stage one.
        weaken_steps (`int`, *optional*, defaults to `80`):
            Number of steps of stage two. 0 keeps the strong policy.
        wrong_query (`float`, *optional*, defaults to `0.5`):
            Probability of a wrong name in a query of stage two.
        wrong_answer (`float`, *optional*, defaults to `0.8`):
            Probability of a wrong answer in stage two.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show progress bars.

    Returns:
        [`~transformers.PreTrainedModel`]: The policy.

    Raises:
        `RuntimeError`: If the policy did not learn to copy within `max_steps`. Reinforcement learning could not succeed.
    """
    made = [make_world(1_000_000 * (seed + 1) + i) for i in range(worlds)]
    unseen = make_world(1_000_000 * (seed + 1) + worlds)
    probe = unseen.heldout_questions[:64]
    model = make_model(tokenizer, seed=seed)

    def demonstrations(**mistakes: float) -> list[Trajectory]:
        per_world = (demonstrate_world(tokenizer, world, seed=seed + i, **mistakes) for i, world in enumerate(made))
        return [trajectory for trajectories in per_world for trajectory in trajectories]

    def rate() -> float:
        return answer_rate(sample(model, tokenizer, unseen, probe, greedy=True), probe)

    steps = supervise(
        model,
        demonstrations(),
        steps=max_steps,
        seed=seed,
        until=lambda: rate() >= target,
        progress="Warm start: format and copying" if progress else None,
    )
    if steps == max_steps and (reached := rate()) < target:
        raise RuntimeError(
            f"The warm start did not learn to copy: exact match {reached:.2f} after {steps} steps, expected {target}. "
            "Try another `seed` or more `max_steps`."
        )
    if weaken_steps:
        supervise(
            model,
            demonstrations(wrong_query=wrong_query, wrong_answer=wrong_answer),
            steps=weaken_steps,
            learning_rate=1e-3,
            seed=seed,
            progress="Warm start: weakening" if progress else None,
        )
    return model
