"""Turn rewards and advantages: pure functions of numbers and strings, no model, no I/O.

Notation: N is the number of rollouts of all groups, in group-major order (the G rollouts of a question are adjacent).
Rollout i has turns k = 1…K_i and the outcome R_i. K is the largest K_i. Tensors of shape (N, K) are NaN where a rollout
has no k-th turn.

The method is Turn-level Stage-aware Policy Optimization (TSPO, arXiv 2601.22776). `docs/algorithm.md` says what the
paper specifies and what this library chooses.
"""

from collections.abc import Sequence
from math import isnan
from typing import Literal, get_args

import torch

from .scoring import contains_answer, normalize_gold

Guard = Literal["none", "degenerate", "chance", "strict"]
Placement = Literal["first", "up_to_first"]
Level = Literal["stage", "turn", "trajectory"]
Baseline = Literal["turn", "group"]
Scale = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]
Composition = Literal["unscored", "all_wrong", "rescued", "mixed", "all_correct"]

EPS = 1e-4  # added to standard deviations before the division, as in TRL
_DEGENERATE = frozenset({"", "yes", "no", "noanswer"})


def eligible_golds(golden_answers: Sequence[str], *, question: str = "", guard: Guard = "degenerate") -> list[str]:
    """
    The golden answers that may earn FOLR, because their occurrence in a passage is informative.

    Args:
        golden_answers (`Sequence[str]`):
            All golden answers of a question.
        question (`str`, *optional*, defaults to `""`):
            The question, used by the guard `"strict"`.
        guard (`str`, *optional*, defaults to `"degenerate"`):
            `"none"`: all golden answers, as in the paper. `"degenerate"` and `"chance"`: excludes those that normalise to
            `""`, `"yes"`, `"no"`, `"noanswer"` or a single character. `"strict"`: also excludes those that occur in the
            question.

    Returns:
        `list[str]`: The eligible golden answers, possibly none.
    """
    if guard not in get_args(Guard):
        raise ValueError(f"`guard` must be one of {list(get_args(Guard))}, got {guard!r}.")
    golds = list(golden_answers)
    if guard != "none":
        golds = [g for g in golds if (n := normalize_gold(g)) not in _DEGENERATE and len(n) > 1]
    if guard == "strict":
        golds = [g for g in golds if not contains_answer(question, [g])]
    return golds


def first_occurrence(
    passage_texts: Sequence[str | None],
    golden_answers: Sequence[str],
    *,
    question: str = "",
    queries: Sequence[str] = (),
    guard: Guard = "degenerate",
) -> int | None:
    """
    The first turn whose passages contain a golden answer: t* of the First-Occurrence Latent Reward.

    Args:
        passage_texts (`Sequence[str | None]`):
            The passages of each of the K turns as one string, `None` for a turn without passages.
        golden_answers (`Sequence[str]`):
            The golden answers.
        question (`str`, *optional*, defaults to `""`):
            The question, used by the guard `"strict"`.
        queries (`Sequence[str]`, *optional*):
            The query of each of the K turns, `""` for a turn without a query; used by the guard `"strict"`.
        guard (`str`, *optional*, defaults to `"degenerate"`):
            Which golden answers may earn FOLR, see [`eligible_golds`]. `"strict"` also ignores an occurrence in a turn
            whose own query already contains the golden answer: otherwise the policy could earn FOLR by guessing answers
            in its queries.

    Returns:
        `int` or `None`: The 0-based turn, or `None` if no passage contains an eligible golden answer.
    """
    golds = eligible_golds(golden_answers, question=question, guard=guard)
    for turn, text in enumerate(passage_texts):
        usable = golds
        if guard == "strict" and turn < len(queries):
            usable = [g for g in golds if not contains_answer(queries[turn], [g])]
        if contains_answer(text, usable):
            return turn
    return None


def folr_rewards(
    outcomes: torch.Tensor,
    first_occurrence: torch.Tensor,
    num_turns: torch.Tensor,
    *,
    alpha: float = 0.5,
    placement: Placement = "first",
    success_threshold: float = 1.0,
) -> torch.Tensor:
    r"""
    Turn rewards with the First-Occurrence Latent Reward (TSPO, arXiv 2601.22776):

    $$ r_{i,k} = R_i + \alpha \, [R_i < \tau] \, [k = t^*_i] $$

    where \\(\tau\\) is `success_threshold` and, with `placement="up_to_first"`, the last bracket is
    \\([k \le t^*_i]\\).

    Args:
        outcomes (`torch.Tensor`):
            Outcome rewards R of shape (N,). NaN marks an unscorable rollout: all its turn rewards are NaN.
        first_occurrence (`torch.Tensor`):
            The 0-based turn t* of each rollout, integers of shape (N,), -1 for none.
        num_turns (`torch.Tensor`):
            K_i, integers of shape (N,).
        alpha (`float`, *optional*, defaults to `0.5`):
            The partial reward α.
        placement (`str`, *optional*, defaults to `"first"`):
            `"first"` rewards turn t*, `"up_to_first"` every turn up to and including t*.
        success_threshold (`float`, *optional*, defaults to `1.0`):
            A rollout whose outcome is at least this is correct and earns no FOLR.

    Returns:
        `torch.Tensor`: Turn rewards of shape (N, K) with K the largest of `num_turns`, NaN where a rollout has no k-th
        turn.
    """
    paid = folr_turns(outcomes, first_occurrence, num_turns, placement=placement, success_threshold=success_threshold)
    return outcomes[:, None] + alpha * paid


def folr_turns(
    outcomes: torch.Tensor,
    first_occurrence: torch.Tensor,
    num_turns: torch.Tensor,
    *,
    placement: Placement = "first",
    success_threshold: float = 1.0,
) -> torch.Tensor:
    """
    The turns that earn the First-Occurrence Latent Reward: the product of the brackets in [`folr_rewards`].

    Args:
        outcomes, first_occurrence, num_turns, placement, success_threshold:
            As in [`folr_rewards`].

    Returns:
        `torch.Tensor`: 1 for a turn that earns it, else 0, of shape (N, K), NaN where a rollout has no k-th turn.
    """
    if placement not in ("first", "up_to_first"):
        raise ValueError(f"`placement` must be 'first' or 'up_to_first', got {placement!r}.")
    num_columns = int(num_turns.max()) if num_turns.numel() else 0
    turn = torch.arange(num_columns, device=outcomes.device)  # (K,)
    occurrence = first_occurrence[:, None]  # (N, 1)
    paid = (turn == occurrence) if placement == "first" else (turn <= occurrence)  # -1 rewards no turn in either case
    paid = paid & (outcomes < success_threshold)[:, None]
    return paid.to(outcomes.dtype).masked_fill(turn >= num_turns[:, None], torch.nan)


def uses_turn_level(
    outcomes: torch.Tensor, *, num_generations: int, level: Level = "stage", success_threshold: float = 1.0
) -> torch.Tensor:
    """
    Which rollouts are trained with turn advantages; the others are trained with the trajectory advantage.

    Args:
        outcomes (`torch.Tensor`):
            Outcome rewards of shape (N,), NaN for unscorable rollouts.
        num_generations (`int`):
            G, the size of a group.
        level (`str`, *optional*, defaults to `"stage"`):
            `"turn"`: all. `"trajectory"`: none. `"stage"`: the rollouts of groups without a correct rollout.
        success_threshold (`float`, *optional*, defaults to `1.0`):
            A rollout whose outcome is at least this is correct.

    Returns:
        `torch.Tensor`: Booleans of shape (N,), the same for all rollouts of a group.
    """
    if level not in ("stage", "turn", "trajectory"):
        raise ValueError(f"`level` must be 'stage', 'turn' or 'trajectory', got {level!r}.")
    if level != "stage":
        return torch.full_like(outcomes, level == "turn", dtype=torch.bool)
    correct = outcomes >= success_threshold  # NaN compares as False: an unscorable rollout is not correct
    return ~correct.view(-1, num_generations).any(dim=1).repeat_interleave(num_generations)


def is_correct(outcome: float | None, *, success_threshold: float = 1.0) -> bool:
    """
    Whether a rollout is correct.

    Args:
        outcome (`float` or `None`):
            The outcome reward; `None` or NaN for an unscorable rollout, which is not correct.
        success_threshold (`float`, *optional*, defaults to `1.0`):
            A rollout whose outcome is at least this is correct.
    """
    return outcome is not None and outcome >= success_threshold


def group_composition(
    outcomes: Sequence[float | None], *, has_signal: bool, success_threshold: float = 1.0
) -> Composition:
    """
    Classify a group by its outcomes.

    Args:
        outcomes (`Sequence[float | None]`):
            The outcome rewards of the G rollouts, `None` or NaN for unscorable ones.
        has_signal (`bool`):
            Whether any turn of the group has a nonzero advantage.
        success_threshold (`float`, *optional*, defaults to `1.0`):
            A rollout whose outcome is at least this is correct.

    Returns:
        `str`: `"unscored"` (no rollout can be scored), `"rescued"` (no rollout is correct and all outcomes are equal, but
        turn rewards give a signal), `"all_wrong"` (no rollout is correct, and turn rewards rescue nothing), `"mixed"` or
        `"all_correct"`. Unscorable rollouts do not count.
    """
    scored = [outcome for outcome in outcomes if outcome is not None and not isnan(outcome)]
    correct = sum(is_correct(outcome, success_threshold=success_threshold) for outcome in scored)
    if not scored:
        return "unscored"
    if not correct:
        # Outcomes that differ give a signal by themselves
        return "rescued" if has_signal and max(scored) == min(scored) else "all_wrong"
    return "all_correct" if correct == len(scored) else "mixed"


def is_near_miss(outcome: float | None, occurrence: int | None, *, success_threshold: float = 1.0) -> bool:
    """
    Whether a rollout retrieved a golden answer but is not correct.

    Args:
        outcome (`float` or `None`):
            The outcome reward; `None` or NaN for an unscorable rollout, which is not a near miss.
        occurrence (`int` or `None`):
            The 0-based turn whose passages first contain a golden answer; `None` or -1 for none.
        success_threshold (`float`, *optional*, defaults to `1.0`):
            A rollout whose outcome is at least this is correct.
    """
    found = occurrence is not None and occurrence >= 0
    return found and outcome is not None and outcome < success_threshold


def turn_advantages(
    turn_rewards: torch.Tensor,
    outcomes: torch.Tensor,
    *,
    num_generations: int,
    level: Level = "stage",
    baseline: Baseline = "turn",
    scale_rewards: Scale = "group",
    success_threshold: float = 1.0,
    turn_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    The advantages of turns by the stage-aware rule of TSPO. A rollout has one of two kinds of advantages:

    - the trajectory advantage \\((R_i - \mathrm{mean}\,R) / (\mathrm{std}\,R + 10^{-4})\\) over the group, the same for
      all turns of a rollout: this is GRPO (arXiv 2402.03300);
    - turn advantages \\((r_{i,k} - \mathrm{mean}) / (\mathrm{std} + 10^{-4})\\) over the rollouts of the group that
      have a k-th turn, or over all turns of the group.

    Standard deviations are unbiased (n - 1), as in TRL. The advantage is exactly 0 for a single value and for values
    without variance. With `turn_weights`, a turn advantage becomes \\(w_g A_{i,k} + (1 - w_g) A_i\\): with the weight 0, the
    group has GRPO's advantages.

    Args:
        turn_rewards (`torch.Tensor`):
            Turn rewards of shape (N, K), NaN where a rollout has no k-th turn, see [`folr_rewards`].
        outcomes (`torch.Tensor`):
            Outcome rewards of shape (N,), NaN for unscorable rollouts. These are excluded from all means and standard
            deviations, and have advantage 0.
        num_generations (`int`):
            G, the size of a group; N must be a multiple of it.
        level (`str`, *optional*, defaults to `"stage"`):
            `"stage"`: turn advantages in groups without a correct rollout, trajectory advantages in the others.
            `"turn"`: turn advantages always. `"trajectory"`: trajectory advantages always.
        baseline (`str`, *optional*, defaults to `"turn"`):
            The turns over which the mean is taken: `"turn"`, the k-th turns of the group, or `"group"`, all its turns.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            `"group"`: divide by the standard deviation of the values over which the mean is taken. `"batch"`: divide by
            that of all outcomes (for trajectory advantages) or of all turn rewards (for turn advantages). `"none"`: do
            not divide.
        success_threshold (`float`, *optional*, defaults to `1.0`):
            A rollout whose outcome is at least this is correct.
        turn_weights (`torch.Tensor`, *optional*):
            Weights of the turn advantages of each group in [0, 1], shape (N / G,), see [`~chance.chance_weights`]. `None`
            means 1.

    Returns:
        `torch.Tensor`: Advantages of shape (N, K), 0 where `turn_rewards` is NaN.

    Raises:
        `ValueError`: If N is not a multiple of `num_generations`, or an option is unknown.
    """
    _check_groups(outcomes, num_generations, baseline)
    if scale_rewards not in ("group", "batch", "none"):
        raise ValueError(f"`scale_rewards` must be 'group', 'batch' or 'none', got {scale_rewards!r}.")
    turn_rewards = turn_rewards.masked_fill(outcomes.isnan()[:, None], torch.nan)

    # Both kinds of advantages, for all rollouts
    trajectory = _normalize(outcomes.view(-1, num_generations), (1,), scale_rewards).view(-1, 1)
    turn = _normalize_turns(turn_rewards, num_generations, baseline, scale_rewards)
    if turn_weights is not None:
        weight = turn_weights.repeat_interleave(num_generations)[:, None]
        turn = torch.where(weight == 1, turn, weight * turn + (1 - weight) * trajectory)

    # One of them for each group
    turn_level = uses_turn_level(
        outcomes, num_generations=num_generations, level=level, success_threshold=success_threshold
    )
    advantages = torch.where(turn_level[:, None], turn, trajectory)
    return advantages.masked_fill(turn_rewards.isnan(), 0.0)


def summed_turn_advantages(
    paid: torch.Tensor,
    outcomes: torch.Tensor,
    trajectory_advantages: torch.Tensor,
    *,
    num_generations: int,
    alpha: float = 0.5,
    level: Level = "stage",
    baseline: Baseline = "turn",
    success_threshold: float = 1.0,
    turn_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    The advantages of turns if rewards are normalised one by one and then summed (`multi_objective_aggregation=
    "normalize_then_sum"` of TRL): the turn reward is one more reward, whose weight is α.

    $$ A_{i,k} = A_i + w_g \, \alpha \, (p_{i,k} - \mathrm{mean}\,p) / (\mathrm{std}\,p + 10^{-4}) $$

    where \\(A_i\\) is the trajectory advantage of TRL, which holds all reward functions, and \\(p_{i,k}\\) is 1 if the turn
    earns FOLR, else 0. If all outcomes of a group are equal, the sign is that of the turn reward minus its mean. Without
    turn rewards, the advantage is TRL's.

    Args:
        paid (`torch.Tensor`):
            The turns that earn FOLR, of shape (N, K), see [`folr_turns`].
        outcomes (`torch.Tensor`):
            Outcome rewards of shape (N,), NaN for unscorable rollouts, which have advantage 0.
        trajectory_advantages (`torch.Tensor`):
            The advantages of TRL, of shape (N,).
        num_generations (`int`):
            G, the size of a group; N must be a multiple of it.
        alpha (`float`, *optional*, defaults to `0.5`):
            The weight α of the turn reward, as `reward_weights` are those of the reward functions.
        level, baseline, success_threshold, turn_weights:
            As in [`turn_advantages`]: which rollouts have turn rewards, the turns over which mean and std are taken, and the
            weights w of the groups.

    Returns:
        `torch.Tensor`: Advantages of shape (N, K), 0 where `paid` is NaN.

    Raises:
        `ValueError`: If N is not a multiple of `num_generations`, or an option is unknown.
    """
    _check_groups(outcomes, num_generations, baseline)
    paid = paid.masked_fill(outcomes.isnan()[:, None], torch.nan)
    turn = alpha * _normalize_turns(paid, num_generations, baseline, "group")
    if turn_weights is not None:
        turn = turn * turn_weights.repeat_interleave(num_generations)[:, None]
    turn_level = uses_turn_level(
        outcomes, num_generations=num_generations, level=level, success_threshold=success_threshold
    )
    advantages = trajectory_advantages[:, None] + turn * turn_level[:, None]
    return advantages.masked_fill(paid.isnan(), 0.0)


def has_variance(values: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    Whether the rollouts of a group differ in any value.

    Args:
        values (`torch.Tensor`):
            Values of shape (N, F), NaN for unknown ones, which are ignored.
        num_generations (`int`):
            G, the size of a group.

    Returns:
        `torch.Tensor`: Booleans of shape (N,), the same for all rollouts of a group.
    """
    grouped = values.view(-1, num_generations, values.size(1))
    largest = grouped.masked_fill(grouped.isnan(), -torch.inf).amax(dim=1)
    smallest = grouped.masked_fill(grouped.isnan(), torch.inf).amin(dim=1)
    return (largest > smallest).any(dim=1).repeat_interleave(num_generations)


def _check_groups(outcomes: torch.Tensor, num_generations: int, baseline: str) -> None:
    if outcomes.numel() % num_generations:
        raise ValueError(
            f"The {outcomes.numel()} outcomes are not a multiple of `num_generations` ({num_generations}): every group "
            "must be complete."
        )
    if baseline not in ("turn", "group"):
        raise ValueError(f"`baseline` must be 'turn' or 'group', got {baseline!r}.")


def _normalize_turns(values: torch.Tensor, num_generations: int, baseline: Baseline, scale: Scale) -> torch.Tensor:
    """Normalise values of turns, of shape (N, K), over the k-th turns of the group, or over all its turns."""
    grouped = values.view(-1, num_generations, values.size(1))  # (N / G, G, K)
    return _normalize(grouped, (1,) if baseline == "turn" else (1, 2), scale).view_as(values)


def _normalize(values: torch.Tensor, dim: tuple[int, ...], scale: Scale) -> torch.Tensor:
    """(x - mean) / (std + eps) along `dim`, ignoring NaN; exactly 0 for NaN, a single value or no variance."""
    known = ~values.isnan()
    filled = values.masked_fill(~known, 0.0)
    count = known.sum(dim, keepdim=True)
    centered = (filled - filled.sum(dim, keepdim=True) / count.clamp(min=1)).masked_fill(~known, 0.0)
    # Equal values leave a rounding residue, which the division by eps would amplify
    largest = values.masked_fill(~known, -torch.inf).amax(dim, keepdim=True)
    smallest = values.masked_fill(~known, torch.inf).amin(dim, keepdim=True)
    centered = torch.where(largest > smallest, centered, 0.0)
    if scale == "none":
        return centered
    if scale == "batch":
        std = values[known].std() if known.sum() > 1 else values.new_zeros(())
    else:
        std = (centered.square().sum(dim, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return centered / (std + EPS)


def token_advantages(advantages: torch.Tensor, turn_index: torch.Tensor) -> torch.Tensor:
    """
    Assign the advantage of each turn to its tokens.

    Args:
        advantages (`torch.Tensor`):
            Advantages of turns, shape (B, K).
        turn_index (`torch.Tensor`):
            The 0-based turn of each token, integers of shape (B, L), -1 on tokens that belong to no turn (observations,
            padding).

    Returns:
        `torch.Tensor`: Advantages of tokens, shape (B, L), 0 where `turn_index` is -1.
    """
    spread = advantages.gather(1, turn_index.clamp(min=0))
    return spread.masked_fill(turn_index < 0, 0.0)
