"""Records of rollouts in the format of a training run."""

from tspo_trl import Passage, Trajectory, Turn
from tspo_trl.credit import first_occurrence

SETTINGS = {"advantage_level": "stage", "folr_alpha": 0.5, "success_threshold": 1.0}


def search(query, *texts, retrieval="ok"):
    passages = [Passage(f"p{i}", f"Title {i}", text, 1.0 - i / 4) for i, text in enumerate(texts)]
    return Turn(
        token_ids=[1, 2],
        logprobs=[-0.5, -0.25],
        text=f"<search>{query}</search>",
        action="search",
        content=query,
        observation_ids=[3] * 5,
        passages=passages,
        retrieval=retrieval,
    )


def answer(text):
    return Turn(token_ids=[4], logprobs=[-1.0], text=f"<answer>{text}</answer>", action="answer", content=text)


def record(turns, rewards, advantages, *, outcome=0.0, golds=("Oslo",), status="answered", place=(0, 0, 0), **changes):
    trajectory = Trajectory(prompt_ids=[9], turns=turns, status=status)
    found = first_occurrence(trajectory.passage_texts, golds)
    step, group, rollout = place
    return {
        "step": step,
        "group": group,
        "rollout": rollout,
        "question": "Where was she born?",
        "golden_answers": list(golds),
        "rewards": {"exact_match_reward": outcome},
        "outcome": outcome,
        "first_occurrence": found,
        "credited_turn": found,
        "turn_rewards": rewards,
        "turn_advantages": advantages,
        "trajectory": trajectory,
        **changes,
    }


def rescued_group(step=0, group=0):
    """Two incorrect rollouts. The second one finds the answer in its first turn."""
    z = 0.5 / (2**0.5 * 0.25 + 1e-4) / 2
    return [
        record([search("her", "nothing"), answer("Rome")], [0.0, 0.0], [-z, 0.0], place=(step, group, 0)),
        record([search("her birth", "In Oslo, 1900"), answer("Rome")], [0.5, 0.0], [z, 0.0], place=(step, group, 1)),
    ]


def mixed_group(step=0, group=1):
    z = 0.5 / (2**0.5 * 0.5 + 1e-4)
    return [
        record([search("her", "Oslo"), answer("Oslo")], [1.0, 1.0], [z, z], outcome=1.0, place=(step, group, 0)),
        record([search("her", "Oslo"), answer("Rome")], [0.5, 0.0], [-z, -z], place=(step, group, 1)),
    ]
