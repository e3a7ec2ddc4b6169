"""What is heard of the compiler's words: the arrays that it gathers whole; its errors are passed on."""

import os

import jax
import pytest

from fm_jax.train.plan import warned

SAID = (
    "W0101 00:00:00.000000 7 spmd_partitioner.cc:1] [SPMD] Involuntary full rematerialization. The compiler cannot go "
    "from sharding {devices=[8,1]<=[8]} to {devices=[1,8]<=[8]} efficiently for HLO operation "
)


def test_arrays_gathered_whole_are_named_and_errors_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    with warned.heard() as whole:
        os.write(2, f'{SAID}%a.1 = f32[8,16]{{1,0}} add(%x), metadata={{op_name="jit(step)/add" b=1}}.\n'.encode())
        os.write(2, f"{SAID}%b = bf16[4] copy(%y).\n".encode())
        os.write(2, b"I0101 00:00:00.000000 7 chatter\nE0101 an error\n")
    assert whole == ["f32[8,16] in jit(step)/add", "bf16[4] in an unnamed operation"]
    assert capfd.readouterr().err == "E0101 an error\n"


def test_what_was_printed_before_a_failure_is_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), warned.heard():
        os.write(2, b"the reason\n")
        raise ValueError
    assert capfd.readouterr().err == "the reason\n"


def test_a_plan_neither_reads_nor_fills_the_compile_cache() -> None:
    before = jax.config.jax_enable_compilation_cache
    with warned.uncached():
        assert not jax.config.jax_enable_compilation_cache
    assert jax.config.jax_enable_compilation_cache == before
