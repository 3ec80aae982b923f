"""benchmarks/inference.py: each variant is measured, llama.cpp on what our exporter wrote."""

import pytest

from benchmarks import inference, llama_cpp

SMALL = dict(track="llama-1m", batch=(1, 2), context=(8,), tokens=3, repeats=1)


@pytest.fixture(autouse=True)
def quick_probes(monkeypatch):
    monkeypatch.setattr(inference, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(inference, "machine_probe", lambda device: dict(matmul=dict(bfloat16=1e9)))


def test_the_table_has_a_row_for_each_variant_and_batch():
    result = inference.run(**SMALL, kinds=("bfloat16", "int8"), no_transformers=True)
    found = {(r["variant"], r["batch"]) for r in result["rows"]}
    assert found == {(kind, rows) for kind in ("bfloat16", "int8") for rows in (1, 2)}
    for r in result["rows"]:
        assert r["decode_tokens_per_s"] > 0 and r["prefill_tokens_per_s"] > 0
        floor = r["bytes_per_step"] / r["read_bytes_per_s"]
        assert r["of_floor"] == pytest.approx(floor * r["decode_tokens_per_s"] / r["batch"])
    weights = {r["variant"]: r["bytes_per_step"] for r in result["rows"] if r["batch"] == 1}
    assert weights["int8"] < 0.6 * weights["bfloat16"]
    assert "| bfloat16 | 2 | 8 |" in inference.render(result)


def test_a_made_up_tokenizer_has_so_many_tokens():
    assert llama_cpp.made_up(2048).n_vocab == 2048


@pytest.mark.slow
def test_llama_cpp_and_transformers_take_turns_with_ours():
    pytest.importorskip("xllamacpp")
    result = inference.run(**SMALL, kinds=("float32", "int8"), llama_cpp=True)
    found = [(r["variant"], r["batch"]) for r in result["rows"]]
    assert ("llama.cpp f32", 1) in found and ("llama.cpp q8_0", 1) in found
    assert ("llama.cpp f32", 2) not in found and ("transformers float32", 2) in found
    assert "AVX" in result["instructions"]["llama.cpp"]
