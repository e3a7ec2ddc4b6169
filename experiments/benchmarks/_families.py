"""The families whose training step is measured: our model, a batch, our loss, and their class with its inputs.

To add one, add an entry to FAMILIES. All models are small enough for two cores and have no dropout, so that both sides
compute the same.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core import meta

from fm_jax.core.errors import NumericError
from fm_jax.core.types import LossFn, Params
from fm_jax.hub import example, families, pretrained
from fm_jax.models.language import decoder, encoder, encoder_decoder
from fm_jax.models.language.masked_lm import MaskedLM
from fm_jax.models.vision import efficientnet, mae, resnet, vit
from fm_jax.models.vision.classifier import ImageClassifier
from fm_jax.objectives import classify, language, masked_lm, reconstruct, seq2seq

Fields = dict[str, np.ndarray]
Size = tuple[int, int]
"""(rows, tokens of a row or height of an image)"""

CLASSES = 1000
LEARNING_RATE = 1e-4  # of AdamW, on both sides
_AGREE = 1e-4  # largest difference of the first losses, in nats (for an MAE in squared deviations)


@dataclass(frozen=True)
class Family:
    """One line of the table."""

    module: Callable[[bool], nn.Module]  # True: a model of the same form that compiles in seconds
    size: Size
    small: Size  # size of the batch for the small model
    batch: Callable[[nn.Module, np.random.Generator, Size], Fields]
    loss: Callable[[Callable[..., Any]], LossFn]
    theirs: str  # their class; a model saved by our hub opens as it
    inputs: Callable[[Mapping[str, np.ndarray]], Fields]  # our batch -> arguments of their forward pass, with labels
    uncompiled: str = ""  # why torch.compile is left out; "": it is not


def _tokens(module: nn.Module, rng: np.random.Generator, size: Size) -> Fields:
    """Draw rows and their next tokens; the last token has no next one."""
    cfg: Any = module.cfg
    tokens = rng.integers(0, cfg.vocab_size, size).astype(np.int32)
    weights = np.ones(size, np.float32)
    weights[:, -1] = 0
    return {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1), "weights": weights}


def _masked(module: nn.Module, rng: np.random.Generator, size: Size) -> Fields:
    """Draw rows of which 15 % are masked, the same in every step, because the peer cannot draw ours."""
    rows, time = size
    vocabulary: int = module.backbone.cfg.vocab_size
    tokens = rng.integers(0, vocabulary, size).astype(np.int32)
    count = max(1, round(0.15 * time))
    places = np.sort(rng.permuted(np.tile(np.arange(time), (rows, 1)), axis=1)[:, :count], axis=1).astype(np.int32)
    read = tokens.copy()
    np.put_along_axis(read, places, 1, axis=1)
    targets = np.take_along_axis(tokens, places, axis=1)
    return {"tokens": tokens, "weights": np.ones(size, np.float32), "read": read, "places": places, "targets": targets}


def _masked_loss(apply: Callable[..., Any]) -> LossFn:
    def given(_: Any, batch: Any) -> masked_lm.Masked:
        ones = batch["weights"][:, : batch["places"].shape[1]]
        return masked_lm.Masked(batch["read"], batch["places"], batch["targets"], ones)

    return masked_lm.masked_lm(apply, given)


def _masked_inputs(batch: Mapping[str, np.ndarray]) -> Fields:
    labels = np.full(batch["tokens"].shape, -100)
    np.put_along_axis(labels, batch["places"].astype(np.int64), batch["targets"].astype(np.int64), axis=1)
    return {"input_ids": batch["read"].astype(np.int64), "labels": labels}


def _pair(module: nn.Module, rng: np.random.Generator, size: Size) -> Fields:
    """Draw sources, and targets half as long."""
    rows, length = size
    cfg: Any = module.cfg
    source = rng.integers(1, cfg.vocab_size, size).astype(np.int32)
    targets = rng.integers(1, cfg.vocab_size, (rows, length // 2)).astype(np.int32)
    tokens = np.concatenate([np.zeros((rows, 1), np.int32), targets[:, :-1]], axis=1)
    weights, lengths = np.ones(targets.shape, np.float32), np.full(rows, length, np.int32)
    return {"source": source, "source_length": lengths, "tokens": tokens, "targets": targets, "weights": weights}


def _images(module: nn.Module, rng: np.random.Generator, size: Size) -> Fields:
    rows, side = size
    image = rng.normal(size=(rows, side, side, 3)).astype(np.float32)
    label = rng.integers(0, CLASSES, rows).astype(np.int32)
    return {"image": image, "label": label, "weights": np.ones(rows, np.float32)}


def _noisy(module: nn.Module, rng: np.random.Generator, size: Size) -> Fields:
    """Draw images, and the noise that decides which patches are masked."""
    batch = _images(module, rng, size)
    patches = (size[1] // module.backbone.cfg.patches.patch_size) ** 2
    return batch | {"noise": rng.random((size[0], patches)).astype(np.float32)}


def _pixels(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    return batch["image"].transpose(0, 3, 1, 2).copy()


def _labelled(batch: Mapping[str, np.ndarray]) -> Fields:
    return {"pixel_values": _pixels(batch), "labels": batch["label"].astype(np.int64)}


def _image_loss(apply: Callable[..., Any]) -> LossFn:
    return classify.softmax(apply, ("image",))


def _gpt(small: bool) -> nn.Module:
    cfg = decoder.gpt(2, 32, 4, 96, 32) if small else decoder.gpt(4, 256, 4, 8192)
    return decoder.Decoder(cfg)


def _llama(small: bool) -> nn.Module:
    sizes = (2, 32, 4, 2, 64, 96) if small else (4, 256, 4, 2, 704, 8192)
    return decoder.Decoder(decoder.llama(*sizes))


def _bert(small: bool) -> nn.Module:
    sizes = (2, 32, 4, 96) if small else (4, 256, 4, 8192)
    return MaskedLM(encoder.Encoder(encoder.bert(*sizes, dropout=0.0)))


def _t5(small: bool) -> nn.Module:
    cfg = encoder_decoder.t5(2, 32, 4, 64, 8, 96) if small else encoder_decoder.t5(3, 256, 4, 1024, 64, 8192)
    return encoder_decoder.EncoderDecoder(cfg)


def _vit(small: bool) -> nn.Module:
    cfg = vit.vit(2, 32, 4, 4, 16) if small else vit.vit(6, 256, 4, 16)
    return ImageClassifier(vit.ViT(cfg), CLASSES)


def _mae(small: bool) -> nn.Module:
    base = vit.vit(2, 32, 4, 4, 16) if small else vit.vit(6, 256, 4, 16)
    return mae.MAE(mae.decoder(1, 32, 4) if small else mae.decoder(4, 192, 4), vit.ViT(mae.encoder(base)))


def _resnet(block: Any, depths: tuple[int, ...]) -> Callable[[bool], nn.Module]:
    def make(small: bool) -> nn.Module:
        cfg = resnet.resnet(depths[:1] if small else depths, block, 0.25 if small else 1.0)
        # scales of 0 would keep the first loss from seeing most layers, and change no time
        return ImageClassifier(resnet.ResNet(replace(cfg, zero_init=False)), CLASSES)

    return make


def _efficientnet(small: bool) -> nn.Module:
    cfg = efficientnet.Config(drop_path=0.0, image_size=96)  # their padding is made for one size
    if small:
        cfg = replace(cfg, width=0.25, depth=0.1, image_size=64)
    return ImageClassifier(efficientnet.EfficientNet(cfg), CLASSES)


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        _gpt, (8, 256), (2, 16), _tokens, language.next_token, "GPT2LMHeadModel",
        lambda batch: dict.fromkeys(("input_ids", "labels"), batch["tokens"].astype(np.int64)),
    ),
    "llama": Family(
        _llama, (8, 256), (2, 16), _tokens, language.next_token, "LlamaForCausalLM",
        lambda batch: dict.fromkeys(("input_ids", "labels"), batch["tokens"].astype(np.int64)),
    ),
    "bert": Family(_bert, (8, 256), (2, 16), _masked, _masked_loss, "BertForMaskedLM", _masked_inputs),
    "t5": Family(
        _t5, (8, 256), (2, 16), _pair, seq2seq.seq2seq, "T5ForConditionalGeneration",
        lambda batch: {"input_ids": batch["source"].astype(np.int64), "labels": batch["targets"].astype(np.int64)},
    ),
    "resnet18": Family(
        _resnet("basic", (2, 2, 2, 2)), (8, 128), (2, 32), _images, _image_loss, "ResNetForImageClassification",
        _labelled,
    ),
    "resnet50": Family(
        _resnet("bottleneck", (3, 4, 6, 3)), (16, 64), (2, 32), _images, _image_loss, "ResNetForImageClassification",
        _labelled,
    ),
    "efficientnet_b0": Family(
        _efficientnet, (16, 96), (8, 64), _images, _image_loss, "EfficientNetForImageClassification", _labelled,
        "torch 2.13 needed minutes to compile it, and its gradient norm was wrong: 0.2456 instead of 0.2605",
    ),
    "vit": Family(_vit, (8, 224), (2, 16), _images, _image_loss, "ViTForImageClassification", _labelled),
    "mae": Family(
        _mae, (16, 224), (2, 16), _noisy, reconstruct.masked_patches, "ViTMAEForPreTraining",
        lambda batch: {"pixel_values": _pixels(batch), "noise": batch["noise"]},
    ),
}  # fmt: skip


def write(name: str, folder: Path, *, small: bool) -> dict[str, str]:
    """Write what both sides open: a checkpoint with random weights, our batch, and the same as their inputs.

    Returns:
        The paths of "folder", "batch" and "inputs".
    """
    family = FAMILIES[name]
    return written(name, family.module(small), family.small if small else family.size, folder)


def written(name: str, module: nn.Module, size: Size, folder: Path) -> dict[str, str]:
    """Write the same for another model of the family and another size of the batch."""
    family = FAMILIES[name]
    batch = family.batch(module, np.random.default_rng(0), size)
    paths = {"folder": folder / "model", "batch": folder / "batch.npz", "inputs": folder / "inputs.npz"}
    shutil.rmtree(paths["folder"], ignore_errors=True)  # of an earlier run, perhaps of another size
    pretrained.save(paths["folder"], module, _initialised(module))
    np.savez(paths["batch"], allow_pickle=False, **batch)
    np.savez(paths["inputs"], allow_pickle=False, **family.inputs(batch))
    return {kind: str(path.absolute()) for kind, path in paths.items()}


def check_losses(name: str, losses: Mapping[str, float]) -> None:
    """Raise NumericError unless every side had the loss of the first one in its first step."""
    first, loss = next(iter(losses.items()))
    if wrong := {side: other for side, other in losses.items() if not abs(other - loss) <= _AGREE}:
        raise NumericError(
            f"{name}: the first step's loss is {loss:.6f} in {first}, but {wrong}: the sides do not compute the same, "
            "so nothing is timed"
        )


def _initialised(module: nn.Module) -> Params:
    inputs = families.writing(module).example(module, np.random.default_rng(0), example.Size()).inputs
    params: Params = meta.unbox(jax.jit(module.init)(jax.random.key(0), **inputs)["params"])
    return params
