"""Small tokenizers of many kinds."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from helpers.passages import TAGS, WORDS
from tspo_trl.rollout.tags import HINT, PROMPT

TEXTS = [
    WORDS,
    PROMPT,
    HINT,
    "<search>capital of Italy</search><answer>Rome</answer>",
    "Doc 1 (Title: Rome) Rome .\n",
] * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def make_byte_level(normalizer=None, *, vocab_size=450):
    """A byte-level BPE, like those of GPT-2 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return fast(tokenizer)


def make_sentencepiece_bpe(prepend_scheme="always"):
    """A BPE with byte fallback and a prefix space, like those of Llama 2 and Mistral."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    tokenizer.decoder = sentencepiece_decoder()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return fast(plain_bytes(tokenizer))


def make_llama_legacy():
    """Like `make_sentencepiece_bpe`, with the prefix space in the normaliser."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = sentencepiece_decoder()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    tokenizer.train_from_iterator([word for text in TEXTS for word in text.split()], trainer)
    return fast(plain_bytes(tokenizer))


def make_unigram(prepend_scheme="always"):
    """A SentencePiece unigram model with byte fallback and NFKC."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = sentencepiece_decoder()
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in (10, *range(33, 127))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return fast(tokenizer)


def make_wordpiece():
    """A lower-casing WordPiece, like that of BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return fast(tokenizer)


def sentencepiece_decoder():
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def plain_bytes(tokenizer):
    """The tokenizer with its bytes as ordinary tokens; the trainer makes them special."""
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(data))


def fast(tokenizer):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "</s>"],
    )


def with_frame(tokenizer, *, bos=True, eos=False):
    """The tokenizer with a beginning and an end around every text."""
    start, end = "<s> " if bos else "", " <|im_end|>" if eos else ""
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<|im_end|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start}$A{end}", special_tokens=ids
    )
    return tokenizer


def with_special_tags(tokenizer, tags=TAGS):
    """The tokenizer with tags as special tokens."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "</s>", *tags]})
    return tokenizer


def add_words(tokenizer, *words, **options):
    tokenizer.add_tokens([AddedToken(word, special=False, **{"normalized": False, **options}) for word in words])
    return tokenizer


def with_gaps(tokenizer, *words, gap=1000):
    """The tokenizer with added tokens whose ids come after a gap."""
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    first = len(tokenizer) + gap
    data["model"]["vocab"] |= {word: first + number for number, word in enumerate(words)}
    added = {**data["added_tokens"][0], "special": False}
    data["added_tokens"] += [{**added, "id": first + number, "content": word} for number, word in enumerate(words)]
    return fast(Tokenizer.from_str(json.dumps(data)))


KINDS = {
    "byte level": make_byte_level,
    "NFKC": lambda: make_byte_level(normalizers.NFKC()),
    "NFKD": lambda: make_byte_level(normalizers.NFKD()),
    "lower case": lambda: make_byte_level(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    "without accents": lambda: make_byte_level(normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents()])),
    "replacement": lambda: make_byte_level(normalizers.Replace(Regex("[«»]"), ">")),
    "BPE, prefix always": make_sentencepiece_bpe,
    "BPE, prefix first": lambda: make_sentencepiece_bpe("first"),
    "BPE, prefix never": lambda: make_sentencepiece_bpe("never"),
    "Llama legacy": make_llama_legacy,
    "unigram": make_unigram,
    "gaps": lambda: with_gaps(make_byte_level(), *TAGS),
    "special tags": lambda: with_special_tags(make_byte_level()),
    "plain tags": lambda: add_words(make_byte_level(), *TAGS),
    "special tags, NFKC": lambda: with_special_tags(make_byte_level(normalizers.NFKC())),
}
