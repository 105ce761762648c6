"""``shoal inspect``: what is in a model file, whether shoal runs it, and how it would."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from shoal.cli.options import engine_options, model_argument
from shoal.cli.results import write_result
from shoal.errors import GGUFError, MemoryLimitError, UnsupportedError
from shoal.params import EngineConfig, SamplingParams

if TYPE_CHECKING:
    from shoal.engine.draft_file import DraftFile
    from shoal.engine.memory_plan import MemoryPlan
    from shoal.gguf.reader import GGUFFile
    from shoal.kernels.base import Backend

_TEMPLATE_LINES = 3
_LENGTHS = (512, 2048, 8192, 32768)
_TEMPLATE_WIDTH = 100


@click.command()
@model_argument(default=None)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--check-tensors", is_flag=True, help="Read all weights and look for NaN and Inf.")
@engine_options
def inspect(model: str, as_json: bool, check_tensors: bool, engine_config: EngineConfig) -> int:
    """Print what a model file holds, how much memory it takes, and whether shoal runs it. No weights are loaded.

    The exit code is 2 if --check-tensors finds something.
    """
    from shoal import hub
    from shoal.gguf.reader import GGUFFile

    with GGUFFile.open(hub.resolve(model)) as file:
        facts = model_facts(file, engine_config)
        problems = [str(error) for error in file.check_tensors()] if check_tensors else []
    if check_tensors:
        facts["bad_tensors"] = problems
    write_result(json.dumps(facts, indent=2) if as_json else "\n".join(_lines(facts)))
    return 2 if problems else 0


def model_facts(file: GGUFFile, config: EngineConfig) -> dict[str, Any]:
    """Everything that ``inspect`` tells, ready for JSON. Sizes are in bytes, lengths in tokens."""
    from shoal.engine.draft_file import open_draft
    from shoal.engine.placement import open_backend
    from shoal.models.sampling_defaults import sampling_defaults

    with open_draft(file, config) as draft:
        backend, config = open_backend(file, config, draft=draft)
        try:
            return {
                "file": {"path": str(file.path), "bytes": file.file_size, "gguf_version": file.version},
                "architecture": file.label("general.architecture"),
                "name": file.label("general.name"),
                **_support(file, config, backend, draft),
                "hyper_parameters": _hyper_parameters(file),
                "tensors": _tensors(file),
                "tokenizer": _tokenizer(file),
                "chat_template": _template(file, config),
                "sampling_defaults": sampling_defaults(file),
                "batching": _batching(file, backend),
            }
        finally:
            backend.close()


def _batching(file: GGUFFile, backend: Backend) -> dict[str, Any]:
    """How much faster sequences are together than alone, as last measured here, or how to measure it."""
    from shoal.bench.factor import last_measured, sweep_command

    found = last_measured(file.path, backend.describe())
    return {
        "measured": found.date if found else None,
        "throughput_factors": found.factors if found else {},
        "measure_with": sweep_command(file.path),
    }


def _support(file: GGUFFile, config: EngineConfig, backend: Backend, draft: DraftFile | None) -> dict[str, Any]:
    """Whether shoal runs the model and if not why; backend, memory and limits if it does."""
    from dataclasses import asdict

    from shoal.engine.memory_plan import plan_memory
    from shoal.engine.placement import parts, unloaded_weights
    from shoal.models.weights import check_supported, require_memory
    from shoal.system.machine_limits import limits_in_force

    facts: dict[str, Any] = {"backend": backend.describe(), "machine": limits_in_force()}
    try:
        model = check_supported(file, backend)
        weights = sum(info.nbytes for info in file.tensors.values())
        require_memory(file, backend)
        unloaded, size = unloaded_weights(file, draft, backend), None if draft is None else draft.size
        plan = plan_memory(model, weights, config, backend, unloaded=unloaded, draft=size)
    except (UnsupportedError, GGUFError, MemoryLimitError) as error:
        return {"supported": False, "reason": str(error), **facts}
    lengths = [length for length in _LENGTHS if length < plan.max_model_len] + [plan.max_model_len]
    facts["memory"] = {
        "weights": plan.weights_bytes,
        "kv_per_token": plan.kv_bytes_per_token,
        "kv_cache": plan.kv_bytes,
        "groups": [
            {
                "window": group.use.window,
                "layers": len(group.layers),
                "pages": group.num_pages,
                "page": group.page_bytes,
            }
            for group in plan.groups
        ],
        "parts": [asdict(part) for part in parts(file, backend, model, config, plan)],
        **_draft_memory(plan.draft),
        "tokens": plan.num_tokens,
        "sequences_that_fit": {str(length): plan.num_seqs(length) for length in lengths},
    }
    return {
        "supported": True,
        "reason": None,
        **facts,
        "embeddings": {
            "encoder": model.arch.encoder,
            "pooling": config.pooling_type or model.pooling_type,
            "pooling_of_file": model.pooling,
            "dimensions": model.n_embd,
        },
        "defaults": _defaults(config, plan.max_model_len, plan.kv_bytes),
    }


def _draft_memory(plan: MemoryPlan | None) -> dict[str, Any]:
    """What a draft model takes beside the model."""
    if plan is None:
        return {}
    sizes = {"weights": plan.weights_bytes, "kv_per_token": plan.kv_bytes_per_token, "kv_cache": plan.kv_bytes}
    return {"draft_model": {**sizes, "max_model_len": plan.max_model_len}}


def _defaults(config: EngineConfig, max_model_len: int, kv_bytes: int) -> dict[str, Any]:
    """What holds where nothing else is said."""
    return {
        "max_model_len": max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "kv_cache_memory": kv_bytes,
        "kv_cache_dtype": config.kv_cache_dtype,
        "max_tokens": f"{SamplingParams().max_tokens} in Python, the rest of the context in complete and chat",
        "seed": config.seed,
    }


def _hyper_parameters(file: GGUFFile) -> dict[str, Any]:
    """The architecture's own keys; of an array its length."""
    from shoal.gguf.header import shown

    prefix = file.label("general.architecture") + "."

    def fact(key: str, value: Any) -> Any:
        if isinstance(value, (str, bytes)):
            return file.label(key)
        return value if isinstance(value, (bool, int, float)) else f"array of {len(value)}"

    own = {key: value for key, value in file.metadata.items() if key.startswith(prefix)}
    return {shown(key.removeprefix(prefix)): fact(key, value) for key, value in own.items()}


def _tensors(file: GGUFFile) -> dict[str, Any]:
    counts = Counter(info.format.name for info in file.tensors.values())
    sizes: Counter[str] = Counter()
    for info in file.tensors.values():
        sizes[info.format.name] += info.nbytes
    types = {name: {"count": counts[name], "bytes": sizes[name]} for name, _ in sizes.most_common()}
    return {"count": counts.total(), "bytes": sizes.total(), "types": types}


def _tokenizer(file: GGUFFile) -> dict[str, Any]:
    from shoal.text.tokenizer import Tokenizer

    facts = {key: file.label(f"tokenizer.ggml.{key}") or None for key in ("model", "pre")}
    try:
        tokenizer = Tokenizer.from_gguf(file)
    except (UnsupportedError, GGUFError) as error:
        return {**facts, "error": str(error)}

    def shown(token: int | None) -> dict[str, Any] | None:
        return None if token is None else {"id": token, "text": tokenizer.decode([token])}

    return {
        **facts,
        "size": tokenizer.vocab_size,
        "bos": shown(tokenizer.bos_id),
        "eos": shown(tokenizer.eos_id),
        "end_of_generation": [
            {"id": token, "text": tokenizer.decode([token]), "source": source}
            for token, source in sorted(tokenizer.eog_sources.items())
        ],
    }


def _template(file: GGUFFile, config: EngineConfig) -> dict[str, Any]:
    """The file's template, and how answers are read: by what that shows, or the one of ``config``, or by what ``config`` names."""
    from shoal.chat.formats import reasoning_format_of, tool_format_of
    from shoal.requests.prompts import given_template

    source = file.label("tokenizer.chat_template")
    used = given_template(config.chat_template) or source
    reasoning = reasoning_format_of(used)
    return {
        "present": bool(source),
        "characters": len(source),
        "start": source.splitlines()[:_TEMPLATE_LINES],
        "tool_call_parser": config.tool_call_parser or (tool_format_of(used).name if used else "none"),
        "reasoning_parser": config.reasoning_parser or (reasoning.name if reasoning else "none"),
    }


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    """The facts for people: a heading a group, a line a fact."""
    file, tensors = facts["file"], facts["tensors"]
    yield f"{file['path']}  ({_size(file['bytes'])}, GGUF v{file['gguf_version']})"
    yield f"architecture   {facts['architecture']}  {facts['name']}"
    yield "supported      yes" if facts["supported"] else f"supported      no: {facts['reason']}"
    yield f"backend        {facts['backend']}"
    yield from _machine_lines(facts["machine"])
    yield from _group("hyper-parameters", facts["hyper_parameters"])
    rows = {name: f"{row['count']:4} tensors  {_size(row['bytes'])}" for name, row in tensors["types"].items()}
    yield from _group(f"tensors: {tensors['count']}, {_size(tensors['bytes'])}", rows)
    yield from _tokenizer_lines(facts["tokenizer"])
    yield from _template_lines(facts["chat_template"])
    if facts["sampling_defaults"]:
        yield from _group("sampling that the file recommends for chats", facts["sampling_defaults"])
    if facts["supported"]:
        yield from _embedding_lines(facts["embeddings"])
        yield from _memory_lines(facts["memory"], encoder=facts["embeddings"]["encoder"])
        yield from _batching_lines(facts["batching"])
        yield from _group("defaults in force", facts["defaults"])
    for problem in facts.get("bad_tensors", ()):
        yield f"bad tensor: {problem}"
    if facts.get("bad_tensors") == []:
        yield "\nall weights are finite"


def _group(title: str, rows: Mapping[str, Any]) -> Iterator[str]:
    yield f"\n{title}"
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        yield f"  {name:{width}}  {value}"


def _machine_lines(machine: Mapping[str, Any]) -> Iterator[str]:
    rows = {
        "cores": machine["affinity"],
        "CPU quota": machine["cpu_quota"] or "none",
        "memory limit": f"{_size(machine['memory_limit'])} ({machine['memory_limit_set_by']})",
        "available": _size(machine["memory_available"]),
    }
    yield from _group("what this process may use", rows)


def _tokenizer_lines(tokenizer: Mapping[str, Any]) -> Iterator[str]:
    if "error" in tokenizer:
        yield from _group("tokenizer", {"not usable": tokenizer["error"]})
        return
    rows = {"kind": f"{tokenizer['model']}, pre-tokenizer {tokenizer['pre']}", "tokens": tokenizer["size"]}
    for role in ("bos", "eos"):
        token = tokenizer[role]
        rows[role] = f"{token['id']} {token['text']!r}" if token else "none"
    yield from _group("tokenizer", rows)
    for end in tokenizer["end_of_generation"]:
        yield f"  ends a generation: {end['id']} {end['text']!r} ({end['source']})"


def _template_lines(template: Mapping[str, Any]) -> Iterator[str]:
    yield f"\nchat template: {template['characters']} characters" if template["present"] else "\nchat template: none"
    for line in template["start"]:
        yield f"  {line[:_TEMPLATE_WIDTH]}{'...' if len(line) > _TEMPLATE_WIDTH else ''}"
    yield from _group("answers in a chat", {name: template[name] for name in ("tool_call_parser", "reasoning_parser")})


def _embedding_lines(embeddings: Mapping[str, Any]) -> Iterator[str]:
    of_file = embeddings["pooling_of_file"]
    source = (
        "as the file says" if embeddings["pooling"] == of_file else f"of which the file says {of_file or 'nothing'}"
    )
    rows = {"pooling": f"{embeddings['pooling']}, {source}", "dimensions": embeddings["dimensions"]}
    kind = "an encoder: embeds texts and continues none" if embeddings["encoder"] else "a decoder: also continues texts"
    yield from _group("embeddings", {"model": kind} | rows)


def _memory_lines(memory: Mapping[str, Any], *, encoder: bool) -> Iterator[str]:
    rows = {"weights": _size(memory["weights"])}
    if encoder:
        yield from _group(
            "memory", rows | {"keys and values": f"{_size(memory['kv_cache'])}, those of one step in one layer"}
        )
        return
    rows["KV cache"] = f"{_size(memory['kv_cache'])}, {memory['kv_per_token']} bytes a token in all layers"
    for group in memory["groups"]:
        name = f"  window {group['window']}" if group["window"] else "  whole context"
        rows[name] = f"{group['layers']} layers: {group['pages']} pages, {_size(group['pages'] * group['page'])}"
    for part in memory["parts"] if len(memory["parts"]) > 1 else ():
        held = f"{part['layers']} layers{' and the head' if part['head'] else ''}"
        rows[f"  on {part['backend']}"] = (
            f"{held}: weights {_size(part['weights'])}, KV cache {_size(part['kv_cache'])}"
        )
    if "draft_model" in memory:
        draft = memory["draft_model"]
        rows["draft model"] = (
            f"weights {_size(draft['weights'])}, KV cache {_size(draft['kv_cache'])}, {draft['kv_per_token']} bytes a token"
        )
    for length, count in memory["sequences_that_fit"].items():
        rows[f"of {length} tokens"] = f"{count} sequences fit"
    yield from _group("memory", rows)


def _batching_lines(batching: Mapping[str, Any]) -> Iterator[str]:
    title = "throughput of sequences together, in times one alone"
    if batching["measured"] is None:
        yield from _group(title, {"not measured": f"`{batching['measure_with']}` measures it"})
        return
    rows = {
        f"prompts of {length}": "  ".join(f"{batch}: {factor:.2f}" for batch, factor in row.items())
        for length, row in batching["throughput_factors"].items()
    }
    yield from _group(title, rows | {"measured": batching["measured"]})


def _size(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):.1f} MiB"
