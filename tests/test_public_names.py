"""What users of the Python interface write: none of these names may move or go."""

from __future__ import annotations

import dataclasses
import inspect

import shoal
import shoal.bench
import shoal.jobs
from shoal import llm
from shoal.requests import beam, outputs


def public(thing: type) -> set[str]:
    return {name for name in vars(thing) if not name.startswith("_")}


def test_names_of_modules() -> None:
    assert shoal.__all__ == [
        "LLM",
        "BeamSearchParams",
        "CompletionOutput",
        "EmbeddingRequestOutput",
        "EngineConfig",
        "PoolingParams",
        "RequestOutput",
        "SamplingParams",
        "ScoringRequestOutput",
        "ShoalError",
        "StructuredOutputsParams",
        "Tokenizer",
        "jobs",
    ]
    assert shoal.jobs.__all__ == ["JobStatus", "Summary", "cancel", "run", "status"]
    assert shoal.bench.__all__ == ["throughput_factor"]
    assert llm.__all__ == ["LLM", "CompletionOutput", "Logprob", "RequestOutput"]
    for module in (shoal, shoal.jobs, shoal.bench, llm):
        assert all(getattr(module, name) is not None for name in module.__all__)
    assert shoal.__version__
    assert callable(shoal.jobs.run)  # and no folder of that name


def test_errors() -> None:
    from shoal import errors

    assert {name for name, thing in vars(errors).items() if inspect.isclass(thing)} >= {
        "ShoalError",
        "ParameterError",
        "RequestError",
        "GGUFError",
        "UnsupportedError",
        "ModelNotFoundError",
        "MemoryLimitError",
        "TemplateError",
        "ConstraintError",
        "JobError",
        "NotMeasuredError",
        "EngineError",
    }


def test_the_methods_of_llm_and_what_they_take() -> None:
    methods = {"generate", "chat", "stream", "logits", "submit", "step", "abort", "encode", "close", "has_work"}
    methods |= {"resize", "config", "beam_search", "embed", "score", "submit_embedding", "embeddings"}
    assert public(shoal.LLM) >= methods
    limits = ["priority", "timeout", "queue_timeout"]
    takes = {
        name: list(inspect.signature(getattr(shoal.LLM, name)).parameters)[1:]
        for name in methods - {"has_work", "config"}
    }
    assert takes["generate"][:3] == ["prompts", "sampling_params", "use_tqdm"]
    assert takes["chat"][:3] == ["messages", "sampling_params", "use_tqdm"]
    assert takes["stream"][:2] == ["prompts", "sampling_params"]
    assert takes["submit"][:2] == ["prompt", "params"]
    assert set(takes["resize"]) == {"max_num_seqs", "kv_cache_memory", "max_num_batched_tokens"}
    assert {"request_id", *limits} <= set(takes["submit"]) & set(takes["submit_embedding"])
    assert takes["embed"][0] == "prompts"
    assert takes["score"][:2] == ["data_1", "data_2"]
    pooled = {"truncate_prompt_tokens", "use_tqdm", "pooling_params", *limits}
    assert pooled <= set(takes["embed"]) & set(takes["score"])
    assert {"chat_template_kwargs", *limits} <= set(takes["chat"])
    assert set(limits) <= set(takes["generate"]) & set(takes["stream"])


def test_fields() -> None:
    def fields(kind: type) -> set[str]:
        assert dataclasses.is_dataclass(kind)
        return {field.name for field in dataclasses.fields(kind)}

    assert fields(shoal.SamplingParams) >= {
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "max_tokens",
        "min_tokens",
        "seed",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "logprobs",
        "skip_special_tokens",
        "include_stop_str_in_output",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "prompt_logprobs",
        "logit_bias",
        "bad_words",
        "allowed_token_ids",
        "logprob_token_ids",
        "min_keep",
        "typical_p",
        "top_n_sigma",
        "dynatemp_range",
        "dynatemp_exponent",
        "xtc_probability",
        "xtc_threshold",
        "repeat_penalty",
        "repeat_last_n",
        "dry_multiplier",
        "dry_base",
        "dry_allowed_length",
        "dry_penalty_last_n",
        "dry_sequence_breakers",
        "mirostat",
        "mirostat_tau",
        "mirostat_eta",
        "samplers",
        "structured_outputs",
    }
    assert fields(shoal.StructuredOutputsParams) == {
        "json",
        "regex",
        "choice",
        "grammar",
        "json_object",
        "structural_tag",
        "disable_any_whitespace",
        "disable_additional_properties",
        "whitespace_pattern",
    }
    assert fields(shoal.BeamSearchParams) == {
        "beam_width",
        "max_tokens",
        "ignore_eos",
        "temperature",
        "length_penalty",
        "include_stop_str_in_output",
    }
    assert fields(beam.BeamSearchOutput) >= {"sequences", "error"}
    assert fields(beam.BeamSearchSequence) >= {
        "tokens",
        "logprobs",
        "cum_logprob",
        "text",
        "finish_reason",
        "stop_reason",
    }
    assert fields(shoal.EngineConfig) >= {
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "kv_cache_memory",
        "kv_cache_dtype",
        "threads",
        "device",
        "seed",
        "enable_prefix_caching",
        "skip_tokenizer_init",
        "chat_template",
        "pooling_type",
    }
    assert fields(shoal.PoolingParams) == {"truncate_prompt_tokens", "dimensions", "normalize", "use_activation"}
    assert fields(shoal.EmbeddingRequestOutput) >= {"request_id", "outputs", "prompt_token_ids", "finished", "error"}
    assert fields(shoal.ScoringRequestOutput) >= {"request_id", "outputs", "prompt_token_ids", "finished", "error"}
    assert fields(shoal.RequestOutput) >= {
        "request_id",
        "prompt",
        "prompt_token_ids",
        "outputs",
        "finished",
        "prompt_logprobs",
        "num_cached_tokens",
        "metrics",
        "error",
    }
    assert fields(shoal.CompletionOutput) >= {
        "index",
        "text",
        "token_ids",
        "cumulative_logprob",
        "logprobs",
        "finish_reason",
        "stop_reason",
    }
    assert fields(outputs.Logprob) == {"logprob", "rank", "decoded_token"}
