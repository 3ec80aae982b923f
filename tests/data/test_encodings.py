"""data/encodings.py: text is read in the encoding it is in, and what cannot be read is said."""

import codecs
import gzip

import pytest
from corpora import open_text, prepare_text

from base import InputError
from data import DataConfig, encodings, open_dataset, prepare
from data.encodings import NotText, examine, known
from data.shards import read_shard

GERMAN = "Die Häuser am Fluß sind schön, größer als früher; müde Mädchen gehen über die Brücke.\n"
FRENCH = "L'élève était déjà là où la forêt commence ; après le château, le garçon naïf chantait.\n"
RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастлива по-своему.\n"
POLISH = (
    "Litwo! Ojczyzno moja! ty jesteś jak zdrowie. Ile cię trzeba cenić, ten tylko się dowie, kto "
    "cię stracił. Dziś piękność twą w całej ozdobie widzę i opisuję.\n"
)
ARABIC = "السلام عليكم يوم جميل البحر الكتاب مدرسة بيت شجرة ماء شمس قمر طريق\n"
CHINESE = "春江潮水连海平，海上明月共潮生。滟滟随波千万里，何处春江无月明！\n"
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n"
KOREAN = "나라의 말이 중국과 달라 문자와 서로 통하지 아니하므로 이런 까닭으로\n"
QUOTES = "It’s a “quoted” line — nothing else of it is beyond ASCII, and there is much of that.\n"


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def text_of(dataset):
    shards = dataset.train + dataset.val
    return "".join(dataset.tokenizer.decode(read_shard(path)) for path in shards)


def open_with(path, cache, **options):
    return open_dataset(
        DataConfig(data="text", text=str(path), tokenizer="bytes", **options), cache
    )


@pytest.mark.parametrize(
    "encoding, line",
    [
        ("latin-1", GERMAN),
        ("cp1252", GERMAN),
        ("latin-1", FRENCH),
        ("cp1252", QUOTES),
        ("cp1251", RUSSIAN),
        ("koi8-r", RUSSIAN),
        ("iso8859-2", POLISH),
        ("cp1250", POLISH),
        ("cp1256", ARABIC),
        ("gbk", CHINESE),
        ("shift_jis", JAPANESE),
        ("euc-kr", KOREAN),
    ],
)
@pytest.mark.parametrize("head", ["", "Plain English, and much of it, comes before.\n" * 2000])
def test_the_encoding_is_found(tmp_path, encoding, line, head):
    """Though a long beginning is ASCII; and a line says what it was taken for."""
    path = put(tmp_path / "a.txt", (head + line * 60).encode(encoding))
    dataset = open_text(path, "bytes", tmp_path / "cache")
    assert text_of(dataset) == head + line * 60
    [remark] = [note for note in dataset.notes if "read as" in note]
    assert remark.startswith("a.txt: read as ") and "--encoding NAME" in remark


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_a_byte_order_mark_decides_and_is_no_character(tmp_path, encoding):
    mark = {"utf-8": codecs.BOM_UTF8, "utf-16-be": codecs.BOM_UTF16_BE}.get(encoding, b"")
    mark = codecs.BOM_UTF32_BE if encoding == "utf-32-be" else mark
    path = put(tmp_path / "a.txt", mark + (GERMAN * 60).encode(encoding))
    for options in ({}, dict(encoding="koi8-r")):
        assert text_of(open_with(path, tmp_path / "cache", **options)) == GERMAN * 60


def test_the_fingerprint_is_of_the_text_whatever_its_encoding(tmp_path):
    found = set()
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "cp1252"):
        path = put(tmp_path / encoding / "a.txt", (GERMAN * 200).encode(encoding))
        found.add(open_text(path, "bytes", tmp_path / "cache").fingerprint)
    assert len(found) == 1


def test_an_encoding_that_is_given_is_used(tmp_path):
    """Where the library would guess otherwise, or cannot; and prepared anew for another."""
    path = put(tmp_path / "a.txt", (GERMAN * 60).encode("cp037"))
    assert text_of(open_with(path, tmp_path / "cache", encoding="cp037")) == GERMAN * 60
    utf16 = put(tmp_path / "b.txt", (GERMAN * 60).encode("utf-16-le"))
    assert text_of(open_with(utf16, tmp_path / "cache", encoding="utf-16-le")) == GERMAN * 60
    with pytest.raises(InputError, match="takes --encoding utf-16-le or -be"):
        open_with(utf16, tmp_path / "cache")


def test_an_encoding_that_looks_wrong_is_used_and_said(tmp_path):
    path = put(tmp_path / "a.txt", GERMAN * 60)
    dataset = open_with(path, tmp_path / "cache", encoding="latin-1")
    assert text_of(dataset) == (GERMAN * 60).encode().decode("latin-1")
    assert "a.txt: read as latin-1, but is valid UTF-8" in dataset.notes[1]
    ascii_only = put(tmp_path / "b.txt", "plain\n" * 60)
    assert len(open_with(ascii_only, tmp_path / "cache", encoding="latin-1").notes) == 1


@pytest.mark.parametrize("name", ["nonsense", "base64", "rot13", "\0"])
def test_unknown_encodings(name):
    assert not known(name)
    with pytest.raises(InputError, match="--encoding .*expected an encoding that Python knows"):
        DataConfig(data="text", text="x", encoding=name)


@pytest.mark.parametrize("tokenizer", ["bytes", "chars"])
def test_replaced_characters_are_counted_and_bounded(tmp_path, tokenizer):
    """Damaged UTF-8 is no other encoding. One in a hundred is as much as passes."""
    whole = (GERMAN * 60).encode()
    for bad, passes in ((3, True), (60, False)):
        content = whole[: -bad * 8] + b"\xff       " * bad
        path = put(tmp_path / f"{bad}.txt", content)
        if passes:
            dataset = open_text(path, tokenizer, tmp_path / "cache")
            assert "3.txt: 3 characters (0.06%) cannot be read and are U+FFFD" in dataset.notes
            assert text_of(dataset).count("\ufffd") == bad
        else:
            with pytest.raises(InputError, match=r"1% of its characters cannot be read as utf-8"):
                open_text(path, tokenizer, tmp_path / "cache")


def test_characters_that_were_replaced_before_count(tmp_path):
    path = put(tmp_path / "a.txt", "caf\ufffd " * 100)
    with pytest.raises(InputError, match="20% of its characters cannot be read"):
        open_text(path, "bytes", tmp_path / "cache")


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("book.pdf", b"%PDF-1.4\n" + bytes(range(1, 256)) * 50, "a PDF; .*pdftotext"),
        ("book.txt", b"%PDF-1.4\n" + bytes(range(1, 256)) * 50, "a PDF"),
        ("a.txt.gz", gzip.compress(GERMAN.encode()), "compressed; .*gunzip"),
        ("a.gz", b"not even compressed\n", "compressed"),
        ("a.zst", b"\x28\xb5\x2f\xfdx", "unzstd"),
        ("a.xz", b"\xfd7zXZ\0x", "unxz"),
        ("a.bz2", b"BZh91AY&SY", "bunzip2"),
        ("book.epub", b"PK\3\4mimetype", "a zip archive"),
        ("a.parquet", b"PAR1\x15", "parquet"),
        ("a.jsonl", b'{"text": "a"}\n', "JSON lines"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}\n', "JSON lines"),
        ("random", bytes(i * i % 251 + 1 for i in range(9000)), "binary"),
    ],
)
def test_what_is_no_text_yet(tmp_path, name, content, said):
    """Refused with what to do; in a folder of text, left out and named."""
    path = put(tmp_path / "in" / name, content)
    with pytest.raises(InputError, match=f"{name}: expected text, found a file that is .*{said}"):
        open_text(path, "bytes", tmp_path / "cache")
    with pytest.raises(InputError, match=f"{name}: expected text"):
        open_text(path.parent, "bytes", tmp_path / "cache")
    put(tmp_path / "in" / "text.txt", GERMAN * 60)
    dataset = open_text(path.parent, "bytes", tmp_path / "cache")
    assert text_of(dataset) == GERMAN * 60
    assert dataset.notes[1].startswith(f"left out 1 file: {name} (")


def test_a_file_of_json_is_text(tmp_path):
    for content in ('{\n "a": 1\n}\n', '{"a": 1}', "[1,\n2]", "{\n"):
        assert examine(put(tmp_path / "a.json", content)).encoding == "utf-8"


def test_blocks_do_not_matter(tmp_path, monkeypatch):
    """Characters and pairs of UTF-16 across them are whole."""
    monkeypatch.setattr(encodings, "BLOCK", 7)
    for encoding in ("utf-8", "utf-16", "gb18030", "utf-32"):
        path = put(tmp_path / "a.txt", (CHINESE + "🙂").encode(encoding))
        found = examine(path, "" if encoding.startswith("utf") else encoding)
        assert (found.chars, found.replaced) == (len(CHINESE) + 1, 0)
        encodings.write_utf8(path, found.encoding, tmp_path / "b.txt")
        assert (tmp_path / "b.txt").read_bytes() == (CHINESE + "🙂").encode()


def test_half_a_character_at_the_end_is_counted(tmp_path):
    found = examine(put(tmp_path / "a.txt", (GERMAN * 9).encode("utf-16") + b"x"))
    assert (found.chars, found.replaced) == (len(GERMAN * 9) + 1, 1)


def test_nothing_is_left_of_the_copies(tmp_path):
    """Neither where it is prepared, nor where that fails midway."""
    for name in "ab":
        put(tmp_path / "in" / name, (GERMAN * 60).encode("utf-16"))
    folder = prepare_text(tmp_path / "in", "bytes", tmp_path / "cache")[0]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]
    assert not any(path.is_dir() for path in folder.iterdir())
    with pytest.raises(InputError, match="unknown tokenizer"):
        prepare_text(tmp_path / "in", "nonsense", tmp_path / "cache2")
    assert not any((tmp_path / "cache2").iterdir())


def test_a_file_with_a_mark_and_nothing_else(tmp_path):
    with pytest.raises(InputError, match="a.txt: expected text, found a file that is empty"):
        open_text(put(tmp_path / "a.txt", codecs.BOM_UTF8), "bytes", tmp_path / "cache")


def test_a_long_list_is_cut(tmp_path):
    line = prepare.left_out_line([(f"f{i}", "binary; do") for i in range(9)] + [(".x/", "hidden")])
    assert line == (
        "left out 9 files and 1 folder: f0 (binary), f1 (binary), f2 (binary) and 7 more"
    )


def test_not_text_says_why(tmp_path):
    with pytest.raises(NotText, match="binary"):
        examine(put(tmp_path / "a", b"x\0"))
