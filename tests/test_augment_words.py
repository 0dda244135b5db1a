"""Words by place, texts with other words in them, and what is drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from predistill.store import DataError
from predistill.teacher_dump.augmentation.neighbours import Neighbours, read_vectors
from predistill.teacher_dump.augmentation.parts import part_bounds
from predistill.teacher_dump.augmentation.rewrite import views
from predistill.teacher_dump.augmentation.words import answer_span, in_case_of, text_passage, tokens_passage


def words_of(text: str) -> list[str]:
    return [text[start:end] for start, end in text_passage(text).words]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a warm, funny film.", ["a", "warm", "funny", "film"]),
        ("it does n't, don't, 's", ["it", "does"]),
        ("see http://x.org/a or me@x.org, #tag @name", ["see", "or"]),
        ("3rd B2B 1990s U.S. e.g. end.Next", []),
        ("Größe, naïve Περί слово", ["Größe", "naïve", "Περί", "слово"]),
        ("cafe\u0301 bar", ["bar"]),
        ("映画 film 映画film", ["film"]),
        ("state-of-the-art (so)", ["state", "of", "the", "art", "so"]),
        ("", []),
    ],
)
def test_words_are_letters_that_stand_alone(text: str, words: list[str]) -> None:
    assert words_of(text) == words


@pytest.mark.parametrize(
    ("word", "other", "made"),
    [
        ("Film", "movie", "Movie"), ("FILM", "movie", "MOVIE"), ("film", "movie", "movie"), ("A", "the", "The"),
        ("film", "Paris", "Paris"), ("FILM", "Paris", "Paris"),
    ],
)  # fmt: skip
def test_capitals_are_kept(word: str, other: str, made: str) -> None:
    assert in_case_of(word, other) == made


@given(st.text(alphabet="ab ,.'Zé\n", max_size=60), st.data())
def test_kept_spans_are_where_the_offsets_say(text: str, data: st.DataObject) -> None:
    spans = []
    for _ in range(data.draw(st.integers(0, 3))):
        start = data.draw(st.integers(0, len(text)))
        spans.append((start, data.draw(st.integers(start, len(text)))))
    spans = [(start, end) for start, end in spans if start < end]
    passage = text_passage(text, spans)
    picks = [data.draw(st.sampled_from([None, "x", "longer"])) for _ in passage.words]
    made = passage.rewritten(picks)
    for (start, end), moved in zip(spans, passage.moved(picks), strict=True):
        assert made[moved : moved + end - start] == text[start:end]
    assert passage.rewritten([None] * len(passage.words)) == text


@given(st.lists(st.sampled_from(["film", "n't", "3", ",", "", "two words", "Ä"]), max_size=12))
def test_a_list_of_words_keeps_its_length(tokens: list[str]) -> None:
    passage = tokens_passage(tokens)
    assert [passage.text[start:end] for start, end in passage.words] == [one for one in tokens if one in ("film", "Ä")]
    made = passage.rewritten(["new"] * len(passage.words))
    assert made == ["new" if one in ("film", "Ä") else one for one in tokens]


def test_an_answer_is_where_it_says() -> None:
    assert answer_span("q", "a warm film", "warm", 2) == (2, 6)
    for text, start in (("warm", 3), ("warm", -1), ("", 0), (None, 0), ("warm", "2"), ("warm", 200)):
        with pytest.raises(DataError, match="question q"):
            answer_span("q", "a warm film", text, start)


def test_views_hang_on_seed_row_and_view_alone() -> None:
    passage, choices = text_passage("one two three four"), [["a", "b"], ["c"], [], ["d", "e", "f"]]

    def made(factor: int, seed: int = 1, row: int = 7) -> list[tuple[int, str]]:
        return [(one.view, one.values[0]) for one in views(row, [passage], [choices], factor, 0.5, seed)]

    assert made(4) == made(40)[: len(made(4))]
    assert made(40) != made(40, seed=2) and made(40) != made(40, row=8)
    texts = [text for _, text in made(200)]
    assert len(set(texts)) == len(texts) == 3 * 2 * 4 - 1  # every combination but the row itself
    assert {text.split()[2] for text in texts} == {"three"}


def test_words_are_replaced_as_often_as_was_said() -> None:
    passage = text_passage(" ".join(["word"] * 500))
    made = [one.values[0].split() for one in views(0, [passage], [[["x", "y"]] * 500], 20, 0.4, 0)]
    share = np.mean([[word != "word" for word in words] for words in made])
    assert abs(share - 0.4) < 4 * (0.4 * 0.6 / 10_000) ** 0.5  # four standard errors
    assert abs(np.mean([[word == "x" for word in words] for words in made]) - share / 2) < 0.02


def test_a_row_without_candidates_has_no_views() -> None:
    assert not list(views(0, [text_passage("one two")], [[[], []]], 5, 1.0, 0))
    assert not list(views(0, [text_passage("... 42")], [[]], 5, 1.0, 0))


def test_two_texts_are_rewritten_apart() -> None:
    pair, choices = [text_passage("one"), text_passage("one")], [[["a", "b"]], [["a", "b"]]]
    made = {tuple(one.values) for one in views(0, pair, choices, 200, 0.5, 0)}
    assert made == {(a, b) for a in ("one", "a", "b") for b in ("one", "a", "b")} - {("one", "one")}


def test_parts_hold_so_many_words() -> None:
    sizes = [5, 5, 1, 30, 0, 0, 9]
    assert part_bounds(sizes, 10) == [(0, 2), (2, 3), (3, 4), (4, 7)]  # 30 words are a part by themselves
    assert part_bounds([3], 10) == [(0, 1)]


def test_neighbours_are_those_of_brute_force(tmp_path) -> None:
    rng = np.random.default_rng(0)
    names = [a + b for a in "abcdefgh" for b in "abcdefgh"]
    vectors = rng.normal(size=(64, 7)).astype(np.float32)
    lines = [f"{name} {' '.join(map(str, row))}" for name, row in zip(names, vectors, strict=True)]
    (tmp_path / "glove.txt").write_text("\n".join(["64 7", *lines, ". . 1 2 3 4 5 6 7", "2nd 1 2 3 4 5 6 7"]) + "\n")
    words, table = read_vectors(tmp_path / "glove.txt")
    assert words == names and np.array_equal(table, vectors)
    nearest = Neighbours(words, table, lambda word: table[words.index(word.lower())], 6)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for at in (0, 17, 63):
        expected = {names[one] for one in np.argsort(-unit @ unit[at])[1:7]}
        assert set(nearest.of(names[at])) == expected == set(nearest.of(names[at].upper()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "there are none"),
        ("film 1 2\nplot 1\n", "line 2: a word and 2 numbers expected"),
        ("film 1 2\nplot 1 x\n", "line 2.*'x'"),
        ("film 1 nan\n", "finite"),
        ("film\n", "line 1: a word and its numbers expected; 0 came"),
        ("no numbers\n. 1\n", "there are none"),
    ],
)
def test_bad_files_of_vectors(tmp_path, content: str, message: str) -> None:
    (tmp_path / "v.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        read_vectors(tmp_path / "v.txt")
