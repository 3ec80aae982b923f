"""Tokenizers by name: `gpt2`, `bpe:N` and `qwen2:N` (trained on the corpus), `bytes`, `chars`; or a
tokenizer.json of anyone's, by its path or by the repository on the Hugging Face hub that has it.

All share one interface (`encode`, `decode`, `n_vocab`, `eot`, `specials`, `token_bytes`) and one
file, tokenizer.json, which Hugging Face's library `tokenizers` reads as well. BPE is learned by
`rustbpe` and run by `tiktoken`, which are faster; nothing here is pickled.

`bpe:N` is for training against the clock: the split of text and the few special tokens are what
was measured to be best. `qwen2:N` is for models that others load: its split is one that
transformers and llama.cpp know, and it has the tokens that conversations are written with, so that
pre-training and teaching have the same vocabulary.
"""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from base import InputError, one_line

END_OF_TEXT = "<|endoftext|>"
# GPT-4's split pattern with at most two digits a piece (nanochat measured 2 better than 1 or 3).
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
# GPT-2's, as tiktoken writes it. llama.cpp knows it by the name "gpt-2".
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# Qwen2's: single digits, runs of line ends in one piece. llama.cpp knows it by the name "qwen2".
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The last ids of qwen2:N, in this order: what no text has, and conversations are written with
SPECIALS = (
    END_OF_TEXT,
    "<|im_start|>",
    "<|im_end|>",
    "<|pad|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
# The pattern's lookahead overflows tiktoken's stack on a very long run of spaces. It is looked for
# from where a run begins: from everywhere, the search takes time quadratic in a run's length.
LONG_RUN = re.compile(r"(?<!\s)\s{10000}")
PIECE = re.compile(r"(?s).{1,5000}")
MOST_ALONE = 20_000  # characters of texts that are encoded sooner than threads for them start
MOST_WORD = 256  # characters of a word that bpe:N and qwen2:N learn from at once
MOST_SPACES = 10_000
LONG_WORD = re.compile(rf"(?<!\S)\S{{{MOST_WORD},}}|(?<!\s)\s{{{MOST_WORD},}}")
SMALLEST, LARGEST = 1024, 4096  # of bpe, which follows the size of the text
MOST_TOKENS = 65535  # of bpe:N and chars: ids are uint16, and one is end-of-text
MOST_QWEN2 = 1 << 20  # of qwen2:N; beyond uint16, ids and shards are uint32

# How tokenizer.json writes a byte, as a printable character: printable Latin-1 as itself, the
# others from U+0100 on
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = sorted({*range(256)} - {*PRINTABLE})
LETTER = {byte: chr(byte) for byte in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(OTHERS)}
BYTE = {letter: byte for byte, letter in LETTER.items()}


class Tokenizer:
    """Text to token ids and back.

    n_vocab: number of ids, special ones included; eot: the end-of-text id, which starts every
    document; specials: {text: id} of those that stand for no text, eot among them; token_bytes:
    (n_vocab,) int64, UTF-8 bytes each id stands for (0 for specials), the basis of bits per byte;
    dtype: of ids, uint16 where all fit, else uint32.
    """

    def __init__(self, kind, tokens, pattern=None, specials=(END_OF_TEXT,), file=None):
        """kind: bytes, chars or bpe; tokens: every id's bytes (str for chars) in id order, special
        ones left out; pattern: a regular expression that bpe splits text by first; specials: the
        texts of the last ids; file: what to_json() is to return, made from the rest if None."""
        self.kind = kind
        self.tokens = tokens
        self.pattern = pattern
        self.specials = {text: len(tokens) + i for i, text in enumerate(specials)}
        self.eot = self.specials[END_OF_TEXT]
        self.n_vocab = len(tokens) + len(specials)
        self.dtype = smallest_dtype(self.n_vocab)
        self._file = file
        sizes = [len(t.encode() if isinstance(t, str) else t) for t in tokens]
        self.token_bytes = np.array(sizes + [0] * len(specials), dtype=np.int64)
        if kind == "chars":
            # Sorted code points, so that encoding a block is one binary search
            self._codes = np.array([ord(c) for c in tokens], dtype=np.uint32)
        elif kind != "bytes":
            import tiktoken

            self._bpe = tiktoken.Encoding(
                kind,
                pat_str=pattern,
                special_tokens=self.specials,
                mergeable_ranks={t: i for i, t in enumerate(tokens)},
            )

    def encode(self, texts):
        """List of str -> list of arrays of ids. Text that looks like a special token is ordinary
        text."""
        if self.kind == "bytes":
            return [np.frombuffer(t.encode(), dtype=np.uint8).astype(np.uint16) for t in texts]
        if self.kind == "chars":
            return [self._encode_chars(t) for t in texts]

        parts = []
        ends = []  # of each text's parts
        for text in texts:
            parts += PIECE.findall(text) if LONG_RUN.search(text) else [text]
            ends.append(len(parts))
        ids = self._encode_parts(parts)
        return [
            ids[begin] if end - begin == 1 else np.concatenate(ids[begin:end])
            for begin, end in zip([0, *ends], ends)
        ]

    def _encode_parts(self, parts):
        """What tiktoken makes of texts, on all cores: into arrays, since its own batches make a
        Python integer of every id."""

        def encode(some):
            found = []
            for part in some:
                ids = self._bpe.encode_to_numpy(part, disallowed_special=())
                found.append(ids.astype(self.dtype))
            return found

        threads = min(n_cores(), len(parts))
        if threads < 2 or sum(map(len, parts)) < MOST_ALONE:
            return encode(parts)
        shares = 4 * threads  # so that a long text does not keep the others waiting
        found = [None] * len(parts)
        with ThreadPoolExecutor(threads) as pool:
            its = pool.map(encode, (parts[i::shares] for i in range(shares)))
            for i, arrays in enumerate(its):
                found[i::shares] = arrays
        return found

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
        """Sequence of ids -> str; specials are left out, broken UTF-8 becomes U+FFFD."""
        special = {*self.specials.values()}
        parts = [self.tokens[i] for i in ids if i not in special]
        return "".join(parts) if self.kind == "chars" else b"".join(parts).decode(errors="replace")

    def to_json(self):
        """The text of tokenizer.json."""
        if self._file is not None:
            return self._file
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
        hf.add_special_tokens([*self.specials])  # the last ids, as here
        return hf.to_str()

    @classmethod
    def from_json(cls, text, where="tokenizer.json"):
        """What to_json wrote, as str or bytes; where: what to call it. A file of another program
        is taken as it is: see foreign.py. Raises InputError for what does not work."""
        try:
            said = json.loads(text)
            if not is_ours(said):
                from .foreign import ForeignTokenizer

                return ForeignTokenizer(text)
            kind, tokens, pattern, specials = _parts(said)
            if len(tokens) > (MOST_QWEN2 if len(specials) > 1 else MOST_TOKENS):
                raise ValueError(f"{len(tokens)} tokens")
            units = len(tokens) if kind == "chars" else 256  # tokens of one character, or byte
            if not tokens or sum(len(t) == 1 for t in tokens) != units:
                raise ValueError("a byte without a token")
            if kind == "bytes" and tokens != [bytes([i]) for i in range(256)]:
                raise ValueError("bytes out of order")
            file = None
            if len(specials) > 1:
                file = text if isinstance(text, str) else text.decode()
            tokenizer = cls(kind, tokens, pattern, specials, file)
            probe = "".join(tokens) if kind == "chars" else "Naïve 中文,  don't 12345\r\n\t🙂"
            if tokenizer.decode(tokenizer.encode([probe])[0]) != probe:
                raise ValueError("encoding and decoding changes the text")
            return tokenizer
        except BaseException as e:  # tiktoken's panics are no Exception
            if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
                raise
            reason = one_line(e, 200)
            raise InputError(
                f"{where}: not a tokenizer of this program ({type(e).__name__}: {reason})"
            ) from None


def n_cores():
    """Those that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def smallest_dtype(n_vocab):
    """What ids below n_vocab are kept in."""
    return np.uint16 if n_vocab <= 1 << 16 else np.uint32


def is_ours(said):
    """Whether a parsed tokenizer.json can be run by Tokenizer: by its special tokens, its splits
    and the order of its merges; an exception of any kind where it is no tokenizer.json."""
    model = said["model"]
    specials = tuple(token["content"] for token in said["added_tokens"])
    if said["normalizer"] or specials not in ((END_OF_TEXT,), SPECIALS):
        return False
    if model["type"] == "WordLevel":
        return True
    splits = said["pre_tokenizer"].get("pretokenizers", ())
    kinds = [split["type"] for split in splits]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]) or splits[-1]["use_regex"]:
        return False
    if model["ignore_merges"]:
        return True
    # tiktoken merges the pair that makes the lowest id first, these libraries the first in the
    # list: for BPE as it is trained that is the same, each token being made by one merge
    made = [model["vocab"]["".join(pair)] for pair in model["merges"]]
    return made == [*range(256, 256 + len(made))] == [*range(256, len(model["vocab"]))]


def _parts(said):
    """(kind, tokens, pattern, specials) of a parsed tokenizer.json of ours; an exception of any
    kind where something is wrong with it."""
    vocabulary = said["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    if [vocabulary[token] for token in tokens] != [*range(len(tokens))]:
        raise ValueError("ids that are not 0, 1, 2, ...")
    specials = [token["content"] for token in said["added_tokens"]]
    ids = [token["id"] for token in said["added_tokens"]]
    if ids != [*range(len(tokens), len(tokens) + len(specials))]:
        raise ValueError(f"not with {' '.join(specials)} as its last ids")
    if said["model"]["type"] == "WordLevel":
        return "chars", tokens, None, specials
    tokens = [bytes(BYTE[letter] for letter in token) for token in tokens]
    splits = said["pre_tokenizer"]["pretokenizers"]
    if len(splits) == 1:
        return "bytes", tokens, None, specials
    return "bpe", tokens, splits[0]["pattern"]["Regex"], specials


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
    unknown name or a file that is none, and when what has to be downloaded cannot be.
    """
    name = on_disk(name)
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
    if m := re.fullmatch(r"bpe(?::(\d+))?", name):
        n = int(m[1]) if m[1] else size_for(texts())
        if not 257 <= n <= MOST_TOKENS + 1:
            raise InputError(f"--tokenizer {name}: expected a size from 257 to {MOST_TOKENS + 1}")
        return Tokenizer("bpe", learn_bpe(texts(), n - 1, PATTERN), PATTERN)
    if m := re.fullmatch(r"qwen2:(\d+)", name):
        n = int(m[1])
        least = 256 + len(SPECIALS)
        if not least <= n <= MOST_QWEN2:
            raise InputError(f"--tokenizer {name}: expected a size from {least} to {MOST_QWEN2}")
        return train_qwen2(texts(), n)
    raise InputError(
        f"unknown tokenizer {name!r}: expected chars, bytes, bpe:N (for example bpe:4096), bpe, "
        "qwen2:N, gpt2, the path of a tokenizer.json or OWNER/NAME of a hub repository"
    )


def size_for(texts):
    """Tokens of a vocabulary that this much text can teach a small model: a power of two from
    1,024 to 4,096, about one for 120 bytes. texts: iterator of str."""
    most = 0
    n_bytes = 0
    for text in texts:
        n_bytes += len(text.encode())
        most = n_bytes // 120
        if most >= LARGEST:
            return LARGEST
    return max(SMALLEST, 2 ** most.bit_length() // 2)


def on_disk(name):
    """The path of the tokenizer.json of a repository on the Hugging Face hub, OWNER/NAME or
    OWNER/NAME@REVISION, fetched if that has not been done before; any other name as it is. Raises
    InputError."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if not found or name.endswith(".json") or set(found[1]) <= {"."}:
        return name
    if found[1].startswith(("./", "../")) or Path(name).exists():
        return name
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(found[1], "tokenizer.json", revision=found[2])
    except Exception as e:  # of requests, of the hub, of the disk
        reason = one_line(e, 200)
        raise InputError(
            f"--tokenizer {name}: its tokenizer.json could not be fetched from the Hugging Face "
            f"hub ({type(e).__name__}: {reason}); check the name and the network, or give the path "
            "of a tokenizer.json"
        ) from None


def longest_prefixes(tokens, n_vocab):
    """(n_vocab,) int64: the longest proper prefix of each token that is a token, -1 for none.

    tokens: every id's bytes or str, in id order; ids beyond them, and those of no text, have none.
    """
    numbers = {}
    for i, token in enumerate(tokens):
        if token:
            numbers.setdefault(token, i)
    found = np.full(n_vocab, -1, dtype=np.int64)
    for i, token in enumerate(tokens):
        for length in range(len(token) - 1, 0, -1):
            prefix = numbers.get(token[:length])
            if prefix is not None:
                found[i] = prefix
                break
    return found


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
    return Tokenizer("bpe", tokens, GPT2_PATTERN)


def learn_bpe(texts, n_tokens, pattern):
    """The tokens of byte-level BPE on an iterator of str that a pattern splits: at most n_tokens
    byte strings, in the order of merges.

    By rustbpe, which learns what `tokenizers` does but for the order of equally frequent pairs, in
    half of the CPU time and half of the memory.
    """
    import rustbpe

    learner = rustbpe.Tokenizer()
    parts = (part for text in texts for part in without_long_words(text))
    learner.train_from_iterator(parts, n_tokens, pattern=pattern)
    ranks = {bytes(token): i for token, i in learner.get_mergeable_ranks()}
    return sorted(ranks, key=ranks.get)


def train_qwen2(texts, n_vocab):
    """The Tokenizer `qwen2:N`: byte-level BPE with Qwen2's split, no normaliser, all bytes, and
    SPECIALS as its last ids, n_vocab ids in all; fewer where the texts have fewer pairs to merge.

    The file is as the libraries that will read it merge: the trained merges and no others, and
    `ignore_merges` off, as llama.cpp has it for this split.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as HFTokenizer

    tokens = learn_bpe(texts, n_vocab - len(SPECIALS), QWEN2_PATTERN)
    ids = {written(token): i for i, token in enumerate(tokens)}
    hf = HFTokenizer(models.BPE(ids, trained_merges(tokens)))
    hf.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    hf.decoder = decoders.ByteLevel()
    hf.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return Tokenizer("bpe", tokens, QWEN2_PATTERN, SPECIALS, file=hf.to_str())


def without_long_words(text):
    """Parts of a text in which no word is longer than MOST_WORD characters, and no run of spaces
    much longer: a merge takes time for each place of a piece."""
    words = text.split()
    n_spaces = len(text) - sum(map(len, words))
    if n_spaces < MOST_SPACES and max(map(len, words), default=0) <= MOST_WORD:
        yield text
        return
    begin = 0
    for found in LONG_WORD.finditer(text):
        for end in range(found.start() + MOST_WORD, found.end(), MOST_WORD):
            yield text[begin:end]
            begin = end
    yield text[begin:]


def trained_merges(tokens):
    """[(left, right), ...] as tokenizer.json has them, by which training has made these tokens of
    bytes, in their order; none for a token that no two others make."""
    ranks = {token: i for i, token in enumerate(tokens)}
    found = (last_merge(token, ranks) for token in tokens[256:])
    return [tuple(map(written, pair)) for pair in found if ranks.keys() >= {*pair}]


def last_merge(token, ranks):
    """The two tokens that training has made a token of: what merging its bytes, the lowest rank
    first, comes to before the last step. ranks: {token: its id}."""
    own = ranks[token]
    halves = []
    for cut in range(1, len(token)):
        pair = token[:cut], token[cut:]
        if ranks.get(pair[0], own) < own and ranks.get(pair[1], own) < own:
            halves.append(pair)
    if len(halves) == 1:
        return halves[0]

    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        lowest = min(pairs)
        merged = []
        at = 0
        while at < len(parts):  # every one of that rank, from the left, as in training
            if at < len(pairs) and pairs[at] == lowest:
                merged.append(parts[at] + parts[at + 1])
                at += 2
            else:
                merged.append(parts[at])
                at += 1
        parts = merged
    return parts
