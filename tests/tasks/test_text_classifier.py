"""What several finetunings of one model share, and what each of them trains."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.hub import hub_convert
from fm_jax.core import tree
from fm_jax.core.config import to_dict
from fm_jax.core.errors import ConfigError, DataError
from fm_jax.core.mesh import MeshConfig
from fm_jax.data.python_docs.docstrings import Examples
from fm_jax.data.text import tokenizer
from fm_jax.hub import families
from fm_jax.hub.pretrained import Pretrained
from fm_jax.models.language import decoder
from fm_jax.peft import lora
from fm_jax.tasks import language, text_classifier
from fm_jax.tasks.init import combining
from fm_jax.tasks.text_classifier import Config, Setup
from fm_jax.train import log, loop, stage
from tests.close import close

WORDS = "the cat sat on a mat and one dog ran to it".split()
CFG = Config(
    fit=loop.FitConfig(2, save_every=1),
    length=8,
    frozen_layers=1,
    lora=lora.Config(rank=2, alpha=4.0, trainable=("head/.*",)),
)


def setup(cfg: Config = CFG) -> Setup:
    module = decoder.Decoder(replace(decoder.tiny(), vocab_size=260))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), families.abstract(module))
    found = Pretrained(module, params, tokenizer.train([" ".join(WORDS)] * 3, 260))
    return Setup(found, ("no", "yes"), cfg, stage.open_mesh(cfg))


def examples(count: int) -> Examples:
    rng = np.random.default_rng(1)
    texts = tuple(" ".join(rng.choice(WORDS, 4)) for _ in range(count))
    labels = np.arange(count, dtype=np.int32) % 2
    return Examples(texts=texts, labels=labels, modules=("",) * count, classes=("no", "yes"), second=())


def test_each_method_divides_the_parameters_and_puts_them_together_again() -> None:
    made = setup()
    whole = tree.flatten(made.params("full", 0)[0])
    for method in text_classifier.METHODS:
        made.check(method)
        trained, frozen = made.params(method, 0)
        joined = tree.flatten(combining(method, CFG.lora)(trained, frozen))
        assert joined.keys() == whole.keys()
        same = {path for path, leaf in joined.items() if np.array_equal(leaf, whole[path])}
        assert same >= {path for path in whole if path.startswith("head/")}
        assert (same == set(whole)) == (method != "scratch"), method


def test_fits_of_one_method_and_rate_share_what_is_compiled_and_few_texts_make_a_small_batch(tmp_path: Path) -> None:
    made = setup()
    assert made.trainer("full", 1e-3) is made.trainer("full", 1e-3) is not made.trainer("full", 1e-2)
    rows = made.rows(examples(20), "train")  # fewer than a batch of 32, and no multiple of 8 devices
    quiet: dict[str, Any] = {"meta": {}, "store": False, "writer": log.Tee([])}
    params, trained = made.fit("probe", 1e-2, rows, 0, tmp_path, **quiet)
    assert set(tree.flatten(trained)) == {path for path in tree.flatten(params) if path.startswith("head/")}
    assert not list(tmp_path.iterdir())
    probabilities = made.probabilities(params, rows)
    assert probabilities.shape == (20, 2)
    close(probabilities.sum(axis=1), 1.0)
    assert text_classifier.scores(probabilities, rows).keys() == {"accuracy", "macro_f1", "calibration_error"}
    with pytest.raises(DataError, match="6 rows are fewer than one for each of 8 shards"):
        made.fit("probe", 1e-2, made.rows(examples(6), "train"), 0, tmp_path, **quiet)


def test_a_fit_that_goes_on_grafts_no_pretrained_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = setup(replace(CFG, batch_size=16))
    rows = made.rows(examples(16), "train")
    whole, _ = made.fit("frozen", 1e-2, rows, 0, tmp_path, meta={"config": {}}, writer=log.Tee([]))
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    begun: list[bool] = []
    own = made.params

    def counted(*given: Any) -> Any:
        trained, frozen = own(*given)
        begun.append(isinstance(jax.tree.leaves(trained)[0], jax.core.Tracer))
        return trained, frozen

    monkeypatch.setattr(made, "params", counted)
    again, _ = made.fit("frozen", 1e-2, rows, 0, tmp_path, meta={"config": {}}, writer=log.Tee([]))
    assert begun and all(begun)
    jax.tree.map(np.testing.assert_array_equal, whole, again)


@pytest.mark.parametrize("method", ["lora", pytest.param("frozen", marks=pytest.mark.slow)])
def test_a_classifiers_checkpoint_needs_no_data_and_no_base(
    method: text_classifier.Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = replace(CFG, batch_size=16, method=method, head="last")
    made = setup(cfg)
    rows = made.rows(examples(16), "train")
    meta = {"config": to_dict(cfg) | {"init": {"from": "gone/base", "revision": None}, "data": {"path": "gone"}}}
    whole, _ = made.fit(method, 1e-1, rows, 0, tmp_path / "run", meta=meta, writer=log.Tee([]))
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = language.load(tmp_path / "moved")
    assert found.module == made.model and found.labels == ("no", "yes")
    assert found.tokenizer is not None and found.tokenizer.fingerprint == made.tokenizer.fingerprint
    jax.tree.map(np.testing.assert_array_equal, dict(found.params), whole)

    hub_convert.run(hub_convert.Config(tmp_path / "moved", Path("public")), Path("work"))
    public = language.load("public")
    assert public.labels == ("no", "yes") and public.tokenizer is not None
    inputs = [np.stack([rows[index][name] for index in range(16)]) for name in made.fields]
    theirs, ours = (
        jax.jit(model.apply)({"params": jax.device_get(params)}, *inputs)
        for model, params in ((public.module, public.params), (made.model, whole))
    )
    np.testing.assert_array_equal(theirs, ours)


def test_a_batch_that_the_mesh_does_not_divide_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="batch_size 12 / accumulate 1 does not divide over 8 shards"):
        stage.open_mesh(replace(CFG, batch_size=12, mesh=MeshConfig()))
