"""Prove that a public checkpoint computes here what it computes in `transformers`, at every layer.

Idea: a wrong activation moves the logits of a model by less than a loose tolerance forgives, so both sides run on the
same random tokens, some rows padded, or on the same images of noise, and every layer's output (of a convolutional
network every stage's) is compared, in units of its standard deviation. The first line that is too far off names the
layer where to look: all lines below it are wrong because it is.

    ./launch.sh local experiments.hub_verify --folder models/gpt2
    ./launch.sh local experiments.hub_verify --folder openai-community/gpt2

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

from fm_jax import run as command_line
from fm_jax.core.errors import CheckpointError, ConfigError, NumericError
from fm_jax.core.types import Params
from fm_jax.data import tokenizer as tokenizers
from fm_jax.evals import report, results
from fm_jax.hub import pretrained
from fm_jax.interpret import capture
from fm_jax.layers.tap import Tap, is_stacked
from fm_jax.models.language.encoder import Encoder
from fm_jax.models.language.encoder_decoder import EncoderDecoder
from fm_jax.models.language.masked_lm import MaskedLM
from fm_jax.models.language.tagger import Tagger
from fm_jax.models.vision.efficientnet import EfficientNet
from fm_jax.models.vision.mae import MAE
from fm_jax.models.vision.vit import ViT

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


@dataclass(frozen=True)
class Rows:
    """Right-padded tokens and what the families want to know of them."""

    tokens: np.ndarray  # [B, T], padding has the pad token
    length: np.ndarray  # [B]
    types: np.ndarray  # [B, T], second half of each row 1 where the model has token types
    decoded: np.ndarray  # [B, T], what the decoder of an encoder-decoder reads: no padding

    @property
    def inside(self) -> np.ndarray:
        """Say which tokens are real: [B, T]."""
        return np.arange(self.tokens.shape[1]) < self.length[:, None]


@dataclass(frozen=True)
class Images:
    """Images, and for each patch the noise that decides whether a masked autoencoder sees it."""

    image: np.ndarray  # [B, H, W, C]
    noise: np.ndarray  # [B, N]; N is 0 where nothing is masked


def draw_images(module: nn.Module, cfg: Config) -> Images:
    """Draw images of the size that the model was made for, 224 × 224 where it names none."""
    rng, model = np.random.default_rng(cfg.seed), getattr(module, "backbone", module).cfg
    cut, side = getattr(model, "patches", None), getattr(model, "image_size", 224)
    size = cut.image_size if cut else (side, side)
    count = cut.grid[0] * cut.grid[1] if cut and isinstance(module, MAE) else 0
    image, noise = rng.normal(size=(cfg.rows, *size, model.in_channels)), rng.random((cfg.rows, count))
    return Images(image.astype(np.float32), noise.astype(np.float32))


def draw(module: nn.Module, cfg: Config, pad: int = 0) -> Rows:
    """Draw rows of falling length from the whole vocabulary but the pad token."""
    rng, model = np.random.default_rng(cfg.seed), getattr(module, "backbone", module).cfg
    time = min(cfg.length, model.max_length)
    length = np.maximum(1, time * np.arange(cfg.rows, 0, -1) // cfg.rows)
    inside = np.arange(time) < length[:, None]
    tokens, decoded = (rng.integers(0, model.vocab_size - 1, (cfg.rows, time)) for _ in range(2))
    tokens, decoded = (rows + (rows >= pad) for rows in (tokens, decoded))
    types = inside & (np.arange(time) >= length[:, None] // 2) & (getattr(model, "num_types", 0) > 1)
    whole = (np.where(inside, tokens, pad), length, types, decoded)
    return Rows(*(field.astype(np.int32) for field in whole))


def ours(module: nn.Module, params: Params, rows: Rows) -> Outputs:
    """Run our model and return what `theirs` returns."""
    bare = getattr(module, "backbone", module)
    inputs: tuple[Any, ...] = (rows.tokens,)
    options: dict[str, Any] = {}
    if isinstance(bare, EncoderDecoder):
        inputs = (rows.decoded, rows.tokens, rows.length)
    elif isinstance(module, Encoder | MaskedLM):
        options = {"segments": rows.inside.astype(np.int32)}
    elif module is not bare:
        inputs = (rows.tokens, rows.length)
    if getattr(bare.cfg, "num_types", 0) > 1:
        options["types"] = rows.types
    sides = ("encoder.", "") if isinstance(bare, EncoderDecoder) else ("",)
    names = ("embed", "block.resid_post") if isinstance(bare, Encoder) else ("embed", "block.resid_post", "final")
    tap = Tap(read=tuple(side + name for side in sides for name in names))

    @jax.jit
    def compute(params: Params, inputs: Any, options: Any) -> Any:
        out, read = capture.run(module, params, *inputs, tap=tap, **options)
        if isinstance(module, MaskedLM) and module.next_sentence:
            hidden = module.apply({"params": params}, *inputs, **options, method="hidden")
            out = {"logits": out, "pair": module.apply({"params": params}, hidden, method="pair")}
        return out, read

    out, read = compute(params, *jax.tree.map(jnp.asarray, (inputs, options)))
    found: Outputs = {}
    for site in tap.read:
        side, name = ("encoder ", site.removeprefix("encoder.")) if site.startswith("encoder.") else ("", site)
        layers = read[site] if is_stacked(site) else [read[site]]
        found |= {f"{side}layer {i}" if is_stacked(site) else side + name: np.asarray(x) for i, x in enumerate(layers)}
    if isinstance(out, tuple):
        out = {"start": out[0], "end": out[1]}
    elif isinstance(module, Encoder):
        out = {}
    elif not isinstance(out, dict):
        out = {"logits": out[..., 0] if isinstance(module, Tagger) and module.num_labels == 1 else out}
    return found | {name: np.asarray(x) for name, x in out.items()}


def ours_on_images(module: nn.Module, params: Params, images: Images) -> Outputs:
    """Run our model of images and return what `theirs_on_images` returns."""
    bare = getattr(module, "backbone", module)
    inputs = (images.image, images.noise) if isinstance(module, MAE) else (images.image,)
    sites: dict[str, str] = {"embed": "embed"}  # their name: ours
    if isinstance(bare, ViT):
        sites |= {"layer": "block.resid_post"}
    else:
        blocks = [bare.cfg.repeats(each) for each in bare.cfg.stages] if isinstance(bare, EfficientNet) else ()
        ends = np.cumsum(blocks) - 1 if blocks else range(len(bare.cfg.depths))  # theirs has no stages, only blocks
        sites |= {f"layer {end}": f"conv.stage{stage}" for stage, end in enumerate(ends, 1)}
    if module is bare:
        sites |= {"final": "final"}
    if isinstance(module, MAE):
        sites = {f"encoder {name}": f"encoder.{site}" for name, site in sites.items()} | sites
    run = jax.jit(lambda params, inputs: capture.run(module, params, *inputs, tap=Tap(read=tuple(sites.values()))))
    out, read = run(params, tuple(map(jnp.asarray, inputs)))
    found: Outputs = {}
    for name, site in sites.items():
        stacked = [(f"{name} {i}", x) for i, x in enumerate(read[site])] if is_stacked(site) else [(name, read[site])]
        found |= {name: np.asarray(x) for name, x in stacked}
    return found if module is bare else found | {"logits": np.asarray(out)}


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


def theirs(model: Any, rows: Rows) -> Outputs:
    """Run a model of transformers and return every layer's output and the model's."""
    config = model.config
    given: dict[str, Any] = {"input_ids": rows.tokens, "attention_mask": rows.inside}
    if config.is_encoder_decoder:
        given["decoder_input_ids"] = rows.decoded
    if rows.types.any():
        given["token_type_ids"] = rows.types
    cache = {"use_cache": False} if hasattr(config, "use_cache") else {}
    return _watched(model, {name: x.astype(np.int64) for name, x in given.items()}, cache)


def theirs_on_images(model: Any, images: Images, names: Collection[str]) -> Outputs:
    """Run a model of transformers on images and return what is named of every layer's output and the model's."""
    given = {"pixel_values": images.image.transpose(0, 3, 1, 2).copy()}
    found = _watched(model, given | ({"noise": images.noise} if images.noise.size else {}), {})
    if model.config.model_type == "efficientnet":  # blocks inside a stage
        found = {name: x for name, x in found.items() if name in names}
    return {name: x.transpose(0, 2, 3, 1) if x.ndim == 4 else x for name, x in found.items()}


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


def compare(mine: Outputs, other: Outputs, rows: Rows | Images, tolerance: float) -> list[dict[str, Any]]:
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
        if (
            isinstance(rows, Rows) and want.shape[:2] == rows.tokens.shape and not decoder
        ):  # a decoder's rows have no padding
            got, want = got[rows.inside], want[rows.inside]
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
        rows, mine, other = _both(cfg, found, model)
        lines = compare(mine, other, rows, cfg.tolerance)
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


def _both(cfg: Config, found: pretrained.Pretrained, model: Any) -> tuple[Rows | Images, Outputs, Outputs]:
    """Return what both sides read, and what each makes of it."""
    if hasattr(getattr(found.module, "backbone", found.module).cfg, "in_channels"):
        images = draw_images(found.module, cfg)
        mine = ours_on_images(found.module, found.params, images)
        return images, mine, theirs_on_images(model, images, mine)
    rows = draw(found.module, cfg, _padding(model.config, found.tokenizer))
    return rows, ours(found.module, found.params, rows), theirs(model, rows)


def _padding(theirs: Any, tokenizer: tokenizers.Tokenizer | None) -> int:
    """Return the id to pad with: that of the config, or else of the tokenizer, or 0."""
    if isinstance(getattr(theirs, "pad_token_id", None), int):
        return theirs.pad_token_id
    return tokenizer.pad_id if tokenizer is not None else 0


if __name__ == "__main__":
    command_line.main(run, {"default": config, "debug": debug}, resumable=("*",))
