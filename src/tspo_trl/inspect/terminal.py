"""The inspector in a terminal, for machines without a browser."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.console import Group as Lines
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .load import Group, Run
from .spans import find_answers
from .view import step_values
from .why import composition, explain_group, explain_turn, is_correct, show, shown_golds

_KINDS = {
    "all_wrong": ("all wrong", "dim"),
    "rescued": ("all wrong, rescued", "yellow"),
    "mixed": ("mixed", "cyan"),
    "all_correct": ("all correct", "green"),
    "unscored": ("not scored", "dim"),
}


def print_run(run: Run, console: Console, *, mode: str | None = None, group: int | None = None) -> None:
    """
    Print the groups of the last step of a run, and one group in detail.

    Args:
        run ([`Run`]):
            The run, see [`load_run`].
        console (`rich.console.Console`):
            Console to print to.
        mode (`str`, *optional*):
            `"train"` or `"eval"`. Defaults to the first mode of the run.
        group (`int`, *optional*):
            Number of the group to show, from 1. Defaults to the first group with an advantage.

    Raises:
        `ValueError`: If the run has no such mode or group.
    """
    mode = next(iter(run.modes)) if mode is None else mode
    if mode not in run.modes:
        raise ValueError(f"`mode` must be one of {list(run.modes)}, got {mode!r}.")
    step = run.modes[mode][-1].step
    groups = [one for one in run.modes[mode] if one.step == step]
    if group is None:
        learns = [any(any(record["turn_advantages"]) for record in one.rollouts) for one in groups]
        group = learns.index(True) + 1 if any(learns) else 1
    if not 1 <= group <= len(groups):
        raise ValueError(f"`group` must be between 1 and {len(groups)} at step {step}, got {group}.")
    for note in run.notes:
        console.print(Text(f"Note: {note}", style="yellow"))
    place = "evaluation" if groups[0].only_scored else f"{mode} step {step}"
    console.print(_step_table(groups, run.settings, f"{run.name}: {place}", group))
    console.print()
    print_group(groups[group - 1], run.settings, console)


def _step_table(groups: Sequence[Group], settings: Mapping[str, Any], title: str, chosen: int) -> Table:
    values = step_values(list(groups), settings)
    names = {
        "reward": "reward",
        "hit": "found",
        "near_miss": "near misses",
        "all_wrong": "groups all wrong",
        "turns": "turns",
    }
    caption = " · ".join(f"{label} {show(v)}" for name, label in names.items() if (v := values[name]) is not None)
    table = Table(title=Text(title), caption=Text(caption), title_justify="left", caption_justify="left")
    table.add_column("", justify="right")
    table.add_column("question", ratio=1)
    table.add_column("rollouts")
    table.add_column("composition")
    for number, group in enumerate(groups, start=1):
        label, style = _KINDS[composition(group, settings)]
        dots = Text.assemble(*(_dot(record, settings) for record in group.rollouts))
        mark = "▸" if number == chosen else ""
        table.add_row(Text(f"{mark}{number}"), Text(group.question), dots, Text(label, style=style))
    return table


def _dot(record: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[str, str]:
    if record["outcome"] is None:
        return "·", "dim"
    if is_correct(record, settings):
        return "●", "green"
    return ("◐", "yellow") if record["first_occurrence"] is not None else ("○", "dim")


def print_group(group: Group, settings: Mapping[str, Any], console: Console) -> None:
    """
    Print a group: its rollouts turn by turn, with rewards, advantages and the reasons for them.

    Args:
        group ([`Group`]):
            The group.
        settings (`Mapping`):
            The settings of rewards and advantages.
        console (`rich.console.Console`):
            Console to print to.
    """
    golds = shown_golds(group, settings)
    console.print(Text(group.question, style="bold"))
    console.print(Text(f"Golden answers: {' · '.join(group.golden_answers)}", style="dim"))
    console.print(Text(explain_group(group, settings)))
    console.print(
        Text(
            "● correct  ◐ near miss: found a golden answer, answered wrong  ○ wrong  │ "
            + ("read" if group.mode == "eval" else "read, not trained"),
            style="dim",
        )
    )
    for place, record in enumerate(group.rollouts):
        parts: list[Any] = []
        for k, turn in enumerate(record["trajectory"].turns):
            reward, advantage = record["turn_rewards"][k], record["turn_advantages"][k]
            head = Text(f"Turn {k + 1}  ", style="bold")
            head.append(f"reward {'–' if reward is None else show(reward)}  ")
            style = "bold blue" if (advantage or 0) > 0 else "bold red" if (advantage or 0) < 0 else "dim"
            head.append(f"advantage {'–' if advantage is None else show(advantage, sign=True)}", style=style)
            if turn.action == "invalid" or turn.retrieval in ("empty", "timeout", "error"):
                head.append(
                    f"  {turn.action if turn.action == 'invalid' else 'search: ' + str(turn.retrieval)}", style="red"
                )
            if record["first_occurrence"] == k:
                head.append("  golden answer first found here", style="yellow")
            parts += [head, _marked(turn.text.strip(), golds)]
            for passage in turn.passages:
                shown = Text("│ ", style="dim") + _marked(f"{passage.title}  {passage.text}".replace("\n", " "), golds)
                parts.append(Padding(shown, (0, 0, 0, 2)))
            parts += [
                Padding(Text(sentence, style="italic"), (0, 0, 0, 2))
                for sentence in explain_turn(group, place, k, settings)
            ]
        status = record["trajectory"].status.replace("_", " ")
        outcome = "not scored" if record["outcome"] is None else f"outcome {show(record['outcome'])}"
        title = Text.assemble(_dot(record, settings), f" Rollout {place + 1}: {outcome}, {status}")
        console.print(Panel(Lines(*parts), title=title, title_align="left"))


def _marked(text: str, golds: list[str]) -> Text:
    shown = Text(text)
    for begin, end in find_answers(text, golds):
        shown.stylize("black on yellow", begin, end)
    return shown
