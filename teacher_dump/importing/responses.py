"""Answers of servers, one a row: vLLM's prompt_logprobs, and top_logprobs as OpenAI's interface has them.

vLLM (`PromptLogprobs` of vllm/logprobs.py: list[dict[int, Logprob] | None], the first being null): at prompt token s
an object of token id -> {"logprob", "rank", "decoded_token"}, the token's own among them, of the top k or not;
with `prompt_token_ids` beside it, as RequestOutput has it, and the server's answers to return_token_ids. What was
generated, `outputs[0]` or `choices[0]` with `token_ids` and `logprobs` of the same kind, goes on from there.

OpenAI (ChatCompletionTokenLogprob): `choices[0].logprobs.content`, a list of {"token", "logprob", "bytes",
"top_logprobs": [the same three]}, of what was generated. The older completions have `tokens`, `token_logprobs` and
`top_logprobs`, a list of {token: logprob} or null; with echo, of the prompt too. A batch's answers stand below
`response.body`. Tokens are texts, or "token_id:N" (vLLM's return_tokens_as_token_ids).

S tokens of a row, E entries of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...store.schema import INPUT_IDS, MISSING_LABEL
from .numbers import Unfit, listed, whole_numbers
from .rows import NO_ENTRY, Rules, Said, check_tokens
from .token_texts import TokenTexts
from .topk import PROMPT_IDS, labels_of

PROMPT_LOGPROBS = "prompt_logprobs"
Entries = tuple[list[int], list[float]]  # ids and log-probabilities of one position


class VLLM(NamedTuple):
    """Reads rows with prompt_logprobs."""

    tokens: str | None
    labels: str
    rules: Rules
    columns: None = None  # all

    def read(self, row: dict[str, Any]) -> Said:
        """Raises Unfit."""
        body = _body(row)
        choice = _choice(body)
        said = _first(PROMPT_LOGPROBS, body, choice)
        if said is None:
            raise Unfit(f"{PROMPT_LOGPROBS} expected; there is none")
        prompt = _prompt_ids(self.tokens, row, body, choice)
        positions = listed(said, PROMPT_LOGPROBS)
        if len(positions) not in (len(prompt), len(prompt) - 1):
            raise Unfit(
                f"{len(prompt)} tokens, so {PROMPT_LOGPROBS} of as many positions, the first null, expected; got "
                f"{len(positions)}"
            )
        own = list(positions[1:] if len(positions) == len(prompt) else positions)
        made = _generated(choice)
        tokens = np.concatenate([prompt, made[0]])
        check_tokens(tokens, self.rules.vocabulary)
        found = [_by_id(position, int(token)) for position, token in zip([*own, *made[1]], tokens[1:], strict=True)]
        most = min((len(ids) for (ids, _), _ in found if ids), default=0)
        each = [
            (_without_own(entries, int(token), most), chosen)
            for (entries, chosen), token in zip(found, tokens[1:], strict=True)
        ]
        return _said(tokens, labels_of(row, self.labels, tokens), each, 0)


class OpenAI(NamedTuple):
    """Reads rows with top_logprobs. texts: of tokens; None where there is no tokenizer."""

    tokens: str | None
    texts: TokenTexts | None
    rules: Rules
    columns: None = None

    def read(self, row: dict[str, Any]) -> Said:
        """Raises Unfit."""
        body = _body(row)
        choice = _choice(body)
        said = _first("logprobs", choice, body) or body
        if not isinstance(said, Mapping):
            raise Unfit("logprobs: an object with content, or with tokens and top_logprobs, expected")
        if said.get("content") is not None:
            written = [self._chat(one) for one in _list(said["content"], "content")]
        elif said.get("tokens") is not None:
            written = self._completion(said)
        else:
            raise Unfit("logprobs with content, or with tokens and top_logprobs, expected; there are none")
        made = np.array([token for token, _, _ in written], np.int64)
        echoed = said.get("content") is None and bool(written) and not written[0][1][0]
        prompt = np.zeros(0, np.int64) if echoed else self._prompt(row, body, choice)
        tokens = np.concatenate([prompt, made])
        check_tokens(tokens, self.rules.vocabulary)
        each = [(entries, own) for _, entries, own in written]
        labels = tokens.copy()
        labels[: len(prompt)] = MISSING_LABEL
        return _said(tokens, labels, each if len(prompt) else each[1:], max(len(prompt) - 1, 0))

    def _chat(self, one: Any) -> tuple[int, Entries, float]:
        """(the token, entries, its own log-probability)"""
        if not isinstance(one, Mapping):
            raise Unfit("content: an object for each token expected")
        token, own = self._id(one.get("token"), one.get("bytes")), _number(one.get("logprob"))
        ids, values = [], []
        for other in _list(one.get("top_logprobs") or [], "top_logprobs"):
            if not isinstance(other, Mapping):
                raise Unfit("top_logprobs: objects with token and logprob expected")
            found = self._known(other.get("token"), other.get("bytes"))
            if found is not None and found not in ids:
                ids.append(found)
                values.append(_number(other.get("logprob")))
        return token, (ids, values), own

    def _completion(self, said: Mapping[str, Any]) -> list[tuple[int, Entries, float]]:
        names = ("tokens", "token_logprobs", "top_logprobs")
        tokens, owns, tops = (_list(said.get(name) or [], name) for name in names)
        if not len(tokens) == len(owns) == len(tops):
            raise Unfit(f"{', '.join(names)} as long expected; got {len(tokens)}, {len(owns)} and {len(tops)}")
        made = []
        for text, own, top in zip(tokens, owns, tops, strict=True):
            if top is not None and not isinstance(top, Mapping):
                raise Unfit("top_logprobs: an object of token and logprob, or null, for each token expected")
            pairs: dict[int, float] = {}
            for other, value in (top or {}).items():
                if (found := self._known(other, None)) is not None:
                    pairs.setdefault(found, _number(value))
            token = self._id(text, None)
            entries = (list(pairs), list(pairs.values()))
            made.append((token, entries, float("nan") if own is None else _number(own)))
        most = min((len(ids) for _, (ids, _), _ in made if ids), default=0)
        return [(token, _without_own(entries, token, most), own) for token, entries, own in made]

    def _id(self, text: Any, raw: Any) -> int:
        found = self._known(text, raw)
        if found is None:
            why = "no tokenizer is given (--tokenizer)" if self.texts is None else "the tokenizer has no such token"
            more = "" if self.texts is None or not self.texts.is_ambiguous(text) else ", or several"
            raise Unfit(f"the id of token {str(text)[:40]!r} is not known: {why}{more}")
        return found

    def _known(self, text: Any, raw: Any) -> int | None:
        if not isinstance(text, str):
            raise Unfit("a token is text; got something else")
        if text.startswith("token_id:") and text[9:].isdecimal() and len(text) < 20:
            return int(text[9:])
        return None if self.texts is None else self.texts.id_of(text, raw)

    def _prompt(self, row: Mapping[str, Any], body: Mapping[str, Any], choice: Mapping[str, Any]) -> np.ndarray:
        """int64: the tokens before what was generated, told or made of its text."""
        names = [self.tokens] if self.tokens else [PROMPT_IDS, INPUT_IDS]
        said = _first_of(names, row, body, choice)
        if said is not None:
            return whole_numbers(said, names[0])
        asked = [one for one in (row, row.get("request"), row.get("body"), body) if isinstance(one, Mapping)]
        messages, text = _first("messages", *asked), _first("prompt", *asked)
        if self.texts is None or (messages is None and not isinstance(text, str)):
            raise Unfit(
                f"what the answer continues expected: {PROMPT_IDS}, or messages or prompt and a --tokenizer; there is "
                "none"
            )
        return self.texts.conversation(messages) if messages is not None else self.texts.text(str(text))


def _body(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The answer itself, which a batch's output has below response.body."""
    inner = row.get("response")
    inner = inner.get("body", inner) if isinstance(inner, Mapping) else row
    return inner if isinstance(inner, Mapping) else row


def _choice(body: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in ("choices", "outputs"):
        found = body.get(name)
        if isinstance(found, list) and found:
            if len(found) > 1:
                raise Unfit(f"one of {name} a row expected; got {len(found)}")
            if isinstance(found[0], Mapping):
                return found[0]
    return {}


def _prompt_ids(name: str | None, *places: Mapping[str, Any]) -> np.ndarray:
    names = [name] if name else [PROMPT_IDS, INPUT_IDS]
    said = _first_of(names, *places)
    if said is None:
        raise Unfit(
            f"{' or '.join(names)} expected, the tokens that were scored; there is none (vLLM's server gives them for "
            "return_token_ids)"
        )
    return whole_numbers(said, names[0])


def _generated(choice: Mapping[str, Any]) -> tuple[np.ndarray, list[Any]]:
    """Tokens that follow the prompt, and an object by id of each; none where they were not kept so."""
    ids, said = choice.get("token_ids"), choice.get("logprobs")
    if not isinstance(ids, list) or not isinstance(said, list) or len(ids) != len(said):
        return np.zeros(0, np.int64), []
    return whole_numbers(ids, "token_ids"), said


def _by_id(position: Any, token: int) -> tuple[Entries, float]:
    """(entries of the top k, the token's own log-probability) of vLLM's object of one position."""
    if position is None:
        return ([], []), float("nan")
    if not isinstance(position, Mapping):
        raise Unfit(f"{PROMPT_LOGPROBS}: an object by token id, or null, for each token expected")
    ids, values, ranks = [], [], []
    for name, one in position.items():
        if not str(name).lstrip("-").isdecimal() or len(str(name)) > 12:
            raise Unfit(f"{PROMPT_LOGPROBS}: token ids expected; got {str(name)[:40]!r}")
        ids.append(int(name))
        values.append(_number(one.get("logprob") if isinstance(one, Mapping) else one))
        ranks.append(one.get("rank") if isinstance(one, Mapping) else None)
    own = values[ids.index(token)] if token in ids else float("nan")
    beyond = [type(rank) is int and rank > len(ids) for rank in ranks]
    if any(beyond):  # the token itself, which is told though it is not of the top k
        kept = [at for at, far in enumerate(beyond) if not far]
        ids, values = [ids[at] for at in kept], [values[at] for at in kept]
    return (ids, values), own


def _without_own(entries: Entries, token: int, most: int) -> Entries:
    """Without the token itself where it comes beside the top `most`, being the least of one entry more."""
    ids, values = entries
    if len(ids) != most + 1 or token not in ids or values[ids.index(token)] > min(values):
        return entries
    at = ids.index(token)
    return ids[:at] + ids[at + 1 :], values[:at] + values[at + 1 :]


def _said(tokens: np.ndarray, labels: np.ndarray, each: Iterable[tuple[Entries, float]], first: int) -> Said:
    """each: of the tokens after token `first`, one after another."""
    each = list(each)
    counts, chosen = np.zeros(len(tokens), np.int64), np.full(len(tokens), np.nan)
    owns = np.array([own for _, own in each], np.float64)
    counts[first : first + len(each)] = [len(ids) for (ids, _), _ in each]
    chosen[first : first + len(each)] = np.where(owns > NO_ENTRY, owns, np.nan)
    try:
        ids = np.array([one for (ids, _), _ in each for one in ids], np.int64)
    except OverflowError as error:
        raise Unfit("token ids below 2**63 expected") from error
    return Said(tokens, labels, counts, ids, np.array([v for (_, values), _ in each for v in values], float), chosen)


def _first(name: str, *places: Mapping[str, Any]) -> Any:
    return _first_of([name], *places)


def _first_of(names: Sequence[str], *places: Mapping[str, Any]) -> Any:
    return next((place[name] for name in names for place in places if place.get(name) is not None), None)


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise Unfit(f"{name}: a list expected")
    return value


def _number(value: Any) -> float:
    """-inf where it is null, as JSON without infinities has it."""
    if value is None:
        return float("-inf")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unfit("a log-probability is a number; got something else")
    return float(value)
