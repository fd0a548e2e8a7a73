"""Turns with tags, token by token: the end of a turn and its action, with tokenizers that join tags with other text."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig

from helpers.passages import ROOMY, TAGS
from helpers.scripted import PASSAGE, RecordingRetriever
from helpers.tokenizer_kinds import KINDS, SPECIAL, add_words, fast, make_wordpiece, sentencepiece_decoder, with_frame
from tspo_trl import SearchLimits, SearchLoop, TagProtocol
from tspo_trl.engines.base import BatchEngine, Generation
from tspo_trl.engines.stopping import StopRule

#: What a model may write after a closing tag
AFTER = ["", "\n", ".", " The", "\n\n<information>", "<answer>"]
WRITTEN = [f"<search>capital of italy</search>{after}" for after in AFTER] * 30
WRITTEN += [f"<answer>rome</answer>{after}" for after in AFTER] * 30


def make_joined(byte_level=True):
    """A BPE that splits nothing before it merges: its tokens join tags with the text before and after them."""
    tokenizer = Tokenizer(models.BPE(unk_token=None if byte_level else "<unk>"))
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = sentencepiece_decoder()
        alphabet = [chr(code) for code in (10, *range(33, 127))]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(WRITTEN, trainer)
    return fast(tokenizer)


TOKENIZERS = {
    **{name: make() for name, make in KINDS.items()},
    "joined": make_joined(),
    "joined, SentencePiece": make_joined(byte_level=False),
    "WordPiece, tags added": add_words(make_wordpiece(), *TAGS),
    "adds BOS": with_frame(KINDS["BPE, prefix always"]()),
    "adds BOS and EOS": with_frame(KINDS["byte level"](), eos=True),
}


def cut(tokenizer, text, eos=None):
    """The tokens of a text up to the end of the turn, as an engine ends it."""
    config = GenerationConfig(eos_token_id=tokenizer.eos_token_id if eos is None else eos)
    stop = StopRule(tokenizer, TagProtocol.stop_strings, config)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    end = next((n for n in range(1, len(ids)) if stop(ids[:n])), len(ids))
    return ids[:end], len(ids)


@pytest.mark.parametrize("joined", ["joined", "joined, SentencePiece"])
def test_some_tokens_join_a_tag_with_the_text_around_it(joined):
    """So that the tests below have such turns."""
    tokens = [tokens for text in WRITTEN[: len(AFTER)] for tokens in TOKENIZERS[joined].tokenize(text)]
    assert any(">" in token.rstrip(">") for token in tokens)


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_turn_ends_with_the_token_that_completes_its_tag(name, after):
    tokenizer = TOKENIZERS[name]
    protocol = TagProtocol(tokenizer)
    for written, action in (
        ("<search>capital of italy</search>", ("search", "capital of italy")),
        ("<answer>rome</answer>", ("answer", "rome")),
    ):
        ids, length = cut(protocol.tokenizer, f"one {written}{after} two three four")
        assert len(ids) < length
        text = protocol.tokenizer.decode(ids, skip_special_tokens=True)
        assert "three" not in text
        assert not protocol.parse(protocol.tokenizer.decode(ids[:-1], skip_special_tokens=True))[1]
        assert protocol.parse(text) == action


class Writes(BatchEngine):
    """Writes the scripted turns, each cut where an engine ends it."""

    def __init__(self, tokenizer, texts, eos):
        super().__init__()
        self.tokenizer, self.texts, self.eos, self.contexts = tokenizer, list(texts), eos, []

    def generate(self, contexts, max_new_tokens):
        self.contexts += contexts
        ids = [cut(self.tokenizer, self.texts.pop(0), self.eos)[0] for _ in contexts]
        return [Generation(turn, [-0.5] * len(turn)) for turn in ids]


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("end", ["<|im_end|>", "</s>"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_rollout_grows_by_the_sampled_tokens_and_its_observations(name, end, pad_is_eos):
    tokenizer = TOKENIZERS[name]
    pad, tokenizer.pad_token = tokenizer.pad_token, tokenizer.eos_token if pad_is_eos else tokenizer.pad_token
    protocol = TagProtocol(tokenizer)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    turns = ["<search>capital of italy</search>\n\n<information>", f"<search>rome{end}", "one", f"no answer{end}"]
    engine = Writes(protocol.tokenizer, turns, ends)
    limits = SearchLimits(max_searches=4, max_observation_tokens=ROOMY, max_completion_length=None)
    retriever = RecordingRetriever()
    loop = SearchLoop(engine, retriever, protocol, eos_token_ids=ends, limits=limits)
    (prompt,) = protocol.encode_prompts(["Where is Rome?"])
    (t,), _ = loop.run([prompt])
    tokenizer.pad_token = pad
    assert [turn.action for turn in t.turns] == ["search", "invalid", "invalid", "none"]
    assert retriever.calls == [["capital of italy"]]
    assert t.status == "no_answer"
    assert t.turns[0].passages[0].text == PASSAGE.text
    # Nothing is encoded again: each context is the one before it, the turn as sampled, and the observation
    for number, turn in enumerate(t.turns[:-1]):
        assert engine.contexts[number + 1] == engine.contexts[number] + turn.token_ids + turn.observation_ids
    assert t.turns[1].token_ids[-1] == tokenizer.convert_tokens_to_ids(end)
    assert tokenizer.bos_token_id not in t.completion_ids
    text = protocol.tokenizer.decode(t.turns[0].observation_ids)
    assert "Mira Talvek".lower() in text.lower() or "<unk>" in text
