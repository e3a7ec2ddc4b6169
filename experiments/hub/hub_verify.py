"""Compare a public checkpoint with `transformers`, layer by layer.

Idea: a small error, such as a wrong activation function, changes the logits too little for a loose tolerance to detect.
So both sides run on the same random tokens (some rows padded) or on the same noise images, and the output of every
layer (of every stage in a convolutional network) is compared, in units of its standard deviation: of each token's own
where there are tokens. The first layer that differs has the error; all layers after it differ because of it.

Both sides round to float32, and a model with massive activations (SmolLM2's residual stream grows from 6 to 250 within
one layer) magnifies rounding. So the judge is a third run: transformers in float64, also where its code asks for
float32. A layer is right if our error against it is within the tolerance, or at most four times that of transformers'
own float32 run, whose residual stream also carries the errors of earlier layers.

    ./launch.sh local experiments.hub.hub_verify --folder models/gpt2
    ./launch.sh local experiments.hub.hub_verify --folder openai-community/gpt2

It needs torch and transformers: `pip install torch transformers` (a CPU build of torch is enough).
Hardware: memory for three copies of the model in float32; no accelerator is needed.
Expected: for a correct conversion our largest error is 1e-6 to 1e-5, about that of transformers (MiniLM 6e-6, SmolLM2
with its massive activations 2e-4). If a layer is wrong, the exit status is 6. The errors are in results.json in both
cases.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fm_jax import cli
from fm_jax.core.config import check_least
from fm_jax.core.errors import CheckpointError, ConfigError, NumericError
from fm_jax.core.types import Featured, Params
from fm_jax.data.text import tokenizer as tokenizers
from fm_jax.evals.report import report, results
from fm_jax.hub import families, pretrained
from fm_jax.hub.example import Example, Size
from fm_jax.hub.files import stored
from fm_jax.hub.multimodal import clip
from fm_jax.interpret import capture
from fm_jax.layers.tap import Tap, is_stacked
from fm_jax.models.language.encoder import Encoder
from fm_jax.models.language.masked_lm import MaskedLM
from fm_jax.models.language.tagger import Tagger

Outputs = dict[str, np.ndarray]  # "embed", "layer 0", …, "final", and the named outputs
_FINAL = ("ln_f", "norm", "final_layer_norm")  # names in transformers of the norm after the last layer
_TIMES = 4  # our error may be this many times that of transformers in float32
_LEAST = 1e-3  # least deviation of a token, in deviations of the layer
_OUTPUTS = {
    "logits": "logits", "prediction_logits": "logits", "start_logits": "start", "end_logits": "end",
    "seq_relationship_logits": "pair", "sop_logits": "pair", "last_hidden_state": "final",
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """The checkpoint, the inputs and the tolerance."""

    folder: Path = Path("model")  # checkpoint folder, or OWNER/NAME
    ignore: tuple[str, ...] = ()  # unknown fields of its config.json that change no result
    rows: int = 3  # texts or images
    length: int = 24  # tokens of the longest row; the other rows are padded
    seed: int = 0
    tolerance: float = 5e-5  # error that is always allowed, in standard deviations of the layer's output

    def __post_init__(self) -> None:
        """Refuse an empty comparison."""
        check_least(self, rows=1, length=1, seed=0)
        if not self.tolerance > 0:
            raise ConfigError(f"tolerance must be above 0, not {self.tolerance}")


def draw(module: nn.Module, cfg: Config, pad: int = 0) -> Example:
    """Return random inputs: rows of tokens with decreasing lengths, or images."""
    size = Size(cfg.rows, cfg.length, pad)
    return families.writing(module).example(module, np.random.default_rng(cfg.seed), size)


def ours(module: nn.Module, params: Params, given: Example, *, headless: bool = False) -> Outputs:
    """Run our model; return every layer's output and the model's outputs.

    Args:
        module: our model.
        params: its parameters.
        given: inputs from `draw`.
        headless: leave out the outputs of the head: the folder is that of a model without one, such as GPT2Model.
    """
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
    outputs: Outputs = {}
    for name, site in sites.items():
        layers = [(f"{name} {i}", x) for i, x in enumerate(read[site])] if is_stacked(site) else [(name, read[site])]
        outputs |= {name: np.asarray(x) for name, x in layers}
    return outputs if headless else outputs | {name: np.asarray(x) for name, x in _named(module, out).items()}


def _named(module: nn.Module, out: Any) -> dict[str, Any]:
    """Return the head's outputs by name; {} for a model without a head, whose output is its last activation."""
    if isinstance(out, tuple):
        return {"start": out[0], "end": out[1]}
    if isinstance(module, Encoder | Featured):
        return {}
    if isinstance(out, dict):
        return out
    return {"logits": out[..., 0] if isinstance(module, Tagger) and module.num_labels == 1 else out}


def peer(folder: Path) -> Any:
    """Open a folder with transformers, as the class named in its config, in float32 and evaluation mode.

    Raises:
        ConfigError: transformers or torch is not installed.
        CheckpointError: transformers reports missing or unexpected weights.
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
    # a folder may lack the pooler of a model without a head, whose output is not compared
    if headless(kind.__name__):
        notes["missing_keys"] = [name for name in notes["missing_keys"] if not name.startswith("pooler.")]
    if odd := [f"{word} {sorted(map(str, notes[word]))[:5]}" for word in notes if notes[word]]:
        raise CheckpointError(f"transformers cannot read all of {folder} as {kind.__name__}: {'; '.join(odd)}")
    return model.eval().requires_grad_(False)


def theirs(model: Any, given: Example, names: Collection[str] = ()) -> Outputs:
    """Run the transformers model; return every layer's output and the model's outputs.

    Args:
        model: the transformers model.
        given: the inputs of our model.
        names: outputs to keep, if their model has more layers than ours has sites (EfficientNet's blocks).
    """
    inputs, config = given.inputs, model.config
    if model.dtype.itemsize == 8:  # images and noise in the model's dtype
        inputs = {name: x.astype(np.float64) if x.dtype == np.float32 else x for name, x in inputs.items()}
    if given.inside is None:
        arguments = {"pixel_values": inputs["image"].transpose(0, 3, 1, 2).copy()}
        outputs = _outputs(model, arguments | ({"noise": inputs["noise"]} if "noise" in inputs else {}), {})
        outputs = {name: x for name, x in outputs.items() if name in names} if names else outputs
        return {name: x.transpose(0, 2, 3, 1) if x.ndim == 4 else x for name, x in outputs.items()}
    arguments = {"input_ids": inputs.get("source", inputs["tokens"]), "attention_mask": given.inside}
    if "source" in inputs:
        arguments["decoder_input_ids"] = inputs["tokens"]
    if "types" in inputs:
        arguments["token_type_ids"] = inputs["types"]
    cache = {"use_cache": False} if hasattr(config, "use_cache") else {}
    return _outputs(model, {name: x.astype(np.int64) for name, x in arguments.items()}, cache)


def judged(model: Any, given: Example, mine: Outputs) -> tuple[Outputs, Outputs]:
    """Return the outputs of the transformers model in float32 and in float64; the model is float64 afterwards."""
    from transformers import modeling_utils

    names = mine if model.config.model_type == "efficientnet" else ()  # theirs also has the blocks of a stage
    torch: Any = modeling_utils.torch

    class Exact(torch.overrides.TorchFunctionMode):
        """Makes of every request for float32, as in norms, softmax and rotary tables, one for float64."""

        def __torch_function__(self, function: Any, types: Any, given: Any = (), options: Any = None) -> Any:
            function = torch.Tensor.double if function is torch.Tensor.float else function
            given = tuple(torch.float64 if x is torch.float32 else x for x in given)
            options = {name: torch.float64 if x is torch.float32 else x for name, x in (options or {}).items()}
            return function(*given, **options)

    rounded = theirs(model, given, names)
    with Exact():
        return rounded, theirs(model.double(), given, names)


def headless(kind: str) -> bool:
    """Say whether a class of transformers has no head, such as GPT2Model."""
    return re.fullmatch(r".*(?<!LMHead)Model", kind) is not None


def _outputs(model: Any, given: dict[str, Any], options: dict[str, Any]) -> Outputs:
    import transformers

    # a BatchEncoding converts arrays to torch tensors, so torch is not imported here
    tensors = transformers.BatchEncoding(given, tensor_type="pt")
    kept: dict[str, list[np.ndarray]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: Any, given: Any, options: Any, out: Any = None) -> None:
            value = given[0] if given else options["hidden_states"]
            value = value if out is None else out[0] if isinstance(out, tuple) else out
            if name not in kept or not name.endswith("embed"):  # a shared layer runs again at every depth
                kept.setdefault(name, []).append(value.numpy())

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
    flat = {f"{name} {i}" if name.endswith("layer") else name: x for name in kept for i, x in enumerate(kept[name])}
    return flat | {_OUTPUTS[name]: x.numpy() for name, x in out.items() if name in _OUTPUTS}


def _stacks(model: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name of the side, layers, norm after them or None) of a transformers model."""
    modules = dict(model.named_modules())
    lists = [name for name, module in modules.items() if type(module).__name__ == "ModuleList"]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    for name in outer:
        above = name.rpartition(".")[0]
        norms = [modules[f"{above}.{norm}"] for norm in _FINAL if f"{above}.{norm}" in modules]
        first = model.config.is_encoder_decoder and above.endswith("encoder")
        side = "encoder " if first or (model.config.model_type == "vit_mae" and name.startswith("vit.")) else ""
        layers = [layer for group in modules[name] for layer in getattr(group, "albert_layers", [group])]
        yield side, layers, norms[0] if norms else None


def compare(mine: Outputs, other: Outputs, exact: Outputs, given: Example, tolerance: float) -> list[dict[str, Any]]:
    """Return one row per layer and output: both sides' largest errors outside padding, in the token's deviations.

    Args:
        mine: our outputs.
        other: those of transformers in float32.
        exact: those of transformers in float64.
        given: the inputs.
        tolerance: error that is always allowed; more is right up to four times the error that `other` has in this
            layer or carries from earlier ones.

    Raises:
        CheckpointError: the two sides differ in layers or shapes.
    """
    if mine.keys() != other.keys() or any(mine[name].shape != other[name].shape for name in mine):
        shapes = [{name: list(x.shape) for name, x in side.items()} for side in (mine, other)]
        raise CheckpointError(
            f"the two models have different layers or shapes: {shapes[0]} here, {shapes[1]} in transformers"
        )
    lines, stream, carried = list[dict[str, Any]](), None, np.zeros(())
    for name in mine:
        sides, tokens = [mine[name], other[name], exact[name]], exact[name].ndim == 3
        inside, decoder = given.inside, "encoder embed" in mine and not name.startswith("encoder ")
        # the rows of an encoder-decoder's decoder have no padding
        if inside is not None and sides[2].shape[:2] == inside.shape and not decoder:
            sides = [side[inside] for side in sides]
        deviation = float(sides[2].std()) or 1.0
        # the next norm divides each token by its own deviation, and one token may be a hundred times the others
        scale = np.maximum(sides[2].std(axis=-1), _LEAST * deviation) if tokens else np.asarray(deviation)
        error, theirs_error = (_largest(side - sides[2], tokens) for side in sides[:2])
        # a residual stream keeps the error of its largest values when later layers take these away again
        this = (name.rpartition("layer ")[0], sides[2].shape) if "layer " in name else None
        carried = np.maximum(carried, theirs_error) if this and this == stream else theirs_error
        stream, limit = this, max(tolerance, _TIMES * float((carried / scale).max()))
        furthest, theirs_furthest = (float((side / scale).max()) for side in (error, theirs_error))
        lines.append(
            {
                "what": name, "std": deviation, "error": furthest, "theirs": theirs_furthest, "limit": limit,
                "": "ok" if furthest <= limit else "differs",  # NaN differs
            }
        )  # fmt: skip
    return lines


def _largest(difference: np.ndarray, tokens: bool) -> np.ndarray:
    """Return the largest difference of each token, or of all values."""
    return np.abs(difference).max(axis=-1) if tokens else np.abs(difference).max()


def config() -> Config:
    """Return the defaults; `folder` must be set."""
    return Config()


def debug() -> Config:
    """Return the same with short rows."""
    return Config(rows=2, length=8)


def run(cfg: Config, workdir: Path) -> Mapping[str, Any]:
    """Compare, print the table and write results.json; raise NumericError if a layer is wrong."""
    folder = pretrained.find(cfg.folder)
    if (file := stored.gguf_file(folder)) is not None:
        raise ConfigError(
            f"{file} is not a folder of transformers; convert it with hub_convert, and compare the result"
        )
    model = peer(folder)
    if model.config.model_type in clip.KINDS:
        raise ConfigError(f"{folder} is a {type(model).__name__}; models of images and texts cannot be compared yet")
    with jax.default_matmul_precision("highest"):
        loaded = pretrained.load(folder, ignore=cfg.ignore)
        given = draw(loaded.module, cfg, _padding(model.config, loaded.tokenizer))
        mine = ours(loaded.module, loaded.params, given, headless=headless(type(model).__name__))
    lines = compare(mine, *judged(model, given, mine), given, cfg.tolerance)
    heads = {"what": "layer", "std": "std", "error": "error / std", "theirs": "transformers'", "limit": "limit", "": ""}
    print(report.table(lines, heads))
    wrong = [line for line in lines if line[""] != "ok"]
    measured = {
        "model": type(model).__name__,
        "largest": max(line["error"] for line in lines),
        "tolerance": cfg.tolerance,
        "first_wrong": wrong[0]["what"] if wrong else "",
        "errors": {line["what"]: line["error"] for line in lines},
        "errors_of_transformers": {line["what"]: line["theirs"] for line in lines},
    }
    results.write(workdir / "results.json", measured)
    if wrong:
        raise NumericError(
            f"{folder} gives other results here than in transformers: {wrong[0]['what']} is the first to differ, "
            f"by {wrong[0]['error']:.2g} standard deviations from its result in float64 (tolerance {cfg.tolerance:g}, "
            f"its own float32 differs by {wrong[0]['theirs']:.2g})"
        )
    largest = f"{measured['largest']:.2g} standard deviations"
    print(f"{type(model).__name__}: equal within {largest} in all {len(lines)} layers and outputs")
    return measured


def _padding(theirs: Any, tokenizer: tokenizers.Tokenizer | None) -> int:
    """Return the padding id: the config's, else the tokenizer's, else 0."""
    if isinstance(getattr(theirs, "pad_token_id", None), int):
        return theirs.pad_token_id
    return tokenizer.pad_id if tokenizer is not None else 0


if __name__ == "__main__":
    cli.main(run, {"default": config, "debug": debug}, resumable=("*",))
