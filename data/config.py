"""What to train on and how it is cut into rows: the options of every program that trains."""

import dataclasses
import math

from base.options import COUNT, POSITIVE, Options, option, remembered

from . import encodings, sources


@dataclasses.dataclass(frozen=True)
class DataConfig(Options):
    """A corpus and the shape of its rows. Raises InputError for what is not valid."""

    data: str = option(
        "stdlib",
        f"what to train on; for text, --text says which: {sources.expected()}",
        (sources.can_train, sources.expected()),
        group="data",
    )
    text: str = option("", "train on this file or folder of text")
    val_text: str = option(
        "", "validate on this file or folder, instead of on a tenth of the text held out"
    )
    conversations: tuple[str, ...] = option(
        (), "with --data conversations, preferences or questions: their .jsonl files"
    )
    mix: tuple[float, ...] = option(
        (),
        "with --conversations: how large a share of the rows each of its files has, of any size "
        "together; empty: all files are one",
        (lambda xs: all(0 < x < math.inf for x in xs), "a positive number for each file, or none"),
    )
    encoding: str = option(
        "",
        "of text files without a byte-order mark, such as cp1252 or gb18030; empty finds out",
        (encodings.known, "an encoding that Python knows, such as cp1252"),
    )
    tokenizer: str = option(
        "bpe:4096",
        "for text: chars, bytes, bpe:N, bpe (N by the size of the text), gpt2; for a model that "
        "others load qwen2:N, the path of a tokenizer.json, or OWNER/NAME on the Hugging Face hub",
    )
    # The file of a tokenizer that is there already, in place of one that --tokenizer makes
    vocabulary: str = remembered("")
    train_shards: int = option(
        9, "how many training shards to use, of a source that has them ready-made", POSITIVE
    )
    long_docs: str = option(
        "split", "what happens to a document beyond max_doc_len", ("split", "drop")
    )
    shuffle: bool = option(True, "documents in random order already in the first epoch")
    val_tokens: int = option(
        0, "validate on this many tokens from the start of the validation split; 0 is all", COUNT
    )
    row_len: int = option(
        256,
        "tokens in a packed row; attention never leaves a row",
        POSITIVE,
        group="batch, context and schedule",
    )
    val_row_len: int = option(1024, "the same for validation", POSITIVE)
    docs_by_pass: bool = option(
        False,
        "documents told apart are counted in a forward pass, one for every 512 tokens and a row's "
        "share to spare, not in a row, one for every 256",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.mix and len(self.mix) != len(self.conversations):
            self.refuse("mix", f"{len(self.conversations)} numbers, one for each file")
        own = "text", "conversations", "preferences", "questions"
        for name in "val_text", "encoding":
            if getattr(self, name) and self.data not in own:
                self.refuse(name, f"only with --text, not with --data {self.data}")

    @property
    def encoder(self):
        """What make_tokenizer() is to be given."""
        return self.vocabulary or self.tokenizer
