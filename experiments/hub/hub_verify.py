"""Prove that a public checkpoint computes here what it computes in `transformers`, at every layer.

Idea: a wrong activation moves the logits of a model by less than a loose tolerance forgives, so both sides run on the
same random tokens, some rows padded, or on the same images of noise, and every layer's output (of a convolutional
network every stage's) is compared, in units of its standard deviation. The first line that is too far off names the
layer where to look: all lines below it are wrong because it is.

    ./launch.sh local experiments.hub.hub_verify --folder models/gpt2
    ./launch.sh local experiments.hub.hub_verify --folder openai-community/gpt2

Needs what nothing else here does: `pip install torch transformers` (a CPU build of torch is enough).
Hardware: memory for the model twice, in float32; no accelerator is needed.
Expected: the largest difference of a sound conversion is 1e-6 to 1e-5, and below 5e-5 at every layer. Exit status 6
otherwise; the table is kept in results.json either way.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fm_jax import cli
from fm_jax.core.errors import CheckpointError, ConfigError, NumericError
from fm_jax.core.types import Featured, Params
from fm_jax.data.text import tokenizer as tokenizers
from fm_jax.evals.report import report, results
from fm_jax.hub import families, pretrained
from fm_jax.hub.example import Example, Size
from fm_jax.interpret import capture
from fm_jax.layers.tap import Tap, is_stacked
from fm_jax.models.language.encoder import Encoder
from fm_jax.models.language.masked_lm import MaskedLM
from fm_jax.models.language.tagger import Tagger

Outputs = dict[str, np.ndarray]  # what is compared: "embed", "layer 0", …, "final", and the outputs by name
_FINAL = ("ln_f", "norm", "final_layer_norm")  # their names of the norm behind the last layer
_OUTPUTS = {
    "logits": "logits", "prediction_logits": "logits", "start_logits": "start", "end_logits": "end",
    "seq_relationship_logits": "pair", "sop_logits": "pair", "last_hidden_state": "final",
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """What to compare, on what, and how closely."""

    folder: str = "model"  # a folder that transformers opens, or OWNER/NAME
    rows: int = 3
    length: int = 24  # tokens of the longest row; the others are padded (of text)
    seed: int = 0
    tolerance: float = 5e-5  # largest difference, in standard deviations of the layer

    def __post_init__(self) -> None:
        """Refuse a comparison of nothing."""
        if min(self.rows, self.length) < 1 or not self.tolerance > 0:
            raise ConfigError("rows, length and tolerance must be above 0")


def draw(module: nn.Module, cfg: Config, pad: int = 0) -> Example:
    """Draw what the model reads: rows of text of falling length, or images."""
    size = Size(cfg.rows, cfg.length, pad)
    return families.writing(module).example(module, np.random.default_rng(cfg.seed), size)


def ours(module: nn.Module, params: Params, given: Example) -> Outputs:
    """Run our model and return what `theirs` returns."""
    sites = families.writing(module).sites(module)
    tap = Tap(read=tuple(sites.values()))

    @jax.jit
    def compute(params: Params, inputs: dict[str, jax.Array]) -> Any:
        out, read = capture.apply(module, params, tap=tap, **inputs)
        if isinstance(module, MaskedLM) and module.next_sentence:
            hidden = module.apply({"params": params}, **inputs, method="hidden")
            out = {"logits": out, "pair": module.apply({"params": params}, hidden, method="pair")}
        return out, read

    out, read = compute(params, jax.tree.map(jnp.asarray, given.inputs))
    found: Outputs = {}
    for name, site in sites.items():
        layers = [(f"{name} {i}", x) for i, x in enumerate(read[site])] if is_stacked(site) else [(name, read[site])]
        found |= {name: np.asarray(x) for name, x in layers}
    return found | {name: np.asarray(x) for name, x in _named(module, out).items()}


def _named(module: nn.Module, out: Any) -> dict[str, Any]:
    """Return the outputs of a head by their names; those of a model without one are its last activation."""
    if isinstance(out, tuple):
        return {"start": out[0], "end": out[1]}
    if isinstance(module, Encoder | Featured):
        return {}
    if isinstance(out, dict):
        return out
    return {"logits": out[..., 0] if isinstance(module, Tagger) and module.num_labels == 1 else out}


def peer(folder: Path) -> Any:
    """Open a folder with transformers, as the class that its config names, in float32 and evaluation mode.

    Raises:
        ConfigError: transformers or torch is not installed.
        CheckpointError: transformers misses a weight, or has one too many.
    """
    try:
        import transformers

        if not transformers.utils.is_torch_available():
            raise ImportError("torch")
    except ImportError:
        raise ConfigError("the comparison needs torch and transformers: pip install torch transformers") from None
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])
    model, notes = kind.from_pretrained(
        folder, dtype="float32", attn_implementation="eager", output_loading_info=True, use_safetensors=None
    )
    if odd := [f"{word} {sorted(map(str, notes[word]))[:5]}" for word in notes if notes[word]]:
        raise CheckpointError(
            f"transformers does not read {folder} as {kind.__name__} without a loss: {'; '.join(odd)}"
        )
    return model.eval().requires_grad_(False)


def theirs(model: Any, given: Example, names: Collection[str] = ()) -> Outputs:
    """Run a model of transformers and return every layer's output and the model's.

    Args:
        model: of transformers.
        given: what ours was called with.
        names: what to keep, where their model has more layers than ours has places (EfficientNet's blocks).
    """
    inputs, config = given.inputs, model.config
    if given.inside is None:
        asked = {"pixel_values": inputs["image"].transpose(0, 3, 1, 2).copy()}
        found = _watched(model, asked | ({"noise": inputs["noise"]} if "noise" in inputs else {}), {})
        found = {name: x for name, x in found.items() if name in names} if names else found
        return {name: x.transpose(0, 2, 3, 1) if x.ndim == 4 else x for name, x in found.items()}
    asked = {"input_ids": inputs.get("source", inputs["tokens"]), "attention_mask": given.inside}
    if "source" in inputs:
        asked["decoder_input_ids"] = inputs["tokens"]
    if "types" in inputs:
        asked["token_type_ids"] = inputs["types"]
    cache = {"use_cache": False} if hasattr(config, "use_cache") else {}
    return _watched(model, {name: x.astype(np.int64) for name, x in asked.items()}, cache)


def _watched(model: Any, given: dict[str, Any], options: dict[str, Any]) -> Outputs:
    import transformers

    # what its tokenizers return makes torch's tensors, and nothing here has to name torch
    tensors = transformers.BatchEncoding(given, tensor_type="pt")
    found: dict[str, list[np.ndarray]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: Any, given: Any, options: Any, out: Any = None) -> None:
            value = given[0] if given else options["hidden_states"]
            value = value if out is None else out[0] if isinstance(out, tuple) else out
            if name not in found or not name.endswith("embed"):  # a shared layer is entered again at every depth
                found.setdefault(name, []).append(value.numpy())

        return hook

    hooks = []
    for side, layers, norm in _stacks(model):
        hooks.append(layers[0].register_forward_pre_hook(keep(f"{side}embed"), with_kwargs=True))
        hooks += [layer.register_forward_hook(keep(f"{side}layer"), with_kwargs=True) for layer in layers]
        if norm is not None:
            hooks.append(norm.register_forward_hook(keep(f"{side}final"), with_kwargs=True))
    out = model(**tensors, **options)
    for hook in hooks:
        hook.remove()
    flat = {f"{name} {i}" if name.endswith("layer") else name: x for name in found for i, x in enumerate(found[name])}
    return flat | {_OUTPUTS[name]: x.numpy() for name, x in out.items() if name in _OUTPUTS}


def _stacks(model: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name of the side, layers, norm behind them or None) of a model of transformers."""
    modules = dict(model.named_modules())
    lists = [name for name, module in modules.items() if type(module).__name__ == "ModuleList"]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    for name in outer:
        above = name.rpartition(".")[0]
        norms = [modules[f"{above}.{norm}"] for norm in _FINAL if f"{above}.{norm}" in modules]
        first = model.config.is_encoder_decoder and above.endswith("encoder")
        side = "encoder " if first or (model.config.model_type == "vit_mae" and name.startswith("vit.")) else ""
        yield side, list(modules[name]), norms[0] if norms else None


def compare(mine: Outputs, other: Outputs, given: Example, tolerance: float) -> list[dict[str, Any]]:
    """Return one line a layer and output: the largest difference at real tokens, in standard deviations of theirs.

    Raises:
        CheckpointError: the two sides have other layers, or outputs of other shapes.
    """
    if mine.keys() != other.keys() or any(mine[name].shape != other[name].shape for name in mine):
        shapes = [{name: list(x.shape) for name, x in side.items()} for side in (mine, other)]
        raise CheckpointError(f"not the same layers: here {shapes[0]}, in transformers {shapes[1]}")
    lines = []
    for name, want in sorted(other.items(), key=lambda pair: list(mine).index(pair[0])):
        got, decoder = mine[name], "encoder embed" in mine and not name.startswith("encoder ")
        inside = given.inside
        if inside is not None and want.shape[:2] == inside.shape and not decoder:  # a decoder's rows have no padding
            got, want = got[inside], want[inside]
        deviation = float(want.std()) or 1.0
        furthest = float(np.abs(got - want).max() / deviation)
        ok = bool(furthest <= tolerance)  # NaN is not
        lines.append({"what": name, "std": deviation, "difference": furthest, "": "ok" if ok else "differs"})
    return lines


def config() -> Config:
    """Return the defaults, which want a folder."""
    return Config()


def debug() -> Config:
    """Return the same on short rows."""
    return Config(rows=2, length=8)


def run(cfg: Config, workdir: Path) -> Mapping[str, Any]:
    """Compare, print the table, write results.json; raise NumericError where the two sides differ."""
    folder = pretrained.find(cfg.folder)
    model = peer(folder)
    with jax.default_matmul_precision("highest"):
        found = pretrained.load(folder)
        given = draw(found.module, cfg, _padding(model.config, found.tokenizer))
        mine = ours(found.module, found.params, given)
        fewer = mine if model.config.model_type == "efficientnet" else ()  # theirs has blocks inside a stage
        lines = compare(mine, theirs(model, given, fewer), given, cfg.tolerance)
    print(report.table(lines, {"what": "layer", "std": "std", "difference": "difference / std", "": ""}))
    wrong = [line for line in lines if line[""] != "ok"]
    measured = {
        "model": type(model).__name__,
        "largest": max(line["difference"] for line in lines),
        "tolerance": cfg.tolerance,
        "first_wrong": wrong[0]["what"] if wrong else "",
        "differences": {line["what"]: line["difference"] for line in lines},
    }
    results.write(workdir / "results.json", measured)
    if wrong:
        raise NumericError(
            f"{folder} computes something else here than in transformers: {wrong[0]['what']} is the first to differ, "
            f"by {wrong[0]['difference']:.2g} standard deviations (tolerance {cfg.tolerance:g})"
        )
    print(f"{type(model).__name__}: equal within {measured['largest']:.2g} standard deviations at {len(lines)} places")
    return measured


def _padding(theirs: Any, tokenizer: tokenizers.Tokenizer | None) -> int:
    """Return the id to pad with: that of the config, or else of the tokenizer, or 0."""
    if isinstance(getattr(theirs, "pad_token_id", None), int):
        return theirs.pad_token_id
    return tokenizer.pad_id if tokenizer is not None else 0


if __name__ == "__main__":
    cli.main(run, {"default": config, "debug": debug}, resumable=("*",))
