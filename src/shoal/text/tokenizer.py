"""Tokenizer: text to token ids and back, with the ids of llama.cpp."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from shoal.errors import RequestError, UnsupportedError
from shoal.gguf.reader import GGUFFile
from shoal.text.schemes import SCHEMES, Scheme
from shoal.text.special import Span, SpecialTokens
from shoal.text.stream import StreamDecoder
from shoal.text.vocab import Kind, Vocabulary

__all__ = ["StreamDecoder", "Tokenizer"]

_HIDDEN = (Kind.CONTROL, Kind.UNKNOWN)
_VERBATIM = (*_HIDDEN, Kind.USER_DEFINED)


class Tokenizer:
    """The tokenizer of one GGUF file. Immutable after loading; every method may be called from several threads.

    ``vocab_size``; ``bos_id`` and ``eos_id`` (None if the file has none); ``eog_ids``, the tokens that end a
    generation, and ``eog_sources``, which says for each where that comes from (a metadata key, or the token's text);
    ``control_ids``, the tokens that are no text; ``longest_piece_bytes``, the most bytes of text that one token can stand for.
    """

    def __init__(self, vocab: Vocabulary, scheme: Scheme) -> None:
        self.vocab_size = len(vocab.pieces)
        self.bos_id = vocab.bos_id
        self.eos_id = vocab.eos_id
        self.eog_sources: Mapping[int, str] = MappingProxyType(dict(vocab.eog_sources))
        self.eog_ids = frozenset(vocab.eog_sources)
        texts: Iterable[str | bytes] = vocab.pieces if vocab.model == "gpt2" else map(str.encode, vocab.pieces)
        self.longest_piece_bytes = max(map(len, texts))  # a byte-level piece has a letter for each byte
        self._vocab = vocab
        self._scheme = scheme
        self._first, self._last = list(scheme.first), list(scheme.last)
        self._between = list(scheme.between)
        self._special = SpecialTokens(vocab.special_tokens())
        self.control_ids = vocab.ids_of(*_HIDDEN)

    @classmethod
    def from_gguf(cls, source: str | Path | GGUFFile) -> Tokenizer:
        """The tokenizer of a model file or a vocabulary-only file.

        Raises UnsupportedError for a kind of tokenizer that shoal does not have, GGUFError where the file's
        tokenizer is malformed. An unknown ``tokenizer.ggml.pre`` gets a warning in the log.
        """
        if not isinstance(source, GGUFFile):
            with GGUFFile.open(source) as file:
                return cls.from_gguf(file)
        model = source.get("tokenizer.ggml.model", str)
        if model not in SCHEMES:
            raise UnsupportedError(
                f"tokenizer.ggml.model: {model[:80]!r} is not supported; known are {', '.join(SCHEMES)}"
            )
        vocab = Vocabulary.from_gguf(source)
        return cls(vocab, SCHEMES[model](source, vocab))

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of ``text``.

        ``add_special``: BOS and EOS (or CLS and SEP) where the file asks for them. ``parse_special``: the text of a control token
        becomes that token; otherwise it is text like any other. Raises RequestError for a lone surrogate.
        """
        ids = self._encode(text, parse_special, ())
        return self.with_special(ids) if add_special else ids

    def with_special(self, ids: Sequence[int]) -> list[int]:
        """``ids`` between BOS and EOS (or CLS and SEP), as far as the file asks for them."""
        return [*self._first, *ids, *self._last]

    def encode_pair(self, first: str, second: str) -> list[int]:
        """Token ids of two texts as a model that compares them was trained: what follows one text follows each, and where the file
        asks for a separator between them, that too. Raises as ``encode``."""
        start, end = self.encode(first), self.encode(second, add_special=False)
        return [*start, *self._between, *end, *self._last]

    @property
    def num_last(self) -> int:
        """How many tokens are put behind a text."""
        return len(self._last)

    def begins_twice(self, ids: Sequence[int]) -> bool:
        """Whether ``ids`` begin with what the file puts first, and then with that again."""
        count = len(self._first)
        return count > 0 and ids[:count] == ids[count : 2 * count] == self._first

    def encode_template(self, text: str, user_spans: Sequence[Span]) -> list[int]:
        """Token ids of a rendered chat template; nothing is added.

        As ``encode`` with ``parse_special``, except that no control token may touch one of ``user_spans``: the
        (start, end) of what users wrote.
        """
        return self._encode(text, True, user_spans)

    def control_spans(self, text: str) -> list[Span]:
        """The (start, end) of every control token that is spelled in ``text``."""
        return self._special.control_spans(text)

    def cut_at_control(self, text: str) -> list[str | int]:
        """``text`` as the control tokens that it spells, by id, and the texts between them."""
        parts: list[str | int] = []
        for part in self._special.cut(text, control=True, user_spans=()):
            spelled = self._vocab.pieces[part] if isinstance(part, int) and part not in self.control_ids else part
            if isinstance(spelled, str) and parts and isinstance(parts[-1], str):
                parts[-1] += spelled
            else:
                parts.append(spelled)
        return parts

    def encode_more(self, text: str) -> list[int]:
        """Token ids of text that continues another: no space is put in front, and control tokens are text."""
        parts = self._special.cut(text, control=False, user_spans=())
        return [token for part in parts for token in ([part] if isinstance(part, int) else self._scheme.encode(part))]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD. ``skip_special`` leaves control tokens out.

        Undoes ``encode``: where that puts a space in front, the first space goes. Raises RequestError for an id
        out of range.
        """
        return self.decode_bytes(ids, skip_special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        """As ``decode``, but the bytes as they are."""
        ids = list(ids)
        strip = self._scheme.strip
        if skip_special and self._first and ids[:1] == self._first:
            ids, strip = ids[1:], False  # llama.cpp strips the space of the very first token only
        pieces = list(map(self._shown_bytes if skip_special else self.token_bytes, ids))
        if strip and pieces:
            pieces[0] = pieces[0].removeprefix(b" ")
        return b"".join(pieces)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of text that a token stands for. Raises RequestError for an id out of range."""
        if not 0 <= token_id < self.vocab_size:
            raise RequestError(f"token id {token_id} is not in the vocabulary of {self.vocab_size}", "prompt_token_ids")
        piece, kind = self._vocab.pieces[token_id], self._vocab.kinds[token_id]
        if kind in _VERBATIM:
            return piece.encode()
        if kind == Kind.NORMAL:
            return self._scheme.spell(piece)
        return _byte_of(piece) if kind == Kind.BYTE else b""

    def stream(self, skip_special: bool = True, shown: Collection[str] = ()) -> StreamDecoder:
        """A decoder for tokens that continue a text: no leading space is taken away. Control tokens of the texts ``shown`` are
        not skipped."""
        if not skip_special:
            return StreamDecoder(self.token_bytes)
        hidden = self.control_ids.difference(self._vocab.ids[text] for text in shown if text in self._vocab.ids)
        if hidden == self.control_ids:
            return StreamDecoder(self._shown_bytes)
        return StreamDecoder(lambda token_id: b"" if token_id in hidden else self.token_bytes(token_id))

    def min_tokens_for(self, num_bytes: int) -> int:
        """The fewest tokens that text of this many UTF-8 bytes can become; to refuse before encoding.

        Bytes for which the vocabulary has no token are dropped by ``encode`` but counted here. 0 where a token may
        stand for text of any length.
        """
        return -(-num_bytes // self.longest_piece_bytes) if self._scheme.bounded else 0

    def _encode(self, text: str, control: bool, user_spans: Sequence[Span]) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            reason = f"the character at {problem.start} is a lone surrogate (U+{ord(text[problem.start]):04X})"
            raise RequestError(f"text is not valid Unicode: {reason}", "prompt") from None
        ids: list[int] = []
        after_special = True
        for part in self._special.cut(text, control=control, user_spans=user_spans):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._scheme.encode(" " + part if self._scheme.prefix and after_special else part)
            after_special = isinstance(part, int)
        return ids

    def _shown_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self.control_ids else self.token_bytes(token_id)


def _byte_of(piece: str) -> bytes:
    """The byte of a token such as <0x0A>; its own text where it is not spelled like that."""
    try:
        return bytes.fromhex(piece[3:5]) if len(piece) == 6 else piece.encode()
    except ValueError:
        return piece.encode()
