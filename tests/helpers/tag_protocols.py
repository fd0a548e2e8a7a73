"""The tags protocol with two tokenizers, and the parts of its observations."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers.passages import ROOMY, WORDS
from tspo_trl import Passage, TagProtocol
from tspo_trl.demo import make_tokenizer


def make_words():
    """The demo's tokenizer, with one token for each word and each tag."""
    return make_tokenizer([WORDS, "< > / [ ] ( ) | : search answer information eos pad unk im_end", "Doc 1 (Title: x)"])


def make_bytes():
    """A byte-level BPE as in real models: it has no unknown tokens, and tags are ordinary text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sentences = [WORDS, "I search <search>capital of Italy</search>", "<information>Doc 1 (Title: Rome) </information>"]
    tokenizer.train_from_iterator(sentences * 3, trainer)
    tokenizer.add_tokens([AddedToken("<tool_response>", normalized=False, special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )


TAG_PROTOCOLS = {"words": TagProtocol(make_words()), "bytes": TagProtocol(make_bytes())}


def encode(protocol, text):
    return protocol.tokenizer(text, add_special_tokens=False)["input_ids"]


def inside(protocol, token_ids):
    """The tokens between the opening and the closing tag, both of which must be present."""
    opening, closing = encode(protocol, "\n\n<information>"), encode(protocol, "</information>\n\n")
    assert token_ids[: len(opening)] == opening
    assert token_ids[-len(closing) :] == closing
    assert len(token_ids) > len(opening) + len(closing)
    return token_ids[len(opening) : -len(closing)]


def neutralized(protocol, text):
    """A text as it is shown if the budget is large enough."""
    return protocol.observe([Passage("0", "", text)], ROOMY).passages[0].text
