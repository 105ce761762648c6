"""StructuredOutputsParams -> a Constraint for one model: checked, tried out in another process, compiled, kept for the next request."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

from shoal.constrain.lark import with_prepared_schemas
from shoal.constrain.schema import explained, parse_schema, prepare_schema
from shoal.errors import ParameterError
from shoal.params import StructuredOutputsParams
from shoal.system.child_process import ChildFailure, ChildProcess
from shoal.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from shoal.constrain.grammar import Spec
    from shoal.constrain.matcher import MatcherConstraint

MAX_LENGTH = 1 << 20  # characters of a specification
KEPT = 128  # compiled constraints
_KEPT_LENGTH = 1 << 23  # characters of their specifications together
_FAILED_SECONDS = 60.0  # how long one that took too long is refused without another try

# One run of white space in JSON: what people put between values, and no more, as some models never stop.
WHITESPACE = r" {1,2}|(\r?\n){1,2}[ \t]{0,40}"


class _Kept(NamedTuple):
    """What became of a specification; ``until`` on the monotonic clock."""

    constraint: MatcherConstraint | None
    error: ParameterError | None
    until: float


class ConstraintCompiler:
    """Compiles what requests ask for. May be used from several threads; costs nothing before it is first used.

    What is kept of the last requests is bounded. ``close`` ends the process that tries specifications out.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # around what is kept
        self._compiling = threading.Lock()
        self._kept: OrderedDict[Spec, _Kept] = OrderedDict()
        self._child: ChildProcess | None = None
        self._ll_tokenizer: LLTokenizer | None = None
        self._vocab_size = tokenizer.vocab_size

    def compile(self, params: StructuredOutputsParams) -> MatcherConstraint:
        """A constraint at its beginning. Raises ParameterError that says what cannot be compiled or enforced, and where."""
        spec, schema = self._spec(params)
        key = spec._replace(options=tuple(sorted(spec.options.items())))  # type: ignore[arg-type]
        kept = self._find(key)
        if kept is None:
            with self._compiling:
                kept = self._find(key) or self._try(params.kind, spec, schema)
                self._keep(key, kept)
        if kept.error is not None:
            raise ParameterError(kept.error.field, kept.error.value, kept.error.allowed)
        assert kept.constraint is not None, "without an error there is one"
        return kept.constraint.copy()

    def close(self) -> None:
        """End the process; it starts anew if it is needed again."""
        if self._child is not None:
            self._child.close()

    def _spec(self, params: StructuredOutputsParams) -> tuple[Spec, dict[str, Any]]:
        """What to compile, and the schema it comes from, if it does."""
        from shoal.constrain.grammar import Spec, is_lark

        _refuse_long(params)
        options: dict[str, Any] = {"whitespace_pattern": params.whitespace_pattern or WHITESPACE}
        if params.disable_any_whitespace:
            options = {"whitespace_flexible": False}
        closed = params.disable_additional_properties
        if params.json is not None:
            schema = prepare_schema(parse_schema(params.json), close_objects=closed)
            return Spec("json", json.dumps(schema), options), schema
        if params.json_object:
            return Spec("json", '{"type": "object"}', options), {}
        if params.structural_tag is not None:
            return self._tag_spec(params.structural_tag, options, closed), {}
        if params.choice is not None:
            return Spec("choice", json.dumps(params.choice), {}), {}
        if params.grammar is not None:
            lark = is_lark(params.grammar)
            text = with_prepared_schemas(params.grammar, options, closed) if lark else params.grammar
            return Spec("lark" if lark else "gbnf", text, {}), {}
        return Spec("regex", params.regex or "", {}), {}

    def _tag_spec(self, given: str | dict[str, Any], options: dict[str, Any], closed: bool) -> Spec:
        from shoal.constrain.grammar import Spec
        from shoal.constrain.structural_tag import FIELD, structural_tag_grammar

        try:
            tag = json.loads(given) if isinstance(given, str) else given
        except (ValueError, RecursionError) as error:
            raise ParameterError(FIELD, given, f"JSON: {error}") from None
        if not isinstance(tag, dict):
            raise ParameterError(FIELD, tag, "a JSON object")
        return Spec("lark", structural_tag_grammar(tag, self._tokenizer, options, closed), {})

    def _try(self, kind: str, spec: Spec, schema: dict[str, Any]) -> _Kept:
        from shoal.constrain.grammar import GrammarError, compiled
        from shoal.constrain.matcher import MatcherConstraint

        child, tokenizer = self._prepared()
        until = float("inf")
        try:
            reason = json.loads(child.ask(json.dumps(spec._asdict()).encode() + b"\n")).get("error")
        except ChildFailure as failure:
            reason, until = f"compiling it {failure}", time.monotonic() + _FAILED_SECONDS
        if reason is None:
            try:
                matcher = compiled(spec, tokenizer)
                return _Kept(MatcherConstraint(matcher, self._vocab_size, self._tokenizer.vocab_size), None, until)
            except GrammarError as error:
                reason = str(error)
        return _Kept(None, _refused(kind, spec, schema, reason), until)

    def _prepared(self) -> tuple[ChildProcess, LLTokenizer]:
        """The process and the tokenizer; the vocabulary is made ready for both at once, which takes a moment for a large one."""
        from shoal.constrain.grammar import MAX_SECONDS

        if self._child is None or self._ll_tokenizer is None:
            vocabulary = _vocabulary(self._tokenizer)
            self._vocab_size = len(vocabulary.tokens)
            greeting = json.dumps(vocabulary.packed()).encode() + b"\n"
            self._child = ChildProcess("shoal.constrain.worker", MAX_SECONDS, greeting)
            starting = threading.Thread(target=_start, args=(self._child,))
            starting.start()
            self._ll_tokenizer = vocabulary.tokenizer(self._tokenizer.encode_more)
            starting.join()
        return self._child, self._ll_tokenizer

    def _find(self, key: Spec) -> _Kept | None:
        with self._lock:
            kept = self._kept.get(key)
            if kept is None or kept.until < time.monotonic():
                return None
            self._kept.move_to_end(key)
            return kept

    def _keep(self, key: Spec, kept: _Kept) -> None:
        with self._lock:
            self._kept[key] = kept
            while len(self._kept) > KEPT or sum(len(spec.text) for spec in self._kept) > _KEPT_LENGTH:
                self._kept.popitem(last=False)


def _vocabulary(tokenizer: Tokenizer) -> Any:
    from shoal.constrain.vocabulary import Vocabulary

    tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    special = sorted(tokenizer.control_ids | tokenizer.eog_ids)
    if tokenizer.eog_ids:
        first = [tokenizer.eos_id] if tokenizer.eos_id in tokenizer.eog_ids else []
        ends = [token for token in (*first, *sorted(tokenizer.eog_ids - {*first})) if token is not None]
        return Vocabulary(tokens, special, ends)
    return Vocabulary([*tokens, b"<end>"], [*special, len(tokens)], [len(tokens)])  # llguidance needs one


def _start(child: ChildProcess) -> None:
    """Start it now; should that fail, the first request says why."""
    try:
        child.start()
    except ChildFailure:
        return


def _refuse_long(params: StructuredOutputsParams) -> None:
    value = getattr(params, params.kind)
    length = len(value) if isinstance(value, str) else sum(map(len, value)) if params.choice is not None else 0
    if isinstance(value, dict):
        try:
            length = len(json.dumps(value))
        except (TypeError, ValueError, RecursionError) as error:
            raise ParameterError(f"structured_outputs.{params.kind}", value, f"JSON: {error}") from None
    if length > MAX_LENGTH:
        field = f"structured_outputs.{params.kind}"
        raise ParameterError(field, f"{length} characters", f"at most {MAX_LENGTH} characters")


def _refused(kind: str, spec: Spec, schema: dict[str, Any], reason: str) -> ParameterError:
    if spec.kind == "json":
        error = explained(reason, schema)
        return error if kind == "json" else ParameterError(f"structured_outputs.{kind}", "it", error.allowed)
    return ParameterError(f"structured_outputs.{kind}", spec.text, f"one that can be compiled: {reason}")
