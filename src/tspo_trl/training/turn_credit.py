"""Turn credit in training: facts of the rollouts, turn rewards, advantages of tokens, and what is logged of them."""

from typing import Any

import torch
from accelerate.utils import gather, gather_object

from ..chance import POOL_SEARCHES, PooledRollout, SearchPool, chance_hits, chance_weights
from ..credit import (
    Scale,
    eligible_golds,
    first_occurrence,
    folr_rewards,
    folr_turns,
    has_variance,
    summed_turn_advantages,
    token_advantages,
    turn_advantages,
    uses_turn_level,
)
from ..rollout.facts import RolloutFacts, rollout_facts
from ..rollout.trajectory import Trajectory
from ..scoring import contains_answer
from .config import TSPOConfig
from .forward import sampled_logps
from .generation import show_texts
from .masking import keep_ratios_finite, mean_trained_advantages, replace_last
from .metrics import add_metrics, chance_metrics, mean_logprob, rollout_metrics
from .rounds import replace_without_signal


class TurnCreditMixin:
    """
    Turn credit of a [`~trl.GRPOTrainer`] whose completions are search rollouts.

    The changes with respect to [`~trl.GRPOTrainer`] are:

    - Reward functions get the rollouts, and a rollout whose retrieval failed has no reward.
    - Every token gets the advantage of its turn.
    - With `dynamic_sampling`, groups without a signal are replaced.
    - Rollouts are logged with their turn rewards and turn advantages.
    """

    args: TSPOConfig
    accelerator: Any
    model: Any
    state: Any
    num_generations: int
    num_generations_eval: int
    scale_rewards: Scale
    reward_weights: torch.Tensor
    log_completions: bool
    search_loop: Any
    _metrics: Any
    _logs: Any
    _compact: bool
    _count_once: Any  # method of the trainer: add a batch to the running evaluation
    _log_rollouts: Any  # method of the trainer: append rollouts to the log
    _further_rollouts = 0  # of all ranks that the step has sampled before this round, with `dynamic_sampling`
    _pool: SearchPool | None = None  # searches of this process, made with the first step

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        # TRL names the arguments of reward functions after columns; the plural is for a list, as in `prompts`
        renamed = [{"trajectories" if key == "trajectory" else key: row[key] for key in row} for row in inputs]
        rewards_per_func = super()._calculate_rewards(renamed, prompts, completions, completion_ids_list)  # type: ignore[misc]
        failed = [row["trajectory"].status == "retrieval_failed" for row in inputs]
        rewards_per_func[gather(torch.tensor(failed, device=rewards_per_func.device))] = torch.nan
        self._rewards_per_func = rewards_per_func  # of all ranks, needed for the turn credit
        return rewards_per_func

    def compute_turn_advantages(
        self,
        outcomes: torch.Tensor,
        first_occurrence: torch.Tensor,
        num_turns: torch.Tensor,
        *,
        num_generations: int,
        success_threshold: float,
        turn_weights: torch.Tensor,
        rows: list[dict[str, Any]],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Compute the credit of every turn from the options of the configuration. Override this method to try another
        credit assignment. An override that does not need all arguments takes the rest as `**kwargs`.

        Args:
            outcomes (`torch.Tensor`):
                Outcome rewards of the N rollouts of all ranks, shape (N,), NaN for rollouts without an
                outcome. The G rollouts of a group are adjacent.
            first_occurrence (`torch.Tensor`):
                The 0-based turn whose passages first contain a golden answer accepted by `folr_guard`, integers of shape
                (N,), -1 if there is none.
            num_turns (`torch.Tensor`):
                Number of turns of each rollout, integers of shape (N,).
            num_generations (`int`):
                Number of rollouts in a group, G.
            success_threshold (`float`):
                A rollout is correct if its outcome is at least this.
            turn_weights (`torch.Tensor`):
                How much the finds of each group count, shape (N / G,), see
                [`~tspo_trl.chance.chance_weights`]. All are 1 unless `folr_guard="chance"`.
            rows (`list[dict]`):
                The B rollouts of this process: rows of the data set, each with its `trajectory` ([`Trajectory`]). They are
                the rollouts `r * B` to `(r + 1) * B - 1` of the N, where r is the index of the process. Use
                `accelerate.utils.gather` for what is computed from them.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Turn rewards of shape (N, K), NaN where a rollout has no
            k-th turn, which are logged; turn advantages of shape (N, K); and booleans of shape (N,), true for rollouts that are
            trained with turn advantages. The others are trained with the advantage that TRL computes for the rollout.
        """
        args = self.args
        placed: Any = {"placement": args.folr_placement, "success_threshold": success_threshold}
        rewards = folr_rewards(outcomes, first_occurrence, num_turns, alpha=args.folr_alpha, **placed)
        stage: Any = {
            "num_generations": num_generations,
            "level": args.advantage_level,
            "success_threshold": success_threshold,
        }
        by_turn = uses_turn_level(outcomes, **stage) & (turn_weights > 0).repeat_interleave(num_generations)
        stage["turn_weights"] = turn_weights
        if args.multi_objective_aggregation == "normalize_then_sum":
            paid = folr_turns(outcomes, first_occurrence, num_turns, **placed)
            advantages = summed_turn_advantages(
                paid,
                outcomes,
                self._trajectory_advantages,
                alpha=args.folr_alpha,
                baseline=args.turn_baseline,
                **stage,
            )
        else:
            advantages = turn_advantages(
                rewards, outcomes, baseline=args.turn_baseline, scale_rewards=self.scale_rewards, **stage
            )
        return rewards, advantages, by_turn

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        # TRL generates, and computes rewards and trajectory advantages. Each row then holds its trajectory
        roll_out = super()._generate_and_score_completions  # type: ignore[misc]
        output = self._assign_credit(inputs, roll_out(inputs))
        if self.args.dynamic_sampling and self.model.training:
            output = replace_without_signal(self, output, lambda rows: self._assign_credit(rows, roll_out(rows)))
        return output

    def _assign_credit(self, inputs: list[dict[str, Any]], output: dict[str, Any]) -> dict[str, Any]:
        """Replace the advantages of TRL in `output`, the inputs of the loss, by those of the turns, and log the rollouts."""
        trajectory_advantages = output["advantages"]
        mode = "train" if self.model.training else "eval"
        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        groups: Any = {"num_generations": num_generations, "success_threshold": self.args.success_threshold}
        start = self.accelerator.process_index * len(inputs)
        local = slice(start, start + len(inputs))

        # Turn credit, over the rollouts of all ranks, because a group may span several ranks
        outcomes = self._outcomes()
        self._trajectory_advantages = self._without_residue(gather(trajectory_advantages), outcomes, num_generations)
        facts = gather(torch.tensor([self._facts(row) for row in inputs], device=outcomes.device))
        by_fact: Any = RolloutFacts(*facts.unbind(dim=1))
        chance, weights = self._chance(inputs, by_fact, outcomes, num_generations)
        credit = self.compute_turn_advantages(
            outcomes, by_fact.credited, by_fact.turns, **groups, turn_weights=weights, rows=inputs
        )
        turn_rewards, advantages, uses_turns = check_credit(credit, outcomes, by_fact.turns)

        # Metrics, over the rollouts of all ranks
        logps = [mean_logprob(row["trajectory"]) for row in inputs]
        logps = gather(torch.tensor(logps, device=outcomes.device))
        has_signal = torch.where(uses_turns, (advantages != 0).any(dim=1), self._trajectory_advantages != 0)
        add_metrics(self._metrics[mode], rollout_metrics(facts, outcomes, has_signal, logps, **groups))

        # Token advantages: those of the turn, or TRL's advantage of the rollout, to which all options of TRL apply
        local_advantages = torch.where(uses_turns[local, None], advantages[local], trajectory_advantages[:, None])
        local_advantages = local_advantages.masked_fill(turn_rewards[local].isnan(), 0.0)
        if self.args.advantage_level != "trajectory" or uses_turns.any():
            turn_index = self._turn_index(inputs, output["completion_ids"])
            output["advantages"] = token_advantages(local_advantages, turn_index)

        keep_ratios_finite(output)
        if self._compact:
            output["sampled_logps"] = sampled_logps([row["trajectory"] for row in inputs], output["completion_ids"])

        # `log_completions` shows the advantages of training, and rollouts as texts. TRL has appended its own
        replace_last(self._logs["advantages"], gather(mean_trained_advantages(output)).tolist())
        if self.log_completions:
            show_texts(self._logs, inputs, self.search_loop.protocol)

        # Log of the rollouts. An evaluation counts and logs every rollout once
        before, kept = self._count_once(facts, outcomes, has_signal, logps, self._rewards_per_func)
        if self.args.log_trajectories:
            of_groups = (x.repeat_interleave(num_generations) for x in (chance, weights))
            of_rollouts = (self._rewards_per_func, outcomes, facts, turn_rewards)
            columns = [*(x[local] for x in of_rollouts), local_advantages, *(x[local] for x in of_groups)]
            rows = inputs[: max(kept - start, 0)]
            first = before + self._further_rollouts + start
            self._log_rollouts(rows, columns, num_generations, first)
        return output

    def _chance(
        self, rows: list[dict[str, Any]], facts: Any, outcomes: torch.Tensor, num_generations: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        How often chance finds a golden answer of each group of all ranks, and the weight of its turn advantages, both of
        shape (N / G,), see [`~tspo_trl.chance.chance_weights`]. NaN and 1 in an evaluation.
        """
        if not self.model.training:
            size = len(outcomes) // num_generations
            return outcomes.new_full((size,), torch.nan), outcomes.new_ones(size)
        pool = self._search_pool()
        pool.add([pooled_rollout(row) for row in rows])
        # Every rank counts in its own searches, for the questions of all ranks
        questions = gather_object([(row["question"], list(row["golden_answers"])) for row in rows])[::num_generations]
        counts = [
            pool.count(question, golds, eligible_golds(golds, question=question, guard=self.args.folr_guard))
            for question, golds in questions
        ]
        found, searches = self.accelerator.reduce(torch.tensor(counts, device=outcomes.device), "sum").unbind(dim=1)
        chance = found / searches.clamp(min=1)  # 0 without other questions: then all finds count
        groups: Any = {"num_generations": num_generations}
        hits = chance_hits(chance, facts.searches - facts.failed, **groups)
        weights = chance_weights(facts.credited >= 0, hits, ~outcomes.isnan(), **groups)
        metrics = chance_metrics(hits, weights, facts.credited >= 0, outcomes, **groups)
        add_metrics(self._metrics["train"], metrics)
        return chance, weights if self.args.folr_guard == "chance" else torch.ones_like(weights)

    def _search_pool(self) -> SearchPool:
        if self._pool is None:
            self._pool = SearchPool(max(POOL_SEARCHES // self.accelerator.num_processes, 1))
        return self._pool

    def _resumed_state(self) -> dict[str, Any]:
        return {"pool": self._search_pool().state()}

    def _resume_state(self, state: dict[str, Any]) -> None:
        self._search_pool().load_state(state.get("pool", ()))

    def _outcomes(self) -> torch.Tensor:
        """The outcome rewards of the N rollouts of all ranks, shape (N,), NaN if no reward function returned a value."""
        rewards = self._rewards_per_func
        outcomes = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        return outcomes.masked_fill(rewards.isnan().all(dim=1), torch.nan)

    def _without_residue(self, advantages: torch.Tensor, outcomes: torch.Tensor, num_generations: int) -> torch.Tensor:
        """TRL's advantages, exactly 0 in groups without variance, where TRL may leave the rounding error of a mean."""
        one_by_one = self.args.multi_objective_aggregation == "normalize_then_sum"
        values = self._rewards_per_func * self.reward_weights.to(outcomes.device) if one_by_one else outcomes[:, None]
        return advantages.masked_fill(~has_variance(values, num_generations), 0.0)

    def _facts(self, row: dict[str, Any]) -> RolloutFacts:
        trajectory: Trajectory = row["trajectory"]
        golds, texts, guard = row["golden_answers"], trajectory.passage_texts, self.args.folr_guard
        # Metrics always use the same golden answers, so that runs with different guards can be compared
        occurrence = first_occurrence(texts, golds)
        credited = occurrence
        if guard in ("none", "strict"):
            rule: Any = {"question": row["question"], "queries": trajectory.queries, "guard": guard}
            credited = first_occurrence(texts, golds, **rule)
        usable = eligible_golds(golds)
        evidence = 0 if occurrence is None else sum(contains_answer(text, usable) for text in texts[occurrence:])
        return rollout_facts(trajectory, occurrence, credited, evidence)

    def _turn_index(self, rows: list[dict[str, Any]], completion_ids: torch.Tensor) -> torch.Tensor:
        """The 0-based turn of each completion token of the local rollouts, shape (B, L), -1 on observations and padding."""
        turn_index = torch.full(completion_ids.shape, -1, device=completion_ids.device)
        for i, row in enumerate(rows):
            index = row["trajectory"].turn_index
            turn_index[i, : len(index)] = torch.tensor(index)
        return turn_index


def pooled_rollout(row: dict[str, Any]) -> PooledRollout:
    """The searches of a rollout that were executed, from a row of the data set with its `trajectory`."""
    turns = row["trajectory"].turns
    texts = [turn.passage_text for turn in turns if turn.retrieval in ("ok", "empty")]
    return PooledRollout(row["question"], row["golden_answers"], texts)


def check_credit(
    credit: tuple[torch.Tensor, torch.Tensor, torch.Tensor], outcomes: torch.Tensor, num_turns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Check what [`TSPOTrainer.compute_turn_advantages`] returned, which users override.

    Args:
        credit (`tuple[torch.Tensor, torch.Tensor, torch.Tensor]`):
            Turn rewards, turn advantages, and the rollouts that are trained with them.
        outcomes (`torch.Tensor`):
            Outcome rewards of shape (N,).
        num_turns (`torch.Tensor`):
            Number of turns of each rollout, shape (N,).

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: The same.

    Raises:
        `ValueError`: If they are not three tensors of the shapes (N, K), (N, K) and (N,), the last does not hold booleans, or an
            advantage is NaN or infinite.
    """
    turns = (len(outcomes), int(num_turns.max()))
    expected = {"turn rewards": turns, "turn advantages": turns, "rollouts that use them": turns[:1]}
    found = [_shape(value) for value in credit] if isinstance(credit, tuple) else _shape(credit)
    if found != list(expected.values()):
        shapes = ", ".join(f"{name} of shape {shape}" for name, shape in expected.items())
        raise ValueError(f"`compute_turn_advantages` must return a tuple of {shapes}; got {found}.")
    if credit[2].dtype != torch.bool:
        raise ValueError(
            "`compute_turn_advantages` must return booleans for the rollouts that use turn advantages, got "
            f"{credit[2].dtype}."
        )
    if not credit[1].isfinite().all():
        raise ValueError(
            "`compute_turn_advantages` returned advantages that are NaN or infinite. Turns that a rollout does not have, and "
            "rollouts without an outcome (NaN), must have the advantage 0."
        )
    return credit


def _shape(value: Any) -> Any:
    """The shape of a tensor, or the type of any other value."""
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
