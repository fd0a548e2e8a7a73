"""Tokenizers with the chat templates of Qwen, and messages in their format."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl import chat_template_utils as trl_templates

from helpers.passages import WORDS
from tspo_trl import Passage, ToolCallProtocol
from tspo_trl.rollout.tool_call import PROMPT, SEARCH_TOOL

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ADDED = {
    "qwen2_5": ["<tool_call>", "</tool_call>", "<|fim_prefix|>"],
    "qwen3": [
        *("<tool_call>", "</tool_call>", "<|fim_prefix|>"),
        *("<tool_response>", "</tool_response>", "<think>", "</think>"),
    ],
}
CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "%s"}}\n</tool_call>'
END = "<|im_end|>"
ROME = [Passage("0", "Rome", "Rome is the capital of Italy."), Passage("1", "", "Paris, of France: one.\n")]


def make_chat(name):
    """A byte-level BPE with Qwen's text splitting and added tokens, and a chat template from TRL."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [WORDS, PROMPT, json.dumps(SEARCH_TOOL), "<tool_response>\nDoc 1 (Title: Rome) one.\n\nDoc 2 two:\n</tool_"]
    tokenizer.train_from_iterator(texts * 3, trainer)
    added = ADDED["qwen2_5" if name.startswith("qwen2_5") else "qwen3"]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in added])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = getattr(trl_templates, f"{name}_chat_template")
    return fast


NAMES = ["qwen2_5", "qwen2_5_training", "qwen3", "qwen3_training", "qwen3_instruct_2507"]
TOKENIZERS = {name: make_chat(name) for name in NAMES}
PROTOCOLS = {name: ToolCallProtocol(tokenizer) for name, tokenizer in TOKENIZERS.items()}
FEW = ["qwen2_5", "qwen3"]  # one for each set of added tokens


def encode(protocol, text):
    return protocol.tokenizer(text, add_special_tokens=False)["input_ids"]


def render(tokenizer, messages, generate=False, **options):
    return tokenizer.apply_chat_template(
        messages, tools=[SEARCH_TOOL], add_generation_prompt=generate, return_dict=False, **options
    )


def call_message(query, content=""):
    call = {"type": "function", "function": {"name": "search", "arguments": {"query": query}}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


WELL = CALL % "Rome"
OTHER = '<tool_call>{"name": "browse", "arguments": {"query": "x"}}</tool_call>'
