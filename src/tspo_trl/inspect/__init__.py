"""The inspector: the rollouts of a run and the reasons for their rewards. May import: `credit`, `scoring`, `rollout`."""

from .load import Group, Run, load_run, parse_steps
from .view import describe
from .why import explain_group, explain_turn
from .write import render_page, write_page

__all__ = [
    "Group",
    "Run",
    "describe",
    "explain_group",
    "explain_turn",
    "load_run",
    "parse_steps",
    "render_page",
    "write_page",
]
