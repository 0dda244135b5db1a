"""What others kept becomes a store: every format against the log-probabilities that it was written from."""

from __future__ import annotations

import copy
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from import_cases import (
    CONFIG,
    VOCABULARY,
    K,
    distillkit,
    documents,
    imported,
    lines,
    log_softmax,
    parquet,
    stored,
    top,
    top_k_rows,
    vllm_row,
)
from language_cases import CHATML, byte_level
from predistill.store import TeacherStore
from predistill.store.verify import verify
from predistill.teacher_dump.importing.distillkit import Compression, decompressed, load_compression
from predistill.teacher_dump.importing.token_texts import TokenTexts

TOP_K = {"ids_column": "ids", "values_column": "logprobs"}
DOCS = documents(20)


def check(
    store: TeacherStore, docs: list[tuple[list[int], np.ndarray]] = DOCS, last: bool = False, within: float = 1e-6
) -> None:
    """The top K of each token's own distribution stands at it; of the last token only where that was told."""
    assert store.task == "causal-lm"
    for row, (tokens, logprobs) in enumerate(docs):
        found, (ids, values) = stored(store, row), top(logprobs)
        assert store.select()[row]["input_ids"].tolist() == tokens
        assert sorted(found) == list(range(len(tokens) - (not last)))
        for at, entries in found.items():
            assert set(entries) == set(ids[at].tolist())
            assert list(entries) == sorted(entries, key=lambda one: -entries[one])
            assert [entries[one] for one in ids[at].tolist()] == pytest.approx(values[at].tolist(), abs=within)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "json", "large lists", "row groups", "shuffled"])
def test_lists_of_ids_and_logprobs(kind: str, tmp_path: Path) -> None:
    rows = top_k_rows(DOCS)
    if kind == "shuffled":
        for row in rows:
            for ids, values in zip(row["ids"], row["logprobs"], strict=True):
                order = np.random.default_rng(1).permutation(K)
                ids[:], values[:] = [ids[one] for one in order], [values[one] for one in order]
    source = tmp_path / f"rows.{kind if kind.startswith('json') else 'parquet'}"
    if kind == "json":
        source.write_text(json.dumps(rows))
    elif kind == "jsonl.gz":
        with gzip.open(source, "wt") as file:
            file.writelines(json.dumps(row) + "\n\n" for row in rows)
    elif kind == "jsonl":
        lines(source, rows)
    elif kind == "large lists":
        schema = pa.schema([
            ("input_ids", pa.large_list(pa.uint16())), ("ids", pa.large_list(pa.list_(pa.int32(), K))),
            ("logprobs", pa.list_(pa.large_list(pa.float64()))),
        ])  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows, schema), source)
    else:
        parquet(source, rows, row_group_size=3 if kind == "row groups" else 100)
    store = imported(source, tmp_path / "store", dtype="float32", vocabulary=VOCABULARY, **TOP_K)
    check(store, last=True)
    assert verify(store.path)["ok"]
    assert store.fields["teacher_top_k_logits"].shape == ("S", K)
    assert store.settings["imported"] and store.identity["teacher"]["weights_sha256"] == "unknown"


def test_the_last_position_may_be_missing_and_labels_may_be_there(tmp_path: Path) -> None:
    rows = top_k_rows(DOCS)
    for row in rows:
        row["ids"], row["logprobs"] = row["ids"][:-1], row["logprobs"][:-1]
        row["labels"] = [-100, *row["input_ids"][1:]]
    store = imported(parquet(tmp_path / "rows.parquet", rows), tmp_path / "store", dtype="float32", **TOP_K)
    check(store)
    assert store.select()[3]["labels"].tolist() == rows[3]["labels"]
    assert store.fields["teacher_top_k_logits"].shape == ("P", K)


def test_probabilities_that_stand_at_the_token_they_speak_of(tmp_path: Path) -> None:
    rows = [
        {"tokens": tokens, "ids": [[], *ids], "p": [None, *np.exp(np.array(values)).tolist()]}
        for tokens, (ids, values) in ((tokens, _tops(logprobs[:-1])) for tokens, logprobs in DOCS)
    ]
    store = imported(
        lines(tmp_path / "rows.jsonl", rows), tmp_path / "store", dtype="float32", tokens_column="tokens",
        ids_column="ids", values_column="p", values="probabilities", alignment="own",
    )  # fmt: skip
    check(store)


def test_vllm(tmp_path: Path) -> None:
    for name, ranks in (("ranked", True), ("plain", False)):
        source = lines(tmp_path / f"{name}.jsonl", [vllm_row(*doc, ranks=ranks) for doc in DOCS])
        store = imported(source, tmp_path / name, dtype="float32", vocabulary=VOCABULARY, top_k_logits=K)
        assert store.settings["format"] == "vllm"
        check(store)
        for row, (tokens, logprobs) in enumerate(DOCS):  # the token itself is told, of the top k or not
            own = [logprobs[at][token] for at, token in enumerate(tokens[1:])]
            kept = [max(logprobs[at]) for at in range(len(tokens) - 1)]
            said = store.select()[row]
            assert said["teacher_loss"] == pytest.approx(-np.mean(own), abs=1e-5)
            assert said["teacher_confidence"] == pytest.approx(np.exp(kept).mean(), abs=1e-5)
    assert store.sql("SELECT count(*) FROM samples WHERE teacher_entropy IS NULL").fetchall() == [(len(DOCS),)]


def test_vllm_answers_of_its_server_and_what_it_generated(tmp_path: Path) -> None:
    rows = []
    for tokens, logprobs in DOCS:
        whole = vllm_row(tokens, logprobs)
        positions = whole["prompt_logprobs"]
        made = {"token_ids": tokens[2:], "logprobs": positions[2:]}
        rows.append({"prompt_token_ids": tokens[:2], "prompt_logprobs": positions[:2], "outputs": [made]})
    options = {"dtype": "float32", "top_k_logits": K}
    check(imported(lines(tmp_path / "offline.jsonl", rows), tmp_path / "offline", **options))
    rows = [
        {"response": {"body": {"model": "x", "choices": [vllm_row(tokens, logprobs)]}}} for tokens, logprobs in DOCS
    ]
    check(imported(lines(tmp_path / "server.jsonl", rows), tmp_path / "server", **options))


def test_the_token_itself_is_left_out_where_it_comes_beside_the_largest(tmp_path: Path) -> None:
    """Of a document in which some tokens are of the top k and some are not."""
    tokens, logprobs = [*DOCS[0][0]], DOCS[0][1]
    tokens[1] = int(logprobs[0].argmax())
    for ranks in (True, False):
        source = lines(tmp_path / f"{ranks}.jsonl", [vllm_row(tokens, logprobs, ranks=ranks)])
        check(imported(source, tmp_path / f"{ranks}", dtype="float32"), [(tokens, logprobs)])


def test_distillkit_exact(tmp_path: Path) -> None:
    said = {**CONFIG, "exact_k": K, "exact_dtype": "float32", "polynomial_terms": None}
    store = imported(distillkit(tmp_path / "captured", DOCS, said), tmp_path / "store", dtype="float32")
    check(store, within=1e-5)
    assert store.fields["teacher_top_k_indices"].parameters["vocabulary"] == VOCABULARY


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
def test_distillkit_polynomials_and_residuals(delta: bool, normalized: bool, tmp_path: Path) -> None:
    bins = [
        {"scale_dtype": "float32", "element_bits": 13, "num_elements": 5},
        {"scale_dtype": "float16", "element_bits": 16, "num_elements": 11},
    ]
    said = {
        **CONFIG, "k": 20, "exact_k": 4, "exact_dtype": "float32", "polynomial_terms": [0, 1, 2, "sqrt", "exp"],
        "term_dtype": "float64", "residual_bins": bins, "delta_encoding": delta, "normalize_t": normalized,
    }  # fmt: skip
    store = imported(distillkit(tmp_path / "captured", DOCS, said), tmp_path / "store", dtype="float32")
    for row, (tokens, logprobs) in enumerate(DOCS):
        found = stored(store, row)
        assert len(found) == len(tokens) - 1
        for at, entries in found.items():
            assert len(entries) == 20
            assert max(abs(value - logprobs[at][one]) for one, value in entries.items()) < 5e-3


def test_distillkit_bfloat16_and_one_bit(tmp_path: Path) -> None:
    """By hand: two values of bfloat16, a polynomial 1 - t, one bit a residual of scale 0.5."""
    path = tmp_path / "compression_config.yaml"
    path.write_text(
        "logprob_compressor: {d: 40, k: 4, exact_k: 2, exact_dtype: bfloat16, polynomial_terms: [0, 1], "
        "delta_encoding: false, residual_bins: [{scale_dtype: float32, element_bits: 1, num_elements: 2}]}"
    )
    exact = [0x80, 0xBF, 0x00, 0xC0]  # -1, -2: the upper halves of 0xBF800000 and 0xC0000000
    terms, scale = np.array([1, -1], "<f4").tobytes(), np.array([0.5], "<f4").tobytes()
    row = np.frombuffer(bytes(exact) + terms + scale + bytes([0b01000000]), np.uint8)
    said = load_compression(path)
    assert isinstance(said, Compression)
    assert decompressed(row[None], said).tolist() == [[-1, -2, 1 - 0.5, 0 + 0.5]]


def test_older_distillkit(tmp_path: Path) -> None:
    """All values exact: ids are words of 64 bits, as many as fit, the first in the lowest bits."""
    (tmp_path / "captured").mkdir()
    (tmp_path / "captured" / "compression_config.yaml").write_text(
        json.dumps({"vocab_size": VOCABULARY, "k": K, "exact_k": 4, "polynomial_degree": 1, "invert_polynomial": False})
    )
    rows = []
    for tokens, logprobs in DOCS:
        ids, values = top(logprobs[:-1])
        values[:, 5] = values[:, 4] - 0.25  # a line through the last two
        packed = [[sum(int(one) << (6 * at) for at, one in enumerate(row))] for row in ids]
        coefficients = [[row[4] + 0.25, -0.25] for row in values.tolist()]
        rows.append({
            "input_ids": tokens, "packed_indices": packed, "exact_values": values[:, :4].tolist(),
            "coeffs": coefficients,
        })  # fmt: skip
    lines(tmp_path / "captured" / "rows.jsonl", rows)
    store = imported(tmp_path / "captured", tmp_path / "store", dtype="float32")
    for row, (_, logprobs) in enumerate(DOCS):
        for at, entries in stored(store, row).items():
            ids, values = top(logprobs)
            own = [*values[at][:5].tolist(), values[at][4] - 0.25]
            assert [entries[one] for one in ids[at].tolist()] == pytest.approx(own, abs=1e-5)


def test_arcee_logits_weigh_nothing_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Logits, not log-probabilities; padded, with an attention mask."""
    rows = []
    for tokens, logprobs in DOCS:
        ids, values = top(logprobs)
        pad = 3
        rows.append({
            "input_ids": tokens + [0] * pad, "attention_mask": [1] * len(tokens) + [0] * pad,
            "token_ids": ids.tolist() + [[0] * K] * pad, "top_values": (values + 17).tolist() + [[0.0] * K] * pad,
        })  # fmt: skip
    store = imported(parquet(tmp_path / "rows.parquet", rows), tmp_path / "store", dtype="float32")
    assert store.settings["format"] == "arcee" and store.settings["values"] == "logits"
    assert "are taken for all" in capsys.readouterr().err
    for row, (tokens, logprobs) in enumerate(DOCS):
        found, (ids, values) = stored(store, row), top(logprobs)
        assert sorted(found) == list(range(len(tokens)))
        for at, entries in found.items():
            expected = log_softmax(values[at])
            assert [entries[one] for one in ids[at].tolist()] == pytest.approx(expected.tolist(), abs=1e-5)


def test_axolotl_columns(tmp_path: Path) -> None:
    """Entries stand at the token that they speak of, those of the prompt are padding, and the kept ones sum to 1."""
    rows = []
    for tokens, logprobs in DOCS:
        prompt = 1 + len(tokens) // 3
        ids, values = top(logprobs)
        values = log_softmax(values)
        shifted_ids = [list(range(K))] * prompt + ids[prompt - 1 : -1].tolist()
        shifted = [[-float("inf")] * K] * prompt + values[prompt - 1 : -1].tolist()
        rows.append({
            "input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": [-100] * prompt + tokens[prompt:],
            "target_token_ids": shifted_ids, "target_logprobs": shifted,
            "target_mask": [[0] * K] * prompt + [[1] * K] * (len(tokens) - prompt),
        })  # fmt: skip
    store = imported(parquet(tmp_path / "rows.parquet", rows), tmp_path / "store", dtype="float32")
    assert store.settings["format"] == "axolotl"
    for row, (tokens, logprobs) in enumerate(DOCS):
        prompt, found = 1 + len(tokens) // 3, stored(store, row)
        assert sorted(found) == list(range(prompt - 1, len(tokens) - 1))
        ids, values = top(logprobs)
        for at, entries in found.items():
            expected = log_softmax(values[at]).tolist()
            assert [entries[one] for one in ids[at].tolist()] == pytest.approx(expected, abs=1e-5)


PROMPT, ANSWER = "user what is the sky", " it is blue"


def _openai(tokenizer: Any) -> tuple[list[int], list[int], np.ndarray]:
    """(prompt, answer, log-probabilities [answer, V])"""
    prompt, answer = (tokenizer(text)["input_ids"] for text in (PROMPT, ANSWER))
    return prompt, answer, log_softmax(np.random.default_rng(2).normal(0, 3, (len(answer), len(tokenizer))))


def _told(tokenizer: Any, token: int, logprob: float, as_ids: bool) -> dict[str, Any]:
    text = f"token_id:{token}" if as_ids else tokenizer.decode([token])
    raw = bytes(tokenizer.decode([token]), "utf-8") if "\ufffd" not in tokenizer.decode([token]) else None
    return {"token": text, "logprob": logprob, "bytes": None if raw is None else list(raw)}


@pytest.mark.parametrize("as_ids", [True, False])
def test_openai_chat(as_ids: bool, tmp_path: Path) -> None:
    tokenizer = byte_level(CHATML)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    _, answer, logprobs = _openai(tokenizer)
    messages = [{"role": "user", "content": "what is the sky"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    logprobs[:, [one for one in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([one])]] = -50
    content = []
    for at, token in enumerate(answer):
        ids = np.argsort(-logprobs[at])[:5].tolist()
        others = [_told(tokenizer, one, float(logprobs[at][one]), as_ids) for one in ids]
        content.append({**_told(tokenizer, token, float(logprobs[at][token]), as_ids), "top_logprobs": others})
    row = {"messages": messages, "choices": [{"message": {"content": ANSWER}, "logprobs": {"content": content}}]}
    source = lines(tmp_path / "rows.jsonl", [row])
    store = imported(source, tmp_path / "store", dtype="float32", tokenizer=str(tmp_path / "tokenizer"))
    found, said = stored(store, 0), store.select()[0]
    assert said["input_ids"].tolist() == prompt + answer
    assert said["labels"].tolist() == [-100] * len(prompt) + answer
    assert sorted(found) == list(range(len(prompt) - 1, len(prompt) + len(answer) - 1))
    for at in range(len(answer)):
        ids = np.argsort(-logprobs[at])[:5].tolist()
        entries = found[len(prompt) - 1 + at]
        assert [entries[one] for one in ids] == pytest.approx([logprobs[at][one] for one in ids], abs=1e-6)
    own = [logprobs[at][token] for at, token in enumerate(answer)]
    assert said["teacher_loss"] == pytest.approx(-np.mean(own), abs=1e-5)
    assert (store.path / "tokenizer" / "tokenizer.json").is_file()
    assert store.fields["teacher_top_k_indices"].parameters["vocabulary"] == len(tokenizer)


def test_openai_completions_with_echo(tmp_path: Path) -> None:
    """tokens, token_logprobs and top_logprobs of the prompt too, the first null."""
    rows = []
    for tokens, logprobs in DOCS:
        tops: list[Any] = [None]
        for at, token in enumerate(tokens[1:]):
            ids = dict.fromkeys([*np.argsort(-logprobs[at])[:K].tolist(), token])
            tops.append({f"token_id:{one}": float(logprobs[at][one]) for one in ids})
        own = [None, *(float(logprobs[at][token]) for at, token in enumerate(tokens[1:]))]
        said = {"tokens": [f"token_id:{one}" for one in tokens], "token_logprobs": own, "top_logprobs": tops}
        rows.append({"choices": [{"text": "…", "logprobs": said}]})
    store = imported(lines(tmp_path / "rows.jsonl", rows), tmp_path / "store", dtype="float32", top_k_logits=K)
    assert store.settings["format"] == "openai"
    check(store)


def test_several_splits_and_files_in_their_order(tmp_path: Path) -> None:
    """data_10 after data_2; shards are cut by size, and the same store comes of the same rows in one file."""
    (tmp_path / "many").mkdir()
    rows = top_k_rows(DOCS)
    for number in range(12):
        part = rows[number : number + 1] if number < 11 else rows[11:]
        parquet(tmp_path / "many" / f"data_{number}.parquet", part)
    one = parquet(tmp_path / "many.parquet", rows)
    dev = lines(tmp_path / "dev.jsonl", rows[:3])
    options = {"dtype": "float32", "shard_size": 2000, **TOP_K}
    many = imported(f"train={tmp_path / 'many'},validation={dev}", tmp_path / "a", **options)
    whole = imported(f"train={one},validation={dev}", tmp_path / "b", **options)
    assert len(many.shards) > 3 and many.splits["validation"]["samples"] == 3
    assert many.fingerprint == whole.fingerprint
    for shard in many.shards:
        left, right = ((folder / "shards" / f"{shard.name}.arrow").read_bytes() for folder in (many.path, whole.path))
        assert left == right
    for row, (tokens, _) in enumerate(DOCS):
        assert many.select(split="train")[row]["input_ids"].tolist() == tokens


def test_half_precision_is_within_its_rounding(tmp_path: Path) -> None:
    source = parquet(tmp_path / "rows.parquet", top_k_rows(DOCS))
    for dtype, bits in (("float16", 11), ("bfloat16", 8)):
        store = imported(source, tmp_path / dtype, dtype=dtype, **TOP_K)
        for row, (_, logprobs) in enumerate(DOCS):
            for at, entries in stored(store, row).items():
                largest = max(logprobs[at])
                for one, value in entries.items():
                    assert abs(value - logprobs[at][one]) <= abs(logprobs[at][one] - largest) * 2.0**-bits + 1e-6


def _tops(logprobs: np.ndarray) -> tuple[list[list[int]], list[list[float]]]:
    ids, values = top(logprobs)
    return ids.tolist(), values.tolist()


def test_positions_of_different_sizes(tmp_path: Path) -> None:
    rows = copy.deepcopy(top_k_rows(DOCS))
    for row in rows:
        for at in range(len(row["input_ids"])):
            row["ids"][at], row["logprobs"][at] = row["ids"][at][: 1 + at % K], row["logprobs"][at][: 1 + at % K]
    store = imported(parquet(tmp_path / "rows.parquet", rows), tmp_path / "store", dtype="float32", **TOP_K)
    assert store.fields["teacher_top_k_logits"].shape == ("S", "K") and verify(store.path)["ok"]
    for row, (_, logprobs) in enumerate(DOCS):
        for at, entries in stored(store, row).items():
            ids, values = top(logprobs)
            assert [*entries] == ids[at][: 1 + at % K].tolist()
            assert [*entries.values()] == pytest.approx(values[at][: 1 + at % K].tolist(), abs=1e-6)


def test_the_example_of_the_page_runs(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "importing.md").read_text(encoding="utf-8")
    example = page.split("```sh\n")[1].split("```")[0]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-e"], input=example, cwd=tmp_path, env={**os.environ, "PATH": path},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "my-teacher" in done.stdout and "ok: 1 shards, 2 samples" in done.stdout


def test_which_token_a_text_is() -> None:
    """By text; by bytes, where a token is part of a character; not where two tokens have one text."""
    tokenizer = byte_level()
    texts = TokenTexts(tokenizer)
    spelled = {one: at for at, one in enumerate(_bytes_to_unicode())}
    for one, token in tokenizer.get_vocab().items():
        if one not in tokenizer.all_special_tokens and all(letter in spelled for letter in one):
            raw = [spelled[letter] for letter in one]
            assert texts.id_of("what it says does not matter", raw) == token
            if (text := tokenizer.decode([token])).encode("utf-8", "ignore") == bytes(raw):
                assert texts.id_of(text) == token
    assert texts.id_of("\ufffd") is None and texts.is_ambiguous("\ufffd")
    assert texts.id_of("nothing of the kind") is None


def _bytes_to_unicode() -> list[str]:
    """GPT-2's, by its definition: printable bytes are themselves, the others follow from 256 on."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters, more = {}, 0
    for one in range(256):
        letters[one] = chr(one) if one in kept else chr(256 + more)
        more += one not in kept
    return [letters[one] for one in range(256)]
