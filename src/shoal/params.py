"""What a caller may set: SamplingParams for a request, EngineConfig for an engine.

Both are frozen and validated when they are made, so that nothing below has to check again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

from shoal.errors import ParameterError

MAX_N = 16
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_SECONDS = 1e9
MAX_DRAFT = 64
MAX_LOOKUP = 16

SPECULATIVE_METHODS = ("ngram", "suffix", "draft_model")
_METHOD_OF = {"prompt_lookup": "ngram", "suffix_decoding": "suffix", "model": "draft_model"}  # by how its fields begin

DEVICES = ("auto", "cpu", "cuda", "reference")

# How replies are read; vLLM's names where it has them. "none": not at all.
TOOL_CALL_PARSERS = ("hermes", "qwen3_coder", "llama3_json", "mistral", "pythonic", "harmony", "generic", "none")
REASONING_PARSERS = ("think", "harmony", "mistral", "cohere", "seed_oss", "granite", "none")

# What vLLM calls some of them.
_PARSER_ALIASES = {
    "tool_call_parser": {
        "openai": "harmony",
        "llama4_pythonic": "pythonic",
        "granite": "generic",
        "phi4_mini_json": "generic",
    },
    "reasoning_parser": dict.fromkeys(("deepseek_r1", "qwen3", "glm45"), "think") | {"openai_gptoss": "harmony"},
}

_INT64_MAX = 2**63 - 1

Pooling = Literal["none", "mean", "cls", "last", "rank"]
"""Which of a sequence's states make its embedding: all, their mean, the first, the last; rank: a classifier's scores of the first."""
POOLINGS: tuple[Pooling, ...] = ("none", "mean", "cls", "last", "rank")  # as GGUF files number them

# llama.cpp's samplers by all of its names and letters.
_SAMPLERS = {
    "penalties": ("penalties", "e"),
    "dry": ("dry", "d"),
    "top_n_sigma": ("top_n_sigma", "top-n-sigma", "s"),
    "top_k": ("top_k", "top-k", "k"),
    "typ_p": ("typ_p", "typ-p", "typ", "typical_p", "typical-p", "typical", "y"),
    "top_p": ("top_p", "top-p", "nucleus", "p"),
    "min_p": ("min_p", "min-p", "m"),
    "xtc": ("xtc", "x"),
    "temperature": ("temperature", "temp", "t"),
}
_SAMPLER_OF = {spelled: name for name, spellings in _SAMPLERS.items() for spelled in spellings}
MAX_SAMPLERS = 32
MAX_BAD_WORDS = 1024
MAX_BREAKERS = 64
MAX_BREAKER_LENGTH = 40
MAX_TOKEN_IDS = 1024
MAX_ALLOWED_IDS = 1 << 20
DRY_BREAKERS = ("\n", ":", '"', "*")


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputsParams:
    """What the text of an answer may be. The class and its fields are vLLM's; exactly one of the first six is given.

    ``json``: a JSON schema, as a dict or as text. ``json_object`` True: any JSON object. ``regex`` and ``choice``: the whole text
    matches it, is one of them. ``grammar``: Lark, or GBNF as llama.cpp has it. ``structural_tag``: free text in which tags hold
    JSON, as a dict or as text.
    JSON may hold short runs of white space: ``whitespace_pattern`` is another regular expression for one such run;
    ``disable_any_whitespace`` leaves none. ``disable_additional_properties``: objects of a schema that do not say otherwise have no
    properties but those listed.

    Raises ParameterError that names the field. Whether a schema or grammar can be enforced shows when its request is submitted.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] | list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in _CONSTRAINTS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ParameterError("structured_outputs", given, "exactly one of " + ", ".join(_CONSTRAINTS))
        (kind,) = given
        value = getattr(self, kind)
        if not isinstance(value, _CONSTRAINTS[kind]) or not value:
            raise ParameterError(f"structured_outputs.{kind}", value, _CONSTRAINT_VALUES[kind])
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                raise ParameterError(f"structured_outputs.{name}", getattr(self, name), "true or false")
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        pattern = self.whitespace_pattern
        if pattern is not None and (not isinstance(pattern, str) or self.disable_any_whitespace):
            allowed = "a regular expression, without disable_any_whitespace"
            raise ParameterError("structured_outputs.whitespace_pattern", pattern, allowed)

    @property
    def kind(self) -> str:
        """The one field of the first six that is given."""
        return next(name for name in _CONSTRAINTS if getattr(self, name) is not None)


# What each kind of constraint is given as; nothing empty.
_CONSTRAINTS: dict[str, tuple[type, ...]] = {
    "json": (str, dict),
    "regex": (str,),
    "choice": (list, tuple),
    "grammar": (str,),
    "json_object": (bool,),
    "structural_tag": (str, dict),
}
_CONSTRAINT_VALUES = {
    "json": "a JSON schema: a dict that is not empty, or a text",
    "regex": "a text that is not empty",
    "choice": "a list of texts that are not empty",
    "grammar": "a text that is not empty",
    "json_object": "true, or left out",
    "structural_tag": "a dict, or a text in JSON",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends. Names and defaults are vLLM's.

    ``n`` answers to one prompt, which is computed once; each draws random numbers of its own, and the first is the one that ``n`` 1
    would give.
    ``temperature`` 0 is greedy. ``top_k`` 0 (or -1), ``top_p`` 1 and ``min_p`` 0 are off; ``top_p`` 0 keeps only the likeliest token.
    Whole numbers may be given as floats (4.0) and as NumPy's. ``max_tokens`` None means up to
    the end of the context. ``seed`` None draws a fresh seed. ``stop`` strings end the text and are not part of it unless
    ``include_stop_str_in_output``. ``logprobs`` k reports the chosen token and the k best at each step;
    ``prompt_logprobs`` k does so for each token of the prompt (0: the token alone). With it ``max_tokens`` may be 0: the
    prompt is scored and nothing is generated. ``structured_outputs``: what the text may be; with ``ignore_eos`` it ends where nothing
    more may follow. After ``thinking_token_budget`` tokens of thought, in a chat, the answer begins.

    ``presence_penalty`` and ``frequency_penalty`` count the output, ``repetition_penalty`` looks at prompt and output; with
    ``repeat_last_n`` all three do so over the last n tokens of both (-1: all). What follows ``logprob_token_ids`` is
    llama.cpp's, by its names; docs/sampling.md has a table of all samplers, and the order in which they come.

    Raises ParameterError that names the field, its value and the allowed range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    seed: int | None = None
    stop: tuple[str, ...] | list[str] | str | None = ()
    stop_token_ids: tuple[int, ...] | list[int] | None = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    bad_words: tuple[str, ...] | list[str] | None = None
    allowed_token_ids: tuple[int, ...] | list[int] | None = None
    logprob_token_ids: tuple[int, ...] | list[int] | None = None
    min_keep: int = 0
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: tuple[str, ...] | list[str] = DRY_BREAKERS
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    samplers: tuple[str, ...] | list[str] | str | None = None
    structured_outputs: StructuredOutputsParams | None = None
    thinking_token_budget: int | None = None

    def __post_init__(self) -> None:
        _whole(self, "n", 1, MAX_N)
        _number("temperature", self.temperature, 0.0, 1e4)
        _number("top_p", self.top_p, 0.0, 1.0)
        _number("min_p", self.min_p, 0.0, 1.0)
        _whole(self, "top_k", -1, 2**31 - 1)
        _whole(self, "min_tokens", 0, _INT64_MAX - 1)
        _whole(self, "max_tokens", 1 if self.prompt_logprobs is None else 0, _INT64_MAX - 1, optional=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ParameterError("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        _whole(self, "seed", -(2**63), 2**64 - 1, optional=True)
        _whole(self, "logprobs", 0, MAX_LOGPROBS, optional=True)
        _whole(self, "prompt_logprobs", 0, MAX_LOGPROBS, optional=True)
        _whole(self, "thinking_token_budget", 0, _INT64_MAX - 1, optional=True)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise ParameterError(name, getattr(self, name), "true or false")
        constraint = self.structured_outputs
        if constraint is not None and not isinstance(constraint, StructuredOutputsParams):
            raise ParameterError("structured_outputs", constraint, "StructuredOutputsParams")
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        self._check_samplers()

    def _check_samplers(self) -> None:
        if self.repeat_penalty is not None:  # llama.cpp's name of the same
            if self.repetition_penalty != 1:
                raise ParameterError(
                    "repeat_penalty", self.repeat_penalty, "left out where repetition_penalty is given"
                )
            _number("repeat_penalty", self.repeat_penalty, 0.0, 1e4, low_open=True)
            object.__setattr__(self, "repetition_penalty", self.repeat_penalty)
            object.__setattr__(self, "repeat_penalty", None)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 1e4, low_open=True)
        for name, low, high in _NUMBERS:
            _number(name, getattr(self, name), low, high)
        for name, least in (("min_keep", 0), ("dry_allowed_length", 0), ("dry_penalty_last_n", -1)):
            _whole(self, name, least, 2**31 - 1)
        _whole(self, "repeat_last_n", -1, 2**31 - 1, optional=True)
        _whole(self, "mirostat", 0, 2)
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise ParameterError("allowed_token_ids", [], "at least 1 id, or None for all")
            object.__setattr__(self, "allowed_token_ids", allowed)
        object.__setattr__(self, "logprob_token_ids", _token_ids("logprob_token_ids", self.logprob_token_ids))
        bad_words = _words("bad_words", self.bad_words, MAX_BAD_WORDS, MAX_STOP_LENGTH)
        object.__setattr__(self, "bad_words", bad_words)
        breakers = _words("dry_sequence_breakers", self.dry_sequence_breakers, MAX_BREAKERS, MAX_BREAKER_LENGTH)
        object.__setattr__(self, "dry_sequence_breakers", breakers)
        object.__setattr__(self, "samplers", _samplers(self.samplers))

    @property
    def greedy(self) -> bool:
        """Whether every token is the most likely one."""
        return self.temperature == 0.0

    @property
    def reports_logprobs(self) -> bool:
        """Whether the log-probabilities of generated tokens are wanted."""
        return self.logprobs is not None or bool(self.logprob_token_ids)

    @property
    def penalises(self) -> bool:
        """Whether any of the three penalties is on."""
        some = self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0
        return some and self.repeat_last_n != 0

    @property
    def repels(self) -> bool:
        """Whether DRY is on."""
        return self.dry_multiplier > 0 and self.dry_penalty_last_n != 0

    @property
    def needs_chain(self) -> bool:
        """Whether more than penalties, bias and DRY comes before temperature, min_p, top_k and top_p, in vLLM's order."""
        if self.samplers is not None:
            return True
        some = self.top_n_sigma > 0 or self.dynatemp_range > 0 or self.typical_p < 1 or self.xtc_probability > 0
        return not self.greedy and (some or self.mirostat > 0 or self.min_keep > 1)


_NUMBERS = (
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("typical_p", 0.0, 1.0),
    ("top_n_sigma", -1e4, 1e4),
    ("dynatemp_range", 0.0, 1e4),
    ("dynatemp_exponent", 0.0, 100.0),
    ("xtc_probability", 0.0, 1.0),
    ("xtc_threshold", 0.0, 1.0),
    ("dry_multiplier", 0.0, 1e4),
    ("dry_base", 1.0, 1e4),
    ("mirostat_tau", 0.0, 100.0),
    ("mirostat_eta", 0.0, 100.0),
)


@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """How ``LLM.beam_search`` looks for the likeliest texts. Names and defaults are vLLM's.

    After each token the ``beam_width`` best beginnings are kept, for at most ``max_tokens`` tokens. A text scores its
    log-probability / (its length, prompt included) ^ ``length_penalty``. Ends of generation end a text, unless ``ignore_eos``, and are
    part of its tokens with ``include_stop_str_in_output``. With a ``temperature`` a token drawn at it joins the candidates.

    Raises ParameterError that names the field, its value and the allowed range.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _whole(self, "beam_width", 1, MAX_LOGPROBS // 2)
        _whole(self, "max_tokens", 1, _INT64_MAX - 1)
        _number("temperature", self.temperature, 0.0, 1e4)
        _number("length_penalty", self.length_penalty, -100.0, 100.0)
        for name in ("ignore_eos", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise ParameterError(name, getattr(self, name), "true or false")


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolingParams:
    """What becomes of the states of one input. Names and defaults are vLLM's.

    ``dimensions``: so many first numbers of an embedding (Matryoshka: of models that were trained for it). ``normalize``: to length 1,
    after that. ``use_activation``: a score goes through a sigmoid (False: it is the classifier's number, as in llama.cpp).
    ``truncate_prompt_tokens``: the first so many tokens of what is longer, special ones among them (-1: as many as the model takes);
    None refuses it.

    Raises ParameterError that names the field, its value and the allowed range.
    """

    truncate_prompt_tokens: int | None = None
    dimensions: int | None = None
    normalize: bool = True
    use_activation: bool = True

    def __post_init__(self) -> None:
        _whole(self, "truncate_prompt_tokens", -1, 2**31 - 1, optional=True)
        if self.truncate_prompt_tokens == 0:
            raise ParameterError("truncate_prompt_tokens", 0, "-1 or at least 1")
        _whole(self, "dimensions", 1, 2**31 - 1, optional=True)
        for name in ("normalize", "use_activation"):
            if not isinstance(getattr(self, name), bool):
                raise ParameterError(name, getattr(self, name), "true or false")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculativeConfig:
    """Whose guesses of what comes next are computed in one step with what they follow. Names are vLLM's.

    ``method``: ngram, suffix or draft_model. ``num_speculative_tokens``: of a guess at most; there are fewer where more would not
    pay. ngram: what followed the last ``prompt_lookup_max`` tokens of prompt and output when they came before, or fewer tokens down to
    ``prompt_lookup_min`` (each is the other where only one is given, else 5). suffix: what followed the longest end of the text,
    counted up to ``suffix_decoding_max_tree_depth`` tokens, when it came before in it or in the last
    ``suffix_decoding_max_cached_requests`` answers; ``suffix_decoding_max_spec_factor`` times as many tokens at most, and only as
    long as ``suffix_decoding_min_token_prob`` of the places where it came go on alike. draft_model: what another ``model`` of the same
    vocabulary goes on with: a path, a short name or ``hf:ORG/REPO:QUANT``.

    Raises ParameterError that names the field, its value and the allowed range.
    """

    method: str
    num_speculative_tokens: int = 8
    prompt_lookup_max: int | None = None
    prompt_lookup_min: int | None = None
    suffix_decoding_max_tree_depth: int = 24
    suffix_decoding_max_cached_requests: int = 10_000
    suffix_decoding_max_spec_factor: float = 1.0
    suffix_decoding_min_token_prob: float = 0.1
    model: str | Path | None = None

    @classmethod
    def of(cls, given: Any) -> SpeculativeConfig:
        """From a mapping, as in vLLM."""
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise ParameterError("speculative_config", given, "an object")
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                raise ParameterError("speculative_config", name, f"names among {', '.join(names)}")
        if "method" not in given:
            raise ParameterError("speculative_config", dict(given), "given with a method")
        return cls(**given)

    def __post_init__(self) -> None:
        if self.method not in SPECULATIVE_METHODS:
            raise ParameterError("speculative_config.method", self.method, "one of " + ", ".join(SPECULATIVE_METHODS))
        for field in fields(self):
            value = getattr(self, field.name)
            others = [start for start, method in _METHOD_OF.items() if method != self.method]
            if value != field.default and field.name.startswith(tuple(others)):
                raise ParameterError(f"speculative_config.{field.name}", value, f"left out for method {self.method}")
        self._set("num_speculative_tokens", 1, MAX_DRAFT)
        if self.method == "ngram":
            for name, other in (("prompt_lookup_max", "prompt_lookup_min"), ("prompt_lookup_min", "prompt_lookup_max")):
                if getattr(self, name) is not None:
                    self._set(name, 1, MAX_LOOKUP)
                    if getattr(self, other) is None:
                        object.__setattr__(self, other, getattr(self, name))
            if self.prompt_lookup_max is None:
                object.__setattr__(self, "prompt_lookup_max", 5)
                object.__setattr__(self, "prompt_lookup_min", 5)
            self._set("prompt_lookup_min", 1, self.prompt_lookup_max or 1)
        if self.method == "draft_model" and not (self.model and isinstance(self.model, (str, Path))):
            raise ParameterError("speculative_config.model", self.model, "a path or a name of a model")
        self._set("suffix_decoding_max_tree_depth", 3, 1024)
        self._set("suffix_decoding_max_cached_requests", 0, 2**31 - 1)
        for name, high in (("suffix_decoding_max_spec_factor", 1e3), ("suffix_decoding_min_token_prob", 1.0)):
            _number(f"speculative_config.{name}", getattr(self, name), 0.0, high)

    def _set(self, name: str, low: int, high: int) -> None:
        value = _integer(f"speculative_config.{name}", getattr(self, name), low, high)
        object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How an engine is sized. Sizes in bytes may be given as text ("512MiB", "4k"); None means "choose".

    ``max_model_len``: longest prompt + output, in tokens (default: the model's context, at most 8192).
    ``max_num_seqs``: sequences running at once. ``max_num_batched_tokens``: rows of one step, so also the
    largest prefill chunk. ``kv_cache_memory``: bytes of KV pages (default: what max_num_seqs sequences of max_model_len
    need, at most 40 % of the memory available and 1 GiB, or one sequence if that needs more). ``kv_cache_dtype``: f16,
    f32 or q8_0 (int8 with a scale for 32 values: half the memory of f16). ``threads``: default one for each
    usable core, no more than a container's quota of CPU time. ``device``: auto (a GPU that is there, else the CPU), cpu, cuda or
    reference. ``gpu_layers``: what of the model the GPU computes, as llama.cpp counts: the head, then layers from the last on; "all",
    or "auto" for as many as fit. ``gpu_memory_utilization``: the share of the GPU's memory that may be in use, by weights, KV pages,
    buffers and by other processes. ``seed``: where seeds of requests without one come
    from. ``enable_prefix_caching``: what prompts have in common at their beginning, in full pages, is computed once; it changes no
    result. ``pooling_type``: none, mean, cls, last or rank, in place of what the model file says (for embeddings).
    ``chat_template_kwargs`` are for the chat template where a request gives no others. ``tool_call_parser`` and
    ``reasoning_parser``: how replies are read (see TOOL_CALL_PARSERS and REASONING_PARSERS); default: as the template shows.
    ``preempt_for_priority``: a request of a lower priority number need not wait for running ones of a higher: it takes their place,
    and they go on later, with the same result. ``target_step_ms``: prompts are cut so that a step takes about so many
    milliseconds as long as other requests get a token from it; it changes no result. ``speculative_config``: a SpeculativeConfig, or
    its fields as a mapping; it changes no result either.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    kv_cache_memory: int | str | None = None
    kv_cache_dtype: str = "f16"
    threads: int | None = None
    device: str = "auto"
    gpu_layers: int | str = "auto"
    gpu_memory_utilization: float = 0.9
    seed: int = 0
    enable_prefix_caching: bool = True
    skip_tokenizer_init: bool = False
    chat_template: str | Path | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    preempt_for_priority: bool = False
    target_step_ms: float | None = None
    speculative_config: SpeculativeConfig | Mapping[str, Any] | None = None
    pooling_type: Pooling | None = None

    def __post_init__(self) -> None:
        _whole(self, "max_model_len", 1, 2**31 - 1, optional=True)
        _whole(self, "max_num_seqs", 1, 65536)
        _whole(self, "max_num_batched_tokens", 1, 65536)
        if self.kv_cache_memory is not None:
            size = parse_size("kv_cache_memory", self.kv_cache_memory)
            _integer("kv_cache_memory", size, 1, 2**50)
            object.__setattr__(self, "kv_cache_memory", size)
        _choice("kv_cache_dtype", self.kv_cache_dtype, ("f16", "f32", "q8_0"))
        _choice("device", self.device, DEVICES)
        object.__setattr__(self, "gpu_layers", _gpu_layers(self.gpu_layers, self.device))
        _number("gpu_memory_utilization", self.gpu_memory_utilization, 0.0, 1.0, low_open=True)
        _whole(self, "threads", 1, 1024, optional=True)
        _whole(self, "seed", -(2**63), 2**64 - 1)
        if self.pooling_type is not None:
            pooling = self.pooling_type.lower() if isinstance(self.pooling_type, str) else self.pooling_type
            _choice("pooling_type", pooling, POOLINGS)
            object.__setattr__(self, "pooling_type", pooling)
        if self.target_step_ms is not None:
            _number("target_step_ms", self.target_step_ms, 0.0, 1e6, low_open=True)
        if self.speculative_config is not None:
            object.__setattr__(self, "speculative_config", SpeculativeConfig.of(self.speculative_config))
        for name in ("enable_prefix_caching", "preempt_for_priority"):
            if not isinstance(getattr(self, name), bool):
                raise ParameterError(name, getattr(self, name), "true or false")
        if self.chat_template_kwargs is not None:
            object.__setattr__(self, "chat_template_kwargs", template_kwargs(self.chat_template_kwargs))
        for name, known in (("tool_call_parser", TOOL_CALL_PARSERS), ("reasoning_parser", REASONING_PARSERS)):
            object.__setattr__(self, name, _parser(name, getattr(self, name), known))


def template_kwargs(value: Any) -> Mapping[str, Any]:
    """What goes to a chat template beside the messages: an object, that does not bring a template. Raises ParameterError."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ParameterError("chat_template_kwargs", value, "an object")
    for name in ("chat_template", "messages", "tokenize"):
        if name in value:
            raise ParameterError("chat_template_kwargs", value, f"given without {name!r}")
    return value


def check_seconds(field: str, value: Any) -> None:
    """A time limit: seconds, or None for no limit. Raises ParameterError that names the field."""
    if value is not None:
        _number(field, value, 0.0, MAX_SECONDS, low_open=True)


def check_priority(value: Any) -> int:
    """The priority of a request: the lowest number comes first. Raises ParameterError for anything but an integer."""
    return _integer("priority", value, -(2**63), _INT64_MAX)


_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)\s*", re.IGNORECASE)


def parse_size(field: str, value: int | str) -> int:
    """Bytes from 512, "512", "4k", "1.5GB" (powers of 1000) or "1GiB" (powers of 1024; a bare letter means that too)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) and len(value) <= 40 else None
    if match is None:
        raise ParameterError(field, value, "a size in bytes such as 1048576, 512k, 512MiB or 2GB")
    number, unit, binary, byte = match.groups()
    base = 1000 if byte and not binary else 1024
    return int(float(number) * base ** "kmgt".find(unit.lower()) * base) if unit else int(float(number))


def _whole(
    owner: SamplingParams | BeamSearchParams | PoolingParams | EngineConfig,
    field: str,
    low: int,
    high: int,
    *,
    optional: bool = False,
) -> None:
    """Make a field an integer of the range, unless it is ``optional`` and None."""
    value = getattr(owner, field)
    if value is not None or not optional:
        object.__setattr__(owner, field, _integer(field, value, low, high))


def _integer(field: str, value: Any, low: int, high: int) -> int:
    whole = isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or not low <= value <= high:
        raise ParameterError(field, value, f"an integer from {low} to {high}")
    return int(value)


def _number(field: str, value: Any, low: float, high: float, *, low_open: bool = False) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not low <= value <= high or (low_open and value == low):
        bounds = f"above {low:g} and at most {high:g}" if low_open else f"from {low:g} to {high:g}"
        raise ParameterError(field, value, f"a finite number {bounds}")


def _choice(field: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ParameterError(field, value, "one of " + ", ".join(allowed))


def _gpu_layers(value: Any, device: str) -> int | str:
    """A number, which may be given as text, or "auto" or "all". Without a GPU there is nothing to choose."""
    if value in ("auto", "all"):
        layers: int | str = value
    else:
        digits = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10
        try:
            layers = _integer("gpu_layers", int(value) if digits else value, 0, 2**31 - 1)
        except ParameterError:
            raise ParameterError("gpu_layers", value, "auto, all or a whole number from 0 on") from None
    if device in ("cpu", "reference") and layers not in ("auto", 0):
        raise ParameterError("gpu_layers", value, f"auto or 0 with device {device}")
    return layers


def _parser(field: str, value: Any, known: tuple[str, ...]) -> str | None:
    if value is None:
        return None
    name = _PARSER_ALIASES[field].get(value, value) if isinstance(value, str) else value
    _choice(field, name, known)
    return str(name)


def _stop_strings(value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else tuple(value or ())
    if len(stops) > MAX_STOP_STRINGS:
        raise ParameterError("stop", f"{len(stops)} strings", f"at most {MAX_STOP_STRINGS} strings")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise ParameterError("stop", stop, f"strings of 1 to {MAX_STOP_LENGTH} characters")
    return stops


def _items(field: str, value: Any) -> tuple[Any, ...]:
    try:
        return () if value is None else tuple(value)
    except TypeError:
        raise ParameterError(field, value, "a list") from None


def _token_ids(field: str, value: Any) -> tuple[int, ...]:
    ids = _items(field, value)
    most = MAX_ALLOWED_IDS if field == "allowed_token_ids" else MAX_TOKEN_IDS
    if len(ids) > most:
        raise ParameterError(field, f"{len(ids)} ids", f"at most {most} ids")
    return tuple(_integer(field, token, 0, 2**31 - 1) for token in ids)


def _bias(value: Any) -> dict[int, float] | None:
    """Ids may be spelled as in JSON's keys."""
    if not value:
        return None
    if not isinstance(value, dict):
        raise ParameterError("logit_bias", value, "a map from token ids to numbers")
    if len(value) > MAX_TOKEN_IDS:
        raise ParameterError("logit_bias", f"{len(value)} ids", f"at most {MAX_TOKEN_IDS} ids")
    bias: dict[int, float] = {}
    for key, number in value.items():
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 12 else key
        _number("logit_bias", number, -100.0, 100.0)
        bias[_integer("logit_bias", token, 0, 2**31 - 1)] = float(number)
    return bias


def _words(field: str, value: Any, most: int, longest: int) -> tuple[str, ...]:
    words = (value,) if isinstance(value, str) else _items(field, value)
    if len(words) > most:
        raise ParameterError(field, f"{len(words)} strings", f"at most {most} strings")
    for word in words:
        if not isinstance(word, str) or not 0 < len(word) <= longest:
            raise ParameterError(field, word, f"strings of 1 to {longest} characters")
    return words


def _samplers(value: Any) -> tuple[str, ...] | None:
    """The names of a chain; llama.cpp also takes a string of their letters."""
    if value is None:
        return None
    names = _items("samplers", value)
    if len(names) > MAX_SAMPLERS:
        raise ParameterError("samplers", f"{len(names)} names", f"at most {MAX_SAMPLERS} names")
    for name in names:
        if not isinstance(name, str) or name not in _SAMPLER_OF:
            raise ParameterError("samplers", name, "names among " + ", ".join(_SAMPLERS))
    return tuple(_SAMPLER_OF[name] for name in names)


def _choices(value: Any) -> tuple[str, ...]:
    choices = tuple(value)
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise ParameterError("structured_outputs.choice", choice, _CONSTRAINT_VALUES["choice"])
    return choices
