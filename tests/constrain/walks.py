"""Random texts under a constraint, without a model: what a model that knows nothing would write."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import jsonschema
import numpy as np

from shoal.constrain.matcher import MatcherConstraint
from shoal.text.tokenizer import Tokenizer

_CLOSING = frozenset(b'"}],')  # most often taken where allowed, so that texts end


def allowed(constraint: MatcherConstraint, vocab_size: int) -> list[int]:
    """The tokens that may come next."""
    row = np.zeros(-(-vocab_size // 32), np.uint32)
    constraint.fill_mask(row)
    return [int(t) for t in np.flatnonzero(np.unpackbits(row.astype("<u4").view(np.uint8), bitorder="little"))]


def walk(constraint: MatcherConstraint, tokenizer: Tokenizer, rng: np.random.Generator, longest: int) -> bytes | None:
    """A text that the constraint allows; None where it has not ended after ``longest`` tokens."""
    text = b""
    for _ in range(longest):
        tokens = allowed(constraint, tokenizer.vocab_size)
        assert tokens
        if tokenizer.eog_ids.intersection(tokens) and (constraint.is_complete or rng.random() < 0.5):
            return text
        tokens = [token for token in tokens if token not in tokenizer.eog_ids]
        closing = [token for token in tokens if tokenizer.token_bytes(token)[0] in _CLOSING]
        token = int(rng.choice(closing if closing and rng.random() < 0.7 else tokens))
        text += tokenizer.token_bytes(token)
        constraint.advance(token)
    return text if constraint.is_accepting else None


def accepts(constraint: MatcherConstraint, tokenizer: Tokenizer, text: str) -> bool:
    """Whether the constraint allows the whole text, token by token, and an end after it."""
    constraint = constraint.copy()
    for token in tokenizer.encode_more(text):
        if token not in allowed(constraint, tokenizer.vocab_size):
            return False
        constraint.advance(token)
    return constraint.is_accepting


def validate(text: str | bytes, schema: Any) -> None:
    """Raise jsonschema's error where a JSON text breaks a schema. Numbers are compared as decimals, not as floats."""
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    kind = jsonschema.validators.validator_for(exact, default=jsonschema.Draft202012Validator)
    kind(exact, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER).validate(
        json.loads(text, parse_float=Decimal)
    )
