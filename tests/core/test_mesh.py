import math

import jax
import pytest
from jax.sharding import AxisType

from fm_jax.core.errors import ConfigError
from fm_jax.core.mesh import AXES, MeshConfig, make_mesh


@pytest.mark.parametrize(
    ("cfg", "sizes"),
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(data=1, fsdp=-1), (1, 8, 1, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2, 1)),
        (MeshConfig(fsdp=2, tensor=-1, data=1, sequence=2), (1, 2, 2, 2)),
    ],
)
def test_a_mesh_has_its_four_axes_and_every_device_once(cfg, sizes):
    mesh = make_mesh(cfg)
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == sizes
    assert set(mesh.devices.flat) == set(jax.devices())
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_a_mesh_takes_the_devices_it_is_given():
    mesh = make_mesh(MeshConfig(tensor=2), jax.devices()[:4])
    assert mesh.shape == {"data": 2, "fsdp": 1, "tensor": 2, "sequence": 1}
    assert math.prod(mesh.devices.shape) == 4


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (MeshConfig(tensor=3), "mesh.data cannot be filled: 8 devices are not divisible by 3"),
        (
            MeshConfig(data=2, tensor=2),
            "data 2 × fsdp 1 × tensor 2 × sequence 1 = 4 does not match the 8 available",
        ),
        (MeshConfig(fsdp=-1), "only one mesh axis may be -1, not data and fsdp"),
        (MeshConfig(tensor=0), "at least 1"),
        (MeshConfig(data=-2), "at least 1"),
    ],
)
def test_a_mesh_that_cannot_be_says_why(cfg, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(cfg)
