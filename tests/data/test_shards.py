"""data/shards.py: what is written is read back, and anything else is refused in one line."""

import errno
import os
import resource
import struct
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base import InputError
from data.shards import ShardWriter, read_shard

FAST = settings(deadline=None, max_examples=40)
WIDTHS = st.sampled_from([np.uint16, np.uint32])


def header(magic=20240520, version=1, n_tokens=0):
    return struct.pack("<256i", magic, version, n_tokens, *[0] * 253)


def body(*tokens):
    return struct.pack(f"<{len(tokens)}H", *tokens)


def put(folder, content):
    path = Path(folder) / "x.bin"
    path.write_bytes(content)
    return path


def refusal(path, *found, n_vocab=None):
    """The InputError of reading `path`: one line, with the file's name and each of `found` in
    it."""
    with pytest.raises(InputError) as e:
        read_shard(path, n_vocab)
    line = str(e.value)
    assert "\n" not in line and str(path) in line
    for part in found:
        assert str(part) in line.replace(str(path), ""), line
    return line


# reading


def test_reads_a_file_laid_out_by_hand(tmp_path):
    tokens = read_shard(put(tmp_path, header(n_tokens=4) + body(0, 1, 256, 65535)))
    assert (
        tokens.tolist() == [0, 1, 256, 65535] and tokens.dtype == np.uint16 and tokens.shape == (4,)
    )
    assert read_shard(str(tmp_path / "x.bin"), 65536).tolist() == [0, 1, 256, 65535]


def test_tokens_are_mapped_not_copied_and_read_only(tmp_path):
    tokens = read_shard(put(tmp_path, header(n_tokens=1) + body(7)))
    assert isinstance(tokens, np.memmap) and not tokens.flags.writeable
    with pytest.raises(ValueError):
        tokens[0] = 1


def test_where_files_cannot_be_mapped_they_are_read(tmp_path, monkeypatch):
    """As on some network and shared folders."""
    path = put(tmp_path, header(n_tokens=3) + body(7, 0, 65535))

    def refuse(number):
        def memmap(file, **kwargs):
            file.seek(0, os.SEEK_END)  # as numpy does to see how long it is
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(np, "memmap", memmap)

    refuse(errno.ENODEV)
    tokens = read_shard(path)
    assert tokens.tolist() == [7, 0, 65535] and tokens.dtype == np.uint16
    with pytest.raises(ValueError):
        tokens[0] = 1
    refuse(errno.EIO)  # a bad disk is no reason to go on
    refusal(path, "Input/output error")


def test_missing_file(tmp_path):
    refusal(tmp_path / "no.bin", "No such file")


def test_folder_in_place_of_a_file(tmp_path):
    refusal(tmp_path, "cannot read")


@pytest.mark.parametrize("size", [0, 1, 12, 1020, 1023])
def test_empty_file_and_short_header(tmp_path, size):
    refusal(
        put(tmp_path, header(n_tokens=1)[:size]),
        "expected a 1024-byte",
        f"found a file of {size} bytes",
    )


@pytest.mark.parametrize("magic", [0, 20240519, 20240521, -1, 20241220])
def test_wrong_magic(tmp_path, magic):
    refusal(
        put(tmp_path, header(magic, n_tokens=1) + body(1)),
        "expected magic 20240520",
        f"found {magic}",
    )


def test_big_endian_header(tmp_path):
    refusal(
        put(tmp_path, struct.pack(">256i", 20240520, 1, 1, *[0] * 253) + body(1)), "magic 20240520"
    )


@pytest.mark.parametrize("version", [0, 3, -1])
def test_wrong_version(tmp_path, version):
    refusal(
        put(tmp_path, header(version=version, n_tokens=1) + body(1)),
        "version 1",
        f"found {version}",
    )


@pytest.mark.parametrize("change", [-6, -3, -2, -1, 1, 2, 1000])
def test_truncated_or_trailing_bytes(tmp_path, change):
    """1 byte, 1 token or all tokens fewer than the header says, or some more."""
    content = header(n_tokens=3) + body(1, 2, 3)
    content = content[:change] if change < 0 else content + bytes(change)
    refusal(put(tmp_path, content), "expected 1030 bytes", "3 tokens", f"found {1030 + change}")


@pytest.mark.parametrize("n_tokens", [0, -1, -512, -(2**31)])
@pytest.mark.parametrize("tail", [b"", body(1)])
def test_token_count_zero_or_negative(tmp_path, n_tokens, tail):
    path = put(tmp_path, header(n_tokens=n_tokens) + tail)
    refusal(path, f"{n_tokens} tokens", f"found {1024 + len(tail)}")


def test_huge_token_count_allocates_nothing(tmp_path):
    refusal(
        put(tmp_path, header(n_tokens=2**31 - 1) + body(1)), 1024 + 2 * (2**31 - 1), "found 1026"
    )


@pytest.mark.parametrize("at", [0, 3, 6])
def test_token_beyond_the_vocabulary_is_named_with_its_position(tmp_path, at):
    tokens = [5] * 7
    tokens[at:] = [100 + i for i in range(7 - at)]  # the first is to be reported, not the largest
    path = put(tmp_path, header(n_tokens=7) + body(*tokens))
    refusal(path, "below 100", "found 100 ", f"position {at}:", n_vocab=100)
    assert len(read_shard(path, 107)) == len(read_shard(path)) == 7


# writing


@settings(FAST, max_examples=20)  # each shard waits for the disk
@given(WIDTHS, st.data(), st.integers(1, 12))
def test_round_trip(dtype, data, shard_tokens):
    """Whatever the width, the pieces and the shard size: full shards in order, only the last
    shorter, none empty."""
    tokens = st.lists(st.integers(0, np.iinfo(dtype).max), max_size=40)
    parts = data.draw(st.lists(tokens, max_size=5))
    whole = sum(parts, [])
    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(folder, "train", shard_tokens, dtype) as writer:
            for part in parts:
                writer.write(part)
        n = -(-len(whole) // shard_tokens)
        assert [p.name for p in writer.paths] == [f"train_{i:06d}.bin" for i in range(n)]
        assert sorted(os.listdir(folder)) == sorted(p.name for p in writer.paths)
        assert all(read_shard(p).dtype == dtype for p in writer.paths)
        shards = [read_shard(p).tolist() for p in writer.paths]
        assert shards == [whole[i : i + shard_tokens] for i in range(0, len(whole), shard_tokens)]
        assert writer.n_tokens == len(whole)


def test_bytes_on_disk_are_llm_c_s(tmp_path):
    """256 little-endian int32, three of them set, then little-endian uint16."""
    with ShardWriter(tmp_path, "v") as writer:
        writer.write([50256, 1, 258])
    assert (tmp_path / "v_000000.bin").read_bytes() == header(
        n_tokens=3
    ) + b"\x50\xc4\x01\x00\x02\x01"


def test_version_2_has_uint32(tmp_path):
    with ShardWriter(tmp_path, "v", dtype=np.uint32) as writer:
        writer.write([151643, 1])
    written = header(version=2, n_tokens=2) + struct.pack("<2I", 151643, 1)
    assert (tmp_path / "v_000000.bin").read_bytes() == written
    with pytest.raises(InputError, match="token 4294967296 does not fit .* uint32"):
        with ShardWriter(tmp_path, "v", dtype=np.uint32) as writer:
            writer.write([1 << 32])


def test_llm_c_s_shards_for_llama_3_are_read(tmp_path):
    path = put(tmp_path, header(20240801, 7, 2) + struct.pack("<2I", 128000, 5))
    assert read_shard(path).tolist() == [128000, 5]
    refusal(put(tmp_path, header(20240801, 1, 1) + bytes(4)), "version 7", "found 1")


@pytest.mark.parametrize("n", [8, 9])
def test_exact_multiple_of_the_shard_size_leaves_no_empty_shard(tmp_path, n):
    with ShardWriter(tmp_path, "t", 4) as writer:
        writer.write(np.arange(n))
    assert [len(read_shard(p)) for p in writer.paths] == [4, 4] + [1] * (n - 8)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, ">u2", np.int32, np.int64, np.uint64])
def test_any_integer_array(tmp_path, dtype):
    with ShardWriter(tmp_path, "t") as writer:
        writer.write(np.array([3, 200], dtype=dtype))
        writer.write(np.arange(10, 20).astype(dtype)[::3])  # not contiguous
    assert read_shard(writer.paths[0]).tolist() == [3, 200, 10, 13, 16, 19]


def test_folder_is_made_and_an_old_shard_replaced(tmp_path):
    for tokens in ([1, 2, 3], [4]):
        with ShardWriter(tmp_path / "a" / "b", "t") as writer:
            writer.write(tokens)
    assert read_shard(tmp_path / "a" / "b" / "t_000000.bin").tolist() == [4]


def test_nothing_written_makes_no_file(tmp_path):
    with ShardWriter(tmp_path, "t") as writer:
        writer.write([])
    assert writer.paths == [] and writer.n_tokens == 0 and os.listdir(tmp_path) == []


@pytest.mark.parametrize("tokens, bad", [([1, -1, 99999], -1), ([65536], 65536), ([2**40], 2**40)])
def test_values_out_of_uint16_are_refused_and_named(tmp_path, tokens, bad):
    with pytest.raises(InputError, match=rf"token {bad}\b"), ShardWriter(tmp_path, "t") as writer:
        writer.write([7])
        writer.write(tokens)
    assert os.listdir(tmp_path) == []


def test_exception_drops_the_open_shard_and_keeps_finished_ones(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path, "t", 4) as writer:
        writer.write(range(6))
        raise KeyError
    assert os.listdir(tmp_path) == ["t_000000.bin"] and read_shard(writer.paths[0]).tolist() == [
        0,
        1,
        2,
        3,
    ]
    assert writer.paths == [tmp_path / "t_000000.bin"] and writer.n_tokens == 4


def test_exception_leaves_an_older_shard_of_that_name_whole(tmp_path):
    with ShardWriter(tmp_path, "t") as writer:
        writer.write([1, 2])
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, "t") as writer:
        writer.write([3])
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["t_000000.bin"]
    assert read_shard(tmp_path / "t_000000.bin").tolist() == [1, 2]


def test_final_name_appears_only_when_the_shard_is_whole(tmp_path):
    with ShardWriter(tmp_path, "t", 4) as writer:
        writer.write([1, 2, 3])
        assert not (tmp_path / "t_000000.bin").exists()
        writer.write([4])
        assert len(read_shard(tmp_path / "t_000000.bin")) == 4


@contextmanager
def largest_file(n_bytes):
    """The system itself refuses to write past `n_bytes` (EFBIG; Python ignores the signal)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 1000, 1024, 1100, 20_000, 50_000])
@pytest.mark.parametrize("piece", [100, 15_000])
def test_failing_disk_gives_one_line_and_leaves_nothing(tmp_path, limit, piece):
    """Whether buffered or not, and wherever in header or body the disk gives out."""
    with pytest.raises(InputError) as e, largest_file(limit), ShardWriter(tmp_path, "t") as writer:
        for _ in range(30_000 // piece):
            writer.write(np.ones(piece, dtype=np.uint16))
    assert "t_000000.bin: cannot write shard" in str(e.value) and "\n" not in str(e.value)
    assert os.listdir(tmp_path) == [] and writer.paths == [] and writer.n_tokens == 0


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failing_at_the_very_end(tmp_path, monkeypatch, call):
    """A network disk may first say so when asked to store, or to rename."""

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with (
        pytest.raises(InputError, match="t_000000.bin.*Input/output"),
        ShardWriter(tmp_path, "t") as writer,
    ):
        writer.write([1, 2, 3])
    assert os.listdir(tmp_path) == [] and writer.paths == []


def test_failing_disk_when_a_small_shard_is_closed(tmp_path):
    """All of it was still in the buffer until then."""
    with largest_file(1100), pytest.raises(InputError, match="cannot write"):
        with ShardWriter(tmp_path, "t") as writer:
            writer.write(range(100))
    assert os.listdir(tmp_path) == []


def test_failing_disk_keeps_finished_shards(tmp_path):
    """The third shard cannot be written; the two before it stay."""
    with (
        pytest.raises(InputError, match="t_000002.bin: cannot"),
        ShardWriter(tmp_path, "t", 4) as writer,
    ):
        writer.write(range(8))
        with largest_file(0):
            writer.write(np.ones(100_000, dtype=np.uint16))
    assert [len(read_shard(p)) for p in writer.paths] == [4, 4]


@pytest.mark.parametrize("shard_tokens", [3, 100])
def test_failing_rename_gives_one_line_and_leaves_no_partial_file(tmp_path, shard_tokens):
    """Inside write() when the shard is full, and at the end of the with-block."""
    (tmp_path / "t_000000.bin").mkdir()
    with (
        pytest.raises(InputError, match="t_000000.bin"),
        ShardWriter(tmp_path, "t", shard_tokens) as writer,
    ):
        writer.write([1, 2, 3])
    assert os.listdir(tmp_path) == ["t_000000.bin"]


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file"), ShardWriter(tmp_path / "file", "t") as writer:
        writer.write([1])
