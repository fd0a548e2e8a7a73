"""The arms of the study: methods to convert rollouts to advantages. All other settings are the same in every arm."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

from tspo_trl import Trajectory, TSPOTrainer
from tspo_trl.credit import first_occurrence, turn_advantages
from tspo_trl.rewards import exact_match_reward, f1_reward
from tspo_trl.scoring import exact_match

NEAR_MISS = 0.5  # reward of a near miss, equal to the default of `folr_alpha`


def near_miss_reward(
    trajectories: Sequence[Trajectory], golden_answers: Sequence[Sequence[str]], **kwargs: Any
) -> list[float]:
    """Return 1.0 for a rollout with a wrong answer whose passages contain a golden answer, else 0.0."""
    return [
        float(not exact_match(t.answer, golds) and first_occurrence(t.passage_texts, golds) is not None)
        for t, golds in zip(trajectories, golden_answers, strict=True)
    ]


class TwoSegmentTrainer(TSPOTrainer):
    """
    Trainer with credit in two segments, after MT-GRPO (Zeng et al., 2025, arXiv 2505.11821). All turns have the
    advantage of the outcome. The first turn, up to the first search result, also has the advantage of its own reward: 1
    if its passages contain the answer, else 0. Both advantages are normalised over the group.
    """

    def compute_turn_advantages(self, outcomes, first_occurrence, num_turns, *, num_generations, **kwargs):
        turn = torch.arange(int(num_turns.max()), device=outcomes.device)
        exists = turn < num_turns[:, None]
        rewards = outcomes[:, None].expand(exists.shape).masked_fill(~exists, torch.nan)
        found = (first_occurrence == 0).to(outcomes.dtype).masked_fill(outcomes.isnan(), torch.nan)
        of_outcome, of_first = (
            turn_advantages(values, by, num_generations=num_generations, level="trajectory")
            for values, by in ((rewards, outcomes), (found[:, None], found))
        )
        of_outcome[:, :1] += of_first
        rewards = torch.cat([rewards[:, :1] + found[:, None], rewards[:, 1:]], dim=1)
        return rewards, of_outcome, torch.ones_like(outcomes, dtype=torch.bool)


class EvidenceTrainer(TSPOTrainer):
    """
    Trainer that looks for evidence by its title instead of its text. Where a row has `supporting_titles`, the first occurrence is
    the first turn that retrieved a passage with one of these titles. Everything else is TSPO. Such titles are annotations.
    """

    def compute_turn_advantages(self, outcomes, first_occurrence, num_turns, *, rows, **kwargs):
        turns = first_occurrence.tolist()
        for i, row in enumerate(rows):
            if titles := row.get("supporting_titles"):
                turns[i] = first_supporting_turn(row["trajectory"], titles)
        return super().compute_turn_advantages(
            outcomes, first_occurrence.new_tensor(turns), num_turns, rows=rows, **kwargs
        )


def first_supporting_turn(trajectory: Trajectory, titles: Sequence[str]) -> int:
    """The 0-based turn that first retrieved a passage with one of some titles, -1 if there is none."""
    for place, turn in enumerate(trajectory.turns):
        if any(passage.title in titles for passage in turn.passages):
            return place
    return -1


class ModulatedTrainer(TSPOTrainer):
    """
    Trainer whose mixed groups look at evidence too, without changing the sign of an outcome's advantage (after STAMP, arXiv
    2607.11172). The turn that first found an answer has the advantage A (1 + c sign A): more credit in a correct rollout, less
    blame in a wrong one. The other groups are those of TSPO.
    """

    strength = 0.5  # c, times the weight of chance

    def compute_turn_advantages(self, outcomes, first_occurrence, num_turns, *, num_generations, **kwargs):
        kwargs["num_generations"] = num_generations
        rewards, advantages, by_turn = super().compute_turn_advantages(outcomes, first_occurrence, num_turns, **kwargs)
        whole = turn_advantages(rewards, outcomes, num_generations=num_generations, level="trajectory")
        found = torch.arange(rewards.size(1), device=outcomes.device) == first_occurrence[:, None]
        weight = kwargs["turn_weights"].repeat_interleave(num_generations)[:, None]
        modulated = whole * (1 + self.strength * weight * whole.sign() * found)
        return rewards, torch.where(by_turn[:, None], advantages, modulated), torch.ones_like(by_turn)


class PassageUtilityTrainer(TSPOTrainer):
    """
    Trainer whose mixed groups credit passages that go with success, learned within the group (the idea of fact utility, arXiv
    2609.00833, without a judge). The utility of a passage is the mean outcome of the rollouts of the group that retrieved it,
    minus that of the others. A turn scores the largest utility of its passages, and half of the normalised score is added to the
    advantage of the outcome. The other groups are those of TSPO.
    """

    strength = 0.5

    def compute_turn_advantages(self, outcomes, first_occurrence, num_turns, *, num_generations, rows, **kwargs):
        kwargs |= {"num_generations": num_generations, "rows": rows}
        rewards, advantages, by_turn = super().compute_turn_advantages(outcomes, first_occurrence, num_turns, **kwargs)
        whole = turn_advantages(rewards, outcomes, num_generations=num_generations, level="trajectory")
        scores = torch.full_like(rewards, torch.nan)
        for start in range(0, len(rows), num_generations):
            trajectories = [row["trajectory"] for row in rows[start : start + num_generations]]
            utility = passage_utility(trajectories, outcomes[start : start + num_generations].tolist())
            for i, trajectory in enumerate(trajectories, start):
                for k, turn in enumerate(trajectory.turns):
                    scores[i, k] = max((utility[passage.id] for passage in turn.passages), default=0.0)
        # Normalised over all turns of the group
        none = torch.zeros_like(outcomes).masked_fill(outcomes.isnan(), torch.nan)
        added = turn_advantages(scores, none, num_generations=num_generations, level="turn", baseline="group")
        mixed = torch.where(whole.ne(0).any(dim=1, keepdim=True), whole + self.strength * added, whole)
        return rewards, torch.where(by_turn[:, None], advantages, mixed), torch.ones_like(by_turn)


def passage_utility(trajectories: Sequence[Trajectory], outcomes: Sequence[float]) -> dict[str, float]:
    """The mean outcome of the rollouts with a passage minus that of the others, by the passage's id."""
    retrieved = [{passage.id for turn in t.turns for passage in turn.passages} for t in trajectories]
    utility = {}
    for passage in set().union(*retrieved):
        sides = {True: [], False: []}
        for ids, outcome in zip(retrieved, outcomes, strict=True):
            if outcome == outcome:  # not NaN
                sides[passage in ids].append(outcome)
        utility[passage] = fmean(sides[True]) - fmean(sides[False]) if all(sides.values()) else 0.0
    return utility


class InformationGainTrainer(TSPOTrainer):
    """
    Trainer with the turn rewards of IGPO (arXiv 2510.14967): the increase, by a turn and its passages, of the probability that
    the policy gives to the golden answer; for the last turn, the outcome. Rewards are normalised over all turns of the group, and
    the advantage of a turn is the sum of the normalised rewards from this turn on. Each turn costs a forward pass.
    """

    def compute_turn_advantages(self, outcomes, first_occurrence, num_turns, *, num_generations, rows, **kwargs):
        turn = torch.arange(int(num_turns.max()), device=outcomes.device)
        rewards = torch.full((len(rows), len(turn)), torch.nan, device=outcomes.device)
        for i, row in enumerate(rows):
            gains = answer_probabilities(self, row["trajectory"], row["golden_answers"][0]).diff()
            rewards[i, : len(gains)] = gains
            rewards[i, len(gains)] = outcomes[i]
        by_turn = turn_advantages(rewards, outcomes, num_generations=num_generations, level="turn", baseline="group")
        later = by_turn.flip(1).cumsum(1).flip(1).masked_fill(rewards.isnan(), 0.0)
        return rewards, later, torch.ones_like(outcomes, dtype=torch.bool)


@torch.no_grad()
def answer_probabilities(trainer: TSPOTrainer, trajectory: Trajectory, gold: str) -> torch.Tensor:
    """
    The probability of the golden answer, as the geometric mean over its tokens, before the first turn and after every turn
    but the last. Shape (K,).
    """
    tokenizer, device = trainer.processing_class, trainer.accelerator.device
    start, answer = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("<answer>", f"{gold}</answer>")
    )
    contexts, ids = [list(trajectory.prompt_ids)], list(trajectory.prompt_ids)
    for done in trajectory.turns[:-1]:
        ids = [*ids, *done.token_ids, *done.observation_ids]
        contexts.append(ids)
    width = max(map(len, contexts)) + len(start) + len(answer)
    tokens = torch.zeros(len(contexts), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, context in enumerate(contexts):  # padded on the left: the answer is at the same columns in all rows
        whole = [*context, *start, *answer]
        tokens[row, -len(whole) :], mask[row, -len(whole) :] = torch.tensor(whole), 1
    logits = trainer.model(input_ids=tokens.to(device), attention_mask=mask.to(device)).logits
    logps = logits[:, -len(answer) - 1 : -1].float().log_softmax(dim=-1)
    return logps.gather(2, tokens[:, -len(answer) :, None].to(device)).squeeze(2).mean(dim=1).exp()


@dataclass(frozen=True)
class Arm:
    """
    A method of credit assignment.

    Args:
        title (`str`):
            Name of the arm in tables.
        settings (`dict[str, Any]`):
            Options of `TSPOConfig`.
        rewards (`tuple`, *optional*):
            Reward functions. If there are several, `settings` contains their weights.
        trainer (`type`, *optional*):
            The trainer class.
        regimes (`tuple[str, ...]` or `None`, *optional*):
            Regimes in which the arm can differ from `same_as`. `None` means all regimes.
        same_as (`str`, *optional*):
            The arm with exactly the same rollouts in all other regimes.
    """

    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    rewards: tuple = (exact_match_reward,)
    trainer: type[TSPOTrainer] = TSPOTrainer
    regimes: tuple[str, ...] | None = None
    same_as: str | None = None


GRPO = "grpo"
TSPO = "tspo"
#: The arm with the defaults of the library, about which the published intervals make claims.
DEFAULT = "chance"

#: TSPO as published: all options that affect credit, so that the study does not depend on the library's defaults.
TSPO_SETTINGS = {
    "advantage_level": "stage",
    "folr_placement": "first",
    "folr_guard": "degenerate",
    "folr_alpha": 0.5,
    "turn_baseline": "turn",
}

#: The arms, in the order of the tables.
ARMS = {
    GRPO: Arm("GRPO", {"advantage_level": "trajectory"}),
    "merged": Arm(
        "GRPO, near miss in the outcome",
        {"advantage_level": "trajectory", "reward_weights": [1.0, NEAR_MISS]},
        rewards=(exact_match_reward, near_miss_reward),
    ),
    TSPO: Arm("TSPO as published"),
    "turn": Arm("turn level always", {"advantage_level": "turn"}),
    "up_to_first": Arm("TSPO, up to first", {"folr_placement": "up_to_first"}),
    "group": Arm("TSPO, group baseline", {"turn_baseline": "group"}),
    DEFAULT: Arm("TSPO, guard chance", {"folr_guard": "chance"}),
    "strict": Arm("TSPO, guard strict", {"folr_guard": "strict"}),
    # Only the control has single-character answers, so in all other regimes the guard has no effect
    "no_guard": Arm("TSPO, guard none", {"folr_guard": "none"}, regimes=("misleading",), same_as=TSPO),
    "modulated": Arm("chance, and evidence in mixed groups", {"folr_guard": "chance"}, trainer=ModulatedTrainer),
    "utility": Arm("chance, and passage utility", {"folr_guard": "chance"}, trainer=PassageUtilityTrainer),
    # The exact match has no weight: it is only measured
    "graded": Arm(
        "chance, outcome F1",
        {"folr_guard": "chance", "reward_weights": [0.0, 1.0]},
        rewards=(exact_match_reward, f1_reward),
    ),
    "igpo": Arm("information gain, after IGPO", {"advantage_level": "turn"}, trainer=InformationGainTrainer),
    "evidence": Arm("TSPO, supporting title", trainer=EvidenceTrainer),
    "two_segment": Arm("two segments, after MT-GRPO", {"advantage_level": "trajectory"}, trainer=TwoSegmentTrainer),
}
