"""Which of a model the GPU computes, decided once, when it is loaded: all of it, nothing, or the head and its last layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from shoal.engine.draft_file import DraftFile, open_draft
from shoal.engine.memory_plan import MemoryPlan, draft_home, kv_dtype, plan_memory
from shoal.errors import GGUFError, MemoryLimitError, ParameterError, UnsupportedError
from shoal.gguf.reader import GGUFFile
from shoal.kernels.base import PAGE_SIZE, Backend
from shoal.kernels.load import find_device, load_backend
from shoal.kernels.split import Cut, SplitBackend
from shoal.models.config import ModelConfig
from shoal.models.weights import weights_by_owner
from shoal.params import EngineConfig

OnCompile = Callable[[str], None] | None


@dataclass(frozen=True, slots=True)
class Part:
    """What one backend holds of a model: how many layers, whether the head is there, bytes of weights (as in the file) and KV pages."""

    backend: str
    layers: int
    head: bool
    weights: int
    kv_cache: int


def open_backend(
    file: GGUFFile, config: EngineConfig, on_compile: OnCompile = None, draft: DraftFile | None = None
) -> tuple[Backend, EngineConfig]:
    """The backend that ``config`` asks for, and ``config`` with what was decided: where there is a GPU, ``device`` and ``gpu_layers``
    say what computes the model. The same model with that config is computed to the same bits, whatever memory is free then. A
    ``draft`` model has its share of the GPU's memory.

    Raises as ``load_backend``, and ParameterError for ``gpu_layers`` without a GPU or through the middle of an encoder.
    """
    if _declines(config):
        return load_backend("cpu", config.threads, on_compile), replace(config, device="cpu")
    if find_device(config.device) != "cuda":
        if config.gpu_layers not in ("auto", 0):
            raise ParameterError("gpu_layers", config.gpu_layers, "auto or 0: there is no GPU")
        return load_backend(config.device, config.threads, on_compile), config
    gpu = load_backend("cuda", None, on_compile, gpu_memory_utilization=config.gpu_memory_utilization)
    try:
        return _with_gpu(file, config, gpu, lambda: load_backend("cpu", config.threads, on_compile), draft)
    except BaseException:
        gpu.close()
        raise


def settled(file: GGUFFile, config: EngineConfig) -> EngineConfig:
    """The config that ``open_backend`` would decide for now."""
    if _declines(config):
        return replace(config, device="cpu")
    if find_device(config.device) != "cuda":
        return config
    with open_draft(file, config) as draft:
        backend, decided = open_backend(file, config, draft=draft)
    backend.close()
    return decided


def parts(file: GGUFFile, backend: Backend, model: ModelConfig, config: EngineConfig, plan: MemoryPlan) -> list[Part]:
    """What each of the backends that ``backend`` is made of holds, in the order of the layers."""
    owner_of = [backend.owners(f"blk.{layer}.")[0] for layer in range(model.n_layers)]
    found = []
    for owner, weights in weights_by_owner(file, backend).items():
        page_bytes = PAGE_SIZE * owner.kv_token_bytes(model.n_kv_heads, model.head_dim, kv_dtype(model, config))
        pages = sum(g.num_pages * sum(owner_of[layer] is owner for layer in g.layers) for g in plan.groups)
        head = owner in backend.owners("output.weight")
        found.append(Part(owner.name, owner_of.count(owner), head, weights, pages * page_bytes))
    return sorted(found, key=lambda part: part.head)


def unloaded_weights(file: GGUFFile, draft: DraftFile | None, backend: Backend) -> dict[Backend, int]:
    """Bytes of weights, as the files have them, that each of the backends is to get that ``backend`` is made of."""
    found = weights_by_owner(file, backend)
    if draft is not None:
        home = draft_home(backend)
        found[home] = found.get(home, 0) + draft.weights_bytes
    return found


def _declines(config: EngineConfig) -> bool:
    """Whether nothing is for the GPU, so that none need be there."""
    return config.gpu_layers == 0 and config.device in ("auto", "cuda")


def _with_gpu(
    file: GGUFFile, config: EngineConfig, gpu: Backend, load_cpu: Callable[[], Backend], draft: DraftFile | None
) -> tuple[Backend, EngineConfig]:
    try:
        model = ModelConfig.from_gguf(file)
    except (GGUFError, UnsupportedError):  # whoever loads the model says why it cannot be
        return gpu, replace(config, device="cuda")
    fits = partial(_fits, file, model, config, draft)
    wanted = config.gpu_layers
    if wanted == "auto":
        wanted = "all" if fits(gpu) else 0 if model.arch.encoder else "auto"
    if wanted == "all" or (wanted != "auto" and int(wanted) > model.n_layers):
        return gpu, replace(config, device="cuda", gpu_layers="all")
    if model.arch.encoder and wanted != 0:
        raise ParameterError(
            "gpu_layers", wanted, f"0 or all: {model.architecture} is an encoder, which one device computes"
        )
    cpu = load_cpu()
    try:
        count = _most_layers(file, model, (cpu, gpu), fits) if wanted == "auto" else int(wanted)
    except BaseException:
        cpu.close()
        raise
    if count == 0:
        gpu.close()
        return cpu, replace(config, device="cpu", gpu_layers=0)
    return _split(file, model, (cpu, gpu), count), replace(config, device="cuda", gpu_layers=count)


def _split(file: GGUFFile, model: ModelConfig, both: tuple[Backend, Backend], gpu_layers: int) -> SplitBackend:
    """As llama.cpp counts: the head is the first to go to the GPU, then layers from the last on; the embedding stays."""
    cut = Cut(model.n_layers + 1 - gpu_layers, model.n_embd, tied="output.weight" not in file.tensors)
    return SplitBackend(*both, cut)


def _most_layers(
    file: GGUFFile, model: ModelConfig, both: tuple[Backend, Backend], fits: Callable[[Backend], bool]
) -> int:
    """The most of ``gpu_layers`` that fit, which are not all; 0 if nothing does."""
    counts = range(model.n_layers, 0, -1)
    return next((n for n in counts if fits(_split(file, model, both, n))), 0)


def _fits(file: GGUFFile, model: ModelConfig, config: EngineConfig, draft: DraftFile | None, backend: Backend) -> bool:
    """Whether there is memory for the weights and for the KV pages of one sequence of full length, or what the user wants of them."""
    unloaded = unloaded_weights(file, draft, backend)
    for owner, nbytes in unloaded.items():
        room = owner.memory_room()
        if room is not None and room.available < nbytes:
            return False
    try:
        plan_memory(model, 0, config, backend, unloaded=unloaded, draft=None if draft is None else draft.size)
    except MemoryLimitError:
        return False
    return True
