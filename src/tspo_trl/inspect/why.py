"""Explanations of rewards and advantages in plain words, from the log."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import torch

from .. import credit
from ..credit import Composition, Guard, eligible_golds, group_composition, is_near_miss, uses_turn_level
from ..scoring import contains_answer
from .load import Group


def show(value: float, sign: bool = False) -> str:
    """Format a number with two digits and a minus sign."""
    value += math.copysign(1e-9, value)  # 0.125 becomes 0.13, as on the page
    text = f"{value:+.2f}" if sign else f"{value:.2f}"
    if float(text) == 0:
        text = "0.00"
    return text.replace("-", "−")


def is_correct(record: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a rollout reached the success threshold."""
    return credit.is_correct(record["outcome"], success_threshold=_threshold(settings))


def near_miss(record: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a rollout found a golden answer and is not correct, see [`~tspo_trl.credit.is_near_miss`]."""
    return is_near_miss(record["outcome"], record["first_occurrence"], success_threshold=_threshold(settings))


def _threshold(settings: Mapping[str, Any]) -> float:
    return settings.get("success_threshold", 1.0)


def shown_golds(group: Group, settings: Mapping[str, Any]) -> list[str]:
    """The golden answers that are highlighted: those that `folr_guard` does not exclude; all in `tspo evaluate`."""
    guard: Guard = "none" if settings.get("folr_guard") == "none" or group.only_scored else "degenerate"
    return eligible_golds(group.golden_answers, guard=guard)


def composition(group: Group, settings: Mapping[str, Any]) -> Composition:
    """The composition of a group, see [`~tspo_trl.credit.group_composition`]."""
    return group_composition(
        [record["outcome"] for record in group.rollouts],
        has_signal=_has_signal(group),
        success_threshold=_threshold(settings),
    )


def _has_signal(group: Group) -> bool:
    return any(any(record["turn_advantages"]) for record in group.rollouts if record["outcome"] is not None)


def uses_turn_advantages(group: Group, settings: Mapping[str, Any]) -> bool:
    """Whether turn advantages apply to a group, rather than the trajectory advantage."""
    return not group.only_scored and _turn_level(group, settings) and turn_weight(group) > 0


def _turn_level(group: Group, settings: Mapping[str, Any]) -> bool:
    outcomes = [math.nan if record["outcome"] is None else record["outcome"] for record in group.rollouts]
    turn_level = uses_turn_level(
        torch.tensor(outcomes, dtype=torch.float64),
        num_generations=len(outcomes),
        level=settings.get("advantage_level", "stage"),
        success_threshold=_threshold(settings),
    )
    return bool(turn_level.all())


def turn_weight(group: Group) -> float:
    """The weight of turn advantages, 1 in logs of older versions."""
    return float(group.rollouts[0].get("turn_weight", 1.0))


def explain_chance(group: Group, settings: Mapping[str, Any]) -> str:
    """Say how often chance finds an answer of a group and what follows. Empty if it is unknown, or has no effect."""
    chance, weight = group.rollouts[0].get("chance"), turn_weight(group)
    found = any(record["credited_turn"] is not None for record in group.rollouts)
    if chance is None or not found or not _turn_level(group, settings):
        return ""
    occurs = f" A golden answer occurs in {chance:.0%} of the searches of other questions"
    if weight == 1:
        return f"{occurs}." if chance >= 0.005 else ""
    if weight == 0:
        return f"{occurs}: chance explains what this group found, so turn rewards do not count."
    why = "the squared share of finds that chance does not explain"
    return f"{occurs}: the turn advantages are multiplied by {show(weight)}, {why}."


def explain_group(group: Group, settings: Mapping[str, Any]) -> str:
    """
    Explain how the composition of a group determines its advantages.

    Args:
        group ([`Group`]):
            The group.
        settings (`Mapping`):
            The settings of rewards and advantages, see [`~tspo_trl.rollout.log.read_settings`].

    Returns:
        `str`: One or two sentences.
    """
    size, evaluated = len(group.rollouts), group.mode == "eval"
    scored = [record for record in group.rollouts if record["outcome"] is not None]
    correct = sum(is_correct(record, settings) for record in scored)
    lost = f" {size - len(scored)} could not be scored and are excluded from all means." if len(scored) < size else ""
    if not scored:
        return "No rollout could be scored" + ("." if evaluated else ": nothing is learned from this group.")
    lost = explain_chance(group, settings) + lost
    outcomes = {record["outcome"] for record in scored}
    rollouts = f"{correct} of {len(scored)} rollouts {'is' if correct == 1 else 'are'} correct"
    if group.only_scored:
        found = sum(near_miss(record, settings) for record in scored)
        failed = f" {size - len(scored)} failed." if len(scored) < size else ""
        return f"{rollouts}; {found} found a golden answer and answered wrong.{failed} Turns have rewards and advantages in training only."
    if not uses_turn_advantages(group, settings):
        if len(outcomes) == 1:
            learned = "" if evaluated else ": nothing is learned"
            return (
                f"The outcome of all rollouts is {show(scored[0]['outcome'])}, so none has an advantage{learned}.{lost}"
            )
        return (
            f"{rollouts}, so a rollout is compared with the others as a whole: all its turns share one advantage.{lost}"
        )
    why = "No rollout is correct" if not correct else f"{rollouts}, but the advantage level is “turn”"
    if not correct and not _has_signal(group):
        learned = "" if evaluated else ": nothing is learned"
        return f"{why}, and no turn differs from the same turn of the others{learned}.{lost}"
    found = sum(record["credited_turn"] is not None and not is_correct(record, settings) for record in scored)
    if not found:
        return f"{why}, so turns are compared with each other.{lost}"
    return (
        f"{why}, so turns are compared with each other, and a turn that found a golden answer stands out: {found} of "
        f"{len(scored)} rollouts found one and answered wrong.{lost}"
    )


def explain_turn(group: Group, rollout: int, turn: int, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """
    Explain the reward and the advantage of a turn.

    Args:
        group ([`Group`]):
            The group.
        rollout (`int`):
            Index of the rollout in the group.
        turn (`int`):
            Index of the turn, from 0.
        settings (`Mapping`):
            The settings of rewards and advantages, see [`~tspo_trl.rollout.log.read_settings`].

    Returns:
        `tuple[str, ...]`: A sentence about the reward, and one about the advantage. For rollouts of `tspo evaluate`, which
        have neither: what was found first, and the outcome at the last turn.
    """
    record = group.rollouts[rollout]
    if group.only_scored:
        return _explain_scored(group, record, turn, settings)
    if record["outcome"] is None or record["turn_rewards"][turn] is None:
        failed = record["trajectory"].status == "retrieval_failed"
        why = "a search of it failed" if failed else "no reward function gave a value"
        return (
            f"No reward: {why}.",
            "Advantage 0: the rollout is excluded from all means"
            + ("." if group.mode == "eval" else ", and nothing is learned from it."),
        )
    return _explain_reward(group, record, turn, settings), _explain_advantage(group, record, turn, settings)


def _explain_scored(group: Group, record: Mapping[str, Any], turn: int, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The first find at its turn, and the outcome at the last turn."""
    why = []
    if turn == record["first_occurrence"]:
        why.append(f"Its passages are the first to contain “{_found_gold(group, record, turn, settings)}”.")
    if turn < len(record["trajectory"].turns) - 1:
        return tuple(why)
    if record["outcome"] is None:
        failed = "a search" if record["trajectory"].status == "retrieval_failed" else "the generation"
        return *why, f"Not scored: {failed} of the rollout failed."
    correct = "correct" if is_correct(record, settings) else "not correct"
    return *why, f"Outcome {show(record['outcome'])}: the answer of the rollout is {correct} (exact match)."


def _found_gold(group: Group, record: Mapping[str, Any], turn: int, settings: Mapping[str, Any]) -> str | None:
    text = record["trajectory"].turns[turn].passage_text
    return next((gold for gold in shown_golds(group, settings) if contains_answer(text, [gold])), None)


def _explain_reward(group: Group, record: Mapping[str, Any], turn: int, settings: Mapping[str, Any]) -> str:
    outcome, reward = record["outcome"], record["turn_rewards"][turn]
    credited, first = record["credited_turn"], record["first_occurrence"]
    here = record["trajectory"].turns[turn]
    golds = shown_golds(group, settings)
    gold = _found_gold(group, record, turn, settings)
    named = "a golden answer" if gold is None else f"“{gold}”"
    is_first = f"its passages are the first to contain {named}"

    if abs(reward - outcome) > 1e-6:
        paid = show(reward - outcome, sign=True) + ("" if outcome == 0 else f" on top of the outcome {show(outcome)}")
        if turn == credited:
            return f"{paid}: {is_first}, and the rollout is not correct."
        if credited is not None:
            return (
                f"{paid}: it comes before turn {credited + 1}, whose passages are the first to contain a golden answer."
            )
        return f"Reward {show(reward)}, where the outcome is {show(outcome)}."
    if is_correct(record, settings):
        more = f" {_capital(is_first)}; a correct rollout needs no partial reward." if turn == first else ""
        return f"Reward {show(reward)}: the outcome, because the answer is correct.{more}"
    more = ""
    if turn == credited:
        more = f" {_capital(is_first)}, but α is {show(settings.get('folr_alpha', 0.0))}."
    elif turn == first:
        more = f" {_capital(is_first)}, but `folr_guard` grants nothing for it."
    elif gold is not None and first is not None and turn > first:
        more = f" Its passages contain {named} too, but those of turn {first + 1} were the first."
    elif credited is not None:
        more = f" The partial reward went to turn {credited + 1}."
    elif here.passages and golds:
        more = " Its passages contain no golden answer."
    elif here.passages:
        more = " No golden answer of this question may earn a partial reward (yes, no, a single character)."
    return f"Reward {show(reward)}: the outcome, because the rollout is not correct.{more}"


def _explain_advantage(group: Group, record: Mapping[str, Any], turn: int, settings: Mapping[str, Any]) -> str:
    advantage = record["turn_advantages"][turn]
    if advantage is None:
        return "No advantage was logged."
    scored = [other for other in group.rollouts if other["outcome"] is not None]
    any_correct = any(is_correct(other, settings) for other in scored)
    if not uses_turn_advantages(group, settings):
        value, values, of = record["outcome"], [other["outcome"] for other in scored], "the outcome"
    elif settings.get("turn_baseline", "turn") == "group":
        value, of = record["turn_rewards"][turn], "all turns of the group"
        values = [reward for other in scored for reward in other["turn_rewards"] if reward is not None]
    else:
        value, of = record["turn_rewards"][turn], f"turn {turn + 1}"
        values = [r for other in scored for r in other["turn_rewards"][turn : turn + 1] if r is not None]

    effect = "made more likely" if advantage > 0 else "made less likely" if advantage < 0 else "nothing is learned"
    if group.mode == "eval":
        effect = "not used: this is an evaluation"
    elif advantage and settings.get("mask_truncated_completions") and record["trajectory"].status == "truncated":
        effect = "but truncated rollouts are left out of the loss"
    result = f"advantage {show(advantage, sign=True)}, {effect}."
    if settings.get("multi_objective_aggregation") == "normalize_then_sum" and advantage:
        compared = _compared(value, values, of, any_correct, group, settings)
        return f"{compared}; each reward function is normalised by itself, and their sum by the batch → {result}"
    expected, weighed = _expected(value, values, settings), ""
    if expected is not None and uses_turn_advantages(group, settings) and (weight := turn_weight(group)) < 1:
        outcomes = [other["outcome"] for other in scored]
        expected = weight * expected + (1 - weight) * (_expected(record["outcome"], outcomes, settings) or 0.0)
        weighed = f", times {show(weight)} because of chance"
    if expected is None and settings.get("scale_rewards") == "batch":
        return f"{_compared(value, values, of, any_correct, group, settings)}, divided by the deviation of the batch → {result}"
    if expected is None or abs(expected - advantage) > 2e-3 * max(1.0, abs(advantage)):
        return (
            f"{_capital(result)} This does not follow from the logged rewards. A setting may differ, or rollouts of "
            "the group may be missing from the log."
        )
    if len(values) == 1:
        return f"The only {of if of != 'the outcome' else 'rollout'} of the group, nothing to compare with → {result}"
    if max(values) == min(values):
        return f"{_all(values, of)} {show(value)}, so there is nothing to compare → {result}"
    more = weighed
    if of == "the outcome" and abs((record["turn_rewards"][turn] or 0.0) - value) > 1e-6:
        more = " (partial rewards do not count in such a group)"
    return f"{_compared(value, values, of, any_correct, group, settings)}{more} → {result}"


def _compared(
    value: float, values: Sequence[float], of: str, any_correct: bool, group: Group, settings: Mapping[str, Any]
) -> str:
    scored = [record for record in group.rollouts if record["outcome"] is not None]
    if of == "the outcome":
        correct = sum(is_correct(record, settings) for record in scored)
        return (
            f"{correct} of {len(scored)} rollouts {'is' if correct == 1 else 'are'} correct, so all turns of a rollout "
            f"share one advantage: its outcome is {show(value)}, the mean {show(mean(values))}"
        )
    why = "Turns are compared" if any_correct else "No rollout of the group is correct, so turns are compared"
    units = "turns" if of == "all turns of the group" else "rollouts"
    return f"{why}: this one got {show(value)}, the mean of {of} over {len(values)} {units} is {show(mean(values))}"


def _expected(value: float, values: Sequence[float], settings: Mapping[str, Any]) -> float | None:
    """The advantage computed from the group, or `None` if it depends on the batch."""
    scale = settings.get("scale_rewards", "group")
    if len(values) < 2 or max(values) == min(values):
        return 0.0
    if scale == "none":
        return value - mean(values)
    return None if scale == "batch" else (value - mean(values)) / (stdev(values) + credit.EPS)


def _all(values: Sequence[float], of: str) -> str:
    if of == "the outcome":
        return f"The outcome of all {len(values)} rollouts is"
    if of == "all turns of the group":
        return "All turns of the group got"
    return f"{_capital(of)} of all {len(values)} rollouts that have one got"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
