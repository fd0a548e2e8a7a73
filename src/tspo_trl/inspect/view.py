"""The data that the page and the terminal show: curves, groups, rollouts, and turns with the reasons for their rewards."""

from collections.abc import Mapping
from statistics import mean
from typing import Any

from ..scoring import contains_answer
from .load import Group, Run
from .spans import find_answers, in_utf16
from .why import (
    composition,
    explain_group,
    explain_turn,
    is_correct,
    near_miss,
    shown_golds,
    uses_turn_advantages,
)

#: Names of the filters of rollouts. Bit i of a rollout's flags stands for the i-th.
FLAGS = ("near_miss", "all_wrong", "rescued", "invalid", "failed", "truncated", "correct")


def rollout_flags(group: Group, record: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    """
    The filters that a rollout passes.

    Args:
        group ([`Group`]):
            The group of the rollout.
        record (`Mapping`):
            The rollout.
        settings (`Mapping`):
            The settings of rewards and advantages.

    Returns:
        `int`: A bit for each of `FLAGS`.
    """
    kind = composition(group, settings)
    correct = is_correct(record, settings)
    turns = record["trajectory"].turns
    values = {
        "near_miss": near_miss(record, settings),
        "all_wrong": kind in ("all_wrong", "rescued"),
        "rescued": kind == "rescued",
        "invalid": any(turn.action == "invalid" for turn in turns),
        "failed": any(turn.retrieval in ("timeout", "error") for turn in turns),
        "truncated": record["trajectory"].status == "truncated",
        "correct": correct,
    }
    return sum(values[name] << bit for bit, name in enumerate(FLAGS))


def step_values(groups: list[Group], settings: Mapping[str, Any]) -> dict[str, float | None]:
    """
    The values of the curves at one step.

    Args:
        groups (`list[Group]`):
            The groups of the step.
        settings (`Mapping`):
            The settings of rewards and advantages.

    Returns:
        `dict[str, float | None]`: Values by name, defined as in the metrics of training; `None` for a share of an empty set.
    """
    records = [record for group in groups for record in group.rollouts]
    scored = [record for record in records if record["outcome"] is not None]
    found = [record for record in scored if record["first_occurrence"] is not None]
    kinds = [kind for group in groups if (kind := composition(group, settings)) != "unscored"]
    return {
        "reward": mean(record["outcome"] for record in scored) if scored else None,
        "hit": len(found) / len(scored) if scored else None,
        "near_miss": sum(near_miss(record, settings) for record in found) / len(scored) if scored else None,
        "all_wrong": sum(kind in ("all_wrong", "rescued") for kind in kinds) / len(kinds) if kinds else None,
        "rescued": kinds.count("rescued") / len(kinds) if kinds else None,
        "turns": mean(len(record["trajectory"].turns) for record in records),
    }


def describe(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    The data of the page of a run.

    Args:
        run ([`Run`]):
            The run.

    Returns:
        `tuple[dict, dict]`: The overview, which is small and shown at once (curves, groups, flags), and the texts (each
        passage once; turns by mode, step, group and rollout). Both are JSON data.
    """
    index: dict[str, Any] = {
        "name": run.name,
        "settings": run.settings,
        "notes": run.notes,
        "flags": list(FLAGS),
        "reward": _reward_name(run),
        "modes": {},
    }
    passages: dict[tuple[str, str], int] = {}
    texts: dict[str, Any] = {}
    for mode, groups in run.modes.items():
        steps: dict[int, list[Group]] = {}
        for group in groups:
            steps.setdefault(group.step, []).append(group)
        index["modes"][mode] = [
            {
                "step": step,
                "values": step_values(step_groups, run.settings),
                "groups": [_overview(group, run.settings) for group in step_groups],
            }
            for step, step_groups in steps.items()
        ]
        texts[mode] = [[_group_texts(group, run, passages) for group in step_groups] for step_groups in steps.values()]
    return index, {"passages": list(passages), "modes": texts}


def _reward_name(run: Run) -> str:
    names = {name for groups in run.modes.values() for group in groups for name in group.rollouts[0]["rewards"]}
    return "Exact match" if names in ({"exact_match_reward"}, {"exact_match"}) else "Reward"


def _overview(group: Group, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "question": group.question,
        "golds": group.golden_answers,
        "kind": composition(group, settings),
        "rollouts": [[rollout_flags(group, r, settings), r["outcome"]] for r in group.rollouts],
    }


def _group_texts(group: Group, run: Run, passages: dict[tuple[str, str], int]) -> dict[str, Any]:
    golds = shown_golds(group, run.settings)
    marks: dict[int, list[list[int]]] = {}
    rollouts = []
    for place, record in enumerate(group.rollouts):
        turns = []
        seen: set[str] = set()
        for k, turn in enumerate(record["trajectory"].turns):
            numbers = []
            for passage in turn.passages:
                number = passages.setdefault((passage.title, passage.text), len(passages))
                numbers.append(number)
                if number not in marks and any(contains_answer(t, golds) for t in (passage.title, passage.text)):
                    marks[number] = [_marks(passage.title, golds), _marks(passage.text, golds)]
            query = turn.content.lower() if turn.retrieval is not None else None
            reasons = explain_turn(group, place, k, run.settings)
            values: dict[str, Any] = {
                "text": turn.text,
                "marks": _marks(turn.text, golds) if contains_answer(turn.text, golds) else None,
                "action": turn.action,
                "content": turn.content,
                "retrieval": turn.retrieval,
                "duplicate": query in seen or None,
                "passages": numbers or None,
                "scores": [round(passage.score, 2) for passage in turn.passages] or None,
                "hint": None if numbers else _decode(run.tokenizer, turn.observation_ids),
                "tokens": [len(turn.token_ids), len(turn.observation_ids)],
                "logprob": round(mean(turn.logprobs), 4) if turn.logprobs else None,
                "reward": record["turn_rewards"][k],
                "advantage": record["turn_advantages"][k],
                "why": reasons,
            }
            if query is not None:
                seen.add(query)
            turns.append({name: value for name, value in values.items() if value is not None})
        rollouts.append(
            {
                "status": record["trajectory"].status,
                "answer": record["trajectory"].answer,
                "rewards": record["rewards"],
                "first": record["first_occurrence"],
                "credited": record["credited_turn"],
                "turns": turns,
            }
        )
    return {
        "why": explain_group(group, run.settings),
        "by_turn": uses_turn_advantages(group, run.settings),
        "prompt": _decode(run.tokenizer, group.rollouts[0]["trajectory"].prompt_ids),
        "marks": marks,
        "rollouts": rollouts,
    }


def _marks(text: str, golds: list[str]) -> list[int]:
    return in_utf16(text, find_answers(text, golds))


def _decode(tokenizer: Any, token_ids: list[int]) -> str | None:
    if tokenizer is None or not token_ids:
        return None
    try:
        return tokenizer.decode(token_ids, skip_special_tokens=False)
    except OverflowError:  # the id belongs to no tokenizer
        return None
