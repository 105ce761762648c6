"""How fast a network could run at best: bytes over bandwidth, or multiply-adds over their peak, whichever takes longer.

Williams, Waterman and Patterson (2009), "Roofline". The share of it that a measurement reaches says how much is left to gain.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.bench.machine import Machine
from shoal.gguf.reader import GGUFFile
from shoal.models.config import ModelConfig

_KV_BYTES = 2  # f16


@dataclass(frozen=True, slots=True)
class NetworkCost:
    """What a network costs. ``weight_bytes`` are read once a pass; ``layer_macs`` are multiply-adds of one token in the
    layers' matrices, ``head_macs`` of one row of logits, ``attention_macs`` of one query against one position;
    ``kv_bytes`` is one position of the KV cache, all layers.
    """

    weight_bytes: int
    layer_macs: int
    head_macs: int
    attention_macs: int
    kv_bytes: int

    @classmethod
    def of(cls, file: GGUFFile) -> NetworkCost:
        """From the tensors of a file. An embedding that is not also the head costs nothing: only single rows are read."""
        config = ModelConfig.from_gguf(file)
        head = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
        layers = [info for name, info in file.tensors.items() if name.startswith("blk.") and len(info.shape) == 2]
        rows, columns = file.tensors[head].shape
        return cls(
            weight_bytes=sum(info.nbytes for info in layers) + file.tensors[head].nbytes,
            layer_macs=sum(info.shape[0] * info.shape[1] for info in layers),
            head_macs=rows * columns,
            attention_macs=2 * config.n_layers * config.n_heads * config.head_dim,
            kv_bytes=2 * config.n_layers * config.n_kv_heads * config.head_dim * _KV_BYTES,
        )


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes that must come from memory and multiply-adds that must be done."""

    num_bytes: float
    macs: float

    def floor_seconds(self, machine: Machine) -> float:
        """The least time on this machine: memory and arithmetic overlap perfectly, so the slower one decides."""
        return max(self.num_bytes / machine.read_bandwidth, self.macs / machine.mac_rate)


def decode_work(cost: NetworkCost, batch: int, context: float) -> Work:
    """One decode step of ``batch`` sequences, each attending to ``context`` positions (a mean over steps may be given).

    Weights are read once for all of them, each sequence's own KV once; activations stay in the cache.
    """
    return Work(
        num_bytes=cost.weight_bytes + batch * context * cost.kv_bytes,
        macs=batch * (cost.layer_macs + cost.head_macs + context * cost.attention_macs),
    )


def prefill_work(cost: NetworkCost, prompts: int, length: int, rows_per_step: int) -> Work:
    """The prefill of ``prompts`` prompts of ``length`` tokens in steps of ``rows_per_step`` rows.

    Weights are read once a step and KV is written once; a token attends to itself and all before it; only the last
    token of a prompt goes through the head.
    """
    tokens = prompts * length
    steps = -(-tokens // rows_per_step)
    attended = prompts * length * (length + 1) / 2
    return Work(
        num_bytes=steps * cost.weight_bytes + tokens * cost.kv_bytes,
        macs=tokens * cost.layer_macs + prompts * cost.head_macs + attended * cost.attention_macs,
    )
