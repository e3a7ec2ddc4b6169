"""Plan an experiment: run it up to its training, compile the step there, and look for a setting that fits."""

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from fm_jax.core import config
from fm_jax.core.errors import ConfigError
from fm_jax.data.images import digits, pictures
from fm_jax.data.text import blank, corpus, documents
from fm_jax.models.language import decoder, encoder, encoder_decoder
from fm_jax.train import stage
from fm_jax.train.plan import step
from fm_jax.train.plan.report import Report, amount
from fm_jax.train.plan.target import Target, aimed

_TRIES = 4  # settings that are compiled where the given one does not fit; each takes as long as the first
_GIVEN = documents.Config(only=("json", "wsgiref", "email"))  # texts for the tokenizer of a model that is continued

_SCHEMES: dict[type, corpus.Scheme] = {
    decoder.Config: "bytes",
    encoder.Config: "wordpiece",
    encoder_decoder.Config: "t5",
}

Run = Callable[[Any, Path], Any]


def check(cfg: Any) -> None:
    """Refuse an experiment that trains nothing: neither its config nor a section of it is a stage's.

    Raises:
        ConfigError: it is so.
    """
    sections = (getattr(cfg, field.name) for field in fields(cfg))
    if not any(isinstance(one, stage.Plan) for one in (cfg, *sections)):
        raise ConfigError("--plan: this experiment trains nothing, so it has no step to compile")


def plan(
    run: Run, cfg: Any, target: Target, say: Callable[[str], None]
) -> tuple[Report, dict[str, str], Report | None]:
    """Return the report of a config and, where it does not fit, the nearest options that fit with their report.

    Raises:
        ConfigError: the experiment trains nothing, or computes something before it trains.
    """
    with tempfile.TemporaryDirectory(prefix="fm_jax_plan_") as scratch:
        used = _without_data(cfg, Path(scratch), say)
        report = compiled(run, used, target, Path(scratch))
        for line in report.lines():
            say(line)
        if report.fits:
            return report, {}, None
        for tried, other in enumerate(_alternatives(used, target, report)):
            if tried == _TRIES:
                break
            changed = {name: new for name, (_, new) in config.changes(used, other).items()}
            try:
                found = compiled(run, other, target, Path(scratch))
            except ConfigError:  # a mesh that does not divide this model
                continue
            say(f"tried {options(changed)}: peak {amount(found.memory.peak)}" + (", fits" if found.fits else ""))
            if found.fits:
                return report, changed, found
    return report, {}, None


def compiled(run: Run, cfg: Any, target: Target, workdir: Path) -> Report:
    """Run an experiment until it would train, and compile that step."""
    try:
        with aimed(target):
            run(cfg, workdir)
    except step.Compiled as stopped:
        return stopped.report
    except (AttributeError, RuntimeError, ValueError) as error:
        if not re.search(r"compile.only|addressable|no attribute 'local_devices'", str(error), re.IGNORECASE):
            raise
        raise ConfigError(
            "--plan: this experiment computes on its devices before it trains, so these options cannot be planned"
        ) from error
    raise ConfigError("--plan: this experiment trains nothing")


def options(changed: dict[str, str]) -> str:
    """Return changed keys as options of the command line."""
    return " ".join(f"--{name} {value}" for name, value in changed.items())


def _without_data(cfg: Any, scratch: Path, say: Callable[[str], None]) -> Any:
    """Return the config with blank data of the same shapes in place of a corpus or a folder of images."""
    data: Any = getattr(cfg, "data", None)
    model: Any = getattr(cfg, "model", None)
    scheme = next((scheme for kind, scheme in _SCHEMES.items() if isinstance(model, kind)), None)
    if isinstance(data, documents.Config) and scheme is not None:
        say("data: random words stand in for the corpus; the shapes are the same")
        if getattr(getattr(cfg, "init", None), "from_", None) is not None:
            return replace(cfg, data=_GIVEN)
        length = max(model.max_length, getattr(cfg, "length", 0))
        return replace(cfg, data=blank.write(scratch / "tokens", scheme, model.vocab_size, length))
    if isinstance(data, pictures.Config):
        classes = (
            "" if data.num_classes else "; a classifier's head has their 10 classes unless --data.num_classes is set"
        )
        say(f"data: built-in digits stand in for the images; the shapes are the same{classes}")
        return replace(cfg, data=replace(data, source=digits.Config()))
    return cfg


def _alternatives(cfg: Any, target: Target, report: Report) -> Iterator[Any]:
    """Yield other settings, those nearest to the given one first: the same batch, then a smaller one."""
    if not isinstance(cfg, stage.Plan):  # an experiment of several stages
        return
    ways = report.mesh["data"] * report.mesh["fsdp"]
    room = report.memory.usable - report.memory.weights - report.memory.optimizer
    split = cfg
    if room < report.memory.usable / 2 and report.mesh["data"] > 1:
        more = report.mesh["data"] * report.mesh["fsdp"]
        split = replace(cfg, mesh=replace(cfg.mesh, data=1, fsdp=more))
    most = max(cfg.batch_size // ways, 1)  # microbatches of one row on each chip
    needed = report.memory.activations / room if room > 0 and report.memory.activations else 2
    parts = cfg.accumulate
    while parts * 2 <= most and parts < cfg.accumulate * needed:
        parts *= 2
    parts = max(part for part in range(1, parts + 1) if cfg.batch_size % (part * ways) == 0)
    most = max(part for part in range(1, most + 1) if cfg.batch_size % (part * ways) == 0)
    seen = [cfg]
    lighter = _rematerialised(split)
    spread = replace(cfg.mesh, data=1, fsdp=max(ways // 2, 1), tensor=cfg.mesh.tensor * 2 if ways > 1 else 1)
    for other in (
        replace(split, accumulate=parts),
        replace(lighter, accumulate=parts),
        replace(lighter, accumulate=most),
        replace(lighter, accumulate=1, batch_size=ways),
        replace(lighter, accumulate=most, mesh=spread),
    ):
        if other not in seen:
            seen.append(other)
            yield other


def _rematerialised(cfg: Any) -> Any:
    """Return the config with `remat` full wherever one of its sections has that option."""
    if not is_dataclass(cfg) or isinstance(cfg, type):
        return cfg
    changed = {}
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        new = "full" if field.name == "remat" and value in ("none", "dots") else _rematerialised(value)
        if new is not value:
            changed[field.name] = new
    return replace(cfg, **changed) if changed else cfg
