"""The chat templates of TRL that render tool calls, by family: what a model writes in them and what it reads.

`PYTHONPATH=src:tests python -m helpers.families` prints the table of docs/protocols.md; with `--time`, the time to read a turn.
"""

import html
import json
import sys
import time
from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl import chat_template_utils as trl_templates

from helpers.passages import WORDS
from tspo_trl import ToolCallProtocol
from tspo_trl.rollout.tool_call import HINT, PROMPT, SEARCH_TOOL

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
JSON_CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "%s"}}\n</tool_call>'
XML_CALL = "<tool_call>\n<function=search>\n<parameter=query>\n%s\n</parameter>\n</function>\n</tool_call>"
GLM_CALL = "<tool_call>search\n<arg_key>query</arg_key>\n<arg_value>%s</arg_value>\n</tool_call>"
LLAMA_CALL = '{"name": "search", "parameters": {"query": "%s"}}'
GEMMA_CALL = '<|tool_call>call:search{query:<|"|>%s<|"|>}<tool_call|>'
GPT_OSS_CALL = ' to=functions.search<|channel|>commentary json<|message|>{"query": "%s"}'
CHATML = ["<|im_start|>", "<|im_end|>"]
GEMMA = ["<|turn>", "<turn|>", '<|"|>', "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>"]


@dataclass(frozen=True)
class Family:
    """What a model of a family writes."""

    models: str
    templates: tuple[str, ...]
    special: tuple[str, ...]  # the special tokens
    call: str
    call_end: str
    answer_end: str
    other_ends: tuple[str, ...] = ()  # further tokens that end generation
    added: tuple[str, ...] = ()  # added tokens that are not special
    answer: str = "%s"
    thought: str | None = "<think>\n%s\n</think>\n\n"
    open_thought: str = "<think>\n%s"
    opened: bool = False  # by the template, before the first token of the model


TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
OPENED = {"thought": "%s\n</think>\n\n", "open_thought": "%s", "opened": True}
IM = {"call_end": "<|im_end|>", "answer_end": "<|im_end|>", "other_ends": ("<|endoftext|>",)}
QWEN = {**IM, "special": (*CHATML, "<|endoftext|>"), "added": TAGS}
GEMMA4 = {
    "special": (*GEMMA, "<tool_response|>", "<|channel>", "<channel|>", "<|think|>", "<bos>", "<eos>"),
    "call": GEMMA_CALL,
    "other_ends": ("<eos>",),
    "thought": "<|channel>thought\n%s\n<channel|>",
    "open_thought": "<|channel>thought\n%s",
}

FAMILIES = [
    Family("Qwen2.5", ("qwen2_5",), call=JSON_CALL, **{**QWEN, "added": TAGS[:2]}),
    Family("Qwen3", ("qwen3",), call=JSON_CALL, **QWEN),
    Family("Qwen3-2507, Qwen3-VL", ("qwen3_instruct_2507", "qwen3_vl"), call=JSON_CALL, **QWEN),
    Family("Qwen3.5 without thoughts", ("qwen3_5_nothink",), call=XML_CALL, **QWEN),
    Family("Qwen3.5, Qwen3.6", ("qwen3_5_think", "qwen3_6"), call=XML_CALL, **QWEN, **OPENED),
    Family("Qwen3.8", ("qwen3_8",), call=XML_CALL, **QWEN, **OPENED),
    Family(
        "Nemotron 3, 3.5",
        ("nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "nemotron_3_5_lightning"),
        call=XML_CALL + "\n",
        **QWEN,
        **OPENED,
    ),
    Family(
        "GLM-4.5",
        ("glm4moe",),
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
        GLM_CALL,
        "<|observation|>",
        "<|user|>",
        ("<|endoftext|>",),
        (*TAGS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        thought="\n<think>%s</think>\n",
        open_thought="\n<think>%s",
    ),
    Family(
        "Llama 3.1, 3.2",
        ("llama3_1", "llama3_2"),
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
        LLAMA_CALL,
        "<|eot_id|>",
        "<|eot_id|>",
        ("<|eom_id|>",),
        thought=None,
    ),
    Family(
        "gpt-oss",
        ("gptoss",),
        (
            "<|start|>",
            "<|end|>",
            "<|message|>",
            "<|channel|>",
            "<|call|>",
            "<|return|>",
            "<|constrain|>",
            "<|endoftext|>",
        ),
        GPT_OSS_CALL,
        "<|call|>",
        "<|return|>",
        ("<|endoftext|>",),
        answer="<|channel|>final<|message|>%s",
        thought="<|channel|>analysis<|message|>%s<|end|><|start|>assistant",
        open_thought="<|channel|>analysis<|message|>%s",
    ),
    Family(
        "Gemma 4",
        ("gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5"),
        call_end="<|tool_response>",
        answer_end="<turn|>",
        **GEMMA4,
    ),
    Family("Gemma 4, second template", ("gemma4_v2",), call_end="<turn|>", answer_end="<turn|>", **GEMMA4),
]
FAMILY = {name: family for family in FAMILIES for name in family.templates}
# Refused: TRL has no response template for them, or reads their calls wrongly
UNREADABLE = ["deepseekv3", "diffusion_gemma", "muse_glimmer"]
WRONG = ["lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl", "lfm2_v2"]


@cache
def _trained():
    """A byte-level BPE without added tokens, as text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [WORDS, PROMPT, HINT, json.dumps(SEARCH_TOOL), "Doc 1 (Title: Rome) one.\n\nDoc 2 two:\n"]
    tokenizer.train_from_iterator(texts * 3, trainer)
    return tokenizer.to_str()


def template_text(name):
    return getattr(trl_templates, f"{name}_chat_template")


def make_family_tokenizer(name):
    """A tokenizer with the control tokens of a family and a chat template of it."""
    family = FAMILY[name.removesuffix("_training")]
    tokenizer = Tokenizer.from_str(_trained())
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in family.special])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in family.added])
    first = {"bos_token": family.special[0]} if family.special[0] in ("<|begin_of_text|>", "<bos>") else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=family.answer_end, pad_token="<pad>", **first)
    fast.chat_template = template_text(name)
    return fast


def end_ids(tokenizer, name):
    """The tokens that end generation."""
    family = FAMILY[name.removesuffix("_training")]
    ends = dict.fromkeys([family.answer_end, family.call_end, *family.other_ends])
    return tokenizer.convert_tokens_to_ids(list(ends))


@cache
def make_family_protocol(name, **options):
    tokenizer = make_family_tokenizer(name)
    return ToolCallProtocol(tokenizer, eos_token_ids=end_ids(tokenizer, name), chat_template_kwargs=options)


def rendered_thoughts(name):
    """What becomes of earlier thoughts when the template renders a conversation anew."""
    tokenizer = make_family_tokenizer(name)
    thoughts = [
        dict.fromkeys(("reasoning_content", "thinking", "reasoning"), text) for text in ("first thought", "second")
    ]
    call = {"type": "function", "function": {"name": "search", "arguments": {"query": "x"}}}
    first, second = ({"role": "assistant", "content": "", "tool_calls": [call], **thought} for thought in thoughts)
    answer = {"role": "assistant", "content": "x", **thoughts[1]}
    user, response = {"role": "user", "content": "x"}, {"role": "tool", "name": "search", "content": "x"}
    texts = [
        tokenizer.apply_chat_template(messages, tools=[SEARCH_TOOL], tokenize=False)
        for messages in ([user, first, response, second, response], [user, first, response, answer, user])
    ]
    kept = ["first thought" in text for text in texts]
    return {(True, True): "kept", (True, False): "kept until the next question", (False, False): "left out"}[*kept]


def _code(text):
    """Text as code in a cell: Markdown ends a cell at a bar, so it is written in HTML."""
    return f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>".replace("\n", "⏎")


def _row(family):
    protocols = [make_family_protocol(name) for name in family.templates]
    opening, closing, escaped, thoughts = {
        (p._format.opening, p._format.closing, p._format.escaped, rendered_thoughts(name))
        for name, p in zip(family.templates, protocols, strict=True)
    }.pop()
    call = family.call % "…" + family.call_end
    ends = dict.fromkeys([family.call_end, family.answer_end])
    if family.thought is None:
        thought = "no form of their own"
    else:
        thought = _code(family.thought.strip() % "…") + (", opened by the template" if family.opened else "")
    return [
        f"{family.models}: {', '.join(f'`{name}`' for name in family.templates)}",
        _code(call),
        _code(f"{opening}…{closing}") + (", in JSON" if escaped else ""),
        " for a call, ".join(_code(end) for end in ends) + (" for an answer" if len(ends) > 1 else ""),
        thought,
        thoughts,
    ]


def table():
    """The table of docs/protocols.md."""
    head = [
        "family, and TRL's templates",
        "a call",
        "its response",
        "end tokens",
        "a thought",
        "thoughts in a re-rendered conversation",
    ]
    rows = [head, ["---"] * len(head), *map(_row, FAMILIES)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def print_times(turns=200):
    """Print the processor time to read a turn of about 200 tokens, for each template."""
    for name, family in FAMILY.items():
        protocol = make_family_protocol(name)
        thought = "" if family.thought is None else family.thought % ("so on " * 60)
        for kind, text in (
            ("call", thought + family.call % "Rome" + family.call_end),
            ("answer", thought + family.answer % "Rome" + family.answer_end),
        ):
            ids = protocol.tokenizer(text, add_special_tokens=False)["input_ids"]
            start = time.process_time()
            for _ in range(turns):
                protocol.read(ids, ended=True)
            print(f"{name}, {kind} of {len(ids)} tokens: {(time.process_time() - start) / turns * 1000:.2f} ms")


if __name__ == "__main__":
    if "--time" in sys.argv:
        print_times()
    else:
        print(table(), end="")
