"""Turns as the chat template writes them: the text from the first token of the model to the token that ends its message."""

from collections.abc import Iterator
from typing import Any

from .chat_format import ANSWER, QUERY, USER, Chat, ChatFormat
from .trajectory import Action


def written_turns(
    chat: Chat, found: ChatFormat, action: Action, content: str, *, after_response: bool
) -> Iterator[str]:
    """
    Write a message with an action, without a thought. Where the template opens a thought, it is closed at once.

    Args:
        chat ([`Chat`]):
            Renders the conversation.
        found ([`ChatFormat`]):
            The format of its messages.
        action (`str`):
            `"search"` or `"answer"`.
        content (`str`):
            The query or the answer.
        after_response (`bool`):
            Whether the message follows a response of the tool. Otherwise it follows the question.

    Yields:
        `str`: Candidates for the text. The first that parses as this action is the template's form.
    """
    chat.render_call(QUERY, ANSWER)  # finds out which form of arguments the template takes
    earlier: list[Any] = [USER, chat.call(QUERY), chat.response(ANSWER)] if after_response else [USER]
    # Some templates end a call only when its response follows
    if action == "search":
        last, end = [chat.call(content), chat.response(ANSWER)], found.call_end
    else:
        last, end = [{"role": "assistant", "content": content}], found.answer_end
    start, whole = chat.render(earlier, start=True), chat.render([*earlier, *last])
    end_text = str(chat.tokenizer.convert_ids_to_tokens(end))
    same = next((n for n, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), len(start))
    if (tag := start.rfind("<", 0, same)) > start.rfind(">", 0, same):
        same = tag  # two tags that begin alike
    text = whole[same:].partition(end_text)[0] + end_text
    yield text
    if found.thought is not None:
        yield f"{found.thought.close}\n\n{text}"
