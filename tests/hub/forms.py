"""The forms of every family (tests/parity/*/FAMILY.py), and folders of such models made without the hub's writer."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from fm_jax.core import tree
from fm_jax.hub import families, table
from fm_jax.hub.fields import Fields
from tests.parity.all_families import FAMILIES

FORMS = {name: config for file in FAMILIES.values() for name, config in file.FORMS.items()}
FEW = tuple(name for file in FAMILIES.values() for name in file.FEW)


def build(config):
    """Return (module, family) of a config.json."""
    family, module = families.build(Fields(config, "config.json"))
    return module, family


def draw(module, seed=0, dtype="float32"):
    """Return random parameters, each leaf different from every other."""
    rng = np.random.default_rng(seed)
    shapes = tree.flatten(families.abstract(module))
    return tree.unflatten({path: jnp.asarray(rng.normal(0, 0.3, leaf.shape), dtype) for path, leaf in shapes.items()})


def tensors(module, params):
    """Return what the hub would store."""
    return dict(table.write(families.writing(module).table(module), params))


def write(folder, config, arrays, name="model.safetensors"):
    """Write a folder with the public library."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / name, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make(folder, name, seed=0, dtype="float32", **changed):
    """Write a folder of a form; return (module, its parameters)."""
    module, _ = build(FORMS[name])
    params = draw(module, seed, dtype)
    write(folder, {**FORMS[name], **changed}, tensors(module, params))
    return module, params


def assert_equal(got, want):
    """Compare two trees bit by bit."""
    assert tree.flatten(got).keys() == tree.flatten(want).keys()
    jax.tree.map(np.testing.assert_array_equal, got, want)
