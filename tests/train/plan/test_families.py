"""Every family's training step, compiled by the chips' own compilers: it fits, and nothing is held or sent for nothing.

Shallow and narrow models in bfloat16, through the experiments that train them. Needs libtpu and the CUDA plugin, but no
chip.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from experiments.language import bert_pretrain, lm_pretrain, t5_pretrain
from experiments.vision import efficientnet_imagenet, mae_pretrain, resnet_imagenet, simclr_pretrain, vit_imagenet
from fm_jax.core import sharding, tree
from fm_jax.core.mesh import MeshConfig
from fm_jax.models.language import decoder, encoder, encoder_decoder
from fm_jax.models.vision import mae, resnet, vit
from fm_jax.train import stage
from fm_jax.train import state as states
from fm_jax.train.plan import hlo, search, target
from fm_jax.train.plan import step as planned
from fm_jax.train.plan.report import Report

pytestmark = [pytest.mark.slow, pytest.mark.compilers]

LAYERS = 3  # no other dimension has this size
VOCABULARY = 16_384
LARGE = 500_000  # numbers of an array that is not cheaper to reduce whole, together with many others
SMALL = 100_000  # numbers of an array that each chip may hold whole: depthwise kernels, squeezes, norms
# A TPU's compiler joins the many small kernels of these, up to ResNet's 1×1 from 1024 to 2048, in one exchange of 6 MB.
# No array of this EfficientNet is as large, so of its gradients the check of whole reductions says nothing.
CONVOLUTIONS = dict.fromkeys(("resnet", "efficientnet", "simclr"), 2_200_000)
SPLIT, WHOLE = MeshConfig(data=1, fsdp=8), MeshConfig(data=8)
NEEDED = {"v5e": "libtpu", "h200": "jax_plugins.xla_cuda12"}
KERNEL = {"v5e": 'custom_call_target="tpu_custom_call"', "h200": 'custom_call_target="__cudnn$fmha'}
# by ops/attention.py: a TPU's kernel from 512 tokens on, cuDNN's for even numbers; neither BERT's dropout nor T5's bias
FUSED = {"gpt2", "llama"}
BFLOAT16 = {"dtype": "bfloat16", "remat": "dots"}


def text(module: ModuleType, cfg: Any, model: Any, length: int = 128, **more: Any) -> tuple[ModuleType, Any]:
    small = replace(model, max_length=length, **BFLOAT16)
    return module, replace(cfg, model=small, batch_size=8192 // length, accumulate=1, **more)


def images(module: ModuleType, cfg: Any, backbone: Any, **more: Any) -> tuple[ModuleType, Any]:
    data = replace(cfg.data, size=64)
    return module, replace(cfg, backbone=backbone, data=data, batch_size=64, **more)


GPT2 = decoder.gpt(LAYERS, 512, 8, VOCABULARY)
LLAMA = decoder.llama(LAYERS, 512, 8, 4, 1408, VOCABULARY)
BERT = encoder.bert(LAYERS, 512, 8, VOCABULARY)
T5 = encoder_decoder.t5_v1_1(LAYERS, 512, 8, 1024, vocab_size=VOCABULARY)
RESNET = replace(resnet.resnet((1, 1), "bottleneck", 4.0), dtype="bfloat16")  # as wide as the last stages are
EFFICIENTNET = replace(efficientnet_imagenet.config().backbone, depth=0.1, image_size=64)
VIT = replace(vit.vit(LAYERS, 512, 8, 8, 64), **BFLOAT16)

FAMILIES: dict[str, tuple[ModuleType, Any]] = {
    "gpt2": text(lm_pretrain, lm_pretrain.CONFIGS["gpt2_small"](), GPT2, 512),
    "llama": text(lm_pretrain, lm_pretrain.CONFIGS["llama2_7b"](), LLAMA, 512),
    "bert": text(bert_pretrain, bert_pretrain.config(), BERT, short_length=64),
    "t5": text(t5_pretrain, replace(t5_pretrain.config(), length=128), T5),
    "resnet": images(resnet_imagenet, resnet_imagenet.config(), RESNET),
    "efficientnet": images(efficientnet_imagenet, efficientnet_imagenet.config(), EFFICIENTNET),
    "vit": images(vit_imagenet, vit_imagenet.config(), VIT),
    "mae": images(mae_pretrain, mae_pretrain.config(), mae.encoder(VIT), decoder=mae.decoder(LAYERS, 256, 8)),
    "simclr": images(simclr_pretrain, simclr_pretrain.config(), RESNET),
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step."""

    family: str
    report: Report
    text: str  # of its HLO
    program: hlo.Program
    layout: Any  # the model's parameters: shapes and shardings
    copies: int  # of the parameters among the weights: 2 with an EMA


def compiled(family: str, chips: str, mesh: MeshConfig, **changed: Any) -> Compiled:
    needed = NEEDED[chips.partition(":")[0]]
    if importlib.util.find_spec(needed.partition(".")[0]) is None or importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed: pip install --no-deps --target compilers -r .lock/compilers.txt")
    module, cfg = FAMILIES[family]
    cfg = replace(cfg, mesh=mesh, **changed)
    seen: dict[str, Any] = {}
    read, compile_step = hlo.read, planned.compile_step

    def reading(text: str) -> hlo.Program:
        seen["text"], seen["program"] = text, read(text)
        return seen["program"]

    def compiling(*args: Any, **options: Any) -> Report:
        seen["layout"] = options["layout"]
        return compile_step(*args, **options)

    with (
        mock.patch.object(hlo, "read", reading),
        mock.patch.object(planned, "compile_step", compiling),
        mock.patch.object(search, "_TRIES", 0),
    ):
        report, _, _ = search.plan(module.run, cfg, target.resolve(chips), lambda line: None)
    copies = 1 if getattr(cfg, "ema_decay", None) is None else 2
    return Compiled(family, report, seen["text"], seen["program"], seen["layout"], copies)


def faults(made: Compiled) -> set[str]:
    """Name every broken promise of a compiled step."""
    return set(_faults(made))


def _faults(made: Compiled) -> Iterator[str]:
    report, leaves, fsdp = made.report, tree.flatten(made.layout), made.report.mesh["fsdp"]
    chip = report.target.partition(":")[0]
    whole = 4 * report.parameters
    small = 4 * sum(size for leaf in leaves.values() if (size := math.prod(leaf.shape)) < SMALL)
    total = {kind: sum(one.bytes for one in report.collectives if one.kind == kind) for kind in hlo.KINDS}
    if not report.fits:
        yield "does not fit"
    if report.resharded:
        yield "involuntary rematerialisation"
    if fsdp == 1 and total["all-reduce"] > 1.5 * whole:
        yield "gradients are reduced more than once"
    if fsdp == 1 and total["all-gather"] + total["all-to-all"] > 0.05 * whole:
        yield "something is gathered"
    if report.memory.weights > made.copies * (1.1 * whole / fsdp + small):
        yield "parameters are not split"
    if (KERNEL[chip] in made.text) != (made.family in FUSED):
        yield "attention is not in the kernel, or in one that it should not have"
    if sum(report.flops.values()) < report.model_flops:  # most of all where the kernel's are not counted
        yield "FLOPs are missing"
    if report.memory.optimizer > 2.1 * whole / fsdp + 2 * small:
        yield "optimiser state is not split"
    stacks = {tuple(sorted(leaf.shape)) for path, leaf in leaves.items() if "blocks/" in path and len(leaf.shape) > 2}
    for one in made.program.collectives:
        if one.kind == "all-gather" and tuple(sorted(one.shape)) in stacks:
            yield "a whole stack is gathered"
        if fsdp > 1 and one.kind == "all-reduce" and math.prod(one.shape) > CONVOLUTIONS.get(made.family, LARGE):
            yield "gradients are reduced whole"


@pytest.mark.parametrize("chips", ["v5e:2x4", "h200:8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_split_step_gathers_one_layer_at_a_time_and_scatters_its_gradients(family: str, chips: str) -> None:
    assert faults(compiled(family, chips, SPLIT)) == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replicated_step_reduces_its_gradients_once(family: str) -> None:
    assert faults(compiled(family, "v5e:2x4", WHOLE)) == set()


def everywhere(leaves: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, PartitionSpec()), leaves)


@contextmanager
def replicated_optimizer() -> Iterator[None]:
    abstract = states.abstract

    def wrong(create: Any, params: Any, frozen: Any, mesh: Any) -> Any:
        state = abstract(create, params, frozen, mesh)
        everywhere = sharding.replicated(mesh)
        return state.replace(opt_state=jax.tree.map(lambda leaf: leaf.update(sharding=everywhere), state.opt_state))

    with mock.patch.object(states, "abstract", wrong):
        yield


@contextmanager
def whole_gradients() -> Iterator[None]:
    make = stage.optimizers.make

    def wrong(*args: Any) -> Any:
        tx = make(*args)
        return tx._replace(update=lambda grads, *others: tx.update(everywhere(grads), *others))

    with mock.patch.object(stage.optimizers, "make", wrong):
        yield


@contextmanager
def whole_parameters() -> Iterator[None]:
    make = stage.make_train_step

    def wrong(*args: Any, combine: Any, **options: Any) -> Any:
        return make(*args, combine=lambda *parts: everywhere(combine(*parts)), **options)

    with mock.patch.object(stage, "make_train_step", wrong):
        yield


@contextmanager
def clashing_activations() -> Iterator[None]:
    def wrong(x: jax.Array, *names: str | None) -> jax.Array:
        if jax.sharding.get_abstract_mesh().empty:
            return x
        x = jax.lax.with_sharding_constraint(x, PartitionSpec("fsdp", None, "data"))
        return jax.lax.with_sharding_constraint(jnp.cos(x), PartitionSpec(None, ("fsdp", "data"), None))

    with mock.patch.object(decoder, "constrain", wrong):
        yield


@contextmanager
def no_memory() -> Iterator[None]:
    with mock.patch.object(target.Target, "usable", 1e6):
        yield


@pytest.mark.parametrize(
    ("broken", "mesh", "fault"),
    [
        (no_memory, SPLIT, "does not fit"),
        (replicated_optimizer, SPLIT, "optimiser state is not split"),
        (whole_gradients, SPLIT, "gradients are reduced whole"),
        (whole_parameters, SPLIT, "a whole stack is gathered"),
        (clashing_activations, MeshConfig(data=2, fsdp=4), "involuntary rematerialisation"),
    ],
)
def test_each_fault_would_be_found(broken: Callable[[], Any], mesh: MeshConfig, fault: str) -> None:
    with broken():
        assert fault in faults(compiled("gpt2", "h200:8", mesh))


def test_a_gradient_reduced_for_each_microbatch_would_be_found() -> None:
    assert "gradients are reduced more than once" in faults(compiled("gpt2", "h200:8", WHOLE, accumulate=2))
