"""Generate text with a decoder, of a run or public: continue a prompt, or answer it through the model's chat template.

Papers: Holtzman et al. 2020 (top-p sampling). Idea: a decoder chooses one token after another, each from the
distribution that it predicts. The default is greedy: always the most probable token, as often used for comparisons.

    ./launch.sh local experiments.language.generate --init.from runs/quickstart/pretrain --prompt "Return the"
    ./launch.sh local experiments.language.generate --init.from models/SmolLM2 --chat true --prompt "Who are you?"
    ./launch.sh local experiments.language.generate --init.from models/gpt2 --prompt "Once" --temperature 0.8

`--init.from` is the work directory of an `lm_pretrain` run, a checkpoint folder, or OWNER/NAME. The text ends at the
end tokens of the checkpoint's generation_config.json, at a stop string, or after `--max_new_tokens`. Other settings of
generation_config.json are not applied: what is sampled is what the command says. Special tokens that are spelt out in
the prompt are text; `--special true` reads them as such.
Hardware: two cores and seconds for a model of 135 M parameters. Expected: the greedy text of `transformers`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from fm_jax import cli
from fm_jax.core.config import check_least
from fm_jax.core.errors import ConfigError
from fm_jax.data.text.tokenizer import Tokenizer
from fm_jax.evals.report import results
from fm_jax.generate import sample, text
from fm_jax.hub.pretrained import Dtype, Pretrained
from fm_jax.models.language.decoder import Decoder
from fm_jax.tasks import language
from fm_jax.tasks.init import Init


@dataclass(frozen=True)
class Config:
    """The model, the prompt, and how tokens are chosen."""

    init: Init = Init(Path("runs/lm_pretrain"))
    prompt: str = ""  # empty: a text from the model's start token
    chat: bool = False  # the prompt is a message, which the model answers
    system: str = ""  # with chat: the system message before it
    special: bool = False  # read special tokens in prompt and system as such
    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # sample from the k most probable tokens; 0: all
    top_p: float = 1.0  # sample from the most probable tokens with this total probability
    repetition_penalty: float = 1.0  # above 1: repeat less
    stop: tuple[str, ...] = ()  # strings that end the text
    dtype: Dtype | None = None  # computation dtype; none: the run's own, float32 for a folder
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible settings, and those that would have no effect."""
        sample.Config(self.temperature, self.top_k, self.top_p, repetition_penalty=self.repetition_penalty)
        check_least(self, max_new_tokens=1, seed=0)
        if self.system and not self.chat:
            raise ConfigError("system is a message of a chat; set chat true, or put it into the prompt")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ConfigError("top_k and top_p have no effect at temperature 0; set a temperature, such as 1.0")


def config() -> Config:
    """Return greedy generation from the model's start token."""
    return Config()


def debug() -> Config:
    """Return a few tokens of the model of `lm_pretrain --config debug --workdir runs/lm_pretrain_debug`."""
    return Config(Init(Path("runs/lm_pretrain_debug")), prompt="Return", max_new_tokens=8)


def run(cfg: Config, workdir: Path) -> dict[str, Any]:
    """Generate and print the text; return it with its prompt as the model read it, also written to results.json."""
    pretrained = language.load(cfg.init.source, revision=cfg.init.revision, dtype=cfg.dtype)
    if not isinstance(pretrained.module, Decoder) or pretrained.tokenizer is None:
        kind = type(pretrained.module).__name__
        raise ConfigError(f"{cfg.init.from_} is a {kind}; generation of text needs a decoder")
    ids = prompt_ids(cfg, pretrained, pretrained.tokenizer)
    (written,) = text.text(
        pretrained.module,
        pretrained.params,
        pretrained.tokenizer,
        [ids],
        max_new_tokens=cfg.max_new_tokens,
        cfg=sample.Config(cfg.temperature, cfg.top_k, cfg.top_p, repetition_penalty=cfg.repetition_penalty),
        key=jax.random.key(cfg.seed),
        generation=pretrained.generation,
        stop=cfg.stop,
        batch_size=1,
    )
    print(written)
    measured = {"prompt": pretrained.tokenizer.decode(ids, keep_special=True), "text": written, "tokens": len(ids)}
    results.write(workdir / "results.json", measured)
    return measured


def prompt_ids(cfg: Config, pretrained: Pretrained, tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of the prompt, in the tokenizer's frame or the chat template's."""
    if cfg.chat:
        system = [{"role": "system", "content": cfg.system}] if cfg.system else []
        messages = [*system, {"role": "user", "content": cfg.prompt}]
        return tokenizer.encode_chat(messages, trusted=cfg.special, add_generation_prompt=True).tolist()
    if ids := tokenizer.encode_pair(cfg.prompt, special=cfg.special).ids.tolist():
        return list(ids)
    # A text from nothing begins as the training documents did: after the start token, or the end of another.
    stated = pretrained.generation.start_id if pretrained.generation else None
    return [tokenizer.start_id if stated is None else stated]


if __name__ == "__main__":
    cli.main(run, {"default": config, "debug": debug}, resumable=("*",))
