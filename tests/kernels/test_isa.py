"""Every instruction set gives the same bits: the same operations in processes that are forced to use one each."""

from __future__ import annotations

import re

import pytest
from llvmlite import binding
from numba import config

from shoal.errors import ParameterError
from shoal.kernels.cpu import isa
from tests.kernels.runner import OLD_CPU, needs_x86, said_by_each_isa, said_with

AVX512_VNNI = "+avx512f,+avx512bw,+avx512vl,+avx512vnni"

PROGRAM = """
import hashlib
import numpy as np
from shoal.gguf.quants import format_named
from shoal.kernels.base import Norm, RawTensor
from shoal.kernels.cpu.backend import CPUBackend
from tests.kernels.mixtures import add_experts, random_mixture
from tests.kernels.ragged import make_case
from tests.kernels.runner import PagedAttention, multiply, rowwise
from tests.support.gguf_builder import random_rows

backend = CPUBackend(2)
digest = hashlib.sha256()
rng = np.random.default_rng(3)
for name in ("Q4_1", "Q8_0", "Q6_K", "F16"):
    fmt = format_named(name)
    raw = RawTensor("w", fmt, (40, 256), random_rows(fmt, (40, 256), rng, 0.05))
    for rows in (1, 6, 13):
        x = rng.standard_normal((rows, 256)).astype(np.float32)
        digest.update(multiply(backend, backend.matrix([raw]), x).tobytes())
x = rng.standard_normal((5, 192)).astype(np.float32) * 9
for activation in ("silu", "gelu", "relu2"):
    digest.update(rowwise(backend, x, lambda ops, r: ops.gated(r, activation)).tobytes())
weight = backend.vector(RawTensor("w", format_named("F32"), (192,), x[0].view(np.uint8)))
for centred in (False, True):
    digest.update(rowwise(backend, x, lambda ops, r: ops.norm(r, Norm(weight, 1e-5, centred))).tobytes())
mixture = random_mixture(("Q4_1", "Q8_0", "F16"))
x = rng.standard_normal((5, 64)).astype(np.float32)
digest.update(add_experts(backend, mixture.packed(backend), x, x).tobytes())
case = make_case(7, 1, 48, [300, 19])
for dtype in ("f16", "f32", "q8_0"):
    paged = PagedAttention(backend, case.shape, case.rope, case.pages, dtype, 400)
    digest.update(paged.run(*case.whole()).tobytes())
    digest.update(paged.run(*case.step([(0, 299, 300), (1, 18, 19)])).tobytes())
    slopes = tuple(0.5 ** (h + 1) for h in range(7))
    for changes in ({"window": 30}, {"soft_cap": 1.5}, {"slopes": slopes}):
        bent = case.bent(**changes)
        paged = PagedAttention(backend, bent.shape, None, case.pages, dtype, 400)
        digest.update(paged.run(*case.whole()).tobytes())
        digest.update(paged.run(*case.step([(0, 299, 300), (1, 18, 19)])).tobytes())
print(digest.hexdigest())
"""


SHORT_PROGRAM = """
import hashlib
import numpy as np
from shoal.gguf.quants import format_named
from shoal.kernels.base import RawTensor
from shoal.kernels.cpu.backend import CPUBackend
from tests.kernels.ragged import make_case
from tests.kernels.runner import PagedAttention, multiply
from tests.support.gguf_builder import random_rows

backend = CPUBackend(1)
digest = hashlib.sha256()
fmt = format_named("F16")
raw = RawTensor("w", fmt, (40, 64), random_rows(fmt, (40, 64), np.random.default_rng(3), 0.05))
x = np.random.default_rng(4).standard_normal((1, 64)).astype(np.float32)
digest.update(multiply(backend, backend.matrix([raw]), x).tobytes())
case = make_case(2, 1, 32, [40])
paged = PagedAttention(backend, case.shape, case.rope, case.pages, "f16", 40)
digest.update(paged.run(*case.whole()).tobytes())
print(digest.hexdigest())
"""


MANY_TOKENS = """
import hashlib
import numpy as np
from shoal.gguf.quants import format_named
from shoal.kernels.base import RawTensor
from shoal.kernels.cpu.backend import CPUBackend
from tests.kernels.runner import multiply
from tests.support.gguf_builder import random_rows

backend = CPUBackend(2)
digest = hashlib.sha256()
rng = np.random.default_rng(3)

def multiply_all(name, columns, change=lambda data: None):
    fmt = format_named(name)
    data = random_rows(fmt, (40, columns), rng, 0.05)
    change(data)
    x = rng.standard_normal((38, columns)).astype(np.float32)
    x[5], x[6] = 1, -1  # all of them the largest
    matrix = backend.matrix([RawTensor("w", fmt, (40, columns), data)])
    for rows in (2, 9, 38):
        digest.update(multiply(backend, matrix, x[:rows]).tobytes())

for name in ("Q4_0", "Q5_1", "Q4_K", "Q2_K", "Q6_K", "IQ3_XXS", "IQ2_S", "IQ4_NL", "Q8_0"):
    multiply_all(name, 2048 if name == "Q4_K" else 512)
multiply_all("Q4_0", 96, lambda data: data.reshape(-1, 18)[:, 2:].fill(255))
multiply_all("Q5_1", 96, lambda data: data.reshape(-1, 24)[:, 4:].fill(255))
multiply_all("Q8_0", 96, lambda data: data.reshape(-1, 34)[:, 2:].fill(128))
print(digest.hexdigest())
"""


ASSEMBLY = """
from shoal.kernels.cpu.compiling import assembly
from shoal.kernels.cpu.simd import dot_start, load_u8x64, tile_dot, tile_store, tile_zero_i32
from shoal.kernels.cpu.simd.panel_format import Product
from shoal.kernels.cpu.simd.panels import panel_product

product = panel_product(Product("int32", 512, 1, False, 3))

def products(args, chunk):
    product(args)
    tile_store(tile_dot(dot_start(tile_zero_i32((0, 0))), load_u8x64(args), args, 4), args, 64)

print(assembly(products))
"""


def test_every_instruction_set_gives_the_same_bits() -> None:
    assert len(set(said_by_each_isa(PROGRAM))) == 1


@needs_x86
def test_codes_unpacked_for_many_tokens_give_the_same_bits() -> None:
    """One type for every product of simd/panels.py, and the largest sums that int16 must hold."""
    sets = [name for name in isa.possible() if name != "portable"]
    assert len(set(said_with(MANY_TOKENS, [{"SHOAL_ISA": name} for name in sets]))) == 1


@needs_x86
@pytest.mark.parametrize(
    ("settings", "encoding"),
    [
        ({"NUMBA_CPU_NAME": "alderlake", "NUMBA_CPU_FEATURES": "", "SHOAL_ISA": ""}, "{vex}"),
        ({"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": AVX512_VNNI, "SHOAL_ISA": "avxvnni"}, "{evex}"),
        ({"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avxvnni", "SHOAL_ISA": ""}, "{vex}"),
    ],
)
def test_vnni_of_256_bits_is_encoded_as_the_cpu_has_it(settings: dict[str, str], encoding: str) -> None:
    """Which is compiled and assembled, but not run."""
    (assembly,) = said_with(ASSEMBLY, [settings])
    products = [line for line in assembly.splitlines() if "vpdpbusd" in line]
    assert len(products) == 8 * 8 + 4
    assert all(encoding in line and "%ymm" in line for line in products)


@needs_x86
@pytest.mark.skipif("avxvnni" not in isa.possible(), reason="needs a CPU with VNNI")
def test_vnni_of_256_bits_uses_nothing_of_avx512() -> None:
    (assembly,) = said_with(ASSEMBLY, [{"SHOAL_ISA": "avxvnni"}])
    assert "vpdpbusd" in assembly
    assert not re.search(r"%zmm|%k[0-7]|%ymm(1[6-9]|[23]\d)", assembly)


@needs_x86
def test_a_cpu_with_few_instructions_gives_the_same_bits() -> None:
    """Halves are read and written, and everything is multiplied and added, without an instruction for it."""
    assert len(set(said_with(SHORT_PROGRAM, [{}, OLD_CPU]))) == 1


@needs_x86
@pytest.mark.slow
def test_all_kernels_give_the_same_bits_on_it() -> None:
    assert len(set(said_with(PROGRAM, [{}, OLD_CPU]))) == 1


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_ISA", "mmx")
    with pytest.raises(ParameterError, match=r"SHOAL_ISA.*mmx.*portable"):
        isa.choose()


@needs_x86
@pytest.mark.parametrize(
    ("name", "names", "has"),
    [
        ("x86-64", ["portable"], set()),
        ("x86-64-v2", ["portable"], set()),
        ("nehalem", ["portable"], set()),
        ("sandybridge", ["portable"], set()),
        ("ivybridge", ["portable"], {"f16c"}),
        ("haswell", ["avx2", "portable"], {"avx2", "fma", "f16c"}),
        ("x86-64-v4", ["avx2", "portable"], {"avx2", "fma", "f16c"}),
        ("alderlake", ["avxvnni", "avx2", "portable"], {"avx2", "fma", "f16c", "avxvnni"}),
    ],
)
def test_a_named_cpu_is_asked_for_what_it_has(
    monkeypatch: pytest.MonkeyPatch, name: str, names: list[str], has: set[str]
) -> None:
    monkeypatch.setattr(config, "CPU_NAME", name)
    monkeypatch.setattr(config, "CPU_FEATURES", "")
    assert isa.possible() == names
    assert isa.target_features() == has
    monkeypatch.setenv("SHOAL_ISA", "avx512vnni")
    with pytest.raises(ParameterError, match=rf"SHOAL_ISA.*avx512vnni.*portable.*\({name}\)"):
        isa.choose()


@needs_x86
def test_a_named_cpu_does_not_get_what_this_one_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "CPU_NAME", "x86-64-v2")
    monkeypatch.setattr(config, "CPU_FEATURES", None)
    assert isa.possible() == ["portable"]
    monkeypatch.setattr(config, "CPU_NAME", "one-that-llvm-does-not-know")
    assert isa.possible() == ["portable"]


@needs_x86
def test_features_that_are_switched_on_and_off_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "CPU_NAME", "haswell")
    monkeypatch.setattr(config, "CPU_FEATURES", "-avx2")
    assert isa.possible() == ["portable"]
    monkeypatch.setattr(config, "CPU_FEATURES", AVX512_VNNI)
    assert isa.possible() == ["avx512vnni", "avxvnni", "avx2", "portable"]


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("cortex-a72", ["portable"]),
        ("neoverse-n1", ["neon-dotprod", "portable"]),
        ("apple-m1", ["neon-dotprod", "portable"]),
        ("neoverse-v1", ["neon-i8mm", "neon-dotprod", "portable"]),
    ],
)
def test_an_arm64_cpu_is_asked_for_its_dot_products(
    monkeypatch: pytest.MonkeyPatch, name: str, names: list[str]
) -> None:
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    monkeypatch.setattr(binding, "get_process_triple", lambda: "aarch64-unknown-linux-gnu")
    monkeypatch.setattr(config, "CPU_NAME", name)
    monkeypatch.setattr(config, "CPU_FEATURES", "")
    assert isa.possible() == names
