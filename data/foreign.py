"""Tokenizers of other programs: a tokenizer.json that is taken as it is, run by Hugging Face's
library, which wrote it."""

import json

import numpy as np

from .tokenizers import BYTE, smallest_dtype

# What begins a document, the first of these that a tokenizer has
ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|end_of_document|>", "</s>", "<eos>", "<|im_end|>")
PROBE = "Naïve 中文,  don't 12345\r\n\t🙂"


class ForeignTokenizer:
    """The interface of tokenizers.Tokenizer over a tokenizer.json of another program.

    Two families can be: byte-level BPE (GPT-2, Llama 3, Qwen), and those of SentencePiece with
    bytes to fall back on (Llama 2, Mistral, Gemma). The second may put a space before a text, which
    token_bytes counts: one byte too many for a document.
    """

    kind = "foreign"

    def __init__(self, text):
        """text: of tokenizer.json, str or bytes. Raises an exception of any kind where it does not
        give any text back."""
        from tokenizers import Tokenizer as HFTokenizer

        self._file = text if isinstance(text, str) else text.decode()
        said = json.loads(self._file)
        self._hf = HFTokenizer.from_str(self._file)
        self._hf.no_truncation()
        self._hf.no_padding()
        self._hf.encode_special_tokens = True  # text that looks like one is ordinary text

        added = {token["content"]: token["id"] for token in said["added_tokens"]}
        self.specials = {t["content"]: t["id"] for t in said["added_tokens"] if t["special"]}
        self.n_vocab = 1 + max(self._hf.get_vocab().values())
        self.dtype = smallest_dtype(self.n_vocab)
        # Tokens of text that are matched before anything else, such as runs of spaces
        texts = {i: text.encode() for text, i in added.items() if text not in self.specials}
        read = _from_byte_level if _is_byte_level(said) else _from_sentencepiece
        self.tokens = [b""] * self.n_vocab
        for token, i in self._hf.get_vocab().items():
            if i not in self.specials.values():
                self.tokens[i] = texts[i] if i in texts else read(token)
        self.token_bytes = np.array([len(token) for token in self.tokens], dtype=np.int64)

        self.eot = next((added[name] for name in ENDS if name in added), None)
        if self.eot is None:
            raise ValueError(f"no token that ends a text; expected one of {' '.join(ENDS)}")
        self.specials[next(name for name in ENDS if name in added)] = self.eot
        self.tokens[self.eot] = b""
        self.token_bytes[self.eot] = 0
        # What two of them must share for their ids to mean the same: all but the vocabulary
        self.pattern = json.dumps([said[key] for key in ("normalizer", "pre_tokenizer")])

        back = b"".join(self.tokens[i] for i in self.encode([PROBE])[0])
        self._spaced = back == b" " + PROBE.encode()
        if not self._spaced and back != PROBE.encode():
            raise ValueError("encoding and decoding changes the text")

    def encode(self, texts):
        """List of str -> list of arrays of ids."""
        found = self._hf.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, dtype=self.dtype) for one in found]

    def decode(self, ids):
        """Sequence of ids -> str; specials are left out, broken UTF-8 becomes U+FFFD."""
        text = b"".join(self.tokens[i] for i in ids).decode(errors="replace")
        return text.removeprefix(" ") if self._spaced else text

    def to_json(self):
        """The text of tokenizer.json, as it was."""
        return self._file


def _is_byte_level(said):
    decoder = said["decoder"] or {}
    parts = decoder.get("decoders", [decoder])
    return any(part.get("type") == "ByteLevel" for part in parts)


def _from_byte_level(token):
    return bytes(BYTE[letter] for letter in token)


def _from_sentencepiece(token):
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
