"""Going on from a Vision Transformer: the default computes in bfloat16, and what is trained stays in float32."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.vision import vit_finetune
from fm_jax.hub import pretrained
from fm_jax.models.vision import vit
from fm_jax.tasks import vision as vision_models
from fm_jax.tasks.init import Init, open_run
from tests.hub.forms import draw


def test_a_public_folder_is_computed_in_half_precision_and_kept_in_whole(tmp_path: Path) -> None:
    net = vit.ViT(vit.tiny())
    pretrained.save(tmp_path / "public", net, draw(net))
    cfg = replace(vit_finetune.debug(), init=Init(tmp_path / "public"), dtype=vit_finetune.config().dtype)
    found = vision_models.load(cfg.init.source)
    assert vit_finetune.adapted(found, cfg).dtype == "bfloat16"
    vit_finetune.run(cfg, tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert run is not None and {str(leaf.dtype) for leaf in jax.tree.leaves(run.params())} == {"float32"}


@pytest.mark.parametrize("method", ["finetune", "scratch"])
def test_from_scratch_only_the_form_is_taken(method: str, tmp_path: Path) -> None:
    net = vit.ViT(vit.tiny())
    pretrained.save(tmp_path / "public", net, given := draw(net))
    cfg = replace(vit_finetune.debug(), init=Init(tmp_path / "public"), learning_rate=0.0, method=method)  # type: ignore[arg-type]
    vit_finetune.run(cfg, tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert run is not None
    kernels = (params["embed"]["kernel"] for params in (given, run.params()["backbone"]))
    assert np.array_equal(*kernels) == (method == "finetune")
