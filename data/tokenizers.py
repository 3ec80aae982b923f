"""Tokenizers by name: `gpt2`, `bpe:N` (trained on the corpus), `bytes`, `chars`.

All share one interface (`encode`, `decode`, `n_vocab`, `eot`, `token_bytes`) and one file,
tokenizer.json, which Hugging Face's library `tokenizers` reads as well. BPE is trained by that
library and run by `tiktoken`, which is faster; nothing here is pickled.
"""

import itertools
import json
import re
from pathlib import Path

import numpy as np

from base import InputError

END_OF_TEXT = "<|endoftext|>"
# GPT-4's split pattern with at most two digits a piece (nanochat measured 2 better than 1 or 3).
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
# The pattern's lookahead overflows tiktoken's stack on a very long run of spaces. It is looked for
# from where a run begins: from everywhere, the search takes time quadratic in a run's length.
LONG_RUN = re.compile(r"(?<!\s)\s{10000}")
PIECE = re.compile(r"(?s).{1,5000}")
MOST_TOKENS = 65535  # ids are uint16, and one is end-of-text

# How tokenizer.json writes a byte, as a printable character: printable Latin-1 as itself, the
# others from U+0100 on
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = sorted({*range(256)} - {*PRINTABLE})
LETTER = {byte: chr(byte) for byte in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(OTHERS)}
BYTE = {letter: byte for byte, letter in LETTER.items()}


class Tokenizer:
    """Text to token ids and back.

    n_vocab: number of ids, end-of-text included; eot: the end-of-text id, which starts every
    document; token_bytes: (n_vocab,) int64, UTF-8 bytes each id stands for (0 for eot), the basis
    of bits per byte.
    """

    def __init__(self, kind, tokens, pattern=None):
        """kind: bytes, chars or bpe; tokens: every id's bytes (str for chars) in id order,
        end-of-text left out; pattern: a regular expression that bpe splits text by first."""
        self.kind = kind
        self.tokens = tokens
        self.pattern = pattern
        self.eot = len(tokens)
        self.n_vocab = len(tokens) + 1
        sizes = [len(t.encode() if isinstance(t, str) else t) for t in tokens]
        self.token_bytes = np.array(sizes + [0], dtype=np.int64)
        if kind == "chars":
            # Sorted code points, so that encoding a block is one binary search
            self._codes = np.array([ord(c) for c in tokens], dtype=np.uint32)
        elif kind != "bytes":
            import tiktoken

            self._bpe = tiktoken.Encoding(
                kind,
                pat_str=pattern,
                special_tokens={END_OF_TEXT: self.eot},
                mergeable_ranks={t: i for i, t in enumerate(tokens)},
            )

    def encode(self, texts):
        """List of str -> list of uint16 arrays of ids. Text that looks like end-of-text is
        ordinary text."""
        if self.kind == "bytes":
            return [np.frombuffer(t.encode(), dtype=np.uint8).astype(np.uint16) for t in texts]
        if self.kind == "chars":
            return [self._encode_chars(t) for t in texts]

        parts = []
        counts = []  # parts of each text
        for text in texts:
            own = PIECE.findall(text) if LONG_RUN.search(text) else [text]
            parts += own
            counts.append(len(own))
        ids = iter(self._bpe.encode_ordinary_batch(parts, num_threads=4))
        arrays = []
        for count in counts:
            joined = itertools.chain.from_iterable(itertools.islice(ids, count))
            arrays.append(np.array(list(joined), dtype=np.uint16))
        return arrays

    def _encode_chars(self, text):
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        ids = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        unknown = codes[self._codes[ids] != codes]
        if len(unknown):
            raise InputError(
                f"character {chr(unknown[0])!r} is not among the {len(self.tokens)} the tokenizer "
                "knows: expected a text in those, or a run with a tokenizer of its own"
            )
        return ids.astype(np.uint16)

    def decode(self, ids):
        """Sequence of ids -> str; end-of-text is left out, broken UTF-8 becomes U+FFFD."""
        parts = [self.tokens[i] for i in ids if i != self.eot]
        return "".join(parts) if self.kind == "chars" else b"".join(parts).decode(errors="replace")

    def to_json(self):
        """The text of tokenizer.json."""
        from tokenizers import Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as HFTokenizer

        if self.kind == "chars":
            ids = {token: i for i, token in enumerate(self.tokens)}
            hf = HFTokenizer(models.WordLevel(ids, unk_token="<unknown>"))  # which is an error
            hf.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
            hf.decoder = decoders.Fuse()
        else:
            ids = {written(token): i for i, token in enumerate(self.tokens)}
            hf = HFTokenizer(models.BPE(ids, merges(self.tokens), ignore_merges=True))
            splits = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            if self.pattern:
                splits.insert(0, pre_tokenizers.Split(Regex(self.pattern), "isolated"))
            hf.pre_tokenizer = pre_tokenizers.Sequence(splits)
            hf.decoder = decoders.ByteLevel()
        hf.add_special_tokens([END_OF_TEXT])  # the last id, as here
        return hf.to_str()

    @classmethod
    def from_json(cls, text, where="tokenizer.json"):
        """What to_json wrote, as str or bytes; where: what to call it. Raises InputError for
        what does not work."""
        try:
            kind, tokens, pattern = _parts(json.loads(text))
            if len(tokens) > MOST_TOKENS:
                raise ValueError(f"{len(tokens)} tokens")
            units = len(tokens) if kind == "chars" else 256  # tokens of one character, or byte
            if not tokens or sum(len(t) == 1 for t in tokens) != units:
                raise ValueError("a byte without a token")
            if kind == "bytes" and tokens != [bytes([i]) for i in range(256)]:
                raise ValueError("bytes out of order")
            tokenizer = cls(kind, tokens, pattern)
            probe = "".join(tokens) if kind == "chars" else "Naïve 中文,  don't 12345\r\n\t🙂"
            if tokenizer.decode(tokenizer.encode([probe])[0]) != probe:
                raise ValueError("encoding and decoding changes the text")
            return tokenizer
        except BaseException as e:  # tiktoken's panics are no Exception
            if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
                raise
            reason = " ".join(str(e).split())[:200]
            raise InputError(
                f"{where}: not a tokenizer of this program ({type(e).__name__}: {reason})"
            ) from None


def _parts(said):
    """(kind, tokens, pattern) of a parsed tokenizer.json; an exception of any kind where it is
    not one of ours."""
    vocabulary = said["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    if [vocabulary[token] for token in tokens] != [*range(len(tokens))]:
        raise ValueError("ids that are not 0, 1, 2, ...")
    [special] = said["added_tokens"]
    if (special["content"], special["id"]) != (END_OF_TEXT, len(tokens)) or said["normalizer"]:
        raise ValueError(f"not with {END_OF_TEXT} as its last id, or with a normalizer")
    if said["model"]["type"] == "WordLevel":
        return "chars", tokens, None
    tokens = [bytes(BYTE[letter] for letter in token) for token in tokens]
    splits = said["pre_tokenizer"]["pretokenizers"]
    if len(splits) == 1:
        return "bytes", tokens, None
    return "bpe", tokens, splits[0]["pattern"]["Regex"]


def written(token):
    """The bytes of a token as tokenizer.json writes them."""
    return "".join(LETTER[byte] for byte in token)


def merges(tokens):
    """[(left, right), ...] for Hugging Face's library: any two neighbours that make a token are
    merged, those of the lowest id first, as tiktoken does it."""
    rank = {token: i for i, token in enumerate(tokens)}
    found = []
    for token in tokens:
        for cut in range(1, len(token)):
            left = token[:cut]
            right = token[cut:]
            if left in rank and right in rank:
                found.append((rank[token], rank[left], rank[right]))
    return [(written(tokens[left]), written(tokens[right])) for _, left, right in sorted(found)]


def load_tokenizer(run_dir):
    """The Tokenizer of a run, from the tokenizer.json that every run keeps in its folder.

    Raises InputError where there is none: the run's tokens have no text, or it is from before runs
    kept it.
    """
    path = Path(run_dir) / "tokenizer.json"
    try:
        text = path.read_bytes()
    except OSError as e:
        raise InputError(
            f"{path}: {e.strerror}; expected the folder of a run that trained on text"
        ) from None
    return Tokenizer.from_json(text, path)


def make_tokenizer(name, texts):
    """Build the tokenizer `name`, or read it where that is the path of a tokenizer.json.

    texts: function returning an iterator of str, read only if it must be. Raises InputError for an
    unknown name or a file that is none, and when GPT-2's vocabulary cannot be downloaded.
    """
    if name.endswith(".json"):
        try:
            return Tokenizer.from_json(Path(name).read_bytes(), name)
        except OSError as e:
            raise InputError(f"{name}: cannot be read: {e.strerror or e}") from None
    if name == "bytes":
        return Tokenizer("bytes", [bytes([i]) for i in range(256)])
    if name == "chars":
        chars = set()
        for text in texts():
            chars.update(text)
        if len(chars) > MOST_TOKENS:
            raise InputError(
                f"{len(chars)} distinct characters do not fit uint16 tokens; use --tokenizer bytes"
            )
        return Tokenizer("chars", sorted(chars))
    if name == "gpt2":
        return gpt2_tokenizer()
    if m := re.fullmatch(r"bpe:(\d+)", name):
        n = int(m[1])
        if not 257 <= n <= MOST_TOKENS + 1:
            raise InputError(f"--tokenizer {name}: expected a size from 257 to {MOST_TOKENS + 1}")
        return Tokenizer("bpe", train_bpe(texts(), n - 1), PATTERN)
    raise InputError(
        f"unknown tokenizer {name!r}: expected chars, bytes, bpe:N (for example bpe:4096) or gpt2"
    )


def gpt2_tokenizer():
    """GPT-2's BPE as tiktoken ships it (downloaded once by tiktoken, then read from its cache)."""
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as e:  # tiktoken lets requests' many errors through
        raise InputError(
            f"GPT-2's vocabulary could not be downloaded ({type(e).__name__}): "
            "check the network, or use --tokenizer bpe:N, which needs none"
        ) from None
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    return Tokenizer("bpe", tokens, encoding._pat_str)


def train_bpe(texts, n_tokens):
    """Byte-level BPE on an iterator of str. Returns at most n_tokens byte strings, in merge
    order."""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HFTokenizer

    hf = HFTokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # Training takes time quadratic in the length of a piece, so an endless word counts as several
    splits = [pre_tokenizers.Split(Regex(r), "isolated") for r in (PATTERN, "(?m).{1,256}")]
    hf.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    alphabet = byte_level.alphabet()
    hf.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=n_tokens, initial_alphabet=alphabet, show_progress=False),
    )
    vocabulary = hf.get_vocab()  # token -> id
    tokens = sorted(vocabulary, key=vocabulary.get)
    return [bytes(BYTE[letter] for letter in token) for token in tokens]
