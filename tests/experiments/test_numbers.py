"""Every whole number that an experiment reads: 0 and -1 mean something, or are refused by the option's name."""

import inspect
from typing import Any

import pytest

from fm_jax.core.config import apply_overrides
from fm_jax.core.errors import ConfigError
from fm_jax.core.options import members, options
from tests.experiments import test_every_experiment as every

MODULES = [x for x in vars(every).values() if inspect.ismodule(x) and x.__name__.startswith("experiments.")]

# options whose 0 means none, all, or only at the end
ZERO = set(
    """
    chunk close embed_size eval_every fill frozen_layers labels layers limit max_skipped num_classes num_fewshot
    num_types position_offset profile_at readers registers save_every seed small test_texts top_k train_batch
    tuning_seed validation_texts workers
    """.split()
)


def numbers(cfg: Any) -> list[str]:
    """Return the options that are whole numbers, except the mesh, which is checked against the devices."""
    return [o.path for o in options(cfg) if int in members(o.hint) and not o.path.startswith(SKIPPED)]


SKIPPED = ("mesh.", "pretrain.", "finetune.")  # the last two are the quickstart's stages, which are here themselves


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_no_number_that_means_nothing_is_taken(module: Any) -> None:
    cfg = module.debug()
    for path in numbers(cfg):
        name = path.rpartition(".")[2]
        for value in ("0", "-1") if name not in ZERO else ("-1",):
            if name == "small_size" or ".rope." in path:
                continue  # read with another option only, which decides what is said
            with pytest.raises(ConfigError, match=name):
                apply_overrides(cfg, [f"--{path}={value}"])


@pytest.mark.parametrize("name", ["batch_size", "accumulate", "fit.num_steps"])
def test_a_batch_of_nothing_names_itself(name: str) -> None:
    leaf = name.rpartition(".")[2]
    with pytest.raises(ConfigError, match=rf"{leaf} must be at least 1, not 0$"):
        apply_overrides(every.lm_pretrain.debug(), [f"--{name}=0"])
