import os
import re

path = os.path.join(os.environ.get("NANOCHAT_BASE_DIR", ""), "vocab-size")


class Tokenizer:
    def __init__(self, pairs):
        self.pattern = re.compile(rb"(?s)(.)\1|." if pairs else b"(?s).")

    def encode(self, text):
        return [
            1 + t[0] + 256 * (len(t) > 1)
            for t in (m[0] for m in self.pattern.finditer(text.encode()))
        ]

    def decode(self, ids):
        return b"".join(bytes([(i - 1) % 256]) * (1 + (i > 256)) for i in ids).decode(
            errors="replace"
        )

    def get_bos_token_id(self):
        return 0


def get_tokenizer():
    return Tokenizer(int(open(path).read()) > 265)
